"""`polyaxon-tracking doctor`: what it finds, what it advises, and what it keeps to itself."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from mounts import without_a_server
from packaging.version import Version
from reports import ACCESS_KEYS, DATA, INSTANCE, LEVEL, OUTPUTS, REFS, SECRET, on_a_terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from reports import Report

    Command = Callable[..., subprocess.CompletedProcess[str]]

# Of the oldest Keras that is allowed, which is tested too.
WARNED_OF = ["keras"] if Version(metadata.version("keras")) < Version("3.12.1") else []


def distribution(directory: Path, name: str, version: str, *, requires: str = "", entry_points: str = "") -> None:
    """Write the metadata of an installed package into `directory`."""
    information = directory / f"{name}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
    (information / "entry_points.txt").write_text(entry_points)


def before(directory: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}


# Off the cluster, and in it


def test_off_the_cluster_all_is_well_and_nothing_is_left_behind(doctor: Callable[..., Report], tmp_path: Path) -> None:
    report = doctor()
    assert report.code == 0
    assert report.status_and_value(OUTPUTS) == ("info", "not set")
    assert report.status_and_value("outputs") == ("ok", f"{tmp_path}/outputs")
    assert report.rows["outputs"]["source"] == "the default off the cluster: each start has its own version_N there"
    assert report.status_and_value("outputs: exists") == ("info", f"no: made with the first save, below {tmp_path}")
    for tried in ("writable", "fsync", "atomic rename", "reads back", "changes in place"):
        assert report.status_and_value(f"outputs: {tried}") == ("ok", "yes")
    assert report.status_and_value("outputs: free space")[0] in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []


def test_the_variables_of_notices_have_rows_where_they_are_set(
    doctor: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not {"POLYAXON_JOB_END_TIME", "POLYAXON_PREEMPTION_NOTICES"} & doctor().rows.keys()
    monkeypatch.setenv("POLYAXON_JOB_END_TIME", "4h")
    monkeypatch.setenv("POLYAXON_PREEMPTION_NOTICES", "aws")
    report = doctor()
    assert report.code == 1
    assert report.status_and_value("POLYAXON_JOB_END_TIME") == ("error", "malformed")
    assert "Expected the UNIX time" in report.rows["POLYAXON_JOB_END_TIME"]["advice"]
    assert report.status_and_value("POLYAXON_PREEMPTION_NOTICES") == ("ok", "'aws'")


def test_a_run(doctor: Callable[..., Report], tmp_path: Path) -> None:
    for name in ("outputs", "digits", "1"):
        (tmp_path / name).mkdir()
    (tmp_path / "digits" / "test.csv").touch()
    report = doctor(
        env={
            OUTPUTS: f"{tmp_path}/outputs",
            DATA: json.dumps({"digits": f"{tmp_path}/digits"}),
            REFS: json.dumps({"experiments": [f"{tmp_path}/1"]}),
            LEVEL: "info",
        }
    )
    assert report.code == 0
    assert report.status_and_value(OUTPUTS) == ("ok", f"{tmp_path}/outputs")
    assert report.status_and_value(DATA) == ("ok", {"digits": f"{tmp_path}/digits"})
    assert report.status_and_value(REFS) == ("ok", {"experiments": [f"{tmp_path}/1"]})
    assert report.status_and_value(LEVEL) == ("ok", "INFO")
    assert report.rows["outputs"]["source"] == OUTPUTS
    assert report.status_and_value("outputs: exists") == ("ok", "yes")
    for name, path in (("data digits", "digits"), ("experiments 1", "1")):
        status, value = report.status_and_value(name)
        assert status == "ok"
        assert str(value).startswith(f"{tmp_path}/{path}: can be read, writable, ")


def test_the_newer_platform(doctor: Callable[..., Report], tmp_path: Path) -> None:
    report = doctor(env={INSTANCE: "owner.project.runs.0f0e", "POLYAXON_CONTEXT_ROOT": str(tmp_path)})
    assert report.status_and_value("outputs") == ("ok", f"{tmp_path}/artifacts/0f0e/outputs")
    assert report.rows["outputs"]["source"] == f"{INSTANCE}, POLYAXON_CONTEXT_ROOT"
    offline = {"POLYAXON_IS_OFFLINE": "true", "POLYAXON_OFFLINE_ROOT": str(tmp_path)}
    report = doctor(env={INSTANCE: "owner.project.runs.0f0e"} | offline)
    assert report.status_and_value("outputs") == ("ok", f"{tmp_path}/runs/0f0e/outputs")
    assert report.rows["outputs"]["source"] == f"{INSTANCE}, POLYAXON_OFFLINE_ROOT"


def test_the_older_variable_wins(doctor: Callable[..., Report], tmp_path: Path) -> None:
    report = doctor(env={INSTANCE: "malformed", OUTPUTS: str(tmp_path)})
    assert report.code == 0
    assert report.status_and_value("outputs") == ("ok", str(tmp_path))
    assert report.rows[INSTANCE]["source"] == f"not read, since {OUTPUTS} is set"


def test_no_op(doctor: Callable[..., Report], tmp_path: Path) -> None:
    report = doctor(env={"POLYAXON_NO_OP": "true", OUTPUTS: "/elsewhere", DATA: "{malformed"})
    assert report.code == 0
    assert report.with_status("warning") == [*WARNED_OF, "POLYAXON_NO_OP"]
    assert report.rows[DATA]["source"] == "not read, since POLYAXON_NO_OP is true"
    assert report.status_and_value("outputs") == ("ok", f"{tmp_path}/outputs")


def test_a_misspelt_variable_is_reported(doctor: Callable[..., Report]) -> None:
    report = doctor(env={"POLYAXON_RUN_OUTPUT_PATH": "/outputs", "POLYAXON_LOGLEVEL": "info"})
    for name, meant in (("POLYAXON_RUN_OUTPUT_PATH", OUTPUTS), ("POLYAXON_LOGLEVEL", LEVEL)):
        assert report.status_and_value(name) == ("warning", "not read")
        assert report.advice(name) == f"Did you mean {meant}?"


def test_what_else_the_platform_sets_is_not_taken_for_misspelt(doctor: Callable[..., Report]) -> None:
    names = [f"POLYAXON_{name}" for name in ("AGENT_INSTANCE", "IN_CLUSTER", "IS_MANAGED", "NO_API", "UI_OFFLINE")]
    report = doctor(env=dict.fromkeys(names, "true"))
    assert report.status_and_value("others of Polyaxon") == ("info", ", ".join(names))
    assert report.rows["others of Polyaxon"]["source"] == "not read"
    assert report.with_status("warning") == WARNED_OF


@pytest.mark.parametrize("variable", ["POLYAXON_NO_OP", "POLYAXON_IS_OFFLINE"])
def test_what_is_neither_true_nor_false(doctor: Callable[..., Report], variable: str) -> None:
    report = doctor(env={variable: "ture", LEVEL: "info"})
    assert report.with_status("error") == [variable]
    assert report.advice(variable).startswith(f"{variable} was received as 'ture'. Expected one of true, ")
    known = ("ok", "INFO") if variable == "POLYAXON_IS_OFFLINE" else ("info", "'info'")
    assert report.status_and_value(LEVEL) == known


@pytest.mark.parametrize("value", ["", " ", "null"])
def test_blank_counts_as_not_set(doctor: Callable[..., Report], value: str) -> None:
    report = doctor(env=dict.fromkeys((OUTPUTS, REFS, DATA, LEVEL, INSTANCE, ACCESS_KEYS), value))
    assert report.code == 0
    assert report.status_and_value(DATA) == ("info", f"{value!r}, which counts as not set")


# What is wrong


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        (DATA, "{", "POLYAXON_RUN_DATA_PATHS was received as '{': it is not JSON"),
        (DATA, "[]", "POLYAXON_RUN_DATA_PATHS was received as '[]': it is not an object."),
        (REFS, '{"runs": []}', "POLYAXON_REFS_OUTPUTS_PATHS was received as '{\"runs\": []}': it has the key 'runs'"),
        (LEVEL, "loud", "POLYAXON_LOG_LEVEL was received as 'loud'. Expected one of "),
        (INSTANCE, "owner.project", "POLYAXON_RUN_INSTANCE was received as 'owner.project'. Expected "),
        (ACCESS_KEYS, "{", "Received malformed credentials of a store in the variable POLYSTORES_"),
        (ACCESS_KEYS, '{"s3://bucket": {"secret_key": "GONE"}}', "POLYSTORES_RUN_STORES_ACCESS_KEYS says that the "),
    ],
)
def test_a_malformed_variable(doctor: Callable[..., Report], variable: str, value: str, advice: str) -> None:
    report = doctor(env={variable: value})
    assert report.code == 1
    assert report.with_status("error") == [variable]
    assert report.advice(variable).startswith(advice)


def test_an_outputs_path_that_is_read_only(
    doctor: Callable[..., Report], obey_modes: Callable[[], None], tmp_path: Path
) -> None:
    (tmp_path / "outputs").mkdir(mode=0o555)
    report = doctor(env={OUTPUTS: f"{tmp_path}/outputs/7"}, preexec_fn=obey_modes)
    assert report.code == 1
    assert report.status_and_value("outputs: writable") == ("error", "no: Permission denied")
    assert report.advice("outputs: writable") == (
        "Mount the volume for writing, or set POLYAXON_RUN_OUTPUTS_PATH to another path."
    )


def test_an_outputs_path_that_is_a_file(doctor: Callable[..., Report], tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    report = doctor(env={OUTPUTS: f"{tmp_path}/outputs"})
    assert report.with_status("error") == ["outputs: exists"]
    assert report.advice("outputs: exists") == f"Move it away, or set {OUTPUTS} to another path."
    report = doctor(env={OUTPUTS: f"{tmp_path}/outputs/7"})
    assert report.status_and_value("outputs: exists") == ("error", f"{tmp_path}/outputs: Not a directory")


def test_disks_that_take_no_bytes(
    doctor: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands in for the read-only disk of a container."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # it would write at the end
    report = doctor(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert report.status_and_value("outputs: writable") == ("error", "no: File too large")
    assert report.with_status("warning") == [*WARNED_OF, "TMPDIR"]
    assert report.advice("TMPDIR") == "Set TMPDIR to a directory that this user may write to."
    assert list(tmp_path.iterdir()) == []


def test_a_mount_whose_file_system_takes_no_directories(doctor: Callable[..., Report], tmp_path: Path) -> None:
    report = doctor(env={OUTPUTS: "/proc/self"})
    assert report.code == 1
    assert report.rows["outputs: file system"]["value"] == "proc at /proc"
    assert report.with_status("error") == ["outputs: writable"]


def test_a_mount_whose_server_is_gone(doctor: Callable[..., Report], tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    with without_a_server(mount):
        report = doctor(env={OUTPUTS: f"{mount}/7", DATA: json.dumps({"digits": str(mount)})})
    again = "Mount the volume again, because its server does not respond"
    assert report.with_status("error") == ["outputs: exists", "data digits"]
    assert report.status_and_value("outputs: exists") == ("error", f"{mount}/7: Transport endpoint is not connected")
    assert report.advice("outputs: exists") == f"{again}, or set {OUTPUTS} to another path."
    assert report.advice("data digits") == f"{again}, or correct the path."


def test_a_mount_that_takes_only_small_files(
    doctor: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    report = doctor(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert report.status_and_value("outputs: writable") == ("error", "no: File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_mount_that_cannot_change_files_in_place(doctor: Callable[..., Report], tmp_path: Path) -> None:
    """As buckets are mounted without a cache; no such file system can be made here, so one call of the system fails."""
    code = "import os\ndef lseek(*_): raise OSError(95, os.strerror(95))\nos.lseek = lseek"
    (tmp_path / "sitecustomize.py").write_text(code)
    report = doctor(env=before(tmp_path))
    assert report.status_and_value("outputs: reads back") == ("ok", "yes")
    assert report.status_and_value("outputs: changes in place") == ("warning", "no: Operation not supported")
    assert report.advice("outputs: changes in place").startswith("Mount the volume with a cache for writing")


def test_a_file_system_that_goes_with_the_power(doctor: Callable[..., Report]) -> None:
    report = doctor(env={OUTPUTS: "/dev/shm/polyaxon-tracking-test"})
    assert report.status_and_value("outputs: file system") == ("warning", "tmpfs at /dev/shm")
    assert report.code == 0


def test_data_that_is_missing_is_wrong_and_a_reference_may_be(doctor: Callable[..., Report], tmp_path: Path) -> None:
    report = doctor(env={DATA: '{"digits": "/nowhere"}', REFS: '{"jobs": ["/nowhere/12"]}'})
    assert report.with_status("error") == ["data digits"]
    assert report.status_and_value("data digits") == ("error", "/nowhere: there is nothing")
    assert report.status_and_value("jobs 1") == ("warning", "/nowhere/12: there is nothing")


def test_data_that_may_not_be_read(
    doctor: Callable[..., Report], obey_modes: Callable[[], None], tmp_path: Path
) -> None:
    (tmp_path / "digits").mkdir(mode=0o300)
    (tmp_path / "file").write_text("0,1")
    (tmp_path / "file").chmod(0o444)
    paths = {"digits": "digits", "file": "file"}
    report = doctor(env={DATA: json.dumps(paths)}, preexec_fn=obey_modes)
    assert report.status_and_value("data digits") == ("error", "digits: Permission denied")
    status, value = report.status_and_value("data file")
    assert (status, str(value).startswith("file: can be read, ")) == ("ok", True)


# What is installed


def test_no_framework_is_imported(tmp_path: Path) -> None:
    code = "import json, sys; from polyaxon_tracking.cli.doctor.report import examine; examine(); print(json.dumps(list(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    frameworks = {"torch", "lightning", "pytorch_lightning", "keras", "tensorflow", "jax", "numpy", "fsspec"}
    assert not frameworks & set(json.loads(output))


@pytest.mark.parametrize(("keras", "mended"), [("3.10.0", "3.12.1"), ("3.12.0", "3.12.1"), ("3.13.1", "3.13.2")])
def test_versions_with_holes(doctor: Callable[..., Report], tmp_path: Path, keras: str, mended: str) -> None:
    distribution(tmp_path, "torch", "2.9.1+cpu")
    distribution(tmp_path, "keras", keras)
    report = doctor(env=before(tmp_path))
    assert report.code == 0
    assert report.with_status("warning")[:2] == ["torch", "keras"]
    assert report.status_and_value("torch") == ("warning", "2.9.1+cpu")
    assert f"Versions before {mended} have known holes in loading files." in report.advice("keras")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *(("torch", "2.10.0"), ("torch", "2.13.0+cpu"), ("torch", "3.0")),
        *(("keras", "3.12.1"), ("keras", "3.12.4"), ("keras", "3.13.2"), ("keras", "3.14.0"), ("keras", "4.0")),
    ],
)
def test_versions_without(doctor: Callable[..., Report], tmp_path: Path, name: str, version: str) -> None:
    distribution(tmp_path, name, version)
    assert doctor(env=before(tmp_path)).status_and_value(name) == ("ok", version)


def test_a_release_with_malicious_code(doctor: Callable[..., Report], tmp_path: Path) -> None:
    distribution(tmp_path, "lightning", "2.6.2")
    report = doctor(env=before(tmp_path))
    assert (report.code, report.with_status("error")) == (1, ["lightning"])
    assert "GHSA-w37p-236h-pfx3" in report.advice("lightning")


def test_integrations_are_found_with_what_they_need(doctor: Callable[..., Report], tmp_path: Path) -> None:
    distribution(
        tmp_path,
        "polyaxon-other",
        "1.0",
        requires="Provides-Extra: mine\nRequires-Dist: no-such-framework>=1; extra == 'mine'\n",
        entry_points="[polyaxon_tracking.integrations]\nmine = polyaxon_other:Callback\n",
    )
    report = doctor(env=before(tmp_path))
    assert report.status_and_value("polyaxon_other") == ("info", "Callback: no-such-framework is not installed")
    for framework in ("keras", "lightning", "torch", "transformers"):
        name = "TrainingLoop" if framework == "torch" else "PolyaxonCallback"
        missing = find_spec(framework) is None  # on other Pythons, without torch
        expected = ("info", f"{name}: {framework} is not installed") if missing else ("ok", name)
        assert report.status_and_value(f"polyaxon_{framework}") == expected


def test_keras_without_a_backend(tmp_path: Path) -> None:
    """In an interpreter that finds no other packages than these, and Python's own."""
    entry_point = "[polyaxon_tracking.integrations]\nkeras = polyaxon_keras:PolyaxonCallback\n"
    requires = "Provides-Extra: keras\nRequires-Dist: keras; extra == 'keras'\n"
    distribution(tmp_path, "polyaxon-tracking", "0.1.0", requires=requires, entry_points=entry_point)
    distribution(tmp_path, "keras", "3.15.1")
    own = "[path for path in sys.path if path.startswith(sys.base_prefix) and 'site-packages' not in path]"
    code = f"import sys; from polyaxon_tracking.cli.doctor import versions; sys.path[:] = [{str(tmp_path)!r}, *{own}]; print(*versions.integrations())"

    def printed() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert "PolyaxonCallback: a backend of Keras (tensorflow, torch or jax) is not installed" in printed()
    distribution(tmp_path, "jax", "0.10.2")
    assert "is not installed" not in printed()


# Views


def test_only_what_is_wrong(command: Command, doctor: Callable[..., Report]) -> None:
    wrong = {"POLYAXON_LOGLEVEL": "info", DATA: "{"}
    everything = doctor(env=wrong)
    report = json.loads(command("doctor", "--problems", "--json", env=wrong).stdout)
    assert [row["name"] for row in report["checks"]] == [
        name for name, row in everything.rows.items() if row["status"] in ("warning", "error")
    ]
    assert (report["ok"], report["errors"]) == (False, 1)
    process = command("doctor", "--problems", env=wrong)
    assert process.returncode == 1
    lines = process.stdout.splitlines()
    assert "  error    POLYAXON_RUN_DATA_PATHS  malformed" in lines
    assert not [line for line in lines if line.startswith(("  ok", "  info", "Paths", "Integrations"))]
    assert lines[-1].startswith("1 error, ")


@pytest.mark.parametrize("columns", [60, 80])
def test_on_a_terminal_lines_are_wrapped_between_words(columns: int) -> None:
    name = f"POLYAXON_{'X' * 10}"
    printed = on_a_terminal(
        "doctor", COLUMNS=str(columns), NO_COLOR="1", **{DATA: "{'a': 1}", f"{name}_1": "", f"{name}_2": ""}
    )
    lines = printed.replace("\r", "").splitlines()
    too_long = [line for line in lines if len(line) > columns]
    assert all(len(line.split()) == 1 for line in too_long), too_long  # one path, or one name
    below = [line.strip() for line in lines if line.startswith(" " * 11)]
    advice = " ".join(below)
    assert (
        'Expected a JSON object of paths by name, such as {"digits": "/data/digits", "faces": "gs://faces"}.' in advice
    )
    assert f"{name}_1, {name}_2" in " ".join(line.strip() for line in lines)


# Secrets


def test_no_secret_is_shown(command: Command) -> None:
    environment = {
        OUTPUTS: "/outputs",
        DATA: "{'faces': 's3://AKIA:" + SECRET + "@bucket/faces'}",
        REFS: '{"jobs": ["/1"], "token": "' + SECRET + '"}',
        LEVEL: f"https://host/level?sig={SECRET}",
        ACCESS_KEYS: '{"s3://bucket": {"store": "s3", "secret_key": "AKIA' + SECRET + '/+"}}',
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://user:{SECRET}@127.0.0.1",
        "AZURE_STORAGE_CONNECTION_STRING": f"AccountKey={SECRET}",
    }
    for arguments in (["doctor"], ["doctor", "--json"]):
        process = command(*arguments, env=environment)
        assert process.returncode == 1
        assert SECRET not in process.stdout + process.stderr
        assert "AWS_ENDPOINT_URL, AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_CONNECTION_STRING" in process.stdout


def test_what_moves_the_cursor_is_escaped(command: Command) -> None:
    process = command("doctor", env={OUTPUTS: "/outputs\x1b[2J", DATA: '{"a\\u001b[2J": "/a\\u001b[2J"}'})
    assert "\x1b" not in process.stdout
    assert "/outputs\\x1b[2J" in process.stdout


# The text


def test_the_text_says_the_same(command: Command, doctor: Callable[..., Report]) -> None:
    environment = {DATA: '{"digits": "/nowhere"}', LEVEL: "loud"}
    process = command("doctor", env=environment)
    assert (process.returncode, process.stderr) == (1, "")
    lines = process.stdout.splitlines()
    assert lines[-1] == ("2 errors, 1 warning" if WARNED_OF else "2 errors, 0 warnings")
    for name, row in doctor(env=environment).rows.items():
        assert [line for line in lines if re.match(rf"  {row['status']} +{re.escape(name)}  ", line)], name
        if row["advice"]:
            assert f"           {row['advice']}" in lines
