"""The options of saving that all callbacks share."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import SaveOptions

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
    ],
    ids=["each step", "two a batch", "four a batch", "several multiples", "accumulated", "every step", "never"],
)
def test_a_multiple_of_steps_that_is_reached_or_passed_asks_for_a_save(
    every: int | None, steps: Iterable[int], saved: list[int]
) -> None:
    found = [0]
    for step in steps:
        if SaveOptions(every_n_train_steps=every).should_save(step=step, saved_step=found[-1]):
            found.append(step)
    assert found[1:] == saved


@pytest.mark.parametrize(("started_at", "saved"), [(7, 10), (10, 20), (11, 20)])
def test_a_resumed_training_saves_at_the_next_multiple(started_at: int, saved: int) -> None:
    steps = range(started_at + 1, 40)
    assert (
        next(
            step for step in steps if SaveOptions(every_n_train_steps=10).should_save(step=step, saved_step=started_at)
        )
        == saved
    )


# Resuming


@pytest.mark.parametrize(("seconds", "over"), [(0.0, False), (59.9, False), (60.0, True), (3600.0, True)])
def test_the_interval_is_over_when_its_time_has_passed(seconds: float, over: bool) -> None:
    options = SaveOptions(train_time_interval=timedelta(minutes=1))
    assert options.is_interval_over(seconds_since_save=seconds) is over
    assert not SaveOptions().is_interval_over(seconds_since_save=seconds)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"every_n_train_steps": 0}, "Received every_n_train_steps=0. Expected a whole number, 1 or more, or None."),
        ({"every_n_train_steps": True}, "Received every_n_train_steps=True. Expected a whole number"),
        ({"every_n_train_steps": 2.5}, "Received every_n_train_steps=2.5. Expected a whole number"),
        ({"train_time_interval": 60}, "Received train_time_interval=60. Expected a timedelta above zero, such as"),
        ({"train_time_interval": timedelta(0)}, "Received train_time_interval=datetime.timedelta(0). Expected"),
        ({"max_to_keep": 0}, "Received max_to_keep=0. Expected a whole number, 1 or more."),
        ({"background": "no"}, "Received background='no'. Expected True or False."),
        ({"write_timeout": 30}, "Received write_timeout=30. Expected a timedelta above zero."),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(TrackingError) as caught:
        SaveOptions(**option)
    assert str(caught.value).startswith(message)
