"""What happens if the script's hyperparameters differ from those of the training that it resumes."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import (
    Hyperparameters,
    ProcessGroup,
    Run,
    SaveOptions,
    TrainingSession,
    accept_hyperparameters,
)

SAVED = {"lr": 0.1, "batch_size": 32}


def session(if_changed: Any = "warn", process_group: ProcessGroup | None = None) -> TrainingSession:
    class Model: ...

    run = Run(if_changed=if_changed)
    return TrainingSession(run, run.checkpoint_manager(Model()), SaveOptions(), process_group)


def hyperparameters(lr: float = 0.1, batch_size: int = 32) -> Hyperparameters:
    return Hyperparameters(restored={"lr": lr}, script={"batch_size": batch_size})


@pytest.mark.parametrize("if_changed", ["warn", "raise", "restart"])
@pytest.mark.parametrize("saved", [SAVED, None, {}, {"an option of an older version": 1}], ids=str)
def test_a_training_whose_hyperparameters_are_the_same_resumes(
    if_changed: str, saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert accept_hyperparameters(session(if_changed), "outputs/step", saved, hyperparameters())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_warning_names_both_values_and_which_is_used(caplog: pytest.LogCaptureFixture) -> None:
    assert accept_hyperparameters(session(), "outputs/step", SAVED, hyperparameters(0.2, 64))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == (
        "The hyperparameters in the script have changed since outputs/step was saved: "
        "lr: 0.1 -> 0.2 (0.1 is used, from the checkpoint); batch_size: 32 -> 64 (64 is used, from the script). "
        "To start from scratch with those in the script, pass if_changed='restart'"
    )


def test_what_is_saved_next_is_what_training_uses() -> None:
    resumed = hyperparameters(0.2, 64).as_saved(SAVED)
    assert resumed == {"lr": 0.1, "batch_size": 64}
    assert len(hyperparameters(0.2, 64).changes(resumed)) == 1  # the next start warns of the learning rate again
    assert hyperparameters(0.1, 64).changes(resumed) == []


def test_raise_and_restart_do_what_they_say(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrackingError, match=r"lr: 0\.1 -> 0\.2 .* Expected the same, because of if_changed='raise'"):
        accept_hyperparameters(session("raise"), "outputs/step", SAVED, hyperparameters(0.2))
    assert not accept_hyperparameters(session("restart"), "outputs/step", SAVED, hyperparameters(0.2))
    assert "starts from scratch because of if_changed='restart'" in caplog.text


class Others(ProcessGroup):
    """A process group of two, in which the other rank's hyperparameters have changed."""

    def gather(self, value: Any) -> list[Any]:
        return [value, True]


def test_if_one_rank_starts_from_scratch_all_do() -> None:
    assert not accept_hyperparameters(session("restart", Others()), "outputs/step", SAVED, hyperparameters())
    assert accept_hyperparameters(session("warn", Others()), "outputs/step", SAVED, hyperparameters())


class Color(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "saved"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        ((0.9, 0.999), [0.9, 0.999]),
        ([1, "a", None], [1, "a", None]),
        (None, None),
        (True, True),
    ],
    ids=repr,
)
def test_plain_values_are_compared(value: object, saved: object) -> None:
    assert Hyperparameters(restored={}, script={"nested": {"value": value}}).as_saved() == {"nested.value": saved}


@pytest.mark.parametrize("value", [Color, Path("a"), Color.RED, [Color.RED], np.zeros(2), len], ids=repr)
def test_other_values_are_left_out(value: object) -> None:
    assert Hyperparameters(restored={"value": value}, script={"nested": {"value": value}}).as_saved() == {}


@pytest.mark.parametrize("name", ["max_epochs", "epochs", "num_train_epochs", "max_steps"])
def test_the_length_of_a_training_may_change(name: str) -> None:
    assert Hyperparameters(restored={}, script={name: 3}).as_saved() == {}


def test_numbers_that_are_not_numbers_are_equal() -> None:
    nan = Hyperparameters(restored={"value": float("nan")}, script={})
    assert nan.changes({"value": float("nan")}) == []


def test_no_secret_is_shown() -> None:
    current = Hyperparameters(restored={}, script={"api_key": "wJalrXUtnFEMI", "url": "s3://a:b@c/d", "max_tokens": 8})
    changes = current.changes({"api_key": "AKIAold", "url": "s3://a:c@c/d", "max_tokens": 4})
    assert "max_tokens: 4 -> 8 (8 is used, from the script)" in changes
    assert all(secret not in " ".join(changes) for secret in ("wJal", "AKIA", "a:b", "a:c"))


@pytest.mark.parametrize("if_changed", [None, True, "ignore", ["warn"]], ids=repr)
def test_other_values_of_the_option_are_an_error(if_changed: Any) -> None:
    with pytest.raises(TrackingError, match=r"Received if_changed=.* Expected 'warn', 'raise' or 'restart'"):
        Run(if_changed=if_changed)
