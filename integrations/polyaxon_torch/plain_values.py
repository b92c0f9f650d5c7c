"""Plain values: what ``torch.load(weights_only=True)`` reads, so that resuming runs no code."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import enum
import io
import os
import pickle
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "check_plain",
    "check_weights_only",
    "how_to_allow",
    "load_state",
    "make_rates_plain",
    "optimizer_options",
    "plain_hyperparameters",
    "plain_numbers",
    "refused_state",
    "scheduler_options",
]


def plain_numbers(value: Any) -> Any:
    """Return `value`, a part of a training state, with Python's numbers and strings instead of NumPy's."""
    return _converted(value, lambda one: one.item() if isinstance(one, np.generic) else one)


def plain_hyperparameters(value: Any) -> Any:
    """Return hyperparameters as plain values: paths as strings, enums as their values, dataclasses as dictionaries.

    This is for hyperparameters only, which are saved to be read, because what is restored must keep its type.
    """
    return _converted(value, _plain_hyperparameter)


def _group_options(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group of an optimizer, without its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def optimizer_options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the class of `optimizer` and the options of its parameter groups, as the script made them."""
    options: dict[str, Any] = {"class": type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        known = _group_options(group)
        rate = known.pop("initial_lr", group.get("lr"))  # a scheduler may have changed `lr` already
        options[str(index)] = known | {"lr": rate}
    return options


def scheduler_options(scheduler: Any) -> dict[str, Any]:
    """Return the options of `scheduler`, without those that count its steps or repeat the optimizer's options."""
    state = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    skipped = ("_", "last_epoch", "base_lrs")
    options = {name: value for name, value in state.items() if not name.startswith(skipped)}
    return {"class": type(scheduler).__name__, **options}


def make_rates_plain(optimizers: Iterable[torch.optim.Optimizer], schedulers: Iterable[Any]) -> None:
    """Replace NumPy's numbers, such as a learning rate, in the options of optimizers and schedulers by Python's.

    Done when training starts, so that a resumed training calculates with the same numbers as an uninterrupted one.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(plain_numbers(_group_options(group)))
    for scheduler in schedulers:
        state = scheduler.state_dict()
        if (plain := plain_numbers(state)) is not state:
            scheduler.load_state_dict(plain)


def check_plain(state: Any, advice: str) -> None:
    """Raise an error if ``torch.load(weights_only=True)`` would refuse to load `state`.

    Args:
        state: a training state, whose tensors are left out of the check.
        advice: what else to do, for the message.

    Raises:
        TrackingError: `state` holds more than tensors and plain values.
    """
    if (place := _refused(_without_tensors(state), "the training state")) is not None:
        raise TrackingError(
            f"Received {place}. Expected tensors and plain values, because loading anything else could run code, and "
            f"training could not resume from it. Make it a number, a string, a list or a dictionary, {advice}."
        )


def how_to_allow(owner: str) -> str:
    """Return the advice for `check_plain` where the option `weights_only` of the class `owner` decides."""
    return (
        f"allow its class with torch.serialization.add_safe_globals, or, if you trust the outputs path, pass "
        f"{owner}(weights_only=False)"
    )


def refused_state(source: str, error: pickle.UnpicklingError, owner: str) -> TrackingError:
    """Return the error for a state in `source` that `weights_only` refused to load with `error`.

    Args:
        source: the path or URL of the checkpoint.
        error: the error of ``torch.load``.
        owner: the name of the class with the option `weights_only`.
    """
    return TrackingError(
        f"Received {source}, which holds more than tensors and plain values, and loading it could run code: {error}. "
        f"Expected a state that torch.load(weights_only=True) reads. Allow the classes with "
        f"torch.serialization.add_safe_globals, or, if you trust the file, pass {owner}(weights_only=False)."
    )


def check_weights_only(weights_only: object) -> None:
    """Raise a `TrackingError` unless `weights_only` is a bool."""
    if not isinstance(weights_only, bool):
        raise TrackingError(f"Received weights_only={weights_only!r}. Expected True or False.")


def load_state(file: str | os.PathLike[str] | io.BytesIO, *, weights_only: bool) -> Any:
    """Return what ``torch.load`` reads from `file`, in host memory.

    With `weights_only`, the uninitialized parameters of lazy layers are loaded too.

    Raises:
        pickle.UnpicklingError: the file holds more than tensors and plain values, and `weights_only` is true.
    """
    allowed = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)  # since torch 2.5
    with allowed([UninitializedParameter, UninitializedBuffer]):
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def _converted(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return `value` with every item converted, or `value` itself if nothing in it changes."""
    value = convert(value)
    if isinstance(value, dict):
        keys = _converted([*value], convert)
        items = _converted([*value.values()], convert)
        is_same = all(new is old for new, old in zip([*keys, *items], [*value, *value.values()], strict=True))
        return value if is_same else dict(zip(keys, items, strict=True))
    if type(value) in (list, tuple):
        converted = [_converted(item, convert) for item in value]
        is_same = all(new is old for new, old in zip(converted, value, strict=True))
        return value if is_same else type(value)(converted)
    return value


def _plain_hyperparameter(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _without_tensors(value: Any) -> Any:
    """Return `value` without its tensors, whose bytes are not what may be refused."""
    if isinstance(value, torch.Tensor):
        return None
    if type(value) in (dict, collections.OrderedDict):
        return {key: _without_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_tensors, value))
    return value


def _refused(value: Any, place: str) -> str | None:
    """Return which part of `value` is refused, and its type, or ``None`` if everything is loaded."""
    if _loads(value):
        return None
    items = value.items() if type(value) is dict else enumerate(value) if type(value) in (list, tuple) else ()
    for key, item in items:
        if (found := _refused(item, f"{place}[{key!r}]")) is not None:
            return found
    return f"{place} with a value of the type {type(value).__module__}.{type(value).__qualname__}"


def _loads(value: Any) -> bool:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        load_state(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True
