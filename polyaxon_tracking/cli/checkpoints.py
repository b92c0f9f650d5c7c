"""List the checkpoints below a path, and verify whether each is intact."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import itertools
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import progress
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from polyaxon_tracking.checkpoints import CheckpointManager
from polyaxon_tracking.cli.rows import displayed, readable_age, readable_size
from polyaxon_tracking.environment import get_outputs_path
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.integrity import size_on_disk
from polyaxon_tracking.progress import Progress
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.disk import is_directory
from polyaxon_tracking.storage.opening import open_directory
from polyaxon_tracking.training.checkpoint_directories import RESUME
from polyaxon_tracking.training.local_outputs import LOCAL_OUTPUTS, versions
from polyaxon_tracking.urls import is_url, local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from polyaxon_tracking.checkpoint_names import Checkpoint

__all__ = ["Found", "as_dict", "find", "print_found"]


class Found(NamedTuple):
    """A checkpoint, with its size and time from its disk or store."""

    checkpoint: Checkpoint
    size: int
    """The size in bytes."""
    modified: dt.datetime | None
    """When the checkpoint was written or copied, by the clock of its disk or store; ``None`` if the driver of the store
    cannot know it."""
    intact: bool | None
    """Whether the checkpoint is intact; ``None`` if it was not verified."""
    damage: str | None
    """The reason why the checkpoint is not intact, or ``None``."""

    @property
    def directory(self) -> str:
        """The directory of the checkpoint."""
        return self.checkpoint.source.rpartition("/")[0]


def find(path: str | None, console: Console, *, verify: bool) -> tuple[str, list[Found]]:
    """Return `path` without secrets, and the checkpoints below it; by default, `path` is the outputs path.

    Args:
        path: an outputs path, its directory ``checkpoints``, ``resume``, ``resume-2`` and so on in ``checkpoints``, or
            the directory with the versions of several starts.
        console: the console for the progress bar of verifying.
        verify: whether to read every file.

    Raises:
        TrackingError: there is no such directory, or its store does not respond.
        OSError: the directory could not be read.
        ModuleNotFoundError: the driver of the store is not installed.
    """
    if path is None:
        path = get_outputs_path() or LOCAL_OUTPUTS
    elif not _is_directory(path):
        is_there = not is_url(path) and os.path.lexists(local_path(path))
        problem = "which is not a directory" if is_there else "where there is nothing"
        raise TrackingError(
            f"Received {shown_path(path)}, {problem}. Expected an outputs path, the checkpoints in it, or a URL of "
            f"one: correct it, or leave it out for the run's own outputs."
        )
    root = open_directory(path).path
    outputs = [*(f"{root}/{name}" for name in versions(_names_of_directories(root))), root]
    directories = itertools.chain.from_iterable(map(_directories, outputs))
    found = [one for directory in directories for one in _listed(directory)]
    return root, list(_verified(found, console)) if verify else found


def as_dict(found: Found) -> dict[str, Any]:
    """Return `found` as a dict for JSON."""
    return {
        "path": found.checkpoint.source,
        "step": found.checkpoint.step,
        "epoch": found.checkpoint.epoch,
        "start": found.checkpoint.start,
        "kept_for_good": found.checkpoint.kept_at is not None,
        "size": found.size,
        "modified": None if found.modified is None else found.modified.isoformat(timespec="seconds"),
        "age_seconds": None if (age := _age(found)) is None else int(age),
        "intact": found.intact,
        "damage": found.damage,
    }


def print_found(console: Console, root: str, found: list[Found]) -> None:
    """Print the checkpoints as text, with a table for each directory."""
    if not found:
        console.print(Text(f"No checkpoints in {displayed(root)}"), soft_wrap=True)
    for directory in dict.fromkeys(one.directory for one in found):
        console.print(Text(displayed(directory), style="bold"), soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("  start", "step", "epoch", "size", "age"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        here = [one for one in found if one.directory == directory]
        for one in here:
            checkpoint = one.checkpoint
            numbers = (checkpoint.start, checkpoint.step, checkpoint.epoch)
            table.add_row(*map(str, numbers), readable_size(one.size), readable_age(_age(one)), _state(one))
        console.print(table)
        for one in here:
            if one.damage:
                console.print(Text(f"  damaged: {displayed(one.checkpoint.name)}: {one.damage}"), soft_wrap=True)


def _is_directory(path: str) -> bool:
    if is_url(path):
        from polyaxon_tracking.storage.object_store import exists  # as everywhere: only URLs need it

        return exists(path, "PATH")
    return is_directory(local_path(path))


def _directories(root: str) -> list[str]:
    """Return `root`, the directories ``resume``, ``resume-2`` and so on in it, and those of ``checkpoints`` in it.

    In ``checkpoints``, a named training has its own directory with such directories.
    """
    below = _names_of_directories(root)
    trainings = sorted(
        (name for name in below if RESUME.fullmatch(name)), key=lambda name: int(name.partition("-")[2] or 1)
    )
    found = [root, *(f"{root}/{name}" for name in trainings)]
    if "checkpoints" in below:
        found += _directories(f"{root}/checkpoints")
    if root.rpartition("/")[2] == "checkpoints":
        named = [name for name in below if name not in trainings and not name.startswith(".")]
        found += [directory for name in sorted(named) for directory in _directories(f"{root}/{name}")[1:]]
    return found


def _names_of_directories(path: str) -> list[str]:
    if is_url(path):
        from polyaxon_tracking.storage.object_store import list_directories

        return list_directories(path)
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []


def _listed(directory: str) -> Iterator[Found]:
    for checkpoint in CheckpointManager(directory).checkpoints():
        try:
            if is_url(directory):
                from polyaxon_tracking.storage.object_store import information, modified

                size = information(checkpoint.path)["size"]
                when = modified(checkpoint.path)
            else:
                size = size_on_disk(checkpoint.path)
                when = dt.datetime.fromtimestamp(os.lstat(checkpoint.path).st_mtime, dt.timezone.utc)
        except FileNotFoundError:
            continue  # pruned since the listing, by a training that still runs
        yield Found(checkpoint, size, when, None, None)


def _verified(found: list[Found], console: Console) -> Iterator[Found]:
    with contextlib.ExitStack() as stack:
        advance = _progress(stack, found, console)
        for one in found:
            damage = one.checkpoint.verify(advance)
            if damage is not None and not _is_there(one.checkpoint):
                continue
            yield one._replace(intact=damage is None, damage=damage)


def _progress(stack: contextlib.ExitStack, found: list[Found], console: Console) -> Callable[[int], object] | None:
    """Return a function to call with the number of bytes read since its last call, or None."""
    if any(is_url(one.checkpoint.path) for one in found):
        return None  # downloads show their own progress
    total = sum(one.size for one in found)
    if not console.is_terminal:
        return stack.enter_context(Progress("Verifying", total)).advance
    columns = (TextColumn("Verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = stack.enter_context(progress.Progress(*columns, console=console, transient=True))
    return functools.partial(bar.advance, bar.add_task("", total=total))


def _is_there(checkpoint: Checkpoint) -> bool:
    if is_url(checkpoint.path):
        return checkpoint.name in open_directory(checkpoint.path.rpartition("/")[0]).names()
    return os.path.lexists(checkpoint.path)


def _state(found: Found) -> str:
    state = {None: "not verified", True: "intact", False: "damaged"}[found.intact]
    return state if found.checkpoint.kept_at is None else f"{state}, kept for good"


def _age(found: Found) -> float | None:
    if found.modified is None:
        return None
    return (dt.datetime.now(dt.timezone.utc) - found.modified).total_seconds()
