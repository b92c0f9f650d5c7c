"""Every test runs in an empty directory, off the cluster, and leaves the environment as it was."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

collect_ignore = ["tests/typing"]  # only for type checkers

# Set by pytest, and by torch, Lightning, TensorFlow, JAX and h5py when they are imported or first used.
_NOT_OURS = {
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "ENABLE_RUNTIME_UPTIME_TELEMETRY",
    "HDF5_PLUGIN_PATH",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TF2_BEHAVIOR",
    "TPU_ML_PLATFORM",
    "TPU_ML_PLATFORM_VERSION",
}


@pytest.fixture(autouse=True)
def _off_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("POLYAXON_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _environment_is_left_as_it_was(_off_the_cluster: None, request: pytest.FixtureRequest) -> Iterator[None]:
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    if isinstance(request.node, pytest.DoctestItem):  # an example shows which variable it is about
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)
    # What a test sets through `monkeypatch` is undone after this fixture, so it is not looked at.
    elif "monkeypatch" not in _requested(request):
        assert not changed - _NOT_OURS, f"the test leaves the environment changed: {sorted(changed)}"


def _requested(request: pytest.FixtureRequest) -> set[str]:
    """The fixtures that the test asks for itself, and `outputs` asks for."""
    names = set(request.node._fixtureinfo.argnames)
    return names | ({"monkeypatch"} if "outputs" in names else set())


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(os=os, Path=Path)


@pytest.fixture(autouse=True)
def _log_levels_are_left_as_they_were() -> Iterator[None]:
    names = ["polyaxon_tracking", "lightning", "lightning.pytorch", "lightning.fabric", "keras", "absl"]
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The outputs path of a run in a cluster."""
    path = tmp_path / "run" / "outputs"
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(path))
    return path
