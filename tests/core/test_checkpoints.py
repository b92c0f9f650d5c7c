"""The checkpoint manager: what is there after every kind of trouble."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mounts import without_a_server

from polyaxon_tracking import Checkpoint, CheckpointManager, TrackingError, atomic_write, cached_path, checkpoints
from polyaxon_tracking.training import open_directory

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints")


def save(manager: CheckpointManager, step: int, epoch: int = 0, content: str | None = None) -> Path:
    with manager.save(step, epoch) as path:
        Path(path).write_text(content or f"step {step}")
    return Path(manager.checkpoints()[0].path)


def steps(manager: CheckpointManager) -> list[int]:
    return [checkpoint.step for checkpoint in manager.checkpoints()]


def entries(manager: CheckpointManager) -> list[str]:
    """Return all names in the directory, including hidden ones."""
    return sorted(os.listdir(manager.directory))


def latest_step(manager: CheckpointManager) -> int | None:
    checkpoint = manager.latest()
    return checkpoint and checkpoint.step


# Saving and finding


def test_nothing_was_saved(manager: CheckpointManager) -> None:
    assert manager.latest() is None
    assert manager.checkpoints() == []
    assert not os.path.exists(manager.directory)


def test_what_is_saved_is_found(manager: CheckpointManager) -> None:
    path = save(manager, 120, epoch=3, content="weights")
    checkpoint = manager.latest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.epoch, checkpoint.path) == (120, 3, str(path))
    assert path.read_text() == "weights"
    assert re.fullmatch(r"step=0000000120-epoch=3-start=1-crc=[0-9a-f]{8}\.ckpt", path.name)


def test_the_newest_stay(manager: CheckpointManager) -> None:
    for step in (1, 2, 10, 100):
        save(manager, step)
    assert steps(manager) == [100, 10]


def test_steps_beyond_the_padding_are_compared_as_numbers(manager: CheckpointManager) -> None:
    save(manager, 9_999_999_999)
    save(manager, 10_000_000_000)
    assert latest_step(manager) == 10_000_000_000


def test_of_one_step_the_later_epoch_is_the_newer(manager: CheckpointManager) -> None:
    save(manager, 8, epoch=1, content="within the epoch")
    save(manager, 8, epoch=2, content="at its end")
    assert [(checkpoint.step, checkpoint.epoch) for checkpoint in manager.checkpoints()] == [(8, 2), (8, 1)]


def test_a_training_that_starts_from_scratch_is_newer_than_all_before_and_leaves_the_newest_of_them(
    manager: CheckpointManager,
) -> None:
    def kept() -> list[tuple[int, int]]:
        return [(checkpoint.start, checkpoint.step) for checkpoint in manager.checkpoints()]

    save(manager, 100)
    save(manager, 200)
    save(manager, 50)
    assert kept() == [(2, 50), (1, 200)]
    save(manager, 60)
    save(manager, 70)
    assert kept() == [(2, 70), (2, 60), (1, 200)]
    save(manager, 5)
    save(manager, 6)
    assert kept() == [(3, 6), (3, 5), (2, 70)]


def test_the_modification_time_does_not_matter(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=5)
    paths = [save(manager, step) for step in (10, 20, 30, 40, 50)]
    for seed in range(100):
        for path, time in zip(paths, random.Random(seed).sample(range(10**9), 5), strict=True):
            os.utime(path, (time, time))
        assert latest_step(manager) == 50


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_gives(manager: CheckpointManager, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = save(manager, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_only_the_one_that_is_chosen_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=2000)
    name = "step={:010d}-epoch=0-start=1-crc={:08x}.ckpt"
    for step in range(1000):
        (tmp_path / name.format(step, 0)).write_text("")
    save(manager, 2000)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **named: opened.append(path) or real(path, *rest, **named))
    assert latest_step(manager) == 2000
    assert len(opened) == 1


def test_a_file_url_and_a_path_object_are_directories(tmp_path: Path) -> None:
    assert CheckpointManager(f"file://{tmp_path}/a").directory == str(tmp_path / "a")
    assert CheckpointManager(tmp_path / "a").directory == str(tmp_path / "a")


# Directories


def save_directory(manager: CheckpointManager, step: int) -> Path:
    with manager.save(step) as path:
        os.makedirs(f"{path}/parts/of")
        for rank in range(3):
            Path(path, "parts", "of", f"{rank}.bin").write_bytes(bytes([rank, step]) * 5000)
        Path(path, ".metadata").write_text("which part is where")
    return Path(manager.checkpoints()[0].path)


def test_a_directory_is_saved_and_pruned_as_a_whole(manager: CheckpointManager) -> None:
    paths = [save_directory(manager, step) for step in (1, 2, 3)]
    assert entries(manager) == [path.name for path in paths[1:]]
    newest = manager.latest()
    assert newest is not None
    assert (newest.step, newest.path) == (3, str(paths[-1]))
    assert Path(newest.path, "parts", "of", "2.bin").read_bytes() == bytes([2, 3]) * 5000


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "parts" / "of" / "1.bin", 12345),
        lambda path: truncate(path / "parts" / "of" / "1.bin"),
        lambda path: (path / ".metadata").unlink(),
        lambda path: (path / "parts" / "of" / "3.bin").touch(),
        lambda path: (path / "parts" / "of" / "0.bin").rename(path / "parts" / "of" / "3.bin"),
        lambda path: shutil.rmtree(path / "parts"),
    ],
    ids=["a flipped bit", "truncated", "a missing file", "a file more", "another name", "a missing directory"],
)
def test_a_damaged_directory_is_skipped(manager: CheckpointManager, damage: Callable[[Path], Any]) -> None:
    save_directory(manager, 1)
    damage(save_directory(manager, 2))
    assert latest_step(manager) == 1


# Damage


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(path, 5), r"its bytes have the CRC-32 \w{8}, not \w{8}"),
        (truncate, r"its bytes have the CRC-32 \w{8}, not \w{8}"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_text("something else"), r"its bytes have the CRC-32 \w{8}, not \w{8}"),
        (make_directory, "it is empty"),
        (make_pipe, "it is not a file"),
        (dangle, "it is a symbolic link"),
        (link, "it is a symbolic link"),
    ],
    ids=[
        "a flipped bit",
        "truncated",
        "empty",
        "a foreign file",
        "a directory",
        "a pipe",
        "a link to nowhere",
        "a link",
    ],
)
def test_a_damaged_one_is_skipped_with_one_warning_and_stays(
    manager: CheckpointManager, damage: Callable[[Path], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = save(manager, 1), save(manager, 2)
    damage(newest)
    assert latest_step(manager) == 1
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert re.fullmatch(
        rf"Skipped damaged checkpoints, using {re.escape(str(before))} instead: {re.escape(str(newest))}: {reason}",
        record.message,
    )
    assert os.path.lexists(newest)


def test_any_flipped_bit_is_found(manager: CheckpointManager) -> None:
    path = save(manager, 1, content="weights" * 100)
    [checkpoint] = manager.checkpoints()
    assert checkpoint.verify() is None
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), 300):
        flip(path, bit)
        assert checkpoint.verify() is not None
        flip(path, bit)


def test_training_continues_beyond_a_damaged_one_without_removing_the_good(manager: CheckpointManager) -> None:
    good, damaged = save(manager, 100), save(manager, 200)
    truncate(damaged)
    assert latest_step(manager) == 100
    new = save(manager, 150)
    assert latest_step(manager) == 150
    assert {Path(manager.directory, name) for name in entries(manager)} == {good, damaged, new}


def test_none_intact_is_an_error_that_lists_them(manager: CheckpointManager) -> None:
    first, second = save(manager, 1), save(manager, 2)
    truncate(first)
    second.write_bytes(b"")
    with pytest.raises(TrackingError) as error:
        manager.latest()
    assert re.fullmatch(
        rf"Received only damaged checkpoints in '{manager.directory}': {second}: it is empty; {first}: its bytes have the CRC-32 "
        r"\w{8}, not \w{8}\. Expected at least one that is intact\. Training does not start from scratch by itself then: put an "
        r"intact copy there, or, to start from scratch, move these away or pass resume=False to the callback\.",
        str(error.value),
    )


def test_foreign_files_are_no_checkpoints(manager: CheckpointManager) -> None:
    save(manager, 1)
    for name in ("notes.txt", "step=5.ckpt", "step=0000000009-epoch=0-start=1-crc=zz.ckpt"):
        Path(manager.directory, name).write_text("")
    assert steps(manager) == [1]


# Mistakes


@pytest.mark.parametrize("max_to_keep", [0, -1, 1.5, True, None, "2"])
def test_max_to_keep_is_a_positive_number(tmp_path: Path, max_to_keep: Any) -> None:
    with pytest.raises(TrackingError) as error:
        CheckpointManager(tmp_path, max_to_keep=max_to_keep)
    assert str(error.value) == f"Received max_to_keep={max_to_keep!r}. Expected a whole number, 1 or more."


@pytest.mark.parametrize("step", [-1, 1.0, "1", None])
def test_a_step_is_a_count(manager: CheckpointManager, step: Any) -> None:
    with pytest.raises(TrackingError) as error, manager.save(step):
        pass
    assert str(error.value) == f"Received step={step!r}. Expected a whole number, 0 or more."
    assert not os.path.exists(manager.directory)


@pytest.mark.parametrize("suffix", [3, None, "ckpt", "", "./x", ".a/../b", ".ckpt "])
def test_a_suffix_is_a_files_ending(manager: CheckpointManager, suffix: str) -> None:
    with pytest.raises(TrackingError, match="Expected a file's ending"), manager.save(1, suffix=suffix):
        pass


def test_a_block_that_writes_nothing(manager: CheckpointManager) -> None:
    with pytest.raises(TrackingError, match="Received nothing to save: no file was written to"), manager.save(1):
        pass
    assert entries(manager) == []


def test_a_block_that_writes_an_empty_directory(manager: CheckpointManager) -> None:
    with pytest.raises(TrackingError, match="Received nothing to save: no file"), manager.save(1) as path:
        os.mkdir(path)
    assert entries(manager) == []


def test_an_exception_in_the_block_leaves_everything_as_it_was(manager: CheckpointManager) -> None:
    save(manager, 1)
    before = entries(manager)
    with pytest.raises(KeyError, match="mine"), manager.save(2) as path:
        Path(path).write_text("half")
        raise KeyError("mine")
    assert entries(manager) == before


# Failing system calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


class Calls:
    """Count the calls that commit a file, and have one of them fail."""

    NAMES = ("mkdir", "open", "fsync", "replace", "close", "readv", "fstat")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.failing: int | None = None
        self.error = errno.EIO
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if "polyaxon_tracking" not in sys._getframe(1).f_code.co_filename:
                return real(*arguments, **named)
            self.made.append(name)
            if self.failing == len(self.made):
                if name == "close":
                    real(*arguments)  # close releases the descriptor even where it reports an error
                raise OSError(self.error, os.strerror(self.error))
            return real(*arguments, **named)

        return call

    def count(self, action: Callable[[], object]) -> int:
        self.made, self.failing = [], None
        action()
        return len(self.made)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
def test_whichever_call_fails_the_checkpoint_before_is_intact_and_none_is_reported_that_is_not_there(
    tmp_path: Path, calls: Calls, error: int
) -> None:
    manager = CheckpointManager(tmp_path / "counted", max_to_keep=1)
    save(manager, 1)
    total = calls.count(lambda: save(manager, 2))
    failures = 0
    for number in range(1, total + 1):
        manager = CheckpointManager(tmp_path / str(number), max_to_keep=1)
        calls.failing = None
        save(manager, 1)
        calls.made, calls.failing, calls.error = [], number, error
        try:
            save(manager, 2)
        except OSError as raised:
            assert raised.errno == error  # noqa: PT017
            failures += 1
            reported = False
        else:
            reported = True
        calls.failing = None
        fresh = CheckpointManager(manager.directory, max_to_keep=1)
        if reported:
            assert latest_step(fresh) == 2, f"call {number}, {calls.made[number - 1]}, failed in silence"
        else:
            assert latest_step(fresh) in (1, 2)
        save(fresh, 3)
        assert latest_step(fresh) == 3
    assert failures >= 8


def test_the_order_of_a_commit_survives_a_power_cut(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the content is synced before the rename, the directory before the block ends, and that only then the old file is removed."""
    save(manager, 1)
    save(manager, 2)
    done: list[str] = []
    kind = {True: "fsync directory", False: "fsync file"}
    reals = os.fsync, os.replace, os.unlink

    def fsync(descriptor: int) -> None:
        reals[0](descriptor)
        done.append(kind[stat.S_ISDIR(os.fstat(descriptor).st_mode)])

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (reals[1](*paths), done.append("rename")))
    monkeypatch.setattr(
        os,
        "unlink",
        lambda path, **named: (reals[2](path, **named), done.append("remove") if "step=" in str(path) else None),
    )
    save(manager, 3)
    assert done == ["fsync file", "rename", "fsync directory", "remove"]


def test_a_failing_removal_of_the_old_is_a_warning(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(manager, step)

    def unlink(path: str, **_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(checkpoints.os, "unlink", unlink)
    save(manager, 3)
    assert latest_step(manager) == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "could not be removed: [Errno 13] Permission denied" in caplog.text


FULL_DISK = """
import resource, signal, sys
from polyaxon_tracking import CheckpointManager
manager = CheckpointManager(sys.argv[1])
with manager.save(1) as path:
    open(path, "wb").write(b"1" * 50_000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with manager.save(2) as path:
    try:
        with open(path, "wb") as file:
            for _ in range(100):
                file.write(b"2" * 10_000)
    except OSError as error:
        # torch and HDF5 report a write that failed without the reason.
        raise {"OSError": error, "RuntimeError": RuntimeError("failed"), "no errno": OSError("failed")}[sys.argv[2]]
"""


@pytest.mark.parametrize("error", ["OSError", "RuntimeError", "no errno"])
def test_a_file_that_cannot_grow_leaves_the_previous_one_and_says_how_much_is_needed(
    manager: CheckpointManager, error: str
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, manager.directory, error], capture_output=True, text=True, check=False
    )
    assert re.search(
        rf"OSError: \[Errno 27\] {manager.directory}/step=0000000002\.ckpt was not saved, and no existing file was changed: "
        r"File too large\. It needs more than \d+,\d{3} bytes, [\d,]+ bytes are free on its file system",
        process.stderr,
    ), process.stderr
    assert latest_step(manager) == 1
    assert len(entries(manager)) == 1


@pytest.mark.parametrize("files", [["state"], ["state/0.pt", "state/1/2.pt"]], ids=["a file", "a directory"])
def test_on_a_full_disk_all_that_was_written_so_far_is_needed_and_what_it_takes_is_free(
    manager: CheckpointManager, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(manager, 1)  # so that the directory is there
    full = os.statvfs_result((4096, 4096, 1 << 20, 0, 0, 0, 0, 0, 0, 255))  # no block is free
    monkeypatch.setattr(checkpoints.os, "statvfs", lambda _: full)

    def fill() -> None:
        with manager.save(2) as path:
            for name in files:
                file = Path(name.replace("state", path))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(bytes(65536 // len(files)))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device\. It needs more than 65,536 bytes, ") as raised:
        fill()
    free = re.search(r"bytes, ([\d,]+) bytes are free on its file system", str(raised.value))
    assert free is not None
    assert int(free[1].replace(",", "")) >= 65_536


@pytest.mark.parametrize("number", [errno.EROFS, errno.EISDIR, errno.EACCES])
def test_where_the_reason_is_another_missing_room_is_reported(manager: CheckpointManager, number: int) -> None:
    def fail() -> None:
        with manager.save(1) as path:
            Path(path).write_text("state")
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=rf"changed: {re.escape(os.strerror(number))}$"):
        fail()


@pytest.mark.parametrize("directory", [None, "", 3, b"outputs"])
def test_no_directory(directory: Any) -> None:
    with pytest.raises(TrackingError) as error:
        CheckpointManager(directory)
    assert str(error.value) == (
        f"Received directory={directory!r}. Expected a path or a URL. get_outputs_path() returns None off the cluster: write "
        f'CheckpointManager(get_outputs_path("checkpoints") or "outputs/checkpoints").'
    )


@pytest.mark.parametrize("below", ["", "/checkpoints"])
def test_a_file_in_place_of_the_directory(below: str, tmp_path: Path) -> None:
    file = tmp_path / "outputs"
    file.write_text("mine")
    with pytest.raises(TrackingError) as error:
        CheckpointManager(f"{file}{below}")
    assert str(error.value) == (
        f"Received directory='{file}{below}', and '{file}' is a file. Expected a directory or the path of a new one. Move the "
        f"file away, or give another path."
    )
    assert file.read_text() == "mine"


@pytest.mark.parametrize("path", [None, "", 3, b"a.txt"])
@pytest.mark.parametrize("use", [open_directory, cached_path, lambda path: atomic_write(path).__enter__()])
def test_no_path(use: Callable[[Any], Any], path: Any, tmp_path: Path) -> None:
    with pytest.raises(TrackingError) as error:
        use(path)
    assert str(error.value) == (
        f"Received path={path!r}. Expected a path or a URL. Give a string, or a pathlib.Path for a local path."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["outputs/", "s3://bucket", "s3://bucket/", "s3://bucket/run/", "memory://run"])
def test_an_atomic_write_of_a_directory(path: str, tmp_path: Path) -> None:
    with pytest.raises(
        TrackingError, match=re.escape(f"Received path='{path}'. Expected the path of a file, such as ")
    ):
        atomic_write(path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_path_objects_are_paths(tmp_path: Path) -> None:
    with atomic_write(Path("outputs/a.txt")) as path:
        Path(path).write_text("content")
    assert open_directory(Path("outputs")).names() == ["a.txt"]
    assert Path(cached_path(Path("outputs/a.txt"))).read_text() == "content"
    assert CheckpointManager(Path("outputs")).latest() is None


# Kills


KILLED = """
import os, signal, sys
from polyaxon_tracking import CheckpointManager
from polyaxon_tracking.storage import local
manager = CheckpointManager(sys.argv[1], max_to_keep=1)
die_before, left = sys.argv[2], int(sys.argv[3])
real = getattr(os, die_before)
def die(*arguments, **named):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return real(*arguments, **named)
setattr(os, die_before, die)
with manager.save(2) as path:
    open(path, "w").write("step 2")
"""


@pytest.mark.parametrize(
    ("call", "number"),
    [("mkdir", 0), ("open", 1), ("fsync", 0), ("readv", 0), ("replace", 0), ("fsync", 1), ("unlink", 0), ("rmdir", 0)],
)
def test_a_kill_before_any_step_of_a_save_leaves_a_checkpoint_and_no_litter(
    manager: CheckpointManager, call: str, number: int
) -> None:
    save(manager, 1)
    killed = subprocess.run([sys.executable, "-c", KILLED, manager.directory, call, str(number)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert latest_step(manager) == (2 if (call, number) in {("fsync", 1), ("unlink", 0), ("rmdir", 0)} else 1)
    manager = CheckpointManager(manager.directory, max_to_keep=1)
    save(manager, 3)
    assert steps(manager) == [3]
    assert [name for name in entries(manager) if name.startswith(".")] == []


def test_the_staging_of_a_living_process_is_not_touched(manager: CheckpointManager) -> None:
    other = CheckpointManager(manager.directory)
    with manager.save(1) as path:
        Path(path).write_text("slow")
        save(other, 2, content="quick")
        assert Path(path).read_text() == "slow"
    assert sorted(steps(manager)) == [1, 2]


def test_sweeping_by_other_processes_never_takes_a_staging_directory_that_is_being_made(
    manager: CheckpointManager,
) -> None:
    code = """
import os, sys
from polyaxon_tracking.storage import locks
while os.getppid() == int(sys.argv[2]):
    locks.sweep(sys.argv[1])
"""
    os.makedirs(manager.directory)
    sweeping = [
        subprocess.Popen([sys.executable, "-c", code, manager.directory, str(os.getpid())], stderr=subprocess.PIPE)
        for _ in "ab"
    ]
    for step in range(1, 1001):
        save(manager, step)
    assert latest_step(manager) == 1000
    for process in sweeping:
        process.kill()
        assert process.communicate()[1] == b""


def test_a_checkpoint_that_a_training_prunes_after_it_was_listed_is_not_damaged(manager: CheckpointManager) -> None:
    class Reader(CheckpointManager):
        def checkpoints(self) -> list[Checkpoint]:
            listed = super().checkpoints()
            if len(listed) == 1 and listed[0].step < 4:
                save(training, listed[0].step + 1)
            return listed

    training = CheckpointManager(manager.directory, max_to_keep=1)
    save(training, 1)
    assert latest_step(Reader(manager.directory)) == 4


def test_two_processes_that_save_at_once_keep_their_checkpoints_and_are_warned(manager: CheckpointManager) -> None:
    code = """
import sys
from polyaxon_tracking import CheckpointManager
manager = CheckpointManager(sys.argv[1])
for step in range(1, 101):
    with manager.save(step) as path:
        open(path, "w").write(sys.argv[2] * 1000 + str(step))
    assert manager.latest() is not None
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, manager.directory, name], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    kept = [Path(checkpoint.path).read_text() for checkpoint in manager.checkpoints()]
    for name, text in zip("ab", errors, strict=True):
        assert {name * 1000 + step for step in ("99", "100")} <= set(kept)
        assert (
            text.count("Another training, or another callback of this one, saves its checkpoints here too, such as")
            == 1
        ), text
    assert {checkpoint.verify() for checkpoint in manager.checkpoints()} == {None}
    assert [name for name in entries(manager) if name.startswith(".")] == []


def test_what_another_process_left_is_pruned_by_the_next_training(manager: CheckpointManager) -> None:
    other = CheckpointManager(manager.directory)
    for step in (1, 2, 3):
        save(manager, 10 * step)
        save(other, 10 * step + 1)
    assert sorted(steps(manager)) == [20, 21, 30, 31]
    save(CheckpointManager(manager.directory), 40)
    assert steps(manager) == [40, 31]


# Single files


def test_an_atomic_write_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.bin"
    for content in ("first", "second"):
        with atomic_write(path) as staged:
            assert Path(staged).name == "model.bin"
            Path(staged).write_text(content)
        assert path.read_text() == content
    assert os.listdir(path.parent) == ["model.bin"]


def test_an_atomic_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_text("first")
    with pytest.raises(KeyError), atomic_write(path) as staged:
        Path(staged).write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_an_atomic_write_where_no_directory_can_be_made() -> None:
    with pytest.raises(FileNotFoundError, match="was not saved"), atomic_write("/proc/self/model.pt"):
        pass


def test_an_atomic_write_where_a_directory_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model.bin").mkdir()
    with (
        pytest.raises(IsADirectoryError, match=r"model\.bin was not saved"),
        atomic_write(tmp_path / "model.bin") as staged,
    ):
        Path(staged).write_text("weights")


def test_another_error_of_torch_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), atomic_write(tmp_path / "model.pt"):
        raise RuntimeError("mine")


# NaN


def test_the_newest_checkpoint_without_nan_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(tmp_path, max_to_keep=2)

    def save(step: int, *, has_nan: bool = False) -> list[tuple[int, bool]]:
        with manager.save(step, has_nan=has_nan) as path:
            Path(path).write_text(f"step {step}")
        return [(checkpoint.step, checkpoint.has_nan) for checkpoint in manager.checkpoints()]

    save(1)
    assert save(2) == [(2, False), (1, False)]
    assert save(3, has_nan=True) == [(3, True), (2, False)]
    assert save(4, has_nan=True) == [(4, True), (3, True), (2, False)]
    assert save(5, has_nan=True) == [(5, True), (4, True), (2, False)]
    assert save(6) == [(6, False), (5, True)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert caplog.messages[0].startswith("The weights after step 3 hold NaN")
    newest = manager.latest()
    assert newest is not None
    assert newest.verify() is None
    assert re.fullmatch(r"step=0000000005-epoch=0-start=1-crc=\w{8}\.nan\.ckpt", manager.checkpoints()[1].name)


def test_a_new_manager_keeps_the_newest_checkpoint_without_nan(tmp_path: Path) -> None:
    for step in range(1, 5):
        with CheckpointManager(tmp_path, max_to_keep=1).save(step, has_nan=step > 1) as path:
            Path(path).write_text(f"step {step}")
    assert [checkpoint.step for checkpoint in CheckpointManager(tmp_path).checkpoints()] == [4, 1]


# Fewer checkpoints than while training ran


def test_pruning_keeps_the_newest_that_is_intact_and_what_others_have_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def save(manager: CheckpointManager, step: int) -> Path:
        with manager.save(step) as path:
            Path(path).write_text(f"step {step}")
        return Path(manager.checkpoints()[0].path)

    manager = CheckpointManager(tmp_path, max_to_keep=4)
    for step in (1, 2, 3, 4):
        newest = save(manager, step)
    newest.write_bytes(b"")
    assert (found := manager.latest()) is not None
    assert found.step == 3
    save(CheckpointManager(tmp_path, max_to_keep=9), 5)  # another training
    manager.prune()
    assert [checkpoint.step for checkpoint in manager.checkpoints()] == [5, 4, 3]
    assert "Another training, or another callback of this one, saves its checkpoints here too" in caplog.text


@pytest.mark.parametrize("max_to_keep", [0, None])
def test_pruning_to_no_number_is_refused(tmp_path: Path, max_to_keep: Any) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(TrackingError, match=r"Received max_to_keep=(0|None)\. Expected a whole number, 1 or more\."):
        manager.prune(max_to_keep)


# URLs with one slash


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3:/bucket/run", "s3://bucket/run"),
        (Path("gs://bucket/run"), "gs://bucket/run"),
        ("s3:bucket/run", "s3://bucket/run"),
        ("hdfs:/run", "hdfs://run"),
        (Path("file:///run"), "file:///run"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "use", [CheckpointManager, open_directory, cached_path, lambda path: atomic_write(path).__enter__()]
)
def test_a_url_with_one_slash_is_no_directory(use: Callable[[Any], Any], path: Any, url: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError) as error:
        use(path)
    assert str(error.value) == (
        f"Received the path '{path}'. Expected a URL with two slashes, '{url}': pathlib.Path removes one of them, so give the URL "
        f"as a string. For a local directory of this name, begin with './'."
    )
    assert list(tmp_path.iterdir()) == []


# Mounts whose server is gone


def test_a_save_to_a_mount_whose_server_goes_says_what_was_not_saved(manager: CheckpointManager) -> None:
    os.makedirs(manager.directory)
    with (
        pytest.raises(OSError, match=re.escape(f"{manager.directory}/step=0000000001.txt was not saved")) as error,
        contextlib.ExitStack() as stack,
    ):
        with manager.save(1, suffix=".txt") as path:
            Path(path).write_text("the state")
            stack.enter_context(without_a_server(Path(manager.directory)))
    assert error.value.errno == errno.ENOTCONN


def test_a_mount_whose_server_goes_while_checkpoints_are_read_damages_none(manager: CheckpointManager) -> None:
    for step in (1, 2):
        with manager.save(step) as path:
            Path(path).write_text(f"step {step}")
    checkpoints = manager.iter_intact()
    assert next(checkpoints).step == 2
    with without_a_server(Path(manager.directory)), pytest.raises(OSError, match="Transport endpoint is not connected"):
        next(checkpoints)
