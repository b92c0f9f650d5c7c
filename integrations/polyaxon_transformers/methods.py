"""Replace methods of a Trainer for a while: no hook surrounds what they do."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import Trainer

__all__ = ["replaced_methods"]


@contextlib.contextmanager
def replaced_methods(trainer: Trainer, replacements: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace methods of `trainer` within the ``with`` block.

    Args:
        trainer: the Trainer.
        replacements: the new methods by name; each takes the previous method, and then the arguments of a call. A
            method that this version of the Trainer does not have is left out.
    """
    own: dict[str, Any] = {}
    for name, replacement in replacements.items():
        if (native := getattr(trainer, name, None)) is not None:
            own[name] = vars(trainer).get(name)
            setattr(trainer, name, functools.wraps(native)(functools.partial(replacement, native)))
    try:
        yield
    finally:
        for name, before in own.items():
            delattr(trainer, name)
            if before is not None:  # of another library
                setattr(trainer, name, before)
