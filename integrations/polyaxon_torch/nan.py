"""Find NaN in tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["has_nan"]

_SAMPLES = 1 << 16


def has_nan(tensors: Iterable[Any]) -> bool:
    """Return whether one of `tensors` holds NaN; anything that is no tensor of real numbers is skipped.

    Of each tensor, at most 65,536 evenly spaced elements are read. That is enough because a loss that becomes NaN makes
    whole weights NaN in one step. Of a tensor that is distributed over ranks, only the part of this rank is read.
    """
    found = []
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not is_lazy(tensor):
            local: torch.Tensor = getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach()
            if local.layout is torch.strided and not local.is_meta:
                values = local.reshape(-1)
                found.append(values[:: 1 + len(values) // _SAMPLES].float().isnan().any())
    return any(bool(one) for one in found)
