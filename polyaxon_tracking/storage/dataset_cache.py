"""Local copies of datasets in stores: downloaded once per machine, and kept for the next start."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
from typing import NamedTuple

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.credentials import locate
from polyaxon_tracking.storage.disk import NO_ROOM, bytes_taken, free_bytes, statuses
from polyaxon_tracking.storage.download_cache import workspace
from polyaxon_tracking.storage.locks import lock_file
from polyaxon_tracking.storage.shared_copies import hold, is_held, remove_unused
from polyaxon_tracking.storage.transfer import Listing, StoredFile, download_files, listing

__all__ = ["DATA_CACHE", "CachedDataset", "cache_directory", "cached_datasets", "local_copy", "remove"]

_logger = logging.getLogger("polyaxon_tracking")

DATA_CACHE = "POLYAXON_DATA_CACHE"

# In the directory of a copy: what there is to download.
_INDEX = "index.json"

# How often a dataset may change while it is downloaded.
_ATTEMPTS = 3

# The locks of this process, by the directory that each keeps from being removed, and the process that took it.
_held: dict[str, tuple[int, int]] = {}


class CachedDataset(NamedTuple):
    """A copy of a dataset in the cache."""

    url: str
    """The URL of the dataset, without secrets."""
    path: str
    """The path of the local copy."""
    directory: str
    """The directory of the copy, with its index and its lock."""
    files: int
    """The number of the dataset's files."""
    downloaded: int
    """How many of them are downloaded."""
    size: int
    """The size of the downloaded files, in bytes."""
    last_used: float
    """When a process last asked for it, in seconds since 1970."""
    in_use: bool
    """Whether a process holds it, so that it cannot be removed."""


def cache_directory() -> str:
    """Return the directory of all copies: ``POLYAXON_DATA_CACHE``, or this user's own directory in ``$TMPDIR``.

    Raises:
        TrackingError: the variable is not a local path, or the directory belongs to another user.
    """
    given = os.environ.get(DATA_CACHE, "").strip()
    if "://" in given:
        raise TrackingError(
            f"{DATA_CACHE} was received as {shown_path(given)}. Expected a directory on this machine, with room for "
            f"the datasets. Correct the variable, or unset it to use $TMPDIR."
        )
    return os.path.abspath(os.path.expanduser(given)) if given else os.path.join(workspace(), "datasets")


def local_copy(url: str) -> str:
    """Return the path of a local copy of the object `url`, or of a directory with all objects below `url`.

    All processes of the machine share the copy: one downloads it, and the others wait. The next start downloads only
    the files that have changed. This process keeps the copy from being removed until it ends.

    Raises:
        FileNotFoundError: there is no such object, and none below.
        TrackingError: the disk has no room for the copy, the dataset changes again and again, an object's name cannot
            be that of a file, or the cache's directory has no file locks or cannot be written to.
        OSError: the store does not respond, or a file does not have the size or the MD5 that the store tells.
    """
    place, query = locate(url).url, locate(url).query
    dataset = os.path.join(_checked_cache(), f"{os.path.basename(place)[:100]}-{_digest(place + query)}")
    found = listing(url)
    for _ in range(_ATTEMPTS):
        copy = _Copy(os.path.join(dataset, _digest(repr([file[:4] for file in found.files]))), place, found)
        try:
            now = listing(url) if _hold_complete(copy, url) else found
        except OSError as error:
            if error.errno in NO_ROOM:
                raise _no_room(copy) from None
            now = listing(url)
            if now == found:
                raise
        if now == found:
            _logger.info("The local copy of %s is %s", place, copy.path)
            return copy.path
        _logger.warning("%s has changed while it was downloaded. Downloading what has changed", place)
        found = now
    raise TrackingError(
        f"Received the dataset {shown_path(place)}, which changed {_ATTEMPTS} times while it was downloaded. Expected "
        f"a dataset to which nobody writes. Wait until it is complete, or pass download=False to read from its URL."
    )


def cached_datasets() -> list[CachedDataset]:
    """Return the datasets in the cache, the last used first."""
    found = []
    for dataset in _directories(cache_directory()):
        for version in _directories(dataset):
            with contextlib.suppress(FileNotFoundError):  # another process removes it, or has only just created it
                found.append(_described(version))
    return sorted(found, key=lambda one: -one.last_used)


def remove(dataset: CachedDataset) -> bool:
    """Remove `dataset` from the cache unless a process uses it, and return whether it was removed."""
    return _remove(dataset.directory)


class _Copy(NamedTuple):
    """A local copy of one version of a dataset."""

    directory: str
    """The directory of the copy, with its index and its lock."""
    url: str
    """The URL of the dataset, without secrets."""
    found: Listing
    """What there is at the URL."""

    @property
    def root(self) -> str:
        """The directory of the files."""
        files = os.path.join(self.directory, "files")
        return os.path.join(files, os.path.basename(self.url)) if self.found.is_directory else files

    @property
    def path(self) -> str:
        """The path of the copy: `root`, or the file in it if the URL is that of an object."""
        return self.root if self.found.is_directory else os.path.join(self.root, self.found.files[0].name)

    def missing(self) -> list[StoredFile]:
        """Return the files that are not there, or not with the size that the store tells."""
        return [file for file in self.found.files if not _is_there(os.path.join(self.root, file.name), file.size)]


def _is_there(path: str, size: int | None) -> bool:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return size in (None, status.st_size)


def _hold_complete(copy: _Copy, url: str) -> bool:
    """Complete `copy` and keep it from being removed; return whether this process has downloaded."""
    has_downloaded = False

    def fill() -> None:
        nonlocal has_downloaded
        has_downloaded = True
        _write_index(copy)
        _take_over(copy)
        missing = copy.missing()
        os.makedirs(copy.root, exist_ok=True)
        if sum(file.size or 0 for file in missing) - bytes_taken(f"{copy.root}.parts") > free_bytes(copy.root):
            raise _no_room(copy)
        download_files(url, missing, copy.root)

    lock = hold(copy.directory, lambda: not copy.missing(), fill, copy.url)
    os.utime(os.path.join(copy.directory, _INDEX))
    if _held.get(copy.directory, (0, 0))[1] == os.getpid():
        os.close(lock)  # this process already has one
    else:
        _held[copy.directory] = lock, os.getpid()
    return has_downloaded


def _take_over(copy: _Copy) -> None:
    """Take the files that have not changed from earlier versions of the dataset, and remove the versions not in use."""
    for directory in _directories(os.path.dirname(copy.directory)):
        if directory == copy.directory:
            continue
        with contextlib.suppress(FileNotFoundError):  # a process was killed before it wrote the index
            earlier = _read_copy(directory)
            known = {(file.name, file.size, file.version) for file in earlier.found.files}
            for file in copy.missing():
                if (file.name, file.size, file.version) in known:
                    _link(os.path.join(earlier.root, file.name), os.path.join(copy.root, file.name))
        _remove(directory)


def _link(file: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with contextlib.suppress(OSError):  # it was never downloaded, or the file system has no hard links
        os.link(file, target)


def _remove(directory: str) -> bool:
    is_removed = remove_unused(directory)
    with contextlib.suppress(OSError):  # there are other versions
        os.rmdir(os.path.dirname(directory))
    return is_removed


def _directories(parent: str) -> list[str]:
    return sorted(path for path in glob.glob(f"{glob.escape(parent)}/*") if os.path.isdir(path))


def _write_index(copy: _Copy) -> None:
    index = {
        "url": copy.url,
        "is_directory": copy.found.is_directory,
        "files": [[file.name, file.size, file.version] for file in copy.found.files],
    }
    path = os.path.join(copy.directory, _INDEX)
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(index, file)
    os.replace(f"{path}.new", path)


def _read_copy(directory: str) -> _Copy:
    """Return the copy in `directory`.

    Raises:
        FileNotFoundError: there is no index in it.
    """
    with open(os.path.join(directory, _INDEX), encoding="utf-8") as file:
        index = json.load(file)
    files = [StoredFile(name, "", size, version, None) for name, size, version in index["files"]]
    return _Copy(directory, index["url"], Listing(index["is_directory"], files))


def _described(directory: str) -> CachedDataset:
    copy = _read_copy(directory)
    return CachedDataset(
        url=copy.url,
        path=copy.path,
        directory=directory,
        files=len(copy.found.files),
        downloaded=len(copy.found.files) - len(copy.missing()),
        size=sum(status.st_size for status in statuses(copy.root)),
        last_used=os.stat(os.path.join(directory, _INDEX)).st_mtime,
        in_use=is_held(directory),
    )


def _checked_cache() -> str:
    """Return the directory of all copies, after creating it and locking a file in it.

    Raises:
        TrackingError: that is not possible.
    """
    directory = cache_directory()
    problem = "which has no file locks"
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(os.path.join(directory, ".lock"), "a", encoding="ascii") as file:
            if lock_file(file.fileno(), fcntl.LOCK_SH):
                return directory
    except OSError as error:
        problem = f"which cannot be written to: {error.strerror}"
    raise TrackingError(
        f"Received the directory {shown_path(directory)} for local copies of datasets, {problem}. Expected a "
        f"directory on a disk of this machine to which this user may write. Set {DATA_CACHE} to another one."
    )


def _no_room(copy: _Copy) -> TrackingError:
    size = sum(file.size or 0 for file in copy.missing())
    return TrackingError(
        f"Received the dataset {shown_path(copy.url)}, of which {size:,} bytes are to be downloaded to "
        f"{shown_path(cache_directory())}, where {free_bytes(copy.directory):,} bytes are free. Expected room for "
        f"them. Set {DATA_CACHE} to a directory on a larger disk, or see with `polyaxon-tracking datasets` what can be "
        f"removed."
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
