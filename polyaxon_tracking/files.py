"""Files that are complete or absent, whatever happens while they are written.

A local file is written to a hidden staging directory beside its target (so on the same file system), made durable with
``fsync``, renamed over the target with ``os.replace``, and the directory entry made durable too. A kill, a full disk
or a power cut at any point leaves either the old file or the new one. See ``fsync(2)`` and ``rename(2)``. An object in
a store is written to ``$TMPDIR``, and uploaded when it is complete.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError, shown_path
from polyaxon_tracking.paths import is_url, local_path
from polyaxon_tracking.staging import ABANDONED_SECONDS, STAGING, staging, statuses, sync_directory, was_removed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Directory", "atomic_write", "open_directory"]

_PROBE_BYTES = 1 << 20

# Of these errors alone, room is the reason: on the disk, of the user's quota, or up to a limit on the size of a file.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[str]:
    """Write a file that is complete at `path` when the block ends, or not there at all.

    The block writes to the path that it is given, which has the same name in a hidden directory beside `path`. When it
    ends, the file is on disk under `path`, in place of what was there; when it raises, `path` is as it was.

    Args:
        path: the file to write; missing directories are made. A symbolic link is replaced, not written through. Where
            it is a URL, the file is written to ``$TMPDIR`` and uploaded as a whole.

    Raises:
        TrackingError: the block wrote no file.
        OSError: writing failed, at whatever call; where there was too little room, the message says how much is free.

    Examples:
        >>> with atomic_write("model.txt") as staged:
        ...     _ = Path(staged).write_text("weights")
        >>> Path("model.txt").read_text()
        'weights'
    """
    path = os.fspath(path)
    if not is_url(path):
        path = os.path.abspath(local_path(path))
    parent, _, name = path.rpartition("/")
    with open_directory(parent).write(name) as staged:
        yield staged


def open_directory(path: str | os.PathLike[str]) -> Directory:
    """The directory `path`, local or a URL, in which files are complete or absent.

    Raises:
        TrackingError: the URL is malformed.

    Examples:
        >>> directory = open_directory("outputs")
        >>> with directory.write("model.txt") as staged:
        ...     _ = Path(staged).write_text("weights")
        >>> directory.names(), Path(directory.fetch("model.txt")).read_text()
        (['model.txt'], 'weights')
    """
    path = os.fspath(path)
    if is_url(path):
        from polyaxon_tracking.remote import RemoteDirectory  # here and not above: it is for URLs alone

        return RemoteDirectory(path)
    return LocalDirectory(os.path.abspath(local_path(path)))


class Directory(abc.ABC):
    """A place for files, each complete or absent: the ground of what is written here, on disks and in stores.

    Errors of a disk or a store are an ``OSError``, whose message says that what was there before is untouched.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        """Absolute, or a URL without secrets."""

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[str]:
        """Give a local path to write to; when the block ends, the file is there as `name`, in place of what was.

        Raises:
            TrackingError: the block wrote no file.
        """
        with self.staged(name) as staged:
            yield staged
            self.sync(staged)
            self.publish(staged, name)

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Names of what is in it; none where it does not exist."""

    @abc.abstractmethod
    def staged(self, name: str) -> contextlib.AbstractContextManager[str]:
        """Where to write, on the way to `name`; gone afterwards."""

    @abc.abstractmethod
    def sync(self, staged: str) -> None:
        """Return when the file `staged` can be published."""

    @abc.abstractmethod
    def publish(self, staged: str, name: str) -> None:
        """Have the file `staged`, after `sync`, appear as `name`."""

    @abc.abstractmethod
    def copy(self, path: str, name: str) -> None:
        """Have the file `path`, of the same disk or store, appear as `name` too, without writing its content again.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove the file `name`, if it is there."""

    @abc.abstractmethod
    def fetch(self, name: str) -> str:
        """A local path to read the file `name` from.

        Raises:
            FileNotFoundError: it is not there; for a local directory, reading says so.
        """

    @abc.abstractmethod
    def release(self, path: str) -> None:
        """Tell that what `fetch` returned has been read."""


class LocalDirectory(Directory):
    """A directory on a disk or a mounted volume."""

    def names(self) -> list[str]:
        """Names of what is in it."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[str]:
        """Where to write what will be moved to `name`."""
        path = os.path.join(self.path, name)
        with contextlib.ExitStack() as stack:
            with explained(path):
                directory = stack.enter_context(staging(self.path))
            staged = os.path.join(directory, name)
            with explained(path, staged):
                yield staged

    def sync(self, staged: str) -> None:
        """Return when the content of `staged`, a file or a directory of files, is on disk."""
        if not os.path.isdir(staged) or os.path.islink(staged):
            sync_file(staged)
            return
        synced = 0
        for directory, _, names in os.walk(staged, topdown=False):
            for name in names:
                sync_file(os.path.join(directory, name))
                synced += 1
            sync_directory(directory)
        if not synced:
            raise _nothing_written(staged)

    def publish(self, staged: str, name: str) -> None:
        """Move `staged`, whose content is on disk, to `name`, durably."""
        os.replace(staged, os.path.join(self.path, name))
        sync_directory(self.path)

    def copy(self, path: str, name: str) -> None:
        """Have the file `path` appear as `name` too: by a hard link, or a copy on file systems without links."""
        with self.write(name) as staged:
            try:
                os.link(path, staged)
            except FileNotFoundError:
                raise
            except OSError:
                shutil.copyfile(path, staged)

    def remove(self, name: str) -> None:
        """Remove the file or directory `name`, if it is there."""
        path = os.path.join(self.path, name)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if os.path.isdir(path) and not os.path.islink(path):
                with staging(self.path) as directory:  # a directory cannot go at once, but its name can
                    os.rename(path, os.path.join(directory, name))
            else:
                os.unlink(path)

    def fetch(self, name: str) -> str:
        """The path of the file `name`."""
        return os.path.join(self.path, name)

    def release(self, path: str) -> None:
        """Do nothing: it is the file itself."""


def checked_file(path: str) -> int:
    """A descriptor of the file `path`.

    Raises:
        TrackingError: there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _nothing_written(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TrackingError(f"Received something other than a file at {shown_path(path)}. Expected one file.")
    return descriptor


def _nothing_written(path: str) -> TrackingError:
    return TrackingError(
        f"Received nothing to save: no file was written to {shown_path(path)}. Expected the block of the `with` "
        f"statement to write one file to the path that the statement gives."
    )


def sync_file(path: str) -> None:
    """Return when the content of the file `path` is on disk.

    Raises:
        TrackingError: there is no such file.
    """
    descriptor = checked_file(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def free_bytes(directory: str) -> int:
    """Bytes that this user may still write on the file system of `directory`."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
