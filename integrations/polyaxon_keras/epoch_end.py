"""The end of an epoch, with its validation: what was before it, and how one is made up for that was cut off."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Any

from polyaxon_keras.framework import keras
from polyaxon_keras.snapshot import host_value
from polyaxon_keras.training_state import generator_values, random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BeforeEpochEnd", "First", "Last", "MissedEpochEnd", "averages_on_exception", "is_helper"]

_SAMPLED = 1 << 12


class BeforeEpochEnd:
    """What the validation, and the callbacks' hooks at the end of an epoch, change in the state of a training.

    Weights are looked at by samples alone: some callbacks swap averaged ones in, and out when the validation ends.
    """

    def __init__(self, model: keras.Model, logs: dict[str, Any], training: dict[str, Any]) -> None:
        stops = bool(model.stop_training)
        self.training = training | {"missed": {"logs": dict(logs), "stops": stops}}
        self.random = random_state()
        self.generators = generator_values(model)
        self._weights = _samples(model)

    def has_weights_of(self, model: keras.Model) -> bool:
        """Return whether `model` holds the weights of before."""
        return _samples(model) == self._weights


class First(keras.callbacks.Callback):
    """The first of a ``fit``'s callbacks, which calls `ends` before any other is told of the end of an epoch."""

    def __init__(self, ends: Callable[[], None]) -> None:
        super().__init__()
        self._ends = ends

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Call `ends`: validation is a part of it."""
        self._ends()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Call `ends`."""
        self._ends()


class Last(keras.callbacks.Callback):
    """The last of a ``fit``'s callbacks, which calls `ended` when all others have seen the end of an epoch."""

    def __init__(self, ended: Callable[[int], None]) -> None:
        super().__init__()
        self._ended = ended

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Call `ended`."""
        self._ended(epoch)


class MissedEpochEnd(keras.callbacks.Callback):
    """Have ``fit`` begin with the end of an epoch: with its validation, and with what was logged of its batches.

    Keras has no way to begin there. So nothing is trained in the one batch that the epoch then has, and no other
    callback is told of that batch.
    """

    def __init__(self, model: keras.Model, callbacks: keras.callbacks.CallbackList, missed: dict[str, Any]) -> None:
        super().__init__()
        self.set_model(model)
        self._list = callbacks
        self._others = callbacks.callbacks
        self._missed = missed
        self._random: dict[str, Any] | None = random_state()
        self._train: Any = None
        self._learning_rate = 0.0
        callbacks.callbacks = [self, *self._others]

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put aside the step, and, for the next hooks, the other callbacks."""
        self._list.callbacks = [self]
        self._learning_rate = self._rate()
        self._train, self.model.train_function = self.model.train_function, self._train_nothing

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Undo what a schedule has done, for which this epoch has begun twice."""
        if self._rate() != self._learning_rate:
            self.model.optimizer.learning_rate = self._learning_rate

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Leave the batches, and have all be as before."""
        for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
            if frame.f_code.co_name == "fit" and "epoch_iterator" in frame.f_locals:
                frame.f_locals["epoch_iterator"].reset()  # the data begins from its start
                break
        self._list.callbacks = [self, *self._others]
        self.model.train_function = self._train
        self.model.stop_training = True

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Go on with the random numbers of then."""
        self._go_on()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Leave: from here on all is as in an epoch that was not cut off."""
        self._go_on()
        self.model.stop_training = self._missed["stops"]
        self._list.callbacks = self._others

    def _go_on(self) -> None:
        self.model.stop_training = False
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def _train_nothing(self, *arguments: Any) -> Any:
        logs = dict(self._missed["logs"])
        self.model.get_metrics_result = self._no_metrics
        return logs if len(arguments) == 1 else (logs, arguments[0])  # on JAX, with the state

    def _no_metrics(self) -> dict[str, Any]:
        """Stand in once for the model's metrics, which have seen nothing: so Keras takes the logs."""
        del self.model.get_metrics_result
        return {}

    def _rate(self) -> float:
        optimizer = self.model.optimizer
        return 0.0 if optimizer is None else float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def averages_on_exception(optimizer: keras.optimizers.Optimizer | None) -> bool:
    """Return whether ``fit`` overwrites the weights with their averages where an exception ends it: on JAX it does."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    alike = getattr(optimizer, "optimizers", [inner])
    return keras.backend.backend() == "jax" and any(getattr(one, "use_ema", False) for one in alike)


def is_helper(callback: keras.callbacks.Callback) -> bool:
    """Return whether `callback` is one of these, which stay where a ``fit`` ends with an exception."""
    return isinstance(callback, First | Last | MissedEpochEnd)


def _samples(model: keras.Model) -> bytes:
    """Return numbers from all over each weight that is trained."""
    flat = [host_value(variable).reshape(-1) for variable in model.trainable_variables]
    return b"".join(values[:: 1 + len(values) // _SAMPLED].tobytes() for values in flat)
