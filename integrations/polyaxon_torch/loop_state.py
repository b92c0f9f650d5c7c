"""The file with the training state of a loop of the user's own."""

from __future__ import annotations

import functools
import pickle
from typing import TYPE_CHECKING, Any

import torch

from polyaxon_torch.nan import has_nan
from polyaxon_torch.plain_values import check_plain, how_to_allow, load_state, plain_numbers, refused_state
from polyaxon_torch.snapshot import Snapshot, tensors_in
from polyaxon_tracking import TrackingError, atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from polyaxon_tracking import Checkpoint
    from polyaxon_tracking.training import TrainingSession

__all__ = ["METADATA_KEY", "LoopStateFile"]

METADATA_KEY = "polyaxon_tracking"
"""The key, in a training state, of what is not the state of an object."""


class LoopStateFile:
    """Write the training states of one loop, in the background if the options say so, and read them.

    Args:
        session: the session of the training.
        weights_only: whether to load only tensors and plain values.
    """

    def __init__(self, session: TrainingSession, *, weights_only: bool) -> None:
        self._session = session
        self._weights_only = weights_only
        self._is_checked = not weights_only
        writes_in_background = session.options.background and session.is_writer
        self._snapshot = Snapshot(session.writer) if writes_in_background else None

    def reserve_memory(self, state: Mapping[str, Any]) -> None:
        """Allocate the memory for the copy of `state` in the background, before the first save needs it."""
        if self._snapshot is not None:
            self._snapshot.reserve(tensors_in(state))

    def save(self, state: dict[str, Any], models: Iterable[str]) -> None:
        """Save `state` as the newest checkpoint. This is a collective.

        Args:
            state: the state of each object by its name, and the metadata, with the ``step`` and the ``epoch``.
            models: the names of the objects that are models, whose weights are searched for NaN.

        Raises:
            TrackingError: the state is the first, and holds more than `load` would load.
            Exception: the write, or the previous write in the background, failed.
        """
        with self._session.process_group.share_errors():
            if not self._session.is_writer:
                return
            if self._weights_only:
                state = plain_numbers(state)
            if not self._is_checked:
                check_plain(state, how_to_allow("TrainingLoop"))
                self._is_checked = True
            step = state[METADATA_KEY]["step"]
            what = f"step {step} to {self._session.checkpoints.directory}"
            self._write(what, step, state, functools.partial(self._write_state, [*models]))

    def save_weights(self, path: str, step: int, weights: dict[str, Any]) -> None:
        """Save the state dicts `weights` as the file `path`, which is replaced when it is complete. A collective."""
        with self._session.process_group.share_errors():
            if self._session.is_writer:
                self._write(path, step, weights, functools.partial(_write_weights, path))

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the training state in `checkpoint`, in host memory.

        Raises:
            TrackingError: the file holds more than tensors and plain values, and only these may be loaded; or no
                TrainingLoop has saved it.
        """
        try:
            state = load_state(checkpoint.path, weights_only=self._weights_only)
        except pickle.UnpicklingError as error:
            raise refused_state(checkpoint.source, error, "TrainingLoop") from error
        if not (isinstance(state, dict) and METADATA_KEY in state):
            raise TrackingError(
                f"Received {checkpoint.source}, which no TrainingLoop has saved. Expected an outputs path with only "
                f"its checkpoints: use another outputs path, or another `name`, for this training."
            )
        return state

    def close(self) -> None:
        """Free the memory of the snapshot, once all writes are done."""
        self._snapshot = None

    def _write(self, what: str, step: int, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        if self._snapshot is None:
            write(state)
        else:
            self._snapshot.save(what, step, state, write)

    def _write_state(self, models: list[str], state: dict[str, Any]) -> None:
        nan = any(has_nan(state[name].values()) for name in models)
        step, epoch = state[METADATA_KEY]["step"], state[METADATA_KEY]["epoch"]
        with self._session.checkpoints.save(step, epoch, suffix=".pt", has_nan=nan) as path:
            torch.save(state, path)


def _write_weights(path: str, weights: dict[str, Any]) -> None:
    with atomic_write(path) as staged:
        torch.save(weights, staged)
