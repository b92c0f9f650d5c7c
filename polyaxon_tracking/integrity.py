"""CRC-32 checksums of files and directories."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


__all__: list[str] = []

_READ_BYTES = 1 << 20
_READERS = 8


def crc_of_file(path: str, advance: Callable[[int], object] | None = None) -> int:
    """Return the CRC-32 (the same as in zip and gzip) of the file `path`; for a directory see `Checkpoint.crc`."""
    if os.path.isdir(path) and not os.path.islink(path):
        return _crc_of_directory(path, advance)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _crc(descriptor, advance)
    finally:
        os.close(descriptor)


def size_on_disk(path: str) -> int:
    """Return the size in bytes of the file, or of all files in the directory; 0 if `path` no longer exists."""
    if not os.path.isdir(path) or os.path.islink(path):
        try:
            return os.lstat(path).st_size
        except OSError:
            return 0
    return sum(size_on_disk(os.path.join(directory, name)) for directory, _, names in os.walk(path) for name in names)


def find_damage(path: str, crc: int, advance: Callable[[int], object] | None) -> str | None:
    """Return what is wrong with the file or directory `path`, or ``None`` if its CRC-32 is `crc`.

    Raises:
        OSError: the directory of `path` cannot be reached, so nothing is known of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if os.path.islink(path):
            return "it is a symbolic link"
        return _reason(error, path)
    try:
        status = os.fstat(descriptor)
        is_directory = stat.S_ISDIR(status.st_mode)
        if not (is_directory or stat.S_ISREG(status.st_mode)):
            return "it is not a file"
        if not (os.listdir(path) if is_directory else status.st_size):
            return "it is empty"
        found = _crc_of_directory(path, advance) if is_directory else _crc(descriptor, advance)
    except OSError as error:
        return _reason(error, path)
    finally:
        os.close(descriptor)
    return None if found == crc else f"its bytes have the CRC-32 {found:08x}, not {crc:08x}"


def _reason(error: OSError, path: str) -> str:
    """Return the reason of `error`, unless the whole directory cannot be reached: then nothing is damaged."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(os.path.dirname(path) or ".")
    return error.strerror or str(error)


def sync_and_checksum(path: str, sync: Callable[[str], None]) -> int:
    """Call `sync` on `path` and return its CRC-32; the file is read in a thread while the disk writes."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # a background write: nobody waits, so save the thread
        sync(path)
        return crc_of_file(path)
    found: list[int | OSError] = []

    def read() -> None:
        try:
            found.append(crc_of_file(path))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=read)
    try:
        thread.start()
    except RuntimeError:  # no thread can start while the interpreter exits
        sync(path)
        return crc_of_file(path)
    try:
        sync(path)
    finally:
        thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def _crc_of_directory(path: str, advance: Callable[[int], object] | None) -> int:
    """Return the CRC-32 of the directory's list of files (see `Checkpoint.crc`); the files are read in parallel."""
    names = sorted(
        os.path.relpath(os.path.join(directory, name), path) for directory, _, found in os.walk(path) for name in found
    )
    from concurrent.futures import ThreadPoolExecutor  # here and not above: slow to import

    def entry(name: str) -> str:
        file = os.path.join(path, name)
        return f"{name}\0{os.path.getsize(file)}\0{crc_of_file(file, advance):08x}\n"

    with ThreadPoolExecutor(_READERS) as pool:
        return zlib.crc32(os.fsencode("".join(pool.map(entry, names))))


def _crc(descriptor: int, advance: Callable[[int], object] | None) -> int:
    crc = 0
    buffer = memoryview(bytearray(_READ_BYTES))
    while read := os.readv(descriptor, [buffer]):
        crc = zlib.crc32(buffer[:read], crc)
        if advance is not None:
            advance(read)
    return crc
