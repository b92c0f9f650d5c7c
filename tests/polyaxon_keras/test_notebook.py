"""Keras in a notebook: what a cell that fails or is interrupted leaves behind, and what the next cell begins with."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from IPython.core.interactiveshell import InteractiveShell

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SETUP = """
import os, signal
import keras
from keras_script import data, model
from polyaxon_keras import PolyaxonCallback

class AtStep(keras.callbacks.Callback):
    def __init__(self, step, happens):
        super().__init__()
        self.step, self.happens = step, happens

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.step:
            self.happens()

def fail():
    raise ArithmeticError("of the cell")

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

network = model("functional")

def fit(*callbacks, **options):
    network.fit(*data(), epochs=3, batch_size=12, verbose=0, callbacks=[PolyaxonCallback(**options), *callbacks])
"""


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """The shell of a notebook's kernel, in this process, where it takes the place of `__main__`."""
    assert not InteractiveShell.initialized()
    hook, main = sys.excepthook, sys.modules["__main__"]
    made = InteractiveShell.instance()
    made.run_cell(SETUP).raise_error()
    yield made
    made.reset(new_session=False)
    InteractiveShell.clear_instance()
    sys.excepthook = hook
    sys.modules["__main__"] = main


def what_is_left(shell: InteractiveShell) -> list[object]:
    """The handlers, hooks and callbacks that a training installs."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return [*handlers, sys.excepthook, list(shell.events.callbacks["post_run_cell"])]


def saved(outputs: Path) -> list[str]:
    names = sorted(os.listdir(outputs / "checkpoints" / "resume"))
    return [name[: len("step=0000000000")] for name in names]


@pytest.mark.parametrize(("happens", "last_step"), [("fail", 8), ("interrupt", 9)])
def test_a_cell_that_does_not_end_saves_and_the_next_one_continues(
    shell: InteractiveShell, outputs: Path, happens: str, last_step: int
) -> None:
    before = what_is_left(shell)
    result = shell.run_cell(f"fit(AtStep(8, {happens}))")
    assert type(result.error_in_exec) is {"fail": ArithmeticError, "interrupt": KeyboardInterrupt}[happens]
    assert what_is_left(shell) == before
    assert saved(outputs) == ["step=0000000006", f"step={last_step:010d}"]
    shell.run_cell("fit(resume=True)").raise_error()
    # Keras begins the interrupted epoch, of six steps, again.
    assert saved(outputs) == [f"step={last_step + 12:010d}"]
    assert what_is_left(shell) == before


def test_a_cell_that_ends_or_fails_elsewhere_saves_nothing_more(shell: InteractiveShell, outputs: Path) -> None:
    before = what_is_left(shell)
    assert shell.run_cell("fit(); fail()").error_in_exec is not None
    assert saved(outputs) == ["step=0000000018"]
    assert what_is_left(shell) == before
    caught = shell.run_cell("try:\n    fit(AtStep(20, fail))\nexcept ArithmeticError:\n    pass\nfail()")
    assert type(caught.error_in_exec) is ArithmeticError
    assert what_is_left(shell) == before
    assert saved(outputs) == ["step=0000000018"]
