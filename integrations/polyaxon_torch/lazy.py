"""Lazy layers of torch, which take their shapes from their first batch, such as ``nn.LazyLinear``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["differing_shapes", "settle_lazy_layers"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def differing_shapes(model: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """Return a message for each tensor of `model` whose shape differs from its shape in the state dict `saved`.

    Call this function after `model` has loaded `saved`. Before that, lazy layers have no shapes, and some other layers
    have a shape that loading changes to the saved shape.

    Returns:
        Messages with the tensor's name and both shapes.
    """
    return [
        *(
            f"{name} is {tuple(tensor.shape)}, saved as {tuple(saved[name].shape)}"
            for name, tensor in model.state_dict().items()
            if name in saved
            and not (is_lazy(tensor) or is_lazy(saved[name]))
            and hasattr(tensor, "shape")
            and tensor.shape != saved[name].shape
        ),
        *settle_lazy_layers(model),
    ]


def settle_lazy_layers(model: nn.Module) -> list[str]:
    """Set the number of inputs of the lazy layers in `model` that have loaded weights before their first batch.

    Such a layer accepts any saved shape, whatever its arguments say. Torch leaves the layer's number of inputs at 0,
    and ``nn.LazyInstanceNorm1d`` then raises.

    Returns:
        A message for each tensor whose shape contradicts the arguments of its layer, with the name and both shapes.
    """
    problems = []
    for path, layer in model.named_modules():
        if not _has_loaded(layer):
            continue
        for name, tensor in [*layer.state_dict(prefix=f"{path}." if path else "").items()][:1]:  # only the weight
            shape = tuple(tensor.shape)
            expected = _expected(layer, shape)
            if shape == expected:
                _set_inputs(layer, shape)
            else:
                problems.append(f"{name} is {expected}, saved as {shape}")
    return problems


def _has_loaded(layer: nn.Module) -> bool:
    """Return whether `layer` is still lazy although its tensors have shapes."""
    return isinstance(layer, LazyModuleMixin) and not layer.has_uninitialized_params()


def _expected(layer: nn.Module, saved: tuple[int, ...]) -> tuple[int, ...]:
    """Return the weight's shape according to the arguments of `layer`, but with the saved number of inputs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, *saved[1:2]
    if isinstance(layer, _CONVOLUTIONS):
        return layer.out_channels, *saved[1:2], *layer.kernel_size
    if isinstance(layer, _TRANSPOSED):
        return *saved[:1], layer.out_channels // layer.groups, *layer.kernel_size
    return saved


def _set_inputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features = shape[1]
    elif isinstance(layer, _CONVOLUTIONS):
        layer.in_channels = shape[1] * layer.groups
    elif isinstance(layer, _TRANSPOSED):
        layer.in_channels = shape[0]
    elif hasattr(layer, "num_features"):  # a normalization layer
        layer.num_features = shape[0]  # type: ignore[assignment]
