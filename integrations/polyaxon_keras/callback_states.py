"""The state of the callbacks that the user passes in `restore`, which Keras saves nowhere."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from polyaxon_keras.framework import keras

__all__ = ["CallbackStates"]

_logger = logging.getLogger("polyaxon_tracking")

# Keras's callbacks flip the sign of `min_delta` in their first epoch, so that resuming would flip it a second time.
# `params` are those of the current ``fit``.
_NEVER_SAVED = {"min_delta", "params"}


class CallbackStates:
    """Saves and restores the state of `callbacks`: their public attributes that are plain values or arrays.

    An attribute named like an argument of the callback's constructor is an option, such as `patience`, and the script
    sets it. It is a part of the state only if the callback has changed its value.

    Args:
        callbacks: the callbacks, before training changes them.
    """

    def __init__(self, callbacks: list[keras.callbacks.Callback]) -> None:
        self._callbacks = callbacks
        self._options = [_options(callback) for callback in callbacks]
        self._restored: list[dict[str, Any]] = []
        self._changed_options: list[set[str]] = [set() for _ in callbacks]
        self._warned_of: set[str] = set()

    def get(self) -> list[dict[str, Any]]:
        """Return the current state of each callback."""
        self._warn_of_losses()
        states = []
        for callback, options, changed in zip(self._callbacks, self._options, self._changed_options, strict=True):
            values = {name: value for name, value in _public(callback).items() if _is_plain(value)}
            changed.update(name for name in options if name in values and not _are_equal(values[name], options[name]))
            states.append(
                {name: copy.deepcopy(values[name]) for name in values if name not in options or name in changed}
            )
        return states

    def set(self, states: list[dict[str, Any]], source: str) -> None:
        """Keep `states`, which were saved in the checkpoint `source`, until `restore`.

        Raises:
            TrackingError: there were more or fewer callbacks.
        """
        if len(states) != len(self._callbacks):
            raise TrackingError(
                f"Received {len(self._callbacks)} callbacks to restore, while {source} holds the state of "
                f"{len(states)}. Expected the same callbacks in the same order. Give `restore` what it was given "
                f"before, or pass PolyaxonCallback(resume=False) to start from scratch. The checkpoint stays as it is."
            )
        self._restored = states

    def restore(self) -> None:
        """Restore the states passed to `set`, once.

        Callbacks reset themselves in ``on_train_begin``. Therefore this comes after that hook of every callback.
        """
        states, self._restored = self._restored, []
        known = zip(self._callbacks, self._options, self._changed_options, strict=True)
        for (callback, options, changed), state in zip(known, states, strict=False):  # without states, none is restored
            changed.update(state.keys() & options.keys())
            vars(callback).update(state)

    def _warn_of_losses(self) -> None:
        """Warn, once for each attribute, of attributes that are not saved because of their values."""
        for callback in self._callbacks:
            lost = {name for name, value in _public(callback).items() if _is_container(value) and not _is_plain(value)}
            names = sorted(f"{type(callback).__name__}.{name}" for name in lost)
            if new := [name for name in names if name not in self._warned_of]:
                self._warned_of.update(new)
                _logger.warning(
                    "Not restored when this training resumes: %s. Only numbers, strings, arrays, and lists and "
                    "dictionaries of these are saved",
                    ", ".join(new),
                )


def _options(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Return the attributes of `callback` that are named like an argument of its constructor."""
    names = _argument_names(callback)
    return {
        name: copy.deepcopy(value) for name, value in _public(callback).items() if name in names and _is_plain(value)
    }


def _argument_names(callback: keras.callbacks.Callback) -> set[str]:
    """Return the names of the arguments of all constructors in the class hierarchy of `callback`."""
    constructors = [vars(cls)["__init__"] for cls in type(callback).__mro__[:-1] if "__init__" in vars(cls)]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


def _public(callback: keras.callbacks.Callback) -> dict[str, Any]:
    return {
        name: value for name, value in vars(callback).items() if not name.startswith("_") and name not in _NEVER_SAVED
    }


def _is_container(value: Any) -> bool:
    return isinstance(value, list | tuple | set | dict)


def _is_plain(value: Any) -> bool:
    """Return whether `value` can be saved: a number, string, array or ``None``, or a list or dictionary of these."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return value.keys() != {"array"} and all(isinstance(key, str) and _is_plain(value[key]) for key in value)
    return value is None or isinstance(value, bool | int | float | str | np.generic | np.ndarray)


def _are_equal(value: Any, other: Any) -> bool:
    if isinstance(value, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(value, other)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_are_equal, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_are_equal(value[key], other[key]) for key in value)
    return type(value) is type(other) and bool(value == other)
