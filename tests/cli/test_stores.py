"""The command with outputs in object stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from reports import ACCESS_KEYS, DATA, OUTPUTS, REFS, SECRET, fill, listed
from servers import Azure

if TYPE_CHECKING:
    from collections.abc import Callable

    from reports import Report
    from servers import Proxy, Store

    Command = Callable[..., subprocess.CompletedProcess[str]]

pytest_plugins = ["store_fixtures"]


# checkpoints


def test_checkpoints_in_a_bucket(command: Command, store: Store) -> None:
    fill(store.url, "checkpoints/resume", "checkpoints/resume-2")
    for given in ("", "/checkpoints", "/checkpoints/resume"):
        process = command("checkpoints", f"{store.url}{given}", "--json", "--verify")
        assert process.returncode == 0, process.stderr
        assert len(listed(process)) == (2 if given.endswith("resume") else 4)
    name = store.names("checkpoints/resume-2")[-1]
    store.fs.pipe_file(store.path(f"checkpoints/resume-2/{name}"), b"stap 20")
    process = command("checkpoints", "--verify", "--json", env={"POLYAXON_RUN_OUTPUTS_PATH": store.url})
    assert process.returncode == 1, process.stderr
    assert [(found["step"], found["size"], found["intact"]) for found in listed(process)] == [
        *((20, 7, True), (10, 7, True), (20, 7, False), (10, 7, True)),
    ]
    assert listed(process)[0]["path"].endswith(f"/checkpoints/resume/{store.names('checkpoints/resume')[-1]}")
    assert all(found["age_seconds"] < 3600 for found in listed(process))
    assert not [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_nothing_at_a_url(command: Command, store: Store) -> None:
    process = command("checkpoints", f"{store.url}/nothing")
    assert (process.returncode, process.stdout) == (2, "")
    assert "/nothing', where there is nothing" in process.stderr
    process = command("checkpoints", env={"POLYAXON_RUN_OUTPUTS_PATH": store.url})
    assert process.returncode == 0
    assert process.stdout.startswith("No checkpoints in s3://")


def test_checkpoints_where_a_driver_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['s3fs'] = None; from polyaxon_tracking.cli import main; main()"
    url = "s3://key:wJalrXUtnFEMI@bucket/run"
    process = subprocess.run(
        [sys.executable, "-c", code, "checkpoints", url], capture_output=True, text=True, check=False, timeout=300
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.endswith('Install it with: pip install "polyaxon-tracking[s3]"\n')
    assert "wJalr" not in process.stderr


# doctor


def test_a_bucket(doctor: Callable[..., Report], store: Store) -> None:
    store.fs.pipe_file(store.path("digits/1.png"), b"image")
    bucket = store.server.url(store.bucket)
    report = doctor(
        env={
            OUTPUTS: store.url,
            DATA: json.dumps({"digits": f"{store.url}/digits", "file": f"{store.url}/digits/1.png", "bucket": bucket}),
            REFS: json.dumps({"jobs": [f"{store.url}/nothing"]}),
        }
    )
    assert report.code == 0, report
    assert report.status_and_value("outputs: writable") == ("ok", "yes, and what was written was removed")
    assert report.status_and_value("outputs: driver") == (
        "ok",
        {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}[store.server.protocol],
    )
    for name in ("digits", "file", "bucket"):
        assert report.status_and_value(f"data {name}")[0] == "ok"
    assert report.status_and_value("jobs 1") == ("warning", f"{store.url}/nothing: there is nothing")
    assert report.status_and_value("TMPDIR: writable") == ("ok", "yes")
    assert store.names() == ["digits/1.png"]


def test_a_bucket_that_does_not_exist(doctor: Callable[..., Report], store: Store) -> None:
    url = store.server.url("no-such-bucket")
    report = doctor(env={OUTPUTS: f"{url}/run", DATA: json.dumps({"digits": f"{url}/digits"})})
    assert report.with_status("error") == ["outputs: writable", "data digits"]
    assert "which does not exist. Expected a bucket that takes this run's files." in report.advice("outputs: writable")


def test_credentials_that_are_refused(command: Command, store: Store, proxy: Proxy) -> None:
    environment = {OUTPUTS: store.url, DATA: json.dumps({"digits": f"{store.url}/digits"})}
    if isinstance(store.server, Azure):
        key = f"AAAA{SECRET}A=="
        environment["AZURE_STORAGE_CONNECTION_STRING"] = store.server.connection_string(proxy.port, key=key)
    else:
        proxy.answer = lambda _: 403
    process = command("doctor", env=environment)
    assert process.returncode == 1
    assert "which this process may not write to" in process.stdout
    assert "which this process may not read" in process.stdout
    assert "Give credentials (" in process.stdout
    assert "Traceback" not in process.stderr
    assert SECRET not in process.stdout + process.stderr


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_driver_that_fails_in_its_own_way(command: Command, store: Store) -> None:
    process = command("doctor", env={OUTPUTS: store.url, "AWS_ENDPOINT_URL": f"http://user:{SECRET}@host:port/"})
    assert process.returncode == 1
    assert "`http://***@host:port/` was not a valid URI" in process.stdout
    assert "2 errors" not in process.stdout
    assert SECRET not in process.stdout + process.stderr


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_credentials_of_the_platform_and_in_the_url(doctor: Callable[..., Report], store: Store) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": SECRET} | {
        name: value for name, value in store.environment.items() if name == "AWS_ENDPOINT_URL"
    }
    platform = {ACCESS_KEYS: json.dumps({f"s3://{store.bucket}": {"store": "s3", "secret_key": "MINE"}})}
    report = doctor(env={OUTPUTS: store.url, "MINE": json.dumps(keys)} | platform)
    assert report.status_and_value(ACCESS_KEYS) == ("ok", f"s3://{store.bucket}: in the variable MINE")
    assert report.status_and_value("outputs: access") == ("ok", f"credentials in {ACCESS_KEYS}")
    report = doctor(env={OUTPUTS: store.url.replace("s3://", f"s3://AKIA:{SECRET}@")})
    assert report.status_and_value("outputs") == ("ok", store.url.replace("s3://", "s3://***@"))
    assert report.status_and_value("outputs: access") == ("ok", "credentials in the URL")
    assert SECRET not in str(report)


def test_a_driver_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTPUTS, f"s3://key:{SECRET}@bucket/run")
    monkeypatch.setenv(DATA, '{"other": "nonsense://bucket"}')
    code = "import sys; sys.modules['s3fs'] = None; from polyaxon_tracking.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 1
    advice = {row["name"]: row["advice"] for row in json.loads(process.stdout)["checks"] if row["status"] == "error"}
    assert advice["outputs: writable"].endswith('Install it with: pip install "polyaxon-tracking[s3]"')
    assert advice["data other"].startswith("Received the URL 'nonsense://bucket', which cannot be opened: ")
    assert SECRET not in process.stdout + process.stderr


# datasets


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_the_copies_of_datasets_are_listed_and_removed(
    command: Command, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POLYAXON_DATA_CACHE", str(tmp_path / "cache"))
    process = command("datasets")
    assert (process.returncode, process.stdout) == (0, f"No datasets in {tmp_path / 'cache'}\n")
    store.fs.pipe_file(store.path("images/1.bin"), b"1" * 1000)
    store.fs.pipe_file(store.path("labels.csv"), b"0,1")
    fetch = (
        "from polyaxon_tracking import get_data_path; print(get_data_path('', sys.argv[1], download=True), flush=True)"
    )
    script = [sys.executable, "-c", f"import sys; {fetch}; sys.stdin.read()"]
    subprocess.run([*script, f"{store.url}/labels.csv"], check=True, stdin=subprocess.DEVNULL)
    with subprocess.Popen(
        [*script, f"{store.url}/images"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as training:
        assert training.stdout is not None
        path = training.stdout.readline().strip()
        process = command("datasets", "--json")
        assert process.returncode == 0, process.stderr
        images, labels = json.loads(process.stdout)["datasets"]
        assert images.pop("age_seconds") < 60
        assert images == {
            "url": f"{store.url}/images",
            "path": path,
            "files": 1,
            "downloaded": 1,
            "size": 1000,
            "in_use": True,
            "removed": False,
        }
        assert (labels["url"], labels["in_use"]) == (f"{store.url}/labels.csv", False)
        process = command("datasets", "--clear")
        assert process.returncode == 1, "a copy in use stays"
        assert [line.split()[-2:] for line in process.stdout.splitlines()[2:]] == [
            ["use", f"{store.url}/images"],
            ["removed", f"{store.url}/labels.csv"],
        ]
        assert Path(path, "1.bin").exists()
    process = command("datasets", f"{store.url}/other", "--clear")
    assert process.returncode == 2
    assert process.stderr == (
        f"Error: Received '{store.url}/other', of which there is no local copy. Expected one of: '{store.url}/images'.\n"
    )
    process = command("datasets", f"{store.url}/images", "--clear")
    assert process.returncode == 0, process.stdout
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_doctor_tries_each_dataset_in_a_store(doctor: Callable[..., Report], store: Store, tmp_path: Path) -> None:
    store.fs.pipe_file(store.path("images/1.bin"), b"1")
    (tmp_path / "empty").mkdir()
    paths = {"images": f"{store.url}/images", "none": f"{store.url}/none", "empty": str(tmp_path / "empty")}
    report = doctor(env={DATA: json.dumps(paths), "POLYAXON_DATA_CACHE": str(tmp_path / "cache")})
    assert report.rows["data images"]["status"] == "ok"
    assert report.status_and_value("data none") == ("error", f"{store.url}/none: there is nothing")
    assert report.status_and_value("data empty") == ("warning", f"{tmp_path / 'empty'}: is empty")
    assert report.status_and_value("data cache") == ("info", str(tmp_path / "cache"))
    assert report.rows["others of Polyaxon"]["value"] == "none is set"
