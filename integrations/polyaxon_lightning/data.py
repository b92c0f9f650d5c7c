"""The data of a training: its data loaders, the generators that they draw from, and what a batch changes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from polyaxon_lightning.framework import pl
from polyaxon_lightning.positions import Positions, training_loaders
from polyaxon_torch import has_state, random_numbers, random_state, set_random_state
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Batches",
    "check_rows",
    "forget_loaders",
    "generator_states",
    "log_repeated_data",
    "restore_random",
    "restored_positions",
    "rows",
    "set_generator_states",
    "state_tensors",
    "warn_of_other_rows",
]

_logger = logging.getLogger("polyaxon_tracking")


class Batches:
    """The state of the batches since the last optimizer step: the gradients, and the state before a failed batch.

    If an exception ends training within a batch, the data loader has already given that batch, and random numbers are
    drawn. So the random numbers, and the state of data loaders that have one, are kept at the end of each batch, and
    training resumes with the batch that failed.
    """

    def __init__(self) -> None:
        self.positions = Positions()
        self._is_exact = False
        self._stateful: list[Any] = []
        self._at_end: tuple[tuple[Any, ...], list[Any]] | None = None
        self._step = 0
        self._accumulates = False
        """Whether the last batch ended without an optimizer step."""

    def start(self, trainer: pl.Trainer, gradients: dict[str, Any]) -> None:
        """Start to watch the batches, with the accumulated `gradients` of the state from which training resumes."""
        self._step = trainer.global_step
        self._accumulates = bool(gradients)
        for name, parameter in trainer.lightning_module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)
        self.find_loaders(trainer)

    def find_loaders(self, trainer: pl.Trainer) -> None:
        """Look at the data loaders again, because Lightning may have requested new data for an epoch."""
        self._at_end, self._stateful = None, [one for one in training_loaders(trainer) if has_state(one)]
        # With several processes, nothing is saved after an exception.
        self._is_exact = trainer.world_size == 1 and self.positions.follow_all(trainer)
        self.positions.expect_iterators()

    def end(self, step: int) -> None:
        """Keep what the next batch changes; `step` optimizer steps are done."""
        self._accumulates, self._step = step == self._step, step
        self.positions.begun()
        self.keep()

    def keep(self) -> None:
        """Keep the state before the next batch, also after a validation, which draws random numbers too."""
        if self._is_exact:
            self._at_end = random_numbers(), [loader.state_dict() for loader in self._stateful]

    def put_into(self, trainer: pl.Trainer, checkpoint: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Add the accumulated gradients to `metadata`; change `checkpoint` to the state from before a failed batch."""
        if self._accumulates and trainer.world_size == 1:
            named = trainer.lightning_module.named_parameters()
            metadata["gradients"] = {name: one.grad for name, one in named if one.grad is not None}
        count: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if self._at_end is not None and count.processed < count.ready:
            numbers, states = self._at_end
            [random] = metadata["random"]
            metadata |= {"random": [random | random_state(numbers)], "within_batch": True}
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states

    def free(self) -> None:
        """Let go of the data loaders, because training has ended."""
        self._is_exact, self._stateful, self._at_end = False, [], None
        self.positions.free()


def log_repeated_data(trainer: pl.Trainer, batches: int) -> None:
    """Log that a training repeats data that resumes within an epoch, after `batches` of its batches."""
    _logger.info(
        "Resuming within epoch %d after %d of its %s batches. The data has neither a sampler nor a state_dict, or the "
        "number of processes has changed, so it starts again: some of this epoch's data is repeated, and some is left "
        "out",
        trainer.current_epoch,
        batches,
        trainer.num_training_batches,
    )


def rows(trainer: pl.Trainer) -> list[int]:
    """Return the number of rows in the data set of each training data loader, if all data sets have a length."""
    if trainer.train_dataloader is None:
        return []
    sets: list[Any] = [getattr(loader, "dataset", None) for loader in training_loaders(trainer)]
    return [len(one) for one in sets] if all(hasattr(one, "__len__") for one in sets) else []


def check_rows(trainer: pl.Trainer, metadata: dict[str, Any]) -> None:
    """Check that the epoch can be resumed with the training data, which is requested for that.

    Raises:
        TrackingError: the data has fewer batches than the epoch had when the state was saved.
    """
    trainer.fit_loop.setup_data()
    if metadata.get("rows") and trainer.num_training_batches <= metadata["batches"] and _differ(trainer, metadata):
        raise TrackingError(
            f"Received training data with {_text(rows(trainer))} rows, {trainer.num_training_batches} batches, while "
            f"the checkpoint was saved within an epoch of {_text(metadata['rows'])} rows, after {metadata['batches']} "
            f"of its batches. Expected the same data. Undo the change, pass PolyaxonCallback(resume=False) to start "
            f"from scratch, or use another outputs path; the checkpoint stays as it is."
        )
    warn_of_other_rows(trainer, metadata)


def warn_of_other_rows(trainer: pl.Trainer, metadata: dict[str, Any]) -> None:
    """Warn if the training data has another length than when the state was saved."""
    if trainer.is_global_zero and metadata.get("rows") and _differ(trainer, metadata):
        _logger.warning(
            "The training data has %s rows, and had %s when the checkpoint was saved: training continues with the data "
            "as it is now",
            _text(rows(trainer)),
            _text(metadata["rows"]),
        )


def _differ(trainer: pl.Trainer, metadata: dict[str, Any]) -> bool:
    return bool(rows(trainer) != metadata["rows"])


def _text(numbers: list[int]) -> str:
    return " and ".join(f"{number:,}" for number in numbers) or "an unknown number of"


def forget_loaders(trainer: pl.Trainer) -> None:
    """Make Lightning request the training data again, because it was requested before the training state was restored.

    ``trainer.estimated_stepping_batches``, which schedules ask for in ``configure_optimizers``, does that. The state of
    a data loader would then not be restored.
    """
    trainer.fit_loop._combined_loader = None  # noqa: SLF001


def generator_states(trainer: pl.Trainer) -> list[torch.Tensor]:
    """Return the states of the generators that the user gave to the data loaders or their samplers."""
    return [generator.get_state() for generator in _generators(trainer)]


def set_generator_states(trainer: pl.Trainer, states: list[torch.Tensor]) -> None:
    """Set the generators to what `generator_states` returned, if there are as many as before."""
    generators = list(_generators(trainer))
    if len(generators) == len(states):
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def restored_positions(trainer: pl.Trainer, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Return where each training data loader was in the epoch, if training resumes within one from `metadata`."""
    numbers = None if metadata["ends_epoch"] else _numbers_of_rank(trainer, metadata)
    if numbers is None:
        return None
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    if progress.is_last_batch and progress.current.completed == progress.current.ready:
        return None  # Lightning takes the next epoch from this iterator
    return {"positions": numbers.get("positions", []), "batches": metadata["batches"]}


def restore_random(trainer: pl.Trainer, metadata: dict[str, Any]) -> None:
    """Set the random number generators to those of `metadata`.

    Workers of the validation data that persist are started before, because in an uninterrupted training they run
    already, and starting them draws a number.
    """
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.num_sanity_val_steps or val_loop.batch_progress.total.ready:
        for loader in pl.utilities.CombinedLoader(trainer.val_dataloaders).flattened:
            if getattr(loader, "persistent_workers", False):
                iter(loader)
    if (numbers := _numbers_of_rank(trainer, metadata)) is not None:
        set_random_state(numbers)
        set_generator_states(trainer, numbers.get("loaders", []))


def _numbers_of_rank(trainer: pl.Trainer, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Return the random numbers of this process in `metadata`, if there are as many processes as then."""
    if len(metadata["random"]) != trainer.world_size:
        return None
    numbers: dict[str, Any] = metadata["random"][trainer.global_rank]
    return numbers


def _generators(trainer: pl.Trainer) -> Iterator[torch.Generator]:
    found = set()
    for given in (trainer.train_dataloader, trainer.val_dataloaders):
        for loader in pl.utilities.CombinedLoader(given).flattened:
            batches = getattr(loader, "batch_sampler", None)
            for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator) and id(generator) not in found:
                    found.add(id(generator))
                    yield generator


def state_tensors(trainer: pl.Trainer) -> list[torch.Tensor]:
    """Return the tensors of the model and of the optimizers."""
    tensors = [*trainer.lightning_module.state_dict().values()]
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors
