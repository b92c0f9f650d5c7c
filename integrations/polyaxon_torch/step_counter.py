"""Notice the steps of torch's optimizers, also of those that a framework wraps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["StepCounter"]


class StepCounter:
    """Notice whether one of `optimizers` has made a step. Without optimizers, each `take` returns ``True``.

    Args:
        optimizers: torch's optimizers.
        on_begin: called when a step begins.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], on_begin: Callable[[], None]) -> None:
        self._has_stepped = not optimizers
        self._is_counting = bool(optimizers)
        self._on_begin = on_begin
        self._handles = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._begin),
                optimizer.register_step_post_hook(self._end),
            )
        ]

    def take(self) -> bool:
        """Return whether a step was made since the last call."""
        has_stepped, self._has_stepped = self._has_stepped, not self._is_counting
        return has_stepped

    def remove(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._on_begin()

    def _end(self, *_: Any) -> None:
        self._has_stepped = True
