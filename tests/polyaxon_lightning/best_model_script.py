"""Train with a ModelCheckpoint that saves within epochs; the environment says how many it keeps, and when a kill comes."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_script import Classifier, data, trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking.background import wait_for_all

if TYPE_CHECKING:
    import torch


class Improves(Classifier):
    """Better with each step; after the restart a little worse where asked, as on another GPU."""

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        if os.environ.get("DIE_AT_STEP") == str(self.global_step):
            wait_for_all()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val_loss", 1 / self.global_step + ("WORSE" in os.environ))

    def test_step(self, batch: list[torch.Tensor], index: int) -> None: ...


def main() -> None:
    seed_everything(0)
    checkpoints = ModelCheckpoint(monitor="val_loss", save_top_k=int(os.environ["SAVE_TOP_K"]), save_last=True)
    training = trainer(
        PolyaxonCallback(
            every_n_train_steps=int(os.environ.get("EVERY", "5")), background="FOREGROUND" not in os.environ
        ),
        checkpoints,
        val_check_interval=0.5,
        num_sanity_val_steps=0,
    )
    training.fit(Improves(), data(loader=StatefulDataLoader), data())
    training.test(dataloaders=data(), ckpt_path="best", verbose=False)
    print("best", os.path.basename(checkpoints.best_model_path))


if __name__ == "__main__":
    sys.exit(main())
