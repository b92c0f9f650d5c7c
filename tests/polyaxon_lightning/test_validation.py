"""A validation of Lightning's Trainer that a signal, an exception or a kill cuts off: the next start makes up for it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import callbacks
from training_scripts import Ended, results_and_curves, train_with_curves

SCRIPT = Path(__file__).with_name("validation_script.py")

averages = pytest.mark.skipif(
    not hasattr(callbacks, "EMAWeightAveraging"), reason="this Lightning averages no weights for the validation"
)


def train(directory: Path, **environment: str) -> Ended:
    return train_with_curves(SCRIPT, "lightning", directory, **environment)


def trained(directory: Path, **environment: str) -> tuple[dict[str, Any], list[str]]:
    return results_and_curves(train(directory, **environment), directory)


@pytest.mark.parametrize("cut_off", ["SIGTERM", "exception"])
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WITHIN_EPOCHS": "1", "PATIENCE": "9"},
        {"MAX_STEPS": "24", "PATIENCE": "9"},
        pytest.param({"EMA": "1"}, marks=averages),
        pytest.param({"EMA": "1", "WITHIN_EPOCHS": "1", "PATIENCE": "9"}, marks=averages),
    ],
    ids=["epoch", "twice an epoch", "max_steps", "averages", "averages twice an epoch"],
)
def test_a_validation_that_was_cut_off_is_made_up_for(
    tmp_path: Path, environment: dict[str, str], cut_off: str
) -> None:
    cut = train(tmp_path / "cut", CUT_OFF=cut_off, **environment)
    assert cut.returncode == (143 if cut_off == "SIGTERM" else 1), cut.stderr
    assert trained(tmp_path / "cut", **environment) == trained(tmp_path / "whole", **environment)


@averages
def test_where_averages_are_validated_a_kill_loses_no_step(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="SIGKILL", EMA="1", FOREGROUND="1")
    assert cut.returncode == -signal.SIGKILL
    assert trained(tmp_path / "cut", EMA="1") == trained(tmp_path / "whole", EMA="1")


@averages
def test_a_signal_in_the_first_validation_of_averages_waits_for_its_end(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="SIGTERM", EPOCH="0", EMA="1")
    assert cut.returncode == 143, cut.stderr
    assert "Saved step 4 after SIGTERM" in cut.stderr
    assert trained(tmp_path / "cut", EMA="1") == trained(tmp_path / "whole", EMA="1")


@averages
def test_averages_are_not_saved_as_the_weights_after_an_exception(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="exception", EPOCH="0", EMA="1")
    assert cut.returncode == 1
    assert "Step 4 is not saved: other weights are in the model" in cut.stderr
    (tmp_path / "cut" / "curves").unlink()  # training starts over
    assert trained(tmp_path / "cut", EMA="1") == trained(tmp_path / "whole", EMA="1")
