"""Gaps are filled, observed values stay, and any adapter learns to reconstruct."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from gluonts_peft import PeftPredictor, TuningDidNotHelp, get_adapter, get_estimator, impute, load_backbone
from gluonts_peft.backbone import Backbone
from gluonts_peft.imputation import (
    Reconstruction,
    reconstruction_loss,
    train_reconstruction,
    write_imputed,
)
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.sweep import gather, reconstruct
from gluonts_peft.training import TrainingOptions, fit

Entries = list[dict[str, Any]]
START = pd.Period("2024-01-01", "h")


def daily(length: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    noise = np.random.default_rng(seed).normal(0, 0.3, length)
    return (10 + 3 * np.sin(2 * np.pi * np.arange(length) / 24) + noise).astype(dtype)


def entry(target: Any, name: str = "a") -> dict[str, Any]:
    return {"item_id": name, "start": START, "target": target, "info": {"kept": name}}


def with_gaps(target: Any, *gaps: tuple[int, int]) -> Any:
    target = target.copy()
    for begin, end in gaps:
        target[begin:end] = np.nan
    return target


@pytest.fixture(scope="module")
def moment() -> Backbone:
    return load_backbone("moment", prediction_length=1)


@pytest.fixture(scope="module")
def tuned() -> PeftPredictor:
    estimator = get_estimator("moment")(
        prediction_length=1,
        adapter="lora",
        max_epochs=2,
        num_batches_per_epoch=10,
        progress=False,
        device="cpu",
        task="reconstruct",
    )
    return estimator.train([entry(daily(1500, seed), str(seed)) for seed in range(2)])


def test_gaps_are_filled_and_observed_values_keep_their_bits(moment: Backbone) -> None:
    gaps = {
        "long": [(0, 3), (100, 101), (600, 624), (700, 956), (1498, 1500)],
        "double": [(20, 24), (26, 27)],
        "whole": [],
    }
    truth = {"long": daily(1500), "double": daily(90, 1, np.float64), "whole": daily(700, 2)}
    dataset = [entry(with_gaps(truth[name], *gaps[name]), name) for name in gaps]
    before = [each["target"].tobytes() for each in dataset]

    filled = impute(moment, dataset)

    assert [each["target"].tobytes() for each in dataset] == before
    for given, found in zip(dataset, filled, strict=True):
        assert (found["item_id"], found["start"], found["info"]) == (given["item_id"], START, given["info"])
        assert found["target"].dtype == given["target"].dtype
        assert np.isfinite(found["target"]).all()
        observed = ~np.isnan(given["target"])
        assert found["target"][observed].tobytes() == given["target"][observed].tobytes()
        # The signal has a range of 6; half of it is what the level alone would miss by.
        assert np.abs(found["target"] - truth[given["item_id"]]).max() < 4.0


def test_a_gap_is_filled_from_the_window_around_it(moment: Backbone) -> None:
    """Against one window by hand, and whatever else is in the batch."""
    target = with_gaps(daily(2000), (900, 920), (1600, 1610))
    [found] = impute(moment, [entry(target)])
    for begin, end in ((900, 920), (1600, 1610)):
        last = (begin + end) // 2 + 256
        last -= (last - begin) % 8
        window = target[last - 512 : last]
        observed = ~np.isnan(window)
        batch = {"past_target": np.nan_to_num(window)[None], "past_observed_values": observed[None].astype(np.float32)}
        with moment.inference():
            [expected] = moment.reconstruct({name: torch.from_numpy(value) for name, value in batch.items()}).numpy()
        np.testing.assert_allclose(found["target"][begin:end], expected[~observed], rtol=1e-5)
    alone = impute(moment, [entry(target)], batch_size=1)
    np.testing.assert_allclose(alone[0]["target"], found["target"], rtol=1e-5)


def test_seasonal_gaps_are_filled_better_than_by_a_line_or_the_last_value(moment: Backbone) -> None:
    truth = daily(6000, seed=3)
    rng = np.random.default_rng(0)
    errors: dict[int, dict[str, float]] = {}
    for gap in (1, 6, 24):
        begins = np.arange(100, 5900, 100) + rng.integers(0, 20, 58)
        target = with_gaps(truth, *((begin, begin + gap) for begin in begins))
        missing = np.isnan(target)
        steps = np.arange(len(target))
        last = target[np.maximum.accumulate(np.where(missing, 0, steps))]
        fills = {
            "model": impute(moment, [entry(target)])[0]["target"],
            "line": np.interp(steps, steps[~missing], target[~missing]),
            "last": last,
        }
        errors[gap] = {name: float(np.abs(fill - truth)[missing].mean()) for name, fill in fills.items()}
    assert errors[6]["model"] < errors[6]["line"] < errors[6]["last"]
    assert errors[24]["model"] < 0.5 * errors[24]["line"]
    # A single missing step is bridged before the network sees it: no better than the line that it is bridged with.
    assert errors[1]["model"] > 0.8 * errors[1]["line"]
    assert errors[1]["model"] < errors[1]["last"]


@pytest.mark.parametrize(
    ("dataset", "options", "sentence"),
    [
        (
            [entry(with_gaps(daily(900), (100, 357)), "b")],
            {},
            "series 'b' misses the 257 steps 100 to 356, more than max_gap 256; cut the series there, or keep it"
            " missing with unfillable='keep'",
        ),
        (
            [entry(np.full(9, np.nan), "c"), entry(np.full(9, np.nan), "d")],
            {},
            "2 of 2 series cannot be imputed: item_id 'c' (no observed value), item_id 'd' (no observed value); leave"
            " them out, keep them missing: unfillable='keep', or go on without them: unusable='skip' (command line:",
        ),
        (
            [entry(daily(9))],
            {"max_gap": 497},
            "max_gap 497 is not between 1 and 496, the context_length less two patches",
        ),
        ([entry(daily(9))], {"unfillable": "ignore"}, "unfillable 'ignore' is unknown; known: keep, raise"),
        ([entry(with_gaps(daily(9), (3, 4)))], {"batch_size": 0}, "batch_size 0 is not positive"),
        ([], {}, "dataset is empty: give at least one entry with a 'target'"),
        ([entry(np.zeros((2, 9)))], {}, "multivariate targets are not supported"),
    ],
)
def test_what_cannot_be_filled_is_refused(
    moment: Backbone, dataset: Entries, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        impute(moment, dataset, **options)


def test_what_cannot_be_filled_is_kept_and_counted(moment: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    dataset = [entry(with_gaps(daily(900), (100, 400), (500, 510)), "b"), entry(np.full(9, np.nan), "c")]
    long, empty = impute(moment, dataset, unfillable="keep")
    assert np.flatnonzero(np.isnan(long["target"])).tolist() == list(range(100, 400))
    assert np.isnan(empty["target"]).all()
    assert [record.getMessage() for record in caplog.records] == [
        "2 gaps stay missing; the first: series 'b' misses the 300 steps 100 to 399, more than max_gap 256; cut the"
        " series there"
    ]
    [longer, _] = impute(moment, dataset, max_gap=496, unfillable="keep")
    assert np.isfinite(longer["target"]).all()
    # Those that can be filled share a window, the one between them stays.
    [some] = impute(moment, [entry(with_gaps(daily(90), (10, 12), (20, 23), (30, 31)))], max_gap=2, unfillable="keep")
    assert np.flatnonzero(np.isnan(some["target"])).tolist() == [20, 21, 22]


def test_a_family_that_does_not_reconstruct_is_refused() -> None:
    chronos = load_backbone("chronos", prediction_length=4)
    sentence = "^family 'chronos' does not reconstruct its input; use one with the capability 'reconstruct', such as"
    with pytest.raises(ValueError, match=sentence):
        impute(chronos, [entry(daily(9))])
    with pytest.raises(ValueError, match=sentence):
        reconstruction_loss(chronos, {})
    with pytest.raises(ValueError, match=sentence):
        train_reconstruction(get_estimator("chronos")(prediction_length=4), [entry(daily(99))])


def test_windows_are_gathered_as_a_loop_gathers_them() -> None:
    series = [np.array([1.0, np.nan, 3.0, 4.0]), np.array([5.0, 6.0])]
    store = SeriesStore.from_dataset([entry(target) for target in series])
    values, observed = gather(store, np.array([0, 1, 0]), np.array([4, 2, 2]), 3)
    assert values.tolist() == [[0.0, 3.0, 4.0], [0.0, 5.0, 6.0], [0.0, 1.0, 0.0]]
    assert observed.tolist() == [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]


def test_the_loss_is_the_error_of_hidden_steps_in_deviations(
    moment: Backbone, make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    batch = make_batch(size=3, context=83, missing=0.2)
    seen: list[Tensor] = []

    def watch(given: dict[str, Tensor]) -> Tensor:
        seen.append(given["past_observed_values"])
        assert (given["past_target"][seen[-1] == 0] == 0).all()
        return type(moment).reconstruct(moment, given)

    moment.reconstruct, original = watch, moment.reconstruct  # type: ignore[assignment, method-assign]
    try:
        with moment.inference():
            losses = reconstruction_loss(moment, batch, 0.4, torch.Generator().manual_seed(1))
    finally:
        moment.reconstruct = original  # type: ignore[method-assign]
    target, observed = batch["past_target"].numpy(), batch["past_observed_values"].numpy() > 0
    with moment.inference():
        found = moment.reconstruct(
            batch | {"past_target": batch["past_target"] * seen[0], "past_observed_values": seen[0]}
        )
    for row in range(3):
        hidden = observed[row] & (seen[0][row].numpy() == 0)
        # 83 steps are 11 patches, counted from the end; 40 % of them are 4.
        patches = np.unique((82 - np.flatnonzero(hidden)) // 8)
        assert len(patches) == 4
        assert (seen[0][row].numpy() > 0).sum() + hidden.sum() == observed[row].sum()
        scaled = (found[row].numpy() - target[row])[hidden] / target[row][observed[row]].std()
        assert losses[row].item() == pytest.approx(np.square(scaled).mean(), rel=1e-4)


def test_the_loss_of_what_has_nothing_to_learn_is_zero_and_finite(moment: Backbone) -> None:
    target = torch.stack([torch.full((64,), 7.0), torch.cat([torch.zeros(60), torch.arange(4.0)]), torch.zeros(64)])
    observed = torch.stack([torch.ones(64), torch.cat([torch.zeros(60), torch.ones(4)]), torch.zeros(64)])
    losses = reconstruction_loss(moment, {"past_target": target, "past_observed_values": observed})
    assert losses.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
def test_mask_ratio_is_a_share(moment: Backbone, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^mask_ratio {ratio} is not a share between 0 and 1$"):
        reconstruction_loss(moment, {}, ratio)


def test_gradients_reach_every_tensor_of_an_adapter(make_batch: Callable[..., dict[str, Tensor]]) -> None:
    backbone = load_backbone("moment", prediction_length=1)
    adapter = get_adapter("lora").attach(backbone)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        # B starts at zero, so that A has a gradient only after the first step.
        optimizer.zero_grad()
        reconstruction_loss(backbone, make_batch(size=8, context=128)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_training_lowers_the_loss_and_is_stored_and_loaded(tuned: PeftPredictor, tmp_path: Path) -> None:
    assert tuned.fit is not None
    assert tuned.fit.gate.passed
    assert tuned.fit.gate.tuned < 0.95 * tuned.fit.gate.zero_shot
    tuned.serialize(tmp_path)
    again = PeftPredictor.deserialize(tmp_path, device="cpu")
    target = with_gaps(daily(700, 5), (300, 330))
    [filled], [loaded] = impute(tuned, [entry(target)]), impute(again, [entry(target)])
    assert loaded["target"].tobytes() == filled["target"].tobytes()
    [untuned] = impute(load_backbone("moment", prediction_length=1), [entry(target)])
    assert np.abs(untuned["target"] - filled["target"]).max() > 1e-3
    with pytest.raises(ValueError, match="^the forecasting head on checkpoint 'moment-nano' is not trained"):
        list(tuned.predict([entry(target[:200])]))


def test_same_seed_same_weights_and_another_loss_is_another_run(tmp_path: Path) -> None:
    from gluonts_peft.series.windows import Windows

    store = SeriesStore.from_dataset([entry(daily(400))])
    windows = Windows(store, context_length=64, prediction_length=1, min_context=32)

    def train(ratio: float, folder: Path | None, ckpt_path: str | None = None) -> dict[str, Tensor]:
        backbone = load_backbone("moment", prediction_length=1, context_length=64)
        adapter = get_adapter("lora")
        options = TrainingOptions(max_epochs=1, num_batches_per_epoch=3, batch_size=4, device="cpu")
        loss = Reconstruction(ratio)
        validation = list(windows.last(windows=4))
        fit(
            backbone,
            adapter,
            windows,
            validation,
            options,
            folder=folder,
            ckpt_path=ckpt_path,
            progress=False,
            loss=loss,
        )
        return adapter.state_dict()

    first, second = train(0.3, tmp_path), train(0.3, None)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match=r"loss differ \('Reconstruction\(mask_ratio=0.3\)' there"):
        train(0.5, tmp_path, "last")


def test_the_gate_of_reconstruction_falls_back() -> None:
    options: dict[str, Any] = dict(
        prediction_length=1,
        adapter="lora",
        learning_rate=3.0,
        max_epochs=1,
        num_batches_per_epoch=3,
        context_length=64,
        progress=False,
    )
    task = {"task": "reconstruct", "mask_ratio": 0.4, "held_out": 0.3}
    with pytest.warns(TuningDidNotHelp, match="the zero-shot predictor is returned"):
        predictor = get_estimator("moment")(**options, task=task).train([entry(daily(400))])
    assert predictor.backbone.adapter is None
    assert predictor.gate is not None
    assert not predictor.gate.passed
    old = get_estimator("moment")(**options, gate="keep")
    with pytest.warns(DeprecationWarning, match="use PeftEstimator"):
        again = train_reconstruction(old, [entry(daily(400))], mask_ratio=0.4, held_out=0.3)
    assert again.gate == predictor.gate


@pytest.mark.parametrize(
    ("adapter", "options", "sentence"),
    [
        ("head", {}, "adapter head trains a forecasting head, which has no part in reconstruction; name another"),
        (["lora", {"name": "head", "kind": "pooling"}], {}, "adapter lora + head(kind='pooling') trains a"),
        ("lora", {"held_out": 1.0}, "held_out 1.0 is not a share between 0 and 1"),
        ("lora", {"mask_ratio": 2.0}, "mask_ratio 2.0 is not a share between 0 and 1"),
    ],
)
def test_training_that_makes_no_sense_is_refused(adapter: str, options: dict[str, Any], sentence: str) -> None:
    estimator = get_estimator("moment")(prediction_length=1, adapter=adapter, context_length=64, progress=False)
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        train_reconstruction(estimator, [entry(daily(400))], **options)


def test_imputed_values_are_written_with_their_mark(moment: Backbone, tmp_path: Path) -> None:
    from gluonts_peft.series.table import read_dataset

    dataset = [entry(with_gaps(daily(100), (10, 14)), "x"), entry(daily(50), "y")]
    filled = impute(moment, dataset)
    path = tmp_path / "filled.csv"
    write_imputed(dataset, filled, path, columns=("who", "when", "HR"))
    table = pd.read_csv(path)
    assert list(table) == ["who", "when", "HR", "imputed"]
    assert table.index[table["imputed"]].tolist() == [10, 11, 12, 13]
    again = read_dataset(path, item_id="who", timestamp="when", target="HR")
    assert [each["target"].tobytes() for each in again] == [each["target"].tobytes() for each in filled]
    with pytest.raises(ValueError, match=r"exists; give another one, or overwrite=True"):
        write_imputed(dataset, filled, path)


def test_hidden_values_have_no_influence(moment: Backbone) -> None:
    values = daily(128)[None]
    shown = np.ones_like(values)
    shown[:, 64:96] = 0.0
    changed = values + 100.0 * (1.0 - shown)
    assert np.array_equal(reconstruct(moment, values, shown), reconstruct(moment, changed, shown))
