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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .forward import replace_method

__all__ = [
    "c3a_delta",
    "dense_forward",
    "dora_weight",
    "fourier_delta",
    "guard_norms",
    "make_dense",
    "vera_delta",
    "waveft_delta",
    "weight_norm",
]


def make_dense(layer: Any) -> None:
    """Replace the forward pass of a PEFT layer around ``nn.Linear`` by a product with the changed matrix.

    Dropout on the adapter's path has no such form: the layer then keeps PEFT's own forward pass.
    """
    if hasattr(layer, "get_delta_weight") and not _drops(layer):
        replace_method(layer, "forward", dense_forward)


def _drops(layer: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Dropout) and module.p > 0
        for name, child in layer.named_children()
        if name.endswith("_dropout")
        for module in child.modules()
    )


def dense_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return what a PEFT layer around ``nn.Linear`` makes of ``x``, by the changed matrix where there is one."""
    base = layer.base_layer
    plain = layer.disable_adapters or layer.merged or args or kwargs
    if not plain and type(base) is nn.Linear:
        return functional.linear(x, _weight(layer, base), base.bias)
    if plain or _is_dora(layer):
        # DoRA's change depends on the base's weight, which is not one matrix around another adapter's layer.
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    out: Tensor = base(x)
    return out + functional.linear(x, _delta(layer).to(x.dtype))


def _is_dora(layer: Any) -> bool:
    return bool(getattr(layer, "lora_magnitude_vector", None))


def _weight(layer: Any, base: nn.Linear) -> Tensor:
    if _is_dora(layer):
        return dora_weight(layer, base)
    return base.weight + _delta(layer).to(base.weight.dtype)


def _delta(layer: Any) -> Tensor:
    for tensor, function in _FASTER.items():
        if hasattr(layer, tensor):
            return function(layer)
    delta: Tensor = layer.get_delta_weight("default")
    return delta


def dora_weight(layer: Any, base: nn.Linear) -> Tensor:
    """Return DoRA's changed weight, ``m V / |V|`` with ``V = W + (alpha/r) B A`` and the norm taken as a constant."""
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    direction = base.weight + layer.scaling["default"] * delta
    norm = _nonzero(torch.linalg.vector_norm(direction.detach(), dim=1))
    magnitude = layer.lora_magnitude_vector["default"].weight
    weight: Tensor = (magnitude / norm)[:, None] * direction
    return weight


def _nonzero(norm: Tensor) -> Tensor:
    """Return norms with 1 in place of 0: a row of zeros, whose magnitude is zero, then stays zero instead of 0 / 0."""
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def weight_norm(part: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the norms by which the part of a DoRA layer of PEFT divides, 1 in place of 0."""
    return _nonzero(type(part).get_weight_norm(part, *args, **kwargs))


def guard_norms(layer: Any) -> None:
    """Let rows of zeros stay zero in a DoRA layer of PEFT, in its own forward pass and in merging."""
    for part in getattr(layer, "lora_magnitude_vector", {}).values():
        replace_method(part, "get_weight_norm", weight_norm)


def c3a_delta(layer: Any) -> Tensor:
    """Return C3A's change, blocks of circulant matrices: ``dW[m b + i, n b + j] = w[m, n, (j - i) mod b] / in``."""
    kernel: Tensor = layer.c3a_kernel["default"]
    size = kernel.shape[-1]
    # Row i of a circulant matrix is a window of its kernel written twice, i steps further left.
    rows = torch.cat([kernel, kernel], -1).unfold(-1, size, 1)[:, :, 1:].flip(2)
    delta: Tensor = rows.permute(0, 2, 1, 3).reshape(layer.out_features, layer.in_features) / layer.in_features
    return delta


def waveft_delta(layer: Any) -> Tensor:
    """Return WaveFT's change; with the Haar wavelet each coefficient is a block of two by two, put where it belongs."""
    name = "default"
    rows, columns = layer.out_features, layer.in_features
    if layer.waveft_wavelet_family[name] != "db1" or not layer.waveft_use_idwt[name] or rows % 2 or columns % 2:
        general: Tensor = layer.get_delta_weight(name)
        return general
    spectrum: Tensor = layer.waveft_spectrum[name]
    table = getattr(layer, "_waveft_table", None)
    if table is None or table[0].device != spectrum.device:
        row, column = layer.waveft_indices[name].to(spectrum.device)
        lower, right = row >= rows // 2, column >= columns // 2
        places, signs = [], []
        for i in (0, 1):
            for j in (0, 1):
                places.append((2 * (row % (rows // 2)) + i) * columns + 2 * (column % (columns // 2)) + j)
                # The right half of the spectrum changes sign from row to row, the lower half from column to column.
                odd = (right if i else torch.zeros_like(right)) ^ (lower if j else torch.zeros_like(lower))
                signs.append(torch.where(odd, -0.5, 0.5))
        scale = layer.waveft_scaling[name]
        table = layer._waveft_table = (torch.cat(places), torch.cat(signs) * scale)
    flat = spectrum.new_zeros(rows * columns)
    return flat.index_add(0, table[0], spectrum.repeat(4) * table[1]).view(rows, columns)


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


_FASTER: dict[str, Callable[[Any], Tensor]] = {
    "fourierft_spectrum": fourier_delta,
    "vera_lambda_b": vera_delta,
    "c3a_kernel": c3a_delta,
    "waveft_spectrum": waveft_delta,
}
