"""The Keras callback in real fits, within this process, on the backend that KERAS_BACKEND names."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import signal
import sys
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_script import Raise, data, digest, model
from restarts import forget_trainings
from training_scripts import files_in

from polyaxon_keras import PolyaxonCallback
from polyaxon_tracking import CheckpointManager, TrackingError
from polyaxon_tracking.background import wait_for_all

# TensorFlow's shuffling cannot resume where it stopped: its state is inside TensorFlow.
SHUFFLES = keras.backend.backend() != "tensorflow"

KINDS = ["functional", "sequential", "unbuilt", "subclassed"]


class Epochs(keras.callbacks.Callback):
    """The epochs that were trained, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.trained.append(epoch)


class Interrupt(keras.callbacks.Callback):
    """Raise in the middle of training."""

    def __init__(self, epoch: int, batch: int = 1) -> None:
        super().__init__()
        self.at = (epoch, batch)
        self.epoch = -1

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        if (self.epoch, batch) == self.at:
            raise RuntimeError("interrupted")


class Score(keras.callbacks.Callback):
    """A metric whose value at the end of each epoch is given."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = scores

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        logs["score"] = self.scores[epoch]


def fit(
    *callbacks: keras.callbacks.Callback,
    network: keras.Model | None = None,
    epochs: int = 3,
    same_process: bool = False,
    **options: Any,
) -> list[int]:
    """Train with four batches an epoch, as a script that is started again would; return the epochs that were trained."""
    if not same_process:
        forget_trainings()
    x, y = data()
    seen = Epochs()
    options = {"batch_size": 18, "validation_data": (x, y), "verbose": 0, **options}
    (network or model()).fit(x, y, epochs=epochs, callbacks=[*callbacks, seen], **options)
    return seen.trained


def state(step: int, epoch: int, start: int = 1) -> str:
    return f"step={step:010d}-epoch={epoch}-start={start}.weights.h5"


# The model's own file


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "model.keras"),
        ({"save_best_only": True}, "best.keras"),
        ({"save_weights_only": True}, "model.weights.h5"),
        ({"save_best_only": True, "save_weights_only": True}, "best.weights.h5"),
        ({"filepath": "mine/{epoch:02d}.keras"}, "mine/01.keras"),
        ({"filepath": "{epoch}-{loss:.0f}.weights.h5", "save_weights_only": True}, "1-[0-9].weights.h5"),
    ],
    ids=["default", "best", "weights", "best weights", "in a directory", "with a metric"],
)
def test_the_model_is_saved_below_the_outputs_path(outputs: Path, options: dict[str, Any], name: str) -> None:
    fit(PolyaxonCallback(**options), network=model("functional"), epochs=1)
    [saved] = (outputs / "checkpoints").glob(name)
    other = model("functional")
    other.load_weights(saved)
    assert not list(outputs.rglob(".staging-*"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_can_be_loaded_as_a_whole(outputs: Path, kind: str) -> None:
    network = model(kind)
    fit(PolyaxonCallback(), network=network, epochs=1)
    loaded = keras.saving.load_model(outputs / "checkpoints" / "model.keras")
    assert digest(loaded) == digest(network)


def test_only_the_best_is_kept(outputs: Path) -> None:
    fit(Score(0.5, 0.9, 0.1), PolyaxonCallback("best-{epoch}.keras", monitor="score", mode="max", save_best_only=True))
    assert files_in(outputs / "checkpoints") == ["best-1.keras", "best-2.keras"]


def test_the_model_is_saved_every_so_many_batches(outputs: Path) -> None:
    fit(PolyaxonCallback("{epoch}-{batch}.keras", save_freq=3), epochs=2)
    assert files_in(outputs / "checkpoints") == ["1-3.keras", "2-2.keras"]


def test_an_absolute_path_outside_the_outputs_path_is_kept_with_a_warning(
    outputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(PolyaxonCallback(tmp_path / "mine.keras"), epochs=1)
    assert (tmp_path / "mine.keras").is_file()
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        f"Checkpoints go to {tmp_path}/mine.keras, outside the outputs path {outputs}, and may be lost with the pod. Leave the path out, or choose one below it"
    )


@pytest.mark.parametrize("filepath", ["../up.keras", "a/../../up.keras"])
def test_a_file_that_would_climb_out_is_refused(outputs: Path, filepath: str) -> None:
    with pytest.raises(TrackingError, match="Expected a relative name that stays below it"):
        PolyaxonCallback(filepath)


def test_a_suffix_that_keras_refuses_is_refused_before_training(outputs: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in `\.keras`"):
        PolyaxonCallback("model")


# The training state


@pytest.mark.parametrize("max_to_keep", [1, 2, 3])
def test_the_newest_training_states_stay(outputs: Path, max_to_keep: int) -> None:
    fit(PolyaxonCallback(max_to_keep=max_to_keep), epochs=4)
    states = [state(4 * epoch, epoch) for epoch in (1, 2, 3, 4)]
    assert files_in(outputs / "checkpoints" / "resume") == states[-max_to_keep:]


def test_training_states_are_saved_within_an_epoch_where_asked(outputs: Path) -> None:
    fit(PolyaxonCallback(every_n_train_steps=3, max_to_keep=9), epochs=2)
    assert files_in(outputs / "checkpoints" / "resume") == [state(3, 0), state(4, 1), state(6, 1), state(8, 2)]


def test_training_states_are_saved_by_time_where_asked(outputs: Path) -> None:
    fit(PolyaxonCallback(train_time_interval=timedelta(microseconds=1), max_to_keep=9), epochs=1)
    assert len(files_in(outputs / "checkpoints" / "resume")) == 5  # after each of four batches, and the epoch


def test_steps_are_batches_also_where_several_are_executed_at_once(outputs: Path) -> None:
    at_once = 1 if keras.backend.backend() == "torch" else 2  # Keras does not execute several at once with torch
    fit(PolyaxonCallback(every_n_train_steps=2, max_to_keep=9), network=model(steps_per_execution=at_once), epochs=2)
    saved = files_in(outputs / "checkpoints" / "resume")
    assert saved == [state(2, 0), state(4, 0), state(4, 1), state(6, 1), state(8, 1), state(8, 2)]


def test_a_multiple_of_steps_that_is_passed_over_saves_at_the_end_of_its_batches(outputs: Path) -> None:
    at_once = 1 if keras.backend.backend() == "torch" else 2
    for epochs in (1, 2):  # the second resumes from step 4, which is no multiple
        network = model(
            optimizer=keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), steps_per_execution=at_once
        )
        assert fit(PolyaxonCallback(every_n_train_steps=3, max_to_keep=9), network=network, epochs=epochs) == [
            epochs - 1
        ]
    first = state(3 if at_once == 1 else 4, 0)
    assert files_in(outputs / "checkpoints" / "resume") == [first, state(4, 1), state(6, 1), state(8, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_in_a_run_resumes_where_the_last_one_was_interrupted(
    outputs: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(PolyaxonCallback(), Interrupt(epoch=2), network=model(kind))
    wait_for_all()
    [saved] = (outputs / "checkpoints" / "resume").glob("step=0000000008-epoch=2-*")
    caplog.clear()
    network = model(kind)
    assert fit(PolyaxonCallback(), network=network) == [2]
    assert f"Resuming from {saved}: epoch 2, step 8" in caplog.messages
    assert int(network.optimizer.iterations) == 12


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_a_save_that_fails_after_an_exception_is_one_line(
    outputs: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "excepthook", lambda *_: None)  # the callback puts its own on top
    with pytest.raises(RuntimeError, match="interrupted") as raised:
        fit(PolyaxonCallback(background=background), Interrupt(epoch=1, batch=2))
    wait_for_all()
    monkeypatch.setattr("polyaxon_keras.training_state.save", full)
    sys.excepthook(raised.type, raised.value, raised.tb)
    message = caplog.messages[-1]
    assert message.startswith(
        "The state after step 6 was not saved; the previous checkpoint is untouched: OSError: [Errno 28] "
    )
    assert "No space left on device. " in message
    assert caplog.records[-1].exc_info is None
    assert files_in(outputs / "checkpoints" / "resume") == [state(4, 1)]


@pytest.mark.parametrize(
    "compiled",
    [
        {"run_eagerly": True},
        {"optimizer": "sgd"},
        {"optimizer": keras.optimizers.SGD(momentum=0.9)},
        {"metrics": ["accuracy"]},
    ],
    ids=["eager", "no optimizer state", "momentum", "metrics"],
)
def test_however_the_model_is_compiled(outputs: Path, compiled: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(PolyaxonCallback(), Interrupt(epoch=1), network=model(**_copied(compiled)))
    assert fit(PolyaxonCallback(), network=model(**_copied(compiled)), epochs=2) == [1]


def _copied(compiled: dict[str, Any]) -> dict[str, Any]:
    optimizer = compiled.get("optimizer")
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return {**compiled, "optimizer": type(optimizer).from_config(optimizer.get_config())}
    return compiled


def test_a_model_of_several_inputs_that_only_fit_builds(outputs: Path) -> None:
    class Sum(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = keras.layers.Dense(2), keras.layers.Dense(2)

        def call(self, inputs: dict[str, Any]) -> Any:
            return self.left(inputs["left"]) + self.right(inputs["right"])

    def train(epochs: int) -> int:
        x, y = data()
        network = Sum()
        network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        network.fit(
            {"left": x, "right": x[:, :2]},
            y,
            epochs=epochs,
            verbose=0,
            callbacks=[PolyaxonCallback("w.weights.h5", save_weights_only=True)],
        )
        return int(network.optimizer.iterations)

    assert train(1) == 3
    assert train(2) == 6


def test_the_best_value_survives(outputs: Path) -> None:
    def best() -> PolyaxonCallback:
        return PolyaxonCallback("best-{epoch}.keras", monitor="score", mode="max", save_best_only=True)

    fit(Score(0.5, 0.9), best(), epochs=2)
    fit(Score(0.0, 0.0, 0.7, 0.95), best(), epochs=4)
    assert files_in(outputs / "checkpoints") == ["best-1.keras", "best-2.keras", "best-4.keras"]


def test_callbacks_that_keras_resets_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and resumed, they stop and reduce the learning rate when an uninterrupted training does."""
    scores = (0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.9, 0.9)

    def train(*, interrupted: bool) -> tuple[list[int], dict[str, Any], dict[str, Any], float, str]:
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / str(interrupted)))
        trained: list[int] = []
        for stop_at in (1, 3, None) if interrupted else (None,):
            keras.utils.set_random_seed(0 if stop_at in (1, None) and not trained else 7)
            stopping = keras.callbacks.EarlyStopping("score", mode="max", patience=3, restore_best_weights=True)
            reducing = keras.callbacks.ReduceLROnPlateau("score", mode="max", patience=2, factor=0.5)
            others = [Score(*scores), stopping, reducing]
            network = model()
            if stop_at is not None:
                others.append(Interrupt(epoch=stop_at))
                with pytest.raises(RuntimeError, match="interrupted"):
                    fit(
                        PolyaxonCallback(restore=[stopping, reducing]),
                        *others,
                        network=network,
                        epochs=8,
                        shuffle=SHUFFLES,
                    )
            else:
                trained += fit(
                    PolyaxonCallback(restore=[stopping, reducing]), *others, network=network, epochs=8, shuffle=SHUFFLES
                )
        names = ("wait", "best", "stopped_epoch", "best_epoch")
        state = {name: getattr(stopping, name) for name in names}
        reduced = {name: getattr(reducing, name) for name in ("wait", "best", "cooldown_counter")}
        return trained, state, reduced, float(network.optimizer.learning_rate), digest(network)

    whole, resumed = train(interrupted=False), train(interrupted=True)
    assert whole[0] == [0, 1, 2, 3, 4]
    assert resumed[0] == [3, 4]
    assert resumed[1:] == whole[1:]


def test_a_training_that_stopped_early_stays_stopped(outputs: Path) -> None:
    def train() -> list[int]:
        stopping = keras.callbacks.EarlyStopping("score", mode="max", patience=1)
        return fit(PolyaxonCallback(), Score(0.9, 0.1, 0.1, 0.1), stopping, epochs=4)

    assert train() == [0, 1]
    assert train() == []


class Limit(keras.callbacks.Callback):
    """A time limit, which stops every start after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.batches -= 1
        if self.batches == 0:
            self.model.stop_training = True


@pytest.mark.parametrize(
    ("batches", "epochs"), [(4, [[0], [1], [2]]), (6, [[0, 1], [1, 2], [2]])], ids=["at the end of an epoch", "within"]
)
def test_a_training_that_a_time_limit_ended_continues_at_the_next_start(
    outputs: Path, batches: int, epochs: list[list[int]]
) -> None:
    """Check that an epoch that was left unfinished starts over."""
    assert [fit(PolyaxonCallback(), Limit(batches)) for _ in range(3)] == epochs
    assert fit(PolyaxonCallback()) == []


@pytest.mark.parametrize(
    ("others", "epochs", "kept"),
    [
        pytest.param([], 3, [(12, 3)], id="all epochs"),
        pytest.param(
            [keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=2)], 9, [(12, 9)], id="stopped early"
        ),
        pytest.param([Limit(8)], 3, [(4, 1), (8, 2)], id="a time limit, so not ended"),
        pytest.param([Limit(10)], 3, [(8, 2), (10, 2)], id="a time limit in the last epoch"),
    ],
)
def test_only_the_newest_state_of_a_training_that_has_ended_is_kept(
    outputs: Path, others: list[keras.callbacks.Callback], epochs: int, kept: list[tuple[int, int]]
) -> None:
    fit(PolyaxonCallback(), *others, epochs=epochs)
    assert files_in(outputs / "checkpoints" / "resume") == [state(step, epoch) for step, epoch in kept]


def test_states_of_every_second_epoch_are_kept_for_good(outputs: Path) -> None:
    fit(PolyaxonCallback(keep_every_n_epochs=2), epochs=5)
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [checkpoint.epoch for checkpoint in saved] == [5, 4, 2]


class Counter(keras.callbacks.Callback):
    """A user's callback: an option that it never changes, one that it counts down, and what it has found."""

    def __init__(self, patience: int, left: int = 10) -> None:
        super().__init__()
        self.patience = patience
        self.left = left
        self.losses: list[Any] = []
        self.best: dict[str, Any] = {"at": None, "weights": []}
        self.pairs: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.left -= 1
        self.losses.append(np.float64((logs or {})["loss"]))
        self.best = {"at": epoch, "weights": [np.full(3, epoch)]}
        self.pairs.append((epoch, self.left))


def test_a_restored_callback_keeps_the_options_of_the_script(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, stopping = Counter(patience=3), keras.callbacks.EarlyStopping("loss", patience=3)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(PolyaxonCallback(restore=[before, stopping]), before, stopping, Interrupt(epoch=1))
    losses = before.losses[:1]
    assert "Not restored when this training resumes: Counter.pairs. Only numbers, strings, arrays" in caplog.text
    after, stopping = Counter(patience=30), keras.callbacks.EarlyStopping("loss", patience=30)
    best: list[Any] = []
    restored = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: best.append((after.left, after.best)))
    fit(PolyaxonCallback(restore=[after, stopping]), after, stopping, restored)
    assert (after.patience, stopping.patience) == (30, 30)
    assert after.left == 7
    assert after.losses[:1] == losses
    assert len(after.losses) == 3
    assert best[0][0] == 9
    assert best[0][1]["at"] == 0
    assert [weights.tolist() for weights in best[0][1]["weights"]] == [[0, 0, 0]]


def test_a_callback_to_restore_that_was_not_saved(outputs: Path) -> None:
    fit(PolyaxonCallback(), epochs=1)
    stopping = keras.callbacks.EarlyStopping("loss")
    with pytest.raises(TrackingError, match=r"Received 1 callbacks to restore, while .* holds the state of 0\."):
        fit(PolyaxonCallback(restore=[stopping]), stopping, epochs=2)


def test_what_is_no_callback_cannot_be_restored(outputs: Path) -> None:
    stopping = keras.callbacks.EarlyStopping()
    for wrong in (["early_stopping"], None, stopping, "early_stopping", [stopping, None]):
        with pytest.raises(TrackingError) as error:
            PolyaxonCallback(restore=wrong)
        shown = "[None]" if isinstance(wrong, list) and stopping in wrong else repr(wrong)
        assert str(error.value) == (
            f"Received restore={shown}. Expected a list of callbacks that `fit` is given too, such as restore=[early_stopping]."
        )
    with pytest.raises(TrackingError, match=r"^Received filepath=3\. Expected a path or a URL\."):
        PolyaxonCallback(3)


def test_off_the_cluster_training_starts_from_scratch_unless_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = tmp_path / "outputs"
    start = f"POLYAXON_RUN_OUTPUTS_PATH is not set: outputs go to {outputs}/version_"
    assert fit(PolyaxonCallback(), epochs=1) == [0]
    assert files_in(outputs / "version_0" / "checkpoints" / "resume") == [state(4, 1)]
    assert f"{start}0" in caplog.messages
    assert fit(PolyaxonCallback(), epochs=2) == [0, 1]
    assert f"{start}1; resume=True would use version_0" in caplog.messages
    assert fit(PolyaxonCallback(resume=True), epochs=3) == [2]
    assert f"{start}1, the newest with checkpoints" in caplog.messages
    assert files_in(outputs / "version_0" / "checkpoints" / "resume") == [state(4, 1)]


def test_off_the_cluster_a_worse_model_does_not_overwrite_the_best_of_another_start(tmp_path: Path) -> None:
    fit(PolyaxonCallback(save_best_only=True), epochs=1)
    best = tmp_path / "outputs" / "version_0" / "checkpoints" / "best.keras"
    before = best.read_bytes()
    worse = PolyaxonCallback(save_best_only=True)
    fit(worse, epochs=1)
    assert Path(worse.filepath) == tmp_path / "outputs" / "version_1" / "checkpoints" / "best.keras"
    assert Path(worse.filepath).exists()
    assert best.read_bytes() == before


def test_resume_false_starts_from_scratch_and_its_states_are_the_newest_from_then_on(outputs: Path) -> None:
    fit(PolyaxonCallback())
    assert fit(PolyaxonCallback(resume=False), epochs=4, batch_size=72) == [0, 1, 2, 3]
    assert files_in(outputs / "checkpoints" / "resume") == [state(4, 4, start=2), state(12, 3)]


def test_a_finished_training_does_nothing_when_started_again(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, again = model(), model()
    fit(PolyaxonCallback(), network=network)
    assert fit(PolyaxonCallback(), network=again) == []
    assert digest(again) == digest(network)
    # Another model in the same process is another training.
    assert fit(PolyaxonCallback(), same_process=True) == [0, 1, 2]
    assert {path.name for path in (outputs / "checkpoints").iterdir() if path.is_dir()} == {"resume", "resume-2"}


def test_a_second_fit_of_one_model_continues_in_memory(outputs: Path) -> None:
    polyaxon, network = PolyaxonCallback(), model()
    assert fit(polyaxon, network=network, epochs=2, same_process=True) == [0, 1]
    assert fit(polyaxon, network=network, epochs=3, same_process=True) == [0, 1, 2]
    assert fit(polyaxon, network=network, epochs=5, initial_epoch=3, same_process=True) == [3, 4]
    assert int(network.optimizer.iterations) == 4 * (2 + 3 + 2)


def test_a_training_in_three_parts_has_the_weights_of_one_in_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for stops in ([6], [2, 4, 6]):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / str(len(stops))))
        for stop in stops:
            keras.utils.set_random_seed(0 if stop == stops[0] else stop)
            network = model()
            fit(PolyaxonCallback(), network=network, epochs=stop, shuffle=SHUFFLES)
        digests.append(digest(network))
    assert digests[0] == digests[1]


def test_an_outputs_path_with_braces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "a {x} b"))
    fit(PolyaxonCallback("{epoch}.keras"), epochs=1)
    assert files_in(tmp_path / "a {x} b" / "checkpoints") == ["1.keras"]


def test_steps_are_those_of_the_optimizer_where_the_last_batches_of_an_epoch_are_fewer(outputs: Path) -> None:
    network = model(steps_per_execution=1 if keras.backend.backend() == "torch" else 3)
    fit(PolyaxonCallback(max_to_keep=2), network=network, epochs=2)
    assert files_in(outputs / "checkpoints" / "resume") == [state(4, 1), state(8, 2)]
    assert int(network.optimizer.iterations) == 8


# Mistakes


def test_what_another_framework_saved_is_refused(outputs: Path) -> None:
    with CheckpointManager(outputs / "checkpoints" / "resume").save(4, 1, suffix=".ckpt") as path:
        Path(path).write_text("Lightning")
    with pytest.raises(TrackingError, match=r"\.ckpt, which Keras did not save\. Expected an outputs path"):
        fit(PolyaxonCallback())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_shape_changed(outputs: Path, kind: str) -> None:
    fit(PolyaxonCallback(), network=model(kind), epochs=1)
    [saved] = (outputs / "checkpoints" / "resume").iterdir()
    network = model(kind, width=16)
    with pytest.raises(TrackingError) as error:
        fit(PolyaxonCallback(), network=network, epochs=2)
    kernel, bias, out, _ = [weight.path for weight in network.weights]
    assert str(error.value) == (
        f"Received a model that is not the one saved in {saved}. Expected the same layers, shapes and optimizer. Undo the "
        f"change, pass resume=False to start from scratch, or use another outputs path; the checkpoint "
        f"stays as it is. What differs: {kernel} is (4, 16), saved as (4, 8); {bias} is (16,), saved as (8,); {out} is "
        f"(16, 2), saved as (8, 2)."
    )
    assert saved.is_file()


def test_another_optimizer_is_refused_where_keras_would_continue_without_its_state(outputs: Path) -> None:
    fit(PolyaxonCallback(), epochs=1)
    with pytest.raises(TrackingError, match="its optimizer is SGD with 2 variables, saved was Adam with 10 variables"):
        fit(PolyaxonCallback(), network=model(optimizer="sgd"), epochs=2)


def test_only_damaged_states_left(outputs: Path) -> None:
    fit(PolyaxonCallback(), epochs=1)
    [saved] = (outputs / "checkpoints" / "resume").iterdir()
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(TrackingError, match=r"Received only damaged checkpoints in .*its bytes have the CRC-32"):
        fit(PolyaxonCallback(), epochs=2)


def test_arguments_out_of_range(wrong_argument: tuple[dict[str, Any], str]) -> None:
    options, message = wrong_argument
    with pytest.raises(TrackingError) as error:
        PolyaxonCallback(**options)
    assert str(error.value) == message


def test_a_mount_on_which_keras_cannot_write_is_refused_before_training(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 and zip files are changed in place; no file system without that can be made here, so a call of the system fails."""

    def lseek(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "lseek", lseek)
    with pytest.raises(TrackingError, match="in which a file cannot be changed while it is being written"):
        PolyaxonCallback()


# Levels and datasets


def test_the_loggers_levels_follow_the_run(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_LOG_LEVEL", "error")
    torch_before = logging.getLogger("torch").level
    PolyaxonCallback(loggers=["mine"])
    for name in ("keras", "absl", "tensorflow", "jax", "polyaxon_tracking", "mine"):
        assert logging.getLogger(name).level == logging.ERROR
    assert logging.getLogger("torch").level == torch_before  # which would log its compiler's work at INFO


def test_datasets_by_name(outputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYAXON_RUN_DATA_PATHS", json.dumps({"digits": str(tmp_path)}))
    assert PolyaxonCallback(datasets=["digits"]).data_path("digits") == str(tmp_path)
    with pytest.raises(TrackingError) as error:
        PolyaxonCallback(datasets={"digit": "data/digits"})
    assert str(error.value) == (
        "Received the dataset name 'digit'. Expected one of those in POLYAXON_RUN_DATA_PATHS: 'digits'. Did you mean 'digits'?"
    )


# The private names of Keras that are used


def test_keras_still_saves_through_the_method_that_is_stood_in_for(outputs: Path) -> None:
    calls = []

    class Seen(PolyaxonCallback):
        def _save_model(self, *arguments: Any, **named: Any) -> None:
            calls.append(arguments or named)

    fit(Seen(), epochs=1)
    assert len(calls) == 1


def test_fit_still_begins_with_the_attribute_that_is_set() -> None:
    network = model()

    class Begin(keras.callbacks.Callback):
        def on_train_begin(self, logs: object = None) -> None:
            self.model._initial_epoch = 2

    assert fit(Begin(), network=network) == [2]
    assert np.isfinite(network.get_weights()[0]).all()


def test_models_go_when_their_trainings_are_over(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # without those of trainings in other tests

    def train(*callbacks: keras.callbacks.Callback) -> weakref.ref[keras.Model]:
        network = model()
        with contextlib.suppress(RuntimeError):
            fit(PolyaxonCallback(), *callbacks, network=network, same_process=True)
        return weakref.ref(network)

    # Two that fail, and one that is tried in their place.
    models = [train(Interrupt(epoch=1)), train(Interrupt(epoch=1)), train()]
    gc.collect()
    assert [one() for one in models] == [None] * 3
    assert sys.excepthook is sys.__excepthook__


def test_a_training_within_another_leaves_its_hooks(outputs: Path) -> None:
    class Teacher(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            before = sys.excepthook, signal.getsignal(signal.SIGTERM)
            fit(PolyaxonCallback(), epochs=1, same_process=True)
            assert (sys.excepthook, signal.getsignal(signal.SIGTERM)) == before

    fit(PolyaxonCallback(), Teacher(), epochs=1)


@pytest.mark.parametrize(
    ("hook", "restored"),
    [("on_train_batch_begin", False), ("on_epoch_begin", True), ("on_test_begin", False), (None, True)],
)
def test_fit_returns_the_history_of_all_epochs(hook: str | None, restored: bool) -> None:
    def start(*others: keras.callbacks.Callback, name: str) -> dict[str, Any]:
        forget_trainings()
        stopping = keras.callbacks.EarlyStopping("loss", patience=9)
        polyaxon = PolyaxonCallback(
            resume=True, name=name, every_n_train_steps=2, restore=[stopping] if restored else []
        )
        network = model("functional")
        history = network.fit(
            *data(),
            epochs=3,
            validation_data=data(),
            validation_freq=2,
            verbose=0,
            callbacks=[polyaxon, stopping, *others],
        )
        assert network.history is history
        return {"epoch": history.epoch, **history.history}

    keras.utils.set_random_seed(0)
    uninterrupted = start(name="uninterrupted")
    assert {name: len(values) for name, values in uninterrupted.items()} == {"epoch": 3, "loss": 3, "val_loss": 1}
    keras.utils.set_random_seed(0)
    if hook is not None:
        with pytest.raises(RuntimeError, match="mine"):
            start(Raise(hook), name="interrupted")
    for _ in range(2):  # at the second start nothing is left to train
        assert start(name="interrupted") == uninterrupted


class NaNAt(keras.callbacks.Callback):
    """Makes the weights NaN at the end of an epoch, as a loss that is NaN does."""

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        if epoch == 2:
            for weight in self.model.trainable_weights:
                weight.assign(np.full(weight.shape, np.nan))


@pytest.mark.parametrize("background", [True, False])
def test_nan_does_not_push_out_the_newest_state_without_it(
    outputs: Path, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def start(epochs: int, *others: keras.callbacks.Callback) -> None:
        forget_trainings()
        polyaxon = PolyaxonCallback(resume=True, background=background)
        model("functional").fit(*data(), epochs=epochs, verbose=0, callbacks=[polyaxon, *others])

    start(5, NaNAt())
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [(checkpoint.epoch, checkpoint.has_nan) for checkpoint in saved] == [(5, True), (2, False)]
    caplog.clear()
    start(6)
    assert (
        f"To resume from the newest checkpoint without NaN, {saved[1].source}, move the newer ones away" in caplog.text
    )
    for checkpoint in CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()[:-1]:
        Path(checkpoint.path).unlink()
    caplog.clear()
    start(3)
    assert "epoch 2, step" in caplog.text
    assert "NaN" not in caplog.text
