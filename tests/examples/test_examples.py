"""Each example as a user would run it, on the real data, and the demo that kills two of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from metadata_server import MACHINE, metadata_server

from polyaxon_tracking import CheckpointManager

ROOT = Path(__file__).parents[2]
EXAMPLES, README = ROOT / "examples", ROOT / "README.md"


def run(script: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / script)],
        env=os.environ | {"KERAS_BACKEND": "torch", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def accuracy(output: str) -> float:
    [*_, found] = re.findall(r"test accuracy (\d\.\d+)", output)
    return float(found)


@pytest.mark.parametrize(
    ("script", "epochs"),
    [
        ("lightning_digits.py", 20),
        ("keras_digits.py", 20),
        ("transformers_digits.py", 12),
        ("custom_loop.py", 20),
        ("fabric_digits.py", 20),
        ("accelerate_digits.py", 20),
    ],
)
def test_an_example_learns_the_digits(tmp_path: Path, script: str, epochs: int) -> None:
    assert accuracy(run(script)) > 0.9
    assert list((tmp_path / "outputs").rglob(f"step=*-epoch={epochs}-*"))


def test_the_loop_on_jax_is_killed_and_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def weights(outputs: Path) -> list[bytes]:
        [checkpoint] = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
        assert checkpoint.step == 1000
        with np.load(checkpoint.path) as saved:
            return [saved[name].tobytes() for name in saved.files]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert accuracy(run("jax_digits.py", POLYAXON_RUN_OUTPUTS_PATH=str(whole))) > 0.9
    environment = os.environ | {"POLYAXON_RUN_OUTPUTS_PATH": str(killed)}
    process = subprocess.Popen([sys.executable, str(EXAMPLES / "jax_digits.py")], env=environment)
    while not list(killed.rglob("step=0000000300-*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert CheckpointManager(killed / "checkpoints" / "resume").checkpoints()[0].step < 1000
    assert accuracy(run("jax_digits.py", POLYAXON_RUN_OUTPUTS_PATH=str(killed))) > 0.9
    assert weights(killed) == weights(whole)


def test_the_warm_start_begins_where_another_run_ended(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run("custom_loop.py", POLYAXON_RUN_OUTPUTS_PATH=str(first))
    output = run(
        "warm_start.py",
        POLYAXON_RUN_OUTPUTS_PATH=str(tmp_path / "second"),
        POLYAXON_REFS_OUTPUTS_PATHS=json.dumps({"experiments": [str(first)]}),
    )
    begin, end = output.splitlines()
    assert begin.startswith(f"starting from step 940 of {first}: ")
    assert accuracy(begin) > 0.9
    assert accuracy(end) > 0.9


def test_the_demo_kills_two_trainings_and_both_resume(tmp_path: Path) -> None:
    output = run("demo.py")
    assert output.count("killed with SIGKILL") == 2
    assert len(re.findall(r"\n  Resuming from checkpoints/resume/step=\S+: epoch \d+, step \d+\n", output)) == 2
    found = [float(found) for found in re.findall(r"finished: test accuracy (\d\.\d+)", output)]
    assert len(found) == 2
    assert min(found) > 0.9
    assert (tmp_path / "demo-outputs").is_dir()
    # As the README shows it, but for numbers. How far a training comes before the kill takes effect differs a little.
    shown = README.read_text().partition("```\nPyTorch Lightning: examples/")[2].partition("\n```")[0]
    expected = "\n".join(
        r"(?:.*\n)*?.*" if line.strip() == "…" else re.escape(line).replace("…", ".*")
        for line in varying(shown).splitlines()
    )
    printed = varying(output.partition("PyTorch Lightning: examples/")[2].partition("\n\n")[0])
    assert re.fullmatch(expected, printed), printed


def varying(output: str) -> str:
    output = re.sub(r"^  \.\.\. \d+ s\n", "", output, flags=re.MULTILINE)  # a start that takes long
    output = re.sub(r"(?<=kept for resuming: ).*", "…", output)
    return re.sub(r"(?<=crc=)\w+|\d+(?:\.\d+)?", "#", output)


def test_workers_of_ray_that_get_a_notice_or_are_killed_resume(tmp_path: Path) -> None:
    """Signals save nothing there. A notice of the cloud does."""
    outputs = tmp_path / "outputs"
    environment = os.environ | {
        "POLYAXON_RUN_OUTPUTS_PATH": str(outputs),
        "POLYAXON_PREEMPTION_NOTICES": "aws",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # Sockets lie below the directory, whose paths must be short.
    with metadata_server() as server, tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        server.preempted = MACHINE
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "ray_digits.py")],
            env=environment
            | {"RAY_TMPDIR": temporary, "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{server.address}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output, noticed, killed = "", "", False
        for line in process.stdout or ():
            output += line
            if saved := re.search(r"Saved step (\d+) after SIGTERM", line):
                noticed, server.preempted = saved[1], None
            worker = re.search(r"RayTrainWorker pid=(\d+)\).* Resuming from", line)
            if noticed and worker and not killed:
                while len(list(outputs.glob("checkpoints/resume/step=*"))) < 2:
                    time.sleep(0.01)
                os.kill(int(worker[1]), signal.SIGKILL)
                killed = True
    assert process.wait() == 0, output
    assert killed
    steps = re.findall(r"Resuming from \S+/checkpoints/resume/step=\S+: epoch \d+, step (\d+)", output)
    assert len(steps) == 2, output
    assert steps[0] == noticed
    assert int(steps[1]) > int(steps[0])
    assert accuracy(output) > 0.9
