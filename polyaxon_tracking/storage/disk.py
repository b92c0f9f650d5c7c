"""Flush files and directories to disk, create directories durably, and return the free space."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__: list[str] = []

# The errors that mean too little room: on the disk, in the user's quota, or by a limit on the size of a file.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
        os.fsync(descriptor)
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


def file_in_place_of(directory: str) -> str | None:
    """Return `directory` or a parent of it if that is a file, so that the directory cannot be created."""
    while not is_there(directory):
        directory = os.path.dirname(directory)
    return None if is_directory(directory) else directory


def free_bytes(directory: str) -> int:
    """Return how many bytes this user may still write to the file system of `directory`."""
    while not is_directory(directory):
        directory = os.path.dirname(directory)
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def sync_directory(directory: str) -> None:
    """Flush the names in `directory` to disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot fsync a directory, and report EINVAL: there is nothing to flush.
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
