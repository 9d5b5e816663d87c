"""Compare rules of handing over and claiming on stored scores, on series that were drawn again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from models import MIXTURES, WEIGHTS

from gluonts_peft.verdict import Candidate, judge

Choice = Callable[[np.ndarray, np.ndarray, int], int]

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


def lower(steps: int) -> Choice:
    """Take a weight so many steps below the one of the lowest mean."""
    return lambda zero, scores, best: best - min(steps, best % len(WEIGHTS))


def lower_by_few(zero: np.ndarray, scores: np.ndarray, best: int) -> int:
    """Take a weight one step below, two with fewer than 40 series: the verdict's own choice."""
    return lower(2 if len(zero) < 40 else 1)(zero, scores, best)


def within_error(share: float) -> Choice:
    """Take the lowest weight that is not worse than the best by more than a share of their difference's error."""

    def choose(zero: np.ndarray, scores: np.ndarray, best: int) -> int:
        excess = scores[best - best % len(WEIGHTS) : best + 1] - scores[best]
        allowed = share * excess.std(axis=1, ddof=1) / np.sqrt(len(zero))
        return best - best % len(WEIGHTS) + int((excess.mean(axis=1) <= allowed).argmax())

    return choose


def shrunk(zero: np.ndarray, scores: np.ndarray, best: int) -> int:
    """Shrink the weight by how much of the gain may be chance: 1 less its squared relative error."""
    gains = zero - scores[best]
    relative = gains.std(ddof=1) / np.sqrt(len(gains)) / max(gains.mean(), 1e-12)
    wanted = WEIGHTS[best % len(WEIGHTS)] * max(0.0, 1.0 - relative**2)
    return best - best % len(WEIGHTS) + int(np.abs(np.array(WEIGHTS) - wanted).argmin())


def lower_unless_certain(zero: np.ndarray, scores: np.ndarray, best: int) -> int:
    """Choose as the verdict does, but the best itself where its gain is more than two and a half times its error."""
    gains = zero - scores[best]
    certain = gains.mean() > 2.5 * gains.std(ddof=1) / np.sqrt(len(gains))
    return best if certain else lower_by_few(zero, scores, best)


#: Ways to go from the candidate of the lowest mean to the one that is handed over; the epoch stays.
CHOICES: dict[str, Choice] = {
    "the best": lower(0),
    "one step lower": lower(1),
    "one step lower, two with fewer than 40 (the verdict)": lower_by_few,
    "the same, but the best where its gain is certain": lower_unless_certain,
    "lowest within half an error of the best": within_error(0.5),
    "lowest within an error of the best": within_error(1.0),
    "shrunk by its error": shrunk,
}
#: Numbers of series for the comparison of choices, and the change in per cent from which a model has much to give.
CHOICE_SIZES, MUCH = (5, 20, 69, 300), 1.5


def choices_table(folder: Path, draws: int) -> list[str]:
    """Return a Markdown table of ways to choose the weight, each handed over where it helps cross-fitted."""
    found = list(models(folder, MIXTURES[0], null=False))
    heads = " | ".join(f"n = {size}" for size in CHOICE_SIZES)
    lines = [f"| weight | {heads} |", "|---|" + "---|" * len(CHOICE_SIZES)]
    for name, choice in CHOICES.items():
        cells = []
        for size in CHOICE_SIZES:
            effects, much = [], []
            for number, model in enumerate(found):
                for repeat in range(draws):
                    windows = np.random.default_rng([number, size, repeat]).permutation(len(model.zero))[:size]
                    chosen = _handed_over(choice, model.zero[windows], model.scores[:, windows])
                    effects.append(0.0 if chosen is None else float(model.unseen[chosen]))
                    if model.unseen.min() < -MUCH:
                        much.append(effects[-1])
            worse = 100 * np.mean(np.array(effects) > 0)
            cells.append(f"{np.mean(effects):+.2f} %, {worse:.0f} % worse, {np.mean(much):+.2f} %")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)  # noqa: T201
    return lines


def _handed_over(choice: Choice, zero: np.ndarray, scores: np.ndarray) -> int | None:
    """Return the candidate that is handed over by a way of choosing, None for zero-shot."""

    def chosen(units: np.ndarray) -> int | None:
        best = int(scores[:, units].mean(axis=1).argmin())
        better = scores[best, units].mean() < zero[units].mean()
        return choice(zero[units], scores[:, units], best) if better else None

    count = len(zero)
    part = np.random.default_rng(0).permutation(np.arange(count) % min(5, count))
    change = 0.0
    for fold in range(min(5, count)):
        candidate = chosen(np.flatnonzero(part != fold))
        if candidate is not None:
            change += (scores[candidate] - zero)[part == fold].sum()
    return chosen(np.arange(count)) if change < 0 else None
