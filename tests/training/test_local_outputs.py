"""Off the cluster, each start has its own directory below ``./outputs``, and its processes share that directory."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import Run

if TYPE_CHECKING:
    from collections.abc import Callable

# Prints its version and whether it resumes, in one write, because ranks share their standard output.
SCRIPT = """
import os, sys
from polyaxon_tracking.training import Run
run = Run(**eval(sys.argv[1]))
os.write(1, f"{os.path.basename(run.outputs_path)} {run.should_resume}\\n".encode())
"""


def version(run: Run) -> str:
    assert Path(run.outputs_path).is_dir()
    return os.path.relpath(run.outputs_path, "outputs")


def started(script: str = SCRIPT, variables: dict[str, str] | None = None) -> Any:
    if not Path("script.py").exists():  # an earlier start may be reading the file
        Path("script.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, "script.py", "{}"],
        env=os.environ | (variables or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def printed(process: Any) -> list[str]:
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return sorted(text.splitlines())


def with_checkpoints(*versions: str) -> None:
    for name in versions:
        Path("outputs", name, "checkpoints", "resume").mkdir(parents=True)
        Path("outputs", name, "checkpoints", "resume", "step=0000000004.ckpt").write_text("state")


def test_each_start_has_its_own_directory_and_all_its_trainings_share_it(new_process: Callable[[], None]) -> None:
    assert [version(Run()), version(Run(name="fold-1")), version(Run(resume=True))] == ["version_0"] * 3
    new_process()
    assert [version(Run()), version(Run())] == ["version_1"] * 2


def test_trials_in_threads_share_the_directory() -> None:
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: version(Run()), range(8))) == {"version_0"}


def test_another_working_directory_has_its_own_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Run()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    assert Run().outputs_path == str(tmp_path / "other" / "outputs" / "version_0")
    monkeypatch.chdir("..")
    assert Run().outputs_path == first.outputs_path


def test_starts_at_the_same_moment_have_a_directory_each() -> None:
    script = SCRIPT.replace("run =", "sys.stdin.readline()\nrun =", 1)
    starts = [started(script=script) for _ in range(6)]
    for start in starts:
        start.stdin.write("\n")
        start.stdin.flush()
    assert sorted(line for start in starts for line in printed(start)) == [f"version_{n} False" for n in range(6)]


def test_resume_uses_the_newest_with_checkpoints(new_process: Callable[[], None]) -> None:
    assert version(Run(resume=True)) == "version_0"
    new_process()
    with_checkpoints("version_9", "version_10", "version_best", "version_011")
    # Of starts that ended before their first checkpoint. Hugging Face's Trainer creates its directory at once.
    Path("outputs", "version_11", "checkpoints", ".staging-1").mkdir(parents=True)
    Path("outputs", "version_11", "checkpoints", ".staging-1", "unfinished").write_text("")
    Path("outputs", "version_12", "checkpoints", "bert").mkdir(parents=True)
    assert version(Run(resume=True)) == "version_10"
    new_process()
    assert version(Run()) == "version_13"
    new_process()
    assert version(Run(resume=True)) == "version_10"


def test_without_any_checkpoints_resume_uses_the_newest() -> None:
    for name in ("version_2", "version_3"):
        Path("outputs", name).mkdir(parents=True)
    assert version(Run(resume=True)) == "version_3"


def test_a_notebook_resumes_where_its_kernel_has_trained(new_process: Callable[[], None]) -> None:
    new_process()
    first = Run()
    with_checkpoints("version_7")  # version_7 is of another kernel, which started later
    assert Run(resume=True).outputs_path == first.outputs_path


def test_one_line_says_which_directory(
    tmp_path: Path, new_process: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    Run()
    with_checkpoints("version_0")
    new_process()
    Run()
    new_process()
    Run(resume=True)
    start = f"POLYAXON_RUN_OUTPUTS_PATH is not set: outputs go to {tmp_path}/outputs/version_"
    assert caplog.messages == [
        f"{start}0",
        f"{start}1; resume=True would use version_0",
        f"{start}0, the newest with checkpoints",
    ]


# Several processes


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("before", [True, False], ids=["after a Run", "before any Run"])
def test_processes_of_multiprocessing_share_the_directory(
    method: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("functions.py").write_text(
        "from polyaxon_tracking.training import Run\ndef train(_):\n    return Run().outputs_path\n"
    )
    runs = [Run()] if before else []
    functions = __import__("functions")
    try:
        with multiprocessing.get_context(method).Pool(2) as pool:
            paths = pool.map(functions.train, range(4), chunksize=1)
    finally:
        del sys.modules["functions"]
    # Of two processes that begin at the same moment, the one that is second removes its directory again.
    assert set(paths) <= {str(tmp_path / "outputs" / f"version_{number}") for number in ([0] if before else [0, 1])}
    assert len(set(paths)) == 1
    assert {pickle.loads(pickle.dumps(run)).outputs_path for run in runs} <= set(paths)


@pytest.mark.parametrize(
    ("variable", "ranks"),
    [("WORLD_SIZE", "2"), ("SLURM_STEP_NUM_TASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "2"), ("WORLD_SIZE", "1")],
)
def test_ranks_that_one_launcher_starts_share_a_directory(variable: str, ranks: str) -> None:
    """The launchers set these variables for the processes that they start; here, this process is the launcher."""
    starts = [started(variables={variable: ranks}) for _ in range(4)]
    versions = {line for start in starts for line in printed(start)}
    assert len(versions) == (1 if ranks == "2" else 4)


def test_a_file_system_without_symbolic_links(monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]) -> None:
    """No such file system can be made here, so the call of the system fails."""

    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", fail)
    assert version(Run()) == "version_0"
    new_process()
    assert version(Run()) == "version_1"
    new_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrackingError, match=r"cannot be written to.*set POLYAXON_RUN_OUTPUTS_PATH to another path"):
        Run()
