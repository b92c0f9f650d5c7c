"""The objects of a loop whose state is saved: models, optimizers, schedulers, and others with a ``state_dict``."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polyaxon_torch.lazy import differing_shapes
from polyaxon_torch.plain_values import optimizer_options, scheduler_options
from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import different_model

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Stateful", "StatefulObjects"]


class Stateful(Protocol):
    """An object with a state that can be saved and loaded, such as a model, an optimizer or a scheduler."""

    def state_dict(self) -> Any: ...  # noqa: D102

    def load_state_dict(self, state_dict: Any, /) -> Any: ...  # noqa: D102


class StatefulObjects:
    """The objects of one loop, by the names that the user gave them.

    A `DistributedDataParallel` model is saved without its wrapper, so that a state of one process loads in several.

    Args:
        objects: the objects, as the user passed them.

    Raises:
        TrackingError: there are none, one has no `state_dict` or `load_state_dict`, or the parameters of a model are
            split between the ranks.
    """

    def __init__(self, objects: Mapping[str, Stateful]) -> None:
        if not objects:
            raise TrackingError(
                "Received no objects. Expected those whose state the training needs, by name, such as "
                "TrainingLoop(model=model, optimizer=optimizer)."
            )
        self._objects = {name: _unwrapped(value) for name, value in objects.items()}
        for name, value in self._objects.items():
            _check_stateful(name, value)

    @property
    def names(self) -> str:
        """Return the names of the objects, for messages."""
        return ", ".join(self._objects)

    @property
    def model(self) -> Stateful:
        """Return the object that identifies the training: the first model, or else the first object."""
        return next(iter(self.modules().values()), next(iter(self._objects.values())))

    def modules(self) -> dict[str, nn.Module]:
        """Return the models."""
        return {name: value for name, value in self._objects.items() if isinstance(value, nn.Module)}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return torch's optimizers, each once: those that were passed, and those that passed objects wrap."""
        found = [getattr(value, "optimizer", value) for value in self._objects.values()]
        return [*dict.fromkeys(one for one in found if isinstance(one, torch.optim.Optimizer))]

    def hyperparameters(self) -> dict[str, Any]:
        """Return the options of the optimizers and schedulers."""
        options: dict[str, Any] = {}
        for name, value in self._objects.items():
            optimizer = getattr(value, "optimizer", None)
            if isinstance(value, torch.optim.Optimizer):
                options[name] = optimizer_options(optimizer or value)
            elif isinstance(optimizer, torch.optim.Optimizer):
                options[name] = scheduler_options(value)
        return options

    def classes(self) -> dict[str, str]:
        """Return the name of the class of each object."""
        return {name: _class_of(value) for name, value in self._objects.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each object."""
        return {name: value.state_dict() for name, value in self._objects.items()}

    def load_state_dict(self, saved: Mapping[str, Any], classes: Mapping[str, str], source: str) -> None:
        """Load the states that `state_dict` returned.

        Args:
            saved: the states.
            classes: what `classes` returned when they were saved.
            source: the path or URL of the checkpoint, for messages.

        Raises:
            TrackingError: the objects are not the ones that were saved. The message lists what differs.
        """
        if saved.keys() != self._objects.keys():
            raise TrackingError(
                f"Received the objects {self.names}. Expected those saved in {source}: {', '.join(saved)}. Pass the "
                f"same names to TrainingLoop, or resume=False to start from scratch; the checkpoint stays as it is."
            )
        problems = [
            f"{name} is of the class {_class_of(value)}, saved as {classes[name]}"
            for name, value in self._objects.items()
            if _is_of_torch(value) and _class_of(value) != classes[name]
        ]
        if problems:
            raise different_model(source, problems)
        for name, value in self._objects.items():
            _load(name, value, saved[name], source)


def _load(name: str, value: Stateful, state: Any, source: str) -> None:
    error = None
    try:
        value.load_state_dict(state)
    except (RuntimeError, ValueError) as caught:
        if not _is_of_torch(value):
            raise
        error = caught
    shapes = differing_shapes(value, state) if isinstance(value, nn.Module) else []
    if shapes or error is not None:
        raise different_model(source, [f"{name}: {problem}" for problem in shapes or [str(error)]]) from None


def _unwrapped(value: Any) -> Any:
    return value.module if isinstance(value, DistributedDataParallel) else value


def _is_of_torch(value: object) -> bool:
    """Return whether `value` is a model or an optimizer, which cannot load the state of another class."""
    return isinstance(value, nn.Module | torch.optim.Optimizer)


def _class_of(value: object) -> str:
    """Return the name of the class of `value`; of the wrapped optimizer, if a framework has wrapped it."""
    is_optimizer = isinstance(value, torch.optim.Optimizer)
    return type(getattr(value, "optimizer", value) if is_optimizer else value).__name__


def _check_stateful(name: str, value: object) -> None:
    if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
        raise TrackingError(
            f"Received {name}={value!r}, an object of the class {type(value).__name__}. Expected an object with "
            f"`state_dict` and `load_state_dict`, such as a model, an optimizer or a scheduler. For values of your "
            f"own, pass an object of a class that has these two methods."
        )
    if isinstance(value, nn.Module) and (split := _first_split(value)) is not None:
        raise TrackingError(
            f"Received {name}, whose part {split!r} is split between the ranks. Expected a model that each rank "
            f"holds whole, as with DistributedDataParallel. For a model that is split, use PyTorch Lightning's "
            f"ModelParallelStrategy with polyaxon_lightning."
        )


def _first_split(model: nn.Module) -> str | None:
    """Return the name of the first parameter or module of `model` that is split between the ranks, or ``None``."""
    parameters = (name for name, parameter in model.named_parameters() if hasattr(parameter, "to_local"))
    modules = (name for name, module in model.named_modules() if type(module).__name__ == "FullyShardedDataParallel")
    return next(itertools.chain(parameters, modules), None)
