"""The callback for Hugging Face's Trainer: what a user sees of it, in real trainings of a tiny model."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import signal
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from training_scripts import flip_a_bit, newest, train, trained
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers_script import digest, tiny, trainer

from polyaxon_tracking import CheckpointManager, TrackingError
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def resume_directory(outputs: Path) -> CheckpointManager:
    return CheckpointManager(outputs / "checkpoints" / "resume")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the last line of an uninterrupted training."""
    return trained(train("transformers", tmp_path_factory.mktemp("uninterrupted")))


@pytest.mark.parametrize(
    ("died", "status", "step"),
    [
        pytest.param({"DIE_AT_STEP": "10", "ONCE_SAVED": "8"}, -signal.SIGKILL, 8, id="killed"),
        pytest.param({"DIE_AT_STEP": "11", "EVERY_N_TRAIN_STEPS": "3", "FOREGROUND": "1"}, -signal.SIGKILL, 9, id="killed-within-an-epoch"),
        pytest.param({"DIE_AT_STEP": "10", "SIGNAL": "SIGTERM"}, 128 + signal.SIGTERM, 10, id="preempted"),
        pytest.param({"DIE_AT_STEP": "10", "SIGNAL": "SIGUSR1"}, 138, 10, id="preempted-by-another-signal"),
        pytest.param({"DIE_AT_STEP": "12", "SIGNAL": "SIGTERM"}, 143, 12, id="preempted-before-an-evaluation"),
        pytest.param({"DIE_IN_EVALUATION_AT_STEP": "12", "SIGNAL": "SIGTERM"}, 143, 12, id="preempted-in-an-evaluation"),
        pytest.param({"DIE_AT_STEP": "10", "SIGNAL": "SIGINT"}, -signal.SIGINT, 10, id="interrupted"),
        pytest.param({"RAISE_AT_STEP": "10"}, 1, 10, id="raised"),
    ],
)  # fmt: skip
def test_a_training_that_ended_before_its_time_resumes_to_the_same_end(
    tmp_path: Path, uninterrupted: str, died: dict[str, str], status: int, step: int
) -> None:
    ended = train("transformers", tmp_path, **died)
    assert ended.returncode == status, ended.stderr
    assert newest(tmp_path).step == step
    resumed = train("transformers", tmp_path)
    assert trained(resumed) == uninterrupted
    epoch = rf"(?:{(step - 1) // 4}|{step // 4})"  # whether its end was reached or cut off
    assert len(re.findall(rf"Resuming from {tmp_path}\S+: epoch {epoch}, step {step}\n", resumed.stderr)) == 1
    below = tmp_path / "checkpoints"
    assert sorted(path.name for path in below.iterdir()) == ["bert", "resume"]
    assert len(list((below / "bert").iterdir())) == 2
    assert len(list((below / "resume").iterdir())) == 1  # of a training that has ended
    assert not list(tmp_path.rglob(".staging-*"))
    assert not list((Path.cwd() / "bert").iterdir())


def test_the_best_that_the_newest_state_names_outlives_a_kill_before_the_next_state(
    tmp_path: Path, uninterrupted: str
) -> None:
    ended = train("transformers", tmp_path, DIE_BEFORE_THE_RESUME_STATE_OF="8", SAVE_TOTAL_LIMIT="1")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert newest(tmp_path).step == 4
    below = tmp_path / "checkpoints" / "bert"
    # The folder of step 8 came first, and nothing went for it: what is resumed from has step 4 as its best.
    assert {path.name for path in below.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    resumed = train("transformers", tmp_path, SAVE_TOTAL_LIMIT="1")
    assert trained(resumed) == uninterrupted
    assert len(list(below.glob("checkpoint-*"))) <= 2  # the newest and the best


def vision(width: int = 16) -> ViTForImageClassification:
    """Return a model whose weights have other names on the Hub than in the model."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=4,
            patch_size=2,
            num_channels=1,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )


def experts() -> Qwen3MoeForCausalLM:
    """Return a model whose weights are split differently on the Hub."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


class InShards(Qwen3MoeForCausalLM):
    """A model that is saved in several files, as a large model is."""

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        super().save_pretrained(*arguments, **options, max_shard_size="5KB")


def experts_in_shards() -> Qwen3MoeForCausalLM:
    return InShards(experts().config)


PIXELS = [
    {"pixel_values": torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(n)), "labels": n % 2}
    for n in range(16)
]
SENTENCES = [
    {"input_ids": (words := torch.randint(0, 50, (6,), generator=torch.Generator().manual_seed(n))), "labels": words}
    for n in range(16)
]


class BestFirst(TrainerCallback):
    """Make the first evaluation the best one, and raise at a step."""

    def __init__(self, raises_at: int | None = None) -> None:
        self.raises_at = raises_at

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.raises_at:
            raise ArithmeticError


@pytest.mark.parametrize(
    ("make", "rows"),
    [(vision, PIXELS), (experts, SENTENCES), (experts_in_shards, SENTENCES)],
    ids=["ViT", "Qwen3MoE", "Qwen3MoE in shards"],
)
def test_a_model_whose_weights_are_saved_under_other_names_resumes_with_all_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Callable[[], nn.Module], rows: list[dict[str, Any]]
) -> None:
    """The Trainer itself would continue with new weights."""
    ends: dict[str, tuple[str, str]] = {}
    for name, raises in (("uninterrupted", [None]), ("interrupted", [6, None])):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / name))
        for raises_at in raises:
            set_seed(0)
            last = Last()
            options = {"train_dataset": rows, "eval_dataset": rows[:4], "num_train_epochs": 4}
            training = trainer(PolyaxonCallback(), BestFirst(raises_at), last, model=make(), **options)
            with pytest.raises(ArithmeticError) if raises_at else contextlib.nullcontext():
                training.train()
        ends[name] = last.digest, digest(training.model)  # before and after the best was loaded
    assert ends["interrupted"] == ends["uninterrupted"]
    best = training.model.from_pretrained(str(training.state.best_model_checkpoint))
    assert str(training.state.best_model_checkpoint).endswith("checkpoint-2")
    assert digest(best) == ends["interrupted"][1] != ends["interrupted"][0]


class Last(TrainerCallback):
    """Keep a digest of the weights after the last step."""

    digest = ""

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.digest = digest(model)


def test_another_width_of_a_model_whose_weights_are_saved_under_other_names_is_refused(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    options = {"train_dataset": PIXELS, "eval_dataset": PIXELS[:4]}
    trainer(PolyaxonCallback(), model=vision(), num_train_epochs=1, **options).train()
    new_process()
    again = trainer(PolyaxonCallback(), model=vision(32), num_train_epochs=2, **options)
    with pytest.raises(TrackingError, match=r"cls_token is \(1, 1, 32\), saved as \(1, 1, 16\);"):
        again.train()


def adapted(rank: int = 4, targets: tuple[str, str] = ("query", "value")) -> PeftModel:
    """Return a tiny BERT with an adapter: only the adapter is trained and saved."""
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, target_modules=list(targets), lora_dropout=0.1)
    return get_peft_model(tiny(), config)


def test_only_an_adapter_is_saved_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends = {}
    for name, raises in (("uninterrupted", [None]), ("interrupted", [10, None])):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / name))
        for raises_at in raises:
            set_seed(0)
            last = Last()
            training = trainer(PolyaxonCallback(), BestFirst(raises_at), last, model=adapted())
            with pytest.raises(ArithmeticError) if raises_at else contextlib.nullcontext():
                training.train()
        ends[name] = last.digest, digest(training.model)
        saved = newest(tmp_path / name)
        weights = {path.name for path in Path(saved.path).glob("*.safetensors")}
        assert weights == {"adapter_model.safetensors"}
    assert ends["interrupted"] == ends["uninterrupted"]


def test_another_adapter_is_refused(outputs: Path, new_process: Callable[[], None]) -> None:
    trainer(PolyaxonCallback(), model=adapted(), num_train_epochs=1).train()
    new_process()
    with pytest.raises(TrackingError, match=r"query.lora_A.weight is \(8, 16\), saved as \(4, 16\);"):
        trainer(PolyaxonCallback(), model=adapted(8)).train()
    new_process()
    # As many weights of the same shapes: PEFT would continue with new ones.
    with pytest.raises(TrackingError, match=r"key.lora_A.weight was not saved; .*value.lora_A.weight was saved and is"):
        trainer(PolyaxonCallback(), model=adapted(targets=("query", "key"))).train()


def test_the_folders_load_as_the_trainers_own_do(outputs: Path) -> None:
    training = trainer(PolyaxonCallback(), num_train_epochs=1)
    training.train()
    below = outputs / "checkpoints"
    saved = newest(outputs)
    assert training.args.output_dir == str(below / "bert")
    for folder in (saved.path, below / "bert" / "checkpoint-4"):
        assert digest(BertForSequenceClassification.from_pretrained(folder)) == digest(training.model)
    best = json.loads((Path(saved.path) / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best == training.state.best_model_checkpoint == str(below / "bert" / "checkpoint-4")
    arguments = torch.load(below / "bert" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert arguments.output_dir == training.args.output_dir
    # Both are the same state, which was written once.
    weights = [Path(folder) / "model.safetensors" for folder in (saved.path, below / "bert" / "checkpoint-4")]
    assert weights[0].samefile(weights[1])


def test_the_training_state_is_saved_at_multiples_of_optimizer_steps(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    def train(resume_from: str | None = None) -> list[int]:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
        polyaxon = PolyaxonCallback(every_n_train_steps=5, max_to_keep=99)
        training = trainer(polyaxon, num_train_epochs=2, load_best_model_at_end=False, **options)
        training.train(resume_from_checkpoint=resume_from)
        new_process()
        return [checkpoint.step for checkpoint in resume_directory(outputs).checkpoints()][::-1]

    assert train() == [5, 8, 10, 15, 16]
    below = outputs / "checkpoints" / "resume"
    [saved] = below.glob("step=0000000008-*")
    mine = saved.rename(outputs / "checkpoint-8")
    shutil.rmtree(below)
    assert train(str(mine)) == [10, 15, 16]


def test_off_the_cluster_outputs_go_to_a_local_directory_and_training_starts_fresh(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, new_process: Callable[[], None]
) -> None:
    caplog.set_level(logging.INFO)
    trainer(PolyaxonCallback(), num_train_epochs=1).train()
    start = f"POLYAXON_RUN_OUTPUTS_PATH is not set: outputs go to {tmp_path}/outputs/version_"
    first = tmp_path / "outputs" / "version_0"
    assert newest(first).step == 4
    before = sorted(first.rglob("*"))
    new_process()
    trainer(PolyaxonCallback(), num_train_epochs=2).train()
    assert caplog.text.count("Starting fresh: ") == 2
    assert f"{start}1; resume=True would use version_0" in caplog.messages
    new_process()
    trainer(PolyaxonCallback(resume=True), num_train_epochs=3).train()
    assert f"{start}1, the newest with checkpoints" in caplog.messages
    assert "step=0000000008-epoch=2-start=1" in caplog.text
    assert ": epoch 2, step 8" in caplog.text
    assert sorted(first.rglob("*")) == before


def test_the_newest_that_is_intact_is_used(
    outputs: Path, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None]
) -> None:
    trainer(PolyaxonCallback(max_to_keep=2), num_train_epochs=2).train()
    last, before = resume_directory(outputs).checkpoints()
    flip_a_bit(Path(last.path) / "optimizer.pt")
    new_process()
    steps: list[int] = []
    trainer(PolyaxonCallback(), _Steps(steps), num_train_epochs=2).train()
    assert steps == [5, 6, 7, 8]
    assert f"Skipped damaged checkpoints, using {before.path} instead: {last.path}" in caplog.text
    for checkpoint in resume_directory(outputs).checkpoints():
        flip_a_bit(Path(checkpoint.path) / "scheduler.pt")
    new_process()
    with pytest.raises(TrackingError, match="Received only damaged checkpoints"):
        trainer(PolyaxonCallback(), num_train_epochs=2).train()


def test_a_model_or_an_optimizer_that_is_not_the_one_saved_is_refused(
    outputs: Path, new_process: Callable[[], None]
) -> None:
    trainer(PolyaxonCallback(), num_train_epochs=1).train()
    new_process()
    before = resume_directory(outputs).latest()
    with pytest.raises(
        TrackingError,
        match=r" What differs: bert.embeddings.word_embeddings.weight is \(50, 32\), saved as \(50, 16\);(?:[^;]+;){4} and \d+ more\.$",
    ):
        trainer(PolyaxonCallback(), model=tiny(32)).train()
    new_process()
    deeper = tiny()
    deeper.classifier = torch.nn.Sequential(torch.nn.Linear(16, 2))
    with pytest.raises(
        TrackingError, match=r"classifier.0.weight was not saved; .*classifier.weight was saved and is no more"
    ):
        trainer(PolyaxonCallback(), model=deeper).train()
    new_process()
    with pytest.raises(TrackingError, match="its optimizer is SGD, saved was AdamW"):
        trainer(PolyaxonCallback(), optim="sgd").train()
    assert resume_directory(outputs).latest() == before


def test_checkpoints_of_another_framework_are_refused(outputs: Path) -> None:
    with resume_directory(outputs).save(3, suffix=".ckpt") as path:
        Path(path).write_text("of Lightning")
    with pytest.raises(TrackingError, match="which Hugging Face's Trainer did not save"):
        trainer(PolyaxonCallback()).train()


def test_what_resume_from_checkpoint_says_is_used(
    outputs: Path, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None]
) -> None:
    trainer(PolyaxonCallback(), num_train_epochs=2).train()
    new_process()
    folder = str(outputs / "checkpoints" / "bert" / "checkpoint-4")
    training = trainer(PolyaxonCallback(), num_train_epochs=3)
    steps: list[int] = []
    training.add_callback(_Steps(steps))
    training.train(resume_from_checkpoint=folder)
    assert steps == list(range(5, 13))
    assert re.search(r"Resuming from resume_from_checkpoint=\S+ as asked, although \S+ exists\. Leave out", caplog.text)
    fresh = trainer(PolyaxonCallback(), num_train_epochs=1)
    steps.clear()
    fresh.add_callback(_Steps(steps))
    fresh.train(resume_from_checkpoint=False)
    assert steps == [1, 2, 3, 4]


def test_a_training_that_was_stopped_early_stays_so(
    outputs: Path, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None]
) -> None:
    def stopping() -> EarlyStoppingCallback:
        return EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)

    caplog.set_level(logging.INFO)
    first = trainer(PolyaxonCallback(), stopping())
    first.train()
    assert first.state.global_step == 8
    new_process()
    steps: list[int] = []
    second = trainer(PolyaxonCallback(), stopping(), _Steps(steps))
    second.train()
    assert steps == []
    assert digest(second.model) == digest(first.model)
    assert "This training was stopped early, at epoch 2: nothing is left to train" in caplog.text
    assert second.args.max_steps == -1


def test_a_second_training_of_a_trainer_has_its_own_checkpoints(outputs: Path) -> None:
    training = trainer(PolyaxonCallback(), num_train_epochs=1)
    training.train()
    training.train()
    names = ["bert", "bert-2", "resume", "resume-2"]
    assert sorted(path.name for path in (outputs / "checkpoints").iterdir()) == names


def test_a_time_interval_and_a_partial_epoch(outputs: Path) -> None:
    polyaxon = PolyaxonCallback(train_time_interval=timedelta(microseconds=1), max_to_keep=9)
    trainer(
        polyaxon,
        max_steps=6,
        gradient_accumulation_steps=2,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
    ).train()
    steps = sorted({checkpoint.step for checkpoint in resume_directory(outputs).checkpoints()})
    assert steps == [1, 2, 3, 4, 5, 6]


def test_save_only_model_is_only_for_the_users_folders(outputs: Path) -> None:
    training = trainer(PolyaxonCallback(), num_train_epochs=1, save_only_model=True)
    training.train()
    assert training.args.save_only_model
    assert not (outputs / "checkpoints" / "bert" / "checkpoint-4" / "optimizer.pt").exists()
    saved = newest(outputs)
    assert (Path(saved.path) / "optimizer.pt").exists()


def test_an_absolute_output_dir_is_kept(outputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    trainer(PolyaxonCallback(), output_dir=str(elsewhere), num_train_epochs=1).train()
    assert (elsewhere / "checkpoint-4").is_dir()
    assert f"Checkpoints go to {elsewhere}, outside the outputs path {outputs}" in caplog.text


def test_wrong_use_is_an_error_before_training(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrackingError, match="several PolyaxonCallbacks"):
        trainer(PolyaxonCallback(), PolyaxonCallback())
    late = trainer()
    late.add_callback(PolyaxonCallback())
    with pytest.raises(TrackingError, match=r"Received a PolyaxonCallback with `trainer.add_callback`"):
        late.train()
    with pytest.raises(TrackingError, match="reviews"):
        PolyaxonCallback(datasets=["reviews"])
    monkeypatch.setenv("POLYAXON_LOG_LEVEL", "ERROR")
    PolyaxonCallback(loggers=["mine"])
    assert {logging.getLogger(name).level for name in ("transformers", "accelerate", "mine")} == {logging.ERROR}


def test_arguments_out_of_range(wrong_argument: tuple[dict[str, Any], str]) -> None:
    options, message = wrong_argument
    with pytest.raises(TrackingError) as error:
        PolyaxonCallback(**options)
    assert str(error.value) == message


def test_the_private_names_that_are_used_are_there() -> None:
    for name in (
        "_load_from_checkpoint",
        "_load_best_model",
        "_load_rng_state",
        "_save_checkpoint",
        "_maybe_log_save_evaluate",
        "_get_output_dir",
    ):
        assert callable(getattr(Trainer, name))


class _Steps(TrainerCallback):
    """Keep the steps that are done."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)


class NaNAt(TrainerCallback):
    """Makes the weights NaN, as a loss that is NaN does."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if round(state.epoch) == 2:
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))


@pytest.mark.parametrize("save_strategy", ["no", "epoch"])
def test_nan_does_not_push_out_the_newest_state_without_it(
    outputs: Path, save_strategy: str, caplog: pytest.LogCaptureFixture, new_process: Callable[[], None]
) -> None:
    options: dict[str, Any] = {"eval_strategy": "no", "save_strategy": save_strategy, "load_best_model_at_end": False}
    trainer(PolyaxonCallback(), NaNAt(), num_train_epochs=5, **options).train()
    saved = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [(checkpoint.epoch, checkpoint.has_nan) for checkpoint in saved] == [(5, True), (2, False)]
    new_process()
    trainer(PolyaxonCallback(resume=True), **options).train()
    assert (
        f"To resume from the newest checkpoint without NaN, {saved[1].source}, move the newer ones away" in caplog.text
    )
