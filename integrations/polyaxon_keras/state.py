"""The whole training state of a Keras model in one ``.weights.h5`` file.

Keras writes the model's weights and the optimizer's variables there. Beside them stands one HDF5 group, which
``load_weights`` passes over, with what Keras leaves out: the epoch and step, the state of the random number generators
(dropout, shuffling), and what callbacks keep.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import h5py
import numpy as np

from polyaxon_keras.framework import keras
from polyaxon_tracking import TrackingError

__all__ = ["load", "random_state", "record", "save"]

_GROUP = "polyaxon_tracking"


def record(model: keras.Model, training: dict[str, Any], random_states: list[dict[str, Any]]) -> dict[str, Any]:
    """What `save` writes beside the variables: `training`, what of `model` it needs, and each process's generators."""
    return {
        "training": training,
        "shapes": [list(weight.shape) for weight in model.weights],
        "optimizer": _optimizer(model),
        "build": model.get_build_config(),
        "generators": [keras.ops.convert_to_numpy(variable) for variable in _generators(model)],
        "random": random_states,
    }


def save(model: keras.Model, path: str, record: dict[str, Any]) -> None:
    """Write the variables of `model` and `record`, as they are, to the file `path`."""
    model.save_weights(path, overwrite=True)
    arrays: list[Any] = []

    def number(array: Any) -> dict[str, int]:
        arrays.append(np.asarray(array))
        return {"array": len(arrays) - 1}

    text = json.dumps(record, default=number)
    with h5py.File(path, "r+") as file:
        group = file.create_group(_GROUP)
        group["record"] = text
        for index, array in enumerate(arrays):
            group[str(index)] = array


def load(model: keras.Model, path: str, source: str, rank: int = 0) -> dict[str, Any]:
    """Bring `model` to the state in the file `path`, building it first where it is not; return its `training`.

    Args:
        model: a compiled model.
        path: a file that `save` wrote.
        source: where the file came from, for messages.
        rank: the index of this process; a new one leaves the generators of random numbers as they are.

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
        _build(model, record["build"])
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if problems := _differences(model, record):
        raise TrackingError(
            f"Received a model that is not the one saved in {source}: {'; '.join(problems)}. Expected the same layers, "
            f"shapes and optimizer. Make them what they were, pass PolyaxonCallback(resume=False) to begin anew, or "
            f"use another outputs path; the checkpoint stays as it is."
        )
    model.load_weights(path)
    for variable, value in zip(_generators(model), record["generators"], strict=True):
        variable.assign(value)
    if rank < len(record["random"]):
        _set_random_state(record["random"][rank])
    training: dict[str, Any] = record["training"]
    return training


def _differences(model: keras.Model, record: dict[str, Any]) -> list[str]:
    """What of `model` is not as it was saved. Keras would go on without the state of another optimizer."""
    shapes = [tuple(shape) for shape in record["shapes"]]
    problems = []
    if len(model.weights) != len(shapes):
        problems.append(f"it has {len(model.weights)} weights, saved were {len(shapes)}")
    else:
        problems += [
            f"{weight.path} is {tuple(weight.shape)}, saved as {shape}"
            for weight, shape in zip(model.weights, shapes, strict=True)
            if tuple(weight.shape) != shape
        ]
    if _optimizer(model) != record["optimizer"] and not problems:
        problems.append(f"its optimizer is {_optimizer(model)}, saved was {record['optimizer']}")
    return problems


def _optimizer(model: keras.Model) -> str:
    if model.optimizer is None:
        return "none"
    return f"{type(model.optimizer).__name__} with {len(model.optimizer.variables)} variables"


def _generators(model: keras.Model) -> list[Any]:
    """Variables of the random number generators in `model`, which ``save_weights`` leaves out."""
    saved = [*model.weights, *model.metrics_variables, *(model.optimizer.variables if model.optimizer else ())]
    known = {id(variable) for variable in saved}
    return [variable for variable in model.variables if id(variable) not in known]


def random_state() -> dict[str, Any]:
    """The state of the global generators, from which Keras shuffles, and on the torch backend drops out."""
    name, keys, *counters = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "numpy": [name, keys, *counters]}
    if keras.backend.backend() == "torch":
        state["torch"] = sys.modules["torch"].get_rng_state().numpy()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if keras.backend.backend() == "torch" and "torch" in state:
        torch = sys.modules["torch"]
        torch.set_rng_state(torch.from_numpy(state["torch"]))


def _build(model: keras.Model, config: dict[str, Any]) -> None:
    """Build `model` by calling it on symbolic tensors of the shapes that it was saved with."""
    if "input_shape" in config:
        model(_symbolic(config["input_shape"]))
    elif "shapes_dict" in config:
        model(**{name.removesuffix("_shape"): _symbolic(shape) for name, shape in config["shapes_dict"].items()})


def _symbolic(shapes: Any) -> Any:
    """Symbolic tensors of `shapes`, which may be nested, with any batch size."""
    if isinstance(shapes, dict):
        return {name: _symbolic(shape) for name, shape in shapes.items()}
    if all(size is None or isinstance(size, int) for size in shapes):
        return keras.KerasTensor((None, *shapes[1:]))
    return [_symbolic(shape) for shape in shapes]
