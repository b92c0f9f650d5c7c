"""An evaluation of Hugging Face's Trainer that a signal, an exception or a kill cuts off: the next start makes up for it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest

if TYPE_CHECKING:
    import subprocess

TRAIN = Path(__file__).with_name("evaluation_script.py")
STEPS = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5},
}


def train(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    directory.mkdir(exist_ok=True)
    environment |= {"POLYAXON_RUN_OUTPUTS_PATH": str(directory), "EPOCHS": str(directory / "epochs")}
    return forked.run("transformers", TRAIN, **environment)


def trained(directory: Path, **environment: str) -> tuple[dict[str, Any], list[str]]:
    """Return what a training has come to, and the steps at which its callbacks were notified of the end of an epoch."""
    process = train(directory, **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), (directory / "epochs").read_text().split()


@pytest.mark.parametrize(
    "cut_off",
    [
        {"CUT_OFF": "SIGTERM"},
        {"CUT_OFF": "SIGTERM", "MOMENT": "step"},
        {"CUT_OFF": "exception"},
        {"CUT_OFF": "exception", "MOMENT": "evaluated"},
    ],
    ids=["signal", "signal before", "exception", "exception after"],
)
@pytest.mark.parametrize(
    "environment",
    [
        {"PATIENCE": "3"},
        {"OPTIONS": json.dumps(STEPS)},
        {"OPTIONS": json.dumps(PLATEAU)},
        {"OPTIONS": json.dumps({"eval_on_start": True})},
        {"OPTIONS": json.dumps({"max_steps": 14, "eval_steps": 2}), "STEP": "14"},
        {"SWAP": "evaluate"},
        {"SWAP": "before"},
    ],
    ids=["epoch", "steps", "plateau", "at the start", "max_steps", "averages", "averages before"],
)
def test_an_evaluation_that_was_cut_off_is_made_up_for(
    tmp_path: Path, environment: dict[str, str], cut_off: dict[str, str]
) -> None:
    cut = train(tmp_path / "cut", **environment, **cut_off)
    assert cut.returncode == (143 if cut_off["CUT_OFF"] == "SIGTERM" else 1), cut.stderr
    whole = trained(tmp_path / "whole", **environment)
    resumed = trained(tmp_path / "cut", **environment)
    if environment.get("STEP") == "14":  # no step is left, in which to keep the weights
        whole[0]["weights"][0] = resumed[0]["weights"][0]
    if environment.get("SWAP") == "before" and cut_off["CUT_OFF"] == "exception":  # what is not saved is trained again
        assert "Step 12 is not saved: other weights are in the model" in cut.stderr
        whole[1].insert(3, "12")
    assert resumed == whole


@pytest.mark.parametrize("environment", [{"PATIENCE": "3"}, {"SWAP": "evaluate"}], ids=["epoch", "averages"])
def test_a_kill_in_an_evaluation_never_resumes_from_other_weights(tmp_path: Path, environment: dict[str, str]) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="SIGKILL", FOREGROUND="1", **environment)
    assert cut.returncode == -signal.SIGKILL
    resumed = train(tmp_path / "cut", **environment)
    # Where averages are evaluated, the state is saved before.
    assert f": epoch 2, step {12 if 'SWAP' in environment else 8}\n" in resumed.stderr, resumed.stderr
    assert json.loads(resumed.stdout) == trained(tmp_path / "whole", **environment)[0]


@pytest.mark.parametrize("swap", ["evaluate", "before"])
def test_a_signal_in_the_first_evaluation_with_other_weights_waits_for_its_end(tmp_path: Path, swap: str) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="SIGTERM", STEP="4", SWAP=swap)
    assert cut.returncode == 143, cut.stderr
    assert "Saved step 4 after SIGTERM" in cut.stderr
    assert trained(tmp_path / "cut", SWAP=swap) == trained(tmp_path / "whole", SWAP=swap)


def test_other_weights_are_not_saved_after_an_exception(tmp_path: Path) -> None:
    cut = train(tmp_path / "cut", CUT_OFF="exception", STEP="4", SWAP="evaluate")
    assert cut.returncode == 1
    assert "Step 4 is not saved: other weights are in the model" in cut.stderr
    assert trained(tmp_path / "cut", SWAP="evaluate")[0] == trained(tmp_path / "whole", SWAP="evaluate")[0]


def test_a_signal_in_a_step_whose_evaluation_has_other_weights_waits_for_its_end(tmp_path: Path) -> None:
    """The weights were swapped by a hook before that of the callback."""
    environment = {"SWAP": "before", "OPTIONS": json.dumps(STEPS), "MOMENT": "step", "STEP": "6"}
    cut = train(tmp_path / "cut", CUT_OFF="SIGTERM", **environment)
    assert cut.returncode == 143, cut.stderr
    assert trained(tmp_path / "cut", **environment) == trained(tmp_path / "whole", **environment)
