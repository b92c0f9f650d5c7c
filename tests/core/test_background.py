"""The thread that writes while training continues."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from polyaxon_tracking import TrackingError, progress
from polyaxon_tracking.background import wait_for_all
from polyaxon_tracking.training import BackgroundWriter

if TYPE_CHECKING:
    from pathlib import Path


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_writes_come_in_the_order_of_submit_and_in_one_thread() -> None:
    writer = BackgroundWriter()
    done: list[tuple[int, str]] = []
    for number in range(5):
        writer.submit("a number", lambda number=number: done.append((number, threading.current_thread().name)))
    writer.wait()
    assert done == [(number, "polyaxon-tracking-writer") for number in range(5)]
    assert not writer.pending


def test_submit_does_not_wait_and_wait_does() -> None:
    writer = BackgroundWriter()
    go_on = threading.Event()
    done: list[bool] = []
    writer.submit("a flag", lambda: done.append(go_on.wait(60)))
    assert writer.pending
    assert not done
    go_on.set()
    writer.wait()
    assert done == [True]


def test_an_error_is_raised_once_with_the_traceback_of_the_write_and_nothing_behind_it_is_done() -> None:
    writer = BackgroundWriter()
    go_on = threading.Event()
    done: list[str] = []
    writer.submit("first", lambda: go_on.wait(60) and fail())
    writer.submit("the removal of the previous checkpoint", lambda: done.append("removed"))
    go_on.set()
    with pytest.raises(OSError, match="No space left on device") as caught:
        writer.wait()
    assert "fail" in [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert done == []
    writer.wait()
    writer.submit("next", lambda: done.append("next"))
    writer.wait()
    assert done == ["next"]


def test_an_error_is_raised_at_the_next_submit() -> None:
    writer = BackgroundWriter()
    writer.submit("first", fail)
    while writer.pending:
        pass
    with pytest.raises(OSError, match="No space left on device"):
        writer.submit("next", fail)
    writer.wait()  # the next one was not taken


def test_a_wait_that_is_over_is_an_error_and_the_write_continues(tmp_path: Path) -> None:
    writer = BackgroundWriter(timeout=timedelta(seconds=0.05))
    go_on = threading.Event()
    writer.submit("model.ckpt", lambda: go_on.wait(60) and (tmp_path / "model.ckpt").touch())
    with pytest.raises(TrackingError) as caught:
        writer.wait()
    assert str(caught.value) == (
        "Received no end of writing model.ckpt in 0.05 s. Expected the disk or the store to take it sooner. See what holds it up, or "
        "allow more with a longer write_timeout; what was saved before is untouched."
    )
    go_on.set()
    while writer.pending:
        pass
    assert (tmp_path / "model.ckpt").exists()


@pytest.mark.parametrize("timeout", [timedelta(0), timedelta(seconds=-1), 30, None])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(TrackingError) as caught:
        BackgroundWriter(timeout)
    assert str(caught.value) == f"Received write_timeout={timeout!r}. Expected a timedelta above zero."


def test_a_long_wait_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    writer = BackgroundWriter(timedelta(seconds=90))

    def write() -> None:
        while "Waiting for model.ckpt to be written, 0 of at most 90 s so far" not in caplog.messages:
            pass

    writer.submit("model.ckpt", write)
    writer.wait()


def test_waiting_for_all_raises_the_error_of_any() -> None:
    writers = [BackgroundWriter() for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.submit("a number", fail if number == 1 else bool)
    with pytest.raises(OSError, match="No space left on device"):
        wait_for_all()
    wait_for_all()


SLOW = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from polyaxon_tracking.training import BackgroundWriter
writer = BackgroundWriter(timedelta(seconds=float(sys.argv[2])))
def write():
    time.sleep(float(sys.argv[3]))
    Path(sys.argv[1]).write_text("state")
writer.submit("the state", write)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(("ending", "status"), [("", 0), ("raise RuntimeError", 1), ("sys.exit(143)", 143)])
def test_the_end_of_the_interpreter_waits(tmp_path: Path, ending: str, status: int) -> None:
    process = run(SLOW + ending, tmp_path / "state", 60, 0.3)
    assert process.returncode == status, process.stderr
    assert (tmp_path / "state").read_text() == "state"


def test_the_end_of_the_interpreter_waits_no_longer_than_allowed(tmp_path: Path) -> None:
    process = run(SLOW, tmp_path / "state", 0.2, 3600)  # within the timeout of `run`
    assert "Received no end of writing the state in 0.2 s" in process.stderr
    assert not (tmp_path / "state").exists()


def test_a_forked_process_does_not_wait_for_the_thread_that_it_lacks(tmp_path: Path) -> None:
    fork = "if os.fork():\n    os.wait()\nelse:\n    sys.exit()\n"
    assert run(SLOW + fork, tmp_path / "state", 3600, 1).returncode == 0
    assert (tmp_path / "state").read_text() == "state"
