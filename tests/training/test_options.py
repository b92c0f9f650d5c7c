"""The options of saving that all callbacks share."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import SaveOptions


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"every_n_train_steps": 0},
            "Received every_n_train_steps=0. Expected a whole number, 1 or more, 'auto', or None.",
        ),
        ({"every_n_train_steps": True}, "Received every_n_train_steps=True. Expected a whole number"),
        ({"every_n_train_steps": "often"}, "Received every_n_train_steps='often'. Expected a whole number"),
        ({"every_n_train_steps": np.arange(2)}, "Received every_n_train_steps=array([0, 1]). Expected a whole number"),
        ({"every_n_train_steps": 2.5}, "Received every_n_train_steps=2.5. Expected a whole number"),
        ({"train_time_interval": 60}, "Received train_time_interval=60. Expected a timedelta above zero, such as"),
        ({"train_time_interval": timedelta(0)}, "Received train_time_interval=datetime.timedelta(0). Expected"),
        ({"max_to_keep": 0}, "Received max_to_keep=0. Expected a whole number, 1 or more."),
        ({"background": "no"}, "Received background='no'. Expected True or False."),
        ({"write_timeout": 30}, "Received write_timeout=30. Expected a timedelta above zero."),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(TrackingError) as caught:
        SaveOptions(**option)
    assert str(caught.value).startswith(message)
