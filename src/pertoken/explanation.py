"""Explanations and tokenizations as users meet them: a text or rows of data in, credit or pieces out, as heatmaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import api, catalog
from .core.bytes import byte_view
from .core.credit import Credit, save_credits
from .core.data import Example, load_examples
from .core.lm import LM, load
from .core.rollout import Sampling, sample
from .core.trace import Trace

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What is explained, and where it goes."""

    prompt: str = ""
    """One prompt..."""
    response: str | None = None
    """...and one response; without it, the model answers (see samples)."""
    text: tuple[str, ...] = ()
    """Or texts by themselves, after the model's first token alone (as pawn's head is trained)."""
    data: str | None = None
    """Or rows of data (JSONL, Parquet, Hub id): every response of every row."""
    limit: int | None = 8
    """Rows at most."""
    samples: int = 1
    """Answers that are drawn where no response is given (SAR looks at several: 5)."""
    model: str = "smollm2"
    """Model folder, Hub id, or smollm2."""
    system: str | None = None
    """System turn put before every text prompt."""
    template: str = "auto"
    """auto, chat or plain."""
    answer_seed: int = 0
    """Of the answers that are drawn."""
    sampling: Sampling = field(default_factory=Sampling)
    """How they are drawn."""
    save: Path | None = None
    """Write the credits as JSONL."""
    html: Path | None = None
    """Write a page of heatmaps."""


def traces_of(options: ExplainOptions, lm: LM, say: Say) -> list[Trace]:
    """What is to be explained.

    Raises:
        ValueError: neither prompt, text nor data; a text without a token.
    """
    if options.text:
        empty = [i for i, text in enumerate(options.text) if not text]
        if empty:
            raise ValueError(f"text {empty[0]} is empty; leave it out")
        first = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.tokenizer.eos_token_id
        cut = [lm.encode_completion(text, ended=False) for text in options.text]
        return [lm.trace_of_ids((first,), ids, pieces) for ids, pieces in cut]
    if options.data:
        examples, report = load_examples(options.data, limit=options.limit)
        for line in report.lines():
            say(line)
        return api.score_rows([], examples, lm, system=options.system)[1]
    if not options.prompt and options.response is None:
        raise ValueError("nothing to explain: give --prompt (and --response), --text, or --data FILE")
    if options.response is not None:
        row = Example(prompt=options.prompt, responses=(options.response,), kind="sft")
        return api.score_rows([], [row], lm, system=options.system)[1]
    drawn = sample(
        lm, [options.prompt], options.samples, options.sampling, seed=options.answer_seed, system=options.system
    )
    return drawn[0]


def explain(
    methods: Sequence[str], options: ExplainOptions, explainers: Sequence[Any] = (), *, say: Say | None = None
) -> list[tuple[str, list[list[Credit]]]]:
    """Credits of several methods on the same traces: (method, credits of each trace).

    Args:
        methods: slugs, with options if they have some: ``reagent:max_steps=60,probes=4``.
        explainers: the methods' options in their place, in order.

    Raises:
        ValueError: a method of another room, or one that is used from Python alone.
    """
    say = say or (lambda line: None)
    names = [text.partition(":")[0] for text in methods]
    for method in names:
        row = catalog.about(method)
        if row.room != "explain" or not hasattr(catalog.method(method), "explain"):
            raise ValueError(
                f"{method} is of the {row.room} room and explains nothing here; pertoken methods --room explain lists "
                "what does"
            )
    made = list(explainers) or [api.make_method(text)[1] for text in methods]
    lm = load(options.model, template=options.template)
    traces = traces_of(options, lm, say)
    return [(m, e.explain(lm, traces)) for m, e in zip(names, made, strict=True)]


def figures(found: Sequence[tuple[str, list[list[Credit]]]]) -> list[tuple[list[Credit], list[str]]]:
    """Heatmaps that belong together: of each trace, the credits of all methods over the same tokens, with titles."""
    out = []
    for i in range(max((len(rows) for _, rows in found), default=0)):
        by_span: dict[str, tuple[list[Credit], list[str]]] = {}
        for method, rows in found:
            for credit in rows[i]:
                credits, titles = by_span.setdefault(credit.over, ([], []))
                credits.append(credit)
                target = credit.meta.get("target")
                piece = b"" if target is None else credit.trace.pieces("all")[target]
                titles.append(method if target is None else f"{method} of {piece.decode('utf8', 'replace')!r}")
        out += list(by_span.values())
    return out


def write(found: Sequence[tuple[str, list[list[Credit]]]], options: ExplainOptions) -> list[Path]:
    """The files that the options ask for; returns their paths."""
    from . import show

    out: list[Path] = []
    if options.save:
        out.append(save_credits([c for _, rows in found for some in rows for c in some], options.save))
    if options.html:
        body = "\n".join(show.heatmap_html(credits, titles=titles) for credits, titles in figures(found))
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(show.page(", ".join(m for m, _ in found), body), "utf8")
        out.append(options.html)
    return out


def tell(found: Sequence[tuple[str, list[list[Credit]]]], say: Say) -> None:
    """The figures of each credit that are numbers or named numbers, one line a trace."""
    for method, rows in found:
        for i, some in enumerate(rows):
            for credit in some:
                told = {k: v for k, v in credit.meta.items() if isinstance(v, int | float | str | bool)}
                told |= {k: v for k, v in credit.meta.items() if isinstance(v, dict)}
                words = "  ".join(f"{k} {_short(v)}" for k, v in told.items())
                say(f"{method}, {i}: {words or f'sum {credit.reduce():.4f}'}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """What is cut into pieces."""

    text: tuple[str, ...] = ()
    """Texts."""
    file: Path | None = None
    """Or a file, one text a line."""
    model: str = "smollm2"
    """Whose tokenizer."""


def tokenize(method: str, options: TokenizeOptions, tokenizer_method: Any = None) -> list[dict[str, list[str]]]:
    """Of each text, its ordinary pieces and those of the method.

    Raises:
        ValueError: no text; a method of another room; a file that is not UTF-8.
    """
    row = catalog.about(method)
    if row.room != "tokenize" or not hasattr(catalog.method(method), "pieces"):
        raise ValueError(
            f"{method} is of the {row.room} room and cuts nothing here; pertoken methods --room tokenize lists what "
            "does"
        )
    texts = list(options.text)
    if options.file:
        try:
            texts += options.file.read_text("utf8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{options.file} is not UTF-8 at byte {error.start}; convert it (iconv -t UTF-8)"
            ) from error
    if not texts:
        raise ValueError("nothing to cut: give --text TEXT, or --file FILE")
    lm = load(options.model)
    view = byte_view(lm.tokenizer)
    made = tokenizer_method if tokenizer_method is not None else catalog.method(method)()
    shown = lambda pieces: [p.decode("utf8", "backslashreplace") for p in pieces]
    found = made.pieces(texts, lm.tokenizer)
    return [
        {"ordinary": shown(view.pieces_of_text(text)[1]), method: shown(pieces)}
        for text, pieces in zip(texts, found, strict=True)
    ]
