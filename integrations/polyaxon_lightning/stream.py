"""The resume stream: the whole training state, whatever the metrics say."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from polyaxon_lightning.framework import pl
from polyaxon_lightning.io import StreamCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from lightning.pytorch.callbacks import Checkpoint

    from polyaxon_tracking import CheckpointManager
else:
    Checkpoint = pl.callbacks.Checkpoint

__all__ = ["ResumeStream", "stream_io"]


class ResumeStream(Checkpoint):
    """Save the whole training state at the end of every epoch, and more often where asked.

    The last of a Trainer's callbacks, so that what it saves holds what the others have just done.
    """

    def __init__(
        self, checkpoints: CheckpointManager, every_n_train_steps: int | None, train_time_interval: timedelta | None
    ) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self._every_n_train_steps = every_n_train_steps
        self._interval = None if train_time_interval is None else train_time_interval.total_seconds()
        self._saved_step = -1
        self._saved_at = 0.0

    @property
    def best_model_path(self) -> str:
        """The newest checkpoint, as ``ckpt_path="best"`` reads it where no ``ModelCheckpoint`` says which is best."""
        latest = self.checkpoints.latest()
        return "" if latest is None else latest.path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps and time from here."""
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where `every_n_train_steps` or `train_time_interval` says so."""
        step = trainer.global_step
        if step == self._saved_step:  # gradients are being accumulated
            return
        due = bool(self._every_n_train_steps) and step % self._every_n_train_steps == 0
        if self._interval is not None:
            # One rank's clock decides for all: saving is collective.
            due = trainer.strategy.broadcast(due or time.monotonic() - self._saved_at >= self._interval)
        if due:
            self._save(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of every epoch, after validation and the other callbacks."""
        self._save(trainer, trainer.current_epoch + 1)

    def _save(self, trainer: pl.Trainer, epoch: int) -> None:
        step = trainer.global_step
        with stream_io(trainer, weights_only=True):
            # Every rank takes part, and the strategy writes on the first alone.
            if trainer.is_global_zero:
                with self.checkpoints.save(step, epoch) as path:
                    trainer.save_checkpoint(path, weights_only=False)
            else:
                trainer.save_checkpoint("", weights_only=False)
        self._saved_step, self._saved_at = step, time.monotonic()


@contextlib.contextmanager
def stream_io(trainer: pl.Trainer, *, weights_only: bool) -> Iterator[None]:
    """Have the strategy write and read the resume stream's files as they are, whatever plugin the user brought."""
    plugin = trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = StreamCheckpointIO(weights_only=weights_only)
    try:
        yield
    finally:
        trainer.strategy.checkpoint_io = plugin
