"""The whole training state of a Keras model in one ``.weights.h5`` file.

Keras writes the model's weights and the optimizer's variables to this file. One more HDF5 group in the file, which
``load_weights`` ignores, holds the metadata that Keras leaves out: the state of the random number generators (dropout,
shuffling) and of callbacks, and the shapes and optimizers to check before loading.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from polyaxon_keras.framework import keras
from polyaxon_tracking.training import different_model

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "generator_values",
    "load",
    "make_metadata",
    "optimizers_of",
    "random_state",
    "read_metadata",
    "save",
    "set_random_state",
]

_GROUP = "polyaxon_tracking"


def make_metadata(model: keras.Model, training: dict[str, Any], random_states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metadata that `save` writes next to the model's variables.

    Args:
        model: the model that will be saved.
        training: the values of PolyaxonCallback, and the states of the callbacks in its `restore`.
        random_states: the state of each process's global random number generators, ordered by rank.
    """
    return {
        "training": training,
        "shapes": [list(weight.shape) for weight in model.weights],
        "optimizers": _optimizers_metadata(model),
        "generators": generator_values(model),
        "random": random_states,
    }


def save(model: keras.Model, path: str, metadata: dict[str, Any]) -> None:
    """Write the variables of `model`, and `metadata` unchanged, to the file `path`."""
    model.save_weights(path, overwrite=True)
    arrays: list[Any] = []

    def replace_array(array: Any) -> dict[str, int]:
        arrays.append(np.asarray(array))
        return {"array": len(arrays) - 1}

    text = json.dumps(metadata, default=replace_array)
    with h5py.File(path, "r+") as file:
        group = file.create_group(_GROUP)
        group["record"] = text
        for index, array in enumerate(arrays):
            group[str(index)] = array


def read_metadata(path: str) -> dict[str, Any]:
    """Return the metadata in the file `path`, which `save` wrote."""
    with h5py.File(path, "r") as file:
        group = file[_GROUP]
        metadata: dict[str, Any] = json.loads(
            group["record"].asstr()[()],
            object_hook=lambda value: group[str(value["array"])][()] if value.keys() == {"array"} else value,
        )
    return metadata


def load(
    model: keras.Model,
    path: str,
    metadata: dict[str, Any],
    source: str,
    rank: int = 0,
    *,
    build: Callable[[], None] = lambda: None,
) -> None:
    """Restore `model` from the file `path`, after building the model if necessary.

    Args:
        model: a compiled model.
        path: a file that `save` wrote.
        metadata: the metadata in the file.
        source: the path or URL that the file came from, for messages.
        rank: the rank of this process. If the checkpoint was saved with fewer processes, the global random number
            generators of the added ranks are left unchanged.
        build: function that builds `model`, called if some of the model's layers have no weights yet.

    Raises:
        TrackingError: the model or its optimizer differs from the saved one.
    """
    if len(model.weights) < len(metadata["shapes"]):  # on TensorFlow, Keras builds the model in the first step
        build()
    _build_optimizers(model, metadata)
    if problems := _differences(model, metadata):
        raise different_model(source, problems)
    model.load_weights(path)
    for variable, value in zip(_generators(model), metadata["generators"], strict=True):
        variable.assign(value)
    if rank < len(metadata["random"]):
        set_random_state(metadata["random"][rank])


def _differences(model: keras.Model, metadata: dict[str, Any]) -> list[str]:
    """Return the differences between `model` and the saved model.

    Optimizers are compared because Keras would continue without the saved state if the optimizer differs.
    """
    shapes = [tuple(shape) for shape in metadata["shapes"]]
    problems = []
    if len(model.weights) != len(shapes):
        problems.append(f"it has {len(model.weights)} weights, saved were {len(shapes)}")
    else:
        problems += [
            f"{weight.path} is {tuple(weight.shape)}, saved as {shape}"
            for weight, shape in zip(model.weights, shapes, strict=True)
            if tuple(weight.shape) != shape
        ]
    if not problems:
        ours, saved = optimizers_of(model), metadata["optimizers"]
        for name in dict.fromkeys(["optimizer", *saved]):
            now = _describe(ours[name]) if name in ours else "none"
            before = saved.get(name, {"is": "none", "over": True})
            if before["over"] and before["is"] != now:
                problems.append(f"its {name} is {now}, saved was {before['is']}")
    return problems


def optimizers_of(model: keras.Model) -> dict[str, keras.optimizers.Optimizer]:
    """Return the optimizers of `model` and of its nested models, by the names of their attributes.

    A model with its own ``train_step`` may have other optimizers next to the optimizer of ``compile``. Keras saves all
    of these optimizers.
    """
    found: dict[int, tuple[str, keras.optimizers.Optimizer]] = {}
    # The user's attributes come first, because TensorFlow keeps each optimizer again in a private attribute.
    for name in sorted(vars(model), key=lambda name: (name.startswith("_"), name)):
        value = vars(model)[name]
        container = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        for key, item in container.items() if isinstance(container, dict) else [("", value)]:
            if isinstance(item, keras.optimizers.Optimizer):
                found.setdefault(id(item), (f"{name}.{key}".strip("."), item))
    for index, layer in enumerate(model.layers):
        if isinstance(layer, keras.Model):
            for name, optimizer in optimizers_of(layer).items():
                found.setdefault(id(optimizer), (f"layers.{index}.{name}", optimizer))
    return dict(found.values())


def _describe(optimizer: keras.optimizers.Optimizer) -> str:
    return f"{type(optimizer).__name__} with {len(optimizer.variables)} variables"


def _optimizers_metadata(model: keras.Model) -> dict[str, dict[str, Any]]:
    """Return the description of each optimizer of `model`, and the indices of the weights that the optimizer updates.

    The indices are ``None`` if the optimizer also updates variables that are not weights of the model. They are read
    from a private attribute because Keras has no public one.
    """
    indices = {id(weight): index for index, weight in enumerate(model.weights)}
    metadata = {}
    for name, optimizer in optimizers_of(model).items():
        over = [indices.get(id(variable)) for variable in optimizer._trainable_variables]  # noqa: SLF001
        metadata[name] = {"is": _describe(optimizer), "over": None if None in over else over}
    return metadata


def _build_optimizers(model: keras.Model, metadata: dict[str, Any]) -> None:
    """Build the variables of each optimizer of `model`.

    Keras would build them only in the first step, and would therefore not load their saved values.
    """
    if "optimizers" not in metadata:  # an earlier version saved only the optimizer of ``compile``
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        metadata["optimizers"] = {"optimizer": {"is": metadata["optimizer"], "over": True}}
    elif len(model.weights) == len(metadata["shapes"]):
        for name, optimizer in optimizers_of(model).items():
            over = metadata["optimizers"].get(name, {}).get("over")
            if over and not optimizer.built:
                optimizer.build([model.weights[index] for index in over])


def generator_values(model: keras.Model) -> list[Any]:
    """Return the states of the random number generators in `model`."""
    return [keras.ops.convert_to_numpy(variable) for variable in _generators(model)]


def _generators(model: keras.Model) -> list[Any]:
    """Return the variables of the random number generators in `model`, which ``save_weights`` leaves out."""
    optimized = [variable for optimizer in optimizers_of(model).values() for variable in optimizer.variables]
    known = {id(variable) for variable in [*model.weights, *model.metrics_variables, *optimized]}
    return [variable for variable in model.variables if id(variable) not in known]


def random_state() -> dict[str, Any]:
    """Return the state of the global random number generators.

    Keras uses these generators to shuffle and, on the torch backend, for dropout, which draws on the device.
    """
    name, keys, *counters = np.random.get_state(legacy=True)
    state: dict[str, Any] = {"python": random.getstate(), "numpy": [name, keys, *counters]}
    if keras.backend.backend() == "torch":
        from polyaxon_torch import torch_random_state  # in a function, because only Keras on torch has torch

        state |= torch_random_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the global random number generators to a `state` that `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if keras.backend.backend() == "torch" and "torch" in state:
        from polyaxon_torch import set_torch_random_state  # as above

        set_torch_random_state(state)
