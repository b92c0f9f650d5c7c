"""Add to the error of a failed write which file was not saved, why, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.storage.disk import NO_ROOM, bytes_taken, flush, free_bytes, statuses
from polyaxon_tracking.storage.locks import ABANDONED_SECONDS, STAGING, was_removed
from polyaxon_tracking.urls import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__: list[str] = []

_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def explained(path: str, staged: str | None = None) -> Iterator[None]:
    """Add to an error while writing `staged` the file that was not saved and, if room is the cause, the free bytes."""
    try:
        yield
    except (OSError, RuntimeError, TrackingError) as error:
        if staged is not None and was_removed(directory := os.path.dirname(staged)):
            raise FileNotFoundError(
                errno.ENOENT,
                f"{path} was not saved, and no existing file was changed: the directory {directory}, where it "
                f"was being written, was removed meanwhile, and not by this process. A training on another machine "
                f"removes what nobody has written to for {ABANDONED_SECONDS / 60:.0f} minutes, and a job that cleans "
                f"up may do so at any time. Give each training its own outputs path, and keep such jobs away "
                f"from {STAGING}*",
            ) from error
        # The message of such an error already says everything.
        if isinstance(error, TrackingError) or is_url(str(getattr(error, "filename", ""))):
            raise
        try:
            room = _room(path, staged)  # before `_error_of_another_write` writes more bytes
        except OSError:  # the mount's server is gone, so the room is not the cause
            room = ""
        cause = error if isinstance(error, OSError) else None
        if cause is None or not cause.errno:
            # torch and HDF5 report a failed write without its reason. Another write to the file finds the reason.
            cause = _error_of_another_write(staged) or cause
        if cause is None:
            raise
        raise OSError(
            cause.errno or errno.EIO,
            f"{path} was not saved, and no existing file was changed: {cause.strerror or cause}"
            f"{room if cause.errno in NO_ROOM else ''}",
        ) from error


def _room(path: str, staged: str | None) -> str:
    """Return a text with the room that `path` needs, judged by the bytes written to `staged`, and the free bytes."""
    written = sum(status.st_size for status in statuses(staged))
    needed = f"It needs more than {written:,} bytes, " if written else ""
    directory = os.path.dirname(staged or path)
    free = free_bytes(directory) + bytes_taken(staged)
    room = f". {needed}{free:,} bytes are free {'in TMPDIR' if is_url(path) else 'on its file system'}"
    parent, name = os.path.split(directory)
    others = [
        f"{other} ({taken:,} bytes)"
        for other in (sorted(os.listdir(parent)) if name.startswith(STAGING) else ())
        if other.startswith(STAGING) and other != name and (taken := bytes_taken(os.path.join(parent, other)))
    ]
    if others:  # they are hidden, so the user may not know what a killed pod left
        room += f". Saves that are not finished, or were killed, take room there: {', '.join(others)}"
    return room


def _error_of_another_write(path: str | None) -> OSError | None:
    """Return the error of another write to the file `path`, or ``None`` if that succeeds or there is no file."""
    if path is None:
        return None
    try:
        if os.path.isdir(path):
            path = os.path.join(path, ".probe")
        with open(path, "ab", buffering=0) as file:
            file.writelines([bytes(_PROBE_BYTES)] * 2)  # two, because a nearly full disk accepts a part of the first
            flush(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None
