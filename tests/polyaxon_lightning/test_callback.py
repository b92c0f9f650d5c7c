"""The Lightning callback in real fits, within this process."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import logging
import random
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning_script import Classifier, Steps, data, digest, trainer
from restarts import forget_trainings
from training_scripts import files_in, flip_a_bit

from polyaxon_lightning import PolyaxonCallback
from polyaxon_lightning.checkpoint_io import DurableCheckpointIO
from polyaxon_tracking import CheckpointManager, TrackingError
from polyaxon_tracking.background import wait_for_all

if TYPE_CHECKING:
    from collections.abc import Callable


class Epochs(Callback):
    """The epochs that were trained, in order."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained.append(trainer.current_epoch)


def fit(
    *callbacks: Callback,
    model: LightningModule | None = None,
    ckpt_path: str | None = None,
    same_process: bool = False,
    **options: Any,
) -> list[int]:
    """Train with a new Trainer, as a script that is started again would; return the epochs that were trained."""
    if not same_process:
        forget_trainings()
    epochs = Epochs()
    trainer(*callbacks, epochs, **options).fit(model or Classifier(), data(), data(), ckpt_path=ckpt_path)
    return epochs.trained


# Where checkpoints go


@pytest.mark.parametrize("first", ["PolyaxonCallback", "ModelCheckpoint"])
def test_a_model_checkpoint_is_redirected_with_its_options_kept(outputs: Path, first: str) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", mode="max", save_top_k=2, filename="{epoch}-best", save_last=True)
    callbacks = [PolyaxonCallback(), checkpoint]
    fit(*(callbacks if first == "PolyaxonCallback" else callbacks[::-1]))
    assert checkpoint.dirpath == str(outputs / "checkpoints")
    assert files_in(outputs / "checkpoints") == ["epoch=0-best.ckpt", "epoch=1-best.ckpt", "last.ckpt"]
    assert checkpoint.best_model_path == str(outputs / "checkpoints" / "epoch=0-best.ckpt")


def test_the_checkpoint_that_lightning_adds_by_itself_is_redirected_too(outputs: Path) -> None:
    fit(PolyaxonCallback())
    assert files_in(outputs / "checkpoints") == ["epoch=2-step=12.ckpt"]


def test_several_model_checkpoints_are_redirected(outputs: Path) -> None:
    best, every = ModelCheckpoint(monitor="val_loss", filename="best"), ModelCheckpoint(save_top_k=-1, every_n_epochs=2)
    fit(PolyaxonCallback(), best, every, max_epochs=4)
    assert files_in(outputs / "checkpoints") == ["best.ckpt", "epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"]


def test_an_explicit_dirpath_outside_the_outputs_path_is_kept_with_a_warning(
    outputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere"
    fit(PolyaxonCallback(), ModelCheckpoint(dirpath=elsewhere))
    assert files_in(elsewhere) == ["epoch=2-step=12.ckpt"]
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        f"Checkpoints go to {elsewhere}, outside the outputs path {outputs}, and may be lost with the pod. Leave the path out, or choose one below it"
    )


def test_an_explicit_dirpath_in_the_outputs_path_is_kept_in_silence(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(PolyaxonCallback(), ModelCheckpoint(dirpath=outputs / "mine"))
    assert files_in(outputs / "mine") == ["epoch=2-step=12.ckpt"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("max_to_keep", [1, 2, 3])
def test_the_newest_training_states_stay(outputs: Path, max_to_keep: int) -> None:
    fit(PolyaxonCallback(max_to_keep=max_to_keep), max_epochs=4)
    states = [f"step={4 * epoch:010d}-epoch={epoch}-start=1.ckpt" for epoch in (1, 2, 3, 4)]
    assert files_in(outputs / "checkpoints" / "resume") == states[-max_to_keep:]


def test_training_states_are_saved_within_an_epoch_where_asked(outputs: Path) -> None:
    fit(PolyaxonCallback(every_n_train_steps=3, max_to_keep=9), max_epochs=2)
    saved = [re.match(r"step=0*(\d+)-epoch=(\d)", name) for name in files_in(outputs / "checkpoints" / "resume")]
    assert [(int(match[1]), int(match[2])) for match in saved if match] == [(3, 0), (4, 1), (6, 1), (8, 2)]


def test_training_states_are_saved_by_time_where_asked(outputs: Path) -> None:
    fit(PolyaxonCallback(train_time_interval=timedelta(microseconds=1), max_to_keep=9), max_epochs=1)
    assert len(files_in(outputs / "checkpoints" / "resume")) == 5  # after each of four batches, and the epoch


def test_gradient_accumulation_saves_once_a_step(outputs: Path) -> None:
    fit(PolyaxonCallback(every_n_train_steps=1, max_to_keep=9), max_epochs=1, accumulate_grad_batches=2)
    assert files_in(outputs / "checkpoints" / "resume") == [
        "step=0000000001-epoch=0-start=1.ckpt",
        "step=0000000002-epoch=0-start=1.ckpt",
        "step=0000000002-epoch=1-start=1.ckpt",
    ]


class Adversaries(LightningModule):
    """Two optimizers by hand, of which one is a step ahead: after each batch the number of steps is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> None:
        generator, critic = self.optimizers()
        for optimizer in [critic, generator] if self.global_step else [critic]:
            optimizer.zero_grad()
            self.manual_backward(self.critic(self.generator(batch[0])).pow(2).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.critic.parameters())


def test_a_multiple_of_steps_that_is_passed_over_saves_at_the_end_of_its_batch(outputs: Path) -> None:
    def saved() -> list[int]:
        return [int(name[5:15]) for name in files_in(outputs / "checkpoints" / "resume")]

    with pytest.raises(RuntimeError, match="interrupted"):
        fit(PolyaxonCallback(every_n_train_steps=10, max_to_keep=99), Interrupt(step=17), model=Adversaries())
    assert saved() == [7, 11, 15, 17]  # 7 and 15 end an epoch, 17 came with the exception
    fit(PolyaxonCallback(every_n_train_steps=10, max_to_keep=99), model=Adversaries(), max_epochs=5)
    assert saved() == [7, 11, 15, 17, 21, 23, 31, 31, 39]


def test_nothing_is_left_in_staging(outputs: Path) -> None:
    fit(PolyaxonCallback())
    assert not list(outputs.rglob(".staging-*"))


def test_fast_dev_run_saves_nothing(outputs: Path) -> None:
    fit(PolyaxonCallback(), fast_dev_run=True)
    assert not list(outputs.rglob("*.ckpt"))


# Resuming


class Interrupt(Callback):
    """Raise in the middle of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


def test_a_fit_in_a_run_resumes_where_the_last_one_was_interrupted(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(PolyaxonCallback(), Interrupt(step=6))
    assert "Saved step 6 after RuntimeError" in caplog.messages
    [saved] = (outputs / "checkpoints" / "resume").glob("step=0000000006-epoch=1-*")
    caplog.clear()
    steps = Steps()
    fit(PolyaxonCallback(), steps)
    assert f"Resuming from {saved}: epoch 1, step 6" in caplog.messages
    assert steps.trained == [6, 7, 8, 9, 10, 11]


def test_an_exception_in_an_optimizer_step_leaves_the_state_before_it(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class HalfDone(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            if self.state[self.param_groups[0]["params"][0]]["step"] == 6:
                raise RuntimeError("between two tensors")
            return loss

    class Torn(Classifier):
        def configure_optimizers(self) -> Any:
            return HalfDone(self.parameters(), lr=0.01)

    with pytest.raises(RuntimeError, match="between two tensors"):
        fit(PolyaxonCallback(), model=Torn())
    assert files_in(outputs / "checkpoints" / "resume") == ["step=0000000004-epoch=1-start=1.ckpt"]


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_a_save_that_fails_after_an_exception_does_not_hide_it(
    outputs: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    class Full(Interrupt):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            wait_for_all()  # that of the epoch before
            monkeypatch.setattr(torch, "save", full)

    with pytest.raises(RuntimeError, match="interrupted"):
        fit(PolyaxonCallback(background=background), Full(step=6))
    message = caplog.messages[-1]
    assert message.startswith(
        "The state after step 6 was not saved; the previous checkpoint is untouched: OSError: [Errno 28] "
    )
    assert "No space left on device. " in message
    assert caplog.records[-1].exc_info is None
    assert files_in(outputs / "checkpoints" / "resume") == ["step=0000000004-epoch=1-start=1.ckpt"]


def test_a_fresh_start_is_said(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fit(PolyaxonCallback()) == [0, 1, 2]
    assert f"Starting fresh: no checkpoint in {outputs}/checkpoints/resume" in caplog.messages


def test_a_finished_training_continues_with_more_epochs(outputs: Path) -> None:
    fit(PolyaxonCallback(), max_epochs=2)
    assert fit(PolyaxonCallback(), max_epochs=5) == [2, 3, 4]


def test_off_the_cluster_training_starts_from_scratch_unless_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = tmp_path / "outputs"
    start = f"POLYAXON_RUN_OUTPUTS_PATH is not set: outputs go to {outputs}/version_"
    assert fit(PolyaxonCallback(), max_epochs=1) == [0]
    assert files_in(outputs / "version_0" / "checkpoints" / "resume") == ["step=0000000004-epoch=1-start=1.ckpt"]
    assert f"{start}0" in caplog.messages
    assert fit(PolyaxonCallback(), max_epochs=2) == [0, 1]
    assert f"{start}1; resume=True would use version_0" in caplog.messages
    assert fit(PolyaxonCallback(resume=True), max_epochs=3) == [2]
    assert f"{start}1, the newest with checkpoints" in caplog.messages
    assert files_in(outputs / "version_0" / "checkpoints" / "resume") == ["step=0000000004-epoch=1-start=1.ckpt"]


def test_off_the_cluster_the_files_of_starts_do_not_mix(tmp_path: Path) -> None:
    for _ in range(3):
        fit(PolyaxonCallback(), ModelCheckpoint(save_last=True), max_epochs=1)
    versions = [tmp_path / "outputs" / f"version_{number}" / "checkpoints" for number in range(3)]
    assert [files_in(version) for version in versions] == [["epoch=0-step=4.ckpt", "last.ckpt"]] * 3


def test_resume_false_starts_from_scratch_and_its_states_are_the_newest_from_then_on(outputs: Path) -> None:
    fit(PolyaxonCallback(), max_epochs=3)
    assert fit(PolyaxonCallback(resume=False), max_epochs=4, limit_train_batches=1) == [0, 1, 2, 3]
    assert files_in(outputs / "checkpoints" / "resume") == [
        "step=0000000004-epoch=4-start=2.ckpt",
        "step=0000000012-epoch=3-start=1.ckpt",  # the newest of the training before stays
    ]


def test_an_explicit_ckpt_path_is_what_is_used(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(PolyaxonCallback(), ModelCheckpoint(save_top_k=-1, filename="{epoch}"))
    first = str(outputs / "checkpoints" / "epoch=0.ckpt")
    assert fit(PolyaxonCallback(), ckpt_path=first, max_epochs=4) == [1, 2, 3]
    assert any(
        message.startswith(f"Resuming from ckpt_path={first} as asked, although ") for message in caplog.messages
    )


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("options", [{"monitor": "val_loss"}, {"every_n_train_steps": 4}, {"every_n_train_steps": 3}])
def test_an_explicit_ckpt_path_trains_every_batch_that_is_left(outputs: Path, options: dict[str, Any]) -> None:
    """Whether the file was saved after a validation, at the last batch of an epoch or within an epoch."""
    fit(PolyaxonCallback(), ModelCheckpoint(save_top_k=-1, **options), max_epochs=3)
    path = min((outputs / "checkpoints").glob("*.ckpt"))
    training = trainer(PolyaxonCallback(name="again"), max_epochs=5)
    training.fit(Classifier(), data(), data(), ckpt_path=path)
    assert training.global_step == 5 * 4


def test_ckpt_path_last_finds_the_newest_state(outputs: Path) -> None:
    fit(PolyaxonCallback(), max_epochs=2)
    assert fit(PolyaxonCallback(), ckpt_path="last", max_epochs=4) == [2, 3]


def test_a_metric_that_stalls_does_not_hold_resuming_back(outputs: Path) -> None:
    class Stalls(Classifier):
        def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
            self.log("val_loss", 1.0 + abs(self.trainer.current_epoch - 2))

    def best() -> ModelCheckpoint:
        return ModelCheckpoint(monitor="val_loss", save_last=True, filename="{epoch}")

    fit(PolyaxonCallback(), best(), model=Stalls(), max_epochs=8)
    assert "epoch=2.ckpt" in files_in(outputs / "checkpoints")
    assert fit(PolyaxonCallback(), best(), model=Stalls(), max_epochs=9) == [8]


def test_the_best_models_and_their_scores_survive(outputs: Path) -> None:
    def best() -> ModelCheckpoint:
        return ModelCheckpoint(monitor="val_loss", save_top_k=2, filename="{epoch}")

    whole, interrupted, resumed = best(), best(), best()
    fit(PolyaxonCallback(), whole, max_epochs=4)
    scores = {path.rpartition("/")[2]: float(score) for path, score in whole.best_k_models.items()}
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(PolyaxonCallback(resume=False), interrupted, Interrupt(step=9), max_epochs=4)
    fit(PolyaxonCallback(), resumed, max_epochs=4)
    assert resumed.best_model_path
    assert len(resumed.best_k_models) == len(scores) == 2
    assert resumed.dirpath == interrupted.dirpath


# What else a Trainer does


def test_best_and_test(outputs: Path) -> None:
    class WithTest(Classifier):
        def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    best = ModelCheckpoint(monitor="val_loss", mode="max", filename="{epoch}")
    running = trainer(PolyaxonCallback(), best)
    running.fit(WithTest(), data(), data())
    assert running.checkpoint_callback is best
    [metrics] = running.test(dataloaders=data(), ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == pytest.approx(float(best.best_model_score))
    assert running.ckpt_path == str(outputs / "checkpoints" / "epoch=0.ckpt")


def test_enable_checkpointing_false_saves_and_resumes_nothing(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(PolyaxonCallback(), max_epochs=2)
    before = list(outputs.rglob("*.ckpt"))
    assert fit(PolyaxonCallback(), max_epochs=2, enable_checkpointing=False) == [0, 1]
    assert list(outputs.rglob("*.ckpt")) == before
    said = "The Trainer has enable_checkpointing=False: nothing is saved, and nothing is resumed from"
    assert said in caplog.messages


def test_a_second_fit_of_one_trainer_continues_in_memory(outputs: Path) -> None:
    epochs, model, seen = Epochs(), Classifier(), []
    weight = model.net[0].weight

    class First(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(weight.abs().sum().item())

    polyaxon = PolyaxonCallback(max_to_keep=2)
    running = trainer(polyaxon, ModelCheckpoint(save_last=True), epochs, First(), max_epochs=2)
    running.fit(model, data(), data())
    torch.nn.init.zeros_(weight)  # what the user does between two fits stays done
    running.fit_loop.max_epochs = 4
    running.fit(model, data(), data())
    assert epochs.trained == [0, 1, 2, 3]
    assert seen[0] > 0
    assert seen[1] == 0
    assert files_in(outputs / "checkpoints" / "resume-2") == [
        "step=0000000012-epoch=3-start=1.ckpt",
        "step=0000000016-epoch=4-start=1.ckpt",
    ]


def test_folds_in_one_script_train_each_on_its_own(outputs: Path) -> None:
    assert [fit(PolyaxonCallback(), max_epochs=epochs, same_process=True) for epochs in (2, 2, 3)] == [
        [0, 1],
        [0, 1],
        [0, 1, 2],
    ]
    kept = {path.name for path in (outputs / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {"resume", "resume-2", "resume-3"}


def test_the_users_checkpoint_io_is_kept(outputs: Path) -> None:
    mine = AsyncCheckpointIO(TorchCheckpointIO())
    running = trainer(PolyaxonCallback(), plugins=[mine], max_epochs=2)
    running.fit(Classifier(), data(), data())
    assert running.strategy.checkpoint_io is mine
    assert files_in(outputs / "checkpoints" / "resume")
    assert fit(PolyaxonCallback(), max_epochs=3) == [2]


def test_a_symlink_in_place_of_a_checkpoint_is_replaced_not_written_through(outputs: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = outputs / "checkpoints" / "model.ckpt"
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    fit(PolyaxonCallback(), ModelCheckpoint(filename="model", enable_version_counter=False))
    assert victim.read_text() == "precious"
    assert link.is_file()
    assert not link.is_symlink()


# Levels and datasets


def test_the_loggers_levels_follow_the_run(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_LOG_LEVEL", "error")
    PolyaxonCallback(loggers=["mine"])
    for name in ("lightning.pytorch", "polyaxon_tracking", "mine"):
        assert logging.getLogger(name).level == logging.ERROR


def test_datasets_by_name(outputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYAXON_RUN_DATA_PATHS", f'{{"digits": "{tmp_path}"}}')
    assert PolyaxonCallback(datasets=["digits"]).data_path("digits") == str(tmp_path)
    with pytest.raises(TrackingError) as error:
        PolyaxonCallback(datasets={"digit": "data/digits"})
    assert str(error.value) == (
        "Received the dataset name 'digit'. Expected one of those in POLYAXON_RUN_DATA_PATHS: 'digits'. Did you mean 'digits'?"
    )


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_last_off_the_cluster_is_found_in_the_newest_directory(tmp_path: Path) -> None:
    callback = PolyaxonCallback()
    assert fit(callback, max_epochs=2, ckpt_path="last") == [0, 1]
    assert fit(callback, max_epochs=3, ckpt_path="last") == [2]
    expected = re.escape(
        f'Received ckpt_path="last", and there is no checkpoint in {tmp_path}/outputs/version_1, the new directory of this '
        "start. Expected resume=True too, which uses the newest directory with checkpoints, version_0. "
    )
    with pytest.raises(TrackingError, match=expected):
        fit(PolyaxonCallback(), max_epochs=4, ckpt_path="last")
    assert fit(PolyaxonCallback(resume=True), max_epochs=4, ckpt_path="last") == [3]


def test_a_training_that_stopped_early_stays_stopped(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val_loss", min_delta=1e9, patience=1)

    assert fit(PolyaxonCallback(), stopping(), max_epochs=9) == [0, 1]
    assert fit(PolyaxonCallback(), stopping(), max_epochs=9) == []
    assert "This training was stopped early, at epoch 2: nothing is left to train" in caplog.messages


class Limit(Callback):
    """A time limit, which stops every start after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches -= 1
        trainer.should_stop = trainer.should_stop or self.batches == 0


@pytest.mark.parametrize("batches", [4, 6], ids=["at the end of an epoch", "within an epoch"])
def test_a_training_that_a_time_limit_ended_continues_at_the_next_start(outputs: Path, batches: int) -> None:
    steps: list[int] = []
    for _ in range(12 // batches):
        trained = Steps()
        fit(PolyaxonCallback(), Limit(batches), trained, max_epochs=3)
        steps += trained.trained
    assert steps == list(range(12))
    assert fit(PolyaxonCallback(), max_epochs=3) == []


@pytest.mark.parametrize(
    ("others", "options", "kept"),
    [
        pytest.param([], {"max_epochs": 3}, ["step=0000000012-epoch=3-start=1.ckpt"], id="all epochs"),
        pytest.param([], {"max_steps": 6}, ["step=0000000006-epoch=1-start=1.ckpt"], id="all steps"),
        pytest.param(
            [EarlyStopping("val_loss", min_delta=1e9, patience=2)],
            {"max_epochs": 9},
            ["step=0000000012-epoch=3-start=1.ckpt"],
            id="stopped early",
        ),
        pytest.param(
            [Limit(8)],
            {"max_epochs": 3},
            ["step=0000000004-epoch=1-start=1.ckpt", "step=0000000008-epoch=2-start=1.ckpt"],
            id="a time limit, so not ended",
        ),
    ],
)
def test_only_the_newest_state_of_a_training_that_has_ended_is_kept(
    outputs: Path, others: list[Callback], options: dict[str, Any], kept: list[str]
) -> None:
    fit(PolyaxonCallback(), *others, **options)
    assert files_in(outputs / "checkpoints" / "resume") == kept


def test_states_of_every_second_epoch_are_kept_for_good(outputs: Path) -> None:
    fit(PolyaxonCallback(keep_every_n_epochs=2), max_epochs=5)
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [checkpoint.epoch for checkpoint in saved] == [5, 4, 2]


def test_a_second_state_of_a_training_that_has_ended_is_removed_at_the_next_start(outputs: Path) -> None:
    """As after a kill between the last save and the end of `fit`."""
    fit(PolyaxonCallback(max_to_keep=2), max_epochs=2)
    assert fit(PolyaxonCallback(), max_epochs=2) == []
    assert files_in(outputs / "checkpoints" / "resume") == ["step=0000000008-epoch=2-start=1.ckpt"]


# Mistakes


def test_several_callbacks_in_one_trainer_are_refused(outputs: Path) -> None:
    with pytest.raises(TrackingError, match=r"Received several PolyaxonCallbacks in one Trainer\. Expected one"):
        fit(PolyaxonCallback(), PolyaxonCallback())


def test_what_another_framework_saved_is_refused(outputs: Path) -> None:
    with CheckpointManager(outputs / "checkpoints" / "resume").save(4, 1, suffix=".weights.h5") as path:
        Path(path).write_text("Keras")
    with pytest.raises(
        TrackingError, match=r"\.weights\.h5, which PyTorch Lightning did not save\. Expected an outputs"
    ):
        fit(PolyaxonCallback())


def test_a_model_whose_shape_changed(outputs: Path) -> None:
    fit(PolyaxonCallback(), max_epochs=1)
    [saved] = (outputs / "checkpoints" / "resume").iterdir()
    with pytest.raises(TrackingError) as error:
        fit(PolyaxonCallback(), model=Classifier(width=16), max_epochs=2)
    assert str(error.value) == (
        f"Received a model that is not the one saved in {saved}. Expected the same layers, shapes and optimizer. Undo the "
        f"change, pass resume=False to start from scratch, or use another outputs path; the checkpoint stays "
        f"as it is. What differs: net.0.weight is (16, 4), saved as (8, 4); net.0.bias is (16,), saved as (8,); net.2.weight is "
        f"(2, 16), saved as (2, 8)."
    )
    assert error.value.__cause__ is None  # it would list all shapes again
    assert saved.is_file()


def test_a_model_whose_names_changed_too(outputs: Path) -> None:
    class Deeper(Classifier):
        def __init__(self) -> None:
            super().__init__(width=16)
            self.more = torch.nn.Linear(1, 1)

    fit(PolyaxonCallback(), max_epochs=1)
    with pytest.raises(TrackingError, match="What differs: ") as error:
        fit(PolyaxonCallback(), model=Deeper(), max_epochs=2)
    assert "more.weight" in str(error.value.__cause__)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, r"the CRC-32 of its member \S+ does not match"),
        (empty, "it is empty"),
        (cut_off_the_end, "File is not a zip file"),
    ],
)
def test_a_damaged_file_given_as_ckpt_path_is_refused(outputs: Path, damage: Any, reason: str) -> None:
    checkpoint = ModelCheckpoint()
    fit(PolyaxonCallback(), checkpoint, max_epochs=1)
    damage(Path(checkpoint.best_model_path))
    with pytest.raises(TrackingError) as error:
        fit(PolyaxonCallback(), ckpt_path=checkpoint.best_model_path)
    assert re.fullmatch(
        rf"Received the checkpoint {re.escape(checkpoint.best_model_path)}, which is damaged: {reason}\. Expected the bytes that "
        r"were saved\. Give another file, or leave out `ckpt_path` to resume from the newest intact training state; the damaged file "
        r"stays as it is\.",
        str(error.value),
    )
    assert fit(PolyaxonCallback()) == [1, 2]


def test_any_flipped_bit_of_a_ckpt_path_is_found_or_changes_nothing(outputs: Path) -> None:
    model, checkpoint = Classifier(), ModelCheckpoint()
    fit(PolyaxonCallback(), checkpoint, model=model, max_epochs=1)
    path, expected = Path(checkpoint.best_model_path), digest(model)
    content = path.read_bytes()
    found = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 300):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            state = DurableCheckpointIO().load_checkpoint(path)
        except (TrackingError, RuntimeError):  # torch refuses what a zip reader takes
            found += 1
        else:
            loaded = Classifier()
            loaded.load_state_dict(state["state_dict"])
            assert digest(loaded) == expected
    assert found > 200


def test_another_optimizer_is_refused_where_lightning_would_fail_while_training(outputs: Path) -> None:
    class Other(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    fit(PolyaxonCallback(), max_epochs=1)
    with pytest.raises(TrackingError) as error:
        fit(PolyaxonCallback(), model=Other(), max_epochs=2)
    assert str(error.value) == (
        "Received a model with the optimizers ['SGD'], while the checkpoint was saved with ['Adam']. Expected the same. Undo "
        "the change, pass resume=False to start from scratch, or use another outputs path; the checkpoint "
        "stays as it is."
    )


def test_only_damaged_states_left(outputs: Path) -> None:
    fit(PolyaxonCallback(max_to_keep=2), max_epochs=2)
    saved = sorted((outputs / "checkpoints" / "resume").iterdir(), reverse=True)
    for path in saved:
        path.write_bytes(b"")
    with pytest.raises(TrackingError) as error:
        fit(PolyaxonCallback(), max_epochs=3)
    assert str(error.value) == (
        f"Received only damaged checkpoints in '{outputs}/checkpoints/resume': {saved[0]}: it is empty; {saved[1]}: it is "
        f"empty. Expected at least one that is intact. Training does not start from scratch by itself then: put an intact "
        f"copy there, or, to start from scratch, move these away or pass resume=False to the callback."
    )


class Unsafe:
    """A class that ``weights_only=True`` does not load."""


def test_a_state_that_is_more_than_tensors_and_plain_values(outputs: Path) -> None:
    class Extra(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["extra"] = {"mine": [1, Unsafe()]}

    with pytest.raises(
        TrackingError, match=r"\['extra'\]\['mine'\]\[1\] with a value of the type .*\.Unsafe\. .*False\)"
    ):
        fit(PolyaxonCallback(), model=Extra(), max_epochs=2)  # at its first save
    assert not list((outputs / "checkpoints").rglob("step=*"))
    fit(PolyaxonCallback(weights_only=False), model=Extra(), max_epochs=1)
    with pytest.raises(TrackingError, match=r"(?s)loading it could run code.*PolyaxonCallback\(weights_only=False\)"):
        fit(PolyaxonCallback(), model=Extra(), max_epochs=2)
    assert fit(PolyaxonCallback(weights_only=False), model=Extra(), max_epochs=2) == [1]


class Mode(enum.Enum):
    FAST = "fast"


@dataclasses.dataclass
class Settings:
    path: Path
    width: np.int64


def test_harmless_hyperparameters_and_numbers_of_numpy_are_saved_as_plain_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    class Rich(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters(
                {
                    "mode": Mode.FAST,
                    "settings": Settings(Path("data"), np.int64(3)),
                    "arguments": argparse.Namespace(depths=(np.int32(1), 2)),
                    "rate": np.float32(0.1),
                }
            )

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=np.float32(0.1))
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=np.float64(0.9))]

    ends = []
    for name, epochs in (("whole", [4]), ("parts", [2, 4])):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / name))
        for max_epochs in epochs:
            new_process()
            torch.manual_seed(0)
            model = Rich()
            trainer(PolyaxonCallback(), max_epochs=max_epochs).fit(model, data(), data())
            assert model.hparams["mode"] is Mode.FAST
        ends.append((digest(model), model.trainer.optimizers[0].param_groups[0]["lr"]))
    assert ends[0] == ends[1]
    newest = CheckpointManager(tmp_path / "parts" / "checkpoints" / "resume").latest()
    assert newest is not None
    assert torch.load(newest.path, weights_only=True)["hyper_parameters"] == {
        "mode": "fast",
        "settings": {"path": "data", "width": 3},
        "arguments": {"depths": (1, 2)},
        "rate": float(np.float32(0.1)),
    }


def test_arguments_out_of_range(wrong_argument: tuple[dict[str, Any], str]) -> None:
    options, message = wrong_argument
    with pytest.raises(TrackingError) as error:
        PolyaxonCallback(**options)
    assert str(error.value) == message


def test_a_url_of_a_model_checkpoint_with_one_slash_is_no_directory(outputs: Path, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=Path("s3://bucket/run"))
    with pytest.raises(
        TrackingError, match=r"^Received the path 's3:/bucket/run'\. Expected a URL with two slashes, 's3://"
    ):
        fit(PolyaxonCallback(), checkpoint, max_epochs=1)
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize("wrong", ["no", None, 1])
def test_weights_only_is_a_yes_or_no(wrong: Any) -> None:
    with pytest.raises(TrackingError, match=rf"^Received weights_only={wrong!r}\. Expected True or False\.$"):
        PolyaxonCallback(weights_only=wrong)


def test_a_training_in_three_parts_has_the_weights_of_one_in_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    digests = []
    for stops in ([6], [2, 4, 6]):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / str(len(stops))))
        for stop in stops:
            new_process()
            torch.manual_seed(0 if stop == stops[0] else stop)
            model = Classifier()
            trainer(PolyaxonCallback(), max_epochs=stop).fit(model, data(shuffle=True), data())
        digests.append(digest(model))
    assert digests[0] == digests[1]


class WithTest(Classifier):
    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.validation_step(batch, index)


@pytest.mark.parametrize("stopped_early", [False, True])
def test_a_training_that_had_ended_has_its_metrics_and_its_best_model(stopped_early: bool) -> None:
    def start() -> tuple[dict[str, torch.Tensor], str, torch.Tensor | None]:
        forget_trainings()
        best = ModelCheckpoint(monitor="val_loss")
        stopping = [EarlyStopping("val_loss", patience=1, min_delta=10.0)] if stopped_early else []
        training = trainer(PolyaxonCallback(resume=True), best, *stopping)
        training.fit(WithTest(), data(), data())
        metrics = dict(training.callback_metrics)
        training.test(dataloaders=data(), ckpt_path="best", verbose=False)
        return metrics, best.best_model_path, best.best_model_score

    ended = start()
    assert set(ended[0]) == {"val_loss"}
    assert start() == ended


# NaN


class NaNAt(Callback):
    """Makes the loss NaN from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step >= self.step:
            for parameter in pl_module.parameters():
                assert parameter.grad is not None
                parameter.grad *= float("nan")


@pytest.mark.parametrize("background", [True, False])
def test_nan_does_not_push_out_the_newest_state_without_it(
    outputs: Path, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fit(PolyaxonCallback(background=background), NaNAt(8), max_epochs=5)
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [(checkpoint.epoch, checkpoint.has_nan) for checkpoint in saved] == [(5, True), (2, False)]
    warning = "The weights after step 12 hold NaN"
    assert [message[: len(warning)] for message in caplog.messages if "NaN" in message] == [warning]
    caplog.clear()
    assert fit(PolyaxonCallback(resume=True), max_epochs=6) == [5]
    assert (
        f"To resume from the newest checkpoint without NaN, {saved[1].source}, move the newer ones away" in caplog.text
    )
    for checkpoint in CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()[:-1]:
        Path(checkpoint.path).unlink()
    caplog.clear()
    assert fit(PolyaxonCallback(resume=True)) == [2]
    assert "NaN" not in caplog.text
