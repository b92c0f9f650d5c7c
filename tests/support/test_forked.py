"""A process of the fork server is as independent as a new interpreter, so killing it is a real kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import forked
import pytest

if TYPE_CHECKING:
    from pathlib import Path

SELF = """
import json, os, resource, sys, threading
print(json.dumps({
    "pid": os.getpid(), "session": os.getsid(0), "group": os.getpgid(0), "directory": os.getcwd(),
    "arguments": sys.argv, "mine": os.environ.get("MINE"), "main": __name__, "threads": threading.active_count(),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "left": hasattr(sys, "left_by_another"),
    "open": sorted(map(int, set(os.listdir("/proc/self/fd")))), "random": __import__("random").random(),
}))
"""


@pytest.fixture(params=list(forked.FRAMEWORKS))
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def described(framework: str, *arguments: str, **environment: str) -> dict[str, object]:
    import json

    process = forked.run(framework, "-c", SELF, *arguments, **environment)
    assert process.returncode == 0, process.stderr
    description: dict[str, object] = json.loads(process.stdout)
    return description


def test_it_is_an_independent_process(framework: str, tmp_path: Path) -> None:
    first, second = described(framework, "an argument", MINE="1"), described(framework)
    assert first["pid"] == first["session"] == first["group"] != second["pid"]
    assert (first["arguments"], first["mine"], first["main"]) == (["-c", "an argument"], "1", "__main__")
    assert (second["arguments"], second["mine"]) == (["-c"], None)
    assert first["directory"] == str(tmp_path)
    assert first["threads"] == 1
    assert first["random"] != second["random"]


def test_nothing_of_one_reaches_the_next(framework: str) -> None:
    before = described(framework)
    code = """
import os, resource, signal, sys
os.environ["MINE"] = "changed"
os.chdir("/")
os.umask(0o777)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.left_by_another = open(os.devnull)
"""
    assert forked.run(framework, "-c", code).returncode == 0
    after = described(framework)
    assert {name: after[name] for name in ("mine", "directory", "files", "left", "open")} == {
        name: before[name] for name in ("mine", "directory", "files", "left", "open")
    }
    process = forked.start(framework, "-c", "import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(143)", 143, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("raise ArithmeticError('mine')", 1, "ArithmeticError: mine\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import os; os._exit(5)", 5, ""),
    ],
)
def test_it_ends_as_a_new_interpreter_does(code: str, status: int, error: str) -> None:
    new = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    process = forked.run("lightning", "-c", code)
    assert process.returncode == new.returncode == status
    for stderr in (process.stderr, new.stderr):
        assert stderr.endswith(error)
        assert bool(stderr) == bool(error)


def test_the_end_of_the_interpreter_is_not_left_out() -> None:
    code = """
import atexit, threading, time
atexit.register(print, "at exit")
def late():
    time.sleep(0.1)
    print("thread")
threading.Thread(target=late).start()
print("script")
"""
    assert forked.run("lightning", "-c", code).stdout == "script\nthread\nat exit\n"


def test_a_signal_to_its_group_reaches_it_and_its_children_and_no_other() -> None:
    code = """
import os, time
if not os.fork():
    time.sleep(60)
print("ready", flush=True)
time.sleep(60)
"""
    one, other = forked.start("lightning", "-c", code), forked.start("lightning", "-c", code)
    for process in (one, other):
        assert process.stdout is not None
        process.stdout.readline()
    os.killpg(one.pid, signal.SIGTERM)
    one.communicate(60)  # its child held the pipe too
    assert one.returncode == -signal.SIGTERM
    assert other.poll() is None
    os.killpg(other.pid, signal.SIGKILL)
    other.communicate(60)


def test_its_classes_can_be_pickled_and_its_modules_lie_next_to_the_script(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("value = 7")
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, neighbour\n"
        "class Mine: pass\n"
        "print(type(pickle.loads(pickle.dumps(Mine()))) is Mine, neighbour.value, __file__)\n"
    )
    assert forked.run("lightning", script).stdout == f"True 7 {script}\n"


def test_one_that_takes_too_long_is_killed_and_raises() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run("lightning", "-c", "import time; time.sleep(60)", timeout=0.5)


def test_a_server_that_has_ended_with_its_last_client_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forked.FRAMEWORKS, "none", ["json"])
    client = "import forked; forked.FRAMEWORKS['none'] = ['json']; print(forked.run('none', '-c', 'print(7)').stdout)"
    for _ in range(2):
        printed = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, check=True).stdout
        assert printed.strip() == "7"
    assert forked.run("none", "-c", "print(7)").stdout == "7\n"


def test_where_an_import_starts_a_thread_nothing_is_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "with_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    monkeypatch.setitem(forked.FRAMEWORKS, "threaded", ["with_a_thread"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="The fork server for threaded has ended"):
        forked.run("threaded", "-c", "")
    assert "started threads, so forking is not safe" in capfd.readouterr().err
