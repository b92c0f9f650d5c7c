"""The processes of ``torch.distributed``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from polyaxon_tracking import Processes, Wishes

__all__ = ["TorchProcesses"]

_T = TypeVar("_T")

# As long as processes wait for each other where torch is not told otherwise.
_LONGER = timedelta(minutes=30)


class TorchProcesses(Processes):
    """The processes of ``torch.distributed`` that train one model, and how they tell each other what concerns them all.

    In a process group of its own, of host memory: nothing waits for a GPU, and nothing gets between the collectives of
    the framework. Alone, where there is one process, every method returns at once.

    Args:
        write_timeout: how long the first may wait for what it writes; the others wait for it, and longer.
    """

    def __init__(self, write_timeout: timedelta) -> None:
        super().__init__()
        self.several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self.rank = distributed.get_rank() if self.several else 0
        self._group = distributed.new_group(backend="gloo", timeout=write_timeout + _LONGER) if self.several else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def gather(self, value: _T) -> list[_T]:
        """The `value` of each process, in their order, when all have called it; after they parted, of this one."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, value, group=self._group)
        return found

    def ask(self, wishes: Wishes) -> Wishes:
        """Tell `wishes` to all, and return what all told each other the time before."""
        if self._group is None:
            return wishes
        before = self.answer()
        numbers = torch.tensor(wishes, dtype=torch.int64)
        work = distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = numbers, work
        return before

    def answer(self) -> Wishes:
        """What all told each other the last time, if it was not returned yet."""
        asked, self._asked = self._asked, None
        if asked is None:
            return Wishes()
        numbers, work = asked
        work.wait()
        return Wishes(*numbers.tolist())

    def raise_error(self, error: BaseException | None) -> None:
        """Raise `error` in this process, and one that tells of it in the others; return where no process has any.

        After an error they have parted.

        Raises:
            RuntimeError: another process has one.
        """
        try:
            super().raise_error(error)
        except BaseException:
            self.part()
            raise

    def part(self) -> None:
        """End the group and its threads, before the interpreter may: one that lets go of a tensor then aborts it."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = self._asked = None
