"""The process group of a Lightning training, in which no rank is left waiting in a collective."""

from __future__ import annotations

import functools
import sys
import traceback
from typing import TYPE_CHECKING, Any

from polyaxon_lightning.framework import pl
from polyaxon_torch import TorchProcessGroup

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["LightningProcessGroup", "launching_trainer"]


class LightningProcessGroup(TorchProcessGroup):
    """The processes of one Lightning training."""

    def share_errors_of_saves(self, strategy: Strategy) -> None:
        """Make a save raise on every rank if rank 0, which writes, fails: the others would wait for it for ever.

        Lightning has no hook between the write and the barrier after it.
        """
        if not self.is_distributed:
            return
        save = type(strategy).save_checkpoint

        @functools.wraps(save)
        def save_checkpoint(*arguments: Any, **options: Any) -> None:
            with self.share_errors():
                save(strategy, *arguments, **options)

        strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    def restore_strategy(self, strategy: Strategy) -> None:
        """Restore the strategy's own `save_checkpoint` and close the process group, because the training is over."""
        vars(strategy).pop("save_checkpoint", None)
        self.close()


def launching_trainer() -> pl.Trainer | None:
    """Return the Trainer that is launching processes (``ddp_spawn``, ``ddp_fork``), or ``None``.

    Found in the call stack, because Lightning calls no hook in the process that launches.
    """
    launcher = pl.strategies.launchers._MultiProcessingLauncher  # noqa: SLF001
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        if isinstance(frame.f_locals.get("self"), launcher):
            # In a forked process, `launch` is not the innermost function of the launcher.
            return frame.f_locals.get("trainer") if frame.f_code.co_name == "launch" else None
    return None
