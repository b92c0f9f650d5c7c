"""Saving in the background with Hugging Face's Trainer: what is written, when, and what is written at once."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers.modeling_utils
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from training_scripts import newest, stderr_of
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers_script import QUIET, tiny, trainer

from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


class Tokenizer:
    """As much of a tokenizer as the Trainer needs, which writes one file."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


class Module(nn.Module):
    """A module that is no model of Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.head(self.embedding(input_ids).mean(1)), labels)}


class Words(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences whose words are to be said again."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = torch.arange(index, index + 8) % 50
        return {"input_ids": words, "labels": words}


class OwnSave(Trainer):
    """A Trainer that writes one file more with the weights, as those of other libraries do."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        assert Path(str(output_dir), "model.safetensors").exists()
        Path(str(output_dir), "mine.txt").write_text(type(self).__name__)


class OwnCheckpoint(Trainer):
    """A Trainer that reads a folder once it is saved, and saves the model to another place too."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        assert {"model.safetensors", "optimizer.pt"} <= {path.name for path in folder.iterdir()}
        self.save_model(str(folder / "last"))


class OwnSaveModel(Trainer):
    """A Trainer that reads the weights once they are saved."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        assert Path(str(output_dir), "model.safetensors").exists()


class OwnOptimizer(Trainer):
    """A Trainer that saves its optimizer itself, too."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        assert Path(output_dir, "optimizer.pt").exists()


def adapted(config: Any) -> Callable[[], PeftModel]:
    return lambda: get_peft_model(BertForSequenceClassification(BertConfig(**SMALL)), copy.deepcopy(config))


def tied() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**SMALL))


LORA = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query"], modules_to_save=["classifier"], bias="all")
IA3 = IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["query", "dense"], feedforward_modules=["dense"])
PROMPT = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2)
FOREGROUND = "Saving the weights in the foreground, while training waits: "


@pytest.mark.parametrize(
    ("made_by", "model", "options", "foreground"),
    [
        pytest.param(Trainer, tiny, {}, None, id="plain"),
        pytest.param(Trainer, tiny, {"save_only_model": True}, None, id="only-the-model"),
        pytest.param(Trainer, tiny, {"save_total_limit": 1, "optim": "sgd"}, None, id="limit"),
        pytest.param(Trainer, tied, {"train_dataset": Words(), "eval_dataset": Words()}, None, id="tied"),
        pytest.param(Trainer, Module, {}, None, id="a-module-of-torch"),
        pytest.param(Trainer, adapted(LORA), {}, None, id="lora"),
        pytest.param(Trainer, adapted(IA3), {}, None, id="ia3"),
        pytest.param(Trainer, adapted(PROMPT), {}, "PEFT reads the weights", id="prompt"),
        pytest.param(Seq2SeqTrainer, tiny, {}, None, id="seq2seq"),
        pytest.param(OwnSave, tiny, {}, "OwnSave has its own `_save`", id="own-save"),
        pytest.param(OwnCheckpoint, tiny, {}, "OwnCheckpoint has its own `_save_checkpoint`", id="own-checkpoint"),
        pytest.param(OwnSaveModel, tiny, {}, "OwnSaveModel has its own `save_model`", id="own-save-model"),
        pytest.param(OwnOptimizer, tiny, {}, None, id="own-optimizer"),
        pytest.param(Trainer, tiny, {"shards": True}, None, id="shards"),
    ],
)
def test_a_folder_has_the_bytes_that_the_trainer_writes_by_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    made_by: type[Trainer],
    model: Callable[[], nn.Module],
    options: dict[str, Any],
    foreground: str | None,
) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "outputs"))
    options = {**options}
    if options.pop("shards", False):
        split = transformers.modeling_utils.split_torch_state_dict_into_shards
        monkeypatch.setattr(
            transformers.modeling_utils,
            "split_torch_state_dict_into_shards",
            lambda *args, **kwargs: split(*args, **kwargs | {"max_shard_size": 4000}),
        )
    below = tmp_path / "bert"
    folders = {}
    for name, callbacks in (("native", []), ("ours", [PolyaxonCallback()])):
        set_seed(0)
        training = trainer(
            *callbacks,
            made_by=made_by,
            model=model(),
            arguments_of=Seq2SeqTrainingArguments if made_by is Seq2SeqTrainer else None,
            output_dir=str(below),
            num_train_epochs=2,
            **QUIET | {"save_strategy": "epoch", "logging_steps": 1} | options,
        )
        training.processing_class = Tokenizer()
        training.train()
        folders[name] = {str(path.relative_to(below)): path.read_bytes() for path in below.rglob("*") if path.is_file()}
        shutil.rmtree(below)
    assert "checkpoint-8/training_args.bin" in folders["native"]
    assert folders["ours"].keys() == folders["native"].keys()
    assert [name for name, content in folders["native"].items() if folders["ours"][name] != content] == []
    lines = [line for line in caplog.messages if line.startswith(FOREGROUND)]
    assert len(lines) == (foreground is not None)
    assert all(line.startswith(FOREGROUND + str(foreground)) for line in lines)


class Held(TrainerCallback):
    """Delay every write until the second step after the save has changed the weights, and keep the earlier weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.threads: set[str] = set()
        self._may_write = threading.Event()
        for module, name in ((torch, "save"), (transformers.modeling_utils, "safe_save_file")):
            monkeypatch.setattr(module, name, self._held(getattr(module, name)))

    def _held(self, save: Callable[..., None]) -> Callable[..., None]:
        def held(content: Any, path: Any, *arguments: Any, **options: Any) -> None:
            if Path(str(path)).name in {"model.safetensors", "optimizer.pt"}:
                self.threads.add(threading.current_thread().name)
                assert self._may_write.wait(60)
            save(content, path, *arguments, **options)

        return held

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **_: Any) -> None:
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}
        if state.global_step % 4 == 2 or state.global_step == state.max_steps:
            self._may_write.set()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._may_write.clear()


@pytest.mark.parametrize("save_strategy", ["epoch", "no"])
def test_what_is_written_is_the_state_of_the_save_while_training_continues(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, save_strategy: str
) -> None:
    held = Held(monkeypatch)
    options = QUIET | {"save_strategy": save_strategy}
    # Embeddings so large that their copy is made anew by each save, in the same memory.
    training = trainer(held, PolyaxonCallback(max_to_keep=3), model=tiny(256), num_train_epochs=3, **options)
    training.train()
    assert held.threads == {"polyaxon-tracking-writer"}
    folders = {path.name[:15]: path for path in (outputs / "checkpoints" / "resume").glob("step=*")}
    for step in (4, 8, 12):
        weights = load_file(folders[f"step={step:010d}"] / "model.safetensors")
        assert json.loads((folders[f"step={step:010d}"] / "trainer_state.json").read_text())["global_step"] == step
        assert all(torch.equal(weights[name], value) for name, value in held.weights[step].items() if name in weights)
        state = torch.load(folders[f"step={step:010d}"] / "optimizer.pt", weights_only=True)["state"]
        assert {int(one["step"]) for one in state.values()} == {step}


LITTLE_MEMORY = """
import resource, torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from polyaxon_transformers import PolyaxonCallback

class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.register_buffer("ballast", torch.zeros(1 << 26))  # 256 MiB

    def forward(self, x):
        self.ballast += 1
        return {"loss": self.layer(x).mean()}

class Limit(TrainerCallback):
    def on_train_begin(self, *_, **__):
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (128 << 20), resource.RLIM_INFINITY))

arguments = TrainingArguments(
    output_dir="out", num_train_epochs=3, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
)
trainer = Trainer(
    Module(), arguments, train_dataset=[{"x": torch.ones(1)}], callbacks=[Limit(), PolyaxonCallback()]
)
trainer.train()
"""


def test_without_memory_for_a_copy_training_waits_and_says_so_once(tmp_path: Path) -> None:
    stderr = stderr_of(LITTLE_MEMORY, tmp_path, MALLOC_ARENA_MAX="1")
    message = "Saving in the foreground, while training waits: a copy of the state takes 268,435,456"
    assert stderr.count(message) == 1
    assert float(load_file(Path(newest(tmp_path).path) / "model.safetensors")["ballast"][-1]) == 3
