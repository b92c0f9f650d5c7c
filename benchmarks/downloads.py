"""The time to download a dataset, compared with the best that drivers do: `python benchmarks/downloads.py`.

The subjects are `get_data_path`, which verifies and flushes each file, the recursive `get` of the driver, and for S3
the `TransferManager` of boto3 with 10 threads, as the command of AWS uses it: it takes the sizes from a listing. Those
two verify and flush nothing. The subjects take turns.

The server is `s3_server.py` on this machine, because moto, the emulator of the tests, takes more processor time for a
request than a client does. `--server` names one of the emulators instead. It prints Markdown: medians of the seconds,
and of the seconds of processor time that this process took.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "storage"))
os.environ["FSSPEC_GS_TOKEN"] = "anon"

import servers
from stores import entered, running

from polyaxon_tracking import get_data_path

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 1 << 20


class FileServer(servers.S3):
    """`s3_server.py`, with the objects that are files in its directory."""

    kind = "files"

    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(self.port), str(self.directory)]

    def make_bucket(self, name: str) -> None:
        (self.directory / name).mkdir()


servers.KINDS["files"] = FileServer


class Cost(NamedTuple):
    seconds: float
    processor_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", choices=servers.KINDS, default="files")
    arguments = parser.parse_args()
    print(
        "| files | `get_data_path`, s | driver, s | boto3, s | ratio to the faster | processor: `get_data_path`, s "
        "| driver, s | boto3, s | second start, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for count in arguments.files:
        with running(arguments.server) as server:
            store = entered(server)
            put(store, arguments.megabytes * 10**6 // count, count)
            print(row(store, count, arguments.rounds), flush=True)


def put(store: servers.Store, size: int, count: int) -> None:
    content = os.urandom(BLOCK)
    for number in range(count):
        name = store.path(f"data/{number:06}")
        if isinstance(store.server, FileServer):
            path = store.server.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for start in range(0, size, BLOCK):
                    file.write(content[: size - start])
        else:
            store.fs.pipe_file(name, (content * -(-size // BLOCK))[:size])


def row(store: servers.Store, count: int, rounds: int) -> str:
    os.environ["POLYAXON_DATA_CACHE"] = cache = os.path.join(store.server.directory, "cache")
    target = os.path.join(store.server.directory, "target")
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: get_data_path("data", default=f"{store.url}/data", download=True),
        "driver": lambda: store.fs.get(store.path("data"), target, recursive=True),
    }
    if store.server.protocol == "s3":
        ways["boto3"] = lambda: boto3_download(store, target)
    costs: dict[str, list[Cost]] = {name: [] for name in (*ways, "again")}
    for _ in range(rounds):
        for name, way in ways.items():
            for path in (cache, target):
                shutil.rmtree(path, ignore_errors=True)
            os.sync()  # so that what the previous subject left is not written now
            costs[name].append(cost(way))
            if name == "ours":
                costs["again"].append(cost(way))
            sizes = [path.stat().st_size for path in Path(target if name != "ours" else cache).rglob("[0-9]" * 6)]
            assert len(sizes) == count, f"{name} downloaded {len(sizes)} files"
    seconds, processor = (
        {name: statistics.median(one[index] for one in found) for name, found in costs.items()} for index in (0, 1)
    )
    ratio = seconds["ours"] / min(seconds[name] for name in ways if name != "ours")
    columns = ("ours", "driver", "boto3")
    cells = [*(f"{seconds[name]:.2f}" if name in ways else "" for name in columns), f"{ratio:.2f}"]
    cells += [f"{processor[name]:.2f}" if name in ways else "" for name in columns]
    return f"| {count:,} | {' | '.join(cells)} | {seconds['again']:.2f} |"


def boto3_download(store: servers.Store, target: str) -> None:
    import boto3
    from s3transfer.manager import TransferConfig, TransferManager
    from s3transfer.subscribers import BaseSubscriber

    class Listed(BaseSubscriber):  # type: ignore[misc]
        """Give the size and the tag of the listing to a transfer, which otherwise asks for them."""

        def __init__(self, entry: dict[str, object]) -> None:
            self.entry = entry

        def on_queued(self, future: object, **_: object) -> None:
            future.meta.provide_transfer_size(self.entry["Size"])
            future.meta.provide_object_etag(self.entry["ETag"])

    os.makedirs(target, exist_ok=True)
    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=store.bucket, Prefix=store.path("data/").removeprefix(f"{store.bucket}/")
    )
    with TransferManager(client, TransferConfig(max_request_concurrency=10)) as manager:
        futures = [
            manager.download(
                store.bucket,
                entry["Key"],
                os.path.join(target, os.path.basename(entry["Key"])),
                subscribers=[Listed(entry)],
            )
            for page in pages
            for entry in page["Contents"]
        ]
        for future in futures:
            future.result()


def cost(way: Callable[[], object]) -> Cost:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    way()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    main()
