"""Integrations whose framework is not installed: the error names what to install."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = ("polyaxon_tracking", "polyaxon_keras", "polyaxon_torch", "polyaxon_transformers")

MESSAGES = {
    "polyaxon_keras": 'polyaxon_keras needs Keras 3, which is not installed. Install it with: pip install "polyaxon-tracking[keras]", and one of the backends tensorflow, torch and jax, which the environment variable KERAS_BACKEND chooses',
    "polyaxon_torch": 'polyaxon_torch needs PyTorch, and these packages are not installed: torch, numpy. Install them with: pip install "polyaxon-tracking[torch]"',
    "polyaxon_transformers": 'polyaxon_transformers needs Hugging Face\'s Trainer, and these packages are not installed: transformers, torch, accelerate. Install them with: pip install "polyaxon-tracking[transformers]"',
}


@pytest.fixture
def error(tmp_path: Path) -> Error:
    return Error(tmp_path)


class Error:
    """The last line that an interpreter without any package prints; `modules` are installed, and do not much."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in PACKAGES:
            found = find_spec(name)
            assert found is not None
            assert found.submodule_search_locations
            (directory / name).symlink_to(found.submodule_search_locations[0])

    def of(self, statement: str, **modules: str) -> str:
        for name, content in modules.items():
            (self.directory / f"{name}.py").write_text(content)
        code = f"import sys; sys.path.insert(0, {str(self.directory)!r}); {statement}"
        process = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
        assert process.returncode == 1
        return process.stderr.splitlines()[-1].removeprefix("ModuleNotFoundError: ")


@pytest.mark.parametrize("package", list(MESSAGES))
def test_a_missing_framework_names_the_extra(package: str, error: Error) -> None:
    assert error.of(f"import {package}") == MESSAGES[package]


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_a_missing_backend_of_keras_is_named(backend: str, error: Error) -> None:
    assert error.of("import polyaxon_keras", keras=f"import {backend}") == (
        f"Keras needs a backend, and {backend} is not installed, which the environment variable KERAS_BACKEND or Keras's default "
        f"chooses. Install it with: pip install {backend}, or set KERAS_BACKEND to one that is installed: tensorflow, torch or jax"
    )


def test_transformers_without_what_its_trainer_needs(error: Error) -> None:
    told = error.of("import polyaxon_transformers", transformers="", torch="")
    assert told.startswith(
        "polyaxon_transformers needs Hugging Face's Trainer, and these packages are not installed: accelerate."
    )


def test_another_module_that_keras_lacks_is_not_taken_for_a_backend(error: Error) -> None:
    assert error.of("import polyaxon_keras", keras="import h5py") == "No module named 'h5py'"
