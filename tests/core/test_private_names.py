"""The tables of docs/decisions.md agree with the source: private names of frameworks, and the functions of a save."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "integrations").rglob("*.py"))
# Of Python: documented, or the way in which the call stack is read, which has its own list.
OF_PYTHON = {"_getframe", "_replace"}
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def defined_by(node: ast.AST) -> set[str]:
    """Return the names that `node` defines: functions, classes, variables, attributes and arguments."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            return {name}
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
            return {name}
        case ast.alias(asname=str(name)):
            return {name}
    return set()


def used_by(node: ast.AST) -> set[str]:
    """Return the names that `node` looks up on another object, as an attribute or by a string, and Keras's modules."""
    match node:
        case ast.Attribute(attr=name) | ast.Constant(value=str(name)) if PRIVATE.fullmatch(name):
            return {name}
        case ast.ImportFrom(module=str(module)) if ".src" in module:
            return {module}
    return set()


def listed(heading: str) -> set[str]:
    """Return the code in the first column of the table below `heading`."""
    section = (ROOT / "docs" / "decisions.md").read_text().partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_private_name_is_listed() -> None:
    nodes = {path: list(ast.walk(ast.parse(path.read_text()))) for path in SOURCES}
    own = {name for found in nodes.values() for node in found for name in defined_by(node)}
    used = {name for found in nodes.values() for node in found for name in used_by(node)}
    # Of frameworks, though a method of ours has the name: it overrides theirs, or stands in for it.
    overridden = {"_save_model", "_load_from_checkpoint", "_load_best_model", "_run_epoch", "_save"}
    assert listed("Private names") == (used - own - OF_PYTHON) | overridden


def test_every_search_of_the_call_stack_is_listed() -> None:
    searches = {
        f"{path.parent.name}/{path.name}: {function.name}"
        for path in SOURCES
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in {"_getframe", "walk_stack", "walk_tb", "f_back", "f_locals"}
    }
    assert listed("Searches of the call stack") == searches


def test_every_function_that_a_save_passes_exists() -> None:
    section = (ROOT / "docs" / "decisions.md").read_text().partition("\n## How one save reaches the disk\n")[2]
    hops = re.findall(r"^\| `([\w/]+\.py): (\w+)`", section.partition("\n## ")[0], re.MULTILINE)
    defined = {
        (str(path.relative_to(ROOT)).removeprefix("integrations/"), function.name)
        for path in [*SOURCES, *(ROOT / "polyaxon_tracking").rglob("*.py")]
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
    }
    assert len(hops) > 20
    assert not set(hops) - defined
