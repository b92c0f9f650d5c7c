"""Train with Hugging Face's Trainer in ways that need more than weights to resume exactly; the environment ends it."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers_script import digest, trainer

from polyaxon_transformers import PolyaxonCallback

IS_5 = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5},
    },
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": False},
    "persistent workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "lengths": {"train_sampling_strategy": "group_by_length"} if IS_5 else {"group_by_length": True},
    "evaluation with persistent workers": {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "eval_strategy": "steps",
        "eval_steps": 9,  # the first is after one of the ends
    },
}
ROWS = [
    {"input_ids": torch.randn(3 + n % 5, 4, generator=torch.Generator().manual_seed(n)), "labels": n % 2}
    for n in range(50)
]


class Net(nn.Module):
    """Averages sequences, after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(input_ids).mean(1)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Fails(Trainer):
    """Raises in the forward of a batch, where the environment says so."""

    batches = 0

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        if self.model.training:
            self.batches += 1
            if os.environ.get("RAISE_AT_BATCH") == str(self.batches):
                raise ArithmeticError("of the user's code")
        return loss


class Ends(TrainerCallback):
    """Ends training after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if os.environ.get("END_AT_STEP") == str(state.global_step):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if os.environ.get("KILL_AT_EPOCH") == str(int(state.epoch or 0)):
            os.kill(os.getpid(), signal.SIGKILL)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    padded = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": padded, "labels": torch.tensor([row["labels"] for row in rows])}


def main() -> None:
    set_seed(0)
    training = trainer(
        PolyaxonCallback(background=False),
        Ends(),
        model=Net(),
        made_by=Fails,
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        **{"num_train_epochs": 4, "save_strategy": "no", "load_best_model_at_end": False} | OPTIONS[os.environ["KIND"]],
    )
    training.data_collator = collate
    training.train()
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in training.state.log_history if "eval_loss" in entry]
    rates = [entry["learning_rate"] for entry in training.state.log_history if "learning_rate" in entry]
    random = torch.rand(1).item()
    sys.stdout.write(
        f"{json.dumps([training.state.global_step, digest(training.model), evaluations, rates, random])}\n"
    )


if __name__ == "__main__":
    main()
