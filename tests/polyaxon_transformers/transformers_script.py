"""Train a tiny BERT with Hugging Face's Trainer; the environment says how and when it dies."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import faults
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from polyaxon_transformers import PolyaxonCallback

# This script in two processes.

# Train, and neither evaluate nor save a model.
QUIET: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


class Words(Dataset[dict[str, torch.Tensor]]):
    """Sequences of eight of fifty words; whether the sum of their numbers is odd."""

    def __init__(self, length: int = 32) -> None:
        self.words = torch.randint(0, 50, (length, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.words[index].sum() % 2}


class Trouble(TrainerCallback):
    """Cause the faults that the environment names."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        time.sleep(float(os.environ.get("SECONDS_PER_BATCH", "0")))
        self._happen("AT_STEP", args, state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._happen("IN_EVALUATION_AT_STEP", args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        metrics["eval_best"] = float(os.environ.get("BEST_AT_STEP") == str(state.global_step))

    def _happen(self, moment: str, args: Any, state: Any) -> None:
        place = state.global_step, args.process_index
        if faults.is_due(f"DIE_{moment}", *place):
            self._wait_for_what_is_written(args.output_dir)
            faults.die()
        if faults.is_due(f"NO_ROOM_{moment}", *place):
            self._wait_for_what_is_written(args.output_dir)
            faults.fill_disk()
        if faults.is_due(f"RAISE_{moment}", *place):
            raise ArithmeticError("in the user's code")

    def _wait_for_what_is_written(self, output_dir: str) -> None:
        """Wait for the save that the test expects, because the background write may not be finished."""
        if "ONCE_SAVED" in os.environ:
            while not any(Path(output_dir).parent.glob(f"resume/step={os.environ['ONCE_SAVED']:0>10}-*")):
                time.sleep(0.01)


def die_before_the_resume_state_of(step: str) -> None:
    """Kill this process when the state of this step is about to get its final name."""
    replace = os.replace

    def die(source: str, target: str) -> None:
        if os.path.basename(target).startswith(f"step={step:0>10}"):
            faults.die("SIGKILL")
        replace(source, target)

    os.replace = die


def tiny(width: int = 16) -> BertForSequenceClassification:
    """Return a model with dropout, embeddings that share nothing, and two classes."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


def trainer(
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    made_by: type[Trainer] = Trainer,
    arguments_of: type[TrainingArguments] | None = None,
    **options: Any,
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": "bert",
        "num_train_epochs": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    made = made_by(
        model=tiny() if model is None else model,
        args=(arguments_of or TrainingArguments)(**arguments | options),
        train_dataset=train_dataset or Words(),
        eval_dataset=eval_dataset or Words(16),
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    return made


def digest(module: nn.Module) -> str:
    return faults.digest_of(tensor.numpy() for tensor in module.state_dict().values())


def main() -> None:
    faults.prepare_process()
    if "DIE_BEFORE_THE_RESUME_STATE_OF" in os.environ:
        die_before_the_resume_state_of(os.environ["DIE_BEFORE_THE_RESUME_STATE_OF"])
    set_seed(0)
    every = os.environ.get("EVERY_N_TRAIN_STEPS")
    training = trainer(
        PolyaxonCallback(every_n_train_steps=int(every) if every else None, background="FOREGROUND" not in os.environ),
        EarlyStoppingCallback(early_stopping_patience=10),
        Trouble(),
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        save_total_limit=int(os.environ.get("SAVE_TOTAL_LIMIT", "2")),
        metric_for_best_model="best" if "BEST_AT_STEP" in os.environ else "loss",
        save_on_each_node=os.environ.get("GROUP_WORLD_SIZE", "1") != "1",  # to find the best model at the end
    )
    if "PARTS" in os.environ:  # Accelerate does so itself if there is a GPU
        training.is_fsdp_enabled = True
        training.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(state_dict_type=os.environ["PARTS"])
    training.train()
    evaluations = [round(entry["eval_loss"], 6) for entry in training.state.log_history if "eval_loss" in entry]
    # In one piece: others print to the same place.
    sys.stdout.write(f"trained {training.state.global_step} {evaluations} {digest(training.model)}\n")


if __name__ == "__main__":
    sys.exit(main())
