"""How far long work is: on a terminal, and without one."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from polyaxon_tracking import CheckpointManager, progress

# So that work is long after no time at all.
LONG = """
from polyaxon_tracking import progress
progress._SHORT_SECONDS = progress._REFRESH_SECONDS = 0
"""
VERIFIES = """
from polyaxon_tracking import CheckpointManager
CheckpointManager("checkpoints").latest()
"""
WAITS = """
import threading
from polyaxon_tracking.training import BackgroundWriter
from polyaxon_tracking.progress import Progress

drawn = threading.Event()
show = progress.Display._draw

def draw(self, what, counted):
    show(self, what, counted)
    if counted is not None:
        drawn.set()

progress.Display._draw = draw

def write():
    with Progress("Uploading model.ckpt", 20_000_000) as counted:
        counted.reach(5_000_000)
        assert drawn.wait(60)

writer = BackgroundWriter()
writer.submit("model.ckpt", write)
writer.wait()
"""


def on_a_terminal(code: str, *, closed: bool = False) -> str:
    """Return what `code` shows on its standard error. With `closed`, the terminal is closed first."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 250, 0, 0))  # a new one has no columns
    with subprocess.Popen([sys.executable, "-c", LONG + code], stdout=subprocess.DEVNULL, stderr=its) as process:
        os.close(its)
        shown = b""
        if closed:
            os.close(ours)
        while not closed:
            try:
                read = os.read(ours, 4096)
            except OSError:  # the other end is closed: its process has ended
                break
            shown += read
        if not closed:
            os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointManager:
    manager = CheckpointManager("checkpoints")
    with manager.save(1) as path:
        Path(path).write_bytes(bytes(20_000_000))
    return manager


def test_verifying_shows_a_bar_on_a_terminal(checkpoints: CheckpointManager) -> None:
    shown = on_a_terminal(VERIFIES)
    assert f"Verifying {checkpoints.directory}/step=0000000001-epoch=0-start=1-crc=" in shown
    assert "100%|" in shown
    assert "20.0M/20.0M" in shown


def test_verifying_says_lines_on_a_terminal_without_tqdm(checkpoints: CheckpointManager) -> None:
    lines = (
        "import logging, sys; logging.basicConfig(level=20); sys.modules['tqdm'] = None; progress._EVERY_SECONDS = 0"
    )
    shown = on_a_terminal(f"{lines}\n{VERIFIES}")
    assert "%|" not in shown
    assert "INFO:polyaxon_tracking:Verifying " in shown
    assert ": 20 of 20 MB" in shown


def test_verifying_says_lines_off_a_terminal(
    checkpoints: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    found = checkpoints.latest()
    assert found is not None
    assert caplog.messages == []  # it was short
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0)
    checkpoints.latest()
    assert caplog.messages[-1] == f"Verifying {found.path}: 20 of 20 MB"
    assert len(caplog.messages) == 20  # a line for each MiB that was read, since there is no time between two


def test_a_directory_is_counted_as_a_whole(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager("checkpoints")
    with manager.save(1) as path:
        for part in range(4):
            (Path(path) / str(part)).mkdir(parents=True)
            (Path(path) / str(part) / "weights").write_bytes(bytes(3_000_000))
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0)
    found = manager.latest()
    assert found is not None
    assert f"Verifying {found.path}: 12 of 12 MB" in caplog.messages


def test_the_final_wait_shows_how_far_the_writer_is(tmp_path: Path) -> None:
    shown = on_a_terminal(WAITS)
    assert "Waiting for model.ckpt to be written:  25%|" in shown
    assert "5.00M/20.0M" in shown
    assert "Uploading" not in shown  # nobody waits for it, but for the writer


def test_a_wait_for_what_has_no_count_shows_the_time(tmp_path: Path) -> None:
    code = """
import time
from polyaxon_tracking.training import BackgroundWriter
writer = BackgroundWriter()
writer.submit("model.ckpt", lambda: time.sleep(1))
writer.wait()
"""
    assert "Waiting for model.ckpt to be written: 00:00" in on_a_terminal(code)


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("", id="gone"),
        pytest.param("sys.stderr.close()", id="closed by the process"),
        pytest.param("sys.stderr = None", id="none"),
        pytest.param("sys.stderr = type('Log', (), {'write': print, 'flush': bool})()", id="of another kind"),
    ],
)
def test_no_terminal_is_needed_for_the_work(checkpoints: CheckpointManager, before: str) -> None:
    on_a_terminal(f"import sys\n{before}\n{VERIFIES}", closed=True)
    on_a_terminal(f"import sys\n{before}\n{WAITS.replace('drawn.wait(60)', 'True')}", closed=True)


GOES_AWAY = """
import os, pty, sys
ours, its = pty.openpty()
sys.stderr = open(its, "w")
from polyaxon_tracking.progress import Progress
with Progress("Verifying", 10) as counted:
    {before}
    os.close(ours)
    counted.reach(5)
    counted.reach(10)
sys.stderr = sys.__stderr__
"""


@pytest.mark.parametrize("before", ["counted.reach(1)", "pass"], ids=["drawn before", "not drawn yet"])
def test_a_terminal_that_goes_away_does_not_end_the_work(before: str) -> None:
    on_a_terminal(GOES_AWAY.format(before=before))
