"""macOS, as far as Linux can stand for it: what macOS lacks is taken away from each process (`support/macos`)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_scripts import SCRIPTS, newest_position

from polyaxon_tracking import CheckpointManager
from polyaxon_tracking.storage import disk

MACOS = Path(__file__).parents[1] / "support" / "macos"
COMMAND = [sys.executable, "-m", "polyaxon_tracking"]

# The state is the sum of the steps. In step 5, the process receives the signal that `DIE` names.
LOOP = """
import logging, os, signal, time
from pathlib import Path
from polyaxon_tracking import StepLoop
logging.basicConfig(level="INFO", format="%(message)s")
total = 0
def save(path):
    Path(path).write_text(str(total))
def load(path):
    global total
    total = int(Path(path).read_text())
number = os.environ.get("DIE")
with StepLoop(save, load, suffix=".txt", every_n_train_steps=2, background=False) as training:
    for step in training.steps(10):
        total += step
        if step == 5 and number == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 5 and number == "SIGTERM":
            os.kill(os.getppid(), signal.SIGTERM)  # to `run`, as the platform does
            while training._session.preemption.requested is None:
                time.sleep(0.01)
print("total", total)
"""


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    path = f"{MACOS}{os.pathsep}{os.environ['PYTHONPATH']}"
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with start(*command, **environment) as process:
        stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def test_the_processes_lack_what_macos_lacks() -> None:
    code = """
import ctypes, os, signal
print(hasattr(signal, "sigwaitinfo"), hasattr(os, "sched_getaffinity"), hasattr(ctypes.CDLL(None), "prctl"))
open("/proc/meminfo")
"""
    process = run(sys.executable, "-c", code)
    assert process.stdout == "False False False\n"
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/proc/meminfo'" in process.stderr


@pytest.mark.parametrize(("die", "code", "saved"), [("SIGTERM", 143, 6), ("SIGKILL", 137, 4)])
def test_run_forwards_the_signal_and_the_next_run_resumes(die: str, code: int, saved: int) -> None:
    train = [*COMMAND, "run", "--outputs", "outputs", "--", sys.executable, "-c", LOOP]
    ended = run(*train, DIE=die)
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    latest = CheckpointManager("outputs/checkpoints/resume").latest()
    assert latest is not None
    assert latest.step == saved
    resumed = run(*train)
    assert (resumed.returncode, resumed.stdout) == (0, "total 45\n"), resumed.stderr
    assert f"Resuming from {Path.cwd()}/outputs/checkpoints/resume/step=000000000{saved}" in resumed.stderr


@pytest.mark.parametrize("number", ["SIGINT", "SIGHUP"])
def test_run_forwards_each_signal_once(number: str) -> None:
    count = """
import signal, time
counted = []
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: counted.append(signal.Signals(number).name))
print("ready", flush=True)
while not counted:
    time.sleep(0.01)
time.sleep(0.5)
print(*counted)
"""
    with start(*COMMAND, "run", "--", sys.executable, "-c", count) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[number])
        assert process.stdout.read() == f"{number}\n"
        assert process.wait(timeout=300) == 0


def test_doctor_finds_nothing_wrong() -> None:
    process = run(*COMMAND, "doctor", "--json")
    report = json.loads(process.stdout)
    assert (process.returncode, report["errors"], process.stderr) == (0, 0, "")
    rows = {row["name"]: row for row in report["checks"]}
    assert rows["outputs: fsync"]["value"] == "yes"


def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(SCRIPTS["torch"])]
        return run(
            *COMMAND, "run", "--outputs", str(tmp_path / name), "--", *script, EVERY="2", EPOCHS="2", **environment
        )

    assert train("outputs", DIE_AT_BATCH="11").returncode == 137
    assert newest_position(tmp_path / "outputs") == (10, 1)
    resumed = train("outputs")
    assert f"Resuming from {tmp_path}/outputs/checkpoints/resume/step=0000000010" in resumed.stderr
    assert resumed.stdout.splitlines()[-1] == train("uninterrupted").stdout.splitlines()[-1]
    assert resumed.stdout.splitlines()[-1].startswith("trained ")


def test_the_memory_of_the_machine_is_a_limit() -> None:
    code = "from polyaxon_tracking.training import available_memory; print(available_memory())"
    process = run(sys.executable, "-c", code)
    assert 0 < int(process.stdout) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


# F_FULLFSYNC. Linux's kernel knows other commands of fcntl(2): one that succeeds, and some that fail as on macOS.


def flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: int) -> list[int]:
    """Save a checkpoint with `command` for F_FULLFSYNC, and return the files that `os.fsync` received."""
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", command, raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    manager = CheckpointManager(tmp_path / "checkpoints")
    with manager.save(1) as path:
        Path(path).write_text("state")
    assert manager.latest() is not None
    return synced


def test_where_f_fullfsync_works_fsync_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flushed(tmp_path, monkeypatch, fcntl.F_GETFD) == []


def test_where_the_file_system_refuses_f_fullfsync_fsync_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(flushed(tmp_path, monkeypatch, 51)) >= 2  # the file and the directory; Linux has no such command


def test_an_error_of_f_fullfsync_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD, raising=False)
    (tmp_path / "file").write_text("content")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        disk.flush(descriptor)
    assert raised.value.errno == errno.EBADF
