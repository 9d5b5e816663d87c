"""Checks of the contracts, for authors of model families and adapters.

A clause of a contract is one named function of a table, :data:`BACKBONE_CHECKS`, :data:`ADAPTER_CHECKS` or
:data:`ESTIMATOR_CHECKS`; its docstring is the clause, its message says what to mend. In a test-suite each is one test::

    from gluonts_peft import load_backbone
    from gluonts_peft.testing import backbone_checks, estimator_checks, parametrize_with_checks

    def backbone():
        return load_backbone("mine", prediction_length=8)

    @parametrize_with_checks([*backbone_checks(backbone), *estimator_checks(MyEstimator)])
    def test_contract(check):
        check()

Elsewhere :func:`check_backbone`, :func:`check_adapter` and :func:`check_estimator` run them all and list what failed.
A failure that cannot be mended is declared with its reason, ``expected_failed_checks={"name": "reason"}``; it is an
error if it passes all the same. The model is scikit-learn's ``check_estimator``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .adapters import ADAPTER_CHECKS
from .backbones import BACKBONE_CHECKS
from .cases import AdapterCase, BackboneCase, EstimatorCase, make_batch, make_dataset
from .contract import Check, ContractError, Result, bind, run
from .estimators import ESTIMATOR_CHECKS

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..estimator import PeftEstimator

__all__ = [
    "ADAPTER_CHECKS",
    "BACKBONE_CHECKS",
    "ESTIMATOR_CHECKS",
    "Check",
    "ContractError",
    "Result",
    "adapter_checks",
    "backbone_checks",
    "check_adapter",
    "check_backbone",
    "check_estimator",
    "estimator_checks",
    "make_batch",
    "make_dataset",
    "parametrize_with_checks",
]


def check_backbone(
    backbone: Backbone | Callable[[], Backbone],
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    raise_failures: bool = True,
) -> list[Result]:
    """Check that a model family keeps the contract of :class:`~gluonts_peft.backbone.Backbone`.

    Parameters
    ----------
    backbone
        A backbone made by ``from_checkpoint``, without an adapter, or a function that makes one. It is not changed.
        Small lengths make the checks quick: ``prediction_length=8, context_length=48`` if the family lets you choose.
    expected_failed_checks
        Name of a check -> why the family cannot keep that clause.
    raise_failures
        Raise at the end if a check failed.

    Returns
    -------
    list of Result
        One a check, in the order of :data:`BACKBONE_CHECKS`.

    Raises
    ------
    ContractError
        If a check failed, or passed though it was declared to fail; the message lists all of them.
    """
    case = BackboneCase(backbone)
    return run(bind(BACKBONE_CHECKS, case, expected_failed_checks), f"backbone {case}", raise_failures)


def check_adapter(
    adapter: Any,
    backbone: Backbone | Callable[[], Backbone],
    *,
    without_effect: str | Iterable[str] = (),
    expected_failed_checks: Mapping[str, str] | None = None,
    raise_failures: bool = True,
) -> list[Result]:
    """Check that an adapter keeps the contract of :class:`~gluonts_peft.adapters.base.Adapter` on a backbone.

    Parameters
    ----------
    adapter
        Name, mapping or list, as :func:`gluonts_peft.get_adapter` takes it. Where the family brings no trained head,
        ``"head"`` is added to it, as in :class:`~gluonts_peft.PeftEstimator`.
    backbone
        A backbone without an adapter, or a function that makes one. It is not changed.
    without_effect
        Regular expressions of parameters of the network that have no influence on the loss, so that training does not
        move them.
    expected_failed_checks, raise_failures
        As for :func:`check_backbone`; the names are those of :data:`ADAPTER_CHECKS`.

    Raises
    ------
    ContractError
        If a check failed, or passed though it was declared to fail; the message lists all of them.
    """
    case = AdapterCase(adapter, backbone, without_effect=without_effect)
    return run(bind(ADAPTER_CHECKS, case, expected_failed_checks), f"adapter {case}", raise_failures)


def check_estimator(
    estimator: type[PeftEstimator],
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    raise_failures: bool = True,
    **options: Any,
) -> list[Result]:
    """Check a family's estimator: training, forecasting, storing, resuming.

    Parameters
    ----------
    estimator
        Class.
    expected_failed_checks, raise_failures
        As for :func:`check_backbone`; the names are those of :data:`ESTIMATOR_CHECKS`.
    **options
        Arguments of the class, for another checkpoint or adapter or shorter lengths.

    Raises
    ------
    ContractError
        If a check failed, or passed though it was declared to fail; the message lists all of them.
    """
    case = EstimatorCase(estimator, options)
    return run(bind(ESTIMATOR_CHECKS, case, expected_failed_checks), f"estimator {case}", raise_failures)


def backbone_checks(
    backbone: Backbone | Callable[[], Backbone],
    *,
    label: str | None = None,
    expected_failed_checks: Mapping[str, str] | None = None,
) -> list[Check]:
    """Return the checks that :func:`check_backbone` runs; a function is called when the first of them runs.

    Parameters
    ----------
    label
        Start of the tests' names.
    """
    return bind(BACKBONE_CHECKS, BackboneCase(backbone, label), expected_failed_checks)


def adapter_checks(
    adapter: Any,
    backbone: Backbone | Callable[[], Backbone],
    *,
    label: str | None = None,
    without_effect: str | Iterable[str] = (),
    expected_failed_checks: Mapping[str, str] | None = None,
) -> list[Check]:
    """Return the checks that :func:`check_adapter` runs. All of them share one short training."""
    case = AdapterCase(adapter, backbone, label, without_effect=without_effect)
    return bind(ADAPTER_CHECKS, case, expected_failed_checks)


def estimator_checks(
    estimator: type[PeftEstimator],
    *,
    label: str | None = None,
    expected_failed_checks: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Check]:
    """Return the checks that :func:`check_estimator` runs."""
    return bind(ESTIMATOR_CHECKS, EstimatorCase(estimator, options, label), expected_failed_checks)


def parametrize_with_checks(checks: Iterable[Check]) -> Callable[[Any], Any]:
    """Make each check a test of pytest: a decorator of a test function with the argument ``check``.

    Parameters
    ----------
    checks
        Of :func:`backbone_checks`, :func:`adapter_checks` and :func:`estimator_checks`. Expected failures become
        strict ``xfail`` marks.
    """
    import pytest

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                check,
                id=str(check),
                marks=[] if check.expected is None else pytest.mark.xfail(reason=check.expected, strict=True),
            )
            for check in checks
        ],
    )
