"""The positions of data loaders without a state within an epoch, which Lightning would start again."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from polyaxon_lightning.framework import pl
from polyaxon_torch import IndexBatches, OrderGenerators, draw_again, has_state, index_batches, reads_items

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Positions", "stop_following", "training_loaders"]


class Positions:
    """The positions of the training data loaders that have a sampler and no state.

    The batches that are done are known from Lightning's count. So a position is the order of the epoch: the random
    number generators as they were when the order began to be drawn.
    """

    def __init__(self) -> None:
        self.resumes_exactly = False
        """Whether training resumes exactly, if it resumes within an epoch."""
        self._positions: list[_Position | None] = []
        self._drawing = contextlib.ExitStack()

    def follow(self, trainer: pl.Trainer, resumed: Callable[[], dict[str, Any] | None]) -> None:
        """Follow the data loaders whenever Lightning has requested them, before it makes their iterators.

        Args:
            trainer: the Trainer.
            resumed: returns the metadata of the state from which training resumes within an epoch, or ``None``.
        """
        fit_loop = trainer.fit_loop
        load_states = fit_loop._load_combined_loader_states  # noqa: SLF001  # the only call between these two

        def load_and_follow() -> None:
            load_states()
            self._find(trainer, resumed())

        fit_loop._load_combined_loader_states = load_and_follow  # type: ignore[method-assign]  # noqa: SLF001

    def _find(self, trainer: pl.Trainer, resumed: dict[str, Any] | None) -> None:
        loaders = training_loaders(trainer)
        self._positions = [_Position(trainer, one) if _has_order(one) else None for one in loaders]
        states: list[Any] = [] if resumed is None else resumed["positions"]
        states = states if len(states) == len(loaders) else [None] * len(loaders)
        for position, state in zip(self._positions, states, strict=True):
            if resumed is not None and position is not None and state is not None:
                position.resume(state, resumed["batches"])
        self.resumes_exactly = all(
            has_state(loader) or (position is not None and state is not None)
            for loader, position, state in zip(loaders, self._positions, states, strict=True)
        )
        self.expect_iterators()

    def expect_iterators(self) -> None:
        """Follow the iterators that are made from now on, because an epoch begins."""
        self._drawing.close()
        for position in self._positions:
            if position is not None:
                self._drawing.enter_context(position.followed())

    def begun(self) -> None:
        """Leave the data loaders as they are, because the epoch has begun.

        Of several data loaders, a short one may start again within the epoch.
        """
        if len(self._positions) == 1:
            self._drawing.close()

    def follow_all(self, trainer: pl.Trainer) -> bool:
        """Return whether training can resume exactly within an epoch: each data loader has an order or a state."""
        loaders = training_loaders(trainer)
        return len(loaders) == len(self._positions) and all(
            has_state(loader) or position is not None for loader, position in zip(loaders, self._positions, strict=True)
        )

    def state(self) -> list[dict[str, Any] | None]:
        """Return the positions, as tensors and plain values."""
        return [None if position is None else position.state() for position in self._positions]

    def free(self) -> None:
        """Let go of the data loaders, because training has ended."""
        self._drawing.close()
        self._positions = []


class _Position:
    """The position of one data loader."""

    def __init__(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._index_batches: IndexBatches = index_batches(loader)
        self._generators = OrderGenerators(loader)
        self._batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        self._epochs: Any = trainer.fit_loop.epoch_progress
        self._start: dict[str, Any] = {}
        self._first = self._epoch = self._drawn = self._done = 0
        self._resumed: dict[str, Any] | None = None

    def resume(self, state: dict[str, Any], batches: int) -> None:
        """Make the next iterator resume from `state`, in an epoch of which `batches` are done."""
        self._resumed = state
        self._done = batches - state["first"]

    def followed(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this position follows the iterators that are made."""
        return self._index_batches.drawn_by(self._loader, self._draw)

    def state(self) -> dict[str, Any] | None:
        """Return the position: the order's beginning, and how many batches of it were drawn."""
        if self._resumed is not None or not self._start:
            return self._resumed
        return {
            "start": self._start,
            "first": self._first,
            "epoch": self._epoch,
            "drawn": self._drawn,
            "own": self._generators.own_state(),
        }

    def _draw(self, batch_sampler: Iterable[Any]) -> Iterator[Any]:
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            self._first, self._epoch = self._batches.current.ready, self._epochs.current.processed
            self._start, self._drawn = self._generators.state(), 0
            indices = iter(batch_sampler)
        else:
            self._first, self._epoch, self._start = resumed["first"], resumed["epoch"], resumed["start"]
            self._drawn = self._done
            self._set_epoch()
            indices = draw_again(batch_sampler, self._generators, resumed, self._done)
        for batch in indices:
            self._drawn += 1
            yield batch

    def _set_epoch(self) -> None:
        """Set the epoch of the samplers, as Lightning does only once the iterators of a resumed epoch are made."""
        for sampler in (self._loader.sampler, getattr(self._loader.batch_sampler, "sampler", None)):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self._epoch)  # type: ignore[union-attr]


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the data loaders of the training batches."""
    return list(pl.utilities.CombinedLoader(trainer.train_dataloader).flattened)


def stop_following(trainer: pl.Trainer) -> None:
    """Undo `Positions.follow`, because the training is over."""
    vars(trainer.fit_loop).pop("_load_combined_loader_states", None)


def _has_order(loader: Any) -> bool:
    """Return whether a sampler decides the order of `loader`."""
    return isinstance(loader, DataLoader) and not has_state(loader) and not reads_items(loader)
