"""Train in several processes: with a launcher, as users start them, or with the ranks in the environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import forked
from servers import free_port
from training_scripts import SCRIPTS, Ended


def start_torchrun(framework: str, outputs: Path | str, *options: str, **environment: str) -> forked.Forked:
    """Start torchrun in a process of the fork server, for two ranks, each of which is a new interpreter.

    Args:
        framework: a key of `SCRIPTS`, whose script each rank runs.
        outputs: the outputs path.
        options: more options of torchrun.
        environment: more variables.
    """
    settings = {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs), "PYTHONWARNINGS": "ignore", **environment}
    options = ("--standalone", "--nproc-per-node=2", *options)
    code = "from torch.distributed.run import main; main()"
    return forked.start("torch", "-c", code, *options, SCRIPTS[framework], **settings)


def wait_for_torchrun(process: forked.Forked) -> Ended:
    """Wait for torchrun. If it hangs, it is killed with its ranks.

    Raises:
        subprocess.TimeoutExpired: it hung.
    """
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    timer = threading.Timer(300, lambda: [os.killpg(int(rank), signal.SIGKILL) for rank in ranks.read_text().split()])
    timer.start()  # they have sessions of their own, and keep the pipes open
    try:
        stdout, stderr = process.communicate(310)
    finally:
        timer.cancel()
    assert process.returncode is not None
    return Ended(process.returncode, stdout, stderr)


def torchrun(framework: str, outputs: Path | str, *options: str, **environment: str) -> Ended:
    """Run `start_torchrun` to its end."""
    return wait_for_torchrun(start_torchrun(framework, outputs, *options, **environment))


def train_two_ranks(
    framework: str,
    outputs: Path | str,
    *,
    script: Path | None = None,
    machines: Path | None = None,
    **environment: str,
) -> list[Ended]:
    """Train in two processes of the fork server with their ranks in the environment, as Kubernetes' PyTorchJob has them.

    If one fails, and the other does not end within 10 seconds, it gets SIGTERM, as from torchrun.

    Args:
        framework: a key of `SCRIPTS`.
        outputs: the outputs path.
        script: another script than that of the framework.
        machines: a directory in which each rank has a directory of its own and a `$TMPDIR`, as on a machine of its own.
        environment: more variables.
    """
    settings = {
        "POLYAXON_RUN_OUTPUTS_PATH": str(outputs),
        "PYTHONWARNINGS": "ignore",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **environment,
    }
    with tempfile.TemporaryDirectory() as logs:
        started = []
        for rank in range(2):
            directory, own = None, {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            if machines is not None:
                directory = machines / f"machine-{rank}"
                (directory / "tmp").mkdir(parents=True)
                own = {"LOCAL_RANK": "0", "GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}
                own["TMPDIR"] = str(directory / "tmp")
            with open(f"{logs}/{rank}.out", "w") as stdout, open(f"{logs}/{rank}.err", "w") as stderr:
                streams = {"stdout": stdout.fileno(), "stderr": stderr.fileno()}
                its_script = script or SCRIPTS[framework]
                process = forked.start(
                    framework, its_script, directory=directory, **streams, **settings, **own, RANK=str(rank)
                )
                started.append(process)
        try:
            forked.wait_for_one(started, 300)
            if any(process.poll() for process in started):
                for process in started:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
                    process.terminate()
            statuses = [process.wait(300) for process in started]
        finally:
            for process in started:
                process.kill()
            texts = [Path(logs, name).read_text() for name in ("0.out", "0.err", "1.out", "1.err")]
            print(*texts, sep="\n")
    return [Ended(statuses[0], *texts[:2]), Ended(statuses[1], *texts[2:])]


def train_ranks(framework: str, outputs: Path | str, *, script: Path | None = None, **environment: str) -> Ended:
    """Train as `train_two_ranks` does, and return the end of both as torchrun reports it: 1 if any of them has failed."""
    ranks = train_two_ranks(framework, outputs, script=script, **environment)
    return Ended(
        int(any(rank.returncode for rank in ranks)),
        "".join(rank.stdout for rank in ranks),
        "".join(rank.stderr for rank in ranks),
    )
