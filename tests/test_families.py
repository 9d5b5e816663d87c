"""Every installed family keeps the contract: the public checks, on each bundled checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gluonts_peft
from gluonts_peft.backbone import Backbone
from gluonts_peft.registry import families
from gluonts_peft.testing import Check, backbone_checks, estimator_checks, parametrize_with_checks

# Clauses that a checkpoint cannot keep, with the reason.
BACKBONE_FAILS: dict[str, dict[str, str]] = {}
ESTIMATOR_FAILS: dict[str, dict[str, str]] = {}


@cache
def backbone(family: str, checkpoint: str) -> Backbone:
    return gluonts_peft.load_backbone(family, checkpoint=checkpoint, prediction_length=8, context_length=48)


def rows() -> Iterator[Check]:
    for family in families.names():
        estimator = families.get(family)
        for checkpoint in estimator.backbone_class.bundled():
            label = f"{family}-{checkpoint}"
            expected = BACKBONE_FAILS.get(checkpoint)
            yield from backbone_checks(
                partial(backbone, family, checkpoint), label=label, expected_failed_checks=expected
            )
            expected = ESTIMATOR_FAILS.get(checkpoint)
            yield from estimator_checks(
                estimator, label=label, checkpoint=checkpoint, expected_failed_checks=expected, context_length=48
            )


@parametrize_with_checks(rows())
def test_contract(check: Check) -> None:
    check()


@pytest.mark.parametrize(("family", "checkpoint"), [("chronos", "bolt-nano"), ("chronos", "chronos2-nano")])
def test_numbers_do_not_depend_on_where_a_file_has_its_weights(
    family: str, checkpoint: str, tmp_path: Path, make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    """Libraries map files, so an offset in a file becomes an address in memory, and some processors round by that."""
    batch = make_batch(context=48, prediction=8)
    wanted = backbone(family, checkpoint).loss(batch)
    for padding in range(0, 64, 8):
        folder = tmp_path / str(padding)
        shutil.copytree(backbone(family, checkpoint).bundled()[checkpoint], folder)
        content = (folder / "model.safetensors").read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        assert json.loads(content[8:size])
        # The format lets a header end in spaces.
        header = content[8:size] + b" " * padding
        weights = len(header).to_bytes(8, "little") + header + content[size:]
        (folder / "model.safetensors").write_bytes(weights)
        loaded = gluonts_peft.load_backbone(family, checkpoint=folder, prediction_length=8, context_length=48)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.network.parameters())
        assert torch.equal(loaded.loss(batch), wanted)
        assert torch.equal(copy.deepcopy(loaded).loss(batch), wanted)
