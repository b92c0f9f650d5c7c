"""The Keras callback in processes that are killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).with_name("keras_script.py")


def train(outputs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TRAIN)],
        env=os.environ | {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def trained(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr
    [line] = [line for line in process.stdout.splitlines() if line.startswith("trained")]
    return line


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_a_killed_and_resumed_training_has_the_weights_of_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    killed = train(tmp_path / "killed", KIND=kind, DIE_AT_STEP="14")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train(tmp_path / "killed", KIND=kind)
    assert ": epoch 3, step 12\n" in resumed.stderr, resumed.stderr
    assert trained(resumed) == trained(train(tmp_path / "uninterrupted", KIND=kind))


def test_a_finished_training_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = train(tmp_path)
    again = train(tmp_path)
    assert trained(again) == trained(first)
    assert "This training had come to its end (epochs=6): nothing is left" in again.stderr
