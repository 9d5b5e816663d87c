"""Forecasting throughput relative to uni2ts's own predictors, on the same network.

    OMP_NUM_THREADS=1 python plugins/moirai/tests/bench_moirai.py [--layers 6] [--width 384] [--series 64]

Prints series a second of both and their ratio: above 1, ours is faster. Weights are random: they change no duration.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch

from gluonts_peft.backbone import Source
from gluonts_peft.predictor import PeftPredictor
from gluonts_peft_moirai import MoiraiBackbone


def fastest(predictor: Any, dataset: list[dict[str, Any]], repeats: int) -> float:
    """Return the shortest of some durations of a forecast of all series, in seconds."""
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        list(predictor.predict(dataset))
        durations.append(time.perf_counter() - start)
    return min(durations)


def main() -> None:
    """Run as a program."""
    from uni2ts import distribution as d
    from uni2ts.model.moirai import MoiraiForecast, MoiraiModule
    from uni2ts.model.moirai2 import Moirai2Forecast, Moirai2Module
    from uni2ts.model.moirai_moe import MoiraiMoEForecast, MoiraiMoEModule

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--series", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=48)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    parts = [d.StudentTOutput(), d.NormalFixedScaleOutput(), d.NegativeBinomialOutput(), d.LogNormalOutput()]
    mixture: Any = dict(distr_output=d.MixtureOutput(parts), patch_sizes=[8, 16, 32, 64, 128])
    sizes: Any = dict(d_model=given.width, num_layers=given.layers, max_seq_len=512, attn_dropout_p=0.0, dropout_p=0.0)
    first = MoiraiModule(**mixture, **sizes).eval()
    experts = MoiraiMoEModule(**mixture, d_ff=given.width // 2, **sizes).eval()
    torch.nn.init.normal_(experts.encoder.centroid)
    second = Moirai2Module(d_ff=2 * given.width, patch_size=16, num_predict_token=4, **sizes).eval()
    rng = np.random.default_rng(0)
    dataset = [
        {"start": pd.Period("2020-01-01", freq="h"), "target": rng.normal(size=length).cumsum().astype(np.float32)}
        for length in rng.integers(given.context, 2 * given.context, given.series)
    ]
    few = dataset[: max(given.series // 8, 1)]
    rows = [
        ("Moirai 1.x, patches of 8", MoiraiForecast, first, {"patch_size": 8}, dataset),
        ("Moirai 1.x, patches of 64", MoiraiForecast, first, {"patch_size": 64}, dataset),
        ("Moirai 1.x, auto", MoiraiForecast, first, {"patch_size": "auto"}, few),
        ("Moirai-MoE", MoiraiMoEForecast, experts, {"patch_size": 64}, few),
        ("Moirai-2", Moirai2Forecast, second, {}, dataset),
    ]
    for name, kind, network, options, data in rows:
        model = kind(
            prediction_length=given.horizon,
            target_dim=1,
            feat_dynamic_real_dim=0,
            past_feat_dynamic_real_dim=0,
            context_length=given.context,
            module=network,
            **options,
            **({"num_samples": given.samples} if options else {}),
        )
        official = model.create_predictor(32, "cpu")
        backbone = MoiraiBackbone.from_network(
            network,
            prediction_length=given.horizon,
            context_length=given.context,
            source=Source("moirai", "random", "memory", None, ""),
            **options,
            **({"num_samples": given.samples} if options else {}),
        )
        own = PeftPredictor(backbone, batch_size=32, device="cpu")
        theirs, ours = (fastest(predictor, data, given.repeats) for predictor in (official, own))
        print(  # noqa: T201
            f"{name:28s} uni2ts {len(data) / theirs:8.2f}/s   here {len(data) / ours:8.2f}/s   {theirs / ours:6.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
