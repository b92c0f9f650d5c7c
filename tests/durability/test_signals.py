"""SIGTERM and Ctrl-C, sent to trainings in their own processes."""

from __future__ import annotations

import os
import re
import signal
import time
from importlib import metadata
from typing import TYPE_CHECKING

import forked
import pytest
from packaging.version import Version
from training_scripts import SCRIPTS, newest_position

from polyaxon_tracking import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FRAMEWORKS = ["lightning", "keras"]
STEPS_AN_EPOCH = 4
# A batch takes so long that a signal falls into one.
SLOW = {"SECONDS_PER_BATCH": "0.6"}
# In these a fit that Ctrl-C ended returns, and a batch is trained again where one resumes within an epoch.
BEFORE_LIGHTNING_2_5 = Version(metadata.version("lightning")) < Version("2.5")


class Training:
    """A training in a process, with its outputs below `directory`."""

    def __init__(self, framework: str, directory: Path, **environment: str) -> None:
        self.log = directory / "log"
        self.outputs = directory / "outputs"
        self.checkpoints = CheckpointManager(self.outputs / "checkpoints" / "resume")
        settings = {
            "POLYAXON_RUN_OUTPUTS_PATH": str(self.outputs),
            "KERAS_BACKEND": os.environ.get("KERAS_BACKEND", "torch"),
            **environment,
        }
        with self.log.open("ab") as log:
            self.process = forked.start(
                framework,
                SCRIPTS[framework],
                stdout=log.fileno(),
                stderr=log.fileno(),
                PYTHONUNBUFFERED="1",
                **settings,
            )

    def wait_for_epochs(self, epochs: int) -> None:
        """Return when so many epochs are saved."""
        self.wait_until(lambda: max((saved.epoch for saved in self.checkpoints.checkpoints()), default=0) >= epochs)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not holds():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def end_with(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.3)  # the same signal within 0.1 s is no second one
        return self.process.wait(timeout=300)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def newest(self) -> tuple[int, int]:
        return newest_position(self.outputs)


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("mode", ["BACKGROUND", "FOREGROUND"])
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, None), (signal.SIGUSR1, 138)],
    ids=["SIGTERM", "Ctrl-C", "SIGUSR1"],
)
def test_a_signal_ends_the_batch_saves_and_ends_training(
    tmp_path: Path, mode: str, framework: str, number: signal.Signals, status: int | None
) -> None:
    training = Training(framework, tmp_path, **SLOW, **{mode: "1"})
    training.wait_for_epochs(1)
    time.sleep(0.4)
    ended = training.end_with(number)
    # Lightning turns Ctrl-C into exit status 1, Python without it into death by the signal.
    of_lightning = 0 if BEFORE_LIGHTNING_2_5 else 1
    assert ended == (status or {"lightning": of_lightning, "keras": -signal.SIGINT}[framework]), training.text
    assert f"Received {number.name}: training ends after this batch and is saved" in training.text
    step, epoch = training.newest
    assert f"Saved step {step} after {number.name}" in training.text
    assert STEPS_AN_EPOCH < step < 2 * STEPS_AN_EPOCH
    assert epoch == 1
    resumed = Training(framework, tmp_path)
    assert resumed.process.wait(timeout=300) == 0, resumed.text
    assert f": epoch {epoch}, step {step}\n" in resumed.text
    *_, trained = re.findall(r"^trained (\d+)", resumed.text, re.MULTILINE)
    # Lightning continues within the epoch; Keras begins the epoch again.
    assert int(trained) == {"lightning": 24, "keras": step + 5 * STEPS_AN_EPOCH}[framework]


def test_a_second_sigterm_ends_training_at_once(tmp_path: Path, framework: str) -> None:
    training = Training(framework, tmp_path, SECONDS_PER_BATCH="1.5")
    training.wait_for_epochs(1)
    before = training.newest
    time.sleep(0.2)  # into the next batch
    assert training.end_with(signal.SIGTERM, signal.SIGTERM) == -signal.SIGTERM
    assert training.newest == before


def test_the_users_own_handler_still_runs(tmp_path: Path, framework: str) -> None:
    training = Training(framework, tmp_path, OWN_HANDLER="1", **SLOW)
    training.wait_for_epochs(1)
    assert training.end_with(signal.SIGTERM) == 143
    assert training.text.count("own handler") == 1


def test_a_signal_in_the_validation_loses_no_step_of_the_epoch(tmp_path: Path, framework: str) -> None:
    training = Training(framework, tmp_path, SECONDS_PER_VALIDATION_BATCH="0.5")
    training.wait_until(lambda: "validating after 8" in training.text)
    assert training.end_with(signal.SIGTERM) == 143, training.text
    step, _ = training.newest
    assert step == 2 * STEPS_AN_EPOCH
    resumed = Training(framework, tmp_path)
    assert resumed.process.wait(timeout=300) == 0, resumed.text
    assert "\ntrained 24 " in resumed.text


def test_a_signal_after_the_last_batch_ends_the_process(tmp_path: Path, framework: str) -> None:
    training = Training(framework, tmp_path, SIGNAL_AT_THE_END="SIGTERM")
    assert training.process.wait(timeout=300) == 143, training.text
    assert "trained" not in training.text
    again = Training(framework, tmp_path)
    assert again.process.wait(timeout=300) == 0
    assert f"trained {6 * STEPS_AN_EPOCH} " in again.text
