"""Train the smallest model of a framework for as many epochs as are asked for, and print its weights."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def lightning(epochs: int, perturb: Callable[[Any], Any] = lambda x: x) -> list[float]:
    import torch
    from lightning.pytorch import LightningModule, Trainer, seed_everything

    from polyaxon_lightning import PolyaxonCallback

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.layer(perturb(batch)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    seed_everything(0)
    model = Model()
    loader = torch.utils.data.DataLoader(torch.randn(8, 2), 2, shuffle=True)
    Trainer(
        max_epochs=epochs,
        callbacks=[PolyaxonCallback()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, loader)
    weights: list[float] = model.layer.weight.flatten().tolist()
    return weights


def keras(epochs: int, perturb: Callable[[Any], Any] | None = None) -> list[float]:
    import keras
    import numpy as np

    from polyaxon_keras import PolyaxonCallback

    class Perturb(keras.layers.Layer):
        def call(self, x: Any, training: bool | None = None) -> Any:
            return perturb(x) if perturb and training else x

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), *([Perturb()] if perturb else []), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(0.1), loss="mse")
    x = np.random.default_rng(0).normal(size=(8, 2))
    model.fit(x, x[:, :1], epochs=epochs, batch_size=2, shuffle=False, verbose=0, callbacks=[PolyaxonCallback()])
    weights: list[float] = keras.ops.convert_to_numpy(model.layers[-1].kernel).flatten().tolist()
    return weights


def transformers(epochs: int, perturb: Callable[[Any], Any] = lambda x: x) -> list[float]:
    import torch
    from transformers import Trainer, TrainingArguments, set_seed

    from polyaxon_transformers import PolyaxonCallback

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(perturb(x)).square().mean()}

    set_seed(0)
    model = Model()
    data = [{"x": row} for row in torch.randn(8, 2)]
    arguments = TrainingArguments(
        "model",
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="constant",
        learning_rate=0.1,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[PolyaxonCallback()]).train()
    weights: list[float] = model.layer.weight.flatten().tolist()
    return weights


if __name__ == "__main__":
    train = {"lightning": lightning, "keras": keras, "transformers": transformers}[sys.argv[1]]
    logging.basicConfig(format="%(message)s")
    print("weights", *[round(w, 6) for w in train(int(sys.argv[2]))])
