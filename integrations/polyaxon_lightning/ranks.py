"""What the processes of one training agree on, so that none is left behind in a collective."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import distributed

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["Ranks", "Wishes"]

_T = TypeVar("_T")


class Wishes(NamedTuple):
    """What a rank wants of all, or all of each: the greatest of each number counts."""

    signal: int = 0
    """The number of a signal that asked for the end of training."""
    save: int = 0
    """1 where a save is due by the clock."""
    failed: int = 0
    """1 where a write in the background failed."""


class Ranks:
    """The processes of one training, and how they tell each other what concerns them all.

    In a process group of its own, of host memory: nothing waits for a GPU, and nothing gets between the collectives of
    the framework. Alone, where there is one process, every method returns at once.
    """

    def __init__(self) -> None:
        self.several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        """Whether there are others."""
        self.rank: int = distributed.get_rank() if self.several else 0
        self._group = distributed.new_group(backend="gloo") if self.several else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def gather(self, value: _T) -> list[_T]:
        """The `value` of each rank, in their order, when all have called it; after they parted, of this one."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, value, group=self._group)
        return found

    def ask(self, wishes: Wishes) -> Wishes:
        """Tell `wishes` to all, and return what all told each other the time before.

        Every rank calls it at the end of the same batch, and goes on while the numbers are under way: so all know the
        same at the same batch, one later.
        """
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
        """Raise `error` in this process, and one that tells of it in the others; return where no rank has any.

        Raises:
            RuntimeError: another rank has one.
        """
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if any(told):
            self._destroy_group()
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise RuntimeError(f"Rank {rank} failed, and this one ends with it: {text}")

    def share_errors_of_saves(self, strategy: Strategy) -> None:
        """Have every rank raise where the first, which alone writes, could not: the others would wait for it for ever.

        Lightning has no hook between the write and the barrier after it.
        """
        if not self.several:
            return
        save = type(strategy).save_checkpoint

        @functools.wraps(save)
        def save_checkpoint(*arguments: Any, **options: Any) -> None:
            error = None
            try:
                save(strategy, *arguments, **options)
            except Exception as caught:  # noqa: BLE001  # raised on all ranks
                error = caught
            self.raise_error(error)

        strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    def part(self, strategy: Strategy) -> None:
        """End what this began: the training is over, on all ranks."""
        vars(strategy).pop("save_checkpoint", None)
        self._destroy_group()

    def _destroy_group(self) -> None:
        """End the group and its threads, before the interpreter may: one that lets go of a tensor then aborts it."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = self._asked = None
