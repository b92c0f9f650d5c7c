"""Whatever the variables hold, the getters return what they promise or raise a TrackingError that shows no secret."""

from __future__ import annotations

import json
import os
import traceback
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

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

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("default")

# What an environment variable can hold: no NUL, no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT | st.sampled_from(["jobs", "experiments"]), inner),
).map(json.dumps)
VALUES = TEXT | DOCUMENTS

EXTREMES = [
    "[" * 100_000,
    '{"a":' * 100_000,
    "1" * 5_000,
    '{"a": ' + "1" * 5_000 + "}",
    "NaN",
    '{"a": "\\ud800"}',
    "\ufeff{}",
]


def is_path(value: object) -> bool:
    return type(value) is str


def extremes(test: Callable[[str], None]) -> Callable[[str], None]:
    for value in EXTREMES:
        test = example(value)(test)
    return test


@extremes
@given(VALUES)
def test_outputs_path(value: str) -> None:
    with mock.patch.dict(os.environ, {"POLYAXON_RUN_OUTPUTS_PATH": value}):
        path = get_outputs_path()
        assert path is None or is_path(path)


@extremes
@given(VALUES | TEXT.map("owner.project.runs.{}".format))
def test_outputs_path_of_an_instance(value: str) -> None:
    with mock.patch.dict(os.environ, {"POLYAXON_RUN_INSTANCE": value}):
        try:
            path = get_outputs_path()
        except TrackingError as error:
            assert "POLYAXON_RUN_INSTANCE" in str(error)  # noqa: PT017
        else:
            assert path is None or (
                is_path(path) and path.startswith("/plx-context/artifacts/") and path.count("/") == 4
            )


@extremes
@given(VALUES)
def test_references(value: str) -> None:
    with mock.patch.dict(os.environ, {"POLYAXON_REFS_OUTPUTS_PATHS": value}):
        try:
            references = get_outputs_refs_paths()
        except TrackingError as error:
            assert "POLYAXON_REFS_OUTPUTS_PATHS" in str(error)  # noqa: PT017
        else:
            assert references is None or all(
                kind in ("jobs", "experiments") and type(paths) is list and all(map(is_path, paths))
                for kind, paths in references.items()
            )


@extremes
@given(VALUES)
def test_data_paths(value: str) -> None:
    with mock.patch.dict(os.environ, {"POLYAXON_RUN_DATA_PATHS": value}):
        try:
            paths = get_data_paths()
            assert is_path(get_data_path("digits", default="data"))
        except TrackingError as error:
            assert "POLYAXON_RUN_DATA_PATHS" in str(error)  # noqa: PT017
        else:
            assert paths is None or all(is_path(name) and is_path(path) for name, path in paths.items())


@extremes
@given(VALUES)
def test_log_level(value: str) -> None:
    with mock.patch.dict(os.environ, {"POLYAXON_LOG_LEVEL": value}):
        try:
            level = get_log_level()
        except TrackingError as error:
            assert "POLYAXON_LOG_LEVEL" in str(error)  # noqa: PT017
        else:
            assert level is None or type(level) is int or (type(level) is str and level.isupper())


SECRET = "S3cr3tXyZzy"  # letters and digits, so that no pattern ends inside it
WITH_SECRETS = [
    f"s3://key:{SECRET}@bucket/run",
    f"s3://key:abc/{SECRET}/def@bucket/run",
    f"s3://{SECRET}@bucket",
    f"wasbs://container:{SECRET}@account.blob.core.windows.net/",
    f"https://host/data?sig={SECRET}",
    f"https://host/data?a=1&token={SECRET}&b=2",
    f'{{"secret_key": "{SECRET}"}}',
    f'{{"a": {{"AWS_SECRET_ACCESS_KEY": "{SECRET}", "x": 1}}}}',
    f"AccountName=a;AccountKey={SECRET}==;EndpointSuffix=core.windows.net",
    f"password={SECRET}",
    f'"api_key" : "{SECRET}"',
    f"s3:\\/\\/key:{SECRET}@bucket",
]
GETTERS = {
    "POLYAXON_RUN_INSTANCE": get_outputs_path,
    "POLYAXON_REFS_OUTPUTS_PATHS": get_outputs_refs_paths,
    "POLYAXON_RUN_DATA_PATHS": get_data_paths,
    "POLYAXON_LOG_LEVEL": get_log_level,
}


@pytest.mark.parametrize("variable", GETTERS)
@pytest.mark.parametrize("secret", WITH_SECRETS)
@given(before=TEXT.filter(lambda text: "secret" not in text), after=TEXT)
def test_no_secret_is_shown(variable: str, secret: str, before: str, after: str) -> None:
    value = f"{{{before} {secret} {after}"  # the brace makes it malformed for each of the getters
    with mock.patch.dict(os.environ, {variable: value}), pytest.raises(TrackingError) as raised:
        GETTERS[variable]()
    error = raised.value
    texts = [str(error), repr(error), "".join(traceback.format_exception(error)), repr(vars(error)), repr(error.args)]
    assert not [text for text in texts if SECRET in text]
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize(
    "value",
    [
        f'{{"private_key": "-----BEGIN PRIVATE KEY-----\\n{SECRET}\\n-----END PRIVATE KEY-----"}}',
        f'{{"password": "correct {SECRET}"}}',
        f'{{"password": "correct,{SECRET}"}}',
        f'{{"secret_key": "correct\\"{SECRET}"}}',
        f'{{"tokens": ["{SECRET}"]}}',
        f'{{"secret": {{"value": "{SECRET}"}}}}',
        json.dumps(json.dumps({"secret_key": SECRET})),
        f"SharedAccessSignature=sv=2020&sig={SECRET}",
        f"sv=2020&sig={SECRET}",
        f"Authorization: Bearer {SECRET}",
    ],
    ids=[
        "private key file",
        "with a blank",
        "with a comma",
        "with an escaped quote",
        "in a list",
        "in an object",
        "JSON within JSON",
        "shared access signature",
        "query without its URL",
        "bearer",
    ],
)
def test_no_secret_is_shown_whatever_its_shape(value: str) -> None:
    malformed = {"POLYAXON_RUN_DATA_PATHS": f"{value},"}
    with mock.patch.dict(os.environ, malformed), pytest.raises(TrackingError) as raised:
        get_data_paths()
    assert SECRET not in str(raised.value)


@given(st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=16, max_size=16), st.sampled_from(["AKIA", "ASIA"]))
def test_no_access_key_id_is_shown(rest: str, kind: str) -> None:
    with (
        mock.patch.dict(os.environ, {"POLYAXON_LOG_LEVEL": f"id {kind}{rest}"}),
        pytest.raises(TrackingError) as raised,
    ):
        get_log_level()
    assert rest not in str(raised.value)
