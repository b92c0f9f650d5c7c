"""Searches of a ``LearningRateFinder`` or ``BatchSizeFinder`` before training, which a training that resumes skips."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from polyaxon_lightning.framework import pl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

__all__ = ["allow_searches", "found_by_searches", "skip_searches"]

_logger = logging.getLogger("polyaxon_tracking")


def found_by_searches(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what the searches have found, by the name of the model's attribute that holds it."""
    model, found = trainer.lightning_module, {}
    for finder in _finders(trainer):
        if isinstance(finder, pl.callbacks.BatchSizeFinder):
            names = (finder._batch_arg_name,)  # noqa: SLF001
        else:
            names = (finder._attr_name,) if finder._attr_name else ("lr", "learning_rate")  # type: ignore[assignment]  # noqa: SLF001
        for name in names:
            if pl.utilities.parsing.lightning_hasattr(model, name):
                found[name] = pl.utilities.parsing.lightning_getattr(model, name)
    return found


def skip_searches(trainer: pl.Trainer, found: dict[str, Any]) -> None:
    """Skip the searches, and set the model's attributes to what they had `found` before.

    After a search, Lightning restores the state from before the search, and forgets the checkpoint that it was about to
    resume from. The optimizer's learning rate is in that checkpoint.
    """
    for finder in _finders(trainer):
        finder.on_fit_start = None  # type: ignore[assignment,method-assign]  # Lightning skips what is not callable
        _logger.info("Resuming with what %s found when training started: it searches no more", type(finder).__name__)
    for name, value in found.items():
        pl.utilities.parsing.lightning_setattr(trainer.lightning_module, name, value)


def allow_searches(trainer: pl.Trainer) -> None:
    """Undo `skip_searches`."""
    for finder in _finders(trainer):
        vars(finder).pop("on_fit_start", None)


def _finders(trainer: pl.Trainer) -> Iterator[LearningRateFinder | BatchSizeFinder]:
    """Yield the Trainer's callbacks that search, except those of a ``Tuner``, which only search."""
    kinds = (pl.callbacks.LearningRateFinder, pl.callbacks.BatchSizeFinder)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kinds) and not callback._early_exit:  # noqa: SLF001
            yield callback
