"""The Keras callback in processes that are killed and started again."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING

import forked
import pytest
from training_scripts import newest, train, trained

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("options", "resumed_at"),
    [
        ({"KIND": "functional", "FOREGROUND": "1"}, "epoch 3, step 12"),
        # In the background the save of the last epoch may still be under way when the kill comes.
        ({"KIND": "functional"}, "epoch [23], step (8|12)"),
        ({"KIND": "subclassed"}, "epoch [23], step (8|12)"),
    ],
    ids=["functional, in the foreground", "functional", "subclassed"],
)
def test_a_killed_and_resumed_training_has_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, options: dict[str, str], resumed_at: str
) -> None:
    killed = train("keras", tmp_path / "killed", DIE_AT_STEP="14", **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train("keras", tmp_path / "killed", **options)
    assert re.search(f": {resumed_at}\n", resumed.stderr), resumed.stderr
    assert trained(resumed) == trained(train("keras", tmp_path / "uninterrupted", **options))


def test_a_finished_training_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = train("keras", tmp_path)
    again = train("keras", tmp_path)
    assert trained(again) == trained(first)
    assert "This training has ended already (epochs=6): nothing is left to train" in again.stderr


@pytest.mark.parametrize(
    ("fails", "saved"),
    [
        ("on_train_batch_end", "epoch 1, step 6"),
        ("on_train_batch_begin", "epoch 1, step 6"),
        ("on_test_begin", "epoch 1, step 8"),
        ("on_epoch_end", "epoch 1, step 8"),
        # Keras 3.12 reads a batch ahead on JAX. TensorFlow counts the step whose data it did not get.
        ("data", "epoch 1, step [567]"),
    ],
)
def test_an_exception_in_the_users_code_is_saved_after(tmp_path: Path, fails: str, saved: str) -> None:
    failed = train("keras", tmp_path, FAILS=fails)
    assert failed.returncode == 1
    assert "RuntimeError: mine" in failed.stderr or "UnknownError" in failed.stderr  # TensorFlow's, for the data's
    assert re.search(f"Saved step {saved.rpartition(' ')[2]} after", failed.stderr), failed.stderr
    resumed = train("keras", tmp_path)
    assert re.search(f": {saved}\n", resumed.stderr), resumed.stderr
    trained(resumed)


def test_an_exception_in_the_middle_of_an_optimizer_step_is_not_saved_after(tmp_path: Path) -> None:
    failed = train("keras", tmp_path, FAILS="optimizer")
    assert failed.returncode == 1
    assert "RuntimeError: mine" in failed.stderr
    # On JAX the variables change when the whole step is done, so they are still those of the step before.
    saved = os.environ.get("KERAS_BACKEND") == "jax"
    assert ("Saved step 6 after RuntimeError" in failed.stderr) == saved
    assert newest(tmp_path).step == (6 if saved else 4)


FAILED_BEFORE = """
import os, signal
import numpy as np
import keras
from polyaxon_keras import PolyaxonCallback
from polyaxon_tracking import PreemptionHandler

class Fail(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise ArithmeticError

model = keras.Sequential([keras.layers.Dense(1)])
model.compile("sgd", "mse")
try:
    model.fit(np.zeros((8, 2)), np.zeros(8), callbacks=[PolyaxonCallback(), Fail()])
except ArithmeticError:
    with PreemptionHandler() as preemption:  # of the user's own loop, or of another framework
        os.kill(os.getpid(), signal.SIGTERM)
        open("saved", "w").close()
        preemption.exit()
"""


def test_a_signal_is_heard_in_a_training_after_one_that_failed(tmp_path: Path) -> None:
    process = forked.run("keras", "-c", FAILED_BEFORE)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert (tmp_path / "saved").exists()
