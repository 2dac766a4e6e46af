"""``pertoken demo``: the main job on real inputs, in one command and at most ten minutes on two cores.

Sample pairs from SmolLM2, put credit on them before any training, train DPO and T-REG side by side on the same pairs,
evaluate both and the untouched model on held-out prompts; beside it the same comparison over three seeds in the grammar
world, where intervals separate. Everything lands in one folder, with one report.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import api, catalog
from .comparison import Evaluation, comparison_sections, credit_section, outcome_json, summary_rows
from .core.compare import Arm, Outcome, compare
from .core.credit import Credit, save_credits
from .core.data import Group
from .core.lm import LM, load
from .core.loop import LoopConfig
from .core.record import provenance, read_json, write_json
from .core.rollout import Sampling, sample
from .core.stages import Stages
from .core.trace import Trace
from .show.report import Heatmaps, Prose, Provenance, build_report
from .worlds import sentiment
from .worlds.experiment import best_and_worst, class_conditional, grammar_pairs
from .worlds.quality import credit_quality

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the demo."""

    out: str = "runs/demo"
    """Output folder; the same command goes on where it was stopped."""
    model: str = "smollm2"
    """Model to align: smollm2 (embedded), a folder or a Hub id."""
    pairs: int = 64
    """Training prompts, each of which gives a preference pair if its samples differ enough."""
    held_out: int = 20
    """Held-out prompts whose pairs measure accuracy and credit (fresh samples use all held-out prompts)."""
    samples: int = 4
    """Completions a prompt, of which the best and the worst make the pair."""
    tokens: int = 24
    """Longest completion."""
    margin: float = 0.3
    """Least difference of VADER's score in a pair."""
    alpha: float = 0.5
    """T-REG's weight of the regulariser."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds in the grammar world."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=3e-5, batch_size=8, save_every=4, seed=1))
    """How both methods are trained."""


def demo(options: DemoOptions, *, say: Say) -> Path:
    """Run it all; the report's path. Finished parts are read, not made again."""
    out, clock = Path(options.out), time.perf_counter()
    done = out / "results.json"
    if done.exists():
        was = read_json(done)["options"]
        if was != json.loads(json.dumps(dataclasses.asdict(options))):
            raise ValueError(f"{out} holds a demo with other options; choose another folder with --out")
        say(f"{out} is finished; its report is below (choose another folder with --out to run it again)")
        return out / "report.html"
    out.mkdir(parents=True, exist_ok=True)
    spent = out / "seconds.json"  # an interrupted demo goes on, and says what all of it took
    before = float(read_json(spent)) if spent.exists() else 0.0
    try:
        real, grammar = _smollm2(options, out, say), _grammar(options, out, say)
    finally:
        seconds = before + time.perf_counter() - clock
        write_json(spent, seconds)
    record = {
        "options": dataclasses.asdict(options),
        "sentiment": real["record"],
        "grammar": grammar["record"],
        "seconds": seconds,
        "provenance": real["provenance"],
    }
    report = _report(options, out, real, grammar, seconds)
    write_json(done, record)
    say(f"{seconds:.0f} s in all")
    return report


def _arms(alpha: float, t_reg: dict[str, Any]) -> list[Arm]:
    method = catalog.method("t-reg")
    return [
        Arm(name="DPO", slug="dpo", objective=catalog.method("dpo")()),
        Arm(name="T-REG", slug="t-reg", objective=method(alpha=alpha, **t_reg)),
    ]


def _smollm2(options: DemoOptions, out: Path, say: Say) -> dict[str, Any]:
    """The sentiment world with the real model."""
    from .score.vader import compound, lexicon_labels

    lm = load(options.model)
    train, held_out, skipped = sentiment_pairs(options, lm, out, compound, say)
    say(f"{len(train)} training pairs, {len(held_out)} held-out pairs; prompts without a pair: {skipped}")
    shown = [t for g in held_out[:2] for t in g.traces]
    before, names = _credit_before(lm, shown, say), ("VADER (the reward)", "contrastive prompt (rhat)")
    save_credits([c for some in before for c in some], out / "credit_before_training.jsonl")
    tone = catalog.method("t-reg").__dataclass_fields__["contrastive"].default_factory
    arms = _arms(options.alpha, {"contrastive": dataclasses.replace(tone(), axis="tone", draft=False)})
    evaluation = Evaluation(
        held_out=held_out,
        prompts=[lm.encode_prompt(sentiment.messages(p)) for p in sentiment.prompts()["test"]],
        samples=2,
        sampling=Sampling(max_new_tokens=options.tokens),
        reward=compound,
        quality=credit_quality,
        truths=[sentiment.lexicon_truth(t, lexicon_labels) for g in held_out for t in g.traces],
        shown=shown,
    )
    outcomes = compare(
        arms,
        lambda: load(options.model),
        train,
        held_out,
        options.loop,
        out / "sentiment",
        seeds=(options.loop.seed,),
        resolve=catalog.method,
        evaluate=evaluation,
        say=say,
        version_of=lambda slug: catalog.about(slug).version,
    )
    untouched = _once(out / "sentiment" / "untouched.json", lambda: evaluation(lm, lm, options.loop.seed))
    return {
        "outcomes": outcomes,
        "untouched": untouched,
        "before": before,
        "names": names,
        "record": _record(outcomes, untouched, train, held_out, f"{lm.name}: {lm.note or 'as given'}"),
        "provenance": provenance(
            models={"start": lm.identity()},
            seed=options.loop.seed,
            methods={a.slug: catalog.about(a.slug).version for a in arms} | {"vader": 1, "contrastive-prompt": 1},
        ),
    }


def sentiment_pairs(
    options: DemoOptions, lm: LM, out: Path, reward: Callable[[str], float], say: Say
) -> tuple[list[Group], list[Group], dict[str, int]]:
    """Pairs on training and on held-out prompts, sampled once and kept as a stage (as traces, so ids are the truth)."""
    prompts = sentiment.prompts()
    sides = {"train": prompts["train"][: options.pairs], "test": prompts["test"][: options.held_out]}
    sampling = Sampling(max_new_tokens=options.tokens)

    def make(folder: Path) -> None:
        from rich.progress import Progress

        count = sum(map(len, sides.values())) * options.samples
        with Progress(transient=True) as bar:
            task = bar.add_task("sample from the model", total=count)
            for side, some in sides.items():
                asked = [lm.encode_prompt(sentiment.messages(p)) for p in some]
                drawn = sample(
                    lm,
                    asked,
                    options.samples,
                    sampling,
                    seed=options.loop.seed,
                    progress=lambda n: bar.advance(task, n),
                )
                rows = [[t.to_json() | {"meta": {"prompt": p}} for t in ts] for p, ts in zip(some, drawn, strict=True)]
                write_json(folder / f"{side}.json", rows)

    inputs = {"model": lm.identity(), "sampling": dataclasses.asdict(sampling), "sides": sides, "n": options.samples}
    folder = Stages(out / "stages", say).run("samples", inputs | {"seed": options.loop.seed}, make)
    pairs, skipped = {}, {}
    for side in sides:
        traces = [[Trace.from_json(t) for t in some] for some in read_json(folder / f"{side}.json")]
        pairs[side], lost = best_and_worst(traces, reward, options.margin, "sentiment")
        skipped |= {f"{side}: {k}": v for k, v in lost.items() if v}
    return pairs["train"], pairs["test"], skipped


def _credit_before(lm: LM, shown: Sequence[Trace], say: Say) -> list[list[Credit]]:
    """Heatmaps before any training: what the reward says, and what the model itself says under two prompts."""
    say("credit before any training: VADER's lexicon, and SmolLM2 under a positive and a negative prompt")
    scorers = [api.make_scorer("vader"), api.make_scorer("contrastive-prompt", lm, axis="tone", draft=False)]
    return [scorer.score(list(shown)) for scorer in scorers]


def _grammar(options: DemoOptions, out: Path, say: Say) -> dict[str, Any]:
    """The same comparison over seeds in the grammar world, with two class-conditional LMs for T-REG's two prompts."""
    from .score.contrastive_prompt import ContrastivePrompt

    say("the grammar world: training its small language models (cached)")
    world = grammar_pairs("lexicon64", n_train=480, n_held_out=200)
    arms = _arms(options.alpha, {"scorer": ContrastivePrompt(policies=class_conditional("lexicon64"))})
    evaluation = Evaluation(
        held_out=world.held_out,
        prompts=world.prompts,
        samples=4,
        sampling=Sampling(max_new_tokens=40),
        reward=world.grammar.score,
        quality=credit_quality,
        truths=world.truths(),
        shown=[t for g in world.held_out[:1] for t in g.traces],
    )
    outcomes = compare(
        arms,
        world.policy,
        world.train,
        world.held_out,
        LoopConfig(lr=5e-4, batch_size=16, steps=120),  # its own; examples/t_reg.py has --tune
        out / "grammar",
        seeds=options.seeds,
        resolve=catalog.method,
        evaluate=evaluation,
        say=say,
        progress=False,
    )
    start = world.policy()
    untouched = _once(out / "grammar" / "untouched.json", lambda: evaluation(start, start, 0))
    note = "a 2-layer LM on a 64-word language (grammar world, preset lexicon64)"
    return {
        "outcomes": outcomes,
        "untouched": untouched,
        "record": _record(outcomes, untouched, world.train, world.held_out, note),
    }


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def _record(
    outcomes: Sequence[Outcome],
    untouched: dict[str, Any],
    train: Sequence[Group],
    held_out: Sequence[Group],
    model: str,
) -> dict[str, Any]:
    rows = [
        {k: (None if v is None else list(v) if isinstance(v, tuple) else v) for k, v in row.items()}
        for row in summary_rows(outcomes, untouched)
    ]
    for row in rows:
        for key, value in row.items():
            if isinstance(value, list):
                row[key] = [None if np.isnan(x) else x for x in value]
    return {
        "model": model,
        "training_pairs": len(train),
        "held_out_pairs": len(held_out),
        "table": rows,
        "runs": outcome_json(outcomes),
    }


def _report(options: DemoOptions, out: Path, real: dict[str, Any], grammar: dict[str, Any], seconds: float) -> Path:
    rows = {row["name"]: row for row in summary_rows(real["outcomes"], real["untouched"])}
    start, best = rows["untouched"]["reward"], max((rows["DPO"]["reward"], rows["T-REG"]["reward"]))
    record = real["record"]
    facts = (
        (
            "mean VADER reward",
            f"{start.value:.2f} → {best.value:.2f}",
            "untouched model → the better of the two methods",
        ),
        (
            "pairs",
            str(record["training_pairs"]),
            f"sampled from {options.model} itself, {options.tokens} tokens at most",
        ),
        ("time", f"{seconds / 60:.1f} min", "everything on this page, on this machine's CPU"),
    )
    intro = (
        f"The model ({record['model']}) answered {options.pairs} questions about films {options.samples} times each. "
        "VADER, a rule-based sentiment score, ranked the answers; the best and the worst of each question became a "
        "preference pair. **DPO** learns from the pair as a whole. **T-REG** also asks the untouched model itself, "
        "under a positive and under a negative prompt, which *tokens* of each answer deserve the credit, and leans on "
        "those."
    )
    sections = [
        Prose(title="What happened", text=intro),
        Heatmaps(
            title="Credit before any training",
            groups=[list(group) for group in zip(*real["before"], strict=True)],
            titles=[list(real["names"])] * len(real["before"][0]),
            how="Two signals on the same held-out answers: the reward's own words, and what the untouched model "
            "believes. Blue earns, orange costs.",
        ),
        *comparison_sections("SmolLM2, one seed", real["outcomes"], real["untouched"]),
        credit_section(real["outcomes"]),
        *comparison_sections("Grammar world, three seeds", grammar["outcomes"], grammar["untouched"]),
        Prose(title="What the numbers say", text=_verdict(grammar, real)),
        Provenance(data=real["provenance"]),
    ]
    return build_report(
        out,
        title="Aligning SmolLM2 with token-level credit",
        sections=sections,
        summary="DPO and T-REG, side by side on the same pairs and budget, on held-out prompts.",
        facts=facts,
        baseline="untouched",
    )


def _verdict(grammar: dict[str, Any], real: dict[str, Any]) -> str:
    """In words, and only what the intervals allow."""
    lines = []
    for where, part in (("With SmolLM2 (one seed)", real), ("In the grammar world (three seeds)", grammar)):
        rows = {row["name"]: row for row in summary_rows(part["outcomes"], part["untouched"])}
        words = []
        for key, label in (
            ("reward", "reward"),
            ("kl", "KL"),
            ("gap", "credit gap"),
            ("d_prime", "d'"),
            ("correct", "pair accuracy"),
        ):
            a, b = rows["DPO"].get(key), rows["T-REG"].get(key)
            if a is None or b is None:
                continue
            apart = b.low > a.high or b.high < a.low
            word = ("higher" if b.value > a.value else "lower") if apart else "not told apart"
            words.append(f"{label} {b.value:.3g} against {a.value:.3g} ({word})")
        lines.append(f"{where}, T-REG against DPO: " + "; ".join(words) + ".")
    return "\n\n".join(lines)
