"""What the command line does, as functions: `align` trains by a method, `score_rows` puts credit on rows.

This is the one place where core and the catalog meet; rooms never see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import catalog
from .core.cache import ArrayCache
from .core.credit import Credit
from .core.data import DataReport, Example, Group, as_kind, encode, load_examples, split_by_prompt
from .core.lm import LM, load
from .core.loop import LoopConfig
from .core.run import Run
from .core.trace import Trace

Say = Callable[[str], None]
_KINDS = {"pairs": "pair", "unpaired": "unpaired", "sft": "sft"}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What every training run takes beside the method's own options."""

    data: str = ""
    """JSONL(.gz), Parquet, a folder, a Hub id, or a mixture a:0.7,b:0.3."""
    out: str = "runs/train"
    """Output folder; a new one, unless --resume."""
    model: str = "smollm2"
    """Starting model: smollm2 (embedded), a folder, or a Hub id."""
    reference: str | None = None
    """Reference model (default: the starting model)."""
    eval_data: str | None = None
    """Held-out data (default: a share of the data's prompts)."""
    test_share: float = 0.1
    """Share of the prompts that is held out without eval_data."""
    limit: int | None = None
    """Read at most this many rows."""
    max_length: int | None = None
    """Most tokens of prompt and response; prompts are cut from the left, responses never."""
    system: str | None = None
    """System turn put before every text prompt."""
    template: str = "auto"
    """auto, chat or plain."""
    dtype: str = "float32"
    """Weights: float32, bfloat16, float16."""
    lora: int | None = None
    """Rank of a LoRA adapter (default: all weights are trained)."""
    pack_tokens: int = 4096
    """Most positions of one forward."""
    resume: bool = False
    """Continue the run in out."""
    loop: LoopConfig = field(default_factory=LoopConfig)


def training_data(
    objective_data: str, options: TrainOptions, lm: LM, say: Say
) -> tuple[list[Group], list[Group], DataReport]:
    """Load, split by prompt and encode; every refused row is told.

    Raises:
        ValueError: no data named; not one usable row.
    """
    if not options.data:
        raise ValueError("no data: give --data FILE.jsonl (prompt, chosen, rejected), a folder or a Hub id")
    kind = _KINDS[objective_data]
    read, report = load_examples(options.data, kind=kind, limit=options.limit, seed=options.loop.seed)
    if options.eval_data:
        held, held_report = load_examples(options.eval_data, kind=kind, limit=options.limit)
        train, report = read, report.merge(held_report)
    else:
        train, held = split_by_prompt(read, test=options.test_share, seed=options.loop.seed)
    groups, one = encode(train, lm, max_length=options.max_length, system=options.system)
    held_out, two = encode(held, lm, max_length=options.max_length, system=options.system)
    report = report.then(one.merge(two))
    for line in report.lines():
        say(line)
    return groups, held_out, report


def align(
    method: str,
    options: TrainOptions,
    objective: Any = None,
    *,
    say: Say | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a model by a method of the catalog.

    Args:
        method: catalog slug.
        options: data, model, output folder, loop.
        objective: the method's options; default: its defaults.

    Returns:
        What ``<out>/results.json`` holds; the model is in ``<out>/model``.
    """
    say = say or (lambda line: None)
    row = catalog.about(method)
    if row.room != "train":
        raise ValueError(
            f"{method} is of the {row.room} room and trains nothing; pertoken methods --room train lists those"
        )
    objective = objective if objective is not None else catalog.method(method)()
    lm = load(options.model, dtype=options.dtype, lora=options.lora, template=options.template)
    groups, held_out, report = training_data(objective.data, options, lm, say)
    given = {"reference": load(options.reference, dtype=options.dtype)} if options.reference else {}
    run = Run(
        slug=method,
        objective=objective,
        policy=lm,
        groups=groups,
        held_out=held_out,
        config=options.loop,
        out=Path(options.out),
        resolve=catalog.method,
        version_of=lambda slug: catalog.about(slug).version,
        pack_tokens=options.pack_tokens,
        given=given,
        cache=ArrayCache(),
        say=say,
        progress=progress,
    )
    run.notes += list(report.lines())
    return run.go(resume=options.resume)


def make_scorer(method: str, lm: LM | None = None, reference: LM | None = None, **options: Any) -> Any:
    """A scorer of the catalog, its model fields filled in.

    Raises:
        ValueError: it needs a model that was not given.
    """
    row = catalog.about(method)
    if row.room != "score":
        raise ValueError(
            f"{method} is of the {row.room} room and scores nothing; pertoken methods --room score lists those"
        )
    kind = catalog.method(method)
    names = {f.name for f in dataclasses.fields(kind)}
    for name, model in (("lm", lm), ("policy", lm), ("reference", reference)):
        if name in names and options.get(name) is None and model is not None:
            options[name] = model
    return kind(**options)


def score_rows(
    scorers: Sequence[Any], examples: Sequence[Example], lm: LM, *, system: str | None = None
) -> tuple[list[list[Credit]], list[Trace], DataReport]:
    """Credit of each scorer on every response of some rows: (credits by scorer, traces, report)."""
    groups, report = encode(list(examples), lm, system=system)
    traces = [dataclasses.replace(t, meta={**t.meta, "prompt": g.example.prompt}) for g in groups for t in g.traces]
    return [s.score(traces) for s in scorers], traces, report


__all__ = ["TrainOptions", "align", "as_kind", "make_scorer", "score_rows", "training_data"]
