"""The hyperparameters of a Keras model: those of its layers, its optimizer and its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyaxon_keras.running_fit import iterations_of
from polyaxon_tracking.training import Hyperparameters

if TYPE_CHECKING:
    from polyaxon_keras.framework import keras

__all__ = ["hyperparameters"]


def hyperparameters(model: keras.Model, steps_per_epoch: int | None) -> Hyperparameters:
    """Return the hyperparameters of `model`, which ``fit`` is about to train.

    Of the optimizer, Keras saves and restores the learning rate only, unless that is a schedule.
    """
    script: dict[str, Any] = {"layers": {index: _plain_config(layer) for index, layer in enumerate(model.layers)}}
    if isinstance(model.loss, str):
        script["loss"] = model.loss
    if steps_per_epoch is not None:
        script["steps_per_epoch"] = steps_per_epoch
    restored: dict[str, Any] = {}
    if model.optimizer is not None:
        config = {key: value for key, value in model.optimizer.get_config().items() if key != "name"}
        rate = config.get("learning_rate")
        if isinstance(rate, float):
            del config["learning_rate"]
            if not iterations_of(model):  # otherwise an earlier ``fit`` may have changed it
                restored["optimizer.learning_rate"] = rate
        script["optimizer"] = {"class": type(model.optimizer).__name__, **config}
    return Hyperparameters(restored=restored, script=script)


def _plain_config(layer: keras.layers.Layer) -> dict[str, Any]:
    """Return the options of `layer` itself, without its name, which Keras numbers, and without those of its parts."""
    try:
        config = layer.get_config()
    except NotImplementedError:  # a layer of the user's that cannot be saved as a configuration
        return {}
    return {key: value for key, value in config.items() if key != "name" and not isinstance(value, dict)}
