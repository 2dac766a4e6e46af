"""A report: sections of prose, tables, charts and heatmaps composed to one self-contained HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

from pertoken.core.credit import Credit

from .html import KEY, heatmap_html, page
from .tables import inline


class Section(Protocol):
    """What a report is made of: a title, one sentence on how to read it, a body."""

    @property
    def title(self) -> str: ...
    @property
    def how(self) -> str: ...
    def names(self) -> list[str]:
        """Names that need a colour, in order."""
        ...

    def html(self, colors: Mapping[str, int]) -> str:
        """The body; `colors` gives each name its place in the palette (-1: the baseline's grey)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prose:
    """Paragraphs in a little Markdown: blank lines, ``- `` lists, ``**bold**``, `` `code` ``, ``[text](https://...)``."""

    title: str
    text: str
    how: str = ""

    def names(self) -> list[str]:
        """No names."""
        return []

    def html(self, colors: Mapping[str, int]) -> str:
        """The section's body."""
        return _markdown(self.text)


@dataclass(frozen=True, kw_only=True)
class Heatmaps:
    """Answers coloured by token.

    Attributes:
        groups: each a list of credits on one answer (shown stacked), or on several.
        titles: a name for each credit of each group (default: methods).
    """

    title: str
    groups: Sequence[Sequence[Credit]]
    titles: Sequence[Sequence[str]] | None = None
    how: str = "Each word piece is coloured by the value a method gives it; point at one to compare it over the rows."

    def names(self) -> list[str]:
        """No names: rows are labelled."""
        return []

    def html(self, colors: Mapping[str, int]) -> str:
        """The section's body."""
        titles = self.titles or [None] * len(self.groups)
        return KEY + "".join(heatmap_html(g, titles=t) for g, t in zip(self.groups, titles, strict=True))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made the numbers: models, hashes, seeds, versions, as JSON in a closed fold."""

    data: Mapping[str, Any]
    title: str = "Provenance"
    how: str = "Everything needed to make these numbers again."

    def names(self) -> list[str]:
        """No names."""
        return []

    def html(self, colors: Mapping[str, int]) -> str:
        """The section's body."""
        text = escape(json.dumps(self.data, indent=2, ensure_ascii=False, default=str))
        return f"<details><summary>Models, data, seeds and versions</summary><pre>{text}</pre></details>"


def build_report(
    out: str | Path,
    *,
    title: str,
    sections: Sequence[Section],
    summary: str = "",
    facts: Sequence[tuple[str, str, str]] = (),
    baseline: str | None = None,
) -> Path:
    """Write a report as one HTML file that needs no other.

    Args:
        out: the file, or a folder to hold ``report.html``.
        title: the heading.
        sections: `Prose`, `Table`, `Lines`, `Frontier`, `Heatmaps`, `Provenance`, or any `Section`, in order.
        summary: one sentence under the heading that says what was found.
        facts: (label, figure, small print) of the few numbers that matter most.
        baseline: the name drawn in grey, against which the others are seen.

    Returns:
        The file, whole or not there (it is written beside and renamed).
    """
    path = Path(out)
    path = path / "report.html" if path.is_dir() or not path.suffix else path
    names = dict.fromkeys(n for s in sections for n in s.names() if n != baseline)
    colors = {name: k for k, name in enumerate(names)} | ({baseline: -1} if baseline is not None else {})
    tiles = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}{f'<small>{escape(c)}</small>' if c else ''}</dd></div>"
        for a, b, c in facts
    )
    toc, bodies = "", ""
    for k, section in enumerate(sections, 1):
        number = f'<span class="pt-n">{k}</span>'
        toc += f'<li><a href="#s{k}">{number}{escape(section.title)}</a></li>'
        how = f'<p class="pt-how"><b>How to read it.</b>{inline(section.how)}</p>' if section.how else ""
        body = f"<h2>{number}{escape(section.title)}</h2>{how}{section.html(colors)}"
        bodies += f'<section class="pt-section" id="s{k}">{body}</section>\n'
    head = f"<header><h1>{escape(title)}</h1>"
    head += f'<p class="pt-summary">{inline(summary)}</p>' if summary else ""
    head += f'<dl class="pt-facts">{tiles}</dl>' if tiles else ""
    head += f'<nav class="pt-toc" aria-label="Contents"><ol>{toc}</ol></nav></header>\n'
    foot = '<footer class="pt-foot">Made by pertoken. This file stands alone: no network, no trackers.</footer>'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page(title, head + bodies + foot), encoding="utf8")
    return part.replace(path)


def _markdown(text: str) -> str:
    out = ""
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if all(line.startswith("- ") for line in lines):
            out += f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in lines)}</ul>"
        else:
            out += f"<p>{inline(' '.join(lines))}</p>"
    return out
