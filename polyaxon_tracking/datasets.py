"""The path of one dataset of the run, or of a local copy of it."""

from __future__ import annotations

from polyaxon_tracking.environment import DATA_PATHS, NO_OP, get_data_paths, is_true
from polyaxon_tracking.errors import TrackingError, closest
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.urls import is_url

TYPE_CHECKING = False  # as `typing.TYPE_CHECKING`, without the milliseconds that importing `typing` takes
if TYPE_CHECKING:
    from typing import TypeVar

    _T = TypeVar("_T")

__all__ = [
    "check_dataset_name",
    "get_data_path",
    "local_data_path",
    "unknown_dataset",
]


def get_data_path(name: str, default: _T | None = None, *, download: bool = False) -> str | _T:
    """Return the path of a dataset, by its name in ``POLYAXON_RUN_DATA_PATHS``, e.g. ``get_data_path("digits")``.

    Args:
        name: the dataset's name.
        default: the value to return if the run has no such dataset, for example the path on your own machine.
        download: whether to download a dataset that is a URL, and to return the path of the local copy: a file, or a
            directory if there are objects below the URL. All processes of a machine share one copy, and the next
            start downloads only what has changed. The copies are in ``$TMPDIR``, or in ``POLYAXON_DATA_CACHE``.

    Raises:
        TrackingError: there is no such dataset and no default; the message lists the existing names, and the closest.
            Or `name` is not a string. With `download`, there is nothing at the URL, or no room for a copy.
        OSError: with `download`, the store does not respond, or a file arrived damaged.

    Examples:
        >>> os.environ["POLYAXON_RUN_DATA_PATHS"] = '{"digits": "/data/digits"}'
        >>> get_data_path("digits", default="data/digits", download=True)
        '/data/digits'
    """
    check_dataset_name(name)
    paths = get_data_paths()
    if paths is not None and name in paths:
        path: str | _T = paths[name]
    elif default is not None:
        path = default
    else:
        raise TrackingError(unknown_dataset(name, paths))
    return local_data_path(name, path) if download and isinstance(path, str) else path


def local_data_path(name: str, path: str) -> str:
    """Return `path`, that of the dataset `name`; if it is a URL, the path of a local copy.

    Raises:
        TrackingError: there is nothing at the URL, or no room for a copy.
        OSError: the store does not respond, or a file arrived damaged.
    """
    if not is_url(path):
        return path
    from polyaxon_tracking.storage.dataset_cache import local_copy  # here and not above: only URLs need it

    try:
        return local_copy(path)
    except FileNotFoundError:
        raise TrackingError(
            f"The dataset {shown_path(name)} is expected at {shown_path(path)}, and there is nothing. Correct the URL, "
            f"or put the data there."
        ) from None


def check_dataset_name(name: object) -> None:
    """Raise a `TrackingError` unless `name` is a string."""
    if not isinstance(name, str):
        raise TrackingError(f"Received the dataset name {name!r}. Expected a string, such as 'digits'.")


def unknown_dataset(name: str, paths: dict[str, str] | None) -> str:
    """Return the error message that the run has no dataset `name`, and which datasets it has."""
    if paths is None:
        why = f"{NO_OP} is true" if is_true(NO_OP) else f"{DATA_PATHS} is not set"
        return (
            f"Received the dataset name {shown_path(name)}, but {why}, so this run has no datasets. "
            f"In a cluster, ask for it in the polyaxonfile; elsewhere, give the path on this machine "
            f"(`default=` of get_data_path, or a mapping from name to path in `datasets=` of the callbacks)."
        )
    if not paths:
        return (
            f"Received the dataset name {shown_path(name)}, but {DATA_PATHS} is an empty object, so this run has no "
            f"datasets. Ask for it in the polyaxonfile, or unset the variable off the cluster."
        )
    return (
        f"Received the dataset name {shown_path(name)}. Expected one of those in {DATA_PATHS}: "
        f"{', '.join(shown_path(known) for known in paths)}.{closest(name, list(paths))}"
    )
