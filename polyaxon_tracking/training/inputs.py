"""Check what a user passes to a callback, and the outputs path, before training starts."""

from __future__ import annotations

import os
from collections.abc import Iterable

from polyaxon_tracking.environment import OUTPUTS_PATH
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.probe import WRITABLE, try_saving, what_failed, what_to_do
from polyaxon_tracking.training.checkpoint_directories import RESUME
from polyaxon_tracking.training.local_outputs import LOCAL_OUTPUTS, version_of_this_start
from polyaxon_tracking.urls import is_url, local_path

__all__ = ["check_name", "checked_local_outputs", "checked_loggers", "checked_outputs"]


def checked_outputs(path: str, source: str = OUTPUTS_PATH, *, in_place: bool = False) -> str:
    """Return the outputs path, absolute or as a URL without secrets, after files were written there as a save does.

    Args:
        path: the outputs path.
        source: where `path` came from, for messages.
        in_place: whether saves also change a file before its end.

    Raises:
        TrackingError: one of the steps failed.
    """
    if is_url(path):
        from polyaxon_tracking.storage.object_store import check_writable  # here and not above: only URLs need it

        return check_writable(path, source)
    path = os.path.abspath(local_path(path))
    step = WRITABLE
    try:
        for step in try_saving(path, in_place=in_place):  # noqa: B007  # for the message
            pass
    except OSError as error:
        raise _unusable_outputs(path, error, step, source) from None  # the message holds everything that the error says
    return path


def checked_local_outputs(*, resume: bool, in_place: bool = False) -> str:
    """Return the outputs path off the cluster: this start's version in ``./outputs``, checked as by `checked_outputs`.

    Args:
        resume: whether the start uses the newest version.
        in_place: whether saves also change a file before its end.

    Raises:
        TrackingError: the version cannot be created, or one of the steps failed.
    """
    outputs = os.path.abspath(LOCAL_OUTPUTS)
    try:
        version = version_of_this_start(outputs, resume=resume)
    except OSError as error:
        raise _unusable_outputs(outputs, error, WRITABLE, OUTPUTS_PATH) from None  # as above
    return checked_outputs(version, in_place=in_place)


def _unusable_outputs(path: str, error: OSError, step: str, source: str) -> TrackingError:
    return TrackingError(
        f"Received the outputs path {shown_path(path)}, {what_failed(error, step)}. Expected a directory that "
        f"this user may write to. {what_to_do(error, step)}, or set {source} to another path."
    )


def checked_loggers(loggers: object) -> list[str]:
    """Return `loggers`, the names of loggers, as a list, or raise a `TrackingError`."""
    expected = "Expected a list of names"
    if isinstance(loggers, str):
        raise TrackingError(f"Received loggers={loggers!r}, a string. {expected}: [{loggers!r}].")
    given = list(loggers) if isinstance(loggers, Iterable) else [loggers]
    names = [name for name in given if isinstance(name, str)]
    if len(names) < len(given):
        raise TrackingError(f"Received loggers={loggers!r}. {expected} of loggers, such as ['mine'].")
    return names


def check_name(name: object) -> None:
    """Raise a `TrackingError` unless `name` is ``None`` or the name of a directory for a training."""
    if name is None:
        return
    if not isinstance(name, str) or name in {"", ".", ".."} or set(name) & set("/\\\0") or RESUME.fullmatch(name):
        raise TrackingError(
            f"Received name={name!r}. Expected the name of a directory for this training, such as 'fold-3': not empty, "
            f"without '/', and not 'resume'."
        )
