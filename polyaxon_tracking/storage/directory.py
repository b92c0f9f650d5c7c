"""The interface of a directory in which checkpoints are kept."""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__: list[str] = []


class Directory(abc.ABC):
    """A directory of files, each complete or absent, on a disk or in a store. This package writes all files through it.

    Errors of a disk or a store are an ``OSError``, whose message says that the previous file is untouched.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        """The absolute path, or the URL without secrets."""

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[str]:
        """Yield a local path to write to; when the block ends, the file replaces the previous file `name`.

        Raises:
            TrackingError: the block wrote no file.
        """
        with self.staged(name) as staged:
            yield staged
            self.sync(staged)
            self.publish(staged, name)

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Return the names in the directory; an empty list if the directory does not exist."""

    @abc.abstractmethod
    def staged(self, name: str) -> contextlib.AbstractContextManager[str]:
        """Return a context manager that yields the path to write `name` to, and removes that path at the end."""

    @abc.abstractmethod
    def sync(self, staged: str) -> None:
        """Make the content of the file `staged` durable, so that `publish` may follow."""

    @abc.abstractmethod
    def publish(self, staged: str, name: str) -> None:
        """Put the file `staged` in the directory as `name`, after `sync`."""

    @abc.abstractmethod
    def copy(self, path: str, name: str) -> None:
        """Put the file `path`, of the same disk or store, in the directory as `name` also, without writing it again.

        Raises:
            FileNotFoundError: there is no file `path`.
        """

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove the file `name`, if it exists."""

    @abc.abstractmethod
    def fetch(self, name: str) -> str:
        """Return a local path to read the file `name` from.

        Raises:
            FileNotFoundError: there is no file `name`; for a local directory, only reading the path raises.
        """

    @abc.abstractmethod
    def release(self, path: str) -> None:
        """Release `path`, which `fetch` returned, because it has been read."""
