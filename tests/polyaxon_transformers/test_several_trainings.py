"""Which training is this? Several in one process with Hugging Face's Trainer, whatever the ending of each."""

from __future__ import annotations

import logging
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from training_scripts import directories_of_trainings
from transformers import Trainer, TrainerCallback, set_seed
from transformers_script import QUIET, digest, tiny, trainer

from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Once(TrainerCallback):
    """Raise once, after a step. Keeps the steps that are done, and a digest of the weights before the first one."""

    def __init__(self, step: int | None = None, error: type[BaseException] = ArithmeticError) -> None:
        self.step, self.error = step, error
        self.steps: list[int] = []
        self.began_with = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.steps = []
        self.began_with = digest(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)
        if state.global_step == self.step:
            self.step = None
            raise self.error


def fails(training: Trainer, error: type[BaseException] = ArithmeticError) -> None:
    with pytest.raises(error):
        training.train()


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("makes_models", [False, True], ids=["of one model", "that makes its models"])
def test_the_same_trainer_continues(outputs: Path, error: type[BaseException], makes_models: bool) -> None:
    def make() -> Any:  # `tiny` itself would be given a trial as its width
        return tiny()

    def making(model: Any, **options: Any) -> Trainer:
        return Trainer(model_init=make, **options)

    once = Once(6, error)
    training = trainer(PolyaxonCallback(), once, made_by=making if makes_models else Trainer, **QUIET)
    fails(training, error)
    training.evaluate()
    training.train()
    assert once.steps[0] == 7
    assert directories_of_trainings(outputs) == ["resume"]


def test_a_new_trainer_with_the_same_model_continues(outputs: Path) -> None:
    model, once = tiny(), Once()
    fails(trainer(PolyaxonCallback(), Once(6), model=model, **QUIET))
    trainer(PolyaxonCallback(), once, model=model, **QUIET).train()
    assert once.steps[0] == 7
    assert directories_of_trainings(outputs) == ["resume"]


@pytest.mark.parametrize("shared", [True, False], ids=["one callback", "a callback for each"])
def test_another_model_is_another_training(outputs: Path, shared: bool) -> None:
    polyaxon, once, model = PolyaxonCallback(), Once(), tiny()
    fails(trainer(polyaxon, Once(6), **QUIET))
    new = digest(model)
    trainer(polyaxon if shared else PolyaxonCallback(), once, model=model, **QUIET).train()
    assert (once.steps[0], once.began_with) == (1, new)
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]


def test_the_next_stage_of_a_model_continues_in_memory_and_resumes_from_its_own_state(
    outputs: Path, new_process: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")

    def stages(second: Once) -> tuple[str, Trainer]:
        set_seed(0)
        model = tiny()
        trainer(PolyaxonCallback(), model=model, num_train_epochs=1, **QUIET).train()
        after_first = digest(model)
        return after_first, trainer(PolyaxonCallback(), second, model=model, num_train_epochs=3, **QUIET)

    once = Once(6)
    after_first, training = stages(once)
    fails(training)
    assert (once.steps[0], once.began_with) == (1, after_first)
    start = [message.partition(" ")[0] for message in caplog.messages if message.startswith(("Starting", "Continuing"))]
    assert start == ["Starting", "Continuing"]
    after_second = digest(training.model)
    new_process()
    once = Once()
    again, training = stages(once)
    training.train()
    assert again == after_first
    assert (once.steps[0], once.began_with) == (7, after_second)
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]


def test_a_trial_after_one_that_failed_leaves_its_folders(outputs: Path, new_process: Callable[[], None]) -> None:
    """The best model of the first trial is needed when the script is started again."""

    def trials(at: int | None) -> list[Trainer]:
        made = []
        for lr in (0.01, 0.001):
            set_seed(len(made))
            made.append(trainer(PolyaxonCallback(), Once(at), num_train_epochs=3, learning_rate=lr))
            if at is None:
                made[-1].train()
            else:
                fails(made[-1])
        return made

    trials(10)
    new_process()
    ends = trials(None)
    folders = [outputs / "checkpoints" / "bert", outputs / "checkpoints" / "bert-2"]
    for training, folder in zip(ends, folders, strict=True):
        best = str(training.state.best_model_checkpoint)
        assert best.startswith(f"{folder}/")
        assert digest(training.model) == digest(type(training.model).from_pretrained(best))
    assert digest(ends[0].model) != digest(ends[1].model)


def test_off_the_cluster_nothing_is_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once = Once(6)
    training = trainer(PolyaxonCallback(), once, **QUIET)
    fails(training)
    training.train()
    assert once.steps[0] == 1
    trainer(PolyaxonCallback(), **QUIET).train()
    assert "Resuming from" not in caplog.text
    assert "and keeps it; resume=True would resume from it" in caplog.text
    assert directories_of_trainings(tmp_path / "outputs" / "version_0") == ["resume", "resume-2"]


def test_resume_true_is_no_reason_to_continue_another_training(tmp_path: Path) -> None:
    once = Once()
    fails(trainer(PolyaxonCallback(resume=True), Once(6), **QUIET))
    trainer(PolyaxonCallback(resume=True), once, **QUIET).train()
    assert once.steps[0] == 1
    assert directories_of_trainings(tmp_path / "outputs" / "version_0") == ["resume", "resume-2"]


class Copies(TrainerCallback):
    """Copies the Trainer's callbacks while they train."""

    def __init__(self) -> None:
        self.taken: list[TrainerCallback] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.taken = pickle.loads(pickle.dumps(self.beside))


def test_a_copy_of_the_callback_made_in_a_training_has_no_part_in_it(outputs: Path) -> None:
    copies = Copies()
    training = trainer(PolyaxonCallback(), copies, **QUIET)
    copies.beside = [one for one in training.callback_handler.callbacks if isinstance(one, PolyaxonCallback)]  # type: ignore[attr-defined]
    training.train()
    trainer(*copies.taken, **QUIET).train()
    assert directories_of_trainings(outputs) == ["resume", "resume-2"]
