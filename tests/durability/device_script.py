"""Train a model with noise from the generator of an accelerator, which Python alone makes up, and print its weights.

The device has a real generator, and nothing else of an accelerator: tensors stay on the CPU.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import smallest_script
import torch
from torch.utils import backend_registration
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Callable


class Devices:
    """What torch and its users ask of ``torch.<type of the device>``."""

    generator = torch.Generator().manual_seed(7)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: int) -> torch.Tensor:
        assert device == 0
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        assert device == 0
        self.generator.set_state(state)


def add_noise(x: torch.Tensor) -> torch.Tensor:
    """Add random numbers of the device, unless Keras only asks for the shape."""
    return x + torch.randn(x.shape, generator=Devices.generator) if x.device.type == "cpu" else x


def loop(epochs: int, perturb: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    from polyaxon_torch import TrainingLoop

    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    loader, drawn = DataLoader(torch.randn(8, 2), 2, shuffle=True), 0
    with TrainingLoop(model=model, optimizer=optimizer) as training:
        for _ in training.epochs(epochs):
            for x in training.batches(loader):
                optimizer.zero_grad()
                loss = model(perturb(x)).square().mean()
                drawn += 1
                if os.environ.get("RAISE_AT_BATCH") == str(drawn):
                    raise RuntimeError("after random numbers of this batch were drawn")
                loss.backward()
                optimizer.step()
    weights: list[float] = model.weight.flatten().tolist()
    return weights


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend("made_up", backend_module=Devices())
    assert torch.accelerator.current_accelerator() == torch.device("made_up")
    logging.basicConfig(level="INFO", format="%(message)s")
    train = loop if sys.argv[1] == "torch" else getattr(smallest_script, sys.argv[1])
    print("weights", *train(int(sys.argv[2]), add_noise))
