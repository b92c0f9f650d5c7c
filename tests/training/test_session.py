"""The rules of a training, without a framework: the state is a text, and a step is a number."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import Action, Flags, ProcessGroup, Run, SaveOptions, TrainingSession, messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")


class Model:
    """What is trained: only its identity counts."""


class Training:
    """The smallest integration: a loop whose state is the number of its step."""

    def __init__(self, process_group: ProcessGroup | None = None, model: object | None = None, **options: Any) -> None:
        self.run = Run(resume=True)
        self.model = Model() if model is None else model
        self.options = SaveOptions(**options)
        checkpoints = self.run.checkpoint_manager(self.model, options=self.options)
        self.session = TrainingSession(self.run, checkpoints, self.options, process_group or ProcessGroup())
        self.step = 0
        self.attempts: list[int] = []
        self.problem: OSError | None = None
        self.seconds_per_write = 0.0

    def save(self) -> None:
        step = self.step
        with self.session.saving(step), self.session.process_group.share_errors():
            self.attempts.append(step)
            if not self.session.is_writer:
                return
            if self.options.background:
                self.session.writer.submit(f"step {step}", lambda: self.write(step))
            else:
                self.write(step)

    def write(self, step: int) -> None:
        if self.problem is not None:
            raise self.problem
        time.sleep(self.seconds_per_write)
        with self.session.checkpoints.save(step) as path:
            Path(path).write_text(f"step {step}")

    def end_batch(self, step: int) -> Action:
        self.step = step
        time.sleep(2e-6)  # longer than the shortest interval of these tests
        action = self.session.end_batch(step)
        if action is Action.SAVE:
            self.save()
        elif action is Action.STOP:
            self.session.stop(step, self.save)
        return action

    @property
    def saved(self) -> list[int]:
        self.session.writer.wait()
        return [checkpoint.step for checkpoint in reversed(self.session.checkpoints.checkpoints())]


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def begun(outputs: Path) -> Iterator[Callable[..., Training]]:
    """Begin trainings, and close them after the test."""
    trainings: list[Training] = []

    def begin(step: int = 0, **arguments: Any) -> Training:
        trainings.append(training := Training(**arguments))
        training.step = step
        training.session.begin(step)
        return training

    yield begin
    for training in trainings:
        training.session.close()


full_disk = OSError(errno.ENOSPC, "No space left on device")
foreground_and_background = pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])


# When it is saved


@pytest.mark.parametrize(
    ("options", "steps", "saved"),
    [
        ({"every_n_train_steps": 2}, [1, 2, 3, 4], [2, 4]),
        ({"every_n_train_steps": 10}, [8, 11, 19, 21], [11, 21]),
        ({"train_time_interval": timedelta(microseconds=1)}, [1, 2], [1, 2]),
        ({"train_time_interval": timedelta(hours=1)}, [1, 2], []),
        ({}, [1, 2], []),
        ({"every_n_train_steps": 1}, [0, 0, 1, 1, 1, 2], [1, 2]),
    ],
    ids=["a multiple", "a multiple is passed over", "time", "not yet time", "neither", "gradients are accumulated"],
)
@foreground_and_background
def test_it_is_saved(
    options: dict[str, Any], steps: list[int], saved: list[int], background: bool, begun: Callable[..., Training]
) -> None:
    training = begun(background=background, **options)
    actions = [training.end_batch(step) for step in steps]
    assert training.saved == training.attempts == saved
    assert actions.count(Action.SAVE) == len(saved)


def test_a_training_that_resumes_counts_from_where_it_was(begun: Callable[..., Training]) -> None:
    training = begun(7, every_n_train_steps=4)
    assert [training.end_batch(step) for step in (7, 8, 9)] == [Action.NOTHING, Action.SAVE, Action.NOTHING]


# What it resumes from


def test_it_resumes_from_the_newest(begun: Callable[..., Training], caplog: pytest.LogCaptureFixture) -> None:
    training = begun(every_n_train_steps=2)
    assert training.session.find_checkpoint((".ckpt",), "This test") is None
    training.session.log.start(None)
    for step in (2, 4, 6):
        training.end_batch(step)
    assert training.saved == [4, 6]
    newest = training.session.find_checkpoint((".ckpt",), "This test")
    assert newest is not None
    assert Path(newest.path).read_text() == "step 6"
    training.session.log.start(newest)
    training.session.log.nothing_left(epoch=2, limit="epochs=2")
    training.session.log.nothing_left(epoch=2, limit=None)
    training.session.log.unused(newest, "ckpt_path", "mine.ckpt")
    assert caplog.messages == [
        f"Starting fresh: no checkpoint in {training.session.checkpoints.directory}",
        f"Resuming from {newest.path}: epoch 0, step 6",
        "This training has ended already (epochs=2): nothing is left to train",
        "This training was stopped early, at epoch 2: nothing is left to train",
        (
            f"Resuming from ckpt_path=mine.ckpt as asked, although {newest.path} exists. Leave out `ckpt_path` to "
            "resume from it"
        ),
    ]


def test_a_checkpoint_of_another_framework_is_refused(begun: Callable[..., Training]) -> None:
    training = begun(every_n_train_steps=2)
    training.end_batch(2)
    training.session.wait()
    with pytest.raises(TrackingError, match=r"Received \S+\.ckpt, which Keras did not save. Expected an outputs path"):
        training.session.find_checkpoint((".weights.h5",), "Keras")


# A signal


@pytest.mark.parametrize(
    ("number", "ends", "name"),
    [(signal.SIGTERM, SystemExit, "SIGTERM"), (signal.SIGINT, KeyboardInterrupt, "SIGINT")],
    ids=["SIGTERM", "Ctrl-C"],
)
@foreground_and_background
def test_a_signal_stops_at_the_end_of_the_batch_and_saves_once(
    number: int,
    ends: type[BaseException],
    name: str,
    background: bool,
    begun: Callable[..., Training],
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = begun(background=background)
    training.end_batch(1)
    os.kill(os.getpid(), number)
    with pytest.raises(ends) as ended:
        training.end_batch(2)
    training.session.save_after_exception(ended.value, 2, training.save)
    assert ends is KeyboardInterrupt or ended.value.code == 143  # type: ignore[attr-defined]
    assert training.saved == training.attempts == [2]
    assert caplog.messages[-1] == f"Saved step 2 after {name}"


def test_a_signal_does_not_save_again_what_is_saved(
    begun: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    training = begun(every_n_train_steps=2)
    training.end_batch(2)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        training.end_batch(2)
    assert training.attempts == [2]
    assert caplog.messages[-1] == "Saved step 2 after SIGTERM"


def test_a_signal_before_the_first_step_saves_nothing_and_does_not_say_so(
    begun: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    training = begun()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        training.end_batch(0)
    assert training.attempts == []
    assert "Saved" not in caplog.text


@foreground_and_background
def test_a_signal_ends_a_run_as_preempted_also_if_the_last_save_fails(
    background: bool, begun: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    training = begun(background=background)
    training.problem = full_disk
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        training.end_batch(1)
    assert caplog.messages[-1] == (
        "The state after step 1 was not saved; the previous checkpoint is untouched: OSError: [Errno 28] No space left "
        "on device"
    )
    assert training.attempts == [1]


def test_a_signal_stops_an_evaluation(begun: Callable[..., Training]) -> None:
    training = begun()
    training.end_batch(3)
    assert not training.session.should_stop_now()
    os.kill(os.getpid(), signal.SIGTERM)
    assert training.session.should_stop_now()
    with pytest.raises(SystemExit, match="143"):
        training.session.stop(3, training.save)
    assert training.saved == [3]


def test_a_signal_after_the_last_batch_ends_the_run_when_training_has_finished(begun: Callable[..., Training]) -> None:
    training = begun(every_n_train_steps=1)
    training.end_batch(1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        training.session.finish(has_ended=True)
    assert training.saved == [1]


def test_an_automatic_save_comes_by_the_clock(begun: Callable[..., Training]) -> None:
    training = begun(every_n_train_steps="auto")
    training.end_batch(1)
    training.session._schedule.saved_at -= 31
    for step in (2, 3, 4):
        training.end_batch(step)
    assert training.saved == [2]


@foreground_and_background
def test_a_save_that_takes_longer_than_a_grace_period_is_said_at_the_next(
    begun: Callable[..., Training], background: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "_GRACE_PERIOD", 0.2)
    training = begun(every_n_train_steps=1, background=background)
    for step in (1, 2, 3, 4):
        training.seconds_per_write = 0.3 if step == 2 else 0.0
        training.end_batch(step)
        training.session.writer.wait()
        said = [message for message in caplog.messages if "longer than the grace period" in message]
        assert len(said) == (step > 2), step


# An exception


@foreground_and_background
def test_an_exception_saves_the_steps_since_the_last_save(
    background: bool, begun: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    training = begun(every_n_train_steps=2, background=background)
    for step in (1, 2, 3):
        training.end_batch(step)
    training.session.save_after_exception(ValueError("NaN"), 3, training.save)
    assert training.saved == [2, 3]
    assert caplog.messages == ["Saved step 3 after ValueError"]


def nothing_happens(training: Training) -> None:
    training.end_batch(2)  # which is saved


def a_step_is_half_done(training: Training) -> None:
    training.end_batch(3)
    training.session.stepping_from = 3


def it_has_not_begun(training: Training) -> None:
    training.step = 3
    training.session.is_active = False


@pytest.mark.parametrize("before", [nothing_happens, a_step_is_half_done, it_has_not_begun])
def test_an_exception_saves_nothing_where(
    before: Callable[[Training], None], begun: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    training = begun(every_n_train_steps=2)
    training.end_batch(2)
    before(training)
    attempts = list(training.attempts)
    training.session.save_after_exception(ValueError(), training.step, training.save)
    assert training.attempts == attempts
    assert "Saved" not in caplog.text


def test_an_exception_saves_after_the_optimizer_step_is_done(begun: Callable[..., Training]) -> None:
    training = begun()
    training.end_batch(1)
    training.session.stepping_from = 1
    training.step = 2  # counted when the step is done
    training.session.save_after_exception(ValueError(), 2, training.save)
    assert training.saved == [2]


def test_an_exception_saves_no_averaged_weights(
    begun: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    training = begun()
    training.end_batch(1)
    training.session.save_after_exception(ValueError(), 1, training.save, has_trained_weights=lambda: False)
    assert training.saved == []
    assert caplog.messages == [
        "Step 1 is not saved: other weights are in the model, such as averages. The previous checkpoint is untouched"
    ]


def test_an_exception_after_a_signal_ends_the_run_as_preempted(
    begun: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    training = begun()
    training.end_batch(1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        training.session.save_after_exception(RuntimeError("a worker was killed"), 1, training.save)
    assert training.saved == [1]
    assert caplog.messages[-2:] == ["Saved step 1 after SIGTERM", "After SIGTERM: RuntimeError: a worker was killed"]


# A write that fails


def test_a_failed_save_in_the_foreground_is_not_repeated_after_its_error(begun: Callable[..., Training]) -> None:
    training = begun(every_n_train_steps=1, background=False)
    training.problem = full_disk
    with pytest.raises(OSError, match="No space left"):
        training.end_batch(1)
    training.session.save_after_exception(full_disk, 1, training.save)
    assert training.attempts == [1]


def test_a_failed_write_in_the_background_is_raised_after_the_next_batch_and_then_the_newest_state_is_saved(
    begun: Callable[..., Training],
) -> None:
    training = begun(every_n_train_steps=10)
    training.problem = full_disk
    training.end_batch(10)
    while training.session.writer.pending:
        pass
    with pytest.raises(OSError, match="No space left"):
        training.end_batch(11)
    training.problem = None
    training.session.save_after_exception(full_disk, 11, training.save)
    assert training.saved == [11]


def test_a_failed_write_in_the_background_that_the_end_notices_is_repeated(begun: Callable[..., Training]) -> None:
    training = begun(every_n_train_steps=2)
    training.problem = full_disk
    training.end_batch(2)
    with pytest.raises(OSError, match="No space left"):
        training.session.wait()
    training.problem = None
    training.session.save_after_exception(full_disk, 2, training.save)
    assert training.saved == [2]


# Its end


def test_the_next_training_has_its_own_checkpoints_only_after_the_end(begun: Callable[..., Training]) -> None:
    model = Model()
    failed = begun(model=model)
    failed.session.save_after_exception(ValueError(), 0, failed.save)
    again = begun(model=model)
    assert again.session.checkpoints.directory == failed.session.checkpoints.directory
    again.session.finish(has_ended=True)
    following = begun(model=model)
    assert following.session.checkpoints.directory == f"{failed.session.checkpoints.directory}-2"


@pytest.mark.parametrize(
    ("has_ended", "options", "kept"),
    [
        pytest.param(True, {}, [4], id="ended"),
        pytest.param(False, {}, [4, 3], id="a time limit"),
        pytest.param(True, {"max_to_keep": 3}, [4, 3, 2], id="as many as the user says"),
    ],
)
def test_only_the_newest_state_of_a_training_that_has_ended_is_kept(
    begun: Callable[..., Training], has_ended: bool, options: dict[str, Any], kept: list[int]
) -> None:
    training = begun(every_n_train_steps=1, **options)
    for step in (1, 2, 3, 4):
        training.end_batch(step)
    training.session.finish(has_ended=has_ended)
    assert [checkpoint.step for checkpoint in training.session.checkpoints.checkpoints()] == kept


def test_a_training_whose_last_write_fails_has_not_finished(begun: Callable[..., Training]) -> None:
    model = Model()
    training = begun(model=model, every_n_train_steps=1)
    training.problem = full_disk
    training.end_batch(1)
    with pytest.raises(OSError, match="No space left"):
        training.session.finish(has_ended=True)
    assert begun(model=model).session.checkpoints.directory == training.session.checkpoints.directory


# Two ranks: two threads, which wait for each other in every collective


class Meeting:
    """Where the ranks exchange values."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=300)
        self.values: list[Any] = [None, None]

    def exchange(self, rank: int, value: _T) -> list[_T]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class Rank(ProcessGroup):
    """One of two threads; the flags are those of the batch before, as with real processes."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__()
        self.is_distributed, self.rank, self.meeting, self.flags = True, rank, meeting, Flags()

    def gather(self, value: _T) -> list[_T]:
        return self.meeting.exchange(self.rank, value)

    def reduce_flags(self, flags: Flags) -> Flags:
        previous, rows = self.flags, self.meeting.exchange(self.rank, flags)
        self.flags = Flags(*map(max, zip(*rows, strict=True)))
        return previous


def on_both_ranks(train: Callable[[Training], Any], **options: Any) -> list[Any]:
    """Return what `train` returns or raises on each rank; both save to the directory of one model."""
    meeting, model = Meeting(), Model()

    def of_rank(rank: int) -> Any:
        training = Training(Rank(rank, meeting), model, **options)
        training.session.begin(0)
        try:
            return train(training)
        except (OSError, RuntimeError, SystemExit) as error:
            return error
        finally:
            training.session.close()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of_rank, range(2)))


def test_both_ranks_save_at_the_same_batch_by_the_clock_of_the_first(outputs: Path) -> None:
    def train(training: Training) -> list[Action]:
        if not training.session.is_writer:
            training.session._schedule.saved_at -= 3600  # another clock
        return [training.end_batch(step) for step in (1, 2, 3)]

    assert on_both_ranks(train, train_time_interval=timedelta(minutes=1)) == [[Action.NOTHING] * 3] * 2


def test_a_signal_to_one_rank_stops_both_one_batch_later(outputs: Path) -> None:
    saved: list[tuple[int, int]] = []

    def train(training: Training) -> None:
        for step in (1, 2, 3):
            if step == 2 and not training.session.is_writer:
                training.session.preemption.requested = signal.SIGTERM
            try:
                training.end_batch(step)
            finally:
                saved.extend((training.session.process_group.rank, attempt) for attempt in training.attempts)

    first, second = on_both_ranks(train)
    assert first.code == second.code == 143
    assert sorted(saved) == [(0, 3), (1, 3)]


def test_a_write_that_fails_on_the_first_rank_ends_both(outputs: Path) -> None:
    def train(training: Training) -> None:
        training.problem = full_disk
        for step in range(1, 1000):
            training.end_batch(step)

    first, second = on_both_ranks(train, every_n_train_steps=1)
    assert first is full_disk
    assert str(second) == "Rank 0 failed, and this one ends with it: OSError: [Errno 28] No space left on device"


def test_an_exception_on_one_rank_saves_nothing_there(outputs: Path) -> None:
    def train(training: Training) -> list[int]:
        training.end_batch(1)
        training.session.save_after_exception(ValueError(), 1, training.save)
        return training.attempts

    assert on_both_ranks(train) == [[], []]
