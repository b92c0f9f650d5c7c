"""The data of a training: its data loaders, the generators that they draw from, and what a batch changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polyaxon_lightning.framework import pl
from polyaxon_torch import random_numbers, random_state

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Batches",
    "forget_loaders",
    "generator_states",
    "is_stateful",
    "set_generator_states",
    "training_loaders",
]


class Batches:
    """What to save of the batches since the last optimizer step: the gradients, and the state before a failed batch.

    If an exception ends training within a batch, the data loader has already given that batch, and random numbers are
    drawn. So if all data loaders have a state, it is kept at the end of each batch, together with the random numbers,
    and training resumes with the batch that failed.
    """

    def __init__(self) -> None:
        self._stateful: list[Any] = []
        self._at_end: tuple[tuple[Any, ...], list[Any]] | None = None
        self._step = 0
        self._accumulates = False
        """Whether the last batch ended without an optimizer step."""

    def start(self, trainer: pl.Trainer, restored: dict[str, Any] | None) -> None:
        """Start to watch the batches, after the gradients in the metadata `restored` are restored."""
        self._step = trainer.global_step
        gradients = {} if restored is None else restored.get("gradients", {})
        self._accumulates = bool(gradients)
        for name, parameter in trainer.lightning_module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)
        self.find_loaders(trainer)

    def find_loaders(self, trainer: pl.Trainer) -> None:
        """Look at the data loaders again, because Lightning may have requested new data for an epoch."""
        self._at_end, loaders = None, training_loaders(trainer)
        # With several processes, nothing is saved after an exception.
        self._stateful = loaders if trainer.world_size == 1 and all(map(is_stateful, loaders)) else []

    def end(self, step: int) -> None:
        """Keep what the next batch changes; `step` optimizer steps are done."""
        self._accumulates, self._step = step == self._step, step
        if self._stateful:
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
        self._stateful, self._at_end = [], None


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the data loaders of the training batches."""
    return list(pl.utilities.CombinedLoader(trainer.train_dataloader).flattened)


def is_stateful(loader: Any) -> bool:
    """Return whether `loader` resumes within an epoch, because it has a state."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


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
