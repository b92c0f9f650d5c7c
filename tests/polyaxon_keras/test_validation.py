"""A validation of Keras that a signal, an exception or a kill cuts off: the next start makes up for it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from training_scripts import Ended, results_and_curves, train_with_curves

SCRIPT = Path(__file__).with_name("validation_script.py")


def train(directory: Path, **environment: str) -> Ended:
    return train_with_curves(SCRIPT, "keras", directory, **environment)


def trained(directory: Path, **environment: str) -> tuple[dict[str, Any], list[str]]:
    return results_and_curves(train(directory, **environment), directory)


@pytest.mark.parametrize("cut_off", ["SIGTERM", "exception"])
@pytest.mark.parametrize(
    "environment",
    [
        {"KIND": "functional"},
        {"KIND": "unbuilt"},
        {"KIND": "subclassed"},
        {"SWAP": "test"},
        {"SWAP": "epoch"},
        {"SWAP": "own"},
    ],
    ids=["functional", "unbuilt", "subclassed", "averages", "averages until the next epoch", "swapped"],
)
def test_a_validation_that_was_cut_off_is_made_up_for(
    tmp_path: Path, environment: dict[str, str], cut_off: str
) -> None:
    cut = train(tmp_path / "cut", CUT_OFF=cut_off, **environment)
    assert cut.returncode == (143 if cut_off == "SIGTERM" else 1), cut.stderr
    assert trained(tmp_path / "cut", **environment) == trained(tmp_path / "whole", **environment)


def test_a_signal_at_the_end_of_an_epoch_waits_until_all_callbacks_have_seen_it(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="SIGTERM", AT_THE_END="1")
    assert cut.returncode == 143, cut.stderr
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


def test_where_weights_are_swapped_a_kill_loses_no_step(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="SIGKILL", SWAP="own", FOREGROUND="1")
    assert cut.returncode == -signal.SIGKILL
    resumed = train(tmp_path / "cut", SWAP="own")
    assert ": epoch 2, step 12\n" in resumed.stderr, resumed.stderr
    assert json.loads(resumed.stdout) == trained(tmp_path / "whole", SWAP="own")[0]


def test_a_signal_in_the_first_validation_with_other_weights_waits_for_its_end(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="SIGTERM", EPOCH="0", SWAP="own")
    assert cut.returncode == 143, cut.stderr
    assert "Saved step 4 after SIGTERM" in cut.stderr
    assert trained(tmp_path / "cut", SWAP="own") == trained(tmp_path / "whole", SWAP="own")


def test_swapped_weights_are_not_saved_after_an_exception(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="exception", EPOCH="0", SWAP="own")
    assert cut.returncode == 1
    assert "Step 4 is not saved: other weights are in the model" in cut.stderr
    assert trained(tmp_path / "cut", SWAP="own") == trained(tmp_path / "whole", SWAP="own")
