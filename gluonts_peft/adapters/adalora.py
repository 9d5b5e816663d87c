"""AdaLoRA: LoRA whose ranks are redistributed while it trains (Zhang et al. 2023, arXiv 2303.10512).

    W' = W + (alpha/r) B diag(E) A,    entries of E with the least importance are set to zero on a schedule

PEFT's allocator does the work; here it is called at the right moments, and its state survives an interruption. What is
saved has the initial rank, with zeros where ranks were taken away, and opens in plain PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import AdapterError
from .peft import PeftAdapter

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["AdaLora"]

_STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLora(PeftAdapter):
    """LoRA with a budget of ranks. Options are the fields of ``peft.AdaLoraConfig``, without ``total_step``."""

    _ranks: dict[str, list[bool]] | None = None

    def peft_config(self, backbone: Backbone) -> Any:
        if "total_step" in self.options:
            raise AdapterError("adapter 'adalora': option 'total_step' is known when training starts; leave it out")
        start, end = (self.options.get(name, self.method.defaults[name]) for name in ("init_r", "target_r"))
        if end > start:
            raise AdapterError(f"adapter 'adalora': target_r {end} is above init_r {start}; ranks are only taken away")
        # PEFT wants a length now; prepare() puts in the real one.
        length = self.options.get("tinit", 0) + self.options.get("tfinal", 0) + 1
        options, self.options = self.options, {**self.options, "total_step": length}
        try:
            return super().peft_config(backbone)
        finally:
            self.options = options

    def prepare(self, total_steps: int) -> None:
        config = self._tuner.peft_config["default"]
        if config.tinit + config.tfinal >= total_steps:
            raise AdapterError(
                f"adapter 'adalora': tinit {config.tinit} + tfinal {config.tfinal} leave none of the {total_steps}"
                " training steps; lower them or train longer"
            )
        config.total_step = total_steps
        self._tuner.rankallocator.set_total_step(total_steps)

    def after_step(self, step: int) -> None:
        config = self._tuner.peft_config["default"]
        config.rank_pattern = self._ranks
        # The last step carries the final mask: PEFT counts the steps from 0 and reaches total_step only after the end.
        self._tuner.update_and_allocate(step + 1)
        self._ranks, config.rank_pattern = config.rank_pattern, None

    def penalty(self) -> Tensor | None:
        config = self._tuner.peft_config["default"]
        if config.orth_reg_weight <= 0:
            return None
        terms = []
        for layer in self._layers:
            for matrix in (layer.lora_A["default"], layer.lora_B["default"].T):
                gram = matrix @ matrix.T
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return torch.stack(terms).mean() * float(config.orth_reg_weight)

    def training_state(self) -> dict[str, Tensor]:
        allocator = self._tuner.rankallocator
        state = {f"{kind}/{name}": value for kind in _STATISTICS for name, value in getattr(allocator, kind).items()}
        for name, kept in (self._ranks or {}).items():
            state[f"ranks/{name}"] = torch.tensor(kept)
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        allocator = self._tuner.rankallocator
        ranks: dict[str, list[bool]] = {}
        for path, value in state.items():
            kind, _, name = path.partition("/")
            if kind == "ranks":
                ranks[name] = value.tolist()
            else:
                getattr(allocator, kind)[name] = value.to(self.attached.device)
        self._ranks = ranks or None
