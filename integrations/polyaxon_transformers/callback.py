"""The callback that a user adds to Hugging Face's Trainer."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from transformers import Trainer, TrainerCallback

from polyaxon_torch import TorchProcessGroup
from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import Run, RunPaths, SaveOptions, TrainingSession
from polyaxon_transformers.training import Training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from polyaxon_tracking.training import IfChanged

__all__ = ["PolyaxonCallback"]

_logger = logging.getLogger("polyaxon_tracking")

# The trainings of this process that share an `output_dir`: the directories of their training states, in their order.
_sharing: dict[str, list[str]] = {}


class PolyaxonCallback(TrainerCallback, RunPaths):
    """Put a Trainer's checkpoints below the run's outputs path, and resume from the newest after the pod was killed.

    A relative `output_dir` of the ``TrainingArguments`` is created below ``<outputs>/checkpoints``, and the folders
    that `save_strategy` asks for are saved there. The callback also saves the whole training state to
    ``<outputs>/checkpoints/resume`` at the end of every epoch. In a run of the platform, ``trainer.train()`` resumes
    from the newest intact training state. Elsewhere, `resume` decides, and each start has its own
    ``./outputs/version_N``. A `resume_from_checkpoint` given to ``train`` takes precedence.

    Args:
        datasets: names of the datasets that training needs, or a mapping from each name to its path on this machine.
            The mapping's paths are used only if the environment names no data. `data_path` returns the path of each.
        resume: ``True`` resumes from the newest intact checkpoint, outside a run from that in the newest ``version_N``
            with checkpoints. ``False`` starts from scratch. By default, only a run resumes.
        if_changed: what to do if the script's hyperparameters differ from those saved with the checkpoint: ``"warn"``
            resumes and logs both values, ``"raise"`` raises, and ``"restart"`` starts from scratch and keeps the
            checkpoint. The number of epochs may always change.
        name: the name of this training, such as ``"fold-3"``, if the script trains several times. The checkpoints of a
            named training, its best models included, are in ``<outputs>/checkpoints/<name>``, whatever trainings came
            before it in the script.
        every_n_train_steps: number of optimizer steps after which to save the training state, in addition to the end
            of every epoch. The state is saved at the end of a batch in which a multiple of this number was reached or
            passed. With ``"auto"``, it is saved as often as costs 1% of the time.
        train_time_interval: time after which to save the training state again, in addition to the end of every epoch.
        max_to_keep: number of the newest training states to keep. Older training states are deleted. By default, two
            are kept while training runs, and one once it has ended.
        keep_every_n_epochs: keep the first training state at or after each multiple of this number of epochs for good.
        keep_every: keep the first training state for good, and then the first one whenever this time has passed since.
        loggers: names of more loggers whose level is set by ``POLYAXON_LOG_LEVEL``. That variable also sets the level
            of the loggers of Transformers, Accelerate and this package.
        background: whether to sync, verify and upload a checkpoint in a background thread while training continues. A
            checkpoint then appears under its name shortly after its step, and every checkpoint is written when
            ``train`` returns. With ``False``, training waits.
        write_timeout: maximum time that the end of training waits for pending writes, and that a save waits for the
            write of the previous save. An error is raised after that time.

    Raises:
        TrackingError: a dataset is unknown or missing, the outputs path cannot be written to, a variable is malformed,
            or an argument is out of range.

    Examples:
        >>> polyaxon = PolyaxonCallback(datasets={"reviews": "."})
        >>> polyaxon.data_path("reviews")
        '.'
        >>> os.path.relpath(polyaxon.outputs_path)
        'outputs/version_0'
    """

    def __init__(
        self,
        *,
        datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]] = (),
        resume: bool | None = None,
        if_changed: IfChanged = "warn",
        name: str | None = None,
        every_n_train_steps: int | Literal["auto"] | None = None,
        train_time_interval: timedelta | None = None,
        max_to_keep: int | None = None,
        keep_every_n_epochs: int | None = None,
        keep_every: timedelta | None = None,
        loggers: Iterable[str] = (),
        background: bool = True,
        write_timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        self._options = SaveOptions(
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            max_to_keep=max_to_keep,
            keep_every_n_epochs=keep_every_n_epochs,
            keep_every=keep_every,
            background=background,
            write_timeout=write_timeout,
        )
        self._run = Run(
            datasets=datasets,
            loggers=loggers,
            framework_loggers=["transformers", "accelerate"],
            resume=resume,
            if_changed=if_changed,
            name=name,
        )
        self._attached = False
        self._training: Training | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Point the new Trainer at the outputs path.

        Raises:
            TrackingError: the Trainer has another PolyaxonCallback too.
        """
        trainer = _constructed_now()
        if sum(isinstance(callback, PolyaxonCallback) for callback in trainer.callback_handler.callbacks) > 1:
            raise TrackingError("Received several PolyaxonCallbacks in one Trainer. Expected one: remove the others.")
        folders = self._redirect(args)
        self._attached = True
        # No hook can choose the checkpoint to resume from.
        trainer.train = _Train(trainer, functools.partial(self._train, *folders))  # type: ignore[method-assign]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log where training starts.

        Raises:
            TrackingError: the callback was added to a Trainer that had been made, or the optimizer is not the one that
                was saved.
        """
        if not self._attached:
            raise TrackingError(
                "Received a PolyaxonCallback with `trainer.add_callback`. Expected it when the Trainer is made, since "
                "a callback that comes later cannot resume: pass Trainer(callbacks=[PolyaxonCallback()])."
            )
        if self._training is not None:
            self._training.begin()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reset the epoch's counters."""
        if self._training is not None:
            self._training.begin_epoch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record that an optimizer step is in progress."""
        if self._training is not None:
            self._training.begin_optimizer_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record whether a save is due, and exit if a signal was received."""
        if self._training is not None:
            self._training.end_step()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Exit if a signal was received, in the evaluation within training."""
        if self._training is not None:
            self._training.end_evaluation_step()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record that a save is due."""
        if self._training is not None:
            self._training.end_epoch()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the running training, because a copy of this callback has no part in it."""
        return vars(self) | {"_training": None}

    def _redirect(self, args: TrainingArguments) -> tuple[str, str | None]:
        """Return the directory for `save_strategy`, and the URL to which its folders are uploaded, if any."""
        given = str(args.output_dir)  # the Trainer has made it
        if "://" in given:
            _remove_if_empty(given)
            raise TrackingError(
                f"Received output_dir={self._run.clean_path(given)!r}. Expected a directory, because the Trainer "
                f"writes only to disks: pass a name such as 'bert'. The folder is then created below the outputs path, "
                f"and uploaded if that is a URL."
            )
        users = self._run.checkpoint_path(given)
        if self._run.is_remote:
            return given, None if os.path.isabs(given) else users
        if users != given:
            args.output_dir = users
            if args.should_save:
                os.makedirs(users, exist_ok=True)
        return users, None

    def _train(
        self,
        folder: str,
        users: str | None,
        trainer: Trainer,
        train: Callable[..., Any],
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Replace ``Trainer.train``: find the checkpoint to resume from, and train."""
        options |= zip(("resume_from_checkpoint", "trial", "ignore_keys_for_eval"), arguments, strict=False)
        if options.get("trial") is not None:
            _logger.info("A trial of a hyperparameter search: it is not resumed, and saves what save_strategy asks for")
            return train(**options)
        args = trainer.args
        # With `model_init`, each call of `train` makes the model again.
        trained = trainer if trainer.model_init is not None else trainer.accelerator.unwrap_model(trainer.model)
        checkpoints = self._run.checkpoint_manager(trained, options=self._options)
        self._run.is_model_trained &= trainer.model_init is None
        sharing = _sharing.setdefault(users or folder, [])
        if checkpoints.directory not in sharing:
            sharing.append(checkpoints.directory)
        if number := sharing.index(checkpoints.directory):  # the first training keeps its folders
            args.output_dir = f"{folder}-{number + 1}"
            users = users and f"{users}-{number + 1}"
            _logger.info("Folders of this training go to %s, because an earlier one has %s", args.output_dir, folder)
        # Last, so that the saved state contains what all other callbacks have just done.
        trainer.pop_callback(self)
        trainer.add_callback(self)
        session = TrainingSession(self._run, checkpoints, self._options, TorchProcessGroup(self._options.write_timeout))
        training = self._training = Training(trainer, session, users, ignore_keys=options.get("ignore_keys_for_eval"))
        try:
            given = options.pop("resume_from_checkpoint", None)
            if (folder_or_true := training.resume(given)) is not None:
                options["resume_from_checkpoint"] = folder_or_true
            with training.attached():
                result = train(**options)
            session.finish(has_ended=training.has_ended)
        except BaseException as error:
            training.save_after_exception(error)
            raise
        finally:
            self._training = None
            training.close()
        return result


def _constructed_now() -> Trainer:
    """Return the Trainer that is being constructed, because hooks do not receive it."""
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
    raise TrackingError("Received a PolyaxonCallback in something other than a transformers.Trainer.")


class _Train:
    """The replacement of a Trainer's method `train`.

    It holds the Trainer until the Trainer trains, because nothing else may: ``Trainer(...).train()``. From then on, it
    holds only a weak reference, so that the model is freed with the Trainer.
    """

    def __init__(self, trainer: Trainer, by: Callable[..., Any]) -> None:
        functools.update_wrapper(self, type(trainer).train)
        self._held: Trainer | None = trainer
        self._trainer = weakref.ref(trainer)
        self._own = vars(trainer).get("train")  # the method of another library
        self._by = by

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        trainer, self._held = self._trainer(), None
        assert trainer is not None  # the caller has got this method from the Trainer
        own = self._own or functools.partial(type(trainer).train, trainer)
        return self._by(trainer, own, *arguments, **options)


def _remove_if_empty(directory: str) -> None:
    try:
        os.removedirs(directory)
    except OSError:  # it holds something
        _logger.debug("%s stays: it was there before", directory)
