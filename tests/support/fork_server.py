"""Import frameworks once, then fork a process for each script that a test starts: `forked.py` is the client.

`multiprocessing.forkserver` was looked at first. Its children end with `os._exit`, so they run neither `atexit` nor the
interpreter's own end, where several of our promises are kept; it has one list of modules to import for a whole process;
and its children have the session, environment and standard streams of the server.

A child ends as every interpreter does, up to the last function of `atexit`. What comes after that, freeing thousands of
modules, would take longer than many of the trainings: the child is ended there.

Run as ``python -W ignore fork_server.py DESCRIPTOR MODULE...``. The descriptor is a socket that listens: all processes of
one test run connect to it, and the server ends with the last of these connections. Each message is a script to run, with
four descriptors: the three standard streams, and a pipe to which the server writes the child's process id and later its
exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import select
import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

MESSAGE_BYTES = 1 << 17
# Restarted in the child by jemalloc itself, which registers handlers with pthread_atfork.
SAFE_THREADS = {"jemalloc_bg_thd"}


def import_frameworks(modules: list[str]) -> None:
    """Import the modules that are installed, which must leave this process with one thread: a child has no other.

    Raises:
        RuntimeError: an import has started a thread.
    """
    for module in modules:
        if importlib.util.find_spec(module.partition(".")[0]):  # TensorFlow is not in all environments of the tests
            importlib.import_module(module)
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len([thread for thread in threads if thread not in SAFE_THREADS]) > 1:
        raise RuntimeError(f"Importing {modules} started threads, so forking is not safe: {sorted(threads)}.")


class Server:
    """Fork a child for each message of a client, and report how each child ends."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._clients: set[socket.socket] = set()
        self._running: dict[int, tuple[int, int]] = {}
        """By the pidfd of a child: its process id, and where to report it."""

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Serve the clients. Returns only in a child, with its message and its streams."""
        while True:
            for ready in select.select([self._listener, *self._clients, *self._running], [], [])[0]:
                if ready is self._listener:
                    client, _ = self._listener.accept()
                    client.send(b"ready")
                    self._clients.add(client)
                elif ready in self._running:
                    self._report_end(ready)
                elif request := self._receive(ready):
                    return request

    def _report_end(self, pidfd: int) -> None:
        pid, report = self._running.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):  # the test has not waited for it
            os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os.close(pidfd)
        os.close(report)

    def _receive(self, client: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
        """Fork the child that the next message asks for. Returns the message and the streams only in the child."""
        message, descriptors, _, _ = socket.recv_fds(client, MESSAGE_BYTES, 4)
        if not message:
            client.close()
            self._clients.remove(client)
            if not self._clients and not select.select([self._listener], [], [], 0)[0]:
                os._exit(0)
            return None
        *streams, report = descriptors
        pid = os.fork()
        if not pid:
            for connection in (self._listener, *self._clients):
                connection.close()
            for other, (_, report_of_other) in self._running.items():
                os.close(other)
                os.close(report_of_other)
            os.close(report)
            return json.loads(message), streams
        for stream in streams:
            os.close(stream)
        self._running[os.pidfd_open(pid)] = pid, report
        os.write(report, f"{pid}\n".encode())
        return None


def become(arguments: list[str], environment: dict[str, str], directory: str, streams: list[int]) -> None:
    """Make this child what a new interpreter with these arguments would be."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(directory)
    own_path = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]  # an ordinary text stream
    # What imported modules have read from the server's environment, or drawn at random.
    tempfile.tempdir = None
    if fsspec := sys.modules.get("fsspec.config"):
        fsspec.set_conf_env(fsspec.conf)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    script, *rest = arguments
    sys.path[:] = ["" if script == "-c" else str(Path(script).parent), *own_path, *sys.path[1:]]
    sys.argv[:] = ["-c", *rest[1:]] if script == "-c" else arguments


class LastOfExit:
    """End the process in the last function of `atexit`, with the exit status that the interpreter would have."""

    def __init__(self) -> None:
        self.status: int | None = None
        """The exit status, or ``None`` if the interpreter must find it."""
        atexit.register(self._end)  # the functions of `atexit` run in the opposite order

    def _end(self) -> None:
        if self.status is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(self.status)

    def run(self, code: types.CodeType, module: types.ModuleType) -> None:
        """Execute the code in the module, and take note of how it ends."""
        try:
            exec(code, vars(module))
        except SystemExit as error:
            if error.code is None or type(error.code) is int:  # otherwise it is printed
                self.status = error.code or 0
            raise
        except Exception:
            self.status = 1
            raise
        self.status = 0


def main_module(script: str) -> types.ModuleType:
    """Return a new ``__main__``, which `pickle` and the processes that the script starts find by that name."""
    module = types.ModuleType("__main__")
    if script != "-c":
        module.__file__ = script
    sys.modules["__main__"] = module
    return module


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    end = LastOfExit()  # before the frameworks register their functions
    import_frameworks(sys.argv[2:])
    gc.freeze()  # a collection would touch, and so copy, every object that the child shares with the server
    request, standard_streams = Server(listening).serve()
    become(request["arguments"], request["environment"], request["directory"], standard_streams)
    first = request["arguments"][0]
    code = request["arguments"][1] if first == "-c" else Path(first).read_text()
    end.run(compile(code, "<string>" if first == "-c" else first, "exec"), main_module(first))
