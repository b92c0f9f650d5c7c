"""Open a directory on disk or in an object store, and write a file there that is complete or absent."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.local import LocalDirectory
from polyaxon_tracking.urls import is_url, local_path, path_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyaxon_tracking.storage.directory import Directory


__all__: list[str] = []


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[str]:
    """Write the file `path` so that it is complete when the block ends, or absent.

    The block writes to the path that this function yields, which has the same name in a hidden directory next to
    `path`. When the block ends, the file is on disk as `path` and replaces the previous file. If the block raises,
    `path` is unchanged.

    Args:
        path: the file to write; missing directories are created. A symbolic link is replaced, not written through. If
            `path` is a URL, the file is written to ``$TMPDIR`` and uploaded as a whole.

    Raises:
        TrackingError: the block wrote no file, or `path` does not name a file.
        OSError: writing failed, at any call; if there was too little room, the message says how much is free.

    Examples:
        >>> with atomic_write("model.txt") as staged:
        ...     _ = Path(staged).write_text("weights")
        >>> Path("model.txt").read_text()
        'weights'
    """
    given = path_text(path, "path")
    parent, _, name = (given if is_url(given) else os.path.abspath(local_path(given))).rpartition("/")
    if given.endswith("/") or parent.endswith(":/"):
        raise TrackingError(
            f"Received path={shown_path(given)}. Expected the path of a file, such as outputs/metrics.json, or the URL "
            f"of an object, such as s3://bucket/metrics.json."
        )
    with open_directory(parent).write(name) as staged:
        yield staged


def open_directory(path: str | os.PathLike[str]) -> Directory:
    """Return the directory `path`, local or a URL, in which files are complete or absent.

    Raises:
        TrackingError: `path` is empty or not a path, or a malformed URL.

    Examples:
        >>> directory = open_directory("outputs")
        >>> with directory.write("model.txt") as staged:
        ...     _ = Path(staged).write_text("weights")
        >>> directory.names(), Path(directory.fetch("model.txt")).read_text()
        (['model.txt'], 'weights')
    """
    path = path_text(path, "path")
    if is_url(path):
        from polyaxon_tracking.storage.remote import RemoteDirectory  # here and not above: only URLs need it

        return RemoteDirectory(path)
    return LocalDirectory(os.path.abspath(local_path(path)))
