"""Which points of its space a search tries: drawn at random, all of them, or learnt from scores by Optuna."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .searchspec import SearcherSpec, SearchSpec, values_of

__all__ = ["Proposer"]

_ATTEMPTS = 100


class Proposer:
    """Proposes points of the space, each one once.

    Which points come depends on the seed, on how many came before and, with Optuna, on the scores that were known by
    then. The first one is the base as it stands.

    Parameters
    ----------
    spec
        The search.
    points
        What was proposed before, in its order.
    """

    def __init__(self, spec: SearchSpec, points: Sequence[Mapping[str, Any]] = ()) -> None:
        self.spec = spec
        self._cells = spec.grid()
        self._hashes: set[str] = set()
        self._count = 0
        self._study: Any = None
        for values in points:
            self._take(values)

    def propose(self) -> dict[str, Any] | None:
        """Return the next point, or None if there is no other one."""
        if self._count == 0:
            self._take({})
            return {}
        for values in self._candidates():
            if self.spec.trial(values).hash() not in self._hashes:
                self._take(values)
                return values
        return None

    def tell(self, values: Mapping[str, Any], scores: Sequence[float]) -> None:
        """Learn the scores of a point, one for each objective."""
        if self.spec.searcher.name == "optuna":
            self._history().add_trial(self._frozen(values, scores))

    def _take(self, values: Mapping[str, Any]) -> None:
        self._hashes.add(self.spec.trial(values).hash())
        self._count += 1

    def _candidates(self) -> Iterator[dict[str, Any]]:
        if self.spec.searcher.name == "grid":
            yield from self._cells
        else:
            for attempt in range(_ATTEMPTS):
                yield self._draw(attempt)

    def _draw(self, attempt: int) -> dict[str, Any]:
        """Draw a point by a sampler of its own, so that nothing but the numbers decides what it is."""
        import optuna

        entropy = [self.spec.seed, self._count, attempt]
        study = self._history() if self.spec.searcher.name == "optuna" and attempt < _ATTEMPTS // 2 else _study(1)
        learns = study is self._study
        study.sampler = _sampler(self.spec.searcher if learns else SearcherSpec(), entropy)
        trial = study.ask()
        values: dict[str, Any] = {}
        for path, space in self.spec.space.items():
            if space.applies(values):
                values[path] = space.decode(_drawn(trial, path, space.distribution()))
        # What is drawn is told when its scores are known; until then the study need not know of it.
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return values

    def _history(self) -> Any:
        if self._study is None:
            self._study = _study(len(self.spec.objective))
        return self._study

    def _frozen(self, values: Mapping[str, Any], scores: Sequence[float]) -> Any:
        import optuna

        # The base may have values that are not in the space, such as the adapter's own rate.
        known = values or values_of(self.spec)
        encoded = {path: self.spec.space[path].encode(value) for path, value in known.items()}
        params = {path: value for path, value in encoded.items() if value is not None}
        return optuna.trial.create_trial(
            params=params,
            distributions={path: self.spec.space[path].distribution() for path in params},
            values=[score if math.isfinite(score) else math.inf for score in scores],
        )


def _study(objectives: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize"] * objectives)


def _drawn(trial: Any, path: str, among: Any) -> Any:
    if hasattr(among, "choices"):
        return trial.suggest_categorical(path, among.choices)
    draw = trial.suggest_int if isinstance(among.low, int) else trial.suggest_float
    return draw(path, among.low, among.high, log=among.log)


def _sampler(searcher: SearcherSpec, entropy: Sequence[int]) -> Any:
    import numpy as np
    from optuna import samplers

    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    if searcher.name == "optuna":
        return samplers.TPESampler(seed=seed, n_startup_trials=searcher.n_startup_trials or 10)
    return samplers.RandomSampler(seed=seed)
