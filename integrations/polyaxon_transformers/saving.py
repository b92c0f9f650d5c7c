"""Save the training state, and the folders that the user asks for, with the Trainer's own code."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from polyaxon_torch import check_plain, has_nan, make_rates_plain
from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import open_directory
from polyaxon_transformers.folders import (
    STATE_SUFFIX,
    folder_name,
    folders_to_delete,
    link_folder,
    pack,
    write_metadata,
)
from polyaxon_transformers.methods import replaced_methods
from polyaxon_transformers.resuming import callback_states, path_in_output_dir
from polyaxon_transformers.weights import save_with

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polyaxon_tracking.training import Directory, StagedFile, TrainingSession
    from polyaxon_transformers.machines import Machines

__all__ = ["FolderSaver", "StateToSave", "make_state_plain", "save_natively"]


class StateToSave(NamedTuple):
    """The part of a training state that is not in the folder that the Trainer saves."""

    epoch: int
    """The number of epochs done."""
    metadata: dict[str, Any]
    """What the Trainer leaves out."""
    random: list[dict[str, Any]]
    """The random state of each rank at the beginning of the epoch, with torch's of this moment."""


class FolderSaver:
    """Saves the folders of one training.

    The Trainer writes a folder to a staging directory, and so to the cache of the operating system. What makes the
    folder durable (sync, checksum, upload) happens in the background while training continues. A training state is such
    a folder, which is packed in a single file for a store.

    Args:
        trainer: the Trainer.
        session: the session of this training.
        machines: the machines of the training.
        upload_url: where the folders that `save_strategy` asks for are uploaded, or ``None`` if they are not.
    """

    def __init__(self, trainer: Trainer, session: TrainingSession, machines: Machines, upload_url: str | None) -> None:
        self._trainer = trainer
        self._session = session
        self._machines = machines
        self._upload_url = upload_url
        self.is_remote = "://" in session.checkpoints.directory
        """Whether the checkpoints are in an object store."""
        self._directory: Directory | None = None
        """The directory of the folders that `save_strategy` asks for, once there is one."""
        self._is_checked = False
        self.best_in_state: str | None = None
        """The name of the folder with the best model, in the newest training state."""

    def check(self) -> None:
        """Check that the training state can be saved completely.

        Raises:
            TrackingError: each machine would write its part of the state, and only the first one's part is uploaded.
        """
        if self.is_remote:
            self._machines.check_state_is_whole(self._session.checkpoints.directory)

    def save_state(self, state: StateToSave) -> None:
        """Save the training state. This is a collective."""
        step, checkpoints = self._trainer.state.global_step, self._session.checkpoints
        suffix = ".tar" if self.is_remote else STATE_SUFFIX
        stage = functools.partial(checkpoints.stage, step, state.epoch, suffix=suffix, has_nan=self._has_nan())
        self._session.wait()
        with self._session.saving(step):
            with self._session.process_group.staging(stage) as (staged, path):
                folder = os.path.join(os.path.dirname(path), folder_name(step))
                with self._machines.own_folder(folder) if self.is_remote else contextlib.nullcontext(folder) as own:
                    self._write(own, self._trainer.state.best_model_checkpoint)
                    if self.is_remote:
                        self._machines.collect(own)
                with self._session.process_group.share_errors():
                    if self._session.is_writer:
                        write_metadata(folder, state.metadata, state.random)
            best, prune = self._best_name(), self._pruning()

            def finish() -> None:
                self._commit_state(staged, folder)
                self.best_in_state = best
                prune()

            self._submit(f"step {step} to {checkpoints.directory}", finish)

    def save_for_user(self, native: Callable[[], None], state: StateToSave | None) -> None:
        """Save the folder that `save_strategy` asks for, complete or not at all. This is a collective.

        Args:
            native: saves it as the Trainer does.
            state: if given, the training state is saved too, from the same files.
        """
        self._session.wait()
        if self.is_remote:
            native()
            if self._upload_url is not None:
                self._upload(self._upload_url)
            return
        with contextlib.nullcontext() if state is None else self._session.saving(self._trainer.state.global_step):
            self._save_to_disk(state)
        # Callbacks that are notified of a save read what was saved: loggers that upload it, and the user's own.
        if any(type(one).on_save is not TrainerCallback.on_save for one in self._trainer.callback_handler.callbacks):
            self._session.wait()

    def _save_to_disk(self, state: StateToSave | None) -> None:
        trainer, step = self._trainer, self._trainer.state.global_step
        name = folder_name(step)
        directory = self._directory = open_directory(str(trainer.args.output_dir))

        def publish(path: str) -> None:
            directory.sync(path)
            directory.remove(name)  # of an earlier training
            directory.publish(path, name)

        staged_state, state_folder = None, ""
        with self._session.process_group.staging(functools.partial(directory.stage, name, publish)) as (staged, path):
            is_best = trainer.state.best_global_step == step
            best = path_in_output_dir(trainer, name) if is_best else trainer.state.best_model_checkpoint
            self._write(path, best, whole=not trainer.args.save_only_model)
            with self._session.process_group.share_errors():
                if state is not None and self._session.is_writer:
                    staged_state = self._session.checkpoints.stage(
                        step, state.epoch, suffix=STATE_SUFFIX, has_nan=self._has_nan()
                    )
                    with staged_state.writing() as target:
                        state_folder = os.path.join(os.path.dirname(target), name)
                        link_folder(path, state_folder)
                        write_metadata(state_folder, state.metadata, state.random)
        best_name, prune = self._best_name(), self._pruning()

        def finish() -> None:
            assert staged is not None  # on rank 0
            staged.commit()
            if state is not None:  # its best model may be the folder that is there by now
                self._commit_state(staged_state, state_folder)
                self.best_in_state = best_name
            prune()

        self._submit(os.path.join(directory.path, name), finish)

    def _has_nan(self) -> bool:
        return has_nan(self._trainer.model.parameters())  # type: ignore[union-attr]  # made by now

    def _upload(self, upload_url: str) -> None:
        name = folder_name(self._trainer.state.global_step)
        folder = os.path.join(str(self._trainer.args.output_dir), name)
        self._machines.collect(folder)
        directory = self._directory = open_directory(upload_url)
        prune = self._pruning()

        def finish() -> None:
            with directory.write(f"{name}.tar") as path:
                pack(folder, path)
            prune()

        self._submit(f"{upload_url}/{name}.tar", finish)

    def _commit_state(self, staged: StagedFile | None, folder: str) -> None:
        """Commit the training state, which the Trainer wrote to `folder`, next to the path of `staged`."""
        assert staged is not None  # on rank 0
        with staged.writing() as path:
            if self.is_remote:
                pack(folder, path)
                shutil.rmtree(folder)
            else:
                os.rename(folder, path)
        staged.commit()

    def _pruning(self) -> Callable[[], None]:
        """Return a function that removes the oldest folders, but not the best, nor the newest state's best."""
        directory, best = self._directory, self._best_name()
        step, limit = self._trainer.state.global_step, self._trainer.args.save_total_limit

        def prune() -> None:
            if directory is not None:
                found = directory.names()
                for old in folders_to_delete(found, limit, step, best=best, best_in_state=self.best_in_state):
                    directory.remove(old)

        return prune

    def _best_name(self) -> str | None:
        best = self._trainer.state.best_model_checkpoint
        return best and os.path.basename(best)

    def _write(self, folder: str, best: str | None, *, whole: bool = True) -> None:
        """Save to `folder` with the Trainer's own code, prune nothing, and record `best` as its best checkpoint."""
        trainer, state = self._trainer, self._trainer.state
        if not self._is_checked:  # now the optimizer has a state
            make_state_plain(trainer)
            self._is_checked = True
        # A strategy that saves in parts has its own collectives meanwhile: an error in them ends the other ranks.
        parts = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        with contextlib.nullcontext() if parts else self._session.process_group.share_errors():
            for states in callback_states(state).values():
                if isinstance(states, list):  # of callbacks of one class; the Trainer appends with every save
                    states.clear()
            try:
                with save_natively(trainer, os.path.dirname(folder), whole=whole) as native:
                    native()
            except SafetensorError as error:  # only its text says that the disk is full
                raise OSError(str(error)) from error
            state.best_model_checkpoint = best
            if self._session.is_writer:
                if not os.path.isdir(folder):
                    raise TrackingError(
                        f"Received a {type(trainer).__name__} whose `_save_checkpoint` did not write to {folder}. "
                        f"Expected it to write to the folder of the step in `self._get_output_dir(trial)`, as "
                        f"Transformers' own does: take that for `self.args.output_dir`."
                    )
                state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _submit(self, what: str, finish: Callable[[], None]) -> None:
        with self._session.process_group.share_errors():
            if self._session.is_writer:
                self._session.writer.submit(what, finish)
                if not self._session.options.background:
                    self._session.writer.wait()


def make_state_plain(trainer: Trainer) -> None:
    """Make the numbers of the optimizer and the scheduler plain, and check that their state can be loaded.

    Raises:
        TrackingError: their state holds more than tensors and plain values.
    """
    made: Any = trainer  # with an optimizer and a scheduler by now
    if not trainer.is_deepspeed_enabled:  # which saves both itself
        make_rates_plain([made.optimizer], [made.lr_scheduler])
        state = {"optimizer": made.optimizer.state_dict(), "scheduler": made.lr_scheduler.state_dict()}
        check_plain(state, "or allow its class with torch.serialization.add_safe_globals")


@contextlib.contextmanager
def save_natively(trainer: Trainer, directory: str, *, whole: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that saves to `directory` as the Trainer does; with the optimizer if `whole`.

    It has no public way to save what it resumes from, and none to say where to.
    """
    args, state = trainer.args, trainer.state
    kept = args.save_only_model, args.push_to_hub, args.save_total_limit, state.best_global_step
    args.save_only_model, args.push_to_hub, args.save_total_limit = not whole, False, None
    # With a best step all ranks would wait for the first, which may have failed, to look for its folder.
    state.best_global_step = None
    try:
        with replaced_methods(
            trainer, {"_get_output_dir": lambda *_, **__: directory, "_save": functools.partial(save_with, trainer)}
        ):
            yield lambda: type(trainer)._save_checkpoint(trainer, trainer.model_wrapped, None)  # noqa: SLF001
    finally:
        args.save_only_model, args.push_to_hub, args.save_total_limit, state.best_global_step = kept
