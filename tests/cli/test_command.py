"""The command itself: what it needs, what it prints where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest
from reports import on_a_terminal

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., subprocess.CompletedProcess[str]]


def test_the_command_is_installed() -> None:
    script = os.path.join(sysconfig.get_path("scripts"), "polyaxon-tracking")
    text = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("doctor", "run", "checkpoints"):
        assert f"\n  {name} " in text


@pytest.mark.parametrize("package", ["typer", "rich"])
@pytest.mark.parametrize("arguments", [["doctor"], ["run", "--", "true"], ["checkpoints"]], ids=lambda given: given[0])
def test_without_the_extra_it_says_which_to_install(package: str, arguments: list[str]) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from polyaxon_tracking.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 3
    assert process.stdout == ""
    assert process.stderr.startswith("The command polyaxon-tracking needs packages that are not installed: ")
    assert process.stderr.endswith('Install them with: pip install "polyaxon-tracking[cli]"\n')


def test_an_error_of_our_own_is_not_taken_for_a_missing_extra() -> None:
    code = "import sys; sys.modules['polyaxon_tracking.errors'] = None; from polyaxon_tracking.cli import main; main()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "ModuleNotFoundError" in process.stderr


def test_asking_for_the_entry_point_imports_only_the_standard_library() -> None:
    code = "import json, sys; import polyaxon_tracking.cli; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"typer", "rich", "logging"} & set(json.loads(output))


@pytest.mark.parametrize("arguments", [["doctor"], ["checkpoints"], ["--help"], ["run", "--nonsense"]], ids=" ".join)
def test_there_is_no_colour_where_there_is_no_terminal(command: Command, arguments: list[str]) -> None:
    process = command(*arguments, env={"TERM": "xterm-256color"})
    assert "\x1b" not in process.stdout + process.stderr


def test_there_is_colour_on_a_terminal_unless_it_is_not_wanted() -> None:
    assert "\x1b[32mok" in on_a_terminal("doctor")
    assert "\x1b[" not in on_a_terminal("doctor", NO_COLOR="1")  # neither bold nor dim
    assert "\x1b[" not in on_a_terminal("doctor", TERM="dumb")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["doctor", "--nonsense"], ["run"]], ids=" ".join)
def test_arguments_that_cannot_be_used_exit_with_2(command: Command, arguments: list[str]) -> None:
    assert command(*arguments).returncode == 2


@pytest.mark.parametrize("arguments", ["doctor", "doctor --json", "checkpoints", "checkpoints --json", "--version"])
def test_standard_output_that_takes_nothing_is_one_line(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "polyaxon_tracking", *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    message = "Error: Standard output cannot be written to: No space left on device. See where it goes.\n"
    assert (process.returncode, process.stderr) == (2, message)


def test_the_version(command: Command) -> None:
    assert command("--version").stdout == "0.1.0\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("typed", "completed"), [("ch", "checkpoints"), ("doctor --pr", "--problems")])
def test_bash_completes_commands_and_options(typed: str, completed: str) -> None:
    words = typed.split()
    script = f"""
eval "$(_POLYAXON_TRACKING_COMPLETE=source_bash polyaxon-tracking)"
COMP_WORDS=(polyaxon-tracking {typed}) COMP_CWORD={len(words)}
_polyaxon_tracking_completion polyaxon-tracking
echo "${{COMPREPLY[@]}}"
"""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    process = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert process.stdout == f"{completed}\n"
