"""Handwritten digits in a loop with Lightning Fabric that resumes after a kill: `python examples/fabric_digits.py`.

On two processes: `torchrun --nproc-per-node=2 examples/fabric_digits.py`.
"""

from __future__ import annotations

import logging
import os

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from digits import LOCAL, load
from polyaxon_torch import TrainingLoop
from polyaxon_tracking import get_log_level


def main() -> None:
    logging.basicConfig(level=get_log_level() or "INFO")
    fabric = Fabric(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")))
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=1e-3))

    with TrainingLoop(model=model, optimizer=optimizer, datasets={"digits": LOCAL}) as training:
        (x, y), (x_test, y_test) = (map(torch.from_numpy, part) for part in load(training.data_path("digits")))
        loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
        for _ in training.epochs(20):
            for images, labels in training.batches(loader):
                optimizer.zero_grad()
                fabric.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()

    accuracy = (network(x_test).argmax(1) == y_test).float().mean()
    print(f"test accuracy {accuracy:.3f}, outputs {training.outputs_path}")


if __name__ == "__main__":
    main()
