"""The callback for Hugging Face's Trainer in two processes, one time started by torchrun."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ranks
from training_scripts import Ended, newest

from polyaxon_tracking import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable


train_ranks = functools.partial(ranks.train_ranks, "transformers")
torchrun = functools.partial(ranks.torchrun, "transformers")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return what both processes of an uninterrupted training print."""
    status, stdout, stderr = train_ranks(tmp_path_factory.mktemp("uninterrupted"))
    assert status == 0, stderr
    assert stderr.count("Starting fresh") == 1
    assert stdout.count("trained 24 ") == 2
    return set(stdout.splitlines())


@pytest.mark.parametrize(
    ("start", "died", "step"),
    [
        pytest.param(torchrun, {"DIE_AT_STEP": "10"}, 8, id="killed"),
        # All know of it one batch later.
        pytest.param(train_ranks, {"DIE_AT_STEP": "9", "SIGNAL": "SIGTERM"}, 10, id="preempted"),
    ],
)
def test_what_happens_to_one_rank_ends_all_and_all_resume(
    tmp_path: Path, uninterrupted: set[str], start: Callable[..., Ended], died: dict[str, str], step: int
) -> None:
    status, _, stderr = start(tmp_path, FOREGROUND="1", ON_RANK="1", **died)
    assert status != 0
    assert newest(tmp_path).step == step, stderr
    status, stdout, stderr = start(tmp_path)
    assert status == 0, stderr
    assert set(stdout.splitlines()) == uninterrupted
    assert len(re.findall(rf"Resuming from .*: epoch 2, step {step}\n", stderr)) == 1


def test_a_write_that_fails_on_the_first_rank_ends_all(tmp_path: Path) -> None:
    status, _, stderr = train_ranks(tmp_path, NO_ROOM_AT_STEP="6", ONCE_SAVED="4")
    assert status == 1
    assert "[rank1]: RuntimeError: Rank 0 failed, and this one ends with it: " in stderr
    assert newest(tmp_path).step == 4


def test_ranks_that_see_different_checkpoints_get_an_error(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    for rank in ("0", "1"):
        (tmp_path / f"outputs{rank}").mkdir()
    with CheckpointManager(f"{outputs}0/checkpoints/resume").save(4, 1, suffix=".checkpoint") as path:
        Path(path).write_text("only one sees it")
    status, stdout, stderr = train_ranks(outputs, OUTPUTS_OF_RANKS=str(outputs))
    assert (status, stdout) == (1, "")
    assert (
        len(re.findall("Received different checkpoints on the ranks of one training: rank 0 would resume", stderr)) == 2
    )
