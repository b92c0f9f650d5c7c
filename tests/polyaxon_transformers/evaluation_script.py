"""Train a tiny BERT whose evaluations the environment cuts off, and print what the training has come to."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers_script import digest, trainer

from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from torch import nn

SWAP = os.environ.get("SWAP")


class OtherWeights:
    """Half of each weight, in the model until it is restored."""

    def __init__(self, model: nn.Module) -> None:
        self._trained = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        for parameter, _ in self._trained:
            parameter.data.mul_(0.5)

    def restore(self) -> None:
        for parameter, trained in self._trained:
            parameter.data.copy_(trained)


class SwapsInEvaluate(Trainer):
    """Swaps where many Trainers with averages do."""

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        swapped = OtherWeights(self.model) if SWAP == "evaluate" else None
        metrics = super().evaluate(*arguments, **options)
        if swapped:
            swapped.restore()
        return metrics


class SwapsBefore(TrainerCallback):
    """Swaps in the last hook before an evaluation, and back in the hook after it."""

    swapped: OtherWeights | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if control.should_evaluate:
            self.swapped = OtherWeights(model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.on_step_end(args, state, control, model)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.swapped is not None:
            self.swapped.restore()


class CutOff(TrainerCallback):
    """Cuts off the evaluation after a step, in the moment that the environment names."""

    predicted = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.predicted = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._cut("step", state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.predicted += 1
        if self.predicted == 2:
            self._cut("prediction", state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._cut("evaluated", state)

    def _cut(self, moment: str, state: Any) -> None:
        if moment != os.environ.get("MOMENT", "prediction") or str(state.global_step) != os.environ.get("STEP", "12"):
            return
        if os.environ["CUT_OFF"] == "exception":
            raise ArithmeticError("of the user's code")
        os.kill(os.getpid(), signal.Signals[os.environ["CUT_OFF"]])


class Epochs(TrainerCallback):
    """Write down each end of an epoch, in whichever process it comes."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with Path(os.environ["EPOCHS"]).open("a") as file:
            file.write(f"{state.global_step}\n")


def main() -> None:
    set_seed(0)
    options: dict[str, Any] = json.loads(os.environ.get("OPTIONS", "{}"))
    stopping = EarlyStoppingCallback(int(os.environ.get("PATIENCE", "9")), early_stopping_threshold=0.5)
    before = [SwapsBefore()] if SWAP == "before" else []
    cut_off = [CutOff()] if "CUT_OFF" in os.environ else []
    training = trainer(
        *before,
        PolyaxonCallback(background="FOREGROUND" not in os.environ),
        stopping,
        Epochs(),
        *cut_off,
        made_by=SwapsInEvaluate,
        **{"per_device_eval_batch_size": 4, "num_train_epochs": 5, "logging_strategy": "no"} | options,
    )
    last = Last()
    training.add_callback(last)
    training.train()
    state = training.state
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    trained = {
        "step": state.global_step,
        "weights": [last.weights, digest(training.model)],
        "learning rate": training.optimizer.param_groups[0]["lr"],
        "scheduler": {k: v for k, v in training.lr_scheduler.state_dict().items() if isinstance(v, int | float)},
        "early stopping": stopping.early_stopping_patience_counter,
        "best": [state.best_metric, state.best_global_step, Path(str(state.best_model_checkpoint)).name],
        "evaluations": evaluations,
        "random": torch.rand(1).item(),
    }
    sys.stdout.write(f"{json.dumps(trained)}\n")


class Last(TrainerCallback):
    """Keep what the weights were after the last step; a training that has nothing left keeps nothing."""

    weights = ""

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if not control.should_evaluate:
            self.weights = digest(model)


if __name__ == "__main__":
    main()
