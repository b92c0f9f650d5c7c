"""Sweeps in one process, with a new model, Trainer and callback for each trial, and trials that end in every way."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import forked
import pytest

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

SWEEP = """
class Pruned(Exception): ...

def trouble(trial, epoch):
    if epoch == 1 and trial < 2:
        raise (Pruned, KeyboardInterrupt)[trial]
    if (trial, epoch) == (3, 2) and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)

def name(trial):
    return f"trial-{trial}" if "NAMED" in os.environ else None

for trial in map(int, os.environ.get("TRIALS", "0 1 2 3").split()):
    model, fit = prepare(trial, 0.1 / 10**trial)
    try:
        fit()
    except (Pruned, KeyboardInterrupt, SystemExit):  # Lightning ends the process where it catches Ctrl-C
        pass
    print("trial", trial, digest(model))
"""
SCRIPTS = {
    "lightning": """
import os, signal
import torch
from lightning.pytorch import Callback
from lightning_script import Classifier, data, digest, trainer
from polyaxon_lightning import PolyaxonCallback

class Model(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)

class Trouble(Callback):
    def on_train_epoch_start(self, trainer, model):
        trouble(self.trial, trainer.current_epoch)

def prepare(trial, lr):
    torch.manual_seed(trial)
    model, at = Model(), Trouble()
    model.lr, at.trial = lr, trial
    callbacks = [PolyaxonCallback(background=False, name=name(trial)), at]
    return model, lambda: trainer(*callbacks, max_epochs=4).fit(model, data(shuffle=True), data())
""",
    "keras": """
import os, signal
import keras
import keras_script
from keras_script import data, digest
from polyaxon_keras import PolyaxonCallback

class Trouble(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        trouble(self.trial, epoch)

def prepare(trial, lr):
    keras.utils.set_random_seed(trial)
    network, at = keras_script.model(optimizer=keras.optimizers.Adam(lr)), Trouble()
    at.trial = trial
    x, y = data()
    options = {"batch_size": 18, "epochs": 4, "shuffle": False, "verbose": 0}
    return network, lambda: network.fit(x, y, callbacks=[PolyaxonCallback(background=False, name=name(trial)), at], **options)
""",
    "transformers": """
import os, signal
from transformers import TrainerCallback, set_seed
from transformers_script import digest, tiny, trainer
from polyaxon_transformers import PolyaxonCallback

class Trouble(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **_):
        trouble(self.trial, int(state.epoch or 0))

def prepare(trial, lr):
    set_seed(trial)
    model, at = tiny(), Trouble()
    at.trial = trial
    callbacks = [PolyaxonCallback(background=False, name=name(trial)), at]
    return model, trainer(*callbacks, model=model, num_train_epochs=4, learning_rate=lr).train
""",
}
LINE = r"Resuming from \S+/checkpoints/(\S+)/step=\S+: epoch (\d), step (\d+)\n"


def sweep(framework: str, outputs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run(
        framework, "-c", SCRIPTS[framework] + SWEEP, POLYAXON_RUN_OUTPUTS_PATH=str(outputs), **environment
    )


def trials(process: subprocess.CompletedProcess[str]) -> list[str]:
    assert process.returncode == 0, process.stderr
    return re.findall(r"^trial .*$", process.stdout, re.MULTILINE)


@pytest.mark.parametrize("framework", SCRIPTS)
def test_each_trial_of_a_sweep_is_its_own_training_however_the_previous_one_ended(
    framework: str, tmp_path: Path
) -> None:
    places = ["resume", "resume-2", "resume-3", "resume-4"]
    uninterrupted = sweep(framework, tmp_path / "uninterrupted")
    expected = trials(uninterrupted)
    assert len(expected) == 4
    assert re.findall(r"Starting fresh: no checkpoint in \S+/checkpoints/(\S+)\n", uninterrupted.stderr) == places
    assert "Resuming from" not in uninterrupted.stderr
    killed = sweep(framework, tmp_path / "killed", KILL="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = sweep(framework, tmp_path / "killed")
    assert trials(again) == expected
    states = [("1", "4"), ("1", "4"), ("4", "16"), ("2", "8")]
    assert re.findall(LINE, again.stderr) == [(place, *state) for place, state in zip(places, states, strict=True)]


@pytest.mark.parametrize("framework", SCRIPTS)
def test_a_named_trial_resumes_from_its_own_state_whatever_trials_the_script_leaves_out(
    framework: str, tmp_path: Path
) -> None:
    expected = trials(sweep(framework, tmp_path / "uninterrupted", NAMED="1"))
    killed = sweep(framework, tmp_path / "killed", NAMED="1", KILL="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = sweep(framework, tmp_path / "killed", NAMED="1", TRIALS="3 2")
    assert trials(again) == [expected[3], expected[2]]
    assert re.findall(LINE, again.stderr) == [("trial-3/resume", "2", "8"), ("trial-2/resume", "4", "16")]
    assert not list((tmp_path / "killed" / "checkpoints").glob("resume*"))
