"""Appropriateness rewriting: how good the classifier is, and what re-ranking eight rewrites by its reward brings.

The specification asks for the Appropriateness Corpus (2,191 arguments), which the folder of PERTOKEN_DATA does not
hold: those who have ``appropriateness_corpus_conservative_w_folds.csv`` measure its figures with --corpus. Without it,
SemEval-2021's Toxic Spans stands in. What differs: English news comments, not debate posts; annotators marked toxic
characters, not 14 dimensions of inappropriateness; a text is a SENTENCE of a comment with toxic spans, inappropriate if
a span touches it (files train and test as given, three words or more). Whole comments, inappropriate if they have any
span, are measured too, but are no classifier's task: all were reported as toxic, and the few without a span are those
whose annotators agreed on none.

Re-ranking: SmolLM2, the paper's instruction in the Alpaca wrapper as one user turn, eight samples (T 1, top-p 0.95) of
each of some inappropriate TEST texts; R = w_a a + w_s s by a classifier of half the training texts. Best-of-8 raises R
by itself, so a classifier of the other half judges, too. Bounds: gain of mean R at least 0.08 at 0.5/0.5, and the
judge's mean a rises; on the corpus, macro-F1 at least 0.68 as well. Table: other weights, the unchanged original, and
what is reported and not optimised. Perplexity is SmolLM2's own, not GPT-2's, and the median.

    python examples/argument_rewriting.py                   about three minutes
    python examples/argument_rewriting.py --corpus FILE     the paper's data
    python examples/argument_rewriting.py --dev             on trial sentences, for choices (see below)
    python examples/argument_rewriting.py --full            PPO by the paper's recipe, w_a 0.3, 0.5, 0.9 (on a GPU)

Chosen on the 1,747 trial sentences: n-grams, balanced (macro-F1 0.827; half the training texts 0.812). On trial
comments: n-grams 0.513, MiniLM vectors 0.467, all inappropriate 0.484, so comments were given up as labels. The prompt
was not tuned: on eight trial comments two others kept as little (edit similarity 0.018, 0.017, 0.012).

--full has run on two cores at a toy size only (one batch of 8 rollouts of 12 tokens), so its bounds (mean a rises and
mean s falls along w_a on the same 100 test texts; R at least 0.05 above the start's at 0.5) are not measured. It
differs from the release: SmolLM2, not LLaMA-7B with Alpaca; the training texts are inappropriate TRAIN texts (no
unlabelled ones); rollouts of 48 tokens (--tokens), not 384, and fewer of them; no dropout in the adapter. Its learning
rate stays near 5e-6 here as there (their cosine is over four times their updates: 4.5e-6 at the end). The last weights
are judged; the log has the validation reward every 100 updates, by which the release chooses a checkpoint.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pertoken import catalog
from pertoken.core.advantage import GAE
from pertoken.core.critic import KLControl
from pertoken.core.data import Group
from pertoken.core.embed import TextEncoder
from pertoken.core.evaluate import mean_interval
from pertoken.core.examples import Example
from pertoken.core.experience import Rollouts
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig
from pertoken.core.rollout import Sampling, sample
from pertoken.core.run import Run
from pertoken.core.trace import Trace
from pertoken.results import save_result
from pertoken.score.argument_rewriting import (
    ArgumentRewriting,
    Labelled,
    alpaca_prompt,
    best_of,
    fit_classifier,
    load_corpus,
    macro_f1,
    perplexities,
)
from pertoken.train._policy_gradient import ValueLoss
from pertoken.train.ppo import PPO

SENTENCE = re.compile(r".+?(?:[.!?]+(?=\s|$)|\n|$)", re.DOTALL)
WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.9, 1.0)
FIGURES = ("a", "s", "edit_similarity", "length_ratio", "copy_rate", "still_inappropriate", "identical")
SHORT = ("a", "s", "edit", "length", "copied", "still inapp.", "same")
GAIN, F1 = 0.08, 0.68


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    corpus: str = ""
    """The Appropriateness Corpus with folds, a CSV file."""
    texts: int = 24
    """Inappropriate texts that are rewritten."""
    samples: int = 8
    """Rewrites of each."""
    tokens: int = 48
    """Most tokens of a rewrite."""
    seed: int = 0
    dev: bool = False
    """Judge on trial sentences (or VALID) in the place of test ones."""
    full: bool = False
    """Train by PPO."""
    batches: int = 12
    """With --full: batches of rollouts."""
    judged: int = 100
    """With --full: test texts."""
    prompts: int = 128
    """With --full: rollouts a batch."""
    out: str = ""
    """With --full: keep the runs here."""
    save: bool = False
    """Write results/argument-rewriting.json."""


@dataclass(frozen=True)
class Data:
    """Labelled texts to learn from and to judge by. `whose`: for each of `train`, the comment it is from."""

    name: str
    train: list[Labelled]
    test: list[Labelled]
    whole: tuple[list[Labelled], list[Labelled]] | None
    whose: list[str]


def comments(name: str) -> list[dict[str, Any]]:
    """A file of Toxic Spans.

    Raises:
        ValueError: PERTOKEN_DATA is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds toxic_spans/, or give --corpus FILE")
    with gzip.open(Path(folder) / "toxic_spans" / f"{name}.jsonl.gz", "rt", encoding="utf8") as lines:
        return [json.loads(line) for line in lines]


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[Labelled]:
    """Sentences of comments that have a toxic span, inappropriate if one touches them."""
    made = []
    for row in rows:
        for found in SENTENCE.finditer(row["text"]) if row["spans"] else ():
            text = found.group().strip()
            touched = any(a < found.end() and b > found.start() for a, b in row["spans"])
            made += [Labelled(text, touched, str(row["id"]))] if len(text.split()) >= 3 else []
    return made


def read(options: Options) -> Data:
    """The corpus, or what stands in for it."""
    if options.corpus:
        splits = load_corpus(options.corpus)
        test = splits["VALID" if options.dev else "TEST"]
        return Data("Appropriateness Corpus, fold0.0", splits["TRAIN"], test, None, [e.row for e in splits["TRAIN"]])
    rows = {name: comments(name) for name in ("train", "trial" if options.dev else "test")}
    train, test = (sentences(some) for some in rows.values())
    whole = [[Labelled(r["text"], bool(r["spans"])) for r in some] for some in rows.values()]
    return Data("Toxic Spans, sentences", train, test, (whole[0], whole[1]), [e.row for e in train])


def fitted(texts: Sequence[Labelled]) -> Any:
    """A classifier of labelled texts."""
    return fit_classifier([e.text for e in texts], [e.inappropriate for e in texts])


def f1_of(classifier: Any, texts: Sequence[Labelled]) -> float:
    """Its macro-F1."""
    return macro_f1([e.inappropriate for e in texts], classifier([e.text for e in texts]) < 0.5)


def halves(data: Data, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """The training texts in two; the sentences of a comment stay together."""
    names = sorted(set(data.whose))
    first = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]}
    some = [(e, who in first) for e, who in zip(data.train, data.whose, strict=True)]
    return [e for e, own in some if own], [e for e, own in some if not own]


def inappropriate(texts: Sequence[Labelled], n: int, seed: int, longest: int | None) -> list[str]:
    """n inappropriate texts of eight words or more, drawn."""
    known = [e.text for e in texts if e.inappropriate and 8 <= len(e.text.split()) <= (longest or 10**6)]
    return [known[i] for i in np.random.default_rng(seed).permutation(len(known))[:n]]


def rewrites(lm: LM, texts: Sequence[str], n: int, options: Options) -> list[list[Trace]]:
    """n rewrites of each text, which know their original."""
    how = Sampling(max_new_tokens=options.tokens, min_new_tokens=min(10, options.tokens), top_p=0.95)
    drawn = sample(lm, [alpaca_prompt(t) for t in texts], n, how, seed=options.seed)
    for text, some in zip(texts, drawn, strict=True):
        for trace in some:
            trace.meta["original"] = text
    return drawn


def figures(traces: Sequence[Trace], scorer: ArgumentRewriting, judge: Any) -> dict[str, Any]:
    """R of each trace, the judge's a, and means of what is reported."""
    credits = scorer.score(traces)
    counts = [c.meta["counts"] for c in credits]
    found: dict[str, Any] = {name: float(np.mean([c[name] for c in counts])) for name in FIGURES}
    said = np.where([c["empty"] for c in counts], 0.0, judge([t.text.strip() for t in traces]))
    return found | {"R": np.array([c.reduce() for c in credits]), "judge": said}


def row_of(name: str, found: Mapping[str, Any], ppl: float | None = None) -> str:
    """A line of the table."""
    told = "".join(f"{found[k]:>14.3f}" for k in FIGURES)
    return f"{name:<24}{found['R'].mean():>8.3f}{found['judge'].mean():>10.3f}{told}" + (f"{ppl:>8.0f}" if ppl else "")


HEAD = f"{'':<24}{'R':>8}{'judge a':>10}" + "".join(f"{n:>14}" for n in SHORT) + f"{'ppl':>8}"


def once() -> TextEncoder:
    """MiniLM that computes each text's token vectors once."""
    encoder: Any = TextEncoder()
    encoder.tokens = lru_cache(maxsize=None)(encoder.tokens)
    return encoder


def rerank(options: Options, data: Data, reward: Any, judge: Any) -> dict[str, Any]:
    """Best-of-n against sampling, at all weights; the gain at 0.5/0.5 by text."""
    lm = load("smollm2")
    texts = inappropriate(data.test, options.texts, options.seed, None if options.corpus else 25)
    pools = rewrites(lm, texts, options.samples, options)
    flat = [t for some in pools for t in some]
    originals = [lm.trace("?", t, original=t) for t in texts]
    encoder = once()
    scorer = ArgumentRewriting(classifier=reward, similarity=encoder)
    base = figures(flat, scorer, judge)
    every = [*originals, *flat]
    ppl = dict(zip(map(id, every), perplexities(lm, [t.text.strip() for t in every]), strict=True))
    ppl_of = lambda traces: float(np.median([ppl[id(t)] for t in traces if ppl[id(t)]]))
    print(f"\n{len(texts)} texts, {options.samples} rewrites of each; R at 0.5/0.5, or at the weights named\n{HEAD}")
    print(row_of("original, unchanged", figures(originals, scorer, judge), ppl_of(originals)))
    print(row_of("sampling", base, ppl_of(flat)))
    out: dict[str, Any] = {"sampling": base, "n": len(texts)}
    for w_a in WEIGHTS:
        own = ArgumentRewriting(classifier=reward, similarity=encoder, w_a=w_a, w_s=1 - w_a)
        picked = [some[i] for some, i in zip(pools, best_of(own, pools), strict=True)]
        out[w_a] = figures(picked, own, judge)
        name = f"best of {options.samples}, {w_a:g}/{1 - w_a:g}"
        print(row_of(name, out[w_a], ppl_of(picked)))
    by_text = lambda values: np.array(values).reshape(len(texts), -1).mean(1)
    for key in ("R", "judge"):
        out[f"gain of {key}"] = mean_interval(out[0.5][key] - by_text(base[key]))
    return out


def recipe(scorer: ArgumentRewriting, prompts: int, tokens: int) -> PPO:
    """The paper's PPO (trlX): 128 rollouts, learned from in four passes of minibatches of four."""
    return PPO(
        scorer={"rewriting": scorer},
        kl=KLControl(kl_coef=0.001857),
        gae=GAE(gamma=1.0, lam=0.95, whitening="unbiased"),
        value=ValueLoss(vf_coef=0.2, value_clip=0.2),
        rollouts=Rollouts(
            generations=1,
            inner_epochs=4,
            minibatches=max(1, prompts // 4),
            sampling=Sampling(max_new_tokens=tokens, min_new_tokens=min(10, tokens)),
        ),
    )


def adapted() -> LM:
    """SmolLM2 with the paper's adapter: rank 8, alpha 32 (their dropout of 0.1 is left out)."""
    import torch
    from peft import LoraConfig, get_peft_model

    lm = load("smollm2")
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = get_peft_model(lm.model, config)
    return LM(model, lm.tokenizer, name=lm.name, note=lm.note)


def grouped(lm: LM, texts: Sequence[str]) -> list[Group]:
    """Prompts to learn from."""
    rows = [Example(prompt=alpaca_prompt(t), kind="prompt", row=i, extra={"original": t}) for i, t in enumerate(texts)]
    return [Group(example=e, prompt_ids=lm.encode_prompt(e.prompt)) for e in rows]


def full(options: Options, data: Data, reward: Any, judge: Any) -> None:
    """Three runs; the same test texts before and after."""
    longest = None if options.corpus else 25
    test = inappropriate(data.test, options.judged, options.seed, longest)
    texts = [t for t in inappropriate(data.train, 100_000, options.seed, longest) if t not in set(test)]
    valid, train = texts[:64], texts[64:]
    found: dict[Any, dict[str, Any]] = {}
    plain = ArgumentRewriting(classifier=reward)
    print(HEAD.removesuffix(f"{'ppl':>8}"))
    for w_a in (None, 0.3, 0.5, 0.9):
        lm = adapted()
        if w_a is not None:
            own = ArgumentRewriting(classifier=reward, w_a=w_a, w_s=1 - w_a, level="sequence")
            objective = recipe(own, options.prompts, options.tokens)
            per_batch = objective.rollouts.inner_epochs * objective.rollouts.minibatches
            config = LoopConfig(
                lr=5e-6,
                weight_decay=0.01,
                schedule="constant",
                warmup=0.0,
                batch_size=options.prompts,
                steps=options.batches * per_batch,
                eval_every=100,
                seed=42,
            )
            folder = Path(options.out or tempfile.mkdtemp(prefix="rewriting-")) / f"w_a-{w_a:g}"
            groups = {"groups": grouped(lm, train), "held_out": grouped(lm, valid[: options.prompts])}
            Run(
                slug="ppo",
                objective=objective,
                policy=lm,
                config=config,
                out=folder,
                resolve=catalog.method,
                progress=False,
                **groups,
            ).go()
        traces = [t for (t,) in rewrites(lm, test, 1, options)]
        found[w_a] = figures(traces, plain, judge)
        print(row_of("not tuned" if w_a is None else f"PPO {w_a:g}/{1 - w_a:g}", found[w_a]), flush=True)
    a, s = ([found[w][k] for w in (0.3, 0.5, 0.9)] for k in ("a", "s"))
    gain = float((found[0.5]["R"] - found[None]["R"]).mean())
    checks = {"a rises": a == sorted(set(a)), "s falls": s == sorted(set(s), reverse=True), "gain": gain >= 0.05}
    print(f"gain of R at 0.5: {gain:.3f}; " + ", ".join(f"{k}: {'yes' if v else 'NO'}" for k, v in checks.items()))


def main(options: Options) -> None:
    """Run it and print the tables."""
    data = read(options)
    first, second = halves(data, options.seed)
    reward, judge = fitted(first), fitted(second)
    if options.full:
        return full(options, data, reward, judge)
    scores = {"all training texts": f1_of(fitted(data.train), data.test)}
    scores |= {"first half (reward)": f1_of(reward, data.test), "second half (judge)": f1_of(judge, data.test)}
    scores["all said inappropriate"] = macro_f1([e.inappropriate for e in data.test], [True] * len(data.test))
    if data.whole is not None:
        train, test = data.whole
        scores["comments"] = f1_of(fitted(train), test)
        scores["comments, all said inappropriate"] = macro_f1([e.inappropriate for e in test], [True] * len(test))
    print(
        f"{data.name}: {len(data.train)} training, {len(data.test)} {'dev' if options.dev else 'test'} texts; macro-F1"
    )
    for name, value in scores.items():
        print(f"{name:<36}{value:.3f}")
    found = rerank(options, data, reward, judge)
    gain, low, high = found["gain of R"]
    judged = found["gain of judge"]
    print("\ngain of mean R at 0.5/0.5: {:.3f} ({:.3f} to {:.3f})".format(*found["gain of R"]))
    print("gain of the judge's mean a: {:.3f} ({:.3f} to {:.3f})".format(*judged))
    checks = {f"gain of R >= {GAIN}": gain >= GAIN, "the judge's a rises": judged[0] > 0}
    if options.corpus:
        checks[f"macro-F1 >= {F1}"] = scores["all training texts"] >= F1
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        _save(options, data, scores, found, checks)


def _save(
    options: Options,
    data: Data,
    scores: Mapping[str, float],
    found: Mapping[Any, Any],
    checks: Mapping[str, bool],
) -> None:
    if options.dev or (options.texts, options.samples, options.tokens) != (24, 8, 48):
        raise ValueError("the saved figure is that of the defaults; leave out --dev, --texts, --samples and --tokens")
    gain, base = found["gain of R"], found["sampling"]
    rows = [{"metric": f"macro-F1 of the classifier, {name}", "value": value} for name, value in scores.items()]
    rows.append(
        {
            "metric": "mean a of best of 8 at 0.5/0.5 by the judge, a classifier of the other half",
            "value": float(found[0.5]["judge"].mean()),
            "baseline": "sampling",
            "baseline_value": float(base["judge"].mean()),
            "notes": "gain {:.3f}, 95 % {:.3f} to {:.3f}".format(*found["gain of judge"]),
        }
    )
    for w_a in WEIGHTS:
        for key in FIGURES[:5]:
            rows.append(
                {
                    "metric": f"mean {key} of best of 8 at {w_a:g}/{1 - w_a:g}",
                    "value": found[w_a][key],
                    "baseline": "sampling",
                    "baseline_value": base[key],
                }
            )
    save_result(
        "argument-rewriting",
        metric="mean R = 0.5 a + 0.5 s of the best of 8 rewrites",
        value=float(found[0.5]["R"].mean()),
        interval=None,
        baseline="sampling (mean of the 8)",
        baseline_value=float(base["R"].mean()),
        bound="; ".join(checks),
        reached=all(checks.values()),
        world=f"{data.name}; SmolLM2, {found['n']} texts",
        seeds=[options.seed],
        notes="gain {:.3f}, 95 % by bootstrap over texts {:.3f} to {:.3f}. ".format(*gain)
        + "The Appropriateness Corpus is not in the data: its bound (macro-F1 0.68) and PPO's are not measured."
        * (not options.corpus),
        rows=rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
