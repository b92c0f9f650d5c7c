"""The position of a training within an epoch of a data loader: the batches that are done, and the order of the rest."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch

from polyaxon_torch.data_order import (
    OrderGenerators,
    drop,
    has_state,
    index_batches,
    length,
    reads_items,
    sampling_loader,
    set_epoch,
)
from polyaxon_torch.rng import random_state, set_random_state
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["DataPosition"]

_logger = logging.getLogger("polyaxon_tracking")

_END = object()


class DataPosition:
    """Iterate over a data loader, and resume within the epoch, exactly after the batch at which a state was taken.

    Resuming draws the order of the epoch again, from the random number generators as they were when the epoch began,
    and skips the finished batches inside the batch sampler, so that no row of them is loaded. This holds with workers,
    ``shuffle=True``, a ``DistributedSampler``, any other sampler or batch sampler, and data loaders that Fabric or
    Accelerate have set up. A data loader with a ``state_dict`` is asked for it; so is an ``IterableDataset`` with one,
    without workers. From any other iterable, the batches that are done are read and dropped, and a log line says so.

    The caller saves and restores the global random numbers, and restores them before `batches` is called. `batches`
    then leaves them as they were at that call, whatever drawing the order again takes.

    Not exact are

    - the random numbers that workers draw to load a batch, unless batches are read and dropped,
    - without workers, the random numbers that Accelerate draws for the one batch that it loads ahead,
    - a sampler that draws from a global generator during the epoch. Those of torch draw at its start, and are exact.

    Args:
        loader: the data loader, or another iterable of batches.

    Examples:
        >>> import torch
        >>> loader = torch.utils.data.DataLoader(range(6), batch_size=2, shuffle=True)
        >>> position = DataPosition(loader)
        >>> batches = position.batches(0)
        >>> first, state = next(batches), position.state_dict()
        >>> rest = list(batches)
        >>> resumed = DataPosition(loader)
        >>> resumed.load_state_dict(state)
        >>> all(map(torch.equal, resumed.batches(0), rest))
        True
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader: Any = loader
        self._inner: Any = sampling_loader(loader)
        self._stateful = _stateful(loader, self._inner)
        self._has_sampler = self._inner is not None and not reads_items(self._inner)
        is_followed = self._has_sampler and self._stateful is None
        self._index_batches = index_batches(self._inner) if is_followed else None
        self._generators = OrderGenerators(loader)
        self._start: dict[str, Any] = {}
        self._data = self._description()
        self._epoch = self._done = self._drawn = 0
        self._is_finished = self._keeps_workers = False
        self._resumed: dict[str, Any] | None = None

    def batches(self, epoch: int) -> Iterator[Any]:
        """Begin `epoch`, or resume within it, and return an iterator over its batches that are left.

        Calls ``set_epoch`` of the samplers and of the data set, if they have one.
        """
        resumed, self._resumed = self._resumed, None
        self._keeps_workers = self._has_persistent_workers() and (resumed is not None or self._was_begun())
        if resumed is not None:
            if resumed["epoch"] == epoch:
                self._keeps_workers = resumed["keeps_workers"]
            if resumed["epoch"] != epoch or resumed["finished"]:
                self._drop_iterator()
            self._generators.set_own_state(resumed["generators"])
            if resumed["epoch"] != epoch or not resumed["batches"]:
                resumed = None
        if self._index_batches is not None:
            self._index_batches.was_begun = True
        self._epoch = epoch
        self._done = self._drawn = 0 if resumed is None else resumed["batches"]
        self._is_finished = resumed is not None and resumed["finished"]
        set_epoch(self._loader, epoch)
        return iter(()) if self._is_finished else self._iterate(resumed)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was taken from `batches`, as tensors and plain values."""
        if self._resumed is not None:
            return self._resumed
        # A loader without a state is asked for one batch more than it has: its sampler may draw numbers at its end.
        is_at_end = self._is_finished or (
            self._stateful is not None and self._has_sampler and self._done == length(self._loader)
        )
        is_asked = self._stateful is not None and self._done > 0 and not is_at_end
        return {
            "epoch": self._epoch,
            "batches": self._done,
            "drawn": self._drawn,
            "finished": is_at_end,
            "keeps_workers": self._keeps_workers,
            "start": self._start,
            "generators": self._generators.own_state(),
            "data": self._data,
            "state": self._stateful.state_dict() if is_asked else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next `batches` resume from `state`, if it is called with the epoch of `state`.

        If it is called with another epoch, that epoch is begun, with the data loader's own generators as in `state`.

        Raises:
            TrackingError: `state` was taken within an epoch of other data, or of another kind of data loader.
        """
        if state["batches"] and not state["finished"] and state["data"] != self._data:
            raise TrackingError(
                f"Received a data loader with {_text(self._data)}, while the state was saved after "
                f"{state['batches']:,} batches of a data loader with {_text(state['data'])}. Expected the same, "
                f"because training resumes within the epoch. Undo the change, or pass "
                f"resume=False to start from scratch; the checkpoint stays as it is."
            )
        self._resumed = state

    def _iterate(self, resumed: dict[str, Any] | None) -> Iterator[Any]:
        self._start = self._generators.state() if resumed is None else resumed["start"]
        resumption = None if resumed is None else _Resumption(resumed, self._generators)
        if self._index_batches is not None:
            iterator, batch = self._in_order(resumption)
        else:
            iterator, batch = self._as_given(resumption)
        while batch is not _END:
            self._done += 1
            yield batch
            batch = next(iterator, _END)
        self._is_finished = True

    def _in_order(self, resumption: _Resumption | None) -> tuple[Iterator[Any], Any]:
        """Return an iterator whose batch sampler passes over the batches that are done, and its first batch."""
        assert self._index_batches is not None
        runs_workers = self._has_persistent_workers() and self._index_batches.was_drawn
        is_drawn = False

        def draw(batch_sampler: Iterable[Any]) -> Iterator[Any]:
            nonlocal is_drawn
            is_drawn = True
            # Starting workers draws their seed. Where the saved epoch had no such draw, undo it; where it had, draw.
            if runs_workers != self._keeps_workers:
                self._generators.set_state(self._start)
                if runs_workers:
                    torch.empty((), dtype=torch.int64).random_(generator=self._inner.generator)
            set_epoch(self._loader, self._epoch)  # again, because Fabric has just set its own count
            indices = iter(batch_sampler)
            if resumption is not None:
                drop(indices, resumption.batches)
                yield from self._counted(itertools.islice(indices, resumption.drawn - resumption.batches))
                resumption.end()
            yield from self._counted(indices)

        if resumption is not None:
            resumption.begin()
        with self._index_batches.drawn_by(self._inner, draw):
            iterator = iter(self._loader)
            batch = next(iterator, _END)
        if resumption is not None:
            if not is_drawn:  # a data loader that does not read what its batch sampler gives
                self._read_and_drop(iterator, resumption.batches - 1)
                resumption.end()
                batch = next(iterator, _END)
            resumption.end_random()
        return iterator, batch

    def _as_given(self, resumption: _Resumption | None) -> tuple[Iterator[Any], Any]:
        """Return an iterator that resumes by a state, or whose batches that are done are read, and its next batch."""
        if resumption is None:
            iterator = iter(self._loader)
        elif self._stateful is not None:
            self._stateful.load_state_dict(resumption.state)
            iterator = iter(self._loader)
            if self._loader is not self._inner:  # such an iterator starts only now
                batch = next(iterator, _END)
                resumption.end()
                return iterator, batch
            resumption.end()
        else:
            resumption.begin()
            iterator = iter(self._loader)
            self._read_and_drop(iterator, resumption.batches)
            resumption.end()
        return iterator, next(iterator, _END)

    def _has_persistent_workers(self) -> bool:
        return bool(getattr(self._inner, "persistent_workers", False))

    def _was_begun(self) -> bool:
        return self._index_batches is not None and self._index_batches.was_begun

    def _drop_iterator(self) -> None:
        """Let go of the iterator that a data loader with a state already has, as Accelerate's: it has drawn numbers."""
        if self._stateful is not None and self._has_sampler:
            numbers = random_state()
            iter(self._inner)
            set_random_state(numbers)

    def _counted(self, indices: Iterable[Any]) -> Iterator[Any]:
        for batch in indices:
            self._drawn += 1
            yield batch

    def _read_and_drop(self, iterator: Iterator[Any], number: int) -> None:
        """Read the first `number` batches of the epoch again. They were done before."""
        _logger.info(
            "Resuming within epoch %d: the first %s batches are read and dropped, because the data has neither a "
            "sampler nor a state_dict",
            self._epoch,
            f"{self._done:,}",
        )
        if (found := drop(iterator, number)) < number:
            _logger.warning(
                "Epoch %d ends at once: %s of its batches were done before, and its data now has only %s. Is a part of "
                "the data missing?",
                self._epoch,
                f"{self._done:,}",
                f"{found + self._done - number:,}",
            )

    def _description(self) -> dict[str, Any]:
        kind = "no sampler" if self._index_batches is None else "a sampler"
        return {
            "kind": kind if self._stateful is None else "a state_dict",
            "batches": length(self._loader),
            "rows": length(getattr(self._inner, "dataset", None)),
            "batch_size": getattr(self._inner, "batch_size", None),
        }


class _Resumption:
    """The random numbers while an epoch is resumed: those of its beginning, until what was drawn is drawn again."""

    def __init__(self, resumed: dict[str, Any], generators: OrderGenerators) -> None:
        self.batches: int = resumed["batches"]
        self.drawn: int = resumed["drawn"]
        self.state: Any = resumed["state"]
        self._start, self._own = resumed["start"], resumed["generators"]
        self._generators = generators
        self._random: dict[str, Any] | None = random_state()

    def begin(self) -> None:
        """Set all generators as they were when the epoch began."""
        self._generators.set_state(self._start)

    def end(self) -> None:
        """Set all generators as they were when the state was taken, once."""
        if self._random is not None:
            self._generators.set_own_state(self._own)
        self.end_random()

    def end_random(self) -> None:
        """Set the global generators as they were when the state was taken, once.

        The data loader's own generators have then drawn fewer or more batches ahead than at that time.
        """
        if self._random is not None:
            set_random_state(self._random)
            self._random = None


def _stateful(loader: Any, inner: Any) -> Any:
    """Return what has the state of the position: the data loader, its data set, or nothing."""
    if has_state(inner) or (inner is None and has_state(loader)):
        return loader if has_state(loader) else inner
    is_read_here = inner is loader and inner is not None and not inner.num_workers
    return inner.dataset if is_read_here and reads_items(inner) and has_state(inner.dataset) else None


def _text(data: dict[str, Any]) -> str:
    numbers = {"batches": data["batches"], "rows": data["rows"], "batch_size": data["batch_size"]}
    given = [f"{name}={number:,}" for name, number in numbers.items() if number is not None]
    return ", ".join([data["kind"], *given])
