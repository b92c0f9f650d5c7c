"""Trainings that are killed while they save, one after the other on the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_while_saving.py")
TRIALS = 10


@pytest.mark.parametrize("framework", ["lightning", "keras"])
def test_a_kill_while_saving_loses_no_checkpoint(tmp_path: Path, framework: str) -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), framework, str(tmp_path), str(TRIALS), "1"],
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    trials = json.loads(process.stdout)
    assert len(trials) == TRIALS
    assert sum(trial["while_saving"] for trial in trials) >= TRIALS // 2  # the kills are where they should be
    for trial in trials:
        # Each training went on from where the last one was killed, and lost nothing that was there before its own kill.
        assert trial["began"] < trial["before"] <= trial["after"], trial
        assert trial["damaged"] == [], trial
    # Litter of the last one alone, and the user's own file is whole.
    assert len(list(tmp_path.rglob(".staging-*"))) <= 2
    with zipfile.ZipFile(
        tmp_path / "checkpoints" / ("mine.ckpt" if framework == "lightning" else "mine.keras")
    ) as file:
        assert file.testzip() is None
