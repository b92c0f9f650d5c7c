"""The Keras callback next to others of one ``fit``."""

from __future__ import annotations

import copy
import csv
import logging
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
from keras_script import data, digest, model
from restarts import forget_trainings

from polyaxon_keras import PolyaxonCallback
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EPOCHS = 4


class Fail(keras.callbacks.Callback):
    """Raise before a batch of the third epoch."""

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        if (self.epoch, batch) == (2, 1):
            raise RuntimeError("mine")


def fit(*callbacks: keras.callbacks.Callback, **options: Any) -> keras.Model:
    forget_trainings()
    keras.utils.set_random_seed(0)
    network = model("functional", optimizer=keras.optimizers.Adam(0.01, use_ema=True))
    x, y = data()
    options = {"epochs": EPOCHS, "batch_size": 16, "shuffle": False, "validation_split": 0.1, "verbose": 0} | options
    network.fit(x, y, callbacks=list(callbacks), **options)
    return network


def swapping_first(directory: Path) -> list[keras.callbacks.Callback]:
    return [keras.callbacks.SwapEMAWeights(swap_on_epoch=True), polyaxon()]


def swapping_last(directory: Path) -> list[keras.callbacks.Callback]:
    return [polyaxon(), keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]


def swapping_for_the_validation(directory: Path) -> list[keras.callbacks.Callback]:
    return [keras.callbacks.SwapEMAWeights(), polyaxon()]


def tensorboard(directory: Path) -> list[keras.callbacks.Callback]:
    return [keras.callbacks.TensorBoard(directory / "logs"), polyaxon()]


def csv_logger(directory: Path) -> list[keras.callbacks.Callback]:
    return [polyaxon(), keras.callbacks.CSVLogger(directory / "metrics.csv", append=True)]


def orbax(directory: Path) -> list[keras.callbacks.Callback]:
    return [polyaxon(), keras.callbacks.OrbaxCheckpoint(str(directory / "orbax"))]


def polyaxon() -> PolyaxonCallback:
    return PolyaxonCallback(save_best_only=True)


OTHERS = [swapping_first, swapping_last, swapping_for_the_validation, tensorboard, csv_logger]
if hasattr(keras.callbacks, "OrbaxCheckpoint"):
    OTHERS.append(orbax)


@pytest.mark.parametrize("make", OTHERS)
def test_next_to_others_a_resumed_training_has_the_weights_of_an_uninterrupted_one(
    make: Callable[[Path], list[keras.callbacks.Callback]],
    outputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        fit(*make(outputs), Fail())
    resumed = digest(fit(*make(outputs)))
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "whole"))
    assert resumed == digest(fit(*make(tmp_path / "whole")))


def test_the_average_of_the_weights_is_saved_for_the_user_where_it_was_swapped_in(outputs: Path) -> None:
    network = fit(keras.callbacks.SwapEMAWeights(swap_on_epoch=True), PolyaxonCallback())
    saved = keras.saving.load_model(outputs / "checkpoints" / "model.keras")
    for one, other in zip(saved.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_rows_of_a_csv_logger_continue(outputs: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        fit(*csv_logger(outputs), Fail())
    fit(*csv_logger(outputs))
    with open(outputs / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("first", [True, False])
def test_backup_and_restore_is_refused_before_training(first: bool, outputs: Path, tmp_path: Path) -> None:
    callbacks = [PolyaxonCallback(), keras.callbacks.BackupAndRestore(tmp_path / "backup")]
    with pytest.raises(
        TrackingError, match=r"Received a BackupAndRestore together with a PolyaxonCallback\. Expected one of"
    ):
        fit(*(callbacks if first else callbacks[::-1]))
    assert not list(outputs.glob("**/*.h5"))


def test_backup_and_restore_may_do_the_resuming(outputs: Path, tmp_path: Path) -> None:
    fit(PolyaxonCallback(resume=False), keras.callbacks.BackupAndRestore(tmp_path / "backup"))
    assert list(outputs.glob("**/step=*.h5"))


def test_files_outside_the_outputs_are_warned_of(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [keras.callbacks.TensorBoard("./logs"), keras.callbacks.CSVLogger("metrics.csv")]
    fit(PolyaxonCallback(), *callbacks, epochs=1)
    for name, path, example in (("TensorBoard", "./logs", "logs"), ("CSVLogger", "metrics.csv", "metrics.csv")):
        assert (
            f"The files of {name} go to {path}, outside the outputs path {outputs}, and may be lost with the pod. Pass "
            f'{name}(f"{{polyaxon.outputs_path}}/{example}")' in caplog.messages
        )


def test_nobody_is_warned_of_files_off_the_cluster_or_in_the_outputs(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(PolyaxonCallback(), keras.callbacks.CSVLogger("metrics.csv"), epochs=1)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "run"))
    callback = PolyaxonCallback()
    fit(callback, keras.callbacks.CSVLogger(f"{callback.outputs_path}/metrics.csv"), epochs=1)
    assert not [
        message for name, level, message in caplog.record_tuples if name == "polyaxon_tracking" and level > logging.INFO
    ]


class Copies(keras.callbacks.Callback):
    """Copies another callback while it trains, without the model, which not every backend can copy."""

    def __init__(self, callback: PolyaxonCallback) -> None:
        super().__init__()
        self.callback = callback
        self.taken: list[PolyaxonCallback] = []

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.taken.append(copy.deepcopy(self.callback, {id(self.callback.model): None}))


def test_a_copy_of_the_callback_made_in_a_training_has_no_part_in_it(outputs: Path) -> None:
    original = polyaxon()
    copies = Copies(original)
    fit(original, copies, epochs=1)
    fit(copies.taken[0], epochs=2)
    assert len(list((outputs / "checkpoints" / "resume").glob("*-epoch=2-*"))) == 1
