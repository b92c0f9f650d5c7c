"""The folders that the Trainer saves: names, pruning, and folders packed in one file."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "STATE_SUFFIX",
    "folder_name",
    "folders_to_delete",
    "link_folder",
    "pack",
    "read_metadata",
    "read_random_state",
    "unpack",
    "write_metadata",
]

STATE_SUFFIX = ".checkpoint"
"""The ending of a training state that is a folder; in a store it is a single file, whose name ends with ``.tar``."""

_METADATA_FILE, _RANDOM_FILE = "polyaxon.json", "polyaxon_random.pt"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)(?:\.tar)?")


def folder_name(step: int) -> str:
    """Return the Trainer's name for the folder that it saves after `step` steps."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def folders_to_delete(
    names: Iterable[str], limit: int | None, step: int, *, best: str | None, best_in_state: str | None
) -> list[str]:
    """Return which of the folders `names` exceed `limit` after `step` steps; never the newest, nor that of `best`.

    The Trainer chooses by modification time, which a copy or another machine's clock changes; this goes by the step.
    Folders of later steps were left by a training before: they are the oldest. The folder `best_in_state`, which the
    newest training state names, stays in addition to those that the Trainer keeps.
    """
    steps = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    found = sorted(steps, key=lambda name: (steps[name] <= step, steps[name]))
    if limit is None or limit <= 0 or len(found) <= limit:
        return []
    kept = {found[-1], *(name for name in found if name.removesuffix(".tar") == best)}
    others = [name for name in found if name not in kept]
    surplus = others[: max(0, len(found) - max(limit, len(kept)))]
    return [name for name in surplus if name.removesuffix(".tar") != best_in_state]


def pack(folder: str, path: str) -> None:
    """Pack the content of `folder` in the single file `path`, for a store."""
    with tarfile.open(path, "w") as archive:
        for name in sorted(os.listdir(folder)):
            archive.add(os.path.join(folder, name), name)


def unpack(path: str, folder: str) -> None:
    """Unpack the file `path`, which `pack` wrote, to `folder`, and write nothing outside it."""
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")


def link_folder(source: str, target: str) -> None:
    """Link the files of `source` into a new folder `target`, or copy them if the disk has no links."""

    def link(file: str, other: str) -> None:
        try:
            os.link(file, other)
        except OSError:
            shutil.copyfile(file, other)

    shutil.copytree(source, target, copy_function=link)


def write_metadata(folder: str, metadata: dict[str, Any], random: list[dict[str, Any]]) -> None:
    """Write what the Trainer leaves out to files in `folder` that the Trainer ignores: `metadata`, `random` states."""
    with open(os.path.join(folder, _METADATA_FILE), "w") as file:
        json.dump(metadata, file)
    torch.save(random, os.path.join(folder, _RANDOM_FILE))


def read_metadata(folder: str) -> dict[str, Any]:
    """Return the metadata that `write_metadata` wrote."""
    with open(os.path.join(folder, _METADATA_FILE)) as file:
        found: dict[str, Any] = json.load(file)
    return found


def read_random_state(folder: str, rank: int) -> dict[str, Any] | None:
    """Return the random state of `rank` that `write_metadata` wrote, or ``None`` if there is none."""
    path = os.path.join(folder, _RANDOM_FILE)
    found = torch.load(path, weights_only=True) if os.path.exists(path) else []  # not in those of earlier versions
    return found[rank] if rank < len(found) else None
