"""The charts of a report, drawn by matplotlib as SVG that takes its colours (and so light or dark) from the page.

Each chart is drawn twice, for a wide and a narrow screen; the page's style shows the one that fits. Colours are
placeholders that become CSS variables; text stays text.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

_INK, _MUTED, _GRID, _BASE = "#f0f001", "#f0f101", "#f0f201", "#f0f301"
_NAMED = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--rule)", _BASE: "var(--base)"}
_DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.8)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5))]
_MARKS = ["o", "s", "^", "D", "v", "P", "X"]
_MARK_SHAPES = {  # the same marks in a 12 x 12 box, for the key above the chart
    "o": '<circle cx="15" cy="6" r="4.2"/>',
    "s": '<rect x="11.2" y="2.2" width="7.6" height="7.6"/>',
    "^": '<path d="M15 1.4 19.6 10H10.4Z"/>',
    "D": '<path d="M15 1 20 6 15 11 10 6Z"/>',
    "v": '<path d="M15 10.6 10.4 2h9.2Z"/>',
    "P": '<path d="M13.4 1.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2V7.6h-2.9V4.4h2.9Z"/>',
    "X": '<path d="M11.5 1.5 15 4.6l3.5-3.1 1.4 1.4L16.6 6l3.3 3.1-1.4 1.4L15 7.4l-3.5 3.1-1.4-1.4L13.4 6l-3.3-3.1Z"/>',
}
_PADS = {"figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1}  # inches
MISSING = "Charts need matplotlib: pip install 'pertoken[plots]'"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: y over x, with an optional band from low to high (all of one length)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @classmethod
    def of_runs(cls, name: str, x: Sequence[float], runs: Any) -> Series:
        """The mean of several runs, shape (runs, len(x)), with a band from the lowest to the highest of them."""
        runs = np.asarray(runs, np.float64)
        low, high = (runs.min(0), runs.max(0)) if len(runs) > 1 else (None, None)
        return cls(name=name, x=x, y=runs.mean(0), low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One system in two dimensions, with optional intervals (low, high) in each. Points of one name are joined."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A section of one or several panels of curves over a common x.

    Attributes:
        panels: ``{title of the panel: its series}``.
    """

    title: str
    panels: Mapping[str, Sequence[Series]]
    x_label: str = "optimiser steps"
    how: str = (
        "One colour a method, with a band from the lowest to the highest seed; where bands overlap, "
        "this run cannot tell the methods apart."
    )

    def names(self) -> list[str]:
        """Names that need a colour, in order."""
        return [s.name for panel in self.panels.values() for s in panel]

    def html(self, colors: Mapping[str, int]) -> str:
        """The section's body; `colors` gives each name its place in the palette (-1: the baseline's grey)."""

        def draw(figure: Any, narrow: bool) -> None:
            count = len(self.panels)
            columns = 1 if narrow else {1: 1, 2: 2, 4: 2}.get(count, 3)
            lines = -(-count // columns)
            figure.set_size_inches(figure.get_figwidth(), lines * (205 if narrow else 300 if count == 1 else 250) / 72)
            for k, (title, series) in enumerate(self.panels.items(), 1):
                axes = figure.add_subplot(lines, columns, k)
                _frame(axes, self.x_label if k > count - columns else "", "", title)
                for s in series:
                    color, place = _color(colors[s.name]), colors[s.name]
                    if s.low is not None and s.high is not None:
                        axes.fill_between(s.x, s.low, s.high, color=color, alpha=0.16, linewidth=0)
                    axes.plot(s.x, s.y, color=color, linestyle=_DASHES[place % len(_DASHES)], linewidth=2)

        return _key(self.names(), colors, marks=False) + _chart(draw, f"{self.title}: {', '.join(self.panels)}")


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """A section that plots what was gained against what it cost: reward over KL, say."""

    title: str
    points: Sequence[Point]
    x_label: str = "KL to the reference (nats a token)"
    y_label: str = "mean reward"
    better: str = "↖ better"
    how: str = "Up is more reward, left is closer to the untouched model; bars are 95 % intervals."

    def names(self) -> list[str]:
        """Names that need a colour, in order."""
        return [p.name for p in self.points]

    def html(self, colors: Mapping[str, int]) -> str:
        """The section's body; `colors` gives each name its place in the palette (-1: the baseline's grey)."""

        def draw(figure: Any, narrow: bool) -> None:
            figure.set_size_inches(figure.get_figwidth(), (290 if narrow else 360) / 72)
            axes = figure.add_subplot()
            _frame(axes, self.x_label, self.y_label, "")
            axes.grid(axis="x", color=_GRID, linewidth=1)
            for name in dict.fromkeys(self.names()):
                mine = [p for p in self.points if p.name == name]
                color, mark = _color(colors[name]), _MARKS[colors[name] % len(_MARKS)]
                for p in mine:
                    for axis, bounds in (("x", p.x_interval), ("y", p.y_interval)):
                        if bounds is not None:
                            line = (bounds, (p.y, p.y)) if axis == "x" else ((p.x, p.x), bounds)
                            axes.plot(*line, color=color, alpha=0.5, linewidth=2.5, solid_capstyle="round")
                axes.plot(
                    [p.x for p in mine], [p.y for p in mine], color=color, linewidth=1.2, marker=mark, markersize=9
                )
            axes.margins(0.12, 0.16)
            axes.annotate(self.better, (0, 1), (8, -14), "axes fraction", "offset points", color=_MUTED)

        return _key(self.names(), colors, marks=True) + _chart(draw, f"{self.y_label} against {self.x_label}")


def _color(place: int) -> str:
    return _BASE if place < 0 else f"#f0{place % 8:02x}01"


def css_color(place: int) -> str:
    """The CSS variable of a place in the palette; -1 is the baseline's grey."""
    return "var(--base)" if place < 0 else f"var(--c{place % 8})"


def _key(names: Sequence[str], colors: Mapping[str, int], *, marks: bool) -> str:
    items = []
    for name in dict.fromkeys(names):
        place, color = colors[name], css_color(colors[name])
        if marks:
            box, shape = "9 0 12 12", f'<g style="fill:{color}">{_MARK_SHAPES[_MARKS[place % len(_MARKS)]]}</g>'
        else:
            dash = _DASHES[place % len(_DASHES)]
            pattern = "" if dash == "-" else f' stroke-dasharray="{" ".join(str(2 * d) for d in dash[1])}"'
            box, shape = "0 0 30 12", f'<path d="M0 6H30" stroke-width="2.4" style="stroke:{color}"{pattern}/>'
        kind = ' class="mark"' if marks else ""
        items.append(f'<li><svg{kind} viewBox="{box}" aria-hidden="true">{shape}</svg>{escape(name)}</li>')
    return f'<ul class="pt-series">{"".join(items)}</ul>'


def _frame(axes: Any, x_label: str, y_label: str, title: str) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(length=0, colors=_MUTED, labelcolor=_MUTED, pad=5)
    axes.locator_params(nbins=5)
    axes.set_xlabel(x_label, color=_MUTED)
    axes.set_ylabel(y_label, color=_MUTED)
    axes.set_title(title, color=_INK, loc="left", fontsize=13, fontweight="bold", pad=10)


def _chart(draw: Any, label: str) -> str:
    """`draw(figure, narrow)` at both widths, in the page's terms (1 unit of the SVG = 1 CSS pixel)."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return f'<p class="pt-note">{escape(MISSING)}</p>'
    out = []
    for name, width in (("pt-wide", 960), ("pt-narrow", 350)):
        settings: dict[Any, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": label + name,
            "font.size": 12,
            "axes.unicode_minus": True,
            **_PADS,
        }
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(width / 72, 4), layout="constrained", facecolor="none")
            draw(figure, name == "pt-narrow")
            for axes in figure.axes:
                axes.patch.set_alpha(0)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        out.append(f'<div class="{name}">{_clean(buffer.getvalue(), label, name)}</div>')
    return f'<div class="pt-chart">{"".join(out)}</div>'


def _clean(svg: str, label: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    salt = (
        "x" + hashlib.sha256((label + name).encode()).hexdigest()[:6]
    )  # ids are unique in the page, not in the chart alone
    svg = re.sub(r'(id="|#)([mpC][0-9a-f_]{6,})', rf"\g<1>{salt}\2", svg)
    for placeholder, variable in _NAMED.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"#f0(0\d)01", lambda m: f"var(--c{int(m[1])})", svg)
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox='
    return re.sub(r"<svg [^>]*?viewBox=", head, svg, count=1)
