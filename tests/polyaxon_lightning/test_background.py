"""Saving in the background with Lightning: what is written, when, and what happens where that fails."""

from __future__ import annotations

import io
import logging
import os
import threading
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning_script import Classifier, data, trainer
from training_scripts import stderr_of

from polyaxon_lightning import PolyaxonCallback
from polyaxon_torch.snapshot import Snapshot
from polyaxon_tracking import CheckpointManager
from polyaxon_tracking.background import wait_for_all
from polyaxon_tracking.training import BackgroundWriter

if TYPE_CHECKING:
    from pathlib import Path


class Wide(Classifier):
    """A classifier with tensors so large that their copies are reused by each save."""

    def __init__(self) -> None:
        super().__init__(width=8192)


def fit(*callbacks: Callback, max_epochs: int = 3, logger: Logger | bool = False) -> Classifier:
    model = Wide()
    trainer(*callbacks, max_epochs=max_epochs, logger=logger).fit(model, data(), data())
    return model


def load(path: Path | str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def assert_same(one: Any, other: Any) -> None:
    """Check that two states have the same values, and tensors with the same bits."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.to_dense(), other.to_dense())
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
    elif isinstance(one, dict):
        assert_same(list(one), list(other))
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for item, its in zip(one, other, strict=True):
            assert_same(item, its)
    else:
        assert one == other


class Held(Callback):
    """Delay every write until the batch after the next has changed the weights, and keep the earlier weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self._batches = 0
        self._may_write = threading.Event()
        self.threads: set[str] = set()
        save = torch.save

        def held(state: Any, path: Any) -> None:
            if not isinstance(path, io.BytesIO):  # what is looked at in memory is no write
                self.threads.add(threading.current_thread().name)
                assert self._may_write.wait(60)
            save(state, path)

        monkeypatch.setattr(torch, "save", held)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights[trainer.global_step] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._may_write.clear()
        self._batches = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._batches += 1
        if self._batches == 2:
            self._may_write.set()


def test_what_is_written_is_the_state_of_the_save_though_training_has_gone_on(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    fit(held, PolyaxonCallback(max_to_keep=3), ModelCheckpoint(save_top_k=-1))
    assert held.threads == {"polyaxon-tracking-writer"}
    resume = CheckpointManager(outputs / "checkpoints" / "resume").checkpoints()
    assert [checkpoint.step for checkpoint in resume] == [12, 8, 4]
    for checkpoint in resume:
        assert checkpoint.verify() is None
        mine = outputs / "checkpoints" / f"epoch={checkpoint.epoch - 1}-step={checkpoint.step}.ckpt"
        for path in (checkpoint.path, mine):
            state = load(path)
            assert state["global_step"] == checkpoint.step
            assert state["state_dict"].keys() == held.weights[checkpoint.step].keys()
            for name, value in held.weights[checkpoint.step].items():
                assert torch.equal(state["state_dict"][name], value)


def test_the_file_is_the_one_that_is_written_in_the_foreground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {}
    for background in (True, False):
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path / "same"))
        torch.manual_seed(0)
        fit(PolyaxonCallback(background=background, resume=False), max_epochs=1)
        states[background] = load(tmp_path / "same" / "checkpoints" / "epoch=0-step=4.ckpt")
        (tmp_path / "same").rename(tmp_path / str(background))
    for state in states.values():
        state.pop("polyaxon_tracking")  # of generators that the fits have drawn from
        state.pop("polyaxon_tracking_saved")  # by which training
    assert_same(states[True], states[False])


def test_the_checkpoints_of_a_step_share_one_copy_which_is_used_again(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    save = Snapshot.save

    def measured(self: Snapshot, *arguments: Any) -> None:
        save(self, *arguments)
        sizes.append(sum(len(buffer.bytes) for buffer in self._buffers.values()))

    monkeypatch.setattr(Snapshot, "save", measured)
    model = fit(
        PolyaxonCallback(), ModelCheckpoint(), ModelCheckpoint(filename="mine", monitor="val_loss", save_top_k=-1)
    )
    weights = sum(value.nbytes for value in model.state_dict().values() if value.nbytes >= 1 << 16)
    assert sizes == [3 * weights] * 9  # with Adam's two


def test_two_names_of_the_very_same_content_are_one_file(outputs: Path) -> None:
    fit(PolyaxonCallback(), ModelCheckpoint(save_last=True))
    last, newest = outputs / "checkpoints" / "last.ckpt", outputs / "checkpoints" / "epoch=2-step=12.ckpt"
    assert last.samefile(newest)
    assert not last.is_symlink()
    assert load(last)["global_step"] == 12


def test_a_last_that_is_to_be_a_link_never_points_to_what_is_not_there(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Links(Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            last = outputs / "checkpoints" / "last.ckpt"
            assert last.exists() == os.path.lexists(last)

    fit(Held(monkeypatch), PolyaxonCallback(), ModelCheckpoint(save_last="link"), Links())
    assert load(outputs / "checkpoints" / "last.ckpt")["global_step"] == 12


def test_checkpoints_that_choose_the_same_name_get_versions(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, each = ModelCheckpoint(save_top_k=-1), ModelCheckpoint(save_top_k=-1, monitor="val_loss")
    fit(Held(monkeypatch), PolyaxonCallback(), every, each, max_epochs=2)
    names = sorted(path.name for path in (outputs / "checkpoints").glob("*.ckpt"))
    assert names == [f"epoch={epoch}-step={step}{v}.ckpt" for epoch, step in ((0, 4), (1, 8)) for v in ("-v1", "")]
    assert "file_exists" not in vars(every)


def test_what_a_callback_saves_by_itself_is_there_at_once(outputs: Path) -> None:
    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(outputs / "mine.ckpt")
            assert load(outputs / "mine.ckpt")["global_step"] == trainer.global_step

    fit(Saves(), PolyaxonCallback())


def test_a_logger_that_reads_each_checkpoint_finds_it(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Uploads(DummyLogger):
        uploaded = 0

        def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
            self.uploaded += load(checkpoint_callback.best_model_path)["global_step"]

    uploads = Uploads()
    fit(PolyaxonCallback(), ModelCheckpoint(), logger=uploads)
    assert uploads.uploaded == 4 + 8 + 12
    assert (
        "A logger of the Trainer reads each checkpoint that a ModelCheckpoint saves: those are saved in the foreground"
        in caplog.messages
    )


def test_a_logger_that_reads_none_holds_nothing_up(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    fit(held, PolyaxonCallback(), ModelCheckpoint(), logger=CSVLogger(outputs))
    assert held.threads == {"polyaxon-tracking-writer"}


class FailingOnce:
    """A disk that fails in the save of one file, and no other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
        save = torch.save

        def failing(state: dict[str, Any], path: str) -> None:
            if state["global_step"] == step and name in str(path) and not self.failed:
                self.failed = True
                raise OSError(5, "Input/output error")
            save(state, path)

        self.failed = False
        monkeypatch.setattr(torch, "save", failing)


@pytest.mark.parametrize("name", ["best", "resume"])
def test_a_write_that_fails_ends_training_after_a_batch_whose_state_is_saved(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    FailingOnce(monkeypatch, name, step=4)
    with pytest.raises(OSError, match=rf"\[Errno 5\] {outputs}\S+ was not saved, .+ Input/output error") as caught:
        fit(PolyaxonCallback(), ModelCheckpoint(filename="best-{epoch}", monitor="val_loss", save_top_k=-1))
    assert caught.value.__cause__ is not None  # the error of the disk, with where it happened
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    newest = CheckpointManager(outputs / "checkpoints" / "resume").latest()
    assert newest is not None
    assert 4 <= newest.step <= 8  # the batch that found it, or the next save
    assert load(newest.path)["global_step"] == newest.step


@pytest.mark.parametrize("name", ["best", "resume"])
def test_a_last_write_that_fails_is_raised_when_training_ends_and_its_state_saved(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    FailingOnce(monkeypatch, name, step=12)
    with pytest.raises(OSError, match="Input/output error"):
        fit(PolyaxonCallback(), ModelCheckpoint(filename="best-{epoch}", save_top_k=-1))
    newest = CheckpointManager(outputs / "checkpoints" / "resume").latest()
    assert newest is not None
    assert newest.step == 12


def test_the_old_one_stays_where_the_new_one_was_not_written(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FailingOnce(monkeypatch, "mine-", step=8)
    with pytest.raises(OSError, match="Input/output error"):
        fit(PolyaxonCallback(), ModelCheckpoint(filename="mine-{epoch}", save_top_k=1))
    assert [path.name for path in (outputs / "checkpoints").glob("*.ckpt")] == ["mine-epoch=0.ckpt"]


def test_what_changes_without_a_trace_is_not_taken_for_the_same(tmp_path: Path) -> None:
    """Averaged weights, swapped in through ``.data`` for one checkpoint of a step and out for the next."""
    background = Snapshot(BackgroundWriter())
    go_on = threading.Event()
    weights = torch.zeros(1 << 20)
    found = []

    def write(state: dict[str, Any]) -> None:
        go_on.wait(60)
        found.append(float(state["weights"][-1]))

    for value in (1.0, 2.0):
        weights.data[-1] = value
        threading.Timer(0.2, go_on.set).start()
        background.save("a file", 1, {"weights": weights}, write)
    background.wait()
    assert found == [1.0, 2.0]


def test_tensors_come_back_as_they_were() -> None:
    base = torch.arange(200_000.0)
    state = {
        "global_step": 1,
        "view": base[10:20],
        "strided": base.view(400, 500).t(),
        "tied": [base, base],
        "empty": torch.empty(0),
        "scalar": torch.tensor(3),
        "half": torch.ones(100_000, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
        "gradient": torch.ones(3, requires_grad=True),
        "nested": {"list": [1, (2.5, "three")]},
    }
    background, found = Snapshot(BackgroundWriter()), []
    background.save("a file", 1, state, found.append)
    background.wait()
    copy = found[0]
    assert_same(copy, state)
    assert copy["strided"].stride() == state["strided"].stride()
    assert copy["tied"][0].untyped_storage().data_ptr() == copy["tied"][1].untyped_storage().data_ptr()
    assert copy["view"].untyped_storage().data_ptr() == copy["tied"][0].untyped_storage().data_ptr()
    assert isinstance(copy["parameter"], torch.nn.Parameter)
    assert copy["gradient"].requires_grad


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU: CUDA, MPS or XPU")
def test_the_tensors_of_a_gpu_are_copied_to_the_host() -> None:
    device = torch.accelerator.current_accelerator()
    large, small = torch.rand(1 << 20, device=device), torch.rand(3, device=device)
    expected = {"global_step": 1, "large": large.cpu(), "small": small.cpu()}
    background, found = Snapshot(BackgroundWriter()), []
    for _ in range(2):
        background.save("a file", 1, {"large": large, "small": small}, found.append)
        large += 0
    background.wait()
    large.zero_()
    for state in found:
        assert_same(state, expected)


LITTLE_MEMORY = """
import resource, sys
import torch
from lightning.pytorch import LightningModule, Trainer, Callback
from polyaxon_lightning import PolyaxonCallback

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.register_buffer("ballast", torch.zeros(256 << 18))
    def training_step(self, batch, _):
        self.ballast += 1
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Limit(Callback):
    def on_train_start(self, trainer, pl_module):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (128 << 20), resource.RLIM_INFINITY))

trainer = Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Limit(), PolyaxonCallback()],
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(1, 1)))
"""


def test_where_memory_does_not_suffice_training_waits_and_says_so_once(tmp_path: Path) -> None:
    stderr = stderr_of(LITTLE_MEMORY, tmp_path, MALLOC_ARENA_MAX="1")
    assert stderr.count("Saving in the foreground, while training waits: a copy of the state takes 268,435,456") == 1
    newest = CheckpointManager(tmp_path / "checkpoints" / "resume").latest()
    assert newest is not None
    assert float(load(newest.path)["state_dict"]["ballast"][-1]) == 3


def test_nothing_is_left_to_write_when_fit_returns(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "polyaxon_tracking")
    fit(PolyaxonCallback())
    before = sorted(outputs.rglob("*"))
    wait_for_all()
    assert sorted(outputs.rglob("*")) == before
    assert not list(outputs.rglob(".staging-*"))
