"""What the processes of one training agree on, so that none is left behind where all wait for all."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from polyaxon_tracking.errors import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyaxon_tracking.checkpoints import Checkpoint, CheckpointManager
    from polyaxon_tracking.training.preemption import Interruption

__all__ = ["Processes", "Wishes"]

_T = TypeVar("_T")


class Wishes(NamedTuple):
    """What a process wants of all, or all of each: the greatest of each number counts."""

    signal: int = 0
    """The number of a signal that asked for the end of training."""
    save: int = 0
    """1 where a save is due by the clock."""
    failed: int = 0
    """1 where a write in the background failed."""


class Processes:
    """The processes that train one model together: this one alone, where no subclass says otherwise.

    An integration whose framework trains in several processes subclasses it: it sets `several` and `rank`, and lets
    `gather` and `ask` go by the framework's own collectives. All processes call each method at the same place.

    Examples:
        >>> processes = Processes()
        >>> processes.gather("value")
        ['value']
        >>> with processes.together():
        ...     pass  # what one process cannot do, none may take for done
    """

    def __init__(self) -> None:
        self.several: bool = False
        """Whether there are others."""
        self.rank: int = 0
        """The index of this process; the one of rank 0 writes."""

    def gather(self, value: _T) -> list[_T]:
        """The `value` of each process, in their order, when all have called it."""
        return [value]

    def ask(self, wishes: Wishes) -> Wishes:
        """Tell `wishes` to all, and return what all told; with several processes, what they told the time before.

        Every process calls it at the end of the same batch, and goes on while the numbers are under way: so all know
        the same at the same batch, one later.
        """
        return wishes

    def end_where_asked(self, interruption: Interruption) -> None:
        """End all processes as a signal to one of them asked; return where none came."""
        if requested := max(self.gather(int(interruption.requested or 0))):
            interruption.end(requested)

    def raise_error(self, error: BaseException | None) -> None:
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
    def together(self) -> Iterator[None]:
        """Get all processes through the block, or none: the others would wait for one that failed for ever.

        Raises:
            RuntimeError: another process failed.
        """
        if not self.several:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  # raised on all
            error = caught
        self.raise_error(error)

    def latest(self, checkpoints: CheckpointManager) -> Checkpoint | None:
        """The newest intact checkpoint that the first process sees; the others must see it too.

        Raises:
            TrackingError: they do not, or there are checkpoints and none is intact.
        """
        newest = None
        with self.together():
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
