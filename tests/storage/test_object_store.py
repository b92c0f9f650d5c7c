"""Checkpoints in object stores, on real servers: what is there, what comes back, and what each costs."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polyaxon_tracking import CheckpointManager, TrackingError, atomic_write, cached_path, progress
from polyaxon_tracking.storage import retry
from polyaxon_tracking.training import BackgroundWriter, open_directory

if TYPE_CHECKING:
    from servers import Proxy, Request, Store

pytest_plugins = ["store_fixtures"]


def save(manager: CheckpointManager, step: int, epoch: int = 0, content: str | None = None) -> None:
    with manager.save(step, epoch) as path:
        Path(path).write_text(content or f"step {step}")


def steps(manager: CheckpointManager) -> list[int]:
    return [checkpoint.step for checkpoint in manager.checkpoints()]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what this package logged, without the drivers' messages."""
    return [record.getMessage() for record in caplog.records if record.name == "polyaxon_tracking"]


def copies() -> list[Path]:
    """Return the files that are left in ``$TMPDIR``."""
    return [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()]


@pytest.fixture
def manager(store: Store) -> CheckpointManager:
    return CheckpointManager(f"{store.url}/checkpoints")


# Saving and finding


def test_the_start_of_an_object_is_read(store: Store, tmp_path: Path) -> None:
    contents = {"large": bytes(range(256)) * 10_000, "small": b"all of it", "empty": b""}
    for url in store.url, str(tmp_path):
        directory = open_directory(url)
        for name, content in contents.items():
            with directory.write(name) as path:
                Path(path).write_bytes(content)
            assert directory.start_of(name) == content[:4096]
        assert directory.start_of("missing") == b""
    (tmp_path / "folder").mkdir()
    assert open_directory(str(tmp_path)).start_of("folder") == b""


def test_what_is_saved_is_found_by_another_process(store: Store, manager: CheckpointManager) -> None:
    for step in (10, 20, 30):
        save(manager, step, epoch=step // 10)
    code = """
import sys
from polyaxon_tracking import CheckpointManager
manager = CheckpointManager(sys.argv[1])
checkpoint = manager.latest()
print(checkpoint.step, checkpoint.epoch, open(checkpoint.path).read(), [known.step for known in manager.checkpoints()])
print(checkpoint.source == manager.checkpoints()[0].path)
"""
    command = [sys.executable, "-c", code, f"{store.url}/checkpoints"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == "30 3 step 30 [30, 20]\nTrue\n"
    assert [name.partition("-crc=")[0] for name in store.names("checkpoints")] == [
        "step=0000000020-epoch=2-start=1",
        "step=0000000030-epoch=3-start=1",
    ]
    assert copies() == []


def test_a_damaged_checkpoint_is_skipped_and_stays(
    store: Store, manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager, 1)
    save(manager, 2)
    newest = store.path(f"checkpoints/{store.names('checkpoints')[-1]}")
    store.fs.pipe_file(newest, b"stap 2")
    found = manager.latest()
    assert found is not None
    assert (found.step, Path(found.path).read_text()) == (1, "step 1")
    [warning] = messages(caplog)
    assert warning.startswith(f"Skipped damaged checkpoints, using {found.source} instead: {manager.directory}/step=")
    assert ": its bytes have the CRC-32 " in warning
    assert len(store.names("checkpoints")) == 2
    assert [checkpoint.verify() is None for checkpoint in manager.checkpoints()] == [False, True]
    save(manager, 3)
    assert steps(manager) == [3, 2, 1]
    store.fs.pipe_file(store.path(f"checkpoints/{store.names('checkpoints')[0]}"), b"")
    for name in store.names("checkpoints"):
        store.fs.pipe_file(store.path(f"checkpoints/{name}"), b"no")
    with pytest.raises(TrackingError, match=r"Received only damaged checkpoints in '.*bucket-.*'"):
        manager.latest()
    assert copies() == []


def test_a_local_copy_is_removed_when_training_resumes(manager: CheckpointManager) -> None:
    save(manager, 1)
    found = manager.latest()
    assert found is not None
    assert [str(path) for path in copies() if path.name != ".lock"] == [found.path]
    save(manager, 2)
    assert copies() == []
    found = manager.latest()
    assert found is not None
    manager.release()
    assert copies() == []


def test_a_file_is_complete_or_as_it_was(store: Store) -> None:
    path = f"{store.url}/best.keras"
    with atomic_write(path) as staged:
        Path(staged).write_text("first")

    def fail() -> None:
        with atomic_write(path) as staged:
            Path(staged).write_text("half of the sec")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    with pytest.raises(TrackingError, match="Received nothing to save: no file was written to"):
        with atomic_write(path):
            pass
    assert store.fs.cat_file(store.path("best.keras")) == b"first"
    with atomic_write(path) as staged:
        Path(staged).write_text("second")
    assert Path(cached_path(path)).read_text() == "second"
    with pytest.raises(FileNotFoundError, match=r"Not found: .*worst\.keras"):
        cached_path(f"{store.url}/worst.keras")


def test_a_directory_lists_copies_and_removes(store: Store) -> None:
    directory = open_directory(store.url)
    assert directory.names() == []
    with directory.write("a") as staged:
        Path(staged).write_text("content")
    directory.copy(f"{directory.path}/a", "b")
    with pytest.raises(FileNotFoundError):
        directory.copy(f"{directory.path}/none", "c")
    assert sorted(directory.names()) == ["a", "b"]
    directory.remove("a")
    directory.remove("a")
    assert directory.names() == ["b"]
    assert Path(directory.fetch("b")).read_text() == "content"


def test_large_files_go_and_come_in_parts(store: Store, manager: CheckpointManager) -> None:
    content = os.urandom(1 << 20) * 120
    with manager.save(1) as path:
        Path(path).write_bytes(content)
    found = manager.latest()
    assert found is not None
    assert Path(found.path).read_bytes() == content


def test_several_trainings_keep_theirs_and_are_warned(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    one, other = (CheckpointManager(f"{store.url}/checkpoints") for _ in "ab")
    for step in (1, 2, 3):
        save(one, 10 * step)
        save(other, 10 * step + 1)
    assert sorted(steps(one)) == [20, 21, 30, 31]
    assert sum("Another training, or another callback" in message for message in caplog.messages) == 2


# What it costs


def test_requests_for_a_checkpoint_are_few_however_many_objects_there_are(store: Store, proxy: Proxy) -> None:
    manager = CheckpointManager(f"{store.url}/checkpoints")
    save(manager, 1)
    for number in range(1000):
        store.fs.pipe_file(store.path(f"checkpoints/other-{number}"), b"")
    save(manager, 2)
    proxy.requests.clear()
    save(manager, 3)
    saving = len(proxy.requests)
    proxy.requests.clear()
    assert manager.latest() is not None
    resuming = len(proxy.requests)
    # A listing is one page of 1,000, or two; Azure's driver also looks at the directory.
    assert (saving, resuming) <= (12, 8), proxy.requests


def test_processes_of_one_machine_download_once(store: Store, proxy: Proxy) -> None:
    def is_download(request: Request) -> bool:
        return "step" in request.path.partition("?")[0] and (store.kind != "gcs" or "alt=media" in request.path)

    manager = CheckpointManager(f"{store.url}/checkpoints")
    content = "x" * 1_000_000
    save(manager, 1, content=content)
    proxy.requests.clear()
    code = """
import sys
from polyaxon_tracking import CheckpointManager
checkpoint = CheckpointManager(sys.argv[1]).latest()
print("found", len(open(checkpoint.path).read()), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, f"{store.url}/checkpoints"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == f"found {len(content)}\n"
    downloads = [request for request in proxy.requests if request.method == "GET" and is_download(request)]
    assert len(downloads) == 1
    processes[0].kill()
    for process in processes:
        process.communicate()
    assert copies() == []


def test_the_copy_of_a_killed_process_is_swept(store: Store) -> None:
    manager = CheckpointManager(f"{store.url}/checkpoints")
    save(manager, 1)
    code = """
import os, signal, sys
from polyaxon_tracking import CheckpointManager
CheckpointManager(sys.argv[1]).latest()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, f"{store.url}/checkpoints"], check=False)
    assert len(copies()) == 2
    save(manager, 2)
    found = manager.latest()
    assert found is not None
    assert {path.parent for path in copies()} == {Path(found.path).parent}


def test_what_a_killed_save_left_makes_room_for_the_download(store: Store) -> None:
    manager = CheckpointManager(f"{store.url}/checkpoints")
    save(manager, 1)
    code = """
import os, signal, sys
from polyaxon_tracking import CheckpointManager
with CheckpointManager(sys.argv[1]).save(2) as path:
    open(path, "w").write("step 2")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, f"{store.url}/checkpoints"], check=False)
    assert len(copies()) == 2
    found = manager.latest()
    assert found is not None
    assert {path.parent for path in copies()} == {Path(found.path).parent}


# Stores and disks that fail


def test_a_store_that_fails_for_a_while_loses_nothing(store: Store, proxy: Proxy) -> None:
    manager = CheckpointManager(f"{store.url}/checkpoints")
    save(manager, 1)
    # No driver tries again after 505, and Azure's waits for 15 seconds after the others.
    answers = [505, 505] if store.kind == "azure" else [505, 500, 505, 0]

    def fail(_: Request) -> int | None:
        return left.pop() if left else None

    proxy.answer = fail
    left = [*answers]
    save(manager, 2)
    assert steps(manager) == [2, 1]
    left = [*answers]
    found = CheckpointManager(manager.directory).latest()
    assert not left
    assert found is not None
    assert Path(found.path).read_text() == "step 2"


def test_a_store_that_stays_away_is_an_error_and_what_was_there_is_untouched(
    store: Store, proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_PATIENCE_SECONDS", 0.5)
    manager = CheckpointManager(f"{store.url}/checkpoints")
    save(manager, 1)
    proxy.answer = lambda request: 505 if request.size else None
    with pytest.raises(OSError, match=r"Not saved, and no existing file was changed: .*/checkpoints/step=") as info:
        save(manager, 2)
    assert "bytes are free" not in str(info.value)
    proxy.answer = lambda _: None
    assert steps(manager) == [1]
    assert copies() == []
    save(manager, 3)
    assert steps(manager) == [3, 1]


def test_a_server_that_is_killed_in_the_middle_of_an_upload_and_restarted_loses_nothing(
    store: Store, proxy: Proxy
) -> None:
    manager = CheckpointManager(f"{store.url}/checkpoints")
    save(manager, 1)
    server = store.server

    def restart() -> None:
        server.start()
        if server.kind == "s3":  # it forgets all with its process
            store.fs.mkdir(store.bucket)

    timers: list[threading.Timer] = []

    def kill(request: Request) -> int | None:
        if request.size > 1 << 20 and not timers:
            server.kill()
            timers.append(threading.Timer(2, restart))
            timers[0].start()
            return 0
        # moto needs a moment for its bucket; what stands for it meanwhile is what it would say when it comes up.
        return 503 if timers and timers[0].is_alive() and server.kind == "s3" else None

    proxy.answer = kill
    content = os.urandom(1 << 20) * 8
    with manager.save(2) as path:
        Path(path).write_bytes(content)
    assert timers
    timers[0].join()
    found = CheckpointManager(manager.directory).latest()
    assert found is not None
    assert Path(found.path).read_bytes() == content
    assert steps(manager) == ([2] if server.kind == "s3" else [2, 1])


def test_a_disk_without_room_for_the_copy_is_reported_before_training(
    store: Store, manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(manager, 1, content="x" * 100_000)
    code = """
import shutil, sys
from polyaxon_tracking import CheckpointManager
manager = CheckpointManager(sys.argv[1])
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=99_999)
manager.latest()
"""
    process = subprocess.run(
        [sys.executable, "-c", code, manager.directory], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "of 100,000 bytes to download to " in process.stderr
    assert (
        "where 99,999 bytes are free. Expected room for it. Set TMPDIR to a directory on a larger disk."
        in process.stderr
    )
    assert copies() == []


def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_previous_one(
    store: Store, manager: CheckpointManager
) -> None:
    save(manager, 1)
    code = """
import resource, signal, sys
from polyaxon_tracking import CheckpointManager
manager = CheckpointManager(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with manager.save(2) as path:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with open(path, "wb", buffering=0) as file:
        for _ in range(3):
            file.write(bytes(999))
"""
    process = subprocess.run(
        [sys.executable, "-c", code, manager.directory], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    # Not the last line: coverage cannot write either.
    assert (
        f"{manager.directory}/step=0000000002.ckpt was not saved, and no existing file was changed: File too large."
        in process.stderr
    )
    assert "bytes are free in TMPDIR" in process.stderr
    assert steps(manager) == [1]


def test_a_temporary_directory_of_another_is_refused(store: Store) -> None:
    workspace = Path(os.environ["TMPDIR"]) / f"polyaxon-tracking-{os.getuid()}"
    workspace.mkdir()
    workspace.chmod(0o777)
    with pytest.raises(
        TrackingError, match=r"to which other users may write\. Expected a directory to which only this user may"
    ):
        save(CheckpointManager(store.url), 1)


# Long transfers


def test_a_long_download_says_how_far_it_is(
    store: Store, manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    save(manager, 1, content="x" * 5_000_000)
    assert manager.latest() is not None
    assert messages(caplog) == []
    manager.release()
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0)
    found = manager.latest()
    assert found is not None
    assert f"Downloading {found.source}: 5 of 5 MB" in caplog.messages
    assert f"Verifying {found.source}: 5 of 5 MB" in caplog.messages


def test_a_long_upload_says_how_far_it_is(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0)
    save(manager, 1, content="x" * 5_000_000)
    [saved] = manager.checkpoints()
    assert f"Uploading {saved.path}: 5 of 5 MB" in caplog.messages


def test_who_waits_for_an_upload_in_the_background_sees_its_progress(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.01)
    manager = CheckpointManager(f"{store.url}/checkpoints")
    pattern = re.compile(r"Waiting for step 1 to be written, \d+ of at most 1800 s so far: \d+ of 5 MB")

    def hold(request: Request) -> int | None:
        deadline = time.monotonic() + 60
        while request.size > 1 << 20 and not any(map(pattern.fullmatch, caplog.messages)):
            assert time.monotonic() < deadline
        return None

    proxy.answer = hold
    writer = BackgroundWriter()
    writer.submit("step 1", lambda: save(manager, 1, content="x" * 5_000_000))
    writer.wait()
    assert not any(message.startswith("Uploading") for message in caplog.messages)


def test_a_process_that_is_killed_in_the_middle_of_an_upload_leaves_whole_objects(store: Store, proxy: Proxy) -> None:
    manager = CheckpointManager(f"{store.url}/checkpoints")
    save(manager, 1)
    code = """
import sys
from polyaxon_tracking import CheckpointManager
with CheckpointManager(sys.argv[1]).save(2) as path:
    open(path, "wb").write(bytes(80 << 20))
"""
    uploading, killed = threading.Event(), threading.Event()

    def hold(request: Request) -> int | None:
        if request.size > 1 << 20:
            uploading.set()
            assert killed.wait(60)
        return None

    proxy.answer = hold
    process = subprocess.Popen([sys.executable, "-c", code, manager.directory])
    assert uploading.wait(60)
    process.kill()
    process.wait()
    killed.set()
    found = manager.latest()
    assert found is not None
    assert Path(found.path).read_bytes() in (b"step 1", bytes(80 << 20))
    manager.release()
    save(manager, 3)
    assert copies() == []


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_what_is_uploaded_in_the_background_is_there_when_the_interpreter_has_exited(store: Store) -> None:
    code = """
import sys, time
from polyaxon_tracking import CheckpointManager
from polyaxon_tracking.training import BackgroundWriter
def save():
    time.sleep(0.5)  # until the interpreter exits
    with CheckpointManager(sys.argv[1]).save(1) as path:
        open(path, "w").write("late")
BackgroundWriter().submit("the state", save)
"""
    command = [sys.executable, "-c", code, f"{store.url}/checkpoints"]
    endpoint = f"http://localhost:{store.server.port}"  # a name has to be looked up, which takes a thread
    process = subprocess.run(
        command, env=os.environ | {"AWS_ENDPOINT_URL": endpoint}, capture_output=True, text=True, check=False
    )
    assert process.stderr == ""
    assert len(store.names("checkpoints")) == 1
