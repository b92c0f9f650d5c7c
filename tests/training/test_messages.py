"""Errors that are the same for every framework."""

from __future__ import annotations

import pytest

from polyaxon_tracking.training import different_model

ADVICE = (
    "Received a model that is not the one saved in /saved. Expected the same layers, shapes and optimizer. Undo the change, pass "
    "resume=False to start from scratch, or use another outputs path; the checkpoint stays as it is. "
)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(1, "0"), (5, "0; 1; 2; 3; 4"), (6, "0; 1; 2; 3; 4; and 1 more"), (23, "0; 1; 2; 3; 4; and 18 more")],
)
def test_of_many_differences_the_first_follow_the_advice(number: int, shown: str) -> None:
    assert str(different_model("/saved", list(map(str, range(number))))) == f"{ADVICE}What differs: {shown}."
