"""Copies of callbacks that are training: some libraries copy or pickle the callbacks of a Trainer."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_script import Classifier, data, trainer

from polyaxon_lightning import PolyaxonCallback

if TYPE_CHECKING:
    from pathlib import Path

COPIES = [copy.deepcopy, lambda callbacks: pickle.loads(pickle.dumps(callbacks))]


class Copies(Callback):
    """Copies the other callbacks at the end of an epoch, when each has saved, or once training has failed."""

    taken: list[Callback]

    def __init__(self, how: int, *, fails: bool) -> None:
        self.how = how
        self.fails = fails

    def take(self, trainer: Trainer) -> None:
        others = [one for one in trainer.callbacks if not isinstance(one, Copies)]  # type: ignore[attr-defined]
        Copies.taken = COPIES[self.how](others)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.take(trainer)
            if self.fails:
                raise ArithmeticError


@pytest.mark.parametrize("how", [0, 1], ids=["copied", "pickled"])
@pytest.mark.parametrize("fails", [False, True], ids=["while training", "after an exception"])
def test_copies_of_the_callbacks_train_by_themselves(how: int, fails: bool, outputs: Path) -> None:
    copies = Copies(how, fails=fails)
    training = trainer(PolyaxonCallback(), ModelCheckpoint(monitor="val_loss", save_top_k=2), copies, max_epochs=2)
    if fails:
        with pytest.raises(ArithmeticError):
            training.fit(Classifier(), data(), data())
        copies.take(training)
    else:
        training.fit(Classifier(), data(), data())
    saved = {path.name for path in (outputs / "checkpoints").glob("*.ckpt")}
    assert saved
    trainer(*Copies.taken, max_epochs=3).fit(Classifier(), data(), data())
    assert len(list((outputs / "checkpoints" / "resume-2").glob("step=0000000012-*"))) == 1
    [own] = [one for one in Copies.taken if isinstance(one, ModelCheckpoint)]
    assert own.best_model_path
    original = training.checkpoint_callback
    assert isinstance(original, ModelCheckpoint)
    assert original.best_model_path.rpartition("/")[2] in saved
