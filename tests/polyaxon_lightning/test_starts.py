"""What a training starts with, among all that there is, and what it says about that."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_script import Classifier, data, trainer
from restarts import forget_trainings
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable

ONE_RANK_SAVES = """
import sys
from lightning.pytorch import Callback
from lightning_script import Classifier, data, trainer
from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking.training import process_group

class OneRankSaves(Callback):
    def on_train_batch_end(self, trainer, *_):
        process_group.SECONDS_UNTIL_WARNING = 1
        if trainer.global_step == 2 and trainer.is_global_zero:
            trainer.save_checkpoint("mine.ckpt")

trainer(PolyaxonCallback(), OneRankSaves(), devices=2, strategy="ddp_fork").fit(Classifier(), data(), data())
"""


class At(Callback):
    """Does something at the end of one batch."""

    def __init__(self, step: int, does: Callable[[Trainer], None]) -> None:
        self.step, self.does = step, does

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            self.does(trainer)


class Batches(Callback):
    """The epochs and batches that were trained."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.trained.append((trainer.current_epoch, batch_idx))


def fail(_: Trainer) -> None:
    raise ArithmeticError


def fit(*callbacks: Callback, loader: Any = None, **options: Any) -> list[tuple[int, int]]:
    """Train as a script that is started again would."""
    forget_trainings()
    batches = Batches()
    trainer(PolyaxonCallback(), *callbacks, batches, **options).fit(Classifier(), loader or data(), data())
    return batches.trained


def test_a_model_that_continues_in_memory_does_not_start_from_scratch(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    model = Classifier()
    trainer(PolyaxonCallback(), max_epochs=1).fit(model, data(), data())
    assert f"Starting fresh: no checkpoint in {outputs}/checkpoints/resume" in caplog.messages
    caplog.clear()
    trainer(PolyaxonCallback(), max_epochs=1).fit(model, data(), data())
    resume = f"{outputs}/checkpoints/resume-2"
    assert f"Continuing with the model as it is in memory: its checkpoints now go to {resume}" in caplog.messages
    assert not any("fresh" in message for message in caplog.messages)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of Slurm, with one process."""
    values = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def requeue(training: Trainer) -> None:
    """Save as Lightning does when Slurm requeues the job."""
    training.save_checkpoint(training._checkpoint_connector.hpc_save_path(training.default_root_dir))


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("lost", [False, True], ids=["older", "newer"])
def test_of_what_slurms_requeue_saved_and_the_training_state_the_newer_counts_and_the_other_is_named(
    outputs: Path, caplog: pytest.LogCaptureFixture, lost: bool
) -> None:
    resume, requeued = outputs / "checkpoints" / "resume", Path.cwd() / "hpc_ckpt_1.ckpt"
    with pytest.raises(ArithmeticError):
        fit(At(9, requeue), At(10, fail), max_epochs=4)
    [newest] = resume.glob("step=0000000010-*")
    if lost:  # as if the job had been killed right after it was requeued
        newest.unlink()
        [newest] = resume.glob("step=0000000008-*")
    assert fit(max_epochs=4)[0] == ((2, 1) if lost else (2, 2))
    passed_over = [message for message in caplog.messages if "passed over" in message]
    if lost:
        assert passed_over == [f"Resuming from {requeued}, of step 9: {newest}, of step 8, is passed over"]
    else:
        assert passed_over == [f"Resuming from {newest}, of step 10: {requeued}, of step 9, is passed over"]


@pytest.mark.usefixtures("slurm")
def test_in_a_job_of_slurm_lightning_keeps_the_signal_that_requeues(outputs: Path) -> None:
    handlers = {}

    def look(trainer: Trainer) -> None:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            handlers[number] = (
                type(signal.getsignal(number)).__module__,
                getattr(signal.getsignal(number), "__module__", None),
            )

    fit(At(2, look), max_epochs=1)
    assert "signal_connector" in handlers[signal.SIGUSR1][0]
    assert handlers[signal.SIGUSR2][1] == "polyaxon_tracking.training.preemption"


def loader(rows: int) -> Any:
    x = torch.randn(rows, 4)
    return StatefulDataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16, shuffle=True)


@pytest.mark.parametrize("rows", [16, 32, 48, 96])
def test_within_an_epoch_data_that_has_changed_is_said_by_its_length(
    outputs: Path, caplog: pytest.LogCaptureFixture, rows: int
) -> None:
    with pytest.raises(ArithmeticError):
        fit(At(6, fail), loader=loader(64))
    if rows <= 32:
        with pytest.raises(TrackingError, match=f"Received training data with {rows} rows, .* of 64 rows, after 2 of"):
            fit(loader=loader(rows))
    else:
        assert fit(loader=loader(rows))[:2] == [(1, 2), (1, 3) if rows > 48 else (2, 0)]
        assert any(f"has {rows} rows, and had 64 when" in message for message in caplog.messages)


def test_data_that_has_changed_between_two_epochs_is_said(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(max_epochs=1, loader=loader(64))
    assert fit(max_epochs=2, loader=loader(32)) == [(1, 0), (1, 1)]
    assert any("has 32 rows, and had 64 when" in message for message in caplog.messages)


def test_an_epoch_that_max_steps_left_is_finished_with_more_steps(outputs: Path) -> None:
    assert fit(max_epochs=-1, max_steps=6, loader=loader(64))[-1] == (1, 1)
    [newest] = (outputs / "checkpoints" / "resume").glob("step=0000000006-*")
    assert "-epoch=1-" in newest.name
    assert fit(max_epochs=-1, max_steps=6, loader=loader(64)) == []
    assert fit(max_epochs=-1, max_steps=9, loader=loader(64)) == [(1, 2), (1, 3), (2, 0)]


def test_a_save_on_one_rank_only_is_said_after_a_while(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    process = forked.start(
        "lightning", "-c", ONE_RANK_SAVES, PYTHONPATH=here, POLYAXON_RUN_OUTPUTS_PATH=str(tmp_path / "run")
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "Rank 0 has waited 1 s for the other ranks." in line:
                assert "call a method that saves a checkpoint on every rank" in line
                break
        else:
            pytest.fail("the training ended, and nothing was said")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
