"""Train a small classifier in a loop of its own; the environment says how it is set up, and how and when it dies."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import faults
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from polyaxon_torch import TrainingLoop

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, BATCH = 64, 8


class Network(nn.Module):
    """A model with all that has state: dropout, and running statistics unless the test is about exceptions."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.Identity() if "NO_BATCH_NORM" in os.environ else nn.BatchNorm1d(8)
        self.net = nn.Sequential(nn.Linear(4, 8), norm, nn.Dropout(0.2), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Counter:
    """A value of the script's own."""

    def __init__(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


class SetUp:
    """What a framework makes of the model, the optimizers and the data."""

    def __init__(self) -> None:
        self.rank = 0
        self.backward: Callable[[torch.Tensor], None] = lambda loss: loss.backward()
        self.accumulating: Callable[[Any], Any] = lambda _: nullcontext()

    def __call__(self, model: nn.Module, optimizer: Any, scheduler: Any, loader: Any) -> tuple[Any, ...]:
        if "COMPILE" in os.environ:
            model.compile(backend="aot_eager")
        return model, optimizer, scheduler, loader


class TorchRun(SetUp):
    def __init__(self) -> None:
        super().__init__()
        distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        self.rank = distributed.get_rank()

    def __call__(self, model: nn.Module, optimizer: Any, scheduler: Any, loader: Any) -> tuple[Any, ...]:
        sampler = DistributedSampler(loader.dataset)
        model = nn.parallel.DistributedDataParallel(model)
        return model, optimizer, scheduler, DataLoader(loader.dataset, BATCH, sampler=sampler)


class WithFabric(SetUp):
    def __init__(self) -> None:
        super().__init__()
        from lightning.fabric import Fabric

        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
        self.fabric.launch()
        self.rank = self.fabric.global_rank
        self.backward = self.fabric.backward

    def __call__(self, model: nn.Module, optimizer: Any, scheduler: Any, loader: Any) -> tuple[Any, ...]:
        model, optimizer = self.fabric.setup(model, optimizer)
        return model, optimizer, scheduler, self.fabric.setup_dataloaders(loader)


class WithAccelerate(SetUp):
    def __init__(self) -> None:
        super().__init__()
        from accelerate import Accelerator

        steps = int(os.environ.get("ACCUMULATE", "1"))
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        self.rank = self.accelerator.process_index
        self.backward = self.accelerator.backward
        self.accumulating = self.accelerator.accumulate

    def __call__(self, model: nn.Module, optimizer: Any, scheduler: Any, loader: Any) -> tuple[Any, ...]:
        prepared: tuple[Any, ...] = self.accelerator.prepare(model, optimizer, scheduler, loader)
        return prepared[0], prepared[1], prepared[2], prepared[3]


SET_UPS = {"plain": SetUp, "torchrun": TorchRun, "fabric": WithFabric, "accelerate": WithAccelerate}


def train(epochs: int) -> str:
    """Train, and return a digest of all that training changes."""
    kind = os.environ.get("SETUP", "plain")
    set_up = SET_UPS[kind]()
    torch.manual_seed(0)
    network, counter = Network(), Counter()
    x = torch.randn(ROWS, 4)
    workers = int(os.environ.get("WORKERS", "0"))
    loader: Any = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), BATCH, shuffle=True, num_workers=workers)
    optimizer: Any = torch.optim.Adam(network.parameters(), lr=0.01)
    scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    model, optimizer, scheduler, loader = set_up(network, optimizer, scheduler, loader)
    accumulate = 1 if kind == "accelerate" else int(os.environ.get("ACCUMULATE", "1"))
    precision = torch.autocast("cpu", torch.bfloat16) if "BF16" in os.environ else nullcontext()
    scaler = torch.amp.GradScaler("cpu", enabled="SCALER" in os.environ)

    training = TrainingLoop(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        counter=counter,
        every_n_train_steps=int(os.environ["EVERY"]) if "EVERY" in os.environ else None,
        background="FOREGROUND" not in os.environ,
    )
    with training:
        for epoch in training.epochs(epochs):
            loss = torch.zeros(())  # all batches may have been done before a signal
            for index, (rows, labels) in enumerate(training.batches(loader)):
                print(f"epoch {epoch}: rows {rows.sum():.6f}", flush=True)
                place = counter.batches, set_up.rank
                if faults.is_due("DIE_AT_BATCH", *place):
                    training._training._session.writer.wait()  # the state before this batch is on disk
                    faults.die()
                if faults.is_due("NO_ROOM_AT_BATCH", *place):
                    training._training._session.writer.wait()
                    faults.fill_disk()
                time.sleep(float(os.environ.get("SECONDS_PER_BATCH", "0")))
                with set_up.accumulating(model), precision:
                    loss = nn.functional.cross_entropy(model(rows).float(), labels)
                    if faults.is_due("RAISE_AT_BATCH", *place):
                        raise RuntimeError("mine")
                    set_up.backward(scaler.scale(loss / accumulate))
                    counter.batches += 1
                    if (index + 1) % accumulate == 0:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                        scaler.step(optimizer)
                        scaler.update()
                        scheduler.step()
                        optimizer.zero_grad(set_to_none=True)
                    elif kind == "accelerate":
                        optimizer.step()
                if faults.is_due("RAISE_AFTER_BATCH", counter.batches, set_up.rank):
                    raise RuntimeError("mine")
            if "SECONDS_PER_VALIDATION" in os.environ:
                print("validating", flush=True)
                time.sleep(float(os.environ["SECONDS_PER_VALIDATION"]))
            training.save_best(float(loss))
    values = [tensor.numpy() for tensor in network.state_dict().values()]
    return f"{faults.digest_of(values)} after {training.step} steps, {counter.batches} batches"


if __name__ == "__main__":
    faults.prepare_process()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    trained = train(int(os.environ.get("EPOCHS", "3")))
    if os.environ.get("RANK", "0") == "0":  # each rank has its own running statistics until the next forward
        print("trained", trained, flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()
