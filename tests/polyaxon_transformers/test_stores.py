"""The callback for Hugging Face's Trainer with outputs in object stores, each step in its own process."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ranks import train_ranks, train_two_ranks
from training_scripts import Ended, train, without_checksums
from transformers import BertForSequenceClassification
from transformers_script import digest, trainer

from polyaxon_tracking import TrackingError, cached_path
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from servers import Store

pytest_plugins = ["store_fixtures"]


def run(directory: Path, outputs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train in a new directory, as in a new pod."""
    directory.mkdir()
    return train("transformers", outputs, directory=directory, **environment)


def run_on_two_machines(directory: Path, outputs: str, **environment: str) -> list[Ended]:
    return train_two_ranks("transformers", outputs, machines=directory, **environment)


def test_a_killed_training_resumes_in_another_pod_to_the_same_end(store: Store, tmp_path: Path) -> None:
    killed = run(tmp_path / "killed", store.url, DIE_AT_STEP="10", EVERY_N_TRAIN_STEPS="3")
    assert killed.returncode == -9, killed.stderr
    resumed = run(tmp_path / "resumed", store.url, EVERY_N_TRAIN_STEPS="3")
    uninterrupted = run(tmp_path / "uninterrupted", str(tmp_path / "outputs"))
    assert resumed.returncode == uninterrupted.returncode == 0, resumed.stderr
    assert resumed.stdout == uninterrupted.stdout
    assert re.search(r"Resuming from \w+://\S+\.tar: epoch [12], step [89]", resumed.stderr), resumed.stderr
    assert without_checksums(store.names()) == [
        "checkpoints/bert/checkpoint-20.tar",
        "checkpoints/bert/checkpoint-24.tar",
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

    killed = train_ranks("transformers", store.url, DIE_AT_STEP="10", FOREGROUND="1")
    assert killed.returncode, killed.stderr
    again = train_ranks("transformers", store.url, DIE_AT_STEP="11", FOREGROUND="1")
    assert again.returncode, again.stderr
    assert unpacked() == ["checkpoint-8"]
    resumed = train_ranks("transformers", store.url)
    uninterrupted = train_ranks("transformers", str(tmp_path / "outputs"))
    assert resumed.returncode == uninterrupted.returncode == 0, resumed.stderr
    assert set(resumed.stdout.splitlines()) == set(uninterrupted.stdout.splitlines())
    assert unpacked() == []


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_the_random_numbers_of_ranks_on_another_machine_are_in_the_store(store: Store, tmp_path: Path) -> None:
    killed = run_on_two_machines(
        tmp_path / "killed", store.url, DIE_AT_STEP="10", EVERY_N_TRAIN_STEPS="3", FOREGROUND="1"
    )
    assert all(ended.returncode for ended in killed)
    [newest] = [name for name in store.names() if "step=0000000009" in name]
    for name in newest, "checkpoints/bert/checkpoint-8.tar":
        with tarfile.open(cached_path(f"{store.url}/{name}")) as archive:
            assert {"rng_state_0.pth", "rng_state_1.pth"} < set(archive.getnames())
    resumed = run_on_two_machines(tmp_path / "resumed", store.url)
    uninterrupted = run_on_two_machines(tmp_path / "uninterrupted", str(tmp_path / "outputs"))
    assert [ended.returncode for ended in resumed + uninterrupted] == [0] * 4, resumed
    assert "step 9\n" in resumed[0].stderr
    assert [ended.stdout for ended in resumed] == [ended.stdout for ended in uninterrupted]
    assert [path for path in (tmp_path / "resumed").glob("machine-*/tmp/**/*") if path.is_file()] == []


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_state_in_parts_on_several_machines_is_refused(store: Store, tmp_path: Path) -> None:
    for ended in run_on_two_machines(tmp_path / "parts", store.url, PARTS="SHARDED_STATE_DICT"):
        assert (ended.returncode, ended.stdout) == (1, "")
        assert re.search(
            r"TrackingError: Received FSDP with \S*SHARDED_STATE_DICT on several machines, and an object store for its "
            r"checkpoints: s3://\S+resume\. .* Expected a volume that all machines share",
            ended.stderr,
        ), ended.stderr
    assert store.names() == []


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_disk_without_room_to_unpack_a_state_is_reported(
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
