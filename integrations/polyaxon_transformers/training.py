"""One call of ``trainer.train``: what it resumes from, and what is saved of it, when."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from signal import Signals
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from polyaxon_torch import TorchProcesses
from polyaxon_tracking import Interruption, TrackingError, Wishes, cached_path, open_directory
from polyaxon_transformers.folders import (
    folder_name,
    link_folder,
    notes,
    pack,
    surplus,
    unpack,
    write_notes,
)
from polyaxon_transformers.weights import saved_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from torch import nn

    from polyaxon_tracking import BackgroundWriter, Checkpoint, CheckpointManager, Directory

__all__ = ["Training", "save_natively"]

_logger = logging.getLogger("polyaxon_tracking")

_SUFFIX = ".checkpoint"


class Training:
    """One training of a Trainer.

    Its whole state is what the Trainer itself saves, in its own format: a folder, which on a disk is the checkpoint,
    and which is packed in one file for a store. The Trainer writes it to a hidden place, into the system's cache; what
    makes it durable (sync, checksum, upload) is done while training goes on.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: CheckpointManager,
        users: str | None,
        writer: BackgroundWriter,
        *,
        background: bool,
        every_n_train_steps: int | None,
        interval: float | None,
    ) -> None:
        self.checkpoints = checkpoints
        self.processes = TorchProcesses()
        self.interruption = Interruption(lambda _: self.active)
        self.active = False
        """Whether training goes on: between the hooks of its beginning and its end."""
        self._trainer = trainer
        self._users = users
        self._remote = "://" in checkpoints.directory
        self._writer = writer
        self._background = background
        self._every_n_train_steps = every_n_train_steps
        self._interval = interval
        self._directory: Directory | None = None
        self._best: str | None = None
        self._source: str | None = None
        self._notes: dict[str, Any] = {}
        self._unpacked: str | None = None
        self._epoch = 0
        self._epoch_ends = False
        self._due = False
        self._stepping = False
        self._saved_step = 0
        self._saved_at = 0.0

    # What it resumes from.

    def resume_from(self, newest: Checkpoint) -> str:
        """The folder to give to the Trainer.

        Raises:
            TrackingError: the checkpoint is of another framework.
        """
        folder = newest.path
        if folder.endswith(".tar"):
            self._unpacked = folder = tempfile.mkdtemp(prefix="polyaxon-tracking-")
            unpack(newest.path, folder)
            self.checkpoints.release()
        elif not folder.endswith(_SUFFIX):
            raise TrackingError(
                f"Received {newest.source}, which Hugging Face's Trainer did not save. Expected an outputs path with "
                f"checkpoints of it alone: use another outputs path for this training."
            )
        self._notes = notes(folder)
        best = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)).best_model_checkpoint
        self._best = best and os.path.basename(best)
        if best is not None and self._users is not None and self._remote and self._trainer.is_local_process_zero():
            self._fetch_best(best, self._users)
        self._saved_step = newest.step
        self._source = newest.source
        return folder

    def load_weights(self, folder: str, native: Callable[[], None]) -> None:
        """Load what was saved in `folder`, as the Trainer does with `native`, or what it would not find there.

        Raises:
            TrackingError: it is what training goes on from, and the model is another.
        """
        model: nn.Module = self._trainer.model  # type: ignore[assignment]  # made by now
        saved = saved_weights(model, folder)
        if saved.differences and self._source is not None and not self.active:
            raise _other_model("; ".join(saved.differences), self._source)
        if saved.translated is None:
            native()
        else:
            model.load_state_dict(saved.translated)

    def _fetch_best(self, best: str, users: str) -> None:
        """Have the best checkpoint where the Trainer will look for it at the end, in a pod that is made anew."""
        if not os.path.isdir(best):
            unpack(cached_path(f"{users}/{os.path.basename(best)}.tar"), best)

    @property
    def stopped(self) -> bool:
        """Whether what it resumes from had been stopped early."""
        return bool(self._notes.get("stopped"))

    def begin(self) -> None:
        """Count from here; make up for the evaluation that a signal cut off."""
        trainer = self._trainer
        if self._notes and self._notes["optimizer"] != _name(trainer.optimizer):
            raise _other_model(
                f"its optimizer is {_name(trainer.optimizer)}, saved was {self._notes['optimizer']}", self._source
            )
        self._epoch = int(trainer.state.epoch or 0)
        self._saved_at = time.monotonic()
        self.active = True
        if self._notes.get("evaluate") or self._notes.get("save"):
            control = trainer.control
            control.should_log = False
            control.should_evaluate, control.should_save = self._notes["evaluate"], self._notes["save"]
            nothing = torch.tensor(0.0)
            trainer._maybe_log_save_evaluate(  # noqa: SLF001  # of the end of a step, with what stands around it
                nothing, None, trainer.model_wrapped, None, self._epoch, None, time.time()
            )

    def end(self) -> None:
        """Let go of what the training had."""
        self.active = False
        self.interruption.uninstall()
        self.processes.part()
        if self._unpacked is not None:
            shutil.rmtree(self._unpacked, ignore_errors=True)
            self._unpacked = None

    # When it is saved.

    def begin_epoch(self) -> None:
        """Count from here."""
        self._epoch, self._epoch_ends = int(self._trainer.state.epoch or 0), False

    def begin_optimizer_step(self) -> None:
        """Note that until the end of the step the state is neither of one step nor of the next."""
        self._stepping = True

    def end_step(self) -> None:
        """Note whether a save is due, and end where a signal asked for it."""
        self._stepping = False
        step = self._trainer.state.global_step
        due = self._interval is not None and time.monotonic() - self._saved_at >= self._interval
        wishes = Wishes(self.interruption.requested or 0, due)
        if self.processes.several:
            first = self.processes.rank == 0  # whose clock counts, and which writes
            wishes = self.processes.ask(Wishes(wishes.signal, first and due, self._writer.failed))
            if wishes.failed:
                self.wait()
        if wishes.signal:
            self._end_for(wishes.signal)
        self._due = bool(wishes.save) or (
            self._every_n_train_steps is not None and step % self._every_n_train_steps == 0
        )

    def evaluate_step(self) -> None:
        """End where a signal asked for it; not with several processes, which would have to agree here too."""
        if self.active and self.interruption.requested and not self.processes.several:
            self._end_for(self.interruption.requested)

    def end_epoch(self) -> None:
        """Note that a save is due, when the Trainer has evaluated."""
        self._epoch_ends = self._due = True

    def after_step(self) -> None:
        """Save what is due, after the Trainer has logged, evaluated and saved."""
        if self._due and self.active:
            self._save(ends_epoch=self._epoch_ends)
        state = self._trainer.state
        if self._trainer.control.should_training_stop or state.global_step >= state.max_steps:
            self.wait()  # the Trainer may now load the best model

    def after_exception(self, error: BaseException) -> None:
        """Save what was done since the last save, whatever ends the training."""
        saves = self.active and not self._stepping and not self.processes.several  # others may have no exception
        self.interruption.uninstall()
        step = self._trainer.state.global_step
        try:
            if saves and step != self._saved_step:
                self._save()
                self.wait()
                _logger.warning("Saved step %d after %s", step, type(error).__name__)
            elif not self.processes.several:
                self.wait()
        except (OSError, RuntimeError, TrackingError):
            _logger.exception("The state at the exception was not saved; the one before is as it was")

    def wait(self) -> None:
        """Return when all is written, on all ranks."""
        with self.processes.together():
            self._writer.wait()

    def _end_for(self, number: int) -> NoReturn:
        if self._trainer.state.global_step != self._saved_step:
            self._save()
        self.wait()
        self.active = False
        self.interruption.requested = Signals(number)
        self.interruption.end()

    # How it is saved.

    def _save(self, *, ends_epoch: bool = False) -> None:
        """Save the training state; with `ends_epoch` the epoch is done, with the evaluation and all."""
        self.wait()
        with contextlib.ExitStack() as stack:
            complete = self._stage(stack, None, ends_epoch=ends_epoch)
            rest = stack.pop_all()
        best, limit = self._best_name(), self._trainer.args.save_total_limit

        def finish() -> None:
            with rest:
                complete()
            self._best = best
            self._prune(best, limit)

        self._finish(f"step {self._saved_step} to {self.checkpoints.directory}", finish)

    def _stage(self, stack: contextlib.ExitStack, folder: str | None, *, ends_epoch: bool) -> Callable[[], None]:
        """Write the training state: the files of `folder`, if the Trainer has just written them there.

        What returns is to be called before `stack` ends, and with that the checkpoint is there.
        """
        trainer, step = self._trainer, self._trainer.state.global_step
        self._due = False
        suffix = ".tar" if self._remote else _SUFFIX
        path = self._enter(stack, self.checkpoints.save(step, self._epoch + ends_epoch, suffix=suffix))
        written = os.path.join(os.path.dirname(path), folder_name(step))
        if folder is None:
            self._write(written, trainer.state.best_model_checkpoint)
        self._saved_step, self._saved_at = step, time.monotonic()
        with self.processes.together():
            if self.processes.rank == 0:
                if folder is not None:
                    link_folder(folder, written)
                write_notes(written, self._notes_of(ends_epoch=ends_epoch, saved=folder is not None))

        def complete() -> None:
            if self._remote:
                pack(written, path)
                shutil.rmtree(written)
            else:
                os.rename(written, path)

        return complete

    def save_for_user(self, native: Callable[[], None]) -> None:
        """Save what the Trainer's `save_strategy` asks for: a folder that is complete or absent."""
        if self._trainer.args.push_to_hub:  # which reads the folder as soon as it is written
            native()
            return
        self.wait()
        if not self._remote:
            self._save_to_disk()
        else:
            native()
            if self._users is not None:
                self._upload(self._users)

    def _save_to_disk(self) -> None:
        trainer, state, name = self._trainer, self._trainer.state, folder_name(self._trainer.state.global_step)
        directory = self._directory = open_directory(str(trainer.args.output_dir))
        saves_both = self._due and self.active and not trainer.args.save_only_model
        complete: Callable[[], None] | None = None
        with contextlib.ExitStack() as stack:
            path = self._enter(stack, directory.staged(name))
            is_best = state.best_global_step == state.global_step
            best = os.path.join(directory.path, name) if is_best else state.best_model_checkpoint
            self._write(path, best, whole=not trainer.args.save_only_model)
            if saves_both:
                complete = self._stage(stack, path, ends_epoch=self._epoch_ends)
            rest = stack.pop_all()
        kept, limit = self._best_name(), trainer.args.save_total_limit

        def finish() -> None:
            with rest:
                directory.sync(path)
                directory.remove(name)  # of a training before
                directory.publish(path, name)
                if complete is not None:  # it may name the folder as the best, which is there by now
                    complete()
            if complete is not None:
                self._best = kept
            self._prune(kept, limit)

        self._finish(os.path.join(directory.path, name), finish)

    def _upload(self, users: str) -> None:
        name = folder_name(self._trainer.state.global_step)
        folder = os.path.join(str(self._trainer.args.output_dir), name)
        directory = self._directory = open_directory(users)
        best, limit = self._best_name(), self._trainer.args.save_total_limit

        def finish() -> None:
            with directory.write(f"{name}.tar") as path:
                pack(folder, path)
            self._prune(best, limit)

        self._finish(f"{users}/{name}.tar", finish)

    def _prune(self, best: str | None, limit: int | None) -> None:
        """Remove the user's oldest; not `best`, nor the best that the newest training state would load."""
        if self._directory is not None:
            for old in surplus(self._directory.names(), limit, {best, self._best}):
                self._directory.remove(old)

    def _best_name(self) -> str | None:
        best = self._trainer.state.best_model_checkpoint
        return best and os.path.basename(best)

    def _enter(self, stack: contextlib.ExitStack, staged: contextlib.AbstractContextManager[str]) -> str:
        """The path that `staged` gives to the first process: all write there."""
        path = ""
        with self.processes.together():
            if self.processes.rank == 0:
                path = stack.enter_context(staged)
        return self.processes.gather(path)[0]

    def _write(self, folder: str, best: str | None, *, whole: bool = True) -> None:
        """Have the Trainer save to `folder`, prune nothing, and know `best` as its best checkpoint."""
        trainer, state = self._trainer, self._trainer.state
        # A strategy that saves in parts has collectives of its own on the way: who fails there ends the others.
        parts = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        with contextlib.nullcontext() if parts else self.processes.together():
            try:
                with save_natively(trainer, os.path.dirname(folder), whole=whole) as native:
                    native()
            except SafetensorError as error:  # which tells of a full disk in its text alone
                raise OSError(str(error)) from error
            state.best_model_checkpoint = best
            if self.processes.rank == 0:
                state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        if self._remote and self.processes.rank and trainer.is_local_process_zero():  # of another machine
            shutil.rmtree(os.path.dirname(folder), ignore_errors=True)

    def _notes_of(self, *, ends_epoch: bool, saved: bool) -> dict[str, Any]:
        """What the Trainer does not note of its state: what of this step and its epoch is still to be done, too."""
        args, control, state = self._trainer.args, self._trainer.control, self._trainer.state
        last = float(state.epoch or 0).is_integer()
        return {
            "optimizer": _name(self._trainer.optimizer),
            "stopped": control.should_training_stop and state.global_step < state.max_steps,
            "evaluate": not ends_epoch and (control.should_evaluate or (last and args.eval_strategy == "epoch")),
            "save": not (ends_epoch or saved) and (control.should_save or (last and args.save_strategy == "epoch")),
        }

    def _finish(self, what: str, finish: Callable[[], None]) -> None:
        with self.processes.together():
            if self.processes.rank == 0:
                self._writer.submit(what, finish)
                if not self._background:
                    self._writer.wait()


@contextlib.contextmanager
def save_natively(trainer: Trainer, directory: str, *, whole: bool) -> Iterator[Callable[[], None]]:
    """The Trainer's own way to save, to `directory`: with the optimizer and all, where it is `whole`.

    It has no public way to save what it resumes from, and none to say where to.
    """
    args, state = trainer.args, trainer.state
    kept = args.save_only_model, args.push_to_hub, args.save_total_limit, state.best_global_step
    args.save_only_model, args.push_to_hub, args.save_total_limit = not whole, False, None
    # With a best step all ranks would wait for the first, which may have failed, to look for its folder.
    state.best_global_step = None
    trainer._get_output_dir = lambda trial: directory  # type: ignore[method-assign]  # noqa: SLF001, ARG005
    try:
        yield lambda: type(trainer)._save_checkpoint(trainer, trainer.model_wrapped, None)  # noqa: SLF001
    finally:
        del trainer._get_output_dir  # noqa: SLF001
        args.save_only_model, args.push_to_hub, args.save_total_limit, state.best_global_step = kept


def _name(optimizer: Any) -> str:
    """The optimizer's class, without what Accelerate wraps around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


def _other_model(problems: str, source: str | None) -> TrackingError:
    return TrackingError(
        f"Received a model that is not the one saved in {source}: {problems}. Expected the same layers, shapes and "
        f"optimizer. Make them what they were, pass PolyaxonCallback(resume=False) to begin anew, or use another "
        f"outputs path; the checkpoint stays as it is."
    )
