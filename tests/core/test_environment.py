"""The getters, over the variables of both generations of the platform."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polyaxon_tracking import (
    TrackingError,
    get_data_path,
    get_data_paths,
    get_log_level,
    get_outputs_path,
    get_outputs_refs_paths,
)

if TYPE_CHECKING:
    from collections.abc import Callable

OUTPUTS = "POLYAXON_RUN_OUTPUTS_PATH"
INSTANCE = "POLYAXON_RUN_INSTANCE"
REFS = "POLYAXON_REFS_OUTPUTS_PATHS"
DATA = "POLYAXON_RUN_DATA_PATHS"
LEVEL = "POLYAXON_LOG_LEVEL"
GETTERS: dict[str, Callable[[], object]] = {
    OUTPUTS: get_outputs_path,
    INSTANCE: get_outputs_path,
    REFS: get_outputs_refs_paths,
    DATA: get_data_paths,
    LEVEL: get_log_level,
}
UUID = "0f0e1c2d3b4a5968778695a4b3c2d1e0"


def message(getter: Callable[[], object]) -> str:
    with pytest.raises(TrackingError) as error:
        getter()
    assert isinstance(error.value, ValueError)
    return str(error.value)


# All of them


@pytest.mark.parametrize("variable", GETTERS)
def test_not_set_is_none(variable: str) -> None:
    assert GETTERS[variable]() is None


@pytest.mark.parametrize("value", ["", "  \n", "null", " null "], ids=["empty", "blank", "null", "null and blanks"])
@pytest.mark.parametrize("variable", GETTERS)
def test_blank_and_null_are_not_set(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    assert GETTERS[variable]() is None


@pytest.mark.parametrize("value", ["true", "True", "1", " yes "])
@pytest.mark.parametrize(
    ("variable", "set_to"),
    [
        (OUTPUTS, "/outputs"),
        (INSTANCE, f"o.p.runs.{UUID}"),
        (REFS, '{"jobs": ["/1"]}'),
        (DATA, '{"a": "/a"}'),
        (LEVEL, "INFO"),
    ],
)
def test_no_op_is_none(variable: str, set_to: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, set_to)
    assert GETTERS[variable]() is not None
    monkeypatch.setenv("POLYAXON_NO_OP", value)
    assert GETTERS[variable]() is None


def test_no_op_does_not_even_look_at_what_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_NO_OP", "true")
    for variable in GETTERS:
        monkeypatch.setenv(variable, "{malformed")
    assert [getter() for getter in GETTERS.values()] == [None] * 5
    assert get_data_path("digits", default="data") == "data"


@pytest.mark.parametrize("value", ["false", "FALSE", "0", "no", " off ", "n", "f", "", "null"])
def test_no_op_that_is_false(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAXON_NO_OP", value)
    monkeypatch.setenv(OUTPUTS, "/outputs")
    assert get_outputs_path() == "/outputs"


@pytest.mark.parametrize("variable", ["POLYAXON_NO_OP", "POLYAXON_IS_OFFLINE"])
def test_what_is_neither_true_nor_false(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSTANCE, f"o.p.runs.{UUID}")
    monkeypatch.setenv(variable, "ture")
    expected = (
        f"{variable} was received as 'ture'. Expected one of true, 1, t, yes, y, on, or of false, 0, f, no, n, off (any case). "
        f"Correct the variable, or unset it, which means false."
    )
    assert message(get_outputs_path) == expected
    if variable == "POLYAXON_NO_OP":
        assert {message(getter) for getter in GETTERS.values()} == {expected}


def test_the_environment_is_read_at_every_call_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/first", "/second"):
        monkeypatch.setenv(OUTPUTS, path)
        monkeypatch.setenv(DATA, f'{{"digits": "{path}"}}')
        before = dict(os.environ)
        assert get_outputs_path() == path
        assert get_data_paths() == {"digits": path}
        assert dict(os.environ) == before


def test_what_is_returned_is_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, '{"digits": "/digits"}')
    paths = get_data_paths()
    assert paths is not None
    paths["digits"] = "/elsewhere"
    assert get_data_paths() == {"digits": "/digits"}


# Outputs


@pytest.mark.parametrize(
    "path",
    ["/outputs/u/p/experiments/7", "outputs", "s3://bucket/u", "gs://bucket", "wasbs://c@a.blob.core.windows.net/"],
)
def test_the_outputs_path_is_passed_on_as_it_is(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTPUTS, path)
    assert get_outputs_path() == path


@pytest.mark.parametrize("variable", [OUTPUTS, "POLYAXON_CONTEXT_ROOT", "POLYAXON_OFFLINE_ROOT"])
@pytest.mark.parametrize(
    ("value", "root"),
    [(" /o\n", "/o"), ("s3://b/o\n", "s3://b/o"), ("~/o", "/home/ann/o"), ("s3://b/~", "s3://b/~")],
)
def test_paths_have_no_white_space_around_them_and_no_tilde(
    variable: str, value: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv(INSTANCE, f"o.p.runs.{UUID}")
    monkeypatch.setenv("POLYAXON_IS_OFFLINE", str("OFFLINE" in variable))
    monkeypatch.setenv(variable, value)
    below = {OUTPUTS: "", "POLYAXON_CONTEXT_ROOT": f"/artifacts/{UUID}/outputs"}
    assert get_outputs_path() == root + below.get(variable, f"/runs/{UUID}/outputs")


@pytest.mark.parametrize(
    ("root", "parts", "joined"),
    [
        ("/outputs", ("best.pt",), "/outputs/best.pt"),
        ("/outputs/", ("a", "b.pt"), "/outputs/a/b.pt"),
        ("/outputs", ("a/b", "c/"), "/outputs/a/b/c"),
        ("/outputs", ("", "a"), "/outputs/a"),
        ("/", ("a",), "/a"),
        ("/", ("",), "/"),
        ("s3://bucket", ("a.pt",), "s3://bucket/a.pt"),
        ("wasbs://c@a.blob.core.windows.net/", ("a", "b"), "wasbs://c@a.blob.core.windows.net/a/b"),
        ("/outputs", ("..a", "b..", "..."), "/outputs/..a/b../..."),
    ],
)
def test_names_are_joined_below_the_outputs_path(
    root: str, parts: tuple[str, ...], joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OUTPUTS, root)
    assert get_outputs_path(*parts) == joined


@pytest.mark.parametrize("part", ["..", "../a", "a/../../b", "/etc", "s3://other/a", "s3:/other/a", "a\\..\\b"])
def test_names_that_climb_out_are_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTPUTS, "/outputs")
    assert message(lambda: get_outputs_path("a", part)) == (
        f"Received the name {part!r} to join below the path '/outputs'. Expected a relative name that stays below it, such "
        f"as 'checkpoints/best.pt': leave out '..', a leading '/' and '://'."
    )


def test_off_the_cluster_there_is_nothing_to_join_below() -> None:
    assert get_outputs_path("best.pt") is None


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ({}, f"/plx-context/artifacts/{UUID}/outputs"),
        ({"POLYAXON_CONTEXT_ROOT": "/context/"}, f"/context/artifacts/{UUID}/outputs"),
        ({"POLYAXON_CONTEXT_ROOT": " "}, f"/plx-context/artifacts/{UUID}/outputs"),
        ({"POLYAXON_IS_OFFLINE": "true"}, f"/tmp/plx/offline/runs/{UUID}/outputs"),
        ({"POLYAXON_IS_OFFLINE": "1", "POLYAXON_OFFLINE_ROOT": "/off"}, f"/off/runs/{UUID}/outputs"),
        ({"POLYAXON_IS_OFFLINE": "false", "POLYAXON_OFFLINE_ROOT": "/off"}, f"/plx-context/artifacts/{UUID}/outputs"),
        ({OUTPUTS: "/older"}, "/older"),
        ({OUTPUTS: ""}, f"/plx-context/artifacts/{UUID}/outputs"),
    ],
    ids=[
        "default",
        "context root",
        "blank root",
        "offline",
        "offline root",
        "not offline",
        "older wins",
        "older blank",
    ],
)
def test_the_outputs_path_of_polyaxon_1_and_2(
    environment: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INSTANCE, f"owner.project.runs.{UUID}")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert get_outputs_path() == path
    assert get_outputs_path("a", "b") == f"{path}/a/b"


@pytest.mark.parametrize(
    "instance",
    [
        "owner",
        "owner.project.runs",
        "a.b.c.d.e",
        ".project.runs.1",
        "owner.project.jobs.1",
        "owner.project.runs.",
        "owner.project.runs.a/b",
    ],
)
def test_a_malformed_instance(instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSTANCE, instance)
    assert message(get_outputs_path) == (
        f"POLYAXON_RUN_INSTANCE was received as {instance!r}. Expected owner.project.runs.<uuid>, four parts between dots, as "
        f"Polyaxon 1.x and 2.x set it. Set POLYAXON_RUN_OUTPUTS_PATH to say directly where the outputs go, or unset "
        f"POLYAXON_RUN_INSTANCE off the cluster."
    )


# References


@pytest.mark.parametrize(
    ("value", "references"),
    [
        (
            '{"experiments": ["/b", "/a"], "jobs": ["gs://j"]}',
            {"experiments": ["/b", "/a"], "jobs": ["gs://j"]},
        ),
        ('{"jobs": ["/j"]}', {"jobs": ["/j"]}),
        ('{"jobs": [], "experiments": ["/a", "/a"]}', {"jobs": [], "experiments": ["/a", "/a"]}),
        ('{"jobs": null, "experiments": ["/a"]}', {"experiments": ["/a"]}),
        ("{}", {}),
    ],
    ids=["both", "one left out", "empty", "null", "none"],
)
def test_references_keep_the_users_order(
    value: str, references: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFS, value)
    found = get_outputs_refs_paths()
    assert found == references
    assert list(found or ()) == list(references)


REFS_EXPECTED = (
    'Expected a JSON object of lists of paths, such as {"jobs": ["/outputs/12"], "experiments": ["/outputs/7"]}. Correct the '
    "variable, or unset it off the cluster."
)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{jobs: []}", "it is not JSON: Expecting property name enclosed in double quotes at character 1"),
        ("/outputs/7", "it is not JSON: Expecting value at character 0"),
        ('["/outputs/7"]', "it is not an object"),
        ('{"experiments": "/outputs/7"}', "'experiments' is not a list of paths"),
        ('{"jobs": [7]}', "'jobs' is not a list of paths"),
        ('{"jobs": [""]}', "'jobs' is not a list of paths"),
        ('{"runs": ["/outputs/7"]}', "it has the key 'runs', which is neither 'jobs' nor 'experiments'"),
    ],
    ids=["invalid", "a path", "a list", "a string", "a number", "blank", "another key"],
)
def test_malformed_references(value: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFS, value)
    assert message(get_outputs_refs_paths) == f"{REFS} was received as {value!r}: {problem}. {REFS_EXPECTED}"


def test_a_misspelt_kind_of_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFS, '{"experiment": ["/outputs/7"]}')
    text = message(get_outputs_refs_paths)
    assert "it has the key 'experiment', which is neither 'jobs' nor 'experiments'. Expected a JSON object" in text
    assert text.endswith(
        """/outputs/7"]}. Did you mean 'experiments'? Correct the variable, or unset it off the cluster."""
    )


# Data


def test_data_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, '{"data2": "/data/2", "data3": "gs://data-bucket"}')
    assert get_data_paths() == {"data2": "/data/2", "data3": "gs://data-bucket"}


DATA_EXPECTED = (
    'Expected a JSON object of paths by name, such as {"digits": "/data/digits", "faces": "gs://faces"}. Correct the '
    "variable, or unset it off the cluster."
)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{'a': '/a'}", "it is not JSON: Expecting property name enclosed in double quotes at character 1"),
        ('{"a": "/a"', "it is not JSON: Expecting ',' delimiter at character 10"),
        ('["/a"]', "it is not an object"),
        ("7", "it is not an object"),
        ('{"a": 7}', "the value of 'a' is not a path"),
        ('{"a": null}', "the value of 'a' is not a path"),
        ('{"a": ["/a"]}', "the value of 'a' is not a path"),
        ('{"a": " "}', "the value of 'a' is not a path"),
    ],
    ids=[
        "single quotes",
        "cut off",
        "a list",
        "a number",
        "number as path",
        "null as path",
        "list as path",
        "blank path",
    ],
)
def test_malformed_data_paths(value: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, value)
    received = ascii(value)
    assert message(get_data_paths) == f"{DATA} was received as {received}: {problem}. {DATA_EXPECTED}"


def test_a_long_value_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, "[" + "1, " * 1000)
    assert message(get_data_paths) == (
        f"{DATA} was received as '[{'1, ' * 66}1'... (3,001 characters): it is not JSON: Expecting value at character 3001. {DATA_EXPECTED}"
    )


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, '{"digits": "/data/digits"}')
    assert get_data_path("digits") == "/data/digits"
    assert get_data_path("digits", default="data/digits") == "/data/digits"
    assert get_data_path("faces", default="data/faces") == "data/faces"


def test_an_unknown_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, '{"faces": "/f", "digits": "/d"}')
    assert message(lambda: get_data_path("digts")) == (
        "Received the dataset name 'digts'. Expected one of those in POLYAXON_RUN_DATA_PATHS: 'faces', 'digits'. Did you mean "
        "'digits'?"
    )
    assert message(lambda: get_data_path("DIGITS")).endswith("Did you mean 'digits'?")
    assert message(lambda: get_data_path("x")).endswith("'faces', 'digits'.")


def test_a_dataset_where_the_run_has_none() -> None:
    assert message(lambda: get_data_path("digits")) == (
        "Received the dataset name 'digits', but POLYAXON_RUN_DATA_PATHS is not set, so this run has no datasets. In a cluster, "
        "ask for it in the polyaxonfile; elsewhere, give the path on this machine (`default=` of get_data_path, or a mapping "
        "from name to path in `datasets=` of the callbacks)."
    )
    assert get_data_path("digits", default="data/digits") == "data/digits"


def test_a_dataset_where_the_variable_is_set_to_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, "{}")
    assert "is not set" not in message(lambda: get_data_path("digits"))


# Log level


@pytest.mark.parametrize(
    ("value", "level"),
    [(name, name) for name in ("NOTSET", "DEBUG", "INFO", "WARN", "WARNING", "ERROR", "FATAL", "CRITICAL")]
    + [("info", "INFO"), (" Warning ", "WARNING"), ("20", "INFO"), ("0", "NOTSET"), ("015", 15), ("1000", 1000)],
)
def test_log_levels(value: str, level: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL, value)
    assert get_log_level() == level
    logger = logging.getLogger("of no one")
    logger.setLevel(get_log_level() or "missing")  # as `basicConfig` does
    assert logger.level == (level if isinstance(level, int) else getattr(logging, level))


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("INFOS", " Did you mean 'INFO'?"),
        ("warnign", " Did you mean 'WARNING'?"),
        ("loud", ""),
        ("-10", ""),
        ("1.5", ""),
        ("99999", ""),
        ("\u0662", ""),
    ],
)
def test_an_unknown_log_level(value: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL, value)
    assert message(get_log_level) == (
        f"POLYAXON_LOG_LEVEL was received as {value!a}. Expected one of NOTSET, DEBUG, INFO, WARN, WARNING, ERROR, FATAL, CRITICAL "
        f"(any case) or a number, such as 20.{hint} Correct `logging: level:` in the polyaxonfile, or unset the variable."
    )


# Arguments


@pytest.mark.parametrize("part", [3, None, b"a"])
@pytest.mark.parametrize("root", [None, "/outputs"], ids=["off the cluster", "in it"])
def test_a_part_that_is_no_name(part: Any, root: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if root is not None:
        monkeypatch.setenv(OUTPUTS, root)
    assert message(lambda: get_outputs_path("a", part)) == (
        f"Received part={part!r}. Expected a path or a URL. Give a string, or a pathlib.Path for a local path."
    )


def test_a_part_may_be_a_path_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTPUTS, "s3://bucket/run")
    assert get_outputs_path(Path("a/b"), "", Path("c.pt")) == "s3://bucket/run/a/b/c.pt"
    assert message(lambda: get_outputs_path(Path("..") / "a")).startswith("Received the name '../a' to join below")


def test_a_dataset_name_that_is_no_string(monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(lambda: get_data_path(3)) == "Received the dataset name 3. Expected a string, such as 'digits'."  # type: ignore[arg-type]
    monkeypatch.setenv(DATA, '{"a": "/a"}')
    assert message(lambda: get_data_path(["a"], "/a")).startswith("Received the dataset name ['a']. Expected a string")  # type: ignore[call-overload]


# URLs with one slash


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (OUTPUTS, "s3:/key:hunter2@bucket/run"),
        ("POLYAXON_CONTEXT_ROOT", "s3:/key:hunter2@bucket/run"),
        (DATA, '{"digits": "s3:/key:hunter2@bucket/run"}'),
        (REFS, '{"jobs": ["s3:/key:hunter2@bucket/run"]}'),
    ],
)
def test_a_url_with_one_slash_is_no_directory(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSTANCE, f"o.p.runs.{UUID}")
    monkeypatch.setenv(variable, value)
    told = message(GETTERS.get(variable, get_outputs_path))
    assert told.startswith(f"{variable} was received as ")
    assert "a URL has two slashes after its scheme" in told
    assert " Did you mean 's3://***@bucket/run'? Correct the variable" in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    "path", ["C:/outputs", "./s3:/outputs", "/mnt/s3:/outputs", "run:7/outputs", "file:///outputs"]
)
def test_what_only_resembles_a_url_is_a_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTPUTS, path)
    assert get_outputs_path() == path
