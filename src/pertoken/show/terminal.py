"""Credit in a terminal: tokens on coloured ground, with a legend in numbers for who sees no colour.

Weak values are greyish and strong ones blue (positive) or orange (negative), levels green, all at about one brightness
under black text, so that they read the same on dark and on light terminals. Values below a tenth of the scale have no
ground.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from pertoken.core.credit import Credit

from ._tokens import number, scale_of, sequential, shown

_WEAK = (140, 146, 154)
_POSITIVE, _NEGATIVE, _LEVEL = (52, 146, 244), (240, 112, 32), (20, 168, 140)
_LEAST = 0.1  # a smaller share of the scale stays without ground: a page of grey boxes hides what matters
_STRONGEST = 3


def heatmap(credits: Credit | Sequence[Credit], *, title: str | None = None, console: Console | None = None) -> None:
    """Print the tokens of one or several credits, coloured by their values, each with its legend and sum.

    Args:
        credits: one credit, or several (each on its own scale, one below the other).
        title: a heading.
        console: a rich console (default: a new one on standard output).
    """
    console = console or Console()
    if title:
        console.print(Text(title, style="bold"))
    for credit in [credits] if isinstance(credits, Credit) else credits:
        console.print(_tokens(credit))
        console.print(_legend(credit))
        console.print()


def _tokens(credit: Credit) -> Text:
    top = scale_of([credit])
    out = Text()
    for token, value in zip(shown(credit.trace, credit.over), credit.values, strict=True):
        style = _style(float(value), top, sequential(credit))
        if not style and token.role in ("special", "part", "given"):
            style = "dim italic" if token.role == "given" else "dim"
        out.append(token.text, style=style)
        out.append("\n" * token.lines)
    return out


def _legend(credit: Credit) -> Text:
    top = scale_of([credit])
    level = sequential(credit)
    out = Text("  ")
    if not top:
        out.append("all zero")
    elif level:
        out.append("0 ").append(f" {top:.3g} ", style=_style(top, top, level))
    else:
        out.append(f" −{top:.3g} ", style=_style(-top, top, level)).append(" 0 ")
        out.append(f" +{top:.3g} ", style=_style(top, top, level))
    how = "sum" if credit.extensive else "mean"
    about = [f"{how} {number(credit.reduce(how), credit, 3)}", f"{len(credit.values)} tokens"]
    about += [f"{credit.method} {credit.kind}".strip(), *([] if credit.level == "token" else [f"{credit.level} level"])]
    about += [f"reads {credit.meta['reads']}"] if "reads" in credit.meta else []
    out.append("   " + " · ".join(about))
    tokens = shown(credit.trace, credit.over)
    order = [i for i in np.argsort(-np.abs(credit.values), kind="stable")[:_STRONGEST] if credit.values[i]]
    if order:
        named = ", ".join(
            f"“{tokens[i].text.strip() or tokens[i].raw}” {number(float(credit.values[i]), credit, 3)}" for i in order
        )
        out.append(f"\n   strongest: {named}", style="dim")
    return out


def _style(value: float, top: float, level: bool) -> str:
    share = min(abs(value) / top, 1.0) if top else 0.0
    if share < _LEAST:
        return ""
    full = _LEVEL if level else _POSITIVE if value > 0 else _NEGATIVE
    red, green, blue = (round(w + share * (f - w)) for w, f in zip(_WEAK, full, strict=True))
    return f"#000000 on #{red:02x}{green:02x}{blue:02x}"
