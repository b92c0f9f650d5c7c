"""Trainings that save their whole state every epoch and resume as their users would, for `durability.py` to kill.

An epoch is one step, and every value of the state counts the steps, so that a mixture of two states shows. Each
training gets the outputs directory, and a `Report` to say how far it is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STATE_MEGABYTES = 24
EPOCHS = 1_000_000  # a kill ends it


class Report:
    """Lines of text that a training prints for the process that will kill it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def begin(self, epoch: int, steps: set[int]) -> None:
        """Report that training continues with `epoch`. `steps` holds the steps that each part of the state counted."""
        self._write(f"begin {epoch} {'whole' if steps == {epoch} else 'mixed'}")

    def saving(self, step: int) -> None:
        self._write(f"saving {step}")

    def saved(self, step: int) -> None:
        self._write(f"saved {step}")

    def _write(self, line: str) -> None:
        os.write(self._descriptor, f"{line}\n".encode())


# PyTorch Lightning


def _lightning(
    outputs: Path,
    report: Report,
    callbacks: list[Any],
    *,
    plugins: list[Any] | None = None,
    ckpt_path: str | None,
    in_flight: int = 0,
) -> None:
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.register_buffer("ballast", torch.zeros(STATE_MEGABYTES << 18))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            self.ballast += 1
            self.log("falling", -float(self.global_step))
            return self.layer(batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    class Reports(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            steps = {int(pl_module.ballast.min()), int(pl_module.ballast.max()), trainer.global_step}
            report.begin(trainer.current_epoch, steps)

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            report.saved(max(0, trainer.global_step - in_flight))

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            report.saving(trainer.global_step)

    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Reports(), *callbacks],
        plugins=plugins,
        default_root_dir=outputs,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(1, 1)), ckpt_path=ckpt_path)


def lightning(outputs: Path, report: Report, *, background: bool = True) -> None:
    """PolyaxonCallback, and a ModelCheckpoint(save_top_k=1) next to it whose old file is removed with each new one."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from polyaxon_lightning import PolyaxonCallback

    os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = str(outputs)
    best = ModelCheckpoint(filename="best-{epoch}", monitor="falling", save_top_k=1)
    polyaxon = PolyaxonCallback(max_to_keep=1, background=background)
    # The save of a step waits for that of the step before, so at most one is not yet on disk.
    _lightning(outputs, report, [polyaxon, best], ckpt_path=None, in_flight=int(background))


def lightning_foreground(outputs: Path, report: Report) -> None:
    """PolyaxonCallback(background=False), and a ModelCheckpoint(save_top_k=1) next to it."""
    lightning(outputs, report, background=False)


def lightning_native(outputs: Path, report: Report) -> None:
    """ModelCheckpoint(save_last=True), fit(ckpt_path="last")."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    saves = ModelCheckpoint(outputs, monitor="falling", save_top_k=1, save_last=True, enable_version_counter=False)
    _lightning(outputs, report, [saves], ckpt_path="last" if (outputs / "last.ckpt").exists() else None)


def lightning_async(outputs: Path, report: Report) -> None:
    """AsyncCheckpointIO, ModelCheckpoint(save_top_k=1), fit(ckpt_path="the newest file")."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    # The process that was killed may have left an empty directory, or a file that cannot be read, and no other.
    found = sorted(outputs.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if outputs.exists() and not found:
        raise FileNotFoundError("no checkpoint is left")
    saves = ModelCheckpoint(outputs, filename="{epoch}", monitor="falling", save_top_k=1)
    ckpt_path = str(found[-1]) if found else None
    _lightning(outputs, report, [saves], plugins=[AsyncCheckpointIO()], ckpt_path=ckpt_path)


# Loops of one's own on torch


def _torch_objects() -> tuple[Any, Any]:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.register_buffer("ballast", torch.zeros(STATE_MEGABYTES << 18))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.ballast += 1
            return self.layer(x).mean()

    model = Model()
    return model, torch.optim.SGD(model.parameters(), lr=1e-6)


def _torch_steps(model: Any) -> set[int]:
    ballast = getattr(model, "module", model).ballast
    return {int(ballast.min()), int(ballast.max())}


def torch(outputs: Path, report: Report, *, background: bool = True) -> None:
    """TrainingLoop, and its save_best next to it."""
    from torch import ones

    from polyaxon_torch import TrainingLoop

    os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = str(outputs)
    model, optimizer = _torch_objects()
    with TrainingLoop(model=model, optimizer=optimizer, max_to_keep=1, background=background) as training:
        report.begin(training.epoch, {*_torch_steps(model), training.step})
        for epoch in training.epochs(EPOCHS):
            report.saved(max(0, epoch - int(background)))
            for batch in training.batches([ones(1, 1)]):
                model(batch).backward()
                optimizer.step()
            training.save_best(-training.step)
            report.saving(training.step)


def torch_foreground(outputs: Path, report: Report) -> None:
    """TrainingLoop(background=False), and its save_best next to it."""
    torch(outputs, report, background=False)


def _torch_by_hand(
    report: Report, model: Any, optimizer: Any, first: int, save: Callable[[int], None], backward: Callable[[Any], None]
) -> None:
    from torch import ones

    report.begin(first, _torch_steps(model))
    for epoch in range(first, EPOCHS):
        report.saved(epoch)
        backward(model(ones(1, 1)))
        optimizer.step()
        report.saving(epoch + 1)
        save(epoch + 1)


def torch_native(outputs: Path, report: Report) -> None:
    """torch.save to one file, torch.load."""
    from torch import load
    from torch import save as save_file

    model, optimizer = _torch_objects()
    outputs.mkdir(exist_ok=True)
    file, first = outputs / "checkpoint.pt", 0
    if file.exists():
        state = load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]

    def save(epoch: int) -> None:
        save_file({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, file)

    _torch_by_hand(report, model, optimizer, first, save, lambda loss: loss.backward())


def torch_fabric(outputs: Path, report: Report) -> None:
    """Fabric's fabric.save and fabric.load, one file."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(*_torch_objects())
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    file = outputs / "checkpoint.ckpt"
    if file.exists():
        fabric.load(file, state)

    def save(epoch: int) -> None:
        fabric.save(file, state | {"epoch": epoch})

    _torch_by_hand(report, model, optimizer, state["epoch"], save, fabric.backward)


def torch_accelerate(outputs: Path, report: Report) -> None:
    """Accelerate's save_state and load_state, total_limit=2."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(str(outputs), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=project)
    model, optimizer = accelerator.prepare(*_torch_objects())
    found = [int(path.name.rpartition("_")[2]) for path in (outputs / "checkpoints").glob("checkpoint_*")]
    if found:
        accelerator.load_state(str(outputs / "checkpoints" / f"checkpoint_{max(found)}"))
        project.iteration = max(found) + 1
    first = _torch_steps(model)

    def save(_: int) -> None:
        accelerator.save_state()

    _torch_by_hand(report, model, optimizer, min(first), save, accelerator.backward)


# Hugging Face's Trainer


def _transformers(
    outputs: Path, report: Report, callbacks: list[Any], *, resume: bool | None = None, in_flight: int = 0
) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.register_buffer("ballast", torch.zeros(STATE_MEGABYTES << 18))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.ballast += 1
            return {"loss": self.layer(x).mean()}

    class Reports(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            report.begin(state.global_step, {int(model.ballast.min()), int(model.ballast.max())})

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report.saved(max(0, state.global_step - in_flight))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report.saving(state.global_step)

    arguments = TrainingArguments(
        str(outputs / "checkpoints" / "model"),
        num_train_epochs=EPOCHS,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        optim="sgd",
        learning_rate=1e-6,
    )
    data = torch.utils.data.TensorDataset(torch.ones(1, 1))
    trainer = Trainer(
        Model(),
        arguments,
        train_dataset=data,
        data_collator=lambda rows: {"x": rows[0][0]},
        callbacks=[Reports(), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)


def transformers(outputs: Path, report: Report, *, background: bool = True) -> None:
    """PolyaxonCallback, and save_strategy="epoch", save_total_limit=1 next to it."""
    from polyaxon_transformers import PolyaxonCallback

    os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = str(outputs)
    polyaxon = PolyaxonCallback(max_to_keep=1, background=background)
    _transformers(outputs, report, [polyaxon], in_flight=int(background))


def transformers_foreground(outputs: Path, report: Report) -> None:
    """PolyaxonCallback(background=False), and save_strategy="epoch", save_total_limit=1 next to it."""
    transformers(outputs, report, background=False)


def transformers_native(outputs: Path, report: Report) -> None:
    """save_strategy="epoch", save_total_limit=1, train(resume_from_checkpoint=True)."""
    found = outputs.exists() and any(outputs.glob("checkpoints/model/checkpoint-*"))
    _transformers(outputs, report, [], resume=found)


# Keras


def _keras(
    report: Report,
    callbacks: list[Any],
    *,
    load: Callable[[Any], Any] | None = None,
    initial_epoch: int | None = None,
    in_flight: int = 0,
) -> None:
    import keras
    import numpy as np

    @keras.saving.register_keras_serializable()
    class Ballast(keras.layers.Layer):
        def build(self, _: object) -> None:
            self.ballast = self.add_weight(shape=(STATE_MEGABYTES << 18,), initializer="zeros", trainable=False)

        def call(self, inputs: Any) -> Any:
            self.ballast.assign(self.ballast + 1)
            return inputs

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

    class Reports(keras.callbacks.Callback):
        began = False

        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            if not self.began:
                ballast = self.model.layers[0].ballast.numpy()
                report.begin(epoch, {int(ballast.min()), int(ballast.max()), int(self.model.optimizer.iterations)})
                self.began = True
            report.saved(max(0, epoch - in_flight))

        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            assert logs is not None
            logs["falling"] = -float(epoch)
            report.saving(epoch + 1)

    def build(*, built: bool = True) -> Any:
        layers = [keras.Input((1,))] if built else []
        model = keras.Sequential([*layers, Ballast(), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-6), "mse")
        return model

    model = build()
    if load is not None:
        model = load(model) or model
        initial_epoch = int(model.optimizer.iterations)
    x, y = np.ones((1, 1)), np.ones(1)
    model.fit(x, y, epochs=EPOCHS, initial_epoch=initial_epoch or 0, verbose=0, callbacks=[Reports(), *callbacks])


def keras(outputs: Path, report: Report, *, background: bool = True) -> None:
    """PolyaxonCallback(save_best_only=True)."""
    from polyaxon_keras import PolyaxonCallback

    os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = str(outputs)
    polyaxon = PolyaxonCallback(
        monitor="falling", mode="min", save_best_only=True, max_to_keep=1, background=background
    )
    _keras(report, [polyaxon], in_flight=int(background))


def keras_foreground(outputs: Path, report: Report) -> None:
    """PolyaxonCallback(save_best_only=True, background=False)."""
    keras(outputs, report, background=False)


def keras_native(outputs: Path, report: Report) -> None:
    """ModelCheckpoint(save_best_only=True), load_model."""
    from keras import callbacks, saving

    path = str(outputs / "best.keras")
    saves = callbacks.ModelCheckpoint(path, monitor="falling", mode="min", save_best_only=True)
    _keras(report, [saves], load=(lambda _: saving.load_model(path)) if os.path.exists(path) else None)


def keras_weights(outputs: Path, report: Report) -> None:
    """ModelCheckpoint(save_weights_only=True), load_weights."""
    from keras import callbacks

    path = str(outputs / "model.weights.h5")

    def load(model: Any) -> None:
        model.optimizer.build(model.trainable_variables)
        model.load_weights(path)

    saves = callbacks.ModelCheckpoint(path, save_weights_only=True)
    _keras(report, [saves], load=load if os.path.exists(path) else None)


def keras_backup(outputs: Path, report: Report) -> None:
    """BackupAndRestore."""
    from keras import callbacks

    _keras(report, [callbacks.BackupAndRestore(str(outputs / "backup"))])


def keras_double_backup(outputs: Path, report: Report) -> None:
    """BackupAndRestore(double_checkpoint=True)."""
    from keras import callbacks

    _keras(report, [callbacks.BackupAndRestore(str(outputs / "backup"), double_checkpoint=True)])
