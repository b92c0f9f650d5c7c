"""How environments are set up: what `make` says while it does so and where something is missing, and after a kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = ["bash", str(ROOT / "tools" / "step.sh")]
# Debian's python3 says it without the package python3-venv.
NO_VENV = r"""#!/bin/sh
case "$*" in
    "-m venv "*)
        echo "The virtual environment was not created successfully because ensurepip is not"
        echo "available.  On Debian/Ubuntu systems, you need to install the python3-venv"
        echo "package using the following command."
        echo
        echo "    apt install python3.11-venv"
        exit 1
        ;;
esac
exec PYTHON "$@"
"""
OLD = """#!/bin/sh
echo 3.9.18
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy the files that `make` reads before pip looks at the package."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )


def python(directory: Path, script: str) -> str:
    path = directory / "python3"
    path.write_text(script.replace("PYTHON", sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
@pytest.mark.parametrize(
    ("script", "said"),
    [
        (NO_VENV, r"This Python has no venv: apt install python3\.11-venv, and start again\."),
        (
            OLD,
            r"\S+/python3 is Python 3\.9\.18, and 3\.10 or newer is needed: install one, and name it, as in: make demo PYTHON=python3\.12",
        ),
        ("#!/bin/sh\nexit 127\n", r"\S+/python3 does not run: install Python 3\.10 or newer, and name it, .*"),
    ],
    ids=["no venv", "too old", "does not run"],
)
def test_a_python_that_will_not_do(checkout: Path, target: str, script: str, said: str) -> None:
    made = run("make", target, f"PYTHON={python(checkout, script)}", "VENV=.venv", "DEMO_VENV=.venv-demo")
    assert made.returncode == 2
    assert re.fullmatch(rf"{said}\nmake(\[\d\])?: \*\*\* .*\n", made.stderr), made.stderr
    assert not list(checkout.glob(".venv*/.installed"))


@pytest.mark.usefixtures("checkout")
def test_a_disk_without_room() -> None:
    made = run("bash", str(ROOT / "tools" / "set_up.sh"), sys.executable, "environment", "999999999", "1", "a test")
    assert made.returncode == 1
    said = r"setting it up takes \d+ MB, and \d+ MB are free on its disk\. Make room, and start again\.\n"
    assert re.fullmatch(f"There is no room for environment: {said}", made.stderr), made.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            [sys.executable, "-c", "open('/dev/full', 'wb', buffering=0).write(b'x')"],
            r"There is no room left for environment: \d+ MB are free on its disk \(OSError: \[Errno 28\] No space left on device\)\. Make room, and start again\.",
        ),
        (
            [str(Path(sys.prefix, "bin", "npm")), "install", "--loglevel=error", "azurite@3.37.0"],
            r"npm could not fetch azurite@3\.37\.0 \(code ECONNREFUSED\)\. Check the network, .*",
        ),
        (
            [sys.executable, "-m", "pip", "install", "--isolated", "--no-index", "there-is-none"],
            r"pip could not fetch all packages \(Could not find a version that satisfies the requirement there-is-none .*\)\. Check the network, .*",
        ),
        (
            [sys.executable, "-c", "import no_such_module"],
            r"(?s:Traceback .*)\nModuleNotFoundError: No module named 'no_such_module'\nThis failed, for the reason above: \S+ -c import no_such_module",
        ),
    ],
    ids=["a full disk", "npm", "pip", "another reason"],
)
def test_a_command_that_fails(tmp_path: Path, command: list[str], said: str) -> None:
    # Port 9 of this machine is closed.
    made = run(*STEP, "environment", *command, npm_config_registry="http://127.0.0.1:9", npm_config_fetch_retries="0")
    assert made.returncode == 1
    assert re.fullmatch(f"{said}\n", made.stderr), made.stderr
    assert not list(tmp_path.glob("environment/*"))


def test_a_command_is_seen_to_work(tmp_path: Path) -> None:
    """Show the command's own lines about progress, or else how much it has written so far."""
    script = "echo Collecting torch '(from polyaxon)'; echo WARNING: no; head -c 3M /dev/zero > $TMPDIR/torch; sleep 5; echo Successfully installed"
    made = run(*STEP, "environment", "bash", "-c", script)
    assert (made.returncode, made.stderr) == (0, "")
    assert re.fullmatch(r"  Collecting torch\n(  \.\.\. \d+ s, [34] MB\n)+  Successfully installed\n", made.stdout), (
        made.stdout
    )


def test_what_a_killed_set_up_left_is_not_taken_for_an_environment(checkout: Path) -> None:
    made = subprocess.Popen(
        ["make", "demo", f"PYTHON={sys.executable}", "DEMO_VENV=.venv-demo"], start_new_session=True
    )
    left = checkout / ".venv-demo" / "pyvenv.cfg"
    while not left.exists() and made.poll() is None:
        time.sleep(0.01)
    os.killpg(made.pid, signal.SIGKILL)
    assert made.wait() == -signal.SIGKILL
    (checkout / ".venv-demo" / "half a package").touch()
    again = run(
        "make", "demo", f"PYTHON={sys.executable}", "DEMO_VENV=.venv-demo", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull
    )
    assert (
        "Removing .venv-demo, whose set-up did not come to its end.\nSetting up .venv-demo for the demo" in again.stdout
    )
    assert "pip could not fetch all packages" in again.stderr
    assert left.exists()
    assert not (checkout / ".venv-demo" / "half a package").exists()
    assert not (checkout / ".venv-demo" / ".installed").exists()
