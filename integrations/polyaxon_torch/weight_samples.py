"""Samples of a model's weights, which show whether a callback has swapped other weights into the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from torch import nn

__all__ = ["WeightSamples"]

_SAMPLED_BYTES = 1 << 12


class WeightSamples:
    """Samples of the weights that `module` holds now. A copy of all weights would take too much memory.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._samples = _samples(module)

    def are_current(self) -> bool:
        """Return whether the model still holds the sampled weights."""
        now = _samples(self._module)
        return now.keys() == self._samples.keys() and all(torch.equal(now[key], self._samples[key]) for key in now)


def _samples(module: nn.Module) -> dict[Any, torch.Tensor]:
    """Return evenly spaced bytes of each parameter, by the parameter's address."""
    samples = {}
    for parameter in module.parameters():
        if type(parameter.data) is torch.Tensor and not is_lazy(parameter):
            storage = parameter.untyped_storage()
            content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            samples[storage.data_ptr()] = content[:: 1 + len(content) // _SAMPLED_BYTES].clone()
    return samples
