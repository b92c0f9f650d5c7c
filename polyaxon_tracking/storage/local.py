"""Files that are complete or absent, whatever happens while they are written.

A local file is written to a hidden staging directory next to its target (so on the same file system), made durable
with ``fsync``, and renamed over the target with ``os.replace``. Then the directory entry is also made durable. A kill,
a full disk or a power cut at any point leaves either the old file or the new file. See ``fsync(2)`` and ``rename(2)``.
An object in a store is written to ``$TMPDIR``, and uploaded when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from polyaxon_tracking.storage.directory import START_BYTES, Directory
from polyaxon_tracking.storage.disk import nothing_written, sync_directory, sync_file
from polyaxon_tracking.storage.locks import StagingDirectory

__all__ = ["LocalDirectory"]


class LocalDirectory(Directory):
    """A directory on a disk or a mounted volume."""

    def names(self) -> list[str]:
        """Return the names in the directory; an empty list if the directory does not exist."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def staging_parent(self) -> str:
        """Return the directory itself, so that a staged file is on the same file system."""
        return self.path

    def sync(self, path: str) -> None:
        """Flush the content of `path`, a file or a directory of files, to the disk."""
        if not os.path.isdir(path) or os.path.islink(path):
            sync_file(path)
            return
        synced = 0
        for directory, _, names in os.walk(path, topdown=False):
            for name in names:
                sync_file(os.path.join(directory, name))
                synced += 1
            sync_directory(directory)
        if not synced:
            raise nothing_written(path)

    def publish(self, path: str, name: str) -> None:
        """Move `path`, whose content is on disk, to `name`, durably."""
        os.replace(path, os.path.join(self.path, name))
        sync_directory(self.path)

    def copy(self, path: str, name: str) -> None:
        """Put the file `path` in the directory as `name` also: by a hard link, or a copy if links are unsupported."""
        with self.write(name) as staged:
            try:
                os.link(path, staged)
            except FileNotFoundError:
                raise
            except OSError:
                shutil.copyfile(path, staged)

    def remove(self, name: str) -> None:
        """Remove the file or directory `name`, if it exists."""
        path = os.path.join(self.path, name)
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if os.path.isdir(path) and not os.path.islink(path):
                # A directory cannot be removed atomically, but it can be renamed.
                with StagingDirectory(self.path) as directory:
                    os.rename(path, os.path.join(directory, name))
            else:
                os.unlink(path)

    def fetch(self, name: str) -> str:
        """Return the path of the file `name`."""
        return os.path.join(self.path, name)

    def start_of(self, name: str) -> bytes:
        """Return the first bytes of the file `name`; none of a directory."""
        try:
            with open(self.fetch(name), "rb") as file:
                return file.read(START_BYTES)
        except (FileNotFoundError, IsADirectoryError, PermissionError):  # the last on Windows too, for a directory
            return b""

    def release(self, path: str) -> None:
        """Do nothing, because `fetch` returned the file itself, not a copy."""
