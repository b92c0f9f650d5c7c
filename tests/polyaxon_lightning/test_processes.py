"""The Lightning callback in processes that are killed and started again, and with either of Lightning's packages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import forked
import lightning
import pytest
from packaging.version import Version
from training_scripts import SCRIPTS, train, trained

# Lightning's own faults, mended since; where one is not there any more, the test says so.
other_package = pytest.mark.xfail(
    Version(lightning.__version__) < Version("2.5.6"),
    reason="the Trainer refuses it by itself, less clearly",
    strict=True,
)


def run_new(*arguments: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter, which has imported nothing."""
    return subprocess.run(
        [python, "-W", "ignore", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("options", "resumed_at"),
    [
        # In the background the last save may still be under way when the kill comes.
        ({}, "epoch [23], step (8|12)"),
        ({"FOREGROUND": "1"}, "epoch 3, step 12"),
        ({"FOREGROUND": "1", "EVERY_N_TRAIN_STEPS": "3"}, "epoch 3, step 12"),
        ({"FOREGROUND": "1", "LAZY": "1"}, "epoch 3, step 12"),
        ({"FOREGROUND": "1", "EVERY_N_TRAIN_STEPS": "7"}, "epoch 3, step 14"),
        ({"FOREGROUND": "1", "EVERY_N_TRAIN_STEPS": "7", "WORKERS": "2"}, "epoch 3, step 14"),
        pytest.param({"FOREGROUND": "1", "EVERY_N_TRAIN_STEPS": "7", "STATEFUL": "1"}, "epoch 3, step 14"),
    ],
    ids=[
        "end of an epoch",
        "end of an epoch, in the foreground",
        "end of an epoch and of steps, in the foreground",
        "a lazy layer, in the foreground",
        "within an epoch, in the foreground",
        "within an epoch, with workers, in the foreground",
        "within an epoch, with a stateful data loader, in the foreground",
    ],
)
def test_a_killed_and_resumed_training_has_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, options: dict[str, str], resumed_at: str
) -> None:
    killed = train("lightning", tmp_path / "killed", DIE_AT_STEP="14", **options)
    assert killed.returncode == -signal.SIGKILL
    resumed = train("lightning", tmp_path / "killed", **options)
    assert re.search(f": {resumed_at}\n", resumed.stderr), resumed.stderr
    assert "Resuming within" not in resumed.stderr
    assert trained(resumed) == trained(train("lightning", tmp_path / "uninterrupted", **options))


def test_within_an_epoch_data_without_sampler_and_state_starts_again_and_that_is_logged(tmp_path: Path) -> None:
    options = {"EVERY_N_TRAIN_STEPS": "7", "FOREGROUND": "1", "ITEMS": "1"}
    assert train("lightning", tmp_path, DIE_AT_STEP="14", **options).returncode == -signal.SIGKILL
    resumed = train("lightning", tmp_path, **options)
    assert ": epoch 3, step 14\n" in resumed.stderr
    assert (
        "Resuming within epoch 3 after 2 of its 4 batches. The data has neither a sampler nor a state_dict, or the "
        "number of processes has changed, so it starts again: some of this epoch's data is repeated, and some is left "
        "out\n" in resumed.stderr
    )
    assert trained(resumed).startswith("trained 24 6 ")


def test_a_signal_to_the_whole_process_group_ends_as_a_signal_does(tmp_path: Path) -> None:
    """The data loader's workers get the signal too, and Lightning may notice their end first."""
    settings = {"POLYAXON_RUN_OUTPUTS_PATH": str(tmp_path), "WORKERS": "2", "SECONDS_PER_BATCH": "0.2"}
    process = forked.start("lightning", SCRIPTS["lightning"], **settings)
    while not list(tmp_path.glob("checkpoints/resume/step=*")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert trained(train("lightning", tmp_path)).startswith("trained 24 6 ")


FAILED_BEFORE = """
import os, signal
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from polyaxon_lightning import PolyaxonCallback

class At(Callback):
    def __init__(self, step, does):
        self.step, self.does = step, does
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.does()

def fit(*callbacks):
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[PolyaxonCallback(resume=False), *callbacks],
    )
    trainer.fit(BoringModel())

def fail():
    raise ArithmeticError

try:
    fit(At(10, fail))
except ArithmeticError:
    fit(At(20, lambda: os.kill(os.getpid(), signal.SIGTERM)))
"""


def test_a_signal_is_heard_in_a_training_after_one_that_failed(tmp_path: Path) -> None:
    process = forked.run("lightning", "-c", FAILED_BEFORE, POLYAXON_RUN_OUTPUTS_PATH=str(tmp_path))
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert "Saved step 20 after SIGTERM" in process.stderr


PACKAGES = """
import sys, importlib
first = [importlib.import_module(name) for name in sys.argv[2:]]
from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking.training.checkpoint_directories import _begun
Lightning = importlib.import_module(sys.argv[1])
from torch import nn, optim, randn
from torch.utils.data import DataLoader

class Module(Lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def training_step(self, batch, _):
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.1)

for epochs in (1, 2):
    _begun.clear()  # as in a script that is started again
    trainer = Lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[PolyaxonCallback()],
    )
    trainer.fit(Module(), DataLoader(randn(4, 2), batch_size=2))
    print("steps", trainer.global_step)
"""


@pytest.mark.parametrize(
    ("trainer", "imported_first"),
    [
        ("lightning.pytorch", []),
        ("lightning.pytorch", ["lightning.pytorch"]),
        ("pytorch_lightning", ["pytorch_lightning"]),
        ("lightning.pytorch", ["lightning.pytorch", "pytorch_lightning"]),
    ],
    ids=["nothing", "lightning", "pytorch_lightning", "both"],
)
def test_the_package_that_was_imported_first_is_the_one_in_use(
    tmp_path: Path, trainer: str, imported_first: list[str]
) -> None:
    process = run_new("-c", PACKAGES, trainer, *imported_first, POLYAXON_RUN_OUTPUTS_PATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["steps 2", "steps 4"]
    assert "Resuming from" in process.stderr


@pytest.mark.parametrize(
    ("trainer", "absent"),
    [("lightning.pytorch", {"pytorch_lightning", "lightning_fabric"}), ("pytorch_lightning", {"lightning"})],
    ids=["lightning", "pytorch_lightning"],
)
def test_one_package_suffices(tmp_path: Path, trainer: str, absent: set[str]) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python3*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.partition("-")[0] not in absent:
            (packages / path.name).symlink_to(path)
    process = run_new(
        "-c", PACKAGES, trainer, python=str(environment / "bin/python"), POLYAXON_RUN_OUTPUTS_PATH=str(tmp_path / "run")
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["steps 2", "steps 4"]


@other_package
def test_a_trainer_of_the_other_package_is_refused_before_training(tmp_path: Path) -> None:
    process = run_new("-c", PACKAGES, "pytorch_lightning", "lightning.pytorch", POLYAXON_RUN_OUTPUTS_PATH=str(tmp_path))
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        "polyaxon_tracking.errors.TrackingError: Received a Trainer of 'pytorch_lightning', but PolyaxonCallback was made "
        "for 'lightning.pytorch'. Import one of the two packages only, before polyaxon_lightning."
    )
    assert process.stdout == ""


def test_without_lightning_the_error_names_the_extra(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    code = f"import sys; sys.path[:0] = {[str(_root('polyaxon_tracking')), str(_root('polyaxon_lightning'))]!r}; import polyaxon_lightning"
    process = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", code], capture_output=True, text=True, check=False
    )
    assert process.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: polyaxon_lightning needs PyTorch Lightning, and neither `lightning` nor `pytorch_lightning` "
        'is installed. Install it with: pip install "polyaxon-tracking[lightning]"'
    )


def _root(package: str) -> Path:
    """Return a directory from which only `package` can be imported, through a link to where it is installed."""
    import importlib

    [location] = importlib.import_module(package).__path__
    directory = Path.cwd() / f"only_{package}"
    directory.mkdir()
    (directory / package).symlink_to(location)
    return directory
