"""BLEU against reference answers on real outputs: does it order models, and does it agree with a judge?

The specification's figure (Qwen2.5-7B-Instruct at least 1.8 x Qwen2.5-7B on MT-Bench, by references of gpt-4.1-mini)
needs outputs that the folder of PERTOKEN_DATA does not hold. Measured instead, on what it holds:

(a) 252 user-oriented tasks with human answers: mean BLEU of text-davinci-003 (trained by feedback), text-davinci-001
    and davinci tuned on its own instructions. No bound: the specification's is of other models.
(b) WildBench: of five weaker models' answers to 169 questions, pairs whose judge's scores (gpt-4o) differ by two or
    more; the answer of the strongest model (Qwen1.5-72B) is the one reference. Share of pairs in which the metric's
    winner is the judge's, beside ROUGE-L and the longer answer.

    python examples/bleuberi.py            about a minute
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from pertoken.core.evaluate import mean_interval
from pertoken.results import save_result
from pertoken.score.bleuberi import answer_of, bleu, rouge_l, tokenize
from pertoken.select.bleuberi_select import agreement

STRONG = "Qwen1.5-72B-Chat-greedy"
TUNED, BASE = "text-davinci-003", "davinci-self-instruct"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    gap: float = 2.0
    """Least difference of the judge's scores (1 to 10) in a pair."""
    save: bool = False
    """Write results/bleuberi.json."""


def read(name: str) -> list[dict[str, Any]]:
    """Rows of a file of PERTOKEN_DATA.

    Raises:
        ValueError: it is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds instructions/ and wildbench/")
    with gzip.open(Path(folder) / f"{name}.jsonl.gz", "rt", encoding="utf8") as lines:
        return [json.loads(line) for line in lines]


def of_models() -> dict[str, list[float]]:
    """BLEU of each model's answers to the tasks with human answers."""
    rows = [r for r in read("instructions/user_oriented") if tokenize(r["reference"])]
    names = rows[0]["predictions"]
    return {m: [bleu(answer_of(r["predictions"][m] or ""), [r["reference"]]) for r in rows] for m in names}


def judged_pairs(gap: float) -> tuple[list[tuple[str, str, str]], list[int]]:
    """(first answer, second answer, reference), and which one the judge preferred."""
    pairs, judge = [], []
    for row in read("wildbench/outputs"):
        models = row["models"]
        reference = models.get(STRONG, {}).get("output") or ""
        others = [m for name, m in sorted(models.items()) if name != STRONG and (m.get("output") or "").strip()]
        if not tokenize(reference):
            continue
        for a, b in itertools.combinations(others, 2):
            if abs(a["score"] - b["score"]) >= gap:
                pairs.append((a["output"], b["output"], reference))
                judge.append(int(b["score"] > a["score"]))
    return pairs, judge


def main(options: Options) -> None:
    """Run it and print both tables."""
    scores = of_models()
    print(f"(a) mean BLEU against human answers, {len(scores[TUNED])} tasks")
    means = {name: mean_interval(values) for name, values in scores.items()}
    for name, (mean, low, high) in means.items():
        print(f"{name:<24}{mean:7.4f}   {low:.4f} to {high:.4f}")
    ratio = means[TUNED][0] / means[BASE][0]
    print(f"{TUNED} over {BASE}: {ratio:.2f} x")
    pairs, judge = judged_pairs(options.gap)
    print(f"\n(b) agreement with the judge, {len(pairs)} pairs that differ by {options.gap:g} or more")
    metrics = {
        "BLEU": lambda text, reference: bleu(text, [reference]),
        "ROUGE-L": lambda text, reference: rouge_l(text, [reference]),
        "longer answer": lambda text, reference: float(len(tokenize(text))),
    }
    shares: dict[str, tuple[float, float, float]] = {}
    for name, metric in metrics.items():
        values = [(metric(a, r), metric(b, r)) for a, b, r in pairs]
        shares[name] = mean_interval([agreement([v], [j]) for v, j in zip(values, judge, strict=True)])
        print("{:<16}{:7.3f}   {:.3f} to {:.3f}".format(name, *shares[name]))
    rouge = shares["ROUGE-L"]
    if options.save:
        save_result(
            "bleuberi",
            metric="share of pairs in which BLEU's winner is the judge's (one reference)",
            value=shares["BLEU"][0],
            interval=shares["BLEU"][1:],
            baseline="the longer answer",
            baseline_value=shares["longer answer"][0],
            bound="",
            reached=None,
            world=f"WildBench, {len(pairs)} pairs of five models' answers, reference: Qwen1.5-72B's",
            seeds=[],
            notes="The specification's figure needs MT-Bench outputs of Qwen2.5 that are not in the data. Interval: "
            "bootstrap over pairs, which share questions, so it is too narrow.",
            rows=[
                {"metric": f"mean BLEU against human answers, {name}", "value": m[0], "interval": list(m[1:])}
                for name, m in means.items()
            ]
            + [{"metric": "agreement, ROUGE-L", "value": rouge[0], "interval": list(rouge[1:])}],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
