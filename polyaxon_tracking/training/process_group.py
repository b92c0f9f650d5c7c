"""The process group of one training: all processes act together, so that no rank waits for ever in a collective."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from polyaxon_tracking.errors import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polyaxon_tracking.checkpoint_names import Checkpoint
    from polyaxon_tracking.checkpoints import CheckpointManager
    from polyaxon_tracking.storage.staged import StagedFile
    from polyaxon_tracking.training.preemption import PreemptionHandler

__all__ = ["Flags", "ProcessGroup"]

_T = TypeVar("_T")

_logger = logging.getLogger("polyaxon_tracking")

SECONDS_UNTIL_WARNING = 30

_WAITING = (
    "Rank %d has waited %d s for the other ranks. Either another rank is still writing or verifying a checkpoint, or "
    "not all ranks take part: call a method that saves a checkpoint on every rank, and not on rank 0 only"
)


class Flags(NamedTuple):
    """The requests of one process, or those of all processes combined: then each field is the maximum of all ranks."""

    signal: int = 0
    """The number of the signal that requested the end of training, or 0."""
    save: int = 0
    """1 if a save is due by the clock."""
    failed: int = 0
    """1 if a background write failed."""


class ProcessGroup:
    """The processes that train one model together. This base class is the group of a single process.

    An integration whose framework trains in several processes subclasses it: the subclass sets `is_distributed` and
    `rank`, and implements `gather` and `reduce_flags` with the framework's own collectives. Each method is a
    collective: all processes must call it at the same place.

    Examples:
        >>> group = ProcessGroup()
        >>> group.gather("value")
        ['value']
        >>> with group.share_errors():
        ...     pass  # if one rank fails here, the block raises on all ranks
    """

    def __init__(self) -> None:
        self.is_distributed: bool = False
        """Whether the group has more than one process."""
        self.rank: int = 0
        """The rank of this process; rank 0 writes the checkpoints."""

    def gather(self, value: _T) -> list[_T]:
        """Return the `value` of every process, in the order of the ranks, once all processes have called `gather`."""
        return [value]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Warn if the block, a collective, does not end soon: a rank that does not take part makes all others wait.

        An integration uses this method in its `gather`.
        """
        seconds = SECONDS_UNTIL_WARNING
        timer = threading.Timer(seconds, _logger.warning, (_WAITING, self.rank, seconds))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def reduce_flags(self, flags: Flags) -> Flags:
        """Contribute this process's `flags`, and return the flags of all processes combined.

        With several processes, this method returns the combined flags of the previous call, so that no process waits
        for the reduction. Every process calls it at the end of the same batch, so all processes receive the same flags
        at the same batch, one batch later.
        """
        return flags

    def close(self) -> None:
        """Free what the group holds, because training has ended. Afterwards, `gather` returns only this value."""

    def exit_if_requested(self, preemption: PreemptionHandler) -> None:
        """Exit on all ranks if any rank has received a signal; otherwise return."""
        if requested := max(self.gather(int(preemption.requested or 0))):
            preemption.exit(requested)

    def raise_on_all(self, error: BaseException | None) -> None:
        """Raise `error` in this process, and a ``RuntimeError`` that quotes it in the others; return if none failed.

        Raises:
            RuntimeError: another process has an error, and this process has none.
        """
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RuntimeError(f"Rank {rank} failed, and this one ends with it: {text}")

    @contextlib.contextmanager
    def share_errors(self) -> Iterator[None]:
        """Raise on all processes if the block raises on one, because the others would wait for that process for ever.

        Raises:
            RuntimeError: the block raised on another process, and not on this process.
        """
        if not self.is_distributed:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  # raised on all ranks
            error = caught
        self.raise_on_all(error)

    @contextlib.contextmanager
    def staging(self, stage: Callable[[], StagedFile]) -> Iterator[tuple[StagedFile | None, str]]:
        """Call `stage` on rank 0, and yield its staged file, ``None`` on the other ranks, and the path for all ranks.

        If the ``with`` block raises on rank 0, the staged file is discarded.
        """
        staged = None
        with self.share_errors():
            if self.rank == 0:
                staged = stage()
        with contextlib.nullcontext("") if staged is None else staged.writing() as path:
            yield staged, self.gather(path)[0]

    def latest(self, checkpoints: CheckpointManager) -> Checkpoint | None:
        """Return the newest intact checkpoint, or None; every rank must find the same checkpoint.

        Raises:
            TrackingError: the ranks find different checkpoints, or there are checkpoints and none is intact.
        """
        newest = None
        with self.share_errors():
            newest = checkpoints.latest()
        seen = self.gather((newest and newest.name, checkpoints.directory))
        for rank, (name, directory) in enumerate(seen):
            if name != seen[0][0]:
                raise TrackingError(
                    f"Received different checkpoints on the ranks of one training: rank 0 would resume from "
                    f"{seen[0][0]} in {seen[0][1]}, rank {rank} from {name} in {directory}. Expected the same on all. "
                    f"Have every rank use the same outputs path, on a volume or in a store that all machines share."
                )
        return newest
