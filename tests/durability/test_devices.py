"""The random numbers of accelerators: of one that Python makes up, because CUDA, MPS and XPU need their hardware."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
from training_scripts import trained

SCRIPT = Path(__file__).with_name("device_script.py")


def train(framework: str, epochs: int, outputs: Path, **environment: str) -> str:
    environment |= {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs), "KERAS_BACKEND": "torch"}
    process = forked.run(framework, SCRIPT, framework, str(epochs), **environment)
    return trained(process, "weights")


@pytest.mark.parametrize("framework", ["torch", "lightning", "keras", "transformers"])
def test_a_resumed_training_draws_the_devices_random_numbers_of_an_uninterrupted_one(
    framework: str, tmp_path: Path
) -> None:
    first = train(framework, 1, tmp_path / "outputs")
    resumed = train(framework, 2, tmp_path / "outputs")
    assert resumed == train(framework, 2, tmp_path / "uninterrupted")
    assert resumed != first


def test_an_exception_within_a_batch_takes_back_the_random_numbers_that_it_drew(tmp_path: Path) -> None:
    environment = {"POLYAXON_RUN_OUTPUTS_PATH": str(tmp_path / "outputs"), "RAISE_AT_BATCH": "7"}
    ended = forked.run("torch", SCRIPT, "torch", "2", **environment)
    assert ended.stderr.endswith("RuntimeError: after random numbers of this batch were drawn\n")
    resumed = train("torch", 2, tmp_path / "outputs")
    assert resumed == train("torch", 2, tmp_path / "uninterrupted")
