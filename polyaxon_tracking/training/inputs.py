"""Check what a user passes to a callback, and the outputs path, before training starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from polyaxon_tracking.environment import DATA_PATHS, OUTPUTS_PATH, get_data_paths, unknown_dataset
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.disk import is_there
from polyaxon_tracking.storage.probe import READ_RIGHT, WRITABLE, try_saving, what_failed, what_to_do
from polyaxon_tracking.training.versions import LOCAL_OUTPUTS, version_of_this_start
from polyaxon_tracking.urls import is_url, local_path

__all__ = ["RESUME", "check_name", "checked_datasets", "checked_local_outputs", "checked_loggers", "checked_outputs"]

# The names of the directories with training states; the group is the number of the training, from the second on.
RESUME = re.compile(r"resume(?:-(\d+))?")


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


def checked_datasets(datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    """Return the paths of `datasets` by name, or raise a `TrackingError` that lists every problem."""
    if isinstance(datasets, str):
        name = shown_path(datasets)
        raise TrackingError(
            f"Received datasets={name}, a string. Expected a list of names, such as [{name}], or a mapping from name "
            f"to the path on this machine, such as {{{name}: 'data/digits'}}."
        )
    if not isinstance(datasets, Iterable):
        raise TrackingError(
            f"Received datasets={datasets!r}. Expected a list of names, or a mapping from name to the path on this "
            f"machine."
        )
    names = list(datasets)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TrackingError(f"Received datasets with the names {wrong}. Expected the names to be strings.")
    if isinstance(datasets, Mapping):
        wrong = [name for name, path in datasets.items() if not isinstance(path, str | os.PathLike)]
        if wrong:
            raise TrackingError(
                f"Received datasets without a path: {wrong}. Expected a path on this machine for each, or a list of "
                f"names if the cluster knows all of them."
            )
    on_cluster = get_data_paths()
    local = {name: os.fspath(path) for name, path in datasets.items()} if isinstance(datasets, Mapping) else {}
    available = local if on_cluster is None else on_cluster
    problems = []
    for name in names:
        if name not in available:
            problems.append(unknown_dataset(name, on_cluster))
        elif problem := _problem_of_data(available[name]):
            source = "`datasets=`" if on_cluster is None else DATA_PATHS
            problems.append(
                f"The dataset {shown_path(name)} is expected at {shown_path(available[name])}, according to {source}"
                f"{problem}."
            )
    if problems:
        raise TrackingError("\n".join(problems))
    return {name: available[name] for name in names}


def _problem_of_data(path: str) -> str | None:
    """Return why there is no data at the local `path`, and what to do about it; ``None`` if there is any."""
    try:
        if is_url(path) or is_there(local_path(path)):
            return None
    except OSError as error:
        return f", and cannot be read: {error.strerror}. {what_to_do(error, otherwise=READ_RIGHT)}, or correct the path"
    return ", and there is nothing. Correct the path, or put the data there"
