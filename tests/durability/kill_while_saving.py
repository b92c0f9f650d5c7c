"""Kill a training with SIGKILL at a random moment of a save, again and again, and let the next one go on from there.

`python kill_while_saving.py lightning|keras OUTPUTS TRIALS SEED` prints what was found after each kill, as JSON.
The frameworks are imported once; each training is a process of its own, forked from this one.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from polyaxon_tracking import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable

STATE_MEGABYTES = 24
EPOCHS = 100_000


def train_lightning() -> None:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from polyaxon_lightning import PolyaxonCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.register_buffer("ballast", torch.zeros(STATE_MEGABYTES << 18))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            self.ballast += 1  # the whole state is of one step, so that a mixture of two would show
            return self.layer(batch).mean()

        def on_train_start(self) -> None:
            assert (self.ballast == self.global_step).all()
            assert self.current_epoch == self.global_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PolyaxonCallback(max_to_keep=1), ModelCheckpoint(filename="mine", enable_version_counter=False)],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(1, 1)))


def train_keras() -> None:
    import keras
    import numpy as np

    from polyaxon_keras import PolyaxonCallback

    class Check(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            assert int(self.model.optimizer.iterations) == epoch

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(STATE_MEGABYTES << 18), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(
        np.ones((1, 1)),
        np.ones(1),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[PolyaxonCallback("mine.keras", max_to_keep=1), Check()],
    )


def main(framework: str, outputs: Path, trials: int, seed: int) -> None:
    os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = str(outputs)
    os.environ["POLYAXON_LOG_LEVEL"] = "WARNING"
    train = {"lightning": train_lightning, "keras": train_keras}[framework]
    importlib.import_module(f"polyaxon_{framework}")
    chance = random.Random(seed)
    print(json.dumps([trial(train, outputs, chance) for _ in range(trials)]))


def trial(train: Callable[[], None], outputs: Path, chance: random.Random) -> dict[str, object]:
    manager = CheckpointManager(outputs / "checkpoints" / "resume")
    began = newest(manager)
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        try:
            train()
        finally:
            os._exit(1)  # it never ends by itself
    try:
        wait_for_a_save(child, outputs, began + chance.randint(1, 4))
        time.sleep(chance.uniform(0, 0.03))
        before, staged = newest(manager), staged_files(outputs)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    latest = manager.latest()
    return {
        "began": began,
        "before": before,
        "while_saving": bool(staged),
        "after": None if latest is None else latest.step,
        "damaged": [checkpoint.path for checkpoint in manager.checkpoints() if checkpoint.damage()],
    }


def wait_for_a_save(child: int, outputs: Path, step: int) -> None:
    """Return when the training has saved `step`, and saves again."""
    manager = CheckpointManager(outputs / "checkpoints" / "resume")
    deadline = time.monotonic() + 60
    while newest(manager) < step or not staged_files(outputs):
        if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() > deadline:
            sys.exit("the training ended, or makes no progress")
        time.sleep(0.0005)


def staged_files(outputs: Path) -> list[str]:
    found = []
    for directory in (outputs / "checkpoints", outputs / "checkpoints" / "resume"):
        for name in listed(directory):
            if name.startswith(".staging-"):
                found += [file for file in listed(directory / name) if file != ".lock"]
    return found


def listed(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:  # not there yet, or no longer
        return []


def newest(manager: CheckpointManager) -> int:
    return max((checkpoint.step for checkpoint in manager.checkpoints()), default=0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
