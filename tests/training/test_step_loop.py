"""Loops whose state two functions save and load, here with NumPy."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from polyaxon_tracking import CheckpointManager, StepLoop, TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable

# Gradient descent on random rows; the generator is a part of the state. A signal may come within a step.
SCRIPT = """
import json, logging, os, signal, sys
import numpy as np
from polyaxon_tracking import StepLoop

logging.basicConfig(level="INFO", format="%(message)s")
options = json.loads(sys.argv[1])
signal_at = options.pop("signal_at", {})
weights, generator = np.zeros(4), np.random.default_rng(0)

def save(path):
    np.savez(path, weights=weights, generator=json.dumps(generator.bit_generator.state))

def load(path):
    global weights
    with np.load(path) as saved:
        weights = saved["weights"]
        generator.bit_generator.state = json.loads(str(saved["generator"]))

with StepLoop(save, load, suffix=".npz", **options) as training:
    for step in training.steps(20):
        row = generator.normal(size=4)
        if str(step) in signal_at:
            os.kill(os.getpid(), signal_at[str(step)])
        weights = weights - 0.1 * row * (row @ weights - 1)
print(weights.tobytes().hex())
"""


def run(options: str = '{"every_n_train_steps": 3}') -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, options], capture_output=True, text=True, check=False, timeout=300
    )


def saved_steps(outputs: Path) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()]


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize(
    ("number", "status", "saved"),
    [(signal.SIGKILL, -9, {9, 12}), (signal.SIGTERM, 143, {14}), (signal.SIGINT, -2, {14})],
    ids=["SIGKILL", "SIGTERM", "Ctrl-C"],
)
def test_a_loop_that_a_signal_ended_resumes_to_the_state_of_an_uninterrupted_one(
    outputs: Path, background: str, number: int, status: int, saved: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f'{{"every_n_train_steps": 3, "background": {background}'
    ended = run(f'{options}, "signal_at": {{"13": {int(number)}}}}}')
    assert ended.returncode == status, ended.stderr
    assert saved_steps(outputs)[0] in saved
    resumed = run(f"{options}}}")
    assert re.search(rf"Resuming from {outputs}/checkpoints/resume/step=\S+\.npz: epoch 0, step ", resumed.stderr)
    assert saved_steps(outputs) == [20]
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", f"{outputs}-2")
    assert resumed.stdout == run(f"{options}}}").stdout != ""


class Sum:
    """A state: the sum of the indices of the steps."""

    def __init__(self) -> None:
        self.value = 0

    def save(self, path: str) -> None:
        Path(path).write_text(str(self.value))

    def load(self, path: str) -> None:
        self.value = int(Path(path).read_text())

    def train(self, number: int, does: Callable[[int], object] = lambda _: None, **options: Any) -> StepLoop:
        with StepLoop(self.save, self.load, suffix=".txt", **{"every_n_train_steps": 4} | options) as training:
            for step in training.steps(number):
                self.value += step
                if does(step):
                    break
        return training


def fail_at(failing: int) -> Callable[[int], object]:
    def fail(step: int) -> None:
        if step == failing:
            raise ArithmeticError("in the user's code")

    return fail


def test_a_finished_loop_trains_nothing_and_continues_with_more_steps(
    outputs: Path, new_process: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    assert Sum().train(10).step == 10
    for number, total, steps in [(10, 45, 10), (12, 66, 12), (5, 66, 12)]:
        new_process()
        state = Sum()
        assert state.train(number).step == steps
        assert state.value == total
    assert "This training has ended already (steps(10)): nothing is left to train" in caplog.text
    assert "This training has ended already (steps(5)): nothing is left to train" in caplog.text


def test_a_loop_that_was_left_trains_nothing(
    outputs: Path, new_process: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    assert Sum().train(10, lambda step: step == 5).step == 6
    new_process()
    state = Sum()
    assert state.train(10).step == 6
    assert state.value == 15
    assert "This training has ended already (left with `break` after 6 steps): nothing is left to train" in caplog.text


def test_a_script_that_only_evaluates_keeps_both_states(outputs: Path, new_process: Callable[[], None]) -> None:
    with pytest.raises(ArithmeticError):
        Sum().train(10, fail_at(9))
    new_process()
    state = Sum()
    with StepLoop(state.save, state.load, suffix=".txt"):
        assert state.value == 28
    assert saved_steps(outputs) == [8, 4]


def test_two_loops_one_after_the_other(outputs: Path) -> None:
    state, seen = Sum(), []
    with StepLoop(state.save, state.load) as training:
        for step in training.steps(10):
            seen.append(step)
            if step == 2:
                break
        seen += training.steps(5)
    assert seen == [0, 1, 2, 3, 4]
    assert training.step == 5
    assert saved_steps(outputs) == [5]


def test_an_exception_within_a_step_saves_nothing_half_changed(outputs: Path, new_process: Callable[[], None]) -> None:
    with pytest.raises(ArithmeticError):
        Sum().train(10, fail_at(6))
    assert saved_steps(outputs) == [4]
    new_process()
    state, seen = Sum(), []
    state.train(10, lambda step: seen.append(step))  # noqa: PLW0108  # `append` returns None either way
    assert seen == [4, 5, 6, 7, 8, 9]
    assert state.value == 45


def test_an_exception_after_the_last_step_keeps_it(outputs: Path) -> None:
    state = Sum()
    with pytest.raises(ArithmeticError), StepLoop(state.save, state.load) as training:
        for _ in training.steps(3):
            pass
        raise ArithmeticError
    assert saved_steps(outputs) == [3]


def test_another_loop_is_another_training(outputs: Path) -> None:
    with pytest.raises(ArithmeticError):
        Sum().train(10, fail_at(9))
    state = Sum()
    state.train(10)
    assert state.value == 45
    assert sorted(path.name for path in (outputs / "checkpoints").iterdir()) == ["resume", "resume-2"]


def test_a_state_may_be_a_directory(outputs: Path, new_process: Callable[[], None]) -> None:
    found: list[str] = []

    def save(path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "weights").write_text("1")

    def load(path: str) -> None:
        found.append((Path(path) / "weights").read_text())

    for number in (3, 5):
        new_process()
        with StepLoop(save, load) as training:
            assert [*training.steps(number)] == list(range(number))[-3 if number == 3 else -2 :]
    assert found == ["1"]


def test_a_flipped_bit_resumes_from_the_previous_state(outputs: Path, new_process: Callable[[], None]) -> None:
    Sum().train(8, max_to_keep=2)
    newest = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()[0]
    Path(newest.path).write_text("29")
    new_process()
    state, seen = Sum(), []
    state.train(8, lambda step: seen.append(step))  # noqa: PLW0108
    assert seen == [4, 5, 6, 7]
    assert state.value == 28


def test_the_first_state_and_one_whenever_the_time_has_passed_are_kept_for_good(outputs: Path) -> None:
    Sum().train(6, keep_every=timedelta(days=1))
    assert saved_steps(outputs) == [6, 4]


def test_a_state_that_cannot_be_loaded_stays(outputs: Path, new_process: Callable[[], None]) -> None:
    Sum().train(8)
    new_process()

    def load(path: str) -> None:
        raise ValueError("another format")

    with pytest.raises(ValueError, match="another format"), StepLoop(Sum().save, load, suffix=".txt"):
        pass
    assert saved_steps(outputs) == [8]
    new_process()
    with (
        pytest.raises(TrackingError, match=r"\.txt, which this StepLoop did not save\. Expected an outputs path"),
        StepLoop(Sum().save, load, suffix=".npz"),
    ):
        pass


def test_an_error_of_the_function_that_saves_names_the_checkpoint(outputs: Path) -> None:
    def save(path: str) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OSError, match=r"step=0000000003\.ckpt was not saved, and no existing file was changed"),
        StepLoop(save, print) as training,
    ):
        for _ in training.steps(3):
            pass
    assert not [*outputs.rglob(".staging-*")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"save": None}, "Received save=None. Expected a function that takes a path."),
        ({"load": "state.npz"}, "Received load='state.npz'. Expected a function that takes a path."),
        (
            {"every_n_train_steps": 0},
            "Received every_n_train_steps=0. Expected a whole number, 1 or more, 'auto', or None.",
        ),
        ({"name": "a/b"}, "Received name='a/b'. Expected the name of a directory for this training, such as 'fold-3'"),
        ({"suffix": "npz"}, "Received suffix='npz'. Expected a file's ending, such as '.ckpt'."),
    ],
)
def test_wrong_arguments(outputs: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TrackingError) as error:
        StepLoop(**{"save": print, "load": print} | wrong)
    assert str(error.value).startswith(message)


def test_calls_in_the_wrong_place(outputs: Path) -> None:
    training = StepLoop(print, print)
    with pytest.raises(TrackingError, match="Received a call of `steps` outside the `with` statement"):
        next(training.steps(3))
    with training, pytest.raises(TrackingError, match=r"Received steps\(2\.5\)\. Expected a whole number, 0 or more"):
        next(training.steps(2.5))  # type: ignore[arg-type]
    with pytest.raises(TrackingError, match="Received a StepLoop for a second `with` statement"), training:
        pass


def test_a_checkpoint_is_the_file_that_the_function_wrote(outputs: Path) -> None:

    with StepLoop(lambda path: np.savez(path, weights=np.arange(3)), print, suffix=".npz") as training:
        for _ in training.steps(1):
            pass
    [checkpoint] = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    with np.load(checkpoint.path) as saved:
        assert saved["weights"].tolist() == [0, 1, 2]
