"""Buckets of object stores that run on this machine.

A file of tests that uses them says so with ``pytest_plugins = ["store_fixtures"]``: the others run without any driver.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import fsspec
import pytest
from servers import KINDS, Proxy, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import Server


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Return the stores that were started, by their kind."""
    started: dict[str, Server] = {}
    yield started
    for server in started.values():
        server.kill()


@pytest.fixture(params=list(KINDS))
def store(
    request: pytest.FixtureRequest,
    servers: dict[str, Server],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    """Return a bucket of a store that runs on this machine; the environment leads to it."""
    if request.param not in servers:
        server = KINDS[request.param](tmp_path_factory.mktemp(request.param))
        server.start()
        servers[request.param] = server
    server = servers[request.param]
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    server.make_bucket(bucket)
    return _entered(Store(server, bucket, server.port), monkeypatch, tmp_path_factory)


@pytest.fixture
def proxy(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Return a proxy before the store, which records requests and answers them with faults."""
    proxy = Proxy(store.server.port)
    store.environment = store.server.environment(proxy.port)
    _entered(store, monkeypatch, tmp_path_factory)
    yield proxy
    proxy.stop()


def _entered(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Store:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class(store.server.protocol).clear_instance_cache()  # of another test's environment
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # read from the environment at its import
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    monkeypatch.setattr("tempfile.tempdir", None)
    return store
