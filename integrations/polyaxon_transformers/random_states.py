"""The states of the random number generators that a training needs besides those that the Trainer saves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from polyaxon_torch import random_state, set_random_state, set_torch_random_state, torch_random_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Trainer

    from polyaxon_transformers.resuming import ResumedState

__all__ = ["RandomStates"]


class RandomStates:
    """The random states of one training.

    The Trainer saves the random state of the moment of the save, but not that of MPS and XPU devices. A training that
    resumes within an epoch also needs the random state from the beginning of the epoch, because some samplers draw the
    order of the data from it.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.at_epoch_begin = random_state()
        """The random state from which the samplers drew the order of the epoch."""
        self._after_step: tuple[int, dict[str, Any]] | None = None
        self._after_evaluation: dict[str, Any] | None = None

    def to_save(self) -> dict[str, Any]:
        """Return the random state of the beginning of the epoch, with torch's of this moment."""
        return self.at_epoch_begin | {"at_save": torch_random_state()}

    def begin(self) -> None:
        """Forget the random states of an earlier beginning, which had larger batches."""
        self._after_step = self._after_evaluation = None

    def begin_epoch(self, resumed: ResumedState | None) -> None:
        """Record the random state of the beginning of an epoch, or set it if training resumes within the epoch."""
        is_within = resumed is not None and self._trainer.state.global_step == resumed.checkpoint.step
        if is_within and not self._is_between_epochs() and (saved := resumed.random_at_epoch_begin) is not None:  # type: ignore[union-attr]
            set_random_state(saved)
        self.at_epoch_begin = random_state()

    def end_step(self) -> None:
        """Record the random state after a step, its evaluation, and its saves."""
        self._after_step = self._trainer.state.global_step, random_state()

    def end_resumed_evaluation(self) -> None:
        """Record the random state after an evaluation that was cut off, and that was run again."""
        self._after_evaluation = random_state()

    def set_to_last_step(self) -> None:
        """Set the random state to that after the last step, if the next step was cut off and will be repeated."""
        step, state = self._after_step or (None, {})
        if step == self._trainer.state.global_step:
            set_random_state(state)

    def load(self, resumed: ResumedState | None, native: Callable[..., None], folder: str | None) -> None:
        """Replace ``Trainer._load_rng_state``, which the Trainer calls before the first step of the resumed epoch."""
        if self._after_evaluation is not None and resumed is not None and folder == resumed.folder:
            set_random_state(self._after_evaluation)
        else:
            native(folder)
            if resumed is not None and folder == resumed.folder and resumed.torch_random_at_save is not None:
                set_torch_random_state(resumed.torch_random_at_save)
        if self._is_between_epochs():  # the order of the data is drawn next
            self.at_epoch_begin = random_state()

    def make_train_loader(self, resumed: ResumedState | None, native: Callable[[], Any]) -> Any:
        """Replace ``Trainer.get_train_dataloader``: a resumed loader draws no seed for workers that were persistent."""
        loader = native()
        if resumed is not None:
            _draw_seeds_separately(loader, resumed.checkpoint.step)
        return loader

    def make_eval_loader(
        self, resumed: ResumedState | None, native: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        """Replace ``Trainer.get_eval_dataloader``, for the same reason."""
        loader = native(*arguments, **options)
        if resumed is not None and resumed.has_evaluated:
            _draw_seeds_separately(loader, resumed.checkpoint.step)
        return loader

    def _is_between_epochs(self) -> bool:
        return float(self._trainer.state.epoch or 0).is_integer()


def _draw_seeds_separately(loader: Any, seed: int) -> None:
    """Let `loader` draw the seed of persistent workers from a generator of its own.

    It draws one when it starts its workers, which an uninterrupted training does in its first epoch, and a resumed one
    in a later epoch. From the global generator, this would change the numbers that training draws after it.
    """
    loader = getattr(loader, "base_dataloader", loader)  # in Accelerate's own
    if isinstance(loader, DataLoader) and loader.persistent_workers and loader.generator is None:
        loader.generator = torch.Generator().manual_seed(seed)
