"""What the processes of one training on JAX agree on, so that none is left behind in a collective."""

from __future__ import annotations

import contextlib
import pickle
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from polyaxon_keras.framework import keras
from polyaxon_keras.snapshot import variables_of
from polyaxon_tracking.training import Flags, ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["JaxProcessGroup"]

_T = TypeVar("_T")


class JaxProcessGroup(ProcessGroup):
    """The processes of ``jax.distributed`` that train one model, and how they tell each other what concerns them all.

    Where there is one process, every method returns at once. Keras has several on JAX alone, and only with a
    distribution: without one, each trains a model of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_distributed = (
            keras.backend.backend() == "jax"
            and keras.distribution.distribution() is not None
            and _jax().process_count() > 1
        )
        self.rank = _jax().process_index() if self.is_distributed else 0
        self._flags: Any = None
        if self.is_distributed:
            self._rows, self._maximum = _reduction()

    def gather(self, value: _T) -> list[_T]:
        """The `value` of each process, in their order, when all have called it."""
        if not self.is_distributed:
            return [value]
        content = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = _allgather(np.asarray(content.size))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: content.size] = content
        rows = zip(_allgather(padded), sizes, strict=True)
        return [pickle.loads(row[:size].tobytes()) for row, size in rows]  # noqa: S301  # of this training itself

    def reduce_flags(self, flags: Flags) -> Flags:
        """Tell `flags` to all, and return what all told each other the time before."""
        if not self.is_distributed:
            return flags
        before, self._flags = self._flags, None
        told = Flags(*([] if before is None else np.asarray(before.addressable_data(0)).tolist()))
        rows = _jax().make_array_from_process_local_data(self._rows, np.array([flags], np.int32))
        self._flags = self._maximum(rows)
        return told

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """Whether this is the process that writes; within the block the variables that it makes are its own.

        To save an optimizer, Keras makes one, whose variables would be spread over all processes: a collective. The
        threads that write in the background have no distribution.

        Raises:
            RuntimeError: another process failed in the block.
        """
        with self.share_errors():
            distribution = keras.distribution.distribution()
            if self.is_distributed:
                keras.distribution.set_distribution(None)
            try:
                yield self.rank == 0
            finally:
                if self.is_distributed:
                    keras.distribution.set_distribution(distribution)

    def splits(self, model: keras.Model) -> bool:
        """Whether a variable of `model` has parts in several processes."""
        return self.is_distributed and not all(variable.value.is_fully_replicated for variable in variables_of(model))

    def collect(self, model: keras.Model) -> list[tuple[Any, np.ndarray[Any, Any]]]:
        """Where variables of `model` are split: each with its whole value, in the first process; else nothing."""
        if not self.splits(model):
            return []
        whole = ((variable, _allgather(variable.value, tiled=True)) for variable in variables_of(model))
        return [one for one in whole if self.rank == 0]


def _jax() -> Any:
    return sys.modules["jax"]


def _allgather(value: Any, *, tiled: bool = False) -> np.ndarray[Any, Any]:
    from jax.experimental import multihost_utils

    gathered: np.ndarray[Any, Any] = multihost_utils.process_allgather(value, tiled=tiled)
    return gathered


def _reduction() -> tuple[Any, Any]:
    """The sharding of an array with a row of each process, and the greatest of each column, which all get."""
    jax = _jax()
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = jax.sharding.Mesh(devices, ("processes", "devices"))
    rows, same = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["processes"], []))
    return rows, jax.jit(_greatest, out_shardings=same)


def _greatest(rows: Any) -> Any:
    return rows.max(0)
