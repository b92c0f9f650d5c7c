"""The interface of a directory in which checkpoints are kept."""

from __future__ import annotations

import abc
import contextlib
import os
from typing import TYPE_CHECKING

from polyaxon_tracking.storage.locks import StagingDirectory
from polyaxon_tracking.storage.staged import StagedFile
from polyaxon_tracking.storage.write_errors import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__: list[str] = []

START_BYTES = 4096


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
        staged = self.stage(name)
        with staged.writing() as path:
            yield path
        staged.commit()

    def stage(self, name: str, publish: Callable[[str], None] | None = None) -> StagedFile:
        """Return a file to write, which its ``commit`` puts in the directory.

        Args:
            name: the name of the file while it is written, and afterwards, unless `publish` chooses another.
            publish: takes the path of the file that was written, and calls `sync` and then `publish` with it. By
                default, it is published as `name`.
        """

        def publish_as_name(path: str) -> None:
            self.sync(path)
            self.publish(path, name)

        target, parent = f"{self.path}/{name}", self.staging_parent()
        with explained(target, os.path.join(parent, ".staging")):  # of no file yet: for messages about free room
            staging = StagingDirectory(parent)
        return StagedFile(staging, name, target, publish or publish_as_name)

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Return the names in the directory; an empty list if the directory does not exist."""

    @abc.abstractmethod
    def staging_parent(self) -> str:
        """Return the local directory in which staging directories are created."""

    @abc.abstractmethod
    def sync(self, path: str) -> None:
        """Make the content of the file `path`, which was staged, durable, so that `publish` may follow."""

    @abc.abstractmethod
    def publish(self, path: str, name: str) -> None:
        """Put the file `path`, which was staged, in the directory as `name`, after `sync`."""

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
    def start_of(self, name: str) -> bytes:
        """Return the first `START_BYTES` bytes of the file `name`; none if this process has no such file to read."""

    @abc.abstractmethod
    def release(self, path: str) -> None:
        """Release `path`, which `fetch` returned, because it has been read."""
