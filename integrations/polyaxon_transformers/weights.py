"""Compare a model with the weights in a folder, and find weights that have other names there.

Transformers saves some architectures (ViT, mixtures of experts, many that see and read) under the names of the Hub, and
translates when `from_pretrained` reads them. The Trainer reads them itself, without the translation, and continues with
new weights for what it does not find: https://github.com/huggingface/transformers/issues/43701 and 48805.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

__all__ = ["Saved", "saved_weights"]


class Saved(NamedTuple):
    """The weights that a folder holds for a model."""

    differences: list[str]
    """What of the model is not as it was saved, by names and shapes: the Trainer only warns of the names."""
    translated: dict[str, torch.Tensor] | None = None
    """All weights, where their names or shapes in the folder are not the model's."""


def saved_weights(model: nn.Module, folder: str) -> Saved:
    """Compare `model` with the weights in `folder`.

    Nothing is known of models whose parts are saved by several processes: their loaders look.
    """
    peft = sys.modules.get("peft")  # imported by now, if the model is one of its
    if peft is not None and isinstance(model, peft.PeftModel):
        return Saved(_differences_of_adapter(model, folder, peft))
    saved = _shapes(folder, _files(folder))
    if not saved:
        return Saved([])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    problems, named_otherwise = _differences(model.state_dict(), saved, frozen)
    if not (named_otherwise and isinstance(model, PreTrainedModel)):
        return Saved(problems)
    loaded: PreTrainedModel
    found: dict[str, Any]
    try:
        loaded, found = type(model).from_pretrained(  # type: ignore[misc]  # a pair, for `output_loading_info`
            folder, config=model.config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except TypeError:  # a constructor that takes more than a configuration: there is no other to ask
        return Saved(problems)
    translated = loaded.state_dict()
    saved = {name: tuple(tensor.shape) for name, tensor in translated.items() if name not in found["missing_keys"]}
    saved |= dict.fromkeys(found["unexpected_keys"], ())
    saved |= {name: tuple(shape) for name, shape, _ in found["mismatched_keys"]}
    problems, _ = _differences(model.state_dict(), saved, frozen)
    return Saved(problems) if problems else Saved([], translated)


def _differences_of_adapter(model: nn.Module, folder: str, peft: Any) -> list[str]:
    """Return how the adapter "default" differs from the saved one; other adapters have their own folders."""
    if not os.path.exists(os.path.join(folder, ADAPTER_SAFE_WEIGHTS_NAME)):
        return []
    problems, _ = _differences(peft.get_peft_model_state_dict(model), _shapes(folder, {ADAPTER_SAFE_WEIGHTS_NAME}))
    return problems


def _files(folder: str) -> set[str]:
    """Return the files that hold the weights: one, or one for each shard of a large model."""
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if os.path.exists(index):
        with open(index) as file:
            return set(json.load(file)["weight_map"].values())
    return {SAFE_WEIGHTS_NAME} if os.path.exists(os.path.join(folder, SAFE_WEIGHTS_NAME)) else set()


def _shapes(folder: str, files: set[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        with safe_open(os.path.join(folder, name), framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    return found


def _differences(
    tensors: dict[str, torch.Tensor], saved: dict[str, tuple[int, ...]], frozen: Iterable[str] = ()
) -> tuple[list[str], bool]:
    """Return how `tensors` and `saved` differ in names and shapes, and whether the names differ.

    What is `frozen` may be missing: Trainers that save only what they train leave it as the script created it.
    """
    # Of a lazy layer there is no shape to compare before it is loaded.
    lazy = {name for name, tensor in tensors.items() if is_lazy(tensor)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in lazy}
    saved = {name: shape for name, shape in saved.items() if name not in lazy}
    # Of tensors that share their memory, one is saved.
    stored = {tensors[name].data_ptr() for name in saved if name in tensors}
    needed = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    missing = [name for name, tensor in needed.items() if name not in saved and tensor.data_ptr() not in stored]
    unexpected = [name for name in saved if name not in tensors]
    problems = [
        *(
            f"{name} is {tuple(tensor.shape)}, saved as {saved[name]}"
            for name, tensor in tensors.items()  # in the order of the model, because only the first are shown
            if name in saved and tuple(tensor.shape) != saved[name]
        ),
        *(f"{name} was not saved" for name in missing),
        *(f"{name} was saved and is no more" for name in unexpected),
    ]
    return problems, bool(missing or unexpected)
