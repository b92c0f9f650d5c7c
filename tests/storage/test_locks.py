"""Staging directories: which are litter, where locks do not show other machines, and that all of them go."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polyaxon_tracking import CheckpointManager, atomic_write, checkpoints
from polyaxon_tracking.storage.shared_copies import remove_unused
from polyaxon_tracking.training import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Saves slowly: a line on its standard output says that a save has begun, one on its input lets it continue.
SLOW = """
import sys
from polyaxon_tracking import CheckpointManager
manager = CheckpointManager(sys.argv[1])
for step in (1001, 1002):
    with manager.save(step) as path:
        with open(path, "w") as file:
            file.write("slow")
        print(path, flush=True)
        assert sys.stdin.readline()
"""

# Another machine: of another boot, and a network mount that keeps its locks to itself.
ELSEWHERE = """
import fcntl
from polyaxon_tracking.storage import locks
locks._owner = lambda _: "0123456789abcdef-0.99"
fcntl.flock = lambda *_: None
"""

# This machine, before it was started again.
BEFORE_A_REBOOT = """
from polyaxon_tracking.storage import locks
locks._BOOT_ID = "/proc/sys/kernel/random/uuid"
"""

HOUR = 3600


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "outputs" / "checkpoints" / "resume")


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[list[Path]]:
    """Yield two FUSE mounts of one directory: each has its own locks, as the mounts of two machines have."""
    may_mount = os.access("/dev/fuse", os.R_OK | os.W_OK) and (os.geteuid() == 0 or shutil.which("fusermount"))
    if not may_mount:
        pytest.skip("needs a kernel with FUSE, and a user who may mount")
    unpacked = Path(sys.prefix) / "bindfs"
    bindfs = shutil.which("bindfs") or str(unpacked / "usr" / "bin" / "bindfs")
    libraries = os.pathsep.join(map(str, unpacked.glob("**/lib/*-linux-gnu")))
    assert os.path.exists(bindfs), "This needs bindfs: `make test` fetches Debian's; on other systems install it."
    shared = tmp_path / "shared"
    mounted = [tmp_path / "here", tmp_path / "there"]
    with contextlib.ExitStack() as stack:
        for path in (shared, *mounted):
            path.mkdir()
        for path in mounted:
            command = [bindfs, str(shared), str(path)]
            subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": libraries}, check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
        yield mounted


def start(directory: str | Path, code: str = ELSEWHERE + SLOW) -> tuple[subprocess.Popen[str], Path]:
    """Start a process, and return it in the middle of its first save, with the file that it writes."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def killed(directory: str | Path, code: str = ELSEWHERE + SLOW) -> Path:
    """Return what a process left that was killed in a save."""
    process, file = start(directory, code)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert file.read_text() == "slow"
    return file.parent


def save(manager: CheckpointManager, step: int) -> None:
    with manager.save(step) as path:
        Path(path).write_text(f"step {step}")


def hidden(directory: str | Path) -> list[str]:
    return [path.name for path in Path(directory).rglob(".*")]


def make_old(directory: Path, seconds: float = 2 * HOUR) -> None:
    for path in (*directory.rglob("*"), directory):
        status = path.stat()
        os.utime(path, (status.st_atime, status.st_mtime - seconds))


# What another machine does


def test_what_another_machine_is_writing_is_not_touched(manager: CheckpointManager) -> None:
    process, _ = start(manager.directory)
    for step in (1, 2):
        save(manager, step)
    Run()  # no start takes it for litter either
    errors = process.communicate("\n\n")[1]
    assert process.returncode == 0, errors
    assert sorted(checkpoint.step for checkpoint in manager.checkpoints()) == [1, 2, 1001, 1002]
    assert hidden(manager.directory) == []


def test_two_mounts_that_keep_locks_to_themselves(mounts: list[Path]) -> None:
    processes = [start(mount / "checkpoints", SLOW)[0] for mount in mounts]
    errors = [process.communicate("\n\n")[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for mount in mounts:
        assert {checkpoint.verify() for checkpoint in CheckpointManager(mount / "checkpoints").checkpoints()} == {None}
        assert hidden(mount) == []


def test_what_a_kill_left_on_a_mount_goes_with_the_next_save_there(mounts: list[Path]) -> None:
    here, there = [CheckpointManager(mount / "checkpoints") for mount in mounts]
    litter = killed(here.directory, SLOW)
    save(there, 1)
    assert hidden(there.directory) != []
    save(here, 2)
    assert not litter.exists()
    assert hidden(here.directory) == []


def test_what_a_kill_left_on_a_disk_goes_after_a_reboot(manager: CheckpointManager, tmp_path: Path) -> None:
    if not os.major(tmp_path.stat().st_dev):
        pytest.skip("needs temporary files on a disk")
    process, file = start(manager.directory, BEFORE_A_REBOOT + SLOW)
    save(manager, 1)
    assert file.exists()
    process.kill()
    process.wait()
    save(manager, 2)
    assert not file.parent.exists()


def test_litter_of_another_machine_goes_when_nobody_has_written_to_it_for_long(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    litter = killed(manager.directory)
    make_old(litter, HOUR / 2)
    tomorrow = litter.stat().st_mtime + 24 * HOUR
    monkeypatch.setattr("time.time", lambda: tomorrow)  # the machine's clock is wrong, that of its disks is not
    save(manager, 1)
    assert litter.exists()
    make_old(litter, HOUR)
    save(manager, 2)
    assert not litter.exists()


def test_a_file_that_grows_keeps_the_directory_of_a_long_save(manager: CheckpointManager) -> None:
    process, file = start(manager.directory)
    parts = file.with_name("parts")
    parts.mkdir()
    make_old(file.parent)
    (parts / "1.bin").write_text("of another rank")
    save(manager, 1)
    assert file.exists()
    assert process.communicate("\n\n")[1].count("Error") == 0


def test_a_lock_that_is_seen_keeps_what_nobody_has_written_to_for_long(manager: CheckpointManager) -> None:
    with manager.save(1) as path:
        Path(path).write_text("slow")
        make_old(Path(path).parent)
        save(CheckpointManager(manager.directory), 2)
        Run()
    assert sorted(checkpoint.step for checkpoint in manager.checkpoints()) == [1, 2]


def test_what_a_kill_in_a_removal_left_goes_when_it_is_old(manager: CheckpointManager) -> None:
    litter = killed(manager.directory, SLOW)
    (litter / ".lock").unlink()  # the first that is removed, where the file system lists it first
    save(manager, 1)
    assert litter.exists()  # it may just be made
    make_old(litter)
    save(manager, 2)
    assert not litter.exists()


def test_a_full_disk_names_what_killed_saves_of_other_machines_take(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    litter = killed(manager.directory)

    def fill() -> None:
        with manager.save(1) as path:
            Path(path).write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as raised:
        fill()
    taken = (litter / "step=0000001001.ckpt").stat().st_blocks * 512
    assert str(raised.value).endswith(
        f". Saves that are not finished, or were killed, take room there: {litter.name} ({taken:,} bytes)"
    )


@pytest.mark.parametrize("directory", ["outputs", "memory://bucket/outputs"])
@pytest.mark.parametrize("when", ["before it was written", "after it was written", "in the middle of a directory"])
def test_a_save_whose_staging_directory_was_removed_says_so(
    directory: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    manager = CheckpointManager(directory)
    save(manager, 1)
    staged = ""

    def save_while_it_is_removed() -> None:
        nonlocal staged
        with manager.save(2) as path:
            staged = os.path.dirname(path)
            if when == "after it was written":
                Path(path).write_text("step 2")
            elif when == "in the middle of a directory":
                os.mkdir(path)
            shutil.rmtree(staged)
            if when != "after it was written":
                Path(path, "0.pt" if when == "in the middle of a directory" else "").write_text("step 2")

    with pytest.raises(FileNotFoundError) as raised:
        save_while_it_is_removed()
    message = str(raised.value)
    assert message.startswith(f"[Errno 2] {manager.directory}/step=0000000002.ckpt was not saved, and no existing file")
    assert f"the directory {staged}, where it was being written, was removed meanwhile" in message
    assert message.endswith("Give each training its own outputs path, and keep such jobs away from .staging-*")
    latest = manager.latest()
    assert latest is not None
    assert latest.step == 1
    save(manager, 2)


# That all of them go


def test_no_file_is_removed_while_it_is_open(manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """SMB, NFS and FUSE would keep its name, and so the directory."""
    removed: list[str] = []

    def checked(real: Callable[..., None]) -> Callable[..., None]:
        def remove(path: str, **named: Any) -> None:
            is_open = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
            assert not [file for file in is_open if file.startswith(manager.directory) and file.endswith(path)], path
            removed.append(os.path.basename(path))
            real(path, **named)

        return remove

    litter = killed(manager.directory, SLOW)
    monkeypatch.setattr(checkpoints.os, "unlink", checked(os.unlink))
    save(manager, 1)
    assert not litter.exists()
    assert removed.count(".lock") == 2  # that of the killed process, and its own


def test_what_a_killed_save_left_goes_at_the_next_start(outputs: Path) -> None:
    folders = [outputs, outputs / "checkpoints", outputs / "checkpoints" / "resume", outputs / "checkpoints" / "mine"]
    litter = [killed(folder, SLOW) for folder in folders]
    with atomic_write(outputs / "checkpoints" / "best.keras") as living:
        Path(living).write_text("best")
        Run()
        assert os.path.exists(living)
    assert [path for path in litter if path.exists()] == []
    assert hidden(outputs) == []


@pytest.mark.parametrize("removals", [0, 1, 2, 3])
def test_what_a_kill_in_the_removal_of_a_staging_directory_left_goes_with_the_next_save(
    tmp_path: Path, removals: int
) -> None:
    code = f"""
import os, pathlib, signal, sys
from polyaxon_tracking.storage.locks import StagingDirectory
left = {removals}
def kill(event, arguments):
    global left
    if event in ("os.remove", "os.rmdir"):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
with StagingDirectory(sys.argv[1]) as staged:
    pathlib.Path(staged, "best.keras").write_text("weights")
    pathlib.Path(staged, "parts").mkdir()
    sys.addaudithook(kill)
"""
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "next") as staged:
        Path(staged).write_text("content")
    assert [path.name for path in tmp_path.iterdir()] == ["next"]


def test_what_a_kill_in_the_removal_of_a_copy_left_is_removed_later(tmp_path: Path) -> None:
    code = """
import os, pathlib, signal, sys
from polyaxon_tracking.storage.shared_copies import hold, remove_unused
file = pathlib.Path(sys.argv[1], "files", "1.bin")
def fill():
    file.parent.mkdir()
    file.write_text("content")
os.close(hold(sys.argv[1], file.exists, fill, "s3://bucket/1.bin"))
sys.addaudithook(lambda event, _: event == "os.rmdir" and os.kill(os.getpid(), signal.SIGKILL))
remove_unused(sys.argv[1])
"""
    copy = tmp_path / "copy"
    assert subprocess.run([sys.executable, "-c", code, copy], check=False).returncode == -signal.SIGKILL
    assert copy.exists()
    assert remove_unused(str(copy))
    assert not copy.exists()
