"""Tasks that an estimator trains for."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gluonts_peft import get_estimator


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("recon", "task 'recon' is unknown; did you mean 'reconstruct'? known: "),
        ({"mask_ratio": 0.3}, "task None is unknown"),
        ({"task": "forecast", "held_out": 0.2}, "task 'forecast' has no option 'held_out'; what is forecast"),
        ({"task": "reconstruct", "heldout": 0.2}, "task 'reconstruct': option 'heldout' is unknown; did you mean"),
        ({"task": "reconstruct", "held_out": 1}, "held_out 1 is not a share between 0 and 1"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(task: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        get_estimator("moment")(prediction_length=1, task=task)
