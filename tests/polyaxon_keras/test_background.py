"""Saving in the background with Keras: what is written, when, and what happens where that fails."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import h5py
import keras
import numpy as np
import pytest
from keras_script import Adversaries, data, model
from training_scripts import stderr_of

from polyaxon_keras import PolyaxonCallback, training_state
from polyaxon_tracking import CheckpointManager
from polyaxon_tracking.background import wait_for_all

if TYPE_CHECKING:
    from pathlib import Path


def fit(*callbacks: keras.callbacks.Callback, network: keras.Model | None = None, epochs: int = 3) -> keras.Model:
    x, y = data()
    network = network or model("functional")
    network.fit(x, y, batch_size=18, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return network


def values(network: keras.Model) -> list[np.ndarray]:
    """Return all weights, and all variables of all optimizers."""
    optimizers = training_state.optimizers_of(network).values()
    variables = [variable for optimizer in optimizers for variable in optimizer.variables]
    return [*network.get_weights(), *map(keras.ops.convert_to_numpy, variables)]


class Held(keras.callbacks.Callback):
    """Delay every write until the batch after the next has changed the values, and keep the earlier values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.values: dict[int, list[np.ndarray]] = {}
        self.threads: set[str] = set()
        self._may_write = threading.Event()
        for name in ("save", "save_weights"):
            monkeypatch.setattr(keras.Model, name, self._held(getattr(keras.Model, name)))

    def _held(self, save: Any) -> Any:
        def held(*arguments: Any, **options: Any) -> None:
            self.threads.add(threading.current_thread().name)
            assert self._may_write.wait(60)
            save(*arguments, **options)

        return held

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self._may_write.clear()

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        if batch == 2:
            self._may_write.set()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.values[epoch + 1] = values(self.model)


def test_what_is_written_is_the_state_of_the_save_though_training_has_gone_on(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    fit(held, PolyaxonCallback("{epoch}.keras", max_to_keep=3))
    assert held.threads == {"polyaxon-tracking-writer"}
    monkeypatch.undo()
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [checkpoint.epoch for checkpoint in saved] == [3, 2, 1]
    for checkpoint in saved:
        assert checkpoint.verify() is None
        resumed = model("functional")
        training_state.load(resumed, checkpoint.path, training_state.read_metadata(checkpoint.path), checkpoint.source)
        mine = keras.saving.load_model(outputs / "checkpoints" / f"{checkpoint.epoch}.keras")
        for network in (resumed, mine):
            for value, expected in zip(values(network), held.values[checkpoint.epoch], strict=True):
                np.testing.assert_array_equal(value, expected)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="its steps are functions of the state")
def test_optimizers_by_hand_are_written_as_they_were_at_the_save(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    fit(held, PolyaxonCallback(save_weights_only=True, max_to_keep=3), network=Adversaries())
    monkeypatch.undo()
    for checkpoint in CheckpointManager(outputs / "checkpoints" / "resume").checkpoints():
        resumed = Adversaries()
        training_state.load(resumed, checkpoint.path, training_state.read_metadata(checkpoint.path), checkpoint.source)
        for value, expected in zip(values(resumed), held.values[checkpoint.epoch], strict=True):
            np.testing.assert_array_equal(value, expected)


def arrays(path: Path | str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_the_file_is_the_one_that_is_written_in_the_foreground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    files = []
    for background in (True, False):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / str(background)))
        keras.utils.set_random_seed(0)
        fit(PolyaxonCallback(save_weights_only=True, background=background), network=model(kind), epochs=1)
        checkpoints = tmp_path / str(background) / "checkpoints"
        [training] = (checkpoints / "resume").glob("*.h5")
        files.append((arrays(checkpoints / "model.weights.h5"), arrays(training)))
    for one, other in zip(*files, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name != "polyaxon_tracking/record":  # with the names that Keras counts up
                np.testing.assert_array_equal(value, other[name])


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, iterations: int) -> None:
    save = getattr(keras.Model, name)
    failed = []

    def failing(self: keras.Model, path: str, **options: Any) -> None:
        if int(self.optimizer.iterations) == iterations and not failed:
            failed.append(path)
            raise OSError(5, "Input/output error")
        save(self, path, **options)

    monkeypatch.setattr(keras.Model, name, failing)


@pytest.mark.parametrize("name", ["save", "save_weights"])
@pytest.mark.parametrize(("iterations", "newest"), [(8, 4), (12, 8)], ids=["in the middle", "the last"])
def test_a_write_that_fails_ends_training_after_a_batch_or_at_the_end(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, name: str, iterations: int, newest: int
) -> None:
    fail_once(monkeypatch, name, iterations)
    with pytest.raises(OSError, match=rf"\[Errno 5\] {outputs}\S+ was not saved, .+ Input/output error"):
        fit(PolyaxonCallback())
    monkeypatch.undo()
    latest = CheckpointManager(outputs / "checkpoints" / "resume").latest()
    assert latest is not None
    assert latest.step in (newest, newest + 4)


def test_the_next_training_finds_what_one_that_was_interrupted_had_not_yet_written(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            if epoch == 2:
                threading.Timer(0.3, held._may_write.set).start()
                raise KeyboardInterrupt

    network = model("functional")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        held = Held(patched)
        fit(held, PolyaxonCallback(), Interrupt(), network=network)
    fit(PolyaxonCallback(), network=network)
    assert int(network.optimizer.iterations) == 12
    assert len(list((outputs / "checkpoints" / "resume").glob("*-start=1-*"))) == 1


LITTLE_MEMORY = """
import resource, sys
import keras, numpy as np
from polyaxon_keras import PolyaxonCallback

class Limit(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (128 << 20), resource.RLIM_INFINITY))

class Ballast(keras.layers.Layer):
    def build(self, _):
        self.ballast = [
            self.add_weight(shape=(2 << 20,), initializer="ones", trainable=False, name=f"w{i}") for i in range(32)
        ]
    def call(self, inputs):
        return inputs

model = keras.Sequential([keras.Input((1,)), Ballast(), keras.layers.Dense(1)])
model.compile("sgd", "mse")
polyaxon = PolyaxonCallback(save_weights_only=True)
model.fit(np.ones((1, 1)), np.ones(1), epochs=2, verbose=0, callbacks=[Limit(), polyaxon])
"""


def test_where_memory_does_not_suffice_training_waits_and_says_so_once(tmp_path: Path) -> None:
    stderr = stderr_of(LITTLE_MEMORY, tmp_path, KERAS_BACKEND="jax")
    assert stderr.count("Saving in the foreground, while training waits: a copy of the state takes ") == 1
    newest = CheckpointManager(tmp_path / "checkpoints" / "resume").latest()
    assert newest is not None
    assert newest.epoch == 2


def test_nothing_is_left_to_write_when_fit_returns(outputs: Path) -> None:
    fit(PolyaxonCallback())
    before = sorted(outputs.rglob("*"))
    wait_for_all()
    assert sorted(outputs.rglob("*")) == before
    assert not list(outputs.rglob(".staging-*"))
