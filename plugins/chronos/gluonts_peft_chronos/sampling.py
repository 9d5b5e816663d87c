"""Sample paths from a Chronos-T5 network, by the law of ``generate`` and several times faster.

A path is drawn token by token (Ansari et al. 2024, arXiv 2403.07815). ``transformers``' ``generate`` treats the paths
of a series as separate sequences; but they share their context, so here the encoder and the keys and values of the
cross-attention are computed once a series, and the paths of a series attend to them as rows of one query:

    scores = q k' + 0          q (series, heads, paths, d_kv),  k (series, heads, source, d_kv)         cross-attention
    scores = q k' + bias       q (series * paths, heads, 1, d_kv),  k grown in place by one row a step   self-attention

The next token follows softmax(top_p(top_k(logits / temperature))), the end token excluded, in ``transformers``' order.
It is found by inverting the cumulative distribution at uniform numbers that are drawn before the first step: a path
depends on its place in the batch and on the seed, not on how the batch is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

__all__ = ["sample_tokens"]


@torch.no_grad()
def sample_tokens(
    model: T5ForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    prediction_length: int,
    num_samples: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """Draw ``num_samples`` token paths for each series.

    Every step has the logits and the distribution that ``model.generate(do_sample=True, ...)`` has after the same
    prefix, as ``chronos.ChronosModel.forward`` calls it; the random numbers themselves are others. Projections, norms,
    feed-forward and embeddings are called as modules, so adapters that replace or wrap them take part.

    Parameters
    ----------
    model
        A ``T5ForConditionalGeneration`` in evaluation mode, in float32 or bfloat16, with or without adapters inside.
    input_ids
        Context tokens, shape ``(batch, source)``.
    attention_mask
        Shape ``(batch, source)``; zero or false where the context is padded or missing.
    prediction_length
        Number of tokens of each path.
    num_samples
        Number of paths of each series.
    temperature
        Divides the logits.
    top_k
        Only the ``top_k`` most probable tokens, and those tied with the last of them, can be drawn. ``None`` or 0: all.
    top_p
        Of these, only the smallest set of most probable tokens that holds at least the probability ``top_p`` can be
        drawn. ``None`` or 1: all.
    generator
        Source of all randomness, on any device: the same state gives the same paths, whatever the global state is.
        ``None``: torch's global generator of the CPU.
    eos_token_id
        Tokens that are never drawn. ``None``: ``model.config.eos_token_id``.
    max_rows
        At most this many paths are decoded at once; bounds memory, changes the paths by float rounding only.
        ``None``: all at once.

    Returns
    -------
    Tensor
        Tokens, int64, shape ``(batch, num_samples, prediction_length)``, on the device of ``input_ids``.

    Raises
    ------
    ValueError
        If an argument is out of range, shapes disagree, the model is in training mode or in float16, or its logits
        are not finite.
    TypeError
        If the model's attention or blocks were themselves replaced or hooked, so that calling only the modules inside
        them would leave that out.
    """
    _check_positive(
        prediction_length=prediction_length, num_samples=num_samples, temperature=temperature, max_rows=max_rows
    )
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be positive, or 0 or None for all tokens, got {top_k!r}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p must lie between 0 and 1, got {top_p!r}")
    _check_inputs(input_ids, attention_mask)
    _check_model(model)

    batch = input_ids.shape[0]
    suppressed = _token_list(model.config.eos_token_id if eos_token_id is None else eos_token_id, input_ids.device)
    uniforms = torch.rand(
        (batch, num_samples, prediction_length),
        dtype=torch.float64,
        generator=generator,
        device="cpu" if generator is None else generator.device,
    ).to(input_ids.device)

    max_rows = max(1, batch * num_samples) if max_rows is None else max_rows
    tokens = torch.empty(uniforms.shape, dtype=torch.long, device=input_ids.device)
    series_step, paths_step = max(1, max_rows // num_samples), min(max_rows, num_samples)
    for first in range(0, batch, series_step):
        series = slice(first, first + series_step)
        mask = attention_mask[series]
        memory = model.encoder(input_ids=input_ids[series], attention_mask=mask).last_hidden_state
        for start in range(0, num_samples, paths_step):
            where = (series, slice(start, start + paths_step))
            numbers = uniforms[where]
            decoder = _Decoder(model, memory, mask, num_paths=numbers.shape[1], num_steps=prediction_length)
            tokens[where] = _draw_paths(decoder, numbers, suppressed, temperature, top_k, top_p)
    return tokens


class _Decoder:
    """The decoder of a T5 network, one step at a time, for ``num_paths`` paths of each series.

    Parameters
    ----------
    model
        The network.
    memory
        Output of its encoder, shape ``(batch, source, d_model)``.
    attention_mask
        Shape ``(batch, source)``.
    num_paths
        Paths of each series; a row is one path, rows of a series are neighbours.
    num_steps
        The most steps that will be made.
    """

    def __init__(
        self,
        model: T5ForConditionalGeneration,
        memory: Tensor,
        attention_mask: Tensor,
        *,
        num_paths: int,
        num_steps: int,
    ) -> None:
        self.model = model
        self.blocks = list(model.decoder.block)
        self.batch, self.num_paths, self.num_steps = len(memory), num_paths, num_steps
        self.position = 0
        first = self.blocks[0].layer[0].SelfAttention
        # (heads, query step, key step); T5 has one bias for all layers, owned by the first.
        self.bias = first.compute_bias(num_steps, num_steps, device=memory.device)[0]
        self.self_cache: list[tuple[Tensor, Tensor]] = []
        self.cross_cache: list[tuple[Tensor, Tensor]] = []
        for block in self.blocks:
            attention = block.layer[1].EncDecAttention
            self.cross_cache.append(
                (self._by_head(attention, attention.k(memory)), self._by_head(attention, attention.v(memory)))
            )
        dtype = self.cross_cache[0][0].dtype
        # As transformers does, the lowest number instead of -inf: a series without any context attends evenly, not NaN.
        self.mask = torch.zeros((self.batch, 1, 1, memory.shape[1]), dtype=dtype, device=memory.device)
        self.mask.masked_fill_(attention_mask[:, None, None, :] == 0, torch.finfo(dtype).min)

    def step(self, tokens: Tensor) -> Tensor:
        """Take each path's newest token, shape ``(rows,)``; return the logits of the next, ``(rows, vocabulary)``."""
        if self.position == self.num_steps:
            raise ValueError(f"the decoder was built for num_steps={self.num_steps}, and all of them are made")
        hidden = self.model.decoder.embed_tokens(tokens)
        for index, block in enumerate(self.blocks):
            hidden = hidden + self._attend_to_path(index, block.layer[0].layer_norm(hidden))
            hidden = hidden + self._attend_to_context(index, block.layer[1].layer_norm(hidden))
            hidden = block.layer[-1](hidden)
        self.position += 1
        hidden = self.model.decoder.final_layer_norm(hidden)
        if self.model.config.scale_decoder_outputs:
            hidden = hidden * self.model.model_dim**-0.5
        return cast(Tensor, self.model.lm_head(hidden))

    def _attend_to_path(self, index: int, hidden: Tensor) -> Tensor:
        attention = self.blocks[index].layer[0].SelfAttention
        rows, heads, width = len(hidden), attention.n_heads, attention.key_value_proj_dim
        query = attention.q(hidden).reshape(rows * heads, 1, width)
        key, value = attention.k(hidden), attention.v(hidden)
        if index == len(self.self_cache):
            shape = (rows * heads, self.num_steps, width)
            self.self_cache.append((key.new_empty(shape), value.new_empty(shape)))
        keys, values = self.self_cache[index]
        now = self.position
        keys[:, now] = key.reshape(rows * heads, width)
        values[:, now] = value.reshape(rows * heads, width)
        scores = torch.bmm(query, keys[:, : now + 1].transpose(1, 2)).view(rows, heads, now + 1)
        weights = (scores + self.bias[:, now, : now + 1]).softmax(-1).to(values.dtype)
        context = torch.bmm(weights.view(rows * heads, 1, now + 1), values[:, : now + 1])
        return cast(Tensor, attention.o(context.view(rows, heads * width)))

    def _attend_to_context(self, index: int, hidden: Tensor) -> Tensor:
        attention = self.blocks[index].layer[1].EncDecAttention
        query = self._by_head(attention, attention.q(hidden).reshape(self.batch, self.num_paths, -1))
        keys, values = self.cross_cache[index]
        context = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask, scale=1.0)
        return cast(Tensor, attention.o(context.transpose(1, 2).reshape(len(hidden), -1)))

    @staticmethod
    def _by_head(attention: modeling_t5.T5Attention, states: Tensor) -> Tensor:
        """Turn ``(batch, length, heads * d_kv)`` into ``(batch, heads, length, d_kv)``."""
        batch, length, _ = states.shape
        return states.reshape(batch, length, attention.n_heads, attention.key_value_proj_dim).transpose(1, 2)


def _draw_paths(
    decoder: _Decoder,
    uniforms: Tensor,
    suppressed: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """Draw the paths that belong to ``uniforms``, shape ``(batch, paths, steps)``; same shape, int64."""
    batch, paths, steps = uniforms.shape
    # Below one by more than the rounding of a product, so that the target stays below the total probability.
    uniforms = uniforms.reshape(batch * paths, steps).clamp(max=1 - 2.0**-50)
    tokens = torch.empty((batch * paths, steps), dtype=torch.long, device=uniforms.device)
    finite = torch.ones((), dtype=torch.bool, device=uniforms.device)
    newest = torch.full((batch * paths,), _start_token(decoder.model), device=uniforms.device)
    for step in range(steps):
        probabilities, candidates = next_distribution(decoder.step(newest), suppressed, temperature, top_k, top_p)
        cumulative = probabilities.double().cumsum(-1)
        total = cumulative[:, -1:]
        finite &= total.isfinite().all()
        drawn = (cumulative <= uniforms[:, step, None] * total).sum(-1, keepdim=True)
        newest = drawn[:, 0] if candidates is None else candidates.gather(1, drawn)[:, 0]
        tokens[:, step] = newest
    if not finite:
        raise ValueError("the model's logits are not finite (NaN, or infinite for every token); look at its weights")
    return tokens.view(batch, paths, steps)


def next_distribution(
    logits: Tensor, suppressed: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities that next tokens are drawn with, and which tokens these are.

    Parameters
    ----------
    logits
        Shape ``(rows, vocabulary)``; changed in place.
    suppressed
        Tokens of probability zero.
    temperature, top_k, top_p
        As in :func:`sample_tokens`.

    Returns
    -------
    probabilities
        float32, shape ``(rows, candidates)``; falling along a row unless all tokens are candidates.
    candidates
        Their tokens, same shape, or None where column ``i`` is token ``i``.
    """
    scores = logits.float()
    scores.index_fill_(1, suppressed, -torch.inf)
    if temperature != 1:
        scores = scores / temperature
    candidates = None
    if top_k and top_k < scores.shape[1]:
        scores, candidates = best_of(scores, top_k)
    if top_p is None or top_p == 1:
        return scores.softmax(-1), candidates
    if candidates is None:
        scores, candidates = scores.sort(-1, descending=True)
    # Summed from the least probable up, as transformers does: summed down, rounding would move the cut.
    tail = scores.flip(-1).softmax(-1).cumsum(-1).flip(-1)
    beyond = tail <= 1 - top_p
    beyond[:, 0] = False
    return scores.masked_fill(beyond, -torch.inf).softmax(-1), candidates


def best_of(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Keep the ``top_k`` largest scores of each row and all that are tied with the last of them.

    Returns scores and tokens, each of shape ``(rows, width)`` with ``width > top_k``, falling; the rest is -inf.
    """
    width = top_k + 1
    while True:
        # Ties are rare in float32 but usual in bfloat16, where many scores share a value.
        width = min(width, scores.shape[1])
        kept, tokens = largest(scores, width)
        last = kept[:, top_k - 1 : top_k]
        if width == scores.shape[1] or not ((kept[:, -1:] == last) & last.isfinite()).any():
            return kept.masked_fill(kept < last, -torch.inf), tokens
        width *= 2


def largest(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Like ``scores.topk(width)``, a costly step of a small network on a CPU, in about half the time.

    The ``width`` largest values lie in the ``width`` groups of columns with the largest maxima, so the rest is skipped.
    """
    rows, columns = scores.shape
    size = 8
    if columns % size or columns < 2 * size * width:
        values, tokens = scores.topk(width)
        return values, tokens
    groups = scores.view(rows, size, columns // size)
    chosen = groups.amax(1).topk(width, sorted=False).indices
    values, places = groups.gather(2, chosen[:, None].expand(-1, size, -1)).view(rows, -1).topk(width)
    return values, places // width * (columns // size) + chosen.gather(1, places % width)


@torch.no_grad()
def forced_logits(
    model: T5ForConditionalGeneration, input_ids: Tensor, attention_mask: Tensor, prefixes: Tensor
) -> Tensor:
    """Return the logits after each token of given prefixes, instead of drawing them.

    Parameters
    ----------
    model, input_ids, attention_mask
        As in :func:`sample_tokens`.
    prefixes
        Decoder inputs, the start token first, shape ``(batch, paths, steps)``.

    Returns
    -------
    Tensor
        Shape ``(batch, paths, steps, vocabulary)``.
    """
    _check_model(model)
    batch, paths, steps = prefixes.shape
    memory = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    decoder = _Decoder(model, memory, attention_mask, num_paths=paths, num_steps=steps)
    logits = [decoder.step(prefixes[:, :, step].flatten()) for step in range(steps)]
    return torch.stack(logits, dim=1).view(batch, paths, steps, -1)


def _start_token(model: T5ForConditionalGeneration) -> int:
    start = model.config.decoder_start_token_id
    if start is None:
        raise ValueError("model.config.decoder_start_token_id is None; set it to the token that every path starts from")
    return int(start)


def _token_list(tokens: int | Sequence[int] | None, device: torch.device) -> Tensor:
    listed = [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
    return torch.tensor(listed, dtype=torch.long, device=device)


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


def _check_inputs(input_ids: Tensor, attention_mask: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            "input_ids and attention_mask must both be (batch, source), "
            f"got shapes {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        )


def _check_model(model: T5ForConditionalGeneration) -> None:
    """Refuse a model for which calling its innermost modules is not the same as calling the model."""
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'} is in training mode, where dropout is random; call model.eval()")
    if model.dtype == torch.float16:
        raise ValueError("the model is in float16, in which T5 overflows; load it in bfloat16 or float32")
    skipped: list[tuple[str, nn.Module, type[nn.Module]]] = [
        ("model", model, modeling_t5.T5ForConditionalGeneration),
        ("model.decoder", model.decoder, modeling_t5.T5Stack),
    ]
    for index, block in enumerate(model.decoder.block):
        path = f"model.decoder.block[{index}]"
        own, cross = block.layer[0], block.layer[1]
        skipped += [
            (path, block, modeling_t5.T5Block),
            (f"{path}.layer[0]", own, modeling_t5.T5LayerSelfAttention),
            (f"{path}.layer[0].SelfAttention", own.SelfAttention, modeling_t5.T5Attention),
            (f"{path}.layer[1]", cross, modeling_t5.T5LayerCrossAttention),
            (f"{path}.layer[1].EncDecAttention", cross.EncDecAttention, modeling_t5.T5Attention),
        ]
    for path, module, stock in skipped:
        if type(module).forward is not stock.forward or "forward" in vars(module):
            raise TypeError(
                f"{path} is a {type(module).__name__} with a forward of its own, which sample_tokens would skip "
                f"(it calls the modules inside {stock.__name__}); use model.generate"
            )
