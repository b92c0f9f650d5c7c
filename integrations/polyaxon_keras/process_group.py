"""Collectives between the processes of one training on JAX, used so that no process waits in one forever."""

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
    """The processes of ``jax.distributed`` that train one model, and the collectives between them.

    With only one process, every method returns at once. Keras trains one model in several processes only on JAX and
    only with a ``keras.distribution``. Without a distribution, each process trains its own model.
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
            self._row_sharding, self._column_maximum = _make_reduction()

    def gather(self, value: _T) -> list[_T]:
        """Return the `value` of each process, ordered by rank, after every process has called this method."""
        if not self.is_distributed:
            return [value]
        content = np.frombuffer(pickle.dumps(value), np.uint8)
        with self.waiting():
            sizes = _allgather(np.asarray(content.size))
            padded = np.zeros(sizes.max(), np.uint8)
            padded[: content.size] = content
            rows = zip(_allgather(padded), sizes, strict=True)
        return [pickle.loads(row[:size].tobytes()) for row, size in rows]  # noqa: S301  # of this training itself

    def reduce_flags(self, flags: Flags) -> Flags:
        """Contribute this process's `flags`, and return the combined flags of the previous call.

        No process waits for the collective that this call starts. With one process, `flags` are returned at once.
        """
        if not self.is_distributed:
            return flags
        previous, self._flags = self._flags, None
        combined = Flags(*([] if previous is None else np.asarray(previous.addressable_data(0)).tolist()))
        rows = _jax().make_array_from_process_local_data(self._row_sharding, np.array([flags], np.int32))
        self._flags = self._column_maximum(rows)
        return combined

    @contextlib.contextmanager
    def rank_0_writes(self) -> Iterator[bool]:
        """Suspend the distribution of Keras within the ``with`` block, in which rank 0 writes.

        To save an optimizer, Keras creates another one. With a distribution, the variables of that optimizer would be
        spread over all processes by a collective. The threads that write in the background have no distribution.

        Yields:
            Whether this process is rank 0.

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

    def is_sharded(self, model: keras.Model) -> bool:
        """Return whether a variable of `model` is split over several processes."""
        return self.is_distributed and not all(variable.value.is_fully_replicated for variable in variables_of(model))

    def gather_variables(self, model: keras.Model) -> list[tuple[Any, np.ndarray[Any, Any]]]:
        """Return each variable of `model` with its whole value on rank 0, and an empty list on the other ranks.

        The list is also empty if no variable of `model` is split over several processes.
        """
        if not self.is_sharded(model):
            return []
        whole_values = ((variable, _allgather(variable.value, tiled=True)) for variable in variables_of(model))
        return [pair for pair in whole_values if self.rank == 0]


def _jax() -> Any:
    return sys.modules["jax"]


def _allgather(value: Any, *, tiled: bool = False) -> np.ndarray[Any, Any]:
    from jax.experimental import multihost_utils

    gathered: np.ndarray[Any, Any] = multihost_utils.process_allgather(value, tiled=tiled)
    return gathered


def _make_reduction() -> tuple[Any, Any]:
    """Return the sharding of an array with one row per process, and a function of the maximum of each column.

    The function returns the maxima to every process.
    """
    jax = _jax()
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = jax.sharding.Mesh(devices, ("processes", "devices"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("processes"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return rows, jax.jit(_column_maximum, out_shardings=replicated)


def _column_maximum(rows: Any) -> Any:
    return rows.max(0)
