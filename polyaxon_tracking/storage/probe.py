"""Try whether a directory takes checkpoints, by writing files there as a save does."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.disk import NO_ROOM, flush, sync_directory, sync_file
from polyaxon_tracking.storage.locks import StagingDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__: list[str] = []

# Some mounts take small files and fail on larger files, which they send in several requests.
_BLOCKS = 4
_BLOCK_BYTES = 1 << 20

WRITABLE, FSYNC, RENAME, READ_BACK = "writable", "fsync", "atomic rename", "reads back"
IN_PLACE = "changes in place"

READ_RIGHT = "Give this user the right to read it"

_PROBLEMS = {
    WRITABLE: "which cannot be written to",
    FSYNC: "whose files cannot be flushed to the disk",
    RENAME: "in which a file cannot replace another",
    READ_BACK: "whose files cannot be read back",
    IN_PLACE: "in which a file cannot be changed while it is being written",
}

# The errors of a mount whose server does not respond: of FUSE, of NFS, and of the network.
_UNREACHABLE = {
    errno.ENOTCONN,
    errno.ESTALE,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ESHUTDOWN,
}


def try_saving(directory: str, *, in_place: bool) -> Iterator[str]:
    """Write, flush, rename and read back files of a few megabytes in `directory`, and remove them.

    Args:
        directory: the directory to try; it is created if it does not exist.
        in_place: whether a file is also changed before its end, as writers of HDF5 and zip files do.

    Yields:
        The name of each step, before the step is tried.

    Raises:
        OSError: the step that was yielded last has failed.
    """
    yield WRITABLE
    with StagingDirectory(directory) as staged:
        block = os.urandom(_BLOCK_BYTES)
        new, old = os.path.join(staged, "new"), os.path.join(staged, "old")
        for path, blocks in ((old, 0), (new, _BLOCKS)):
            with open(path, "xb") as file:
                file.writelines([block] * blocks)
        yield FSYNC
        sync_file(new)
        sync_directory(staged)
        yield RENAME
        os.replace(new, old)
        sync_directory(staged)
        yield READ_BACK
        with open(old, "rb") as file:
            _check(file.read() == block * _BLOCKS)
        if in_place:
            yield IN_PLACE
            _change_in_place(os.path.join(staged, "changed"), block)


def _change_in_place(path: str, block: bytes) -> None:
    with open(path, "x+b", buffering=0) as file:
        file.write(block)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        file.write(b"the header")
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        _check(file.read(10) == b"the header")
        flush(file.fileno())


def _check(is_as_written: bool) -> None:
    if not is_as_written:
        raise OSError(errno.EIO, "It reads other bytes than were written")


def what_failed(error: OSError, step: str) -> str:
    """Return a clause that says what is wrong with a directory, if `error` was raised by `step` of `try_saving`."""
    if isinstance(error, NotADirectoryError):
        return f"{_PROBLEMS[WRITABLE]}: {shown_path(error.filename)} is a file"
    return f"{_PROBLEMS[step]}: {error.strerror or error}"


def what_to_do(error: OSError, step: str = WRITABLE, otherwise: str = "Mount the volume for writing") -> str:
    """Return what to do about `error` of `step`, without a full stop, because another advice may follow."""
    if isinstance(error, NotADirectoryError):
        return "Move it away"
    if error.errno in _UNREACHABLE:
        return "Mount the volume again, because its server does not respond"
    if error.errno in NO_ROOM:
        return "Make room there, or raise the limit"
    if step == IN_PLACE:
        return "Mount the volume with a cache for writing, such as rclone's --vfs-cache-mode writes"
    if step != WRITABLE:
        return "Mount a file system that can do this"
    return otherwise
