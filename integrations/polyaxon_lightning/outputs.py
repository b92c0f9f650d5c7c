"""Put what a Trainer writes below the run's outputs path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from polyaxon_lightning.framework import pl

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import Logger

    from polyaxon_tracking.training import Run
else:
    ModelCheckpoint = pl.callbacks.ModelCheckpoint

__all__ = ["redirect_checkpoints", "warn_of_files_outside"]


def redirect_checkpoints(callbacks: list[Any], run: Run) -> None:
    """Give each ModelCheckpoint without a `dirpath` that of `run`; warn if another `dirpath` is outside the outputs."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            if callback.save_last == "link" and run.is_remote:  # a store has no links, and copies
                callback.save_last = True
            if callback.dirpath is None:
                callback.dirpath = run.checkpoints_path
            else:
                run.warn_if_outside(os.fspath(callback.dirpath))
                callback.dirpath = run.clean_path(os.fspath(callback.dirpath))  # checkpoints hold this path


def warn_of_files_outside(loggers: list[Logger], run: Run) -> None:
    """Warn if loggers write outside the outputs path of `run`; they create their files before any callback's hook."""
    for logger in loggers:
        if isinstance(logger, (pl.loggers.CSVLogger, pl.loggers.TensorBoardLogger)):
            name = type(logger).__name__
            run.warn_if_outside(
                os.fspath(logger.save_dir),
                f"The files of {name}",
                f"Pass Trainer(default_root_dir=callback.outputs_path), or {name}(callback.outputs_path)",
            )
