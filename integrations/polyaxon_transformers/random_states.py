"""The states of the random number generators that a training needs besides those that the Trainer saves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyaxon_torch import random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Trainer

    from polyaxon_transformers.resuming import ResumedState

__all__ = ["RandomStates"]


class RandomStates:
    """The random states of one training.

    The Trainer saves the random state of the moment of the save. A training that resumes within an epoch also needs the
    random state from the beginning of the epoch, because some samplers draw the order of the data from it.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.at_epoch_begin = random_state()
        """The random state from which the samplers drew the order of the epoch."""
        self._after_step: dict[str, Any] | None = None
        self._after_evaluation: dict[str, Any] | None = None

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
        self._after_step = random_state()

    def end_resumed_evaluation(self) -> None:
        """Record the random state after an evaluation that was cut off, and that was run again."""
        self._after_evaluation = random_state()

    def set_to_last_step(self) -> None:
        """Set the random state to that after the last step, because the step that was cut off will be done again."""
        if self._after_step is not None:
            set_random_state(self._after_step)

    def load(self, resumed: ResumedState | None, native: Callable[..., None], folder: str | None) -> None:
        """Replace ``Trainer._load_rng_state``, which the Trainer calls before the first step of the resumed epoch."""
        if self._after_evaluation is not None and resumed is not None and folder == resumed.folder:
            set_random_state(self._after_evaluation)
        else:
            native(folder)
        if self._is_between_epochs():  # the order of the data is drawn next
            self.at_epoch_begin = random_state()

    def _is_between_epochs(self) -> bool:
        return float(self._trainer.state.epoch or 0).is_integer()
