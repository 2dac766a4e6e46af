"""GPM's acceptance figures: cycles that no order can hold, and real pairs on which it must not lose to Bradley-Terry.

(a) Planted cycles. 20 groups of n = 3 or 5 items, each item with 384 random features of its own (and once with those of
a sentence about it, by all-MiniLM, less their mean: the sentences are almost parallel). In each group every item beats
the next (n - 1) / 2 round the circle. One model is fitted on all pairs and asked for the same pairs: this tests what a
form can represent, not how it generalises. No order of the items gets more than 2/3 (n = 3) or 7/10 (n = 5) of such a
group right, which is found by trying all orders, so no Bradley-Terry model can.
(b) HH-RLHF, harmless-base (needs PERTOKEN_DATA): heads on frozen features of 1,636 human pairs. Dialogues are told
apart by their first turn; a fifth of them is for development and never tested on, the rest is split 5 times at random
(a fifth is test). all-MiniLM embeds the last question with the answer; --full takes SmolLM2's state after the whole
dialogue. A constant feature is added, without which a GPM cannot say r_a - r_b. Bradley-Terry and GPM choose tau from
0.1 and 1 and their epoch by the loss on a tenth of the training dialogues.

    python examples/gpm.py          two to three minutes, most of them for the sentence embeddings, which are kept
    python examples/gpm.py --full   SmolLM2's features (about an hour the first time)

Acceptance (specification): on cycles, GPM >= 99 % with d = 2 unnormalised and with d = 4 normalised, Bradley-Terry at
most 66.7 % and 70 %; on HH, GPM (d = 6) not worse than Bradley-Terry by more than 1 point, mean of 5 splits. GPM
normalised with d = 2 is reported without a bound: on a circle two items can only swap by passing through each other.

What was learned. (1) Sentences of one template need more steps than random features (1000 in place of 300): with 300
GPM d = 4 normalised was at 87 to 100 %, depending on the seed. (2) The bound of (b) is missed. The signal is weak (all
that was tried is right on 55 to 58 % of the development pairs, +-2.7 points), and a GPM has 6 x 385 weights for what
Bradley-Terry says with 384: it overfits within a few epochs. Normalised and without the constant it lost 5.4 points
(52.7 against 58.1 %), because its scores begin at a random size; on the development dialogues unnormalised embeddings
(the release has both kinds) were as good as Bradley-Terry, so that they are measured here: 3.3 points less (57.4
against 60.7 %). A larger constant or a smaller rate were no better there. With a weight decay to choose and a fifth of
the training dialogues to choose by, the two come to 57.7 and 58.0 %; that is within the bound only because
Bradley-Terry is then chosen worse, so it is not what is reported.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pertoken.core.cache import ArrayCache, key_of, remember
from pertoken.core.embed import TextEncoder
from pertoken.core.evaluate import seeds_interval
from pertoken.core.lm import load
from pertoken.core.pairwise import HeadOptions, PairConfig
from pertoken.results import save_result
from pertoken.score.gpm import GPM

GROUPS, WIDTH = 20, 384
CYCLE, SENTENCE_EPOCHS = PairConfig(lr=0.02, epochs=300, batch_size=256, dev_share=0.0, optimizer="adam"), 1000
REAL = PairConfig(lr=1e-3, epochs=60, batch_size=64, dev_share=0.1, patience=8)
FORMS = {
    "GPM d=2": HeadOptions(dim=2, normalize=False),
    "GPM d=4 normalised": HeadOptions(dim=4),
    "GPM d=2 normalised": HeadOptions(dim=2),
    "Bradley-Terry": HeadOptions(form="bt", tau=1.0),
}
NAMES = (
    "amber bronze coral dune ember fern garnet hazel indigo jade khaki lilac maroon navy olive pearl rose sand teal ash"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the random features and heads (a)."""
    splits: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Of the human pairs (b)."""
    full: bool = False
    """SmolLM2's hidden states in (b)."""
    save: bool = False
    """Write results/gpm.json."""


def wins(n: int) -> list[tuple[int, int]]:
    """The regular tournament of n items: each beats the next (n - 1) / 2."""
    return [(i, (i + step) % n) for i in range(n) for step in range(1, (n - 1) // 2 + 1)]


def best_order(n: int) -> float:
    """The largest share of the tournament that any order gets right, by trying all of them."""
    orders = (np.argsort(order) for order in itertools.permutations(range(n)))
    return max(float(np.mean([place[i] < place[j] for i, j in wins(n)])) for place in orders)


def cycles(features_NH: np.ndarray, n: int, head: HeadOptions, seed: int, epochs: int = CYCLE.epochs) -> float:
    """Share of the planted pairs that a fitted model gets right."""
    pairs = [(g * n + i, g * n + j) for g in range(len(features_NH) // n) for i, j in wins(n)]
    config = dataclasses.replace(CYCLE, seed=seed, epochs=epochs)
    table = GPM(head=head).fit_features(features_NH, pairs, config=config).table(features_NH)
    return float(np.mean([bool(table[i, j] > 0) for i, j in pairs]))


def planted(options: Options) -> tuple[dict[tuple[str, int], list[float]], dict[int, float]]:
    """Accuracies by form and n, one a seed and then one on sentences; and the bounds of any order."""
    encoder, found = TextEncoder(), {}
    bounds = {n: best_order(n) for n in (3, 5)}
    print(f"(a) planted cycles, {GROUPS} groups; an order gets at most {bounds[3]:.1%} (n=3), {bounds[5]:.1%} (n=5)")
    print(f"{'form':<22}{'n':>3}   " + "".join(f"seed {s:<5}" for s in options.seeds) + "sentences")
    for n in (3, 5):
        texts = [f"The {name} team of level {'ABCDE'[i]}" for name in NAMES.split() for i in range(n)]
        said = encoder(texts)
        said = said - said.mean(0)
        for name, head in FORMS.items():
            random = [np.random.default_rng(s).normal(size=(GROUPS * n, WIDTH)) for s in options.seeds]
            right = [cycles(x.astype(np.float32), n, head, s) for x, s in zip(random, options.seeds, strict=True)]
            right.append(cycles(said, n, head, options.seeds[0], SENTENCE_EPOCHS))
            found[name, n] = right
            print(f"{name:<22}{n:>3}   " + "".join(f"{r:<10.1%}" for r in right))
    return found, bounds


def human_pairs(full: bool) -> tuple[np.ndarray, list[str]] | None:
    """Features (2 B, H), chosen and rejected of each pair one after the other, and what each pair is split by."""
    folder = os.environ.get("PERTOKEN_DATA")
    path = Path(folder or ".") / "hh_harmless" / "pairs.jsonl.gz"
    if not folder or not path.exists():
        print("(b) skipped: set PERTOKEN_DATA to a folder that holds hh_harmless/pairs.jsonl.gz")
        return None
    with gzip.open(path, "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    first = [row["prompt"].split("\n\nAssistant:")[0] for row in rows]
    if full:
        lm = load("smollm2")
        model = GPM(lm=lm)
        traces = [lm.trace(_turns(row["prompt"]), row[side].strip()) for row in rows for side in ("chosen", "rejected")]
        shelf = ArrayCache().context({"features": "hidden_end", "version": 1, **lm.identity()})
        compute = lambda some: list(model.features(some)[0].numpy())
        key = lambda t: key_of(t.prompt_ids, t.completion_ids)
        return np.stack(remember(shelf, traces, key, compute, chunk=128)), first
    asked = [row["prompt"].rsplit("\n\nHuman:", 1)[-1].removesuffix("\n\nAssistant:").strip() for row in rows]
    texts = [f"{q} {row[side].strip()}" for q, row in zip(asked, rows, strict=True) for side in ("chosen", "rejected")]
    return TextEncoder()(texts), first


def _turns(prompt: str) -> list[dict[str, str]]:
    """Anthropic's dialogue as messages; the last, empty answer is the one to give."""
    turns = []
    for part in prompt.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": a.strip()} for a in answers if a.strip()]
    return turns


def real(options: Options) -> dict[str, list[float]] | None:
    """Held-out accuracy of both heads, one a split."""
    data = human_pairs(options.full)
    if data is None:
        return None
    features, groups = data
    constant = np.linalg.norm(features, axis=1).mean() * np.ones((len(features), 1))
    features = np.concatenate([features, constant], 1).astype(np.float32)
    arms = {"GPM d=6": {"dim": 6, "normalize": False}, "Bradley-Terry": {"form": "bt"}}
    found: dict[str, list[float]] = {name: [] for name in arms}
    print(f"(b) {len(groups)} human pairs of HH-RLHF harmless-base, held-out accuracy (tau chosen on a dev share)")
    development = np.array([zlib.crc32(g.encode()) % 5 == 0 for g in groups])
    for split in options.splits:
        test = np.array([zlib.crc32(f"{split} {g}".encode()) % 5 == 0 for g in groups]) & ~development
        train = np.flatnonzero(~test)
        pairs = np.stack([2 * train, 2 * train + 1], 1)
        line = f"    split {split}: {int(test.sum())} test pairs"
        for name, head in arms.items():
            config = dataclasses.replace(REAL, seed=split)
            fitted = [
                GPM(head=HeadOptions(tau=tau, **head)).fit_features(  # type: ignore[arg-type]
                    features, pairs, config=config, groups=[groups[i] for i in train]
                )
                for tau in (0.1, 1.0)
            ]
            best = min(fitted, key=lambda model: model.record["dev_loss"])
            table = [best.table(features[2 * i : 2 * i + 2])[0, 1] for i in np.flatnonzero(test)]
            found[name].append(float(np.mean([bool(s > 0) for s in table])))
            line += f"   {name} {found[name][-1]:.1%} (tau {best.head.tau:g}, epoch {best.record['epoch'] + 1})"
        print(line)
    return found


def main(options: Options) -> None:
    """Run both parts and print them beside their bounds."""
    found, bounds = planted(options)
    checks = {
        "GPM d=2 unnormalised >= 99 % on both cycles": min(found["GPM d=2", 3] + found["GPM d=2", 5]) >= 0.99,
        "GPM d=4 normalised >= 99 %": min(found["GPM d=4 normalised", 3] + found["GPM d=4 normalised", 5]) >= 0.99,
        "Bradley-Terry within the bound of any order": all(
            max(found["Bradley-Terry", n]) <= bounds[n] + 1e-9 for n in (3, 5)
        ),
    }
    human = real(options)
    rows: list[dict[str, Any]] = [
        {
            "metric": f"share of planted {n}-cycle pairs, {name}",
            "value": float(np.mean(found[name, n])),
            "baseline": "bradley-terry",
            "baseline_value": float(np.mean(found["Bradley-Terry", n])),
        }
        for n in (3, 5)
        for name in FORMS
        if name != "Bradley-Terry" and (name, n) != ("GPM d=2", 3)
    ]
    if human is not None:
        gap = 100 * (np.array(human["GPM d=6"]) - np.array(human["Bradley-Terry"]))
        mean, low, high = seeds_interval(gap.tolist())
        print(f"    mean of {len(gap)} splits: " + ", ".join(f"{n} {np.mean(a):.2%}" for n, a in human.items()), end="")
        print(f"; difference {mean:+.2f} points [{low:+.2f}, {high:+.2f}] (the splits share pairs)")
        checks["on HH within 1 point of Bradley-Terry"] = bool(mean >= -1.0)
        rows.append(
            {
                "metric": "held-out accuracy on HH-RLHF harmless pairs (%), GPM d=6, mean of 5 splits",
                "value": 100 * float(np.mean(human["GPM d=6"])),
                "baseline": "bradley-terry",
                "baseline_value": 100 * float(np.mean(human["Bradley-Terry"])),
                "bound": "not worse by more than 1 point",
                "reached": bool(mean >= -1.0),
                "world": "frozen SmolLM2 states" if options.full else "frozen all-MiniLM features",
                "seeds": list(options.splits),
                "notes": f"difference {mean:+.2f} points, 95 % of splits [{low:+.2f}, {high:+.2f}], which share pairs",
            }
        )
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        _save(options, found, bounds, checks, rows)


def _save(
    options: Options,
    found: dict[tuple[str, int], list[float]],
    bounds: dict[int, float],
    checks: dict[str, bool],
    rows: Sequence[dict[str, Any]],
) -> None:
    values = found["GPM d=2", 3]
    save_result(
        "gpm",
        metric="share of planted 3-cycle pairs that the fitted model gets right, GPM d=2 unnormalised",
        value=float(np.mean(values)),
        interval=(min(values), max(values)),
        baseline="bradley-terry",
        baseline_value=float(np.mean(found["Bradley-Terry", 3])),
        bound="; ".join(checks),
        reached=all(checks.values()),
        world=f"{GROUPS} planted cycles, one model",
        seeds=options.seeds,
        notes=f"interval: least and greatest of the seeds and of sentence features. No order gets more than "
        f"{bounds[3]:.1%} (n=3) and {bounds[5]:.1%} (n=5), by enumeration; GPM d=2 normalised has no bound",
        rows=rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
