"""The callback that a user adds to ``model.fit``."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from datetime import timedelta
from signal import Signals
from typing import TYPE_CHECKING, Any

import numpy as np

from polyaxon_keras import training_state
from polyaxon_keras.epoch_end import BeforeEpochEnd, First, Last, MissedEpochEnd, averages_on_exception, is_helper
from polyaxon_keras.fit_hooks import callback_list, refuse_second_restorer, training_weights, warn_of_files_outside
from polyaxon_keras.framework import keras
from polyaxon_keras.process_group import JaxProcessGroup
from polyaxon_keras.snapshot import Snapshot, values
from polyaxon_tracking import CheckpointManager, PreemptionHandler, TrackingError, atomic_write
from polyaxon_tracking.training import BackgroundWriter, Flags, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType, TracebackType
    from typing import NoReturn

__all__ = ["PolyaxonCallback"]

_logger = logging.getLogger("polyaxon_tracking")

# What Keras and its backends log to. Not torch's: at INFO it tells of its compiler, whether that is used or not.
_KERAS_LOGGERS = ["keras", "absl", "tensorflow", "jax"]


class PolyaxonCallback(keras.callbacks.ModelCheckpoint):
    """A ``ModelCheckpoint`` that saves below the run's outputs path, and goes on after the pod was killed.

    The model is saved when ``ModelCheckpoint`` would, with the same options, to ``<outputs>/checkpoints``. Beside that,
    the whole training state is saved to ``<outputs>/checkpoints/resume`` at the end of every epoch. In a run of the
    platform, ``model.fit`` goes on from the newest of these that is intact; elsewhere outputs are in ``./outputs`` and
    `resume` decides.

    Args:
        filepath: name of the model's file, with the same placeholders as in ``ModelCheckpoint``, below
            ``<outputs>/checkpoints``; an absolute path is left as it is. By default ``best.keras`` with
            `save_best_only`, else ``model.keras``; with `save_weights_only` they end in ``.weights.h5``.
        monitor: as in ``ModelCheckpoint``, like all up to `initial_value_threshold`.
        verbose: 0 or 1.
        save_best_only: whether to save only when `monitor` improved.
        save_weights_only: whether to save the weights alone.
        mode: ``"auto"``, ``"min"`` or ``"max"``.
        save_freq: ``"epoch"``, or a number of batches.
        initial_value_threshold: what `monitor` has to improve on at first.
        datasets: names of the datasets that training needs; or a mapping from name to the path on this machine, which
            is used where the environment names no data. Ask for each with `data_path`.
        resume: whether to go on from the newest checkpoint: by default only in a run of the platform.
        every_n_train_steps: save the training state every so many batches too, where a multiple was reached or passed.
            Keras cannot resume inside an epoch: the epoch begins again, with the weights that were saved.
        train_time_interval: save the training state whenever so much time has passed, too.
        restore: callbacks beside this one whose state is saved and restored too, such as ``EarlyStopping`` and
            ``ReduceLROnPlateau``, which Keras lets begin anew.
        max_to_keep: how many of the newest training states stay.
        loggers: names of loggers whose level follows ``POLYAXON_LOG_LEVEL``, beside Keras's and this package's.
        background: whether to write while training goes on, from a copy of the state in memory; a file then appears
            under its name a little after its step. All is written when ``fit`` returns.
        write_timeout: how long the end of training waits for what is still to be written, and a save for the one
            before. Then it is an error.

    Raises:
        TrackingError: a dataset is unknown or missing, the outputs path cannot be written to, a variable is malformed,
            or an argument is out of range.

    Examples:
        >>> polyaxon = PolyaxonCallback(monitor="val_loss", save_best_only=True, datasets={"digits": "."})
        >>> os.path.relpath(polyaxon.filepath)
        'outputs/checkpoints/best.keras'
        >>> polyaxon.data_path("digits")
        '.'
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str] | None = None,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]] = (),
        resume: bool | None = None,
        restore: Iterable[keras.callbacks.Callback] = (),
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        max_to_keep: int = 2,
        loggers: Iterable[str] = (),
        background: bool = True,
        write_timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if filepath is None:
            filepath = ("best" if save_best_only else "model") + (".weights.h5" if save_weights_only else ".keras")
        Run.check_frequency(every_n_train_steps, train_time_interval)
        self._restored = list(restore)
        if wrong := [callback for callback in self._restored if not isinstance(callback, keras.callbacks.Callback)]:
            raise TrackingError(f"Received restore={wrong!r}. Expected a list of callbacks that `fit` is given too.")
        self._run = Run(datasets=datasets, loggers=[*_KERAS_LOGGERS, *loggers], resume=resume)
        path = self._run.checkpoint_path(os.fspath(filepath))
        below = self._run.checkpoints_path
        if path.startswith(below):  # of the file's name alone, braces are placeholders
            path = below.replace("{", "{{").replace("}", "}}") + path[len(below) :]
        super().__init__(
            path,
            monitor=monitor,
            verbose=verbose,
            save_best_only=save_best_only,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
            initial_value_threshold=initial_value_threshold,
        )
        self._every_n_train_steps = every_n_train_steps
        self._interval = None if train_time_interval is None else train_time_interval.total_seconds()
        self._max_to_keep = max_to_keep
        BackgroundWriter(write_timeout)  # raises for a wrong `write_timeout`
        self._write_timeout = write_timeout
        self._saves_in_background = background
        self._snapshot: Snapshot | None = None
        self._process_group = JaxProcessGroup()
        self._callbacks: list[keras.callbacks.Callback] = []
        self._resume = resume
        self._reserves = True
        self._unchanged = False
        self._checkpoints = CheckpointManager(self._run.checkpoints_path, max_to_keep)  # until training begins
        self._epoch = 0
        self._batch = -1
        self._step = 0
        self._saved_step = 0
        self._saved_at = 0.0
        self._preemption = PreemptionHandler(self._is_training)
        self._excepthook = sys.excepthook
        self._stepping = False
        self._iterations_before = 0
        self._fitted: keras.Model | None = None
        self._states: list[dict[str, Any]] = []
        self._logs: dict[str, Any] = {}
        self._before: BeforeEpochEnd | None = None
        """What was before the end of the epoch, until all have seen that."""
        self._saved_before = -1
        self._wishes = Flags()
        self._looks = False
        self._swaps = False

    @property
    def outputs_path(self) -> str:
        """Where this run's outputs go."""
        return self._run.outputs_path

    def data_path(self, name: str) -> str:
        """Where the dataset `name` is, one of those given as `datasets`.

        Raises:
            TrackingError: it was not given.
        """
        return self._run.data_path(name)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Bring the model to the newest training state.

        Raises:
            TrackingError: no checkpoint is intact, or the model is not the one that was saved.
        """
        super().on_train_begin(logs)
        callbacks = callback_list()
        self._callbacks = [callback for callback in callbacks.callbacks if not is_helper(callback)]
        callbacks.callbacks = [First(self._begin_epoch_end), *self._callbacks, Last(self._leave_epoch)]
        if self._resume is not False:
            refuse_second_restorer(self._callbacks)
        self._process_group = JaxProcessGroup()
        if self._run.on_cluster and self._process_group.rank == 0:
            warn_of_files_outside(self._callbacks, self._run)
        if self._saves_in_background and self._snapshot is None and self._process_group.rank == 0:
            self._snapshot = Snapshot(self._write_timeout)
        self._checkpoints = self._run.checkpoint_manager(self.model, max_to_keep=self._max_to_keep)
        self._step = self._saved_step = 0
        self._reserves = True
        self._saved_at = time.monotonic()
        self._states, self._logs, self._before, self._saved_before, self._swaps = [], {}, None, -1, False
        self._wishes = Flags()
        self._fitted = self.model
        _let_go_of_failed()
        self._preemption.install()
        if sys.excepthook != self._save_after_exception:
            self._excepthook, sys.excepthook = sys.excepthook, self._save_after_exception
        self._watch_optimizers()
        self._iterations_before = self._iterations()
        newest = self._process_group.latest(self._checkpoints) if self._run.should_resume else None
        if newest is None:
            _logger.info("Starting fresh: %s", self._run.why_fresh(self._checkpoints))
            return
        if not newest.path.endswith(".weights.h5"):
            raise TrackingError(
                f"Received {newest.source}, which Keras did not save. Expected an outputs path with checkpoints of "
                f"Keras alone: use another outputs path for this training."
            )
        training = training_state.load(
            self.model, newest.path, newest.source, self._process_group.rank, build=self._build
        )
        self._checkpoints.release()
        self.best = training["best"]
        self._states = training["callbacks"]
        if len(self._states) != len(self._restored):
            raise TrackingError(
                f"Received {len(self._restored)} callbacks to restore, while {newest.source} holds the state of "
                f"{len(self._states)}. Expected the same callbacks in the same order. Give `restore` what it was given "
                f"before, or pass PolyaxonCallback(resume=False) to begin anew; the checkpoint stays as it is."
            )
        self._swaps = training.get("swaps", False)
        if missed := training.get("missed"):
            self._logs = missed["logs"]
            MissedEpochEnd(self.model, callbacks, missed)
            self._saved_before = newest.step
        self._step = self._saved_step = newest.step
        self._iterations_before = self._iterations() - newest.step
        _begin_at(self.model, newest.epoch)
        _logger.info("Resuming from %s: epoch %d, step %d", newest.source, newest.epoch, newest.step)
        if newest.epoch >= self.params["epochs"]:
            _logger.info("This training had come to its end (epochs=%d): nothing is left", self.params["epochs"])

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Count from here."""
        self._unchanged = False
        super().on_epoch_begin(epoch, logs)
        self._restore_callbacks()
        self._epoch, self._batch, self._before = epoch, -1, None

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save where `save_freq`, `every_n_train_steps` or `train_time_interval` says so, or a signal asks for it."""
        self._unchanged = False
        super().on_train_batch_end(batch, logs)
        if self.params["steps"] is not None:  # with `steps_per_execution` the last batches of an epoch may be fewer
            batch = min(batch, self.params["steps"] - 1)
        self._step += batch - self._batch
        self._batch, self._logs = batch, logs or {}
        if self._reserves:
            self._reserve()
        flags = self._agree()
        if Run.should_save(self._every_n_train_steps, step=self._step, saved_step=self._saved_step):
            flags = flags._replace(save=True)
        if self._batch + 1 == self.params["steps"]:
            self._wishes = flags  # for the end of the epoch, which is next
        else:
            self._grant(flags)

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save and end where a signal asked for it, in the validation within ``fit``.

        Where other weights are in the model than before the validation, the signal waits until the validation ends,
        unless the state was saved before it.
        """
        number = self._agree().signal
        if self._looks:
            self._looks, self._swaps = False, self._swaps or not self._has_weights_of_before()
        if number and self._before is not None and (self._saved_before == self._step or self._has_weights_of_before()):
            self._unchanged = False
            self._end(number)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save the model as ``ModelCheckpoint`` does, then the training state."""
        self._unchanged = False
        super().on_epoch_end(epoch, logs)
        if not self._restored:  # otherwise those among them that come after this one have yet to see the epoch's end
            self._end_epoch(epoch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Note that this training has finished; end where a signal came after its last batch.

        The next one has checkpoints of its own, also that of the same model.
        """
        self._unchanged = False
        super().on_train_end(logs)
        self._restore_callbacks()
        epochs = self.params["epochs"]
        if self.model.stop_training and self._epoch + 1 < epochs:
            self._save_training(epochs)  # stopped early: no epoch is left to go on with
        self._wait()
        self._snapshot = None  # and its memory
        self._preemption.uninstall()
        if sys.excepthook == self._save_after_exception:  # otherwise another one has been put on top since
            sys.excepthook = self._excepthook
        for optimizer in training_state.optimizers_of(self.model).values():
            vars(optimizer).pop("apply", None)
        _begin_at(self.model, None)
        self._run.mark_finished(self._checkpoints)
        self._process_group.exit_if_requested(self._preemption)

    def _agree(self) -> Flags:
        """What this process wants, or what all do: with several, one batch later."""
        due = self._interval is not None and time.monotonic() - self._saved_at >= self._interval
        number = self._preemption.requested or 0
        if not self._process_group.is_distributed:
            return Flags(number, due)
        failed = self._snapshot is not None and self._snapshot.failed
        first = self._process_group.rank == 0  # whose clock counts
        flags = self._process_group.reduce_flags(Flags(number, first and due, failed))
        if flags.failed:
            self._wait()
        return flags

    def _grant(self, flags: Flags) -> None:
        if flags.signal:
            self._end(flags.signal)
        if flags.save:
            self._save_within_epoch()

    def _end(self, number: int) -> NoReturn:
        """Save and leave training, as the signal `number` to one of the processes asks."""
        if self._saved_before != self._step:
            self._save_within_epoch()
        self._leave(number)

    def _leave(self, number: int) -> NoReturn:
        self._wait()
        if self._process_group.rank == 0:
            _logger.warning("Saved step %d after %s", self._step, Signals(number).name)
        self._preemption.exit(number)

    def _begin_epoch_end(self) -> None:
        """Note what was before the end of the epoch; where validations were seen to swap weights, save it."""
        if self._before is None:
            self._unchanged = False
            self._before, self._looks = self._look(), not self._process_group.is_distributed
            flags, self._wishes = self._wishes, Flags()
            self._grant(flags._replace(save=flags.save or (self._swaps and self._saved_before != self._step)))

    def _end_epoch(self, epoch: int) -> None:
        """Save at the end of every epoch."""
        if self._before is not None:
            self._before = None
            self._save_training(epoch + 1)

    def _leave_epoch(self, epoch: int) -> None:
        """Save where that has waited for all others, and end where a signal has waited for the end of the epoch."""
        self._unchanged = False
        self._end_epoch(epoch)
        if (number := self._preemption.requested) and not self._process_group.is_distributed:
            self._leave(number)

    def _look(self) -> BeforeEpochEnd:
        return BeforeEpochEnd(self.model, self._logs, self._training_values())

    def _has_weights_of_before(self) -> bool:
        """Whether the weights are those of before the end of the epoch; several processes cannot look at all."""
        with training_weights(self._callbacks):
            return self._before is None or self._process_group.is_distributed or self._before.has_weights_of(self.model)

    def _is_training(self, frame: FrameType | None) -> bool:
        """Whether `frame` is within the ``fit`` of this callback's model: Keras tells no callback of an exception."""
        while frame is not None:
            if self._is_fit(frame):
                return True
            frame = frame.f_back
        return False

    def _is_fit(self, frame: FrameType) -> bool:
        # Keras takes its own frames out of a traceback, but for the one of the wrapper that does so.
        arguments, name = frame.f_locals, frame.f_code.co_name
        if name == "error_handler" and arguments.get("args"):
            return arguments["args"][0] is self._fitted and arguments["fn"].__name__ == "fit"
        return name == "fit" and arguments.get("self") is self._fitted

    def _save_after_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Save what was done since the last save when an exception of ``fit`` ends the process.

        A hook of the interpreter, since Keras tells callbacks nothing of an exception.
        """
        self._excepthook(kind, error, trace)
        frames = [frame for frame, _ in traceback.walk_tb(trace)]
        if (
            not any(map(self._is_fit, frames)) or self._stepping or self._process_group.is_distributed
        ):  # others may have none
            return
        self._unchanged = False
        if self._iterations() - self._iterations_before == self._step + 1:  # raised before this callback's turn came
            self._step, self._batch = self._step + 1, self._batch + 1
            self._logs = self.model.get_metrics_result()
        if self._step == self._saved_step:
            return
        if averages_on_exception(self.model.optimizer) or not self._has_weights_of_before():
            _logger.warning(
                "Step %d is not saved: other weights are in the model, such as averages. What was there before is as "
                "it was",
                self._step,
            )
            return
        try:
            self._save_within_epoch()
            self._wait()
        except (OSError, RuntimeError, TrackingError) as failure:
            _logger.error(  # noqa: TRY400  # the traceback of the exception has just been printed
                "The state at the exception was not saved; what was there before is as it was: %s", failure
            )
        else:
            _logger.warning("Saved step %d after %s", self._step, kind.__name__)

    def _watch_optimizers(self) -> None:
        """Know where an optimizer step is under way: until it is done, the state is neither of one step nor the next.

        Not on JAX, where the variables of the model change together, when the whole step is done.
        """
        self._stepping = False
        if keras.backend.backend() != "jax":
            for optimizer in training_state.optimizers_of(self.model).values():
                self._watch(optimizer)

    def _watch(self, optimizer: keras.optimizers.Optimizer) -> None:
        vars(optimizer).pop("apply", None)  # of a training that ended with an exception
        apply = optimizer.apply

        def watched(*arguments: Any, **options: Any) -> Any:
            self._stepping = True
            result = apply(*arguments, **options)
            self._stepping = False
            return result

        optimizer.apply = watched

    def _build(self) -> None:
        """Build the model for such batches as this ``fit`` has, as Keras does by itself on the other backends.

        TensorFlow builds in the first step, and loads nothing before. Only the local variable of ``fit`` and the
        private name of Keras know the types of the batches without taking one.
        """
        frame: FrameType | None = sys._getframe()  # noqa: SLF001
        while frame is not None and "epoch_iterator" not in frame.f_locals:
            frame = frame.f_back
        if frame is not None:
            batch = frame.f_locals["epoch_iterator"]._distributed_dataset.element_spec  # noqa: SLF001
            x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
            self.model(keras.tree.map_structure(_symbolic, x))

    def _iterations(self) -> int:
        optimizer = self.model.optimizer
        return 0 if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _restore_callbacks(self) -> None:
        # Not before training has begun for all: they reset themselves then.
        if self._states:
            for callback, values in zip(self._restored, self._states, strict=True):
                vars(callback).update(values)
            self._states = []

    def _training_values(self) -> dict[str, Any]:
        best = None if self.best is None else float(self.best)
        callbacks = [_plain_values(callback) for callback in self._restored]
        return {"best": best, "callbacks": callbacks, "swaps": self._swaps}

    def _save_within_epoch(self) -> None:
        """Save the state; at the end of the epoch, that of before it."""
        before = self._before
        if before is None and self._batch + 1 == self.params["steps"]:
            before = self._look()
        self._save_training(self._epoch, before)

    def _save_training(self, epoch: int, before: BeforeEpochEnd | None = None) -> None:
        model, checkpoints, step = self.model, self._checkpoints, self._step
        training, random = self._training_values(), training_state.random_state()
        if before is not None:
            training, random = before.training, before.random
        metadata = training_state.make_metadata(model, training, self._process_group.gather(random))
        if before is not None:
            metadata["generators"] = before.generators
            self._saved_before = step

        def write() -> None:
            with checkpoints.save(step, epoch, suffix=".weights.h5") as path:
                training_state.save(model, path, metadata)

        with training_weights(self._callbacks) as swapped:
            self._unchanged = self._unchanged and not swapped
            self._write(f"step {step} to {checkpoints.directory}", write)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _write(self, what: str, write: Callable[[], None]) -> None:
        whole = self._process_group.collect(self.model)
        with self._process_group.first() as writes:
            if writes:
                self._write_first(what, write, whole)

    def _write_first(self, what: str, write: Callable[[], None], whole: list[tuple[Any, Any]]) -> None:
        try:
            if whole:
                with values(whole):
                    write()
            elif self._snapshot is None:
                write()
            else:
                self._snapshot.save(what, self.model, write, unchanged=self._unchanged)
                self._unchanged = True
        except OSError:
            self._saved_step = self._step  # the disk fails: nothing is gained by a second try after the exception
            raise

    def _wait(self) -> None:
        """Return when all is written."""
        with self._process_group.share_errors():
            if self._snapshot is not None:
                self._snapshot.wait()

    def _reserve(self) -> None:
        """Take the memory for copies of the state: since the first batch all of it is there."""
        self._reserves = False
        if self._snapshot is not None and not self._process_group.splits(self.model):
            self._snapshot.reserve(self.model)

    def _save_model(self, epoch: int, batch: int | None, logs: dict[str, Any] | None) -> None:
        """Save the model's file as ``ModelCheckpoint`` does, but complete or not at all.

        This stands in for a private method of Keras, which writes in place: a kill leaves nothing to load. No public
        hook comes between its decision to save and its writing.
        """
        path = self._get_file_path(epoch, batch, logs)
        if not self._should_save_model(epoch, batch, logs, path):
            return
        model = self.model

        def write() -> None:
            with atomic_write(path) as staged:
                if self.save_weights_only:
                    model.save_weights(staged, overwrite=True)
                else:
                    model.save(staged, overwrite=True)
            if self.verbose > 0:
                _logger.info("Epoch %d: saved the model to %s", epoch + 1, path)

        self._write(path, write)


def _let_go_of_failed() -> None:
    """Take away what trainings wait with whose exception was caught, so that their models go."""
    while True:
        failed = getattr(sys.excepthook, "__self__", None)
        if not isinstance(failed, PolyaxonCallback) or failed._is_training(sys._getframe()):  # noqa: SLF001
            return
        sys.excepthook = failed._excepthook  # noqa: SLF001
        failed._preemption.uninstall()  # noqa: SLF001


def _plain_values(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Return the state of a callback: its attributes that are numbers, strings, arrays, or lists of arrays.

    Not `min_delta`: Keras's callbacks turn its sign in their first epoch, so it would be turned again after resuming.
    """
    return {
        name: value.copy() if isinstance(value, list | np.ndarray) else value
        for name, value in vars(callback).items()
        if not name.startswith("_")
        and name != "min_delta"
        and (
            value is None
            or isinstance(value, bool | int | float | str | np.generic | np.ndarray)
            or (isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value))
        )
    }


def _symbolic(spec: Any) -> keras.KerasTensor:
    """Return a symbolic tensor for what `spec` describes, with any batch size."""
    return keras.KerasTensor((None, *spec.shape[1:]), spec.dtype.name)


def _begin_at(model: keras.Model, epoch: int | None) -> None:
    """Have the ``fit`` that is beginning start with `epoch` instead of its `initial_epoch`.

    A private attribute, the one that Keras's own ``BackupAndRestore`` sets: there is no public way.
    """
    model._initial_epoch = epoch  # noqa: SLF001
