"""The fast sampler follows ``transformers``' ``generate`` step by step."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from scipy.stats import chisquare
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gluonts_peft_chronos.sampling import (
    best_of,
    forced_logits,
    largest,
    next_distribution,
    sample_tokens,
)

# Of double precision: both sides compute the same sums in other orders.
EQUAL = 1e-9
VOCABULARY = 32
EOS = 1
NETWORKS = {
    "plain": {},
    "more-decoder": {"num_layers": 1, "num_decoder_layers": 3},
    "gated-gelu": {"feed_forward_proj": "gated-gelu"},
    "untied": {"tie_word_embeddings": False, "scale_decoder_outputs": False},
    "few-buckets": {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 9},
}
LAW = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


def network(seed: int = 0, **options: object) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "d_model": 24,
        "d_kv": 5,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 3,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": EOS,
        "dropout_rate": 0.1,
        # Larger than usual, so that attention and logits are far from uniform.
        "initializer_factor": 1.5,
    }
    model = T5ForConditionalGeneration(T5Config(**(settings | options))).eval()
    with torch.no_grad():
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    return model


def contexts(batch: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts of which one is padded on the left, one has holes and one (the last) is missing entirely."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    attention_mask[0, :4] = False
    if batch > 2:
        attention_mask[1, 5:7] = False
        attention_mask[-1] = False
    return input_ids.where(attention_mask, 0), attention_mask


def forced_prefixes(batch: int, paths: int, steps: int) -> torch.Tensor:
    prefixes = torch.randint(VOCABULARY, (batch, paths, steps), generator=torch.Generator().manual_seed(2))
    prefixes[..., 0] = 0
    return prefixes


def official_logits(
    model: T5ForConditionalGeneration, input_ids: torch.Tensor, attention_mask: torch.Tensor, prefixes: torch.Tensor
) -> torch.Tensor:
    batch, paths, steps = prefixes.shape
    with torch.no_grad():
        logits = model(
            input_ids=input_ids.repeat_interleave(paths, 0),
            attention_mask=attention_mask.repeat_interleave(paths, 0),
            decoder_input_ids=prefixes.view(batch * paths, steps),
        ).logits
    return logits.view(batch, paths, steps, -1)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_forward_at_every_step(name: str) -> None:
    # In double precision: how far single precision is off depends on the processor.
    model = network(**NETWORKS[name]).double()
    inputs = (*contexts(), forced_prefixes(3, 4, 9))
    expected = official_logits(model, *inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(forced_logits(model, *inputs), expected, rtol=EQUAL, atol=EQUAL)


def test_logits_equal_forward_with_eager_attention() -> None:
    model = network(attn_implementation="eager")
    model.set_attn_implementation("eager")
    inputs = (*contexts(), forced_prefixes(3, 2, 6))
    model = model.double()
    torch.testing.assert_close(forced_logits(model, *inputs), official_logits(model, *inputs), rtol=EQUAL, atol=EQUAL)


def test_logits_in_bfloat16_are_as_close_to_float32_as_forward() -> None:
    inputs = (*contexts(), forced_prefixes(3, 2, 6))
    exact = official_logits(network(), *inputs)
    model = network().to(torch.bfloat16)
    logits = forced_logits(model, *inputs)
    assert logits.dtype == torch.bfloat16
    official = (official_logits(model, *inputs) - exact).abs().mean()
    assert 0 < (logits - exact).abs().mean() < 1.5 * official


def test_logits_equal_forward_of_a_lora_network() -> None:
    base = network().double()
    inputs = (*contexts(), forced_prefixes(3, 4, 5))
    before = official_logits(base, *inputs)
    config = LoraConfig(
        r=2, target_modules=["q", "k", "v", "o", "wi", "wo", "relative_attention_bias"], init_lora_weights=False
    )
    model = inject_adapter_in_model(config, base).eval().double()
    expected = official_logits(model, *inputs)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(forced_logits(model, *inputs), expected, rtol=EQUAL, atol=EQUAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 200])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
def test_distribution_equals_the_warpers(dtype: torch.dtype, temperature: float, top_k: int, top_p: float) -> None:
    rows, columns = 40, 160
    logits = 2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    logits[:, EOS] = 9.0
    logits = logits.to(dtype)
    processors = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(1, 4, EOS)])
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(torch.zeros(rows, 1, dtype=torch.long), logits.float()).softmax(-1)

    probabilities, candidates = next_distribution(logits.clone(), torch.tensor([EOS]), temperature, top_k, top_p)
    if candidates is None:
        candidates = torch.arange(columns).expand(rows, columns)
    actual = torch.zeros(rows, columns).scatter_add(1, candidates, probabilities)
    if dtype == torch.bfloat16 and 0 < top_p < 1 or top_p == 0:
        # Which of several equal scores top_p cuts is left to an unstable sort: compare the values, not the places.
        actual, expected = actual.sort(-1).values, expected.sort(-1).values
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_top_k_keeps_every_tie() -> None:
    scores = torch.zeros(2, 40)
    scores[0, 5] = 1.0
    scores[1, :3] = torch.tensor([3.0, 2.0, 1.0])
    kept, tokens = best_of(scores, 3)
    assert kept.isfinite().sum(-1).tolist() == [40, 3]
    assert sorted(tokens[1][kept[1].isfinite()].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("levels", [5, 10_000], ids=["ties", "distinct"])
def test_largest_equals_topk(levels: int) -> None:
    scores = torch.randint(levels, (30, 640), generator=torch.Generator().manual_seed(4)).float()
    values, tokens = largest(scores, 11)
    torch.testing.assert_close(values, scores.topk(11).values, rtol=0, atol=0)
    assert torch.equal(scores.gather(1, tokens), values)
    assert all(len(set(row)) == 11 for row in tokens.tolist())


def exact_pairs(model: T5ForConditionalGeneration, law: dict[str, float]) -> torch.Tensor:
    """Probabilities of the first two tokens by the official forward and warpers, shape (vocabulary, vocabulary)."""
    input_ids, attention_mask = (part[:1] for part in contexts())
    prefixes = torch.stack([torch.zeros(VOCABULARY, dtype=torch.long), torch.arange(VOCABULARY)], -1)[None]
    logits = official_logits(model, input_ids, attention_mask, prefixes)[0]
    processors = LogitsProcessorList(
        [
            MinNewTokensLengthLogitsProcessor(1, 9, EOS),
            TemperatureLogitsWarper(law["temperature"]),
            TopKLogitsWarper(int(law["top_k"])),
            TopPLogitsWarper(law["top_p"]),
        ]
    )
    ids = torch.zeros(VOCABULARY, 1, dtype=torch.long)
    first, second = (processors(ids, logits[:, step]).softmax(-1) for step in (0, 1))
    return first[0, :, None] * second


@pytest.mark.parametrize(
    "law",
    [{"temperature": 1.0, "top_k": 32, "top_p": 1.0}, {"temperature": 1.4, "top_k": 9, "top_p": 0.85}],
    ids=["open", "filtered"],
)
def test_first_two_tokens_have_the_exact_frequencies(law: dict[str, float]) -> None:
    model = network()
    count = 8000
    input_ids, attention_mask = (part[:1] for part in contexts())
    paths = sample_tokens(
        model,
        input_ids,
        attention_mask,
        prediction_length=2,
        num_samples=count,
        generator=torch.Generator().manual_seed(5),
        **law,
    )
    observed = torch.bincount(paths[0, :, 0] * VOCABULARY + paths[0, :, 1], minlength=VOCABULARY**2).double()
    expected = count * exact_pairs(model, law).flatten().double()
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    assert common.sum() > 20
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.001


def test_greedy_paths_equal_generate() -> None:
    model = network()
    input_ids, attention_mask = contexts()
    options = {"min_new_tokens": 12, "max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(do_sample=False, **options),
        )[:, 1:]
    law = {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    paths = sample_tokens(model, input_ids, attention_mask, prediction_length=12, num_samples=2, **law)
    assert torch.equal(paths, expected[:, None].expand(-1, 2, -1))


def test_same_generator_state_gives_same_paths() -> None:
    model = network()

    def draw(seed: int, **options: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample_tokens(
            model, *contexts(), prediction_length=3, num_samples=5, generator=generator, **(LAW | options)
        )

    torch.manual_seed(10)
    state = torch.get_rng_state()
    first = draw(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    assert torch.equal(draw(7), first)
    assert not torch.equal(draw(8), first)
    for max_rows in (1, 7, 10, 99):
        assert torch.equal(draw(7, max_rows=max_rows), first), max_rows


def test_without_generator_the_global_seed_decides() -> None:
    model = network()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(sample_tokens(model, *contexts(), prediction_length=4, num_samples=3, **LAW))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_paths_are_tokens_without_end_and_run_in_inference_mode() -> None:
    with torch.inference_mode():
        paths = sample_tokens(network(), *contexts(), prediction_length=5, num_samples=30, **LAW)
    assert paths.shape == (3, 30, 5)
    assert paths.dtype == torch.long
    assert (paths != EOS).all()
    assert ((paths >= 0) & (paths < VOCABULARY)).all()


def test_given_end_tokens_replace_the_configured_one() -> None:
    model = network()
    options = {"prediction_length": 5, "num_samples": 300, "generator": torch.Generator().manual_seed(6)} | LAW
    only = [2, 3, EOS]
    paths = sample_tokens(
        model, *contexts(), eos_token_id=[token for token in range(VOCABULARY) if token not in only], **options
    )
    assert set(paths.unique().tolist()) == set(only)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_length": 0}, "prediction_length must be positive, got 0"),
        ({"prediction_length": -3}, "prediction_length must be positive, got -3"),
        ({"num_samples": 0}, "num_samples must be positive, got 0"),
        ({"num_samples": -2}, "num_samples must be positive, got -2"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"max_rows": 0}, "max_rows must be positive, got 0"),
        ({"top_k": -1}, "top_k must be positive, or 0 or None for all tokens, got -1"),
        ({"top_p": 1.5}, "top_p must lie between 0 and 1, got 1.5"),
        ({"top_p": -0.5}, "top_p must lie between 0 and 1, got -0.5"),
        (
            {"attention_mask": torch.ones(3, 4)},
            "input_ids and attention_mask must both be (batch, source), got shapes (3, 11) and (3, 4)",
        ),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    input_ids, attention_mask = contexts()
    arguments = {"attention_mask": attention_mask, "prediction_length": 2, "num_samples": 2} | LAW | options
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample_tokens(network(), input_ids, **arguments)


def test_training_mode_is_refused_also_of_a_part() -> None:
    options = {"prediction_length": 2, "num_samples": 2} | LAW
    message = "{} is in training mode, where dropout is random; call model.eval()"
    with pytest.raises(ValueError, match=f"^{re.escape(message.format('the model'))}$"):
        sample_tokens(network().train(), *contexts(), **options)
    model = network()
    model.decoder.dropout.train()
    with pytest.raises(ValueError, match=f"^{re.escape(message.format('decoder.dropout'))}$"):
        sample_tokens(model, *contexts(), **options)


def test_float16_is_refused() -> None:
    message = "the model is in float16, in which T5 overflows; load it in bfloat16 or float32"
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample_tokens(network().half(), *contexts(), prediction_length=2, num_samples=2, **LAW)


def test_a_replaced_forward_is_refused_not_skipped() -> None:
    model = network()
    attention = model.decoder.block[1].layer[1].EncDecAttention
    attention.forward = attention.forward
    message = (
        "model.decoder.block[1].layer[1].EncDecAttention is a T5Attention with a forward of its own, which "
        "sample_tokens would skip (it calls the modules inside T5Attention); use model.generate"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        sample_tokens(model, *contexts(), prediction_length=2, num_samples=2, **LAW)


def test_logits_that_are_not_finite_are_reported() -> None:
    model = network()
    with torch.no_grad():
        model.decoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="^the model's logits are not finite"):
        sample_tokens(model, *contexts(), prediction_length=2, num_samples=2, **LAW)
