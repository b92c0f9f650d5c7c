"""Staging directories: hidden directories for unfinished files, each with a lock that ends with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import sys

from polyaxon_tracking.storage.disk import make_directory, statuses

__all__: list[str] = []

STAGING = ".staging-"
LOCK = ".lock"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"

# A staging directory to which another machine has not written for this long is abandoned. A bucket mount may show a
# write 15 minutes late, and nothing is written while the CRC-32 of a large checkpoint is computed.
ABANDONED_SECONDS = 3600.0


class StagingDirectory:
    """A new staging directory inside `directory`. First, those that are abandoned are removed.

    As a context manager, it gives its path and is removed at the end of the block.
    """

    def __init__(self, directory: str) -> None:
        make_directory(directory)
        others = sweep(directory)  # before anything is written, because this may free the room for it
        self.path, lock = _create_staging(directory)
        self._lock: int | None = lock
        try:
            for other in others:
                if _is_abandoned(other, now=os.fstat(lock).st_mtime):
                    _remove_unlocked(other, abandoned=True)
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the directory and all files in it, from any thread. Calling this method again does nothing."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        # Close the lock first: SMB, NFS and FUSE cannot remove the directory of an open file. The lock file holds
        # nothing that could be lost, so an error of a mount whose server is gone does not matter.
        with contextlib.suppress(OSError):
            os.close(lock)
        remove_tree(self.path)  # if this fails, the next start removes the directory


def sweep_below(directory: str) -> None:
    """Remove staging directories that killed processes left in or below `directory`, if this user may."""
    for parent, names, _ in os.walk(directory):
        found = {name for name in names if name.startswith(STAGING)}
        names[:] = [name for name in names if name not in found]
        if found:
            with contextlib.suppress(OSError), StagingDirectory(parent):
                pass


def was_removed(directory: str) -> bool:
    """Return whether the staging directory `directory` has been removed, or is being removed."""
    try:
        os.lstat(os.path.join(directory, LOCK))
    except FileNotFoundError:
        return os.path.basename(directory).startswith(STAGING)
    except OSError:
        pass  # another problem with the mount
    return False


def _create_staging(directory: str) -> tuple[str, int]:
    while True:
        staged = os.path.join(directory, f"{STAGING}{_owner(directory)}-{secrets.token_hex(8)}")
        os.mkdir(staged, 0o700)
        try:
            lock = os.open(os.path.join(staged, LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # another process removed the directory before it was locked
        is_own = False
        try:
            lock_file(lock)
            is_own = not os.fstat(lock).st_size
        except BlockingIOError:
            pass  # another process holds the lock, so it is removing the directory
        finally:
            if not is_own:
                os.close(lock)
        if is_own:
            return staged, lock


def boot_id() -> str | None:
    """Return an identifier of the kernel's boot, or None if the system does not tell."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return file.read().replace("-", "")[:16]
    except OSError:
        return None


def _owner(directory: str) -> str:
    """Return an identifier of the kernel's boot and of the mounted device through which this process writes."""
    boot = boot_id() or secrets.token_hex(8)  # a random identifier equals no other
    device = os.stat(directory).st_dev
    return f"{boot}-{os.major(device)}.{os.minor(device)}"


def _has_same_locks(name: str, owner: str) -> bool:
    """Return whether `owner` sees the lock that the creator of the staging directory `name` holds while it runs.

    NFS and FUSE may keep locks local to one mount in one kernel. A disk (whose device has a major number) belongs to
    one machine at a time. So if a staging directory on a disk has another owner, it is from an earlier boot, or from
    before the disk was moved.
    """
    made_by = name.removeprefix(STAGING).rpartition("-")[0]
    return made_by == owner or (_is_on_disk(made_by) and _is_on_disk(owner))


def _is_on_disk(owner: str) -> bool:
    major, _, minor = owner.rpartition("-")[2].partition(".")
    # On Linux, network mounts have the major number 0. On macOS they have other numbers, and disks have 1.
    return bool(minor) and (major == "1" if sys.platform == "darwin" else major != "0")


def sweep(directory: str) -> list[str]:
    """Remove the staging directories of processes that are known to have ended, and return those that remain."""
    with os.scandir(directory) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(STAGING)]
    owner = _owner(directory) if found else ""
    for staged in found:
        if _has_same_locks(os.path.basename(staged), owner):
            _remove_unlocked(staged)
    return [staged for staged in found if os.path.lexists(staged)]


def _is_abandoned(staged: str, *, now: float) -> bool:
    """Return whether nothing in `staged` was written for `ABANDONED_SECONDS`; `now` is by the file system's clock."""
    try:
        written = [status.st_mtime for status in statuses(staged)] or [os.lstat(staged).st_mtime]
    except FileNotFoundError:
        return False  # another process has removed it
    return now - max(written) > ABANDONED_SECONDS


def _remove_unlocked(staged: str, *, abandoned: bool = False) -> None:
    """Remove `staged` unless a process holds its lock; on a file system without locks, only if it is `abandoned`."""
    is_removable = abandoned
    try:
        lock = os.open(os.path.join(staged, LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        # Its process was killed before the lock was made, or still runs and then makes another directory.
        with contextlib.suppress(OSError):
            os.rmdir(staged)
    else:
        try:
            is_removable = lock_file(lock) or abandoned
            if is_removable:
                os.ftruncate(lock, 1)  # a process that takes this lock later then makes another directory
        except OSError:  # a process holds the lock, or this user may not write here
            is_removable = False
        finally:
            os.close(lock)
    if is_removable:
        remove_tree(staged)


def remove_tree(directory: str) -> None:
    """Remove `directory`, and its lock last, because one with files and without a lock looks as if it were in use."""
    with contextlib.suppress(OSError):  # another process removes it too, or this user may not
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif name != LOCK:
                os.unlink(path)
        shutil.rmtree(directory)


def lock_file(descriptor: int, operation: int = fcntl.LOCK_EX) -> bool:
    """Lock the file and return whether this process holds the lock; False on network mounts that have no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
