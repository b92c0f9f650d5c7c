"""Models that are split between ranks, which save a directory together."""

from __future__ import annotations

import os
from pathlib import Path

import forked
import pytest
from ranks import train_ranks
from training_scripts import Ended, trained

from polyaxon_tracking import CheckpointManager

SCRIPT = Path(__file__).with_name("sharded_script.py")


def train(outputs: Path | str, **environment: str) -> Ended:
    return train_ranks("lightning", outputs, script=SCRIPT, **environment)


def train_alone(outputs: Path) -> Ended:
    process = forked.run("lightning", SCRIPT, POLYAXON_RUN_OUTPUTS_PATH=str(outputs), RANKS="1")
    return Ended(process.returncode, process.stdout, process.stderr)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(train(tmp_path_factory.mktemp("uninterrupted")))


@pytest.mark.parametrize("options", [{}, {"IN_ONE_FILE": "1"}], ids=["in parts", "in one file"])
def test_a_killed_training_resumes_and_old_checkpoints_go_as_a_whole(
    options: dict[str, str], tmp_path: Path, uninterrupted: str
) -> None:
    assert train(tmp_path, DIE_AT_STEP="3", **options).returncode != 0
    resumed = train(tmp_path, **options)
    assert ": epoch 3, step 3\n" in resumed.stderr, resumed.stderr
    assert trained(resumed) == uninterrupted
    directory = tmp_path / "checkpoints" / "resume"
    checkpoints = CheckpointManager(directory).checkpoints()
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 3]
    assert sorted(os.listdir(directory)) == sorted(checkpoint.name for checkpoint in checkpoints)
    assert [os.path.isdir(checkpoint.path) for checkpoint in checkpoints] == 2 * [not options]


def test_a_torn_checkpoint_is_passed_over_and_the_number_of_ranks_may_change(
    tmp_path: Path, uninterrupted: str
) -> None:
    train(tmp_path, EPOCHS="3")
    torn, whole = CheckpointManager(tmp_path / "checkpoints" / "resume").checkpoints()
    os.truncate(f"{torn.path}/__1_0.distcp", 100)
    resumed = train_alone(tmp_path)
    assert f"Skipped damaged checkpoints, using {whole.path} instead: {torn.path}: " in resumed.stderr
    assert ": epoch 2, step 2\n" in resumed.stderr
    # One rank adds up in another order than two.
    [before, after] = (float(line.split()[-1]) for line in (uninterrupted, trained(resumed)))
    assert after == pytest.approx(before, abs=1e-4)


def test_parts_in_an_object_store_are_refused_before_training(tmp_path: Path) -> None:
    process = train("memory://bucket/run")
    assert process.returncode == 1
    assert (
        "TrackingError: Received the outputs path memory://bucket/run, in an object store, and a strategy that saves a "
        "checkpoint in parts, ModelParallelStrategy. Expected a volume" in process.stderr
    )
    assert process.stdout == ""
