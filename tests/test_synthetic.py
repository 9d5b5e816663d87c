"""Synthetic series: seeded, finite, and what their options say."""

from __future__ import annotations

import numpy as np

from gluonts_peft.synthetic import sample_series


def draw(seed: int, **options: object) -> np.ndarray:
    return sample_series(np.random.default_rng(seed), 64, 200, **options)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_series_and_another_seed_others() -> None:
    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4), equal_nan=True)


def test_series_are_finite_where_observed_and_gaps_lie_in_the_history_only() -> None:
    values = draw(0, history=150)
    assert values.shape == (64, 200)
    assert values.dtype == np.float32
    assert not np.isinf(values).any()
    assert np.isnan(values[:, :150]).any()
    assert not np.isnan(values[:, 150:]).any()


def test_daily_series_repeat_after_24_steps() -> None:
    def repetition(values: np.ndarray) -> float:
        scores = []
        for row in values:
            ahead, back = row[24:], row[:-24]
            seen = ~np.isnan(ahead) & ~np.isnan(back)
            if seen.sum() > 50 and ahead[seen].std() > 1e-6 and back[seen].std() > 1e-6:
                scores.append(np.corrcoef(ahead[seen], back[seen])[0, 1])
        return float(np.mean(scores))

    rng = np.random.default_rng
    assert repetition(sample_series(rng(1), 400, 240, daily=1.0)) > repetition(sample_series(rng(1), 400, 240)) + 0.1
