"""The values that a training state holds besides the model's variables and the random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyaxon_keras.callback_states import CallbackStates
from polyaxon_keras.fit_history import FitHistory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyaxon_keras.framework import keras

__all__ = ["TrainingValues"]


class TrainingValues:
    """The values of one ``fit``: of its callbacks, its history and its hyperparameters, and how far it has come.

    Args:
        callback: the PolyaxonCallback.
        callbacks_to_restore: the other callbacks whose state is a part of the training state.
        fit_callbacks: all callbacks of the ``fit``.
    """

    def __init__(
        self,
        callback: keras.callbacks.ModelCheckpoint,
        callbacks_to_restore: list[keras.callbacks.Callback],
        fit_callbacks: list[keras.callbacks.Callback],
    ) -> None:
        self._callback = callback
        self._callback_states = CallbackStates(callbacks_to_restore)
        self._history = FitHistory(fit_callbacks)
        self.hyperparameters: dict[str, Any] = {}
        """The hyperparameters that training uses."""
        self.validation_swaps_weights = False
        """Whether a validation has found other weights in the model, such as averages."""
        self.stopped_at: int | None = None
        """The number of epochs done when training was stopped early, for example by ``EarlyStopping``."""

    def get(self) -> dict[str, Any]:
        """Return the values to save."""
        best = self._callback.best
        return {
            "best": None if best is None else float(best),
            "callbacks": self._callback_states.get(),
            "history": self._history.get(),
            "swaps": self.validation_swaps_weights,
            "stopped": self.stopped_at,
            "hyperparameters": self.hyperparameters,
        }

    def set(self, saved: dict[str, Any], source: str) -> None:
        """Use `saved`, a result of `get` from the checkpoint `source`; callbacks and history wait for `restore`.

        Raises:
            TrackingError: there were more or fewer callbacks to restore.
        """
        self._callback.best = saved["best"]
        self._callback_states.set(saved["callbacks"], source)
        self._history.set(saved.get("history"))
        self.validation_swaps_weights = saved.get("swaps", False)
        self.stopped_at = saved.get("stopped")

    def restore(self) -> None:
        """Restore the callbacks and the history, once.

        Keras resets both in ``on_train_begin``. Therefore this comes after that hook of every callback.
        """
        self._callback_states.restore()
        self._history.restore()

    def begin_epoch(self) -> None:
        """Restore what was not restored yet, and copy the history, because Keras will extend it in place."""
        self._callback_states.restore()
        self._history.begin_epoch()

    def end_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Add the epoch that ends to the history."""
        self._history.end_epoch(epoch, logs)
