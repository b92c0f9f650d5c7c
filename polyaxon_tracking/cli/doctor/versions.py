"""Check the installed versions: this package, frameworks, store drivers, integrations. Nothing is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from typing import TYPE_CHECKING

import polyaxon_tracking
from polyaxon_tracking.cli.rows import ERROR, INFO, OK, WARNING, Row, readable_size
from polyaxon_tracking.training.memory import available_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["integrations", "versions"]

_INSTALLED = [
    ("lightning",),
    ("pytorch-lightning",),
    ("torch",),
    ("keras",),
    ("tensorflow", "tensorflow-cpu"),
    ("jax",),
    ("transformers",),
    ("accelerate",),
    ("fsspec",),
    ("tqdm",),
    ("s3fs",),
    ("gcsfs",),
    ("adlfs",),
    ("typer",),
    ("rich",),
]

# The first versions without known vulnerabilities in loading files. Keras 3.12, the last on Python 3.10, has a fix.
_LOADS_SAFELY_FROM: dict[str, list[tuple[int, ...]]] = {"torch": [(2, 10)], "keras": [(3, 12, 1), (3, 13, 2)]}

# GHSA-w37p-236h-pfx3.
_MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}

# Keras needs one of them, and installs none.
_KERAS_BACKENDS = ("tensorflow", "tensorflow-cpu", "torch", "jax")

# The same framework under its other name.
_OTHER_NAME = {"lightning": "pytorch-lightning"}


def versions() -> Iterator[Row]:
    """Yield a row for each package, with its installed version."""
    group = "Versions"
    here = os.path.dirname(polyaxon_tracking.__file__)
    yield Row(group, "polyaxon-tracking", OK, _version("polyaxon-tracking") or "not installed, but importable", here)
    yield Row(group, "Python", OK, f"{platform.python_version()} on {platform.platform()}", sys.executable)
    yield Row(group, "process", INFO, f"user id {os.getuid()}, {readable_size(available_memory())} of memory available")
    for names in _INSTALLED:
        found = next(((name, version) for name in names if (version := _version(name))), None)
        yield Row(group, names[0], INFO, "not installed") if found is None else _version_row(*found)


def integrations() -> Iterator[Row]:
    """Yield a row for each installed integration, with the frameworks that are missing."""
    for found in importlib.metadata.entry_points(group="polyaxon_tracking.integrations"):
        needed = [] if found.dist is None else _required_packages(found.dist, found.name)
        missing = [name for name in needed if not _version(name) and not _version(_OTHER_NAME.get(name, name))]
        if "keras" in needed and not missing and not any(map(_version, _KERAS_BACKENDS)):
            missing.append("a backend of Keras (tensorflow, torch or jax)")
        if missing:
            yield Row("Integrations", found.module, INFO, f"{found.attr}: {', '.join(missing)} is not installed")
        else:
            yield Row("Integrations", found.module, OK, found.attr)


def _required_packages(distribution: importlib.metadata.Distribution, extra: str) -> list[str]:
    """Return the packages that the `extra` of the distribution installs."""
    required = [line.partition(";") for line in distribution.requires or []]
    return [
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        for requirement, _, marker in required
        if re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker)
    ]


def _version_row(name: str, version: str) -> Row:
    if version in _MALICIOUS.get(name, ()):
        advice = f"This release holds malicious code (GHSA-w37p-236h-pfx3). Replace it: pip install --upgrade {name}"
        return Row("Versions", name, ERROR, version, "", advice)
    numbers = _numbers(version)
    # The first safe version in the same series, or in a later series.
    safe = next((first for first in _LOADS_SAFELY_FROM.get(name, []) if numbers[:2] <= first[:2]), None)
    if safe is not None and numbers < safe:
        advice = (
            f"Versions before {'.'.join(map(str, safe))} have known holes in loading files. Resume only from "
            f"directories that you trust, or: pip install --upgrade {name}"
        )
        return Row("Versions", name, WARNING, version, "", advice)
    return Row("Versions", name, OK, version)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
