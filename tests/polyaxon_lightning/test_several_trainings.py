"""Which training is this? Several in one process with PyTorch Lightning, whatever the ending of each."""

from __future__ import annotations

import gc
import re
import signal
import weakref
from typing import TYPE_CHECKING, Any

import forked
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_script import Classifier, data, digest, trainer
from training_scripts import directories_of_trainings

from polyaxon_lightning import PolyaxonCallback

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path


class Once(Callback):
    """Raise once, before a step. Keeps the steps that are begun, and a digest of the weights before the first one."""

    def __init__(self, step: int | None = None, error: type[BaseException] = ArithmeticError) -> None:
        self.step, self.error = step, error
        self.steps: list[int] = []
        self.began_with = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = []
        self.began_with = digest(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.step = None
            raise self.error
        self.steps.append(trainer.global_step)


def fit(training: Trainer, model: LightningModule) -> None:
    training.fit(model, data(), data())


def fails(training: Trainer, model: LightningModule, *errors: type[BaseException]) -> None:
    with pytest.raises(errors or ArithmeticError):
        fit(training, model)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_training_that_failed_leaves_no_signal_handler(error: type[BaseException]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fails(trainer(PolyaxonCallback(), Once(6, error)), Classifier(), error, SystemExit)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("same", ["the Trainer", "the callback", "only the model"])
def test_the_same_model_continues(outputs: Path, error: type[BaseException], same: str) -> None:
    model, polyaxon, once = Classifier(), PolyaxonCallback(), Once(6, error)
    training = trainer(polyaxon, once)
    fails(training, model, error, SystemExit)  # with which Lightning ends a process after Ctrl-C
    trainer().validate(model, data(), verbose=False)
    if same != "the Trainer":
        training = trainer(polyaxon if same == "the callback" else PolyaxonCallback(), once)
    fit(training, model)
    assert once.steps == [6, 7, 8, 9, 10, 11]
    assert directories_of_trainings(outputs) == ["resume"]


@pytest.mark.parametrize("shared", ["the Trainer", "the callback", "nothing"])
def test_another_model_is_another_training(outputs: Path, shared: str, caplog: pytest.LogCaptureFixture) -> None:
    model, polyaxon, once = Classifier(), PolyaxonCallback(), Once(6)
    training = trainer(polyaxon, once)
    fails(training, Classifier())
    new = digest(model)
    if shared != "the Trainer":  # which counts its steps on
        training = trainer(polyaxon if shared == "the callback" else PolyaxonCallback(), once)
    fit(training, model)
    assert once.began_with == new
    assert once.steps[0] == (6 if shared == "the Trainer" else 0)
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]
    assert "Resuming from" not in caplog.text


def test_the_next_stage_of_a_model_continues_in_memory_and_resumes_from_its_own_state(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    def first_stage() -> Classifier:
        torch.manual_seed(0)
        model = Classifier()
        fit(trainer(PolyaxonCallback(), max_epochs=1), model)
        return model

    model, once = first_stage(), Once(6)
    after_first = digest(model)
    fails(trainer(PolyaxonCallback(), once), model)
    assert (once.steps[0], once.began_with) == (0, after_first)
    after_second = digest(model)
    new_process()
    model, once = first_stage(), Once()
    assert digest(model) == after_first
    fit(trainer(PolyaxonCallback(), once), model)
    assert (once.steps[0], once.began_with) == (6, after_second)
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]


def test_what_comes_before_or_between_is_no_training(outputs: Path) -> None:
    model, once = Classifier(), Once(6)
    trainer(PolyaxonCallback(), fast_dev_run=True).fit(model, data(), data())
    training = trainer(PolyaxonCallback(), once)
    fails(training, model)
    training.validate(model, data(), verbose=False)
    fit(training, model)
    assert once.steps[0] == 6
    assert directories_of_trainings(outputs) == ["resume"]


def test_off_the_cluster_nothing_is_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, once = Classifier(), Once(6)
    fails(trainer(PolyaxonCallback(), once), model)
    fit(trainer(PolyaxonCallback(), once), model)
    assert once.steps[0] == 0
    fit(trainer(PolyaxonCallback()), Classifier())
    assert "Resuming from" not in caplog.text
    assert "and keeps it; resume=True would resume from it" in caplog.text
    assert directories_of_trainings(tmp_path / "outputs" / "version_0") == ["resume", "resume-2"]


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_resume_true_and_last_are_no_reason_to_continue_another_training(tmp_path: Path) -> None:
    fails(trainer(PolyaxonCallback(resume=True), Once(6)), Classifier())
    for place, ckpt_path in (("resume-2", None), ("resume-3", "last")):
        once = Once()
        trainer(PolyaxonCallback(resume=True), once).fit(Classifier(), data(), data(), ckpt_path=ckpt_path)
        assert once.steps[0] == 0
        assert directories_of_trainings(tmp_path / "outputs" / "version_0")[-1] == place


@pytest.mark.parametrize("step", [None, 6], ids=["finished", "failed"])
def test_a_model_is_gone_with_its_training(outputs: Path, step: int | None) -> None:
    def train() -> weakref.ref[Classifier]:
        model = Classifier()
        if step is None:
            fit(trainer(PolyaxonCallback()), model)
        else:
            fails(trainer(PolyaxonCallback(), Once(step)), model)
        return weakref.ref(model)

    model = train()
    gc.collect()
    assert model() is None


FOLDS = """
import os, sys
import torch
from lightning.pytorch import Callback, Trainer
from lightning_script import Classifier, data, digest, trainer
from polyaxon_lightning import PolyaxonCallback

class Fail(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1 and "FAIL" in os.environ:
            raise ArithmeticError

if __name__ == "__main__":
    polyaxon = PolyaxonCallback()
    for fold in range(2):
        torch.manual_seed(fold)
        model = Classifier()
        training = trainer(polyaxon, *[Fail()] * (fold == 0), strategy=sys.argv[1], devices=2, max_epochs=2)
        try:
            training.fit(model, data(), data())
        except Exception as error:
            print(type(error).__name__)
        else:
            print("fold", fold, digest(model))
"""


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_folds_whose_processes_are_launched_for_each_train_each_on_its_own(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "folds.py").write_text(FOLDS)

    def train(strategy: str, outputs: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"POLYAXON_RUN_OUTPUTS_PATH": str(tmp_path / outputs)}
        return forked.run("lightning", tmp_path / "folds.py", strategy, **settings, **environment)

    whole = train("ddp_fork", "whole")  # spawned processes import everything again, which takes much longer
    failed, again = train(strategy, "failed", FAIL="1"), train(strategy, "failed")
    assert len(set(whole.stdout.splitlines())) == 2, whole.stderr
    assert failed.stdout.split()[0] == "ProcessRaisedException", failed.stderr
    for process in (whole, failed):
        assert re.findall(r"no checkpoint in \S+/(\S+)\n", process.stderr) == ["resume", "resume-2"]
    states = [("resume", "2"), ("resume-2", "4")]
    assert re.findall(r"Resuming from \S+/(\S+)/step=\S+: epoch \d, step (\d+)\n", again.stderr) == states
    assert again.stdout == whole.stdout
