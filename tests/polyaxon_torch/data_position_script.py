"""Read three epochs of a data loader, or resume within the second, and print a digest of each batch.

``data_position_script.py KIND DIRECTORY [resume]``. The first run saves the position after each batch of the second
epoch, and the second run resumes from each of them. Between two batches, random numbers are drawn as by dropout.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from polyaxon_torch import DataPosition, random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS, BATCH_SIZE, EPOCHS, CUT_OFF_EPOCH = 20, 3, 3, 1


class Rows(Dataset[torch.Tensor]):
    """Rows with noise, which counts the rows that it loads."""

    def __init__(self, noise: float) -> None:
        self.loaded = torch.zeros(3, dtype=torch.int64).share_memory_()  # by this process and by each worker
        self.noise = noise

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> torch.Tensor:
        worker = get_worker_info()  # whose random numbers are other ones after resuming
        self.loaded[0 if worker is None else worker.id + 1] += 1
        noise = 0 if worker is not None or not self.noise else self.noise * torch.rand(1)
        return torch.tensor([float(row)]) + noise


class Items(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for row in range(first, ROWS, step):
            yield torch.tensor([float(row)]) + torch.rand(1)


class ItemsWithState(IterableDataset[torch.Tensor]):
    def __init__(self) -> None:
        self.first = self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        first, self.first = self.first, 0
        for row in range(first, ROWS):
            self.next = row + 1
            yield torch.tensor([float(row)]) + torch.rand(1)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["next"]


class ShuffledBatches:
    """A batch sampler that draws from a global generator as an epoch begins."""

    def __init__(self, library: str) -> None:
        self.library = library

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(ROWS))
        if self.library == "python":
            random.shuffle(order)
        else:
            np.random.shuffle(order)
        for first in range(0, ROWS, BATCH_SIZE):
            yield order[first : first + BATCH_SIZE]

    def __len__(self) -> int:
        return len(range(0, ROWS, BATCH_SIZE))


class OwnGenerators:
    """A sampler that draws each index when it gives it, from its own generators."""

    def __init__(self) -> None:
        self.python = random.Random(1)
        self.numpy = np.random.default_rng(1)
        self.legacy = np.random.RandomState(1)
        self.torch = torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[int]:
        for _ in range(ROWS):
            numbers = self.python.randrange(ROWS), self.numpy.integers(ROWS), self.legacy.randint(ROWS)
            yield int(sum(numbers) + torch.randint(ROWS, (), generator=self.torch)) % ROWS

    def __len__(self) -> int:
        return ROWS


class DistributedBatches(DistributedSampler[Any]):
    """A batch sampler with `set_epoch`."""

    def __iter__(self) -> Iterator[Any]:
        rows = list(super().__iter__())
        return (rows[first : first + BATCH_SIZE] for first in range(0, len(rows), BATCH_SIZE))

    def __len__(self) -> int:
        return len(range(0, super().__len__(), BATCH_SIZE))


class Doubled(DataLoader[Any]):
    """A data loader whose constructor takes something else, and which changes the batches."""

    def __init__(self, factor: float, dataset: Dataset[Any]) -> None:
        super().__init__(dataset, BATCH_SIZE, shuffle=True)
        self.factor = factor

    def __iter__(self) -> Any:
        return (batch * self.factor for batch in super().__iter__())


class WithoutItsSampler(DataLoader[Any]):
    """A data loader that does not read what its batch sampler gives."""

    def __iter__(self) -> Any:
        return (self.collate_fn([self.dataset[row]]) for row in torch.randperm(len(self)).tolist())


class Wrapper:
    """An object of the user's that changes the batches of a data loader."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch * 2

    def __len__(self) -> int:
        return len(self.loader)


OWN_CLASSES: dict[str, Callable[[], Any]] = {
    "own class": lambda: Doubled(2.0, Rows(1)),
    "without its sampler": lambda: WithoutItsSampler(Rows(1)),
    "list": lambda: [torch.tensor([float(row)]) for row in range(7)],
}

ORDERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "in order": lambda rows: {},
    "replacement": lambda rows: {
        "sampler": RandomSampler(rows, True, num_samples=70, generator=torch.Generator().manual_seed(2))
    },
    "weighted": lambda rows: {"sampler": WeightedRandomSampler([1.0] * ROWS, ROWS)},
    "several passes": lambda rows: {"sampler": RandomSampler(rows, num_samples=3 * ROWS)},
    "own generators": lambda rows: {"sampler": OwnGenerators()},
    "distributed": lambda rows: {"sampler": DistributedSampler(rows, num_replicas=2, rank=1)},
    "distributed batches": lambda rows: {"batch_sampler": DistributedBatches(rows, num_replicas=2, rank=1)},
    "batches of python": lambda rows: {"batch_sampler": ShuffledBatches("python")},
    "batches of numpy": lambda rows: {"batch_sampler": ShuffledBatches("numpy")},
    "list of batches": lambda rows: {"batch_sampler": [[3, 4], [1, 2], [0]]},
    "items": lambda rows: {},
    "": lambda rows: {"shuffle": True},
}


def loader_of(kind: str) -> Any:
    """Return a new data loader: `kind` is an order, and the words of `take`."""
    words = kind.split()

    def take(word: str) -> bool:
        return word in words and words.remove(word) is None

    set_up = next((name for name in ("wrapped", "fabric", "accelerate") if take(name)), "")
    is_stateful = take("stateful")
    without_noise = take("noiseless")
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(1)} if take("generator") else {}
    options |= {"num_workers": 2} if take("workers") else {}
    options |= {"persistent_workers": True} if take("persistent") else {}
    options |= {"drop_last": True} if take("drop_last") else {}
    options |= {"batch_size": None} if take("unbatched") else {}
    own_class = OWN_CLASSES.get(kind)
    if own_class is not None:
        return own_class()
    rows = ItemsWithState() if take("remembered") else Items() if "items" in words else Rows(0 if without_noise else 1)
    options |= ORDERS[" ".join(words)](rows)
    if "batch_sampler" not in options:
        options = {"batch_size": BATCH_SIZE} | options
    loader = (StatefulDataLoader if is_stateful else DataLoader)(rows, **options)
    return _set_up(loader, set_up, is_stateful=is_stateful)


def _set_up(loader: Any, framework: str, *, is_stateful: bool) -> Any:
    if framework == "wrapped":
        return Wrapper(loader)
    if framework == "fabric":
        from lightning.fabric import Fabric

        return Fabric(accelerator="cpu", devices=1).setup_dataloaders(loader)
    if framework == "accelerate":
        from accelerate import Accelerator, DataLoaderConfiguration

        options = DataLoaderConfiguration(use_stateful_dataloader=is_stateful)
        return Accelerator(cpu=True, dataloader_config=options).prepare(loader)
    return loader


def loaded(loader: Any) -> int:
    """Return how many rows the data set of `loader` has loaded."""
    dataset = getattr(getattr(loader, "loader", loader), "dataset", None)
    return int(dataset.loaded.sum()) if isinstance(dataset, Rows) else 0


def digest(batch: torch.Tensor) -> str:
    numbers = torch.rand(1), random.random(), np.random.rand()
    return hashlib.sha256(repr((batch.tolist(), numbers)).encode()).hexdigest()[:16]


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def read_all(kind: str, directory: Path) -> list[str]:
    """Return a digest of each batch, and save each position in the second epoch, and the position at its end."""
    seed(0)
    loader, digests = loader_of(kind), []
    for epoch in range(EPOCHS):
        position = DataPosition(loader)
        for done, batch in enumerate(position.batches(epoch), 1):
            digests.append(digest(batch))
            if epoch == CUT_OFF_EPOCH:
                torch.save((position.state_dict(), random_state()), directory / f"{done}.pt")
        if epoch == CUT_OFF_EPOCH:
            torch.save((position.state_dict(), random_state()), directory / "ended.pt")
    return digests


def read_rest(kind: str, file: Path) -> list[str]:
    """Return the number of rows that were loaded without need, and a digest of each batch after the position."""
    seed(100)
    loader, digests, surplus = loader_of(kind), [], 0
    state, numbers = torch.load(file, weights_only=True)
    set_random_state(numbers)
    for epoch in range(CUT_OFF_EPOCH, EPOCHS):
        position = DataPosition(loader)
        if epoch == CUT_OFF_EPOCH:
            position.load_state_dict(state)
        rows = loaded(loader)
        for batch in position.batches(epoch):
            digests.append(digest(batch))
            rows += batch.numel()
        if epoch == CUT_OFF_EPOCH:
            surplus = loaded(loader) - rows
    return [str(surplus), *digests]


def main(kind: str, directory: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) == 3:
        print("all", *read_all(kind, directory))
        return
    for file in sorted(directory.glob("*.pt")):
        print("after", file.stem, *read_rest(kind, file))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
