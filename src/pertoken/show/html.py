"""Credit as HTML: token heatmaps, and the single self-contained page that holds them.

Blue is positive, orange negative, no colour zero; levels (weight, entropy, probability) are shades of green from zero
up. Credits of the same tokens are stacked for comparison, on one scale for each kind or each on its own (a switch).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from pertoken.core.credit import Credit

from ._tokens import number, scale_of, sequential, shown

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
KEY = (
    '<p class="pt-key"><span><i style="background:color-mix(in srgb,var(--pos) 70%,transparent)"></i>positive</span>'
    '<span><i style="background:color-mix(in srgb,var(--neg) 70%,transparent)"></i>negative</span>'
    "<span><i></i>zero</span><span>stronger colour = larger value</span></p>"
)


def heatmap_html(credits: Credit | Sequence[Credit], *, titles: Sequence[str] | None = None) -> str:
    """Heatmaps as an HTML fragment, to be put in a `page` (which brings the style and the tooltips).

    Args:
        credits: one or several. Neighbours on the same tokens become rows of one figure; rows of one kind share their
            colour scale unless the reader switches to a scale for each. Over a completion, the figure is headed by
            ``trace.meta["prompt"]`` if that is there, else by the prompt's text.
        titles: a name for each credit (default: its method, else its kind).

    Returns:
        One ``<figure>`` for each run of credits on the same tokens. All text in it is escaped.

    Raises:
        ValueError: another number of titles than of credits.
    """
    credits = [credits] if isinstance(credits, Credit) else list(credits)
    if titles is not None and len(titles) != len(credits):
        raise ValueError(f"{len(titles)} titles for {len(credits)} credits; give one each")
    names = list(titles) if titles is not None else [c.method or c.kind for c in credits]
    rows = list(zip(credits, names, strict=True))
    return "".join(
        _figure(list(group)) for _, group in groupby(rows, lambda r: (r[0].trace.tokenizer, r[0].over, _ids(r[0])))
    )


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`, in one file: style and script inside, nothing fetched from anywhere.

    Args:
        title: plain text of the window's title.
        body: HTML, trusted as it is (fragments of this module escape what they show).
    """
    here = files("pertoken.show")
    style, script = ((here / name).read_text(encoding="utf8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        '<main class="pt">\n<div class="pt-bar"><span class="pt-mark" aria-label="pertoken"><i>per</i><i>tok</i>'
        '<i>en</i></span><button class="pt-theme" type="button">light / dark</button></div>\n'
        f"{body}\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _ids(credit: Credit) -> tuple:
    """What makes two credits comparable token by token (over=completion: also the same question)."""
    return credit.trace.prompt_ids, credit.trace.completion_ids


def _figure(rows: list[tuple[Credit, str]]) -> str:
    kinds = [(c.kind, sequential(c)) for c, _ in rows]
    shared = {k: scale_of([c for (c, _), kind in zip(rows, kinds, strict=True) if kind == k]) for k in kinds}
    first = rows[0][0]
    asked = "" if first.over != "completion" else str(first.trace.meta.get("prompt") or first.trace.prompt_text).strip()
    switch = ""
    if any(shared[k] != scale_of([c]) for (c, _), k in zip(rows, kinds, strict=True)):
        switch = '<label class="pt-own"><input type="checkbox">own colour scale for each row</label>'
    caption = f'<div>Prompt <q dir="auto" title="{escape(asked)}">{escape(asked)}</q></div>' if asked else ""
    head = f'<figcaption class="pt-cap">{caption}{switch}</figcaption>' if caption or switch else ""
    body = "".join(_row(c, name, shared[k]) for (c, name), k in zip(rows, kinds, strict=True))
    return f'<figure class="pt-heat">{head}{body}</figure>\n'


def _row(credit: Credit, name: str, shared: float) -> str:
    own = scale_of([credit])
    how = "sum" if credit.extensive else "mean"
    level = "" if credit.level == "token" else f", {credit.level} level"
    about = f"{credit.kind}{level} · {how} {number(credit.reduce(how), credit, digits=3)}"
    about += f" · reads {credit.meta['reads']}" if "reads" in credit.meta else ""
    legend = _legend(credit, shared, "ls" if own != shared else "")
    legend += _legend(credit, own, "lo") if own != shared else ""
    who = f'<div class="pt-who">{escape(name)}<small>{escape(about)}</small>{legend}</div>'
    said = escape(f"{name}: {about}")
    tokens = f'<div class="pt-toks" dir="auto" role="list" aria-label="{said}">{_spans(credit, shared, own)}</div>'
    return f'<div class="pt-row" data-who="{escape(name)}">{who}{tokens}</div>'


def _legend(credit: Credit, scale: float, mode: str) -> str:
    low, high, hue = ("0", f"{scale:.3g}", "l") if sequential(credit) else (f"−{scale:.3g}", f"+{scale:.3g}", "")
    if not scale:
        return f'<span class="pt-legend {mode}">all zero</span>'
    return f'<span class="pt-legend {mode}">{low}<i class="{hue}"></i>{high}</span>'


def _spans(credit: Credit, shared: float, own: float) -> str:
    level, ids = sequential(credit), credit.trace.ids(credit.over)
    out = []
    for i, (token, value) in enumerate(zip(shown(credit.trace, credit.over), credit.values, strict=True)):
        classes = ["t", {"special": "d", "part": "d", "given": "g"}.get(token.role, "")]
        style = ""
        if value:
            classes.append("l" if level else "p" if value > 0 else "n")
            apart = f";--o:{_share(value, own)}" if own != shared else ""
            style = f' style="--s:{_share(value, shared)}{apart}"'
        text = escape(token.text)
        if token.lines:  # the symbol says that there is a break, the real one makes it
            text = text.replace("⏎", '<span class="nl">⏎</span>\n')
        said = number(value, credit)
        label = escape(f"{token.raw}, id {ids[i]}: {said}" + (" (not emitted)" if token.role == "given" else ""))
        named = " ".join(filter(None, classes))
        out.append(
            f'<span class="{named}"{style} role="listitem" tabindex="{-1 if i else 0}" data-t="{escape(token.raw)}"'
            f' data-i="{ids[i]}" data-v="{said}" title="{label}" aria-label="{label}">{text}</span>'
        )
    return "".join(out)


def _share(value: float, scale: float) -> str:
    return f"{min(abs(value) / scale, 1.0):.3f}" if scale else "0"
