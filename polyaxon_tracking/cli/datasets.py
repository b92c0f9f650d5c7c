"""List the local copies of datasets, and remove those that no process uses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.text import Text

from polyaxon_tracking.cli.rows import displayed, readable_age, readable_size
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.credentials import locate
from polyaxon_tracking.storage.dataset_cache import CachedDataset, cache_directory, cached_datasets
from polyaxon_tracking.storage.dataset_cache import remove as remove_dataset

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["as_dict", "find", "print_found", "remove"]


def find(urls: list[str]) -> tuple[str, list[CachedDataset]]:
    """Return the cache's directory, and its datasets: those of `urls`, or all if `urls` is empty.

    Raises:
        TrackingError: the cache has no dataset of one of the URLs.
        OSError: the cache could not be read.
    """
    found = cached_datasets()
    known = {one.url for one in found}
    for url in urls:
        if locate(url).url not in known:
            raise TrackingError(
                f"Received {shown_path(url)}, of which there is no local copy. Expected one of: "
                f"{', '.join(map(shown_path, sorted(known))) or 'there are none'}."
            )
    wanted = {locate(url).url for url in urls} or known
    return cache_directory(), [one for one in found if one.url in wanted]


def remove(found: list[CachedDataset]) -> list[CachedDataset]:
    """Remove the copies that no process uses, and return them."""
    return [one for one in found if remove_dataset(one)]


def as_dict(dataset: CachedDataset, removed: list[CachedDataset]) -> dict[str, Any]:
    """Return `dataset` as a dict for JSON."""
    return {
        "url": dataset.url,
        "path": dataset.path,
        "files": dataset.files,
        "downloaded": dataset.downloaded,
        "size": dataset.size,
        "age_seconds": int(time.time() - dataset.last_used),
        "in_use": dataset.in_use,
        "removed": dataset in removed,
    }


def print_found(console: Console, directory: str, found: list[CachedDataset], removed: list[CachedDataset]) -> None:
    """Print the copies as a table."""
    if not found:
        console.print(Text(f"No datasets in {displayed(directory)}"), soft_wrap=True)
        return
    console.print(Text(displayed(directory), style="bold"), soft_wrap=True)
    rows = [("files", "size", "last used", "state", "dataset")]
    for one in found:
        age = readable_age(time.time() - one.last_used)
        rows.append((str(one.files), readable_size(one.size), age, _state(one, removed), displayed(one.url)))
    # Not a table of Rich, which would shorten the URLs to the width of the terminal.
    files, size, used, state, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        line = f"  {row[0]:>{files}}  {row[1]:>{size}}  {row[2]:>{used}}  {row[3]:<{state}}  {row[4]}"
        console.print(Text(line, style="dim" if row is rows[0] else ""), soft_wrap=True)


def _state(dataset: CachedDataset, removed: list[CachedDataset]) -> str:
    if dataset in removed:
        return "removed"
    if dataset.in_use:
        return "in use"
    if dataset.downloaded < dataset.files:
        return f"{dataset.files - dataset.downloaded} files missing"
    return "complete"
