"""Flush files and directories to disk, create directories durably, and return the free space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__: list[str] = []

# The errors that mean too little room: on the disk, in the user's quota, or by a limit on the size of a file.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# The errors of file systems that cannot flush in this way, such as network and FUSE mounts.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENODEV}


def flush(descriptor: int) -> None:
    """Flush what was written to `descriptor` to disk.

    On macOS, ``fsync`` flushes only to the disk's own cache, which a power cut empties. ``F_FULLFSYNC`` of ``fcntl(2)``
    also flushes that cache, on the file systems that support it.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _CANNOT_FLUSH:
                raise
        else:
            return
    os.fsync(descriptor)


def checked_file(path: str) -> int:
    """Return an open descriptor of the file `path`.

    Raises:
        TrackingError: there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise nothing_written(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TrackingError(f"Received something other than a file at {shown_path(path)}. Expected one file.")
    return descriptor


def nothing_written(path: str) -> TrackingError:
    """Return the error for a `with` block that wrote no file to `path`."""
    return TrackingError(
        f"Received nothing to save: no file was written to {shown_path(path)}. Expected the block of the `with` "
        f"statement to write one file to the path that the statement gives."
    )


def sync_file(path: str) -> None:
    """Flush the content of the file `path` to disk.

    Raises:
        TrackingError: there is no such file.
    """
    descriptor = checked_file(path)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def is_there(path: str) -> bool:
    """Return whether there is a file or directory `path`.

    Raises:
        OSError: it cannot be known, for example because the server of a mount is gone. ``os.path.exists`` would return
            ``False``.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError if a name holds a NUL
        return False
    return True


def is_directory(path: str) -> bool:
    """Return whether `path` is a directory; raise the same errors as `is_there`."""
    return is_there(path) and stat.S_ISDIR(os.stat(path).st_mode)


def is_empty(path: str) -> bool:
    """Return whether `path` is an empty directory, or a file of 0 bytes."""
    if os.path.isfile(path):
        return not os.path.getsize(path)
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except OSError:  # this user may open the files in it, but not list them
        return False


def file_in_place_of(directory: str) -> str | None:
    """Return `directory` or a parent of it if that is a file, so that the directory cannot be created."""
    while not is_there(directory):
        directory = os.path.dirname(directory)
    return None if is_directory(directory) else directory


def free_bytes(directory: str) -> int:
    """Return how many bytes this user may still write to the file system of `directory`."""
    while not is_directory(directory):
        directory = os.path.dirname(directory)
    return shutil.disk_usage(directory).free


def sync_directory(directory: str) -> None:
    """Flush the names in `directory` to disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flush(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush a directory: there is nothing to flush.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def make_directory(directory: str) -> None:
    """Create `directory` and its missing parents, durably."""
    if is_directory(directory):
        return
    parent = os.path.dirname(directory)
    if parent != directory:
        make_directory(parent)
    with contextlib.suppress(FileExistsError):  # another process has created it
        os.mkdir(directory)
    if not is_directory(directory):
        raise NotADirectoryError(errno.ENOTDIR, "Expected a directory, but there is a file of this name", directory)
    sync_directory(parent)


def statuses(path: str | None) -> Iterator[os.stat_result]:
    """Yield the status of the file `path`, or of each file in the directory `path`; nothing if it no longer exists."""
    if path is None:
        return
    names = [os.path.join(directory, name) for directory, _, found in os.walk(path) for name in found]
    for name in names if os.path.isdir(path) else [path]:
        with contextlib.suppress(OSError):
            yield os.lstat(name)


def bytes_taken(path: str | None) -> int:
    """Return how many bytes the file `path`, or all files in the directory `path`, take on disk."""
    return sum(status.st_blocks * 512 for status in statuses(path))  # always in units of 512 bytes; see stat(2)
