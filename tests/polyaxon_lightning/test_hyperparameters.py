"""A script that is started again with other hyperparameters: PyTorch Lightning."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning_script import Classifier, data, trainer
from restarts import forget_trainings
from torch.utils.data import DataLoader, TensorDataset

from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Tunable(Classifier):
    def __init__(self, lr: float = 0.01, dropout: float = 0.2, optimizer: str = "Adam", gamma: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters("lr", "dropout")
        self.net[1].p = dropout
        self.of_optimizer, self.gamma = optimizer, gamma

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = getattr(torch.optim, self.of_optimizer)(self.parameters(), lr=self.hparams["lr"])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, self.gamma)}


class Data(LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(64, 4), torch.zeros(64).long()), batch_size=self.batch_size)


def start(model: Classifier, *, max_epochs: int, batch_size: int = 16, **options: Any) -> Trainer:
    """Train until `max_epochs`, as the next start of the script."""
    forget_trainings()
    training = trainer(PolyaxonCallback(resume=True, **options), max_epochs=max_epochs)
    training.fit(model, datamodule=Data(batch_size))
    return training


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return [message for message in found if "hyperparameters" in message]


def learning_rate(training: Trainer) -> float:
    return float(training.optimizers[0].param_groups[0]["lr"])


def test_the_same_script_with_more_epochs_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for max_epochs in (1, 2, 3):
        assert start(Tunable(), max_epochs=max_epochs).global_step == 4 * max_epochs
    assert warnings(caplog) == []


def test_a_warning_names_what_changed_and_what_is_used(caplog: pytest.LogCaptureFixture) -> None:
    start(Tunable(), max_epochs=1)
    for max_epochs in (2, 3):  # the second start trained with the first one's learning rate, so the third says so again
        training = start(Tunable(lr=1.0, dropout=0.5, gamma=0.1), max_epochs=max_epochs, batch_size=8)
        (message,) = warnings(caplog)
        assert learning_rate(training) == pytest.approx(0.01 * 0.5**max_epochs)
        for text in (
            "optimizers.0.0.lr: 0.01 -> 1 (0.01 is used, from the checkpoint)",
            "lr_schedulers.0.gamma: 0.5 -> 0.1 (0.5 is used, from the checkpoint)",
        ):
            assert text in message
        for text in (
            "dropout: 0.2 -> 0.5 (0.5 is used, from the script)",
            "train_dataloaders.0.batch_size: 16 -> 8 (8 is used, from the script)",
        ):
            assert (text in message) == (max_epochs == 2)


def test_raise_ends_before_a_batch_is_trained(outputs: Any) -> None:
    start(Tunable(), max_epochs=1)
    before = {path.name for path in (outputs / "checkpoints" / "resume").iterdir()}
    model = Tunable(lr=1.0)
    with pytest.raises(TrackingError, match=r"optimizers\.0\.0\.lr: 0\.01 -> 1 .*if_changed='raise'"):
        start(model, max_epochs=2, if_changed="raise")
    assert {path.name for path in (outputs / "checkpoints" / "resume").iterdir()} == before


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"dropout": 0.5}, {"optimizer": "SGD"}], ids=str)
def test_restart_starts_from_scratch_and_then_resumes_what_it_started(
    change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    start(Tunable(), max_epochs=2)
    torch.manual_seed(1)
    model = Tunable(**change)
    begins_with = {name: value.clone() for name, value in model.state_dict().items()}
    seen = {}

    def note(training: Trainer) -> None:
        seen.update({name: value.clone() for name, value in training.lightning_module.state_dict().items()})

    forget_trainings()
    training = trainer(PolyaxonCallback(resume=True, if_changed="restart"), max_epochs=1)
    model.on_train_start = lambda: note(training)  # type: ignore[method-assign]
    training.fit(model, datamodule=Data(16))
    assert training.global_step == 4
    assert all(torch.equal(seen[name], value) for name, value in begins_with.items())
    assert "starts from scratch because of if_changed='restart'" in warnings(caplog)[0]
    assert start(Tunable(**change), max_epochs=3, if_changed="restart").global_step == 12
    assert warnings(caplog) == []


def test_restart_resumes_bit_for_bit_if_nothing_changed() -> None:
    def trained(*limits: int, **options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        for limit in limits:
            model = Tunable()
            forget_trainings()
            training = trainer(PolyaxonCallback(resume=True, **options), max_epochs=limit)
            training.fit(model, data(shuffle=True))
        return model.state_dict()

    without = trained(3, name="without")
    for if_changed in ("warn", "restart"):
        resumed = trained(1, 3, name=if_changed, if_changed=if_changed)
        assert all(torch.equal(resumed[name], value) for name, value in without.items())
