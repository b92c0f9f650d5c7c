"""The state before an evaluation: what is saved if a signal or an exception cuts the evaluation off."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from polyaxon_torch import WeightSamples, random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["EvaluationWatch"]


class EvaluationWatch:
    """Keeps the state before each evaluation of a training, and watches whether other weights are in the model.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.swaps_weights = False
        """Whether an evaluation has run with other weights in the model, such as averages."""
        self.before: BeforeEvaluation | None = None
        """The state before the evaluation that is running."""
        self._samples: WeightSamples | None = None
        self._is_checked = False
        self._notifier: _NotifyBeforeEvaluation | None = None

    def attach(self) -> None:
        """Sample the weights before each evaluation that is due, and before other callbacks may swap weights for it."""
        self._notifier = _NotifyBeforeEvaluation(self._sample)
        # After the Trainer's own callback, which decides whether an evaluation is due.
        self._trainer.callback_handler.callbacks.insert(1, self._notifier)

    def detach(self) -> None:
        """Undo `attach`."""
        notifier, self._notifier = self._notifier, None  # which refers to this object, and so to the model
        assert notifier is not None
        self._trainer.pop_callback(notifier)

    def begin(self) -> None:
        """Keep the state before the evaluation, which begins now."""
        if self._samples is None:
            self._sample()
        assert self._samples is not None
        self.before, self._is_checked = BeforeEvaluation(self._trainer, self._samples), False

    def check(self) -> None:
        """Find out, in the first step of an evaluation, whether that swaps weights."""
        if self.before is not None and not self._is_checked:
            self._is_checked = True
            self.swaps_weights |= not self.has_trained_weights()

    def end(self) -> None:
        """Let go of the state before the evaluation, because the evaluation has ended, or there was none."""
        self.before = self._samples = None

    def has_trained_weights(self) -> bool:
        """Return whether the model holds the weights that are trained, in a state that may be saved.

        That is not so if the evaluation cannot be run again, because weights were swapped for it in a hook before it.
        """
        is_repeatable = self.before is None or self.before.is_repeatable
        return is_repeatable and (self._samples is None or self._samples.are_current())

    def _sample(self) -> None:
        self._samples = WeightSamples(self._trainer.model)  # type: ignore[arg-type]  # made by now


class BeforeEvaluation:
    """The part of the training state that an evaluation, and the callbacks that are notified of it, may change.

    Args:
        trainer: the Trainer, which is about to evaluate.
        samples: samples of the weights from before the hooks that come last before the evaluation.
    """

    def __init__(self, trainer: Trainer, samples: WeightSamples) -> None:
        self._trainer = trainer
        self.is_repeatable = samples.are_current()
        """Whether the evaluation can be run again. It cannot if a callback has swapped weights in a hook before it,
        because that hook is not called again."""
        self._random = random_state()
        self._state = vars(trainer.state) | {"log_history": [*trainer.state.log_history]}
        self._control = vars(trainer.control).copy()
        self._callbacks = [
            (one, copy.deepcopy(one.state().get("attributes", {})))
            for one in trainer.callback_handler.callbacks
            if isinstance(one, ExportableState)
        ]
        made: Any = trainer  # with an optimizer and a scheduler by now
        self._optimizer, self._scheduler = made.optimizer, made.lr_scheduler
        self._schedule: dict[str, Any] = copy.deepcopy(self._scheduler.state_dict())
        self._rates = [_copied(group["lr"]) for group in self._optimizer.param_groups]

    def put_back(self) -> None:
        """Change the Trainer's state to that from before the evaluation, because the evaluation will be run again."""
        set_random_state(self._random)
        vars(self._trainer.state).update(self._state)
        vars(self._trainer.control).update(self._control)
        for callback, attributes in self._callbacks:
            for name, value in attributes.items():
                setattr(callback, name, value)
        self._scheduler.load_state_dict(self._schedule)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


class _NotifyBeforeEvaluation(TrainerCallback):
    """Call `notify` if an evaluation is about to come, before the other callbacks may swap weights for it."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Call `notify` if an evaluation is due."""
        if control.should_evaluate:
            self._notify()

    on_epoch_end = on_step_end


def _copied(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, torch.Tensor) else rate
