"""Checkpoints that are kept for good: saving removes others, and no start of a training removes them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from polyaxon_tracking import CheckpointManager, TrackingError, checkpoints


def save(manager: CheckpointManager, step: int, epoch: int, *, has_nan: bool = False) -> None:
    with manager.save(step, epoch, has_nan=has_nan) as path:
        Path(path).write_text(f"step {step}")


def steps(directory: Path | str) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointManager(directory).checkpoints()]


def test_the_first_checkpoint_of_every_so_many_epochs_is_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_every_n_epochs=3)
    for epoch in range(1, 12):
        save(manager, 10 * epoch, epoch)
        save(manager, 10 * epoch + 5, epoch)  # within the next epoch
    assert steps(tmp_path) == [115, 110, 90, 60, 30]
    newest = manager.latest()
    assert newest is not None
    assert newest.step == 115
    assert re.fullmatch(r"step=0000000030-epoch=3-start=1-crc=\w{8}\.kept\d{10}\.ckpt", manager.checkpoints()[-1].name)


def test_a_multiple_that_no_checkpoint_has_is_passed_over(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=1, keep_every_n_epochs=5)
    for epoch in (4, 6, 8, 11, 12):
        save(manager, epoch, epoch)
    assert steps(tmp_path) == [12, 11, 6]


def test_the_first_checkpoint_and_one_whenever_the_time_has_passed_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(20):
        monkeypatch.setattr(checkpoints.time, "time", lambda hour=step: 1_800_000_000 + 3600.0 * hour)
        manager = CheckpointManager(tmp_path, max_to_keep=1, keep_every=timedelta(hours=6))  # a new start each time
        save(manager, step, 0)
    assert steps(tmp_path) == [19, 18, 12, 6, 0]


def test_a_start_without_the_option_removes_none(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=1, keep_every_n_epochs=2)
    for epoch in range(1, 6):
        save(manager, epoch, epoch)
    assert steps(tmp_path) == [5, 4, 2]
    manager = CheckpointManager(tmp_path, max_to_keep=1)
    save(manager, 6, 6)
    manager.prune()
    assert steps(tmp_path) == [6, 4, 2]


def test_a_training_that_starts_over_keeps_its_own(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=1, keep_every_n_epochs=2)
    for epoch in (1, 2, 3, 1, 2, 3):
        save(manager, epoch, epoch)
    found = [(checkpoint.start, checkpoint.step) for checkpoint in manager.checkpoints()]
    assert found == [(2, 3), (2, 2), (1, 3), (1, 2)]


def test_a_checkpoint_with_nan_is_not_kept_for_good(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=1, keep_every_n_epochs=2)
    save(manager, 2, 2, has_nan=True)
    for epoch in (3, 4, 5):
        save(manager, epoch, epoch)
    assert steps(tmp_path) == [5, 4, 3]


def test_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=1, keep_every_n_epochs=2)
    for epoch in (2, 3):
        save(manager, epoch, epoch)
    Path(manager.checkpoints()[0].path).write_text("torn")
    newest = manager.latest()
    assert newest is not None
    assert newest.kept_at is not None
    assert Path(newest.path).read_text() == "step 2"


KILLED = """
import os, signal, sys
from polyaxon_tracking import CheckpointManager

manager = CheckpointManager(sys.argv[1], max_to_keep=1, keep_every_n_epochs=2)
left, unlink = int(sys.argv[2]), os.unlink

def die(path, **named):
    global left
    if path.endswith(".ckpt"):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    unlink(path, **named)

os.unlink = die
with manager.save(8, 8) as path:
    open(path, "w").write("step 8")
"""


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_kill_while_old_checkpoints_are_removed_leaves_those_that_are_kept(tmp_path: Path, removed: int) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=9, keep_every_n_epochs=2)
    for epoch in range(1, 8):
        save(manager, epoch, epoch)
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(removed)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {8, 6, 4, 2} <= set(steps(tmp_path))
    assert len(steps(tmp_path)) == 8 - removed
    save(CheckpointManager(tmp_path, max_to_keep=1), 9, 9)
    assert steps(tmp_path) == [9, 8, 6, 4, 2]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"keep_every_n_epochs": 0}, "Received keep_every_n_epochs=0. Expected a whole number, 1 or more, or None."),
        (
            {"keep_every_n_epochs": 1.5},
            "Received keep_every_n_epochs=1.5. Expected a whole number, 1 or more, or None.",
        ),
        (
            {"keep_every": 6},
            "Received keep_every=6. Expected a timedelta above zero, such as timedelta(hours=6), or None.",
        ),
        ({"keep_every": timedelta(0)}, "Received keep_every=datetime.timedelta(0). Expected a timedelta above zero"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(TrackingError) as caught:
        CheckpointManager(tmp_path, **option)
    assert str(caught.value).startswith(message)
