"""Check every path of the run: disks and mounted volumes by writing, syncing and renaming, stores by requests."""

from __future__ import annotations

import os
import re
import tempfile
from typing import TYPE_CHECKING

from polyaxon_tracking.cli.rows import ERROR, INFO, OK, WARNING, Row, displayed, readable_size
from polyaxon_tracking.environment import (
    CONTEXT_ROOT,
    DATA_PATHS,
    IS_OFFLINE,
    OFFLINE_ROOT,
    OUTPUTS_PATH,
    REFS_OUTPUTS_PATHS,
    RUN_INSTANCE,
    get_data_paths,
    get_outputs_path,
    get_outputs_refs_paths,
    is_true,
    value_of,
)
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import mask_secrets
from polyaxon_tracking.storage.credentials import locate
from polyaxon_tracking.storage.dataset_cache import DATA_CACHE, cache_directory
from polyaxon_tracking.storage.disk import free_bytes, is_empty
from polyaxon_tracking.storage.probe import IN_PLACE, READ_RIGHT, WRITABLE, try_saving, what_to_do
from polyaxon_tracking.training.local_outputs import LOCAL_OUTPUTS
from polyaxon_tracking.urls import is_url, local_path

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["paths"]

_GROUP = "Paths"

# With less free space, the next checkpoint may not fit.
_LITTLE_SPACE = 10**9

# File systems whose content is lost with the container, or at a power cut.
_EPHEMERAL = {"overlay": "the container's own disk", "tmpfs": "memory", "ramfs": "memory"}


def paths() -> Iterator[Row]:
    """Check all paths, and yield their rows; a malformed variable is skipped."""
    remote = False
    try:
        outputs = get_outputs_path()
    except TrackingError:
        pass
    else:
        remote = outputs is not None and is_url(outputs)
        yield from _remote_outputs(outputs) if outputs and remote else _local_outputs(outputs)
    try:
        data = get_data_paths() or {}
    except TrackingError:
        data = {}
    for name, path in data.items():
        yield _check_reading(f"data {displayed(name)}", path, DATA_PATHS, ERROR)
    if any(map(is_url, data.values())):
        yield from _check_data_cache()
    try:
        references = get_outputs_refs_paths() or {}
    except TrackingError:
        references = {}
    for kind, listed in references.items():
        for number, path in enumerate(listed, start=1):
            # A reference to a resumed run can name a directory that was never written.
            yield _check_reading(f"{kind} {number}", path, REFS_OUTPUTS_PATHS, WARNING)
    yield from _check_temporary_directory(remote=remote)


def _check_data_cache() -> Iterator[Row]:
    """Check the directory for local copies of datasets."""
    try:
        directory = cache_directory()
    except TrackingError as error:
        yield Row(_GROUP, "data cache", ERROR, "no", DATA_CACHE, str(error))
        return
    yield Row(_GROUP, "data cache", INFO, displayed(directory), "local copies of datasets go there")
    other = f"Set {DATA_CACHE} to a directory on a larger disk, or remove copies: polyaxon-tracking datasets --clear."
    yield _check_free_space("data cache", directory, other)


def _check_temporary_directory(*, remote: bool) -> Iterator[Row]:
    other_path = "set TMPDIR to a directory that this user may write to"
    try:
        directory = tempfile.gettempdir()
    except FileNotFoundError as error:  # no directory is writable, as in a container with a read-only disk
        advice = f"S{other_path[1:]}."
        yield Row(_GROUP, "TMPDIR", ERROR if remote else WARNING, str(error.strerror), "", advice)
        return
    yield Row(_GROUP, "TMPDIR", INFO, displayed(directory), "uploads and downloads go through it")
    if remote:
        yield from _check_writing("TMPDIR", directory, other_path)
        yield _check_free_space("TMPDIR", directory, "Set TMPDIR to a directory on a larger disk.")


def _source(outputs: str | None) -> str:
    if outputs is None:
        return "the default off the cluster: each start has its own version_N there"
    if value_of(OUTPUTS_PATH) is not None:
        return OUTPUTS_PATH
    return f"{RUN_INSTANCE}, {OFFLINE_ROOT if is_true(IS_OFFLINE) else CONTEXT_ROOT}"


def _local_outputs(outputs: str | None) -> Iterator[Row]:
    path = os.path.abspath(local_path(LOCAL_OUTPUTS if outputs is None else outputs))
    yield Row(_GROUP, "outputs", OK, displayed(path), _source(outputs))
    other_path = f"set {OUTPUTS_PATH} to another path"
    try:
        there = _nearest_existing(path)
    except OSError as error:  # the mount's server is gone, or this user may not search the directory
        advice = f"{what_to_do(error)}, or {other_path}."
        yield Row(_GROUP, "outputs: exists", ERROR, f"{displayed(str(error.filename))}: {error.strerror}", "", advice)
        return
    if there == path:
        yield Row(_GROUP, "outputs: exists", OK, "yes")
    else:
        yield Row(_GROUP, "outputs: exists", INFO, f"no: made with the first save, below {displayed(there)}")
    kind, mount = _file_system(there)
    if outputs is not None and kind in _EPHEMERAL:
        warning = f"Outputs would go to {_EPHEMERAL[kind]}, and be lost with it: mount a volume there."
        yield Row(_GROUP, "outputs: file system", WARNING, f"{kind} at {mount}", "", warning)
    else:
        yield Row(_GROUP, "outputs: file system", OK, f"{kind} at {mount}")
    yield from _check_writing("outputs", there, other_path)
    yield _check_free_space("outputs", there, "A new checkpoint needs room next to those that are kept: make room.")


def _nearest_existing(path: str) -> str:
    """Return `path` if it exists, otherwise its nearest existing parent."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return _nearest_existing(os.path.dirname(path))
    os.scandir(path).close()
    return path


def _check_writing(name: str, directory: str, other_path: str) -> Iterator[Row]:
    """Write files to `directory`, as saving a checkpoint does, and remove them; `other_path` is a further advice."""
    step, rows = WRITABLE, []
    try:
        for step in try_saving(directory, in_place=True):
            rows.append(Row(_GROUP, f"{name}: {step}", OK, "yes"))
    except OSError as error:
        # Only Keras, HDF5 and zip files need to change files in place; checkpoints of torch do not.
        status = WARNING if step == IN_PLACE else ERROR
        advice = f"{what_to_do(error, step)}, or {other_path}."
        rows[-1] = rows[-1]._replace(status=status, value=f"no: {error.strerror or error}", advice=advice)
    yield from rows


def _check_free_space(name: str, directory: str, advice: str) -> Row:
    free = free_bytes(directory)
    if free < _LITTLE_SPACE:
        return Row(_GROUP, f"{name}: free space", WARNING, readable_size(free), "", advice)
    return Row(_GROUP, f"{name}: free space", OK, readable_size(free))


def _remote_outputs(url: str) -> Iterator[Row]:
    yield Row(_GROUP, "outputs", OK, displayed(url), _source(url))
    try:
        from polyaxon_tracking.storage.object_store import (  # as everywhere: only URLs need it
            check_writable,
            credentials_for,
        )

        check_writable(url, _source(url))
    except Exception as error:  # noqa: BLE001  # a driver may raise anything, and then the other rows are still useful
        yield Row(_GROUP, "outputs: writable", ERROR, "no", "", _advice_for(error))
    else:
        import fsspec

        location = locate(url)
        driver = fsspec.get_filesystem_class(location.protocol).__module__.partition(".")[0]
        yield Row(_GROUP, "outputs: driver", OK, driver)
        yield Row(_GROUP, "outputs: access", OK, credentials_for(location))
        yield Row(_GROUP, "outputs: writable", OK, "yes, and what was written was removed")


def _check_reading(name: str, path: str, source: str, missing: str) -> Row:
    """Return the row of a path to read from; its status is `missing` if nothing is there."""
    where = displayed(path)
    advice = "Correct the path, or put there what it names."
    if is_url(path):
        try:
            from polyaxon_tracking.storage.object_store import exists  # as everywhere: only URLs need it

            found = exists(path, source)
        except Exception as error:  # noqa: BLE001  # as above
            return Row(_GROUP, name, ERROR, f"{where}: cannot be read", source, _advice_for(error))
        if not found:
            return Row(_GROUP, name, missing, f"{where}: there is nothing", source, advice)
        return Row(_GROUP, name, OK, f"{where}: can be read", source)
    local = os.path.abspath(local_path(path))
    try:
        if os.path.isdir(local):
            os.scandir(local).close()
        else:
            os.close(os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except FileNotFoundError:
        return Row(_GROUP, name, missing, f"{where}: there is nothing", source, advice)
    except (OSError, ValueError) as error:  # ValueError if a name holds a NUL
        advice = what_to_do(error, otherwise=READ_RIGHT) if isinstance(error, OSError) else READ_RIGHT
        advice += ", or correct the path."
        return Row(_GROUP, name, ERROR, f"{where}: {getattr(error, 'strerror', error)}", source, advice)
    if source == DATA_PATHS and is_empty(local):
        advice = "Correct the path, or put the data there."
        return Row(_GROUP, name, WARNING, f"{where}: is empty", source, advice)
    writable = "writable" if os.access(local, os.W_OK) else "read-only"
    free = readable_size(free_bytes(local))
    return Row(_GROUP, name, OK, f"{where}: can be read, {writable}, {free} free", source)


def _advice_for(error: Exception) -> str:
    if isinstance(error, (TrackingError, ModuleNotFoundError)):
        return str(error)
    return f"The driver of the store failed: {type(error).__name__}: {mask_secrets(str(error))}. Correct the URL."


def _file_system(path: str) -> tuple[str, str]:
    """Return the type of the file system that `path` is on, and its mount point."""
    path = os.path.realpath(path)
    kind, mount = "unknown", "/"
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:  # not Linux
        return kind, mount
    for line in lines:
        mounted, _, of = line.partition(" - ")  # see proc_pid_mountinfo(5)
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mounted.split()[4])
        # Of two mounts at the same place, the later mount hides the earlier one.
        if f"{path}/".startswith(f"{point.rstrip('/')}/") and len(point) >= len(mount):
            kind, mount = of.split()[0], point
    return kind, displayed(mount)
