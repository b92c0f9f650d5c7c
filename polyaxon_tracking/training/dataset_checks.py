"""Check the datasets that a training needs, before it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

from polyaxon_tracking.datasets import unknown_dataset
from polyaxon_tracking.environment import DATA_PATHS, get_data_paths
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.disk import file_in_place_of, is_empty, is_there
from polyaxon_tracking.storage.probe import READ_RIGHT, what_to_do
from polyaxon_tracking.urls import is_url, local_path

__all__ = ["checked_datasets"]

_logger = logging.getLogger("polyaxon_tracking")


def checked_datasets(datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    """Return the paths of `datasets` by name, or raise a `TrackingError` that lists every problem."""
    names, local = _names_and_paths(datasets)
    on_cluster = get_data_paths()
    available = local if on_cluster is None else on_cluster
    source = "`datasets=`" if on_cluster is None else DATA_PATHS
    problems = []
    for name in names:
        if name not in available:
            problems.append(unknown_dataset(name, on_cluster))
        elif problem := _problem(name, available[name], source):
            problems.append(problem)
        elif not is_url(available[name]) and is_empty(local_path(available[name])):
            _logger.warning("The dataset %s is empty: %s", shown_path(name), shown_path(available[name]))
    if problems:
        raise TrackingError("\n".join(problems))
    return {name: available[name] for name in names}


def _names_and_paths(
    datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]],
) -> tuple[list[str], dict[str, str]]:
    """Return the names in `datasets`, and the paths if it is a mapping, or raise a `TrackingError`."""
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
    paths = {name: os.fspath(path) for name, path in datasets.items()} if isinstance(datasets, Mapping) else {}
    return names, paths


def _problem(name: str, path: str, source: str) -> str | None:
    """Return the error message that there is no data at `path`, that of the dataset `name`; ``None`` if there is any.

    Args:
        name: the name of the dataset.
        path: its path or URL. It is not checked if the driver for the URL is not installed, since the script may read
            it in another way.
        source: where the path comes from.
    """
    try:
        if is_url(path):
            return _problem_of_url(name, path, source)
        if is_there(local_path(path)):
            return None
        file = file_in_place_of(os.path.abspath(local_path(path)))
    except OSError as error:
        advice = f"{what_to_do(error, otherwise=READ_RIGHT)}, or correct the path"
        return _expected_at(name, path, source, f"and cannot be read: {error.strerror}. {advice}")
    if file is not None:
        return _expected_at(name, path, source, f"and {shown_path(file)} is a file, not a directory. Correct the path")
    return _expected_at(name, path, source, "and there is nothing. Correct the path, or put the data there")


def _problem_of_url(name: str, url: str, source: str) -> str | None:
    from polyaxon_tracking.storage.object_store import exists  # here and not above: only URLs need it

    try:
        if exists(url, f"the dataset {shown_path(name)} in {source}"):
            return None
    except ModuleNotFoundError:
        return None
    except TrackingError as error:
        return str(error)
    return _expected_at(name, url, source, "and there is nothing. Correct the URL, or put the data there")


def _expected_at(name: str, path: str, source: str, problem: str) -> str:
    return f"The dataset {shown_path(name)} is expected at {shown_path(path)}, according to {source}, {problem}."
