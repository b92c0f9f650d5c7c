"""The hyperparameters of a Trainer: of its arguments, its model's configuration and the optimizer it was given."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from polyaxon_torch import optimizer_options
from polyaxon_tracking.training import Hyperparameters

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["hyperparameters"]

# Those that are in the optimizer's state, which the Trainer restores.
_RESTORED = ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_SCRIPT = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "label_smoothing_factor"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("seed", "data_seed", "bf16", "fp16", "group_by_length", "dataloader_drop_last"),
)


def hyperparameters(trainer: Trainer) -> Hyperparameters:
    """Return the hyperparameters of `trainer`, which is about to train."""
    args = trainer.args
    restored = {name: _plain(getattr(args, name)) for name in _RESTORED}
    if trainer.optimizer is not None:  # the script has made it, so the arguments do not count
        restored = {"optimizer": optimizer_options(trainer.optimizer)}
    script = {name: _plain(getattr(args, name)) for name in _SCRIPT if hasattr(args, name)}
    config: Any = getattr(trainer.model, "config", None)
    if hasattr(config, "to_diff_dict"):
        ignored = ("_", "transformers_version")
        script["config"] = {
            name: value for name, value in config.to_diff_dict().items() if not name.startswith(ignored)
        }
    return Hyperparameters(restored=restored, script=script)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
