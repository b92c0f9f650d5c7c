"""Disks that fail in the middle of a training."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest
from training_scripts import SCRIPTS, newest

if TYPE_CHECKING:
    import subprocess

TROUBLE = Path(__file__).with_name("trouble.py")


def train(framework: str, outputs: Path, mode: str, *command: str) -> subprocess.CompletedProcess[str]:
    settings = {
        mode: "1",
        "POLYAXON_RUN_OUTPUTS_PATH": str(outputs),
        "KERAS_BACKEND": "torch",
        "SECONDS_PER_BATCH": "0.1",
    }
    return forked.run(framework, *command, **settings)


@pytest.mark.parametrize("mode", ["BACKGROUND", "FOREGROUND"])
@pytest.mark.parametrize("framework", list(SCRIPTS))
@pytest.mark.parametrize(("kind", "reason"), [("full", "File too large"), ("read-only", "Permission denied")])
def test_the_checkpoint_before_stays_and_the_error_says_what_is_missing(
    tmp_path: Path, mode: str, framework: str, kind: str, reason: str
) -> None:
    script = str(SCRIPTS[framework])
    failed = train(framework, tmp_path, mode, str(TROUBLE), kind, script)
    # HDF5 may crash the interpreter at its exit, after it has printed the error: see docs/durability.md.
    crash = {-signal.SIGSEGV} if (framework, kind) == ("keras", "full") else set()
    assert failed.returncode in {1} | crash, failed.stderr
    room = r"\. It needs more than [\d,]+ bytes, [\d,]+ bytes are free on its file system" if kind == "full" else "\n"
    message = rf"(?:OSError|PermissionError): \[Errno \d+\] {re.escape(str(tmp_path))}\S+ was not saved, and no existing file was changed: {reason}{room}"
    assert re.search(message, failed.stderr), failed.stderr
    for directory in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "resume"):
        directory.chmod(0o755)
    latest = newest(tmp_path)
    assert latest.epoch in (2, 3)
    resumed = train(framework, tmp_path, mode, script)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resuming from {latest.path}: epoch {latest.epoch}" in resumed.stderr
    assert re.search(r"^trained .*\b24\b", resumed.stdout, re.MULTILINE), resumed.stdout
    assert not list(tmp_path.rglob(".staging-*"))
