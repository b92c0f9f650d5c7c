"""Trainings that are killed again and again, each on the outputs that the previous one left: `benchmarks/durability.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forked
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "durability.py"
OTHER_FILE_SYSTEM = "/dev/shm"


def killed(framework: str, outputs: Path, *, kills: int, moment: str = "saving", tmp: str | None = None) -> Any:
    options = f"--json --subjects {framework} --kills {kills} --moment {moment} --outputs".split()
    environment = {"KERAS_BACKEND": "torch"} | ({"TMPDIR": tmp} if tmp else {})
    process = forked.run(framework.removesuffix("_foreground"), SCRIPT, *options, outputs, **environment)
    assert process.returncode == 0, process.stderr
    starts = json.loads(process.stdout)
    assert len(starts) > kills
    for start in starts:
        # From no further back than what was saved, with a state that is all of one step, and nothing torn.
        assert start["whole"], start
        assert start["began"] >= start["promised"], start
        assert not start.get("torn"), start
        assert start.get("best", 1) or not start["promised"], start  # the best model outlives the commit of the next
    return starts


@pytest.fixture(
    params=[
        f"{framework}{mode}"
        for framework in ("lightning", "keras", "transformers", "torch")
        for mode in ("", "_foreground")
    ]
)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_kills_while_saving(tmp_path: Path, framework: str) -> None:
    starts = killed(framework, tmp_path, kills=20)
    assert starts[-1]["promised"] >= 10  # each resumes where the previous one was killed


def test_kills_while_saving_to_another_file_system_than_that_of_temporary_files(tmp_path: Path, framework: str) -> None:
    assert os.stat(OTHER_FILE_SYSTEM).st_dev != tmp_path.stat().st_dev
    killed(framework, tmp_path, kills=5, tmp=OTHER_FILE_SYSTEM)


def test_kills_in_the_first_save(tmp_path: Path, framework: str) -> None:
    starts = killed(framework, tmp_path, kills=5, moment="first-save")
    assert {start["began"] for start in starts} <= {0, 1, 2}


def test_kills_before_the_old_one_goes(tmp_path: Path, framework: str) -> None:
    starts = killed(framework, tmp_path, kills=3, moment="pruning")
    # The save before was done, though the training was killed before it could know.
    assert all(start["began"] > start["promised"] for start in starts[1:])


def test_kills_while_resuming(tmp_path: Path, framework: str) -> None:
    killed(framework, tmp_path, kills=5, moment="resuming")
