"""The callback for Hugging Face's Trainer with layers that take their shapes from their first batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import set_seed
from transformers_script import digest, trainer

from polyaxon_tracking import TrackingError
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = [
    {"x": (row := torch.randn(4, generator=torch.Generator().manual_seed(n))), "labels": int(row.sum() > 0)}
    for n in range(32)
]


class Lazy(nn.Module):
    """A model whose parameters may need a batch before training, because the Trainer counts them first; buffers do not."""

    def __init__(self, *, first_batch: bool, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LazyLinear(width),
            nn.LazyBatchNorm1d(affine=False),
            nn.Unflatten(1, (4, width // 4)),
            nn.LazyInstanceNorm1d(affine=True),
            nn.Flatten(),
            nn.LazyLinear(2),
        )
        if first_batch:
            self.net(torch.zeros(2, 4))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class LazyBuffers(Lazy):
    def __init__(self) -> None:
        super().__init__(first_batch=True)
        self.net[1] = nn.LazyBatchNorm1d(affine=False)


def train(make: Callable[[], nn.Module], *, epochs: int, seed: int = 0, **options: Any) -> nn.Module:
    set_seed(seed)
    options |= {"num_train_epochs": epochs, "lr_scheduler_type": "constant", "load_best_model_at_end": False}
    training = trainer(
        PolyaxonCallback(), model=make(), train_dataset=ROWS, eval_dataset=ROWS[:8], save_strategy="no", **options
    )
    training.train()
    assert training.state.global_step == 4 * epochs
    return training.model


@pytest.mark.parametrize(
    ("make", "again"),
    [
        (lambda: Lazy(first_batch=True), lambda: Lazy(first_batch=True)),
        (lambda: Lazy(first_batch=True), lambda: Lazy(first_batch=False)),
        (LazyBuffers, LazyBuffers),
    ],
    ids=["seen a batch", "seen a batch at the first start", "buffers"],
)
def test_lazy_layers_resume(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_process: Callable[[], None],
    make: Callable[[], nn.Module],
    again: Callable[[], nn.Module],
) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "whole"))
    whole = train(make, epochs=4)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "parts"))
    train(make, epochs=2)
    new_process()
    assert digest(train(again, epochs=4, seed=1)) == digest(whole)


def test_a_lazy_layer_of_another_width_is_refused_where_torch_takes_the_old_one(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    train(lambda: Lazy(first_batch=True), epochs=1)
    new_process()
    with pytest.raises(TrackingError) as error:
        train(lambda: Lazy(first_batch=False, width=16), epochs=2)
    [saved] = (outputs / "checkpoints" / "resume").iterdir()
    told = str(error.value)
    assert told.startswith(f"Received a model that is not the one saved in {saved}. Expected the same layers, ")
    assert told.endswith(" What differs: net.0.weight is (16, 4), saved as (8, 4).")
