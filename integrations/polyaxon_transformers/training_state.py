"""One call of ``trainer.train``: the checkpoint that it resumes from, and when and how its state is saved."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import tempfile
import time
from signal import Signals
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from polyaxon_torch import TorchProcessGroup, random_state, set_random_state, settle_lazy_layers
from polyaxon_tracking import PreemptionHandler, TrackingError, cached_path
from polyaxon_tracking.training import Flags, SaveOptions, open_directory
from polyaxon_transformers.folders import (
    folder_name,
    folders_to_delete,
    link_folder,
    pack,
    read_metadata,
    unpack,
    write_metadata,
)
from polyaxon_transformers.weights import saved_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from torch import nn

    from polyaxon_tracking import Checkpoint, CheckpointManager
    from polyaxon_tracking.training import BackgroundWriter, Directory

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
        options: SaveOptions,
        ignore_keys: list[str] | None,
    ) -> None:
        self.checkpoints = checkpoints
        self.process_group = TorchProcessGroup(options.write_timeout)
        self.preemption = PreemptionHandler(lambda _: self.active)
        self.active = False
        """Whether training goes on: between the hooks of its beginning and its end."""
        self._trainer = trainer
        self._users = users
        self._remote = "://" in checkpoints.directory
        self._writer = writer
        self._options = options
        self._ignore_keys = ignore_keys
        self._directory: Directory | None = None
        self._best: str | None = None
        self._newest: Checkpoint | None = None
        self._folder = ""
        self._metadata: dict[str, Any] = {}
        self._evaluating = False
        self._random_before: dict[str, Any] = {}
        self._random_after: dict[str, Any] | None = None
        self._unpacked = contextlib.ExitStack()
        self._nothing_left = False
        self._epoch = 0
        self._epoch_ends = False
        self._due = False
        self._stepping_from = -1
        self._saved_step = 0
        self._saved_at = 0.0

    # What it resumes from.

    def resume_from(self, newest: Checkpoint) -> str:
        """Return the folder from which the Trainer resumes.

        Raises:
            TrackingError: the checkpoint is of another framework, or there is no room to unpack it.
        """
        folder = newest.path
        if folder.endswith(".tar"):
            folder = self._unpack(newest)
        elif not folder.endswith(_SUFFIX):
            raise TrackingError(
                f"Received {newest.source}, which Hugging Face's Trainer did not save. Expected an outputs path with "
                f"checkpoints of it alone: use another outputs path for this training."
            )
        self._newest, self._folder, self._metadata = newest, folder, read_metadata(folder)
        best = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)).best_model_checkpoint
        self._best = best and os.path.basename(best)
        if self._best is not None and self._users is not None and self._trainer.is_local_process_zero():
            here = self._path_of(self._best)
            if not os.path.isdir(here):  # the pod was made anew
                unpack(cached_path(f"{self._users}/{self._best}.tar"), here)
        return folder

    def _unpack(self, newest: Checkpoint) -> str:
        """Unpack `newest` once on each machine, and return the folder, which is kept until the end of training.

        In a directory that, should this process be killed, the next start removes.
        """
        here, folder = tempfile.gettempdir(), ""
        try:
            with self.process_group.share_errors():
                if self._trainer.is_local_process_zero():
                    needed, free = os.path.getsize(newest.path), shutil.disk_usage(here).free
                    if needed > free:
                        raise TrackingError(
                            f"Received {newest.source} of {needed:,} bytes to unpack in {here}, where {free:,} bytes "
                            f"are free. Expected room for it. Set TMPDIR to a directory on a larger disk."
                        )
                    folder = self._unpacked.enter_context(open_directory(here).staged(folder_name(newest.step)))
                    unpack(newest.path, folder)
        finally:
            self.checkpoints.release()
        # The processes of one machine are numbered one after the other.
        first = self.process_group.rank - int(self._trainer.args.local_process_index)
        return self.process_group.gather(folder)[first]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Install the signal handlers, and replace the Trainer's methods that have no hook around them.

        There is none before its loops, none around what it loads or saves, and none after all that belongs to a step.
        """
        trainer = self._trainer
        own: dict[str, Any] = {}
        for name, ours in (
            ("set_initial_training_values", self._initial_values),
            ("_load_from_checkpoint", self._load_from_checkpoint),
            ("_load_best_model", self._load_best_model),
            ("_load_rng_state", self._load_random_state),
            ("_run_epoch", self._run_epoch),
            ("_save_checkpoint", self._save_for_user),
            ("_maybe_log_save_evaluate", self._log_save_evaluate),
        ):
            if (original := getattr(trainer, name, None)) is not None:  # `_run_epoch` came with Transformers 5.3
                own[name] = vars(trainer).get(name)
                setattr(trainer, name, functools.wraps(original)(functools.partial(ours, original)))
        self.preemption.install()
        try:
            yield
        finally:
            for name, before in own.items():
                delattr(trainer, name)
                if before is not None:  # of another library
                    setattr(trainer, name, before)

    def _initial_values(self, native: Callable[..., tuple[Any, ...]], *arguments: Any, **options: Any) -> Any:
        """Start no epoch if none is left: the Trainer would check the number of steps only after one more step."""
        epochs, steps_per_epoch, *others, max_steps = native(*arguments, **options)
        newest = self._newest
        if newest is not None and (self._metadata["stopped"] or newest.step >= max_steps):
            if self._trainer.is_world_process_zero():
                limit = "max_steps" if self._trainer.args.max_steps > 0 else "num_train_epochs"
                ended = (
                    f"been stopped early, at epoch {newest.epoch}"
                    if self._metadata["stopped"]
                    else f"come to its end ({limit}={getattr(self._trainer.args, limit):g})"
                )
                _logger.info("This training had %s: nothing is left", ended)
            epochs = min(epochs, newest.step // steps_per_epoch)
        return epochs, steps_per_epoch, *others, max_steps

    def _load_from_checkpoint(self, native: Callable[..., None], folder: str, *arguments: Any, **options: Any) -> None:
        self._load_weights(folder, functools.partial(native, folder, *arguments, **options))

    def _load_best_model(self, native: Callable[[], None]) -> None:
        self._load_weights(str(self._trainer.state.best_model_checkpoint), native)

    def _load_weights(self, folder: str, native: Callable[[], None]) -> None:
        """Load the weights in `folder` with the Trainer's `native`, or those that it would not find there.

        Raises:
            TrackingError: it is what training goes on from, and the model is another.
        """
        if self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled:  # in parts: their loaders look
            native()
            return
        model: nn.Module = self._trainer.model  # type: ignore[assignment]  # made by now
        saved = saved_weights(model, folder)
        if saved.differences and folder == self._folder:
            raise self._other_model("; ".join(saved.differences))
        if saved.translated is None:
            native()
        else:
            model.load_state_dict(saved.translated)
        differences = settle_lazy_layers(model)
        if differences and folder == self._folder:
            raise self._other_model("; ".join(differences))

    def _load_random_state(self, native: Callable[..., None], checkpoint: str | None) -> None:
        if self._random_after is not None and checkpoint == self._folder:
            set_random_state(self._random_after)
        else:
            native(checkpoint)

    def _run_epoch(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        if not self._nothing_left:
            native(*arguments, **options)

    def begin(self) -> None:
        """Reset the counters, and run the evaluation that a signal cut off."""
        trainer = self._trainer
        # It may be the second time, with smaller batches.
        self._saved_step, self._stepping_from, self._due = trainer.state.global_step, -1, False
        self._random_after, self._nothing_left = None, False
        if self._newest is not None:
            optimizer = _name(trainer.optimizer)
            if self._metadata["optimizer"] != optimizer:
                raise self._other_model(f"its optimizer is {optimizer}, saved was {self._metadata['optimizer']}")
            self._restore_callbacks()
            if self._best is not None and os.path.isdir(best := self._path_of(self._best)):
                trainer.state.best_model_checkpoint = best  # which the Trainer forgets where the outputs were moved
        self._epoch = int(trainer.state.epoch or 0)
        self._saved_at = time.monotonic()
        self.active = True
        if self._metadata.get("evaluate") or self._metadata.get("save"):
            self._make_up_for_the_end_of_a_step()

    def _restore_callbacks(self) -> None:
        """Restore the states of callbacks, and keep the arguments that the script gives them now."""
        trainer, states = self._trainer, _callback_states(self._trainer.state)
        stateful = [one for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
        for name in {type(one).__name__ for one in stateful}:
            alike = [one for one in stateful if type(one).__name__ == name]
            saved = states.setdefault(name, [] if len(alike) > 1 else alike[0].state())
            for callback, state in zip(alike, saved if isinstance(saved, list) else [saved], strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def _make_up_for_the_end_of_a_step(self) -> None:
        """Evaluate and save as was due, with the random state of that step; training continues with the next one."""
        trainer, control = self._trainer, self._trainer.control
        trainer._load_rng_state(self._folder)  # noqa: SLF001  # of the end of a step, as all here
        control.should_log = False
        control.should_evaluate, control.should_save = self._metadata["evaluate"], self._metadata["save"]
        nothing = torch.tensor(0.0)
        trainer._maybe_log_save_evaluate(  # noqa: SLF001
            nothing, None, trainer.model_wrapped, None, self._epoch, self._ignore_keys, time.time()
        )
        self._random_after = random_state()
        self._nothing_left = trainer.control.should_training_stop

    def end(self) -> None:
        """Release everything that the training used."""
        self.active = False
        self.preemption.uninstall()
        self.process_group.close()
        self._unpacked.close()
        del self._trainer  # `preemption` refers to this, and the model is to go with the Trainer

    def _path_of(self, name: str) -> str:
        return os.path.join(os.path.abspath(str(self._trainer.args.output_dir)), name)

    def _other_model(self, problems: str) -> TrackingError:
        source = self._newest and self._newest.source
        return TrackingError(
            f"Received a model that is not the one saved in {source}: {problems}. Expected the same layers, shapes and "
            f"optimizer. Make them what they were, pass PolyaxonCallback(resume=False) to begin anew, or use another "
            f"outputs path; the checkpoint stays as it is."
        )

    # When it is saved.

    def begin_epoch(self) -> None:
        """Reset the epoch's counters."""
        self._epoch, self._epoch_ends = int(self._trainer.state.epoch or 0), False

    def begin_optimizer_step(self) -> None:
        """Record that an optimizer step is in progress, because the state is inconsistent until the step is done."""
        self._stepping_from = self._trainer.state.global_step

    def end_step(self) -> None:
        """Record whether a save is due, and exit if a signal was received."""
        step = self._trainer.state.global_step
        due = self._options.is_interval_over(seconds_since_save=time.monotonic() - self._saved_at)
        flags = Flags(self.preemption.requested or 0, due)
        if self.process_group.is_distributed:
            first = self.process_group.rank == 0  # whose clock counts, and which writes
            flags = self.process_group.reduce_flags(Flags(flags.signal, first and due, self._writer.failed))
            if flags.failed:
                self.wait()
        if flags.signal:
            self._end_for(flags.signal)
        self._due = bool(flags.save) or self._options.should_save(step=step, saved_step=self._saved_step)

    def evaluate_step(self) -> None:
        """Exit if a signal was received; not with several processes, which would need a collective here too."""
        if self.active and self.preemption.requested and not self.process_group.is_distributed:
            self._end_for(self.preemption.requested)

    def end_epoch(self) -> None:
        """Record that a save is due once the Trainer has evaluated."""
        self._due = True
        self._epoch_ends = float(self._trainer.state.epoch or 0).is_integer()  # it may have been left

    def _log_save_evaluate(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Log, save and evaluate as the Trainer does last in a step and an epoch, and then save the training state."""
        self._evaluating = self._trainer.control.should_evaluate
        if self._evaluating:
            self._random_before = random_state()
        native(*arguments, **options)
        self._evaluating = False
        if self._due and self.active:
            self._save(ends_epoch=self._epoch_ends)
        state = self._trainer.state
        if self._trainer.control.should_training_stop or state.global_step >= state.max_steps:
            self.wait()  # the Trainer may now load the best model

    def finish(self) -> None:
        """Exit if a signal came too late for a step to notice."""
        self.active = False
        self.process_group.exit_if_requested(self.preemption)

    def after_exception(self, error: BaseException) -> None:
        """Save the steps since the last save, whatever ends the training; then exit if a signal was received.

        Where the signal went to the whole process group, it has ended the workers of the data loader, too.
        """
        state, requested = self._trainer.state, self.preemption.requested
        half_done = state.global_step == self._stepping_from
        # Others may have no exception, and would not take part.
        saves = (
            self.active
            and not half_done
            and not self.process_group.is_distributed
            and state.global_step != self._saved_step
        )
        self.preemption.uninstall()
        try:
            if saves:
                self._save()
            if not self.process_group.is_distributed:
                self.wait()
        except Exception as failure:  # noqa: BLE001  # `error` is what ends the training, and is raised
            _logger.error(  # noqa: TRY400  # in one line, beside the traceback of `error`
                "The state at the exception was not saved; what was there before is as it was: %s: %s",
                type(failure).__name__,
                failure,
            )
        else:
            if saves:
                _logger.warning("Saved step %d after %s", state.global_step, _told(requested, error))
        if requested and not isinstance(error, (SystemExit, KeyboardInterrupt)):
            _logger.warning("After %s: %s: %s", requested.name, type(error).__name__, error)
            self.preemption.exit()

    def wait(self) -> None:
        """Wait for all writes, on all ranks."""
        with self.process_group.share_errors():
            self._writer.wait()

    def _end_for(self, number: int) -> NoReturn:
        self.preemption.requested = Signals(number)
        if self._trainer.state.global_step != self._saved_step:
            self._save()
        self.wait()
        if self.process_group.rank == 0:
            _logger.warning("Saved step %d after %s", self._saved_step, Signals(number).name)
        self.active = False
        self.preemption.exit()

    # How it is saved.

    def _save(self, *, ends_epoch: bool = False) -> None:
        """Save the training state; `ends_epoch` means that the epoch and its evaluation are done."""
        self.wait()
        if self._evaluating:  # which is left, and will be begun again
            set_random_state(self._random_before)
        with contextlib.ExitStack() as stack:
            complete = self._stage(stack, None, ends_epoch=ends_epoch)
            rest = stack.pop_all()
        best, prune = self._best_name(), self._pruning()

        def finish() -> None:
            with rest:
                complete()
            self._best = best
            prune()

        self._finish(f"step {self._saved_step} to {self.checkpoints.directory}", finish)

    def _stage(self, stack: contextlib.ExitStack, folder: str | None, *, ends_epoch: bool) -> Callable[[], None]:
        """Write the training state; if the Trainer has just saved to `folder`, link the files from there.

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
        with self.process_group.share_errors():
            if self.process_group.rank == 0:
                if folder is not None:
                    link_folder(folder, written)
                write_metadata(written, self._make_metadata(ends_epoch=ends_epoch, saved=folder is not None))

        def complete() -> None:
            if self._remote:
                pack(written, path)
                shutil.rmtree(written)
            else:
                os.rename(written, path)

        return complete

    def _save_for_user(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Save the folder that `save_strategy` asks for, complete or not at all."""
        trainer = self._trainer
        if trainer.args.push_to_hub:  # which reads the folder as soon as it is written
            native(*arguments, **options)
            return
        self.wait()
        if self._remote:
            native(*arguments, **options)
            if self._users is not None:
                self._upload(self._users)
            return
        self._save_to_disk()
        # Who is told of a save looks at what was saved: loggers that upload it, and the user's own callbacks.
        if any(type(one).on_save is not TrainerCallback.on_save for one in trainer.callback_handler.callbacks):
            self.wait()

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
        kept, prune = self._best_name(), self._pruning()

        def finish() -> None:
            with rest:
                directory.sync(path)
                directory.remove(name)  # of a training before
                directory.publish(path, name)
                if complete is not None:  # it may name the folder as the best, which is there by now
                    complete()
            if complete is not None:
                self._best = kept
            prune()

        self._finish(os.path.join(directory.path, name), finish)

    def _upload(self, users: str) -> None:
        name = folder_name(self._trainer.state.global_step)
        folder = os.path.join(str(self._trainer.args.output_dir), name)
        directory = self._directory = open_directory(users)
        prune = self._pruning()

        def finish() -> None:
            with directory.write(f"{name}.tar") as path:
                pack(folder, path)
            prune()

        self._finish(f"{users}/{name}.tar", finish)

    def _pruning(self) -> Callable[[], None]:
        """Return a function that removes the oldest folders, but not the best, nor the newest state's best."""
        directory, best = self._directory, self._best_name()
        step, limit = self._trainer.state.global_step, self._trainer.args.save_total_limit

        def prune() -> None:
            if directory is not None:
                for old in folders_to_delete(directory.names(), limit, step, {best, self._best}):
                    directory.remove(old)

        return prune

    def _best_name(self) -> str | None:
        best = self._trainer.state.best_model_checkpoint
        return best and os.path.basename(best)

    def _enter(self, stack: contextlib.ExitStack, staged: contextlib.AbstractContextManager[str]) -> str:
        """Return the staging path of rank 0, to which all ranks write."""
        path = ""
        with self.process_group.share_errors():
            if self.process_group.rank == 0:
                path = stack.enter_context(staged)
        return self.process_group.gather(path)[0]

    def _write(self, folder: str, best: str | None, *, whole: bool = True) -> None:
        """Save to `folder` with the Trainer's own code, prune nothing, and record `best` as its best checkpoint."""
        trainer, state = self._trainer, self._trainer.state
        # A strategy that saves in parts has collectives of its own on the way: who fails there ends the others.
        parts = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        with contextlib.nullcontext() if parts else self.process_group.share_errors():
            for states in _callback_states(state).values():
                if isinstance(states, list):  # of callbacks of one class; the Trainer appends with every save
                    states.clear()
            try:
                with save_natively(trainer, os.path.dirname(folder), whole=whole) as native:
                    native()
            except SafetensorError as error:  # which tells of a full disk in its text alone
                raise OSError(str(error)) from error
            state.best_model_checkpoint = best
            if self.process_group.rank == 0:
                if not os.path.isdir(folder):
                    raise TrackingError(
                        f"Received a {type(trainer).__name__} whose `_save_checkpoint` did not write to {folder}. "
                        f"Expected it to write to the folder of the step in `self._get_output_dir(trial)`, as "
                        f"Transformers' own does: take that for `self.args.output_dir`."
                    )
                state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        if self._remote and self.process_group.rank and trainer.is_local_process_zero():  # of another machine
            shutil.rmtree(os.path.dirname(folder), ignore_errors=True)

    def _make_metadata(self, *, ends_epoch: bool, saved: bool) -> dict[str, Any]:
        """Return what the Trainer leaves out of its state, and what remains to do in this step and epoch."""
        args, control, state = self._trainer.args, self._trainer.control, self._trainer.state
        last = float(state.epoch or 0).is_integer()
        return {
            "optimizer": _name(self._trainer.optimizer),
            "stopped": self.preemption.requested is None
            and control.should_training_stop
            and state.global_step < state.max_steps,
            "evaluate": not ends_epoch and (control.should_evaluate or (last and args.eval_strategy == "epoch")),
            "save": not (ends_epoch or saved) and (control.should_save or (last and args.save_strategy == "epoch")),
        }

    def _finish(self, what: str, finish: Callable[[], None]) -> None:
        with self.process_group.share_errors():
            if self.process_group.rank == 0:
                self._writer.submit(what, finish)
                if not self._options.background:
                    self._writer.wait()


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
    trainer._get_output_dir = lambda trial: directory  # type: ignore[method-assign]  # noqa: SLF001, ARG005
    try:
        yield lambda: type(trainer)._save_checkpoint(trainer, trainer.model_wrapped, None)  # noqa: SLF001
    finally:
        del trainer._get_output_dir  # noqa: SLF001
        args.save_only_model, args.push_to_hub, args.save_total_limit, state.best_global_step = kept


def _name(optimizer: Any) -> str:
    """Return the name of the optimizer's class, without Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


def _callback_states(state: TrainerState) -> dict[str, Any]:
    """Return the states of callbacks by class name; a list if there are several callbacks of a class."""
    return state.stateful_callbacks  # type: ignore[return-value]  # the annotation is of what its constructor takes


def _told(requested: Signals | None, error: BaseException) -> str:
    return type(error).__name__ if requested is None else requested.name
