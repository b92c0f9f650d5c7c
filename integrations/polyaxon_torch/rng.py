"""The random number generators that a training with torch draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_numbers", "random_state", "set_random_state"]


def random_numbers() -> tuple[Any, ...]:
    """Return the states of the random number generators as their libraries give them, which is cheap, as at each batch.

    `random_state` makes of them what can be saved.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda


def random_state(numbers: tuple[Any, ...] | None = None) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's random number generators, as tensors and plain values.

    Args:
        numbers: what `random_numbers` returned earlier, or ``None`` for the state now.
    """
    python, (name, keys, *counters), torchs, cuda = random_numbers() if numbers is None else numbers
    return {
        "python": python,
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *counters],
        "torch": torchs,
        "cuda": cuda,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random number generators to a `state` that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *counters = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *counters))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():  # another machine may have a different number of GPUs
        torch.cuda.set_rng_state_all(state["cuda"])
