from __future__ import annotations

import errno
import math
import pickle
import re
import resource
import signal
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from gluonts_peft.checkpoint_io import SafeCheckpointIO, read_checkpoint, write_checkpoint


def assert_same(left: Any, right: Any) -> None:
    """Equal in value and in type, all the way down; NaN equals NaN."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for (a, x), (b, y) in zip(left.items(), right.items(), strict=True):
            assert_same(a, b)
            assert_same(x, y)
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            assert_same(x, y)
    elif isinstance(left, float) and math.isnan(left):
        assert math.isnan(right)
    else:
        assert left == right


NESTED: dict[str, Any] = {
    "epoch": 3,
    "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.arange(6.0).view(2, 3)}, 1: {}},
    "betas": (0.9, 0.999),
    "deep": [(), [], {}, ((1, "a"), [None, (True,)])],
    "limits": [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308],
    "flags": {True: False, "x": None},
    "keys": {(1, "a"): 1, 2.5: 2, None: 3, "1": 4, 1: 5},
    "big": 2**70,
    "text": "Säule \u2026 \n 'quoted' \\ \x00",
    "scalar": torch.tensor(3, dtype=torch.int64),
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "bits": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 4),
    "special": torch.tensor([math.inf, -math.inf]),
    "bytes": torch.arange(4, dtype=torch.uint8),
}


def test_a_nested_state_comes_back_the_same(tmp_path: Path) -> None:
    write_checkpoint(NESTED, tmp_path / "a.ckpt")
    assert_same(read_checkpoint(tmp_path / "a.ckpt"), NESTED)


def test_an_empty_state_comes_back_empty(tmp_path: Path) -> None:
    write_checkpoint({}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt") == {}


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_checkpoint(NESTED, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int64(-3), -3),
        (np.bool_(True), True),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (torch.Size([2, 3]), (2, 3)),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_relatives_of_plain_types_come_back_plain(tmp_path: Path, value: Any, expected: Any) -> None:
    write_checkpoint({"v": value}, tmp_path / "a.ckpt")
    assert_same(read_checkpoint(tmp_path / "a.ckpt"), {"v": expected})


def test_shared_and_strided_tensors_come_back_each_for_itself(tmp_path: Path) -> None:
    """safetensors by itself refuses tensors that share memory; an optimiser's state may hold them."""
    base = torch.arange(12.0).view(3, 4)
    write_checkpoint({"a": base, "b": base, "row": base[1], "t": base.T}, tmp_path / "a.ckpt")
    read = read_checkpoint(tmp_path / "a.ckpt")
    assert_same(read, {"a": base, "b": base, "row": base[1], "t": base.T.contiguous()})
    read["a"].zero_()
    assert torch.equal(read["b"], base)


def test_a_later_change_of_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    weights = torch.ones(3)
    write_checkpoint({"w": weights}, tmp_path / "a.ckpt")
    weights.zero_()
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"callbacks": {"mine": [0, {1, 2}]}},
            "state.callbacks.mine[1] is a set; a checkpoint holds tensors, numbers, strings and containers",
        ),
        (
            {"optimizer": {0: np.zeros(3)}},
            "state.optimizer.0 is a ndarray; a checkpoint holds tensors, numbers, strings and containers",
        ),
        (
            {"a": {b"k": 1}},
            "state.a is a bytes; a checkpoint holds tensors, numbers, strings and containers",
        ),
        (
            {"path": (Path("x"),)},
            f"state.path[0] is a {type(Path('x')).__name__}; a checkpoint holds tensors, numbers, strings and"
            " containers",
        ),
    ],
    ids=["set", "array", "bytes-key", "path"],
)
def test_other_types_are_refused_with_their_place_and_nothing_is_written(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        write_checkpoint(state, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.ckpt"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(f'checkpoint {str(path)!r} does not exist')}$"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"checkpoint {str(tmp_path)!r} does not exist")):
        read_checkpoint(tmp_path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    message = f"{str(path)!r} is a safetensors file, but not a training checkpoint"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_checkpoint(path)
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_checkpoint(path)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}}))


def _torch_saved(path: Path) -> None:
    torch.save({"state_dict": {}}, path)


def _truncated(path: Path) -> None:
    write_checkpoint(NESTED, path)
    path.write_bytes(path.read_bytes()[:-7])


def _cut_in_the_header(path: Path) -> None:
    write_checkpoint(NESTED, path)
    path.write_bytes(path.read_bytes()[:40])


def _empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("make", [_pickled, _torch_saved, _truncated, _cut_in_the_header, _empty])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "a.ckpt"
    make(path)
    message = f"{str(path)!r} is not a training checkpoint of this project, or is damaged: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}."):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [("{", "JSONDecodeError"), ('{"tensor": "9"}', "KeyError('9')"), ('{"a": 1, "b": 2}', "ValueError")],
    ids=["not-json", "tensor-missing", "other-tree"],
)
def test_a_damaged_tree_is_refused(tmp_path: Path, header: str, reason: str) -> None:
    path = tmp_path / "a.ckpt"
    safetensors.torch.save_file({"0": torch.ones(2)}, path, metadata={"gluonts_peft_checkpoint": header})
    message = f"{str(path)!r} is a damaged training checkpoint: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read_checkpoint(path)


def test_a_pickle_is_not_even_opened(tmp_path: Path) -> None:
    """Reading must not run code that a file brings along."""
    path, witness = tmp_path / "a.ckpt", tmp_path / "witness"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (witness,))

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is not a training checkpoint of this project, or is damaged"):
        read_checkpoint(path)
    assert not witness.exists()


def test_a_full_disk_leaves_the_earlier_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint({"epoch": 1}, path)

    def full(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_checkpoint({"epoch": 2}, path)
    assert caught.value.errno == errno.ENOSPC
    assert read_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_refuses_is_an_os_error(tmp_path: Path) -> None:
    """safetensors reports it in a class of its own; a limit on file sizes stands for the full disk."""
    path = tmp_path / "a.ckpt"
    write_checkpoint({"epoch": 1}, path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        name = rf"{re.escape(str(tmp_path))}/\.a\.ckpt\.\w+\.partial"
        with pytest.raises(OSError, match=rf"^'{name}' cannot be written: "):
            write_checkpoint({"w": torch.zeros(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert read_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_while_writing_leaves_the_earlier_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint({"epoch": 1}, path)

    def interrupted(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_lightning_plugin_writes_reads_and_removes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.ckpt"
    plugin = SafeCheckpointIO()
    plugin.save_checkpoint(NESTED, path)
    assert_same(plugin.load_checkpoint(path, weights_only=True), NESTED)
    plugin.remove_checkpoint(path)
    assert not path.exists()
    plugin.remove_checkpoint(path)
