"""The rules of one training: what it resumes from, when it saves, stops and ends. They are the same everywhere.

Each integration itself decides on three saves: at the end of an epoch, after early stopping, and before a validation if
earlier validations have swapped weights. "When a training state is saved" in docs/decisions.md names their functions.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from signal import Signals
from typing import TYPE_CHECKING

from polyaxon_tracking.background import BackgroundWriter
from polyaxon_tracking.training.messages import TrainingLog, of_framework
from polyaxon_tracking.training.preemption import PreemptionHandler
from polyaxon_tracking.training.process_group import Flags, ProcessGroup
from polyaxon_tracking.training.save_schedule import SaveSchedule
from polyaxon_tracking.training.time_limit import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import NoReturn

    from polyaxon_tracking.checkpoint_names import Checkpoint
    from polyaxon_tracking.checkpoints import CheckpointManager
    from polyaxon_tracking.training.options import SaveOptions
    from polyaxon_tracking.training.run import Run

__all__ = ["Action", "TrainingSession"]

_logger = logging.getLogger("polyaxon_tracking")


class Action(enum.Enum):
    """The action that an integration must take at the end of a batch."""

    NOTHING = enum.auto()
    """Continue."""
    SAVE = enum.auto()
    """Save the training state, within `TrainingSession.saving`."""
    STOP = enum.auto()
    """Call `TrainingSession.stop`, because a signal was received."""


class TrainingSession:
    """Find what one training resumes from, and decide when it saves, stops and ends; the same on all ranks.

    An integration translates its framework's hooks into calls of this class, and counts the steps: optimizer steps, or
    batches. The integration saves at the end of an epoch by itself, and otherwise when this class asks for it.

    Args:
        run: the run of this process.
        checkpoints: the checkpoint manager of this training, from `Run.checkpoint_manager`.
        options: how often to save, and how.
        process_group: the processes that train the model together.
        is_training: takes the frame that a signal interrupted and returns whether training is still running; then the
            signal waits for the end of the batch. By default, training runs from `begin` to `finish`.

    Examples:
        >>> from polyaxon_tracking.training import Run, SaveOptions
        >>> run, options = Run(), SaveOptions(every_n_train_steps=2)
        >>> class Model: ...
        >>> session = TrainingSession(run, run.checkpoint_manager(Model()), options)
        >>> session.begin(step=0)
        >>> for step in (1, 2, 3):
        ...     if session.end_batch(step) is Action.SAVE:
        ...         with session.saving(step), session.checkpoints.save(step) as path:
        ...             _ = Path(path).write_text("the state")
        >>> session.finish(has_ended=True)
        >>> session.checkpoints.latest().step
        2
    """

    def __init__(
        self,
        run: Run,
        checkpoints: CheckpointManager,
        options: SaveOptions,
        process_group: ProcessGroup | None = None,
        *,
        is_training: Callable[[FrameType | None], bool] | None = None,
    ) -> None:
        self.run = run
        self.checkpoints = checkpoints
        self.options = options
        self.process_group = ProcessGroup() if process_group is None else process_group
        self.preemption = PreemptionHandler(is_training or (lambda _: self.is_active))
        self.is_writer = self.process_group.rank == 0
        """Whether this process writes the checkpoints."""
        self.log = TrainingLog(run, checkpoints, is_enabled=self.is_writer)
        self.writer = BackgroundWriter(options.write_timeout)
        """The thread that writes this training's files in the background."""
        self.saved_step: int | None = None
        """The step that needs no other save: that of the last save, or of the start of training. ``None`` if a save is
        needed at any step, because the last write failed, or a later state of the same step must be saved."""
        self.is_active = False
        """Whether training is running: from `begin` until training stops, fails or finishes."""
        self.stepping_from: int | None = None
        """The number of steps done when the current optimizer step began; the integration sets it, because the state
        is inconsistent until that step is done. The end of the batch resets it."""
        self._schedule = SaveSchedule(options)
        self._time_limit = TimeLimit()
        self._signal: Signals | None = None

    # Resume

    def find_checkpoint(self, suffixes: tuple[str, ...], framework: str) -> Checkpoint | None:
        """Return the newest intact checkpoint, the same on all ranks, or ``None`` if there are no checkpoints.

        Args:
            suffixes: the endings of the checkpoints' names that the integration can read.
            framework: the name of the framework, for messages.

        Raises:
            TrackingError: there are checkpoints but none is intact, another framework saved them, or the ranks find
                different checkpoints.
        """
        return of_framework(self.process_group.latest(self.checkpoints), suffixes, framework)

    # Train

    def begin(self, step: int) -> None:
        """Start at `step`, the number of steps done before: start the clock, and let signals wait for a batch's end.

        The signal handlers are installed unless the integration has done so earlier, with ``preemption.install()``.
        """
        self.saved_step, self.stepping_from, self._signal = step, None, None
        self._schedule.start()
        self.is_active = True
        self.preemption.install()
        self.preemption.install_unhandled()

    def end_batch(self, step: int) -> Action:
        """Return what to do at the end of a batch, after `step` steps. This is a collective.

        With several processes, a signal, the clock and a failed write take effect one batch later, so that none waits.

        Raises:
            Exception: a background write has failed.
        """
        self.stepping_from = None
        seconds_of_save = self._schedule.seconds_blocked + self.writer.seconds_of_last_write
        self.log.save_took(seconds_of_save)
        if self.is_writer and (reason := self._time_limit.reason_to_end(seconds_of_save)):
            self.preemption.request(reason)
        is_due = self._schedule.is_due_by_time(is_writing=self.writer.pending)
        flags = self.process_group.reduce_flags(
            Flags(self.preemption.requested or 0, int(is_due and self.is_writer), int(self.writer.failed))
        )
        if flags.failed:
            self.wait()
        if flags.signal:
            self._signal = Signals(flags.signal)
            return Action.STOP
        if step == self.saved_step:  # for example while gradients are being accumulated
            return Action.NOTHING
        is_due = bool(flags.save) or self._schedule.is_due_by_steps(step=step, saved_step=self.saved_step or 0)
        return Action.SAVE if is_due else Action.NOTHING

    def should_stop_now(self) -> bool:
        """Return whether to call `stop` at once, because a signal was received in an evaluation or between two epochs.

        With several processes, training stops only at the end of a training batch, because the evaluations of the
        processes may have different lengths.
        """
        return self.is_active and self.preemption.requested is not None and not self.process_group.is_distributed

    # Save

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Record the save that the ``with`` block does after `step` steps.

        In the foreground, the step counts as saved before the write: a write that fails is not repeated at once.
        """
        if not self.options.background:
            self.saved_step = step
        with self._schedule.saving():
            yield
        self.saved_step = step

    def wait(self) -> None:
        """Wait until all files are written. This is a collective.

        Raises:
            Exception: a write has failed. The last save then does not count as saved.
            RuntimeError: a write has failed on another rank.
        """
        with self.process_group.share_errors():
            self.wait_for_own_writes()

    def wait_for_own_writes(self) -> None:
        """Wait until this process's files are written. The other ranks need not call this method.

        Raises:
            Exception: a write has failed. The last save then does not count as saved.
        """
        saved_step, self.saved_step = self.saved_step, None
        self.writer.wait()
        self.saved_step = saved_step

    # End

    def stop(self, step: int, save: Callable[[], None]) -> NoReturn:
        """Save once and exit as the signal asks, on all ranks. This is a collective.

        Args:
            step: the number of steps done.
            save: saves the training state; called if the state after `step` steps is not saved yet.

        Raises:
            SystemExit: always after SIGTERM, with status 143, also if saving failed: a run that was preempted is
                started again.
            KeyboardInterrupt: always after Ctrl-C.
        """
        signal = self._signal or self.preemption.requested
        assert signal is not None
        self.is_active = False
        _save_last(self, step, save, signal.name, is_due=step != self.saved_step)
        # Launchers kill all ranks when the first one exits, even a rank that is still writing.
        with contextlib.suppress(RuntimeError):  # another rank was killed
            self.process_group.gather(None)
        self.process_group.close()
        self.preemption.exit(signal)

    def save_after_exception(
        self,
        error: BaseException,
        step: int,
        save: Callable[[], None],
        *,
        has_trained_weights: Callable[[], bool] = lambda: True,
    ) -> None:
        """Save the steps since the last save because `error` ends training, and exit if a signal was received before.

        Nothing is saved in the middle of an optimizer step, or with several processes: saving takes all of them, and
        the others may have no exception.

        Args:
            error: the exception, which the caller raises afterwards.
            step: the number of steps done.
            save: saves the training state.
            has_trained_weights: returns whether the model holds the weights that training continues with, and not, for
                example, their averages.

        Raises:
            SystemExit: a signal was received. It may be the cause of `error`: a signal to a whole process group also
                ends the workers of a data loader.
            KeyboardInterrupt: as above, after Ctrl-C.
        """
        requested = self.preemption.requested
        self.preemption.uninstall()
        was_active, self.is_active = self.is_active, False
        can_save = was_active and not self.process_group.is_distributed
        is_due = can_save and step not in (self.saved_step, self.stepping_from)
        if is_due and not has_trained_weights():
            is_due = False
            self.log.other_weights(step)
        reason = requested.name if requested else type(error).__name__
        _save_last(self, step, save, reason if was_active and (is_due or requested) else None, is_due=is_due)
        if requested and not isinstance(error, (SystemExit, KeyboardInterrupt)):
            _logger.warning("After %s: %s: %s", requested.name, type(error).__name__, error)
            self.preemption.exit()

    def finish(self, *, has_ended: bool) -> None:
        """End a training whose call has returned: the next one, even of the same model, has its own checkpoints.

        This is a collective. Unless the user has said how many states to keep, only the newest state of a training that
        has ended is kept, because a training with nothing left to train needs no other.

        Args:
            has_ended: whether all epochs or steps are done, or early stopping has ended training. Otherwise, as after a
                time limit, training continues when the script is started again.

        Raises:
            Exception: a write has failed.
            SystemExit: SIGTERM was received after the last batch.
            KeyboardInterrupt: Ctrl-C was pressed after the last batch.
        """
        self.is_active = False
        try:
            self.wait()
            if has_ended and self.is_writer and self.options.max_to_keep is None:
                self.checkpoints.prune()
            self.run.mark_finished(self.checkpoints)
            self.process_group.exit_if_requested(self.preemption)
        finally:
            self.close()

    def close(self) -> None:
        """Uninstall the signal handlers and close the process group. Calling this method again does nothing."""
        self.is_active = False
        self.preemption.uninstall()
        self.process_group.close()


def _save_last(
    session: TrainingSession, step: int, save: Callable[[], None], reason: str | None, *, is_due: bool
) -> None:
    """Save if `is_due`, wait for this process's writes, and log that `step` is saved after `reason`, if any.

    An error is logged and not raised, because it must not replace what ends training.
    """
    try:
        if is_due:
            save()
        session.wait_for_own_writes()
    except Exception as error:  # noqa: BLE001  # whatever the framework's code raises
        session.log.not_saved(step, error)
    else:
        if reason is not None and step == session.saved_step:
            session.log.saved(step, reason)
