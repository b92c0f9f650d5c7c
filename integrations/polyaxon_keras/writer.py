"""Write a model's files in the process of rank 0, in the background if possible."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from polyaxon_keras import training_state
from polyaxon_keras.snapshot import Snapshot, host_value, substituted_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyaxon_keras.framework import keras
    from polyaxon_keras.process_group import JaxProcessGroup
    from polyaxon_tracking.training import TrainingSession

__all__ = ["ModelWriter"]


class ModelWriter:
    """Write the files of one training: the model's own file, and its training states."""

    def __init__(self, session: TrainingSession, process_group: JaxProcessGroup) -> None:
        self._is_unchanged = False
        self._checkpoints = session.checkpoints
        self._process_group = process_group
        self._snapshot = Snapshot(session.writer) if session.options.background and session.is_writer else None
        self._should_reserve_memory = self._snapshot is not None

    def variables_may_have_changed(self) -> None:
        """Copy the variables again for the next write. Without this call, the files of one step share one copy."""
        self._is_unchanged = False

    def free_memory_with(self, owner: object) -> None:
        """Free the memory of the copy when `owner` is gone, because Keras notifies no callback of an exception."""
        if self._snapshot is not None:
            weakref.finalize(owner, self._snapshot.free).atexit = False

    def write(self, what: str, model: keras.Model, write: Callable[[], None]) -> None:
        """Call `write` on rank 0, with the current variables of `model`; from a snapshot if there is one.

        Args:
            what: the file or checkpoint that `write` writes, for messages.
            model: the model, just taken from its callback.
            write: saves the model.
        """
        whole_values = self._process_group.gather_variables(model)
        with self._process_group.rank_0_writes() as is_writer:
            if not is_writer:
                return
            if whole_values:
                with substituted_values(whole_values):
                    write()
            elif self._snapshot is None:
                write()
            else:
                self._snapshot.save(what, model, write, unchanged=self._is_unchanged)
                self._is_unchanged = True

    def write_state(self, model: keras.Model, step: int, epoch: int, metadata: dict[str, Any]) -> None:
        """Save the training state after `step` steps and `epoch` epochs, as `write` does."""

        def write() -> None:
            nan = any(_has_nan(host_value(variable)) for variable in model.trainable_variables)
            with self._checkpoints.save(step, epoch, suffix=".weights.h5", has_nan=nan) as path:
                training_state.save(model, path, metadata)

        self.write(f"step {step} to {self._checkpoints.directory}", model, write)

    def reserve_memory(self, model: keras.Model) -> None:
        """Allocate the memory for copies of the variables of `model`, once, after the first batch created them all."""
        if not self._should_reserve_memory:
            return
        self._should_reserve_memory = False
        if self._snapshot is not None and not self._process_group.is_sharded(model):
            self._snapshot.reserve(model)


def _has_nan(values: np.ndarray[Any, Any]) -> bool:
    """Return whether at most 65,536 evenly spaced elements of `values` hold NaN.

    That is enough because a loss that becomes NaN makes whole weights NaN in one step.
    """
    flat = values.reshape(-1)
    return bool(np.isnan(flat[:: 1 + len(flat) // 65_536].astype(np.float32)).any())
