"""Training states that an earlier commit saved still resume.

The archive holds what commit ad9fa01 saved after two epochs of `smallest_script.py`, with Lightning 2.6, Keras 3.15 and
Transformers 5.24. Make a new archive, next to this one, only when the content of the states changes.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import forked
import pytest

HERE = Path(__file__).parent


def train(framework: str, outputs: Path) -> tuple[str, str]:
    command = [str(HERE / "smallest_script.py"), framework, "3"]
    process = forked.run(framework, *command, POLYAXON_RUN_OUTPUTS_PATH=str(outputs))
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1], process.stderr


@pytest.mark.parametrize("framework", ["lightning", "keras", "transformers"])
def test_a_state_saved_before_resumes_as_if_nothing_had_happened(framework: str, tmp_path: Path) -> None:
    weights, _ = train(framework, tmp_path / "uninterrupted")
    resume = tmp_path / "outputs" / "checkpoints" / "resume"
    with tarfile.open(HERE / "saved_before.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith(f"./{framework}/")]
        archive.extractall(tmp_path, members, filter="data")
    resume.parent.mkdir(parents=True)
    os.rename(tmp_path / framework, resume)
    resumed, log = train(framework, tmp_path / "outputs")
    assert f"Resuming from {resume}/step=0000000008-epoch=2" in log
    assert resumed == weights
