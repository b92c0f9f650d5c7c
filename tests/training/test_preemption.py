"""SIGTERM and Ctrl-C as a request, in the user's own loop."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from polyaxon_tracking import PreemptionHandler

LOOP = """
import signal, sys, time
from polyaxon_tracking import PreemptionHandler
if "own" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: print("own handler", flush=True))
with PreemptionHandler() as preemption:
    print("training", flush=True)
    while not preemption.requested:
        time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
    preemption.exit()
"""


def end(number: signal.Signals, *arguments: str, times: int = 1) -> tuple[int, list[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    for _ in range(times):
        time.sleep(0.5)  # into the loop
        process.send_signal(number)
    lines = process.stdout.read().splitlines()
    return process.wait(timeout=300), lines


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, -signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGUSR1, 138, id="SIGUSR1, as of Slurm's --signal"),
        pytest.param(signal.SIGUSR2, 140, id="SIGUSR2"),
        pytest.param(signal.SIGXCPU, 152, id="SIGXCPU, as at a limit of CPU time"),
    ],
)
def test_the_first_is_a_request(number: signal.Signals, status: int) -> None:
    assert end(number, "0.01") == (status, ["saved"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_second_ends_at_once(number: signal.Signals) -> None:
    assert end(number, "60", times=2) == (-number, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_process_and_to_its_group_is_one(number: signal.Signals) -> None:
    """As `timeout` sends it."""
    code = f"""
import os
from polyaxon_tracking import PreemptionHandler
with PreemptionHandler() as preemption:
    os.kill(os.getpid(), {int(number)})
    os.kill(os.getpid(), {int(number)})
    print("saved", flush=True)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout == "saved\n"
    assert process.returncode == (-2 if number == signal.SIGINT else 128 + number), process.stderr


def test_a_limit_of_cpu_time_leaves_the_time_to_save() -> None:
    """The kernel sends SIGXCPU again after each second that the save takes."""
    code = """
import resource, time
from polyaxon_tracking import PreemptionHandler
resource.setrlimit(resource.RLIMIT_CPU, (1, 60))
with PreemptionHandler() as preemption:
    while not preemption.requested:
        pass
    began = time.process_time()
    while time.process_time() < began + 2.5:
        pass
    print("saved", flush=True)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (152, "saved\n"), process.stderr


NOBODY_LOOKS = """
import os, signal, time
from polyaxon_tracking import PreemptionHandler
with PreemptionHandler():
    os.kill(os.getpid(), getattr(signal, "{}"))
    time.sleep(0.1)
    print("to the end of the block", flush=True)
print("and on", flush=True)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_one_that_nobody_looked_at_ends_the_block(number: signal.Signals, status: int) -> None:
    code = NOBODY_LOOKS.format(number.name)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (status, "to the end of the block\n")


def test_an_exception_of_the_block_is_the_one_that_ends_it() -> None:
    def end() -> None:
        with PreemptionHandler():
            signal.raise_signal(signal.SIGTERM)
            raise KeyError

    with pytest.raises(KeyError):
        end()


def test_a_handler_that_was_there_runs() -> None:
    assert end(signal.SIGTERM, "0.01", "own") == (143, ["own handler", "saved"])


def test_the_handlers_that_were_there_come_back() -> None:
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
    before = [*map(signal.getsignal, numbers)]
    with PreemptionHandler() as preemption:
        assert not set(map(signal.getsignal, numbers)) & set(before)
        assert preemption.requested is None
    assert [*map(signal.getsignal, numbers)] == before


HANDLED = {
    "by the user": "signal.signal(signal.SIGUSR1, lambda *_: print('handled', flush=True))",
    "by the user, ignored": "signal.signal(signal.SIGUSR1, signal.SIG_IGN); print('handled', flush=True)",
    "by a handler that Python does not know": "faulthandler.register(signal.SIGUSR1, sys.stdout); sys.stdout.flush()",
}


@pytest.mark.parametrize("handler", HANDLED)
def test_a_signal_that_something_else_handles_is_no_request(handler: str) -> None:
    code = f"""
import faulthandler, os, signal, sys
from polyaxon_tracking import PreemptionHandler
{HANDLED[handler]}
with PreemptionHandler() as preemption:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert preemption.requested is None
print("to the end", flush=True)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    handled, *_, last = process.stdout.splitlines()
    assert "most recent call first" in handled or handled == "handled"
    assert last == "to the end"


def test_where_training_is_over_the_signal_does_what_it_did() -> None:
    preemption = PreemptionHandler(lambda _: False)
    preemption.install()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert preemption.requested is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_nothing_is_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with PreemptionHandler():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


EARLIER = {
    "put back": """
first = PreemptionHandler(lambda _: False)  # its training is over
first.install()
of_a_framework = signal.signal(number, lambda *_: None)  # which keeps what it found
first.uninstall()
signal.signal(number, of_a_framework)  # and puts it back when its training has failed
""",
    "kept by another": """
first = PreemptionHandler(lambda _: False)
first.install()
found = signal.getsignal(number)
signal.signal(number, lambda *arguments: found(*arguments))  # of a framework that does not clean up
first.uninstall()
""",
    "never taken away": """
first = PreemptionHandler(lambda _: False)  # of a framework that notifies nobody of exceptions
first.install()
""",
    "under way": """
first = PreemptionHandler()  # a training within which another one trains
first.install()
""",
}

TRAINING = """
import os, signal, sys, time
from polyaxon_tracking import PreemptionHandler
number = signal.Signals[sys.argv[1]]
{}
with PreemptionHandler() as second:
    os.kill(os.getpid(), number)
    print("requested", second.requested == number, flush=True)
    if "twice" in sys.argv:
        time.sleep(0.2)  # within 0.1 s it would be the same request
        os.kill(os.getpid(), number)
        print("continued", flush=True)
    second.exit()
"""


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_one_of_another_training_does_not_end_this(earlier: str, number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-c", TRAINING.format(EARLIER[earlier]), number.name]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (process.returncode, process.stdout) == (status, "requested True\n"), process.stderr
    process = subprocess.run([*command, "twice"], capture_output=True, text=True, check=False, timeout=300)
    assert (process.returncode, process.stdout) == (-number, "requested True\n"), process.stderr
