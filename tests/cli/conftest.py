"""The command in its own process, as users start it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from reports import Report

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = [sys.executable, "-m", "polyaxon_tracking"]


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


@pytest.fixture
def obey_modes() -> Callable[[], None]:
    """Return a function that takes away, before a program is started, the capabilities by which root ignores file modes."""

    def drop() -> None:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)

    return drop


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start ``polyaxon-tracking`` with arguments, and wait for its end."""

    def start(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | options.pop("env", {})  # type: ignore[operator]
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=300, env=environment, **options
        )

    return start


@pytest.fixture
def doctor(command: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Report]:
    def start(**options: object) -> Report:
        """Return the rows by name, after checking what holds for every report."""
        process = command("doctor", "--json", **options)
        assert process.stderr == ""
        report = json.loads(process.stdout)
        rows = report["checks"]
        assert report["errors"] == sum(row["status"] == "error" for row in rows)
        assert report["warnings"] == sum(row["status"] == "warning" for row in rows)
        assert report["ok"] == (report["errors"] == 0)
        assert process.returncode == (0 if report["ok"] else 1)
        for row in rows:
            assert bool(row["advice"]) == (row["status"] in ("warning", "error")), row
        return Report(process.returncode, {row["name"]: row for row in rows})

    return start
