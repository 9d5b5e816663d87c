"""What a search shows while it runs."""

from __future__ import annotations

import math
import time
from typing import Any

from .records import FINISHED, Entry, cell, value_at
from .searchspec import SearchSpec

__all__ = ["Board"]

_SHOWN = 10


class Board:
    """A live table of the best trials on a terminal, or nothing."""

    def __init__(self, spec: SearchSpec, *, enabled: bool) -> None:
        self.spec, self.enabled = spec, enabled
        self.rows: dict[int, dict[str, Any]] = {}
        self._live: Any = None
        self._started = time.monotonic()
        self._before = 0

    def __enter__(self) -> Board:
        if self.enabled:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def know(self, entry: Entry, status: str, score: float | None = None, epochs: int | None = None) -> None:
        row = self.rows.setdefault(entry.number, {"score": math.inf, "epochs": 0})
        trial = self.spec.trial(entry.values)
        row.update(status=status, values={path: value_at(trial, path) for path in self.spec.space})
        if score is not None:
            row["score"] = score
        if epochs is not None:
            row["epochs"] = epochs
        self.refresh()

    def refresh(self) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def left(self) -> float | None:
        """Return the seconds that are left, by what the trials of this run took so far."""
        ended: int = sum(row["status"] != "running" for row in self.rows.values())
        if self.spec.num_samples is None or not ended:
            return None
        return (time.monotonic() - self._started) * (self.spec.num_samples - ended) / ended

    def table(self) -> Any:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        counts = {name: sum(row["status"] == name for row in self.rows.values()) for name in (FINISHED, "running")}
        left = self.left()
        caption = f"{counts[FINISHED]} of {self.spec.num_samples or 'all'} finished, {counts['running']} running" + (
            "" if left is None else f", about {left / 60:.0f} min left"
        )
        table = Table(box=SIMPLE, title=self.spec.title, caption=caption)
        for name in ("trial", "status", "epochs", self.spec.objective[0], *self.spec.space):
            table.add_column(Text(name))
        for number, row in sorted(self.rows.items(), key=lambda item: item[1]["score"])[:_SHOWN]:
            values = [cell(value) for value in row["values"].values()]
            score = "–" if math.isinf(row["score"]) else f"{row['score']:.5g}"
            table.add_row(str(number), row["status"], str(row["epochs"]), score, *map(Text, values))
        return table
