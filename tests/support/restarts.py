"""Simulate the next start of a script in this process."""

from __future__ import annotations

import sys

from polyaxon_tracking.training import checkpoint_directories, local_outputs


def forget_trainings() -> None:
    """Forget the trainings of this process, as a new process does."""
    checkpoint_directories._begun.clear()
    local_outputs._of_this_process.clear()
    if callback := sys.modules.get("polyaxon_transformers.callback"):
        callback._sharing.clear()
