"""Train in several processes: with a launcher, as users start them, or with the ranks in the environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import forked
from servers import free_port
from training_scripts import SCRIPTS, Ended

TORCHRUN = [os.path.join(sysconfig.get_path("scripts"), "torchrun"), "--standalone", "--nproc-per-node=2"]


def start_ranks(
    command: list[str], outputs: Path | str, *, directory: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start a command that launches several processes itself."""
    settings = {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command,
        cwd=directory,
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_ranks(process: subprocess.Popen[str]) -> Ended:
    """Wait for a command that `start_ranks` started. If it hangs, it is killed with its processes.

    Raises:
        subprocess.TimeoutExpired: the command hung.
    """
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        # The workers of torchrun have their own sessions, and keep the pipes open.
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, workers)]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        print(*process.communicate(), sep="\n")
        raise
    return Ended(process.returncode, stdout, stderr)


def train_ranks(command: list[str], outputs: Path | str, *, directory: Path | None = None, **environment: str) -> Ended:
    """Run a command that launches several processes itself, to the end of all of them."""
    return wait_for_ranks(start_ranks(command, outputs, directory=directory, **environment))


def train_two_ranks(
    framework: str,
    outputs: Path | str,
    *,
    script: Path | None = None,
    machines: Path | None = None,
    **environment: str,
) -> list[Ended]:
    """Train in two processes of the fork server with their ranks in the environment, as Kubernetes' PyTorchJob has them.

    If one fails, the other gets SIGTERM, as from torchrun.

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
                    process.terminate()
            statuses = [process.wait(300) for process in started]
        finally:
            for process in started:
                process.kill()
            texts = [Path(logs, name).read_text() for name in ("0.out", "0.err", "1.out", "1.err")]
            print(*texts, sep="\n")
    return [Ended(statuses[0], *texts[:2]), Ended(statuses[1], *texts[2:])]


def as_one(ranks: list[Ended]) -> Ended:
    """Return the end of several ranks as torchrun reports it: 1 if any of them has failed."""
    return Ended(
        int(any(rank.returncode for rank in ranks)),
        "".join(rank.stdout for rank in ranks),
        "".join(rank.stderr for rank in ranks),
    )
