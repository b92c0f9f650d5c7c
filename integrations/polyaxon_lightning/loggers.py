"""The loggers of a Trainer: which of them read its checkpoints, or write outside the run's outputs path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from polyaxon_lightning.framework import pl

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from polyaxon_tracking.training import Run
else:
    Logger = pl.loggers.Logger

__all__ = ["reads_no_checkpoint", "warn_of_files_outside"]


def reads_no_checkpoint(logger: Logger) -> bool:
    """Return whether `logger` does not read each checkpoint as soon as it is saved, as to upload it."""
    hook = type(logger).after_save_checkpoint
    quiet = (Logger, pl.loggers.TensorBoardLogger, pl.loggers.CSVLogger)
    # Lightning's loggers that upload artifacts have an option for it, which is off by default.
    return hook in {kind.after_save_checkpoint for kind in quiet} or getattr(logger, "_log_model", None) is False


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
