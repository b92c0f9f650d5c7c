"""Training states saved between a batch and the end of the validation or the epoch that follows the batch."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch

from polyaxon_lightning.data import generator_states, set_generator_states
from polyaxon_lightning.framework import pl
from polyaxon_lightning.positions import stop_following
from polyaxon_torch import WeightSamples, random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ValidationWatch",
    "batches_done",
    "complete_batch",
    "continue_after_batch",
    "count_epoch_as_unfinished",
    "count_validation_without_drawing",
    "end_no_finished_epoch",
    "epoch_metrics",
    "let_go_of_loops",
    "log_again",
    "plateau_metrics",
    "start_epoch_like_the_others",
    "step_plateaus",
    "uncount_unfinished_batch",
]

# Larger tensors among the states of callbacks, such as averaged weights, are not copied.
_SMALL_BYTES = 1 << 16


class ValidationWatch:
    """Keep the state before each validation of a training, and watch whether other weights are in the model."""

    def __init__(self) -> None:
        self.swaps_weights = False
        """Whether a validation has run with other weights in the model, such as averages."""
        self._before: BeforeValidation | None = None
        self._is_saving_before = False

    @property
    def is_running(self) -> bool:
        """Return whether a validation runs, or the epoch's end that follows it, and the state before it is kept."""
        return self._before is not None

    def begin(self, trainer: pl.Trainer) -> None:
        """Keep the state before the validation, or before the end of an epoch without one."""
        self._before = BeforeValidation(trainer)

    def check(self) -> None:
        """Find out, in the first batch of a validation, whether that swaps weights."""
        if not self.has_trained_weights():
            self.swaps_weights = True

    def end(self) -> None:
        """Let go of the state before the validation, because the epoch has ended or continues."""
        self._before = None

    def has_trained_weights(self) -> bool:
        """Return whether the model holds the weights that are trained."""
        return self._before is None or self._before.has_same_weights()

    @contextlib.contextmanager
    def saving_before(self) -> Iterator[None]:
        """Let the save in the ``with`` block save the state from before the validation, if one runs."""
        self._is_saving_before = True
        try:
            yield
        finally:
            self._is_saving_before = False

    def put_into(self, checkpoint: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Change `checkpoint` to the state from before the validation, if that is the state to save."""
        metadata["swaps"] = self.swaps_weights
        if self._is_saving_before and self._before is not None:
            self._before.put_into(checkpoint, metadata)


class BeforeValidation:
    """The part of the training state that a validation, and the hooks at its end and the epoch's end, may change.

    Only samples of the weights are compared: some callbacks swap averaged ones in, and out when the validation ends.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._weights = WeightSamples(trainer.lightning_module)
        self._random = random_state() | {"loaders": generator_states(trainer)}
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
        self._callbacks = _frozen({key: state for key, state in states.items() if state})
        self._schedulers = [_frozen(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        self._progress = trainer.fit_loop.epoch_loop.state_dict(prefix="epoch_loop.")
        self._groups = [_frozen(optimizer.state_dict()["param_groups"]) for optimizer in trainer.optimizers]

    def has_same_weights(self) -> bool:
        """Return whether the model holds the weights from before the validation."""
        return self._weights.are_current()

    def put_into(self, checkpoint: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Change `checkpoint` to the state from before the validation, as if saved at the end of the batch."""
        metadata |= {"random": [metadata["random"][0] | self._random], "validates": True}
        checkpoint |= {"callbacks": self._callbacks, "lr_schedulers": self._schedulers}
        for state, groups in zip(checkpoint["optimizer_states"], self._groups, strict=True):
            state["param_groups"] = groups
        checkpoint["loops"]["fit_loop"] |= self._progress
        count_epoch_as_unfinished(checkpoint)
        current, total = _counts(checkpoint)
        is_counted = current["completed"] == current["processed"]
        for count in (current, total):
            count["completed"] -= is_counted


def batches_done(checkpoint: dict[str, Any]) -> int:
    """Return how many batches of its epoch are done in `checkpoint`."""
    return _counts(checkpoint)[0]["completed"]


def complete_batch(checkpoint: dict[str, Any]) -> bool:
    """Return whether `checkpoint` was saved at the end of a batch, and count that batch as done.

    Where it is not counted, Lightning leaves out what follows the batch (the validation, the end of the epoch), or
    trains it again, before version 2.5.
    """
    current, total = _counts(checkpoint)
    if not current["completed"] < current["processed"] == current["ready"]:
        return False
    for count in (current, total):
        count.update(dict.fromkeys(count, count["completed"] + 1))
    return True


def continue_after_batch(trainer: pl.Trainer, metadata: dict[str, Any]) -> None:
    """Make training start with the validation or epoch end after the batch at which `metadata` was saved."""
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    was_last = loop.max_steps == metadata["step"]
    loop.max_steps += was_last  # otherwise the loop would not start

    def advance(*_: Any) -> None:
        del loop.advance
        loop.max_steps -= was_last
        # Not with the fit loop's own setter, which always restarts a training with `max_steps`.
        pl.loops._Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]  # noqa: SLF001
        trainer.should_stop = metadata["stopped"]
        if metadata.get("validates"):
            trainer._last_val_time = float("-inf")  # type: ignore[attr-defined]  # noqa: SLF001  # of a `val_check_interval` in time

    loop.advance = advance  # type: ignore[assignment,method-assign]


def count_epoch_as_unfinished(checkpoint: dict[str, Any]) -> None:
    """Take back the count of the epoch, because training is to resume within it."""
    for count in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        count["processed"] = count["completed"]


def uncount_unfinished_batch(trainer: pl.Trainer) -> None:
    """Take back the count of a batch that an exception cut off in the total of all epochs, where Lightning does not."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    total.ready = total.started = total.processed = total.completed


def count_validation_without_drawing(trainer: pl.Trainer) -> None:
    """Keep Lightning from drawing random numbers while it counts the validation before an unfinished batch as done.

    Before version 2.5, it does not count that validation.
    """
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    count = getattr(val_loop, "increment_progress_to_evaluation_end", None)
    if count is None:
        return

    def count_once() -> None:
        del val_loop.increment_progress_to_evaluation_end
        numbers, states = random_state(), generator_states(trainer)
        count()
        set_random_state(numbers)
        set_generator_states(trainer, states)

    val_loop.increment_progress_to_evaluation_end = count_once  # type: ignore[method-assign]


def start_epoch_like_the_others(trainer: pl.Trainer) -> None:
    """Make Lightning start the data loaders at the start of the resumed epoch, as in an uninterrupted training.

    Since version 2.5.6, it uses the iterators from before ``on_train_start`` instead, which have drawn other random
    numbers: persistent workers, for example, draw a number only when they are started.
    """
    trainer.fit_loop._resuming_from_checkpoint = False  # noqa: SLF001


def end_no_finished_epoch(trainer: pl.Trainer) -> None:
    """Keep Lightning from ending the finished epoch again, as it would with `max_steps`."""
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]  # noqa: SLF001


def let_go_of_loops(trainer: pl.Trainer) -> None:
    """Remove the methods that were replaced on the loops, because the training is over."""
    loop = trainer.fit_loop.epoch_loop
    if "advance" in vars(loop):
        loop.advance(None)  # type: ignore[arg-type]  # this restores what it changed
    vars(trainer.fit_loop).pop("_iteration_based_training", None)
    vars(loop.val_loop).pop("run", None)
    vars(loop.val_loop).pop("increment_progress_to_evaluation_end", None)
    stop_following(trainer)


def epoch_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the reduced metrics of an epoch whose batches are all done, because Lightning does not save them.

    Each with whether it goes to the loggers, and to the progress bar. A private name: the public properties show the
    values of the last batch until the epoch has ended.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.batch_progress.is_last_batch:
        return {}
    metrics = loop._results.metrics(on_step=False)  # noqa: SLF001
    return {
        name: [value.cpu(), name in metrics["log"], name in metrics["pbar"]]
        for name, value in metrics["callback"].items()
    }


def log_again(trainer: pl.Trainer, metrics: dict[str, Any]) -> None:
    """Log what `epoch_metrics` returned, for the end of the epoch."""
    for name, (value, logger, prog_bar) in metrics.items():
        trainer.fit_loop.epoch_loop._results.log(  # noqa: SLF001
            "resumed", name, value.to(trainer.strategy.root_device), prog_bar=prog_bar, logger=logger, batch_size=1
        )


def plateau_metrics(trainer: pl.Trainer) -> dict[int, Any]:
    """Return what the ``ReduceLROnPlateau`` schedulers are about to be stepped with, by their index.

    Lightning steps them after the last hook of an epoch, so a checkpoint of the epoch's end lacks that step.
    """
    return {
        index: trainer.callback_metrics[config.monitor]
        for index, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == "epoch"
        and (trainer.current_epoch + 1) % config.frequency == 0
        and config.monitor in trainer.callback_metrics
    }


def step_plateaus(trainer: pl.Trainer, metrics: dict[int, Any]) -> None:
    """Step the ``ReduceLROnPlateau`` schedulers with what `plateau_metrics` returned."""
    for index, metric in metrics.items():
        trainer.lightning_module.lr_scheduler_step(trainer.lr_scheduler_configs[index].scheduler, metric)


def _counts(checkpoint: dict[str, Any]) -> list[dict[str, int]]:
    """Return how many batches a checkpoint counts: of the epoch, and of all epochs."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return [progress["current"], progress["total"]]


def _frozen(value: Any) -> Any:
    """Return a copy of `value`, a part of the state, in which large tensors are shared."""
    if isinstance(value, torch.Tensor):
        return value if value.numel() * value.element_size() > _SMALL_BYTES else value.detach().clone()
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_frozen, value))
    return copy.deepcopy(value)
