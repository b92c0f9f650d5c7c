"""The hyperparameters of a Lightning training: of its optimizers and schedulers, its modules and its data loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyaxon_lightning.positions import training_loaders
from polyaxon_torch import optimizer_options, scheduler_options
from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import Hyperparameters, accept_hyperparameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyaxon_lightning.framework import pl
    from polyaxon_tracking.training import TrainingSession

__all__ = ["HyperparametersOfTrainer", "check_optimizers", "optimizer_names"]


class HyperparametersOfTrainer:
    """The hyperparameters that a Trainer trains with, to be saved with its states and compared before it resumes.

    Args:
        session: the session of the training.
    """

    def __init__(self, session: TrainingSession) -> None:
        self._session = session
        self._of_optimizers: dict[str, Any] = {}
        self.resumed: Mapping[str, Any] | None = None
        """The hyperparameters saved with the state that the Trainer has restored."""

    def record_optimizers(self, trainer: pl.Trainer) -> None:
        """Record the options of the optimizers and schedulers, which Lightning has made and has not restored yet."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._of_optimizers = {
            "optimizers": {index: optimizer_options(one) for index, one in enumerate(trainer.optimizers)},
            "lr_schedulers": {index: scheduler_options(one) for index, one in enumerate(schedulers)},
        }

    def accept(self, trainer: pl.Trainer, source: str, saved: Mapping[str, Any] | None) -> bool:
        """Return whether to resume from the checkpoint `source` with the hyperparameters `saved`. A collective.

        Raises:
            TrackingError: hyperparameters have changed, and ``if_changed="raise"``.
        """
        return accept_hyperparameters(self._session, source, saved, self._current(trainer))

    def as_saved(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what to save with a training state."""
        return self._current(trainer).as_saved(self.resumed)

    def _current(self, trainer: pl.Trainer) -> Hyperparameters:
        datamodule = getattr(trainer, "datamodule", None)
        script = {**getattr(datamodule, "hparams", {}), **trainer.lightning_module.hparams}
        if trainer.train_dataloader is not None:  # from the start of training on
            loaders = enumerate(training_loaders(trainer))
            script["train_dataloaders"] = {
                index: {"batch_size": getattr(one, "batch_size", None)} for index, one in loaders
            }
        return Hyperparameters(restored=self._of_optimizers, script=script)


def optimizer_names(trainer: pl.Trainer) -> list[str]:
    """Return the names of the classes of the optimizers."""
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]


def check_optimizers(trainer: pl.Trainer, saved: list[str]) -> None:
    """Check that the optimizers are of the classes that were saved.

    Raises:
        TrackingError: they are not. Lightning would use the options of the saved optimizers, or fail in the middle of
            training.
    """
    if saved != optimizer_names(trainer):
        raise TrackingError(
            f"Received a model with the optimizers {optimizer_names(trainer)}, while the checkpoint was saved with "
            f"{saved}. Expected the same. Undo the change, pass resume=False to start from scratch, or use another "
            f"outputs path; the checkpoint stays as it is."
        )
