"""Moirai 1.0/1.1 and Moirai-MoE: distributions, from which sample paths are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from gluonts_peft.backbone import Trajectories
from gluonts_peft.errors import unknown

from .base import MoiraiBackbone
from .distributions import drawing_from, log_prob, parameters
from .tokens import Tokens, Window, encode, impute, tokens

__all__ = ["Moirai1Backbone", "MoiraiMoEBackbone"]

# Numbers drawn, or rolled on from, at a time: some ten MB.
_MAX_DRAWS = 1 << 21
_MAX_ROWS = 4096


class _Sampling(MoiraiBackbone):
    """What Moirai 1.x and Moirai-MoE share: patch sizes, distributions, sample paths.

    Parameters
    ----------
    patch_size
        One of the network's patch sizes.
    num_samples
        Sample paths a series.
    draws
        ``"horizon"`` draws what is asked for. ``"uni2ts"`` draws as uni2ts's own predictor does, every step of every
        token: the same paths under the same seed, but slow.
    """

    capabilities = frozenset({"samples", "covariates", "multivariate"})
    density = True

    def __init__(
        self,
        network: nn.Module,
        *,
        patch_size: int | str,
        num_samples: int,
        draws: str,
        **options: Any,
    ) -> None:
        self.patch_sizes: tuple[int, ...] = tuple(network.patch_sizes)  # type: ignore[arg-type]
        choices: tuple[int | str, ...] = self._patch_choices(self.patch_sizes)
        if patch_size not in choices:
            raise ValueError(f"patch_size {patch_size!r} is none of {', '.join(map(repr, choices))}")
        if num_samples <= 0:
            raise ValueError(f"num_samples {num_samples} is not positive")
        if draws not in ("horizon", "uni2ts"):
            raise ValueError(unknown("draws", draws, ("horizon", "uni2ts")))
        super().__init__(
            network,
            patch_sizes=self.patch_sizes if isinstance(patch_size, str) else (patch_size,),
            **options,
        )
        self.patch_size = patch_size
        self.num_samples = num_samples
        self.draws = draws

    @staticmethod
    def _patch_choices(sizes: tuple[int, ...]) -> tuple[int | str, ...]:
        return sizes

    def _embed(self, linear: Any, x: Tensor, patch_size: int) -> Tensor:
        index = self.patch_sizes.index(patch_size)
        return functional.linear(x, linear.weight[index, :, : x.shape[-1]], linear.bias[index])

    def _distribution(self, features: Tensor, patch_size: int, steps: int) -> Any:
        """Return the distribution of scaled values at the first steps of some patches."""
        network: Any = self.network
        found = parameters(network.param_proj, features, self.patch_sizes.index(patch_size), patch_size)
        return network.distr_output._distribution(tree_map(lambda x: x[:, :, :steps], found), validate_args=False)

    def _negative_log_likelihood(
        self, given: Window, features: Tensor, patch_size: int, loc: Tensor, scale: Tensor
    ) -> Tensor:
        base = self._distribution(features, patch_size, self.prediction_length)
        loc, scale = loc[:, : given.targets, 0], scale[:, : given.targets, 0]
        return self._label_mean(scale.log() - log_prob(base, (self._label(given) - loc) / scale), given)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        """Forecast sample paths, from torch's global generator if none is given."""
        count = self.num_samples if num_samples is None else num_samples
        if count <= 0:
            raise ValueError(f"num_samples {count} is not positive")
        with drawing_from(generator), torch.no_grad():
            paths = self._draw_everything(batch, count) if self.draws == "uni2ts" else self._draw(batch, count)
        return Trajectories(paths.float(), None)

    def _draw(self, batch: Mapping[str, Tensor], count: int) -> Tensor:
        raise NotImplementedError

    def _draw_everything(self, batch: Mapping[str, Tensor], count: int) -> Tensor:
        """Forecast with uni2ts's own module around this network."""
        from uni2ts.model.moirai import MoiraiForecast
        from uni2ts.model.moirai_moe import MoiraiMoEForecast

        values, observed = (batch[name].unsqueeze(-1) if batch[name].ndim == 2 else batch[name] for name in _PAST)
        missing = self.past_length - values.shape[1]
        inputs = {"past_target": values, "past_observed_target": observed > 0}
        inputs["past_is_pad"] = inputs["past_observed_target"].any(-1).long().cummax(1).values == 0
        for name in _FEATURES:
            if name in batch:
                inputs[name] = batch[name] > 0 if "observed" in name else batch[name]
        if isinstance(self, MoiraiMoEBackbone):
            full = impute(self._window({name: batch[name] for name in batch if name not in _FUTURE}))
            inputs["past_target"] = full.values[:, : full.targets, : -self.prediction_length].transpose(1, 2)
        inputs = {
            name: functional.pad(x, (0, 0) * (x.ndim - 2) + (missing, 0), value=1.0 if name == "past_is_pad" else 0.0)
            for name, x in inputs.items()
        }
        kind = MoiraiMoEForecast if isinstance(self, MoiraiMoEBackbone) else MoiraiForecast
        model = kind(
            prediction_length=self.prediction_length,
            target_dim=values.shape[-1],
            feat_dynamic_real_dim=_width(batch, "feat_dynamic_real"),
            past_feat_dynamic_real_dim=_width(batch, "past_feat_dynamic_real"),
            context_length=self.context_length,
            module=self.network,
            patch_size=self.patch_size,
            num_samples=count,
        )
        paths: Tensor = model(**inputs, num_samples=count)
        return paths if batch["past_target"].ndim == 2 or paths.ndim == 4 else paths.unsqueeze(-1)


def _width(batch: Mapping[str, Tensor], name: str) -> int:
    return batch[name].shape[-1] if name in batch else 0


_PAST = ("past_target", "past_observed_values")
_FUTURE = ("future_target", "future_observed_values")
_FEATURES = (
    "feat_dynamic_real",
    "observed_feat_dynamic_real",
    "past_feat_dynamic_real",
    "past_observed_feat_dynamic_real",
)


class Moirai1Backbone(_Sampling):
    """Moirai 1.0 and 1.1: masked patches in, a distribution of every step of the horizon out.

    Parameters
    ----------
    patch_size
        One of the network's, or ``"auto"``: for each series the one under which the last ``prediction_length`` steps of
        its history are most likely given what was before, as in uni2ts; that costs a second pass for each size.
    """

    ends = {"embedding": ("in_proj", "mask_encoding"), "head": ("param_proj",)}

    @classmethod
    def fits(cls, network: nn.Module) -> bool:
        return hasattr(network, "mask_encoding") and not hasattr(network, "feat_proj")

    def __init__(
        self,
        network: nn.Module,
        *,
        patch_size: int | str = "auto",
        num_samples: int = 100,
        draws: str = "horizon",
        **lengths: Any,
    ) -> None:
        super().__init__(network, patch_size=patch_size, num_samples=num_samples, draws=draws, **lengths)

    @staticmethod
    def _patch_choices(sizes: tuple[int, ...]) -> tuple[int | str, ...]:
        return ("auto", *sizes)

    @property
    def past_length(self) -> int:
        return self.context_length + (self.prediction_length if self.patch_size == "auto" else 0)

    def _features(self, given: Window, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the network makes of the horizon's patches, with the location and scale of each variate."""
        cut = tokens(given, patch_size)
        loc, scale = self._loc_scale(cut, cut.history)
        embedded = self._embed(self.network.in_proj, (cut.values - loc) / scale, patch_size)
        horizon = torch.zeros(embedded.shape[1:3], dtype=torch.bool, device=embedded.device)
        horizon[: cut.targets, cut.history :] = True
        mask: Tensor = self.network.mask_encoding.weight  # type: ignore[union-attr, assignment]
        embedded = torch.where(horizon[None, :, :, None], mask.to(embedded.dtype), embedded)
        features = encode(self.network, embedded, cut, causal=False)
        return features[:, : cut.targets, cut.history :], loc, scale

    def _loss(self, given: Window, patch_size: int) -> Tensor:
        features, loc, scale = self._features(given, patch_size)
        return self._negative_log_likelihood(given, features, patch_size, loc, scale)

    @torch.no_grad()
    def choose_patch_size(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the position in ``patch_sizes`` of the size that fits each series best, shape ``(batch,)``."""
        given = self._window(batch, earlier=True)
        return torch.stack([self._loss(given, size) for size in self.patch_sizes]).argmin(0)

    def _groups(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor | None]]:
        """Yield patch sizes and the rows that they go with, None for all."""
        if not isinstance(self.patch_size, str) or len(self.patch_sizes) == 1:
            yield self.patch_sizes[0] if isinstance(self.patch_size, str) else self.patch_size, None
            return
        chosen = self.choose_patch_size(batch)
        for index, size in enumerate(self.patch_sizes):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows) == len(chosen):
                yield size, None
            elif len(rows):
                yield size, rows

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the negative log likelihood of the label, shape ``(batch,)``: uni2ts's ``PackedNLLLoss`` by window.

        With ``patch_size="auto"`` each window is taken in the patch size in which it would be forecast.
        """
        losses = batch["past_target"].new_zeros(len(batch["past_target"]))
        for size, rows in self._groups(batch):
            given = self._window(batch if rows is None else {name: x[rows] for name, x in batch.items()})
            found = self._loss(given, size)
            losses = found if rows is None else losses.index_put((rows,), found)
        return losses

    def _draw(self, batch: Mapping[str, Tensor], count: int) -> Tensor:
        paths, order = [], []
        for size, rows in self._groups(batch):
            given = self._window(batch if rows is None else {name: x[rows] for name, x in batch.items()})
            features, loc, scale = self._features(given, size)
            loc, scale = loc[:, None, : given.targets, 0], scale[:, None, : given.targets, 0]
            chunk = max(1, _MAX_DRAWS // (count * given.targets * self.prediction_length))
            parts = (self._distribution(part, size, self.prediction_length) for part in features.split(chunk))
            paths.append(torch.cat([base.sample((count,)).transpose(0, 1) for base in parts]) * scale + loc)
            if rows is not None:
                order.append(rows)
        found = torch.cat(paths)
        return self._forecast_axes(found[torch.cat(order).argsort()] if order else found, batch)


class MoiraiMoEBackbone(_Sampling):
    """Moirai-MoE: causal patches and sparse experts; a distribution of the next patch, sampled patch by patch.

    Routing is frozen: a token's experts follow from the distances of its features to centroids of the checkpoint.
    """

    ends = {"embedding": ("in_proj", "res_proj", "feat_proj"), "head": ("param_proj",)}

    @classmethod
    def fits(cls, network: nn.Module) -> bool:
        return hasattr(network, "feat_proj")

    def __init__(
        self,
        network: nn.Module,
        *,
        patch_size: int | None = None,
        num_samples: int = 100,
        draws: str = "horizon",
        **lengths: Any,
    ) -> None:
        if patch_size is None:
            # uni2ts's own default.
            sizes: tuple[int, ...] = tuple(network.patch_sizes)  # type: ignore[arg-type]
            patch_size = 16 if 16 in sizes else min(sizes)
        super().__init__(network, patch_size=patch_size, num_samples=num_samples, draws=draws, **lengths)
        self.patch_size: int

    def _features(self, cut: Tokens, known: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of the targets' first ``stop`` patches, scaled by the first ``known``."""
        loc, scale = self._loc_scale(cut, known)
        scaled = (cut.values[:, :, :stop] - loc) / scale
        size, network = self.patch_size, self.network
        hidden = functional.silu(self._embed(network.in_proj, scaled, size))
        embedded = self._embed(network.feat_proj, hidden, size) + self._embed(network.res_proj, scaled, size)
        features = encode(network, embedded, cut, causal=True)
        return features[:, : cut.targets], loc, scale

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the negative log likelihood of the label, shape ``(batch,)``, each patch given those before it."""
        given = impute(self._window(batch))
        cut = tokens(given, self.patch_size)
        last = cut.values.shape[2] - 1
        features, loc, scale = self._features(cut, cut.history, last)
        return self._negative_log_likelihood(given, features[:, :, cut.history - 1 :], self.patch_size, loc, scale)

    def _draw(self, batch: Mapping[str, Tensor], count: int) -> Tensor:
        given = impute(self._window(batch))
        chunk = max(1, _MAX_ROWS // count)
        paths = []
        for start in range(0, len(given.values), chunk):
            rows = slice(start, start + chunk)
            part = replace(given, values=given.values[rows], observed=given.observed[rows])
            paths.append(self._paths(tokens(part, self.patch_size), count))
        return self._forecast_axes(torch.cat(paths)[..., : self.prediction_length], batch)

    def _paths(self, cut: Tokens, count: int) -> Tensor:
        """Return sample paths of the whole patches of the horizon, ``(batch, count, targets, steps)``."""
        rows, size, drawn = len(cut.values), self.patch_size, []
        for position in range(cut.history, cut.values.shape[2]):
            features, loc, scale = self._features(cut, position, position)
            base = self._distribution(features[:, :, -1:], size, size)
            loc, scale = loc[:, : cut.targets, 0], scale[:, : cut.targets, 0]
            if position == cut.history:
                # The first patch is drawn many times from one pass.
                patch = base.sample((count,)) * scale + loc
                patch = patch.transpose(0, 1).flatten(0, 1)
                cut = cut.repeat(count)
            else:
                patch = base.sample() * scale + loc
            drawn.append(patch)
            cut = cut.fill(patch[:, :, None], position)
        paths: Tensor = torch.cat(drawn, -1).unflatten(0, (rows, count))
        return paths
