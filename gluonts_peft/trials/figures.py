"""The pictures of a report: drawn twice, for light and for dark pages, as SVG inside the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["Curve", "draw_costs", "draw_curve", "draw_extremes", "draw_forecasts", "draw_parameters", "html_figure"]


@dataclass(frozen=True)
class Theme:
    """Colours: of text, of what matters, of what surrounds it, and of lines that must be told apart."""

    text: str
    accent: str
    line: str
    cycle: tuple[str, ...]


# The palette of Okabe and Ito, which the colour-blind can tell apart, without its black and yellow.
_CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c", "#7f3f98")
_LIGHT = Theme(text="#1f2328", accent="#0969da", line="#9aa4af", cycle=_CYCLE)
_DARK = Theme(text="#e6edf3", accent="#58a6ff", line="#656c76", cycle=_CYCLE)


def html_figure(draw: Callable[[Theme], Any], caption: str) -> str:
    """Return a figure with its caption as HTML, drawn for both kinds of page."""
    light, dark = (_svg(draw(theme)) for theme in (_LIGHT, _DARK))
    return (
        '<figure><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" alt="{html.escape(caption)}">'
        f"</picture></div><figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _svg(figure: Any) -> str:
    import matplotlib

    file = io.BytesIO()
    # Text as text is a tenth of the size; the fixed salt makes equal figures equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gluonts-peft"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(theme: Theme, rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=theme.text, labelsize=8)
        for name, spine in axis.spines.items():
            spine.set_color(theme.line)
            spine.set_visible(name in ("left", "bottom"))
    return figure, axes


#: Changes are drawn from as far below 0 as above, at least so many per cent: a change of 2 % is a small one.
LEAST_REACH = 10.0


def draw_parameters(points: pd.DataFrame, what: str, theme: Theme, *, relative: bool) -> Any:
    """Draw what tuning changed, or an error, against the number of trainable parameters.

    Parameters
    ----------
    points
        Indexed by method, with the columns ``parameters``; ``value``, ``low`` and ``high``: what is drawn, and from
        where to where its bar reaches (NaN for none); ``claimed``: whether it may be filled and coloured.
    what
        Name of the error.
    theme
        Colours.
    relative
        Whether values are changes in per cent of zero-shot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = _figure(theme, 1, 1, 8.0, 4.5)
    axis = axes[0, 0]
    x, y = points["parameters"].to_numpy(float), points["value"].to_numpy(float)
    axis.set_xscale("log")
    axis.set_xlim(x.min() / 2.5, x.max() * 4)
    for claimed, colour, fill in ((True, theme.accent, theme.accent), (False, theme.text, "none")):
        part = points[points["claimed"] == claimed]
        if len(part):
            axis.errorbar(
                part["parameters"], part["value"], yerr=_bars(part.to_dict("list")), fmt="o", color=colour, mfc=fill,
                ecolor=theme.line, ms=5,
            )  # fmt: skip
    _error_axis(axis, what, points[["value", "low", "high"]].to_numpy(float), theme, relative=relative)
    axis.set_xlabel("trainable parameters", color=theme.text, fontsize=9)
    FigureCanvasAgg(figure)
    _label_points(axis, list(map(str, points.index)), x, y, theme)
    return figure


def _bars(points: Mapping[str, Any]) -> Any:
    """Return how far bars reach below and above points; 0 where nothing is known."""
    value, low, high = (np.asarray(points[name], float) for name in ("value", "low", "high"))
    return np.nan_to_num(np.maximum([value - low, high - value], 0.0))


def _error_axis(axis: Any, what: str, values: Any, theme: Theme, *, relative: bool) -> None:
    """Let an axis of errors start at 0, and one of changes have 0 in its middle and reach ten per cent or more."""
    known = np.abs(values[np.isfinite(values)])
    top = 1.1 * float(known.max(initial=0.0)) or 1.0
    if relative:
        reach = max(LEAST_REACH, top)
        axis.set_ylim(-reach, reach)
        axis.axhline(0.0, color=theme.text, lw=1, ls="--")
        axis.annotate(
            "zero-shot", (0.995, 0.0), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
            textcoords="offset points", fontsize=8, color=theme.text,
        )  # fmt: skip
    else:
        axis.set_ylim(0.0, top)
    axis.set_ylabel(f"change of {what} against zero-shot, %" if relative else what, color=theme.text, fontsize=9)


@dataclass
class Curve:
    """A change, or an error, against an option.

    Parameters
    ----------
    option
        Its name.
    lines
        Name of a line -> its points: value of the option, what is drawn there, and from where to where its bar reaches.
    relative
        Whether changes in per cent of zero-shot are drawn, and no errors.
    """

    option: str
    lines: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    relative: bool = False


def draw_curve(curve: Curve, what: str, theme: Theme) -> Any:
    """Draw a change, or an error, against an option, its values evenly spaced."""
    figure, axes = _figure(theme, 1, 1, 8.0, 3.6)
    axis = axes[0, 0]
    options = sorted({point[0] for points in curve.lines.values() for point in points})
    place = {option: position for position, option in enumerate(options)}
    for number, (name, points) in enumerate(curve.lines.items()):
        option, value, low, high = (np.array(part, float) for part in zip(*sorted(points), strict=True))
        # Side by side, so that bars of equal values do not hide each other.
        x = np.array([place[each] for each in option]) + 0.06 * (number - (len(curve.lines) - 1) / 2)
        axis.errorbar(
            x, value, yerr=_bars({"value": value, "low": low, "high": high}), marker="o", ms=4, lw=1.2, label=name,
            color=theme.cycle[number % 8],
        )  # fmt: skip
    drawn = np.array([point[1:] for points in curve.lines.values() for point in points], float)
    _error_axis(axis, what, drawn, theme, relative=curve.relative)
    axis.set_xticks(range(len(options)), ["all" if option == np.inf else f"{option:g}" for option in options])
    axis.set_xlabel(curve.option, color=theme.text, fontsize=9, parse_math=False)
    legend = axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_color(theme.text)
        text.set_parse_math(False)
    return figure


def draw_costs(costs: pd.DataFrame, theme: Theme) -> Any:
    """Draw a bar a method for each column of a table."""
    count = len(costs)
    figure, axes = _figure(theme, 1, len(costs.columns), 4.4, 0.6 + 0.22 * count, sharey=True)
    for axis, name in zip(axes[0], costs.columns, strict=True):
        axis.barh(np.arange(count), costs[name].to_numpy(float), color=theme.accent, height=0.65)
        axis.set_xlabel(name, color=theme.text, fontsize=9)
    axes[0, 0].set_yticks(np.arange(count), list(map(str, costs.index)), parse_math=False)
    axes[0, 0].invert_yaxis()
    for axis in axes[0]:
        axis.set_xlim(left=0.0)
    return figure


def _label_points(axis: Any, names: list[str], x: Any, y: Any, theme: Theme) -> None:
    """Write each name beside its point, where it hides neither a point nor another name, if there is such a place."""
    figure = axis.figure
    figure.draw_without_rendering()
    points = axis.transData.transform(np.column_stack([x, y]))
    taken: list[Any] = []
    places = [
        (dx * reach, dy * reach, side)
        for reach in (1, 2, 3.5, 5.5, 8)
        for dx, dy, side in ((6, 0, "left"), (-6, 0, "right"), (0, 8, "center"), (0, -8, "center"),
                             (6, 7, "left"), (6, -7, "left"), (-6, 7, "right"), (-6, -7, "right"))
    ]  # fmt: skip
    for name, a, b in sorted(zip(names, x, y, strict=True), key=lambda point: point[1]):
        best: tuple[int, Any] | None = None
        for dx, dy, side in places:
            note = axis.annotate(
                name, (a, b), xytext=(dx, dy), textcoords="offset points", ha=side, va="center", fontsize=8,
                color=theme.text, parse_math=False,
            )  # fmt: skip
            box = note.get_window_extent()
            hidden = sum(box.overlaps(other) for other in taken) + sum(box.padded(2).contains(*p) for p in points)
            if best is None or hidden < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hidden, note)
            else:
                note.remove()
            if hidden == 0:
                break
        if best is not None:
            taken.append(best[1].get_window_extent())


# What axes of values say, which are fitted to what is shown.
_CUT = "value (axes are cut: not from 0, without outliers)"

Examples = Mapping[str, Sequence[Mapping[str, Any]]]


def draw_forecasts(shown: Examples, theme: Theme) -> Any:
    """Draw forecasts of the same windows, a column a method."""
    count = min(len(examples) for examples in shown.values())
    figure, axes = _figure(theme, count, len(shown), 2.7, 1.9, sharey="row", sharex=True)
    figure.supylabel(_CUT, fontsize=8, color=theme.text)
    for column, (method, examples) in enumerate(shown.items()):
        for row, example in enumerate(examples[:count]):
            axis = axes[row, column]
            unit = _paint(axis, example, theme)
            if row == 0:
                axis.set_title(method, fontsize=9, color=theme.text, parse_math=False)
            if row == count - 1:
                axis.set_xlabel(unit, fontsize=8, color=theme.text)
            if column == 0:
                axis.set_ylabel(example["item_id"], fontsize=8, color=theme.text, parse_math=False)
                _limit(axis, [shown[name][row] for name in shown])
    return figure


def draw_extremes(shown: Examples, theme: Theme) -> Any:
    """Draw forecasts of different windows, a row a method."""
    count = min(len(examples) for examples in shown.values())
    figure, axes = _figure(theme, len(shown), count, 2.1, 1.9)
    figure.supylabel(_CUT, fontsize=8, color=theme.text)
    for row, (method, examples) in enumerate(shown.items()):
        for column, example in enumerate(examples[:count]):
            axis = axes[row, column]
            unit = _paint(axis, example, theme)
            title = f"{example['kind']}: {example['item_id']}, {example['MAE']:.3g}"
            axis.set_title(title, fontsize=8, parse_math=False)
            axis.title.set_color(theme.text)
            if row == len(shown) - 1:
                axis.set_xlabel(unit, fontsize=8, color=theme.text)
            if column == 0:
                axis.set_ylabel(method, fontsize=8, color=theme.text, parse_math=False)
            _limit(axis, [example])
    return figure


def _paint(axis: Any, example: Mapping[str, Any], theme: Theme) -> str:
    """Draw one forecast and return the unit of its time axis."""
    hours, unit = _step(example["freq"])
    history, label = (np.array(example[part], dtype=float) for part in ("history", "label"))
    low, median, high = (np.array(example["quantiles"][q], dtype=float) for q in ("0.1", "0.5", "0.9"))
    before, after = np.arange(-len(history), 0) * hours, np.arange(len(label)) * hours
    axis.fill_between(after, low, high, color=theme.accent, alpha=0.25, lw=0)
    axis.plot(after, median, color=theme.accent, lw=1.5)
    axis.plot(before, history, color=theme.line, lw=0.9)
    axis.plot(after, label, color=theme.text, lw=0.9)
    axis.axvline(0, color=theme.line, lw=0.8)
    return unit


def _limit(axis: Any, examples: Sequence[Mapping[str, Any]]) -> None:
    """Fit the axis to forecasts and to all but the outliers of what was observed."""
    first = examples[0]
    seen = np.concatenate([np.array(first[part], dtype=float) for part in ("history", "label")])
    bands = [np.array(example["quantiles"][q], dtype=float) for example in examples for q in ("0.1", "0.9")]
    reach = np.concatenate([np.nanpercentile(seen, [3, 97]), *bands])
    bottom, top = float(np.nanmin(reach)), float(np.nanmax(reach))
    margin = 0.08 * (top - bottom) or 1.0
    axis.set_ylim(bottom - margin, top + margin)


def _step(freq: str) -> tuple[float, str]:
    """Return the length of a step and its unit."""
    try:
        offset: Any = pd.tseries.frequencies.to_offset(freq)
        return float(pd.Timedelta(offset) / pd.Timedelta(hours=1)), "hours"
    except ValueError:
        return 1.0, "steps"
