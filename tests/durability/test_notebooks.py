"""Trainings in real kernels of Jupyter, whose cells are interrupted as a person does."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from jupyter_client.manager import KernelManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Each defines `make()`, which returns a new model, and `fit(model, slowly=False, **options)`, which trains it for 3 epochs
# of 4 steps. Slowly, a batch takes 0.2 s, so that an interrupt finds one.
CELLS = {
    "lightning": """
from lightning.pytorch import Callback
from lightning_script import Classifier as make, data, trainer
from polyaxon_lightning import PolyaxonCallback

class Slow(Callback):
    def on_train_batch_start(self, *_):
        time.sleep(0.2)

def fit(model, slowly=False, **options):
    trainer(PolyaxonCallback(every_n_train_steps=1, **options), *[Slow()] * slowly).fit(model, data(), data())
""",
    "keras": """
import keras
from keras_script import data, model as made
from polyaxon_keras import PolyaxonCallback

class Slow(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        time.sleep(0.2)

def make():
    return made("functional")

def fit(model, slowly=False, **options):
    polyaxon = PolyaxonCallback(every_n_train_steps=1, **options)
    model.fit(*data(), batch_size=18, epochs=3, verbose=0, callbacks=[polyaxon, *[Slow()] * slowly])
""",
    "transformers": """
from transformers import TrainerCallback
from transformers_script import tiny as make, trainer
from polyaxon_transformers import PolyaxonCallback

class Slow(TrainerCallback):
    def on_step_begin(self, *_, **__):
        time.sleep(0.2)

def fit(model, slowly=False, **options):
    polyaxon = PolyaxonCallback(every_n_train_steps=1, **options)
    settings = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
    trainer(polyaxon, *[Slow()] * slowly, model=model, num_train_epochs=3, **settings).train()
""",
    "torch": """
import torch
from polyaxon_torch import TrainingLoop

def make():
    return torch.nn.Linear(4, 1)

def fit(model, slowly=False, **options):
    optimizer = torch.optim.Adam(model.parameters())
    loader = torch.utils.data.DataLoader(torch.ones(32, 4), batch_size=8)
    with TrainingLoop(model=model, optimizer=optimizer, every_n_train_steps=1, **options) as training:
        for epoch in training.epochs(3):
            for rows in training.batches(loader):
                time.sleep(0.2 * slowly)
                optimizer.zero_grad()
                model(rows).square().mean().backward()
                optimizer.step()
""",
}
SETUP = """
import logging, signal, sys, threading, time
logging.basicConfig(format="%(message)s")

def what_is_left():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("polyaxon")]
    return [handlers, threads, sys.excepthook]
"""


class Cell(NamedTuple):
    """What a cell has come to: the name of its exception, or an empty text, what it showed, and in which formats."""

    error: str
    output: str
    kinds: set[str]


class Kernel:
    """A kernel, and a client that runs one cell after the other in it."""

    def __init__(self, **variables: str) -> None:
        self._manager = KernelManager()
        self._manager.start_kernel(env=os.environ | {"POLYAXON_LOG_LEVEL": "INFO"} | variables)
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=300)

    def run(self, code: str, *, interrupt_at: str | None = None) -> Cell:
        """Run a cell; interrupt it as soon as its output contains `interrupt_at`."""
        printed, kinds = "", set()

        def read(message: dict[str, Any]) -> None:
            nonlocal printed, interrupt_at
            content = message["content"]
            data = content.get("data", {})
            kinds.update(data)
            printed += content.get("text", "") + data.get("text/plain", "")
            if interrupt_at is not None and interrupt_at in printed:
                interrupt_at = None
                time.sleep(1)  # into a batch
                self._manager.interrupt_kernel()

        reply = self._client.execute_interactive(code, timeout=300, output_hook=read)["content"]
        assert reply["status"] == "ok" or reply["ename"] in ("KeyboardInterrupt", "SystemExit"), reply["evalue"]
        return Cell(reply.get("ename", ""), printed, kinds)

    def shut_down(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture
def new_kernel() -> Iterator[Callable[[str], Kernel]]:
    """Return a function that starts a kernel for a framework."""
    kernels: list[Kernel] = []

    def start(framework: str) -> Kernel:
        kernels.append(Kernel())
        assert not kernels[-1].run(SETUP + CELLS[framework]).error
        return kernels[-1]

    yield start
    for kernel in kernels:
        kernel.shut_down()


@pytest.mark.parametrize("framework", CELLS)
def test_an_interrupted_cell_saves_and_the_next_one_continues(
    new_kernel: Callable[[str], Kernel], framework: str
) -> None:
    kernel = new_kernel(framework)
    assert not kernel.run("model = make(); before = what_is_left()").error
    interrupted = kernel.run("fit(model, slowly=True, resume=True, name='mine')", interrupt_at="Starting fresh")
    # Since 2.5, Lightning calls `exit(1)` after Ctrl-C, and the kernel stays.
    assert interrupted.error == ("SystemExit" if framework == "lightning" else "KeyboardInterrupt")
    [step] = re.findall(r"Saved step (\d+) after SIGINT", interrupted.output)
    assert 0 < int(step) < 12
    assert "True" in kernel.run("what_is_left() == before").output
    again = kernel.run("fit(model, resume=True, name='mine')")
    assert not again.error
    assert re.search(rf"Resuming from \S+/checkpoints/mine/resume/step=\S+: epoch \d, step {step}\n", again.output)
    assert "True" in kernel.run("what_is_left() == before").output

    # A cell that makes the model, and is run again, trains it anew: two trainings do not mix.
    rerun = kernel.run("model = make(); fit(model, resume=True, name='mine')").output
    assert re.search(r"Starting fresh: no checkpoint in \S+/checkpoints/mine/resume-2\n", rerun)

    # A new kernel is a new start.
    other = new_kernel(framework)
    assert re.search(
        r"Resuming from \S+/version_0/checkpoints/mine/resume/step=",
        other.run("fit(make(), resume=True, name='mine')").output,
    )
    fresh = other.run("fit(make(), resume=False, name='mine')").output
    assert "Starting fresh" in fresh


def test_objects_show_what_they_are(new_kernel: Callable[[str], Kernel]) -> None:
    kernel = new_kernel("torch")
    assert not kernel.run("fit(make(), name='mine')").error
    kernel.run("from polyaxon_tracking import CheckpointManager")
    shown = kernel.run("CheckpointManager('outputs/version_0/checkpoints/mine/resume')").output
    assert re.fullmatch(r"CheckpointManager\('\S+/checkpoints/mine/resume', max_to_keep=2\)", shown)
    shown = kernel.run("CheckpointManager('outputs/version_0/checkpoints/mine/resume').latest()").output
    assert re.match(r"Checkpoint\(path='\S+', step=12, epoch=3, start=1, crc=\d+, source=", shown)


def test_a_long_wait_shows_a_bar_of_the_notebook(new_kernel: Callable[[str], Kernel]) -> None:
    kernel = new_kernel("torch")
    cell = kernel.run("""
from polyaxon_tracking.training import BackgroundWriter
writer = BackgroundWriter()
writer.submit("model.ckpt", lambda: time.sleep(4))
writer.wait()
""")
    assert not cell.error
    assert "Waiting for model.ckpt to be written" in cell.output
    assert "application/vnd.jupyter.widget-view+json" in cell.kinds
