"""The callback for Hugging Face's Trainer in two processes, started by torchrun."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from transformers_script import TORCHRUN

from polyaxon_tracking import CheckpointManager


def train(outputs: Path, **environment: str) -> tuple[int, str, str]:
    """Its exit status and what it printed; where it hangs, an error."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "POLYAXON_RUN_OUTPUTS_PATH": str(outputs)}
    process = subprocess.Popen(
        TORCHRUN,
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun kills its own, which a signal to the group does not reach
        print(*process.communicate(), sep="\n")
        raise
    return process.returncode, stdout, stderr


def newest_step(outputs: Path) -> int:
    newest = CheckpointManager(outputs / "checkpoints" / "resume").latest()
    assert newest is not None
    return newest.step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What both processes print at the end of a training that nothing interrupts."""
    status, stdout, stderr = train(tmp_path_factory.mktemp("uninterrupted"))
    assert status == 0, stderr
    assert stderr.count("Starting fresh") == 1
    assert stdout.count("trained 24 ") == 2
    return set(stdout.splitlines())


@pytest.mark.parametrize(
    ("died", "step"),
    [
        pytest.param({"DIE_AT_STEP": "10"}, 8, id="killed"),
        # All know of it one batch later.
        pytest.param({"DIE_AT_STEP": "9", "SIGNAL": "SIGTERM"}, 10, id="preempted"),
    ],
)
def test_what_happens_to_one_rank_ends_all_and_all_go_on(
    tmp_path: Path, uninterrupted: set[str], died: dict[str, str], step: int
) -> None:
    status, _, stderr = train(tmp_path, FOREGROUND="1", ON_RANK="1", **died)
    assert status != 0
    assert newest_step(tmp_path) == step, stderr
    status, stdout, stderr = train(tmp_path)
    assert status == 0, stderr
    assert set(stdout.splitlines()) == uninterrupted
    assert len(re.findall(rf"Resuming from .*: epoch 2, step {step}\n", stderr)) == 1


def test_a_write_that_fails_on_the_first_rank_ends_all(tmp_path: Path) -> None:
    status, _, stderr = train(tmp_path, NO_ROOM_AT_STEP="6")
    assert status == 1
    assert "[rank1]: RuntimeError: Rank 0 failed, and this one ends with it: " in stderr
    assert newest_step(tmp_path) == 4


def test_ranks_that_see_different_checkpoints_are_told_so(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    for rank in ("0", "1"):
        (tmp_path / f"outputs{rank}").mkdir()
    with CheckpointManager(f"{outputs}0/checkpoints/resume").save(4, 1, suffix=".checkpoint") as path:
        Path(path).write_text("only one sees it")
    status, stdout, stderr = train(outputs, OUTPUTS_OF_ITS_OWN=str(outputs))
    assert (status, stdout) == (1, "")
    assert (
        len(re.findall("Received different checkpoints on the ranks of one training: rank 0 would resume", stderr)) == 2
    )
