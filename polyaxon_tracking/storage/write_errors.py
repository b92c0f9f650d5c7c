"""Errors of a write say which file was not saved, why, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.storage.disk import free_bytes, statuses
from polyaxon_tracking.storage.locks import ABANDONED_SECONDS, STAGING, was_removed
from polyaxon_tracking.urls import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__: list[str] = []

_PROBE_BYTES = 1 << 20

# Of these errors alone, room is the reason: on the disk, of the user's quota, or up to a limit on the size of a file.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def explained(path: str, staged: str | None = None) -> Iterator[None]:
    """Add to an error in writing `staged` what a reader of the log needs: which file, and where it is so, the room."""
    try:
        yield
    except (OSError, RuntimeError, TrackingError) as error:
        if staged is not None and was_removed(directory := os.path.dirname(staged)):
            raise FileNotFoundError(
                errno.ENOENT,
                f"{path} was not saved, and what was there before is untouched: the directory {directory}, where it "
                f"was being written, was removed meanwhile, and not by this process. A training on another machine "
                f"removes what nobody has written to for {ABANDONED_SECONDS / 60:.0f} minutes, and a job that cleans "
                f"up may do so at any time. Give each training an outputs path of its own, and keep such jobs away "
                f"from {STAGING}*",
            ) from error
        if isinstance(error, TrackingError) or is_url(str(getattr(error, "filename", ""))):  # which say it all
            raise
        room = _room(path, staged)  # before the bytes of `_refusal`
        cause = error if isinstance(error, OSError) else None
        if cause is None or not cause.errno:
            # torch and HDF5 tell of a write that failed without the reason. Another write to the file finds it.
            cause = _refusal(staged) or cause
        if cause is None:
            raise
        raise OSError(
            cause.errno or errno.EIO,
            f"{path} was not saved, and what was there before is untouched: {cause.strerror or cause}"
            f"{room if cause.errno in _NO_ROOM else ''}",
        ) from error


def _room(path: str, staged: str | None) -> str:
    """Return how much room `path` needs, of which `staged` holds what was written so far, and how much there is."""
    written = sum(status.st_size for status in statuses(staged))
    needed = f"It needs more than {written:,} bytes, " if written else ""
    directory = os.path.dirname(staged or path)
    free = free_bytes(directory) + _bytes_taken(staged)
    room = f". {needed}{free:,} bytes are free {'in TMPDIR' if is_url(path) else 'on its file system'}"
    parent, name = os.path.split(directory)
    others = [
        f"{other} ({taken:,} bytes)"
        for other in (sorted(os.listdir(parent)) if name.startswith(STAGING) else ())
        if other.startswith(STAGING) and other != name and (taken := _bytes_taken(os.path.join(parent, other)))
    ]
    if others:  # they are hidden, and what a killed pod left nobody knows of
        room += f". Saves that are not finished, or were killed, take room there: {', '.join(others)}"
    return room


def _bytes_taken(path: str | None) -> int:
    return sum(status.st_blocks * 512 for status in statuses(path))  # whatever the file system; see stat(2)


def _refusal(path: str | None) -> OSError | None:
    """Why the file `path` takes no more bytes, or ``None`` where it does, or does not exist."""
    if path is None:
        return None
    try:
        if os.path.isdir(path):
            path = os.path.join(path, ".probe")
        with open(path, "ab", buffering=0) as file:
            file.writelines([bytes(_PROBE_BYTES)] * 2)  # a nearly full disk takes a part of the first
            os.fsync(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None
