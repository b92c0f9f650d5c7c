"""`polyaxon-tracking run`: what the child gets, and what comes of it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest
from mounts import without_a_server

from polyaxon_tracking import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., subprocess.CompletedProcess[str]]

RUN = [sys.executable, "-m", "polyaxon_tracking", "run"]
MACOS = Path(__file__).parents[1] / "support" / "macos"

# What a training script sees.
ASK = """
import json, os
from polyaxon_tracking import get_data_paths, get_log_level, get_outputs_path, get_outputs_refs_paths
print(json.dumps([get_outputs_path(), get_data_paths(), get_outputs_refs_paths(), get_log_level()]))
"""

# Count every signal; end when there was none for a while after the first.
COUNT = """
import json, os, signal, sys, time
counted = {}
def count(number, frame):
    counted[signal.Signals(number).name] = counted.get(signal.Signals(number).name, 0) + 1
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, count)
print("ready", os.getpid(), flush=True)
while not counted:
    time.sleep(0.01)
time.sleep(0.5)
print(json.dumps(counted), flush=True)
sys.exit(7)
"""


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", code]


# The environment


def test_the_child_has_the_environment_of_a_run(command: Command, tmp_path: Path) -> None:
    for name in ("digits", "runs/1", "runs/2", "jobs/12"):
        (tmp_path / name).mkdir(parents=True)
    process = command(
        *("run", "--outputs", "here", "--data", "digits=digits", "--data", "faces=gs://faces"),
        *("--ref", "experiments=runs/2", "--ref", "jobs=jobs/12", "--ref", "experiments=runs/1"),
        *("--log-level", "warning", *python(ASK)),
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert json.loads(process.stdout) == [
        f"{tmp_path}/here",
        {"digits": f"{tmp_path}/digits", "faces": "gs://faces"},
        {"experiments": [f"{tmp_path}/runs/2", f"{tmp_path}/runs/1"], "jobs": [f"{tmp_path}/jobs/12"]},
        "WARNING",
    ]


def test_what_the_options_do_not_give_is_not_set(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_NO_OP", "true")
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", "/elsewhere")
    monkeypatch.setenv("POLYAXON_RUN_DATA_PATHS", '{"digits": "/digits"}')
    monkeypatch.setenv("POLYAXON_RUN_INSTANCE", "owner.project.runs.1")
    monkeypatch.setenv("POLYAXON_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("MINE", "stays")
    process = command("run", "--", "env")
    variables = dict(line.partition("=")[::2] for line in process.stdout.splitlines())
    assert {name: value for name, value in variables.items() if name.startswith("POLYAXON_")} == {
        "POLYAXON_RUN_OUTPUTS_PATH": f"{tmp_path}/outputs"
    }
    assert variables["MINE"] == "stays"


def test_paths_are_made_absolute_and_urls_are_left_as_they_are(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    Path("data=2").mkdir()
    url = "s3://key:secret@bucket/run"
    process = command("run", "--outputs", url, "--data", "a=~/data=2", *python(ASK))
    assert json.loads(process.stdout)[:2] == [url, {"a": f"{os.getcwd()}/data=2"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "Received --data 'digits'. Expected NAME=PATH, such as digits=data/digits."),
        (["--data", "=data"], "Received --data '=data'. Expected NAME=PATH, such as digits=data/digits."),
        (["--data", "digits="], "Received --data 'digits='. Expected NAME=PATH, such as digits=data/digits."),
        (
            ["--data", "digits=nowhere"],
            "Received --data 'digits=nowhere', and there is nothing at '{here}/nowhere'. Expected NAME=PATH, such as digits=data/digits: correct the path, or put there what it names.",
        ),
        (
            ["--data", "a=.", "--data", "a=/"],
            "Received --data 'a' twice. Expected every name once: leave one of them out.",
        ),
        (
            ["--data", "a=s3://"],
            "Received the URL 's3://'. Expected a bucket in it, such as s3://bucket/path.",
        ),
        (
            ["--ref", "experiment=."],
            "Received --ref 'experiment=.'. Expected one of jobs, experiments before the '=', such as experiments=outputs/1. Did you mean 'experiments'?",
        ),
        (
            ["--log-level", "inf"],
            "--log-level was received as 'inf'. Expected one of NOTSET, DEBUG, INFO, WARN, WARNING, ERROR, FATAL, CRITICAL (any case) or a number, such as 20. Did you mean 'INFO'? Correct it, or leave it out.",
        ),
        (
            ["--outputs", "file"],
            "Received the outputs path '{here}/file', which cannot be written to: '{here}/file' is a file. Expected a directory that this user may write to. Move it away, or set --outputs to another path.",
        ),
        (["--outputs", ""], "Received an empty --outputs. Expected a directory, or a URL such as s3://bucket/run."),
    ],
    ids=" ".join,
)
def test_arguments_are_checked_before_the_child_starts(
    command: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    process = command("run", *arguments, "--", "touch", "started")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"Error: {message.format(here=tmp_path)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_secret_is_shown(command: Command) -> None:
    process = command("run", "--data", "a=gs://key:wJalrXUtnFEMI@bucket", "--", "true")
    assert process.returncode == 2
    assert "wJalr" not in process.stderr
    process = command("run", "--json", "--data", "a=s3://key:wJalrXUtnFEMI@bucket/data", "--", "true")
    assert process.returncode == 0
    assert "wJalr" not in process.stderr


# What comes of it


def test_only_the_child_writes_to_standard_output(command: Command) -> None:
    code = "import sys; print(sys.stdin.read().upper()); print('logged', file=sys.stderr)"
    process = command("run", *python(code), input="given")
    assert (process.stdout, process.stderr) == ("GIVEN\n", "logged\n")


def test_the_child_has_the_files_that_the_shell_opened_for_it(command: Command) -> None:
    read, write = os.pipe()
    os.write(write, b"from a substitution")
    os.close(write)
    assert command("run", "--", "cat", f"/dev/fd/{read}", pass_fds=[read]).stdout == "from a substitution"
    os.close(read)


def test_options_of_the_child_are_its_own(command: Command) -> None:
    for separator in (["--"], []):
        assert command("run", *separator, "echo", "--json", "-h", "--", "a b").stdout == "--json -h -- a b\n"


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -KILL $$", 137), ("kill -SEGV $$", 139), ("kill $$", 143)],
)
def test_the_exit_code_is_the_childs(command: Command, script: str, code: int) -> None:
    process = command("run", "--", "sh", "-c", script)
    assert (process.returncode, process.stdout, process.stderr) == (code, "", "")


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [("pyhton", 127, "No such file or directory"), ("./plain", 126, "Permission denied")],
)
def test_what_cannot_be_started(command: Command, tmp_path: Path, program: str, code: int, reason: str) -> None:
    (tmp_path / "plain").write_text("")
    process = command("run", "--", program)
    assert (process.returncode, process.stdout) == (code, "")
    assert process.stderr == (
        f"Error: Received the command '{program}', which cannot be started: {reason}. Expected a program, such as: polyaxon-tracking run -- python train.py\n"
    )


@pytest.mark.parametrize(("program", "code"), [("train.py", 127), ("./train.py", 126)])
def test_a_script_is_no_program(command: Command, tmp_path: Path, program: str, code: int) -> None:
    (tmp_path / "train.py").write_text("")
    process = command("run", "--", program)
    assert process.returncode == code
    assert process.stderr.endswith(f"Expected a program. Did you mean: polyaxon-tracking run -- python {program}?\n"), (
        process.stderr
    )


@pytest.mark.parametrize("arguments", [["--", "sh", "-c", "exit 3"], ["--", "./gone"]], ids=["runs", "fails"])
@pytest.mark.parametrize("json_too", [True, False], ids=["json", "text"])
def test_where_standard_error_goes_nowhere_the_exit_code_is_as_ever(arguments: list[str], json_too: bool) -> None:
    expected = 3 if "sh" in arguments else 127
    options = ["--json"] if json_too else []
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *RUN, *options, *arguments]
    process = subprocess.run(closed, stdout=subprocess.PIPE, check=False)
    assert (process.returncode, process.stdout) == (expected, b"")
    reads, writes = os.pipe()
    os.close(reads)
    process = subprocess.run([*RUN, *options, *arguments], stdout=subprocess.PIPE, stderr=writes, check=False)
    os.close(writes)
    assert (process.returncode, process.stdout) == (expected, b"")


def test_errors_are_json_too(command: Command) -> None:
    for arguments, code in ((["--data", "digits", "--", "true"], 2), (["--", "./gone"], 127)):
        process = command("run", "--json", *arguments)
        assert (process.returncode, process.stdout) == (code, "")
        assert json.loads(process.stderr.splitlines()[-1])["error"].startswith("Received ")


def test_json_is_printed_on_standard_error(command: Command, tmp_path: Path) -> None:
    process = command("run", "--json", "--log-level", "info", "--", "sh", "-c", "echo out; kill -KILL $$")
    assert process.stdout == "out\n"
    assert [json.loads(line) for line in process.stderr.splitlines()] == [
        {"environment": {"POLYAXON_RUN_OUTPUTS_PATH": f"{tmp_path}/outputs", "POLYAXON_LOG_LEVEL": "INFO"}},
        {"exit_code": 137},
    ]


# Signals


def started(code: str, **options: object) -> subprocess.Popen[str]:
    """Start `run` in its own session, without a terminal, and wait until the child is ready."""
    command = [*RUN, *python(code)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)  # type: ignore[call-overload]
    assert process.stdout.readline().startswith("ready")
    return process  # type: ignore[no-any-return]


def rest_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    text = process.stdout.read()
    process.stdout.close()
    return text


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize("to", ["process", "group"])
def test_the_child_gets_every_signal_once(to: str, number: str) -> None:
    process = started(COUNT)
    (os.kill if to == "process" else os.killpg)(process.pid, signal.Signals[number])
    assert json.loads(rest_of(process)) == {number: 1}
    assert process.wait(timeout=300) == 7


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_ends_the_child_is_its_exit_code(number: str, code: int) -> None:
    process = started(
        "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); print('ready', flush=True); signal.pause()"
    )
    os.kill(process.pid, signal.Signals[number])
    assert process.wait(timeout=300) == code
    assert rest_of(process) == ""


def test_a_second_signal_is_handed_on_too() -> None:
    process = started(COUNT)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    assert json.loads(rest_of(process)) == {"SIGUSR1": 1, "SIGTERM": 1}
    assert process.wait(timeout=300) == 7


def test_the_child_starts_with_no_signal_held_back() -> None:
    process = started("import signal; print('ready'); print(signal.pthread_sigmask(signal.SIG_BLOCK, []))")
    assert rest_of(process) == "set()\n"
    assert process.wait(timeout=300) == 0


def test_the_child_does_not_outlive_a_kill() -> None:
    command = [*RUN, *python(COUNT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    process.kill()
    assert process.stdout.read() == ""  # the child held the pipe open
    assert not Path(f"/proc/{child}/fd").exists() or not os.listdir(f"/proc/{child}/fd")
    process.stdout.close()
    process.wait()


def test_a_training_that_is_terminated_saves_and_resumes() -> None:
    loop = """
import time
from polyaxon_tracking import CheckpointManager, PreemptionHandler, get_outputs_path
checkpoints = CheckpointManager(get_outputs_path("checkpoints"))
latest = checkpoints.latest()
step = latest.step if latest else 0
with PreemptionHandler() as preemption:
    print("ready", flush=True)
    while True:
        step += 1
        time.sleep(0.01)
        if preemption.requested:
            with checkpoints.save(step) as path, open(path, "w") as file:
                file.write("state")
            preemption.exit()
"""
    for _ in range(2):
        process = started(loop, stderr=subprocess.DEVNULL)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=300) == 143
        rest_of(process)
    assert len(CheckpointManager("outputs/checkpoints").checkpoints()) == 2


# On a terminal


class Terminal:
    """A command in the foreground of a terminal."""

    def __init__(self, command: list[str], path: str = "") -> None:
        self.master, slave = pty.openpty()
        settings = termios.tcgetattr(slave)
        settings[3] &= ~termios.ECHO  # of the local modes: keys are not shown among what is printed
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{os.environ['PYTHONPATH']}"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # no threads
        )
        os.close(slave)
        self.lines: IO[str] = open(self.master, encoding="utf-8", closefd=False)  # noqa: SIM115

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def until(self, begin: str) -> str:
        """Return the next line that begins with `start`."""
        return next(line.strip() for line in self.lines if line.startswith(begin))

    def end(self) -> int:
        code = self.process.wait(timeout=300)
        os.close(self.master)
        return code


# What macOS lacks, among it the sender of a signal, is taken away by a folder on the PYTHONPATH.
SYSTEMS = pytest.mark.parametrize("path", ["", str(MACOS)], ids=["linux", "macos"])


@SYSTEMS
def test_keys_reach_the_child_once_and_the_parent_waits(path: str) -> None:
    for key, name in ((b"\x03", "SIGINT"), (b"\x1c", "SIGQUIT")):
        terminal = Terminal([*RUN, *python(COUNT)], path)
        terminal.until("ready")
        terminal.type(key)
        assert json.loads(terminal.until("{")) == {name: 1}
        assert terminal.end() == 7


@SYSTEMS
def test_a_signal_from_elsewhere_is_handed_on_from_a_terminal(path: str) -> None:
    terminal = Terminal([*RUN, *python(COUNT)], path)
    terminal.until("ready")
    terminal.process.send_signal(signal.SIGTERM)
    assert json.loads(terminal.until("{")) == {"SIGTERM": 1}
    assert terminal.end() == 7


def test_the_child_may_read_from_the_terminal() -> None:
    code = "print('ready', flush=True); print('got', input(), flush=True)"
    terminal = Terminal([*RUN, *python(code)])
    terminal.until("ready")
    terminal.type(b"an answer\n")
    assert terminal.until("got") == "got an answer"
    assert terminal.end() == 0


# What a shell with job control does for a command, Ctrl-Z and `fg`.
SHELL = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True, preexec_fn=os.setpgrp)
os.tcsetpgrp(0, job.pid)
child = int(job.stdout.readline().split()[1])
print("ready", flush=True)
_, status = os.waitpid(job.pid, os.WUNTRACED)
os.tcsetpgrp(0, os.getpgrp())
while open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0] != "T":
    time.sleep(0.01)
print("stopped", os.WIFSTOPPED(status), flush=True)
os.tcsetpgrp(0, job.pid)
os.killpg(job.pid, signal.SIGCONT)
print("continued", flush=True)
print(job.stdout.read(), end="", flush=True)
sys.exit(job.wait())
"""


def test_it_can_be_stopped_and_continued() -> None:
    terminal = Terminal([sys.executable, "-c", SHELL, *RUN, *python(COUNT)])
    terminal.until("ready")
    terminal.type(b"\x1a")
    assert terminal.until("stopped") == "stopped True"
    terminal.until("continued")
    terminal.type(b"\x03")
    assert json.loads(terminal.until("{")) == {"SIGINT": 1}
    assert terminal.end() == 7


def test_data_on_a_mount_whose_server_is_gone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with without_a_server(tmp_path / "data"):
        process = command("run", "--data", f"digits={tmp_path}/data", "--", "true")
    assert process.returncode == 2
    assert f"and Transport endpoint is not connected at '{tmp_path}/data'. Expected NAME=PATH" in process.stderr
