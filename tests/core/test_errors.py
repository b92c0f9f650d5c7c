"""What is masked in messages: secrets, and no more than that."""

from __future__ import annotations

import pytest

from polyaxon_tracking.redaction import mask_secrets, mask_urls


@pytest.mark.parametrize("text", ["Unable to locate credentials", "Received an invalid token.", "In asia-east1"])
def test_a_word_after_which_nothing_comes_is_left(text: str) -> None:
    assert mask_secrets(text) == text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("password=hunter", "passw***"),
        ("password: hunter", "passw***"),
        ("Wrong password. It was: hunter", "Wrong passw***"),
        ("Wrong password hunter", "Wrong passw***"),
        ('{"token": "hunter"}', '{"token***'),
        ("{'token': 'hunter'}", "{'token***"),
        ("the secret 'hunter' is wrong", "the secret***"),
        ("<Secret>hunter</Secret>", "<Secret***"),
        ("no such token aB3xyz", "no such token***"),
        ("secret_key hunter", "secret***"),
        ("api_key hunter", "api_key***"),
        ("AccountName=a;AccountKey=hunter", "AccountName=a;AccountKey***"),
        ("Authorization: Basic hunter", "Authorization***"),
        ("Bearer hunter", "Bearer***"),
        ("-----BEGIN PRIVATE KEY-----", "-----BEGIN***"),
        ("id AKIAIOSFODNN7EXAMPLE", "id AKIA***"),
    ],
)
def test_all_that_may_be_a_secret_is_cut(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("ftp://alice:pa'ss\"w<o>rd@host/a", "ftp://***@host/a"),
        ("sftp://alice:my pass@host/a b", "sftp://***@host/a b"),
        ("git+https://token@host/a", "git+https://***@host/a"),
        ("https://host/a?sig=a'b c", "https://host/a?***"),
        ("Not found: ftp://alice:pa'ss@host/a, nor b", "Not found: ftp://***@host/a, nor b"),
        ("url='https://u:p@host/a?token=b'", "url='https://***@host/a?***'"),
        ("wasbs://container@account.blob.core.windows.net/a", "wasbs://container@account.blob.core.windows.net/a"),
        ("/data/me@host?.ckpt", "/data/me@host?.ckpt"),
        ("s3:/key:sec/ret@bucket/a", "s3:/***@bucket/a"),
        ('{"a": "s3:/key:secret@bucket/a"}', '{"a": "s3:/***@bucket/a"}'),
    ],
)
def test_of_a_url_only_what_names_the_place_is_shown(text: str, masked: str) -> None:
    assert mask_urls(text) == masked
