"""The end of an epoch, with its validation: the state before that end, and how an interrupted end is repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyaxon_keras.framework import keras
from polyaxon_keras.running_fit import epoch_iterator
from polyaxon_keras.snapshot import host_value
from polyaxon_keras.training_state import generator_values, random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MissedEpochEnd",
    "StateBeforeEpochEnd",
    "averages_on_exception",
    "is_helper",
    "notify_of_epoch_ends",
]

_SAMPLES_PER_WEIGHT = 1 << 12


class StateBeforeEpochEnd:
    """The part of the training state that the validation and the callbacks' ``on_epoch_end`` may change.

    Only samples of the weights are kept. They show whether a callback has swapped averaged weights into the model,
    which some callbacks do until the validation ends.
    """

    def __init__(
        self, model: keras.Model, logs: dict[str, Any], training: dict[str, Any], *, sample_weights: bool
    ) -> None:
        stops = bool(model.stop_training)
        self.training = training | {"missed": {"logs": dict(logs), "stops": stops}}
        self.random = random_state()
        self.generators = generator_values(model)
        self._weights = _samples(model) if sample_weights else None

    def has_weights_of(self, model: keras.Model) -> bool:
        """Return whether `model` holds the weights from before the end of the epoch, as far as they were sampled."""
        return self._weights is None or _samples(model) == self._weights


class NotifyBeforeEpochEnd(keras.callbacks.Callback):
    """The first callback of a ``fit``, which calls `notify` before any other callback is notified of an epoch's end."""

    def __init__(self, notify: Callable[[], None]) -> None:
        super().__init__()
        self._notify = notify

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Call `notify`, because the validation is a part of the end of an epoch."""
        self._notify()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Call `notify`."""
        self._notify()


class NotifyAfterEpochEnd(keras.callbacks.Callback):
    """The last callback of a ``fit``, which calls `notify` after all others were notified of the end of an epoch."""

    def __init__(self, notify: Callable[[int, dict[str, Any]], None]) -> None:
        super().__init__()
        self._notify = notify

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Call `notify` with the index of the epoch and its logs."""
        self._notify(epoch, logs or {})


def notify_of_epoch_ends(
    callbacks: keras.callbacks.CallbackList, begin: Callable[[], None], end: Callable[[int, dict[str, Any]], None]
) -> list[keras.callbacks.Callback]:
    """Call `begin` before, and `end` after, all callbacks are notified of the end of an epoch.

    Returns:
        The callbacks of the list, without the helpers that this function adds.
    """
    others = [callback for callback in callbacks.callbacks if not is_helper(callback)]
    callbacks.callbacks = [NotifyBeforeEpochEnd(begin), *others, NotifyAfterEpochEnd(end)]
    return others


class MissedEpochEnd(keras.callbacks.Callback):
    """Let ``fit`` begin with the end of an epoch: with the validation, and with the logs of the epoch's last batch.

    Keras cannot begin at the end of an epoch. Therefore ``fit`` runs the epoch with a single batch, on which nothing is
    trained and of which no other callback is notified.
    """

    def __init__(self, model: keras.Model, callbacks: keras.callbacks.CallbackList, missed: dict[str, Any]) -> None:
        super().__init__()
        self.set_model(model)
        self._callback_list = callbacks
        self._other_callbacks = callbacks.callbacks
        self._missed = missed
        self._saved_random_state: dict[str, Any] | None = random_state()
        self._train_function: Any = None
        self._learning_rate = 0.0
        callbacks.callbacks = [self, *self._other_callbacks]

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the train step, and remove the other callbacks until the end of the batch."""
        self._callback_list.callbacks = [self]
        self._learning_rate = self._current_learning_rate()
        self._train_function, self.model.train_function = self.model.train_function, self._train_nothing

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Restore the learning rate if a schedule has changed it, because the epoch begins for the second time."""
        if self._current_learning_rate() != self._learning_rate:
            self.model.optimizer.learning_rate = self._learning_rate

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Skip the other batches of the epoch, and put back the train step and the other callbacks."""
        if (iterator := epoch_iterator()) is not None:
            iterator.reset()  # so that the next epoch has all data
        self._callback_list.callbacks = [self, *self._other_callbacks]
        self.model.train_function = self._train_function
        self.model.stop_training = True

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the random state of the interrupted epoch end."""
        self._prepare_epoch_end()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Remove this callback, so that training continues as if the epoch had not been interrupted."""
        self._prepare_epoch_end()
        self.model.stop_training = self._missed["stops"]
        self._callback_list.callbacks = self._other_callbacks

    def _prepare_epoch_end(self) -> None:
        self.model.stop_training = False
        if self._saved_random_state is not None:
            set_random_state(self._saved_random_state)
            self._saved_random_state = None

    def _train_nothing(self, *arguments: Any) -> Any:
        logs = dict(self._missed["logs"])
        self.model.get_metrics_result = self._no_metrics
        return logs if len(arguments) == 1 else (logs, arguments[0])  # JAX returns the state too

    def _no_metrics(self) -> dict[str, Any]:
        """Return no metrics once, so that Keras uses the logs instead of metrics that no batch has updated."""
        del self.model.get_metrics_result
        return {}

    def _current_learning_rate(self) -> float:
        optimizer = self.model.optimizer
        return 0.0 if optimizer is None else float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def averages_on_exception(optimizer: keras.optimizers.Optimizer | None) -> bool:
    """Return whether an exception makes ``fit`` overwrite the weights with their averages, as it does only on JAX."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    optimizers = getattr(optimizer, "optimizers", [inner])
    return keras.backend.backend() == "jax" and any(getattr(item, "use_ema", False) for item in optimizers)


def is_helper(callback: keras.callbacks.Callback) -> bool:
    """Return whether `callback` is a callback of this module.

    These callbacks stay in the callback list if ``fit`` ends with an exception.
    """
    return isinstance(callback, NotifyBeforeEpochEnd | NotifyAfterEpochEnd | MissedEpochEnd)


def _samples(model: keras.Model) -> bytes:
    """Return evenly spaced values of each trainable weight, as bytes."""
    flat = [host_value(variable).reshape(-1) for variable in model.trainable_variables]
    return b"".join(values[:: 1 + len(values) // _SAMPLES_PER_WEIGHT].tobytes() for values in flat)
