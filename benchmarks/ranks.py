"""End one process of a training in several, again and again, and look whether all end and how the next start resumes.

`python benchmarks/ranks.py` starts a PyTorch Lightning training in two processes on the CPU in each of the ways that
users do, and sends SIGTERM or SIGKILL to one of them, at a random moment. The next start resumes from what is left. It
prints a Markdown table. With `--cost`: what a batch costs more with the callback.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking import CheckpointManager

TORCHRUN = [os.path.join(sysconfig.get_path("scripts"), "torchrun"), "--standalone", "--nproc-per-node=2"]
LAUNCHERS = {"ddp": [sys.executable], "ddp_spawn": [sys.executable], "torchrun": TORCHRUN}
HANGS_AFTER = 60  # seconds
BATCHES = 2000  # for the cost of one


class Model(LightningModule):
    def __init__(self, outputs: Path, *, counts: bool) -> None:
        super().__init__()
        self.outputs = outputs
        self.layer = torch.nn.Linear(64, 64)
        self.counts = counts
        self.ends: list[float] = []

    def train_dataloader(self) -> Any:
        data = TensorDataset(torch.randn(2 * BATCHES if self.counts else 200, 64))
        return DataLoader(data, batch_size=1 if self.counts else 4)

    def on_train_start(self) -> None:
        (self.outputs / f"pid-{self.global_rank}").write_text(str(os.getpid()))

    def training_step(self, batch: Any) -> Any:
        self.ends.append(time.perf_counter())
        if not self.counts:
            time.sleep(0.01)
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def train(outputs: Path, launcher: str, *, counts: bool, plain: bool) -> None:
    """Train in one process, which writes its process id to a file, or prints how long a batch took."""
    model = Model(outputs, counts=counts)
    ours = [] if plain else [PolyaxonCallback(every_n_train_steps=None if counts else 5)]
    strategy = "ddp" if launcher == "torchrun" else launcher
    settings: Any = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": outputs,
    }
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1 if counts else -1, callbacks=ours, **settings
    )
    trainer.fit(model)
    if trainer.global_rank == 0:
        print(statistics.median(b - a for a, b in zip(model.ends, model.ends[1:], strict=False)))


def started(outputs: Path, launcher: str, *options: str, **how: Any) -> subprocess.Popen[str]:
    command = [*LAUNCHERS[launcher], __file__, "--train", str(outputs), "--launchers", launcher, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs)}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **how)


def rounds(launcher: str, count: int, chance: random.Random) -> None:
    """Print a row: what the starts after `count` ends of one process found."""
    hangs = nothing = back = 0
    took = []
    with tempfile.TemporaryDirectory() as directory:
        outputs = Path(directory)
        checkpoints = CheckpointManager(outputs / "checkpoints" / "resume")
        for _ in range(count):
            before = checkpoints.latest()
            log = (outputs / "log").open("w+")
            training = started(outputs, launcher, stdout=log, stderr=log)
            while len(list(outputs.glob("pid-*"))) < 2:
                assert training.poll() is None, Path(log.name).read_text()
                time.sleep(0.02)
            time.sleep(chance.uniform(0.5, 2))
            number, rank = chance.choice([signal.SIGTERM, signal.SIGKILL]), chance.randrange(2)
            os.kill(int((outputs / f"pid-{rank}").read_text()), number)
            began = time.monotonic()
            try:
                training.wait(HANGS_AFTER)
            except subprocess.TimeoutExpired:
                hangs += 1
                print(f"{launcher} hangs after {number.name} to rank {rank}: {outputs}", file=sys.stderr)
            took.append(time.monotonic() - began)
            if training.poll() is None:
                os.killpg(training.pid, signal.SIGKILL)
                training.wait()
            [*resumed] = re.findall(r"Resuming from .*step (\d+)\n", Path(log.name).read_text())
            nothing += before is not None and not resumed
            back += bool(before is not None and resumed and int(resumed[0]) < before.step)
            for path in outputs.glob("pid-*"):
                path.unlink()
    print(
        f"| `{launcher}` | {count} | {hangs} | {nothing} | {back} | "
        f"{statistics.median(took):.1f} s, at most {max(took):.1f} s |",
        flush=True,
    )


def cost() -> None:
    """Print how long a batch takes with the callback and without, in two processes."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for plain, found in times.items():
            with tempfile.TemporaryDirectory() as directory:
                options = ["--cost", *(["--plain"] if plain else [])]
                training = started(Path(directory), "ddp", *options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                found.append(float(training.communicate()[0].split()[-1]))
    ours, plain = statistics.median(times[False]) * 1e6, statistics.median(times[True]) * 1e6
    print(f"A batch of ddp that does nearly nothing: {plain:.0f} µs; with the callback {ours:.0f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=list(LAUNCHERS), default=list(LAUNCHERS))
    parser.add_argument("--rounds", type=int, default=10, help="of each launcher")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.launchers[0], counts=arguments.cost, plain=arguments.plain)
    elif arguments.cost:
        cost()
    else:
        print("| | rounds | hang | nothing to resume from | goes further back | ended after |")
        print("|---|---|---|---|---|---|", flush=True)
        for launcher in arguments.launchers:
            rounds(launcher, arguments.rounds, random.Random(arguments.seed))


if __name__ == "__main__":
    main()
