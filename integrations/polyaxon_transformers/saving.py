"""Save the training state, and the folders that the user asks for, with the Trainer's own code."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from polyaxon_torch import check_plain, has_nan, make_rates_plain
from polyaxon_torch.snapshot import Snapshot, tensors_in
from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import open_directory
from polyaxon_transformers.capture import Capture
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
from polyaxon_transformers.weights import disk_errors, save_with

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polyaxon_tracking.training import Directory, TrainingSession
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

    The Trainer's own code saves a folder to a staging directory. Of the tensors, a copy is taken in memory, and the
    background thread writes it and makes the folder durable (sync, checksum, upload) while training continues. A
    training state is such a folder, which is packed in a single file for a store.

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
        writes_in_background = session.options.background and session.is_writer
        self._snapshot = Snapshot(session.writer) if writes_in_background else None
        # The other machines save what rank 0 would capture, and it would be collected from them.
        self._writes_later = self._snapshot is not None and not (self.is_remote and machines.are_several)
        self._capture = Capture(trainer)
        self._directories: dict[str, Directory] = {}
        """The directories of the folders that `save_strategy` asks for, once there are some."""
        self._last_step: int | None = None
        """The step of the last save."""
        self._is_checked = False
        self._has_reserved_memory = False
        self.best_in_state: str | None = None
        """The name of the folder with the best model, in the newest training state."""

    def check(self) -> None:
        """Check that the training state can be saved completely.

        Raises:
            TrackingError: each machine would write its part of the state, and only the first one's part is uploaded.
        """
        if self.is_remote:
            self._machines.check_state_is_whole(self._session.checkpoints.directory)

    def reserve_memory(self) -> None:
        """Allocate the memory for the copy in the background, after the first step: the optimizer has its state."""
        if self._snapshot is not None and self._writes_later and not self._has_reserved_memory:
            self._has_reserved_memory = True
            self._snapshot.reserve(tensors_in(self._capture.state_dicts()))

    def save_state(self, state: StateToSave) -> None:
        """Save the training state. This is a collective."""
        step, checkpoints = self._trainer.state.global_step, self._session.checkpoints
        suffix = ".tar" if self.is_remote else STATE_SUFFIX
        stage = functools.partial(checkpoints.stage, step, state.epoch, suffix=suffix, has_nan=self._has_nan())
        self._wait_for_earlier_step()
        with self._session.saving(step):
            with self._session.process_group.staging(stage) as (staged, path):
                folder = os.path.join(os.path.dirname(path), folder_name(step))
                with self._machines.own_folder(folder) if self.is_remote else contextlib.nullcontext(folder) as own:
                    self._save_folder(own, self._trainer.state.best_model_checkpoint)
                    if self.is_remote:
                        self._machines.collect(own)
            best, prune = self._best_name(), self._pruning()

            def finish(tensors: dict[str, Any]) -> None:
                assert staged is not None  # on rank 0
                with staged.writing():
                    self._capture.write(folder, tensors)
                    write_metadata(folder, state.metadata, state.random)
                    if self.is_remote:
                        pack(folder, path)
                        shutil.rmtree(folder)
                    else:
                        os.rename(folder, path)
                staged.commit()
                self.best_in_state = best
                prune()

            self._submit(f"step {step} to {checkpoints.directory}", finish)

    def save_for_user(self, native: Callable[[], None], state: StateToSave | None) -> None:
        """Save the folder that `save_strategy` asks for, complete or not at all. This is a collective.

        Args:
            native: saves it as the Trainer does.
            state: if given, the training state is saved too, from the same files.
        """
        self._wait_for_earlier_step()
        name = folder_name(self._trainer.state.global_step)
        if self.is_remote and self._machines.are_several:  # each has its own disk, which the Trainer writes to
            native()
            self._machines.collect(os.path.join(str(self._trainer.args.output_dir), name))
        else:
            with contextlib.nullcontext() if state is None else self._session.saving(self._trainer.state.global_step):
                self._save_to_disk(name, state)
            # Callbacks that are notified of a save read the folder: loggers that upload it, and the user's own.
            callbacks = self._trainer.callback_handler.callbacks
            if any(type(one).on_save is not TrainerCallback.on_save for one in callbacks):
                self._session.wait()
        if self._upload_url is not None:
            self._upload(name, self._upload_url)

    def _save_to_disk(self, name: str, state: StateToSave | None) -> None:
        trainer, step = self._trainer, self._trainer.state.global_step
        directory = self._open(str(trainer.args.output_dir))

        def publish(path: str) -> None:
            directory.sync(path)
            directory.remove(name)  # of an earlier training
            directory.publish(path, name)

        with self._session.process_group.staging(functools.partial(directory.stage, name, publish)) as (staged, path):
            is_best = trainer.state.best_global_step == step
            best = path_in_output_dir(trainer, name) if is_best else trainer.state.best_model_checkpoint
            self._save_folder(path, best, with_optimizer=not trainer.args.save_only_model)
        best_name, prune, has_nan = self._best_name(), self._pruning(), self._has_nan()

        def finish(tensors: dict[str, Any]) -> None:
            assert staged is not None  # on rank 0
            with contextlib.ExitStack() as stack:
                stack.callback(staged.discard)  # unless it is committed
                with staged.writing():
                    self._capture.write(path, tensors)
                if state is None:
                    staged.commit()
                else:
                    checkpoints = self._session.checkpoints
                    with checkpoints.save(step, state.epoch, suffix=STATE_SUFFIX, has_nan=has_nan) as target:
                        link_folder(path, target)
                        write_metadata(target, state.metadata, state.random)
                        staged.commit()  # before the state, whose best model it may be
                    self.best_in_state = best_name
            prune()

        self._submit(os.path.join(directory.path, name), finish)

    def _upload(self, name: str, url: str) -> None:
        folder = os.path.join(str(self._trainer.args.output_dir), name)
        directory = self._open(url)
        prune = self._pruning()

        def finish(_: dict[str, Any]) -> None:
            with directory.write(f"{name}.tar") as path:
                pack(folder, path)
            prune()

        self._submit(f"{url}/{name}.tar", finish)

    def _open(self, path: str) -> Directory:
        if path not in self._directories:
            self._directories[path] = open_directory(path)
        return self._directories[path]

    def _wait_for_earlier_step(self) -> None:
        """Wait for the files of an earlier step. Those of this step are written from the same copy."""
        step, before = self._trainer.state.global_step, self._last_step
        self._last_step = step
        if step != before:
            self._session.wait()

    def _has_nan(self) -> bool:
        return has_nan(self._trainer.model.parameters())  # type: ignore[union-attr]  # made by now

    def _pruning(self) -> Callable[[], None]:
        """Return a function that removes the oldest folders, but not the best, nor the newest state's best."""
        directories, best = [*self._directories.values()], self._best_name()
        step, limit = self._trainer.state.global_step, self._trainer.args.save_total_limit

        def prune() -> None:
            for directory in directories:
                found = directory.names()
                for old in folders_to_delete(found, limit, step, best=best, best_in_state=self.best_in_state):
                    directory.remove(old)

        return prune

    def _best_name(self) -> str | None:
        best = self._trainer.state.best_model_checkpoint
        return best and os.path.basename(best)

    def _save_folder(self, folder: str, best: str | None, *, with_optimizer: bool = True) -> None:
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
            replacements = self._capture.methods(folder) if self._writes_later else {}
            directory = os.path.dirname(folder)
            with (
                disk_errors(),
                save_natively(trainer, directory, replacements, with_optimizer=with_optimizer) as native,
            ):
                native()
            state.best_model_checkpoint = best
            if self._session.is_writer:
                if not os.path.isdir(folder):
                    raise TrackingError(
                        f"Received a {type(trainer).__name__} whose `_save_checkpoint` did not write to {folder}. "
                        f"Expected it to write to the folder of the step in `self._get_output_dir(trial)`, as "
                        f"Transformers' own does: take that for `self.args.output_dir`."
                    )
                state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _submit(self, what: str, finish: Callable[[dict[str, Any]], None]) -> None:
        """Call `finish` with what was captured: in the background with a copy, or now if the options say so."""
        tensors = self._capture.take()
        with self._session.process_group.share_errors():
            if self._snapshot is not None:
                self._snapshot.save(what, self._trainer.state.global_step, tensors, finish)
            elif self._session.is_writer:
                self._session.writer.submit(what, functools.partial(finish, tensors))
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
def save_natively(
    trainer: Trainer, directory: str, replacements: dict[str, Callable[..., None]], *, with_optimizer: bool
) -> Iterator[Callable[[], None]]:
    """Yield a function that saves to `directory` as the Trainer does, with `replacements`.

    It has no public way to save what it resumes from, and none to say where to.

    Args:
        trainer: the Trainer.
        directory: where it creates its folder.
        replacements: methods that stand in for its own.
        with_optimizer: whether to save the optimizer too.
    """
    args, state = trainer.args, trainer.state
    kept = args.save_only_model, args.push_to_hub, state.best_global_step
    args.save_only_model, args.push_to_hub = not with_optimizer, False
    # With a best step all ranks would wait for the first, which may have failed, to look for its folder.
    state.best_global_step = None
    methods: dict[str, Callable[..., Any]] = {
        "_get_output_dir": lambda *_, **__: directory,
        "_save": functools.partial(save_with, trainer),
    }
    try:
        with replaced_methods(trainer, methods | replacements):
            yield lambda: type(trainer)._save_checkpoint(trainer, trainer.model_wrapped, None)  # noqa: SLF001
    finally:
        args.save_only_model, args.push_to_hub, state.best_global_step = kept
