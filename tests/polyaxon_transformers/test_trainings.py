"""Trainings of Hugging Face's Trainer in one process: ends, restarts, other callbacks, folders, signals."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from training_scripts import newest_position
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers_script import QUIET, digest, tiny, trainer

from polyaxon_tracking import CheckpointManager, TrackingError
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable


class At(TrainerCallback):
    """Call a function after a step, and keep the steps that are done."""

    def __init__(self, step: int | None = None, does: Callable[[Any], None] = lambda control: None) -> None:
        self.step, self.does = step, does
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)
        if state.global_step == self.step:
            self.does(control)


def kill(control: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop(control: Any) -> None:
    control.should_training_stop = True


def fail(control: Any) -> None:
    raise ArithmeticError("in the user's code")


def folders(outputs: Path, name: str = "bert") -> set[str]:
    return {path.name for path in (outputs / "checkpoints" / name).glob("checkpoint-*")}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_steps": 6}, id="steps"),
        pytest.param({"num_train_epochs": 1.5}, id="half an epoch"),
        pytest.param({"num_train_epochs": 2}, id="epochs"),
        pytest.param(
            {
                "num_train_epochs": 6,
                "stops": True,
                "save_strategy": "steps",
                "save_steps": 3,
                "load_best_model_at_end": True,
            },
            id="stopped in an epoch",
        ),
    ],
)
def test_a_training_that_had_ended_trains_no_step_more(
    outputs: Path, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None], options: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO)
    stops = options.pop("stops", False)
    settings = {**QUIET, "eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "constant"} | options
    ends = []
    for _ in range(3):
        new_process()
        done = At()
        stopping = [EarlyStoppingCallback(1, early_stopping_threshold=1e9)] if stops else []
        training = trainer(PolyaxonCallback(), *stopping, done, **settings)
        training.train()
        ends.append((training.state.global_step, digest(training.model)))
        assert done.steps == (list(range(1, ends[0][0] + 1)) if len(ends) == 1 else [])
    assert len(set(ends)) == 1
    assert ends[0][0] == (8 if options.get("num_train_epochs") == 2 else 6)
    assert newest_position(outputs) == (ends[0][0], ends[0][0] // 4)
    assert caplog.text.count("nothing is left") == 2


@pytest.mark.parametrize("limit", [4, 6], ids=["at the end of an epoch", "within an epoch"])
def test_a_training_that_a_time_limit_ended_continues_at_the_next_start(
    outputs: Path, new_process: Callable[[], None], limit: int
) -> None:
    class Limit(TrainerCallback):
        def __init__(self) -> None:
            self.left = limit

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            control.should_training_stop = self.left == 0

    steps = []
    for _ in range(12 // limit):
        new_process()
        done = At()
        trainer(PolyaxonCallback(), Limit(), done, **QUIET | {"num_train_epochs": 3}).train()
        steps += done.steps
    assert steps == list(range(1, 13))


@pytest.mark.parametrize(
    ("make_others", "options", "kept"),
    [
        pytest.param(list, {"num_train_epochs": 3}, [12], id="all epochs"),
        pytest.param(list, {"max_steps": 6}, [6], id="all steps"),
        pytest.param(
            lambda: [EarlyStoppingCallback(1, early_stopping_threshold=1e9)],
            {"num_train_epochs": 6, "load_best_model_at_end": True},
            [8],
            id="stopped early",
        ),
        pytest.param(lambda: [At(8, stop)], {"num_train_epochs": 3}, [4, 8], id="a time limit, so not ended"),
    ],
)
def test_only_the_newest_state_of_a_training_that_has_ended_is_kept(
    outputs: Path, make_others: Callable[[], list[TrainerCallback]], options: dict[str, Any], kept: list[int]
) -> None:
    settings = {**QUIET, "eval_strategy": "epoch", "save_strategy": "epoch"} | options
    trainer(PolyaxonCallback(), *make_others(), **settings).train()
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert sorted(checkpoint.step for checkpoint in saved) == kept


def test_states_of_every_second_epoch_are_kept_for_good(outputs: Path) -> None:
    trainer(PolyaxonCallback(keep_every_n_epochs=2), num_train_epochs=5).train()
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [checkpoint.epoch for checkpoint in saved] == [5, 4, 2]


def test_folders_of_a_training_before_are_the_oldest(outputs: Path, new_process: Callable[[], None]) -> None:
    """Train from scratch on the same outputs: the second training must not lose each folder as soon as it is saved."""
    trainer(PolyaxonCallback(), num_train_epochs=5, load_best_model_at_end=False).train()
    assert folders(outputs) == {"checkpoint-16", "checkpoint-20"}
    new_process()
    with pytest.raises(ArithmeticError):
        trainer(PolyaxonCallback(resume=False), At(14, fail), load_best_model_at_end=False).train()
    assert folders(outputs) == {"checkpoint-8", "checkpoint-12"}


def test_save_total_limit_keeps_what_the_trainer_keeps_and_the_best_of_the_newest_state_in_addition(
    outputs: Path,
) -> None:
    class Best(TrainerCallback):
        """The first evaluation is the best, and then the third."""

        def __init__(self) -> None:
            self.kept: dict[int, set[str]] = {}

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            metrics["eval_loss"] = {3: 1.0, 6: 2.0, 9: 0.5}.get(state.global_step, 3.0)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.kept[state.global_step] = {path.name for path in Path(args.output_dir).glob("checkpoint-*")}

    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    ours, natively = Best(), Best()
    trainer(PolyaxonCallback(), ours, num_train_epochs=4, **options).train()
    trainer(natively, num_train_epochs=4, output_dir="native", **options).train()
    assert natively.kept[9] == {"checkpoint-6", "checkpoint-9"}
    assert ours.kept[9] == {"checkpoint-3"} | natively.kept[9]  # the state of step 8 would load it
    assert ours.kept[12] == {"checkpoint-3"} | natively.kept[12]
    assert folders(outputs) == {path.name for path in Path("native").glob("checkpoint-*")}


def test_on_save_finds_the_folder_and_what_is_put_there_stays(outputs: Path) -> None:
    found = []

    class Reads(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            found.append((folder / "trainer_state.json").exists())
            (folder / "mine.txt").write_text("read_metadata")

    trainer(PolyaxonCallback(), Reads(), num_train_epochs=3, save_total_limit=9).train()
    assert found == [True, True, True]
    assert len(list((outputs / "checkpoints" / "bert").glob("*/mine.txt"))) == 3


def test_the_best_is_found_again_where_the_outputs_were_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    class FirstIsBest(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)

    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "here"))
    with pytest.raises(ArithmeticError):
        trainer(PolyaxonCallback(), FirstIsBest(), At(14, fail), num_train_epochs=4).train()
    (tmp_path / "here").rename(tmp_path / "there")
    new_process()
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "there"))
    training = trainer(PolyaxonCallback(), FirstIsBest(), num_train_epochs=4)
    training.train()
    best = tmp_path / "there" / "checkpoints" / "bert" / "checkpoint-4"
    assert training.state.best_model_checkpoint == str(best)
    assert digest(training.model) == digest(type(training.model).from_pretrained(best))


def test_folds_with_one_output_dir_keep_their_best_models(outputs: Path, new_process: Callable[[], None]) -> None:
    def folds(dies_in: int | None = None) -> list[str]:
        ends = []
        for fold in range(2):
            set_seed(fold)
            training = trainer(PolyaxonCallback(), At(10, fail if fold == dies_in else print), num_train_epochs=3)
            training.train()
            ends.append(digest(training.model))
        return ends

    with pytest.raises(ArithmeticError):
        folds(dies_in=1)
    new_process()
    again = folds()
    assert len(set(again)) == 2
    assert {path.name for path in (outputs / "checkpoints").iterdir()} == {"bert", "bert-2", "resume", "resume-2"}
    new_process()
    assert folds() == again


@pytest.mark.parametrize("step", [5, 6, 7, 8])
def test_a_signal_at_a_step_with_an_evaluation_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None], step: int
) -> None:
    ends = {}
    for name, steps in (("uninterrupted", [None]), ("preempted", [step, None])):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / name))
        for at in steps:
            new_process()
            set_seed(0)
            training = trainer(PolyaxonCallback(), At(at, kill), **{**QUIET, "eval_strategy": "steps", "eval_steps": 3})
            if at:
                with pytest.raises(SystemExit) as ended:
                    training.train()
                assert ended.value.code == 143
            else:
                training.train()
        ends[name] = digest(training.model), [entry.get("eval_loss") for entry in training.state.log_history[:-1]]
    assert ends["preempted"] == ends["uninterrupted"]


@pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.3"), reason="the Trainer has no method for an epoch", strict=True
)
def test_an_evaluation_that_is_made_up_for_may_end_training(outputs: Path, new_process: Callable[[], None]) -> None:
    class Mine(TrainerCallback):
        """One that needs its own hooks in their order."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.evaluations = 0

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.evaluations += 1
            control.should_training_stop = state.global_step == 8

    class Asks(Trainer):
        def evaluate(self, *arguments: Any, ignore_keys: list[str] | None = None, **options: Any) -> dict[str, float]:
            asked.append(ignore_keys)
            return super().evaluate(*arguments, ignore_keys=ignore_keys, **options)

    asked: list[list[str] | None] = []
    done = At(8, kill)
    first = trainer(PolyaxonCallback(), Mine(), done, made_by=Asks)
    with pytest.raises(SystemExit):
        first.train(ignore_keys_for_eval=["hidden_states"])
    new_process()
    mine, done = Mine(), At()
    second = trainer(PolyaxonCallback(), mine, done, made_by=Asks)
    second.train(ignore_keys_for_eval=["hidden_states"])
    assert (done.steps, mine.evaluations, second.state.global_step) == ([], 1, 8)
    assert asked == [["hidden_states"]] * 2


def test_callbacks_resume_with_what_the_script_gives_them_now(outputs: Path, new_process: Callable[[], None]) -> None:
    class NeverBetter(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            metrics["eval_loss"] = 1.0

    with pytest.raises(ArithmeticError):
        trainer(PolyaxonCallback(), NeverBetter(), EarlyStoppingCallback(3), At(13, fail)).train()
    new_process()
    stopping = EarlyStoppingCallback(4)
    training = trainer(PolyaxonCallback(), NeverBetter(), stopping)
    training.train()
    assert stopping in training.callback_handler.callbacks
    assert stopping.early_stopping_patience_counter == 4  # two of them before the restart
    assert training.state.global_step == 20


def test_a_signal_after_the_last_step_ends_the_process(outputs: Path, new_process: Callable[[], None]) -> None:
    class Late(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kill(control)

    with pytest.raises(SystemExit) as ended:
        trainer(PolyaxonCallback(), Late(), num_train_epochs=1).train()
    assert ended.value.code == 143
    assert newest_position(outputs) == (4, 1)


def test_an_error_that_a_signal_brought_about_ends_as_the_signal_asks(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A signal to the whole process group also ends the workers of the data loader."""

    class Loses(Trainer):
        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            if self.state.global_step == 5:
                kill(None)
                raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")
            return super().training_step(*arguments, **options)

    with pytest.raises(SystemExit) as ended:
        trainer(PolyaxonCallback(), made_by=Loses, **QUIET).train()
    assert ended.value.code == 143
    assert newest_position(outputs) == (5, 1)
    assert "Saved step 5 after SIGTERM" in caplog.text
    assert "After SIGTERM: RuntimeError: DataLoader worker" in caplog.text


def test_an_error_of_a_callback_before_it_loses_no_step(outputs: Path) -> None:
    with pytest.raises(ArithmeticError):
        trainer(At(7, fail), PolyaxonCallback(), **QUIET).train()
    assert newest_position(outputs) == (7, 1)


def test_an_error_while_saving_does_not_hide_the_users_own(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unsaved(Trainer):
        def _save(self, *_: Any, **__: Any) -> None:
            raise TypeError("not this either")

    with pytest.raises(ArithmeticError):
        trainer(PolyaxonCallback(), At(2, fail), made_by=Unsaved, **QUIET).train()
    assert "was not saved; the previous checkpoint is untouched: TypeError" in caplog.text


def test_a_smaller_batch_after_too_little_memory_counts_from_scratch(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Runs(Trainer):
        failed = False

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            if self.state.global_step == 5 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*arguments, **options)

    done = At()
    done.does, done.step = (lambda control: kill(control) if done.steps.count(4) == 2 else None), 4
    with pytest.raises(SystemExit):
        trainer(PolyaxonCallback(), done, made_by=Runs, auto_find_batch_size=True, **QUIET).train()
    assert done.steps == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert "Saved step 4 after SIGTERM" in caplog.text


def test_what_a_trainer_leaves_out_since_it_is_not_trained_is_as_the_script_makes_it(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    class TrainedAlone(Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            names = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            kept = {name: tensor for name, tensor in self.model.state_dict().items() if name in names}
            super()._save(output_dir, kept)

    def frozen() -> Any:
        set_seed(0)
        model = tiny()
        model.bert.requires_grad_(requires_grad=False)
        return model

    with pytest.raises(ArithmeticError):
        trainer(PolyaxonCallback(), At(6, fail), model=frozen(), made_by=TrainedAlone, **QUIET).train()
    new_process()
    done = At()
    trainer(PolyaxonCallback(), done, model=frozen(), made_by=TrainedAlone, **QUIET).train()
    assert done.steps[0] == 7


def test_a_model_is_gone_with_its_trainer(outputs: Path) -> None:
    training = trainer(PolyaxonCallback(), num_train_epochs=1)
    training.train()
    model = weakref.ref(training.model)
    del training
    assert model() is None


def test_an_override_that_saves_elsewhere_gets_an_error_that_says_how(outputs: Path) -> None:
    class Elsewhere(Trainer):
        def _save_checkpoint(self, *_: Any) -> None:
            self.save_model(os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}"))

    with pytest.raises(
        TrackingError, match=r"Received a Elsewhere whose `_save_checkpoint` did not write to .*_get_output"
    ):
        trainer(PolyaxonCallback(), made_by=Elsewhere).train()


def test_ways_to_call_train(outputs: Path, new_process: Callable[[], None]) -> None:
    class Simple(Trainer):
        def train(self) -> Any:
            return super().train()

    trainer(PolyaxonCallback(), made_by=Simple, num_train_epochs=1, **QUIET).train()
    new_process()
    done = At()
    trainer(PolyaxonCallback(), done, num_train_epochs=2, **QUIET).train(True)
    assert done.steps == [5, 6, 7, 8]


def test_resume_from_checkpoint_may_be_true_before_there_is_any(outputs: Path) -> None:
    done = At()
    trainer(PolyaxonCallback(), done, num_train_epochs=1, **QUIET).train(resume_from_checkpoint=True)
    assert done.steps == [1, 2, 3, 4]


def test_resume_from_checkpoint_off_the_cluster_needs_the_newest_directory(new_process: Callable[[], None]) -> None:
    trainer(PolyaxonCallback(), num_train_epochs=1, **QUIET).train(resume_from_checkpoint=True)
    new_process()
    with pytest.raises(TrackingError, match=r"Received resume_from_checkpoint=True.*Expected resume=True too"):
        trainer(PolyaxonCallback(), num_train_epochs=2, **QUIET).train(resume_from_checkpoint=True)
    new_process()
    done = At()
    trainer(PolyaxonCallback(resume=True), done, num_train_epochs=2, **QUIET).train(resume_from_checkpoint=True)
    assert done.steps == [5, 6, 7, 8]


@pytest.mark.parametrize("output_dir", ["results", "results/run", "elsewhere/run"])
def test_the_directories_that_the_script_and_the_trainer_made_stay(outputs: Path, output_dir: str) -> None:
    Path("results").mkdir()
    trainer(PolyaxonCallback(), output_dir=output_dir, num_train_epochs=1).train()
    for directory in ("results", output_dir):
        Path(directory, "metrics.json").write_text("of the script")
    assert folders(outputs, output_dir) == {"checkpoint-4"}


def test_a_learning_rate_of_numpy_resumes_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    ends = []
    for name, ends_at in (("whole", [None]), ("parts", [6, None])):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / name))
        for step in ends_at:
            new_process()
            set_seed(0)
            model = tiny()
            optimizer = torch.optim.AdamW(model.parameters(), lr=np.float32(0.01))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, np.float64(0.9))
            training = trainer(
                PolyaxonCallback(),
                At(step, fail),
                model=model,
                made_by=functools.partial(Trainer, optimizers=(optimizer, scheduler)),
                num_train_epochs=3,
                **QUIET,
            )
            with pytest.raises(ArithmeticError) if step else contextlib.nullcontext():
                training.train()
        ends.append((digest(training.model), training.state.global_step))
    assert ends[0] == ends[1]


class Unsafe:
    """No plain value."""


def test_what_could_not_be_loaded_is_refused_before_training(outputs: Path) -> None:
    model = tiny()
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "mine": Unsafe()}], lr=0.01)
    done = At()
    with pytest.raises(
        TrackingError,
        match=r"the training state\['optimizer'\]\['param_groups'\]\[0\]\['mine'\] with a value .*\.Unsafe\.",
    ):
        trainer(
            PolyaxonCallback(),
            done,
            model=model,
            made_by=functools.partial(Trainer, optimizers=(optimizer, None)),
            **QUIET,
        ).train()
    assert done.steps == []


def test_what_could_not_be_loaded_is_refused_at_the_first_save(outputs: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, *arguments: Any, **options: Any) -> Any:
            result = super().step(*arguments, **options)
            self.state[self.param_groups[0]["params"][0]]["mine"] = Unsafe()
            return result

    model = tiny()
    done = At()
    with pytest.raises(TrackingError, match=r"\['optimizer'\]\['state'\]\[0\]\['mine'\] with a value of the type"):
        trainer(
            PolyaxonCallback(),
            done,
            model=model,
            made_by=functools.partial(Trainer, optimizers=(Odd(model.parameters(), 0.01), None)),
            **QUIET,
        ).train()
    assert done.steps == [1, 2, 3, 4]
    assert not list((outputs / "checkpoints").rglob("step=*"))


def test_an_output_dir_that_is_a_url_is_refused(outputs: Path) -> None:
    with pytest.raises(TrackingError, match=r"Received output_dir='s3://bucket/bert'. Expected a directory") as caught:
        trainer(PolyaxonCallback(), output_dir="s3://key:secret@bucket/bert")
    assert "secret" not in str(caught.value)
    assert [path.name for path in Path.cwd().iterdir()] == ["run"]
