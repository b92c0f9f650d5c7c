"""A directory in an object store: files are written in ``$TMPDIR``, then uploaded, and read from local copies."""

from __future__ import annotations

import os

from polyaxon_tracking.progress import Progress
from polyaxon_tracking.storage import object_store
from polyaxon_tracking.storage.credentials import locate_directory
from polyaxon_tracking.storage.directory import START_BYTES, Directory
from polyaxon_tracking.storage.disk import checked_file
from polyaxon_tracking.storage.download_cache import cached_path, release, workspace

__all__ = ["RemoteDirectory"]


class RemoteDirectory(Directory):
    """A prefix in an object store: all objects whose names begin with it, since a store has no directories."""

    def __init__(self, url: str) -> None:
        super().__init__(locate_directory(url).url)

    def names(self) -> list[str]:
        """Return the names of the objects directly below the prefix."""
        return list(object_store.list_files(self.path))

    def staging_parent(self) -> str:
        """Return the directory for temporary files of this user."""
        return workspace()

    def sync(self, path: str) -> None:
        """Check that a file was written. It needs no flush, because the local file is temporary."""
        os.close(checked_file(path))

    def publish(self, path: str, name: str) -> None:
        """Upload the file `path` as `name`."""
        object_store.upload(path, self._url(name))

    def copy(self, path: str, name: str) -> None:
        """Make the store copy the object `path`, a URL, to `name`; if it cannot, download and upload the object."""
        if object_store.copy(path, self._url(name)):
            return
        size = object_store.information(path)["size"]
        with self.write(name) as staged, Progress(f"Copying {path}", size) as progress:
            object_store.download(path, staged, progress)

    def remove(self, name: str) -> None:
        """Remove the object `name`, if it exists."""
        object_store.remove(self._url(name))

    def fetch(self, name: str) -> str:
        """Return the path of a local copy of the object `name`, and download it if needed."""
        return cached_path(self._url(name))

    def start_of(self, name: str) -> bytes:
        """Return the first bytes of the object `name`, with one request that downloads no more."""
        return object_store.start_of(self._url(name), START_BYTES)

    def release(self, path: str) -> None:
        """Remove the local copy `path`, unless another process still needs it."""
        release(path)

    def _url(self, name: str) -> str:
        return f"{self.path}/{name}"
