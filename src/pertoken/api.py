"""What the command line does, as functions: `align` trains by a method, `score_rows` puts credit on rows.

This is the one place where core and the catalog meet; rooms never see it.
"""

from __future__ import annotations

import dataclasses
import functools
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
from .core.rewarding import with_row
from .core.rollout import sample
from .core.run import Run
from .core.trace import Trace

Say = Callable[[str], None]
_KINDS = {"pairs": "pair", "unpaired": "unpaired", "sft": "sft", "prompts": "prompt"}
_WHOLE = (  # of YAML: lists and mappings (and those within), and quoted text; an apostrophe in a word quotes nothing
    r"\[(?:[^][]|\[[^]]*])*]",
    r"{(?:[^{}]|{[^}]*})*}",
    r"""(?<=[=[{,:\s])"(?:[^"\\]|\\.)*\"""",
    r"(?<=[=[{,:\s])'(?:[^']|'')*'",
)


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
    transform: str | None = None
    """Method that rewrites the pairs before training: reward-augmented, or with options SLUG:NAME=VALUE,NAME=VALUE."""
    dtype: str = "float32"
    """Weights: float32, bfloat16, float16."""
    lora: int | None = None
    """Rank of a LoRA adapter (default: all weights are trained)."""
    pack_tokens: int = 4096
    """Most positions of one forward."""
    generator: str = "pertoken"
    """What draws rollouts, for methods that learn from rewards: pertoken or vllm (its engine, in this process)."""
    resume: bool = False
    """Continue the run in out."""
    loop: LoopConfig = field(default_factory=LoopConfig)


def training_data(
    objective_data: str, options: TrainOptions, lm: LM, say: Say
) -> tuple[list[Group], list[Group], DataReport]:
    """Load, split by prompt and encode; every refused row is told.

    Raises:
        ValueError: no data named; not one usable row; a transform that there is not, or that takes other data.
    """
    if not options.data:
        raise ValueError("no data: give --data FILE.jsonl (prompt, chosen, rejected), a folder or a Hub id")
    kind = _KINDS[objective_data]
    transform = make_transform(options.transform, lm) if options.transform else None
    if transform and kind != "pair":
        raise ValueError(f"--transform {options.transform} rewrites pairs, and this method takes {objective_data} data")
    read, report = load_examples(options.data, kind=kind, limit=options.limit, seed=options.loop.seed)
    if options.eval_data:
        held, held_report = load_examples(options.eval_data, kind=kind, limit=options.limit)
        train, report = read, report.merge(held_report)
    else:
        train, held = split_by_prompt(read, test=options.test_share, seed=options.loop.seed)
    system = options.system
    if system and lm.template == "chat":  # part of the prompts' messages, where a transform finds it
        train, held, system = with_system(train, system), with_system(held, system), None
    if transform:
        (train, one), (held, two) = transform(train, required=True), transform(held, required=False)
        report = report.then(one.merge(two))
    groups, one = encode(train, lm, max_length=options.max_length, system=system)
    held_out, two = encode(held, lm, max_length=options.max_length, system=system)
    report = report.then(one.merge(two))
    for line in report.lines():
        say(line)
    return groups, held_out, report


def with_system(examples: Sequence[Example], system: str) -> list[Example]:
    """Examples with a system turn as the first of their prompt's messages."""
    first = {"role": "system", "content": system}

    def turns(prompt: Any) -> tuple[dict[str, Any], ...]:
        return (first, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt))

    return [dataclasses.replace(e, prompt=turns(e.prompt)) for e in examples]


def make_method(text: str, what: str = "method") -> tuple[str, Any]:
    """A method of the catalog and its options, from a line of text.

    Args:
        text: ``SLUG``, or ``SLUG:NAME=VALUE,...`` with its options (``goal.place=user``); values are read as YAML.
        what: where it stands, for errors.

    Returns:
        The slug, and the options.

    Raises:
        ValueError: no such method or option.
    """
    import re

    from .run_file import merged, value_of

    slug, _, words = text.partition(":")
    kind, changes = catalog.method(slug), dict[str, Any]()
    for word in re.findall(f"(?:{'|'.join(_WHOLE)}|[^,])+", words):  # commas in values are theirs
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{what} {text}: write SLUG:NAME=VALUE,NAME=VALUE")
        *groups, option = name.strip().split(".")
        place = changes
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ValueError(f"{what} {text}: {group} is given a value and options of its own; give one of them")
        if option in place:
            raise ValueError(f"{what} {text}: {name.strip()} is given twice; give it once")
        place[option] = value_of(value, f"{what} {text}")
    return slug, merged(kind(), changes, f"{what} {slug}")


def make_transform(text: str, lm: LM) -> Callable[..., tuple[list[Example], DataReport]]:
    """The transform of a method of the catalog, ready for a model.

    Args:
        text: as `make_method`.

    Raises:
        ValueError: no such method or option; a method that transforms no data.
    """
    slug = text.partition(":")[0]
    if not hasattr(catalog.method(slug), "transform"):
        raise ValueError(f"{slug} transforms no data; --transform reward-augmented does")
    _, options = make_method(text, "--transform")
    named = getattr(getattr(options, "scoring", None), "score_with", "")
    return functools.partial(options.transform, lm=lm, scorer=make_scorer(named, lm) if named else None)


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
    generate = make_generator(options.generator, options.model)
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
        generate=generate,
        max_length=options.max_length,
    )
    run.notes += list(report.lines())
    return run.go(resume=options.resume)


def make_generator(name: str, model: str) -> Any:
    """What draws rollouts.

    Raises:
        ValueError: an unknown name. ImportError: vLLM is not installed.
    """
    if name == "pertoken":
        return sample
    if name != "vllm":
        raise ValueError(f"generator={name!r} is not one of pertoken, vllm")
    from .adapters.vllm import VLLMGenerator

    return VLLMGenerator(model)


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
    traces = [with_row(g, t) for g in groups for t in g.traces]
    return [s.score(traces) for s in scorers], traces, report


__all__ = ["TrainOptions", "align", "as_kind", "make_scorer", "score_rows", "training_data"]
