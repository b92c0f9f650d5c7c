"""One call of ``trainer.train``: the hooks and methods of the Trainer, translated into calls of the session."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback

from polyaxon_tracking.training import Action
from polyaxon_transformers.evaluation import EvaluationWatch
from polyaxon_transformers.machines import Machines
from polyaxon_transformers.methods import replaced_methods
from polyaxon_transformers.random_states import RandomStates
from polyaxon_transformers.resuming import Resumption, load_best_model, load_checkpoint, optimizer_name
from polyaxon_transformers.saving import FolderSaver, StateToSave, make_state_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from transformers import Trainer

    from polyaxon_tracking.training import TrainingSession

__all__ = ["Training"]


class Training:
    """One training of a Trainer, whose training state is a folder that the Trainer itself saves.

    Args:
        trainer: the Trainer.
        session: the session of this training.
        upload_url: where the folders that `save_strategy` asks for are uploaded, or ``None`` if they are not.
        ignore_keys: the argument `ignore_keys_for_eval` of ``trainer.train``.
    """

    def __init__(
        self,
        trainer: Trainer,
        session: TrainingSession,
        upload_url: str | None,
        *,
        ignore_keys: list[str] | None,
    ) -> None:
        self.trainer = trainer
        self._session = session
        self._ignore_keys = ignore_keys
        machines = Machines(trainer, session.process_group)
        self._resumption = Resumption(trainer, session, machines, upload_url)
        self._saver = FolderSaver(trainer, session, machines, upload_url)
        self._epoch = 0
        self._has_epoch_ended = False
        """Whether the callbacks were notified of the end of the epoch."""
        self._is_due = False
        """Whether to save the training state after the Trainer has logged, evaluated and saved."""
        self._is_stopping = False
        """Whether to stop for a signal once the evaluation has ended."""
        self._evaluation = EvaluationWatch(trainer)
        self._random = RandomStates(trainer)
        self._is_nothing_left = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Install the signal handlers, and replace methods of the Trainer.

        The Trainer has no hooks before its loops, around what it loads and saves, and after all of a step.

        Raises:
            TrackingError: the training state could not be saved completely.
        """
        self._saver.check()
        args, resumed = self.trainer.args, self._resumption.state
        evaluates_on_start = args.eval_on_start
        args.eval_on_start = evaluates_on_start and resumed is None  # callbacks have seen that evaluation before
        self._session.preemption.install()
        self._evaluation.attach()
        try:
            with replaced_methods(
                self.trainer,
                {
                    "get_train_dataloader": functools.partial(self._random.make_train_loader, resumed),
                    "get_eval_dataloader": functools.partial(self._random.make_eval_loader, resumed),
                    "set_initial_training_values": self._resumption.initial_values,
                    "_load_from_checkpoint": functools.partial(load_checkpoint, self.trainer, resumed),
                    "_load_best_model": functools.partial(load_best_model, self.trainer),
                    "_load_rng_state": functools.partial(self._random.load, resumed),
                    "_run_epoch": self._run_epoch,  # since Transformers 5.3
                    "_save_checkpoint": self._save_for_user,
                    "_maybe_log_save_evaluate": self._log_save_evaluate,
                },
            ):
                yield
        finally:
            self._evaluation.detach()
            args.eval_on_start = evaluates_on_start

    @property
    def has_ended(self) -> bool:
        """Return whether all steps are done, or early stopping has ended training."""
        state, resumed = self.trainer.state, self._resumption.state
        was_stopped = resumed is not None and resumed.metadata["stopped"]
        return state.global_step >= state.max_steps or was_stopped or _is_stopped_early(self.trainer)

    def close(self) -> None:
        """Release everything that the training used."""
        self._session.close()
        self._resumption.close()
        # The signal handlers refer to this object, which must not keep the model in memory.
        del self.trainer, self._resumption, self._saver, self._evaluation, self._random

    # Resume

    def resume(self, given: str | bool | None) -> str | bool | None:
        """Return the argument `resume_from_checkpoint` for the Trainer; the user has `given` it, or not (``None``).

        Raises:
            TrackingError: as `Resumption.choose`.
        """
        argument = self._resumption.choose(given)
        if self._resumption.state is not None:
            self._saver.best_in_state = self._resumption.state.best
        return argument

    def _run_epoch(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        if not self._is_nothing_left:
            native(*arguments, **options)

    def begin(self) -> None:
        """Restore what the Trainer has not restored, and run an evaluation again that a signal cut off.

        With `auto_find_batch_size`, the Trainer may begin a second time, with smaller batches.

        Raises:
            TrackingError: the optimizer is not the one that was saved.
        """
        state, resumed = self.trainer.state, self._resumption.state
        self._is_due = self._is_nothing_left = self._has_epoch_ended = False
        self._random.begin()
        self._evaluation.end()
        if resumed is not None:
            resumed.restore(self.trainer)
        make_state_plain(self.trainer)
        self._epoch = int(state.epoch or 0)
        self._session.begin(state.global_step)
        metadata = {} if resumed is None else resumed.metadata
        self._evaluation.swaps_weights = metadata.get("swaps", False)
        if resumed is not None and any(metadata.get(what) for what in ("evaluate", "save", "ends_epoch")):
            if metadata.get("ends_epoch"):
                self._epoch = math.ceil(state.epoch or 0) - 1
            resumed.finish_step(self.trainer, self._ignore_keys)
            self._random.end_resumed_evaluation()
            self._is_nothing_left = self.trainer.control.should_training_stop

    # Train

    def begin_epoch(self) -> None:
        """Reset the epoch's counters."""
        self._epoch, self._has_epoch_ended = int(self.trainer.state.epoch or 0), False
        self._random.begin_epoch(self._resumption.state)

    def begin_optimizer_step(self) -> None:
        """Record that an optimizer step is in progress, because the state is inconsistent until the step is done."""
        self._session.stepping_from = self.trainer.state.global_step

    def end_step(self) -> None:
        """Record whether a save is due, and stop if a signal was received."""
        self._saver.reserve_memory()
        action = self._session.end_batch(self.trainer.state.global_step)
        self._is_due = action is Action.SAVE
        if action is Action.STOP:
            if all(self._session.process_group.gather(self._evaluation.has_trained_weights())):
                self._stop()
            self._is_stopping = True

    def end_evaluation_step(self) -> None:
        """Stop if a signal was received; with other weights in the model, only once the evaluation has ended.

        If the state was saved before the evaluation, training stops at once with these weights too.
        """
        self._evaluation.check()
        is_saved = self.trainer.state.global_step == self._session.saved_step
        if self._session.should_stop_now() and (is_saved or self._evaluation.has_trained_weights()):
            self._stop()

    def end_epoch(self) -> None:
        """Record that a save is due once the Trainer has evaluated."""
        self._is_due = self._has_epoch_ended = True

    @property
    def _is_epoch_done(self) -> bool:
        """Return whether the epoch has ended, and was not left before its last batch."""
        return self._has_epoch_ended and float(self.trainer.state.epoch or 0).is_integer()

    def _log_save_evaluate(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Log, save and evaluate as the Trainer does last in a step and an epoch, and then save the training state."""
        state = self.trainer.state
        if self.trainer.control.should_evaluate:
            self._begin_evaluation()
        native(*arguments, **options)
        self._evaluation.end()
        if self._is_due and self._session.is_active:
            self._save_state(ends_epoch=self._is_epoch_done)
        self._random.end_step()
        if self._is_stopping or self._session.should_stop_now():
            self._stop()
        if self.trainer.control.should_training_stop or state.global_step >= state.max_steps:
            self._session.wait()  # the Trainer may now load the best model

    def _begin_evaluation(self) -> None:
        """Keep the state before the evaluation; save it if evaluations swap weights, so that a signal need not wait."""
        self._evaluation.begin()
        is_alone = self._session.is_active and not self._session.process_group.is_distributed
        is_saved = self.trainer.state.global_step == self._session.saved_step
        if self._evaluation.swaps_weights and self._evaluation.has_trained_weights() and is_alone and not is_saved:
            self._saver.save_state(self._state_to_save(ends_epoch=False, is_folder_saved=False))

    def _stop(self) -> NoReturn:
        save = functools.partial(self._save_state, ends_epoch=self._is_epoch_done and self._evaluation.before is None)
        self._session.stop(self.trainer.state.global_step, save)

    def save_after_exception(self, error: BaseException) -> None:
        """Save the steps since the last save, because `error` ends training; exit if a signal was received before."""
        self._session.save_after_exception(
            error,
            self.trainer.state.global_step,
            self._save_after_exception,
            has_trained_weights=self._evaluation.has_trained_weights,
        )

    def _save_after_exception(self) -> None:
        if self._evaluation.before is None:
            self._random.set_to_last_step()
        self._save_state()

    # Save

    def _save_state(self, *, ends_epoch: bool = False) -> None:
        """Save the training state; `ends_epoch` means that the epoch and its evaluation are done."""
        self._is_due = False
        if self._evaluation.before is not None:  # the evaluation will be run again
            self._evaluation.before.put_back()
        self._saver.save_state(self._state_to_save(ends_epoch=ends_epoch, is_folder_saved=False))

    def _save_for_user(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Save the folder that `save_strategy` asks for and, if it is due, the training state from the same files."""
        args = self.trainer.args
        native = functools.partial(native, *arguments, **options)
        if args.push_to_hub:  # the Trainer reads the folder as soon as it is written
            native()
            return
        state = None
        if self._is_due and self._session.is_active and not (args.save_only_model or self._saver.is_remote):
            self._is_due = False
            state = self._state_to_save(ends_epoch=self._is_epoch_done, is_folder_saved=True)
        self._saver.save_for_user(native, state)

    def _state_to_save(self, *, ends_epoch: bool, is_folder_saved: bool) -> StateToSave:
        """Return what the Trainer leaves out of its state, and what remains to do in this step and epoch."""
        control, state = self.trainer.control, self.trainer.state
        is_last_step = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        metadata = {
            "optimizer": optimizer_name(self.trainer),
            "hyperparameters": self._resumption.hyperparameters_to_save(),
            "stopped": self._session.preemption.requested is None and _is_stopped_early(self.trainer),
            "evaluate": not ends_epoch and control.should_evaluate,
            "save": not (ends_epoch or is_folder_saved) and control.should_save,
            "ends_epoch": is_last_step and not self._has_epoch_ended,
            "swaps": self._evaluation.swaps_weights,
        }
        random = self._session.process_group.gather(self._random.to_save())
        return StateToSave(self._epoch + ends_epoch, metadata, random)


def _is_stopped_early(trainer: Trainer) -> bool:
    """Return whether an ``EarlyStoppingCallback`` has ended training.

    Whatever else ends it, such as a time limit, lets training continue at the next start.
    """
    stopping = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
    is_stopped = trainer.control.should_training_stop and trainer.state.global_step < trainer.state.max_steps
    return is_stopped and any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stopping)
