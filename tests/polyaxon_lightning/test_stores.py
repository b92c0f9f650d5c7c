"""The Lightning callback with outputs in object stores, each step in its own process."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_script import Classifier, data, trainer
from servers import FTP, Azure
from training_scripts import files_below, flip_a_bit, train, trained, without_checksums

from polyaxon_lightning import PolyaxonCallback
from polyaxon_tracking import CheckpointManager, cached_path
from polyaxon_tracking.storage import retry

if TYPE_CHECKING:
    from collections.abc import Callable

    from servers import Proxy, Store

pytest_plugins = ["store_fixtures"]

FIT = """
import sys
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_script import Classifier, data, digest, trainer
from polyaxon_lightning import PolyaxonCallback

epochs, ckpt_path = int(sys.argv[1]), sys.argv[2] or None
best = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
training = trainer(PolyaxonCallback(), best, max_epochs=epochs)
training.fit(Classifier(), data(), data(), ckpt_path=ckpt_path)
training.validate(dataloaders=data(), ckpt_path="best", verbose=False)
print("best", best.best_model_path, len(best.best_k_models), best.last_model_path, training.global_step)
"""


def test_a_killed_training_resumes_to_the_weights_of_an_uninterrupted_one(store: Store, tmp_path: Path) -> None:
    killed = train("lightning", store.url, DIE_AT_STEP="18")
    assert killed.returncode == -9
    resumed = train("lightning", store.url)
    uninterrupted = train("lightning", str(tmp_path))
    assert trained(resumed, "trained") == trained(uninterrupted, "trained")
    assert re.search(r"Resuming from \w+://\S+: epoch [1-4], step", resumed.stderr), resumed.stderr
    # What was saved at the moment of the kill may be one too many: no state names it.
    kept = files_below(tmp_path)
    assert set(kept) <= set(without_checksums(store.names()))
    assert [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()] == []


def test_files_that_a_kill_left_are_saved_again_or_removed(store: Store) -> None:
    def top_k() -> list[str]:
        return sorted(Path(name).name for name in store.names("checkpoints") if not name.startswith("resume/"))

    script = Path(__file__).with_name("best_model_script.py")
    options = {"SAVE_TOP_K": "2", "POLYAXON_RUN_OUTPUTS_PATH": store.url}
    assert forked.run("lightning", script, DIE_AT_STEP="7", **options).returncode == -9
    assert len(top_k()) == 4
    resumed = forked.run("lightning", script, WORSE="1", **options)
    assert resumed.returncode == 0, resumed.stderr
    assert top_k() == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "last.ckpt"]


@pytest.fixture(scope="module")
def local_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the files that the two trainings of the next test leave in a local directory."""
    outputs = tmp_path_factory.mktemp("local") / "run"
    for epochs, ckpt_path in (("3", ""), ("5", "last")):
        trained(forked.run("lightning", "-c", FIT, epochs, ckpt_path, POLYAXON_RUN_OUTPUTS_PATH=str(outputs)), "best")
    return files_below(outputs)


def test_last_best_and_top_k_are_found_in_the_store(store: Store, local_names: list[str]) -> None:
    first = forked.run("lightning", "-c", FIT, "3", "", POLYAXON_RUN_OUTPUTS_PATH=store.url)
    assert trained(first, "best").endswith(" 12")
    second = forked.run("lightning", "-c", FIT, "5", "last", POLYAXON_RUN_OUTPUTS_PATH=store.url)
    assert ": epoch 3, step 12" in second.stderr
    _, path, number, last, step = trained(second, "best").split()
    assert (path.rpartition("/")[0], number, step) == (path_in(store, "")[:-1], "2", "20")
    assert last == path_in(store, "last.ckpt")
    assert without_checksums(store.names()) == local_names
    # Lightning itself removes the checkpoint that it resumed from, if that is remote (issue 21813).
    path = path_in(store, second_best(store))
    again = forked.run("lightning", "-c", FIT, "7", path, POLYAXON_RUN_OUTPUTS_PATH=store.url)
    assert trained(again, "best").endswith(" 28")
    assert f"Resuming from ckpt_path={path} as asked" in again.stderr
    assert path.rpartition("/")[2] in store.names("checkpoints")


def second_best(store: Store) -> str:
    """Return the name of a checkpoint that a user may resume from."""
    return next(name for name in store.names("checkpoints") if name.startswith("epoch="))


def path_in(store: Store, name: str) -> str:
    return f"{CheckpointManager(store.url).directory}/checkpoints/{name}"


def test_the_same_state_is_uploaded_once_for_all_its_names(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=-1, save_last="link")
    trainer(PolyaxonCallback(), checkpoint, max_epochs=3).fit(Classifier(), data(), data())
    # Of three epochs: the training state, and the model's checkpoint, of which `last.ckpt` is a copy by the store; but
    # the first `last.ckpt`, which knows of one more file than what was saved before.
    uploads = [request for request in proxy.requests if request.size > 1000]
    assert len(uploads) == 3 * 2 + 1, uploads
    saved = torch.load(cached_path(checkpoint.best_model_path), weights_only=True)
    last = torch.load(cached_path(path_in(store, "last.ckpt")), weights_only=True)
    assert saved.keys() == last.keys()
    assert (last["epoch"], last["global_step"]) == (2, 12)


def test_the_requests_of_an_epoch_are_few(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)

    def requests(epochs: int) -> int:
        proxy.requests.clear()
        trainer(PolyaxonCallback(resume=False), ModelCheckpoint(monitor="val_loss"), max_epochs=epochs).fit(
            Classifier(), data(), data()
        )
        return len(proxy.requests)

    # A ModelCheckpoint and the training state: an upload and a removal each, and the listings before and after.
    assert (requests(7) - requests(2)) / 5 <= 16, proxy.requests


def test_a_checkpoint_that_is_damaged_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    checkpoint = ModelCheckpoint()
    trainer(PolyaxonCallback(), checkpoint, max_epochs=1).fit(Classifier(), data(), data())
    name = checkpoint.best_model_path.rpartition("/")[2]
    copy = tmp_path / name
    copy.write_bytes(store.fs.cat_file(store.path(f"checkpoints/{name}")))
    flip_a_bit(copy)
    store.fs.pipe_file(store.path(f"checkpoints/{name}"), copy.read_bytes())
    with pytest.raises(ValueError, match=rf"Received the checkpoint {re.escape(checkpoint.best_model_path)}, which is"):
        trainer(PolyaxonCallback(resume=False), max_epochs=2).fit(
            Classifier(), data(), data(), ckpt_path=checkpoint.best_model_path
        )


def test_weights_of_another_run_are_loaded_from_a_reference(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    model = Classifier()
    trainer(PolyaxonCallback(), max_epochs=1).fit(model, data(), data())
    code = """
import torch
from lightning_script import Classifier, digest
from polyaxon_tracking import CheckpointManager, get_outputs_refs_paths
[outputs] = get_outputs_refs_paths()["experiments"]
checkpoint = CheckpointManager(f"{outputs}/checkpoints/resume").latest()
model = Classifier()
model.load_state_dict(torch.load(checkpoint.path, weights_only=True)["state_dict"])
print("loaded", digest(model))
"""
    process = forked.run("lightning", "-c", code, POLYAXON_REFS_OUTPUTS_PATHS=json.dumps({"experiments": [store.url]}))
    from lightning_script import digest

    assert trained(process, "loaded") == f"loaded {digest(model)}"


def test_the_platforms_credentials_suffice_and_are_in_no_checkpoint(store: Store, proxy: Proxy) -> None:
    settings: dict[str, Any]
    if isinstance(store.server, Azure):
        settings = {"AZURE_CONNECTION_STRING": store.server.connection_string(proxy.port)}
    elif store.kind == "s3":
        endpoint = f"http://127.0.0.1:{proxy.port}"
        settings = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "wJalr-secret", "AWS_ENDPOINT_URL": endpoint}
    else:  # its secret is tested without Lightning
        return
    environment = {
        "POLYSTORES_RUN_STORES_ACCESS_KEYS": json.dumps({store.server.url(store.bucket): {"secret_key": "a.KEY"}}),
        "a.KEY": json.dumps(settings),
        "POLYAXON_RUN_OUTPUTS_PATH": store.url,
        "HOME": "/nonexistent",
    }
    code = (
        "import os\nfor name in list(os.environ):\n    if name.startswith(('AWS_', 'AZURE_')): del os.environ[name]\n"
    )
    process = forked.run("lightning", "-c", code + FIT, "2", "", **environment)
    assert trained(process, "best").endswith(" 8")
    assert len(proxy.requests) > 10
    secrets = [value.encode() for name, value in settings.items() if "SECRET" in name or "CONNECTION" in name]
    contents = [store.fs.cat_file(store.path(name)) for name in store.names()]
    assert secrets
    assert not [secret for secret in secrets if any(secret in content for content in contents)]
    assert not [secret for secret in secrets if secret.decode() in process.stdout + process.stderr]


def test_a_failing_upload_reaches_the_user(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    monkeypatch.setattr(retry, "_PATIENCE_SECONDS", 0.5)
    polyaxon = PolyaxonCallback()
    proxy.answer = lambda request: 505 if request.size > 1000 else None
    with pytest.raises(OSError, match="Not saved, and no existing file was changed: "):
        trainer(polyaxon, max_epochs=2).fit(Classifier(), data(), data())


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_secrets_in_the_url_of_a_directory_are_in_no_checkpoint(store: Store, outputs: Path) -> None:
    url = store.url.replace("s3://", "s3://AKIAMINE:s3cr3t@")
    checkpoint = ModelCheckpoint(dirpath=f"{url}/mine", save_last=True)
    trainer(PolyaxonCallback(), checkpoint, max_epochs=1).fit(Classifier(), data(), data())
    assert store.names("mine") == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert checkpoint.best_model_path == f"{store.url}/mine/epoch=0-step=4.ckpt"
    contents = [store.fs.cat_file(store.path(f"mine/{name}")) for name in store.names("mine")]
    contents += [path.read_bytes() for path in outputs.rglob("*.ckpt")]
    assert not [content for content in contents if b"s3cr3t" in content or b"AKIAMINE" in content]


def test_a_password_in_the_url_of_the_outputs_is_used_by_lightning_too_and_is_in_no_checkpoint(
    tmp_path: Path, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "ftp"
    (directory / "run").mkdir(parents=True)
    server = FTP(directory, "alice", "s3/cr3t")
    monkeypatch.setitem(fsspec.config.conf, "ftp", {})
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", f"ftp://alice:s3%2Fcr3t@127.0.0.1:{server.port}/run")
    for epochs in (1, 2):
        new_process()
        checkpoint = ModelCheckpoint(save_last=True)  # a copy, which fsspec's driver for FTP cannot make in the store
        trainer(PolyaxonCallback(), checkpoint, max_epochs=epochs).fit(Classifier(), data(), data())
    server.stop()
    place = f"ftp://127.0.0.1:{server.port}/run/checkpoints"
    assert f"Resuming from {place}/resume/step=0000000004" in caplog.text
    assert checkpoint.best_model_path == f"{place}/epoch=1-step=8.ckpt"
    contents = [path.read_bytes() for path in directory.rglob("*.ckpt")]
    assert len(contents) == 3
    assert not [content for content in contents if b"cr3t" in content or b"alice" in content]
    assert "cr3t" not in caplog.text
