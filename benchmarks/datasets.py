"""The time to download a dataset, compared with the driver's own ``get``: `python benchmarks/datasets.py`.

The stores are those of the tests, on this machine, so the network is left out. For S3, the transfers of boto3, which
the command of AWS uses, are measured too. The three take turns. It prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "storage"))
os.environ["FSSPEC_GS_TOKEN"] = "anon"

from servers import KINDS, Store
from stores import entered, running

from polyaxon_tracking import get_data_path

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 10_000])
    parser.add_argument("--stores", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    print("| store | files | `get_data_path`, s | driver's `get`, s | ratio | boto3, s | ratio | second start, s |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in arguments.stores:
        for count in arguments.files:
            with running(kind) as server:
                print(row(entered(server), arguments.megabytes * 10**6 // count, count), flush=True)


def row(store: Store, size: int, count: int) -> str:
    content = os.urandom(size)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.fs.pipe_file(store.path(f"data/{number:06}"), content), range(count)))
    os.environ["POLYAXON_DATA_CACHE"] = cache = os.path.join(store.server.directory, "cache")
    target = os.path.join(store.server.directory, "target")
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: get_data_path("data", default=f"{store.url}/data", download=True),
        "driver": lambda: store.fs.get(store.path("data"), target, recursive=True),
    }
    if store.kind == "s3":
        ways["boto3"] = lambda: boto3_download(store, target)
    times: dict[str, list[float]] = {name: [] for name in (*ways, "again")}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            for path in (cache, target):
                shutil.rmtree(path, ignore_errors=True)
            times[name].append(seconds(way))
            if name == "ours":
                times["again"].append(seconds(way))
    medians = {name: statistics.median(found) for name, found in times.items()}
    cells = [store.kind, f"{count:,}", f"{medians['ours']:.2f}"]
    for name in ("driver", "boto3"):
        found = medians.get(name)
        cells += ["", ""] if found is None else [f"{found:.2f}", f"{medians['ours'] / found:.2f}"]
    return f"| {' | '.join(cells)} | {medians['again']:.2f} |"


def boto3_download(store: Store, target: str) -> None:
    import boto3

    os.makedirs(target, exist_ok=True)
    client = boto3.client("s3")
    with ThreadPoolExecutor(10) as pool:
        for path in store.fs.find(store.path("data")):
            key = path.removeprefix(f"{store.bucket}/")
            pool.submit(client.download_file, store.bucket, key, os.path.join(target, os.path.basename(key)))


def seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
