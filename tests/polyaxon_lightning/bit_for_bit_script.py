"""Train with what draws random numbers or counts ahead; the environment says what, and how training is cut off."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning_script import Classifier, digest, trainer
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from polyaxon_lightning import PolyaxonCallback

KINDS = os.environ.get("KINDS", "").split()


class Schedules(Classifier):
    lr = 0.01
    batch_size = 8

    def train_dataloader(self) -> Any:
        return loader(self.batch_size)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        if os.environ.get("CUT_OFF_AT") == f"{self.current_epoch}.{index}":
            if "SIGNAL" not in os.environ:
                torch.rand(1)  # as dropout in layers before the one that fails
                raise OSError("a file of the data set was away")
            os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
        if "several" in KINDS:
            batch = [torch.cat(parts) for parts in zip(batch["long"], batch["short"], strict=True)]  # type: ignore[call-overload]
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule: Any = lr_scheduler.ConstantLR(optimizer)
        if "plateau" in KINDS:
            schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.9)
        if "estimated" in KINDS:
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "monitor": "loss", "interval": "step"}]


class Draws(Callback):
    """Draws at the start of each epoch, as a callback does that picks samples to show."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.rand(3)


def loader(batch_size: int) -> Any:
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {}
    if "generator" in KINDS:
        options |= {"generator": torch.Generator().manual_seed(1)}
    if "persistent" in KINDS or "workers" in KINDS:
        options |= {"num_workers": 2 if "workers" in KINDS else 1, "persistent_workers": "persistent" in KINDS}
    kind = StatefulDataLoader if "stateful" in KINDS else DataLoader
    return kind(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=batch_size, shuffle=True, **options)


def main() -> None:
    seed_everything(0)
    others: list[Callback] = [Draws()] if "draws" in KINDS else []
    if "searches" in KINDS:
        others += [LearningRateFinder(num_training_steps=20), BatchSizeFinder(init_val=2, max_trials=2)]
    accumulate = 4 if "accumulate" in KINDS else 1
    training = trainer(
        PolyaxonCallback(background=False),
        *others,
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        val_check_interval=0.5,
    )
    model = Schedules()
    given: list[Any] = [] if "searches" in KINDS else [loader(8)]
    if "several" in KINDS:
        given = [{"long": loader(8), "short": loader(20)}]
    training.fit(model, *given, val_dataloaders=loader(40))
    print("trained", training.global_step, training.fit_loop.total_batch_idx, digest(model), model.lr, model.batch_size)


if __name__ == "__main__":
    sys.exit(main())
