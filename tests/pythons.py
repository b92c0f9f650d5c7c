"""Run some of the tests with every other Python on this machine: ``make test-pythons``.

With ``--set-up`` only the environments are made.

Each minor version is run once, but for the one that runs this script, which ``make test`` uses. The environments, one for
each in `.venv-pythons`, hold what the extra `test-core` names.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / os.environ.get("PYTHONS_VENV", ".venv-pythons")
OLDEST = (3, 10)

# What depends on the version of Python: the core, the command, and Keras on JAX. Stores and the other frameworks are left
# to `make test`.
TESTS = [
    "tests/core",
    "tests/training",
    "polyaxon_tracking",
    "tests/cli",
    "--ignore=tests/cli/test_stores.py",
    "tests/polyaxon_keras/test_callback.py",
    "tests/polyaxon_keras/test_processes.py",
]

# Prints nothing where the frameworks are not built for it: a release that is not final, or has no global lock.
PROBE = """
import importlib.util, platform, sys, sysconfig
no_lock = sysconfig.get_config_var("Py_GIL_DISABLED")
if platform.python_implementation() == "CPython" and sys.version_info[3] == "final" and not no_lock:
    print(importlib.util.find_spec("ensurepip") is not None, *sys.version_info[:3])
"""


class Interpreter(NamedTuple):
    """An installed Python. Of each minor version, the newest is used."""

    makes_environments: bool
    version: tuple[int, ...]
    path: Path

    def __str__(self) -> str:
        return "Python " + ".".join(map(str, self.version))

    @property
    def environment(self) -> Path:
        return ENVIRONMENTS / ".".join(map(str, self.version[:2]))

    @property
    def python(self) -> Path:
        """Return the path of the interpreter in the environment."""
        return self.environment / "bin" / "python"


def find_interpreters() -> list[Interpreter]:
    """Return one interpreter for each minor version, of those of pyenv and those on PATH."""
    paths = [*Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob("versions/*/bin/python")]
    for directory in os.environ["PATH"].split(os.pathsep):
        paths += [path for path in Path(directory).glob("python3.*") if re.fullmatch(r"python3\.\d+", path.name)]
    found: dict[tuple[int, ...], Interpreter] = {}
    for path in paths:
        with contextlib.suppress(OSError):  # it has the name of an interpreter, and cannot be executed
            probe = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, check=False)
            if probe.returncode == 0 and probe.stdout:  # pyenv's shims are there for every version, and may refuse
                makes_environments, *version = probe.stdout.split()
                interpreter = Interpreter(makes_environments == "True", tuple(map(int, version)), path)
                minor = interpreter.version[:2]
                found[minor] = max(interpreter, found.get(minor, interpreter))
    return [found[minor] for minor in sorted(found) if minor >= OLDEST and minor != sys.version_info[:2]]


def run(*command: str | Path, **environment: str) -> str:
    """Run a command in the checkout, and return what it prints.

    Raises:
        subprocess.CalledProcessError: it failed; `output` is what it printed.
    """
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    ).stdout


def set_up(interpreter: Interpreter) -> str:
    """Create the environment, unless there is one of this interpreter that is newer than `pyproject.toml`."""
    project, stamp = ROOT / "pyproject.toml", interpreter.environment / ".installed"
    origin = f"{interpreter} {interpreter.path}"
    if stamp.exists() and stamp.read_text() == origin and stamp.stat().st_mtime > project.stat().st_mtime:
        return "is there"
    run(interpreter.path, "-m", "venv", "--clear", interpreter.environment)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", ".[test-core]"]
    run(interpreter.python, *install)
    stamp.write_text(origin)
    return "made"


def test(interpreter: Interpreter) -> str:
    """Run the tests in the environment, and return the last line of pytest."""
    command = ["-m", "pytest", "--quiet", "-n", "3", "--dist", "worksteal"]
    return run(interpreter.python, *command, *TESTS, KERAS_BACKEND="jax").splitlines()[-1]


def check(interpreter: Interpreter, steps: tuple[Callable[[Interpreter], str], ...]) -> tuple[bool, str]:
    """Take the steps up to the first that fails. Returns whether none failed, and a line that says so."""
    started, line = time.monotonic(), ""
    for step in steps:
        print(f"{interpreter}: {step.__name__}: ", end="", flush=True)
        try:
            print(line := step(interpreter))
        except subprocess.CalledProcessError as error:
            print(f"failed\n{error.output}")
            return False, f"{interpreter}: FAILED: {step.__name__}"
    passed = re.search(r"\d+ passed", line)
    return True, f"{interpreter}: {passed[0] if passed else 'set up'} in {time.monotonic() - started:.0f} s"


def main() -> int:
    steps = (set_up,) if "--set-up" in sys.argv else (set_up, test)
    interpreters = find_interpreters()
    for interpreter in interpreters:
        lacks = "" if interpreter.makes_environments else ", left out: it lacks the module ensurepip"
        print(f"Found {interpreter} in {interpreter.path}{lacks}")
    results = [check(interpreter, steps) for interpreter in interpreters if interpreter.makes_environments]
    print(*[line for _, line in results] or ["No other Python was found, so none was tested."], sep="\n")
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
