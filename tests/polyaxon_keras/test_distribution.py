"""The Keras callback with several devices, and with several processes of JAX."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import forked
import keras
import pytest
from training_scripts import Ended, newest, newest_position

SCRIPT = str(Path(__file__).with_name("distribution_script.py"))
KINDS = [
    ("MirroredStrategy", 1),
    ("DataParallel", 1),
    ("ModelParallel", 1),
    ("DataParallel", 2),
    ("ModelParallel", 2),
]


def train(outputs: Path, how: str = "DataParallel", processes: int = 2, **environment: str) -> list[Ended]:
    """Return how each process ended. If one hangs, an error is raised."""
    settings = {
        "KERAS_BACKEND": "tensorflow" if how == "MirroredStrategy" else "jax",
        "DISTRIBUTION": how,
    }
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            settings["COORDINATOR"] = f"127.0.0.1:{server.getsockname()[1]}"
    started = [
        forked.start(
            "keras",
            SCRIPT,
            RANK=str(rank),
            POLYAXON_RUN_OUTPUTS_PATH=str(outputs).replace("$RANK", str(rank)),
            **settings,
            **environment,
        )
        for rank in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.wait(), *texts) for process, texts in zip(started, printed, strict=True)]


def says_what_it_resumes_from(ended: list[Ended], step: str) -> bool:
    """Return whether only the first process logged that the training resumed from this step."""
    return [f": {step}\n" in one.stderr for one in ended] == [True] + [False] * (len(ended) - 1)


@pytest.mark.parametrize(("how", "processes"), KINDS)
def test_a_killed_and_resumed_training_has_the_weights_of_an_uninterrupted_one(
    how: str, processes: int, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", how, processes)
    assert [one.returncode for one in whole] == [0] * processes, whole
    killed = train(tmp_path / "killed", how, processes, DIE_AFTER="13", FOREGROUND="1", HEARTBEAT_SECONDS="10")
    assert -signal.SIGKILL in [one.returncode for one in killed], killed
    names = {path.name for path in (tmp_path / "killed").glob("**/*.*")}
    assert {"best.keras", "resume"} > {name for name in names if not name.startswith("step=")}
    assert len(names) == 3, names  # of one writer
    resumed = train(tmp_path / "killed", how, processes)
    assert says_what_it_resumes_from(resumed, "epoch 3, step 12"), resumed
    assert [one.stdout for one in resumed] == [one.stdout for one in whole]
    keras.saving.load_model(tmp_path / "killed" / "checkpoints" / "best.keras")


def test_a_state_of_several_processes_may_be_resumed_by_one(tmp_path: Path) -> None:
    killed = train(tmp_path, "ModelParallel", 2, DIE_AFTER="13", HEARTBEAT_SECONDS="10")
    assert -signal.SIGKILL in [one.returncode for one in killed], killed
    [only] = train(tmp_path, "DataParallel", 1)
    assert only.returncode == 0, only.stderr
    assert "Resuming from " in only.stderr


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
def test_a_signal_to_one_process_saves_once_and_ends_all(name: str, status: int, tmp_path: Path) -> None:
    ended = train(tmp_path, DIE_AFTER="5", SIGNAL=name, ON_RANK="1")
    assert [one.returncode for one in ended] == [status, status], ended
    assert newest(tmp_path).step == 7  # all know of it one batch later
    resumed = train(tmp_path)
    assert says_what_it_resumes_from(resumed, "epoch 1, step 7"), resumed


def test_a_signal_in_the_validation_ends_all(tmp_path: Path) -> None:
    ended = train(tmp_path, DIE_IN_VALIDATION_AFTER="8", SIGNAL="SIGTERM", ON_RANK="1")
    assert [one.returncode for one in ended] == [143, 143], ended
    assert newest_position(tmp_path) == (8, 1)  # resuming runs the validation of the second epoch
    resumed = train(tmp_path)
    assert [one.returncode for one in resumed] == [0, 0], resumed
    assert says_what_it_resumes_from(resumed, "epoch 1, step 8"), resumed


def test_a_killed_process_ends_the_other_and_the_next_start_resumes(tmp_path: Path) -> None:
    ended = train(tmp_path, DIE_AFTER="9", ON_RANK="1", FOREGROUND="1", HEARTBEAT_SECONDS="10")
    assert ended[1].returncode == -signal.SIGKILL
    assert ended[0].returncode != 0
    resumed = train(tmp_path)
    assert says_what_it_resumes_from(resumed, "epoch 2, step 8"), resumed


@pytest.mark.parametrize("mode", ["FOREGROUND", "BACKGROUND"])
def test_a_write_that_fails_in_the_first_process_ends_all(mode: str, tmp_path: Path) -> None:
    first, second = train(tmp_path, NO_ROOM_AFTER="9", ON_RANK="0", **{mode: "1"})
    assert "File too large" in first.stderr
    assert "RuntimeError: Rank 0 failed, and this one ends with it: OSError: " in second.stderr
    # HDF5 may crash the interpreter at its exit, after it has printed the error: see docs/durability.md.
    assert (first.returncode, second.returncode) in {(1, 1), (-signal.SIGSEGV, 1)}
    # In the background the state after eight batches may be what is being written.
    assert newest(tmp_path).step in {"FOREGROUND": [8], "BACKGROUND": [4, 8]}[mode]


def test_processes_that_see_different_checkpoints_get_an_error(tmp_path: Path) -> None:
    [only] = train(tmp_path / "0", processes=1)
    assert only.returncode == 0, only.stderr
    (tmp_path / "1").mkdir()
    ended = train(tmp_path / "$RANK")
    for one in ended:
        assert one.returncode == 1
        assert (
            f" in {tmp_path}/0/checkpoints/resume, rank 1 from None in {tmp_path}/1/checkpoints/resume. Expected "
            in one.stderr
        )
