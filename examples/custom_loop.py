"""Handwritten digits in a plain PyTorch loop that resumes after a kill, with no framework.

`python examples/custom_loop.py`; on two processes, `torchrun --nproc-per-node=2 examples/custom_loop.py`.
"""

from __future__ import annotations

import logging
import os

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from digits import LOCAL, load
from polyaxon_torch import TrainingLoop
from polyaxon_tracking import get_log_level


def main() -> None:
    logging.basicConfig(level=get_log_level() or "INFO")
    is_distributed = "RANK" in os.environ  # torchrun has started this process
    if is_distributed:
        distributed.init_process_group("gloo")

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.parallel.DistributedDataParallel(network) if is_distributed else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

    with TrainingLoop(model=model, optimizer=optimizer, scheduler=scheduler, datasets={"digits": LOCAL}) as training:
        (x, y), (x_test, y_test) = (map(torch.from_numpy, part) for part in load(training.data_path("digits")))
        digits = TensorDataset(x, y)
        sampler = DistributedSampler(digits) if is_distributed else None
        loader = DataLoader(digits, batch_size=32, shuffle=sampler is None, sampler=sampler)
        for _ in training.epochs(20):
            for images, labels in training.batches(loader):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            scheduler.step()
            accuracy = (network(x_test).argmax(1) == y_test).float().mean()
            training.save_best(accuracy, mode="max")

    accuracy = (network(x_test).argmax(1) == y_test).float().mean()
    print(f"test accuracy {accuracy:.3f}, outputs {training.outputs_path}")
    if is_distributed:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
