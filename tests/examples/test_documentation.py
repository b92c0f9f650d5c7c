"""The code in the README and on the documentation site runs as it stands."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SESSION = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What differs from one time to the next: ages, free space, times.
VARYING = re.compile(r"\d+(?:\.\d+)?(?= (?:s|GB|TB)\b)|(?<=\"age_seconds\": )\d+|\d{4}-\d\d-\d\dT[\d:+]+")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocks(page)],
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "page", [page for page in PAGES if SESSION.search(page.read_text())], ids=lambda page: page.name
)
def test_the_commands_of_a_page_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    """In one directory, with the page's script in it. A "…" stands for anything, alone on a line for any lines."""
    (tmp_path / "train.py").write_text(blocks(page))
    environment = os.environ | {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}", "TMPDIR": "/tmp"}
    for session in SESSION.findall(page.read_text()):
        commands = [line.removeprefix("$ ") for line in session.splitlines() if line.startswith("$ ")]
        script = "\n".join(f"echo {shlex.quote(f'$ {command}')}\n{command}" for command in commands)
        printed = subprocess.run(
            ["bash", "-c", script.replace("/home/ann/digits", str(tmp_path))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        ).stdout.replace(str(tmp_path), "/home/ann/digits")
        expected = re.escape(VARYING.sub("#", session))
        expected = re.sub(r"^(?:\\ )*…\\?\n", r"(?:.*\\n)*?", expected, flags=re.MULTILINE).replace("…", ".*")
        assert re.fullmatch(expected, VARYING.sub("#", re.sub(r" +\n", "\n", printed))), printed


def test_the_tests_that_the_promises_name_are_there() -> None:
    named = re.findall(r"^\d+\. .*`(\S+)::(\w+)`$", (ROOT / "docs" / "promises.md").read_text(), re.MULTILINE)
    assert len(named) > 50
    for path, name in named:
        functions = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path}::{name}"


def test_the_pictures_show_what_the_tables_say() -> None:
    """As `python benchmarks/pictures.py` draws them now, but for how this version of Matplotlib draws."""
    drawn = runpy.run_path(str(ROOT / "benchmarks" / "pictures.py"))
    assert len(drawn["DRAWINGS"]) == 4
    for name, draw in drawn["DRAWINGS"].items():
        committed = (ROOT / "docs" / "pictures" / name).read_text()
        assert "prefers-color-scheme: dark" in committed
        assert texts(committed) == texts(drawn["svg"](draw)) != []


def texts(svg: str) -> list[str]:
    found = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()) for element in found]


def test_there_is_code_on_the_first_screen_of_the_readme() -> None:
    assert "```python" in (ROOT / "README.md").read_text().splitlines()[:12]
