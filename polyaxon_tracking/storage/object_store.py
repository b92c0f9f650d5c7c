"""Files in object stores, through fsspec: an object is whole or absent, and a store may be away for a while.

Every file is finished on a local disk first and then handed to the driver's ``put_file``: an exception while a file of
fsspec is open for writing leaves a truncated object on s3fs, gcsfs and adlfs. Nothing is ever renamed in a store.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
import time
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.progress import Progress
from polyaxon_tracking.redaction import mask_secrets, shown_path
from polyaxon_tracking.storage.credentials import ACCESS_KEYS, Location, locate, locate_directory

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Iterator

__all__: list[str] = []

_T = TypeVar("_T")

_logger = logging.getLogger("polyaxon_tracking")

# Beside the drivers' own attempts, which end after seconds.
_PATIENCE_SECONDS = 300.0
_PATIENCE_AT_START_SECONDS = 15.0
_LONGEST_PAUSE_SECONDS = 15.0

_PROBE = b"written to see whether it can be, and removed"

_EXTRAS = {"s3": "s3", "gs": "gcs", "abfs": "azure"}
_USUAL_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}

# Of botocore and google.auth.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")

# Loggers of drivers that write down requests: at DEBUG with the tokens that they are sent with, or each at INFO.
_TALKATIVE = {
    "azure.core.pipeline.policies.http_logging_policy": logging.WARNING,
    "botocore": logging.INFO,
    "fsspec.http": logging.INFO,
    "webhdfs": logging.INFO,
}


def list_files(url: str) -> dict[str, int]:
    """Sizes in bytes of the objects right below `url`, by their names; none where there is nothing."""
    return {name: entry["size"] for name, entry in _entries(url).items() if entry["type"] == "file"}


def list_directories(url: str) -> list[str]:
    """Names of the directories right below `url`: what objects further below begin with."""
    return [name for name, entry in _entries(url).items() if entry["type"] == "directory"]


def _entries(url: str) -> dict[str, dict[str, Any]]:
    location, fs, path = _opened(url)

    def call() -> list[dict[str, Any]]:
        fs.invalidate_cache()  # other processes write here too
        found: list[dict[str, Any]] = fs.ls(path, detail=True)
        return found

    try:
        entries = _patiently("Not listed", location, call)
    except FileNotFoundError:
        return {}
    found = {entry["name"].rstrip("/") if entry["type"] == "directory" else entry["name"]: entry for entry in entries}
    return {name.rpartition("/")[2]: entry for name, entry in found.items() if name.rpartition("/")[0] == path}


def information(url: str) -> dict[str, Any]:
    """What the store says of the object `url`: its ``size`` in bytes, and what changes with its content.

    Raises:
        FileNotFoundError: there is none.
    """
    location, fs, path = _opened(url)
    found: dict[str, Any] = _patiently(None, location, lambda: fs.info(path))
    return found


def modified(url: str) -> dt.datetime:
    """When the object `url` was written, by the clock of the store.

    Raises:
        FileNotFoundError: there is none.
    """
    location, fs, path = _opened(url)
    when: dt.datetime = _patiently(None, location, lambda: fs.modified(path))
    return when


def upload(file: str, url: str) -> None:
    """Put the local `file` to `url`, in place of what is there, as a whole."""
    location, fs, path = _opened(url)
    what = "Not saved, and what was there before is untouched"
    with Progress(f"Uploading {location.url}", os.path.getsize(file)) as progress:
        _patiently(what, location, lambda: fs.put_file(file, path, callback=_told(progress)))


def download(url: str, file: str, progress: Progress) -> None:
    """Get the object `url` to the local `file`."""
    location, fs, path = _opened(url)

    _patiently("Not downloaded", location, lambda: fs.get_file(path, file, callback=_told(progress)))


def _told(progress: Progress) -> Any:
    """What fsspec's drivers tell of the bytes that they have moved, told to `progress`, from none on."""
    from fsspec.callbacks import Callback

    class Told(Callback):  # type: ignore[misc]  # fsspec has no types
        def call(self, hook_name: str | None = None, **_: Any) -> None:  # noqa: ARG002  # fsspec's
            progress.reach(self.value)

    progress.reach(0)
    return Told()


def copy(url: str, other: str) -> None:
    """Have the store copy the object `url` to `other`, in the same store."""
    location, fs, path = _opened(url)
    _patiently("Not copied", location, lambda: fs.cp_file(path, _opened(other)[2]))


def remove(url: str) -> None:
    """Remove the object `url`, if it is there."""
    location, fs, path = _opened(url)
    # Another process was quicker, or an attempt whose answer was lost.
    with contextlib.suppress(FileNotFoundError):
        _patiently("Not removed", location, lambda: fs.rm_file(path))


def check_writable(url: str, whence: str) -> str:
    """Write an object below `url` and remove it; return `url` without secrets, as fsspec takes it.

    Raises:
        TrackingError: that did not work; the message names `whence`, where the URL came from.
        ModuleNotFoundError: the driver is not installed.
    """
    location = locate_directory(url)
    with _explained(location, whence, "takes this run's files", "write to", "write and delete"):
        _, fs, path = _opened(url)
        probe = f"{path}/.polyaxon-tracking-{secrets.token_hex(8)}"
        _patiently(None, location, lambda: fs.pipe_file(probe, _PROBE), at_start=True)
        _patiently(None, location, lambda: fs.rm_file(probe), at_start=True)
    return location.url


def exists(url: str, whence: str) -> bool:
    """Whether there is an object, or one whose name begins so, at `url`.

    Raises:
        TrackingError: the store does not say; the message names `whence`, where the URL came from.
        ModuleNotFoundError: the driver is not installed.
    """
    location = locate(url)
    with _explained(location, whence, "can be read", "read", "read"):
        _, fs, path = _opened(url)
        try:
            _patiently(None, location, lambda: fs.info(path), at_start=True)
        except FileNotFoundError:
            return False
    return True


@contextlib.contextmanager
def _explained(location: Location, whence: str, expected: str, use: str, rights: str) -> Iterator[None]:
    """Raise for what goes wrong at the start of a run a message that says what to do."""
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
        f"Received the URL {shown_path(location.url)} from {whence}, in the bucket {shown_path(bucket)}, {problem}. "
        f"Expected a bucket that {expected}. {advice}."
    )


def configure_driver(url: str) -> None:
    """Have every file system that fsspec makes for stores of this kind use the credentials for `url`.

    For a framework that opens the outputs path by itself. They go to fsspec's configuration in memory; nothing where
    the driver finds its credentials by itself.
    """
    location = locate(url)
    if location.options or location.user_info:
        import fsspec

        fsspec.config.conf.setdefault(location.protocol, {}).update(_driver_options(location))


def _driver_options(location: Location) -> dict[str, Any]:
    """Return the driver's arguments, with those that it takes from a URL with user and password: it decodes neither."""
    if not location.user_info:
        return location.options
    import fsspec

    driver = fsspec.get_filesystem_class(location.protocol)
    without = driver._get_kwargs_from_urls(location.url)  # noqa: SLF001  # as below
    given = driver._get_kwargs_from_urls(location.secret_url)  # noqa: SLF001
    return {name: unquote(value) for name, value in given.items() if without.get(name) != value}


def credentials_for(location: Location) -> str:
    """Where the credentials for `location` come from."""
    if location.whence is not None:
        return f"credentials in {location.whence}"
    if location.options or location.user_info or location.query:
        return "credentials in the URL"
    usual = _USUAL_CREDENTIALS.get(location.protocol)
    return f"credentials ({usual}; or {ACCESS_KEYS})" if usual else "credentials"


def _opened(url: str) -> tuple[Location, Any, str]:
    location = locate(url)
    options = tuple(sorted((name, repr(value)) for name, value in location.options.items()))
    bucket = "/".join(location._replace(query="").secret_url.split("/", 3)[:3])
    fs = _file_system(bucket, options, os.getpid())
    return location, fs, fs._strip_protocol(location.secret_url)  # noqa: SLF001  # documented for users, and in all drivers


# fsspec's own cache of instances has one for each thread, and every background write may be in another.
@functools.lru_cache(maxsize=8)
def _file_system(bucket: str, given: tuple[tuple[str, str], ...], process: int) -> Any:  # noqa: ARG001  # the key
    location = locate(bucket)
    for name, level in _TALKATIVE.items():
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(level)
    extra = _EXTRAS.get(location.protocol)
    try:
        import fsspec

        options = {**_driver_options(location), "skip_instance_cache": True, "use_listings_cache": False}
        return fsspec.core.url_to_fs(location.url, **options)[0]
    except ImportError as error:
        if extra is None:
            raise
        raise ModuleNotFoundError(
            f"Received the URL {shown_path(location.url)}, which needs a driver that is not installed: {error}. "
            f'Install it with: pip install "polyaxon-tracking[{extra}]"'
        ) from error
    except ValueError as error:  # no such protocol, or no credentials at all
        raise TrackingError(
            f"Received the URL {shown_path(location.url)}, which cannot be opened: {_reason(error)}. Expected a URL "
            f"that fsspec knows, and {credentials_for(location)} for it."
        ) from None
    except Exception as error:  # noqa: BLE001  # a driver that connects at once may raise anything
        raise OSError(_number(error), f"{_kind(error)}: {_reason(error)}", location.url) from None


def _patiently(what: str | None, location: Location, call: Callable[[], _T], *, at_start: bool = False) -> _T:
    """Do `call`, again and again where the store is away; an error that stays says `what` came of it, or why."""
    deadline = time.monotonic() + (_PATIENCE_AT_START_SECONDS if at_start else _PATIENCE_SECONDS)
    pause = 1.0
    while True:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error) or time.monotonic() + pause > deadline:
                if isinstance(error, OSError) and os.path.isabs(error.filename or ""):  # of the local disk
                    raise
                # `from None`: what a driver says may hold secrets
                raise OSError(_number(error), f"{what or _kind(error)}: {_reason(error)}", location.url) from None
            _logger.warning("%s: %s. Trying again in %g s", location.url, _reason(error), pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _number(error: BaseException) -> int:
    """The error number that says the same, from which Python makes the class."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:  # noqa: PLR2004  # see RFC 9110, 15
        return errno.ENOENT
    if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden"):
        return errno.EACCES
    return (error.errno if isinstance(error, OSError) else None) or errno.EIO


def _kind(error: BaseException) -> str:
    """What failed, since not every driver's message says so."""
    if any(type(cause).__name__ in _NO_CREDENTIALS for cause in _chain(error)):
        return "No credentials were found"
    number = _number(error)
    if number in (errno.ENOENT, errno.EACCES):
        return "Not found" if number == errno.ENOENT else "Not allowed"
    return "The store cannot be reached" if _status(error) is None and _may_pass(error) else "The request failed"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:400]
    return mask_secrets(text) or type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    """The status of HTTP that the store answered with, which each driver has elsewhere."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        found = [getattr(cause, name, None) for name in ("status_code", "status", "code")]
        if isinstance(response, dict):  # of botocore
            found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for value in found:
            if str(value).isdecimal():
                return int(str(value))
    return None


def _may_pass(error: BaseException) -> bool:
    """Whether it is of the kind that goes away: a store that is overloaded, restarts, or cannot be reached."""
    status = _status(error)
    if status is not None:
        return status // 100 == 5 or status in (408, 429)  # noqa: PLR2004  # see RFC 9110, 15
    return any(isinstance(cause, _passing_errors()) or getattr(cause, "retryable", False) for cause in _chain(error))


@functools.cache
def _passing_errors() -> tuple[type[BaseException], ...]:
    """The errors of a connection, of the drivers that are installed; where one is missing it raised nothing."""
    import asyncio

    found: list[type[BaseException]] = [ConnectionError, TimeoutError, asyncio.TimeoutError]
    try:
        import aiohttp
    except ModuleNotFoundError:
        pass
    else:
        found.append(aiohttp.ClientError)
    try:
        import botocore.exceptions
    except ModuleNotFoundError:
        pass
    else:
        found += [botocore.exceptions.HTTPClientError, botocore.exceptions.IncompleteReadError]
    try:
        import requests
    except ModuleNotFoundError:
        pass
    else:
        found.append(requests.exceptions.RequestException)
    try:
        import azure.core.exceptions
    except ModuleNotFoundError:
        pass
    else:
        found += [azure.core.exceptions.ServiceRequestError, azure.core.exceptions.ServiceResponseError]
    return tuple(found)
