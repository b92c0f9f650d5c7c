"""The Keras callback with layers and optimizers that have no variables before the first step."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
from keras_script import Adversaries, data, digest
from restarts import forget_trainings

from polyaxon_keras import PolyaxonCallback
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BACKEND = keras.backend.backend()


class Late(keras.Model):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(width), keras.layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        return self.out(self.hidden(inputs))


class Integers(Late):
    """A model whose inputs must be integers, because they are indices."""

    def call(self, inputs: Any) -> Any:
        return super().call(keras.ops.take(keras.ops.eye(4), inputs, axis=0))


class Strings(Late):
    def __init__(self) -> None:
        super().__init__()
        self.look_up = keras.layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")

    def call(self, inputs: Any) -> Any:
        return super().call(self.look_up(inputs))


class SaidToBeBuilt(Late):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.built = True


STRINGS = [Strings] if BACKEND == "tensorflow" else []  # the other backends have no tensors of strings
x, y = data()
INPUTS = {Integers: (x[:, 0] > 0).astype("int32"), Strings: np.where(x[:, 0] > 0, "a", "b")}


def fit(make: Callable[[], keras.Model], *, epochs: int, seed: int = 0) -> keras.Model:
    forget_trainings()
    keras.utils.set_random_seed(seed)
    network = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if not isinstance(network, Adversaries):
        network.compile(keras.optimizers.Adam(0.01), loss)
    inputs = INPUTS.get(type(network), x)
    if BACKEND == "tensorflow":
        inputs = sys.modules["tensorflow"].convert_to_tensor(inputs)
    polyaxon = PolyaxonCallback(save_weights_only=True)
    network.fit(inputs, y, batch_size=18, epochs=epochs, shuffle=False, verbose=0, callbacks=[polyaxon])
    return network


@pytest.mark.parametrize("make", [Late, Integers, SaidToBeBuilt, *STRINGS])
def test_layers_that_the_first_step_builds_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], keras.Model]
) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "whole"))
    whole = fit(make, epochs=4)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "parts"))
    fit(make, epochs=2)
    resumed = fit(make, epochs=4, seed=1)
    assert int(resumed.optimizer.iterations) == 16
    assert digest(resumed) == digest(whole)


def test_a_layer_of_another_width_that_the_first_step_builds_is_refused(outputs: Path) -> None:
    fit(SaidToBeBuilt, epochs=1)
    with pytest.raises(TrackingError, match=r"kernel is \(4, 16\), saved as \(4, 8\);"):
        fit(lambda: SaidToBeBuilt(16), epochs=2)


def states_of_optimizers(network: keras.Model) -> list[np.ndarray]:
    optimizers = [network.of_generator, *network.of_others]
    return [keras.ops.convert_to_numpy(variable) for optimizer in optimizers for variable in optimizer.variables]


@pytest.mark.skipif(BACKEND == "jax", reason="its steps are functions of the state")
def test_two_optimizers_by_hand_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "whole"))
    whole = fit(Adversaries, epochs=4)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "parts"))
    fit(Adversaries, epochs=2)
    resumed = fit(Adversaries, epochs=4, seed=1)
    assert digest(resumed) == digest(whole)
    for value, expected in zip(states_of_optimizers(resumed), states_of_optimizers(whole), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.skipif(BACKEND == "jax", reason="its steps are functions of the state")
def test_another_optimizer_by_hand_is_refused(outputs: Path) -> None:
    fit(Adversaries, epochs=1)
    with pytest.raises(
        TrackingError,
        match=r": its of_generator is SGD with 2 variables, saved was Adam with 10 variables; its of_others\.0 is SGD",
    ):
        fit(lambda: Adversaries(keras.optimizers.SGD), epochs=2)
