"""Adapters from their names, and from the folders in which they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..registry import adapters
from .additive import from_peft
from .base import RECORD, Adapter, AdapterError, read_adapter_record
from .hybrid import Hybrid

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["get_adapter", "load_adapter"]


def get_adapter(spec: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]], **options: Any) -> Adapter:
    """Build an adapter from its name and options.

    Parameters
    ----------
    spec
        A name (``"lora"``), a mapping with a name and options (``{"name": "lora", "r": 2}``), or a list of these: a
        hybrid of several.
    **options
        Options of the adapter, when ``spec`` is a name.

    Raises
    ------
    ValueError
        If the name or an option is unknown or has a value that cannot be used.
    """
    if isinstance(spec, Adapter):
        return spec
    if isinstance(spec, str):
        return adapters.get(spec)(**options)  # type: ignore[no-any-return]
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise ValueError(f"adapter {dict(spec)!r} has no 'name'; write e.g. {{'name': 'lora', 'r': 2}}")
        rest = {str(key): value for key, value in spec.items() if key != "name"}
        return get_adapter(str(spec["name"]), **rest, **options)
    if not isinstance(spec, Iterable):
        raise ValueError(f"adapter {spec!r} is a {type(spec).__name__}; name it, or write {{'name': 'lora', 'r': 2}}")
    return Hybrid([get_adapter(part) for part in spec])


def load_adapter(folder: str | Path, backbone: Backbone, *, check_base: bool = True) -> Adapter:
    """Attach a saved adapter to a backbone.

    Parameters
    ----------
    folder
        What :meth:`Adapter.save` wrote, or an adapter that plain PEFT saved.
    backbone
        Backbone without an adapter.
    check_base
        Refuse an adapter that was trained on other base weights. Adapters saved by plain PEFT carry no fingerprint
        and cannot be checked.

    Raises
    ------
    AdapterError
        If the folder holds no adapter, or the adapter belongs to another base.
    """
    folder = Path(folder)
    record_path = folder / RECORD
    if record_path.exists():
        content = read_adapter_record(folder)
        spec, stored, checkpoint = content["adapter"], content["base"]["fingerprint"], content["base"]["checkpoint"]
        if check_base and stored != backbone.source.fingerprint:
            raise AdapterError(
                f"adapter in {str(folder)!r} was trained on {checkpoint!r} with fingerprint"
                f" {stored[:12]}…, this backbone is {backbone.source.checkpoint!r} with fingerprint"
                f" {backbone.source.fingerprint[:12]}…; load the adapter's own base, or pass check_base=False"
            )
        try:
            adapter = get_adapter(spec)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{str(record_path)!r} names an adapter that cannot be used: {error}") from error
    elif (folder / "adapter_config.json").exists():
        adapter = from_peft(folder, backbone)
    else:
        raise AdapterError(f"folder {str(folder)!r} holds neither {RECORD} nor adapter_config.json")
    try:
        with backbone.weights.changing():
            adapter.attach(backbone)
            try:
                return adapter.load(folder)
            except BaseException:
                adapter.detach()
                raise
    except (AdapterError, MemoryError, OSError, ImportError):
        raise
    except Exception as error:
        # Libraries believe what a folder says, and fail in any way where it makes no sense.
        raise AdapterError(
            f"adapter {adapter!r} in {str(folder)!r} cannot be attached: {type(error).__name__}: {error}"
        ) from error
