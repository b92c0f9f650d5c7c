"""Helpers of the command's tests: checkpoints to list, and the reports that it prints as JSON."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from polyaxon_tracking import CheckpointManager

OUTPUTS = "POLYAXON_RUN_OUTPUTS_PATH"
REFS = "POLYAXON_REFS_OUTPUTS_PATHS"
DATA = "POLYAXON_RUN_DATA_PATHS"
LEVEL = "POLYAXON_LOG_LEVEL"
INSTANCE = "POLYAXON_RUN_INSTANCE"
ACCESS_KEYS = "POLYSTORES_RUN_STORES_ACCESS_KEYS"
SECRET = "wJalrXUtnFEMI"


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What `polyaxon-tracking` prints on a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "polyaxon_tracking", *arguments],
        env=os.environ | {"TERM": "xterm-256color"} | environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    printed = b""
    try:
        while read := os.read(master, 65536):
            printed += read
    except OSError:  # the end, as Linux tells it
        pass
    os.close(master)
    process.wait(timeout=300)
    return printed.decode()


class Report(NamedTuple):
    code: int
    rows: dict[str, dict[str, str]]

    def status_and_value(self, name: str) -> tuple[str, object]:
        return self.rows[name]["status"], self.rows[name]["value"]

    def advice(self, name: str) -> str:
        return self.rows[name]["advice"]

    def with_status(self, status: str) -> list[str]:
        return [name for name, row in self.rows.items() if row["status"] == status]


def fill(outputs: str, *directories: str) -> None:
    """Save two checkpoints in each of the directories."""
    for directory in directories:
        manager = CheckpointManager(f"{outputs}/{directory}")
        for step in (10, 20):
            with manager.save(step, step // 10) as path:
                Path(path).write_text(f"step {step}")


def listed(process: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(process.stdout)["checkpoints"]
    return found
