"""Retry requests to an object store that is temporarily unavailable, and report failures without secrets."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from polyaxon_tracking.redaction import mask_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polyaxon_tracking.storage.credentials import Location

__all__: list[str] = []

_T = TypeVar("_T")

_logger = logging.getLogger("polyaxon_tracking")

# In addition to the drivers' own retries, which end after seconds.
_PATIENCE_SECONDS = 300.0
_PATIENCE_AT_START_SECONDS = 15.0
_LONGEST_PAUSE_SECONDS = 15.0

# The errors of Python 3.10 and of the drivers that mean a broken connection, or damage on the way, by their module.
_CONNECTION_ERRORS = {
    "asyncio": ["TimeoutError"],
    "aiohttp": ["ClientError"],
    "botocore.exceptions": ["HTTPClientError", "IncompleteReadError", "FlexibleChecksumError"],
    "requests.exceptions": ["RequestException"],
    "azure.core.exceptions": ["ServiceRequestError", "ServiceResponseError"],
}
# Exceptions of botocore and google.auth.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")


def with_retries(what: str | None, location: Location, call: Callable[[], _T], *, at_start: bool = False) -> _T:
    """Call `call`, and retry while the store is unavailable; the final error states `what`, or its kind, and why."""
    deadline = time.monotonic() + (_PATIENCE_AT_START_SECONDS if at_start else _PATIENCE_SECONDS)
    pause = 1.0
    while True:
        try:
            return call()
        except Exception as error:
            if not _is_temporary(error) or time.monotonic() + pause > deadline:
                if isinstance(error, OSError) and os.path.isabs(error.filename or ""):  # an error of the local disk
                    raise
                # `from None`: a driver's message may hold secrets
                raise OSError(
                    error_number(error), f"{what or failure_kind(error)}: {failure_reason(error)}", location.url
                ) from None
            _logger.warning("%s: %s. Trying again in %g s", location.url, failure_reason(error), pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def error_number(error: BaseException) -> int:
    """Return the ``errno`` for `error`, from which Python chooses the subclass of ``OSError``."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:  # noqa: PLR2004  # see RFC 9110, 15
        return errno.ENOENT
    if status == 416:  # noqa: PLR2004  # a part of an empty object was requested
        return errno.ENODATA
    if isinstance(error, NotImplementedError) or status == 501:  # noqa: PLR2004
        return errno.EOPNOTSUPP
    if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden"):
        return errno.EACCES
    return (error.errno if isinstance(error, OSError) else None) or errno.EIO


def failure_kind(error: BaseException) -> str:
    """Return a short text with the kind of failure, because not every driver's message states it."""
    if any(type(cause).__name__ in _NO_CREDENTIALS for cause in _chain(error)):
        return "No credentials were found"
    known = {errno.ENOENT: "Not found", errno.EACCES: "Not allowed", errno.EOPNOTSUPP: "Not supported by the driver"}
    if kind := known.get(error_number(error)):
        return kind
    return "The store cannot be reached" if _status(error) is None and _is_temporary(error) else "The request failed"


def failure_reason(error: BaseException) -> str:
    """Return the message of `error` in one line and without secrets, or its type if it has no message."""
    text = " ".join(str(error).split())[:400]
    return mask_secrets(text) or type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of the store's response, which each driver keeps in a different attribute."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        found = [getattr(cause, name, None) for name in ("status_code", "status", "code")]
        if isinstance(response, dict):  # a response of botocore
            found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for value in found:
            if str(value).isdecimal():
                return int(str(value))
    return None


def _is_temporary(error: BaseException) -> bool:
    """Return whether `error` may be temporary: the store is overloaded, restarts, or cannot be reached."""
    status = _status(error)
    if status is not None:
        # See RFC 9110, 15. A store that answers 501 will never do it.
        return (status // 100 == 5 and status != 501) or status in (408, 429)  # noqa: PLR2004
    return any(isinstance(cause, _connection_errors()) or getattr(cause, "retryable", False) for cause in _chain(error))


def _connection_errors() -> tuple[type[BaseException], ...]:
    """Return the connection errors of Python and of the drivers that this process has imported."""
    found: list[type[BaseException]] = [ConnectionError, TimeoutError]
    for module, names in _CONNECTION_ERRORS.items():
        found += [getattr(sys.modules[module], name) for name in names if module in sys.modules]
    return tuple(found)
