"""Temporary copies of objects in stores: downloaded once per machine, and removed when no process needs them."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import logging
import os
import stat
import tempfile

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.progress import Progress
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage import object_store
from polyaxon_tracking.storage.disk import free_bytes
from polyaxon_tracking.storage.locks import sweep
from polyaxon_tracking.storage.shared_copies import hold, remove_unused
from polyaxon_tracking.urls import is_url, local_path, path_text

__all__ = ["cached_path"]

_logger = logging.getLogger("polyaxon_tracking")

# The locks of this process, by the path of the local copy that each lock keeps from being removed.
_held: dict[str, _Hold] = {}


def cached_path(path: str | os.PathLike[str]) -> str:
    """Return the path of a local file with the content of `path`: `path` itself, or a local copy if `path` is a URL.

    The local copy is in this user's own directory in ``$TMPDIR``. All processes of the machine share the copy: the
    first process downloads it, and it is removed when the last process that uses it ends.

    Args:
        path: a local path, or the URL of an object.

    Raises:
        FileNotFoundError: there is no such object.
        TrackingError: the disk has no room for the copy, or `path` is empty or not a path.

    Examples:
        >>> cached_path("data/best.keras")
        'data/best.keras'
    """
    path = path_text(path, "path")
    if not is_url(path):
        return local_path(path)
    from polyaxon_tracking.storage.credentials import locate

    location = locate(path)
    information = object_store.information(path)
    identity = f"{location.url}{location.query} {information['size']} {object_store.content_version(information)}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    file = os.path.join(workspace(), f"copy-{key}", location.url.rpartition("/")[2])
    held = _held.get(file)
    if held is None or held.process != os.getpid():  # a forked process needs its own lock
        if not _held:
            atexit.register(_release_all)
        held = _held[file] = _Hold(_download_once(file, path, information["size"]), os.getpid())
    held.count += 1
    return file


def release(file: str) -> None:
    """Release `file`, which `cached_path` returned; the copy is removed when no process needs it any more."""
    held = _held.get(file)
    if held is None or held.process != os.getpid():  # a local file, or a copy that another process holds
        return
    held.count -= 1
    if not held.count:
        del _held[file]
        os.close(held.lock)
        remove_unused(os.path.dirname(file))


def workspace() -> str:
    """Return this user's own directory in ``$TMPDIR``, for files before an upload and after a download.

    Raises:
        TrackingError: the directory belongs to another user, or others may write to it.
    """
    directory = os.path.join(tempfile.gettempdir(), f"polyaxon-tracking-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise TrackingError(
            f"Received {directory}, to which other users may write. Expected a directory to which only this user may "
            f"write. Remove it, or set TMPDIR to another directory."
        )
    return directory


def _download_once(file: str, url: str, size: int) -> int:
    """Return a lock that keeps `file` from being removed, once one process has downloaded it; the others wait."""
    from polyaxon_tracking.storage.credentials import locate  # here and not above: only URLs need it

    def fill() -> None:
        _sweep()
        _download(url, file, size)

    directory = os.path.dirname(file)
    try:
        return hold(directory, lambda: os.path.exists(file), fill, locate(url).url)
    except BaseException:
        remove_unused(directory)
        raise


def _download(url: str, file: str, size: int) -> None:
    from polyaxon_tracking.storage.credentials import locate

    place = locate(url).url
    free = free_bytes(os.path.dirname(file))
    if size > free:
        raise TrackingError(
            f"Received {shown_path(place)} of {size:,} bytes to download to {workspace()}, where {free:,} bytes are "
            f"free. Expected room for it. Set TMPDIR to a directory on a larger disk."
        )
    part = f"{file}.part"
    try:
        with Progress(f"Downloading {place}", size) as progress:
            object_store.download(url, part, progress)
        if (received := os.path.getsize(part)) != size:
            raise OSError(errno.EIO, f"{place} was not downloaded whole: {received:,} of {size:,} bytes came")
        os.replace(part, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _sweep() -> None:
    """Remove the downloads, and the files to upload, that killed processes left."""
    sweep(workspace())
    with os.scandir(workspace()) as entries:
        found = [entry.path for entry in entries if entry.name.startswith("copy-")]
    for directory in found:
        remove_unused(directory)


def _release_all() -> None:
    for file, held in list(_held.items()):
        held.count = 1
        release(file)


class _Hold:
    def __init__(self, lock: int, process: int) -> None:
        self.lock = lock
        self.process = process
        self.count = 0
