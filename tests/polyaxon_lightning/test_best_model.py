"""The files of a ModelCheckpoint, after kills between them and the training state that names them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest

if TYPE_CHECKING:
    import subprocess

SCRIPT = Path(__file__).with_name("best_model_script.py")


def train(outputs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run("lightning", SCRIPT, POLYAXON_RUN_OUTPUTS_PATH=str(outputs), **environment)


def files(outputs: Path) -> list[str]:
    return sorted(path.name for path in (outputs / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("mode", [{}, {"FOREGROUND": "1"}], ids=["background", "foreground"])
def test_the_best_model_of_the_newest_training_state_still_exists(tmp_path: Path, mode: dict[str, str]) -> None:
    # The newest training state, after step 5, names the best model of step 4; that of step 6 is better.
    killed = train(tmp_path, SAVE_TOP_K="1", DIE_AT_STEP="7", **mode)
    assert killed.returncode == -signal.SIGKILL
    assert files(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]
    resumed = train(tmp_path, SAVE_TOP_K="1", WORSE="1", **mode)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == "best epoch=0-step=4.ckpt"
    assert files(tmp_path) == ["epoch=0-step=4.ckpt", "last.ckpt"]  # that of step 6 was not saved again


@pytest.mark.parametrize("mode", [{}, {"FOREGROUND": "1"}], ids=["background", "foreground"])
@pytest.mark.parametrize(
    ("every", "step"),
    [
        pytest.param("5", "7", id="saved after the newest state"),
        pytest.param("1", "2", id="saved at the step of the newest state, which came first"),
    ],
)
def test_after_a_kill_the_directory_holds_what_an_uninterrupted_training_leaves(
    tmp_path: Path, mode: dict[str, str], every: str, step: str
) -> None:
    options = {"SAVE_TOP_K": "6", "EVERY": every} | mode
    assert train(tmp_path / "cut", DIE_AT_STEP=step, **options).returncode == -signal.SIGKILL
    for outputs in tmp_path / "cut", tmp_path / "whole":
        process = train(outputs, **options)
        assert process.returncode == 0, process.stderr
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(files(tmp_path / "cut")) == 7


@pytest.mark.parametrize("mode", [{}, {"FOREGROUND": "1"}], ids=["background", "foreground"])
def test_files_that_this_training_did_not_save_stay(tmp_path: Path, mode: dict[str, str]) -> None:
    directory = tmp_path / "cut" / "checkpoints"
    assert train(tmp_path / "cut", SAVE_TOP_K="1", DIE_AT_STEP="7", **mode).returncode == -signal.SIGKILL
    assert train(tmp_path / "other", SAVE_TOP_K="1", **mode).returncode == 0
    shutil.copy(directory / "epoch=1-step=6.ckpt", directory / "copy.ckpt")
    of_other = (tmp_path / "other" / "checkpoints" / "epoch=2-step=12.ckpt").read_bytes()
    for name in "epoch=2-step=12.ckpt", "epoch=1-step=99.ckpt":
        (directory / name).write_bytes(of_other)
    (directory / "epoch=1-step=98.ckpt").write_text("of something else")
    resumed = train(tmp_path / "cut", SAVE_TOP_K="1", **mode)
    assert resumed.returncode == 0, resumed.stderr
    assert files(tmp_path / "cut") == [
        "copy.ckpt",
        "epoch=1-step=98.ckpt",
        "epoch=1-step=99.ckpt",
        "epoch=2-step=12-v1.ckpt",
        "epoch=2-step=12.ckpt",
        "last.ckpt",
    ]
    assert (directory / "epoch=2-step=12.ckpt").read_bytes() == of_other


@pytest.mark.parametrize("mode", [{}, {"FOREGROUND": "1"}], ids=["background", "foreground"])
def test_at_the_end_no_more_files_are_left_than_were_asked_for(tmp_path: Path, mode: dict[str, str]) -> None:
    process = train(tmp_path, SAVE_TOP_K="2", **mode)
    assert process.returncode == 0, process.stderr
    assert files(tmp_path) == ["epoch=2-step=10.ckpt", "epoch=2-step=12.ckpt", "last.ckpt"]


def test_a_best_model_that_somebody_has_deleted_is_forgotten(tmp_path: Path) -> None:
    assert train(tmp_path, SAVE_TOP_K="2", DIE_AT_STEP="5").returncode == -signal.SIGKILL
    assert files(tmp_path) == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "last.ckpt"]
    (tmp_path / "checkpoints" / "epoch=0-step=4.ckpt").unlink()
    resumed = train(tmp_path, SAVE_TOP_K="2", WORSE="1")
    assert resumed.returncode == 0, resumed.stderr
    assert (
        f"names {tmp_path}/checkpoints/epoch=0-step=4.ckpt, which no longer exists. The best model is now "
        f"{tmp_path}/checkpoints/epoch=0-step=2.ckpt" in resumed.stderr
    )
    assert resumed.stdout.splitlines()[-1] == "best epoch=0-step=2.ckpt"
