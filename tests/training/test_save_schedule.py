"""When a save is due, by a clock that the tests set."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest
from clock import Clock

from polyaxon_tracking.training import SaveOptions
from polyaxon_tracking.training.save_schedule import SaveSchedule

if TYPE_CHECKING:
    from collections.abc import Iterable


@pytest.mark.parametrize(
    ("every", "steps", "saved"),
    [
        (3, range(1, 11), [3, 6, 9]),
        (10, range(1, 50, 2), [11, 21, 31, 41]),
        (10, [4, 8, 12, 16, 20, 24], [12, 20]),
        (2, [5, 10, 11, 12], [5, 10, 12]),
        (3, [3, 3, 3, 4, 6, 6], [3, 6]),
        (1, [1, 2, 2, 3], [1, 2, 3]),
        (None, range(1, 50), []),
        (np.int64(3), range(1, 11), [3, 6, 9]),
    ],
    ids=[
        "each step",
        "two a batch",
        "four a batch",
        "several multiples",
        "accumulated",
        "every step",
        "never",
        "NumPy",
    ],
)
def test_a_multiple_of_steps_that_is_reached_or_passed_asks_for_a_save(
    every: int | None, steps: Iterable[int], saved: list[int]
) -> None:
    schedule, found = SaveSchedule(SaveOptions(every_n_train_steps=every)), [0]
    for step in steps:
        if schedule.is_due_by_steps(step=step, saved_step=found[-1]):
            found.append(step)
    assert found[1:] == saved


@pytest.mark.parametrize(("started_at", "saved"), [(7, 10), (10, 20), (11, 20)])
def test_a_resumed_training_saves_at_the_next_multiple(started_at: int, saved: int) -> None:
    schedule = SaveSchedule(SaveOptions(every_n_train_steps=10))
    steps = range(started_at + 1, 40)
    assert next(step for step in steps if schedule.is_due_by_steps(step=step, saved_step=started_at)) == saved


@pytest.mark.parametrize(("seconds", "over"), [(0.0, False), (59.9, False), (60.0, True), (3600.0, True)])
def test_the_interval_is_over_when_its_time_has_passed(seconds: float, over: bool) -> None:
    clock = Clock(1000.0)
    timed = SaveSchedule(SaveOptions(train_time_interval=timedelta(minutes=1)), clock)
    never = SaveSchedule(SaveOptions(), clock)
    for schedule in (timed, never):
        schedule.start()
    clock.seconds += seconds
    assert timed.is_due_by_time() is over
    assert not never.is_due_by_time()


class Simulated:
    """A training whose batches and saves take so many seconds; the first save counts from the start."""

    def __init__(self, *, batch: float, blocked: float, writing: float = 0.0, slowdown: float = 0.0) -> None:
        self.clock = Clock(1000.0)
        self.schedule = SaveSchedule(SaveOptions(every_n_train_steps="auto"), self.clock)
        self.batch, self.blocked, self.writing, self.slowdown = batch, blocked, writing, slowdown
        self.written_at = 0.0

    def intervals(self, saves: int) -> list[float]:
        """Return the seconds before each of so many saves."""
        self.schedule.start()
        found, began = [], self.clock.seconds
        while len(found) < saves:
            is_writing = self.clock.seconds < self.written_at
            self.clock.seconds += self.batch * (1 + self.slowdown * is_writing)
            if self.schedule.is_due_by_time(is_writing=self.clock.seconds < self.written_at):
                found.append(round(self.clock.seconds - began, 1))
                with self.schedule.saving():
                    self.clock.seconds += self.blocked
                began = self.clock.seconds
                self.written_at = began + self.writing
        return found


def test_automatic_saves_cost_a_hundredth_of_the_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert Simulated(batch=0.5, blocked=0.42).intervals(5) == pytest.approx([30, 42, 42, 42, 42], abs=0.5)
    assert caplog.messages == ["every_n_train_steps='auto': a save costs 0.42 s, so that one comes every 42 s"]


def test_the_time_by_which_a_write_slows_batches_down_is_a_cost() -> None:
    """20 batches of 1 s during a write take 1.1 s each, and training waits for 1 s: the cost is about 3 s."""
    *_, interval = Simulated(batch=1.0, blocked=1.0, writing=22.0, slowdown=0.1).intervals(5)
    assert 280 < interval < 310


def test_a_slower_disk_makes_automatic_saves_rarer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    training = Simulated(batch=1.0, blocked=0.5)
    assert training.intervals(3) == pytest.approx([30, 50, 50], abs=1)
    training.blocked = 2.0
    assert training.intervals(3) == pytest.approx([50, 200, 200], abs=1)
    assert [message.rpartition(" every ")[2] for message in caplog.messages] == ["50 s", "200 s"]


def test_automatic_saves_are_never_closer_than_ten_seconds_nor_than_a_write() -> None:
    assert Simulated(batch=0.5, blocked=0.001).intervals(3) == pytest.approx([30, 10, 10], abs=0.5)
    assert Simulated(batch=0.5, blocked=0.001, writing=60.0).intervals(3) == pytest.approx([30, 60, 60], abs=0.5)
