"""What the processes of one training agree on, where Lightning alone would leave one behind in a collective."""

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
    """The processes of one training, and how they tell each other what concerns them all."""

    def share_errors_of_saves(self, strategy: Strategy) -> None:
        """Have every rank raise where the first, which alone writes, could not: the others would wait for it for ever.

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
        """End what this began: the training is over, on all ranks."""
        vars(strategy).pop("save_checkpoint", None)
        self.close()


def launching_trainer() -> pl.Trainer | None:
    """Return the Trainer that is launching processes (``ddp_spawn``, ``ddp_fork``), or ``None``.

    Found in the call stack, because Lightning calls no hook in the process that launches.
    """
    launcher = pl.strategies.launchers._MultiProcessingLauncher  # noqa: SLF001
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        if isinstance(frame.f_locals.get("self"), launcher):
            # In a process that was forked, the launcher's own function is further in.
            return frame.f_locals.get("trainer") if frame.f_code.co_name == "launch" else None
    return None
