"""Every moment of a save at which the power may go, played through on what was recorded of the save.

A model of a file system that keeps no promise but those of POSIX: what was written since the last ``fsync`` of a file
may be there, torn, or not; what happened to a directory's names since its last ``fsync`` may have happened or not, each
for itself. A kill is the case in which all of it has happened.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polyaxon_tracking import CheckpointManager, atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

CONTENT = {step: f"weights of step {step} ".encode() * 40 for step in (1, 2, 3)}


class Operation(NamedTuple):
    """One call that changed something, with paths relative to the directory."""

    call: str
    path: str
    target: str = ""
    content: bytes = b""


class Recorder:
    """The calls that change something below a directory, in order."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.operations: list[Operation] = []
        real_open = os.open

        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            descriptor = real_open(path, flags, mode, dir_fd=dir_fd)
            if flags & os.O_CREAT:
                self.add("create", path, dir_fd)
            return descriptor

        monkeypatch.setattr(os, "open", opened)
        for call in ("mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, call, self.wrapped(call))
        real_replace, real_fsync = os.replace, os.fsync

        def replace(source: str, target: str) -> None:
            real_replace(source, target)
            self.operations.append(Operation("replace", self.relative(source), self.relative(target)))

        def fsync(descriptor: int) -> None:
            real_fsync(descriptor)
            self.add("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "fsync", fsync)

    def wrapped(self, call: str) -> Callable[..., None]:
        real = getattr(os, call)

        def change(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
            real(path, *arguments, dir_fd=dir_fd)
            self.add(call, path, dir_fd)

        return change

    def add(self, call: str, path: str, dir_fd: int | None = None, content: bytes = b"") -> None:
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        self.operations.append(Operation(call, self.relative(path), content=content))

    def write(self, path: str, content: bytes) -> None:
        """Write a file, as the user's code does in the block."""
        Path(path).write_bytes(content)
        self.add("create", path)
        self.operations.append(Operation("write", self.relative(path), content=content))

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)


class Disk:
    """What may be on the disk after some operations."""

    def __init__(self) -> None:
        self.names: dict[str, int | None] = {".": None}  # path -> file, or None for a directory; what is there for sure
        self.pending: list[tuple[str, str, int | None, str]] = []  # (directory, path, file, "add" or "remove")
        self.files: list[list[bytes]] = []  # what each may hold, the most recent last
        self.current: dict[str, int | None] = {".": None}

    def apply(self, operation: Operation) -> None:
        call, path, target, content = operation
        if call == "create":
            self.files.append([b""])
            self.set(path, len(self.files) - 1)
        elif call == "mkdir":
            self.set(path, None)
        elif call == "write":
            versions = self.files[self.file(path)]
            versions += [content[:1], content[: len(content) // 2], content]
        elif call == "fsync":
            if self.current[path] is None:
                settled = [change for change in self.pending if change[0] == path]
                self.pending = [change for change in self.pending if change[0] != path]
                for change in settled:
                    self.change(self.names, change)
            else:
                file = self.file(path)
                self.files[file] = self.files[file][-1:]
        elif call == "replace":
            self.set(target, self.current[path])
            self.remove(path)
        else:
            self.remove(path)

    def file(self, path: str) -> int:
        file = self.current[path]
        assert file is not None
        return file

    def set(self, path: str, file: int | None) -> None:
        self.current[path] = file
        self.pending.append((os.path.dirname(path) or ".", path, file, "add"))

    def remove(self, path: str) -> None:
        del self.current[path]
        self.pending.append((os.path.dirname(path) or ".", path, None, "remove"))

    @staticmethod
    def change(names: dict[str, int | None], change: tuple[str, str, int | None, str]) -> None:
        _, path, file, kind = change
        if kind == "add":
            names[path] = file
        else:
            names.pop(path, None)

    def outcomes(self) -> Iterator[dict[str, bytes | None]]:
        """Yield each tree of files that a power loss may leave."""
        for happened in itertools.product([True, False], repeat=len(self.pending)):
            names = dict(self.names)
            for change, did in zip(self.pending, happened, strict=True):
                if did:
                    self.change(names, change)
            files = {file for path, file in names.items() if file is not None}
            versions = {file: self.files[file] for file in files}
            for contents in itertools.product(*versions.values()):
                held = dict(zip(versions, contents, strict=True))
                yield {path: None if file is None else held[file] for path, file in names.items()}


def build(tree: dict[str, bytes | None], root: Path) -> None:
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir(parents=True, exist_ok=True)
        elif (root / path).parent.is_dir():  # a name in a directory whose own name was lost is lost too
            (root / path).write_bytes(content)


def outcomes(operations: list[Operation], done: int) -> list[dict[str, bytes | None]]:
    disk = Disk()
    for operation in operations[:done]:
        disk.apply(operation)
    unique = {tuple(sorted(tree.items(), key=lambda item: item[0])): tree for tree in disk.outcomes()}
    return list(unique.values())


def test_whenever_the_power_goes_a_save_with_pruning_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "recorded"
    root.mkdir()
    returned: dict[int, int] = {}  # how many operations there were when the save of a step returned
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        manager = CheckpointManager(root / "resume", max_to_keep=1)
        for step, content in CONTENT.items():
            with manager.save(step) as path:
                recorder.write(path, content)
            returned[step] = len(recorder.operations)
    assert [operation.call for operation in recorder.operations].count("unlink") >= 2  # pruning is part of it
    looked_at = 0
    for done in range(len(recorder.operations) + 1):
        promised = max((step for step, count in returned.items() if count <= done), default=0)
        for number, tree in enumerate(outcomes(recorder.operations, done)):
            directory = tmp_path / f"{done}-{number}"
            directory.mkdir()
            build(tree, directory)
            latest = CheckpointManager(directory / "resume").latest()
            looked_at += 1
            moment = f"after {recorder.operations[:done][-3:]}, {tree.keys()}"
            assert (latest.step if latest else 0) in {promised, promised + 1}, moment
            if latest is not None:
                assert Path(latest.path).read_bytes() == CONTENT[latest.step], moment
    assert looked_at > 500


def test_whenever_the_power_goes_a_single_file_is_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "recorded"
    root.mkdir()
    returned = []
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        for content in CONTENT.values():
            with atomic_write(root / "best.keras") as path:
                recorder.write(path, content)
            returned.append(len(recorder.operations))
    versions = [None, *CONTENT.values()]
    for done in range(len(recorder.operations) + 1):
        promised = sum(count <= done for count in returned)
        for tree in outcomes(recorder.operations, done):
            assert tree.get("best.keras") in versions[promised : promised + 2]
