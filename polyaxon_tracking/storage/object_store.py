"""Files in object stores, through fsspec: an object is whole or absent, and requests to the store are retried.

Every file is first completed on a local disk and then passed to the driver's ``put_file``, because an exception while
a file of fsspec is open for writing leaves a truncated object on s3fs, gcsfs and adlfs. Nothing is renamed in a store.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.progress import Progress
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.credentials import ACCESS_KEYS, Location, locate, locate_directory
from polyaxon_tracking.storage.retry import error_number, failure_kind, failure_reason, with_retries

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Iterator

__all__: list[str] = []


_logger = logging.getLogger("polyaxon_tracking")


_PROBE = b"written to see whether it can be, and removed"

_EXTRAS = {"s3": "s3", "gs": "gcs", "abfs": "azure"}
_USUAL_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


# The errors of what a driver or a store cannot do at all: s3fs reports ENOSYS.
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS}

# Loggers of drivers that log requests: at DEBUG with the requests' tokens, or every request at INFO.
_LOGGER_LEVELS = {
    "azure.core.pipeline.policies.http_logging_policy": logging.WARNING,
    "botocore": logging.INFO,
    "fsspec.http": logging.INFO,
    "webhdfs": logging.INFO,
}


def list_files(url: str) -> dict[str, int]:
    """Return the sizes in bytes of the objects directly below `url`, by name; an empty dict if there are none."""
    return {name: entry["size"] for name, entry in _entries(url).items() if entry["type"] == "file"}


def list_directories(url: str) -> list[str]:
    """Return the names of the directories directly below `url`, which are prefixes of objects further below."""
    return [name for name, entry in _entries(url).items() if entry["type"] == "directory"]


def _entries(url: str) -> dict[str, dict[str, Any]]:
    location, fs, path = open_store(url)

    def call() -> list[dict[str, Any]]:
        fs.invalidate_cache()  # other processes also write here
        found: list[dict[str, Any]] = fs.ls(path, detail=True)
        return found

    try:
        entries = with_retries("Not listed", location, call)
    except FileNotFoundError:
        entries = []
    if not entries:
        _check_bucket("/".join(location.url.split("/", 3)[:3]), os.getpid())
    found = {entry["name"].rstrip("/") if entry["type"] == "directory" else entry["name"]: entry for entry in entries}
    return {name.rpartition("/")[2]: entry for name, entry in found.items() if name.rpartition("/")[0] == path}


@functools.lru_cache(maxsize=8)
def _check_bucket(url: str, process: int) -> None:  # noqa: ARG001  # a forked process asks again
    """Raise a `TrackingError` if there is no bucket `url`, because listing it looks the same as an empty bucket."""
    location, fs, path = open_store(url)
    if location.protocol not in _EXTRAS:
        return  # other stores have no buckets: a write creates the directory
    try:
        with_retries(None, location, lambda: fs.ls(path))  # `info` needs more rights
    except FileNotFoundError:
        raise TrackingError(
            f"Received a URL in the bucket {shown_path(url)}, which does not exist. Expected one that exists: create "
            f"it, or correct the URL."
        ) from None
    except OSError:
        return  # this user may list only a directory of the bucket, which therefore exists


def information(url: str) -> dict[str, Any]:
    """Return the store's description of the object `url`: its ``size`` in bytes, and what changes with its content.

    Raises:
        FileNotFoundError: there is no object `url`.
    """
    location, fs, path = open_store(url)
    found: dict[str, Any] = with_retries(None, location, lambda: fs.info(path))
    return found


def content_version(information: dict[str, Any]) -> str:
    """Return what changes with the content of an object: its entity tag, or else all that the store says of it."""
    return str(next((information[tag] for tag in ("ETag", "etag", "generation") if tag in information), information))


def modified(url: str) -> dt.datetime | None:
    """Return when the object `url` was written, by the clock of the store; ``None`` if the driver cannot know it.

    Raises:
        FileNotFoundError: there is no object `url`.
    """
    location, fs, path = open_store(url)
    try:
        when: dt.datetime = with_retries(None, location, lambda: fs.modified(path))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return when


def upload(file: str, url: str) -> None:
    """Upload the local `file` to `url` as a whole, in place of the previous object."""
    location, fs, path = open_store(url)
    what = "Not saved, and no existing file was changed"
    with Progress(f"Uploading {location.url}", os.path.getsize(file)) as progress:
        with_retries(what, location, lambda: fs.put_file(file, path, callback=progress_callback(progress.reach)))


def download(url: str, file: str, progress: Progress) -> None:
    """Download the object `url` to the local `file`."""
    location, fs, path = open_store(url)

    with_retries(
        "Not downloaded", location, lambda: fs.get_file(path, file, callback=progress_callback(progress.reach))
    )


def start_of(url: str, size: int) -> bytes:
    """Return the first `size` bytes of the object `url`, or fewer; none if this process may not read such an object."""
    location, fs, path = open_store(url)
    try:
        found: bytes = with_retries("Not read", location, lambda: fs.cat_file(path, start=0, end=size))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENODATA):  # an empty object has no first byte
            return b""
        raise
    return found


def progress_callback(reach: Callable[[int], None]) -> Any:
    """Return a callback for fsspec's drivers that calls `reach` with the number of bytes so far, first with 0."""
    from fsspec.callbacks import Callback

    class ProgressCallback(Callback):  # type: ignore[misc]  # fsspec has no types
        def call(self, hook_name: str | None = None, **_: Any) -> None:  # noqa: ARG002  # fsspec's
            reach(self.value)

    reach(0)
    return ProgressCallback()


def copy(url: str, other: str) -> bool:
    """Make the store copy the object `url` to `other`, in the same store; return whether it can copy objects."""
    location, fs, path = open_store(url)
    try:
        with_retries("Not copied", location, lambda: fs.cp_file(path, open_store(other)[2]))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def remove(url: str) -> None:
    """Remove the object `url`, if it exists."""
    location, fs, path = open_store(url)
    # The object is gone if another process removed it, or an earlier attempt whose response was lost.
    with contextlib.suppress(FileNotFoundError):
        with_retries("Not removed", location, lambda: fs.rm_file(path))


def check_writable(url: str, source: str) -> str:
    """Write and remove an object below `url`; return `url` without secrets, in the form that fsspec accepts.

    Raises:
        TrackingError: writing or removing failed; the message names `source`, where the URL came from.
        ModuleNotFoundError: the driver is not installed.
    """
    location = locate_directory(url)
    with _explain_failures(location, source, "takes this run's files", "write to", "write and delete"):
        _, fs, path = open_store(url)
        probe = f"{path}/.polyaxon-tracking-{secrets.token_hex(8)}"
        with_retries(None, location, lambda: fs.pipe_file(probe, _PROBE), at_start=True)
        with_retries(None, location, lambda: fs.rm_file(probe), at_start=True)
    return location.url


def exists(url: str, source: str) -> bool:
    """Return whether there is an object at `url`, or one below it.

    Raises:
        TrackingError: the request to the store failed; the message names `source`, where the URL came from.
        ModuleNotFoundError: the driver is not installed.
    """
    location = locate(url)
    with _explain_failures(location, source, "can be read", "read", "read"):
        _, fs, path = open_store(url)
        try:
            with_retries(None, location, lambda: fs.info(path), at_start=True)
        except FileNotFoundError:
            return False
    return True


@contextlib.contextmanager
def _explain_failures(location: Location, source: str, expected: str, use: str, rights: str) -> Iterator[None]:
    """Replace an error of the store at the start of a run by a `TrackingError` that says what to do."""
    try:
        yield
    except FileNotFoundError:
        problem, advice = "which does not exist", "Create it, or correct the URL"
    except PermissionError as error:
        problem = f"which this process may not {use} ({error.strerror})"
        advice = f"Give {credentials_for(location)} that may {rights} there"
    except OSError as error:
        problem = f"which could not be used ({error.strerror})"
        advice = f"See that the store can be reached from here, and that {credentials_for(location)} are right"
    else:
        return
    bucket = location.url.split("/", 3)[2]
    raise TrackingError(
        f"Received the URL {shown_path(location.url)} from {source}, in the bucket {shown_path(bucket)}, {problem}. "
        f"Expected a bucket that {expected}. {advice}."
    )


def configure_driver(url: str) -> None:
    """Make every file system that fsspec creates for stores of this kind use the credentials for `url`.

    This is for a framework that opens the outputs path itself. The credentials go to fsspec's configuration in memory.
    Nothing is changed if the driver finds its credentials itself.
    """
    location = locate(url)
    if location.options or location.user_info:
        import fsspec

        fsspec.config.conf.setdefault(location.protocol, {}).update(_driver_options(location))


def _driver_options(location: Location) -> dict[str, Any]:
    """Return the driver's arguments, with the URL's user and password decoded, because drivers do not decode them."""
    if not location.user_info:
        return location.options
    import fsspec

    driver = fsspec.get_filesystem_class(location.protocol)
    without = driver._get_kwargs_from_urls(location.url)  # noqa: SLF001  # as below
    given = driver._get_kwargs_from_urls(location.secret_url)  # noqa: SLF001
    return {name: unquote(value) for name, value in given.items() if without.get(name) != value}


def credentials_for(location: Location) -> str:
    """Return a text that says where the credentials for `location` come from."""
    if location.source is not None:
        return f"credentials in {location.source}"
    if location.options or location.user_info or location.query:
        return "credentials in the URL"
    usual = _USUAL_CREDENTIALS.get(location.protocol)
    return f"credentials ({usual}; or {ACCESS_KEYS})" if usual else "credentials"


def open_store(url: str) -> tuple[Location, Any, str]:
    """Return the location of `url`, the driver's file system, and the path of `url` for it."""
    location = locate(url)
    options = tuple(sorted((name, repr(value)) for name, value in location.options.items()))
    bucket = "/".join(location._replace(query="").secret_url.split("/", 3)[:3])
    fs = _file_system(bucket, options, os.getpid())
    return location, fs, fs._strip_protocol(location.secret_url)  # noqa: SLF001  # documented for users, and in all drivers


# fsspec's own cache has an instance for each thread, and every background write may be in another thread.
@functools.lru_cache(maxsize=8)
def _file_system(bucket: str, given: tuple[tuple[str, str], ...], process: int) -> Any:  # noqa: ARG001  # the key
    location = locate(bucket)
    for name, level in _LOGGER_LEVELS.items():
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(level)
    extra = _EXTRAS.get(location.protocol)
    try:
        import fsspec

        options = {**_driver_options(location), "skip_instance_cache": True, "use_listings_cache": False}
        return fsspec.core.url_to_fs(location.url, **options)[0]
    except ImportError as error:
        package = f'"polyaxon-tracking[{extra}]"' if extra else "fsspec"
        if extra is None and error.name != "fsspec":
            raise  # fsspec's message names the package
        raise ModuleNotFoundError(
            f"Received the URL {shown_path(location.url)}, which needs a driver that is not installed: {error}. "
            f"Install it with: pip install {package}"
        ) from error
    except ValueError as error:  # no such protocol, or no credentials at all
        raise TrackingError(
            f"Received the URL {shown_path(location.url)}, which cannot be opened: {failure_reason(error)}. "
            f"Expected a URL that fsspec knows, and {credentials_for(location)} for it."
        ) from None
    except Exception as error:  # noqa: BLE001  # a driver that connects at once may raise anything
        raise OSError(error_number(error), f"{failure_kind(error)}: {failure_reason(error)}", location.url) from None
