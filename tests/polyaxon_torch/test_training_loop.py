"""Loops of one's own, killed and started again in their own processes."""

from __future__ import annotations

import functools
import re
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ranks
from training_scripts import Ended, flip_a_bit, newest, newest_position, train, trained

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

STEPS_AN_EPOCH = 8

LOOPS = {
    "plain": {},
    "in the foreground": {"FOREGROUND": "1"},
    "workers": {"WORKERS": "2"},
    "bf16": {"BF16": "1"},
    "gradient scaler": {"SCALER": "1"},
    "torch.compile": {"COMPILE": "1"},
    "fabric": {"SETUP": "fabric"},
    "accelerate": {"SETUP": "accelerate"},
}


def rows_of(stdout: str) -> list[str]:
    """Return the lines about the batches, in their order."""
    return [line for line in stdout.splitlines() if line.startswith("epoch ")]


@functools.cache
def whole(**settings: str) -> subprocess.CompletedProcess[str]:
    """Train without an interruption; several tests compare with it."""
    with tempfile.TemporaryDirectory() as outputs:
        return train("torch", outputs, **settings)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("step", [8, 13])
def test_a_killed_loop_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, loop: str, step: int) -> None:
    settings = {"EVERY": "3", **LOOPS[loop]}
    uninterrupted = whole(**settings)
    killed = train("torch", tmp_path / "killed", **settings, DIE_AT_BATCH=str(step))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train("torch", tmp_path / "killed", **settings)
    assert trained(resumed) == trained(uninterrupted)
    assert f"Resuming from {tmp_path}" in resumed.stderr
    last_saved = step if step % STEPS_AN_EPOCH == 0 else step - step % 3
    assert rows_of(resumed.stdout) == rows_of(uninterrupted.stdout)[last_saved:]


def test_a_loop_without_saves_within_epochs_resumes_at_the_end_of_the_last_epoch(tmp_path: Path) -> None:
    uninterrupted = whole()
    train("torch", tmp_path / "killed", DIE_AT_BATCH="13")
    assert newest_position(tmp_path / "killed") == (8, 1)
    resumed = train("torch", tmp_path / "killed")
    assert trained(resumed) == trained(uninterrupted)
    assert rows_of(resumed.stdout) == rows_of(uninterrupted.stdout)[8:]


@pytest.mark.parametrize("set_up", ["plain", "accelerate"])
def test_accumulated_gradients_are_never_saved_half(tmp_path: Path, set_up: str) -> None:
    """A step is four batches: 2 steps an epoch. The kill comes within a step."""
    settings = {"ACCUMULATE": "4", "EVERY": "1", "SETUP": set_up}
    uninterrupted = whole(**settings)
    train("torch", tmp_path / "killed", **settings, DIE_AT_BATCH="14")
    assert newest_position(tmp_path / "killed") == (3, 1)
    resumed = train("torch", tmp_path / "killed", **settings)
    assert trained(resumed) == trained(uninterrupted)
    assert "after 6 steps, 24 batches" in trained(resumed)


def test_a_signal_while_gradients_are_accumulated_waits_for_the_step(tmp_path: Path) -> None:
    settings = {"ACCUMULATE": "4"}
    uninterrupted = whole(**settings)
    ended = train("torch", tmp_path / "ended", **settings, DIE_AT_BATCH="13", SIGNAL="SIGTERM")
    assert ended.returncode == 143, ended.stderr
    assert "Saved step 4 after SIGTERM" in ended.stderr
    assert trained(train("torch", tmp_path / "ended", **settings)) == trained(uninterrupted)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT), ("SIGUSR1", 138)])
def test_a_signal_ends_the_batch_and_saves(tmp_path: Path, name: str, status: int) -> None:
    uninterrupted = whole()
    ended = train("torch", tmp_path / "ended", DIE_AT_BATCH="10", SIGNAL=name)
    assert ended.returncode == status, ended.stderr
    assert f"Received {name}: training ends after this batch and is saved" in ended.stderr
    assert f"Saved step 11 after {name}" in ended.stderr
    assert newest_position(tmp_path / "ended") == (11, 1)
    resumed = train("torch", tmp_path / "ended")
    assert trained(resumed) == trained(uninterrupted)
    assert rows_of(resumed.stdout) == rows_of(uninterrupted.stdout)[11:]


def test_an_exception_in_a_batch_saves_the_steps_before_it(tmp_path: Path) -> None:
    settings = {"NO_BATCH_NORM": "1"}
    uninterrupted = whole(**settings)
    failed = train("torch", tmp_path / "failed", **settings, RAISE_AT_BATCH="10")
    assert failed.returncode == 1
    assert failed.stderr.endswith("RuntimeError: mine\n")
    assert "Saved step 10 after RuntimeError" in failed.stderr
    resumed = train("torch", tmp_path / "failed", **settings)
    assert trained(resumed) == trained(uninterrupted)
    assert rows_of(resumed.stdout) == rows_of(uninterrupted.stdout)[10:]


def test_an_exception_after_the_step_of_a_batch_is_not_saved_half(tmp_path: Path) -> None:
    uninterrupted = whole()
    failed = train("torch", tmp_path / "failed", RAISE_AFTER_BATCH="11")
    assert failed.returncode == 1
    assert newest_position(tmp_path / "failed") == (8, 1)
    assert trained(train("torch", tmp_path / "failed")) == trained(uninterrupted)


def test_a_full_disk_leaves_the_previous_state_and_is_raised(tmp_path: Path) -> None:
    uninterrupted = whole()
    failed = train("torch", tmp_path / "failed", NO_ROOM_AT_BATCH="10")
    assert failed.returncode == 1
    assert "File too large" in failed.stderr
    assert newest_position(tmp_path / "failed") == (8, 1)
    assert trained(train("torch", tmp_path / "failed")) == trained(uninterrupted)


def test_a_flipped_bit_resumes_from_the_previous_state(tmp_path: Path) -> None:
    uninterrupted = whole()
    train("torch", tmp_path / "killed", DIE_AT_BATCH="17")
    flip_a_bit(Path(newest(tmp_path / "killed").path))
    resumed = train("torch", tmp_path / "killed")
    assert "Skipped damaged checkpoints" in resumed.stderr
    assert re.search(r"Resuming from .*: epoch 1, step 8", resumed.stderr)
    assert trained(resumed) == trained(uninterrupted)


train_ranks = functools.partial(ranks.train_ranks, "torch")
torchrun = functools.partial(ranks.torchrun, "torch")


@pytest.mark.parametrize(
    ("set_up", "start"),
    [("torchrun", torchrun), ("torchrun", train_ranks), ("fabric", train_ranks), ("accelerate", train_ranks)],
    ids=["torchrun", "ranks in the environment", "fabric", "accelerate"],
)
def test_ranks_that_were_killed_resume_from_the_same_state(
    tmp_path: Path, set_up: str, start: Callable[..., Ended]
) -> None:
    settings = {"EVERY": "3", "SETUP": set_up}
    uninterrupted = train_ranks(tmp_path / "whole", **settings)
    killed = start(tmp_path / "killed", **settings, DIE_AT_BATCH="7", ON_RANK="1")
    assert killed.returncode == 1
    assert newest_position(tmp_path / "killed") in {(4, 1), (6, 1)}  # rank 0 may be killed before it has written
    resumed = start(tmp_path / "killed", **settings)
    assert trained(resumed) == trained(uninterrupted)


def test_a_signal_to_one_rank_ends_all_with_the_same_state(tmp_path: Path) -> None:
    settings = {"SETUP": "torchrun", "SECONDS_PER_BATCH": "0.1"}
    uninterrupted = train_ranks(tmp_path / "whole", **settings)
    ended = train_ranks(tmp_path / "ended", **settings, DIE_AT_BATCH="5", ON_RANK="1", SIGNAL="SIGTERM")
    assert ended.returncode == 1, ended.stderr
    assert "after SIGTERM" in ended.stderr
    assert newest_position(tmp_path / "ended")[0] in (6, 7)
    assert trained(train_ranks(tmp_path / "ended", **settings)) == trained(uninterrupted)


def test_a_write_that_fails_on_rank_0_ends_all(tmp_path: Path) -> None:
    settings = {"SETUP": "torchrun", "EVERY": "1"}
    ended = train_ranks(tmp_path / "ended", **settings, NO_ROOM_AT_BATCH="5")
    assert ended.returncode == 1
    assert "File too large" in ended.stderr
    assert newest_position(tmp_path / "ended") in {(5, 1), (4, 1)}
