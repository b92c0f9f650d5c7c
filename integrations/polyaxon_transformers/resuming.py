"""What a training resumes from: the choice of its checkpoint, and the restoring of weights and callbacks from it."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from polyaxon_torch import settle_lazy_layers
from polyaxon_tracking import TrackingError, cached_path
from polyaxon_tracking.training import StagedFile, accept_hyperparameters, different_model, open_directory
from polyaxon_transformers.folders import STATE_SUFFIX, folder_name, read_metadata, read_random_state, unpack
from polyaxon_transformers.hyperparameters import hyperparameters
from polyaxon_transformers.weights import load_with, saved_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import Trainer

    from polyaxon_tracking import Checkpoint
    from polyaxon_tracking.training import TrainingSession
    from polyaxon_transformers.machines import Machines

__all__ = [
    "ResumedState",
    "Resumption",
    "callback_states",
    "load_best_model",
    "load_checkpoint",
    "optimizer_name",
    "path_in_output_dir",
]


class Resumption:
    """Choose the checkpoint that one training of a Trainer resumes from, unless the user's own folder is preferred.

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
        self._hyperparameters = hyperparameters(trainer)
        self.state: ResumedState | None = None
        """The training state to resume from, once it is chosen."""

    def choose(self, given: str | bool | None) -> str | bool | None:
        """Return the argument `resume_from_checkpoint` for the Trainer; the user has `given` it, or not (``None``).

        Raises:
            TrackingError: there are checkpoints but none is intact, another framework saved them, or there is no room
                to unpack one.
        """
        session, run = self._session, self._session.run
        if isinstance(given, str):
            newest = session.process_group.latest(session.checkpoints) if run.should_resume else None
            if newest is not None:
                session.log.unused(newest, "resume_from_checkpoint", given)
            return given
        if given is True or (given is None and run.should_resume):
            self._open_newest()
            if self.state is not None:
                return self.state.folder
        if given is True and _has_folders(str(self._trainer.args.output_dir)):
            return True
        if given is True:
            run.check_fresh("resume_from_checkpoint=True")
        session.log.start(None)
        return None  # without folders the Trainer would raise for True, even at the first start of a run

    def _open_newest(self) -> None:
        """Open the newest intact training state, if there is one and its hyperparameters are accepted."""
        checkpoint = self._session.find_checkpoint((STATE_SUFFIX, ".tar"), "Hugging Face's Trainer")
        if checkpoint is None:
            return
        self.state = ResumedState(self._trainer, self._session, self._machines, checkpoint)
        saved = self.state.metadata.get("hyperparameters")
        if not accept_hyperparameters(self._session, checkpoint.source, saved, self._hyperparameters):
            self.state.close()
            self.state = None
            return
        self.state.fetch_best(self._trainer, self._upload_url)
        self._session.log.start(checkpoint)

    def initial_values(self, native: Callable[..., tuple[Any, ...]], *arguments: Any, **options: Any) -> Any:
        """Start no epoch if none is left: the Trainer would check the number of steps only after one more step."""
        epochs, steps_per_epoch, *others, max_steps = native(*arguments, **options)
        resumed = self.state
        if resumed is not None and (resumed.metadata["stopped"] or resumed.checkpoint.step >= max_steps):
            name = "max_steps" if self._trainer.args.max_steps > 0 else "num_train_epochs"
            limit = None if resumed.metadata["stopped"] else f"{name}={getattr(self._trainer.args, name):g}"
            self._session.log.nothing_left(epoch=resumed.checkpoint.epoch, limit=limit)
            epochs = min(epochs, resumed.checkpoint.step // steps_per_epoch)
        return epochs, steps_per_epoch, *others, max_steps

    def hyperparameters_to_save(self) -> dict[str, Any]:
        """Return the hyperparameters to save with a training state."""
        resumed = {} if self.state is None else self.state.metadata
        return self._hyperparameters.as_saved(resumed.get("hyperparameters"))

    def close(self) -> None:
        """Remove the unpacked folder, if there is one."""
        if self.state is not None:
            self.state.close()


class ResumedState:
    """A training state that the Trainer resumes from.

    Args:
        trainer: the Trainer.
        session: the session of this training.
        machines: the machines of the training.
        checkpoint: the checkpoint, a folder or a folder packed in one file.

    Raises:
        TrackingError: there is no room to unpack it.
    """

    def __init__(self, trainer: Trainer, session: TrainingSession, machines: Machines, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._unpacked: StagedFile | None = None
        self.folder = checkpoint.path
        """The folder from which the Trainer resumes; the Trainer itself saved its files."""
        if checkpoint.path.endswith(".tar"):
            self.folder = self._unpack(trainer, session, machines)
        self.metadata = read_metadata(self.folder)
        """What the Trainer leaves out of its state: see `polyaxon_transformers.training`."""
        self.random_at_epoch_begin = read_random_state(self.folder, session.process_group.rank)
        """This process's random state at the beginning of the epoch in which the state was saved."""
        self.torch_random_at_save = (self.random_at_epoch_begin or {}).get("at_save")
        """The state of torch's generators on this rank when the state was saved; not in those of earlier versions."""
        state = TrainerState.load_from_json(os.path.join(self.folder, TRAINER_STATE_NAME))
        self.best = state.best_model_checkpoint and os.path.basename(state.best_model_checkpoint)
        """The name of the folder with the best model, if there was one."""
        self.has_evaluated = any(key.startswith("eval_") for entry in state.log_history for key in entry)
        """Whether there was an evaluation before."""

    def _unpack(self, trainer: Trainer, session: TrainingSession, machines: Machines) -> str:
        """Unpack the checkpoint once on each machine, and return the folder, which is kept until the end of training.

        The folder is in a staging directory: if this process is killed, the next start removes it.
        """
        here = tempfile.gettempdir()
        path, source = self.checkpoint.path, self.checkpoint.source
        try:
            with session.process_group.share_errors():
                if trainer.is_local_process_zero():
                    needed, free = os.path.getsize(path), shutil.disk_usage(here).free
                    if needed > free:
                        raise TrackingError(
                            f"Received {source} of {needed:,} bytes to unpack in {here}, where {free:,} bytes are "
                            f"free. Expected room for it. Set TMPDIR to a directory on a larger disk."
                        )
                    self._unpacked = open_directory(here).stage(folder_name(self.checkpoint.step))
                    with self._unpacked.writing() as folder:
                        unpack(path, folder)
        finally:
            session.checkpoints.release()
        return machines.first_value(self._unpacked.path if self._unpacked is not None else "")

    def fetch_best(self, trainer: Trainer, upload_url: str | None) -> None:
        """Download the folder with the best model, if it was uploaded and this machine does not have it."""
        if self.best is None or upload_url is None or not trainer.is_local_process_zero():
            return
        folder = path_in_output_dir(trainer, self.best)
        if not os.path.isdir(folder):  # this is a new pod
            unpack(cached_path(f"{upload_url}/{self.best}.tar"), folder)

    def restore(self, trainer: Trainer) -> None:
        """Restore what the Trainer has not restored when its training begins.

        Raises:
            TrackingError: the optimizer is not the one that was saved.
        """
        optimizer = optimizer_name(trainer)
        if self.metadata["optimizer"] != optimizer:
            raise different_model(
                self.checkpoint.source, [f"its optimizer is {optimizer}, saved was {self.metadata['optimizer']}"]
            )
        _restore_callbacks(trainer)
        if self.best is not None and os.path.isdir(best := path_in_output_dir(trainer, self.best)):
            trainer.state.best_model_checkpoint = best  # the Trainer forgets it if the outputs were moved

    def finish_step(self, trainer: Trainer, ignore_keys: list[str] | None) -> None:
        """Do what was left to do after the step of the checkpoint, with the random state of that step."""
        control = trainer.control
        trainer._load_rng_state(self.folder)  # noqa: SLF001  # of the end of a step, like all of this
        control.should_evaluate, control.should_save = self.metadata["evaluate"], self.metadata["save"]
        _evaluate_and_save(trainer, ignore_keys)
        if self.metadata.get("ends_epoch"):
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
            _evaluate_and_save(trainer, ignore_keys)

    def close(self) -> None:
        """Remove the unpacked folder, if there is one. Calling this method again does nothing."""
        if self._unpacked is not None:
            self._unpacked.discard()


def load_checkpoint(
    trainer: Trainer,
    resumed: ResumedState | None,
    native: Callable[..., None],
    folder: str,
    *arguments: Any,
    **options: Any,
) -> None:
    """Replace ``Trainer._load_from_checkpoint``: load the weights of `folder`, also those that it would not find."""
    source = resumed.checkpoint.source if resumed is not None and folder == resumed.folder else None
    _load_weights(trainer, folder, functools.partial(native, folder, *arguments, **options), source)


def load_best_model(trainer: Trainer, native: Callable[[], None]) -> None:
    """Replace ``Trainer._load_best_model``: load the best weights, also those that it would not find."""
    _load_weights(trainer, str(trainer.state.best_model_checkpoint), native, source=None)


def _load_weights(trainer: Trainer, folder: str, native: Callable[[], None], source: str | None) -> None:
    """Load the weights in `folder` with the Trainer's own function `native`, or those that it would not find there.

    Args:
        trainer: the Trainer.
        folder: a folder that a Trainer saved.
        native: loads them as the Trainer does, which only warns of weights that do not fit.
        source: the checkpoint that training resumes from; ``None`` if `folder` is another one.

    Raises:
        TrackingError: training resumes from `folder`, and the model is a different one.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # their loaders check it
        native()
        return
    model: nn.Module = trainer.model  # type: ignore[assignment]  # made by now
    saved = saved_weights(model, folder)
    if saved.differences and source is not None:
        raise different_model(source, saved.differences)
    if saved.translated is None:
        load_with(model, folder, native)
    else:
        model.load_state_dict(saved.translated)
    differences = settle_lazy_layers(model)
    if differences and source is not None:
        raise different_model(source, differences)


def _evaluate_and_save(trainer: Trainer, ignore_keys: list[str] | None) -> None:
    """Evaluate and save as the Trainer's `control` asks for. Nothing is logged, because the losses are lost."""
    trainer.control.should_log = False
    epoch = trainer.state.epoch or 0
    trainer._maybe_log_save_evaluate(  # noqa: SLF001
        torch.tensor(0.0), None, trainer.model_wrapped, None, epoch, ignore_keys, time.time()
    )


def _restore_callbacks(trainer: Trainer) -> None:
    """Restore the states of callbacks, and keep the arguments that the script gives them now."""
    states = callback_states(trainer.state)
    stateful = [one for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
    for name in {type(one).__name__ for one in stateful}:
        alike = [one for one in stateful if type(one).__name__ == name]
        saved = states.setdefault(name, [] if len(alike) > 1 else alike[0].state())
        for callback, state in zip(alike, saved if isinstance(saved, list) else [saved], strict=False):
            for attribute, value in state.get("attributes", {}).items():
                setattr(callback, attribute, value)


def callback_states(state: TrainerState) -> dict[str, Any]:
    """Return the states of callbacks by class name; a list if there are several callbacks of a class."""
    return state.stateful_callbacks  # type: ignore[return-value]  # the annotation is of what its constructor takes


def optimizer_name(trainer: Trainer) -> str:
    """Return the name of the optimizer's class, without Accelerate's wrappers."""
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


def path_in_output_dir(trainer: Trainer, name: str) -> str:
    """Return the absolute path of `name` in the Trainer's `output_dir`."""
    return os.path.join(os.path.abspath(str(trainer.args.output_dir)), name)


def _has_folders(output_dir: str) -> bool:
    return os.path.isdir(output_dir) and get_last_checkpoint(output_dir) is not None  # type: ignore[no-untyped-call]
