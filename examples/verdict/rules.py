"""Compare rules of handing over and claiming on stored scores, on series that were drawn again and again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from models import MIXTURES, WEIGHTS

from gluonts_peft.verdict import Candidate, judge

SIZES = (5, 20, 100, 300)
#: Share of zero-shot's weighted quantile loss that could have been saved, in per cent, for a model to count as good.
GOOD = 0.5
RULES = ("loss, best epoch, <", "scores, best candidate, <", "verdict", "verdict, proven only")


class Model:
    """Scores of one model at all its candidates, on the windows of one pool to judge and on the other to know."""

    def __init__(self, arrays: dict[str, np.ndarray], name: str, mixture: str, judged: np.ndarray) -> None:
        scores, zero = arrays[f"{name}/{mixture}"], arrays["zero-shot"]
        epochs, weights = scores.shape[:2]
        self.candidates = [(epoch, weight) for epoch in range(epochs) for weight in range(weights)]
        flat = scores.reshape(epochs * weights, 3, -1)
        self.zero, self.scores = zero[0, judged], flat[:, 0][:, judged]
        self.zero_loss, self.losses = arrays["zero-shot loss"][judged], arrays[f"{name}/loss"][:, judged]
        good = np.isfinite(self.zero)
        self.zero, self.scores = self.zero[good], self.scores[:, good]
        self.zero_loss, self.losses = self.zero_loss[good], self.losses[:, good]
        base = zero[1, ~judged].sum()
        #: Change of the weighted quantile loss on unseen patients, in per cent.
        self.unseen = 100 * (flat[:, 1][:, ~judged].sum(axis=1) / base - 1)

    def decide(self, rule: str, windows: np.ndarray) -> tuple[int | None, bool]:
        """Return the candidate that is handed over, None for zero-shot, and whether it is called proven."""
        if rule == RULES[0]:
            means = self.losses[:, windows].mean(axis=1)
            epoch = int(means.argmin())
            helped = means[epoch] < self.zero_loss[windows].mean()
            return (epoch * len(WEIGHTS) + len(WEIGHTS) - 1 if helped else None), bool(helped)
        scores, zero = self.scores[:, windows], self.zero[windows]
        if rule == RULES[1]:
            best = int(scores.mean(axis=1).argmin())
            helped = scores[best].mean() < zero.mean()
            return (best if helped else None), bool(helped)
        rows = zip(self.candidates, scores, strict=True)
        found = judge(zero, [Candidate(epoch, WEIGHTS[weight], row) for (epoch, weight), row in rows])
        handed_over = found.helped if rule == RULES[2] else found.proven
        if not handed_over or found.epoch is None or found.weight is None:
            return None, found.proven
        return self.candidates.index((found.epoch, WEIGHTS.index(found.weight))), found.proven


def models(folder: Path, mixture: str, null: bool) -> Iterator[Model]:
    for file in sorted(folder.glob("*.npz")):
        arrays = dict(np.load(file))
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays if "/" in key)
        for name in names:
            if name.startswith("null") == null:
                for pool in (False, True):
                    yield Model(arrays, name, mixture, arrays["pool"] == pool)


def row(found: list[Model], rule: str, size: int, draws: int) -> dict[str, float]:
    """Return what a rule does, in per cent of all draws of all models."""
    change, worse, missed, proven, passed = [], 0, 0, 0, 0
    total = 0
    for number, model in enumerate(found):
        count = len(model.zero)
        repeats = draws if size < count else 1
        best = model.unseen.min()
        for repeat in range(repeats):
            windows = np.random.default_rng([number, size, repeat]).permutation(count)[:size]
            chosen, claim = model.decide(rule, windows)
            weight = draws / repeats
            effect = 0.0 if chosen is None else float(model.unseen[chosen])
            change.append(effect * weight)
            worse += (effect > 0) * weight
            missed += (chosen is None and best < -GOOD) * weight
            passed += (chosen is not None) * weight
            proven += claim * weight
            total += weight
    return {
        "change": sum(change) / total,
        "worse": 100 * worse / total,
        "missed": 100 * missed / total,
        "handed over": 100 * passed / total,
        "proven": 100 * proven / total,
    }


def table(folder: Path, draws: int) -> tuple[list[str], dict[tuple[str, str, int], dict[str, float]]]:
    """Return the table as Markdown, and its numbers by mixture, rule and number of series."""
    numbers: dict[tuple[str, str, int], dict[str, float]] = {}
    lines = [
        "| mixture | rule | n | change of WQL, unseen | handed over and worse | zero-shot kept though > 0.5 % possible"
        " | nulls handed over | nulls proven |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for mixture in MIXTURES:
        tuned = list(models(folder, mixture, null=False))
        first = mixture == MIXTURES[0]
        nulls = list(models(folder, mixture, null=True)) if first else []
        for rule in RULES if first else RULES[2:3]:
            for size in SIZES:
                found = row(tuned, rule, size, draws)
                line = f"| {mixture} | {rule} | {size} | {found['change']:+.2f} % | {found['worse']:.1f} % |"
                line += f" {found['missed']:.0f} % |"
                if nulls:
                    nothing = row(nulls, rule, size, draws)
                    found["proven by noise"] = nothing["proven"]
                    line += f" {nothing['handed over']:.0f} % | {nothing['proven']:.1f} % |"
                numbers[mixture, rule, size] = found
                lines.append(line if nulls else f"{line} | |")
                print(lines[-1], flush=True)  # noqa: T201
    return lines, numbers
