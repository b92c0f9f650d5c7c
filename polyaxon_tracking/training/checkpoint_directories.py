"""The checkpoint directory of each training of this process: ``resume``, ``resume-2`` and so on."""

from __future__ import annotations

import re
import weakref
from typing import NamedTuple

from polyaxon_tracking.urls import join_below

__all__ = ["RESUME", "directory_of_training", "has_finished_training", "mark_finished"]

# The names of these directories.
RESUME = re.compile(r"resume(-\d+)?")


class _Training(NamedTuple):
    """The objects that a training trains, and whether the training has finished.

    The references are weak because a model must be freed after its training.
    """

    objects: tuple[weakref.ref[object], ...]
    has_finished: bool = False


# The trainings of this process, by the checkpoint directory of each.
_begun: dict[str, _Training] = {}


def directory_of_training(checkpoints_path: str, objects: tuple[object, ...]) -> str:
    """Return the directory, in `checkpoints_path`, of the training of `objects` that starts now.

    A training of the same objects that has not finished is continued. Otherwise, the training gets the next directory.
    """
    new = _Training(tuple(map(weakref.ref, objects)))
    number = 1
    while True:
        directory = join_below(checkpoints_path, "resume" if number == 1 else f"resume-{number}")
        begun = _begun.setdefault(directory, new)  # one atomic call, because trials may run in threads
        if begun is new or (not begun.has_finished and _refer_to(begun.objects, objects)):
            return directory
        number += 1


def has_finished_training(model: object) -> bool:
    """Return whether a training of `model` has finished in this process."""
    return any(_refer_to(one.objects[:1], (model,)) for one in [*_begun.values()] if one.has_finished)


def mark_finished(directory: str) -> None:
    """Record that the training whose checkpoints are in `directory` has finished."""
    _begun[directory] = _begun.get(directory, _Training(()))._replace(has_finished=True)


def _refer_to(references: tuple[weakref.ref[object], ...], objects: tuple[object, ...]) -> bool:
    # Compare by identity, because a model may define its own `__eq__`.
    return len(references) == len(objects) and all(ref() is one for ref, one in zip(references, objects, strict=True))
