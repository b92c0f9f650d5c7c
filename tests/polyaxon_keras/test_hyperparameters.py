"""A script that is started again with other hyperparameters: Keras."""

from __future__ import annotations

import logging
from typing import Any

import keras
import numpy as np
import pytest
from keras_script import data
from restarts import forget_trainings

from polyaxon_keras import PolyaxonCallback
from polyaxon_tracking import TrackingError


@keras.saving.register_keras_serializable()
class WithoutConfig(keras.layers.Layer):
    """A layer that Keras cannot describe, because its argument is no plain value."""

    def __init__(self, scale: object) -> None:
        super().__init__()
        self.scale = scale

    def call(self, inputs: Any) -> Any:
        return inputs


def network(dropout: float = 0.2, **optimizer: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8), WithoutConfig(object()), keras.layers.Dropout(dropout), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(**{"learning_rate": 0.125, "momentum": 0.5, **optimizer}), loss=loss)
    return model


def start(model: keras.Model, epochs: int, batch_size: int = 8, **options: Any) -> keras.Model:
    """Train until `epochs`, as the next start of the script."""
    forget_trainings()
    polyaxon = PolyaxonCallback(save_weights_only=True, resume=True, **options)
    model.fit(*data(), epochs=epochs, batch_size=batch_size, verbose=0, callbacks=[polyaxon])
    return model


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return [message for message in found if "hyperparameters" in message]


def test_the_same_script_with_more_epochs_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for epochs in (1, 2, 3):
        assert int(start(network(), epochs).optimizer.iterations) == 9 * epochs
    assert warnings(caplog) == []


def test_a_warning_names_what_changed_and_what_is_used(caplog: pytest.LogCaptureFixture) -> None:
    start(network(), 1)
    for epochs in (2, 3):
        model = start(network(dropout=0.5, learning_rate=1.0, momentum=0.9), epochs, batch_size=12)
        (message,) = warnings(caplog)
        assert float(model.optimizer.learning_rate) == 0.125
        assert "optimizer.learning_rate: 0.125 -> 1 (0.125 is used, from the checkpoint)" in message
        for text in (
            "layers.2.rate: 0.2 -> 0.5 (0.5 is used, from the script)",
            "optimizer.momentum: 0.5 -> 0.9 (0.9 is used, from the script)",
            "steps_per_epoch: 9 -> 6 (6 is used, from the script)",
        ):
            assert (text in message) == (epochs == 2)


def test_raise_ends_before_a_batch_is_trained() -> None:
    start(network(), 1)
    model = network(learning_rate=1.0)
    before = model.get_weights()
    with pytest.raises(TrackingError, match=r"optimizer\.learning_rate: 0\.125 -> 1 .*if_changed='raise'"):
        start(model, 2, if_changed="raise")
    for value, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("change", [{"learning_rate": 1.0}, {"dropout": 0.5}], ids=str)
def test_restart_starts_from_scratch_and_then_resumes_what_it_started(
    change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    start(network(), 2)
    model = start(network(**change), 1, if_changed="restart")
    assert int(model.optimizer.iterations) == 9
    assert "starts from scratch because of if_changed='restart'" in warnings(caplog)[0]
    keras.utils.set_random_seed(0)
    alone = start(network(**change), 1, name="alone")
    for value, expected in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)
    caplog.clear()
    assert int(start(network(**change), 3, if_changed="restart").optimizer.iterations) == 27
    assert warnings(caplog) == []


def test_a_learning_rate_that_training_changed_is_no_change_of_the_script(caplog: pytest.LogCaptureFixture) -> None:
    """The same model resumes in the same process after an error, when a callback has halved its learning rate."""

    class Halve(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate) / 2
            if epoch == 1 and raises:
                raise ArithmeticError

    raises, model = True, network()
    with pytest.raises(ArithmeticError):
        model.fit(
            *data(), epochs=3, verbose=0, callbacks=[PolyaxonCallback(save_weights_only=True, resume=True), Halve()]
        )
    raises = False
    model.fit(*data(), epochs=3, verbose=0, callbacks=[PolyaxonCallback(save_weights_only=True, resume=True), Halve()])
    assert warnings(caplog) == []
