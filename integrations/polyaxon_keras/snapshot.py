"""Saving while training goes on: from a copy of the variables in host memory, in arrays that are used again."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from keras.src.backend.common import global_state
from keras.src.saving import saving_lib

from polyaxon_keras.framework import keras
from polyaxon_keras.training_state import optimizers_of
from polyaxon_tracking.training import BackgroundWriter, available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import timedelta

__all__ = ["Snapshot", "host_value", "values", "variables_of"]

_logger = logging.getLogger("polyaxon_tracking")

_COMPARED_BYTES = 1 << 22


class Snapshot:
    """Copy a model's variables in memory, and have them written in another thread.

    At most one state is in flight. The model and the training state that are saved after the same step share its copy,
    since the variables are found to have the same bytes; a state whose bytes have changed waits for the write of the
    one before.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._writer = BackgroundWriter(timeout)
        self.wait = self._writer.wait
        self._variables: list[Any] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._filled = False
        self._told = False

    @property
    def failed(self) -> bool:
        """Whether a write failed whose error was not raised yet."""
        return self._writer.failed

    def save(self, what: str, model: keras.Model, write: Callable[[], None], *, unchanged: bool = False) -> None:
        """Have `write` called in the thread, in which all variables of `model` have the values that they have now.

        Where memory does not suffice for the copy, call it at once. With `unchanged`, the values are known to be those
        of the save before.

        Raises:
            BaseException: that of a write before.
        """
        if not self._writer.pending:
            self.wait()  # raises what went wrong before
        if not self.reserve(model):
            write()
            return
        if not (unchanged and self._filled):
            self._copy()

        def write_copy() -> None:
            with values(zip(self._variables, self._arrays, strict=True)):
                write()

        self._writer.submit(what, write_copy)

    def reserve(self, model: keras.Model) -> bool:
        """Take the memory for a copy of the variables of `model`, if it is there."""
        variables = variables_of(model)
        if list(map(id, variables)) == list(map(id, self._variables)):
            return True
        self.wait()
        self._variables, self._arrays, self._filled = [], [], False
        size = sum(host_value(variable).nbytes for variable in variables)
        available = available_memory()
        if size >= available:
            if not self._told:
                self._told = True
                _logger.warning(
                    "Saving in the foreground, while training waits: a copy of the state takes %s bytes of memory, "
                    "and %s are available",
                    f"{size:,}",
                    f"{available:,}",
                )
            return False
        self._variables = variables
        self._arrays = arrays = [np.empty_like(host_value(variable)) for variable in variables]

        def touch() -> None:
            for array in arrays:
                array.fill(0)  # only now the system gives the memory

        self._writer.submit("zeros to the memory for a copy of the state", touch)
        return True

    def _copy(self) -> None:
        if not self._filled:
            self._filled = True
            self._writer.wait()
        for variable, array in zip(self._variables, self._arrays, strict=True):
            value = host_value(variable)
            if self._writer.pending:
                if _are_equal(array, value):
                    continue
                self.wait()
            np.copyto(array, value)


def variables_of(model: keras.Model) -> list[Any]:
    """All variables of `model`, each once: the weights, those of the optimizers, the metrics and the generators."""
    found = [*model.variables, *model.metrics_variables]
    for optimizer in optimizers_of(model).values():
        found += optimizer.variables
    return list({id(variable): variable for variable in found}.values())


def host_value(variable: Any) -> np.ndarray[Any, Any]:
    """Return the value of `variable` in host memory, without a copy where it is there."""
    value: Any = variable.value
    array: np.ndarray[Any, Any]
    if keras.backend.is_float_dtype(variable.dtype) and variable.dtype not in ("float16", "float32", "float64"):
        array = keras.ops.convert_to_numpy(value)  # types that NumPy does not know of itself
    elif keras.backend.backend() == "torch":
        array = value.detach().cpu().numpy()
    elif keras.backend.backend() == "tensorflow":
        # TensorFlow's own conversions copy.
        array = np.asarray(memoryview(sys.modules["tensorflow"].convert_to_tensor(value)))
    else:
        array = np.asarray(value)
    return array


@contextlib.contextmanager
def values(held: Iterable[tuple[Any, np.ndarray[Any, Any]]]) -> Iterator[None]:
    """Have variables appear with other values, in this thread alone."""
    # To learn which attributes of an optimizer it need not save, Keras makes one, and so a variable, which the scope
    # does not allow. What it learns it would keep for the thread, but looks for it under another name (3.15).
    skipped = saving_lib.get_attr_skipset("Optimizer")
    global_state.set_global_attribute("saving_attr_skiplist_Optimizer", skipped)
    with _Scope() as scope:
        for update in held:
            scope.add_update(update)
        yield


class _Scope(keras.StatelessScope):
    def get_current_value(self, variable: Any) -> Any:
        """The array of `variable` as a tensor, made when it is asked for and gone when it is written."""
        array = super().get_current_value(variable)
        return None if array is None else keras.ops.convert_to_tensor(array)


def _are_equal(array: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> bool:
    """Whether the bytes are the same, compared in parts, for which there is a cache."""
    one, other = _words(array), _words(value)
    step = _COMPARED_BYTES // one.itemsize
    return all(
        np.array_equal(one[start:end], other[start:end])
        for start, end in itertools.pairwise([*range(0, len(one), step), len(one)])
    )


def _words(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.int64 if flat.nbytes % 8 == 0 else np.uint8)
