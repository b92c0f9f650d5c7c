"""How long checkpoints hold a training up, next to what a user would otherwise pick: `python benchmarks/speed.py`.

Each figure is measured in its own process, one after the other, and the table compares medians of one run on one
machine. It prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

EVENTS = 6  # of which the first, in which everybody's memory is still cold, is left out
TENSORS = 10
MIB = 1 << 20


# What is measured. Each function runs in its own process, and returns seconds or ratios.


def lightning_blocked(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Measure how long one checkpoint event holds the loop up, and how long a copy of the state takes."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    from polyaxon_lightning import PolyaxonCallback
    from polyaxon_tracking.background import wait_for_all

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            for index in range(TENSORS):
                self.register_buffer(f"buffer_{index}", torch.rand(megabytes * MIB // 4 // TENSORS))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            for index in range(TENSORS):
                getattr(self, f"buffer_{index}").add_(1)
            return self.layer(batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    class Clock(Callback):
        def __init__(self) -> None:
            self.events: list[float] = []
            self.started: float | None = None

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if self.started is not None:
                self.events.append(time.perf_counter() - self.started)
            wait_for_all()
            if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
                executor = trainer.strategy.checkpoint_io._executor
                if executor is not None:
                    executor.submit(int).result()
            os.sync()

    clock = Clock()
    callbacks: list[Callback] = [clock]
    plugins = []
    if subject in ("ours", "ours in the foreground"):
        os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = outputs
        callbacks += [PolyaxonCallback(background=subject == "ours"), ModelCheckpoint()]
    elif subject != "nothing":
        callbacks += [ModelCheckpoint(outputs, save_last=True)]
        plugins = [AsyncCheckpointIO()] if subject == "async" else []
    trainer = Trainer(
        max_epochs=EVENTS + 2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=subject != "nothing",
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=outputs,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(1, 1)))
    return {"events": clock.events[1:], "copy": timed_copy([*module.state_dict().values()])}


def keras_blocked(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Measure the same with Keras."""
    import keras
    import numpy as np

    from polyaxon_keras import PolyaxonCallback
    from polyaxon_tracking.background import wait_for_all

    @keras.saving.register_keras_serializable()
    class Ballast(keras.layers.Layer):
        def build(self, _: object) -> None:
            shape = (megabytes * MIB // 4 // TENSORS,)
            self.ballast = [self.add_weight(shape=shape, initializer="ones", name=f"w{i}") for i in range(TENSORS)]

        def call(self, inputs: Any) -> Any:
            return inputs + sum(ballast[0] for ballast in self.ballast)

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

    class Clock(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.events: list[float] = []
            self.started: float | None = None
            self.orbax: Any = None

        def on_epoch_end(self, epoch: int, logs: object = None) -> None:
            self.started = time.perf_counter()

        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            if self.started is not None:
                self.events.append(time.perf_counter() - self.started)
            wait_for_all()
            if self.orbax is not None:
                self.orbax.wait_until_finished()
            os.sync()

    clock = Clock()
    callbacks: list[Any] = [clock]
    if subject == "ours":
        os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = outputs
        callbacks.append(PolyaxonCallback())
    elif subject == "native":
        callbacks.append(keras.callbacks.ModelCheckpoint(os.path.join(outputs, "model.keras")))
    elif subject == "orbax":
        clock.orbax = keras.callbacks.OrbaxCheckpoint(os.path.abspath(outputs), save_freq="epoch", max_to_keep=2)
        callbacks.append(clock.orbax)
    model = keras.Sequential([keras.Input((1,)), Ballast(), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-6), "mse")
    model.fit(np.ones((1, 1)), np.ones(1), epochs=EVENTS + 2, verbose=0, callbacks=callbacks)
    state = model.get_weights()
    copies = [np.zeros_like(array) for array in state]

    def copy() -> None:
        for target, array in zip(copies, state, strict=True):
            np.copyto(target, array)

    copy()
    return {"events": clock.events[1:], "copy": list(timed(copy))}


def transformers_blocked(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Measure the same with Hugging Face's Trainer, and its peak of memory. A third of the state are weights."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_jit_checkpoint import CheckpointManager

    from polyaxon_tracking.background import wait_for_all
    from polyaxon_transformers import PolyaxonCallback

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            size = megabytes * MIB // 4 // TENSORS // 3
            self.layers = torch.nn.ParameterList([torch.rand(size) for _ in range(TENSORS)])

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": sum(layer.mean() for layer in self.layers) * x.mean()}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.events: list[float] = []
            self.started: float | None = None
            self.memory_before = 0

        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            if self.memory_before == 0:
                self.memory_before = _peak_memory(reset=True)

        def on_epoch_end(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()
            if subject == "jit":
                CheckpointManager(trainer).execute_jit_checkpoint()

        def on_epoch_begin(self, *_: object, **__: object) -> None:
            if self.started is not None:
                self.events.append(time.perf_counter() - self.started)
            wait_for_all()
            os.sync()

    clock = Clock()
    callbacks: list[TrainerCallback] = [clock]
    if subject in ("ours", "ours in the foreground"):
        os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = outputs
        callbacks.append(PolyaxonCallback(background=subject == "ours"))
    trainer = Trainer(
        Module(),
        TrainingArguments(
            os.path.join(outputs, "model"),
            num_train_epochs=EVENTS + 2,
            save_strategy="no" if subject in ("nothing", "jit") else "epoch",
            save_total_limit=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"x": torch.ones(1)}],
        callbacks=callbacks,
    )
    trainer.train()
    memory = (_peak_memory() - clock.memory_before) / (megabytes * MIB)
    copy = timed_copy(3 * [*trainer.model.state_dict().values()])
    return {"events": clock.events[1:], "copy": copy, "memory": [memory]}


def foreground(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Measure how long a foreground save takes: ours, Lightning's, and a bare write of as many bytes."""
    import torch
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from polyaxon_tracking import CheckpointManager

    state = {str(index): torch.rand(megabytes * MIB // 4 // TENSORS) for index in range(TENSORS)}
    manager = CheckpointManager(os.path.join(outputs, "ours"))
    numbers = iter(range(1, 1000))

    def ours() -> None:
        with manager.save(next(numbers)) as path:
            torch.save(state, path)

    def native() -> None:
        TorchCheckpointIO().save_checkpoint(state, os.path.join(outputs, f"native-{next(numbers)}.ckpt"))

    def bare() -> None:
        with open(os.path.join(outputs, f"bare-{next(numbers)}"), "wb", buffering=0) as file:
            file.writelines(memoryview(tensor.numpy()).cast("B") for tensor in state.values())
            os.fsync(file.fileno())

    found: dict[str, list[float]] = {"ours": [], "native": [], "bare": []}
    for _ in range(EVENTS):
        for name, save in (("bare", bare), ("ours", ours), ("native", native)):
            for old in [
                *Path(outputs).glob("native-*"),
                *Path(outputs).glob("bare-*"),
                *Path(outputs, "ours").glob("s*"),
            ]:
                old.unlink()
            os.sync()
            found[name] += timed(save, 1)
    return {name: seconds[1:] for name, seconds in found.items()}


def memory(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Memory that saving takes at its peak, beyond what was in use before, as a multiple of the state."""
    import torch
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from polyaxon_lightning.checkpoint_io import DurableCheckpointIO
    from polyaxon_torch.snapshot import Snapshot
    from polyaxon_tracking.training import BackgroundWriter

    state = {str(index): torch.rand(megabytes * MIB // 4 // TENSORS) for index in range(TENSORS)}
    small = {"0": torch.rand(10)}
    background = Snapshot(BackgroundWriter(_minutes(10)))

    def save(number: int, checkpoint: dict[str, Any]) -> None:
        path = os.path.join(outputs, f"{number}.ckpt")
        if subject == "background":
            background.save(path, number, checkpoint, lambda copy: torch.save(copy, path))
        else:
            io = DurableCheckpointIO() if subject == "foreground" else TorchCheckpointIO()
            io.save_checkpoint(checkpoint, path)

    save(0, {"global_step": 0, "state": small})  # imports what it needs
    background.wait()
    before = _peak_memory(reset=True)
    for number in range(1, 4):
        for tensor in state.values():
            tensor.add_(1)
        save(number, {"global_step": number, "state": state})
    background.wait()
    return {"ratio": [(_peak_memory() - before) / (megabytes * MIB)]}


def written_once(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Bytes on the disk of a ModelCheckpoint(save_last=True), whose two names get the same content, of one state."""
    lightning_same_content(megabytes, outputs)
    files = {path.stat().st_ino: path.stat().st_size for path in Path(outputs, "checkpoints").glob("*.ckpt")}
    names = list(Path(outputs, "checkpoints").glob("*.ckpt"))
    assert len(names) == 2, names
    return {"ratio": [sum(files.values()) / (megabytes * MIB)]}


def lightning_same_content(megabytes: int, outputs: str) -> None:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from polyaxon_lightning import PolyaxonCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.register_buffer("ballast", torch.zeros(megabytes * MIB // 4))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            self.ballast += 1
            return self.layer(batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = outputs
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, callbacks=[PolyaxonCallback(), ModelCheckpoint(save_last=True)], **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(1, 1)))


def lightning_batches(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Seconds a batch of a loop of empty steps, with and without the callback."""
    import torch
    from lightning.pytorch import LightningModule, Trainer

    from polyaxon_lightning import PolyaxonCallback

    class Empty(LightningModule):
        def training_step(self, batch: torch.Tensor, _: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    batches = 100_000
    data = torch.zeros(batches)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

    def epoch(number: int, *, ours: bool) -> float:
        os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = os.path.join(outputs, str(number))
        callbacks = [PolyaxonCallback()] if ours else []
        trainer = Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=outputs, **quiet)
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        started = time.perf_counter()
        trainer.fit(Empty(), loader)
        return (time.perf_counter() - started) / batches

    return _alternating(epoch)


def keras_batches(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Measure the same with Keras."""
    import keras
    import numpy as np

    from polyaxon_keras import PolyaxonCallback

    class Empty(keras.Model):
        def train_step(self, *_: Any) -> dict[str, float]:
            return {}

        def make_train_function(self, force: bool = False) -> None:
            self.train_function = lambda *_: {}

    batches = 100_000
    data = np.zeros((batches, 1), np.float32)

    def epoch(number: int, *, ours: bool) -> float:
        os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = os.path.join(outputs, str(number))
        model = Empty()
        model.compile()
        model.build((None, 1))
        callbacks = [PolyaxonCallback(filepath="model.weights.h5", save_weights_only=True)] if ours else []
        started = time.perf_counter()
        model.fit(data, batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)
        return (time.perf_counter() - started) / batches

    return _alternating(epoch)


def resume(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Find and verify the newest checkpoint, and read its file once; neither is in the system's cache."""
    from polyaxon_tracking import CheckpointManager

    manager = CheckpointManager(outputs, max_to_keep=3)
    for step in (1, 2):
        with manager.save(step) as path, open(path, "wb") as file:
            file.writelines(os.urandom(MIB) for _ in range(megabytes))
    newest = manager.checkpoints()[0].path

    def read() -> None:
        buffer = bytearray(MIB)
        with open(newest, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    found: dict[str, list[float]] = {"read": [], "latest": []}
    for _ in range(EVENTS):
        for name, function in (("read", read), ("latest", manager.latest)):
            _forget(newest)
            found[name] += timed(function, 1)
    return {name: seconds[1:] for name, seconds in found.items()}


def imports(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Seconds of a whole process that imports a package."""
    found: dict[str, list[float]] = {"pass": [], "import polyaxon_tracking": [], "import traceml.tracking": []}
    for _ in range(EVENTS):
        for statement in found:
            command = [sys.executable, "-c", statement]
            found[statement] += timed(
                lambda command=command: subprocess.run(command, check=True, capture_output=True), 1
            )
    return found


def data_paths(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Seconds of parsing 10,000 datasets."""
    from polyaxon_tracking import get_data_paths

    text = json.dumps({f"dataset-{index}": f"/data/mounted/{index}" for index in range(10_000)})
    os.environ["POLYAXON_RUN_DATA_PATHS"] = text
    found: dict[str, list[float]] = {"ours": [], "json": []}
    for _ in range(30):
        found["ours"] += timed(get_data_paths, 1)
        found["json"] += timed(lambda: json.loads(text), 1)
    return found


def whole_run(subject: str, megabytes: int, outputs: str) -> dict[str, list[float]]:
    """Seconds of 50 epochs, with a checkpoint each and without any."""
    import torch
    from lightning.pytorch import LightningModule, Trainer

    from polyaxon_lightning import PolyaxonCallback

    width = 1024

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(2)])

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-6)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data = torch.rand(16 * 128, width)

    def train(number: int, *, ours: bool) -> float:
        os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = os.path.join(outputs, str(number))
        callbacks = [PolyaxonCallback()] if ours else []
        trainer = Trainer(max_epochs=50, callbacks=callbacks, enable_checkpointing=ours, **quiet)
        started = time.perf_counter()
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=128))
        return time.perf_counter() - started

    return _alternating(train)


def timed(function: Callable[[], object], times: int = 5) -> Iterator[float]:
    for _ in range(times):
        started = time.perf_counter()
        function()
        yield time.perf_counter() - started


def timed_copy(state: list[torch.Tensor]) -> list[float]:
    """Return how long a copy of `state` in memory takes, each time into the same memory."""
    copies = [tensor.new_zeros(tensor.shape) for tensor in state]

    def copy() -> None:
        for target, tensor in zip(copies, state, strict=True):
            target.copy_(tensor)

    copy()
    return list(timed(copy))


def _alternating(run: Callable[..., float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(EVENTS):
        found["without"].append(run(number, ours=False))
        found["with"].append(run(number, ours=True))
    return {name: seconds[1:] for name, seconds in found.items()}


def _peak_memory(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def _forget(path: str) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _minutes(minutes: int) -> Any:
    from datetime import timedelta

    return timedelta(minutes=minutes)


# The table.


def measure(name: str, subject: str = "", megabytes: int = 400, backend: str = "torch") -> dict[str, float]:
    """Return the medians of what the function `name` returns, each time in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", name, "--subject", subject]
    command += ["--megabytes", str(megabytes)]
    settings = {"KERAS_BACKEND": backend, "POLYAXON_LOG_LEVEL": "WARNING", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as outputs:
        result = subprocess.run(
            [*command, "--outputs", outputs], env=os.environ | settings, capture_output=True, text=True, check=False
        )
    if result.returncode:
        sys.exit(f"{name} {subject} {backend} failed:\n{result.stderr}")
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"{name} {subject} {megabytes} {backend}: {found}", file=sys.stderr, flush=True)
    return {key: statistics.median(values) for key, values in found.items()}


def row(what: str, ours: float, against: str, theirs: float, target: float, unit: str = "s") -> None:
    ratio = ours / theirs
    scale, digits = {"s": (1, 3), "ms": (1e3, 2), "µs": (1e6, 1), "of the state": (1, 2)}[unit]
    reached = "yes" if ratio <= target else "**no**"
    print(
        f"| {what} | {ours * scale:.{digits}f} {unit} | {against} | {theirs * scale:.{digits}f} {unit} | {ratio:.3g} | "
        f"{target:.3g} | {reached} |",
        flush=True,
    )


# What users would otherwise pick.
NATIVES = {"lightning": ("native", "async"), "keras": ("native", "orbax"), "transformers": ("native", "jit")}


def events(framework: str, megabytes: int, backend: str = "torch") -> dict[str, float]:
    """Return the seconds of an event with each, minus those without a save, and of a copy of the state in memory."""
    subjects = ("nothing", "ours", *NATIVES[framework])
    found = {subject: measure(f"{framework}_blocked", subject, megabytes, backend) for subject in subjects}
    nothing = found["nothing"]["events"]
    blocked = {subject: seconds["events"] - nothing for subject, seconds in found.items()}
    memory = found["ours"].get("memory", 0) - found["nothing"].get("memory", 0)
    return blocked | {"copy": found["ours"]["copy"], "memory": memory}


def table(megabytes: int) -> None:
    print(
        "| | this library | against | that | ratio | to reach | reached |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    found = events("lightning", megabytes)
    what = "Lightning: the loop is blocked by a checkpoint event"
    row(what, found["ours"], "`ModelCheckpoint(save_last=True)`", found["native"], 1 / 20)
    row(what, found["ours"], "the same with `AsyncCheckpointIO`", found["async"], 1 / 5)
    row(what, found["ours"], "a copy of the state in memory", found["copy"], 2)
    for backend in ("torch", "tensorflow", "jax"):
        found = events("keras", megabytes, backend)
        what = f"Keras on {backend}: the same"
        row(what, found["ours"], "`ModelCheckpoint`, a full `.keras`", found["native"], 1 / 10)
        row(what, found["ours"], "`OrbaxCheckpoint`", found["orbax"], 1 / 2)
    found = events("transformers", megabytes)
    what = "Hugging Face's Trainer: the same"
    row(what, found["ours"], '`save_strategy="epoch"`', found["native"], 1 / 10)
    row(what, found["ours"], "the save of `enable_jit_checkpoint`", found["jit"], 1 / 10)
    row(what, found["ours"], "a copy of the state in memory", found["copy"], 2)
    row("Hugging Face's Trainer: extra memory", found["memory"], "the state", 1, 1.05, "of the state")
    saves = measure("foreground", megabytes=megabytes)
    row("Save in the foreground", saves["ours"], "bare write and fsync of the bytes", saves["bare"], 1.3)
    row("Save in the foreground", saves["ours"], "Lightning's, which syncs nothing", saves["native"], 1)
    for subject, target in (("foreground", 0.05), ("background", 1.05)):
        extra = measure("memory", subject, megabytes)["ratio"]
        row(f"Extra memory, {subject}", extra, "the state", 1, target, "of the state")
    extra = measure("memory", "native", megabytes)["ratio"]
    print(f"| Extra memory, Lightning's own | | the state | {extra:.2f} of the state | | | |", flush=True)
    once = measure("written_once", megabytes=megabytes)["ratio"]
    row("Bytes on disk for two names of the same content", once, "the state", 1, 1.01, "of the state")
    for framework in ("lightning", "keras"):
        batches = measure(f"{framework}_batches")
        extra = batches["with"] - batches["without"]
        what = f"{framework.capitalize()}: a batch costs more by"
        row(what, extra, "5 µs", 5e-6, 1, "µs")
    found = measure("resume", megabytes=megabytes)
    row("Find and verify the newest", found["latest"], "reading the file once", found["read"], 1.3)
    found = measure("imports")
    bare = found["pass"]
    ours = found["import polyaxon_tracking"] - bare
    row("`import polyaxon_tracking`, beyond bare Python", ours, "10 ms", 0.01, 1, "ms")
    row("the same", ours, "`import traceml.tracking`", found["import traceml.tracking"] - bare, 1 / 100, "ms")
    found = measure("data_paths")
    row("`get_data_paths()` of 10,000 entries", found["ours"], "`json.loads`", found["json"], 1.5, "ms")
    found = measure("whole_run")
    row("50 epochs with a checkpoint each", found["with"], "the same without any", found["without"], 1.05)


def sweep(sizes: list[int]) -> None:
    print(
        "\n| state | Lightning | `ModelCheckpoint(save_last=True)` | with `AsyncCheckpointIO` | Keras on torch | "
        "`ModelCheckpoint`, a full `.keras` | `OrbaxCheckpoint` | a copy in memory |\n" + 8 * "|---" + "|",
        flush=True,
    )
    for size in sizes:
        lightning, keras = events("lightning", size), events("keras", size)
        cells = [lightning["ours"], lightning["native"], lightning["async"]]
        cells += [keras["ours"], keras["native"], keras["orbax"], lightning["copy"]]
        print(f"| {size} MB | {' | '.join(f'{seconds * 1e3:.1f} ms' for seconds in cells)} |", flush=True)


def sweep_of_trainer(sizes: list[int]) -> None:
    print(
        "\n| state | Hugging Face's Trainer | the Trainer by itself | the save of `enable_jit_checkpoint` | "
        "a copy in memory | extra memory |\n" + 6 * "|---" + "|",
        flush=True,
    )
    for size in sizes:
        found = events("transformers", size)
        cells = [f"{found[subject] * 1e3:.1f} ms" for subject in ("ours", "native", "jit", "copy")]
        print(f"| {size} MB | {' | '.join(cells)} | {found['memory']:.2f} of the state |", flush=True)


def machine() -> str:
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    names = {"torch", "lightning", "transformers", "keras", "tensorflow", "tensorflow_cpu", "jax", "orbax-checkpoint"}
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    versions = [f"{name} {version}" for name, version in sorted(installed.items()) if name in names]
    free = shutil.disk_usage(tempfile.gettempdir()).free // 10**9
    return (
        f"{os.cpu_count()} cores ({model or platform.machine()}), {free} GB free in {tempfile.gettempdir()}, no GPU, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400, help="size of the state")
    parser.add_argument("--sweep", type=int, nargs="*", default=[10, 100, 400, 1000, 2000], help="in megabytes")
    parser.add_argument("--measure", help="one figure, in this process")
    parser.add_argument("--subject", default="")
    parser.add_argument("--outputs", default="")
    arguments = parser.parse_args()
    if arguments.measure:
        found = globals()[arguments.measure](arguments.subject, arguments.megabytes, arguments.outputs)
        print(json.dumps(found))
        return
    print(f"State of {arguments.megabytes} MB. {machine()}.\n", flush=True)
    table(arguments.megabytes)
    sweep(arguments.sweep)
    sweep_of_trainer(arguments.sweep)


if __name__ == "__main__":
    main()
