"""Train a small classifier with PyTorch Lightning; the environment says how and when it dies."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import faults
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from polyaxon_lightning import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.loggers import Logger


class Classifier(LightningModule):
    """A model with all that has state: dropout, momentum, a scheduler that Lightning steps after saving."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        first = nn.LazyLinear(width) if "LAZY" in os.environ else nn.Linear(4, width)
        self.net = nn.Sequential(first, nn.Dropout(0.2), nn.Linear(width, 2))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        place = self.trainer.global_step, self.global_rank
        if faults.is_due("DIE_AT_STEP", *place):
            faults.die()
        if faults.is_due("NO_ROOM_AT_STEP", *place):
            faults.fill_disk()
        time.sleep(float(os.environ.get("SECONDS_PER_BATCH", "0")))
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        if "SECONDS_PER_VALIDATION_BATCH" in os.environ:
            print("validating after", self.trainer.global_step, flush=True)
            time.sleep(float(os.environ["SECONDS_PER_VALIDATION_BATCH"]))
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Items(IterableDataset[tuple[torch.Tensor, ...]]):
    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return (self.rows[row] for row in range(len(self.rows)))

    def __len__(self) -> int:
        return len(self.rows)


def data(
    *, shuffle: bool = False, loader: type[DataLoader[tuple[torch.Tensor, ...]]] = DataLoader
) -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    workers = int(os.environ.get("WORKERS", "0"))
    rows = TensorDataset(x, (x.sum(1) > 0).long())
    if "ITEMS" in os.environ:
        return loader(Items(rows), batch_size=16, num_workers=workers)
    return loader(rows, batch_size=16, shuffle=shuffle, num_workers=workers)


def trainer(*callbacks: Callback, max_epochs: int = 3, logger: Logger | bool = False, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def digest(module: nn.Module) -> str:
    return faults.digest_of(tensor.numpy() for tensor in module.state_dict().values())


class Steps(Callback):
    """The optimizer steps before each batch, in order."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.trained.append(trainer.global_step)


class Late(Callback):
    """Send the signal when the last batch is done."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        faults.die(os.environ["SIGNAL_AT_THE_END"])


def main() -> None:
    faults.prepare_process()
    every = os.environ.get("EVERY_N_TRAIN_STEPS")
    several: dict[str, Any] = {"devices": 2, "strategy": os.environ["STRATEGY"]} if "STRATEGY" in os.environ else {}
    seed_everything(0)
    training = trainer(
        ModelCheckpoint(monitor="val_loss", save_top_k=2),
        PolyaxonCallback(
            every_n_train_steps=int(every) if every else None,
            background="FOREGROUND" not in os.environ,
            resume=False if "NO_RESUME" in os.environ else None,
        ),
        max_epochs=6,
        **several,
    )
    model = Classifier()
    if "SIGNAL_AT_THE_END" in os.environ:
        training.callbacks.append(Late())  # type: ignore[attr-defined]
    loader = StatefulDataLoader if "STATEFUL" in os.environ else DataLoader
    batches = data(shuffle=True, loader=loader)
    training.fit(model, batches, data(), ckpt_path=os.environ.get("CKPT_PATH"))
    # Optimizers and progress stay in the processes that were spawned.
    spawned = training.strategy.launcher is not None and not training.optimizers
    learning_rate = None if spawned else training.optimizers[0].param_groups[0]["lr"]
    # In one piece: others print to the same place.
    sys.stdout.write(f"trained {training.global_step} {training.current_epoch} {learning_rate} {digest(model)}\n")


if __name__ == "__main__":
    sys.exit(main())
