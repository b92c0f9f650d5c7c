"""The callback that a user adds to a Trainer."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from polyaxon_lightning.checkpoint_io import DurableCheckpointIO, detach
from polyaxon_lightning.framework import pl
from polyaxon_lightning.hooks import skip_unused_hooks
from polyaxon_lightning.model_checkpoints import attach_to_model_checkpoints
from polyaxon_lightning.outputs import redirect_checkpoints, warn_of_files_outside
from polyaxon_lightning.process_group import Launch, launching_trainer, share_errors_of_saves
from polyaxon_lightning.resuming import Resumption, ckpt_path_argument
from polyaxon_lightning.sharded import refuse_parts_in_store, writes_itself
from polyaxon_lightning.training_state import TrainingStateCheckpoint
from polyaxon_torch import TorchProcessGroup, check_weights_only
from polyaxon_torch.snapshot import Snapshot
from polyaxon_tracking import CheckpointManager, TrackingError
from polyaxon_tracking.training import Run, RunPaths, SaveOptions, TrainingSession

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from polyaxon_tracking.training import IfChanged
else:
    Callback, ModelCheckpoint = pl.callbacks.Callback, pl.callbacks.ModelCheckpoint
    TorchCheckpointIO = pl.plugins.io.TorchCheckpointIO

__all__ = ["PolyaxonCallback"]

_logger = logging.getLogger("polyaxon_tracking")

_LIGHTNING_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def _is_of_first_rank(record: logging.LogRecord) -> bool:
    """Return whether to log the record: rank 0 logs everything, the other ranks log warnings and errors only."""
    return record.levelno >= logging.WARNING or not getattr(pl.utilities.rank_zero_only, "rank", 0)


# At import and not in the constructor, because `ddp_spawn` sends the callback to processes that construct none.
_logger.addFilter(_is_of_first_rank)


class PolyaxonCallback(Callback, RunPaths):
    """Put a Trainer's checkpoints below the run's outputs path, and resume from the newest after the pod was killed.

    Every ``ModelCheckpoint`` of the Trainer without a `dirpath` writes to ``<outputs>/checkpoints``, with all its own
    options. The callback also saves the whole training state to ``<outputs>/checkpoints/resume`` at the end of every
    epoch. In a run of the platform, ``trainer.fit(model)`` resumes from the newest intact training state. Elsewhere,
    `resume` decides, and each start has its own ``./outputs/version_N``. A `ckpt_path` given to ``fit`` is preferred.

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
            of Lightning's loggers and of this package's logger.
        background: whether to write files in a background thread while training continues, from a copy of the state
            in memory. A file then appears under its name shortly after its step, and every file is written when ``fit``
            returns. With ``False``, training waits while a file is written.
        write_timeout: maximum time that the end of training waits for pending writes, and that a save waits for the
            write of the previous save. An error is raised after that time.
        weights_only: whether resuming loads only tensors and plain values. With ``False``, loading a checkpoint can run
            code that is in the file: use it only if the state needs it and you trust the outputs path.

    Raises:
        TrackingError: a dataset is unknown or missing, the outputs path cannot be written to, a variable is malformed,
            or an argument is out of range.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> polyaxon = PolyaxonCallback(datasets={"digits": "."})
        >>> trainer = Trainer(max_epochs=20, callbacks=[polyaxon, ModelCheckpoint(monitor="val_loss")])
        >>> polyaxon.data_path("digits")
        '.'
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
        weights_only: bool = True,
    ) -> None:
        super().__init__()
        skip_unused_hooks(self)
        check_weights_only(weights_only)
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
            framework_loggers=_LIGHTNING_LOGGERS,
            resume=resume,
            if_changed=if_changed,
            name=name,
        )
        self._weights_only = weights_only
        self._launch = Launch(0, "", None)
        self._resumption: Resumption | None = None
        """How the running ``fit`` resumes; ``None`` if nothing is saved."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Point the checkpoints at the outputs path, and load the newest training state before training starts.

        Raises:
            TrackingError: the Trainer is of Lightning's other package, no checkpoint is intact, the model is not the
                one that was saved, or ranks of the training see different checkpoints.
        """
        self._check(trainer, stage)
        self._resumption = None
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning saves nothing then, and nor does this callback
            return
        self._run.configure_driver()  # Lightning's callbacks look into their directories themselves
        user_checkpoints = _without_training_state(trainer.checkpoint_callbacks)
        redirect_checkpoints(user_checkpoints, self._run)
        saves = stage == "fit" and bool(user_checkpoints)
        training_state = self._attach_training_state(trainer, pl_module) if saves else None
        self._replace_checkpoint_io(trainer, training_state)
        if stage != "fit":
            return
        if self._run.on_cluster and trainer.is_global_zero:
            warn_of_files_outside(trainer.loggers, self._run)
        if training_state is None:
            _logger.info("The Trainer has enable_checkpointing=False: nothing is saved, and nothing is resumed from")
            return
        self._resumption = Resumption(training_state, self._ckpt_path_argument(trainer))
        self._resumption.find(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log where training starts; if the model is sharded, load the checkpoint that `setup` found."""
        if self._resumption is not None:
            self._resumption.start(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the hyperparameters, of which Lightning knows the batch size only now.

        Raises:
            TrackingError: hyperparameters have changed, and ``if_changed="raise"``.
        """
        if self._resumption is not None:
            self._resumption.compare_hyperparameters(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove from the Trainer what `setup` added for this training."""
        if self._resumption is not None:
            trainer.callbacks = _without_training_state(trainer.callbacks)  # type: ignore[attr-defined]
            self._resumption = None
            for callback in trainer.checkpoint_callbacks:
                detach(callback)

    def _check(self, trainer: pl.Trainer, stage: str) -> None:
        if not isinstance(trainer, pl.Trainer):
            raise TrackingError(
                f"Received a Trainer of {type(trainer).__module__.partition('.')[0]!r}, but PolyaxonCallback was made "
                f"for {pl.__name__!r}. Import one of the two packages only, before polyaxon_lightning."
            )
        if sum(isinstance(callback, PolyaxonCallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise TrackingError("Received several PolyaxonCallbacks in one Trainer. Expected one: remove the others.")
        if stage == "fit":
            refuse_parts_in_store(trainer, self._run)

    def __getstate__(self) -> dict[str, Any]:
        """Record the checkpoint directory, because pickling may mean that training processes are being launched.

        The running training is left out, because a copy of this callback has no part in it.
        """
        _note_launch()
        return vars(self) | {"_resumption": None}

    def _checkpoints_of(self, model: pl.LightningModule) -> CheckpointManager:
        """Return the checkpoint manager for `model`; in a launched process, that of the recorded directory."""
        if self._launch.is_of_this_process():
            return self._options.checkpoint_manager(self._launch.directory)
        return self._run.checkpoint_manager(model, options=self._options)

    def _ckpt_path_argument(self, trainer: pl.Trainer) -> Any:
        """Return the `ckpt_path` that ``fit`` was called with; in a launched process, the recorded one."""
        return self._launch.ckpt_path if self._launch.is_of_this_process() else ckpt_path_argument(trainer)

    def _attach_training_state(self, trainer: pl.Trainer, model: pl.LightningModule) -> TrainingStateCheckpoint:
        """Add the callback that saves the training state, as the last of the Trainer's callbacks.

        This callback becomes the first of them: a search for a learning rate would hide the user's `ckpt_path` from it.
        """
        process_group = TorchProcessGroup(self._options.write_timeout)
        share_errors_of_saves(trainer.strategy, process_group)
        session = TrainingSession(self._run, self._checkpoints_of(model), self._options, process_group)
        snapshot = Snapshot(session.writer) if self._options.background else None
        training_state = TrainingStateCheckpoint(session, snapshot, weights_only=self._weights_only)
        training_state.follow_data(trainer)
        others = [one for one in _without_training_state(trainer.callbacks) if one is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others, training_state]  # type: ignore[attr-defined]
        return training_state

    def _replace_checkpoint_io(self, trainer: pl.Trainer, state: TrainingStateCheckpoint | None) -> None:
        """Replace the plugin that writes the checkpoints of ModelCheckpoints, unless the user passed a plugin."""
        if type(trainer.strategy.checkpoint_io) not in (TorchCheckpointIO, DurableCheckpointIO):
            return
        io = DurableCheckpointIO() if state is None else DurableCheckpointIO(state.snapshot, state.io.own_files)
        trainer.strategy.checkpoint_io = io
        io.protected_path = self._ckpt_path_argument(trainer)
        if state is not None:
            if not writes_itself(trainer):
                state.io.on_newest = io.keep_named
            attach_to_model_checkpoints(trainer, io, in_background=state.snapshot is not None)


def _without_training_state(callbacks: Sequence[Any]) -> list[Any]:
    return [callback for callback in callbacks if not isinstance(callback, TrainingStateCheckpoint)]


def _note_launch() -> None:
    """Record what the processes of a training need, in the process that is about to launch them.

    What the launched processes record is lost when they end, and the next training must not resume from there.
    Whether the training has finished is not known here, so only the same Trainer and model continue it.
    """
    trainer = launching_trainer()
    if trainer is not None and trainer.state.fn == "fit":
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PolyaxonCallback):
                checkpoints = callback._run.checkpoint_manager(trainer.lightning_module, trainer)  # noqa: SLF001
                launch = Launch(os.getpid(), checkpoints.directory, ckpt_path_argument(trainer))
                callback._launch = launch  # noqa: SLF001


if hasattr(os, "register_at_fork"):  # forking pickles nothing
    os.register_at_fork(before=_note_launch)
