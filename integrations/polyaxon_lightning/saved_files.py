"""The files of a Trainer's checkpoints: how their paths are written, whether they are intact, and copies of them."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from polyaxon_tracking.training import open_directory

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SavedFile", "absolute", "copy_saved", "damage", "identity_of", "is_url", "start_of"]


class SavedFile(NamedTuple):
    """A file that was written, and the checkpoint in it."""

    checkpoint: dict[str, Any]
    path: str
    identity: tuple[int, ...] | None


def is_url(path: str | Path) -> bool:
    """Return whether `path` is a URL."""
    return "://" in os.fspath(path)


def absolute(path: str | Path) -> str:
    """Return `path` as an absolute path, or as a URL without secrets, because log lines and errors show it."""
    if not is_url(path):
        return os.path.abspath(path)
    parent, _, name = os.fspath(path).rpartition("/")
    return f"{open_directory(parent).path}/{name}"


def _store(path: str) -> list[str]:
    """Return the scheme and the bucket of a URL, or an empty list for a local path."""
    return path.split("/", 3)[:3] if is_url(path) else []


def identity_of(path: str) -> tuple[int, ...] | None:
    """Return what identifies the file `path`, or None if there is no such local file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def copy_saved(saved: SavedFile, path: str) -> bool:
    """Link or copy the saved file to `path`, such as ``last.ckpt``; return whether that was possible."""
    if _store(saved.path) != _store(path) or saved.path == path or identity_of(saved.path) != saved.identity:
        return False
    parent, name = os.path.split(path)
    try:
        open_directory(parent).copy(saved.path, name)
    except FileNotFoundError:  # it was removed meanwhile
        return False
    return True


def start_of(path: str) -> bytes:
    """Return the first bytes of the file `path`, or none if there is no such file."""
    parent, name = os.path.split(path)
    return open_directory(parent).start_of(name)


def damage(path: str | Path) -> str | None:
    """Return what is wrong with the file `path`, from the CRC-32 of its zip members, or None if it is intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except zipfile.BadZipFile as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if not start:
            return "it is empty"
        return str(error) if start == b"PK" else None  # torch's format of before 1.6 has no checksums
    except (EOFError, LookupError, OSError, RuntimeError, ValueError, struct.error, zlib.error) as error:
        return str(error) or type(error).__name__  # invalid headers, or a disk error
    return member and f"the CRC-32 of its member {member} does not match"
