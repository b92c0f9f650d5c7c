"""Kill a training with SIGKILL at a random moment of a save, again and again, and let the next one go on from there.

`python kill_while_saving.py lightning|keras OUTPUTS TRIALS SEED` prints what was found after each kill, as JSON.
The frameworks are imported once; each training is a process of its own, forked from this one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from polyaxon_tracking import CheckpointManager

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
        np.ones((1, 1)), np.ones(1), epochs=EPOCHS, verbose=0, callbacks=[PolyaxonCallback("mine.keras", max_to_keep=1), Check()]
    )


def main(framework: str, outputs: Path, trials: int, seed: int) -> None:
    os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = str(outputs)
    os.environ["POLYAXON_LOG_LEVEL"] = "WARNING"
    import_framework(framework)
    chance = random.Random(seed)
    manager = CheckpointManager(outputs / "checkpoints" / "resume")
    found = []
    for _ in range(trials):
        began = newest(manager)
        child = os.fork()
        if not child:
            os.dup2(2, 1)
            {"lightning": train_lightning, "keras": train_keras}[framework]()
            os._exit(1)  # it never ends by itself
        ended, staged = wait_for_a_save(child, outputs, began, chance)
        before = newest(manager)
        if not ended:
            time.sleep(chance.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        found.append(
            {
                "killed": not ended and os.WIFSIGNALED(status),
                "while_saving": bool(list(outputs.rglob(".staging-*"))),
                "staged": staged,
                "before": before,
                "after": newest(manager),
                "damaged": [checkpoint.path for checkpoint in manager.checkpoints() if checkpoint.damage()],
                "intact": getattr(manager.latest(), "step", None),
                "mine": (outputs / "checkpoints" / ("mine.ckpt" if framework == "lightning" else "mine.keras")).exists(),
            }
        )
    print(json.dumps(found))


def import_framework(framework: str) -> None:
    if framework == "lightning":
        import polyaxon_lightning  # noqa: F401
    else:
        import polyaxon_keras  # noqa: F401


def wait_for_a_save(child: int, outputs: Path, began: int, chance: random.Random) -> tuple[bool, int]:
    """Return when the training saves, after it has made one to four steps; or whether it has ended, as it should not."""
    manager = CheckpointManager(outputs / "checkpoints" / "resume")
    goal = began + chance.randint(1, 4)
    while True:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True, 0
        staged = [path for path in outputs.rglob(".staging-*/*.*") if path.name != ".lock"]
        if newest(manager) >= goal and staged:
            return False, sum(size(path) for path in staged)
        time.sleep(0.0005)


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def newest(manager: CheckpointManager) -> int:
    return max((checkpoint.step for checkpoint in manager.checkpoints()), default=0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
