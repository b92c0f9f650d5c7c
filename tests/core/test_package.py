"""The public surface, and what importing it brings along."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import polyaxon_tracking
from polyaxon_tracking import training

PUBLIC = [
    "Checkpoint",
    "CheckpointManager",
    "PreemptionHandler",
    "TrackingError",
    "atomic_write",
    "cached_path",
    "get_data_path",
    "get_data_paths",
    "get_log_level",
    "get_outputs_path",
    "get_outputs_refs_paths",
]

FOR_INTEGRATIONS = [
    "Action",
    "BackgroundWriter",
    "Directory",
    "Flags",
    "Hyperparameters",
    "IfChanged",
    "PreemptionHandler",
    "ProcessGroup",
    "Run",
    "SaveOptions",
    "StagedFile",
    "TrainingSession",
    "accept_hyperparameters",
    "available_memory",
    "different_model",
    "open_directory",
]


def imported_by(statement: str) -> set[str]:
    """Return the top-level modules that `statement` loads in a new interpreter."""
    code = f"import json, sys; before = set(sys.modules); {statement}; print(json.dumps(sorted(set(sys.modules) - before)))"
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    return {name.partition(".")[0] for name in json.loads(output)}


def test_the_public_names() -> None:
    assert polyaxon_tracking.__all__ == PUBLIC
    assert dir(polyaxon_tracking) == PUBLIC
    assert training.__all__ == FOR_INTEGRATIONS


def test_every_public_name_is_there_and_nothing_else() -> None:
    assert all(getattr(polyaxon_tracking, name).__name__ == name for name in PUBLIC)
    with pytest.raises(AttributeError, match="module 'polyaxon_tracking' has no attribute 'get_output_path'"):
        _ = polyaxon_tracking.get_output_path  # type: ignore[attr-defined]


def test_importing_the_package_imports_next_to_nothing() -> None:
    assert imported_by("import polyaxon_tracking") <= {"__future__", "polyaxon_tracking"}


@pytest.mark.parametrize(
    "name", [f"polyaxon_tracking import {name}" for name in PUBLIC] + ["polyaxon_tracking.training import *"]
)
def test_the_core_imports_only_the_standard_library(name: str) -> None:
    assert imported_by(f"from {name}") <= sys.stdlib_module_names | {"polyaxon_tracking"}
