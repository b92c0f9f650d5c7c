"""Off the cluster, the directory that the ranks of one start share."""

from __future__ import annotations

from pathlib import Path

from ranks import torchrun
from training_scripts import newest_position, trained

SETTINGS = {"SETUP": "torchrun", "EVERY": "3"}
NO_OUTPUTS_PATH = ""


def test_ranks_of_torchrun_share_a_directory_and_two_starts_have_two() -> None:
    for _ in range(2):
        trained(torchrun("torch", NO_OUTPUTS_PATH, **SETTINGS, EPOCHS="1"))
    # Ranks may leave a number out: each makes a directory, and only that of the first counts.
    assert [newest_position(path) for path in Path("outputs").glob("version_*")] == [(4, 1)] * 2


def test_ranks_that_torchrun_starts_again_resume_in_their_directory() -> None:
    """With one rank: gloo itself does not always connect several ranks that are started again."""
    options = ["--nproc-per-node=1", "--max-restarts=1"]
    whole = torchrun("torch", NO_OUTPUTS_PATH, *options, **SETTINGS)
    killed = torchrun("torch", NO_OUTPUTS_PATH, *options, **SETTINGS, DIE_AT_BATCH="13")
    assert trained(killed) == trained(whole)
    assert "version_1/checkpoints/resume/step=0000000012-" in killed.stderr
    assert sorted(path.name for path in Path("outputs").glob("version_*")) == ["version_0", "version_1"]
