"""Which checkpoints of a Trainer's ModelCheckpoints are saved in the background."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from polyaxon_lightning.framework import pl
from polyaxon_lightning.loggers import reads_no_checkpoint

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from polyaxon_lightning.checkpoint_io import DurableCheckpointIO
else:
    ModelCheckpoint = pl.callbacks.ModelCheckpoint

__all__ = ["save_in_background"]

_logger = logging.getLogger("polyaxon_tracking")


def save_in_background(trainer: pl.Trainer, io: DurableCheckpointIO) -> None:
    """Let ModelCheckpoints save in the background, unless something reads each file as soon as it is saved.

    A subclass may, and loggers that upload each checkpoint do: Lightning calls their ``after_save_checkpoint``.
    """
    if not all(map(reads_no_checkpoint, trainer.loggers)):
        _logger.info(
            "A logger of the Trainer reads each checkpoint that a ModelCheckpoint saves: those are saved in the "
            "foreground"
        )
        return
    for callback in trainer.checkpoint_callbacks:
        if type(callback) is ModelCheckpoint:
            if callback.save_last == "link":  # its target may never be written; equal states are linked anyway
                callback.save_last = True
            io.save_in_background(callback)
