"""Which training is this? Several in one process with Keras, whatever the ending of each."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any

import keras
import pytest
from keras_script import data, digest, model
from training_scripts import directories_of_trainings

from polyaxon_keras import PolyaxonCallback
from polyaxon_tracking.background import wait_for_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Once(keras.callbacks.Callback):
    """Raise once, in an epoch. Keeps the epochs that are trained, and a digest of the weights before the first one."""

    def __init__(self, epoch: int | None = None, error: type[BaseException] = ArithmeticError) -> None:
        super().__init__()
        self.epoch, self.error = epoch, error
        self.epochs: list[int] = []
        self.began_with = ""

    def on_train_begin(self, logs: object = None) -> None:
        self.epochs = []

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        if not self.epochs:
            self.began_with = digest(self.model)
        self.epochs.append(epoch)

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        if self.epochs[-1] == self.epoch:
            self.epoch = None
            raise self.error


def fit(network: keras.Model, *callbacks: keras.callbacks.Callback, epochs: int = 4) -> None:
    x, y = data()
    network.fit(x, y, batch_size=18, epochs=epochs, verbose=0, callbacks=list(callbacks))


def fails(
    network: keras.Model, *callbacks: keras.callbacks.Callback, error: type[BaseException] = ArithmeticError
) -> None:
    with pytest.raises(error):
        fit(network, *callbacks)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("shared", [True, False], ids=["the same callback", "a new callback"])
def test_the_same_model_continues(outputs: Path, error: type[BaseException], shared: bool) -> None:
    network, polyaxon, once = model("functional"), PolyaxonCallback(), Once(2, error)
    fails(network, polyaxon, once, error=error)
    network.evaluate(*data(), verbose=0)
    fit(network, polyaxon if shared else PolyaxonCallback(), once)
    assert once.epochs == [2, 3]
    assert int(network.optimizer.iterations) == 16
    assert directories_of_trainings(outputs) == ["resume"]


@pytest.mark.parametrize("shared", [True, False], ids=["one callback", "a callback for each"])
def test_another_model_is_another_training(outputs: Path, shared: bool) -> None:
    network, polyaxon, once = model("functional"), PolyaxonCallback(), Once()
    fails(model("functional"), polyaxon, Once(2))
    new = digest(network)
    fit(network, polyaxon if shared else PolyaxonCallback(), once)
    assert (once.epochs, once.began_with) == ([0, 1, 2, 3], new)
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]


def test_the_next_stage_of_a_model_continues_in_memory_and_resumes_from_its_own_state(
    outputs: Path, new_process: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")

    def first_stage() -> keras.Model:
        network = model("functional")
        fit(network, PolyaxonCallback(), epochs=2)
        return network

    network, once = first_stage(), Once(1)
    after_first = digest(network)
    fails(network, PolyaxonCallback(), once)
    assert (once.epochs, once.began_with) == ([0, 1], after_first)
    assert [message.partition(" ")[0] for message in caplog.messages][:2] == ["Starting", "Continuing"]
    new_process()
    network, once = first_stage(), Once()
    assert digest(network) == after_first
    fit(network, PolyaxonCallback(), once)
    assert once.epochs == [1, 2, 3]
    assert int(network.optimizer.iterations) == 4 * (2 + 4)
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]


def test_the_copy_of_the_state_goes_with_a_fit_whose_exception_was_caught(outputs: Path) -> None:
    copies: list[weakref.ref[Any]] = []

    class Sees(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            if epoch == 1:
                copies.extend(map(weakref.ref, polyaxon._training.writer._snapshot._arrays))

    network, polyaxon = model("functional"), PolyaxonCallback()
    fails(network, Sees(), polyaxon, Once(2))
    wait_for_all()
    gc.collect()
    assert copies
    assert not any(copy() is not None for copy in copies)


def test_a_training_within_another_has_its_own_directory(outputs: Path) -> None:
    student = Once()

    class Teacher(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            if epoch == 1:
                fit(model("functional"), PolyaxonCallback(), student)

    fit(model("functional"), PolyaxonCallback(), Teacher())
    assert student.epochs == [0, 1, 2, 3]
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]


def test_off_the_cluster_nothing_is_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, once = model("functional"), Once(2)
    fails(network, PolyaxonCallback(), once)
    fit(network, PolyaxonCallback(), once)
    assert once.epochs == [0, 1, 2, 3]
    fit(model("functional"), PolyaxonCallback())
    assert "Resuming from" not in caplog.text
    assert "and keeps it; resume=True would resume from it" in caplog.text
    assert directories_of_trainings(tmp_path / "outputs" / "version_0") == ["resume", "resume-2"]


def test_resume_true_is_no_reason_to_continue_another_training(tmp_path: Path) -> None:
    once = Once()
    fails(model("functional"), PolyaxonCallback(resume=True), Once(2))
    fit(model("functional"), PolyaxonCallback(resume=True), once)
    assert once.epochs == [0, 1, 2, 3]
    assert directories_of_trainings(tmp_path / "outputs" / "version_0") == ["resume", "resume-2"]
