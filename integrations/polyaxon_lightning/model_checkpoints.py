"""Which checkpoints of a Trainer's ModelCheckpoints are saved in the background."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from polyaxon_lightning.framework import pl

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import Logger

    from polyaxon_lightning.checkpoint_io import DurableCheckpointIO
else:
    ModelCheckpoint = pl.callbacks.ModelCheckpoint
    Logger = pl.loggers.Logger

__all__ = ["attach_to_model_checkpoints"]

_logger = logging.getLogger("polyaxon_tracking")


def attach_to_model_checkpoints(trainer: pl.Trainer, io: DurableCheckpointIO, *, in_background: bool) -> None:
    """Let ModelCheckpoints save with `io`, in the background unless something reads each file as soon as it is saved.

    A subclass may, and loggers that upload each checkpoint do: Lightning calls their ``after_save_checkpoint``.
    """
    if in_background and not all(map(_reads_no_checkpoint, trainer.loggers)):
        _logger.info(
            "A logger of the Trainer reads each checkpoint that a ModelCheckpoint saves: those are saved in the "
            "foreground"
        )
        in_background = False
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            is_plain = type(callback) is ModelCheckpoint
            if in_background and is_plain and callback.save_last == "link":
                callback.save_last = True  # the link's target may never be written; equal states are linked anyway
            io.attach(callback, in_background=in_background and is_plain)


def _reads_no_checkpoint(logger: Logger) -> bool:
    """Return whether `logger` does not read each checkpoint as soon as it is saved, as to upload it."""
    hook = type(logger).after_save_checkpoint
    quiet = (Logger, pl.loggers.TensorBoardLogger, pl.loggers.CSVLogger)
    # Lightning's loggers that upload artifacts have an option for it, which is off by default.
    return hook in {kind.after_save_checkpoint for kind in quiet} or getattr(logger, "_log_model", None) is False
