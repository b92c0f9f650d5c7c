"""Flipped bits in the files that the frameworks write."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import pytest
import torch

from polyaxon_tracking import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable

FLIPS = 300


def write_torch(path: str) -> None:
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.Adam(layer.parameters())
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, path)


def model() -> keras.Model:
    network = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    network.compile("adam", "mse")
    return network


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".ckpt", write_torch),
        (".weights.h5", lambda path: model().save_weights(path)),
        (".keras", lambda path: model().save(path)),
    ],
    ids=[".ckpt", ".weights.h5", ".keras"],
)
def test_any_flipped_bit_is_found(
    tmp_path: Path, suffix: str, write: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "polyaxon_tracking")  # else one line for every flip
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        with manager.save(step, suffix=suffix) as path:
            write(path)
    newest = manager.checkpoints()[0]
    content = Path(newest.path).read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), FLIPS):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        Path(newest.path).write_bytes(flipped)
        latest = manager.latest()
        assert latest is not None
        assert latest.step == 1
    Path(newest.path).write_bytes(content)
    assert manager.latest() == newest
