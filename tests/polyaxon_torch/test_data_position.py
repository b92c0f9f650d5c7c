"""A training that resumes within an epoch is given the data that an uninterrupted training would have been given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
from torch.utils.data import DataLoader, IterableDataset

from polyaxon_torch import DataPosition
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).with_name("data_position_script.py")

WITH_SAMPLER = [
    "",
    "in order",
    "drop_last",
    "generator",
    "replacement",
    "weighted",
    "several passes",
    "own generators",
    "distributed",
    "distributed batches",
    "batches of python",
    "batches of numpy",
    "list of batches",
    "unbatched",
    "workers",
    "workers replacement",
    "persistent workers",
    "persistent workers generator",
    "own class",
    "wrapped",
    "fabric",
    "fabric distributed",
    "accelerate noiseless",
    "accelerate workers replacement",
]
WITH_STATE = ["stateful", "stateful workers", "stateful generator", "accelerate stateful noiseless", "items remembered"]
READ = ["items", "items workers", "without its sampler", "list"]


def lines(process: Any, word: str) -> list[list[str]]:
    assert process.returncode == 0, process.stderr
    return [line.split()[1:] for line in process.stdout.splitlines() if line.startswith(word)]


# What trains, and what resumes, if that is not the same: the number of workers may change.
CHANGED = {"noiseless replacement": "noiseless workers replacement"}
CHANGED |= {after: before for before, after in CHANGED.items()}


@pytest.mark.parametrize("kind", [*WITH_SAMPLER, *WITH_STATE, *READ, *CHANGED])
def test_the_data_after_each_batch_is_that_of_an_uninterrupted_epoch(tmp_path: Path, kind: str) -> None:
    [digests] = lines(forked.run("lightning", SCRIPT, kind, tmp_path), "all")
    resumed = forked.run("lightning", SCRIPT, CHANGED.get(kind, kind), tmp_path, "resume")
    left = {after: rest for after, _, *rest in lines(resumed, "after")}
    batches = len(digests) // 3
    expected = {str(after): digests[batches + after :] for after in range(1, batches + 1)}
    assert left == expected | {"ended": digests[2 * batches :]}
    if kind in WITH_SAMPLER:  # what was loaded was given
        assert {surplus for _, surplus, *_ in lines(resumed, "after")} == {"0"}
    assert ("are read and dropped" in resumed.stderr) == (kind in READ)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_stream_that_has_become_shorter_than_what_was_done_is_a_warning(
    caplog: pytest.LogCaptureFixture, left: int
) -> None:
    class Stream(IterableDataset[int]):
        def __init__(self, rows: int) -> None:
            self.rows = rows

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.rows))

    position = DataPosition(DataLoader(Stream(6), batch_size=2))
    batches = position.batches(4)
    next(batches), next(batches)
    shorter = DataPosition(DataLoader(Stream(2 * left), batch_size=2))
    shorter.load_state_dict(position.state_dict())
    assert list(shorter.batches(4)) == []
    warning = (
        f"Epoch 4 ends at once: 2 of its batches were done before, and its data now has only {left}. Is a part of the "
        f"data missing?"
    )
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [warning] * (left < 2)


def test_other_data_is_refused_within_an_epoch_and_not_between_two() -> None:
    position = DataPosition(DataLoader(range(6), batch_size=2))  # type: ignore[arg-type]
    batches = position.batches(0)
    next(batches)
    within = position.state_dict()
    list(batches)
    ended = position.state_dict()
    for other in (DataLoader(range(8), batch_size=2), DataLoader(range(6), batch_size=3), list(range(3))):  # type: ignore[arg-type]
        with pytest.raises(
            TrackingError,
            match="after 1 batches of a data loader with a sampler, batches=3, rows=6, batch_size=2",
        ):
            DataPosition(other).load_state_dict(within)
        resumed = DataPosition(other)
        resumed.load_state_dict(ended)
        assert len(list(resumed.batches(1))) == len(other)


def test_the_batch_sampler_of_the_data_loader_stays_the_users() -> None:
    loader = DataLoader(range(6), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    batch_sampler = loader.batch_sampler
    batches = DataPosition(loader).batches(0)
    next(batches)
    assert loader.batch_sampler is batch_sampler
    assert len(list(loader)) == 3  # as a second iterator, while the first is in use
    assert len(list(batches)) == 2
