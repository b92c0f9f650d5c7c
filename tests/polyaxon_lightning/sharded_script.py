"""Train a model whose parameters are split between ranks; the environment says how many, and when one is killed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import faults
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from polyaxon_lightning import PolyaxonCallback

if TYPE_CHECKING:
    from typing import Any


class Sharded(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        if self.global_rank == 1 and faults.is_due("DIE_AT_STEP", self.trainer.global_step):
            faults.die()
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    ranks = int(os.environ.get("RANKS", "2"))
    seed_everything(0, verbose=False)
    strategy: Any = ModelParallelStrategy(
        data_parallel_size=ranks,
        tensor_parallel_size=1,
        save_distributed_checkpoint="IN_ONE_FILE" not in os.environ,
        process_group_backend="gloo",
    )
    trainer = Trainer(
        max_epochs=int(os.environ.get("EPOCHS", "4")),
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PolyaxonCallback(max_to_keep=2)],
    )
    model = Sharded()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    trainer.fit(model, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=64 // ranks))
    total = sum(float(parameter.full_tensor().double().sum()) for parameter in model.parameters())  # type: ignore[attr-defined]
    # In one piece: others print to the same place.
    sys.stdout.write(f"trained {trainer.global_step} {total:.9f}\n")
    torch.distributed.destroy_process_group()  # otherwise gloo now and then ends the process with SIGABRT at its exit


if __name__ == "__main__":
    main()
