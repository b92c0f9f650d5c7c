"""The whole training state of a Keras model in one ``.weights.h5`` file.

Keras writes the model's weights and the optimizer's variables there. Beside them stands one HDF5 group, which
``load_weights`` passes over, with what Keras leaves out: the epoch and step, the state of the random number generators
in the model (dropout), and what callbacks keep.
"""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np

from polyaxon_keras.framework import keras
from polyaxon_tracking import TrackingError

__all__ = ["load", "save"]

_GROUP = "polyaxon_tracking"


def save(model: keras.Model, path: str, training: dict[str, Any]) -> None:
    """Write the state of `model`, and `training` (plain values, arrays and lists of arrays), to the file `path`."""
    model.save_weights(path, overwrite=True)
    arrays: list[np.ndarray[Any, Any]] = []

    def number(array: Any) -> dict[str, int]:
        arrays.append(np.asarray(array))
        return {"array": len(arrays) - 1}

    record = {
        "training": training,
        "build": model.get_build_config(),
        "generators": [keras.ops.convert_to_numpy(variable) for variable in _generators(model)],
    }
    text = json.dumps(record, default=number)
    with h5py.File(path, "r+") as file:
        group = file.create_group(_GROUP)
        group["record"] = text
        for index, array in enumerate(arrays):
            group[str(index)] = array


def load(model: keras.Model, path: str) -> dict[str, Any]:
    """Bring `model` to the state in the file `path`, building it first where it is not; return its `training`.

    Raises:
        TrackingError: the model or its optimizer is not the one that was saved.
    """
    with h5py.File(path, "r") as file:
        group = file[_GROUP]
        record = json.loads(
            group["record"].asstr()[()],
            object_hook=lambda value: group[str(value["array"])][()] if value.keys() == {"array"} else value,
        )
    if not model.built:  # TensorFlow builds in the first step
        model.build_from_config(_any_batch_size(record["build"]))
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    try:
        model.load_weights(path)
    except ValueError as error:
        raise TrackingError(
            f"Received a model or optimizer that is not the one saved in {path}. Keras says: {error}\n"
            f"Expected the same layers, shapes and optimizer. Make them what they were, pass "
            f"PolyaxonCallback(resume=False) to begin anew, or use another outputs path; the checkpoint stays as it is."
        ) from error
    for variable, value in zip(_generators(model), record["generators"], strict=True):
        variable.assign(value)
    training: dict[str, Any] = record["training"]
    return training


def _generators(model: keras.Model) -> list[Any]:
    """Variables of the random number generators in `model`, which ``save_weights`` leaves out."""
    saved = [*model.weights, *model.metrics_variables, *(model.optimizer.variables if model.optimizer else ())]
    known = {id(variable) for variable in saved}
    return [variable for variable in model.variables if id(variable) not in known]


def _any_batch_size(build: Any) -> Any:
    """The shapes in `build` with an unknown batch size, so that the last batch may be smaller."""
    if isinstance(build, dict):
        return {name: _any_batch_size(value) for name, value in build.items()}
    if isinstance(build, list | tuple):
        if build and all(size is None or isinstance(size, int) for size in build):
            return (None, *build[1:])
        return [_any_batch_size(value) for value in build]
    return build
