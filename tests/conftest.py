"""Every test runs in an empty directory, off the cluster, and leaves the environment as it was."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NOT_OURS = {"PYTEST_CURRENT_TEST"}


@pytest.fixture(autouse=True)
def _off_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("POLYAXON_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _environment_is_left_as_it_was(_off_the_cluster: None, request: pytest.FixtureRequest) -> Iterator[None]:
    # What a test sets through `monkeypatch` is undone after this fixture, so it is not looked at.
    uses_monkeypatch = "monkeypatch" in request.fixturenames
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} - _NOT_OURS
    if not uses_monkeypatch:
        assert not changed, f"the test leaves the environment changed: {sorted(changed)}"


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
