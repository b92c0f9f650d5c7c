"""A training of Hugging Face's Trainer resumes exactly, whatever its options are and however it ended."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
from exact_script import OPTIONS

if TYPE_CHECKING:
    import subprocess

TRAIN = Path(__file__).with_name("exact_script.py")


def train(outputs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run("transformers", TRAIN, POLYAXON_RUN_OUTPUTS_PATH=str(outputs), **environment)


def trained(outputs: Path, **environment: str) -> list[Any]:
    """Return what a training has come to: steps, weights, evaluations, learning rates, random numbers."""
    process = train(outputs, **environment)
    assert process.returncode == 0, process.stderr
    found: list[Any] = json.loads(process.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("end", "status"),
    [({"KILL_AT_EPOCH": "2"}, -signal.SIGKILL), ({"END_AT_STEP": "10"}, 143), ({"RAISE_AT_BATCH": "11"}, 1)],
    ids=["killed between epochs", "preempted within an epoch", "raised within a step"],
)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, kind: str, end: dict[str, str], status: int
) -> None:
    cut = train(tmp_path / "cut", KIND=kind, **end)
    assert cut.returncode == status, cut.stderr
    assert trained(tmp_path / "cut", KIND=kind) == trained(tmp_path / "whole", KIND=kind)
