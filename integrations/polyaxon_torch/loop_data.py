"""The position of a loop in the data of its current epoch, on each rank."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from polyaxon_torch.data_position import DataPosition
from polyaxon_torch.rng import torch_random_state
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from polyaxon_tracking.training import ProcessGroup

__all__ = ["LoopData"]

_logger = logging.getLogger("polyaxon_tracking")


class LoopData:
    """The data loaders that a loop iterates over in each epoch, and its position in each of them.

    Args:
        process_group: the processes that train together; each has its own part of the data.
    """

    def __init__(self, process_group: ProcessGroup) -> None:
        self._process_group = process_group
        self._ranks = len(process_group.gather(None))
        self.is_in_batch = False
        """Whether the script works on a batch."""
        self._begun = 0
        """The number of loaders whose batches the script has asked for in this epoch."""
        self._positions: dict[int, DataPosition] = {}
        """The position in each loader, in the order of the script."""
        self._at_step: tuple[int, dict[str, Any]] | None = None
        """The loader, and the position in it, at the end of the last step in this epoch."""
        self._random_at_step: dict[str, Any] = {}
        self._resumed: dict[int, dict[str, Any]] = {}
        """The positions to resume from, until the script asks for the batches of the loader."""
        self._resumed_loaders = 0
        """The number of loaders that were begun in the epoch to resume within, or 0 at the end of an epoch."""

    @property
    def resumes_within_epoch(self) -> bool:
        """Return whether a position within an epoch was loaded, and the script has not come to it yet."""
        return self._resumed_loaders > 0

    def batches(self, loader: Iterable[Any], epoch: int, restore_random_numbers: Callable[[], None]) -> Iterator[Any]:
        """Yield the batches of `loader` that are left in the current epoch.

        Args:
            loader: the data loader.
            epoch: the index of the current epoch.
            restore_random_numbers: called before the first batch if the loop resumes within these batches.

        Raises:
            TrackingError: the loop also iterates over another loader at the same time, or the loader is not the one
                whose position was saved.
        """
        index, self._begun = self._begun, self._begun + 1
        position = self._positions[index] = DataPosition(loader)
        state = self._resumed.pop(index, None)
        if state is not None:
            position.load_state_dict(state)
        resumes_here = self._begun == self._resumed_loaders
        if resumes_here:
            self._resumed_loaders = 0
            restore_random_numbers()
        batches = position.batches(epoch)
        if self._begun < self._resumed_loaders:  # the script was past this loader, which it may have left with `break`
            return
        for batch in batches:
            resumes_here = False
            self.is_in_batch = True
            yield batch
            self.is_in_batch = False
            if self._begun != index + 1:
                raise TrackingError(
                    "Received calls of `batches` for two loaders whose batches are used at the same time. Expected "
                    "that the loop over the first ends before the next begins. To train on both at once, pass one "
                    "iterable that yields batches of both."
                )
        if resumes_here and self._process_group.rank == 0:
            _logger.info("All batches of epoch %d were done before: the loop over them has none left", epoch)

    def record_step(self) -> None:
        """Record the position and torch's random numbers, because a step has ended here."""
        if self._begun:
            self._at_step = self._begun - 1, self._positions[self._begun - 1].state_dict()
        self._random_at_step = torch_random_state()

    def end_epoch(self) -> None:
        """Begin the next epoch, in which no data has been used yet."""
        self._begun = self._resumed_loaders = 0
        self._at_step = None

    def state_dict(self, *, at_step: bool) -> list[dict[str, Any]]:
        """Return the positions on each rank. This is a collective.

        Args:
            at_step: whether to return the position at the end of the last step, and not the current position.
        """
        begun = self._begun
        positions = self._resumed | {index: position.state_dict() for index, position in self._positions.items()}
        if at_step and self._at_step is not None:
            index, position = self._at_step
            begun, positions[index] = index + 1, position
        return self._process_group.gather({"begun": begun, "positions": positions})

    def random_state(self, *, at_step: bool) -> dict[str, Any]:
        """Return those of the random numbers that were recorded at the end of the last step, if `at_step`."""
        return self._random_at_step if at_step else {}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Resume from what `state_dict` returned.

        With another number of ranks, each rank's part of the data is another one. Then the epoch's data starts over.
        """
        rank = self._process_group.rank
        if self.has_as_many_ranks(states):
            self._resumed, self._resumed_loaders = states[rank]["positions"], states[rank]["begun"]
        elif states[0]["begun"] and rank == 0:
            _logger.warning(
                "Resuming within an epoch with %d processes, saved with %d: the epoch's data starts from its "
                "beginning, so that some of it comes twice",
                self._ranks,
                len(states),
            )

    def has_as_many_ranks(self, states: list[Any]) -> bool:
        """Return whether `states` has one state for each of the ranks that train now."""
        return len(states) == self._ranks
