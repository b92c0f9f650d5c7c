"""Datasets in object stores, on real servers: what is downloaded, when, and what a kill, damage or a change does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polyaxon_tracking import TrackingError, get_data_path, progress
from polyaxon_tracking.storage import dataset_cache, retry
from polyaxon_tracking.training import Run

if TYPE_CHECKING:
    from servers import Proxy, Request, Store

pytest_plugins = ["store_fixtures"]

# Three pieces, the last of which is not whole.
LARGE = os.urandom(1 << 20) * 20

# Names that a URL would read otherwise, a file of 0 bytes, and one in a directory of its own.
FILES = {"labels.csv": b"0,1", "a b?c=d%20.txt": b"odd name", "train/empty": b"", "train/1/x.bin": b"x" * 1000}

DOWNLOAD = "from polyaxon_tracking import get_data_path; print(get_data_path('images', download=True))"


@pytest.fixture(autouse=True)
def _images(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the dataset ``images``, with the data in the store."""
    monkeypatch.setenv("POLYAXON_RUN_DATA_PATHS", json.dumps({"images": f"{store.url}/images"}))


def new_start() -> str:
    """Return the path of the local copy at the next start of the script, whose process holds no copy yet."""
    for lock, _ in dataset_cache._held.values():
        os.close(lock)
    dataset_cache._held.clear()
    return get_data_path("images", download=True)


def put(store: Store, files: dict[str, bytes], dataset: str = "images") -> None:
    for name, content in files.items():
        store.fs.pipe_file(store.path(f"{dataset}/{name}"), content)


def files_in(directory: str) -> dict[str, bytes]:
    """Return the contents of all files in `directory`, by their name below it."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()
    }


def is_content(request: Request, name: str = "images") -> bool:
    """Return whether `request` asks for the content of an object, and not for its description or for a listing."""
    path, _, query = request.path.partition("?")
    is_listing = path.endswith(("/o", "/o/")) or "list" in query or "comp=" in query
    is_description = path.startswith("/storage/v1") and "alt=media" not in query
    return request.method == "GET" and name in path and not is_listing and not is_description


def start(code: str = DOWNLOAD, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def path_of(process: subprocess.Popen[str]) -> str:
    """Return the path that `process` printed, at its end."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.strip()


# What is there


def test_all_objects_below_a_url_are_a_directory(store: Store) -> None:
    put(store, FILES)
    path = get_data_path("images", download=True)
    assert os.path.basename(path) == "images"
    assert files_in(path) == FILES
    assert get_data_path("images") == f"{store.url}/images"


def test_a_download_says_how_far_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, {"large.bin": LARGE, **FILES})
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0)
    with caplog.at_level(logging.INFO, "polyaxon_tracking"):
        get_data_path("images", download=True)
    lines = [message for message in caplog.messages if message.startswith("Downloading ")]
    assert lines[-1].endswith(": 20 of 20 MB")
    assert any(not line.endswith((": 0 of 20 MB", ": 20 of 20 MB")) for line in lines)


def test_an_object_is_a_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, {"@large.bin": LARGE})
    monkeypatch.setenv("POLYAXON_RUN_DATA_PATHS", json.dumps({"large": f"{store.url}/images/@large.bin"}))
    path = get_data_path("large", download=True)
    assert os.path.basename(path) == "@large.bin"
    assert Path(path).read_bytes() == LARGE


def test_a_default_that_is_a_url_is_downloaded_too(store: Store) -> None:
    put(store, FILES, "faces")
    assert files_in(get_data_path("faces", default=f"{store.url}/faces", download=True)) == FILES
    assert get_data_path("other", default="data/other", download=True) == "data/other"


def test_a_whole_bucket_is_a_dataset(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, FILES)
    monkeypatch.setenv("POLYAXON_RUN_DATA_PATHS", json.dumps({"all": store.server.url(store.bucket)}))
    found = files_in(get_data_path("all", download=True))
    assert found == {f"user/project/7/images/{name}": content for name, content in FILES.items()}


def test_callbacks_and_loops_download_unless_asked_for_the_url(store: Store) -> None:
    put(store, FILES)
    run = Run(datasets=["images"])
    assert files_in(run.data_path("images")) == FILES
    assert run.data_path("images", download=False) == f"{store.url}/images"


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_an_empty_object_for_a_directory_is_no_file(store: Store) -> None:
    put(store, {**FILES, "train": b"", "train/1": b"", "test/": b""})
    assert files_in(get_data_path("images", download=True)) == FILES


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_name_that_leaves_the_directory_is_refused(store: Store) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.put_object(Bucket=store.bucket, Key="user/project/7/images/../../escaped", Body=b"")
    with pytest.raises(
        TrackingError, match=r"Received the object '\.\./\.\./escaped' below .* cannot be that of a file"
    ):
        get_data_path("images", download=True)


# Once, and only what has changed


def test_the_processes_of_a_machine_download_once(store: Store, proxy: Proxy) -> None:
    put(store, {**FILES, "large.bin": LARGE})
    paths = {path_of(process) for process in [start() for _ in range(8 if store.kind == "s3" else 2)]}
    assert len(paths) == 1
    assert files_in(paths.pop()) == {**FILES, "large.bin": LARGE}
    # One request for each file that is not empty, and one for each piece of the large one.
    assert sum(map(is_content, proxy.requests)) == 3 + 3


def test_the_next_start_downloads_only_what_has_changed(store: Store, proxy: Proxy) -> None:
    put(store, FILES)
    first = get_data_path("images", download=True)
    proxy.requests.clear()
    assert get_data_path("images", download=True) == first
    assert new_start() == first
    assert not [request for request in proxy.requests if is_content(request)]
    put(store, {"labels.csv": b"1,1"})
    store.fs.rm_file(store.path("images/train/1/x.bin"))
    second = get_data_path("images", download=True)
    assert files_in(second) == {name: content for name, content in FILES.items() if "x.bin" not in name} | {
        "labels.csv": b"1,1"
    }
    assert sum(map(is_content, proxy.requests)) == 1
    assert files_in(first) == FILES, "this process still reads the version that it asked for"


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_version_that_no_process_uses_is_removed(store: Store) -> None:
    put(store, FILES)
    first = new_start()
    put(store, {"labels.csv": b"1,1"})
    second = new_start()
    assert not os.path.exists(first)
    assert os.path.exists(second)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_file_that_is_gone_or_cut_is_downloaded_again(store: Store) -> None:
    put(store, FILES)
    path = Path(new_start())
    (path / "labels.csv").unlink()
    (path / "train/1/x.bin").chmod(0o600)
    (path / "train/1/x.bin").write_bytes(b"x")
    assert files_in(new_start()) == FILES


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_training_cannot_change_the_copy_by_mistake(store: Store) -> None:
    put(store, FILES)
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in Path(new_start()).rglob("*") if path.is_file())


# Kills, damage and changes


def test_a_killed_download_resumes(store: Store, proxy: Proxy) -> None:
    put(store, {**FILES, "large.bin": LARGE})
    process = start()
    first_piece: list[Request] = []

    def kill_after_a_piece(request: Request) -> int | None:
        """Let one piece of the large file pass; with the next, kill the process once the first is on disk."""
        if is_content(request, "large.bin"):
            first_piece.append(request)
            if len(first_piece) > 1:
                deadline = time.monotonic() + 300
                while not list(Path(os.environ["TMPDIR"]).rglob("*.done")) and time.monotonic() < deadline:
                    time.sleep(0.01)
                process.kill()
        return None

    proxy.answer = kill_after_a_piece
    assert process.wait(timeout=300) == -signal.SIGKILL
    proxy.answer = lambda _: None
    assert not list(Path(os.environ["TMPDIR"]).rglob("large.bin")), "a file has its name only when it is complete"
    proxy.requests.clear()
    assert files_in(new_start()) == {**FILES, "large.bin": LARGE}
    assert 1 <= sum(is_content(request, "large.bin") for request in proxy.requests) < 3
    assert not list(Path(os.environ["TMPDIR"]).rglob("*.parts"))


def test_damage_on_the_way_is_found_and_downloaded_again(
    store: Store, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, FILES)
    damaged: list[Request] = []

    def damage_once(request: Request, content: bytes) -> bytes:
        if not is_content(request, "x.bin") or damaged:
            return content
        damaged.append(request)
        return b"y" + content[1:]

    proxy.alter = damage_once
    assert files_in(get_data_path("images", download=True)) == FILES
    assert len(damaged) == 1
    # The driver of S3 finds it itself where the store tells another checksum.
    expected = "did not match calculated checksum" if store.kind == "s3" else "x.bin: the MD5 differs from the store's"
    assert expected in caplog.text


def test_a_file_that_arrives_damaged_twice_is_an_error(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, FILES)
    bytes_of = iter(range(1000))
    proxy.alter = lambda request, content: (
        bytes([next(bytes_of) % 256]) + content[1:] if is_content(request, "x.bin") else content
    )
    problem = r"its MD5 is \w+, and the store's \w+: .*/train/1/x\.bin"
    if store.kind == "s3":
        monkeypatch.setattr(retry, "_PATIENCE_SECONDS", 2.0)
        problem = "Expected checksum"
    with pytest.raises(OSError, match=f"Not downloaded: {problem}"):
        get_data_path("images", download=True)
    assert "x.bin" not in {path.name for path in Path(os.environ["TMPDIR"]).rglob("*")}


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_an_entity_tag_that_is_no_md5_is_accepted(store: Store, proxy: Proxy) -> None:
    """With KMS, S3 encrypts the content before it computes the tag."""
    put(store, {"1.bin": b"1" * 100})
    tag, other = hashlib.md5(b"1" * 100).hexdigest().encode(), b"0" * 32
    proxy.alter = lambda _, content: content.replace(tag, other)
    assert files_in(get_data_path("images", download=True)) == {"1.bin": b"1" * 100}


def test_a_dataset_that_changes_meanwhile_is_of_one_version(
    store: Store, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    other = bytes(reversed(LARGE))
    put(store, {"large.bin": LARGE})
    seen: list[Request] = []

    def change(request: Request) -> int | None:
        if is_content(request, "large.bin"):
            seen.append(request)
            if len(seen) == 2:
                put(store, {"large.bin": other})
        return None

    proxy.answer = change
    assert files_in(get_data_path("images", download=True)) == {"large.bin": other}
    assert "/images has changed while it was downloaded. Downloading what has changed" in caplog.text


# Errors


def test_what_is_missing_is_an_error_before_training_that_names_the_dataset(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = store.server.url("no-such-bucket")
    monkeypatch.setenv("POLYAXON_RUN_DATA_PATHS", json.dumps({"images": f"{store.url}/none", "faces": f"{nowhere}/x"}))
    with pytest.raises(TrackingError) as raised:
        Run(datasets=["images", "faces"])
    first, second = str(raised.value).splitlines()
    assert first.startswith("The dataset 'images' is expected at")
    assert first.endswith("and there is nothing. Correct the URL, or put the data there.")
    assert "'faces'" in second
    with pytest.raises(TrackingError, match=r"The dataset 'images' is expected at '.*/none', and there is nothing"):
        get_data_path("images", download=True)


def test_refused_credentials_are_an_error_that_names_the_dataset(store: Store, proxy: Proxy) -> None:
    put(store, FILES)
    proxy.answer = lambda _: 403
    with pytest.raises(TrackingError, match=r"from the dataset 'images' in POLYAXON_RUN_DATA_PATHS, .* may not read"):
        Run(datasets=["images"])


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_store_that_is_away_for_a_while_is_waited_for(store: Store, proxy: Proxy) -> None:
    put(store, FILES)
    failures = iter([503] * 3)
    proxy.answer = lambda request: next(failures, None) if is_content(request) else None
    assert files_in(get_data_path("images", download=True)) == FILES


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_too_little_room_is_an_error_before_the_download(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(store, {"large.bin": LARGE})
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], check=False).returncode:
        pytest.skip("needs a user who may mount")
    try:
        monkeypatch.setenv("POLYAXON_DATA_CACHE", str(small))
        with pytest.raises(TrackingError, match=r"20,971,520 bytes are to be downloaded to .*small', where \d,"):
            get_data_path("images", download=True)
        assert not [request for request in proxy.requests if is_content(request)]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_limit_on_the_size_of_files_is_an_error_that_says_what_to_do(store: Store) -> None:
    put(store, {"large.bin": LARGE})
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY})); "
    process = start(limit + DOWNLOAD)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "TrackingError: Received the dataset 's3://" in errors.splitlines()[-1]
    assert "Set POLYAXON_DATA_CACHE to a directory on a larger disk" in errors


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_cache_that_cannot_be_used(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(store, FILES)
    (tmp_path / "file").touch()
    for given, problem in (
        (str(tmp_path / "file"), "cannot be written to: "),
        ("s3://bucket/cache", "Expected a directory on this machine"),
    ):
        monkeypatch.setenv("POLYAXON_DATA_CACHE", given)
        with pytest.raises(TrackingError, match=problem):
            get_data_path("images", download=True)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_ctrl_c_ends_a_download(store: Store, proxy: Proxy) -> None:
    put(store, FILES)
    process = start()
    proxy.answer = lambda request: process.send_signal(signal.SIGINT) or 503 if is_content(request) else None
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (1, -signal.SIGINT)
    assert "KeyboardInterrupt" in errors
