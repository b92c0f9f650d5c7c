"""One call of ``trainer.train``: the hooks and methods of the Trainer, translated into calls of the session."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback

from polyaxon_torch import random_state, set_random_state
from polyaxon_tracking.training import Action, accept_hyperparameters
from polyaxon_transformers.hyperparameters import hyperparameters
from polyaxon_transformers.resuming import ResumedState, load_weights, optimizer_name
from polyaxon_transformers.saving import STATE_SUFFIX, FolderSaver, StateToSave

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
        self._upload_url = upload_url
        self._ignore_keys = ignore_keys
        self._resumed: ResumedState | None = None
        self._saver = FolderSaver(trainer, session, upload_url)
        self._hyperparameters = hyperparameters(trainer)
        self._epoch = 0
        self._is_epoch_done = False
        self._is_due = False
        """Whether to save the training state after the Trainer has logged, evaluated and saved."""
        self._is_evaluating = False
        self._random_before_evaluation: dict[str, Any] = {}
        self._random_to_resume_with: dict[str, Any] | None = None
        """The state of the random number generators after an evaluation that was cut off and is run again."""
        self._is_nothing_left = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Install the signal handlers, and replace methods of the Trainer.

        It has no hooks before its loops, around what it loads and saves, and after all that belongs to a step.
        """
        trainer = self.trainer
        own: dict[str, Any] = {}
        for name, replacement in (
            ("set_initial_training_values", self._initial_values),
            ("_load_from_checkpoint", self._load_from_checkpoint),
            ("_load_best_model", self._load_best_model),
            ("_load_rng_state", self._load_random_state),
            ("_run_epoch", self._run_epoch),
            ("_save_checkpoint", self._save_for_user),
            ("_maybe_log_save_evaluate", self._log_save_evaluate),
        ):
            if (native := getattr(trainer, name, None)) is not None:  # `_run_epoch` was added in Transformers 5.3
                own[name] = vars(trainer).get(name)
                setattr(trainer, name, functools.wraps(native)(functools.partial(replacement, native)))
        self._session.preemption.install()
        try:
            yield
        finally:
            for name, before in own.items():
                delattr(trainer, name)
                if before is not None:  # of another library
                    setattr(trainer, name, before)

    def close(self) -> None:
        """Release everything that the training used."""
        self._session.close()
        if self._resumed is not None:
            self._resumed.close()
        # The signal handlers refer to this object, which must not keep the model in memory.
        del self.trainer, self._saver

    # Resume

    def resume_from_newest(self) -> str | None:
        """Find the newest intact checkpoint, and return the folder from which the Trainer must resume, if there is one.

        Raises:
            TrackingError: there are checkpoints but none is intact, another framework saved them, or there is no room
                to unpack one.
        """
        checkpoint = self._session.find_checkpoint((STATE_SUFFIX, ".tar"), "Hugging Face's Trainer")
        if checkpoint is None:
            return None
        self._resumed = ResumedState(self.trainer, self._session, checkpoint)
        saved = self._resumed.metadata.get("hyperparameters")
        if not accept_hyperparameters(self._session, checkpoint.source, saved, self._hyperparameters):
            self._resumed.close()
            self._resumed = None
            return None
        self._resumed.fetch_best(self.trainer, self._upload_url)
        self._saver.best_in_state = self._resumed.best
        self._session.log.start(checkpoint)
        return self._resumed.folder

    def _initial_values(self, native: Callable[..., tuple[Any, ...]], *arguments: Any, **options: Any) -> Any:
        """Start no epoch if none is left: the Trainer would check the number of steps only after one more step."""
        epochs, steps_per_epoch, *others, max_steps = native(*arguments, **options)
        resumed = self._resumed
        if resumed is not None and (resumed.metadata["stopped"] or resumed.checkpoint.step >= max_steps):
            name = "max_steps" if self.trainer.args.max_steps > 0 else "num_train_epochs"
            limit = None if resumed.metadata["stopped"] else f"{name}={getattr(self.trainer.args, name):g}"
            self._session.log.nothing_left(epoch=resumed.checkpoint.epoch, limit=limit)
            epochs = min(epochs, resumed.checkpoint.step // steps_per_epoch)
        return epochs, steps_per_epoch, *others, max_steps

    def _load_from_checkpoint(self, native: Callable[..., None], folder: str, *arguments: Any, **options: Any) -> None:
        resumed = self._resumed
        source = resumed.checkpoint.source if resumed is not None and folder == resumed.folder else None
        load_weights(self.trainer, folder, functools.partial(native, folder, *arguments, **options), source)

    def _load_best_model(self, native: Callable[[], None]) -> None:
        load_weights(self.trainer, str(self.trainer.state.best_model_checkpoint), native, source=None)

    def _load_random_state(self, native: Callable[..., None], folder: str | None) -> None:
        if self._random_to_resume_with is not None and self._resumed is not None and folder == self._resumed.folder:
            set_random_state(self._random_to_resume_with)
        else:
            native(folder)

    def _run_epoch(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        if not self._is_nothing_left:
            native(*arguments, **options)

    def begin(self) -> None:
        """Restore what the Trainer has not restored, and run an evaluation again that a signal cut off.

        The Trainer may begin a second time, with smaller batches.

        Raises:
            TrackingError: the optimizer is not the one that was saved.
        """
        state = self.trainer.state
        self._is_due, self._random_to_resume_with, self._is_nothing_left = False, None, False
        if self._resumed is not None:
            self._resumed.restore(self.trainer)
        self._epoch = int(state.epoch or 0)
        self._session.begin(state.global_step)
        metadata = {} if self._resumed is None else self._resumed.metadata
        if metadata.get("evaluate") or metadata.get("save"):
            self._finish_resumed_step(metadata)

    def _finish_resumed_step(self, metadata: dict[str, Any]) -> None:
        """Evaluate and save as was due in the step of the checkpoint, with the random state of that step."""
        assert self._resumed is not None
        trainer, control = self.trainer, self.trainer.control
        trainer._load_rng_state(self._resumed.folder)  # noqa: SLF001  # of the end of a step, like all of this
        control.should_log = False
        control.should_evaluate, control.should_save = metadata["evaluate"], metadata["save"]
        loss = torch.tensor(0.0)  # not used, because nothing is logged
        trainer._maybe_log_save_evaluate(  # noqa: SLF001
            loss, None, trainer.model_wrapped, None, self._epoch, self._ignore_keys, time.time()
        )
        self._random_to_resume_with = random_state()
        self._is_nothing_left = trainer.control.should_training_stop

    # Train

    def begin_epoch(self) -> None:
        """Reset the epoch's counters."""
        self._epoch, self._is_epoch_done = int(self.trainer.state.epoch or 0), False

    def begin_optimizer_step(self) -> None:
        """Record that an optimizer step is in progress, because the state is inconsistent until the step is done."""
        self._session.stepping_from = self.trainer.state.global_step

    def end_step(self) -> None:
        """Record whether a save is due, and stop if a signal was received."""
        action = self._session.end_batch(self.trainer.state.global_step)
        if action is Action.STOP:
            self._stop()
        self._is_due = action is Action.SAVE

    def end_evaluation_step(self) -> None:
        """Stop if a signal was received."""
        if self._session.should_stop_now():
            self._stop()

    def end_epoch(self) -> None:
        """Record that a save is due once the Trainer has evaluated."""
        self._is_due = True
        self._is_epoch_done = float(self.trainer.state.epoch or 0).is_integer()  # it may have been left

    def _log_save_evaluate(self, native: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Log, save and evaluate as the Trainer does last in a step and an epoch, and then save the training state."""
        control, state = self.trainer.control, self.trainer.state
        self._is_evaluating = control.should_evaluate
        if self._is_evaluating:
            self._random_before_evaluation = random_state()
        native(*arguments, **options)
        self._is_evaluating = False
        if self._is_due and self._session.is_active:
            self._save_state(ends_epoch=self._is_epoch_done)
        if self.trainer.control.should_training_stop or state.global_step >= state.max_steps:
            self._session.wait()  # the Trainer may now load the best model

    def _stop(self) -> NoReturn:
        self._session.stop(self.trainer.state.global_step, self._save_state)

    def save_after_exception(self, error: BaseException) -> None:
        """Save the steps since the last save, because `error` ends training; exit if a signal was received before."""
        self._session.save_after_exception(error, self.trainer.state.global_step, self._save_state)

    # Save

    def _save_state(self, *, ends_epoch: bool = False) -> None:
        """Save the training state; `ends_epoch` means that the epoch and its evaluation are done."""
        self._is_due = False
        if self._is_evaluating:  # the evaluation is left, and will be run again
            set_random_state(self._random_before_evaluation)
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
        args, control, state = self.trainer.args, self.trainer.control, self.trainer.state
        resumed = {} if self._resumed is None else self._resumed.metadata
        is_last_step = float(state.epoch or 0).is_integer()
        should_evaluate = control.should_evaluate or (is_last_step and args.eval_strategy == "epoch")
        should_save = control.should_save or (is_last_step and args.save_strategy == "epoch")
        metadata = {
            "optimizer": optimizer_name(self.trainer),
            "hyperparameters": self._hyperparameters.as_saved(resumed.get("hyperparameters")),
            "stopped": self._session.preemption.requested is None and _is_stopped_early(self.trainer),
            "evaluate": not ends_epoch and should_evaluate,
            "save": not (ends_epoch or is_folder_saved) and should_save,
        }
        return StateToSave(self._epoch + ends_epoch, metadata)


def _is_stopped_early(trainer: Trainer) -> bool:
    """Return whether an ``EarlyStoppingCallback`` has ended training.

    Whatever else ends it, such as a time limit, lets training continue at the next start.
    """
    stopping = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
    is_stopped = trainer.control.should_training_stop and trainer.state.global_step < trainer.state.max_steps
    return is_stopped and any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stopping)
