"""Where files are written on their way: hidden directories, each with a lock that ends with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from polyaxon_tracking.storage.disk import make_directory, statuses

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__: list[str] = []

STAGING = ".staging-"
_LOCK = ".lock"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"

# What another machine has not written to for so long is litter. Mounts of buckets may show a write 15 minutes late, and
# of a large checkpoint nothing is written while its CRC-32 is computed.
ABANDONED_SECONDS = 3600.0


@contextlib.contextmanager
def staging(directory: str) -> Iterator[str]:
    """Give a hidden directory inside `directory` to write in, and remove it afterwards; remove others' litter first."""
    make_directory(directory)
    others = sweep(directory)  # before anything is written: it may make the room
    staged, lock = _create_staging(directory)
    try:
        for other in others:
            if _is_abandoned(other, now=os.fstat(lock).st_mtime):
                _remove_unlocked(other, abandoned=True)
        yield staged
    finally:
        # SMB, NFS and FUSE keep the name of a file that is removed while it is open, and so the directory.
        try:
            os.close(lock)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # litter at most, and the next start sweeps it


def sweep_below(directory: str) -> None:
    """Remove what killed processes left in `directory` and the directories below it, where this user may."""
    for parent, names, _ in os.walk(directory):
        found = {name for name in names if name.startswith(STAGING)}
        names[:] = [name for name in names if name not in found]
        if found:
            with contextlib.suppress(OSError), staging(parent):
                pass


def was_removed(directory: str) -> bool:
    """Return whether the staging directory `directory` has gone, or is being removed."""
    try:
        os.lstat(os.path.join(directory, _LOCK))
    except FileNotFoundError:
        return os.path.basename(directory).startswith(STAGING)
    except OSError:
        pass  # of a mount that has other troubles
    return False


def _create_staging(directory: str) -> tuple[str, int]:
    while True:
        staged = os.path.join(directory, f"{STAGING}{_owner(directory)}-{secrets.token_hex(8)}")
        os.mkdir(staged, 0o700)
        try:
            lock = os.open(os.path.join(staged, _LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # another process swept the directory before it was locked
        is_own = False
        try:
            lock_file(lock)
            is_own = not os.fstat(lock).st_size
        except BlockingIOError:
            pass  # another process holds the lock, so it is sweeping the directory
        finally:
            if not is_own:
                os.close(lock)
        if is_own:
            return staged, lock


def _owner(directory: str) -> str:
    """Return the kernel (its boot) and the mount (its device) through which this process writes to `directory`."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            boot = file.read().replace("-", "")[:16]
    except OSError:
        boot = secrets.token_hex(8)  # nobody else's
    device = os.stat(directory).st_dev
    return f"{boot}-{os.major(device)}.{os.minor(device)}"


def _has_same_locks(name: str, owner: str) -> bool:
    """Return whether `owner` sees the lock that the maker of the staging directory `name` holds, while it lives.

    NFS and FUSE may keep locks to one mount in one kernel. A disk is of one machine at a time: so what was made on a
    disk (whose device has a major number), and is on one, was made before a new boot, or before the disk was moved.
    """
    made_by = name.removeprefix(STAGING).rpartition("-")[0]
    return made_by == owner or (_is_on_disk(made_by) and _is_on_disk(owner))


def _is_on_disk(owner: str) -> bool:
    major, _, minor = owner.rpartition("-")[2].partition(".")
    return bool(minor) and major != "0"


def sweep(directory: str) -> list[str]:
    """Remove the staging directories of processes that are known to be gone, and return those that remain."""
    with os.scandir(directory) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(STAGING)]
    owner = _owner(directory) if found else ""
    for staged in found:
        if _has_same_locks(os.path.basename(staged), owner):
            _remove_unlocked(staged)
    return [staged for staged in found if os.path.lexists(staged)]


def _is_abandoned(staged: str, *, now: float) -> bool:
    """Return whether nothing in `staged` was written for long; `now` is a time of the file system's own clock."""
    try:
        written = [status.st_mtime for status in statuses(staged)] or [os.lstat(staged).st_mtime]
    except FileNotFoundError:
        return False  # another process was quicker
    return now - max(written) > ABANDONED_SECONDS


def _remove_unlocked(staged: str, *, abandoned: bool = False) -> None:
    """Remove `staged` unless a process holds its lock; where there are no locks, only if it is `abandoned`."""
    is_litter = abandoned
    try:
        lock = os.open(os.path.join(staged, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        with contextlib.suppress(OSError):  # killed before it made its lock; a process that lives makes another
            os.rmdir(staged)
    else:
        try:
            is_litter = lock_file(lock) or abandoned
            if is_litter:
                os.ftruncate(lock, 1)  # so that a process which takes the lock from now on makes another
        except OSError:  # a process holds the lock, or nothing may be written here
            is_litter = False
        finally:
            os.close(lock)
    if is_litter:
        shutil.rmtree(staged, ignore_errors=True)


def lock_file(descriptor: int, operation: int = fcntl.LOCK_EX) -> bool:
    """Return whether this process now holds the lock; not where the file system has no locks (some network mounts).

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
