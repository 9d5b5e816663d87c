"""Search for an adapter from Python, and forecast with the best one.

    python examples/search.py --out $PWD/runs/example                    # without Ray, a minute
    python examples/search.py --out $PWD/runs/example --ray              # Ray on this machine
    python examples/search.py --out /shared/runs/example --address auto  # on a cluster

The space is tried on simulated vital signs; no patient ever had these values. The same command goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gluonts.model.predictor import Predictor

from gluonts_peft.trials import SearchSpec, load_data, print_ranking, search

SPEC = SearchSpec(
    base={
        "family": "chronos",
        "checkpoint": "bolt-nano",
        "adapter": "lora",
        "prediction_length": 12,
        "context_length": 36,
        "training": {"max_epochs": 2, "num_batches_per_epoch": 5},
        "data": {"source": "simulated", "patients": 20, "hours": 12, "vital": "hr", "windows": 2},
    },
    space={
        "adapter.name": {"space": "choice", "categories": ["lora", "bitfit"]},
        # A rank only where the adapter has one.
        "adapter.r": {"space": "choice", "categories": [2, 8], "when": {"adapter.name": "lora"}},
        "training.learning_rate": {"space": "loguniform", "lower": 1e-4, "upper": 1e-2},
    },
    objective="MAE",
    num_samples=4,
)


def main() -> None:
    """Search, and show the ranking and a forecast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="absolute path of a folder")
    parser.add_argument("--ray", action="store_true", help="start Ray on this machine")
    parser.add_argument("--address", help="of a Ray cluster")
    options = parser.parse_args()

    serial = not options.ray and options.address is None
    ranking = search(SPEC, options.out, address=options.address, serial=serial, progress=False)
    print_ranking(ranking)

    best = Predictor.deserialize(options.out / "best")
    entry = load_data(SPEC.trial({}).data).test[0]
    forecast = next(iter(best.predict([entry])))
    median = ", ".join(f"{value:.0f}" for value in forecast.quantile(0.5))
    print(f"{entry['item_id']}, the next hour: {median}")  # noqa: T201


# Workers import this file.
if __name__ == "__main__":
    main()
