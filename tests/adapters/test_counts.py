"""Numbers of trainable parameters on the official Chronos-T5 sizes, most of them quoted by the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import gluonts_peft
from gluonts_peft.backbone import Source
from gluonts_peft_chronos import T5Backbone

# d_model, d_ff, layers of encoder and of decoder, heads: amazon/chronos-t5-{tiny,small,base}.
SIZES = {"tiny": (256, 1024, 4, 4), "small": (512, 2048, 6, 8), "base": (768, 3072, 12, 12)}

CHRONOS_CONFIG = {
    "context_length": 512,
    "prediction_length": 64,
    "n_tokens": 4096,
    "n_special_tokens": 2,
    "tokenizer_class": "MeanScaleUniformBins",
    "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_eos_token": True,
    "model_type": "seq2seq",
    "num_samples": 20,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}

# Spec, then the counts on Tiny, Small and Base.
TABLE: dict[str, tuple[Any, dict[str, int]]] = {
    "full": ("full", {"tiny": 8_394_496, "small": 46_154_240, "base": 201_374_976}),
    "none": ("none", {"tiny": 0, "small": 0, "base": 0}),
    "lora, r=2": ({"name": "lora", "r": 2}, {"tiny": 49_152, "small": 147_456, "base": 442_368}),
    "fourierft, n=50": ({"name": "fourierft", "n_frequency": 50}, {"tiny": 2_400, "small": 3_600, "base": 7_200}),
    "vera, r=256": ({"name": "vera", "r": 256}, {"tiny": 24_576, "small": 55_296, "base": 147_456}),
    "bitfit": ("bitfit", {"tiny": 256, "small": 512, "base": 768}),
    "layernorm": ("layernorm", {"tiny": 5_632, "small": 16_384, "base": 47_616}),
    "layernorm, attention": (
        {"name": "layernorm", "sites": ["attention_norm"]},
        {"tiny": 3_072, "small": 9_216, "base": 27_648},
    ),
}
DEFAULTS = {"lora": "lora, r=2", "fourierft": "fourierft, n=50", "vera": "vera, r=256"}


@pytest.fixture(scope="module", params=SIZES)
def backbone(request: pytest.FixtureRequest) -> tuple[str, T5Backbone]:
    d_model, d_ff, layers, heads = SIZES[request.param]
    config = T5Config(
        vocab_size=4096,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        tie_word_embeddings=True,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.chronos_config = dict(CHRONOS_CONFIG)
    # Counting needs shapes only; the largest would take 800 MB otherwise.
    with torch.device("meta"):
        network = T5ForConditionalGeneration(config)
    network.tie_weights()
    source = Source("chronos", f"t5-{request.param}", "folder", None, "0" * 64)
    return request.param, T5Backbone.from_network(network, prediction_length=36, source=source)


def count(backbone: T5Backbone, spec: Any) -> int:
    adapter = gluonts_peft.get_adapter(spec).attach(backbone)
    try:
        return adapter.num_parameters()
    finally:
        adapter.detach()


def test_totals_are_the_official_ones(backbone: tuple[str, T5Backbone]) -> None:
    size, model = backbone

    assert sum(parameter.numel() for parameter in model.network.parameters()) == TABLE["full"][1][size]


@pytest.mark.parametrize("row", TABLE)
def test_trainable_parameters(backbone: tuple[str, T5Backbone], row: str) -> None:
    size, model = backbone
    spec, expected = TABLE[row]

    assert count(model, spec) == expected[size]


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_table(backbone: tuple[str, T5Backbone], name: str) -> None:
    size, model = backbone

    assert count(model, name) == TABLE[DEFAULTS[name]][1][size]


def test_bitfit_is_the_two_tables_of_relative_positions(backbone: tuple[str, T5Backbone]) -> None:
    size, model = backbone
    adapter = gluonts_peft.get_adapter("bitfit").attach(model)
    names = adapter.parameter_names()
    adapter.detach()

    assert names == [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")
    ]
    # 32 buckets of distance, one number a head.
    assert count(model, "bitfit") == 2 * 32 * SIZES[size][3]


def test_parts_of_a_hybrid_add_up(backbone: tuple[str, T5Backbone]) -> None:
    size, model = backbone

    assert count(model, ["bitfit", "layernorm"]) == TABLE["bitfit"][1][size] + TABLE["layernorm"][1][size]
    assert count(model, ["layernorm", "lora"]) == TABLE["layernorm"][1][size] + TABLE["lora, r=2"][1][size]
