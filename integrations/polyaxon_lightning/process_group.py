"""Several processes of one Lightning training: no rank is left waiting in a collective, and how they are launched."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from polyaxon_lightning.framework import pl

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from polyaxon_torch import TorchProcessGroup

__all__ = ["Launch", "launching_trainer", "restore_saves", "share_errors_of_saves"]


def share_errors_of_saves(strategy: Strategy, process_group: TorchProcessGroup) -> None:
    """Make a save of `strategy` raise on every rank if it fails on rank 0, which writes.

    Otherwise the other ranks would wait for rank 0 forever. Lightning has no hook between the write and the barrier
    that follows it, so the strategy's method is replaced until `restore_saves`.
    """
    if not process_group.is_distributed:
        return
    save = type(strategy).save_checkpoint

    @functools.wraps(save)
    def save_checkpoint(*arguments: Any, **options: Any) -> None:
        with process_group.share_errors():
            save(strategy, *arguments, **options)

    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def restore_saves(strategy: Strategy) -> None:
    """Restore the strategy's own method that `share_errors_of_saves` replaced."""
    vars(strategy).pop("save_checkpoint", None)


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


class Launch(NamedTuple):
    """The record that a process leaves for the processes of a training that it launches."""

    pid: int
    """The process that launches; 0 if none does."""
    directory: str
    """The checkpoint directory."""
    ckpt_path: Any
    """The `ckpt_path` that ``fit`` was called with."""

    def is_of_this_process(self) -> bool:
        """Return whether this process was launched."""
        return self.pid not in (0, os.getpid())
