"""Download the objects of a store side by side, each file complete or absent; a killed download resumes."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.progress import Progress
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.disk import flush, sync_file
from polyaxon_tracking.storage.object_store import content_version, open_store, progress_callback
from polyaxon_tracking.storage.retry import with_retries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__: list[str] = []

_T = TypeVar("_T")

_logger = logging.getLogger("polyaxon_tracking")

# As many bytes in one request, and as many requests at a time, as the command of AWS, rounded up: 128 MB in memory.
_PIECE_BYTES = 8 * 2**20
_CONNECTIONS = 16

# The entity tag of S3 is the MD5 of the content, except for uploads in parts, and for some kinds of encryption.
_MD5_DIGITS = 32


class StoredFile(NamedTuple):
    """An object of a store."""

    name: str
    """The name below the URL that was listed, with slashes; the last part of the URL if that is the object itself."""
    path: str
    """The path for the driver."""
    size: int | None
    """The size in bytes; ``None`` if the store does not tell."""
    version: str
    """What changes with the content: its MD5 if the store tells it, or else its entity tag."""
    md5: str | None
    """The MD5 of the content in hexadecimal digits; ``None`` if the store does not tell."""


class Listing(NamedTuple):
    """What there is at a URL."""

    is_directory: bool
    """Whether there are objects below the URL; otherwise it is the URL of one object."""
    files: list[StoredFile]
    """The objects, ordered by name."""


def listing(url: str) -> Listing:
    """Return the object `url`, or all objects below it.

    Raises:
        FileNotFoundError: there is no such object, and none below.
        TrackingError: an object's name cannot be that of a file.
    """
    location, fs, path = open_store(url)
    fs.invalidate_cache()  # other processes also write here
    information = with_retries("Not listed", location, lambda: fs.info(path))
    is_directory = information["type"] == "directory"
    if is_directory:
        found = with_retries("Not listed", location, lambda: fs.find(path, detail=True))
        below = f"{path.rstrip('/')}/"
        entries = {
            name.removeprefix(below): entry
            for name, entry in found.items()
            if name.startswith(below) and not name.endswith("/")
        }
    else:
        entries = {os.path.basename(location.url): {**information, "name": path}}
    directories = {name[: match.start()] for name in entries for match in re.finditer("/", name)}
    files = []
    for name, entry in sorted(entries.items()):
        if not entry["size"] and name in directories:
            continue  # some programs create an empty object for a directory
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
            raise TrackingError(
                f"Received the object {shown_path(name)} below {shown_path(location.url)}, whose name cannot be that "
                f"of a file. Expected names without '..' and without '//'. Rename it, or pass download=False to read "
                f"from its URL."
            )
        md5 = _md5_of(entry)
        files.append(StoredFile(name, entry["name"], entry["size"], md5 or content_version(entry), md5))
    if not files:
        raise FileNotFoundError(errno.ENOENT, "Not found: there are no objects", location.url)
    return Listing(is_directory, files)


def _md5_of(entry: dict[str, Any]) -> str | None:
    """Return the MD5 of an object's content, where S3, Google's and Azure's drivers tell it."""
    if encoded := entry.get("md5Hash"):
        return base64.b64decode(encoded).hex()
    if content := (entry.get("content_settings") or {}).get("content_md5"):
        return bytes(content).hex()
    tag = str(entry.get("ETag", "")).strip('"')
    return tag if len(tag) == _MD5_DIGITS and tag.isalnum() else None


def download_files(url: str, files: list[StoredFile], directory: str) -> None:
    """Download `files`, which `listing` found at `url`, to the local `directory`.

    A file has its name once it is complete, verified and on disk. The pieces of a large file that a killed process had
    downloaded are kept.

    Raises:
        OSError: the store does not respond, a file does not have the size or the MD5 that the store tells, or writing
            failed.
    """
    with Progress(f"Downloading {open_store(url)[0].url}", sum(file.size or 0 for file in files)) as progress:
        _Download(url, files, directory, progress).run()


class _Download:
    """The download of several files, in several threads."""

    def __init__(self, url: str, files: list[StoredFile], directory: str, progress: Progress) -> None:
        self.location, self.fs, _ = open_store(url)
        self.directory = directory
        self.parts = f"{directory}.parts"
        os.makedirs(self.parts, exist_ok=True)
        self.progress = progress
        # Other drivers are not safe in several threads.
        self._threads = _CONNECTIONS if self.fs.async_impl else 1
        # A web server may ignore that only a piece is asked for.
        self.has_pieces = self.fs.async_impl and self.location.protocol not in ("http", "https")
        self.has_md5 = True
        """Whether what looks like an MD5 is one, as far as is known."""
        self._pieces = self._all_pieces(files)
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            workers = [pool.submit(self._work) for _ in range(self._threads)]
            try:
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:
                self._is_stopped.set()  # also if Ctrl-C was pressed
        for worker in workers:
            worker.result()
        shutil.rmtree(self.parts, ignore_errors=True)

    def request(self, call: Callable[[], _T]) -> _T:
        """Return what `call`, a request to the store, returns; retry, unless the download is stopped."""

        def unless_stopped() -> _T:
            if self._is_stopped.is_set():
                raise InterruptedError("the download was stopped")
            return call()

        return with_retries("Not downloaded", self.location, unless_stopped)

    def _work(self) -> None:
        """Download pieces until none is left."""
        try:
            while (piece := self._next_piece()) is not None:
                file, number = piece
                file.fetch(number)
                with self._lock:
                    file.left.discard(number)
                    is_complete = not file.left
                if is_complete:
                    file.finish()
        except BaseException:
            with self._lock:
                is_first = not self._is_stopped.is_set()
                self._is_stopped.set()
            if is_first:  # the errors of the other threads follow from this one
                raise

    def _next_piece(self) -> tuple[_PartialFile, int] | None:
        with self._lock:
            return None if self._is_stopped.is_set() else next(self._pieces, None)

    def _all_pieces(self, files: list[StoredFile]) -> Iterator[tuple[_PartialFile, int]]:
        for file in files:
            partial = _PartialFile(self, file)
            # If the process was killed just before the file had its name, one piece is downloaded again.
            partial.left = partial.left or {0}
            for number in sorted(partial.left):
                yield partial, number


class _PartialFile:
    """A file while it is downloaded: the pieces that are there, in no order, and a note of which."""

    def __init__(self, download: _Download, file: StoredFile) -> None:
        self._download = download
        self._file = file
        self._size = file.size or 0
        self._path = os.path.join(download.directory, file.name)
        # Not next to the file, because an object may have any name.
        self._part = os.path.join(download.parts, hashlib.sha256(file.name.encode()).hexdigest()[:32])
        self._done = f"{self._part}.done"
        self._has_pieces = download.has_pieces and file.size is not None
        self._count = max(1, -(-self._size // _PIECE_BYTES)) if self._has_pieces else 1
        done = self._noted() if self._count > 1 else set()
        self.left = set(range(self._count)) - done
        """The numbers of the pieces that are not downloaded yet."""
        download.progress.advance(sum(end - start for start, end in map(self._bounds, done)))

    def fetch(self, number: int) -> None:
        """Download the piece `number`."""
        fs, path, progress = self._download.fs, self._file.path, self._download.progress
        if not self._has_pieces:
            received = 0

            def reach(done: int) -> None:
                nonlocal received
                progress.advance(done - received)
                received = done

            self._download.request(lambda: fs.get_file(path, self._part, callback=progress_callback(reach)))
            sync_file(self._part)
            return
        start, end = self._bounds(number)
        data: bytes = self._download.request(lambda: fs.cat_file(path, start=start, end=end)) if self._size else b""
        if len(data) != end - start:
            raise self._damaged(f"{len(data):,} bytes came instead of {end - start:,}")
        _write(self._part, data, start)
        if self._count > 1:
            _write(self._done, b"1", number, is_flushed=False)  # a note that is lost means one more download
        progress.advance(len(data))

    def finish(self) -> None:
        """Verify the file, and give it its name."""
        if self._file.size not in (None, size := os.path.getsize(self._part)):
            raise self._damaged(f"{size:,} bytes came instead of {self._size:,}")
        if self._file.md5 and self._download.has_md5:
            self._verify(self._file.md5)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        os.replace(self._part, self._path)
        os.chmod(self._path, 0o444)  # several processes read it, and the next start too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._done)

    def _verify(self, expected: str) -> None:
        """Compare the file's MD5 with the store's; if they differ, download the file again."""
        if (first := _md5(self._part)) == expected:
            return
        _logger.warning("%s: the MD5 differs from the store's. Downloading it again", self._url)
        self._download.progress.advance(-self._size)
        for number in range(self._count):
            self.fetch(number)
        if (second := _md5(self._part)) == expected:
            return
        # With some kinds of encryption S3's entity tag looks like the MD5 of the content, and is not.
        if second != first or self._download.location.protocol != "s3":
            os.unlink(self._part)
            raise self._damaged(f"its MD5 is {second}, and the store's {expected}")
        self._download.has_md5 = False

    def _damaged(self, problem: str) -> OSError:
        return OSError(errno.EIO, f"Not downloaded: {problem}", self._url)

    @property
    def _url(self) -> str:
        return f"{self._download.location.url.removesuffix(f'/{self._file.name}')}/{self._file.name}"

    def _bounds(self, number: int) -> tuple[int, int]:
        """Return the first byte of the piece `number`, and the byte after its last."""
        return number * _PIECE_BYTES, min((number + 1) * _PIECE_BYTES, self._size)

    def _noted(self) -> set[int]:
        """Return the numbers of the pieces that are downloaded."""
        if not os.path.exists(self._done):
            return set()
        if not os.path.exists(self._part):
            os.unlink(self._done)
            return set()
        with open(self._done, "rb") as file:
            return {number for number, mark in enumerate(file.read()) if mark}


def _write(path: str, data: bytes, start: int, *, is_flushed: bool = True) -> None:
    """Write `data` to the file `path` from the byte `start` on, and flush it to disk if `is_flushed`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, start)
            view, start = view[written:], start + written
        if is_flushed:
            flush(descriptor)
    finally:
        os.close(descriptor)


def _md5(path: str) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()
