"""The history that ``fit`` returns: that of all epochs, also of those before a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyaxon_keras.framework import keras

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FitHistory"]


class FitHistory:
    """Saves and restores the epochs and metrics in the ``History`` among `callbacks`, the callbacks of a ``fit``."""

    def __init__(self, callbacks: list[keras.callbacks.Callback]) -> None:
        self._callback = next((one for one in callbacks if isinstance(one, keras.callbacks.History)), None)
        self._restored: dict[str, Any] | None = None
        self._epochs: list[int] = []
        self._metrics: dict[str, list[Any]] = {}

    def get(self) -> dict[str, Any]:
        """Return the history of the epochs that have ended."""
        return {"epochs": self._epochs, "metrics": self._metrics}

    def set(self, saved: dict[str, Any] | None) -> None:
        """Keep `saved`, a result of `get`, until `restore`; ``None`` is from an earlier version, which saved none."""
        self._restored = saved

    def restore(self) -> None:
        """Restore the history passed to `set`, once.

        Keras resets its ``History`` in ``on_train_begin``. Therefore this comes after that hook of every callback.
        """
        saved, self._restored = self._restored, None
        if saved is not None and self._callback is not None:
            self._callback.epoch = saved["epochs"]
            self._callback.history = saved["metrics"]

    def begin_epoch(self) -> None:
        """Restore the history before the first epoch, and copy it, because Keras will extend it in place."""
        self.restore()
        if self._callback is not None:
            self._epochs = list(self._callback.epoch)
            self._metrics = {name: list(values) for name, values in self._callback.history.items()}

    def end_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Add the epoch that ends, because Keras notifies its ``History`` only later."""
        self._epochs.append(epoch)
        for name, value in logs.items():
            self._metrics.setdefault(name, []).append(_plain(value))


def _plain(value: Any) -> Any:
    """Return a Python number if `value` is a NumPy number; anything else unchanged."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
