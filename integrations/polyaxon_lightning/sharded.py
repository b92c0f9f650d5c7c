"""Save a training state of which every rank writes a part."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from polyaxon_lightning.framework import pl
from polyaxon_torch import has_nan
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from polyaxon_tracking.training import Run, TrainingSession

__all__ = ["refuse_parts_in_store", "save_sharded", "writes_itself"]


def writes_itself(trainer: pl.Trainer) -> bool:
    """Return whether the strategy writes checkpoints without its `checkpoint_io`, as if each rank writes a part."""
    return type(trainer.strategy).save_checkpoint is not pl.strategies.Strategy.save_checkpoint


def refuse_parts_in_store(trainer: pl.Trainer, run: Run) -> None:
    """Raise a `TrackingError` if each rank would write its own part of a checkpoint to an object store."""
    if run.is_remote and _writes_parts(trainer.strategy):
        raise TrackingError(
            f"Received the outputs path {run.outputs_path}, in an object store, and a strategy that saves a checkpoint "
            f"in parts, {type(trainer.strategy).__name__}. Expected a volume that all machines share, or checkpoints "
            f"as one file, as with ModelParallelStrategy(save_distributed_checkpoint=False) or "
            f"FSDPStrategy(state_dict_type='full')."
        )


def _writes_parts(strategy: Strategy) -> bool:
    """Return whether each rank writes its own part of a checkpoint; each strategy has another private name for that."""
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
