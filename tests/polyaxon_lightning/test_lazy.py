"""The Lightning callback with models whose tensors get their shapes after they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_script import Classifier, data, digest, trainer
from restarts import forget_trainings
from torch import nn

from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.pytorch import LightningModule


class Lazy(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.net = self.layers()

    def layers(self) -> nn.Sequential:
        return nn.Sequential(nn.LazyLinear(self.width), nn.Dropout(0.2), nn.LazyBatchNorm1d(), nn.LazyLinear(2))


class Convolutions(Lazy):
    """A model with a norm that torch cannot resume by itself, because the number of inputs that it checks stays 0."""

    def layers(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Unflatten(1, (2, 2)),
            nn.LazyConv1d(self.width, 1, groups=2),
            nn.LazyInstanceNorm1d(affine=True),
            nn.LazyConvTranspose1d(4, 1),
            nn.LazyInstanceNorm1d(affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.LazyLinear(2),
        )


class OptimizedBefore(Lazy):
    """Its optimizer is made over parameters without shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.01)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class Configured(Lazy):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = self.layers()


class MadeInSetup(Lazy):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.net

    def setup(self, stage: str) -> None:
        self.net = self.layers()


class Unused(Lazy):
    """A model with a head that no batch reaches, so that its tensors are saved without shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(3))


class Calibrated(nn.Module):
    """A module whose tensor takes its shape from the first batch or from the state it loads, as observers of quantization do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("greatest", torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.greatest = x.detach().amax(0)
        return x

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *arguments: Any) -> None:
        self.greatest = torch.empty_like(state[f"{prefix}greatest"])
        super()._load_from_state_dict(state, prefix, *arguments)


class Quantized(Lazy):
    def layers(self) -> nn.Sequential:
        return nn.Sequential(Calibrated(), nn.Linear(4, 2))


def fit(make: Callable[[], LightningModule], *, epochs: int, seed: int = 0) -> LightningModule:
    torch.manual_seed(seed)
    model = make()
    forget_trainings()
    trainer(PolyaxonCallback(), max_epochs=epochs).fit(model, data(), data())
    return model


def initialized(model: LightningModule) -> LightningModule:
    if isinstance(model, Unused):
        del model.head
    return model


@pytest.mark.parametrize(
    "make",
    [Lazy, Convolutions, OptimizedBefore, Configured, MadeInSetup, Unused, Quantized],
    ids=lambda kind: kind.__name__,
)
def test_layers_that_get_their_shapes_late_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], LightningModule]
) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "whole"))
    whole = fit(make, epochs=4)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "parts"))
    fit(make, epochs=2)
    resumed = fit(make, epochs=4, seed=1)
    assert resumed.trainer.global_step == 16
    assert digest(initialized(resumed)) == digest(initialized(whole))


def test_a_lazy_layer_knows_its_inputs_when_it_was_resumed(outputs: Path) -> None:
    for epochs in (1, 2):
        model = fit(Convolutions, epochs=epochs)
    _, first, norm, transposed, *_, last = model.net
    assert [first.in_channels, norm.num_features, transposed.in_channels, last.in_features] == [2, 8, 8, 8]


@pytest.mark.parametrize(
    ("make", "differing"),
    [
        (Lazy, "net.0.weight is (16, 4), saved as (8, 4)"),
        (Configured, "net.0.weight is (16, 4), saved as (8, 4)"),
        (MadeInSetup, "net.0.weight is (16, 4), saved as (8, 4)"),
        (Convolutions, "net.1.weight is (16, 1, 1), saved as (8, 1, 1)"),
    ],
)
def test_a_lazy_layer_of_another_width_is_refused_where_torch_takes_the_old_one(
    outputs: Path, make: Callable[[int], LightningModule], differing: str
) -> None:
    fit(lambda: make(8), epochs=1)
    [saved] = (outputs / "checkpoints" / "resume").iterdir()
    with pytest.raises(TrackingError) as error:
        fit(lambda: make(16), epochs=2)
    assert str(error.value) == (
        f"Received a model that is not the one saved in {saved}. Expected the same layers, shapes and optimizer. Undo the "
        f"change, pass resume=False to start from scratch, or use another outputs path; the checkpoint stays "
        f"as it is. What differs: {differing}."
    )
    assert saved.is_file()


def test_other_shapes_next_to_lazy_ones_are_refused(outputs: Path) -> None:
    class Mixed(Lazy):
        def layers(self) -> nn.Sequential:
            return nn.Sequential(nn.LazyLinear(8), nn.Linear(8, self.width), nn.LazyLinear(2))

    fit(lambda: Mixed(8), epochs=1)
    with pytest.raises(
        TrackingError, match=r"net\.1\.weight is \(16, 8\), saved as \(8, 8\); net\.1\.bias is \(16,\), "
    ):
        fit(lambda: Mixed(16), epochs=2)


def test_a_model_that_changes_the_state_as_it_is_loaded_knows_better(outputs: Path) -> None:
    class Wider(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = self.state_dict()
            checkpoint["optimizer_states"] = []

    fit(lambda: Classifier(8), epochs=1)
    assert fit(lambda: Wider(16), epochs=2).trainer.global_step == 8


def test_the_users_own_ckpt_path_is_not_compared_to_the_newest_state(outputs: Path, tmp_path: Path) -> None:
    mine = ModelCheckpoint(dirpath=tmp_path, filename="mine")
    trainer(mine, max_epochs=1).fit(Classifier(16), data(), data())
    fit(lambda: Classifier(8), epochs=1)
    running = trainer(PolyaxonCallback(), max_epochs=2)
    running.fit(Classifier(16), data(), data(), ckpt_path=mine.best_model_path)
    assert running.global_step == 8
