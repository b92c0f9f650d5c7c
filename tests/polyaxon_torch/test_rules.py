"""What a TrainingLoop resumes from, refuses and says, in one process."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from restarts import forget_trainings
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from training_scripts import directories_of_trainings, files_in, newest_position

from polyaxon_torch import TrainingLoop
from polyaxon_tracking import CheckpointManager, TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

BATCHES = 4


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


class Value:
    """An object of the script's own, with any value as its state."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


def made(seed: int = 0, *, width: int = 8, lr: float = 0.1) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(), nn.Linear(width, 1))
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr, momentum=0.9)}


def loader() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), 16 // BATCHES, shuffle=True)


def train(
    objects: dict[str, Any],
    *,
    epochs: int = 2,
    loaders: Iterable[Any] | None = None,
    at_batch: Callable[[TrainingLoop], object] = lambda _: None,
    at_epoch_end: Callable[[TrainingLoop], bool | None] = lambda _: None,
    **options: Any,
) -> TrainingLoop:
    """Train; `at_batch` is called in each batch before its step, and a true value of `at_epoch_end` leaves the loop."""
    loaders = [loader()] if loaders is None else [*loaders]
    with TrainingLoop(**objects, **options) as training:
        for _ in training.epochs(epochs):
            for one in loaders:
                for rows in training.batches(one):
                    loss = (objects["model"](rows) ** 2).mean()
                    at_batch(training)
                    objects["optimizer"].zero_grad()
                    loss.backward()
                    objects["optimizer"].step()
            if at_epoch_end(training):
                break
    return training


def weights(objects: dict[str, Any]) -> list[float]:
    return [float(value) for parameter in objects["model"].parameters() for value in parameter.detach().flatten()]


def fail_at(step: int) -> Callable[[TrainingLoop], None]:
    def fail(training: TrainingLoop) -> None:
        if training.step == step:
            raise RuntimeError("mine")

    return fail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Received no objects. Expected those whose state the training needs"),
        ({"model": 3}, "Received model=3, an object of the class int. Expected an object with `state_dict`"),
        ({"model": nn.Linear(1, 1), "weights_only": "no"}, "Received weights_only='no'. Expected True or False"),
        ({"model": nn.Linear(1, 1), "every_n_train_steps": 0}, "Received every_n_train_steps=0"),
        ({"model": nn.Linear(1, 1), "datasets": ["digits"]}, "Received the dataset name 'digits'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TrackingError, match=message):
        TrainingLoop(**arguments)


def test_a_model_that_is_split_between_ranks(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = fully_shard(nn.Linear(1, 1), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TrackingError, match="Received model, whose part 'weight' is split between the ranks"):
            TrainingLoop(model=model)
    finally:
        distributed.destroy_process_group()


def test_calls_in_the_wrong_place() -> None:
    training = TrainingLoop(**made())
    with pytest.raises(TrackingError, match="Received a call of `epochs` outside the `with` statement"):
        next(training.epochs(1))
    with training:
        with pytest.raises(TrackingError, match=r"Received epochs\(-1\). Expected a whole number"):
            next(training.epochs(-1))
        with pytest.raises(TrackingError, match="Received a call of `batches` outside the loop over the epochs"):
            next(training.batches(loader()))
        with pytest.raises(TrackingError, match="Received mode='best'"):
            training.save_best(1.0, mode="best")  # type: ignore[arg-type]
    with pytest.raises(TrackingError, match="for a second `with` statement"):
        with training:
            pass


def test_batches_of_two_loaders_at_the_same_time() -> None:
    objects = made()
    with pytest.raises(TrackingError, match="for two loaders whose batches are used at the same time"):
        with TrainingLoop(**objects) as training:
            for _ in training.epochs(1):
                for _ in zip(training.batches(loader()), training.batches(loader()), strict=True):
                    objects["optimizer"].step()


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (
            lambda: made() | {"scaler": Value()},
            "Received the objects model, optimizer, scaler. Expected those saved in",
        ),
        (lambda: {"model": made()["model"]}, "Expected those saved in .*: model, optimizer"),
        (lambda: made(width=9), r"model: 0.weight is \(9, 4\), saved as \(8, 4\)"),
        (
            lambda: (one := made()) | {"optimizer": torch.optim.Adam(one["model"].parameters())},
            "optimizer is of the class Adam, saved as SGD",
        ),
        (
            lambda: (
                (one := made()) | {"optimizer": torch.optim.SGD([{"params": p} for p in one["model"].parameters()])}
            ),
            "optimizer: loaded state dict has a different number of parameter groups",
        ),
    ],
    ids=["an extra object", "a missing object", "shapes", "another optimizer", "parameter groups"],
)
def test_objects_that_are_not_those_that_were_saved(outputs: Path, objects: Any, message: str) -> None:
    train(made())
    saved = files_in(outputs / "checkpoints" / "resume")
    forget_trainings()
    with pytest.raises(TrackingError, match=message):
        train(objects())
    assert files_in(outputs / "checkpoints" / "resume") == saved


def test_a_state_that_could_not_be_loaded_is_an_error_at_the_first_save(outputs: Path) -> None:
    with pytest.raises(
        TrackingError, match=r"\['value'\] with a value of the type .*Value. Expected tensors and plain"
    ):
        train(made() | {"own": Value(Value())})
    train(made() | {"own": Value(Value())}, name="trusted", weights_only=False)


def test_a_checkpoint_of_another_framework(outputs: Path) -> None:
    with CheckpointManager(outputs / "checkpoints" / "resume").save(3, 1, suffix=".ckpt") as path:
        torch.save({}, path)
    with pytest.raises(TrackingError, match="which TrainingLoop did not save"):
        train(made())


def test_a_file_that_is_no_state_of_a_loop(outputs: Path) -> None:
    with CheckpointManager(outputs / "checkpoints" / "resume").save(3, 1, suffix=".pt") as path:
        torch.save({"mine": 1}, path)
    with pytest.raises(TrackingError, match="which no TrainingLoop has saved"):
        train(made())


def test_changed_options_of_an_optimizer(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(made(), epochs=1)
    forget_trainings()
    with pytest.raises(TrackingError, match=r"optimizer.0.lr: 0.1 -> 0.2"):
        train(made(lr=0.2), if_changed="raise")
    forget_trainings()
    objects = made(lr=0.2)
    train(objects)
    assert "optimizer.0.lr: 0.1 -> 0.2 (0.1 is used, from the checkpoint)" in caplog.text
    assert objects["optimizer"].param_groups[0]["lr"] == 0.1
    forget_trainings()
    objects = made(lr=0.2)
    assert train(objects, if_changed="restart").step == 2 * BATCHES
    assert objects["optimizer"].param_groups[0]["lr"] == 0.2


def test_a_finished_training_trains_nothing_and_continues_with_more_epochs(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = made()
    train(whole, epochs=4, name="whole")
    first = made()
    train(first, epochs=2)
    forget_trainings()
    again = made(1)
    assert train(again, epochs=2, at_batch=fail_at(2 * BATCHES)).step == 2 * BATCHES
    assert weights(again) == weights(first)
    assert "This training has ended already (epochs(2)): nothing is left to train" in caplog.text
    forget_trainings()
    more = made(1)
    assert train(more, epochs=4).step == 4 * BATCHES
    assert weights(more) == weights(whole)


def test_a_loop_that_was_left_trains_nothing(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = made()
    training = train(first, epochs=9, at_epoch_end=lambda training: training.epoch == 1)
    assert (training.epoch, training.step) == (2, 2 * BATCHES)
    for _ in range(2):
        forget_trainings()
        again = made(1)
        assert train(again, epochs=9, at_batch=fail_at(2 * BATCHES)).epoch == 2
        assert weights(again) == weights(first)
        assert "This training was stopped early, at epoch 2: nothing is left to train" in caplog.text
    forget_trainings()
    assert train(made(1), epochs=10).epoch == 10


@pytest.mark.parametrize(
    ("stop", "options", "kept"),
    [
        pytest.param(None, {}, [3], id="all epochs"),
        pytest.param(2, {}, [2], id="left with break"),
        pytest.param(None, {"max_to_keep": 2}, [2, 3], id="as many as the script says"),
    ],
)
def test_only_the_newest_state_of_a_training_that_has_ended_is_kept(
    outputs: Path, stop: int | None, options: dict[str, Any], kept: list[int]
) -> None:
    train(made(), epochs=3, at_epoch_end=lambda training: training.epoch + 1 == stop, **options)
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert sorted(checkpoint.epoch for checkpoint in saved) == kept


def test_states_of_every_second_epoch_are_kept_for_good(outputs: Path) -> None:
    train(made(), epochs=5, keep_every_n_epochs=2)
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [checkpoint.epoch for checkpoint in saved] == [5, 4, 2]


def test_a_script_that_only_evaluates_keeps_both_states(outputs: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        train(made(), epochs=3, at_batch=fail_at(2 * BATCHES + 1))
    forget_trainings()
    with TrainingLoop(**made()) as training:
        assert training.epoch == 2
    assert len(CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()) == 2


def test_an_epoch_whose_batches_the_script_left(outputs: Path) -> None:
    objects = made()
    with TrainingLoop(**objects) as training:
        for _ in training.epochs(2):
            for rows in itertools.islice(training.batches(loader()), 3):
                objects["model"](rows).sum().backward()
                objects["optimizer"].step()
    assert (training.epoch, training.step) == (2, 6)
    assert newest_position(outputs) == (6, 2)


@pytest.mark.parametrize("step", [2, 6, 14])
def test_several_loaders_in_an_epoch(outputs: Path, step: int) -> None:
    def loaders() -> list[Any]:
        rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(4))
        return [DataLoader(rows, 4, shuffle=True, generator=torch.Generator().manual_seed(one)) for one in (5, 6)]

    whole, seen = made(), []
    train(whole, name="whole", loaders=loaders(), at_batch=lambda training: seen.append(training.step))
    with pytest.raises(RuntimeError, match="mine"):
        train(made(), loaders=loaders(), at_batch=fail_at(step))
    forget_trainings()
    resumed, after = made(1), []
    train(resumed, loaders=loaders(), at_batch=lambda training: after.append(training.step))
    assert after == seen[step:]
    assert weights(resumed) == weights(whole)


def test_a_step_is_a_batch_if_there_is_no_optimizer(outputs: Path) -> None:
    value = Value()
    with pytest.raises(RuntimeError, match="mine"):
        with TrainingLoop(value=value, every_n_train_steps=2) as training:
            for _ in training.epochs(2):
                for one in training.batches([1, 2, 3]):
                    fail_at(4)(training)
                    value.value += one
    assert (training.step, newest_position(outputs)) == (4, (4, 1))
    forget_trainings()
    resumed, seen = Value(), []
    with TrainingLoop(value=resumed) as training:
        for _ in training.epochs(2):
            for one in training.batches([1, 2, 3]):
                resumed.value += one
                seen.append(one)
    assert (resumed.value, seen) == (12, [2, 3])


def test_several_optimizers_are_one_step_a_batch(outputs: Path) -> None:
    objects = made()
    other = torch.optim.Adam(objects["model"].parameters())
    with TrainingLoop(**objects, other=other) as training:
        for _ in training.epochs(1):
            for rows in training.batches(loader()):
                objects["model"](rows).sum().backward()
                objects["optimizer"].step()
                other.step()
    assert training.step == BATCHES


def test_another_model_is_another_training_and_the_same_continues(outputs: Path) -> None:
    first = made()
    with pytest.raises(RuntimeError, match="mine"):
        train(first, at_batch=fail_at(5))
    train(made(1))
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]
    assert train(first).step == 2 * BATCHES
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]
    train(first)  # the next stage of the same model
    assert directories_of_trainings(outputs) == ["resume", "resume-2", "resume-3"]


def test_lazy_layers(outputs: Path) -> None:
    def lazy() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(8), nn.Dropout(), nn.LazyLinear(1))
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}

    whole = lazy()
    train(whole, name="whole")
    train(lazy(), epochs=1)
    forget_trainings()
    resumed = lazy()
    train(resumed)
    assert weights(resumed) == weights(whole)


def test_a_lazy_layer_that_no_batch_has_reached(outputs: Path) -> None:
    def with_unused() -> dict[str, Any]:
        return made() | {"unused": nn.LazyLinear(2)}

    train(with_unused(), epochs=1)
    forget_trainings()
    assert train(with_unused()).step == 2 * BATCHES


def test_nan_does_not_push_out_the_newest_state_without_it(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make_nan(training: TrainingLoop) -> None:
        if training.epoch == 2:
            nn.init.constant_(objects["model"][0].weight, float("nan"))

    objects = made()
    train(objects, epochs=5, at_epoch_end=make_nan)
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [(checkpoint.epoch, checkpoint.has_nan) for checkpoint in saved] == [(5, True), (2, False)]
    assert "hold NaN" in caplog.text


def test_the_best_weights_are_kept_over_restarts(outputs: Path) -> None:
    values = iter([0.5, float("nan"), 0.3, 0.9, 0.2])
    best, at_best = [], []

    def measure(training: TrainingLoop) -> None:
        best.append(training.save_best(torch.tensor(next(values))))
        if best[-1]:
            at_best.append({name: value.clone() for name, value in objects["model"].state_dict().items()})

    objects = made()
    train(objects, epochs=3, at_epoch_end=measure)
    forget_trainings()
    objects = made()
    train(objects, epochs=4, at_epoch_end=measure)
    assert best == [True, False, True, False]
    saved = torch.load(outputs / "checkpoints" / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(saved[name], at_best[-1][name]) for name in saved)
    assert files_in(outputs / "checkpoints") == ["best.pt"]
    with TrainingLoop(**made(), name="highest") as training:
        assert [training.save_best(value, mode="max", filename="high.pt") for value in (1, 2, 0)] == [True, True, False]
        with pytest.raises(TrackingError, match="Received the name"):
            training.save_best(1, filename="../best.pt")
    assert files_in(outputs / "checkpoints" / "highest") == ["high.pt"]
