"""Start trainings in their own processes without importing their framework each time: see `fork_server.py`.

A process that is started here has its own process id, session, signals, environment, directory, standard streams and
exit status. Tests of how a process starts (imports, launchers, ``python -m``, the examples) start a new interpreter
instead, with `subprocess`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

# With what they import when training starts: torch's optimizers import Dynamo, Keras asks whether its data is
# TensorFlow's, and Lightning imports the drivers of all stores.
FRAMEWORKS = {
    "keras": ["keras", "h5py", "tensorflow"],
    "torch": ["torch", "torch.distributed.run", "torch._dynamo", "torchdata.stateful_dataloader"],
    "lightning": ["lightning.pytorch", "torchdata.stateful_dataloader", "adlfs", "gcsfs", "s3fs"],
    "transformers": ["transformers.trainer", "transformers.models.bert.modeling_bert"],
}
FRAMEWORKS["all"] = [*FRAMEWORKS["keras"], *FRAMEWORKS["lightning"], *FRAMEWORKS["transformers"]]
SERVER = Path(__file__).with_name("fork_server.py")


class Forked:
    """A process of a fork server, with what the tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, report: IO[str], stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._report = report

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            with self._report:
                self.returncode = int(self._report.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return all that the process prints until it ends. One that takes longer is killed, with all of its session.

        Raises:
            subprocess.TimeoutExpired: the process took longer.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        texts = ["", ""]
        readers = [
            threading.Thread(target=_read, args=(stream, texts, number), daemon=True)
            for number, stream in enumerate((self.stdout, self.stderr))
            if stream is not None
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
        if any(reader.is_alive() for reader in readers):
            os.killpg(self.pid, signal.SIGKILL)
            for reader in readers:
                reader.join()
            self.wait()
            print(*texts, sep="\n")
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0, *texts)
        self.wait()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _read(stream: IO[str], texts: list[str], number: int) -> None:
    with stream:
        texts[number] = stream.read()


@functools.cache
def _server(framework: str, keras_backend: str) -> socket.socket:
    """Return a connection to the server that has imported the framework, one for all processes of the test run."""
    path = f"{os.environ['FORK_SERVERS']}/{framework}-{keras_backend}"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with open(f"{path}.lock", "w") as lock, contextlib.ExitStack() as listening:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):  # there is none yet, or it has ended with its last client
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener = listening.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(path)
            listener.listen()
            _start_server(listener, framework, keras_backend)
            connection.connect(path)
    with contextlib.suppress(ConnectionResetError):
        if connection.recv(5) == b"ready":
            return connection
    raise RuntimeError(f"The fork server for {framework} has ended.")


def _start_server(listener: socket.socket, framework: str, keras_backend: str) -> None:
    environment = os.environ | {
        "KERAS_BACKEND": keras_backend,
        "OPENBLAS_NUM_THREADS": "1",  # it would start the others when NumPy is imported
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # read at import; see servers.py
    }
    subprocess.Popen(
        [sys.executable, "-W", "ignore", SERVER, str(listener.fileno()), *FRAMEWORKS[framework]],
        env=environment,
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=SERVER.parent,
        start_new_session=True,
    )


def start(
    framework: str,
    *arguments: str | Path,
    stdout: int | None = None,
    stderr: int | None = None,
    directory: str | Path | None = None,
    **environment: str,
) -> Forked:
    """Start a script, or ``"-c"`` and code, in a process that has imported the framework.

    Args:
        framework: a key of `FRAMEWORKS`.
        arguments: the script, or ``"-c"`` and code, and its arguments.
        stdout: the descriptor that standard output goes to; a pipe by default.
        stderr: the same of standard error.
        directory: the working directory; this process's by default.
        environment: what is set in addition to this process's environment.
    """
    its_environment = os.environ | environment
    channel = _server(framework, its_environment.get("KERAS_BACKEND", "torch"))
    with contextlib.ExitStack() as descriptors:
        nothing = os.open(os.devnull, os.O_RDONLY)
        descriptors.callback(os.close, nothing)
        output, its_output = _stream(stdout, descriptors)
        errors, its_errors = _stream(stderr, descriptors)
        reading, report = os.pipe()
        descriptors.callback(os.close, report)
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": its_environment,
            "directory": str(directory or Path.cwd()),
        }
        socket.send_fds(channel, [json.dumps(request).encode()], [nothing, its_output, its_errors, report])
    reports = open(reading)  # noqa: SIM115  # closed when the exit status was read
    # A pipe has a buffer: the process id is one line, and the exit status the next, much later.
    return Forked(int(_line(reading)), reports, output, errors)


def _stream(descriptor: int | None, descriptors: contextlib.ExitStack) -> tuple[IO[str] | None, int]:
    """Return the file from which a stream of the process is read, if it is a pipe, and the descriptor that the process writes to."""
    if descriptor is not None:
        return None, descriptor
    reading, writing = os.pipe()
    descriptors.callback(os.close, writing)
    return open(reading), writing


def _line(descriptor: int) -> str:
    """Read one line, and not a byte of the next."""
    return b"".join(iter(lambda: os.read(descriptor, 1), b"\n")).decode()


def wait_for_one(processes: list[Forked], timeout: float) -> None:
    """Return when one of the processes has ended, or after the timeout in seconds."""
    select.select([process._report for process in processes], [], [], timeout)


def run(
    framework: str,
    *arguments: str | Path,
    directory: str | Path | None = None,
    timeout: float = 300,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script, or ``"-c"`` and code, to its end: `start` says with what."""
    process = start(framework, *arguments, directory=directory, **environment)
    stdout, stderr = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess([str(argument) for argument in arguments], process.returncode, stdout, stderr)
