"""How checkpoints get on and off the disk, as plugins of Lightning's strategies."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import torch

from polyaxon_lightning.framework import pl
from polyaxon_tracking import TrackingError, atomic_write

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch.plugins.io import TorchCheckpointIO
else:
    TorchCheckpointIO = pl.plugins.io.TorchCheckpointIO

__all__ = ["DurableCheckpointIO", "StreamCheckpointIO"]


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's own way to write checkpoints, made durable: a file under its name is complete and on disk.

    Lightning stages in ``$TMPDIR`` and moves, which copies in place where that is another file system, and syncs
    nothing. This writes beside the target, syncs, and renames.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to the file `path`, which is complete or as it was before."""
        if "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise TypeError("`trainer.save_checkpoint(..., storage_options=...)` is not supported for local files")
        with atomic_write(path) as staged:
            torch.save(checkpoint, staged)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read the checkpoint `path` after its checksums, which ``torch.load`` does not look at.

        Raises:
            TrackingError: the file is damaged.
        """
        if os.path.isfile(path) and (problem := _damage(path)):
            raise TrackingError(
                f"Received the checkpoint {path}, which is damaged: {problem}. Expected the bytes that were saved. "
                f"Give another file, or leave `ckpt_path` out to go on from the newest intact training state; this one "
                f"stays as it is."
            )
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *arguments, **options)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file or directory `path`, if it is there."""
        if "://" in os.fspath(path):
            super().remove_checkpoint(path)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)


class StreamCheckpointIO(TorchCheckpointIO):
    """Write and read the file that the checkpoint manager asks for; the manager sees to the rest."""

    def __init__(self, *, weights_only: bool) -> None:
        super().__init__()
        self._weights_only = weights_only

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`: a path and not a file object, with which ``torch.save`` is twice as slow."""
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read the checkpoint at `path` into host memory."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=self._weights_only)
        return checkpoint


def _damage(path: str | Path) -> str | None:
    """What is wrong with the file `path`, by the CRC-32 of its members where it is a zip, as ``torch.save`` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except zipfile.BadZipFile as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if not start:
            return "it is empty"
        return str(error) if start == b"PK" else None  # torch's format of before 1.6 has no checksums
    except (EOFError, LookupError, OSError, RuntimeError, ValueError, struct.error, zlib.error) as error:
        return str(error) or type(error).__name__  # headers that make no sense, or a disk that fails
    return member and f"the CRC-32 of its member {member} does not match"
