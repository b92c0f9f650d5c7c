"""Save a training state of which every rank writes a part."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from polyaxon_lightning.framework import pl
from polyaxon_torch import has_nan

if TYPE_CHECKING:
    from polyaxon_tracking.training import TrainingSession

__all__ = ["save_sharded", "writes_itself", "writes_parts"]


def writes_itself(trainer: pl.Trainer) -> bool:
    """Return whether the strategy writes checkpoints without its `checkpoint_io`, as if each rank writes a part."""
    return type(trainer.strategy).save_checkpoint is not pl.strategies.Strategy.save_checkpoint


def writes_parts(trainer: pl.Trainer) -> bool:
    """Return whether each rank writes its own part of a checkpoint; each strategy has another private name for that."""
    strategy = trainer.strategy
    return (
        getattr(strategy, "_save_distributed_checkpoint", False)
        or getattr(strategy, "_state_dict_type", None) == "sharded"
        or isinstance(strategy, pl.strategies.DeepSpeedStrategy)
    )


def save_sharded(trainer: pl.Trainer, session: TrainingSession, epoch: int) -> None:
    """Write every rank's part to a directory of rank 0, which publishes the directory when all have written."""
    group, step = session.process_group, trainer.global_step
    nan = has_nan(trainer.lightning_module.parameters())
    with group.staging(functools.partial(session.checkpoints.stage, step, epoch, has_nan=nan)) as (staged, path):
        trainer.save_checkpoint(path, weights_only=False)
    with group.share_errors():
        if staged is not None:
            staged.commit()
