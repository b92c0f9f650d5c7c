"""The cost of checkpoints in object stores, compared with the driver only: `python benchmarks/stores.py`.

The stores are those of the tests, on this machine, so the network is left out: what is compared is what this package
adds to the driver's own ``put_file`` and ``get_file``, which take turns. It prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "storage"))
os.environ["FSSPEC_GS_TOKEN"] = "anon"

from servers import KINDS, Proxy, Server, Store
from speed import lightning_blocked

from polyaxon_tracking import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 3
BLOCKED_MEGABYTES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--stores", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    print("| store | MB | save, s | `put_file`, s | ratio | resume, s | `get_file`, s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in arguments.stores:
        for megabytes in arguments.megabytes:
            with running(kind) as server:
                print(transfers(server, megabytes), flush=True)
    print("\n| store | requests of a save | of a resume | with 1,000 other objects |")
    print("|---|---|---|---|")
    for kind in arguments.stores:
        with running(kind) as server:
            print(requests(server), flush=True)
    print(f"\n| outputs | blocked by an event of Lightning, {BLOCKED_MEGABYTES} MB, s | of a copy of the state |")
    print("|---|---|---|")
    for kind in ("disk", *arguments.stores):
        with contextlib.ExitStack() as stack:
            if kind == "disk":
                outputs = stack.enter_context(tempfile.TemporaryDirectory())
            else:
                outputs = entered(stack.enter_context(running(kind))).url
            times = lightning_blocked("ours", BLOCKED_MEGABYTES, outputs)
            blocked, copy = statistics.median(times["events"]), statistics.median(times["copy"])
            print(f"| {kind} | {blocked:.3f} | {blocked / copy:.2f} |", flush=True)


@contextlib.contextmanager
def running(kind: str) -> Iterator[Server]:
    """Run a store of the `kind`, whose directory is removed at the end."""
    with tempfile.TemporaryDirectory() as directory:
        server = KINDS[kind](Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.kill()


def entered(server: Server, port: int | None = None) -> Store:
    bucket = f"bucket-{time.monotonic_ns()}"
    server.make_bucket(bucket)
    store = Store(server, bucket, port or server.port)
    os.environ.update(store.environment)
    return store


def transfers(server: Server, megabytes: int) -> str:
    store = entered(server)
    manager = CheckpointManager(store.url, max_to_keep=1)
    content = os.urandom(1 << 20)
    file = os.path.join(server.directory, "file")
    with open(file, "wb") as target:
        target.writelines(content for _ in range(megabytes))
    seconds: dict[str, list[float]] = {"save": [], "put": [], "resume": [], "get": []}
    for step in range(1, ROUNDS + 2):  # of which the first, that connects, is left out
        with manager.save(step) as path:
            os.link(file, path)  # what writes it is no part of this
            os.chmod(path, 0o600)
            started_at = time.perf_counter()
        seconds["save"].append(time.perf_counter() - started_at)
        started_at = time.perf_counter()
        store.fs.put_file(file, store.path("put"))
        seconds["put"].append(time.perf_counter() - started_at)
        started_at = time.perf_counter()
        assert manager.latest() is not None
        seconds["resume"].append(time.perf_counter() - started_at)
        manager.release()
        started_at = time.perf_counter()
        store.fs.get_file(store.path("put"), f"{file}.got")
        seconds["get"].append(time.perf_counter() - started_at)
        os.unlink(f"{file}.got")
        store.fs.rm_file(store.path("put"))
    save, put, resume, get = (statistics.median(seconds[name][1:]) for name in ("save", "put", "resume", "get"))
    return (
        f"| {server.kind} | {megabytes} | {save:.2f} | {put:.2f} | {save / put:.2f} "
        f"| {resume:.2f} | {get:.2f} | {resume / get:.2f} |"
    )


def requests(server: Server) -> str:
    proxy = Proxy(server.port)
    store = entered(server, proxy.port)
    manager = CheckpointManager(store.url)
    counts = []
    for others in (0, 1000):
        for number in range(others):
            store.fs.pipe_file(store.path(f"other-{number}"), b"")
        for step in (1, 2, 3):
            proxy.requests.clear()
            with manager.save(others + step) as path:
                Path(path).write_text("content")
        counts.append(len(proxy.requests))
        proxy.requests.clear()
        assert manager.latest() is not None
        counts.append(len(proxy.requests))
        manager.release()
    proxy.stop()
    return f"| {server.kind} | {counts[0]} | {counts[1]} | {counts[2]} and {counts[3]} |"


if __name__ == "__main__":
    main()
