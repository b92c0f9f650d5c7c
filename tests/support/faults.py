"""Faults that a training script causes in its own process where its environment says so, and a digest of its weights."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np


def prepare_process() -> None:
    """Install a signal handler of the script's own (`OWN_HANDLER`), give each rank other outputs (`OUTPUTS_OF_RANKS`)."""
    if "OWN_HANDLER" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: print("own handler", flush=True))
    if "OUTPUTS_OF_RANKS" in os.environ:
        os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = os.environ["OUTPUTS_OF_RANKS"] + os.environ.get("LOCAL_RANK", "0")


def is_due(name: str, count: int, rank: int = 0) -> bool:
    """Return whether the variable holds this count, and this is the rank in `ON_RANK`, not started again by torchrun."""
    is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    return is_first_start and os.environ.get(name) == str(count) and rank == int(os.environ.get("ON_RANK", "0"))


def die(name: str | None = None) -> None:
    """Send this process the signal, or else the one in `SIGNAL`, or else SIGKILL."""
    os.kill(os.getpid(), signal.Signals[name or os.environ.get("SIGNAL", "SIGKILL")])


def fill_disk() -> None:
    """Limit the files of this process to a few bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """Return a digest that differs if any bit differs."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
