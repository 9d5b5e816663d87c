"""What a check is: a clause, what it is asked of, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch

from ..errors import unknown

__all__ = ["Check", "Clause", "ContractError", "Result", "bind", "clause_of", "refusal", "require", "run"]

Clause = Callable[[Any], None]


class ContractError(AssertionError):
    """Something does not keep its contract.

    Attributes
    ----------
    results
        What each check found.
    """

    def __init__(self, message: str, results: Sequence[Result] = ()) -> None:
        super().__init__(message)
        self.results = list(results)


@dataclass(frozen=True)
class Result:
    """What a check found.

    Parameters
    ----------
    name
        Name in its table.
    status
        ``"passed"``, ``"failed"``, ``"expected"`` (failed as declared), ``"unexpected"`` (passed, though a failure was
        declared) or ``"skipped"`` (the clause does not apply).
    message
        What to mend, or why it was skipped or expected; empty if it passed.
    """

    name: str
    status: str
    message: str = ""


@dataclass(frozen=True)
class Check:
    """A clause of a contract together with what it is asked of. Calling it raises if the clause is not kept.

    Parameters
    ----------
    name
        Name in its table.
    case
        What is checked.
    clause
        The function.
    expected
        Why it is expected to fail, or None.
    """

    name: str
    case: Any
    clause: Clause
    expected: str | None = None

    def __call__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.clause(self.case)

    def __str__(self) -> str:
        return f"{self.case}-{self.name}"

    def run(self) -> Result:
        """Run the check and return what it found; nothing is raised."""
        try:
            self()
        except SkipTest as reason:
            return Result(self.name, "skipped", str(reason))
        except Exception as error:
            text = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
            if self.expected is not None:
                return Result(self.name, "expected", f"{self.expected} ({text})")
            return Result(self.name, "failed", text if isinstance(error, ContractError) else self._explained(text))
        if self.expected is not None:
            return Result(
                self.name, "unexpected", f"passes, but was declared to fail: {self.expected}; declare it no more"
            )
        return Result(self.name, "passed")

    def _explained(self, text: str) -> str:
        return f"{text} (the clause: {(self.clause.__doc__ or self.name).strip()})"


def clause_of(table: dict[str, Clause]) -> Callable[[Clause], Clause]:
    def register(function: Clause) -> Clause:
        table[function.__name__] = function
        return function

    return register


def bind(table: Mapping[str, Clause], case: Any, expected: Mapping[str, str] | None) -> list[Check]:
    expected = dict(expected or {})
    for name in expected:
        if name not in table:
            raise ValueError(unknown("check", name, table))
    return [Check(name, case, clause, expected.get(name)) for name, clause in table.items()]


def run(checks: Iterable[Check], subject: str, raise_failures: bool) -> list[Result]:
    results = [check.run() for check in checks]
    failed = [result for result in results if result.status in ("failed", "unexpected")]
    if failed and raise_failures:
        lines = "\n".join(f"  {result.name}: {result.message}" for result in failed)
        raise ContractError(f"{len(failed)} of {len(results)} checks failed on {subject}:\n{lines}", results)
    return results


def require(condition: object, message: str) -> None:
    if not condition:
        raise ContractError(message)


def refusal(call: Callable[[], Any], kind: type[Exception], what: str) -> str:
    """Return the message with which a call is refused."""
    try:
        call()
    except kind as error:
        return str(error)
    except Exception as error:
        raise ContractError(
            f"{what} ends in {type(error).__name__}: {error}; raise {kind.__name__} with a sentence that says what to"
            " do"
        ) from error
    raise ContractError(f"{what} is accepted; raise {kind.__name__} with a sentence that says what to do")
