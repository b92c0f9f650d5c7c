"""Keras's own tests of ``ModelCheckpoint``, with this package's callback in its place."""

from __future__ import annotations

import types

import pytest
from keras.src.callbacks import model_checkpoint_test

from polyaxon_keras import PolyaxonCallback

KERAS_TESTS = model_checkpoint_test.ModelCheckpointTest


@pytest.mark.parametrize("name", [name for name in vars(KERAS_TESTS) if name.startswith("test_")])
def test_of_keras(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same name, since a warning says it.
    in_place = types.SimpleNamespace(ModelCheckpoint=type("ModelCheckpoint", (PolyaxonCallback,), {}))
    monkeypatch.setattr(model_checkpoint_test, "callbacks", in_place)
    KERAS_TESTS(name).debug()
