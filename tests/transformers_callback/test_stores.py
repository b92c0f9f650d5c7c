"""The callback for Hugging Face's Trainer with outputs in object stores, each step in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest
from transformers import BertForSequenceClassification
from transformers_script import TORCHRUN, digest, trainer

from polyaxon_tracking import TrackingError, cached_path
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from servers import Store

pytest_plugins = ["store_fixtures"]

SCRIPT = str(Path(__file__).with_name("transformers_script.py"))


def run(directory: Path, outputs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train in a directory of its own, as in a new pod."""
    directory.mkdir()
    return forked.run("transformers", SCRIPT, directory=directory, POLYAXON_RUN_OUTPUTS_PATH=outputs, **environment)


def run_torchrun(directory: Path, outputs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train in two processes of torchrun, in a directory of their own."""
    directory.mkdir()
    return subprocess.run(
        TORCHRUN,
        cwd=directory,
        env=os.environ | {"POLYAXON_RUN_OUTPUTS_PATH": outputs} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def names(found: list[str]) -> list[str]:
    return sorted(re.sub(r"-crc=\w+", "", name) for name in found)


def test_a_killed_training_goes_on_in_another_pod_to_the_same_end(store: Store, tmp_path: Path) -> None:
    killed = run(tmp_path / "killed", store.url, DIE_AT_STEP="10", EVERY_N_TRAIN_STEPS="3")
    assert killed.returncode == -9, killed.stderr
    resumed = run(tmp_path / "resumed", store.url, EVERY_N_TRAIN_STEPS="3")
    uninterrupted = run(tmp_path / "uninterrupted", str(tmp_path / "outputs"))
    assert resumed.returncode == uninterrupted.returncode == 0, resumed.stderr
    assert resumed.stdout == uninterrupted.stdout
    assert re.search(r"Resuming from \w+://\S+\.tar: epoch [12], step [89]", resumed.stderr), resumed.stderr
    assert names(store.names()) == [
        "checkpoints/bert/checkpoint-20.tar",
        "checkpoints/bert/checkpoint-24.tar",
        "checkpoints/resume/step=0000000024-epoch=5-start=1.tar",
        "checkpoints/resume/step=0000000024-epoch=6-start=1.tar",
    ]
    assert [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()] == []
    with tarfile.open(cached_path(f"{store.url}/checkpoints/bert/checkpoint-24.tar")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "unpacked")
    assert digest(model) == resumed.stdout.split()[-1]


def test_the_best_model_of_a_pod_that_is_gone_is_loaded_at_the_end(store: Store, tmp_path: Path) -> None:
    options = {"BEST_AT_STEP": "8"}
    killed = run(tmp_path / "killed", store.url, DIE_AT_STEP="14", **options)
    assert killed.returncode == -9, killed.stderr
    resumed = run(tmp_path / "resumed", store.url, **options)
    uninterrupted = run(tmp_path / "uninterrupted", str(tmp_path / "outputs"), **options)
    assert resumed.returncode == uninterrupted.returncode == 0, resumed.stderr
    assert resumed.stdout == uninterrupted.stdout
    assert "checkpoints/bert/checkpoint-8.tar" in store.names()


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_state_is_unpacked_once_on_a_machine_and_goes_also_after_a_kill(store: Store, tmp_path: Path) -> None:
    def unpacked() -> list[str]:
        return [path.name for path in Path(os.environ["TMPDIR"]).glob(".*/checkpoint-*")]

    threads = {"OMP_NUM_THREADS": "1"}
    killed = run_torchrun(tmp_path / "killed", store.url, DIE_AT_STEP="10", FOREGROUND="1", **threads)
    assert killed.returncode, killed.stderr
    again = run_torchrun(tmp_path / "again", store.url, DIE_AT_STEP="11", FOREGROUND="1", **threads)
    assert again.returncode, again.stderr
    assert unpacked() == ["checkpoint-8"]
    resumed = run_torchrun(tmp_path / "resumed", store.url, **threads)
    uninterrupted = run_torchrun(tmp_path / "uninterrupted", str(tmp_path / "outputs"), **threads)
    assert resumed.returncode == uninterrupted.returncode == 0, resumed.stderr
    assert set(resumed.stdout.splitlines()) == set(uninterrupted.stdout.splitlines())
    assert unpacked() == []


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_disk_without_room_to_unpack_a_state_is_told_of(
    store: Store, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", store.url)
    trainer(PolyaxonCallback(), num_train_epochs=1).train()
    new_process()
    usage = shutil.disk_usage("/")
    rooms = iter([usage, usage._replace(free=99_999)])  # when it is downloaded, and then
    monkeypatch.setattr("shutil.disk_usage", lambda path: next(rooms))
    with pytest.raises(
        TrackingError, match=r"step=0{9}4-\S+\.tar of [\d,]+ bytes to unpack in .*99,999 bytes are free"
    ):
        trainer(PolyaxonCallback(), num_train_epochs=2).train()
    assert [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()] == []
