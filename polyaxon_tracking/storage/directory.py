"""The interface of a directory in which checkpoints are kept."""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__: list[str] = []


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
