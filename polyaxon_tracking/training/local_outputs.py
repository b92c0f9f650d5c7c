"""The outputs of each start off the cluster: the directories ``version_0``, ``version_1`` and so on."""

from __future__ import annotations

import contextlib
import os
import re
import threading

from polyaxon_tracking.storage.disk import make_directory
from polyaxon_tracking.storage.locks import boot_id

__all__ = ["LOCAL_OUTPUTS", "is_restarted", "newest_with_checkpoints", "version_of_this_start", "versions"]

LOCAL_OUTPUTS = "outputs"

_VERSION = re.compile(r"version_(0|[1-9]\d*)")

# The directory with a link for each start: the name of the process that started it, to the name of its version. The
# links point to nothing, so that TensorBoard does not follow them and show each curve twice.
_STARTS = ".starts"

# The numbers of ranks that torchrun, Lightning, Slurm's srun, Open MPI and MPICH set for each rank that they start.
_WORLD_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
_TORCHRUN_RESTARTS = "TORCHELASTIC_RESTART_COUNT"

# The version of this process, by the directory with the versions.
_of_this_process: dict[str, str] = {}
_lock = threading.Lock()  # trials may run in threads


def version_of_this_start(outputs: str, *, resume: bool) -> str:
    """Return the path of this start's version, a directory in `outputs`, and create the directory.

    A start is one process, with the processes that it starts through `multiprocessing`, or the ranks that a launcher
    starts together on this machine, also when `torchrun` starts them again. If `resume` is true, the start uses the
    newest version with checkpoints, or the newest version if none has any. Otherwise the start uses a new version. The
    first call decides for all later calls of the start.

    Raises:
        OSError: a directory cannot be created. Or, in a rank, the file system has no symbolic links.
    """
    with _lock:
        if outputs not in _of_this_process:
            make_directory(os.path.join(outputs, _STARTS))
            _of_this_process[outputs] = os.path.join(outputs, _find_or_make(outputs, resume=resume))
        return _of_this_process[outputs]


def newest_with_checkpoints(outputs: str) -> str | None:
    """Return the name of the newest version in `outputs` that holds checkpoints, or None."""
    names = versions(os.listdir(outputs))
    return next((name for name in names if _holds_files(os.path.join(outputs, name, "checkpoints"))), None)


def _holds_files(directory: str) -> bool:
    for _, below, files in os.walk(directory):
        if files:
            return True
        below[:] = [name for name in below if not name.startswith(".")]  # staging directories
    return False


def versions(names: list[str]) -> list[str]:
    """Return those of `names` that are names of versions, the newest first."""
    return sorted(filter(_VERSION.fullmatch, names), key=_number, reverse=True)


def is_restarted() -> bool:
    """Return whether `torchrun` has started this rank again, because a rank had failed."""
    return os.environ.get(_TORCHRUN_RESTARTS, "0") != "0"


def _newest(outputs: str) -> str | None:
    return next(iter(versions(os.listdir(outputs))), None)


def _number(version: str) -> int:
    return int(version.rpartition("_")[2])


def _find_or_make(outputs: str, *, resume: bool) -> str:
    launcher = _launcher()
    link = os.path.join(outputs, _STARTS, _process_name(os.getpid() if launcher is None else launcher))
    if launcher is None:
        with contextlib.suppress(OSError):
            os.unlink(link)  # the link of an earlier process with this id, if their starts are not known
    while True:
        if launcher is not None:
            with contextlib.suppress(FileNotFoundError):
                return os.readlink(link)
        existing = (newest_with_checkpoints(outputs) or _newest(outputs)) if resume else None
        version = existing or _make(outputs)
        try:
            os.symlink(version, link)
        except FileExistsError:  # another rank was first
            if existing is None:
                with contextlib.suppress(OSError):  # another start with `resume` already uses the empty directory
                    os.rmdir(os.path.join(outputs, version))
        except OSError:
            if launcher is not None:
                raise
            return version  # only ranks need the link
        else:
            return version


def _make(outputs: str) -> str:
    while True:
        newest = _newest(outputs)
        version = f"version_{0 if newest is None else _number(newest) + 1}"
        with contextlib.suppress(FileExistsError):  # another start was first
            os.mkdir(os.path.join(outputs, version))
            return version


def _launcher() -> int | None:
    """Return the id of the process that has started this process as a rank, or None if this process is no rank."""
    from multiprocessing import parent_process  # here and not above: getters and loops of one's own do not need it

    if parent := parent_process():
        return parent.pid
    # The parent is 0 if it is outside of this process's container.
    if _TORCHRUN_ID in os.environ or any(os.environ.get(name, "1") not in {"0", "1"} for name in _WORLD_SIZES):
        return os.getppid() or None
    return None


def _process_name(pid: int) -> str:
    """Return a name that no other process has, on any machine; the same as another's only if ``/proc`` is hidden."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            started = file.read().rpartition(")")[2].split()[19]  # see proc_pid_stat(5)
    except OSError:  # the process belongs to another user, as that of Slurm may, and ``/proc`` hides it
        started = ""
    return f"{boot_id() or ''}-{pid}-{started}"
