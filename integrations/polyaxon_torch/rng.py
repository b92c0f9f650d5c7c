"""The random number generators that a training with torch draws from."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_numbers", "random_state", "set_random_state", "set_torch_random_state", "torch_random_state"]


def random_numbers() -> tuple[Any, ...]:
    """Return the states of the random number generators as their libraries give them, which is cheap, as at each batch.

    `random_state` makes of them what can be saved.
    """
    return random.getstate(), np.random.get_state(legacy=True), torch_random_state()


def random_state(numbers: tuple[Any, ...] | None = None) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's random number generators, as tensors and plain values.

    Args:
        numbers: what `random_numbers` returned earlier, or ``None`` for the state now.
    """
    python, (name, keys, *counters), torchs = random_numbers() if numbers is None else numbers
    return {
        "python": python,
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *counters],
        **torchs,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random number generators to a `state` that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *counters = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *counters))
    set_torch_random_state(state)


def torch_random_state() -> dict[str, Any]:
    """Return the state of torch's random number generators.

    The state of the CPU is named ``torch``. Those of the accelerator's devices are a list with the name of its type,
    such as ``cuda``, ``mps`` or ``xpu``.
    """
    accelerator = _accelerator()
    state: dict[str, Any] = {"torch": torch.default_generator.get_state()}
    if accelerator is not None:
        devices = getattr(torch, accelerator)
        state[accelerator] = [devices.get_rng_state(index) for index in range(devices.device_count())]
    return state


def set_torch_random_state(state: dict[str, Any]) -> None:
    """Set torch's random number generators to a `state` that `torch_random_state` returned.

    Arrays count as tensors, and other keys are ignored.
    """
    torch.set_rng_state(torch.as_tensor(state["torch"]))
    accelerator = _accelerator()
    if accelerator is not None:
        devices, states = getattr(torch, accelerator), state.get(accelerator, [])
        if len(states) == devices.device_count():  # another machine may have a different number of devices
            for index, one in enumerate(states):
                devices.set_rng_state(torch.as_tensor(one), index)


@functools.cache  # it is asked for at every batch
def _accelerator() -> str | None:
    """Return the type of this machine's accelerator, or ``None`` if there is none."""
    if hasattr(torch, "accelerator"):  # since torch 2.6
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return None if device is None else device.type
    return "cuda" if torch.cuda.is_available() else None
