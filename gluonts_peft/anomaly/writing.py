"""Write what was found: scores and events as tables, and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import delivering
from ..series.calendar import stamp_table
from ..series.entries import in_step
from ..series.writing import Names, write_columns
from .detection import Detection

__all__ = ["write_detections"]


def write_detections(
    detections: Sequence[Detection],
    dataset: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    plots: int = 6,
    columns: Sequence[str] = ("item_id", "timestamp", "target"),
) -> None:
    """Write ``scores.csv``, ``events.csv`` and ``plot.png`` into a folder, stamped as the data are.

    Parameters
    ----------
    detections, dataset
        What :func:`detect` gave, and was given; at least one detection.
    folder
        New or empty; made if need be.
    plots
        Most series in the plot, the first ones.
    columns
        Names of the columns for item, time and value in ``scores.csv``.

    Raises
    ------
    FileExistsError
        If the folder is in use.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {str(folder)!r} is in use; name a new one")
    # Series that were left out are passed over.
    entries = list(in_step([(each.scores.item_id, each.scores.start) for each in detections], dataset))
    inside = [np.zeros(len(detection.scores.values), bool) for detection in detections]
    for marks, detection in zip(inside, detections, strict=True):
        for event in detection.events:
            marks[event.first : event.last + 1] = True
    lengths = [len(marks) for marks in inside]
    scores = [detection.scores for detection in detections]
    calendars = [own.calendar for own in scores]
    names = [entry.get("item_id", own.item_id) for own, entry in zip(scores, entries, strict=True)]
    points = {
        columns[0]: Names(names, lengths),
        columns[1]: stamp_table([own.start for own in scores], lengths, calendars),
        columns[2]: np.concatenate([np.asarray(entry["target"]) for entry in entries]),
        "score": np.concatenate([own.values for own in scores]),
        "threshold": np.repeat([detection.threshold for detection in detections], lengths),
        "event": np.concatenate(inside),
    }
    counts = [len(detection.events) for detection in detections]
    found = [event for detection in detections for event in detection.events]
    own_calendars = [calendar for calendar, count in zip(calendars, counts, strict=True) for _ in range(count)]
    events = {
        columns[0]: Names(names, counts),
        "start": stamp_table([event.start for event in found], 1, own_calendars),
        "end": stamp_table([event.end for event in found], 1, own_calendars),
        "steps": np.array([event.last - event.first + 1 for event in found], np.int64),
        "peak": np.array([event.peak for event in found], float),
        "threshold": np.repeat([detection.threshold for detection in detections], counts),
    }
    figure = _plot(detections[:plots], entries)
    with delivering(folder, "detect") as part:
        part.mkdir()
        write_columns(points, part / "scores.csv", ".csv")
        write_columns(events, part / "events.csv", ".csv")
        figure.savefig(part / "plot.png", dpi=100)


def _plot(detections: Sequence[Detection], entries: Sequence[Mapping[str, Any]]) -> Any:
    """Draw a series above its scores, events shaded."""
    from matplotlib.figure import Figure

    # Not by way of pyplot, which would take hold of the whole process's figures.
    figure = Figure(figsize=(10, 3 * len(detections)), layout="constrained")
    axes = figure.subplots(2 * len(detections), 1, squeeze=False, height_ratios=[2, 1] * len(detections))[:, 0]
    for detection, entry, above, below in zip(detections, entries, axes[::2], axes[1::2], strict=False):
        # What the clock shows; and one step more, where an event at the end ends.
        own = detection.scores
        times = stamp_table([own.start], len(own.values) + 1, [own.calendar]).walls.view("M8[ns]")
        above.plot(times[:-1], entry["target"], color="black", linewidth=0.7)
        above.set_title(detection.scores.item_id, loc="left", fontsize="medium", parse_math=False)
        below.plot(times[:-1], detection.scores.values, color="tab:blue", linewidth=0.7)
        below.axhline(detection.threshold, color="tab:red", linewidth=0.7, linestyle="--")
        below.set_ylabel("score")
        below.sharex(above)
        for axis in (above, below):
            for event in detection.events:
                axis.axvspan(times[event.first], times[event.last + 1], color="tab:red", alpha=0.25, linewidth=0)
    return figure
