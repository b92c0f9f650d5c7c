"""The public surface, what importing it brings along, and the sizes of modules and classes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import polyaxon_tracking
from polyaxon_tracking import training

PACKAGES = ["polyaxon_tracking", "polyaxon_torch", "polyaxon_lightning", "polyaxon_keras", "polyaxon_transformers"]

PUBLIC = [
    "Checkpoint",
    "CheckpointManager",
    "PreemptionHandler",
    "StepLoop",
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
    "RunPaths",
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


def modules() -> dict[str, str]:
    """Return the sources of all modules by their names, where they are installed: in the checkout, or from the wheel."""
    folders = {name: Path(spec.origin).parent for name in PACKAGES if (spec := find_spec(name)) and spec.origin}
    assert folders.keys() == set(PACKAGES)
    return {
        f"{name}/{path.relative_to(folder)}": path.read_text()
        for name, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }


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


def test_no_module_is_above_350_lines() -> None:
    sizes = {name: len(source.splitlines()) for name, source in modules().items()}
    assert len(sizes) > 100
    assert {name: size for name, size in sizes.items() if size > 350} == {}


def test_no_class_is_above_250_lines() -> None:
    sizes = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, source in modules().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.end_lineno is not None
    }
    assert len(sizes) > 50
    assert {name: size for name, size in sizes.items() if size > 250} == {}
