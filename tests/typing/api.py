"""How users write it; checked by mypy in strict mode, never run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking import (
    Checkpoint,
    CheckpointManager,
    Directory,
    Run,
    TrackingError,
    atomic_write,
    cached_path,
    get_data_path,
    get_data_paths,
    get_log_level,
    get_outputs_path,
    get_outputs_refs_paths,
    open_directory,
)

outputs: str | None = get_outputs_path("checkpoints", "best.pt")
data: dict[str, str] | None = get_data_paths()
digits: str = get_data_path("digits")
digits = get_data_path("digits", default="data/digits")
either: str | Path = get_data_path("digits", default=Path("data"))
references: dict[str, list[str]] | None = get_outputs_refs_paths()
level: str | None = get_log_level()

manager = CheckpointManager(Path("checkpoints"), max_to_keep=3)
with manager.save(100, epoch=2, suffix=".pt") as path:
    written: str = path
latest: Checkpoint | None = manager.latest()
if latest is not None:
    step: int = latest.step
    damage: str | None = latest.damage()
with atomic_write("model.txt") as staged:
    Path(staged).write_text("weights", encoding="utf-8")

local: str = cached_path("s3://bucket/model.keras")
directory: Directory = open_directory("s3://bucket/outputs")
names: list[str] = directory.names()

run = Run(datasets=["digits"], loggers=["mine"], resume=True)
error: ValueError = TrackingError("message")

polyaxon = PolyaxonCallback(datasets={"digits": Path("data")}, train_time_interval=timedelta(minutes=10))
trainer = Trainer(callbacks=[polyaxon, ModelCheckpoint(monitor="val_loss")])
where: str = polyaxon.data_path("digits")
