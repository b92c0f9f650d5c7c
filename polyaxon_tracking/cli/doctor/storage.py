"""Every path of the run, tried: disks and mounted volumes by writing, syncing and renaming, stores by requests."""

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
from polyaxon_tracking.storage.disk import free_bytes, sync_directory, sync_file
from polyaxon_tracking.storage.locks import staging
from polyaxon_tracking.training.run import LOCAL_OUTPUTS
from polyaxon_tracking.urls import is_url, local_path

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["paths"]

_GROUP = "Paths"

# With less, the next checkpoint may be the one that does not fit.
_LITTLE_SPACE = 10**9

# File systems that go with the container, or with the power.
_PASSING = {"overlay": "the container's own disk", "tmpfs": "memory", "ramfs": "memory"}

_PROBE = b"written to see whether it can be, and removed"


def paths() -> Iterator[Row]:
    """Try them all; of a variable that is malformed there are none."""
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
        yield _to_read(f"data {displayed(name)}", path, DATA_PATHS, ERROR)
    try:
        references = get_outputs_refs_paths() or {}
    except TrackingError:
        references = {}
    for kind, listed in references.items():
        for number, path in enumerate(listed, start=1):
            # A reference to a run that was resumed can name a directory that was never written.
            yield _to_read(f"{kind} {number}", path, REFS_OUTPUTS_PATHS, WARNING)
    yield from _temporary(remote=remote)


def _temporary(*, remote: bool) -> Iterator[Row]:
    advice = "Set TMPDIR to a directory that this user may write to."
    try:
        directory = tempfile.gettempdir()
    except FileNotFoundError as error:  # it has tried them all; a container whose disk is read-only
        yield Row(_GROUP, "TMPDIR", ERROR if remote else WARNING, str(error.strerror), "", advice)
        return
    yield Row(_GROUP, "TMPDIR", INFO, displayed(directory), "uploads and downloads go through it")
    if remote:
        yield from _tried("TMPDIR", directory, advice)
        yield _space("TMPDIR", directory, "Set TMPDIR to a directory on a larger disk.")


def _source(outputs: str | None) -> str:
    if outputs is None:
        return "the default off the cluster"
    if value_of(OUTPUTS_PATH) is not None:
        return OUTPUTS_PATH
    return f"{RUN_INSTANCE}, {OFFLINE_ROOT if is_true(IS_OFFLINE) else CONTEXT_ROOT}"


def _local_outputs(outputs: str | None) -> Iterator[Row]:
    path = os.path.abspath(local_path(LOCAL_OUTPUTS if outputs is None else outputs))
    yield Row(_GROUP, "outputs", OK, displayed(path), _source(outputs))
    advice = f"Mount the volume for writing, or set {OUTPUTS_PATH} to another path."
    try:
        there = _nearest(path)
    except OSError as error:  # a mount whose server is gone, or a directory that this user may not search
        if isinstance(error, NotADirectoryError):
            advice = f"It is a file. Remove it, or set {OUTPUTS_PATH} to another path."
        yield Row(_GROUP, "outputs: exists", ERROR, f"{displayed(str(error.filename))}: {error.strerror}", "", advice)
        return
    if there == path:
        yield Row(_GROUP, "outputs: exists", OK, "yes")
    else:
        yield Row(_GROUP, "outputs: exists", INFO, f"no: made with the first save, below {displayed(there)}")
    kind, mount = _file_system(there)
    if outputs is not None and kind in _PASSING:
        told = f"Outputs would go to {_PASSING[kind]}, and be lost with it: mount a volume there."
        yield Row(_GROUP, "outputs: file system", WARNING, f"{kind} at {mount}", "", told)
    else:
        yield Row(_GROUP, "outputs: file system", OK, f"{kind} at {mount}")
    yield from _tried("outputs", there, advice)
    yield _space("outputs", there, "Checkpoints need their own size beside those that are kept: make room.")


def _nearest(path: str) -> str:
    """`path`, or the directory nearest above it that exists."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(os.path.dirname(path))
    os.scandir(path).close()
    return path


def _tried(name: str, directory: str, advice: str) -> Iterator[Row]:
    """Do in `directory` what saving a checkpoint does, and leave nothing behind."""
    trying = "writable"
    try:
        with staging(directory) as staged:
            first, second = os.path.join(staged, "first"), os.path.join(staged, "second")
            for path in (first, second):
                with open(path, "xb") as file:
                    file.write(_PROBE)
            yield Row(_GROUP, f"{name}: writable", OK, "yes")
            trying = "fsync"
            sync_file(first)
            sync_directory(staged)
            yield Row(_GROUP, f"{name}: fsync", OK, "yes")
            trying = "atomic rename"
            os.replace(first, second)
            sync_directory(staged)
            yield Row(_GROUP, f"{name}: atomic rename", OK, "yes")
    except OSError as error:
        yield Row(_GROUP, f"{name}: {trying}", ERROR, f"no: {error.strerror}", "", advice)


def _space(name: str, directory: str, advice: str) -> Row:
    free = free_bytes(directory)
    if free < _LITTLE_SPACE:
        return Row(_GROUP, f"{name}: free space", WARNING, readable_size(free), "", advice)
    return Row(_GROUP, f"{name}: free space", OK, readable_size(free))


def _remote_outputs(url: str) -> Iterator[Row]:
    yield Row(_GROUP, "outputs", OK, displayed(url), _source(url))
    try:
        from polyaxon_tracking.storage.object_store import (  # as everywhere: for URLs alone
            check_writable,
            credentials_for,
        )

        check_writable(url, _source(url))
    except Exception as error:  # noqa: BLE001  # a driver may raise anything, and the other rows are of use then
        yield Row(_GROUP, "outputs: writable", ERROR, "no", "", _told(error))
    else:
        import fsspec

        location = locate(url)
        driver = fsspec.get_filesystem_class(location.protocol).__module__.partition(".")[0]
        yield Row(_GROUP, "outputs: driver", OK, driver)
        yield Row(_GROUP, "outputs: access", OK, credentials_for(location))
        yield Row(_GROUP, "outputs: writable", OK, "yes, and what was written was removed")


def _to_read(name: str, path: str, source: str, missing: str) -> Row:
    """The row of a path to read from; `missing` is its status where nothing is there."""
    where = displayed(path)
    advice = "Correct the path, or put there what it names."
    if is_url(path):
        try:
            from polyaxon_tracking.storage.object_store import exists  # as everywhere: for URLs alone

            found = exists(path, source)
        except Exception as error:  # noqa: BLE001  # as above
            return Row(_GROUP, name, ERROR, f"{where}: cannot be read", source, _told(error))
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
    except (OSError, ValueError) as error:  # the latter where a name holds a NUL
        advice = "Give this user the right to read it, or correct the path."
        return Row(_GROUP, name, ERROR, f"{where}: {getattr(error, 'strerror', error)}", source, advice)
    writable = "writable" if os.access(local, os.W_OK) else "read-only"
    free = readable_size(free_bytes(local))
    return Row(_GROUP, name, OK, f"{where}: can be read, {writable}, {free} free", source)


def _told(error: Exception) -> str:
    if isinstance(error, (TrackingError, ModuleNotFoundError)):
        return str(error)
    return f"The driver of the store failed: {type(error).__name__}: {mask_secrets(str(error))}. Correct the URL."


def _file_system(path: str) -> tuple[str, str]:
    """The kind of the file system that `path` is on, and where it is mounted."""
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
        # Of two at the same place the later one covers the other.
        if f"{path}/".startswith(f"{point.rstrip('/')}/") and len(point) >= len(mount):
            kind, mount = of.split()[0], point
    return kind, displayed(mount)
