"""The callback for Hugging Face's Trainer with weights that safetensors refuses, of models that train without saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, set_seed
from transformers_script import tiny, trainer

from polyaxon_tracking import TrackingError
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = [{"x": torch.tensor(n % 7), "labels": torch.tensor((n + 1) % 7)} for n in range(28)]


class Net(nn.Module):
    """Two matrices of the same shape, and a counter that each forward in training increments."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.register_buffer("seen", torch.zeros(4))
        self.finish()

    def finish(self) -> None:
        """Change the weights, as each subclass does."""

    def count(self) -> None:
        self.seen += 1

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.count()
        return {"loss": nn.functional.cross_entropy(self.head(self.embedding(x)), labels)}


class Tied(Net):
    def finish(self) -> None:
        self.head.weight = self.embedding.weight


class Sliced(Net):
    def finish(self) -> None:
        self.register_buffer("part", self.seen[1:3])


class Transposed(Net):
    def finish(self) -> None:
        self.head.weight = nn.Parameter(torch.randn(4, 7).t())


class Expanded(Net):
    def finish(self) -> None:
        self.register_buffer("rows", torch.zeros(1, 4).expand(3, 4))

    def count(self) -> None:
        self.rows = (self.rows + 1)[:1].expand(3, 4)


class Sparse(Net):
    def finish(self) -> None:
        self.register_buffer("edges", torch.eye(3).to_sparse())

    def count(self) -> None:
        self.edges = self.edges * 2


class Complex(Net):
    def finish(self) -> None:
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex128))

    def count(self) -> None:
        self.phase *= 1j


class ExtraState(Net):
    def finish(self) -> None:
        self.batches = 0

    def count(self) -> None:
        self.batches += 1

    def get_extra_state(self) -> dict[str, int]:
        return {"batches": self.batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def train(made_by: Callable[[], nn.Module], *callbacks: Any, epochs: int, seed: int = 0, **options: Any) -> nn.Module:
    set_seed(seed)
    options = {"train_dataset": ROWS, "eval_strategy": "no", "load_best_model_at_end": False} | options
    training = trainer(
        *callbacks,
        model=made_by(),
        num_train_epochs=epochs,
        per_device_train_batch_size=7,
        lr_scheduler_type="constant",
        **{"save_strategy": "no"} | options,
    )
    training.train()
    assert training.state.global_step == 4 * epochs
    return training.model


def state(model: nn.Module) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value.to_dense().tolist() if isinstance(value, torch.Tensor) else value

    return {name: plain(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("made_by", "save_strategy"),
    [
        *((made_by, "no") for made_by in (Tied, Sliced, Transposed, Expanded, Sparse, Complex, ExtraState)),
        (Tied, "epoch"),
        (ExtraState, "epoch"),
    ],
)
def test_what_trains_without_the_callback_resumes_with_the_same_weights(
    outputs: Path, new_process: Callable[[], None], made_by: type[Net], save_strategy: str
) -> None:
    whole = train(made_by, epochs=4)
    train(made_by, PolyaxonCallback(), epochs=2, save_strategy=save_strategy)
    new_process()
    resumed = train(made_by, PolyaxonCallback(), epochs=4, seed=1, save_strategy=save_strategy)
    assert state(resumed) == state(whole)
    if made_by is Tied:
        assert resumed.head.weight is resumed.embedding.weight
    if made_by is Sliced:
        resumed.seen += 1
        assert resumed.part.tolist() == resumed.seen[1:3].tolist()


def tied_without_saying_so() -> BertForSequenceClassification:
    model = tiny()
    layer = model.bert.encoder.layer[0].attention.self
    layer.key.weight = layer.query.weight
    return model


WORDS = [{"input_ids": torch.tensor([n, n + 1]), "labels": torch.tensor(n % 2)} for n in range(28)]


def test_a_model_of_transformers_that_does_not_declare_its_tied_weights_resumes(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    if not hasattr(tiny(), "all_tied_weights_keys"):
        with pytest.raises(RuntimeError, match="shared tensors"):
            train(tied_without_saying_so, PolyaxonCallback(), epochs=1, train_dataset=WORDS)
        return
    whole = train(tied_without_saying_so, PolyaxonCallback(resume=False), epochs=4, train_dataset=WORDS)
    new_process()
    train(tied_without_saying_so, PolyaxonCallback(resume=False), epochs=2, train_dataset=WORDS)
    new_process()
    resumed = train(tied_without_saying_so, PolyaxonCallback(), epochs=4, seed=1, train_dataset=WORDS)
    assert state(resumed) == state(whole)
    layer = resumed.bert.encoder.layer[0].attention.self
    assert layer.key.weight is layer.query.weight


def test_another_shape_of_a_weight_that_safetensors_refuses_is_an_error(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    class Wider(Complex):
        def finish(self) -> None:
            self.register_buffer("phase", torch.ones(4, dtype=torch.complex128))

    train(Complex, PolyaxonCallback(), epochs=1)
    new_process()
    with pytest.raises(TrackingError, match=r"phase is \(4,\), saved as \(3,\)"):
        train(Wider, PolyaxonCallback(), epochs=2)
    new_process()
    with pytest.raises(TrackingError, match="phase was saved and is no more"):
        train(Net, PolyaxonCallback(), epochs=2)
