"""Run a training script whose disk fails when its second epoch is saved: `python trouble.py KIND SCRIPT`.

``full``: no file may grow beyond a few bytes. ``read-only``: the directory of the checkpoints takes no new names.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
import threading
import time

import faults

from polyaxon_tracking import CheckpointManager

CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION_3 = 0x20080522


def obey_modes() -> None:
    """Root may write where the mode of a directory forbids it; without this capability root may not: capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)  # of the calling thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and the same of the capabilities above 31
    if libc.capget(header, sets) == 0:
        for index in (0, 1):
            sets[index] &= ~(1 << CAP_DAC_OVERRIDE)
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "The capability to override modes could not be given up")


def cause_trouble(kind: str) -> None:
    checkpoints = os.path.join(os.environ["POLYAXON_RUN_OUTPUTS_PATH"], "checkpoints")
    manager = CheckpointManager(os.path.join(checkpoints, "resume"))
    while not any(checkpoint.epoch == 2 for checkpoint in manager.checkpoints()):
        time.sleep(0.001)
    if kind == "full":
        faults.fill_disk()
    else:
        for directory in (manager.directory, checkpoints):
            os.chmod(directory, 0o555)


if __name__ == "__main__":
    obey_modes()  # before any thread starts: each thread has its own capabilities
    threading.Thread(target=cause_trouble, args=sys.argv[1:2], daemon=True).start()
    runpy.run_path(sys.argv[2], run_name="__main__")
