"""Run a training script, and have its disk fail when its second epoch is saved: `python trouble.py KIND SCRIPT`.

``full``: no file may grow beyond a few bytes. ``read-only``: the directory of the checkpoints takes no new names.
"""

from __future__ import annotations

import os
import resource
import runpy
import sys
import threading
import time

from polyaxon_tracking import CheckpointManager


def cause_trouble(kind: str) -> None:
    checkpoints = os.path.join(os.environ["POLYAXON_RUN_OUTPUTS_PATH"], "checkpoints")
    manager = CheckpointManager(os.path.join(checkpoints, "resume"))
    while not any(checkpoint.epoch == 2 for checkpoint in manager.checkpoints()):
        time.sleep(0.001)
    if kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    else:
        for directory in (manager.directory, checkpoints):
            os.chmod(directory, 0o555)


if __name__ == "__main__":
    threading.Thread(target=cause_trouble, args=sys.argv[1:2], daemon=True).start()
    runpy.run_path(sys.argv[2], run_name="__main__")
