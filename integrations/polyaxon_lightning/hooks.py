"""Which hooks of a callback Lightning calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyaxon_lightning.framework import pl

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
else:
    Callback = pl.callbacks.Callback

__all__ = ["skip_unused_hooks"]

_BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def skip_unused_hooks(callback: Callback) -> None:
    """Make Lightning skip the per-batch hooks that `callback` does not override.

    It calls whatever of a callback's hooks is callable, in microseconds each.
    """
    for hook in _BATCH_HOOKS:
        if getattr(type(callback), hook) is getattr(Callback, hook):
            setattr(callback, hook, None)
