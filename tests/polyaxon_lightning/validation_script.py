"""Train with all that a validation decides; the environment says how and when a validation is cut off."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning_script import Classifier, data, digest, trainer
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from polyaxon_lightning import PolyaxonCallback

if TYPE_CHECKING:
    import torch


class Logging(Classifier):
    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        # What was logged of a part of an epoch is in no state.
        self.log("loss", loss, on_step=True, on_epoch="WITHIN_EPOCHS" not in os.environ)
        return loss


class Curves(Logger):
    """Append what is logged to a file."""

    name, version = "curves", 0

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with Path(os.environ["CURVES"]).open("a") as file:
            file.write(json.dumps([step, metrics]) + "\n")


class CutOff(Callback):
    """Cut off the validation of an epoch, in its second batch."""

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *place: Any) -> None:
        if trainer.sanity_checking or place[1] != 1 or str(trainer.current_epoch) != os.environ.get("EPOCH", "2"):
            return
        if os.environ["CUT_OFF"] == "exception":
            raise RuntimeError("mine")
        faults.die(os.environ["CUT_OFF"])


def main() -> None:
    seed_everything(0)
    early_stopping = EarlyStopping("val_loss", min_delta=0.5, patience=int(os.environ.get("PATIENCE", "4")))
    best = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    all_callbacks = [PolyaxonCallback(background="FOREGROUND" not in os.environ), early_stopping, best]
    if "EMA" in os.environ:
        all_callbacks.append(callbacks.EMAWeightAveraging(decay=0.9))
    if "CUT_OFF" in os.environ:
        all_callbacks.append(CutOff())
    options: dict[str, Any] = {"val_check_interval": 2} if "WITHIN_EPOCHS" in os.environ else {}
    if "MAX_STEPS" in os.environ:
        options["max_steps"] = int(os.environ["MAX_STEPS"])
    training = trainer(*all_callbacks, max_epochs=6, logger=Curves(), log_every_n_steps=1, **options)
    loader = StatefulDataLoader if "WITHIN_EPOCHS" in os.environ else DataLoader
    model = Logging()
    training.fit(model, data(shuffle=True, loader=loader), data())
    trained = {
        "steps": [training.global_step, training.current_epoch],
        "weights": digest(model),
        "learning rate": training.optimizers[0].param_groups[0]["lr"],
        "early stopping": [early_stopping.wait_count, early_stopping.stopped_epoch, float(early_stopping.best_score)],
        "best": sorted((Path(path).name, float(score)) for path, score in best.best_k_models.items()),
    }
    sys.stdout.write(f"{json.dumps(trained)}\n")


if __name__ == "__main__":
    main()
