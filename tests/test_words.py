from __future__ import annotations

import math

import pytest

from gluonts_peft.words import BETTER, NO_EVIDENCE, PROVEN, WORDS, WORSE, counted, evidence, word_of


@pytest.mark.parametrize(
    ("change", "p", "units", "word"),
    [
        (-0.5, 0.0499, 6, PROVEN),
        (-0.49, 0.0499, 6, BETTER),
        (-0.5, 0.05, 6, BETTER),
        (-0.5, 0.0499, 5, BETTER),
        (-50.0, math.nan, 5, BETTER),
        (0.0, 0.0, 100, NO_EVIDENCE),
        (0.01, 0.0499, 6, WORSE),
        (0.01, 0.05, 6, NO_EVIDENCE),
        (50.0, 0.0, 5, NO_EVIDENCE),
        (50.0, math.nan, 100, NO_EVIDENCE),
        (math.nan, 0.0, 100, NO_EVIDENCE),
    ],
)
def test_a_word_needs_size_certainty_and_units(change: float, p: float, units: int, word: str) -> None:
    assert word_of(change, p, units) == word
    assert word in WORDS


def test_what_a_word_rests_on_is_one_sentence() -> None:
    assert evidence("MAE", -1.6, (-2.4, -0.8), 117, "patients") == (
        "MAE -1.60 % against zero-shot (90 % interval -2.40 to -0.80 %, 117 patients)"
    )
    assert evidence("MAE", 3.0, None, 1, "stays", "full", "p 0.1") == (
        "MAE +3.00 % against full (1 stay, too few for a proof: it takes 6, p 0.1)"
    )
    assert evidence("MAE", -0.29, (-0.48, -0.11), 80, "patients").endswith(
        "80 patients, too small for a proof: it takes -0.5 %)"
    )
    assert evidence("MAE", -0.29, (-0.7, 0.0), 80, "patients").endswith("80 patients)")
    assert [counted(1, unit) for unit in ("patients", "series", "windows")] == ["1 patient", "1 series", "1 window"]
