"""Any method of HuggingFace PEFT as an adapter: one generic class, told by a row what the method is.

PEFT owns the mathematics and the file format. The rows are in :mod:`gluonts_peft.adapters.additive`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..errors import unknown
from ..noise import without_noise
from .base import RECORD, Adapter, AdapterError, copy_into, read_adapter_record, unwrapped
from .dense import guard_norms, make_dense
from .options import check_option, in_layers, matching, resolve_pattern, widest

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["EXTRA", "OURS", "Method", "PeftAdapter"]

ATTENTION = ("q", "k", "v", "o")

# Extras train tensors that are not the adapter's: a hybrid with bitfit or head says that. The others are ours.
EXTRA = {"bias", "modules_to_save", "trainable_token_indices"}
OURS = EXTRA | {
    "peft_type",
    "peft_version",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
}
_PATTERNS = {"rank_pattern", "alpha_pattern", "n_frequency_pattern", "block_size_pattern"}
_NAMING = ("sites", "target_modules", "exclude_modules", "layers_to_transform")


@dataclass(frozen=True)
class Method:
    """A row of the table: one method of PEFT. Calling it with options builds the adapter.

    Parameters
    ----------
    name
        Name in the registry.
    config
        Name of the configuration class in ``peft``.
    learning_rate
        Default rate.
    sites
        Kinds of site it goes to by default; the option ``sites`` overrides it.
    defaults
        Options whose default differs from PEFT's.
    divides
        An option that must divide all widths, and the largest value to try: its default is found from the model.
    dense
        Train through ``x (W + dW)`` instead of PEFT's own forward: faster where dW is cheap next to two products.
    feedforward
        Further sites that go into ``feedforward_modules`` (IA3 scales the input there).
    mergeable
        Whether the change can be folded into the weights.
    innermost
        Attaches to plain linear layers only, so it goes first in a hybrid.
    kind
        Class of the adapter; None means :class:`PeftAdapter`.
    """

    name: str
    config: str
    learning_rate: float
    sites: tuple[str, ...] = ATTENTION
    defaults: Mapping[str, Any] = field(default_factory=dict)
    divides: tuple[str, int] | None = None
    dense: bool = False
    feedforward: tuple[str, ...] = ()
    mergeable: bool = True
    innermost: bool = False
    kind: type[PeftAdapter] | None = None

    def __call__(self, **options: Any) -> PeftAdapter:
        return (self.kind or PeftAdapter)(self, options)

    def config_class(self) -> Any:
        """Return the configuration class."""
        import peft

        return getattr(peft, self.config)

    def peft_type(self) -> Any:
        """Return the method's type in PEFT."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return next(kind for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config is self.config_class())


class PeftAdapter(Adapter):
    """Any adapter of PEFT.

    Parameters
    ----------
    method
        Row of the table.
    options
        Fields of the method's PEFT configuration, and ``sites``: the kinds of place to attach to. PEFT's own
        ``target_modules`` names layers of one family and takes the place of ``sites``.

    Raises
    ------
    AdapterError
        If an option is unknown or PEFT refuses its value.

    Attributes
    ----------
    own_options
        Options that are the adapter's and not PEFT's.
    """

    own_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, method: Method, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.method = method
        self.name = method.name
        self.learning_rate = method.learning_rate
        self.mergeable = method.mergeable
        self.innermost = method.innermost
        known, defaults = self.known_options(), self._defaults()
        for option, value in options.items():
            if option not in known and option not in EXTRA & defaults.keys():
                raise AdapterError(f"adapter {self.name!r}: " + unknown("option", option, known))
            # The backbone knows its sites.
            if option not in self.own_options and option != "sites":
                check_option(method.name, option, value, defaults.get(option))
        self._tuner: Any = None
        self._meant: list[str] = []
        self._layers: list[Any] = []
        self._parameters: list[nn.Parameter] = []

    def _defaults(self) -> dict[str, Any]:
        """Return what PEFT takes for options that are not given."""
        return {
            item.name: item.default if item.default_factory is MISSING else item.default_factory()
            for item in fields(self.method.config_class())
        }

    def known_options(self) -> set[str]:
        """Return the names of the options: PEFT's, the adapter's own, and ``sites``."""
        return {f.name for f in fields(self.method.config_class())} - OURS | {"sites"} | self.own_options

    @property
    def prefix(self) -> str:
        """What PEFT's tensors of this method start with: two methods of one prefix cannot share a model."""
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        return str(PEFT_TYPE_TO_PREFIX_MAPPING[self.method.peft_type()])

    @property
    def _stem(self) -> str:
        # VeRA's prefix names its diagonals alone; its projections share the first word.
        return self.prefix.partition("_")[0] + "_"

    def peft_config(self, backbone: Backbone) -> Any:
        """Return the PEFT configuration for a backbone.

        Raises
        ------
        AdapterError
            If PEFT refuses a value.
        """
        method = self.method
        given = {name: value for name, value in self.options.items() if name not in self.own_options}
        options = {**method.defaults, **given}
        targets = self._targets(backbone, options)
        modules = [backbone.network.get_submodule(name) for name in targets]
        # A rank beyond the widest matrix only costs memory.
        limit = max(widest(modules), 1024)
        for option in ("r", "init_r", "target_r"):
            if options.get(option, 0) > limit:
                raise AdapterError(
                    f"adapter {self.name!r}: {option} {options[option]} is beyond {limit}; take a lower rank"
                )
        if method.divides is not None and self.options.get("target_modules") is None:
            option, most = method.divides
            # OFT takes the number of blocks, r, or their size.
            options.setdefault(option, 0 if method.name == "oft" and options.get("r") else _divisor(modules, most))
        for option in sorted(name for name in _PATTERNS if options.get(name)):
            # LoRA and WaveFT take keys for expressions, the others look up full names as well.
            whole = option in ("n_frequency_pattern", "block_size_pattern") and method.name != "waveft"
            told = f"adapter {self.name!r}: {option}"
            options[option] = resolve_pattern(options[option], targets, told, whole=whole)
        try:
            with without_noise("peft"):
                return method.config_class()(target_modules=targets, base_model_name_or_path=_base(backbone), **options)
        except Exception as error:
            raise AdapterError(f"adapter {self!r} is refused by PEFT: {error}") from error

    def _targets(self, backbone: Backbone, options: dict[str, Any]) -> list[str]:
        """Take what names modules out of some options, and return the full names of those to adapt."""
        method, told = self.method, f"adapter {self.name!r}"
        everything = _places(backbone.network)
        chosen = "sites" in options
        sites = options.pop("sites", method.sites)
        if (given := options.pop("target_modules", None)) is None:
            targets = list(backbone.places(sites if chosen else (*sites, *method.feedforward)))
        elif given == "all-linear":
            ends = set(backbone.sites().get("head", ()))
            linear = [name for name in everything if isinstance(backbone.network.get_submodule(name), nn.Linear)]
            targets = [name for name in linear if name not in ends]
        else:
            targets = matching(given, everything, f"{told}: target_modules")
        if (left_out := options.pop("exclude_modules", None)) is not None:
            excluded = set(matching(left_out, targets, f"{told}: exclude_modules"))
            if not excluded:
                raise AdapterError(f"{told}: exclude_modules {left_out!r} names none of the {len(targets)} modules")
            targets = [name for name in targets if name not in excluded]
        if (layers := options.pop("layers_to_transform", None)) is not None:
            targets = in_layers(targets, layers)
        if method.feedforward:
            inner = options.get("feedforward_modules")
            if inner is None:
                own = {name for kind in method.feedforward for name in backbone.sites().get(kind, ())}
                inner = [name for name in targets if name in own]
            options["feedforward_modules"] = matching(inner, targets, f"{told}: feedforward_modules")
        if not targets:
            named = {name: self.options[name] for name in _NAMING if name in self.options}
            raise AdapterError(f"{told}: {named} name no module of {backbone!r}")
        return targets

    def _attach(self, backbone: Backbone) -> None:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTunerLayer

        network = backbone.network
        config = self.peft_config(backbone)
        self._meant = sorted(config.target_modules)
        known = {id(parameter) for parameter in network.parameters()} | {id(module) for module in network.modules()}
        # Each part of a hybrid keeps a configuration of its own; PEFT would merge them through the network.
        _forget_config(network)
        try:
            with without_noise("peft"):
                self._tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](network, config, "default")
        except Exception as error:
            # PEFT checks some options by assertions, and some not at all.
            reason = str(error) or type(error).__name__
            raise AdapterError(f"adapter {self!r} cannot be attached to {backbone!r}: {reason}") from error
        self._layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer) and id(m) not in known]
        self._parameters = [p for p in network.parameters() if id(p) not in known and p.requires_grad]
        self._check_places(network)
        for layer in self._layers:
            guard_norms(layer)
            if self.method.dense:
                make_dense(layer)

    def _check_places(self, network: nn.Module) -> None:
        """Refuse if PEFT has adapted other modules than were meant, whose names end alike."""
        mine = {id(layer) for layer in self._layers}
        found = {name for name, module in network.named_modules() if id(module) in mine}
        if surplus := {unwrapped(f"{name}.")[:-1] for name in found} - set(self._meant):
            raise AdapterError(
                f"adapter {self!r} would adapt {min(surplus)!r} as well, whose name ends like another that is meant"
            )

    def _detach(self, backbone: Backbone) -> None:
        self._unwrap(backbone)

    def folds(self) -> list[nn.Parameter] | None:
        # LayerNorm tuning exchanges modules instead of changing weights.
        if self.method.config == "LNTuningConfig":
            return []
        found = [parameter for layer in self._layers for parameter in layer.get_base_layer().parameters()]
        return list(dict.fromkeys(found))

    def _fold(self) -> None:
        for layer in self._layers:
            with without_noise("peft"):
                layer.merge(safe_merge=False, adapter_names=["default"])

    def _unwrap(self, backbone: Backbone) -> None:
        """Put the modules that were wrapped back into their places."""
        mine = {id(layer) for layer in self._layers}
        parents = [
            (module, name, child)
            for module in backbone.network.modules()
            for name, child in module.named_children()
            if id(child) in mine
        ]
        for module, name, child in parents:
            setattr(module, name, child.base_layer)
        _forget_config(backbone.network)
        self._tuner, self._layers, self._parameters = None, [], []

    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters)

    def state_dict(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        # PEFT reads the names off the modules; the holder stands for the PeftModel that a plain user would have.
        holder = nn.Module()
        holder.base_model = self._tuner
        holder.peft_config = self._tuner.peft_config
        with without_noise("peft"):
            found = get_peft_model_state_dict(holder, save_embedding_layers=False)
        # Wrappers of later parts of a hybrid add `base_layer` to the path; a tensor of an adapter never lies in one.
        return {
            unwrapped(name): tensor
            for name, tensor in found.items()
            if any(part.startswith(self._stem) for part in name.split("."))
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        copy_into(self.state_dict(), state, self)

    def _frozen_digest(self) -> str | None:
        """Return the SHA-256 of random tensors that are drawn again instead of stored, or None if there are none."""
        from safetensors.torch import save

        stored = {tensor.data_ptr() for tensor in self.state_dict().values()}
        drawn = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self._tuner.named_buffers()
            if name.rpartition(".")[0].rpartition(".")[2].startswith(self._stem) and tensor.data_ptr() not in stored
        }
        unique = {tensor.data_ptr(): tensor for _, tensor in sorted(drawn.items())}
        if not unique:
            return None
        return hashlib.sha256(save({str(i): t.clone() for i, t in enumerate(unique.values())})).hexdigest()

    def _write_config(self, folder: Path) -> None:
        # What opens the folder without this project, such as `AutoPeftModel`, learns from it which class to build.
        network = type(self.attached.network)
        mapping = {"base_model_class": network.__name__, "parent_library": network.__module__}
        self._tuner.peft_config["default"].save_pretrained(folder, auto_mapping_dict=mapping)

    def _write_record(self, folder: Path, backbone: Backbone, **more: Any) -> None:
        super()._write_record(folder, backbone, frozen=self._frozen_digest(), **more)

    def load(self, folder: str | Path) -> Adapter:
        if (Path(folder) / RECORD).exists():
            frozen = read_adapter_record(Path(folder)).get("frozen")
            if frozen is not None and frozen != self._frozen_digest():
                raise AdapterError(
                    f"adapter {self!r} in {str(folder)!r} rests on random projections that this version of torch draws"
                    " differently; load it with the versions in its record, or train it with save_projection=True"
                )
        return super().load(folder)


def _base(backbone: Backbone) -> str:
    """Return where others find the base: bundled names mean nothing to them, so those become folders."""
    name = backbone.source.checkpoint
    return str(backbone.bundled()[name]) if backbone.source.kind == "bundled" else name


def _forget_config(network: nn.Module) -> None:
    if hasattr(network, "peft_config"):
        del network.peft_config


def _places(network: nn.Module) -> list[str]:
    """Return the names of the modules of the base, also where other adapters have wrapped them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[str] = []
    wrapped: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if not name or name.startswith(wrapped or "."):
            continue
        found.append(name)
        if isinstance(module, BaseTunerLayer):
            wrapped = (*wrapped, f"{name}.")
    return found


def _divisor(modules: list[nn.Module], limit: int) -> int:
    """Return the largest number up to ``limit`` that divides every width of some linear layers."""
    widths = [n for module in modules if isinstance(module.weight, Tensor) for n in module.weight.shape]
    common = math.gcd(*widths)
    return max(n for n in range(1, limit + 1) if common % n == 0)
