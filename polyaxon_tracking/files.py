"""Files that are complete on disk or absent, whatever happens while they are written.

A file is written to a hidden staging directory beside its target (so on the same file system), made durable with
``fsync``, renamed over the target with ``os.replace``, and the directory entry made durable too. A kill, a full disk
or a power cut at any point leaves either the old file or the new one. See ``fsync(2)`` and ``rename(2)``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["atomic_write"]

_STAGING = ".staging-"
_LOCK = ".lock"

_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[str]:
    """Write a file that is complete at `path` when the block ends, or not there at all.

    The block writes to the path that it is given, which has the same name in a hidden directory beside `path`. When it
    ends, the file is on disk under `path`, in place of what was there; when it raises, `path` is as it was.

    Args:
        path: the file to write, on a local file system; missing directories are made. A symbolic link is replaced, not
            written through.

    Raises:
        TrackingError: the block wrote no file.
        OSError: writing failed, at whatever call; the message says how much was needed and how much is free.

    Examples:
        >>> with atomic_write("model.txt") as staged:
        ...     _ = Path(staged).write_text("weights")
        >>> Path("model.txt").read_text()
        'weights'
    """
    path = os.path.abspath(path)
    with staged_file(path) as staged:
        yield staged
        sync_file(staged)
        publish(staged, path)


@contextlib.contextmanager
def staged_file(path: str) -> Iterator[str]:
    """Where to write what will be moved to `path`; an error in the block or before says that `path` is as it was."""
    with contextlib.ExitStack() as stack:
        with _explained(path):
            directory = stack.enter_context(staging(os.path.dirname(path)))
        staged = os.path.join(directory, os.path.basename(path))
        with _explained(path, staged):
            yield staged


@contextlib.contextmanager
def staging(directory: str) -> Iterator[str]:
    """A hidden directory inside `directory` to write in, gone afterwards; those of killed processes are swept first."""
    make_directory(directory)
    _sweep(directory)
    staged, lock = _create_staging(directory)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # litter at most, and the next start sweeps it
        os.close(lock)


def publish(staged: str, path: str) -> None:
    """Move the file `staged`, whose content is on disk, to `path` in the same file system, durably."""
    os.replace(staged, path)
    sync_directory(os.path.dirname(path))


def sync_file(path: str) -> None:
    """Return when the content of the file `path` is on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise TrackingError(
            f"Received nothing to save: no file was written to {shown(path)}. Expected the block of the `with` "
            f"statement to write one file to the path that the statement gives."
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise TrackingError(f"Received something other than a file at {shown(path)}. Expected one file.")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: str) -> None:
    """Return when the names in `directory` are on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems have no fsync of a directory and say so with EINVAL: nothing to wait for.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def make_directory(directory: str) -> None:
    """Make `directory` and what is missing above it, durably."""
    if os.path.isdir(directory):
        return
    parent = os.path.dirname(directory)
    if parent != directory:
        make_directory(parent)
    with contextlib.suppress(FileExistsError):  # another process was quicker
        os.mkdir(directory)
    if not os.path.isdir(directory):
        raise NotADirectoryError(errno.ENOTDIR, "Expected a directory, but there is a file of this name", directory)
    sync_directory(parent)


@contextlib.contextmanager
def _explained(path: str, staged: str | None = None) -> Iterator[None]:
    """Add to an error in writing `staged` what a reader of the log needs: which file, its size and the free space."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        written, free = _size(staged), _free_bytes(os.path.dirname(path))
        cause = error if isinstance(error, OSError) else None
        if cause is None or not cause.errno:
            # torch and HDF5 tell of a write that failed without the reason. Another write to the file finds it.
            cause = _refusal(staged) or cause
        if cause is None:
            raise
        needed = f"It needs more than {written:,} bytes, " if written else ""
        raise OSError(
            cause.errno or errno.EIO,
            f"{path} was not saved, and what was there before is untouched: {cause.strerror or cause}. {needed}"
            f"{free:,} bytes are free on its file system",
        ) from error


def _refusal(path: str | None) -> OSError | None:
    """Why the file `path` takes no more bytes, or ``None`` where it does, or does not exist."""
    if path is None:
        return None
    try:
        with open(path, "ab", buffering=0) as file:
            file.writelines([bytes(_PROBE_BYTES)] * 2)  # a nearly full disk takes a part of the first
            os.fsync(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _free_bytes(directory: str) -> int:
    """Bytes that this user may still write on the file system of `directory`."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _size(path: str | None) -> int:
    try:
        return os.lstat(path).st_size if path else 0
    except OSError:
        return 0


def _create_staging(directory: str) -> tuple[str, int]:
    while True:
        staged = os.path.join(directory, _STAGING + secrets.token_hex(8))
        try:
            os.mkdir(staged, 0o700)
            lock = os.open(os.path.join(staged, _LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except (FileExistsError, FileNotFoundError):
            continue  # the name was taken, or another process swept the directory before it was locked
        with contextlib.suppress(BlockingIOError):  # another process holds the lock, so it is sweeping the directory
            _lock(lock)
            if os.fstat(lock).st_nlink:
                return staged, lock
        os.close(lock)  # swept before it was locked


def _sweep(directory: str) -> None:
    """Remove the staging directories whose process is gone; a process holds a lock on its own until it ends."""
    with os.scandir(directory) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(_STAGING)]
    for staged in found:
        try:
            lock = os.open(os.path.join(staged, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            with contextlib.suppress(OSError):  # killed before it made its lock; not empty means that it lives
                os.rmdir(staged)
            continue
        try:
            with contextlib.suppress(BlockingIOError):  # its process lives
                if _lock(lock):
                    shutil.rmtree(staged, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(descriptor: int) -> bool:
    """Whether this process now holds the lock; not where the file system has no locks (some network mounts).

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
