"""Handwritten digits with PyTorch Lightning: `python examples/lightning_digits.py`.

In a cluster the data, the outputs and the log level come from the run, and a killed run resumes by itself, as do its
curves: `tensorboard --logdir outputs`.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from digits import LOCAL, load
from polyaxon_lightning import PolyaxonCallback


class Digits(LightningDataModule):
    def __init__(self, directory: str) -> None:
        super().__init__()
        train, test = load(directory)
        dataset = TensorDataset(*map(torch.from_numpy, train))
        self.train, self.val = random_split(dataset, [0.9, 0.1], torch.Generator().manual_seed(0))
        self.test = TensorDataset(*map(torch.from_numpy, test))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=256)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels))

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    seed_everything(0)
    polyaxon = PolyaxonCallback(datasets={"digits": LOCAL})
    trainer = Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=TensorBoardLogger(polyaxon.outputs_path, name="tensorboard", version=""),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[polyaxon, ModelCheckpoint(monitor="val_loss")],
    )
    data = Digits(polyaxon.data_path("digits"))
    trainer.fit(Classifier(), data)
    [metrics] = trainer.test(ckpt_path="best", datamodule=data)
    print(f"test accuracy {metrics['test_accuracy']:.3f}, best model {trainer.checkpoint_callback.best_model_path}")


if __name__ == "__main__":
    main()
