"""The Lightning callback next to others, and in trainings of other kinds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_script import Classifier, Steps, data, digest, trainer
from torch import nn

from polyaxon_lightning import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable


class Manual(Classifier):
    """Steps its optimizer itself."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Normalized(Classifier):
    """A model with batch statistics, which SWA computes again in one more epoch; SWA needs one scheduler, stepped per epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class BuiltInSetup(Classifier):
    """A model whose layers are made when the data is known."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))


@pytest.mark.parametrize("limit", [{"stopping_threshold": 1e9}, {"divergence_threshold": -1.0}])
def test_a_training_that_a_threshold_stopped_in_its_first_epoch_stays_stopped(
    outputs: Path, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None], limit: dict[str, float]
) -> None:
    caplog.set_level("INFO", "polyaxon_tracking")
    steps = []
    for _ in range(2):
        trained = Steps()
        stopping = callbacks.EarlyStopping("val_loss", patience=9, **limit)
        trainer(PolyaxonCallback(), stopping, trained, max_epochs=4, logger=False).fit(Classifier(), data(), data())
        steps.append(trained.trained)
        new_process()
    assert steps == [[0, 1, 2, 3], []]
    assert "This training was stopped early, at epoch 1: nothing is left to train" in caplog.messages


class Power(Callback):
    """A power failure between two epochs."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 3:
            raise OSError("power failure")


OTHERS: dict[str, Callable[[], Callback]] = {
    "EarlyStopping": lambda: callbacks.EarlyStopping("val_loss", patience=2, min_delta=0.05),
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({2: 2}),
    "LearningRateMonitor": callbacks.LearningRateMonitor,
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2),
}
if hasattr(callbacks, "EMAWeightAveraging"):  # in Lightning 2.6
    OTHERS["EMAWeightAveraging"] = lambda: callbacks.EMAWeightAveraging(decay=0.8)
KINDS: dict[str, dict[str, Any]] = {
    "accumulated gradients": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "double precision": {"precision": "64-true"},
    "clipped gradients": {"gradient_clip_val": 0.1},
    "validation within epochs": {"val_check_interval": 2},
    "validation every other epoch": {"check_val_every_n_epoch": 2, "model": Normalized},
}
MODELS: dict[str, Callable[[], Any]] = {
    "manual optimisation": Manual,
    "layers made in setup": BuiltInSetup,
    "batch normalisation": Normalized,
    "compiled": lambda: torch.compile(Classifier(), backend="aot_eager"),
}


def assert_resumes_as_if_uninterrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_process: Callable[[], None],
    model: Callable[[], Any] = Classifier,
    other: Callable[[], Callback] = Callback,
    **options: Any,
) -> None:
    digests = []
    for starts in (1, 2):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / str(starts)))
        for start in range(starts):
            new_process()
            torch.manual_seed(start)
            trained = model()
            last = start == starts - 1
            fit = trainer(PolyaxonCallback(), other(), *([] if last else [Power()]), max_epochs=6, **options).fit
            if last:
                fit(trained, data(shuffle=True), data())
            else:
                with pytest.raises(OSError, match="power failure"):
                    fit(trained, data(shuffle=True), data())
        digests.append(digest(trained))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", OTHERS)
def test_next_to_other_callbacks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    model = Normalized if name == "StochasticWeightAveraging" else Classifier
    logger = CSVLogger(tmp_path) if name == "LearningRateMonitor" else False
    assert_resumes_as_if_uninterrupted(tmp_path, monkeypatch, new_process, model, OTHERS[name], logger=logger)


@pytest.mark.parametrize("kind", KINDS)
def test_with(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]) -> None:
    assert_resumes_as_if_uninterrupted(tmp_path, monkeypatch, new_process, **KINDS[kind])


@pytest.mark.parametrize("kind", MODELS)
def test_of(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]) -> None:
    assert_resumes_as_if_uninterrupted(tmp_path, monkeypatch, new_process, MODELS[kind])


# Callbacks that decide themselves where training resumes


class Bad(Callback):
    """Raise the user's error in the middle of the third epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 10:
            raise ValueError("the user's")


def test_an_on_exception_checkpoint_does_not_take_training_back(
    outputs: Path, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None]
) -> None:
    def fit(*others: Callback) -> Trainer:
        new_process()
        caplog.clear()
        training = trainer(PolyaxonCallback(), callbacks.OnExceptionCheckpoint(outputs), *others, max_epochs=6)
        training.fit(Classifier(), data(), data())
        return training

    with pytest.raises(ValueError, match="the user's"):
        fit(Bad())
    saved = (outputs / "on_exception.ckpt").read_bytes()
    with pytest.raises(OSError, match="power failure"):
        fit(Power())
    assert "epoch 2, step 10\n" in caplog.text
    # As a kill would have left it; Lightning goes by the time.
    (outputs / "on_exception.ckpt").write_bytes(saved)
    os.utime(outputs / "on_exception.ckpt", (2e9, 2e9))
    steps = Steps()
    training = fit(steps)
    assert "epoch 3, step 12\n" in caplog.text
    assert steps.trained[0] == 12
    assert training.global_step == 24


# Loggers


def test_the_files_of_loggers_land_in_the_outputs(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    polyaxon = PolyaxonCallback()
    default = Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=polyaxon.outputs_path,
        callbacks=[polyaxon],
        log_every_n_steps=1,
    )
    default.fit(Classifier(), data(), data())
    loggers = [
        TensorBoardLogger(polyaxon.outputs_path, name="tensorboard"),
        CSVLogger(polyaxon.outputs_path, name="csv"),
    ]
    trainer(PolyaxonCallback(), logger=loggers, max_epochs=2).fit(Classifier(), data(), data())
    assert list(outputs.glob("lightning_logs/version_0/events.*"))
    assert list(outputs.glob("tensorboard/version_0/events.*"))
    assert "val_loss" in (outputs / "csv" / "version_0" / "metrics.csv").read_text()
    assert "may be lost" not in caplog.text


def test_the_files_of_loggers_outside_the_outputs_are_warned_of(
    outputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(accelerator="cpu", max_epochs=1, callbacks=[PolyaxonCallback()]).fit(Classifier(), data(), data())
    [warning] = [
        record.getMessage() for record in caplog.records if record.name == "polyaxon_tracking" and record.levelno > 20
    ]
    assert warning == (
        f"The files of TensorBoardLogger go to {tmp_path}, outside the outputs path {outputs}, and may be lost with the pod. "
        f"Pass Trainer(default_root_dir=callback.outputs_path), or TensorBoardLogger(callback.outputs_path)"
    )


# A training that is described in a file

CONFIGURATION = """
trainer:
  max_epochs: {max_epochs}
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks:
    - class_path: polyaxon_lightning.PolyaxonCallback
      init_args:
        every_n_train_steps: 3
        max_to_keep: 1
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        monitor: val_loss
"""


class WithData(Classifier):
    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data()


def test_the_callback_in_a_file_of_the_lightning_cli(
    outputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None]
) -> None:
    for max_epochs in (2, 3):
        new_process()
        (tmp_path / "config.yaml").write_text(CONFIGURATION.format(max_epochs=max_epochs))
        cli = LightningCLI(WithData, args=["fit", "--config", "config.yaml"], save_config_kwargs={"overwrite": True})
    assert cli.trainer.global_step == 12
    assert "epoch 2, step 8\n" in caplog.text
    assert len(list((outputs / "checkpoints" / "resume").glob("step=*"))) == 1
    assert list((outputs / "checkpoints").glob("epoch=*.ckpt"))


OF_TRACEML = """
import os, signal
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel
from polyaxon_lightning import PolyaxonCallback
from traceml.integrations.pytorch_lightning import Callback


class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        if os.environ.get("DIE_AT_STEP") == str(self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("loss", loss)
        return loss


logger = Callback(is_offline=True, track_code=False, track_env=False, collect_resources=False)
callbacks = [PolyaxonCallback(background=False)]
trainer = pl.Trainer(
    accelerator="cpu", max_epochs=3, limit_train_batches=4, limit_val_batches=1, logger=logger, callbacks=callbacks
)
trainer.fit(Model())
print("trained", trainer.global_step)
"""


def test_next_to_the_callback_of_traceml(tmp_path: Path) -> None:
    """Polyaxon's own client logs metrics; it is a logger for Lightning."""
    [traceml] = Path(sys.prefix).glob("traceml/lib/python3*/site-packages")
    settings = {
        # Last, so that all but Polyaxon's own packages are the tested ones.
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(traceml)]),
        "POLYAXON_RUN_OUTPUTS_PATH": str(tmp_path / "outputs"),
        "POLYAXON_OFFLINE_ROOT": str(tmp_path / "offline"),
    }
    killed, resumed = (
        subprocess.run(
            [sys.executable, "-c", OF_TRACEML],
            env=os.environ | settings | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        for more in ({"DIE_AT_STEP": "9"}, {})
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "Resuming from " in resumed.stderr, resumed.stderr
    assert ": epoch 2, step 8\n" in resumed.stderr
    assert "trained 12\n" in resumed.stdout
