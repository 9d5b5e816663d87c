"""A faster way to train adapters that change a weight matrix: one product with the changed matrix.

PEFT computes ``x W + f(x)``, where ``f`` of VeRA, FourierFT and others costs one or two further products of the size
of the first, for each token. Here the change is computed once a step, for the matrix instead of for the tokens,

    y = x (W + dW)

which is the same function, without a second product with the tokens. PEFT's layer stays the owner of the parameters,
of saving and of merging; only ``forward`` is replaced. FourierFT's change is not a dense inverse transform but a
product of two thin matrices: with places (p_j, q_j) and coefficients c_j in a spectrum of M x N,

    dW[a, b] = s / (M N) * sum_j c_j cos(2 pi (p_j a / M + q_j b / N))
             = s / (M N) * sum_j c_j (cos u cos v - sin u sin v),       u = 2 pi p_j a / M,  v = 2 pi q_j b / N
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["fourier_delta", "make_dense", "vera_delta"]


def make_dense(layer: Any) -> None:
    """Replace the forward pass of a PEFT layer around ``nn.Linear`` by a product with the changed matrix.

    Dropout on the adapter's path has no such form: the layer then keeps PEFT's own forward pass.
    """
    kind = type(layer)
    if not hasattr(kind, "get_delta_weight") or _drops(layer):
        return
    layer.__class__ = type(kind.__name__, (_Dense, kind), {"__module__": kind.__module__})


def _drops(layer: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Dropout) and module.p > 0
        for name, child in layer.named_children()
        if name.endswith("_dropout")
        for module in child.modules()
    )


class _Dense:
    """Mixed into a PEFT layer."""

    base_layer: nn.Module
    disable_adapters: bool
    merged: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        delta = _delta(self)
        base = self.base_layer
        if type(base) is nn.Linear:
            return functional.linear(x, base.weight + delta.to(base.weight.dtype), base.bias)
        # Around another adapter's layer the base is not one matrix.
        out: Tensor = base(x)
        return out + functional.linear(x, delta.to(x.dtype))


def _delta(layer: Any) -> Tensor:
    if hasattr(layer, "fourierft_spectrum"):
        return fourier_delta(layer)
    if hasattr(layer, "vera_lambda_b"):
        return vera_delta(layer)
    delta: Tensor = layer.get_delta_weight("default")
    return delta


def vera_delta(layer: Any) -> Tensor:
    """Return the change of VeRA's weight, shape ``(out_features, in_features)``.

    ``diag(b)`` is applied last, so that its gradient takes no product of matrices.
    """
    a = layer.vera_A["default"][:, : layer.in_features]
    b = layer.vera_B["default"][: layer.out_features]
    product: Tensor = b @ (layer.vera_lambda_d["default"][:, None] * a)
    result: Tensor = layer.vera_lambda_b["default"][:, None] * product
    return result


def fourier_delta(layer: Any) -> Tensor:
    """Return the change of FourierFT's weight, shape ``(out_features, in_features)``; see the module's formula."""
    spectrum: Tensor = layer.fourierft_spectrum["default"]
    tables = getattr(layer, "_fourier_tables", None)
    if tables is None or tables[0].device != spectrum.device or tables[0].dtype != spectrum.dtype:
        indices = layer.indices["default"].to(spectrum.device)
        sides = []
        for places, size in zip(indices, (layer.out_features, layer.in_features), strict=True):
            # The phase is reduced in integers first: float32 loses it for large products.
            steps = torch.outer(torch.arange(size, device=spectrum.device), places) % size
            angle = steps.double() * (2 * math.pi / size)
            sides.append((angle.cos(), angle.sin()))
        (cos_u, sin_u), (cos_v, sin_v) = sides
        scale = layer.fourierft_scaling["default"] / (layer.out_features * layer.in_features)
        left = torch.cat([cos_u, -sin_u], 1) * scale
        right = torch.cat([cos_v, sin_v], 1)
        tables = (left.to(spectrum.dtype), right.to(spectrum.dtype).T.contiguous())
        layer._fourier_tables = tables
    left, right = tables
    delta: Tensor = (left * spectrum.repeat(2)) @ right
    return delta
