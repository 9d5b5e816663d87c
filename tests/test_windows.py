from __future__ import annotations

import pickle
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts import time_feature
from gluonts.dataset.common import ListDataset
from gluonts.dataset.pandas import PandasDataset

from gluonts_peft.series.batches import context_batches
from gluonts_peft.series.rows import Layout
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Skipped, Windows

NAN = float("nan")
LENGTHS = (40, 7, 1, 25, 12, 3)


def make_dataset(missing: float = 0.2, seed: int = 0) -> list[dict[str, Any]]:
    """Random series of all LENGTHS, then one all missing, one constant, one with its observed values in the middle."""
    generator = np.random.default_rng(seed)
    targets = [generator.standard_normal(length) for length in LENGTHS]
    for target in targets:
        target[generator.random(len(target)) < missing] = np.nan
    middle = np.full(30, np.nan)
    middle[12:20] = np.arange(8)
    targets += [np.full(20, np.nan), np.full(15, 3.0), middle]
    start = pd.Period("2024-01-01 00:00", freq="h")
    return [{"item_id": f"s{i}", "start": start, "target": target} for i, target in enumerate(targets)]


def naive_window(target: np.ndarray, cut: int, context: int, prediction: int) -> tuple[list[float], list[float]]:
    """Values and observed values of one window, a step at a time."""
    values, observed = [], []
    for position in range(cut - context, cut + prediction):
        seen = position >= 0 and not np.isnan(target[position])
        values.append(float(np.float32(target[position])) if seen else 0.0)
        observed.append(float(seen))
    return values, observed


def naive_admissible(
    dataset: list[dict[str, Any]], context: int, prediction: int, min_context: int = 1, holdout: int = 0
) -> list[tuple[int, int]]:
    pairs = []
    for i, entry in enumerate(dataset):
        for cut in range(min_context, len(entry["target"]) - holdout - prediction + 1):
            _, observed = naive_window(entry["target"], cut, context, prediction)
            if any(observed[:context]) and any(observed[context:]):
                pairs.append((i, cut))
    return pairs


def assert_batch_equals_naive(batch, series, cuts, dataset, context, prediction) -> None:
    rows = [naive_window(dataset[i]["target"], cut, context, prediction) for i, cut in zip(series, cuts, strict=True)]
    values, observed = (np.array(part, np.float32) for part in zip(*rows, strict=True))
    np.testing.assert_array_equal(batch["past_target"], values[:, :context])
    np.testing.assert_array_equal(batch["future_target"], values[:, context:])
    np.testing.assert_array_equal(batch["past_observed_values"], observed[:, :context])
    np.testing.assert_array_equal(batch["future_observed_values"], observed[:, context:])
    assert {array.dtype for array in batch.values()} == {np.dtype(np.float32)}
    assert all(array.flags.c_contiguous and array.flags.writeable for array in batch.values())


@pytest.fixture
def dataset() -> list[dict[str, Any]]:
    return make_dataset()


@pytest.fixture(params=["memory", "folder"])
def store(request, dataset, tmp_path) -> SeriesStore:
    return SeriesStore.from_dataset(dataset, tmp_path / "store" if request.param == "folder" else None)


def test_store_keeps_every_series(store, dataset):
    assert len(store) == len(dataset)
    assert store.lengths.tolist() == [*LENGTHS, 20, 15, 30]
    for i, entry in enumerate(dataset):
        np.testing.assert_array_equal(store.series(i), entry["target"].astype(np.float32))
    assert store.values.dtype == np.float32
    assert not store.values.flags.writeable
    assert store.offsets.dtype == np.int64
    assert store.missing == sum(int(np.isnan(entry["target"]).sum()) for entry in dataset)
    assert store.item_ids == [f"s{i}" for i in range(9)]
    assert store.starts == ["2024-01-01 00:00"] * 9
    assert store.freq == "h"
    assert store.edges[6:].tolist() == [[20, -1], [0, 14], [12, 19]]


def test_store_reopens_with_the_same_contents(dataset, tmp_path):
    written = SeriesStore.from_dataset(dataset, tmp_path / "a" / "b")
    opened = SeriesStore.open(str(tmp_path / "a" / "b"))
    np.testing.assert_array_equal(opened.values, written.values)
    np.testing.assert_array_equal(opened.offsets, written.offsets)
    np.testing.assert_array_equal(opened.edges, written.edges)
    assert (opened.missing, opened.item_ids, opened.starts, opened.freq) == (
        written.missing,
        written.item_ids,
        written.starts,
        written.freq,
    )
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "edges.npy",
        "offsets.npy",
        "series.json",
        "values.bin",
    ]


def test_fingerprint_is_of_the_contents_only(dataset, tmp_path):
    here = SeriesStore.from_dataset(dataset).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", here)
    assert SeriesStore.from_dataset(dataset, tmp_path / "store").fingerprint() == here
    assert SeriesStore.from_dataset([{"target": entry["target"]} for entry in dataset]).fingerprint() == here
    assert SeriesStore.from_dataset(make_dataset(seed=1)).fingerprint() != here
    parts = SeriesStore.from_dataset([{"target": [1, 2]}, {"target": [3]}]).fingerprint()
    assert SeriesStore.from_dataset([{"target": [1]}, {"target": [2, 3]}]).fingerprint() != parts


def test_fingerprint_does_not_see_the_bits_of_nan():
    other = np.array([0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    assert np.isnan(other).all()
    one = SeriesStore.from_dataset([{"target": other}])
    assert one.fingerprint() == SeriesStore.from_dataset([{"target": [NAN, NAN]}]).fingerprint()


def test_repr_has_counts(dataset, tmp_path):
    store = SeriesStore.from_dataset(dataset, tmp_path / "store")
    assert repr(store) == (
        f"SeriesStore(9 series of 1 to 40 steps, 153 values, {store.missing} missing, freq 'h', "
        f"in '{tmp_path / 'store'}')"
    )
    assert repr(SeriesStore.from_dataset([{"target": [1, 2]}])) == (
        "SeriesStore(1 series of 2 steps, 2 values, 0 missing, in memory)"
    )


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_, list, range, "list"]
)
def test_any_real_target_is_stored_as_float32(dtype):
    target = {list: [0, 1.0, 1], range: range(2), "list": [0, 1]}.get(dtype)
    target = np.array([0, 1, 1]).astype(dtype) if target is None else target
    stored = SeriesStore.from_dataset([{"target": target}]).series(0)
    np.testing.assert_array_equal(stored, np.array(list(target), np.float32))
    assert stored.dtype == np.float32


def test_gluonts_datasets_are_read():
    index = pd.period_range("2024-01", periods=4, freq="M")
    frames = {"a": pd.DataFrame({"target": [1.0, 2.0, NAN, 4.0]}, index=index)}
    store = SeriesStore.from_dataset(PandasDataset(frames))
    np.testing.assert_array_equal(store.series(0), np.array([1, 2, NAN, 4], np.float32))
    assert (store.item_ids, store.starts, store.freq) == (["a"], ["2024-01"], "M")

    store = SeriesStore.from_dataset(ListDataset([{"start": "2024-01-01", "target": [1, 2]}], freq="D"))
    assert (store.item_ids, store.starts, store.freq) == (["0"], ["2024-01-01"], "D")


def test_freq_is_none_if_mixed():
    entries = [{"target": [1], "start": pd.Period("2024", freq=freq)} for freq in ("D", "M")]
    assert SeriesStore.from_dataset(entries).freq is None
    assert SeriesStore.from_dataset(entries[:1]).freq == "D"
    assert SeriesStore.from_dataset([*entries[:1], {"target": [1]}]).freq is None


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ([], ValueError, "dataset is empty: give at least one entry with a 'target'"),
        ([{"target": []}] * 2, ValueError, "dataset has no values: all of its 2 targets have length 0"),
        ([{"target": []}] * 3, ValueError, "dataset has no values: all of its 3 targets have length 0"),
        (
            [{"target": [1]}, ("target", [1])],
            TypeError,
            "entry 1 of the dataset is a tuple: give a dict with a 'target'",
        ),
        ([[1.0, 2.0]], TypeError, "entry 0 of the dataset is a list: give a dict with a 'target'"),
        (
            [{"item_id": "A", "start": 0}],
            ValueError,
            "item_id 'A' has no 'target', only ['item_id', 'start']: give one of shape (steps,)",
        ),
        ([{"target": [1]}, {}], ValueError, "entry 1 has no 'target', only []: give one of shape (steps,)"),
        (
            [{"item_id": "A", "target": np.zeros((2, 10))}],
            ValueError,
            "multivariate targets are not supported, target of item_id 'A' has shape (2, 10): "
            "give each dimension as an entry of its own",
        ),
        (
            [{"target": [1]}, {"target": [[1, 2, 3]]}],
            ValueError,
            "multivariate targets are not supported, target of entry 1 has shape (1, 3): "
            "give each dimension as an entry of its own",
        ),
        (
            [{"item_id": 7, "target": 1.5}],
            ValueError,
            "target of item_id 7 is 1.5, without a dimension: give one of shape (steps,)",
        ),
        ([{"target": None}], ValueError, "target of entry 0 is None, without a dimension: give one of shape (steps,)"),
        (
            [{"item_id": "A", "target": [1.0, None]}],
            TypeError,
            "target of item_id 'A' has type object with the value None: give numbers, with NaN for missing values",
        ),
        (
            [{"target": ["a", "b"]}],
            TypeError,
            "target of entry 0 has type <U1 with the value 'a': give numbers, with NaN for missing values",
        ),
        (
            [{"target": [1.0, 2j]}],
            TypeError,
            "target of entry 0 has type complex128 with the value (1+0j): give numbers, with NaN for missing values",
        ),
        (
            [{"item_id": "A", "target": [1.0, float("inf")]}],
            ValueError,
            "target of item_id 'A' has the value inf at step 1: give NaN for missing values",
        ),
        (
            [{"target": [1]}, {"target": np.array([0, NAN, -np.inf], np.float32)}],
            ValueError,
            "target of entry 1 has the value -inf at step 2: give NaN for missing values",
        ),
        (
            [{"item_id": "A", "target": [1e39]}],
            ValueError,
            "target of item_id 'A' has the value 1e+39 at step 0, too large for float32: rescale it",
        ),
        (
            [{"target": [0.0, -5e300]}],
            ValueError,
            "target of entry 0 has the value -5e+300 at step 1, too large for float32: rescale it",
        ),
    ],
)
def test_wrong_entries_are_refused(entries, kind, message, tmp_path):
    for folder in (None, tmp_path / "store"):
        with pytest.raises(kind) as caught:
            SeriesStore.from_dataset(entries, folder)
        assert str(caught.value) == message
    with pytest.raises(FileNotFoundError):
        SeriesStore.open(tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    if entries and any("target" in entry and np.size(entry["target"]) for entry in entries if isinstance(entry, dict)):
        with pytest.raises(kind) as caught:
            list(context_batches(entries, context_length=3, batch_size=2))
        assert str(caught.value) == message


def test_ragged_target_is_refused():
    with pytest.raises(ValueError, match=r"^target of item_id 'A' is not an array \(.*inhomogeneous.*\): give one of"):
        SeriesStore.from_dataset([{"item_id": "A", "target": [[1, 2], [3]]}])


@pytest.mark.parametrize(("limit", "count", "size"), [(100, 3, 120), (79, 2, 80)])
def test_too_large_for_memory_names_the_way_out(limit, count, size):
    entries = ({"target": np.zeros(10)} for _ in range(5))
    with pytest.raises(ValueError, match="max_memory") as caught:
        SeriesStore.from_dataset(entries, max_memory=limit)
    assert str(caught.value) == (
        f"the first {count} series of the dataset take {size} bytes, more than max_memory={limit}: name a folder, "
        "SeriesStore.from_dataset(dataset, folder), to keep them on disk, or raise max_memory"
    )
    assert len(SeriesStore.from_dataset([{"target": np.zeros(10)}] * 2, max_memory=80)) == 2


def test_existing_store_is_not_overwritten(dataset, tmp_path):
    before = SeriesStore.from_dataset(dataset, tmp_path).fingerprint()
    with pytest.raises(FileExistsError) as caught:
        SeriesStore.from_dataset(make_dataset(seed=1), tmp_path)
    assert str(caught.value) == (
        f"folder '{tmp_path}' holds a series store already: read it with SeriesStore.open(folder) "
        "or name another folder"
    )
    assert SeriesStore.open(tmp_path).fingerprint() == before


COUNTER = 1.7e9 + 3.0 * np.arange(50)
# Float32 holds the changes of the first kind, and those of the second only with a rest.
HELD = {
    "decimals": np.round(98.6 + np.sin(np.arange(80)), 1),
    "walk": np.random.default_rng(0).standard_normal(5000).cumsum() + 300,
    "jump": np.where(np.arange(80) < 40, 0.1, 1e9),
    "constant": np.full(60, 0.1),
    "gaps": np.where(np.arange(60) % 2, NAN, 1 + 0.1 * np.arange(60)),
    "ordinal": np.arange(2**20, 2**20 + 50),
    "empty": np.zeros(0),
}
DROPPED = {
    "counter": COUNTER,
    "integers": COUNTER.astype(np.int64),
    "rare changes": 1.7e9 + 3.0 * (np.arange(400) // 20),
    "slow": 1e4 + 1e-3 * np.sin(np.arange(200) / 9),
    "after a jump": np.r_[np.zeros(20), 1e9 + np.sin(np.arange(60))],
    "gaps": np.where(np.arange(50) % 3 == 1, NAN, COUNTER),
}


@pytest.mark.parametrize("kind", HELD)
def test_float32_is_kept_where_it_holds_the_changes(kind):
    store = SeriesStore.from_dataset([{"target": HELD[kind]}, {"target": [1.0]}])
    assert store.rest is None
    assert store.take(np.arange(2)).dtype == np.float32
    exact = SeriesStore.from_dataset([{"target": HELD[kind]}, {"target": [1.0]}], exact=True)
    np.testing.assert_allclose(exact.take(np.arange(len(HELD[kind]))), HELD[kind], rtol=1e-13)
    differs = np.nan_to_num(HELD[kind]) != np.nan_to_num(HELD[kind].astype(np.float32))
    assert (exact.rest is not None) == differs.any()


@pytest.mark.parametrize("kind", DROPPED)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_what_float32_drops_is_kept(kind, where, tmp_path):
    plain = {"target": np.arange(7.0)}
    dataset = [plain, {"target": DROPPED[kind]}, plain]
    store = SeriesStore.from_dataset(dataset, tmp_path if where == "folder" else None)
    for opened in (
        store,
        pickle.loads(pickle.dumps(store)),
        SeriesStore.open(tmp_path) if where == "folder" else store,
    ):
        steps = np.arange(opened.offsets[1], opened.offsets[2])
        # Two float32 hold 48 bits, float64 53.
        np.testing.assert_allclose(opened.take(steps), DROPPED[kind], rtol=2.0**-48)
        np.testing.assert_array_equal(opened.take(np.arange(7)), plain["target"])
        assert opened.values.dtype == np.float32
        windows = Windows(opened, context_length=20, prediction_length=4)
        batch = windows.read([1], [30])
        assert (batch["past_target"].dtype, batch["past_observed_values"].dtype) == (np.float64, np.float32)
        seen = batch["past_observed_values"][0] > 0
        np.testing.assert_allclose(batch["past_target"][0, seen], DROPPED[kind][10:30][seen], rtol=2.0**-48)
    [(_, batch)] = context_batches(dataset, context_length=1000, batch_size=3)
    assert batch["past_target"].dtype == np.float64
    np.testing.assert_array_equal(
        np.where(batch["past_observed_values"][1], batch["past_target"][1], NAN), DROPPED[kind]
    )


def test_fingerprint_counts_what_float32_drops_and_nothing_else():
    low, high = ([{"target": COUNTER + extra}] for extra in (0.0, 1.0))
    held = [{"target": HELD["decimals"]}]
    assert SeriesStore.from_dataset(low).fingerprint() != SeriesStore.from_dataset(high).fingerprint()
    as_float32 = [{"target": HELD["decimals"].astype(np.float32)}]
    assert SeriesStore.from_dataset(held).fingerprint() == SeriesStore.from_dataset(as_float32).fingerprint()


def test_rests_count_as_memory_and_damaged_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="take 400 bytes"):
        SeriesStore.from_dataset([{"target": COUNTER}], max_memory=399)
    SeriesStore.from_dataset([{"target": COUNTER}], max_memory=400)
    SeriesStore.from_dataset([{"target": COUNTER}], tmp_path)
    (tmp_path / "rest.bin").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=r"damaged, rest\.bin has 8 bytes instead of 200"):
        SeriesStore.open(tmp_path)


def test_several_dimensions_and_features_keep_what_float32_drops():
    entry = {"target": np.stack([np.arange(50.0), COUNTER]), "feat_dynamic_real": COUNTER[None] / 3}
    store = SeriesStore.from_dataset([entry], features=True, multivariate=True)
    batch = Windows(store, context_length=20, prediction_length=4).read([0], [30])
    np.testing.assert_array_equal(batch["past_target"][0], entry["target"][:, 10:30].T)
    np.testing.assert_allclose(batch["feat_dynamic_real"][0, :, 0], COUNTER[10:34] / 3, rtol=1e-15)


@pytest.mark.parametrize("field", ["target", "feat_dynamic_real"])
def test_numbers_too_small_for_float32_are_refused(field):
    entry = {"target": np.ones(5), "feat_dynamic_real": np.ones((1, 5)), "item_id": "A"} | {
        field: np.full((1, 5)[field == "target" :], 1e-35)
    }
    with pytest.raises(ValueError, match=f"{field} of item_id 'A' has no value beyond 1e-35, too small for float32"):
        SeriesStore.from_dataset([entry], features=True)


def test_half_written_folder_is_refused_and_can_be_written_again(dataset, tmp_path):
    script = (
        "import os, sys; from gluonts_peft.series.store import SeriesStore\n"
        "def entries():\n"
        "    yield {'target': list(range(100_000))}\n"
        "    os._exit(9)\n"
        "SeriesStore.from_dataset(entries(), sys.argv[1])\n"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == ["values.bin"]
    with pytest.raises(FileNotFoundError) as caught:
        SeriesStore.open(tmp_path)
    assert str(caught.value) == (
        f"folder '{tmp_path}' holds no complete series store, series.json is missing: "
        "write it again with SeriesStore.from_dataset(dataset, folder)"
    )
    SeriesStore.from_dataset(dataset, tmp_path)
    assert SeriesStore.open(tmp_path).fingerprint() == SeriesStore.from_dataset(dataset).fingerprint()


def test_damaged_stores_are_refused(dataset, tmp_path):
    SeriesStore.from_dataset(dataset, tmp_path)
    again = "write it again with SeriesStore.from_dataset(dataset, folder)"
    values, index = (tmp_path / "values.bin").read_bytes(), (tmp_path / "series.json").read_text()
    for extra in (-4, 8):
        (tmp_path / "values.bin").write_bytes(values[:extra] if extra < 0 else values + bytes(extra))
        with pytest.raises(ValueError, match="damaged") as caught:
            SeriesStore.open(tmp_path)
        assert str(caught.value) == (
            f"series store '{tmp_path}' is damaged, values.bin has {612 + extra} bytes instead of 612: {again}"
        )
    (tmp_path / "values.bin").write_bytes(values)
    for number in (0, 7):
        (tmp_path / "series.json").write_text(index.replace('"format": 2', f'"format": {number}'))
        with pytest.raises(ValueError, match="format") as caught:
            SeriesStore.open(tmp_path)
        assert str(caught.value) == f"series store '{tmp_path}' has format {number}, this version reads 2: {again}"
    (tmp_path / "series.json").write_text(index)
    np.save(tmp_path / "offsets.npy", np.array([0, 153]))
    with pytest.raises(ValueError, match="damaged") as caught:
        SeriesStore.open(tmp_path)
    assert str(caught.value) == (
        f"series store '{tmp_path}' is damaged, series.json lists 9 series, offsets.npy has 1 and edges.npy has 9: "
        f"{again}"
    )


@pytest.mark.parametrize("i", [-1, 9])
def test_unknown_series_is_refused(dataset, i):
    with pytest.raises(IndexError) as caught:
        SeriesStore.from_dataset(dataset).series(i)
    assert str(caught.value) == f"series {i} does not exist: the store holds series 0 to 8"


def test_a_mapped_store_is_pickled_by_its_folder(dataset, tmp_path):
    dataset = [*dataset, {"target": np.zeros(10_000)}]
    mapped = SeriesStore.from_dataset(dataset, tmp_path / "store")
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 1_000
    for copy in (pickle.loads(pickled), pickle.loads(pickle.dumps(SeriesStore.from_dataset(dataset)))):
        assert copy.fingerprint() == mapped.fingerprint()
        assert copy.item_ids == mapped.item_ids


def test_a_large_store_is_never_held_in_memory(tmp_path):
    count, length = 64, 250_000

    def entries() -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {"target": np.arange(i, i + length, dtype=np.float32)}

    tracemalloc.start()
    store = SeriesStore.from_dataset(entries(), tmp_path)
    windows = Windows(store, context_length=72, prediction_length=36)
    batch = windows.sample(0, 256)
    last = next(iter(windows.last()))
    store.fingerprint()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert store.values.nbytes == 64_000_000
    assert peak < 10_000_000
    assert isinstance(store.values.base, np.memmap)
    assert np.shares_memory(store.series(3), store.values)
    np.testing.assert_array_equal(np.diff(batch["future_target"]), 1)
    np.testing.assert_array_equal(last["future_target"][:, -1], np.arange(count) + length - 1)
    (tmp_path / "values.bin").unlink()


def test_numbered_windows_are_all_that_are_drawn_from():
    gap = np.r_[np.arange(6.0), np.full(5, NAN), np.arange(6.0)]
    store = SeriesStore.from_dataset([{"target": np.arange(9.0)}, {"target": [1.0]}, {"target": gap}])
    windows = Windows(store, context_length=3, prediction_length=2, holdout=1)
    pairs = [(0, cut) for cut in range(1, 7)] + [(2, cut) for cut in range(1, 15)]
    assert len(windows) == len(pairs)
    # Nothing is observed in one half of these.
    good = [pair for pair in pairs if pair[0] == 0 or not 6 <= pair[1] <= 11]
    expected = windows.read(*zip(*good, strict=True))
    found = windows.numbered(np.arange(len(windows)))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    one = windows.numbered([len(windows) - 1])
    assert all(np.array_equal(one[name], expected[name][-1:]) for name in one)
    with pytest.raises(IndexError, match="^window 20 does not exist: numbers go from 0 to 19$"):
        windows.numbered([3, 20])


@pytest.mark.parametrize("options", [{}, {"min_context": 5}, {"holdout": 3}, {"min_context": 4, "holdout": 6}])
@pytest.mark.parametrize(("context", "prediction"), [(6, 3), (1, 1), (50, 4), (3, 9)])
def test_sampled_windows_equal_a_loop_and_are_admissible(store, dataset, context, prediction, options):
    windows = Windows(store, context_length=context, prediction_length=prediction, **options)
    admissible = naive_admissible(dataset, context, prediction, **options)
    seen = set()
    for step in range(4):
        batch = windows.sample(step, 200)
        series, cuts = windows.pairs(step, 200)
        assert_batch_equals_naive(batch, series, cuts, dataset, context, prediction)
        seen |= set(zip(series.tolist(), cuts.tolist(), strict=True))
    assert seen <= set(admissible)
    assert len(seen) > 0.95 * len(admissible)
    assert len(admissible) <= len(windows)


@pytest.mark.parametrize("missing", [0.0, 0.6])
def test_sampling_is_uniform_over_admissible_windows(missing):
    dataset = make_dataset(missing)[:6]
    windows = Windows(SeriesStore.from_dataset(dataset), context_length=4, prediction_length=2, seed=5)
    admissible = naive_admissible(dataset, 4, 2)
    counts = Counter(
        pair
        for step in range(100)
        for pair in zip(*(column.tolist() for column in windows.pairs(step, 300)), strict=True)
    )
    assert set(counts) == set(admissible)
    expected = 30_000 / len(admissible)
    chi_square = sum((counts[pair] - expected) ** 2 / expected for pair in admissible)
    degrees = len(admissible) - 1
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


def test_a_store_without_gaps_offers_every_cut():
    dataset = make_dataset(missing=0.0)[:6]
    windows = Windows(SeriesStore.from_dataset(dataset), context_length=4, prediction_length=2)
    assert len(windows) == len(naive_admissible(dataset, 4, 2)) == 38 + 5 + 23 + 10 + 1


def test_the_draw_depends_on_seed_and_step_alone(store, dataset):
    def make(seed: int) -> Windows:
        return Windows(store, context_length=5, prediction_length=2, seed=seed)

    forward = [make(1).sample(step, 32) for step in range(5)]
    windows = make(1)
    for step in (3, 0, 4, 4, 1, 2):
        windows.last()
        for name, values in windows.sample(step, 32).items():
            np.testing.assert_array_equal(values, forward[step][name])
    assert not np.array_equal(forward[0]["past_target"], forward[1]["past_target"])
    assert not np.array_equal(forward[0]["past_target"], make(2).sample(0, 32)["past_target"])
    # Seed and step are not interchangeable, nor summed.
    assert not np.array_equal(make(1).sample(2, 32)["past_target"], make(2).sample(1, 32)["past_target"])


@pytest.mark.parametrize("missing", [0.0, 0.7])
def test_a_smaller_batch_begins_a_larger_one(missing):
    windows = Windows(SeriesStore.from_dataset(make_dataset(missing)), context_length=3, prediction_length=2)
    large = np.stack(windows.pairs(7, 500))
    for size in (1, 3, 64):
        np.testing.assert_array_equal(np.stack(windows.pairs(7, size)), large[:, :size])


def test_rare_windows_are_found():
    target = np.full(100_000, np.nan)
    target[[0, 50_000, 50_001, 99_999]] = 1.0
    windows = Windows(SeriesStore.from_dataset([{"target": target}]), context_length=2, prediction_length=2)
    series, cuts = windows.pairs(0, 4)
    assert set(series) == {0}
    assert set(cuts) <= {50_000, 50_001, 50_002}


@pytest.mark.parametrize("context", [2, 3])
def test_gaps_that_leave_no_window_are_an_error(context):
    target = np.full(1_000, np.nan)
    target[[0, 999]] = 1.0
    windows = Windows(SeriesStore.from_dataset([{"target": target}]), context_length=context, prediction_length=4)
    with pytest.raises(ValueError, match="only 0 of") as caught:
        windows.sample(0, 8)
    assert re.sub("of [0-9]+ drawn", "of N drawn", str(caught.value)) == (
        f"only 0 of N drawn windows have an observed value both in context_length={context} and in "
        "prediction_length=4 steps: fill the gaps of the series, leave out those with long ones, or use longer windows"
    )


def test_series_without_windows_are_counted(store):
    windows = Windows(store, context_length=4, prediction_length=6)
    assert windows.skipped == Skipped(total=9, too_short=2, all_missing=1)
    assert str(windows.skipped) == (
        "skipped 3 of 9 series: 2 too short, 1 without observed values in context and label"
    )
    assert repr(windows) == (
        f"Windows({len(windows)} windows of 6 series, context_length=4, prediction_length=6, min_context=1, "
        "holdout=0, seed=0)"
    )
    longer = Windows(store, context_length=4, prediction_length=6, min_context=10, holdout=2)
    assert longer.skipped == Skipped(total=9, too_short=5, all_missing=1)


def test_values_in_the_holdout_do_not_count_as_observed():
    store = SeriesStore.from_dataset([{"target": [NAN] * 8 + [1.0] * 4}, {"target": range(12)}])
    assert Windows(store, context_length=2, prediction_length=2).skipped.all_missing == 0
    windows = Windows(store, context_length=2, prediction_length=2, holdout=4)
    assert windows.skipped == Skipped(total=2, too_short=0, all_missing=1)
    assert set(windows.pairs(0, 50)[0]) == {1}


@pytest.mark.parametrize(("leading", "trailing"), [(0, 0), (5, 0), (0, 6), (4, 7)])
def test_missing_ends_are_left_out_of_the_plan(leading, trailing):
    dataset = [{"target": np.array([NAN] * leading + [1.0] * 9 + [NAN] * trailing)}]
    windows = Windows(SeriesStore.from_dataset(dataset), context_length=30, prediction_length=5)
    assert len(windows) == len(naive_admissible(dataset, 30, 5))


def test_a_single_observed_value_makes_no_window():
    lonely = [NAN] * 5 + [1.0] + [NAN] * 5
    store = SeriesStore.from_dataset([{"target": lonely}, {"target": range(11)}])
    assert Windows(store, context_length=4, prediction_length=3).skipped == Skipped(2, 0, 1)


def test_nothing_skipped_is_said():
    assert str(Skipped(4, 0, 0)) == "skipped none of 4 series"
    assert str(Skipped(5, 0, 2, unit="windows")) == (
        "skipped 2 of 5 windows: 2 without observed values in context and label"
    )


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (
            [[1.0], [1.0, 2.0], [NAN] * 9],
            {"prediction_length": 3},
            "no series is left, skipped 3 of 3 series: 2 too short, 1 without observed values in context and label; a "
            "window needs min_context=1 + prediction_length=3 + holdout=0, 4 steps, and the longest series has 9: "
            "lower one of them or give longer series with observed values",
        ),
        (
            [[1.0] * 8],
            {"prediction_length": 4, "min_context": 2, "holdout": 3},
            "no series is left, skipped 1 of 1 series: 1 too short; a "
            "window needs min_context=2 + prediction_length=4 + holdout=3, 9 steps, and the longest series has 8: "
            "lower one of them or give longer series with observed values",
        ),
    ],
)
def test_no_series_left_is_an_error_with_counts(targets, options, message):
    store = SeriesStore.from_dataset([{"target": target} for target in targets])
    with pytest.raises(ValueError, match="no series is left") as caught:
        Windows(store, context_length=4, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"context_length": 0}, ValueError, "context_length must be at least 1, not 0"),
        ({"prediction_length": -2}, ValueError, "prediction_length must be at least 1, not -2"),
        ({"min_context": 0}, ValueError, "min_context must be at least 1, not 0"),
        ({"holdout": -1}, ValueError, "holdout must be at least 0, not -1"),
        ({"seed": -7}, ValueError, "seed must be at least 0, not -7"),
        ({"context_length": 2.5}, TypeError, "context_length must be an integer, not 2.5"),
        ({"seed": "a"}, TypeError, "seed must be an integer, not 'a'"),
    ],
)
def test_wrong_numbers_are_refused(dataset, options, kind, message):
    store = SeriesStore.from_dataset(dataset)
    with pytest.raises(kind) as caught:
        Windows(store, **{"context_length": 4, "prediction_length": 2, **options})
    assert str(caught.value) == message


def test_wrong_numbers_are_refused_at_the_call(dataset):
    windows = Windows(SeriesStore.from_dataset(dataset), context_length=4, prediction_length=2)
    for call, message in [
        (lambda: windows.sample(-1, 4), "step must be at least 0, not -1"),
        (lambda: windows.sample(0, 0), "batch_size must be at least 1, not 0"),
        (lambda: windows.last(0), "windows must be at least 1, not 0"),
        (lambda: windows.last(distance=0), "distance must be at least 1, not 0"),
        (lambda: windows.last(max_windows=-3), "max_windows must be at least 1, not -3"),
        (lambda: context_batches([], context_length=0, batch_size=4), "context_length must be at least 1, not 0"),
        (lambda: context_batches([], context_length=4, batch_size=0), "batch_size must be at least 1, not 0"),
    ]:
        with pytest.raises(ValueError, match="must be at least") as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize("options", [{}, {"min_context": 5}, {"holdout": 4}])
@pytest.mark.parametrize("distance", [None, 1, 5])
@pytest.mark.parametrize("count", [1, 3])
def test_last_windows_equal_a_loop(store, dataset, count, distance, options):
    windows = Windows(store, context_length=6, prediction_length=3, **options)
    admissible = set(naive_admissible(dataset, 6, 3, **options))
    expected, too_short = [], 0
    for i, entry in enumerate(dataset):
        for k in reversed(range(count)):
            cut = len(entry["target"]) - options.get("holdout", 0) - 3 - k * (distance or 3)
            too_short += cut < options.get("min_context", 1)
            expected += [(i, cut)] if (i, cut) in admissible else []

    last = windows.last(count, distance, batch_size=4)
    assert list(zip(last.series.tolist(), last.cuts.tolist(), strict=True)) == expected
    assert last.skipped == Skipped(9 * count, too_short, 9 * count - too_short - len(expected), unit="windows")
    assert len(last) == len(expected)
    first, second = list(last), list(last)
    assert [len(batch["past_target"]) for batch in first] == [
        min(4, len(last) - begin) for begin in range(0, len(last), 4)
    ]
    joined = {name: np.concatenate([batch[name] for batch in first]) for name in first[0]}
    assert_batch_equals_naive(joined, last.series, last.cuts, dataset, 6, 3)
    for name, values in joined.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in second]), values)


def held_out_steps(windows: Windows, apart: Any) -> list[set[int]]:
    """Return the steps of each series that the labels of the windows cover."""
    steps: list[set[int]] = [set() for _ in range(len(windows.store))]
    for series, cut in zip(apart.series.tolist(), apart.cuts.tolist(), strict=True):
        steps[series] |= set(range(cut, cut + windows.prediction_length))
    return steps


def test_long_series_give_the_windows_that_are_set_apart():
    store = SeriesStore.from_dataset([{"target": range(4000)}, *[{"target": range(200)} for _ in range(20)]])
    windows = Windows(store, context_length=72, prediction_length=24, min_context=24, holdout=24)
    rest, apart = windows.hold_out(50)
    assert len(apart) == 50
    assert set(apart.series.tolist()) == {0}
    assert apart.cuts[-1] == 4000 - 24 - 24
    assert np.diff(apart.cuts).tolist() == [6] * 49
    # None of the others loses anything, and nothing that was set apart is drawn.
    assert rest.skipped.too_short == 0
    assert rest.holdout.tolist() == [24 + 24 + 49 * 6] + [24] * 20
    series, cuts = rest.pairs(0, 50_000)
    assert cuts[series == 0].max() + 24 == apart.cuts[0]
    assert cuts[series > 0].max() + 24 == 200 - 24


@pytest.mark.parametrize("count", [1, 7, 64, 300])
@pytest.mark.parametrize("history", [False, True])
def test_what_is_set_apart_is_not_drawn_and_no_series_is_lost(count, history):
    rng = np.random.default_rng(count)
    lengths = [30, 45, 60, 61, 90, 120, 150, 400]
    store = SeriesStore.from_dataset([{"target": rng.normal(size=length)} for length in lengths])
    windows = Windows(store, context_length=20, prediction_length=5, min_context=8)
    rest, apart = windows.hold_out(count, history)
    assert 0 < len(apart) <= count
    assert rest.skipped == windows.skipped
    begins = [min(steps, default=10**9) - (20 if history else 0) for steps in held_out_steps(windows, apart)]
    series, cuts = rest.pairs(0, 20_000)
    assert all(cut + 5 <= begins[each] for each, cut in zip(series.tolist(), cuts.tolist(), strict=True))
    # Half of the training windows of a series at most.
    kept = np.bincount(series, minlength=len(lengths)) > 0
    assert kept.all()
    for each, length in enumerate(lengths):
        assert len(set(cuts[series == each].tolist())) >= (length - 5 - 8 + 1) // 2


def test_series_give_as_many_as_each_other_and_few_of_many_give_one():
    store = SeriesStore.from_dataset([{"target": range(1000)} for _ in range(7)])
    windows = Windows(store, context_length=10, prediction_length=8)
    assert np.bincount(windows.hold_out(64)[1].series).tolist() == [10, 9, 9, 9, 9, 9, 9]
    many = SeriesStore.from_dataset([{"target": range(300)} for _ in range(100)])
    rest, apart = Windows(many, context_length=10, prediction_length=8).hold_out(20)
    assert apart.series.tolist() == list(range(0, 100, 5))
    assert (rest.holdout > 0).sum() == 20


def test_windows_without_observations_are_not_set_apart():
    target = np.arange(200.0)
    target[-20:] = np.nan
    store = SeriesStore.from_dataset([{"target": target}, {"target": range(200)}])
    _, apart = Windows(store, context_length=10, prediction_length=4).hold_out(10)
    assert set(apart.series.tolist()) == {1}
    assert apart.skipped.all_missing == 5


def test_last_windows_continue_where_a_holdout_begins():
    store = SeriesStore.from_dataset([{"target": np.arange(30)}, {"target": np.arange(100, 125)}])
    training = Windows(store, context_length=5, prediction_length=4, holdout=4)
    validation = next(iter(Windows(store, context_length=5, prediction_length=4).last()))
    np.testing.assert_array_equal(validation["future_target"], [[26, 27, 28, 29], [121, 122, 123, 124]])
    labels = training.sample(0, 500)["future_target"]
    assert labels[labels < 100].max() == 25
    assert labels.max() == 120


@pytest.mark.parametrize(("limit", "chosen"), [(1, [0]), (3, [0, 4, 9]), (10, list(range(10))), (99, list(range(10)))])
def test_max_windows_are_evenly_spaced(limit, chosen):
    store = SeriesStore.from_dataset([{"target": np.arange(20)} for _ in range(10)])
    last = Windows(store, context_length=5, prediction_length=4).last(max_windows=limit)
    assert last.series.tolist() == chosen
    assert last.skipped == Skipped(10, 0, 0, unit="windows")


def test_no_last_window_left_is_an_error():
    store = SeriesStore.from_dataset([{"target": [1.0] * 6 + [NAN] * 4}, {"target": [1.0] * 3}])
    windows = Windows(store, context_length=4, prediction_length=3)
    with pytest.raises(ValueError, match="no window is left") as caught:
        windows.last()
    assert str(caught.value) == (
        "no window is left, skipped 2 of 2 windows: 1 too short, 1 without observed values in context and label; a "
        "window needs min_context=1 + prediction_length=3 + holdout=0, 4 steps, and the longest series has 10: "
        "lower one of them or give longer series with observed values"
    )
    assert repr(windows.last(2)) == (
        "LastWindows(1 windows in batches of 256, skipped 3 of 4 windows: 2 too short, "
        "1 without observed values in context and label)"
    )


def test_named_windows_are_read_also_inadmissible_ones(store, dataset):
    windows = Windows(store, context_length=6, prediction_length=3, holdout=5)
    series, cuts = [0, 6, 7, 7, 8, 1], [37, 5, 0, 12, 27, 1]
    assert_batch_equals_naive(windows.read(series, cuts), series, cuts, dataset, 6, 3)


@pytest.mark.parametrize(
    ("series", "cuts", "message"),
    [
        ([0, 9], [1, 1], "series 9 does not exist: the store holds 0 to 8"),
        ([-1], [1], "series -1 does not exist: the store holds 0 to 8"),
        ([0, 0], [37, 38], "cut 38 of series 0 leaves no room for prediction_length=3: cuts go from 0 to 37"),
        ([3], [-1], "cut -1 of series 3 leaves no room for prediction_length=3: cuts go from 0 to 22"),
    ],
)
def test_windows_beyond_a_series_are_refused(dataset, series, cuts, message):
    windows = Windows(SeriesStore.from_dataset(dataset), context_length=6, prediction_length=3)
    with pytest.raises(IndexError) as caught:
        windows.read(series, cuts)
    assert str(caught.value) == message


def test_constant_and_shortest_series():
    store = SeriesStore.from_dataset([{"target": [2.0, 2.0]}, {"target": [7.0]}, {"target": []}])
    windows = Windows(store, context_length=3, prediction_length=1)
    assert windows.skipped == Skipped(3, 2, 0)
    batch = windows.sample(0, 2)
    np.testing.assert_array_equal(batch["past_target"], [[0, 0, 2], [0, 0, 2]])
    np.testing.assert_array_equal(batch["past_observed_values"], [[0, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(batch["future_target"], [[2], [2]])
    np.testing.assert_array_equal(batch["future_observed_values"], [[1], [1]])


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("context", [1, 10, 100])
def test_context_batches_equal_a_loop(dataset, context, batch_size):
    dataset = [*dataset, {"target": []}]
    entries = []
    for members, batch in context_batches(dataset, context_length=context, batch_size=batch_size):
        entries += members
        width = max(1, *(min(context, len(entry["target"])) for entry in members), 0)
        rows = [naive_window(np.asarray(entry["target"]), len(entry["target"]), width, 0) for entry in members]
        np.testing.assert_array_equal(batch["past_target"], np.array([row[0] for row in rows], np.float32))
        np.testing.assert_array_equal(batch["past_observed_values"], np.array([row[1] for row in rows], np.float32))
        assert {array.dtype for array in batch.values()} == {np.dtype(np.float32)}
    assert all(one is other for one, other in zip(entries, dataset, strict=True))


def test_context_batches_are_lazy_and_may_be_none():
    taken = []

    def entries() -> Iterator[dict[str, Any]]:
        for i in range(10):
            taken.append(i)
            yield {"target": [i]}

    batches = context_batches(entries(), context_length=3, batch_size=4)
    assert taken == []
    next(batches)
    assert taken == [0, 1, 2, 3]
    assert list(context_batches([], context_length=3, batch_size=4)) == []


def test_the_module_is_light():
    script = "import sys, gluonts_peft.windows; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'peft')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=False).returncode == 0


def rich_entry(steps: int, future: int = 0, dimensions: int = 2, start: str = "2024-01-01 05:00") -> dict[str, Any]:
    """Values that tell where they come from: thousands for the field, tens for the row, units for the step."""
    step = np.arange(steps + future, dtype=np.float64)
    return {
        "item_id": f"{steps}",
        "start": pd.Period(start, freq="h"),
        "target": 10.0 * np.arange(dimensions)[:, None] + step[:steps] / 10,
        "feat_dynamic_real": 1000.0 + 10.0 * np.arange(3)[:, None] + step / 10,
        "past_feat_dynamic_real": 2000.0 + step[None, :steps] / 10,
    }


@pytest.mark.parametrize("on_disk", [False, True])
def test_dimensions_and_features_keep_their_places(on_disk: bool, tmp_path: Path) -> None:
    entries = [rich_entry(9), rich_entry(12)]
    entries[1]["target"][1, 5] = np.nan
    entries[1]["feat_dynamic_real"][2, 6] = np.nan
    store = SeriesStore.from_dataset(entries, tmp_path / "s" if on_disk else None, features=True, multivariate=True)
    assert store.layout == Layout(2, (("feat_dynamic_real", 3), ("past_feat_dynamic_real", 1)))
    assert store.values.shape == (21, 6)
    assert store.missing == 2
    windows = Windows(store, context_length=5, prediction_length=2)
    batch = windows.read([1, 0], [6, 3])

    def steps(begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end)[:, None] / 10

    np.testing.assert_allclose(batch["past_target"][0][:, 0], steps(1, 6)[:, 0], atol=1e-6)
    np.testing.assert_allclose(batch["past_target"][0][:4, 1], 10 + steps(1, 5)[:, 0], atol=1e-6)
    assert batch["past_target"][0, 4, 1] == 0
    np.testing.assert_array_equal(batch["past_observed_values"][0], [[1, 1]] * 4 + [[1, 0]])
    np.testing.assert_allclose(batch["future_target"][0], steps(6, 8) + [0, 10], atol=1e-6)
    known = batch["feat_dynamic_real"]
    assert known.shape == (2, 7, 3)
    np.testing.assert_allclose(known[0, :, :2], 1000 + steps(1, 8) + [0, 10], atol=1e-4)
    np.testing.assert_array_equal(batch["observed_feat_dynamic_real"][0, :, 2], [1, 1, 1, 1, 1, 0, 1])
    np.testing.assert_allclose(batch["past_feat_dynamic_real"][0], 2000 + steps(1, 6), atol=1e-4)
    # The second window reaches back two steps beyond its series: padding in every field.
    for name in ("past_observed_values", "observed_feat_dynamic_real", "past_observed_feat_dynamic_real"):
        assert not batch[name][1, :2].any()
        assert batch[name][1, 2:5].all()
    assert not batch["past_target"][1, :2].any()
    reopened = SeriesStore.open(tmp_path / "s") if on_disk else store
    assert reopened.fingerprint() == store.fingerprint()
    assert reopened.layout == store.layout
    fewer = SeriesStore.from_dataset(entries, multivariate=True)
    assert fewer.layout == Layout(2)
    assert fewer.fingerprint() != store.fingerprint()


def test_prediction_gets_features_of_the_future() -> None:
    entries = [rich_entry(4, future=3), rich_entry(9, future=5)]
    [(found, batch)] = context_batches(
        entries, context_length=6, batch_size=8, prediction_length=3, features=True, multivariate=True
    )
    assert found == entries
    assert batch["past_target"].shape == (2, 6, 2)
    assert "future_target" not in batch
    np.testing.assert_allclose(batch["past_target"][1, :, 1], 10 + np.arange(3, 9) / 10, atol=1e-6)
    np.testing.assert_allclose(batch["feat_dynamic_real"][1, :, 0], 1000 + np.arange(3, 12) / 10, atol=1e-4)
    np.testing.assert_allclose(batch["feat_dynamic_real"][0, 2:, 0], 1000 + np.arange(7) / 10, atol=1e-4)
    np.testing.assert_array_equal(batch["observed_feat_dynamic_real"][0, :, 0], [0, 0] + [1] * 7)
    assert batch["past_feat_dynamic_real"].shape == (2, 6, 1)
    with pytest.raises(ValueError, match=r"feat_dynamic_real of item_id '4' has 7 steps, needed are 8: the target's 4"):
        list(
            context_batches(
                entries, context_length=6, batch_size=8, prediction_length=4, features=True, multivariate=True
            )
        )


def test_entries_with_other_rows_are_refused() -> None:
    other = rich_entry(6)
    other["feat_dynamic_real"] = other["feat_dynamic_real"][:2]
    with pytest.raises(ValueError, match=r"feat_dynamic_real of item_id '6' has 2 rows, that of the first entry 3"):
        SeriesStore.from_dataset([rich_entry(5), other], features=True, multivariate=True)
    with pytest.raises(ValueError, match=r"target of item_id '6' has 3 rows, that of the first entry 2"):
        SeriesStore.from_dataset([rich_entry(5), rich_entry(6, dimensions=3)], features=True, multivariate=True)
    bare = {"item_id": "b", "target": rich_entry(5)["target"]}
    with pytest.raises(ValueError, match=r"item_id 'b' has no 'feat_dynamic_real'"):
        SeriesStore.from_dataset([rich_entry(5), bare], features=True, multivariate=True)
    with pytest.raises(ValueError, match="multivariate targets are not supported"):
        SeriesStore.from_dataset([rich_entry(5)], features=True)


@pytest.mark.parametrize("freq", ["h", "5min", "W", "M", "D"])
def test_time_features_are_those_of_gluonts(freq: str) -> None:
    names = ("minute_of_hour", "hour_of_day", "day_of_week", "day_of_month", "day_of_year")
    entries = [
        {"start": pd.Period("2023-12-30 22:50", freq=freq), "target": np.arange(30.0)},
        {"start": pd.Period("2024-02-27 01:05", freq=freq), "target": np.arange(40.0)},
    ]
    windows = Windows(SeriesStore.from_dataset(entries), context_length=7, prediction_length=3, time_features=names)
    cuts = [9, 25]
    found = windows.read([0, 1], cuts)["time_feat"]
    [(_, batch)] = context_batches(entries, context_length=7, batch_size=2, prediction_length=3, time_features=names)
    assert found.shape == batch["time_feat"].shape == (2, 10, 5)
    for row, (entry, cut) in enumerate(zip(entries, cuts, strict=True)):
        for features, end in ((found, cut), (batch["time_feat"], len(entry["target"]))):
            index = pd.period_range(entry["start"], periods=60, freq=freq)[end - 7 : end + 3]
            expected = np.stack([np.asarray(getattr(time_feature, name)(index)) for name in names], -1)
            np.testing.assert_allclose(features[row], expected, atol=1e-6)


def test_time_features_need_a_frequency() -> None:
    with pytest.raises(ValueError, match="time features need series that start at periods of one frequency"):
        Windows(
            SeriesStore.from_dataset([{"target": np.arange(9.0)}]),
            context_length=2,
            prediction_length=1,
            time_features=("hour_of_day",),
        )


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_changes_that_float64_does_not_hold_are_refused(spread):
    target = 1e13 + spread * np.sin(np.arange(50))
    with pytest.raises(
        ValueError, match="target of item_id 'A' changes by .* beside values of 1e\\+13, of which float64"
    ):
        SeriesStore.from_dataset([{"target": target, "item_id": "A"}])


def test_constants_that_were_computed_are_constants():
    target = np.array([0.1 + 0.2, 0.3, 0.3, 0.1 * 3])
    assert len(np.unique(target)) == 2
    assert SeriesStore.from_dataset([{"target": target}]).rest is None
