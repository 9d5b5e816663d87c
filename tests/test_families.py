"""Every installed family keeps the contract: the public checks, on each bundled checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

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
