"""Check every environment variable that this package reads: whether it is set, and its value."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from polyaxon_tracking.cli.rows import ERROR, INFO, OK, WARNING, Row, displayed
from polyaxon_tracking.environment import (
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
    value_of,
)
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_value
from polyaxon_tracking.storage.credentials import ACCESS_KEYS, access_keys, locate, variable_shown
from polyaxon_tracking.storage.dataset_cache import DATA_CACHE
from polyaxon_tracking.training.cloud_notices import PREEMPTION_NOTICES, cloud_to_ask
from polyaxon_tracking.training.time_limit import JOB_END_TIME, job_end_time
from polyaxon_tracking.urls import is_url

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
    IS_OFFLINE: lambda: str(is_true(IS_OFFLINE)).lower(),
}
# Those that the user sets where a training may be ended early. They have rows only if they are set.
_NOTICES: dict[str, Callable[[], object]] = {JOB_END_TIME: job_end_time, PREEMPTION_NOTICES: cloud_to_ask}
# The defaults of variables that are not set.
_DEFAULTS = {CONTEXT_ROOT: DEFAULT_CONTEXT_ROOT, OFFLINE_ROOT: DEFAULT_OFFLINE_ROOT}

# The similarity, as difflib's ratio of names without their prefix, from which a name counts as a misspelling. Of the
# variables that the platform sets and this package does not read (2.x: _env_vars/keys.py), only one is this similar.
_NEAR = 0.8
_NOT_MISSPELT = "UI_OFFLINE"

_PREFIXES = ("POLYAXON_", "POLYSTORES_")

_KNOWN = (*VARIABLES, ACCESS_KEYS, DATA_CACHE, *_NOTICES)

# Prefixes of the store drivers' variables. Only their names are reported, because their values may be secrets.
_OF_DRIVERS = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_", "FSSPEC_", "GCSFS_")


def variables() -> Iterator[Row]:
    """Check all variables, and yield their rows."""
    for name in VARIABLES:
        yield _variable(name)
    yield from _notices()
    yield from _access_keys()
    others = sorted(name for name in os.environ if name.startswith(_PREFIXES) and name not in _KNOWN)
    misspelt = {name: _misspelt_variable(name) for name in others}
    for name, known in misspelt.items():
        if known is not None:
            yield Row(_GROUP, displayed(name), WARNING, "not read", "", f"Did you mean {known}?")
    yield _row_of_names("others of Polyaxon", [name for name in others if misspelt[name] is None], "not read")
    drivers = sorted(name for name in os.environ if name.startswith(_OF_DRIVERS))
    yield _row_of_names("drivers of stores", drivers, "values are not shown")


def _misspelt_variable(name: str) -> str | None:
    """Return the variable of which `name` is a misspelling, or None."""
    import difflib  # here and not above: it is rarely needed

    known = {_without_prefix(variable): variable for variable in _KNOWN}
    near = difflib.get_close_matches(_without_prefix(name), known, n=1, cutoff=_NEAR)
    return known[near[0]] if near and _without_prefix(name) != _NOT_MISSPELT else None


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _row_of_names(what: str, names: list[str], source: str) -> Row:
    """Return one row with the names of other variables that are set."""
    return Row(_GROUP, what, INFO, ", ".join(map(displayed, names)) or "none is set", source if names else "")


def _variable(name: str) -> Row:
    raw = os.environ.get(name)
    value = value_of(name)
    if value is None:
        text = "not set" if raw is None else f"{raw!a}, which counts as not set"
        return Row(_GROUP, name, INFO, text, f"so {_DEFAULTS[name]}" if name in _DEFAULTS else "")
    try:
        nothing_is_read = is_true(NO_OP)
    except TrackingError as error:
        if name == NO_OP:
            return Row(_GROUP, name, ERROR, "malformed", "", str(error))
        return Row(_GROUP, name, INFO, shown_value(value), f"not read, since {NO_OP} is malformed")
    if name == NO_OP:
        advice = "Every function answers as off the cluster. Unset it to use the run's outputs and data."
        status, advice = (WARNING, advice) if nothing_is_read else (OK, "")
        return Row(_GROUP, name, status, shown_value(value), "", advice)
    if nothing_is_read:
        return Row(_GROUP, name, INFO, shown_value(value), f"not read, since {NO_OP} is true")
    if name in (CONTEXT_ROOT, OFFLINE_ROOT):
        return Row(_GROUP, name, OK, displayed(value))
    if name == RUN_INSTANCE and value_of(OUTPUTS_PATH) is not None:
        return Row(_GROUP, name, INFO, shown_value(value), f"not read, since {OUTPUTS_PATH} is set")
    try:
        parsed = _GETTERS[name]()
    except TrackingError as error:
        return Row(_GROUP, name, ERROR, "malformed", "", str(error))
    if name == RUN_INSTANCE:
        return Row(_GROUP, name, OK, shown_value(value))
    return Row(_GROUP, name, OK, _without_secrets(parsed))


def _without_secrets(value: object) -> object:
    if isinstance(value, dict):
        return {displayed(name): _without_secrets(path) for name, path in value.items()}
    if isinstance(value, list):
        return [_without_secrets(path) for path in value]
    return displayed(str(value))


def _notices() -> Iterator[Row]:
    for name, read in _NOTICES.items():
        if (value := value_of(name)) is not None:
            try:
                read()
            except TrackingError as error:
                yield Row(_GROUP, name, ERROR, "malformed", "", str(error))
            else:
                yield Row(_GROUP, name, OK, shown_value(value))


def _access_keys() -> Iterator[Row]:
    try:
        stores = access_keys()
    except TrackingError as error:
        yield Row(_GROUP, ACCESS_KEYS, ERROR, "malformed", "", str(error))
        return
    if not stores:
        yield Row(_GROUP, ACCESS_KEYS, INFO, "not set" if ACCESS_KEYS not in os.environ else "no stores")
    for path, variable in stores.items():
        text = f"{displayed(path)}: " + ("no credentials" if variable is None else f"in {variable_shown(variable)}")
        try:
            if is_url(path):
                locate(path)
        except TrackingError as error:
            yield Row(_GROUP, ACCESS_KEYS, ERROR, text, "", str(error))
        else:
            yield Row(_GROUP, ACCESS_KEYS, OK, text)
