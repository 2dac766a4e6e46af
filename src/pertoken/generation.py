"""Generation as users meet it: prompts in, continuations with weights, a posterior table and the guide's credit out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import api, catalog
from .core.credit import save_credits
from .core.data import load_examples
from .core.decode import Drawn, Stream
from .core.lm import LM, Prompt, load
from .core.particles import logsumexp
from .core.rewarding import make_rewarder
from .core.rollout import Sampling

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What is generated, and where it goes."""

    prompt: tuple[str, ...] = ()
    """Prompts."""
    data: str | None = None
    """Or rows with a prompt (JSONL, Parquet, Hub id)."""
    limit: int | None = 8
    """Rows at most."""
    model: str = "smollm2"
    """Model folder, Hub id, or smollm2."""
    system: str | None = None
    """System turn put before every text prompt."""
    template: str = "auto"
    """auto, chat or plain (the prompt is continued as it stands)."""
    dtype: str = "float32"
    """Weights: float32, bfloat16, float16."""
    n: int = 1
    """Continuations of each prompt."""
    seed: int = 0
    """Of all draws."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn."""
    save: Path | None = None
    """Write the continuations as JSONL."""
    html: Path | None = None
    """Write a page of heatmaps of the guide's credit."""


def make_decoder(method: str, decoder: Any, lm: LM) -> Any:
    """A decoder of the catalog with what it names filled in: a reward becomes its scorer.

    Raises:
        ValueError: a method of another room.
    """
    row = catalog.about(method)
    if row.room != "generate":
        raise ValueError(
            f"{method} is of the {row.room} room and generates nothing; pertoken methods --room generate lists those"
        )
    decoder = decoder if decoder is not None else catalog.method(method)()
    if not hasattr(decoder, "generate"):
        raise ValueError(f"{method} is used from Python alone: pertoken about {method} tells how")
    if getattr(decoder, "reward", "") and getattr(decoder, "scorer", 0) is None:
        rewarder = make_rewarder(decoder.reward, None, lambda slug: api.make_scorer(slug, lm))
        decoder = dataclasses.replace(decoder, scorer=_Sum(rewarder))
    return decoder


@dataclass(frozen=True)
class _Sum:
    """A weighted sum of scorers as one."""

    rewarder: Any

    def score(self, items: Sequence[Any]) -> list[Any]:
        return list(self.rewarder(items).credits)


def generate(
    method: str, options: GenerateOptions, decoder: Any = None, *, stream: Stream | None = None, say: Say | None = None
) -> tuple[list[Prompt], list[list[Drawn]]]:
    """Continuations of prompts by a method of the catalog.

    Args:
        decoder: the method's options; default: its defaults.
        stream: told of tokens as they come, by methods that draw left to right.

    Returns:
        The prompts, and n draws of each.

    Raises:
        ValueError: no prompt.
    """
    prompts: list[Prompt] = list(options.prompt)
    if options.data:
        examples, report = load_examples(options.data, kind="prompt", limit=options.limit)
        for line in report.lines():
            (say or print)(line)
        prompts += [e.prompt for e in examples]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT, or --data FILE with a column prompt")
    lm = load(options.model, dtype=options.dtype, template=options.template)
    if options.system:
        first = {"role": "system", "content": options.system}
        prompts = [(first, *([{"role": "user", "content": p}] if isinstance(p, str) else p)) for p in prompts]
    decoder = make_decoder(method, decoder, lm)
    return prompts, decoder.generate(
        lm, prompts, n=options.n, sampling=options.sampling, seed=options.seed, stream=stream
    )


def posterior(drawn: Sequence[Drawn]) -> list[tuple[str, float, int]]:
    """(text, share of the weight, draws) of each distinct text, most likely first; nothing if all draws are dead."""
    total = logsumexp_of(drawn)
    found: dict[str, tuple[float, int]] = {}
    for one in drawn:
        if one.logw > -math.inf:
            share, count = found.get(one.trace.text, (0.0, 0))
            found[one.trace.text] = share + math.exp(one.logw - total), count + 1
    return sorted(((text, s, c) for text, (s, c) in found.items()), key=lambda row: -row[1])


def logsumexp_of(drawn: Sequence[Drawn]) -> float:
    """log of the sum of weights."""
    import numpy as np

    return logsumexp(np.array([one.logw for one in drawn]))


def as_row(prompt: Prompt, one: Drawn, method: str) -> Mapping[str, Any]:
    """A draw as a line of JSONL."""
    t = one.trace
    logps = {name: getattr(t, name) for name in ("sampled_logps", "policy_logps")}
    sums = {name: None if v is None else float(v.sum()) for name, v in logps.items()}
    weight = None if one.logw == -math.inf else one.logw
    shown = {"prompt": prompt, "completion": t.text, "method": method, "logw": weight, "ended": t.ended}
    return shown | sums | {"tokens": len(t), "meta": dict(one.meta)}


def write(
    prompts: Sequence[Prompt], drawn: Sequence[Sequence[Drawn]], method: str, options: GenerateOptions
) -> list[Path]:
    """The files that the options ask for; returns their paths."""
    from . import show

    out: list[Path] = []
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        rows = (as_row(p, one, method) for p, some in zip(prompts, drawn, strict=True) for one in some)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        options.save.write_text(text, "utf8")
        out.append(options.save)
    credits = [[one.credit for one in some if one.credit is not None] for some in drawn]
    if options.html:
        if not any(credits):
            raise ValueError(f"{method} guides nothing token by token, so there is no credit to draw; leave --html out")
        figures = [
            show.heatmap_html(c, titles=[f"{method}, sample {k}"]) for some in credits for k, c in enumerate(some)
        ]
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(show.page(f"What {method} did to each token", "\n".join(figures)), "utf8")
        out.append(options.html)
    if options.save and any(credits):
        out.append(save_credits([c for some in credits for c in some], options.save.with_suffix(".credits.jsonl")))
    return out


def tell(prompts: Sequence[Prompt], drawn: Sequence[Sequence[Drawn]], say: Say) -> None:
    """Every draw with its weight, and the posterior table where draws weigh differently or agree."""
    for k, (prompt, some) in enumerate(zip(prompts, drawn, strict=True)):
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        say(f"--- prompt {k}: {asked if len(asked) <= 100 else asked[:99] + '…'}")
        for i, one in enumerate(some):
            weight = "" if all(o.logw == some[0].logw for o in some) else f"  log-weight {one.logw:.3f}"
            note = "dead (weight 0)" if one.logw == -math.inf else one.trace.text
            cut = "" if one.trace.ended or one.logw == -math.inf else " [cut off]"
            say(f"{i}{weight}: {note}{cut}")
        table = posterior(some)
        if not table:
            say("no continuation has any weight: every particle died. Allow more tokens or particles, or check whether")
            say("the constraint can be met from here")
        elif some[0].meta.get("posterior"):
            tell_particles(some[0], say)
        elif len(some) > 1 and (len(table) < len(some) or any(o.logw != some[0].logw for o in some)):
            say("posterior")
            for text, share, count in table:
                say(f"  {share:7.3f}  {count:3d} x  {text}")


def tell_particles(one: Drawn, say: Say) -> None:
    """What stands behind a draw from weighted particles: the share of each text, deaths, and the marginal."""
    meta = one.meta
    say(f"posterior of {meta['particles']} particles, {meta['dead']} of them dead: {meta['target']}")
    for row in meta["posterior"]:
        say(f"  {row['share']:7.3f}  {row['text']}")
    if meta["log_marginal"] is not None:
        say(f"log of the share of such texts among the model's: {meta['log_marginal']:.3f}")
