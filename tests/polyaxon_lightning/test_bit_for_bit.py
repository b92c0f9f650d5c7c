"""A training that was cut off ends with the weights of an uninterrupted one, whatever draws numbers or counts ahead."""

from __future__ import annotations

import functools
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest

if TYPE_CHECKING:
    import subprocess

SCRIPT = Path(__file__).with_name("bit_for_bit_script.py")


def train(outputs: Path, kinds: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run("lightning", SCRIPT, KINDS=kinds, POLYAXON_RUN_OUTPUTS_PATH=str(outputs), **environment)


def trained(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr
    [line] = [line for line in process.stdout.splitlines() if line.startswith("trained")]
    return line


@functools.cache
def uninterrupted(kinds: str) -> str:
    """Return what a training that nothing cuts off prints; several tests compare with it."""
    with tempfile.TemporaryDirectory() as outputs:
        return trained(train(Path(outputs), kinds))


@pytest.mark.parametrize(
    "kinds",
    [
        "",
        "plateau",
        "accumulate",
        "estimated",
        "generator",
        "draws",
        "workers",
        "workers estimated",
        "persistent",
        "several",
        "several workers",
        "stateful",
        "stateful plateau",
        "stateful accumulate",
        "stateful estimated",
        "stateful accumulate plateau",
        "stateful generator",
    ],
)
@pytest.mark.parametrize(
    ("cut_off", "status", "step"),
    [
        pytest.param({"CUT_OFF_AT": "1.6"}, 1, 16, id="exception"),
        pytest.param({"CUT_OFF_AT": "1.5"}, 1, 15, id="exception after a validation"),
        pytest.param({"CUT_OFF_AT": "1.5", "SIGNAL": "SIGTERM"}, 143, 16, id="signal"),
    ],
)
def test_within_an_epoch(tmp_path: Path, kinds: str, cut_off: dict[str, str], status: int, step: int) -> None:
    process = train(tmp_path / "cut off", kinds, **cut_off)
    assert process.returncode == status, process.stderr
    resumed = train(tmp_path / "cut off", kinds)
    assert f": epoch 1, step {4 if 'accumulate' in kinds else step}\n" in resumed.stderr
    assert trained(resumed) == uninterrupted(kinds)


@pytest.mark.parametrize(
    "kinds",
    [
        "",
        "estimated",
        "persistent",
        "generator",
        "draws",
        "stateful",
        "stateful persistent draws",
        "estimated persistent generator draws",
    ],
)
def test_at_the_end_of_an_epoch(tmp_path: Path, kinds: str) -> None:
    process = train(tmp_path / "killed", kinds, CUT_OFF_AT="2.0", SIGNAL="SIGKILL")
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumed = train(tmp_path / "killed", kinds)
    assert ": epoch 2, step 20\n" in resumed.stderr
    assert trained(resumed) == uninterrupted(kinds)


def test_what_was_found_before_training_is_not_searched_for_again(tmp_path: Path) -> None:
    uninterrupted = trained(train(tmp_path / "uninterrupted", "searches"))
    assert not uninterrupted.endswith(" 0.01 8")  # which the script gives
    process = train(tmp_path / "killed", "searches", CUT_OFF_AT="2.0", SIGNAL="SIGKILL")
    assert process.returncode == -signal.SIGKILL, process.stderr
    for _ in range(2):  # the second time, training has ended already
        resumed = train(tmp_path / "killed", "searches")
        assert (
            "Resuming with what LearningRateFinder found when training started: it searches no more" in resumed.stderr
        )
        assert trained(resumed) == uninterrupted
