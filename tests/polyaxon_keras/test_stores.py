"""The Keras callback with outputs in object stores, on the backend that KERAS_BACKEND names."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import keras
import numpy as np
import pytest
from keras_script import data, digest, model
from restarts import forget_trainings
from training_scripts import files_below, without_checksums

from polyaxon_keras import PolyaxonCallback
from polyaxon_tracking import cached_path
from polyaxon_tracking.storage import retry

if TYPE_CHECKING:
    from servers import Proxy, Store

pytest_plugins = ["store_fixtures"]


def fit(*callbacks: keras.callbacks.Callback, epochs: int) -> keras.Model:
    forget_trainings()
    x, y = data()
    keras.utils.set_random_seed(0)
    network = model("functional")
    network.fit(x, y, batch_size=18, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return network


@pytest.mark.parametrize("best", [True, False], ids=["best", "each epoch"])
def test_a_training_resumes_to_the_weights_of_an_uninterrupted_one(
    store: Store, best: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        {"monitor": "loss", "save_best_only": True}
        if best
        else {"filepath": "{epoch}.weights.h5", "save_weights_only": True}
    )
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    fit(PolyaxonCallback(**options), epochs=2)
    resumed = fit(PolyaxonCallback(**options), epochs=4)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path))
    uninterrupted = fit(PolyaxonCallback(**options), epochs=4)
    assert digest(resumed) == digest(uninterrupted)
    assert without_checksums(store.names()) == files_below(tmp_path)
    if best:
        loaded = keras.models.load_model(cached_path(f"{store.url}/checkpoints/best.keras"))
        assert digest(loaded) == digest(resumed)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_killed_training_resumes_without_tensorflow(store: Store) -> None:
    without = "" if keras.backend.backend() == "tensorflow" else "import sys; sys.modules['tensorflow'] = None\n"
    code = f"{without}import keras_script; keras_script.main()"
    killed = forked.run("keras", "-c", code, POLYAXON_RUN_OUTPUTS_PATH=store.url, DIE_AT_STEP="18")
    assert killed.returncode == -9, killed.stderr
    resumed = forked.run("keras", "-c", code, POLYAXON_RUN_OUTPUTS_PATH=store.url)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"Resuming from s3://\S+: epoch [1-4], step", resumed.stderr), resumed.stderr
    assert "trained 24 " in resumed.stdout
    assert [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()] == []


def test_weights_of_another_run_are_loaded_from_a_reference(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    trained = fit(PolyaxonCallback(filepath="model.weights.h5", save_weights_only=True), epochs=1)
    monkeypatch.setenv("POLYAXON_REFS_OUTPUTS_PATHS", json.dumps({"experiments": [store.url]}))
    from polyaxon_tracking import CheckpointManager, get_outputs_refs_paths

    refs = get_outputs_refs_paths()
    assert refs is not None
    newest = CheckpointManager(f"{refs['experiments'][0]}/checkpoints/resume").latest()
    assert newest is not None
    for path in (newest.path, cached_path(f"{refs['experiments'][0]}/checkpoints/model.weights.h5")):
        network = model("functional")
        network.load_weights(path)
        for one, other in zip(network.get_weights(), trained.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_failing_upload_reaches_the_user_and_the_previous_state_stays(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    fit(PolyaxonCallback(), epochs=1)
    before = store.names()
    monkeypatch.setattr(retry, "_PATIENCE_SECONDS", 0.5)
    polyaxon = PolyaxonCallback()
    proxy.answer = lambda request: 505 if request.size > 1000 else None
    with pytest.raises(OSError, match="Not saved, and no existing file was changed: "):
        fit(polyaxon, epochs=3)
    assert store.names() == before


def test_a_url_outside_the_outputs_is_kept_with_a_warning(
    store: Store, outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(PolyaxonCallback(f"{store.url}/mine.keras"), epochs=1)
    assert store.names() == ["mine.keras"]
    assert any(f"outside the outputs path {outputs}, and may be lost" in message for message in caplog.messages)
