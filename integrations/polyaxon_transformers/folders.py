"""The folders that the Trainer saves: whether a model is the one saved there, and folders as single files."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["differences", "folder_name", "link_folder", "notes", "pack", "surplus", "unpack", "write_notes"]

_NOTES = "polyaxon.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)(?:\.tar)?")


def folder_name(step: int) -> str:
    """What the Trainer calls the folder that it saves after `step` steps."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def surplus(names: Iterable[str], limit: int | None, best: set[str | None]) -> list[str]:
    """Which of the folders `names` are too many for `limit`, the oldest first; never the newest, nor those of `best`.

    The Trainer chooses by modification time, which a copy or another machine's clock changes; this goes by the step.
    """
    found = sorted((int(match[1]), name) for name in names if (match := _NAME.fullmatch(name)))
    if limit is None or limit <= 0 or len(found) <= limit:
        return []
    kept = {found[-1][1], *(name for _, name in found if name.removesuffix(".tar") in best)}
    others = [name for _, name in found if name not in kept]
    return others[: max(0, len(found) - max(limit, len(kept)))]


def pack(folder: str, path: str) -> None:
    """Write the content of `folder` to `path`, one file, as it is in a store."""
    with tarfile.open(path, "w") as archive:
        for name in sorted(os.listdir(folder)):
            archive.add(os.path.join(folder, name), name)


def unpack(path: str, folder: str) -> None:
    """Write what `pack` wrote to `path` to `folder`; nothing outside it."""
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")


def link_folder(source: str, target: str) -> None:
    """Have the files of `source` in a new folder `target` too, without writing them again where the disk has links."""

    def link(file: str, other: str) -> None:
        try:
            os.link(file, other)
        except OSError:
            shutil.copyfile(file, other)

    shutil.copytree(source, target, copy_function=link)


def write_notes(folder: str, notes: dict[str, Any]) -> None:
    """Write to `folder` what the Trainer leaves out; it passes the file over."""
    with open(os.path.join(folder, _NOTES), "w") as file:
        json.dump(notes, file)


def notes(folder: str) -> dict[str, Any]:
    """What `write_notes` wrote."""
    with open(os.path.join(folder, _NOTES)) as file:
        found: dict[str, Any] = json.load(file)
    return found


def differences(model: nn.Module, folder: str) -> list[str]:
    """What of `model` is not as it was saved in `folder`, by names and shapes: the Trainer only warns of the names.

    Nothing is known of adapters and of models whose parts are saved by several processes: their loaders look.
    """
    path = os.path.join(folder, SAFE_WEIGHTS_NAME)
    if not os.path.exists(path):
        return []
    with safe_open(path, framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    tensors = model.state_dict()
    # Of tensors that share their memory, one is saved.
    stored = {tensors[name].data_ptr() for name in saved if name in tensors}
    missing = [name for name, tensor in tensors.items() if name not in saved and tensor.data_ptr() not in stored]
    return [
        *(
            f"{name} is {tuple(tensors[name].shape)}, saved as {shape}"
            for name, shape in saved.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ),
        *(f"{name} was not saved" for name in missing),
        *(f"{name} was saved and is no more" for name in saved if name not in tensors),
    ]
