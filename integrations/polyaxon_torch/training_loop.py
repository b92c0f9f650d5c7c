"""The object that makes a loop of the user's own resume, save and stop as a framework's callback does."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from polyaxon_torch.loop_rules import Training
from polyaxon_torch.plain_values import check_weights_only
from polyaxon_torch.stateful_objects import StatefulObjects
from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import Run, RunPaths, SaveOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    import torch
    from typing_extensions import Self

    from polyaxon_torch.stateful_objects import Stateful
    from polyaxon_tracking.training import IfChanged

__all__ = ["TrainingLoop"]

_Batch = TypeVar("_Batch")


class TrainingLoop(RunPaths):
    """Make a training loop of your own resume from its newest intact checkpoint after the process was killed.

    The whole training state is saved to ``<outputs>/checkpoints/resume`` at the end of every epoch: the objects, the
    random numbers, the position in the data, and the counts of steps and epochs. In a run of the platform, the loop
    resumes from the newest intact state. Elsewhere, `resume` decides, and each start has its own
    ``./outputs/version_N``. The same class serves loops on one process, with torchrun, with Lightning Fabric and with
    Hugging Face's Accelerate.

    `step` counts the batches in which an optimizer has made a step; without optimizers, all batches. A state is saved
    only at the end of a step, so never while gradients are accumulated.

    Args:
        datasets: names of the datasets that training needs, or a mapping from each name to its path on this machine.
            The mapping's paths are used only if the environment names no data. `data_path` returns the path of each.
        resume: ``True`` resumes from the newest intact checkpoint, outside a run from that in the newest ``version_N``
            with checkpoints. ``False`` starts from scratch. By default, only a run resumes.
        if_changed: what to do if the options of the optimizers differ from those saved with the checkpoint: ``"warn"``
            resumes and logs both values, ``"raise"`` raises, and ``"restart"`` starts from scratch and keeps the
            checkpoint.
        name: the name of this training, such as ``"fold-3"``, if the script trains several times. The checkpoints of a
            named training are in ``<outputs>/checkpoints/<name>``.
        every_n_train_steps: number of steps after which to save the training state, in addition to the end of every
            epoch; or ``"auto"``, to save as often as costs 1% of the time.
        train_time_interval: time after which to save the training state again, in addition to the end of every epoch.
        max_to_keep: number of the newest training states to keep. By default, two while training runs, and one once it
            has ended.
        keep_every_n_epochs: keep the first training state at or after each multiple of this number of epochs for good.
        keep_every: keep the first training state for good, and then the first one whenever this time has passed since.
        loggers: names of more loggers whose level is set by ``POLYAXON_LOG_LEVEL``.
        background: whether to write files in a background thread while training continues, from a copy of the state
            in memory.
        write_timeout: maximum time that the end of training waits for pending writes, and that a save waits for the
            write of the previous save. An error is raised after that time.
        weights_only: whether resuming loads only tensors and plain values. With ``False``, loading a checkpoint can run
            code that is in the file.
        objects: whatever the training needs again, by name, with the methods `state_dict` and `load_state_dict`:
            models, optimizers, schedulers, gradient scalers, objects of your own. The script must make them before.

    Raises:
        TrackingError: an object has no state, a dataset is unknown or missing, the outputs path cannot be written to, a
            variable is malformed, or an argument is out of range.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> loader = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8, shuffle=True)
        >>> with TrainingLoop(model=model, optimizer=optimizer) as training:
        ...     for epoch in training.epochs(3):
        ...         for rows in training.batches(loader):
        ...             optimizer.zero_grad()
        ...             (model(rows) ** 2).mean().backward()
        ...             optimizer.step()
        >>> training.epoch, training.step
        (3, 12)
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
        **objects: Stateful,
    ) -> None:
        check_weights_only(weights_only)
        self._objects = StatefulObjects(objects)
        self._options = SaveOptions(
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            max_to_keep=max_to_keep,
            keep_every_n_epochs=keep_every_n_epochs,
            keep_every=keep_every,
            background=background,
            write_timeout=write_timeout,
        )
        self._run = Run(datasets=datasets, loggers=loggers, resume=resume, if_changed=if_changed, name=name)
        self._weights_only = weights_only
        self._training: Training | None = None

    @property
    def step(self) -> int:
        """The number of steps done, over all starts."""
        return 0 if self._training is None else self._training.step

    @property
    def epoch(self) -> int:
        """The number of epochs done, over all starts; so also the index of the current epoch."""
        return 0 if self._training is None else self._training.epoch

    def __enter__(self) -> Self:
        """Load the newest intact training state into the objects, if there is one and the loop resumes.

        Raises:
            TrackingError: no checkpoint is intact, the objects are not those that were saved, the ranks see different
                checkpoints, or the options of an optimizer have changed and ``if_changed="raise"``.
        """
        if self._training is not None:
            raise TrackingError("Received a TrainingLoop for a second `with` statement. Expected a new TrainingLoop.")
        training = Training(self._run, self._options, self._objects, weights_only=self._weights_only)
        training.begin()
        self._training = training
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until everything is written; after an exception, save the steps since the last save before that."""
        assert self._training is not None
        self._training.end(error)

    def epochs(self, number: int) -> Iterator[int]:
        """Yield the index of each epoch that is left of `number` epochs, and save the training state after each.

        A `break` ends the training: started again, the script trains nothing, unless it asks for more epochs.

        Args:
            number: the number of epochs that the training has in all, over all its starts.

        Raises:
            TrackingError: `number` is not a whole number, or the call is not within the `with` statement.
        """
        given: object = number  # of any type, because few scripts are type-checked
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise TrackingError(f"Received epochs({number!r}). Expected a whole number, 0 or more.")
        training = self._running("epochs")
        training.ask_for_epochs(number)
        while training.has_epochs_left(number):
            training.begin_epoch()
            yield training.epoch
            training.end_epoch()

    def batches(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield the batches of `loader`, in a resumed epoch only those that are left, exactly.

        Call this method within the loop over `epochs`, once for each loader. After each batch, the training state is
        saved if that is due, and training stops if a signal was received. In an epoch whose last batch was done before
        the script was started again, there are no batches left, and what follows them in the epoch is done.

        Args:
            loader: a data loader of torch or of a framework built on it, or any other iterable of batches.

        Raises:
            TrackingError: the call is not within the loop over `epochs`, the batches of another loader are still being
                iterated over, or within a resumed epoch the loader is not the one that was saved.
        """
        training = self._running("batches")
        if not training.is_in_epoch:
            raise TrackingError(
                "Received a call of `batches` outside the loop over the epochs. Expected `for batch in "
                "training.batches(loader)` within `for epoch in training.epochs(number)`."
            )
        for batch in training.begin_batches(loader):
            yield batch
            training.end_batch()

    def save_best(
        self, value: float | torch.Tensor, *, mode: Literal["min", "max"] = "min", filename: str = "best.pt"
    ) -> bool:
        """Save the weights of the models if `value` is the best so far, over all starts, and return whether it is.

        The file is complete or absent, and is replaced by the next better one. It holds the state dict of each model by
        the name given to the constructor. With several processes, the `value` of rank 0 counts, and all must call this
        method.

        Args:
            value: the metric to compare, a number or a tensor with one. NaN is never the best.
            mode: whether the best value is the lowest (``"min"``, as for a loss) or the highest (``"max"``).
            filename: the name of the file in ``<outputs>/checkpoints``; each has its own best value.

        Raises:
            TrackingError: `mode` is neither, or `filename` leaves the directory.
        """
        if mode not in ("min", "max"):
            raise TrackingError(f"Received mode={mode!r}. Expected 'min' or 'max'.")
        training = self._running("save_best")
        return training.save_best(self._run.checkpoint_path(filename), filename, value, sign=1 if mode == "max" else -1)

    def _running(self, method: str) -> Training:
        if self._training is None or not self._training.is_running:
            raise TrackingError(
                f"Received a call of `{method}` outside the `with` statement. Expected `with TrainingLoop(...) as "
                f"training:` around the loop."
            )
        return self._training
