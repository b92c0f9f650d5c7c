"""Run the training scripts of the test folders as processes, and read what they print and leave on the disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import forked

from polyaxon_tracking import Checkpoint, CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Iterable

TESTS = Path(__file__).parents[1]
SCRIPTS = {
    "lightning": TESTS / "polyaxon_lightning" / "lightning_script.py",
    "torch": TESTS / "polyaxon_torch" / "loop_script.py",
    "keras": TESTS / "polyaxon_keras" / "keras_script.py",
    "transformers": TESTS / "polyaxon_transformers" / "transformers_script.py",
}


class Ended(NamedTuple):
    """The end of a process: its exit status, or the negative number of the signal, and the texts that it printed."""

    returncode: int
    stdout: str
    stderr: str


class _Ended(Protocol):
    returncode: int
    stdout: str
    stderr: str


def train(
    framework: str, outputs: Path | str, *, directory: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the framework's script in a process of the fork server."""
    return forked.run(
        framework, SCRIPTS[framework], directory=directory, POLYAXON_RUN_OUTPUTS_PATH=str(outputs), **environment
    )


def stderr_of(source: str, outputs: Path, **environment: str) -> str:
    """Run the program `source` in a new Python, whose limits are its own, and return what it printed to stderr."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        env=os.environ | {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs)} | environment,
        cwd=outputs,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stderr


def trained(process: _Ended, start: str = "trained") -> str:
    """Return the line that a successful script prints at its end, the same on all ranks."""
    assert process.returncode == 0, process.stderr
    [line] = {line for line in process.stdout.splitlines() if line.startswith(start)}
    return line


def train_with_curves(script: Path, framework: str, directory: Path, **environment: str) -> Ended:
    """Run a script that appends what it logs to the file `curves`, with its outputs in the same directory."""
    directory.mkdir(exist_ok=True)
    environment |= {"POLYAXON_RUN_OUTPUTS_PATH": str(directory), "CURVES": str(directory / "curves")}
    process = forked.run(framework, script, **environment)
    return Ended(process.returncode, process.stdout, process.stderr)


def results_and_curves(process: Ended, directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the results that a successful script printed as JSON, and what it logged."""
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), (directory / "curves").read_text().splitlines()


def newest(outputs: Path | str) -> Checkpoint:
    """Return the checkpoint that the training would resume from."""
    checkpoint = CheckpointManager(f"{outputs}/checkpoints/resume").latest()
    assert checkpoint is not None
    return checkpoint


def newest_position(outputs: Path | str) -> tuple[int, int]:
    """Return the step and the epoch of the checkpoint that the training would resume from."""
    checkpoint = newest(outputs)
    return checkpoint.step, checkpoint.epoch


def directories_of_trainings(outputs: Path) -> list[str]:
    """Return the directories of training states: `resume` for the first training of the script, then `resume-2`."""
    return sorted(path.name for path in (outputs / "checkpoints").glob("resume*"))


def without_checksums(names: Iterable[str | Path]) -> list[str]:
    """Return the names in order, without the CRC-32s in them."""
    return sorted(re.sub(r"-crc=\w+", "", str(name)) for name in names)


def files_in(directory: Path) -> list[str]:
    """Return the names of the files in the directory, without the CRC-32s in them."""
    return without_checksums(entry.name for entry in directory.iterdir() if entry.is_file())


def files_below(directory: Path) -> list[str]:
    """Return the paths of all files below the directory, without the CRC-32s in them."""
    return without_checksums(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of the file; of a zip archive, in its largest member, because nobody reads the padding."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda member: member.file_size)
            place = content.index(archive.read(largest)) + largest.file_size // 2
    content[place] ^= 1
    path.write_bytes(content)
