"""What the processes of one training agree on, so that none is left behind where all wait for all."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from polyaxon_tracking.errors import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyaxon_tracking.checkpoints import Checkpoint, CheckpointManager
    from polyaxon_tracking.training.preemption import PreemptionHandler

__all__ = ["Flags", "ProcessGroup"]

_T = TypeVar("_T")


class Flags(NamedTuple):
    """What a process wants of all, or all of each: the greatest of each number counts."""

    signal: int = 0
    """The number of a signal that asked for the end of training."""
    save: int = 0
    """1 where a save is due by the clock."""
    failed: int = 0
    """1 where a write in the background failed."""


class ProcessGroup:
    """The processes that train one model together: this one alone, where no subclass says otherwise.

    An integration whose framework trains in several processes subclasses it: it sets `several` and `rank`, and lets
    `gather` and `reduce_flags` use the framework's own collectives. All processes call each method at the same place.

    Examples:
        >>> group = ProcessGroup()
        >>> group.gather("value")
        ['value']
        >>> with group.share_errors():
        ...     pass  # what one process cannot do, none may take for done
    """

    def __init__(self) -> None:
        self.is_distributed: bool = False
        """Whether there are others."""
        self.rank: int = 0
        """The index of this process; the one of rank 0 writes."""

    def gather(self, value: _T) -> list[_T]:
        """The `value` of each process, in their order, when all have called it."""
        return [value]

    def reduce_flags(self, flags: Flags) -> Flags:
        """Tell `flags` to all, and return what all told; with several processes, what they told the time before.

        Every process calls it at the end of the same batch, and goes on while the numbers are under way: so all know
        the same at the same batch, one later.
        """
        return flags

    def exit_if_requested(self, preemption: PreemptionHandler) -> None:
        """End all processes as a signal to one of them asked; return where none came."""
        if requested := max(self.gather(int(preemption.requested or 0))):
            preemption.exit(requested)

    def raise_on_all(self, error: BaseException | None) -> None:
        """Raise `error` in this process, and one that tells of it in the others; return where no process has any.

        Raises:
            RuntimeError: another process has one.
        """
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise RuntimeError(f"Rank {rank} failed, and this one ends with it: {text}")

    @contextlib.contextmanager
    def share_errors(self) -> Iterator[None]:
        """Get all processes through the block, or none: the others would wait for one that failed for ever.

        Raises:
            RuntimeError: another process failed.
        """
        if not self.is_distributed:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  # raised on all
            error = caught
        self.raise_on_all(error)

    def latest(self, checkpoints: CheckpointManager) -> Checkpoint | None:
        """The newest intact checkpoint that the first process sees; the others must see it too.

        Raises:
            TrackingError: they do not, or there are checkpoints and none is intact.
        """
        newest = None
        with self.share_errors():
            newest = checkpoints.latest()
        seen = self.gather((newest and newest.name, checkpoints.directory))
        for rank, (name, directory) in enumerate(seen):
            if name != seen[0][0]:
                raise TrackingError(
                    f"Received different checkpoints on the ranks of one training: rank 0 would go on from "
                    f"{seen[0][0]} in {seen[0][1]}, rank {rank} from {name} in {directory}. Expected the same on all. "
                    f"Have every rank use the same outputs path, on a volume or in a store that all machines share."
                )
        return newest
