"""Capture the tensors of a folder that the Trainer saves, so that the background thread can write them from a copy.

The Trainer saves a folder in one method, ``_save_checkpoint``. While that runs, `Capture` stands in for the two methods
that write the large files: the weights, and the state of the optimizer and of the scheduler. The small files are
written at once: the configuration of the tokenizer, which the data collator may be using, the arguments, the random
states of the moment, and the state of the Trainer.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from accelerate.utils import is_compiled_module  # type: ignore[import-untyped]
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from polyaxon_transformers.weights import (
    check_others,
    disk_errors,
    is_of_peft,
    memory_of,
    save_others,
    save_with,
    split_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Capture"]

_logger = logging.getLogger("polyaxon_tracking")

_WEIGHTS = "weights"
# The devices of which the snapshot copies tensors without pickling them.
_DEVICES = {"cpu", "cuda", "mps", "xpu"}
# What a model of Transformers has that does not save just its state dict.
_OF_SPECIAL_MODELS = ("hf_quantizer", "_hf_peft_config_loaded", "_tp_size", "hf_device_map")


class Capture:
    """Captures the tensors of the folders of one training, and writes them later.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._folder = ""
        """The folder that the Trainer is saving."""
        self._tensors: dict[str, Any] = {}
        self._adapter_weights: dict[tuple[str, ...], set[str]] = {}
        """The names of the weights that are saved, by the names of the adapters."""
        self._has_logged = False

    def methods(self, folder: str) -> dict[str, Callable[..., None]]:
        """Return the methods that stand in for the Trainer's own while it saves `folder`."""
        self._folder, self._tensors = os.path.abspath(folder), {}  # without those of a save that failed
        return {"_save": self._capture_weights, "_save_optimizer_and_scheduler": self._capture_optimizer}

    def take(self) -> dict[str, Any]:
        """Return what was captured since the last call; empty if the Trainer has written everything itself."""
        tensors, self._tensors = self._tensors, {}
        return tensors

    def state_dicts(self) -> dict[str, Any]:
        """Return what the next save will capture, as far as is known before it."""
        weights = self._weights() if self._why_weights_at_once(self._trainer._save) is None else {}  # noqa: SLF001
        return weights | (self._optimizer() if self._captures_optimizer() else {})

    def write(self, folder: str, tensors: dict[str, Any]) -> None:
        """Write to `folder` the `tensors` that `take` returned, or a copy of them.

        Raises:
            OSError: there is no room, for example.
        """
        for name, content in tensors.items():
            if name == _WEIGHTS:
                self._write_weights(folder, content)
            else:
                torch.save(content, os.path.join(folder, name))

    def _capture_weights(self, native: Callable[..., None], output_dir: str, *arguments: Any, **options: Any) -> None:
        reason = self._why_weights_at_once(native)
        if reason is not None and not self._has_logged:
            self._has_logged = True
            _logger.info("Saving the weights in the foreground, while training waits: %s", reason)
        is_of_step = os.path.abspath(output_dir) == self._folder  # or that of a save within this one
        if reason is not None or not is_of_step or arguments or options or not self._trainer.args.should_save:
            save_with(self._trainer, native, output_dir, *arguments, **options)
            return
        weights = self._weights()
        check_others(weights[_WEIGHTS])
        os.makedirs(output_dir, exist_ok=True)
        _save_tokenizer(self._trainer, output_dir)
        torch.save(self._trainer.args, os.path.join(output_dir, TRAINING_ARGS_NAME))
        self._tensors |= weights

    def _capture_optimizer(self, native: Callable[..., None], output_dir: str) -> None:
        if not self._captures_optimizer():
            native(output_dir)
        elif self._trainer.args.should_save:
            self._tensors |= self._optimizer()

    def _captures_optimizer(self) -> bool:
        """Return whether the state of the optimizer is written later. A method of the Trainer's class may read it."""
        names = "_save_checkpoint", "_save_optimizer_and_scheduler"
        return _is_saved_by_one_rank(self._trainer) and _own_method(self._trainer, *names) is None

    def _optimizer(self) -> dict[str, Any]:
        made: Any = self._trainer  # with an optimizer and a scheduler by now
        return {OPTIMIZER_NAME: made.optimizer.state_dict(), SCHEDULER_NAME: made.lr_scheduler.state_dict()}

    def _weights(self) -> dict[str, Any]:
        """Return the weights that are saved; of an adapter without the model that it adapts."""
        model: Any = self._trainer.model
        found = model.state_dict()
        if is_of_peft(model):
            adapters = tuple(model.peft_config)
            if adapters not in self._adapter_weights:  # once, because PEFT may ask the Hub
                self._adapter_weights[adapters] = _weights_of_adapters(model, found)
            found = {name: tensor for name, tensor in found.items() if name in self._adapter_weights[adapters]}
        return {_WEIGHTS: found}

    def _write_weights(self, folder: str, weights: dict[str, Any]) -> None:
        """Write `weights` as the Trainer's ``_save`` would write the weights of its model."""
        trainer, model = self._trainer, self._trainer.model
        is_safe: bool = getattr(trainer.args, "save_safetensors", True)  # an option until Transformers 5
        options: dict[str, Any] = {"safe_serialization": is_safe} if hasattr(trainer.args, "save_safetensors") else {}
        others: dict[str, Any] = {}
        if is_safe and not is_of_peft(model):
            weights, others = split_weights(model, weights)  # type: ignore[arg-type]  # made by now
        with disk_errors():
            if isinstance(model, PreTrainedModel) or is_of_peft(model):
                model.save_pretrained(folder, state_dict=weights, **options)  # type: ignore[union-attr, operator]
            elif is_safe:
                safetensors.torch.save_file(weights, os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
            else:
                torch.save(weights, os.path.join(folder, WEIGHTS_NAME))
        save_others(others, folder)

    def _why_weights_at_once(self, save: Callable[..., None]) -> str | None:
        """Return why the weights cannot be written later, from a copy; ``None`` if they can.

        Args:
            save: the method ``_save`` that nothing stands in for.
        """
        trainer, model = self._trainer, self._trainer.model
        of = type(model).__name__
        if not _is_saved_by_one_rank(trainer):
            return "each rank saves its part of the model, or the device has its own format"
        method = _own_method(trainer, "_save_checkpoint", "save_model", "_save")
        if method is None and getattr(save, "__func__", None) is not Trainer._save:  # noqa: SLF001
            method = "_save"  # of this object, by another library
        if method is not None:
            return f"{type(trainer).__name__} has its own `{method}`, which may read what has been saved"
        if is_compiled_module(model) or trainer.accelerator.unwrap_model(model) is not model:
            return f"the model is in a wrapper, a {of}"
        if is_of_peft(model):
            own: Any = model
            is_read = any(config.is_prompt_learning for config in own.peft_config.values())
            if is_read or type(own).save_pretrained is not sys.modules["peft"].PeftModel.save_pretrained:
                return f"PEFT reads the weights of this {of} from the model when it saves them"
        elif isinstance(model, PreTrainedModel):
            if type(model).save_pretrained is not PreTrainedModel.save_pretrained:
                return f"{of} has its own `save_pretrained`, which may read the weights"
            if any(getattr(model, attribute, None) for attribute in _OF_SPECIAL_MODELS):
                return f"this {of} is quantized, adapted, or spread over devices"
        return None


def _own_method(trainer: Trainer, *names: str) -> str | None:
    """Return the first of the methods `names` that the class of `trainer` does not have from Transformers."""
    return next((name for name in names if getattr(type(trainer), name) is not getattr(Trainer, name)), None)


def _is_saved_by_one_rank(trainer: Trainer) -> bool:
    """Return whether one rank saves the whole model and optimizer, as with one process or DDP."""
    splits = ("is_fsdp_enabled", "is_deepspeed_enabled", "is_distributed_loading_by_transformers")
    return trainer.args.device.type in _DEVICES and not any(getattr(trainer, name, False) for name in splits)


def _weights_of_adapters(model: Any, found: dict[str, Any]) -> set[str]:
    """Return the names of what PEFT saves of `model`, whose state dict is `found`."""
    peft = sys.modules["peft"]
    saved = {
        memory_of(tensor)
        for adapter in model.peft_config
        for tensor in peft.get_peft_model_state_dict(model, state_dict=found, adapter_name=adapter).values()
    }
    return {name for name, tensor in found.items() if memory_of(tensor) in saved}


def _save_tokenizer(trainer: Trainer, output_dir: str) -> None:
    tokenizer = trainer.processing_class
    if tokenizer is None:
        tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)
