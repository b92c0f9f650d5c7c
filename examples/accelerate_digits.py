"""Handwritten digits in a loop with Hugging Face's Accelerate that resumes after a kill.

`python examples/accelerate_digits.py`; on two processes,
`accelerate launch --cpu --num-processes 2 examples/accelerate_digits.py`.
"""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from digits import LOCAL, load
from polyaxon_torch import TrainingLoop
from polyaxon_tracking import get_data_path, get_log_level


def main() -> None:
    logging.basicConfig(level=get_log_level() or "INFO")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)

    (x, y), (x_test, y_test) = (map(torch.from_numpy, part) for part in load(get_data_path("digits", default=LOCAL)))
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)

    with TrainingLoop(model=model, optimizer=optimizer) as training:
        for _ in training.epochs(20):
            for images, labels in training.batches(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                    optimizer.step()
                    optimizer.zero_grad()

    accuracy = (network(x_test).argmax(1) == y_test).float().mean()
    accelerator.print(f"test accuracy {accuracy:.3f}, outputs {training.outputs_path}")


if __name__ == "__main__":
    main()
