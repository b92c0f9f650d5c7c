"""Every variable that is read: whether it is set, and what it says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from polyaxon_tracking.cli.rows import ERROR, INFO, OK, WARNING, Row, displayed
from polyaxon_tracking.credentials import ACCESS_KEYS, access_keys, locate, variable_shown
from polyaxon_tracking.errors import TrackingError, shown
from polyaxon_tracking.paths import (
    CONTEXT_ROOT,
    DATA_PATHS,
    DEFAULT_CONTEXT_ROOT,
    DEFAULT_OFFLINE_ROOT,
    IS_OFFLINE,
    LOG_LEVEL,
    NO_OP,
    OFFLINE_ROOT,
    OUTPUTS_PATH,
    REFS_OUTPUTS_PATHS,
    RUN_INSTANCE,
    VARIABLES,
    get_data_paths,
    get_log_level,
    get_outputs_path,
    get_outputs_refs_paths,
    is_true,
    is_url,
    value_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["variables"]

_GROUP = "Environment"

_GETTERS: dict[str, Callable[[], object]] = {
    OUTPUTS_PATH: get_outputs_path,
    REFS_OUTPUTS_PATHS: get_outputs_refs_paths,
    DATA_PATHS: get_data_paths,
    LOG_LEVEL: get_log_level,
    RUN_INSTANCE: get_outputs_path,
}
# What holds where they are not set.
_DEFAULTS = {CONTEXT_ROOT: DEFAULT_CONTEXT_ROOT, OFFLINE_ROOT: DEFAULT_OFFLINE_ROOT}

# Of the drivers of stores: that they are set is of use, their values may be secrets.
_OF_DRIVERS = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_", "FSSPEC_", "GCSFS_")


def variables() -> Iterator[Row]:
    """Look at them all."""
    for name in VARIABLES:
        yield _variable(name)
    yield from _access_keys()
    yield _names("others of Polyaxon", ("POLYAXON_", "POLYSTORES_"), "not read")
    yield _names("drivers of stores", _OF_DRIVERS, "values are not shown")


def _names(what: str, begins: tuple[str, ...], told: str) -> Row:
    """What else is set: a misspelt name is among it."""
    found = sorted(name for name in os.environ if name.startswith(begins) and name not in (*VARIABLES, ACCESS_KEYS))
    return Row(_GROUP, what, INFO, ", ".join(map(displayed, found)) or "none is set", told if found else "")


def _variable(name: str) -> Row:
    raw = os.environ.get(name)
    value = value_of(name)
    if value is None:
        told = "not set" if raw is None else f"{raw!a}, which counts as not set"
        return Row(_GROUP, name, INFO, told, f"so {_DEFAULTS[name]}" if name in _DEFAULTS else "")
    if name == NO_OP:
        advice = "Every function answers as off the cluster. Unset it to use the run's outputs and data."
        return Row(_GROUP, name, WARNING if is_true(NO_OP) else OK, shown(value), "", advice if is_true(NO_OP) else "")
    if is_true(NO_OP):
        return Row(_GROUP, name, INFO, shown(value), f"not read, since {NO_OP} is true")
    if name in (CONTEXT_ROOT, OFFLINE_ROOT, IS_OFFLINE):
        return Row(_GROUP, name, OK, displayed(value))
    if name == RUN_INSTANCE and value_of(OUTPUTS_PATH) is not None:
        return Row(_GROUP, name, INFO, shown(value), f"not read, since {OUTPUTS_PATH} is set")
    try:
        parsed = _GETTERS[name]()
    except TrackingError as error:
        return Row(_GROUP, name, ERROR, "malformed", "", str(error))
    if name == RUN_INSTANCE:
        return Row(_GROUP, name, OK, shown(value))
    return Row(_GROUP, name, OK, _without_secrets(parsed))


def _without_secrets(value: object) -> object:
    if isinstance(value, dict):
        return {displayed(name): _without_secrets(path) for name, path in value.items()}
    if isinstance(value, list):
        return [_without_secrets(path) for path in value]
    return displayed(str(value))


def _access_keys() -> Iterator[Row]:
    try:
        stores = access_keys()
    except TrackingError as error:
        yield Row(_GROUP, ACCESS_KEYS, ERROR, "malformed", "", str(error))
        return
    if not stores:
        yield Row(_GROUP, ACCESS_KEYS, INFO, "not set" if ACCESS_KEYS not in os.environ else "no stores")
    for path, variable in stores.items():
        told = f"{displayed(path)}: " + ("no credentials" if variable is None else f"in {variable_shown(variable)}")
        try:
            if is_url(path):
                locate(path)
        except TrackingError as error:
            yield Row(_GROUP, ACCESS_KEYS, ERROR, told, "", str(error))
        else:
            yield Row(_GROUP, ACCESS_KEYS, OK, told)
