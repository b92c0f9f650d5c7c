"""The processes of ``torch.distributed``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from polyaxon_tracking.training import Flags, ProcessGroup

__all__ = ["TorchProcessGroup"]

_T = TypeVar("_T")

# As long as processes wait for each other where torch is not told otherwise.
_LONGER = timedelta(minutes=30)


class TorchProcessGroup(ProcessGroup):
    """The processes of ``torch.distributed`` that train one model, and how they tell each other what concerns them all.

    In a process group of its own, of host memory: nothing waits for a GPU, and nothing gets between the collectives of
    the framework. Alone, where there is one process, every method returns at once.

    Args:
        write_timeout: how long the first may wait for what it writes; the others wait for it, and longer.
    """

    def __init__(self, write_timeout: timedelta) -> None:
        super().__init__()
        self.is_distributed = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        self.rank = distributed.get_rank() if self.is_distributed else 0
        self._group = (
            distributed.new_group(backend="gloo", timeout=write_timeout + _LONGER) if self.is_distributed else None
        )
        self._flags: tuple[torch.Tensor, Any] | None = None

    def gather(self, value: _T) -> list[_T]:
        """The `value` of each process, in their order, when all have called it; after they parted, of this one."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, value, group=self._group)
        return found

    def reduce_flags(self, flags: Flags) -> Flags:
        """Tell `flags` to all, and return what all told each other the time before."""
        if self._group is None:
            return flags
        before = self.wait_for_flags()
        numbers = torch.tensor(flags, dtype=torch.int64)
        work = distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._flags = numbers, work
        return before

    def wait_for_flags(self) -> Flags:
        """What all told each other the last time, if it was not returned yet."""
        asked, self._flags = self._flags, None
        if asked is None:
            return Flags()
        numbers, work = asked
        work.wait()
        return Flags(*numbers.tolist())

    def raise_on_all(self, error: BaseException | None) -> None:
        """Raise `error` in this process, and one that tells of it in the others; return where no process has any.

        After an error they have parted.

        Raises:
            RuntimeError: another process has one.
        """
        try:
            super().raise_on_all(error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the group and its threads, before the interpreter may: one that lets go of a tensor then aborts it."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = self._flags = None
