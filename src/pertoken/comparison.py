"""Comparisons as users meet them: train side by side, evaluate on the same held-out prompts, draw one report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import api, catalog
from .core.compare import Arm, Outcome, check_arms, compare
from .core.credit import Credit
from .core.data import Group
from .core.evaluate import mean_interval, seeds_interval, sequence_kl
from .core.lm import LM, load
from .core.loop import LoopConfig
from .core.record import provenance, write_json
from .core.rollout import Sampling, sample
from .core.trace import Trace
from .run_file import merged
from .show.charts import Frontier, Lines, Point, Series
from .show.report import Heatmaps, Prose, Provenance, Section, build_report
from .show.tables import Column, Interval, Table

Say = Callable[[str], None]
UNTOUCHED = "untouched"


@dataclass(kw_only=True)
class Evaluation:
    """What every arm is measured by, on the same held-out prompts and pairs.

    Attributes:
        held_out: pairs for the accuracy (sign of the summed log-ratio margin) and for the credit.
        prompts: ids of held-out prompts that are sampled from; `samples` completions each, drawn as `sampling` says.
        reward: text of a completion -> reward; None if there is none.
        quality: (credits, truths) -> figures of how well token credit finds the truth; `truths` one array a held-out
            completion, in order.
        shown: completions whose credit is drawn for every arm.
        beta: of the implicit token reward r_t = beta * log-ratio.
    """

    held_out: Sequence[Group]
    prompts: Sequence[tuple[int, ...]] = ()
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    reward: Callable[[str], float] | None = None
    quality: Callable[[Sequence[Credit], Sequence[np.ndarray]], dict[str, Any]] | None = None
    truths: Sequence[np.ndarray] = ()
    shown: Sequence[Trace] = ()
    beta: float = 0.1
    say: Say = lambda line: None

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        """Figures as JSON values; per-item lists where an interval is wanted."""
        out: dict[str, Any] = {}
        scorer = catalog.method("logratio")(policy=lm, reference=reference, beta=self.beta)
        if self.held_out and lm is not reference:  # an untouched model has log-ratio 0 everywhere
            credits = scorer.score([t for g in self.held_out for t in g.traces])
            sums = np.reshape([c.reduce("sum") for c in credits], (len(self.held_out), -1))
            out["correct"] = [float(chosen > rejected) for chosen, rejected in sums]
            if self.quality:
                found = self.quality(credits, self.truths)
                out |= {k: float(v) for k, v in found.items() if not (isinstance(v, float) and math.isnan(v))}
        if self.prompts:
            drawn = sample(lm, list(self.prompts), self.samples, self.sampling, seed=1000 + seed)
            traces = [t for group in drawn for t in group]
            if self.reward:
                scores = [self.reward(t.text) for t in traces]
                # Samples of one prompt are alike, so a prompt is the item whose mean is resampled.
                out["reward"] = [float(v) for v in np.reshape(scores, (-1, self.samples)).mean(1)]
            if lm is not reference:
                out["kl"] = [float(v) for v in sequence_kl(lm, reference, [group[0] for group in drawn])]
            out["distinct"] = distinct_share(traces)
            out["examples"] = [t.text for t in traces[:8]]
        out["credits"] = [c.to_json() for c in scorer.score(list(self.shown))] if self.shown else []
        return out


def distinct_share(traces: Sequence[Trace]) -> float:
    """Distinct bigrams of token ids over all bigrams: a diversity that falls when a policy collapses."""
    bigrams = [b for t in traces for b in zip(t.completion_ids, t.completion_ids[1:], strict=False)]
    return len(set(bigrams)) / max(1, len(bigrams))


def interval(values: Sequence[Any]) -> Interval | None:
    """One figure over seeds: Student's t over the seeds' means, or, with one seed, a bootstrap over its items."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    means = [float(np.mean(v)) for v in values]
    if len(values) == 1:
        return Interval(*mean_interval(values[0])) if np.ndim(values[0]) else Interval(means[0], math.nan, math.nan)
    return Interval(*seeds_interval(means))


COLUMNS = (
    Column("reward", "mean reward", "high", 3, "fresh samples on held-out prompts"),
    Column("kl", "KL", "low", 2, "nats a response, to the reference"),
    Column("correct", "pair accuracy", "high", 3, "held-out pairs"),
    Column("auc", "AUC", "high", 3, "credit: positive over negative words"),
    Column("gap", "gap", "high", 3, "credit of positive minus negative words"),
    Column("d_prime", "d'", "high", 2, "gap over noise on neutral words"),
    Column("distinct", "distinct", "high", 3, "distinct bigrams of the samples"),
)


def summary_rows(outcomes: Sequence[Outcome], untouched: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One row an arm, with an interval a figure."""
    rows = [_row(UNTOUCHED, [untouched], "")] if untouched else []
    for arm in dict.fromkeys(o.arm for o in outcomes):
        of_arm = [o for o in outcomes if o.arm == arm]
        seconds = np.mean([o.record["seconds"] for o in of_arm])
        note = f"{of_arm[0].record['updates']} updates, {seconds:.0f} s"
        rows.append(_row(arm, [o.figures for o in of_arm], note))
    return rows


def _row(name: str, figures: Sequence[Mapping[str, Any]], note: str) -> dict[str, Any]:
    cells = {c.key: interval([f.get(c.key) for f in figures]) for c in COLUMNS}
    return {"name": name, "note": note, **cells}


def comparison_sections(
    title: str, outcomes: Sequence[Outcome], untouched: Mapping[str, Any] | None, how: str = ""
) -> list[Section]:
    """Table, frontier and curves of one comparison."""
    rows = summary_rows(outcomes, untouched)
    columns = [c for c in COLUMNS if any(row[c.key] is not None for row in rows)]
    seeds = len({o.seed for o in outcomes})
    basis = f"Student-t over {seeds} seeds" if seeds > 1 else "bootstrap over held-out prompts, one seed"
    words = {"how": how or f"One row a method; the bar around a dot is its 95 % interval ({basis})."}
    sections: list[Section] = [Table(title=title, columns=columns, rows=rows, **words)]
    frontier = _frontier(title, rows)
    sections += [frontier] if frontier else []
    panels = {}
    names = (("loss", "loss"), ("rewards/accuracies", "accuracy on the batch"), ("rewards/margins", "reward margin"))
    for key, label in names:
        series = []
        for arm in dict.fromkeys(o.arm for o in outcomes):
            runs = [[r[key] for r in o.history if key in r] for o in outcomes if o.arm == arm]
            steps = [r["step"] for r in outcomes[0].history]
            if runs and all(len(run) == len(steps) for run in runs) and steps:
                series.append(Series.of_runs(arm, steps, runs))
        if series:
            panels[label] = series
    if panels:
        sections.append(Lines(title=f"{title}: training", panels=panels))
    return sections


def _frontier(title: str, rows: Sequence[Mapping[str, Any]]) -> Section | None:
    """What was gained against what it cost: reward over KL, or, without a reward, pair accuracy."""
    gains = {"reward": "mean reward", "correct": "accuracy on held-out pairs"}
    gain = next((g for g in gains if any(row[g] is not None and row["kl"] is not None for row in rows)), None)
    if gain is None:
        return None
    points = [
        Point(
            name=row["name"],
            x=row["kl"].value,
            y=row[gain].value,
            x_interval=_bounds(row["kl"]),
            y_interval=_bounds(row[gain]),
        )
        for row in rows
        if row["kl"] is not None and row[gain] is not None
    ]
    start = next((row[gain] for row in rows if row["name"] == UNTOUCHED), None)
    if start is not None:
        points.insert(0, Point(name=UNTOUCHED, x=0.0, y=start.value, y_interval=_bounds(start)))
    word = gain if gain == "reward" else "accuracy"
    return Frontier(
        title=f"{title}: {word} against KL",
        points=points,
        x_label="KL to the reference (nats a response)",
        y_label=gains[gain],
        how=f"Up is more {word}, left is closer to the untouched model; bars are 95 % intervals.",
    )


def credit_section(
    outcomes: Sequence[Outcome], before: Sequence[Sequence[Credit]] = (), titles: Sequence[str] = ()
) -> Section:
    """The same held-out answers under each method: r_t = beta * log-ratio, with other credit (`before`) above them."""
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        first.setdefault(outcome.arm, outcome)
    loaded = {arm: [Credit.from_json(c) for c in o.figures["credits"]] for arm, o in first.items()}
    count = min((len(v) for v in loaded.values()), default=0)
    groups, names = [], []
    for i in range(count):
        above = [b[i] for b in before]
        groups.append([*above, *(loaded[arm][i] for arm in loaded)])
        names.append([*titles[: len(above)], *loaded])
    return Heatmaps(title="The same answers under each method", groups=groups, titles=names)


def _bounds(value: Interval) -> tuple[float, float] | None:
    return None if math.isnan(value.low) else (value.low, value.high)


def outcome_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes without the bulky parts, for results.json."""
    keep = [c.key for c in COLUMNS]
    out = []
    for o in outcomes:
        means = {
            k: float(np.mean(o.figures[k])) for k in keep if o.figures.get(k) is not None and np.size(o.figures[k])
        }
        out.append(
            {"arm": o.arm, "seed": o.seed, **means, "updates": o.record["updates"], "seconds": o.record["seconds"]}
        )
    return out


@dataclass(frozen=True, kw_only=True)
class CompareOptions(api.TrainOptions):
    """What a comparison takes beside each method's options."""

    out: str = "runs/compare"
    """Output folder; the same command goes on where it was stopped."""
    seeds: tuple[int, ...] = (1,)
    """Seeds; with two or more the intervals are over seeds."""
    set: tuple[str, ...] = ()
    """Options of the methods: METHOD.NAME=VALUE or NAME=VALUE."""
    reward: str | None = None
    """Scorer that judges fresh samples on held-out prompts (vader...)."""
    samples: int = 64
    """Held-out prompts to sample from, one completion each."""
    sample_tokens: int = 48
    """Longest sampled completion."""


def make_arms(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
    """Arms of ``method`` or ``name=method`` words.

    Raises:
        ValueError: no such method, one that does not train, an option it does not have, or a value that is none.
    """
    arms = []
    for word in names:
        name, _, slug = word.rpartition("=")
        row = catalog.about(slug)
        if row.room != "train":
            raise ValueError(f"{slug} is of the {row.room} room and trains nothing; leave it out of the comparison")
        objective = merged(catalog.method(slug)(), settings.get(name or slug, {}), name or slug)
        arms.append(Arm(name=name or slug, slug=slug, objective=objective))
    return arms


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to: the outcomes, the untouched model's figures, and where the report is."""

    outcomes: list[Outcome]
    untouched: dict[str, Any]
    report: Path


def compare_train(
    names: Sequence[str], options: CompareOptions, settings: Mapping[str, Any], *, say: Say
) -> Comparison:
    """Train `names` side by side on the user's data.

    Raises:
        ValueError: a method that cannot be compared on these data, with the reason, before anything runs.
    """
    if len(names) < 1:
        raise ValueError("name the methods to compare: pertoken compare train dpo t-reg --data pairs.jsonl")
    arms = make_arms(names, settings)
    check_arms(arms, arms[0].objective.data)

    def policy() -> LM:
        return load(options.model, dtype=options.dtype, lora=options.lora, template=options.template)

    base = policy()
    loop = dataclasses.replace(options.loop, seed=options.seeds[0])
    groups, held_out, report = api.training_data(
        arms[0].objective.data, dataclasses.replace(options, loop=loop), base, say
    )
    out = Path(options.out)
    judge = api.make_scorer(options.reward, base) if options.reward else None
    unique = list(dict.fromkeys(g.prompt_ids for g in held_out))[: options.samples]
    evaluation = Evaluation(
        held_out=held_out if arms[0].objective.data == "pairs" else (),
        prompts=unique,
        sampling=Sampling(max_new_tokens=options.sample_tokens),
        reward=(lambda text: judge.score([base.trace("?", text)])[0].reduce("sum")) if judge else None,
        shown=[t for g in held_out[:2] for t in g.traces],
    )
    outcomes = compare(
        arms,
        policy,
        groups,
        held_out,
        options.loop,
        out,
        seeds=options.seeds,
        resolve=catalog.method,
        evaluate=evaluation,
        say=say,
        pack_tokens=options.pack_tokens,
        version_of=lambda slug: catalog.about(slug).version,
    )
    untouched = evaluation(base, base, options.seeds[0])
    record = {
        "outcomes": outcome_json(outcomes),
        "data": list(report.lines()),
        "provenance": _provenance(base, arms, options),
    }
    write_json(out / "comparison.json", record)
    sections = [
        *comparison_sections("Side by side", outcomes, untouched),
        credit_section(outcomes),
        Prose(title="The data", text="\n\n".join(report.lines())),
        Provenance(data=record["provenance"]),
    ]
    title = " · ".join(a.name for a in arms)
    report_path = build_report(
        out,
        title=title,
        sections=sections,
        summary=f"{len(groups)} training and {len(held_out)} held-out rows, {len(options.seeds)} seed(s), "
        f"{options.loop.total_steps(len(groups))} updates of the student each.",
        baseline=UNTOUCHED,
    )
    return Comparison(outcomes, untouched, report_path)


def _provenance(base: LM, arms: Sequence[Arm], options: CompareOptions) -> dict[str, Any]:
    versions = {a.slug: catalog.about(a.slug).version for a in arms}
    extra = {"options": dataclasses.asdict(options)}
    return provenance(models={"start": base.identity()}, seed=options.seeds[0], methods=versions, extra=extra)


def show_run(folder: Path) -> None:
    """Print what a run's folder holds: its last figures and its notes.

    Raises:
        ValueError: it holds no run.
    """
    from rich.console import Console
    from rich.table import Table as RichTable

    log = folder / "log.jsonl"
    if not log.exists():
        raise ValueError(f"{folder} holds no run (log.jsonl is missing); give the folder named by --out")
    records = [json.loads(line) for line in log.read_text("utf8").splitlines()]
    console = Console()
    table = RichTable(title=str(folder), title_justify="left")
    names = [n for n in records[-1] if n not in ("step",)]
    for name in ("figure", "first", "last"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name in names:
        first = next((r[name] for r in records if name in r), math.nan)
        table.add_row(name, f"{first:.5g}", f"{records[-1][name]:.5g}")
    console.print(table)
    done = folder / "results.json"
    for note in json.loads(done.read_text("utf8")).get("notes", []) if done.exists() else []:
        console.print(note)


__all__ = [
    "CompareOptions",
    "Comparison",
    "Evaluation",
    "LoopConfig",
    "compare_train",
    "comparison_sections",
    "credit_section",
    "interval",
    "make_arms",
    "outcome_json",
    "show_run",
    "summary_rows",
]
