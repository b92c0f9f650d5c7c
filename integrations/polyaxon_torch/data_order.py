"""What decides the order of a data loader's batches: its batch sampler, its epoch and the generators it draws from."""

from __future__ import annotations

import collections
import contextlib
import itertools
import random
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from polyaxon_torch.rng import random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "IndexBatches",
    "OrderGenerators",
    "draw_again",
    "drop",
    "has_state",
    "index_batches",
    "length",
    "reads_items",
    "sampling_loader",
    "set_epoch",
]


class IndexBatches:
    """Stand in for the batch sampler of a data loader while an iterator over the loader is made.

    Everything but iterating, such as its `batch_size`, is that of the batch sampler.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.was_begun = False
        """Whether an epoch was begun, so that persistent workers run in an uninterrupted training."""
        self.was_drawn = False
        """Whether an epoch was drawn in this process, so that persistent workers run here."""
        self._draw: Callable[[Iterable[Any]], Iterator[Any]] | None = None

    @contextlib.contextmanager
    def drawn_by(self, loader: DataLoader[Any], draw: Callable[[Iterable[Any]], Iterator[Any]]) -> Iterator[None]:
        """Make an iterator over `loader` take its index batches from `draw`, which is given the batch sampler.

        A ``DataLoader`` refuses to set these attributes, because its iterators would not notice. Here no iterator
        exists yet, or that of persistent workers, which has this object since the first epoch.
        """
        name = _batch_sampler_name(loader)
        vars(loader)[name], self._draw = self, draw
        try:
            yield
        finally:
            vars(loader)[name], self._draw = self.batch_sampler, None

    def __iter__(self) -> Iterator[Any]:
        if self._draw is None:
            return iter(self.batch_sampler)
        self.was_drawn = True
        return self._draw(self.batch_sampler)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":  # not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


_INDEX_BATCHES: weakref.WeakKeyDictionary[Any, IndexBatches] = weakref.WeakKeyDictionary()


def index_batches(loader: Any) -> IndexBatches:
    """Return the index batches of `loader`, always the same object, because persistent workers keep it."""
    batch_sampler = getattr(loader, _batch_sampler_name(loader))
    found = _INDEX_BATCHES.get(loader)
    if found is None or not (batch_sampler is found or batch_sampler is found.batch_sampler):
        found = _INDEX_BATCHES[loader] = IndexBatches(batch_sampler)
    return found


def _batch_sampler_name(loader: DataLoader[Any]) -> str:
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def sampling_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the ``DataLoader`` that reads the batches of `loader`: itself, or the one that it wraps.

    Fabric and Accelerate wrap the user's data loader.
    """
    if hasattr(loader, "split_batches"):  # Accelerate's dispatcher: only the first rank reads
        return None
    inner = getattr(loader, "base_dataloader", loader)  # Accelerate's, which says that it is a `DataLoader`
    if isinstance(inner, DataLoader):
        return inner
    held = [value for value in getattr(loader, "__dict__", {}).values() if isinstance(value, DataLoader)]
    return sampling_loader(held[0]) if len(held) == 1 and length(held[0]) == length(loader) else None


def length(sized: Any) -> int | None:
    """Return the length of a data loader or data set, or ``None`` if it has none."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def set_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch`` of the data loader, its samplers and its data set, if they have one."""
    for part in [*_parts(loader), getattr(sampling_loader(loader), "dataset", None)]:
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


class OrderGenerators:
    """The random number generators that the order of a data loader's batches may be drawn from.

    These are the global ones of Python, NumPy and torch, and the generators of its own: attributes of the data loader
    and of its samplers that are a ``torch.Generator``, a ``random.Random``, or a generator of NumPy.
    """

    def __init__(self, loader: Any) -> None:
        kinds = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
        values = [value for part in _parts(loader) for value in getattr(part, "__dict__", {}).values()]
        found = {id(value): value for value in values if isinstance(value, kinds)}
        found.pop(id(torch.default_generator), None)
        self._own = list(found.values())

    def state(self) -> dict[str, Any]:
        """Return the states of the global generators and of the data loader's own."""
        return {"random": random_state(), "own": self.own_state()}

    def own_state(self) -> list[Any]:
        """Return the states of the data loader's own generators, each with its kind."""
        return [[type(generator).__name__, _state(generator)] for generator in self._own]

    def set_state(self, state: dict[str, Any]) -> None:
        """Set all generators to a `state` that `state` returned."""
        set_random_state(state["random"])
        self.set_own_state(state["own"])

    def set_own_state(self, states: list[Any]) -> None:
        """Set the data loader's own generators to what `own_state` returned, if they are as many and of these kinds."""
        if [kind for kind, _ in states] == [type(generator).__name__ for generator in self._own]:
            for generator, (_, state) in zip(self._own, states, strict=True):
                _set_state(generator, state)


def draw_again(
    batch_sampler: Iterable[Any], generators: OrderGenerators, state: dict[str, Any], done: int
) -> Iterator[Any]:
    """Return an iterator over the index batches after the first `done`, in the order that `state` describes.

    Between two batches, the global generators are left as the training has them.

    Args:
        batch_sampler: the batch sampler.
        generators: the generators that it may draw from.
        state: their state when the order began to be drawn (`start`), the number of batches that were `drawn` when the
            state was taken, and the states of the data loader's `own` generators then.
        done: the number of batches to pass over.
    """
    numbers = random_state()
    generators.set_state(state["start"])
    indices = iter(batch_sampler)
    drop(indices, done)
    for batch in itertools.islice(indices, max(0, state["drawn"] - done)):
        of_order = random_state()
        set_random_state(numbers)
        yield batch
        numbers = random_state()
        set_random_state(of_order)
    set_random_state(numbers)
    generators.set_own_state(state["own"])
    yield from indices


def drop(iterator: Iterator[Any], number: int) -> int:
    """Take `number` items from `iterator`, and drop them. Return how many there were."""
    last = collections.deque(enumerate(itertools.islice(iterator, number), start=1), maxlen=1)
    return last[0][0] if last else 0


def _parts(loader: Any) -> list[Any]:
    """Return the data loader, the one that it wraps, and their samplers, also the sampler of a sampler."""
    parts = [loader, sampling_loader(loader)]
    for part in parts:  # which grows
        for name in ("batch_sampler", "sampler"):
            inner = getattr(part, name, None)
            if inner is not None and not any(inner is one for one in parts):
                parts.append(inner)
    return parts


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def _plain(state: Any) -> Any:
    """Return a state of NumPy with lists of numbers instead of arrays."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


def has_state(loader: Any) -> bool:
    """Return whether `loader` resumes within an epoch, because it has a state."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def reads_items(loader: DataLoader[Any]) -> bool:
    """Return whether the data set of `loader` gives items one after the other, so that no sampler chooses them."""
    return isinstance(loader.dataset, IterableDataset)
