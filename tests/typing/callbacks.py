"""How users write the callbacks; checked by mypy and by pyright, both strict, and never run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import Trainer as HuggingFaceTrainer
from typing_extensions import assert_type

import polyaxon_keras
import polyaxon_lightning
import polyaxon_torch
import polyaxon_transformers

lightning = polyaxon_lightning.PolyaxonCallback(
    datasets={"digits": Path("data")},
    resume=True,
    every_n_train_steps=100,
    train_time_interval=timedelta(minutes=10),
    max_to_keep=3,
    loggers=["mine"],
    background=False,
    write_timeout=timedelta(hours=1),
    weights_only=False,
)
as_lightnings: Callback = lightning
trainer = Trainer(callbacks=[lightning, ModelCheckpoint(monitor="val_loss")])
assert_type(lightning.data_path("digits"), str)
assert_type(lightning.outputs_path, str)

keras = polyaxon_keras.PolyaxonCallback(
    "best.keras",
    monitor="val_loss",
    save_best_only=True,
    save_freq=100,
    every_n_train_steps="auto",
    datasets=["digits"],
    restore=[],
    train_time_interval=timedelta(minutes=10),
)
assert_type(keras.data_path("digits"), str)
assert_type(keras.outputs_path, str)

transformers = polyaxon_transformers.PolyaxonCallback(datasets=["reviews"], resume=False, every_n_train_steps=100)
HuggingFaceTrainer(callbacks=[transformers])
assert_type(transformers.data_path("reviews"), str)
assert_type(transformers.outputs_path, str)

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
with polyaxon_torch.TrainingLoop(model=model, optimizer=optimizer, scheduler=scheduler, resume=True) as training:
    for epoch in training.epochs(3):
        assert_type(epoch, int)
        for batch in training.batches([torch.ones(2, 4)]):
            assert_type(batch, torch.Tensor)
        assert_type(training.save_best(0.5, mode="max"), bool)
assert_type(training.step, int)
