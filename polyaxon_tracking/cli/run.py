"""Run a command with the environment of a run, forward each signal to it once, and return its exit code."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess

from polyaxon_tracking.environment import (
    DATA_PATHS,
    LOG_LEVEL,
    OUTPUTS_PATH,
    REFS_KEYS,
    REFS_OUTPUTS_PATHS,
    VARIABLES,
    checked_log_level,
)
from polyaxon_tracking.errors import TrackingError, closest
from polyaxon_tracking.redaction import shown_path, shown_value
from polyaxon_tracking.storage.credentials import locate
from polyaxon_tracking.storage.disk import is_there
from polyaxon_tracking.training.inputs import checked_outputs
from polyaxon_tracking.urls import is_url, local_path

__all__ = ["environment", "supervise"]

_FORWARDED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_FROM_KEYS = {signal.SIGINT, signal.SIGQUIT}
_FROM_KERNEL = 0x80  # SI_KERNEL of sigaction(2), which Python does not name
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def environment(outputs: str, data: list[str], references: list[str], log_level: str | None) -> dict[str, str]:
    """Return the variables that the platform sets for such a run.

    Args:
        outputs: the outputs path, a directory or a URL.
        data: datasets as ``NAME=PATH``.
        references: other runs' outputs as ``experiments=PATH`` or ``jobs=PATH``.
        log_level: the log level, or None.

    Raises:
        TrackingError: one of the arguments cannot be used.
    """
    paths: dict[str, str] = {}
    for given in data:
        name, path = _pair("--data", given, "NAME=PATH, such as digits=data/digits")
        if name in paths:
            raise TrackingError(
                f"Received --data {shown_path(name)} twice. Expected every name once: leave one of them out."
            )
        paths[name] = path
    refs: dict[str, list[str]] = {}
    for given in references:
        kind, path = _pair("--ref", given, "KIND=PATH, such as experiments=outputs/1")
        if kind not in REFS_KEYS:
            raise TrackingError(
                f"Received --ref {shown_value(given)}. Expected one of {', '.join(REFS_KEYS)} before the '=', such as "
                f"experiments=outputs/1.{closest(kind, list(REFS_KEYS))}"
            )
        refs.setdefault(kind, []).append(path)
    variables: dict[str, str] = {}
    if paths:
        variables[DATA_PATHS] = json.dumps(paths)
    if refs:
        variables[REFS_OUTPUTS_PATHS] = json.dumps(refs)
    if log_level is not None:
        variables[LOG_LEVEL] = str(checked_log_level(log_level, "--log-level", "Correct it, or leave it out."))
    if not outputs.strip():
        raise TrackingError("Received an empty --outputs. Expected a directory, or a URL such as s3://bucket/run.")
    # Last, because it creates the directory. The command itself checks a store, as it may run in another environment.
    return {OUTPUTS_PATH: _valid_url(outputs) if is_url(outputs) else checked_outputs(outputs, "--outputs")} | variables


def supervise(command: list[str], variables: dict[str, str]) -> int:
    """Run `command` with `variables` in its environment, and return its exit code, as a shell would.

    Variables of another run in this process's environment are not passed on.

    Raises:
        OSError: the command cannot be started.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    # A handler, although it never runs. If SIGCHLD is ignored, the exit status of the child is lost. With the default
    # action, macOS drops SIGCHLD instead of keeping it for `sigwait`.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waited_for = _FORWARDED | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    # On a terminal, the child shares this process group (of the operating system), so that it can read from the
    # terminal and receives Ctrl-C and Ctrl-Z directly. Elsewhere, the child has its own process group, so that a signal
    # to the whole group does not reach the child twice.
    shared = _is_in_foreground()
    # On macOS, which has no `prctl`, the child outlives a SIGKILL of this process.
    prctl, this_process = getattr(ctypes.CDLL(None), "prctl", None), os.getpid()

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # SIGKILL is also forwarded
        if os.getppid() != this_process:
            os._exit(128 + signal.SIGKILL)
        if not shared:
            os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        process = subprocess.Popen(  # noqa: S603  # the user's command
            command,
            env=inherited | variables,
            close_fds=False,  # the command needs those of a shell's <(...); Python's own are not inherited
            preexec_fn=prepare,  # noqa: PLW1509  # there are no threads
        )
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    while process.poll() is None:
        number, from_terminal = _next_signal(waited_for)
        # A signal from a key on the terminal has also reached the child.
        if number != signal.SIGCHLD and not (shared and from_terminal):
            process.send_signal(number)
    code = process.returncode
    return code if code >= 0 else 128 - code


def _next_signal(waited_for: set[signal.Signals]) -> tuple[int, bool]:
    """Wait for a signal, and return its number, and whether it came from a key on the terminal, if there is one."""
    if hasattr(signal, "sigwaitinfo"):
        received = signal.sigwaitinfo(waited_for)
        return received.si_signo, received.si_code == _FROM_KERNEL
    number = signal.sigwait(waited_for)  # on macOS, which does not report the sender
    return number, number in _FROM_KEYS


def _is_in_foreground() -> bool:
    """Return whether this process may read from a terminal, and receives its Ctrl-C."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _pair(option: str, given: str, expected: str) -> tuple[str, str]:
    name, separator, path = given.partition("=")
    if not (separator and name.strip() and path.strip()):
        raise TrackingError(f"Received {option} {shown_value(given)}. Expected {expected}.")
    if is_url(path):
        return name, _valid_url(path)
    local = os.path.abspath(local_path(path))
    try:
        problem = "" if is_there(local) else "there is nothing at"
    except OSError as error:  # the mount's server is gone, or this user may not search the directory
        problem = f"{error.strerror} at"
    if problem:
        raise TrackingError(
            f"Received {option} {shown_path(given)}, and {problem} {shown_path(local)}. Expected {expected}: "
            f"correct the path, or put there what it names."
        )
    return name, local


def _valid_url(url: str) -> str:
    """Return `url` with its user info, which the command needs; raise if the URL is malformed."""
    locate(url)
    return url
