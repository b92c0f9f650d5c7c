"""Notices that are no signals: the end of the job's time, and the metadata servers of clouds."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import forked
import pytest
from clock import Clock
from metadata_server import MACHINE, MetadataServer, metadata_server
from training_scripts import SCRIPTS, newest, train, trained

from polyaxon_tracking import PreemptionHandler, StepLoop, TrackingError
from polyaxon_tracking.training import cloud_notices
from polyaxon_tracking.training.time_limit import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERY_STEP = {"torch": {"EVERY": "1"}, "lightning": {"EVERY_N_TRAIN_STEPS": "1"}}


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with metadata_server() as started:
        yield started


@pytest.fixture
def asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_notices, "_SECONDS_BETWEEN", 0.05)


def wait_for(preemption: PreemptionHandler) -> None:
    deadline = time.monotonic() + 60
    while preemption.requested is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The end of the job's time


@pytest.mark.parametrize("framework", EVERY_STEP)
def test_a_training_ends_saved_before_the_job_is_killed(framework: str, tmp_path: Path) -> None:
    seconds = 20
    settings = {"POLYAXON_RUN_OUTPUTS_PATH": str(tmp_path), "SECONDS_PER_BATCH": "1", **EVERY_STEP[framework]}
    started = time.time()
    limited = forked.start(
        framework, SCRIPTS[framework], POLYAXON_JOB_END_TIME=str(started + seconds), EPOCHS="6", **settings
    )
    try:
        _, stderr = limited.communicate(started + seconds - time.time())
    except subprocess.TimeoutExpired:
        pytest.fail("the training was killed at the end of the job's time")
    assert limited.returncode == 143, stderr
    assert " (POLYAXON_JOB_END_TIME), and one more batch with its save may take " in stderr
    step = newest(tmp_path).step
    assert f"Saved step {step} after SIGTERM" in stderr
    resumed = train(framework, tmp_path, EPOCHS="6")
    assert f"step {step}\n" in resumed.stderr
    assert trained(resumed) == trained(train(framework, tmp_path / "whole", EPOCHS="6"))


@pytest.mark.parametrize(
    ("batch", "save", "ends"),
    [
        (1, 10, 979),
        (100, 10, 900),
        (1, 0.01, 994),  # a save takes at least 2.5 s
        (1, 0, 939),  # none was measured: 30 s
    ],
)
def test_the_time_of_a_batch_and_two_saves_is_left(
    batch: float, save: float, ends: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_JOB_END_TIME", "1000")
    clock = Clock()
    limit = TimeLimit(clock)
    while limit.reason_to_end(save) is None:
        assert clock.seconds < 1000
        clock.seconds += batch
    assert clock.seconds == ends


def test_a_time_that_is_over_before_training_begins_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POLYAXON_JOB_END_TIME", "1000")
    clock = Clock()
    limit = TimeLimit(clock)
    with caplog.at_level(logging.WARNING, "polyaxon_tracking"):
        for clock.seconds in (1001, 1002, 1003):
            assert limit.reason_to_end(20) is None
    assert caplog.messages == ["POLYAXON_JOB_END_TIME is ignored: that time is over, and the job still runs"]


@pytest.mark.parametrize("value", ["4h", "nan", "inf", "2026-11-27T16:00:00"])
def test_a_time_that_is_no_unix_time_is_an_error_before_training(
    value: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_JOB_END_TIME", value)
    message = f"POLYAXON_JOB_END_TIME was received as '{value}'. Expected the UNIX time"
    with pytest.raises(TrackingError, match=message), StepLoop(print, print) as training:
        next(training.steps(1))
    assert not list(outputs.rglob("*.ckpt"))


# The metadata servers of clouds


def test_a_notice_of_aws_ends_the_training_saved_and_it_resumes(tmp_path: Path, server: MetadataServer) -> None:
    cloud = {"POLYAXON_PREEMPTION_NOTICES": "aws", "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{server.address}"}
    settings = {"POLYAXON_RUN_OUTPUTS_PATH": str(tmp_path), "SECONDS_PER_BATCH": "0.5", "EPOCHS": "6"}
    preempted = forked.start("torch", SCRIPTS["torch"], **cloud, **settings)
    assert preempted.stdout is not None
    preempted.stdout.readline()  # in the first batch
    server.preempted = MACHINE
    _, stderr = preempted.communicate(300)
    assert preempted.returncode == 143, stderr
    assert "AWS will terminate this machine at 2026-11-27T16:02:00Z: training ends as after SIGTERM" in stderr
    step = newest(tmp_path).step
    assert f"Saved step {step} after SIGTERM" in stderr
    server.preempted = None
    resumed = train("torch", tmp_path, **cloud, EPOCHS="6")
    assert f"step {step}\n" in resumed.stderr
    assert trained(resumed) == trained(train("torch", tmp_path / "whole", EPOCHS="6"))


@pytest.mark.parametrize("cloud", ["aws", "google", "azure"])
def test_only_the_notice_of_this_machine_is_a_request(
    cloud: str, server: MetadataServer, monkeypatch: pytest.MonkeyPatch, asked_often: None
) -> None:
    monkeypatch.setenv("POLYAXON_PREEMPTION_NOTICES", cloud)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{server.address}")
    monkeypatch.setenv("GCE_METADATA_HOST", server.address)
    monkeypatch.setattr(cloud_notices, "_LINK_LOCAL", f"http://{server.address}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the metadata server is never behind a proxy
    with pytest.raises(SystemExit, match="143"), PreemptionHandler() as preemption:
        server.preempted = "machine-4"
        time.sleep(0.5)
        assert preemption.requested is None
        server.preempted = MACHINE
        wait_for(preemption)


def test_a_server_that_does_not_answer_is_said_once_and_asked_again(
    monkeypatch: pytest.MonkeyPatch, asked_often: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POLYAXON_PREEMPTION_NOTICES", "google")
    with metadata_server() as gone:
        monkeypatch.setenv("GCE_METADATA_HOST", gone.address)
    with caplog.at_level(logging.WARNING, "polyaxon_tracking"):
        with pytest.raises(SystemExit), PreemptionHandler() as preemption:
            time.sleep(0.5)
            assert len(caplog.messages) == 1
            with metadata_server() as server:
                server.preempted = MACHINE
                monkeypatch.setenv("GCE_METADATA_HOST", server.address)
                wait_for(preemption)
    assert caplog.messages[0].startswith(
        "The metadata server did not answer, so notices are not read as long as this lasts (POLYAXON_PREEMPTION_NOTICES=google): "
    )


@pytest.mark.parametrize("answer", ["not JSON", "[]", '{"other": 1}'])
def test_a_server_that_answers_something_else_is_said(
    answer: str,
    server: MetadataServer,
    monkeypatch: pytest.MonkeyPatch,
    asked_often: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("POLYAXON_PREEMPTION_NOTICES", "azure")
    monkeypatch.setattr(cloud_notices, "_LINK_LOCAL", f"http://{server.address}")
    server.events = answer
    with pytest.raises(SystemExit), PreemptionHandler() as preemption:
        while not caplog.messages:
            time.sleep(0.01)
        server.events, server.preempted = None, MACHINE
        wait_for(preemption)
    assert caplog.messages[0].startswith("The metadata server did not answer, so notices are not read")


def test_an_unknown_cloud_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_PREEMPTION_NOTICES", "gogle")
    message = (
        "POLYAXON_PREEMPTION_NOTICES was received as 'gogle'. Expected one of aws, google, azure. Did you mean 'google'"
    )
    with pytest.raises(TrackingError, match=message):
        PreemptionHandler()


def test_the_signal_that_follows_a_notice_is_no_second_signal() -> None:
    with pytest.raises(SystemExit, match="143"), PreemptionHandler() as preemption:
        preemption.request("a notice")
        assert preemption.requested == signal.SIGTERM
        time.sleep(0.2)
        signal.raise_signal(signal.SIGTERM)
        preemption.request("the notice again")
        assert preemption.requested == signal.SIGTERM
