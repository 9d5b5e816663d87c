"""Adapters: what trains, and where. See :class:`gluonts_peft.adapters.base.Adapter` for the contract."""
