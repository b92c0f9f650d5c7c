"""Start from what another run has learned: the first of this run's references, as `custom_loop.py` left it.

In a polyaxonfile the references are listed under `environment`; elsewhere give them by hand:
`POLYAXON_REFS_OUTPUTS_PATHS='{"experiments": ["outputs"]}' python examples/warm_start.py`
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

from digits import LOCAL, load
from polyaxon_tracking import CheckpointManager, get_data_path, get_outputs_path, get_outputs_refs_paths


def main() -> None:
    references = (get_outputs_refs_paths() or {}).get("experiments", [])
    if not references:
        sys.exit(
            "This run refers to no experiment. Set POLYAXON_REFS_OUTPUTS_PATHS, as the first lines of the file say."
        )
    learned = CheckpointManager(os.path.join(references[0], "checkpoints", "resume")).latest()
    if learned is None:
        sys.exit(f"There is no checkpoint below {references[0]}. Run examples/custom_loop.py first.")
    (x, y), (x_test, y_test) = (map(torch.from_numpy, part) for part in load(get_data_path("digits", default=LOCAL)))

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model.load_state_dict(torch.load(learned.path, weights_only=True)["model"])
    print(f"starting from step {learned.step} of {references[0]}: test accuracy {accuracy(model, x_test, y_test):.3f}")

    # Fine-tune only the last layer.
    optimizer = torch.optim.Adam(model[2].parameters(), lr=1e-4)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    checkpoints = CheckpointManager(get_outputs_path("checkpoints") or "outputs/warm-start/checkpoints")
    with checkpoints.save(step=50, suffix=".pt") as path:
        torch.save({"model": model.state_dict()}, path)
    print(f"test accuracy {accuracy(model, x_test, y_test):.3f}, checkpoints {checkpoints.directory}")


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
