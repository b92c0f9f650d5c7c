"""Save while training continues, from a copy of the variables in host memory whose arrays are reused."""

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
from polyaxon_tracking.training import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from polyaxon_tracking.training import BackgroundWriter

__all__ = ["Snapshot", "host_value", "substituted_values", "variables_of"]

_logger = logging.getLogger("polyaxon_tracking")

_COMPARED_BYTES = 1 << 22


class Snapshot:
    """Copies a model's variables in memory and writes the copy in a background thread.

    There is only one copy. The model and the training state that are saved after the same step share the copy, because
    their variables have the same bytes. If a variable's bytes have changed, a save waits for the write of the previous
    save.

    Args:
        writer: the thread that writes the copy.
    """

    def __init__(self, writer: BackgroundWriter) -> None:
        self._writer = writer
        self.wait = writer.wait
        self._variables: list[Any] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._filled = False
        self._warned = False

    def save(self, what: str, model: keras.Model, write: Callable[[], None], *, unchanged: bool = False) -> None:
        """Call `write` in the background thread, in which all variables of `model` keep their current values.

        If there is not enough memory for the copy, `write` is called at once in this thread.

        Args:
            what: what `write` writes, for messages.
            model: the model whose variables are copied.
            write: a function that saves the model or the training state.
            unchanged: whether the values are known to be the same as in the previous save, so that no copy is needed.

        Raises:
            BaseException: the error of an earlier write.
        """
        if not self._writer.pending:
            self.wait()  # raises the error of an earlier write
        if not self.reserve(model):
            write()
            return
        if not (unchanged and self._filled):
            self._copy()

        variables, arrays = self._variables, self._arrays

        def write_copy() -> None:
            with substituted_values(zip(variables, arrays, strict=True)):
                write()

        self._writer.submit(what, write_copy)

    def reserve(self, model: keras.Model) -> bool:
        """Allocate the memory for a copy of the variables of `model`.

        Returns:
            Whether there is enough memory for the copy.
        """
        variables = variables_of(model)
        if list(map(id, variables)) == list(map(id, self._variables)):
            return True
        self.wait()
        self._variables, self._arrays, self._filled = [], [], False
        size = sum(host_value(variable).nbytes for variable in variables)
        available = available_memory()
        if size >= available:
            if not self._warned:
                self._warned = True
                _logger.warning(
                    "Saving in the foreground, while training waits: a copy of the state takes %s bytes of memory, "
                    "and %s are available",
                    f"{size:,}",
                    f"{available:,}",
                )
            return False
        self._variables = variables
        self._arrays = arrays = [np.empty_like(host_value(variable)) for variable in variables]

        def fill_with_zeros() -> None:
            for array in arrays:
                array.fill(0)  # the system provides the memory only when it is written to

        self._writer.submit("zeros to the memory for a copy of the state", fill_with_zeros)
        return True

    def free(self) -> None:
        """Let go of the memory of the copy, once pending writes are done with it."""
        self._variables, self._arrays, self._filled = [], [], False

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
    """Return all variables of `model`, each once: of the weights, optimizers, metrics and random number generators."""
    found = [*model.variables, *model.metrics_variables]
    for optimizer in optimizers_of(model).values():
        found += optimizer.variables
    return list({id(variable): variable for variable in found}.values())


def host_value(variable: Any) -> np.ndarray[Any, Any]:
    """Return the value of `variable` in host memory, without a copy if the value is there already."""
    value: Any = variable.value
    array: np.ndarray[Any, Any]
    if keras.backend.is_float_dtype(variable.dtype) and variable.dtype not in ("float16", "float32", "float64"):
        array = keras.ops.convert_to_numpy(value)  # NumPy itself lacks types such as bfloat16
    elif keras.backend.backend() == "torch":
        array = value.detach().cpu().numpy()
    elif keras.backend.backend() == "tensorflow":
        # TensorFlow's own conversions would copy the value.
        array = np.asarray(memoryview(sys.modules["tensorflow"].convert_to_tensor(value)))
    else:
        array = np.asarray(value)
    return array


@contextlib.contextmanager
def substituted_values(pairs: Iterable[tuple[Any, np.ndarray[Any, Any]]]) -> Iterator[None]:
    """Give each variable of `pairs` the value next to it within the ``with`` block, only in this thread."""
    # To find the attributes of an optimizer that it need not save, Keras creates an optimizer and therefore a variable,
    # which a StatelessScope forbids. Keras caches the attributes per thread, but looks them up under another name
    # (3.15). So the attributes are found before the scope begins, and stored under the name that Keras looks up.
    skipped = saving_lib.get_attr_skipset("Optimizer")
    global_state.set_global_attribute("saving_attr_skiplist_Optimizer", skipped)
    with _SubstitutingScope() as scope:
        for pair in pairs:
            scope.add_update(pair)
        yield


class _SubstitutingScope(keras.StatelessScope):
    def get_current_value(self, variable: Any) -> Any:
        """Return the substituted array of `variable` as a tensor, which exists only while the variable is written."""
        array = super().get_current_value(variable)
        return None if array is None else keras.ops.convert_to_tensor(array)


def _are_equal(array: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> bool:
    """Return whether the bytes are the same, comparing parts that are small enough for the processor's cache."""
    first, second = _as_words(array), _as_words(value)
    step = _COMPARED_BYTES // first.itemsize
    return all(
        np.array_equal(first[start:end], second[start:end])
        for start, end in itertools.pairwise([*range(0, len(first), step), len(first)])
    )


def _as_words(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.int64 if flat.nbytes % 8 == 0 else np.uint8)
