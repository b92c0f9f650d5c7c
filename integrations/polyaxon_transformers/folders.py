"""The folders that the Trainer saves: names, pruning, and folders packed in one file."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["folder_name", "folders_to_delete", "link_folder", "pack", "read_metadata", "unpack", "write_metadata"]

_METADATA_FILE = "polyaxon.json"
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


def write_metadata(folder: str, metadata: dict[str, Any]) -> None:
    """Write `metadata`, what the Trainer leaves out, to a file in `folder` that the Trainer ignores."""
    with open(os.path.join(folder, _METADATA_FILE), "w") as file:
        json.dump(metadata, file)


def read_metadata(folder: str) -> dict[str, Any]:
    """Return what `write_metadata` wrote."""
    with open(os.path.join(folder, _METADATA_FILE)) as file:
        found: dict[str, Any] = json.load(file)
    return found
