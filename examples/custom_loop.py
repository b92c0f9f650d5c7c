"""Handwritten digits in a plain PyTorch loop, with the getters and a checkpoint manager: no framework, no callback.

`python examples/custom_loop.py`
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from digits import LOCAL, load
from polyaxon_tracking import CheckpointManager, get_data_path, get_log_level, get_outputs_path


def main() -> None:
    logging.basicConfig(level=get_log_level() or "INFO")
    (x, y), (x_test, y_test) = (map(torch.from_numpy, part) for part in load(get_data_path("digits", default=LOCAL)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    # Ten lines make the loop survive a kill: find the newest intact checkpoint, load it, and save one every epoch.
    checkpoints = CheckpointManager(get_outputs_path("checkpoints") or "outputs/checkpoints")
    step = first_epoch = 0
    if latest := checkpoints.latest():
        state = torch.load(latest.path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, first_epoch = latest.step, latest.epoch
        logging.info("resuming from %s: epoch %d, step %d", latest.path, first_epoch, step)

    for epoch in range(first_epoch, 20):
        order = torch.Generator().manual_seed(epoch)  # the same order of batches, resumed or not
        for images, labels in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=order):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            step += 1
        with checkpoints.save(step, epoch + 1, suffix=".pt") as path:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)

    accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    print(f"test accuracy {accuracy:.3f}, checkpoints {checkpoints.directory}")


if __name__ == "__main__":
    main()
