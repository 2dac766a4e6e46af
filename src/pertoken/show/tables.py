"""The tables of a report: figures with their intervals, and a best one marked only where the intervals say so."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple, TypeGuard

from .charts import css_color

_ARROWS = {"high": " ↑", "low": " ↓", None: ""}


class Interval(NamedTuple):
    """A figure with its interval."""

    value: float
    low: float
    high: float


class Column(NamedTuple):
    """A column: key in the rows, heading, which way is better (``high``, ``low`` or None), decimals, small print."""

    key: str
    label: str
    better: str | None = None
    digits: int = 3
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A comparison. The best of a column is marked only if its interval lies apart from that of every other row.

    Attributes:
        columns: what is compared.
        rows: one a system: ``name``, optional ``note``, and under each column's key an `Interval`, a number, a text or
            None. A number without interval, or one that is not finite, leaves its column without a mark.
        note: small print under the table.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    how: str = "A dot is the measured value, the bar around it its 95 % interval, on one scale a column."
    note: str = ""

    def names(self) -> list[str]:
        """The rows' names."""
        return [str(row["name"]) for row in self.rows]

    def html(self, colors: Mapping[str, int]) -> str:
        """The section's body; `colors` gives each name its place in the palette (-1: the baseline's grey)."""
        cells = {c.key: [row.get(c.key) for row in self.rows] for c in self.columns}
        best = {c.key: best_of(cells[c.key], c.better) for c in self.columns}
        head = "".join(f'<th scope="col">{_heading(c)}{_small(c.note)}</th>' for c in self.columns)
        body = ""
        for i, row in enumerate(self.rows):
            name = str(row["name"])
            body += f'<tr style="--c:{css_color(colors[name])}"><th scope="row"><span class="pt-chip"></span>'
            body += f"{escape(name)}{_small(str(row.get('note') or ''))}</th>"
            for c in self.columns:
                mark = ' class="pt-best"' if best[c.key] == i else ""
                cell = _cell(cells[c.key][i], c.digits, cells[c.key])
                body += f'<td{mark} data-label="{_heading(c)}"><span>{cell}</span></td>'
            body += "</tr>"
        legend = ""
        if any(k is not None for k in best.values()):
            legend = "★ better than every other row: its interval overlaps none of theirs. "
        elif len(self.rows) > 1 and any(c.better for c in self.columns):
            legend = "No row is marked as best: no interval lies apart from all the others. "
        foot = f'<p class="pt-note">{legend}{inline(self.note)}</p>' if legend or self.note else ""
        return f'<table class="pt-table"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>{foot}'


def best_of(cells: Sequence[Any], better: str | None) -> int | None:
    """Index of the cell whose interval lies apart from every other's, or None.

    Args:
        cells: `Interval`, number, text or None (no result).
        better: ``high``, ``low``, or None for a column that has no better.
    """
    results = [c for c in cells if isinstance(c, (int, float, Interval))]
    held = [(i, c) for i, c in enumerate(cells) if _drawable(c)]
    if better is None or len(held) < 2 or len(held) < len(results):
        return None
    sign = 1 if better == "high" else -1
    i, top = max(held, key=lambda pair: sign * pair[1].value)
    nearest = top.low if sign > 0 else -top.high
    return i if all(nearest > (c.high if sign > 0 else -c.low) for j, c in held if j != i) else None


def inline(text: str) -> str:
    """One line of prose as HTML, escaped: ``**bold**``, ``*emphasis*``, `` `code` `` and ``[text](https://...)``."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"(?<![\w*])\*([^\s*][^*]*)\*(?![\w*])", r"<em>\1</em>", text)
    return re.sub(r"\[([^\]]+)\]\((https?://[^\s)]+)\)", r'<a href="\2">\1</a>', text)


def _heading(column: Column) -> str:
    return escape(column.label) + _ARROWS[column.better]


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _drawable(cell: Any) -> TypeGuard[Interval]:
    return isinstance(cell, Interval) and all(math.isfinite(v) for v in cell)


def _cell(value: Any, digits: int, column: Sequence[Any]) -> str:
    if not isinstance(value, (int, float, Interval)):
        return escape("–" if value is None else str(value))
    if not isinstance(value, Interval):
        return f'<span class="pt-val">{_figure(value, digits)}</span>'
    text = f'<span class="pt-val">{_figure(value.value, digits)}</span>'
    if math.isnan(value.low) and math.isnan(value.high) and not math.isnan(value.value):
        return text  # one run and one number: it has no interval
    text += f'<span class="pt-ci">{_figure(value.low, digits)} to {_figure(value.high, digits)}</span>'
    if not _drawable(value):
        return text
    held = [c for c in column if _drawable(c)]
    start, width = min(c.low for c in held), (max(c.high for c in held) - min(c.low for c in held)) or 1.0
    low, middle, high, zero = (100 * (v - start) / width for v in (value.low, value.value, value.high, 0.0))
    tick = f'<u style="left:{zero:.1f}%"></u>' if 0 < zero < 100 else ""
    bar = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{middle:.1f}%"></b>'
    return f'{text}<span class="pt-whisk" aria-hidden="true">{tick}{bar}</span>'


def _figure(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "n/a"
    return (str(value) if isinstance(value, int) else f"{value:.{digits}f}").replace("-", "−")
