"""Resume a Trainer from a training state, though it has chosen its `ckpt_path` before any callback's hook."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import sys
import traceback
from typing import TYPE_CHECKING, Any

from polyaxon_lightning.checkpoint_io import METADATA_KEY, DurableCheckpointIO, training_state_io
from polyaxon_lightning.framework import pl
from polyaxon_lightning.searches import skip_searches
from polyaxon_torch import differing_shapes, refused_state
from polyaxon_tracking.training import different_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import Strategy

    from polyaxon_lightning.checkpoint_io import TrainingStateIO
    from polyaxon_lightning.training_state import TrainingStateCheckpoint
    from polyaxon_tracking import Checkpoint

__all__ = ["Resumption", "ckpt_path_argument"]

_logger = logging.getLogger("polyaxon_tracking")


class Resumption:
    """Choose the checkpoint that one ``fit`` resumes from, and load it, unless the user's `ckpt_path` is preferred.

    Args:
        training_state: the callback that saves and restores the training state.
        argument: the `ckpt_path` that ``fit`` was called with.
    """

    def __init__(self, training_state: TrainingStateCheckpoint, argument: Any) -> None:
        self._training_state = training_state
        self._session = training_state.session
        self._argument = argument
        self._checkpoint: Checkpoint | None = None
        """The checkpoint to resume from."""

    def find(self, trainer: pl.Trainer) -> None:
        """Find the newest training state, and load it unless that must wait until the optimizers are made.

        Raises:
            TrackingError: no checkpoint is intact, the model is not the one that was saved, or ranks see different
                checkpoints.
        """
        run = self._session.run
        # Lightning looks for "last" before any hook, in the directory it would use without this package.
        is_last_requested = trainer.ckpt_path is None and self._argument == "last"
        if run.should_resume or is_last_requested:
            self._checkpoint = self._session.find_checkpoint((".ckpt",), "PyTorch Lightning")
            if self._checkpoint is None and is_last_requested:
                run.check_fresh('ckpt_path="last"')
        if self._checkpoint is not None and not self._loads_late(trainer):
            _load(trainer, self._training_state.io, self._checkpoint)

    def start(self, trainer: pl.Trainer) -> None:
        """Log where training starts, after loading the checkpoint if `find` could not."""
        log = self._session.log
        self._training_state.hyperparameters.record_optimizers(trainer)
        own_path = self._decide_and_load(trainer)
        resumed = self._checkpoint
        if resumed is not None or own_path is not None:
            skip_searches(trainer, self._training_state.found_by_searches)
        if own_path is None:
            log.start(resumed)
            if resumed is not None:
                _take_over_files(trainer, resumed.source)
        elif resumed is not None:  # the user's path is loaded afterwards
            log.unused(resumed, "ckpt_path", self._session.run.clean_path(os.fspath(own_path)))
        max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        if own_path is None and resumed is not None and 0 <= max_epochs <= resumed.epoch:
            log.nothing_left(epoch=resumed.epoch, limit=f"max_epochs={max_epochs}")

    def compare_hyperparameters(self, trainer: pl.Trainer) -> None:
        """Compare the hyperparameters with those of the checkpoint; Lightning knows the batch size only by now.

        Raises:
            TrackingError: hyperparameters have changed, and ``if_changed="raise"``.
        """
        if self._checkpoint is not None and self._session.run.if_changed != "restart":
            hyperparameters = self._training_state.hyperparameters
            hyperparameters.accept(trainer, self._checkpoint.source, hyperparameters.resumed)

    def _decide_and_load(self, trainer: pl.Trainer) -> Any:
        """Decide between the user's `ckpt_path` and the checkpoint of `find`, and return the path if it is preferred.

        The checkpoint is loaded here if `find` could not load it, or if the Trainer has loaded an older one since.
        """
        own_path, resumed = trainer.ckpt_path, self._checkpoint
        restores_later = trainer.strategy.restore_checkpoint_after_setup  # and not before `on_fit_start`
        if restores_later:
            own_path = own_path or self._argument
        is_loaded_over = own_path is not None and own_path != "last"
        is_of_user = restores_later or not _is_chosen_by_lightning(trainer, self._argument)
        if resumed is None or (is_loaded_over and is_of_user):
            return own_path
        if is_loaded_over:
            newer = _is_newer(trainer, resumed)
            self._session.log.passed_over(str(own_path), _loaded_step(trainer), resumed, newer=newer)
            if newer:
                self._checkpoint = None
                return own_path
        if is_loaded_over or self._loads_late(trainer):
            if not _load(trainer, self._training_state.io, resumed, functools.partial(self._accept, trainer, resumed)):
                self._checkpoint = None
            elif not restores_later:
                _restore(trainer)
        return None

    def _loads_late(self, trainer: pl.Trainer) -> bool:
        """Return whether the state is loaded only once the optimizers are made: they decide whether to resume."""
        return trainer.strategy.restore_checkpoint_after_setup or self._session.run.if_changed == "restart"

    def _accept(self, trainer: pl.Trainer, checkpoint: Checkpoint, state: dict[str, Any]) -> bool:
        """Return whether to resume from `state`, loaded from `checkpoint`, or to start from scratch."""
        if self._session.run.if_changed != "restart":  # `compare_hyperparameters` compares more
            return True
        saved = state.get(METADATA_KEY, {}).get("hyperparameters")
        return self._training_state.hyperparameters.accept(trainer, checkpoint.source, saved)


def _load(
    trainer: pl.Trainer,
    io: TrainingStateIO,
    checkpoint: Checkpoint,
    accept: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> bool:
    """Load `checkpoint` with `io`, and make the Trainer restore everything from it.

    Args:
        trainer: the Trainer.
        io: the input and output of training states.
        checkpoint: the checkpoint.
        accept: takes the loaded state, and returns whether to resume from it.

    Returns:
        Whether the state was accepted.

    Raises:
        TrackingError: the checkpoint holds more than `io` may load. If the model's shapes differ from the saved shapes,
            Lightning's later load of the weights raises a ``TrackingError``.
    """
    if isinstance(trainer.precision_plugin, pl.plugins.precision.DoublePrecision):
        # Lightning converts only after it has restored the weights, which would round them.
        trainer.precision_plugin.convert_module(trainer.lightning_module)
    try:
        with training_state_io(trainer, io):
            state = _hand_over(trainer, checkpoint.path)
    except pickle.UnpicklingError as error:
        raise refused_state(checkpoint.source, error, "PolyaxonCallback") from error
    if not accept(state):
        _take_back(trainer)
        return False
    if not trainer.strategy.restore_checkpoint_after_setup:  # such a strategy loads later, and compares shapes itself
        _check_shapes_when_loaded(trainer.strategy, state, checkpoint.source)
    return True


def _restore(trainer: pl.Trainer) -> None:
    """Restore the loaded checkpoint now, because the Trainer has just restored another one."""
    connector = trainer._checkpoint_connector  # noqa: SLF001
    connector.restore_model()
    connector.restore_datamodule()
    connector.restore_callbacks()


def _take_over_files(trainer: pl.Trainer, source: str) -> None:
    """Make each ModelCheckpoint's restored state in `source` and the files in its directory agree.

    It forgets the files that its state names and that no longer exist. Those that were saved after the state are
    replaced, or removed later.
    """
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, DurableCheckpointIO):
        return
    if trainer.is_global_zero:
        io.resume(trainer.checkpoint_callbacks)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint):
            named = sorted({*callback.best_k_models, callback.best_model_path} - {""})
            missing = trainer.strategy.broadcast(io.missing(named) if trainer.is_global_zero else None)
            if missing:
                _forget(callback, missing)
                _logger.warning(
                    "%s names %s, which no longer exists. The best model is now %s",
                    source,
                    ", ".join(missing),
                    callback.best_model_path or "the next that is saved",
                )


def _forget(callback: ModelCheckpoint, files: list[str]) -> None:
    models = callback.best_k_models
    for file in files:
        models.pop(file, None)
    if callback.best_model_path in files:
        callback.best_model_path, callback.best_model_score = "", None
    if models:
        best, worst = (min, max) if callback.mode == "min" else (max, min)
        callback.best_model_path = best(models, key=models.__getitem__)
        callback.best_model_score = models[callback.best_model_path]
        callback.kth_best_model_path = worst(models, key=models.__getitem__)
        callback.kth_value = models[callback.kth_best_model_path]


def _is_chosen_by_lightning(trainer: pl.Trainer, argument: Any) -> bool:
    """Return whether Lightning itself chose `ckpt_path`: what an ``OnExceptionCheckpoint`` or Slurm's requeue saved.

    Args:
        trainer: the Trainer.
        argument: the `ckpt_path` that ``fit`` was called with.
    """
    on_exception = pl.callbacks.OnExceptionCheckpoint
    has_one = any(isinstance(callback, on_exception) for callback in trainer.checkpoint_callbacks)
    return (has_one or _is_of_slurm(trainer)) and argument is None


def _is_newer(trainer: pl.Trainer, checkpoint: Checkpoint) -> bool:
    """Return whether to resume from what Lightning itself chose, because it is newer than `checkpoint`.

    What an ``OnExceptionCheckpoint`` saved may have been saved in the middle of an optimizer step, and is never used.
    """
    return _is_of_slurm(trainer) and _loaded_step(trainer) > checkpoint.step


def _loaded_step(trainer: pl.Trainer) -> int:
    """Return the number of steps in the checkpoint that the Trainer has loaded."""
    step: int = trainer._checkpoint_connector._loaded_checkpoint["global_step"]  # noqa: SLF001
    return step


def _is_of_slurm(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer loads what Lightning saves when Slurm requeues a job."""
    return os.path.basename(trainer.ckpt_path or "").startswith("hpc_ckpt_")


def ckpt_path_argument(trainer: pl.Trainer) -> Any:
    """Return the `ckpt_path` argument of the running ``trainer.fit``, which Lightning stores nowhere.

    In a process that was launched by ``fit``, there is none.
    """
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
    return None


def _hand_over(trainer: pl.Trainer, path: str) -> dict[str, Any]:
    """Load the checkpoint `path` into the Trainer's connector, which restores everything in its own order.

    These names are private, because no public name will do: ``Trainer.fit`` chooses its `ckpt_path` before any hook is
    called. It asks an ``OnExceptionCheckpoint`` for a path, but then ``ckpt_path=None`` means ``"last"`` for every
    ``ModelCheckpoint`` too, in every fit, and modification times choose among the files.
    """
    connector = trainer._checkpoint_connector  # noqa: SLF001
    connector.resume_start(path)
    state: dict[str, Any] = connector._loaded_checkpoint  # noqa: SLF001
    return state


def _take_back(trainer: pl.Trainer) -> None:
    """Undo `_hand_over`, so that the Trainer restores nothing."""
    connector = trainer._checkpoint_connector  # noqa: SLF001
    connector.resume_start(None)
    connector._loaded_checkpoint = {}  # noqa: SLF001


def _check_shapes_when_loaded(strategy: Strategy, state: dict[str, Any], source: str) -> None:
    """Make Lightning's load raise an error with both shapes if the model's tensors differ in shape from `state`.

    Before `state` is loaded nothing can be compared: lazy layers have no shapes, and models may build themselves in
    ``configure_model``, or change the state in ``on_load_checkpoint``. No hook comes after loading.
    """

    def load_model_state_dict(checkpoint: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        del strategy.load_model_state_dict
        error = None
        try:
            strategy.load_model_state_dict(checkpoint, *arguments, **options)
        except RuntimeError as caught:
            error = caught
        module = strategy.lightning_module
        assert module is not None
        mine = checkpoint is state  # and not the checkpoint of the user's `ckpt_path`
        if mine and (differing := differing_shapes(module, state["state_dict"])):
            # Torch's error lists all shapes again; it is only needed if names differ too.
            same_names = module.state_dict().keys() == state["state_dict"].keys()
            raise different_model(source, differing) from (None if same_names else error)
        if error is not None:
            raise error

    strategy.load_model_state_dict = load_model_state_dict  # type: ignore[method-assign]
