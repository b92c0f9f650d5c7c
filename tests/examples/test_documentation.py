"""The code in the README and on the documentation site runs as it stands."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from importlib.metadata import metadata
from pathlib import Path
from xml.etree import ElementTree as ET

import forked
import pytest
import tomllib

import polyaxon_tracking
from polyaxon_tracking import CheckpointManager, TrackingError

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Raises an error if a variable has no value that it may have.
# Raises an error if a variable of notices has a value that it may not have.
NOTICES = """
from polyaxon_tracking import PreemptionHandler
from polyaxon_tracking.training.time_limit import TimeLimit
PreemptionHandler(), TimeLimit()
"""
ANY_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SESSION = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What differs from one time to the next: ages, free space, times.
VARYING = re.compile(r"\d+(?:\.\d+)?(?= (?:s|GB|TB)\b)|(?<=\"age_seconds\": )\d+|\d{4}-\d\d-\d\dT[\d:+]+")
SOURCES = ("polyaxon_tracking", "integrations")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def constant(printed: str) -> str:
    """Return what is printed without what varies, and without the widths of columns, which depend on it."""
    return re.sub(r"(?<=\S) +(?=\S)", " ", re.sub(r" +\n", "\n", VARYING.sub("#", printed)))


def blocks(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    process = forked.run("all", "-c", blocks(page), KERAS_BACKEND="torch")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "page", [page for page in PAGES if SESSION.search(page.read_text())], ids=lambda page: page.name
)
def test_the_commands_of_a_page_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    """Run the commands in one directory, which holds the page's script. A "…" stands for any text, and on its own line for any lines."""
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
            timeout=300,
        ).stdout.replace(str(tmp_path), "/home/ann/digits")
        expected = re.escape(constant(session))
        expected = re.sub(r"^(?:\\ )*…\\?\n", r"(?:.*\\n)*?", expected, flags=re.MULTILINE).replace("…", ".*")
        assert re.fullmatch(expected, constant(printed)), printed


# Blocks that are no code: what a file tree or the output of a training looks like.
SHOWN = re.compile(
    r"<outputs>/|PyTorch Lightning: examples/|Resuming from |Received only |The hyperparameters |OSError: |POLYAXON_RUN_OUTPUTS_PATH is not set"
    r"|every_n_train_steps='auto': |/scratch/datasets"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_neither_python_nor_a_session_is_right_too(page: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "digits").mkdir(parents=True)
    (tmp_path / "train.py").write_text("from polyaxon_tracking import get_data_path; print(get_data_path('digits'))")
    extras = set(metadata("polyaxon-tracking").get_all("Provides-Extra"))
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE) if page.parent == ROOT else []
    for kind, text in ANY_BLOCK.findall(page.read_text()):
        if kind in ("python", "console"):
            continue
        if kind == "toml":
            assert tomllib.loads(text)
        elif kind == "bash":  # of a job of Slurm, whose training ends by a signal, or the variables of notices
            slurm = "srun() { return 138; }; scontrol() { echo $*; }; SLURM_JOB_ID=7 SLURM_JOB_END_TIME=1e10\n"
            script = f"{slurm}{text}\n{sys.executable} -c '{NOTICES}'"
            printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
            assert printed == ("requeue 7\n" if "scontrol" in text else "")
        elif text.startswith("pip install"):
            assert set(re.findall(r"\[([\w,]+)\]", text)) <= extras
        elif text.startswith("make "):
            assert text.split()[1:] in [[target] for target in targets]
        elif text.startswith("polyaxon-tracking "):
            environment = os.environ | {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
            subprocess.run(["bash", "-ec", text], env=environment, cwd=tmp_path, check=True, timeout=300)
        elif text.startswith("POLYSTORES_"):
            for line in text.splitlines():
                assert json.loads(line.partition("=")[2])
        else:
            assert not kind
            assert SHOWN.match(text), text


def test_the_error_for_damaged_checkpoints_is_what_the_page_shows(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "resuming.md").read_text().replace("/outputs/7", str(tmp_path))
    manager = CheckpointManager(tmp_path / "checkpoints" / "resume")
    with manager.save(172, 4) as path:
        Path(path).write_text("weights")
    [saved] = manager.checkpoints()
    Path(saved.path).write_text("")
    with pytest.raises(TrackingError) as caught:
        manager.latest()
    _, _, expected = page.partition("```\nReceived only")
    expected = re.escape(" ".join(expected.partition("\n```")[0].split())).replace("…", ".*")
    assert re.fullmatch(f"Received only {expected}", str(caught.value))


def test_every_variable_is_in_the_reference() -> None:
    code = "".join(path.read_text() for path in Path(polyaxon_tracking.__file__).parent.rglob("*.py"))
    names = set(re.findall(r"POLY(?:AXON|STORES)_[A-Z_]+", code))
    listed = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE))
    assert names == listed


def test_the_tests_that_the_promises_name_are_there() -> None:
    named = re.findall(r"^\d+\. .*`(\S+)::(\w+)`$", (ROOT / "docs" / "promises.md").read_text(), re.MULTILINE)
    assert len(named) > 50
    for path, name in named:
        functions = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path}::{name}"


def test_the_pictures_show_what_the_tables_say() -> None:
    """Compare with what `python benchmarks/pictures.py` draws now, except for what depends on Matplotlib's version."""
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


def test_the_messages_that_troubleshooting_explains_are_those_of_the_code() -> None:
    source = "".join(path.read_text() for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py")))
    source = re.sub(r'"\s+f?"', "", source)  # strings that the compiler joins
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for message in rows:
        shown = re.sub(r"'digits'|resume-2|172|1800|/", "…", message)
        for part in re.split(r"…|: (?=no checkpoint)", shown):
            assert part.removeprefix("OSError: ").strip(" :") in source, message
