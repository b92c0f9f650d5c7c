"""Every test runs in an empty directory, off the cluster, and leaves the environment as it was."""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from restarts import forget_trainings

from polyaxon_tracking.storage import credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Read by torch when it is imported. Several tests run at a time: the threads of one training, which wait for each other,
# would take the time of the others, and a training of seconds take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it runs in the background with Ctrl-C ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["tests/typing", "tests/support/macos"]  # only for type checkers, and for other processes

# Set by pytest, and by torch, Lightning, TensorFlow, JAX and h5py when they are imported or first used.
_NOT_OURS = {
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "ENABLE_RUNTIME_UPTIME_TELEMETRY",
    "HDF5_PLUGIN_PATH",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TF2_BEHAVIOR",
    "TF_CPP_MIN_LOG_LEVEL",
    "TPU_ML_PLATFORM",
    "TPU_ML_PLATFORM_VERSION",
    "TPU_SKIP_MDS_QUERY",
}

# They change what the command line prints.
_OF_TERMINALS = {"COLUMNS", "FORCE_COLOR", "NO_COLOR"}


def pytest_configure(config: pytest.Config) -> None:
    """Make the helpers and training scripts importable in the processes that tests start."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, config.getini("pythonpath")))
    if "FORK_SERVERS" not in os.environ:  # otherwise the process that started this worker has set it
        shared = tempfile.TemporaryDirectory(prefix="tests-")
        config.add_cleanup(shared.cleanup)
        os.environ["FORK_SERVERS"] = shared.name  # see forked.py
        # Compiling is most of what trainings on JAX take, and many of them are the same.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{shared.name}/jax"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_collection_finish() -> None:
    """Let no garbage collection go through what the frameworks have made when they were imported.

    Frameworks collect after each training, which would take a third of the time of all tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _off_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("POLYAXON_", "POLYSTORES_")) or name in _OF_TERMINALS:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _environment_is_left_as_it_was(_off_the_cluster: None, request: pytest.FixtureRequest) -> Iterator[None]:
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    if isinstance(request.node, pytest.DoctestItem):  # an example shows which variable it is about
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)
    # What a test sets through `monkeypatch` is undone after this fixture, so it is not looked at.
    elif "monkeypatch" not in _requested(request):
        assert not changed - _NOT_OURS, f"the test leaves the environment changed: {sorted(changed)}"


def _requested(request: pytest.FixtureRequest) -> set[str]:
    """Return the fixtures that the test requests itself, and those that these request."""
    names = set(request.node._fixtureinfo.argnames)
    return names | ({"monkeypatch"} if {"outputs", "store"} & set(request.fixturenames) else set())


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(os=os, Path=Path)


@pytest.fixture(autouse=True)
def _log_levels_are_left_as_they_were() -> Iterator[None]:
    names = [
        "polyaxon_tracking",
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "keras",
        "absl",
        "transformers",
        "accelerate",
    ]
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True)
def _credentials_in_urls_are_forgotten() -> Iterator[None]:
    yield
    credentials._seen.clear()


@pytest.fixture
def new_process() -> Callable[[], None]:
    """Return a function that makes this process forget its trainings, as a new process would."""
    return forget_trainings


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the outputs path of a run in a cluster."""
    path = tmp_path / "run" / "outputs"
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(path))
    return path


@pytest.fixture(
    params=[
        ({"max_to_keep": 0}, "Received max_to_keep=0. Expected a whole number, 1 or more."),
        (
            {"every_n_train_steps": 0},
            "Received every_n_train_steps=0. Expected a whole number, 1 or more, 'auto', or None.",
        ),
        (
            {"every_n_train_steps": "9"},
            "Received every_n_train_steps='9'. Expected a whole number, 1 or more, 'auto', or None.",
        ),
        (
            {"train_time_interval": timedelta(0)},
            "Received train_time_interval=datetime.timedelta(0). Expected a timedelta above zero, such as timedelta(minutes=10), or None.",
        ),
        (
            {"train_time_interval": 600},
            "Received train_time_interval=600. Expected a timedelta above zero, such as timedelta(minutes=10), or None.",
        ),
        ({"background": "no"}, "Received background='no'. Expected True or False."),
        ({"resume": "no"}, "Received resume='no'. Expected True, False or None."),
        ({"loggers": "mine"}, "Received loggers='mine', a string. Expected a list of names: ['mine']."),
        ({"loggers": None}, "Received loggers=None. Expected a list of names of loggers, such as ['mine']."),
        ({"loggers": [3]}, "Received loggers=[3]. Expected a list of names of loggers, such as ['mine']."),
    ],
    ids=lambda value: " ".join(f"{name} {option!r}" for name, option in value[0].items()),
)
def wrong_argument(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    """Return an argument that every callback refuses, and the message."""
    wrong: tuple[dict[str, Any], str] = request.param
    return wrong
