"""`polyaxon-tracking checkpoints`: what is there, and whether it is intact."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mounts import without_a_server
from reports import fill, listed

from polyaxon_tracking import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., subprocess.CompletedProcess[str]]


def places(process: subprocess.CompletedProcess[str], root: object) -> list[tuple[str, int]]:
    """Directory below `root`, and step."""
    return [(os.path.relpath(os.path.dirname(found["path"]), str(root)), found["step"]) for found in listed(process)]


def damage(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[0] ^= 1
    Path(path).write_bytes(content)


def stall(path: str) -> None:
    """Make a checkpoint one whose reading does not end by itself for long."""
    os.truncate(path, 1 << 40)


def wait_until_read(path: str, process: subprocess.Popen[str]) -> None:
    while True:
        assert process.poll() is None
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(descriptor) == os.path.abspath(path):
                    return
        time.sleep(0.01)


def test_all_trainings_are_found_in_their_order(command: Command, outputs: Path) -> None:
    fill(str(outputs), "checkpoints/resume-10", "checkpoints/resume", "checkpoints/resume-2", "checkpoints/other")
    fill(str(outputs), "checkpoints/fold-2/resume", "checkpoints/fold-1/resume")
    (outputs / "checkpoints" / "best.ckpt").write_text("the user's")
    process = command("checkpoints", "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["path"] == str(outputs)
    assert places(process, outputs / "checkpoints") == [
        *(("resume", 20), ("resume", 10)),
        *(("resume-2", 20), ("resume-2", 10)),
        *(("resume-10", 20), ("resume-10", 10)),
        *(("fold-1/resume", 20), ("fold-1/resume", 10)),
        *(("fold-2/resume", 20), ("fold-2/resume", 10)),
    ]


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/resume/", "file://{}/run", "~/run"])
def test_the_path_may_be_any_of_the_three(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill("run", "checkpoints/resume")
    process = command("checkpoints", given.format(tmp_path), "--json")
    assert places(process, tmp_path) == [("run/checkpoints/resume", 20), ("run/checkpoints/resume", 10)]


def test_a_loop_of_ones_own(command: Command, tmp_path: Path) -> None:
    fill("mine", "")
    fill("outputs", "checkpoints")
    assert places(command("checkpoints", "mine", "--json"), tmp_path) == [("mine", 20), ("mine", 10)]
    off_the_cluster = places(command("checkpoints", "--json"), tmp_path)
    assert off_the_cluster == [("outputs/checkpoints", 20), ("outputs/checkpoints", 10)]


def test_what_is_kept_for_good_says_so(command: Command) -> None:
    manager = CheckpointManager("run", max_to_keep=1, keep_every_n_epochs=2)
    for epoch in (1, 2, 3):
        with manager.save(10 * epoch, epoch) as path:
            Path(path).write_text("weights")
    _, _, *rows = command("checkpoints", "run").stdout.splitlines()
    assert [row.split()[1:3] + row.split()[-3:] for row in rows] == [
        ["30", "3", "s", "not", "verified"],
        ["20", "2", "kept", "for", "good"],
    ]
    assert [found["kept_for_good"] for found in listed(command("checkpoints", "run", "--json"))] == [False, True]


def test_off_the_cluster_the_newest_start_is_first(command: Command, tmp_path: Path) -> None:
    fill("outputs", "version_9/checkpoints/resume", "version_10/checkpoints/resume", "checkpoints")
    found = places(command("checkpoints", "--json"), tmp_path / "outputs")
    assert [place for place, step in found if step == 20] == [
        "version_10/checkpoints/resume",
        "version_9/checkpoints/resume",
        "checkpoints",
    ]
    assert places(command("checkpoints", "outputs/version_9", "--json"), tmp_path) == [
        ("outputs/version_9/checkpoints/resume", 20),
        ("outputs/version_9/checkpoints/resume", 10),
    ]


def test_what_is_listed_of_each_checkpoint(command: Command, tmp_path: Path) -> None:
    fill("run", "")
    path = CheckpointManager("run").checkpoints()[0].path
    os.utime(path, (0, 1_700_000_000))
    found = listed(command("checkpoints", "run", "--json"))[0]
    assert found.pop("age_seconds") > 0
    assert found == {
        "path": path,
        "step": 20,
        "epoch": 2,
        "start": 1,
        "kept_for_good": False,
        "size": 7,
        "modified": "2023-11-14T22:13:20+00:00",
        "intact": None,
        "damage": None,
    }


def test_the_table(command: Command, tmp_path: Path) -> None:
    fill("run", "checkpoints/resume")
    newest, older = CheckpointManager("run/checkpoints/resume").checkpoints()
    damage(newest.path)
    for path, age in ((newest.path, 30), (older.path, 2 * 3600 + 60)):
        os.utime(path, (0, time.time() - age))
    process = command("checkpoints", "run")
    assert process.returncode == 0
    seconds = re.search(r"(\d+) s", process.stdout)
    assert seconds
    assert [line.split() for line in process.stdout.splitlines()] == [
        [f"{tmp_path}/run/checkpoints/resume"],
        ["start", "step", "epoch", "size", "age", "state"],
        ["1", "20", "2", "7", "bytes", seconds[1], "s", "not", "verified"],
        ["1", "10", "1", "7", "bytes", "2", "h", "not", "verified"],
    ]
    process = command("checkpoints", "run", "--verify")
    assert (process.returncode, process.stderr) == (1, "")
    assert [line.split()[-1] for line in process.stdout.splitlines()[1:4]] == ["state", "damaged", "intact"]
    assert process.stdout.splitlines()[4].startswith(f"  damaged: {newest.name}: its bytes have the CRC-32 ")


def test_damage_is_found(command: Command, tmp_path: Path) -> None:
    fill("run", "checkpoints/resume")
    assert [found["intact"] for found in listed(command("checkpoints", "run", "--verify", "--json"))] == [True, True]
    newest, older = CheckpointManager("run/checkpoints/resume").checkpoints()
    Path(newest.path).write_text("")
    os.unlink(older.path)
    os.symlink("/nowhere", older.path)
    process = command("checkpoints", "run", "--verify", "--json")
    assert process.returncode == 1
    found = [(found["intact"], found["damage"]) for found in listed(process)]
    assert found == [(False, "it is empty"), (False, "it is a symbolic link")]


def test_there_are_none(command: Command, tmp_path: Path) -> None:
    process = command("checkpoints")
    assert (process.returncode, process.stdout) == (0, f"No checkpoints in {tmp_path}/outputs\n")
    process = command("checkpoints", "--json", "--verify")
    assert (process.returncode, listed(process)) == (0, [])


def test_a_path_that_is_no_directory(command: Command, tmp_path: Path) -> None:
    expected = "Expected an outputs path, the checkpoints in it, or a URL of one: correct it, or leave it out for the run's own outputs."
    (tmp_path / "file").touch()
    for path, problem in (
        ("nowhere", "where there is nothing"),
        ("", "where there is nothing"),
        ("file", "which is not a directory"),
    ):
        message = f"Received {path!r}, {problem}. {expected}"
        process = command("checkpoints", path)
        assert (process.returncode, process.stdout, process.stderr) == (2, "", f"Error: {message}\n")
        process = command("checkpoints", path, "--json")
        assert (process.returncode, json.loads(process.stdout)) == (2, {"error": message})


def test_a_directory_that_may_not_be_read(command: Command, obey_modes: Callable[[], None], tmp_path: Path) -> None:
    fill("run", "checkpoints/resume")
    Path("run/checkpoints/resume").chmod(0o300)
    message = f"{tmp_path}/run/checkpoints/resume cannot be read: Permission denied. See that this user may read it, from here."
    process = command("checkpoints", "run", "--json", preexec_fn=obey_modes)
    assert (process.returncode, json.loads(process.stdout), process.stderr) == (
        2,
        {"error": message},
        f"Error: {message}\n",
    )


def test_a_variable_that_is_malformed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_RUN_INSTANCE", "owner.project")
    process = command("checkpoints")
    assert process.returncode == 2
    assert process.stderr.startswith("Error: POLYAXON_RUN_INSTANCE was received as 'owner.project'. Expected ")


def test_what_another_process_prunes_meanwhile_is_left_out(command: Command, tmp_path: Path) -> None:
    manager = CheckpointManager("run", max_to_keep=3)
    for step in (10, 20, 30):
        with manager.save(step) as path:
            Path(path).write_text("state")
    newest, _, oldest = (checkpoint.path for checkpoint in manager.checkpoints())
    stall(newest)
    process = subprocess.Popen(
        [sys.executable, "-m", "polyaxon_tracking", "checkpoints", "run", "--verify", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until_read(newest, process)  # it has listed them all
    os.unlink(oldest)
    os.truncate(newest, 0)
    listed = json.loads(process.communicate(timeout=300)[0])["checkpoints"]
    assert [(found["step"], found["intact"]) for found in listed] == [(30, False), (20, True)]


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    fill("run", "")
    newest = CheckpointManager("run").checkpoints()[0].path
    stall(newest)
    arguments = ["checkpoints", "run", "--verify", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "polyaxon_tracking", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Of a test that runs in the background of a shell, where it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509  # no threads
    )
    wait_until_read(newest, process)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, printed) == (130, "")
    assert "Traceback" not in errors


def test_a_bar_shows_how_far_verifying_is_on_a_terminal(command: Command, tmp_path: Path) -> None:
    fill("run", "")
    assert command("checkpoints", "run", "--verify").stderr == ""
    master, slave = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-m", "polyaxon_tracking", "checkpoints", "run", "--verify", "--json"],
        stdout=subprocess.PIPE,
        stderr=slave,
        check=True,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(slave)
    assert len(json.loads(process.stdout)["checkpoints"]) == 2
    assert b"Verifying" in os.read(master, 65536)
    os.close(master)


def test_lines_say_how_far_verifying_is_off_a_terminal(tmp_path: Path) -> None:
    fill("run", "")
    long = "from polyaxon_tracking import progress; progress._EVERY_SECONDS = 0"
    start = "from polyaxon_tracking.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", f"{long}; {start}", "checkpoints", "run", "--verify", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(process.stdout)["checkpoints"]) == 2
    assert process.stderr.splitlines() == ["polyaxon_tracking: Verifying: 0 of 0 MB"] * 2


def test_nothing_is_changed(command: Command, tmp_path: Path) -> None:
    fill("run", "checkpoints/resume")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert command("checkpoints", "run", "--verify").returncode == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_directory_is_a_checkpoint_too(command: Command, outputs: Path) -> None:
    with CheckpointManager(outputs / "checkpoints" / "resume").save(10, 1) as path:
        os.makedirs(os.path.join(path, "parts"))
        Path(path, ".metadata").write_bytes(b"x" * 1000)
        Path(path, "parts", "0").write_bytes(b"x" * 4000)
    [found] = listed(command("checkpoints", "--verify", "--json"))
    assert (found["size"], found["intact"]) == (5000, True)
    damage(f"{found['path']}/parts/0")
    [found] = listed(command("checkpoints", "--verify", "--json"))
    assert found["intact"] is False


def test_a_mount_whose_server_is_gone(command: Command, tmp_path: Path) -> None:
    with without_a_server(tmp_path):
        process = command("checkpoints", str(tmp_path), cwd="/")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"Error: {tmp_path} cannot be read: Transport endpoint is not connected. ")
