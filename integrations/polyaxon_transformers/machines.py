"""The machines of a training, each with its own disk, on which a folder is written before it is uploaded to a store."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, TypeVar

from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import open_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Trainer

    from polyaxon_tracking.training import ProcessGroup

__all__ = ["Machines"]

_T = TypeVar("_T")


class Machines:
    """The machines on which the ranks of a training run. Each method is a collective.

    Args:
        trainer: the Trainer.
        group: the ranks.
    """

    def __init__(self, trainer: Trainer, group: ProcessGroup) -> None:
        self._trainer = trainer
        self._group = group
        self._first = group.rank - int(trainer.args.local_process_index)  # one machine's ranks are consecutive
        self.are_several = any(group.gather(self._first))
        """Whether there is more than one machine."""

    def first_value(self, value: _T) -> _T:
        """Return the `value` of the first rank on this machine."""
        return self._group.gather(value)[self._first]

    def check_state_is_whole(self, url: str) -> None:
        """Check that one machine writes the whole state, because only the first one's folder is uploaded to `url`.

        Raises:
            TrackingError: each rank would write its part to its machine's disk.
        """
        trainer = self._trainer
        if trainer.is_deepspeed_enabled:
            strategy = "DeepSpeed"
        elif trainer.is_fsdp_enabled:
            strategy = f"FSDP with {trainer.accelerator.state.fsdp_plugin.state_dict_type}"
        else:
            return
        if not self.are_several or "FULL_STATE_DICT" in strategy:
            return
        raise TrackingError(
            f"Received {strategy} on several machines, and an object store for its checkpoints: {url}. Each machine "
            f"would write its part of the state to its own disk. Expected a volume that all machines share, or a state "
            f"that one rank writes: FSDP with fsdp_state_dict_type=FULL_STATE_DICT."
        )

    @contextlib.contextmanager
    def own_folder(self, folder: str) -> Iterator[str]:
        """Yield the path to which this machine's ranks write `folder`; on the machine of rank 0 that is `folder`.

        On the other machines it is a staging directory, which is removed when the block ends.
        """
        with contextlib.ExitStack() as stack:
            with self._group.share_errors():
                if self._first and self._trainer.is_local_process_zero():
                    staged = open_directory(tempfile.gettempdir()).stage(os.path.basename(folder))
                    stack.callback(staged.discard)
                    folder = stack.enter_context(staged.writing())
            yield self.first_value(folder)

    def collect(self, folder: str) -> None:
        """Add to rank 0's `folder` the files that only other machines' ranks wrote: the random states of these ranks.

        Their content goes through the memory of every rank, so that the files must be small.
        """
        if not self.are_several:
            return
        self._group.gather(None)  # now all ranks have written
        names = self._group.gather(_files(folder))
        contents: dict[str, bytes] = {}
        with self._group.share_errors():
            if self._first and self._trainer.is_local_process_zero():
                for name in names[self._group.rank] - names[0]:
                    with open(os.path.join(folder, name), "rb") as file:
                        contents[name] = file.read()
        every = self._group.gather(contents)
        with self._group.share_errors():
            if self._group.rank == 0:
                for name, content in (item for found in every for item in found.items()):
                    path = os.path.join(folder, name)
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    with open(path, "wb") as file:
                        file.write(content)


def _files(folder: str) -> set[str]:
    return {
        os.path.relpath(os.path.join(directory, name), folder)
        for directory, _, names in os.walk(folder)
        for name in names
    }
