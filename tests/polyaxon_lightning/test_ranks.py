"""The Lightning callback in several processes, started in each of the ways that users start them."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest
import training_scripts
from ranks import start_torchrun, torchrun, train_ranks, wait_for_torchrun
from training_scripts import Ended, newest

if TYPE_CHECKING:
    from pathlib import Path

LAUNCHERS = ["ddp", "ddp_spawn", "torchrun"]


def train(launcher: str, outputs: Path | str, **environment: str) -> Ended:
    """Train in two processes that torchrun starts, or Lightning, or that get their ranks from the environment."""
    if launcher == "torchrun":
        return torchrun("lightning", outputs, STRATEGY="ddp", **environment)
    if launcher == "environment":
        return train_ranks("lightning", outputs, STRATEGY="ddp", **environment)
    settings = {"STRATEGY": launcher, "PYTHONWARNINGS": "ignore", **environment}
    first = training_scripts.train("lightning", outputs, **settings)
    return Ended(first.returncode, first.stdout, first.stderr)


def digests(stdout: str) -> list[str]:
    return [line.split()[-1] for line in stdout.splitlines() if line.startswith("trained")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of the weights of an uninterrupted training in two processes."""
    status, stdout, stderr = train("environment", tmp_path_factory.mktemp("uninterrupted"))
    assert status == 0, stderr
    assert stderr.count("Starting fresh") == 1
    [digest] = set(digests(stdout))
    assert len(digests(stdout)) == 2
    return digest


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "environment"])
def test_the_start_after_the_kill_of_one_rank_resumes_on_all(launcher: str, tmp_path: Path, uninterrupted: str) -> None:
    options = {"FOREGROUND": "1", "ON_RANK": "1"}
    status, _, stderr = train(launcher, tmp_path, DIE_AT_STEP="8", **options)
    assert status != 0
    assert newest(tmp_path).step == 8, stderr
    status, stdout, stderr = train(launcher, tmp_path, **options)
    assert status == 0, stderr
    assert len(re.findall("Resuming from .*: epoch 4, step 8\n", stderr)) == 1
    assert set(digests(stdout)) == {uninterrupted}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_all_ranks_resume_exactly_within_an_epoch(workers: str, tmp_path: Path, uninterrupted: str) -> None:
    options = {"FOREGROUND": "1", "EVERY_N_TRAIN_STEPS": "5", "WORKERS": workers}
    status, _, stderr = train("environment", tmp_path, DIE_AT_STEP="5", **options)
    assert status != 0
    assert newest(tmp_path).step == 5, stderr
    status, stdout, stderr = train("environment", tmp_path, **options)
    assert status == 0, stderr
    assert len(re.findall("Resuming from .*: epoch 2, step 5\n", stderr)) == 1
    assert set(digests(stdout)) == {uninterrupted}


@pytest.mark.parametrize(("launcher", "rank"), [("environment", 0), ("ddp", 1), ("ddp_spawn", 1)])
def test_sigterm_to_one_rank_saves_once_and_ends_all(launcher: str, rank: int, tmp_path: Path) -> None:
    status, _, stderr = train(launcher, tmp_path, DIE_AT_STEP="6", SIGNAL="SIGTERM", ON_RANK=str(rank))
    assert status == (143 if launcher == "ddp" else 1), stderr
    # All ranks know of it one batch later.
    assert stderr.count("Saved step 8 after SIGTERM") == 1
    assert newest(tmp_path).step == 8


def test_sigterm_to_all_ranks_saves_once_and_ends_all(tmp_path: Path) -> None:
    process = start_torchrun("lightning", tmp_path, STRATEGY="ddp", SECONDS_PER_BATCH="0.5")
    while not list(tmp_path.glob("checkpoints/resume/step=*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()  # torchrun sends it on to all
    status, _, stderr = wait_for_torchrun(process)
    assert status != 0
    [step] = re.findall(r"Saved step (\d+) after SIGTERM", stderr)
    assert newest(tmp_path).step == int(step)


@pytest.mark.parametrize("mode", ["foreground", "background"])
def test_a_write_that_fails_on_the_first_rank_ends_all(mode: str, tmp_path: Path) -> None:
    options = {"FOREGROUND": "1"} if mode == "foreground" else {}
    status, _, stderr = train("environment", tmp_path, NO_ROOM_AT_STEP="5", **options)
    assert status == 1
    assert "[rank1]: RuntimeError: Rank 0 failed, and this one ends with it: " in stderr
    # In the background, the write of step 4 may not be done when the room ends.
    assert newest(tmp_path).step in ({4} if mode == "foreground" else {2, 4})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_off_the_cluster_the_ranks_of_a_start_share_its_directory(launcher: str, tmp_path: Path) -> None:
    directories = {".starts"}
    for _ in range(2):
        status, _, stderr = train(launcher, "")
        assert status == 0, stderr
        # Ranks may leave a number out: each makes a directory, and only that of the first counts.
        [directory] = set(re.findall(rf"outputs go to {tmp_path}/outputs/(version_\d);?\s", stderr))
        assert newest(tmp_path / "outputs" / directory).epoch == 6
        directories.add(directory)
    assert len(directories) == 3
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == directories


def test_ranks_that_see_different_checkpoints_get_an_error(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    status, _, stderr = train("environment", outputs, OUTPUTS_OF_RANKS=str(outputs))
    assert status == 0, stderr
    assert not list(tmp_path.glob("outputs1/**/*.ckpt"))  # only the first rank writes
    status, stdout, stderr = train("environment", outputs, OUTPUTS_OF_RANKS=str(outputs))
    assert status == 1
    assert stdout == ""
    message = (
        rf"Received different checkpoints on the ranks of one training: rank 0 would resume from step=\S+ in "
        rf"{tmp_path}/outputs0/checkpoints/resume, rank 1 from None in {tmp_path}/outputs1/checkpoints/resume"
    )
    assert len(re.findall(message, stderr)) == 2


@pytest.mark.parametrize("launcher", ["ddp_spawn", "environment"])
def test_ckpt_path_last_resumes_from_the_newest_training_state(launcher: str, tmp_path: Path) -> None:
    """With ``resume=False``, so that only this argument makes the second start resume."""
    settings = {"NO_RESUME": "1", "FOREGROUND": "1", "CKPT_PATH": "last"}
    first, second = train("environment", tmp_path, **settings, DIE_AT_STEP="8"), train(launcher, tmp_path, **settings)
    assert first.returncode != 0
    assert second.returncode == 0, second.stderr
    assert len(re.findall("Resuming from .*: epoch 4, step 8\n", second.stderr)) == 1
