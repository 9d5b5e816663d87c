"""Labels of validation are never inside what is trained on."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gluonts_peft import PeftPredictor, get_estimator
from gluonts_peft.imputation import train_reconstruction
from gluonts_peft.series.overlap import held_back
from gluonts_peft.series.store import SeriesStore

START = pd.Period("2024-01-01 00:00", "5min")


def entry(name: Any, steps: int = 80, seed: int = 0, start: int = 0) -> dict[str, Any]:
    values = np.random.default_rng(seed).normal(20, 1, steps).astype(np.float32)
    return {"item_id": name, "start": START + start, "target": values}


DATA = [entry(f"s{i}", seed=i) for i in range(4)]


def make_estimator(**options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prediction_length=6,
        context_length=32,
        max_epochs=1,
        num_batches_per_epoch=3,
        batch_size=4,
        gate="keep",
        device="cpu",
        progress=False,
    )
    return get_estimator("chronos")(**{**defaults, **options})


def weights_of(predictor: PeftPredictor) -> dict[str, torch.Tensor]:
    assert predictor.backbone.adapter is not None
    return predictor.backbone.adapter.state_dict()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("validation_windows", [1, 3])
def test_the_same_data_twice_is_as_if_none_were_given(named: bool, validation_windows: int) -> None:
    data = DATA if named else [{**each, "item_id": None} for each in DATA]
    estimator = make_estimator(validation_windows=validation_windows)
    expected = estimator.train(data)
    held = 6 * validation_windows
    with pytest.warns(UserWarning, match=rf"^labels of validation_data lie inside .* 4 of 4 series.* {held} steps"):
        found = estimator.train(data, data)
    assert found.gate == expected.gate
    for name, tensor in weights_of(expected).items():
        assert torch.equal(weights_of(found)[name], tensor)


@pytest.mark.parametrize("shuffled", [False, True])
def test_renamed_copies_are_recognised(shuffled: bool) -> None:
    copies = [{**each, "item_id": f"copy {i}"} for i, each in enumerate(DATA)]
    with pytest.warns(UserWarning, match="^labels of validation_data lie inside the training data of 4 of 4 series"):
        make_estimator().train(DATA, copies[::-1] if shuffled else copies)


def cut(each: dict[str, Any], begin: int | None = None, end: int | None = None) -> dict[str, Any]:
    first = 0 if begin is None else begin
    return {**each, "target": each["target"][begin:end], "start": each["start"] + first}


@pytest.mark.parametrize(
    "validation",
    [
        pytest.param([cut(each, 40) for each in DATA], id="its end, cut off"),
        pytest.param([cut(each, None, 70) for each in DATA], id="its beginning"),
        pytest.param([cut(each, 10, 70) for each in DATA], id="its middle"),
        pytest.param([DATA[2], entry("else", seed=9)], id="one of them"),
    ],
)
def test_parts_of_the_training_data_are_recognised(validation: Any) -> None:
    with pytest.warns(UserWarning, match="^labels of validation_data lie inside the training data"):
        make_estimator().train(DATA, validation)


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        pytest.param([cut(each, None, 74) for each in DATA], DATA, id="the usual split"),
        pytest.param([cut(each, None, 60) for each in DATA], [cut(each, 30) for each in DATA], id="context overlaps"),
        pytest.param(DATA, [entry(f"other {i}", seed=40 + i) for i in range(3)], id="other items"),
        pytest.param(DATA, [entry(f"s{i}", seed=40 + i) for i in range(3)], id="other values of the names"),
        pytest.param(
            DATA, [{**entry(f"s{i}", seed=i), "start": START + 1000} for i in range(3)], id="other times of the names"
        ),
        pytest.param(
            [{**each, "item_id": None} for each in DATA],
            [{**entry(None, seed=40 + i), "item_id": None} for i in range(3)],
            id="no names",
        ),
    ],
)
def test_data_that_are_apart_are_left_alone(training: Any, validation: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="labels of validation_data")
        make_estimator().train(training, validation)


def test_where_all_would_be_held_out_it_is_refused() -> None:
    early = [cut(each, None, 40) for each in DATA]
    late = [cut(each, 36) for each in DATA]
    with pytest.raises(ValueError, match=r"^the labels of validation_data lie at or before the start of all 4"):
        make_estimator().train(late, early)


def test_a_run_that_held_labels_out_goes_on(tmp_path: Any) -> None:
    estimator = make_estimator(folder=str(tmp_path), max_epochs=2)
    with pytest.warns(UserWarning, match="^labels of"):
        first = estimator.train(DATA, DATA[:2])
    with pytest.warns(UserWarning, match="^labels of"):
        again = estimator.train(DATA, DATA[:2], ckpt_path="last")
    assert again.gate == first.gate


def test_reconstruction_refuses_to_validate_on_what_it_trains_on() -> None:
    data = [entry(f"s{i}", 200, i) for i in range(3)]
    estimator = get_estimator("moment")(
        prediction_length=1, max_epochs=1, num_batches_per_epoch=1, gate="keep", device="cpu", progress=False
    )
    with pytest.raises(
        ValueError, match="^validation_data holds the same times of the same items as the training data"
    ):
        train_reconstruction(estimator, data, data)
    with pytest.raises(ValueError, match="^tasks have no part in task 'reconstruct'"):
        train_reconstruction(get_estimator("moment")(prediction_length=4, tasks=[{}]), data)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(5, 30)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(5, 30)), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_no_label_is_ever_left_in_what_is_trained_on(
    training: list[tuple[int, int, int]], validation: list[tuple[int, int, int]], labels: int
) -> None:
    """Series are pieces of three long ones: where a piece lies says which labels it holds."""
    whole = [np.random.default_rng(item).normal(size=70) for item in range(3)]

    def pieces(parts: list[tuple[int, int, int]]) -> SeriesStore:
        return SeriesStore.from_dataset(
            {"item_id": item, "start": START + at, "target": whole[item][at : at + steps]} for item, at, steps in parts
        )

    names = ([part[0] for part in training], [part[0] for part in validation])
    held = held_back(pieces(training), pieces(validation), names, labels)
    for (item, at, steps), count in zip(training, held.tolist(), strict=True):
        kept = set(range(at, at + steps - count))
        firsts = []
        for other, begin, length in validation:
            if other == item:
                label = set(range(begin + length - labels, begin + length))
                assert not kept & label
                if set(range(at, at + steps)) & label:
                    firsts.append(max(begin + length - labels, at))
        # No more than is needed.
        assert count == (at + steps - min(firsts) if firsts else 0)
