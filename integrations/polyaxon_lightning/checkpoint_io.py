"""The CheckpointIO plugins with which Lightning's strategies write and read checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch

from polyaxon_lightning.framework import pl
from polyaxon_lightning.own_files import OwnFiles
from polyaxon_lightning.saved_files import SavedFile, absolute, copy_saved, damage, identity_of, is_url
from polyaxon_torch import check_plain, has_nan, how_to_allow, load_state, plain_hyperparameters, plain_numbers
from polyaxon_tracking import TrackingError, atomic_write, cached_path
from polyaxon_tracking.training import open_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from polyaxon_torch.snapshot import Snapshot
    from polyaxon_tracking import CheckpointManager
else:
    ModelCheckpoint = pl.callbacks.ModelCheckpoint
    TorchCheckpointIO = pl.plugins.io.TorchCheckpointIO

__all__ = [
    "METADATA_KEY",
    "DurableCheckpointIO",
    "TrainingStateIO",
    "detach",
    "training_state_io",
]

METADATA_KEY = "polyaxon_tracking"
"""The key, in a training state, of the values that Lightning leaves out of a checkpoint."""

# What a training state holds of them is not restored.
_HYPERPARAMETERS = (
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY,
    pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY,
)


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's TorchCheckpointIO, made durable: a file that has its name is complete and on disk.

    Lightning stages in ``$TMPDIR`` and moves, which copies in place where that is another file system, and syncs
    nothing. This class writes next to the target, syncs, and renames; to a store it uploads a complete file. Files of
    the ModelCheckpoints that were passed to `attach` are marked as files of this training, and may be written in the
    background. Every other file is written when ``trainer.save_checkpoint`` returns.

    Args:
        snapshot: the snapshot from which to write in the background; with ``None``, training waits.
        own_files: the files that the ModelCheckpoints of this training have saved; by default none.
    """

    def __init__(self, snapshot: Snapshot | None = None, own_files: OwnFiles | None = None) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._own_files = OwnFiles() if own_files is None else own_files
        self.protected_path: str | Path | None = None
        """The checkpoint from which training resumes, which is not removed."""
        self.announced: tuple[str, bool] = "", False
        """The path that a ModelCheckpoint is about to save to, and whether to save in the background."""
        self._newest: dict[str, Any] = {}
        """The newest training state's metadata, with its step."""
        self._pending: set[str] = set()
        self._listed: dict[str, set[str]] = {}
        self._last_saved: SavedFile | None = None
        self._named: set[str] = set()
        """The files that the newest training state names, such as the best model's."""
        self._removed: set[str] = set()
        """The files that were removed, and not saved again since."""
        self._unneeded: set[str] = set()
        """Those of them that are still there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to the file `path`; if that fails, the file stays as it was."""
        if storage_options is not None:
            raise TypeError(
                "`trainer.save_checkpoint(..., storage_options=...)` is not supported: see PolyaxonCallback"
            )
        announced, in_background = self.announced
        is_announced = os.fspath(path) == announced
        path, self.announced = absolute(path), ("", False)
        self._removed.discard(path)
        if is_announced:
            checkpoint = self._own_files.marked(checkpoint, path)
        if self._snapshot is not None and is_announced and in_background:
            self._pending.add(path)
            write = functools.partial(self._save_pending, path)
            self._snapshot.save(path, checkpoint["global_step"], checkpoint, write)
            return
        self.wait()
        self._last_saved = None
        self._unneeded.discard(path)
        with atomic_write(path) as staged:
            torch.save(checkpoint, staged)
        self._list(path)

    def keep_named(self, state: dict[str, Any]) -> None:
        """Keep the files that the training state `state` names, which is the newest one, until the next is written.

        A ModelCheckpoint removes a file as soon as it has a better one. If a kill comes then, the next start resumes
        from a state whose best model is that file. So the file is removed only when a state that does not name it is
        written. So is a file that was saved after the state from which training resumed, and not again.
        """
        self._named = {absolute(path) for path in _named_files(state)}
        self._newest = state.get(METADATA_KEY, {}) | {"step": state["global_step"]}
        # At the end of an epoch, every ModelCheckpoint has saved what it saves at this step.
        passed = self._own_files.take_passed(self._newest["step"] + self._newest.get("ends_epoch", False))
        self._remove_unneeded(*passed)

    def resume(self, callbacks: Iterable[Checkpoint]) -> None:
        """Find what `callbacks` saved after the training state that was loaded, because training resumes from it."""
        if self._newest:  # otherwise each rank wrote its part, which is not marked
            self._own_files.resume(self._newest.get("training"), self._newest["step"], self._named, callbacks)

    def attach(self, callback: ModelCheckpoint, *, in_background: bool) -> None:
        """Mark the files of `callback` from now on, and write them in the background if `in_background`.

        A plugin is passed only a path. Every path that a ModelCheckpoint saves to comes from its method
        `format_checkpoint_name`, so that method is made to report the path.
        """
        methods = _AttachedMethods(callback, self, in_background=in_background)
        callback.format_checkpoint_name = methods.format_checkpoint_name  # type: ignore[method-assign]
        callback.file_exists = methods.file_exists  # type: ignore[method-assign]

    def is_taken(self, path: str | Path) -> bool:
        """Return whether the file `path` exists or is being written; a store is listed once, not at every save."""
        path = absolute(path)
        if path in self._removed:
            return False
        if path in self._pending or not is_url(path):
            return path in self._pending or os.path.exists(path)
        parent, name = os.path.split(path)
        if parent not in self._listed:
            self._listed[parent] = set(open_directory(parent).names())
        return name in self._listed[parent]

    def may_save_again(self, path: str | Path) -> bool:
        """Return whether the file `path` was saved by this training, after the state from which it resumed."""
        return self._own_files.is_leftover(absolute(path))

    def wait(self) -> None:
        """Wait for all writes, and raise the error of a write that failed."""
        if self._snapshot is not None:
            self._snapshot.wait()
            self._pending.clear()

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Verify the checksums of the checkpoint `path`, which ``torch.load`` does not check, and load it.

        Raises:
            TrackingError: the file is damaged.
        """
        self.wait()
        local = cached_path(path) if is_url(path) else path
        if os.path.isfile(local) and (problem := damage(local)):
            place = absolute(os.fspath(path).partition("?")[0]) if is_url(path) else path
            raise TrackingError(
                f"Received the checkpoint {place}, which is damaged: {problem}. Expected the bytes that were saved. "
                f"Give another file, or leave out `ckpt_path` to resume from the newest intact training state; the "
                f"damaged file stays as it is."
            )
        checkpoint: dict[str, Any] = super().load_checkpoint(local, *arguments, **options)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file or directory `path`, if it exists, when no earlier save and no training state needs it."""
        if path == self.protected_path:  # Lightning itself keeps it if it is local (its issue 21813)
            return
        path = absolute(path)
        self._removed.add(path)
        if self._snapshot is None:
            self._remove_unneeded(path)
        elif not self._snapshot.failed:  # otherwise remove nothing: the next save raises the error on all ranks
            self._snapshot.submit(f"the removal of {path}", functools.partial(self._remove_unneeded, path))

    def teardown(self) -> None:
        """Wait for all writes, and free the memory of the snapshot."""
        super().teardown()
        self.wait()
        self._snapshot = self._last_saved = None

    def missing(self, paths: list[str]) -> list[str]:
        """Return those of the files `paths` that do not exist."""
        return [path for path in paths if not self.is_taken(path)]

    def _save_pending(self, path: str, checkpoint: dict[str, Any]) -> None:
        self._unneeded.discard(path)
        saved = self._last_saved
        if saved is None or saved.checkpoint is not checkpoint or not copy_saved(saved, path):
            with atomic_write(path) as staged:
                torch.save(checkpoint, staged)
        self._last_saved = SavedFile(checkpoint, path, identity_of(path))
        self._list(path)
        self._pending.discard(path)

    def _list(self, path: str) -> None:
        parent, name = os.path.split(path)
        self._listed.get(parent, set()).add(name)

    def _remove_unneeded(self, *paths: str) -> None:
        self._unneeded.update(paths)
        for path in self._unneeded - self._named:
            self._unneeded.discard(path)
            self._remove(path)

    def _remove(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
            return
        parent, name = os.path.split(path)
        open_directory(parent).remove(name)
        self._listed.get(parent, set()).discard(name)


class _AttachedMethods:
    """Two methods of a ModelCheckpoint whose files are marked; a copy of the ModelCheckpoint has its own methods."""

    def __init__(self, callback: ModelCheckpoint, io: DurableCheckpointIO, *, in_background: bool) -> None:
        self._callback = callback
        self._io: DurableCheckpointIO | None = io
        self._in_background = in_background

    def format_checkpoint_name(self, *arguments: Any, **options: Any) -> str:
        path = type(self._callback).format_checkpoint_name(self._callback, *arguments, **options)
        if self._io is not None:
            self._io.announced = path, self._in_background
        return path

    def file_exists(self, filepath: str | Path, trainer: pl.Trainer) -> bool:
        """Return whether a path is taken, and gets a version: also if its file is still being written.

        A file that a kill left of the steps that are trained again is replaced, and gets no version.
        """
        io, native = self._io, type(self._callback).file_exists
        if io is None:
            return native(self._callback, filepath, trainer)
        is_taken = False
        if native is not ModelCheckpoint.file_exists:
            is_taken = native(self._callback, filepath, trainer)
        elif trainer.is_global_zero:
            is_taken = io.is_taken(filepath)
        return bool(trainer.strategy.broadcast(is_taken and not io.may_save_again(filepath)))

    def __getstate__(self) -> dict[str, Any]:
        return {"_callback": self._callback, "_io": None, "_in_background": False}


def detach(callback: Checkpoint) -> None:
    """Restore the methods of `callback` that `DurableCheckpointIO.attach` replaced."""
    for method in ("format_checkpoint_name", "file_exists"):
        vars(callback).pop(method, None)


class TrainingStateIO(TorchCheckpointIO):
    """Write training states with a checkpoint manager, whatever path Lightning passes, and read them.

    Args:
        checkpoints: the manager that saves the training states.
        snapshot: the snapshot from which to write in the background; with ``None``, training waits.
        weights_only: whether to load only tensors and plain values.
    """

    def __init__(self, checkpoints: CheckpointManager, snapshot: Snapshot | None, *, weights_only: bool) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self._snapshot = snapshot
        self._weights_only = weights_only
        self._is_checked = not weights_only
        self.own_files = OwnFiles()
        self.on_newest: Callable[[dict[str, Any]], None] = lambda _: None
        """Called with the training state that is now the newest: the one that was loaded, and each that was written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint`, in the background if there is a snapshot.

        Raises:
            TrackingError: it is the first, and holds more than `load_checkpoint` would load.
        """
        if self._weights_only:
            checkpoint = plain_numbers(checkpoint) | {
                key: plain_hyperparameters(checkpoint[key]) for key in _HYPERPARAMETERS if key in checkpoint
            }
        if not self._is_checked:
            check_plain(checkpoint, how_to_allow("PolyaxonCallback"))
            self._is_checked = True
        if self._snapshot is None:
            self._write(checkpoint)
        else:
            step = checkpoint["global_step"]
            self._snapshot.save(f"step {step} to {self._checkpoints.directory}", step, checkpoint, self._write)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read the checkpoint at `path` into host memory."""
        checkpoint: dict[str, Any] = load_state(path, weights_only=self._weights_only)
        return checkpoint

    def _write(self, checkpoint: dict[str, Any]) -> None:
        finished_epochs = checkpoint["epoch"] + checkpoint[METADATA_KEY]["ends_epoch"]
        step, nan = checkpoint["global_step"], has_nan(checkpoint["state_dict"].values())
        with self._checkpoints.save(step, finished_epochs, has_nan=nan) as path:
            torch.save(checkpoint, path)  # to a path, because `torch.save` to a file object is twice as slow
        self.on_newest(checkpoint)


@contextlib.contextmanager
def training_state_io(trainer: pl.Trainer, io: TrainingStateIO) -> Iterator[None]:
    """Make the strategy write and read training states with `io`, whatever plugin the user passed."""
    plugin = trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = io
    try:
        yield
    finally:
        trainer.strategy.checkpoint_io = plugin


def _named_files(state: dict[str, Any]) -> set[str]:
    """Return the paths that the states of ModelCheckpoints in the training state `state` hold."""
    named: set[str] = set()
    for callback in state.get("callbacks", {}).values():
        if isinstance(callback, dict) and "best_k_models" in callback:
            named |= {*callback["best_k_models"], callback["best_model_path"], callback["last_model_path"]}
    return named - {""}
