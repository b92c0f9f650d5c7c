"""The whole training state of a Keras model in one ``.weights.h5`` file.

Keras writes the model's weights and the optimizer's variables there. Beside them stands one HDF5 group, which
``load_weights`` passes over, with what Keras leaves out: the epoch and step, the state of the random number generators
(dropout, shuffling), and what callbacks keep.
"""

from __future__ import annotations

import json
import random
import sys
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from polyaxon_keras.framework import keras
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["generator_values", "load", "make_metadata", "optimizers_of", "random_state", "save", "set_random_state"]

_GROUP = "polyaxon_tracking"


def make_metadata(model: keras.Model, training: dict[str, Any], random_states: list[dict[str, Any]]) -> dict[str, Any]:
    """What `save` writes beside the variables: `training`, what of `model` it needs, and each process's generators."""
    return {
        "training": training,
        "shapes": [list(weight.shape) for weight in model.weights],
        "optimizers": _optimizers_metadata(model),
        "generators": generator_values(model),
        "random": random_states,
    }


def save(model: keras.Model, path: str, metadata: dict[str, Any]) -> None:
    """Write the variables of `model` and `metadata`, as they are, to the file `path`."""
    model.save_weights(path, overwrite=True)
    arrays: list[Any] = []

    def number(array: Any) -> dict[str, int]:
        arrays.append(np.asarray(array))
        return {"array": len(arrays) - 1}

    text = json.dumps(metadata, default=number)
    with h5py.File(path, "r+") as file:
        group = file.create_group(_GROUP)
        group["record"] = text
        for index, array in enumerate(arrays):
            group[str(index)] = array


def load(
    model: keras.Model, path: str, source: str, rank: int = 0, *, build: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Bring `model` to the state in the file `path`, building it first where it is not; return its `training`.

    Args:
        model: a compiled model.
        path: a file that `save` wrote.
        source: where the file came from, for messages.
        rank: the index of this process; a new one leaves the generators of random numbers as they are.
        build: builds `model`: it is called where layers of it have no weights yet.

    Raises:
        TrackingError: the model or its optimizer is not the one that was saved.
    """
    with h5py.File(path, "r") as file:
        group = file[_GROUP]
        metadata = json.loads(
            group["record"].asstr()[()],
            object_hook=lambda value: group[str(value["array"])][()] if value.keys() == {"array"} else value,
        )
    if len(model.weights) < len(metadata["shapes"]):  # TensorFlow builds in the first step
        build()
    _build_optimizers(model, metadata)
    if problems := _differences(model, metadata):
        raise TrackingError(
            f"Received a model that is not the one saved in {source}: {'; '.join(problems)}. Expected the same layers, "
            f"shapes and optimizer. Make them what they were, pass PolyaxonCallback(resume=False) to begin anew, or "
            f"use another outputs path; the checkpoint stays as it is."
        )
    model.load_weights(path)
    for variable, value in zip(_generators(model), metadata["generators"], strict=True):
        variable.assign(value)
    if rank < len(metadata["random"]):
        set_random_state(metadata["random"][rank])
    training: dict[str, Any] = metadata["training"]
    return training


def _differences(model: keras.Model, metadata: dict[str, Any]) -> list[str]:
    """What of `model` is not as it was saved. Keras would go on without the state of another optimizer."""
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
    """Return the optimizers of `model` and of the models in it, by their attributes.

    Beside that of ``compile`` there may be others, for a ``train_step`` that steps by hand. Keras saves them all.
    """
    found: dict[int, tuple[str, keras.optimizers.Optimizer]] = {}
    # Users' names first: TensorFlow keeps each a second time, in attributes of its own.
    for name in sorted(vars(model), key=lambda name: (name.startswith("_"), name)):
        value = vars(model)[name]
        several = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        for key, one in several.items() if isinstance(several, dict) else [("", value)]:
            if isinstance(one, keras.optimizers.Optimizer):
                found.setdefault(id(one), (f"{name}.{key}".strip("."), one))
    for index, layer in enumerate(model.layers):
        if isinstance(layer, keras.Model):
            for name, one in optimizers_of(layer).items():
                found.setdefault(id(one), (f"layers.{index}.{name}", one))
    return dict(found.values())


def _describe(optimizer: keras.optimizers.Optimizer) -> str:
    return f"{type(optimizer).__name__} with {len(optimizer.variables)} variables"


def _optimizers_metadata(model: keras.Model) -> dict[str, dict[str, Any]]:
    """Return what each optimizer of `model` is, and over which of its weights it was built: Keras keeps that privately.

    None stands for an optimizer of other variables than the model's weights.
    """
    indices = {id(weight): index for index, weight in enumerate(model.weights)}
    metadata = {}
    for name, optimizer in optimizers_of(model).items():
        over = [indices.get(id(variable)) for variable in optimizer._trainable_variables]  # noqa: SLF001
        metadata[name] = {"is": _describe(optimizer), "over": None if None in over else over}
    return metadata


def _build_optimizers(model: keras.Model, metadata: dict[str, Any]) -> None:
    """Have each optimizer of `model` make its variables, which Keras would do in the first step, and load nothing."""
    if "optimizers" not in metadata:  # an earlier version knew of that of ``compile`` alone
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
    """Variables of the random number generators in `model`, which ``save_weights`` leaves out."""
    optimized = [variable for optimizer in optimizers_of(model).values() for variable in optimizer.variables]
    known = {id(variable) for variable in [*model.weights, *model.metrics_variables, *optimized]}
    return [variable for variable in model.variables if id(variable) not in known]


def random_state() -> dict[str, Any]:
    """The state of the global generators, from which Keras shuffles, and on the torch backend drops out."""
    name, keys, *counters = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "numpy": [name, keys, *counters]}
    if keras.backend.backend() == "torch":
        state["torch"] = sys.modules["torch"].get_rng_state().numpy()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Have the global generators go on from what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if keras.backend.backend() == "torch" and "torch" in state:
        torch = sys.modules["torch"]
        torch.set_rng_state(torch.from_numpy(state["torch"]))
