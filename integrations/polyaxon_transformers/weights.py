"""Save every model's weights, compare a model with a folder's weights, and find those that have other names there.

The Trainer saves weights with safetensors, which refuses tensors that share memory or are not contiguous, sparse
tensors, and values that are not tensors.

Transformers saves some architectures (ViT, mixtures of experts, many that see and read) under the names of the Hub, and
translates when `from_pretrained` reads them. The Trainer reads them itself, without the translation, and continues with
new weights for what it does not find: https://github.com/huggingface/transformers/issues/43701 and 48805.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from polyaxon_torch import check_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn
    from transformers import Trainer

__all__ = [
    "Saved",
    "check_others",
    "disk_errors",
    "is_of_peft",
    "load_with",
    "memory_of",
    "save_others",
    "save_with",
    "saved_weights",
    "split_weights",
]

# The weights that safetensors cannot hold.
_OTHER_WEIGHTS = "polyaxon_weights.pt"
_REFUSED_TYPES = {torch.complex32, torch.complex128}


class Saved(NamedTuple):
    """The weights that a folder holds for a model."""

    differences: list[str]
    """What of the model is not as it was saved, by names and shapes: the Trainer only warns of the names."""
    translated: dict[str, torch.Tensor] | None = None
    """All weights, where their names or shapes in the folder are not the model's."""


def save_with(trainer: Trainer, native: Callable[..., None], output_dir: str, *arguments: Any, **options: Any) -> None:
    """Replace ``Trainer._save``: save the weights with `native`, and those that safetensors refuses all the same."""
    uses_safetensors = getattr(trainer.args, "save_safetensors", True)  # an option until Transformers 5
    if arguments or options or not (trainer.args.should_save and uses_safetensors) or is_of_peft(trainer.model):
        native(output_dir, *arguments, **options)  # with a state dict that has been made already
        return
    model: nn.Module = trainer.model  # type: ignore[assignment]  # made by now
    found = model.state_dict()
    check_others(found)
    weights, others = split_weights(model, found)
    if all(weights.get(name) is value for name, value in found.items()):
        native(output_dir)
    else:
        native(output_dir, state_dict=weights)
    save_others(others, output_dir)


def check_others(found: dict[str, Any]) -> None:
    """Check that what safetensors refuses of the state dict `found` can be loaded.

    Raises:
        TrackingError: it holds more than tensors and plain values.
    """
    if others := _refused(found):
        check_plain(others, "or allow its class with torch.serialization.add_safe_globals")


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the errors of safetensors into an `OSError`, because only their text says that the disk is full."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def split_weights(model: nn.Module, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return of `found`, the state dict of `model` or a copy of it, what safetensors takes, and what it refuses.

    What shares memory or is not contiguous is copied, because loading copies it back into the tensors of the model.
    """
    others = _refused(found)
    copies = {name: found[name].clone(memory_format=torch.contiguous_format) for name in _to_copy(model, found)}
    return {name: value for name, value in (found | copies).items() if name not in others}, others


def save_others(others: dict[str, Any], folder: str) -> None:
    """Save to `folder` the weights that safetensors refuses, if there are any."""
    if others:
        torch.save(others, os.path.join(folder, _OTHER_WEIGHTS))


def load_with(model: nn.Module, folder: str, native: Callable[[], None]) -> None:
    """Load what `save_with` saved to `folder` into `model`, most of it with the function `native`."""
    for tensor in model.state_dict(keep_vars=True).values():
        if _is_strided(tensor) and _overlaps_itself(tensor):  # nothing can be copied into it
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    if others := _other_weights(folder):  # the Trainer fails where a weight is missing in its file
        found = {
            name: tensor for file in _files(folder) for name, tensor in load_file(os.path.join(folder, file)).items()
        }
        model.load_state_dict(found | others, strict=False)
    else:
        native()


def saved_weights(model: nn.Module, folder: str) -> Saved:
    """Compare `model` with the weights in `folder`.

    Nothing is known of models whose parts are saved by several processes: their loaders look.
    """
    if is_of_peft(model):
        return Saved(_differences_of_adapter(model, folder, sys.modules["peft"]))
    saved = _shapes(folder, _files(folder))
    if not saved:
        return Saved([])
    other_weights = _other_weights(folder)
    others = {name: _shape(value) for name, value in other_weights.items()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    problems, named_otherwise = _differences(model.state_dict(), saved | others, frozen)
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
    saved |= {name: tuple(shape) for name, shape, _ in found["mismatched_keys"]} | others
    problems, _ = _differences(model.state_dict(), saved, frozen)
    return Saved(problems) if problems else Saved([], translated | other_weights)


def is_of_peft(model: nn.Module | None) -> bool:
    """Return whether `model` is a model with adapters of PEFT, which saves only these."""
    peft = sys.modules.get("peft")  # imported by now, if the model is one of its
    return peft is not None and isinstance(model, peft.PeftModel)


def _is_strided(value: Any) -> bool:
    """Return whether `value` is a tensor of torch's own, with memory; subclasses save themselves."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type != "meta"
        and not is_lazy(value)
    )


def _refused(found: dict[str, Any]) -> dict[str, Any]:
    """Return what safetensors refuses of the state dict `found`."""
    return {name: value for name, value in found.items() if _is_refused(value)}


def _is_refused(value: Any) -> bool:
    """Return whether safetensors cannot hold `value`, also not a copy of it."""
    if not isinstance(value, torch.Tensor):  # a layer's `get_extra_state`
        return True
    return value.layout != torch.strided or value.is_quantized or value.dtype in _REFUSED_TYPES


def _to_copy(model: nn.Module, tensors: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the tensors that safetensors refuses as they are.

    Transformers' own models are saved with one of the weights that the model declares as tied, and no other.
    """
    is_of_transformers = isinstance(model, PreTrainedModel)
    declared: Any = getattr(model, "all_tied_weights_keys", None)  # since Transformers 5
    if is_of_transformers and declared is None:
        return
    seen = set()
    for name, tensor in tensors.items():
        if not _is_strided(tensor) or _is_refused(tensor) or (is_of_transformers and name in declared):
            continue
        storage = tensor.untyped_storage()
        memory = storage.device, storage.data_ptr()
        if memory in seen or not (tensor.is_contiguous() or is_of_transformers):
            yield name
        else:
            seen.add(memory)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether several elements of `tensor` are one in memory, as after ``expand``."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _other_weights(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, _OTHER_WEIGHTS)
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True) if os.path.exists(path) else {}
    return found


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def memory_of(value: Any) -> int:
    """Return what tensors that share their memory have in common."""
    return value.data_ptr() if _is_strided(value) else id(value)


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
    stored = {memory_of(tensors[name]) for name in saved if name in tensors}
    needed = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    missing = [name for name, tensor in needed.items() if name not in saved and memory_of(tensor) not in stored]
    unexpected = [name for name in saved if name not in tensors]
    problems = [
        *(
            f"{name} is {_shape(tensor)}, saved as {saved[name]}"
            for name, tensor in tensors.items()  # in the order of the model, because only the first are shown
            if name in saved and _shape(tensor) != saved[name]
        ),
        *(f"{name} was not saved" for name in missing),
        *(f"{name} was saved and is no more" for name in unexpected),
    ]
    return problems, bool(missing or unexpected)
