"""Text2Grad's acceptance figure: rollouts that PPO needs with critiques on their spans, against their sum at the end.

World: the 64-word sentiment language and the 2-layer LM of width 64 trained on it (replies of 24 tokens). The annotator
is a rule: it writes a critique that quotes the language's positive words as good and its negative ones as poor. Two
arms, one code path: Text2Grad with the scores where the critique quotes (span), and with their sum on the last token
(scalar). Same GAE, critic (a linear head on the shared trunk), KL (0.02, the full one, not adapted) and rate (3e-5,
AdamW, constant); batches of 32 rollouts, 4 epochs each.

    python examples/text2grad.py           three seeds at the base rate, and the round trip of spans (three minutes)
    python examples/text2grad.py --sweep   rates of 3 and 10 x base, too, with the first seed (seven minutes)
    python examples/text2grad.py --remedy  the base rate with four updates an epoch, too (ten minutes)
    python examples/text2grad.py --full    SmolLM2 on film prompts with the VADER lexicon as the critic (hours)

Acceptance (specification): rollouts until the moving mean of 3 batches first reaches 80 % of the way from the start to
the best batch mean that either arm attains, span <= 0.85 x scalar, median of 3 seeds (an arm that never gets there
counts as the whole budget), and a final mean (of the last 10 batches) not below the scalar arm's. Not used as a reward,
printed beside: VADER's compound, log-prob under the starting LM, and distinct-2, all on held-out prompts.

Round trip: 200 synthetic critiques (phrases quoted verbatim, or with other case, white space and punctuation) on texts
with accents, emoji, CJK, quotes and brackets; share of the characters inside of quoted phrases whose token has the
phrase's score. >= 99 % for each of three tokenizers.

Missed: the round trip is reached (all characters), the ratio is not: 0.90, 0.75 and 1.00 by seed, median 0.90. What was
learned:
(1) The budget of 60 batches at 3e-5 ends in the middle of the rise: the span arm's mean goes from 0.2 to 1.0, where 22
is possible, and the scalar arm's to 0.7. It passes 80 % in no seed, so each ratio has the whole budget below the line
and is an upper bound; and the best of 120 single batches, whose means scatter by 0.35, is nearer to noise than to the
curve. Seed 2's span arm misses the line itself.
(2) The order of the arms does not depend on that: the span arm ends higher in every seed (median 1.03 and 0.67; held
out 1.20 and 0.78). In an earlier run with --sweep, not in the result, they ended at 10.2 and 4.1 with 3 x the rate, at
21.8 and 14.8 with 10 x, ratio 0.58 (first seed; no bound). VADER, no reward, follows. The log-prob under the start
falls with the score: at 10 x it was 22 sentiment words of 24.
(3) Seed 5, on which the example was made to run, gave 0.72. A longer budget is no remedy: 100 batches with seed 6 are
still in the rise (finals 2.36 and 1.39), ratio 0.92, the scalar arm again beyond the budget.
(4) Nor are more updates (--remedy, four an epoch, as the release's mini-batches of 1 have them): finals 4.1 and 2.0,
held out 4.8 and 2.2, the span arm ahead in every seed, but it passes the line at 0.98, 0.90 and 0.90 of the budget and
the scalar arm in no seed: still in the rise, median 0.90.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from pertoken import catalog
from pertoken.core.bytes import byte_view
from pertoken.core.compare import Arm, Outcome, compare
from pertoken.core.critic import KLControl
from pertoken.core.data import Example, Group
from pertoken.core.experience import Rollouts
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig
from pertoken.core.rollout import Sampling, sample
from pertoken.core.run import completions_stats
from pertoken.core.trace import Trace
from pertoken.results import save_result
from pertoken.score.text2grad_reward import Rule, Text2GradReward, Written
from pertoken.score.text2grad_reward.critique import Quote
from pertoken.score.vader import compound
from pertoken.train.text2grad import Text2Grad
from pertoken.worlds import sentiment
from pertoken.worlds.grammar import GRAMMARS, prompts, train_lm

BASE, SWEEP, BATCH, EPOCHS, LAST, SHARE = 3e-5, (1, 3, 10), 32, 4, 10, 0.8
LEVELS = {"span": "token", "scalar": "sequence"}
CRITIQUES = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (0, 1, 2)
    batches: int = 60
    """Batches of rollouts, an arm: the budget."""
    minibatches: int = 1
    """Updates an epoch."""
    sweep: bool = False
    """The rates 3 and 10 x base, too, with the first seed."""
    remedy: bool = False
    """Base rate with four times the updates, too, every seed."""
    workers: int = 2
    """Runs at a time, one thread each."""
    full: bool = False
    """SmolLM2 in the sentiment world instead of the small language."""
    out: str = ""
    """Keep the runs here (default: a temporary folder)."""
    save: bool = False
    """Write results/text2grad.json."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A policy to start from, prompts, and the rule that criticises."""

    name: str
    base: str
    train: list[Group]
    held_out: list[Group]
    rule: Rule

    def policy(self) -> LM:
        """A fresh copy."""
        return load(self.base, device="cpu", attention="sdpa")


def small() -> World:
    """The 64-word language; its words with a value are what the rule knows."""
    grammar = GRAMMARS["lexicon64"]
    good, poor = (tuple(w for w, v in grammar.lexicon.items() if v * sign > 0) for sign in (1, -1))
    rule = Rule(lexicon="", good=good, poor=poor)
    return _world("64-word language, 2-layer LM", str(train_lm(grammar, progress=False)), prompts(grammar), rule)


def real() -> World:
    """SmolLM2 on film prompts."""
    split = {side: [sentiment.messages(p) for p in some] for side, some in sentiment.prompts().items()}
    return _world("SmolLM2-135M on film prompts", "smollm2", split, Rule())


def _world(name: str, base: str, split: dict[str, list[Any]], rule: Rule) -> World:
    lm, sides = load(base, device="cpu", attention="sdpa"), {}
    for side, some in split.items():
        examples = [
            Example(prompt=p if isinstance(p, str) else tuple(p), kind="prompt", row=i) for i, p in enumerate(some)
        ]
        sides[side] = [Group(example=e, prompt_ids=lm.encode_prompt(p)) for e, p in zip(examples, some, strict=True)]
    return World(name=name, base=base, train=sides["train"], held_out=sides["test"], rule=rule)


@dataclass(frozen=True)
class Judged:
    """Figures of a trained policy on held-out prompts, four replies each."""

    world: World

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        """The rule's score; and what was no reward: VADER's compound, nats a token under the start, distinct-2."""
        drawn = sample(lm, [g.prompt_ids for g in self.world.held_out], 4, SAMPLING, seed=seed)
        traces = [t for some in drawn for t in some]
        scores = [c.reduce() for c in Text2GradReward(rule=self.world.rule).score(traces)]
        logps = completions_stats(reference, traces, frozenset({"logp"}))
        return {
            "score": float(np.mean(scores)),
            "vader": float(np.mean([compound(t.text) for t in traces])),
            "logp": float(np.concatenate([s["logp"] for s in logps]).mean()),
            "distinct-2": distinct2(traces),
        }


SAMPLING = Sampling(max_new_tokens=24)


def distinct2(traces: Sequence[Trace]) -> float:
    """Share of the pairs of neighbouring tokens that differ from all others."""
    pairs = [pair for t in traces for pair in zip(t.completion_ids, t.completion_ids[1:], strict=False)]
    return len(set(pairs)) / len(pairs)


Setting = tuple[float, int]
"""Learning rate, and updates an epoch."""


def run_arm(name: str, setting: Setting, seed: int, options: Options, out: Path) -> Outcome:
    """One arm at one setting with one seed."""
    rate, minibatches = setting
    world = real() if options.full else small()
    objective = Text2Grad(
        scorer={"critique": Text2GradReward(rule=world.rule, level=LEVELS[name])},
        kl=KLControl(kl_coef=0.02),
        rollouts=Rollouts(generations=1, inner_epochs=EPOCHS, minibatches=minibatches, sampling=SAMPLING),
    )
    (outcome,) = compare(
        [Arm(name=f"{name} {rate:g} x {minibatches}", slug="text2grad", objective=objective)],
        world.policy,
        world.train,
        [],
        LoopConfig(
            lr=rate,
            steps=options.batches * EPOCHS * minibatches,
            batch_size=BATCH,
            schedule="constant",
            warmup=0.0,
        ),
        out,
        seeds=(seed,),
        resolve=catalog.method,
        evaluate=Judged(world),
        progress=options.full,
    )
    return outcome


def run_all(settings: Sequence[Setting], options: Options, out: Path) -> dict[Setting, dict[str, list[Outcome]]]:
    """Both arms: at the base rate with every seed, at the others with the first; in several processes."""
    jobs = [
        (name, setting, seed)
        for setting in settings
        for seed in options.seeds[: None if setting[0] == BASE else 1]
        for name in LEVELS
    ]
    if options.workers == 1:
        done = [run_arm(*job, options, out) for job in jobs]
    else:
        with ProcessPoolExecutor(options.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            done = list(pool.map(run_arm, *zip(*jobs, strict=True), [options] * len(jobs), [out] * len(jobs)))
    found: dict[Setting, dict[str, list[Outcome]]] = {key: {name: [] for name in LEVELS} for key in settings}
    for (name, setting, _), outcome in zip(jobs, done, strict=True):
        found[setting][name].append(outcome)
    return found


def curve(outcome: Outcome) -> np.ndarray:
    """Mean rule score of each batch of rollouts."""
    return np.array([r["reward"] for r in outcome.history if "reward" in r])


def reached(curves: dict[str, np.ndarray]) -> dict[str, int]:
    """Batches of each arm until its moving mean of 3 passes 80 % of the way to the best batch of either."""
    start, best = np.mean([c[0] for c in curves.values()]), max(c.max() for c in curves.values())
    out = {}
    for name, c in curves.items():
        moving = np.convolve(c, np.ones(3) / 3, "valid")
        there = np.flatnonzero(moving >= start + SHARE * (best - start))
        out[name] = int(there[0]) + 3 if len(there) else len(c)
    return out


# ---- round trip of spans


def tokenizers() -> dict[str, Any]:
    """A byte-level BPE, and two SentencePiece-like ones with byte fallback, trained on a page of the film prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [p for some in sentiment.prompts().values() for p in some]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>"]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator(texts, trainer)

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=800, special_tokens=specials + raw, show_progress=False)
    )
    llama = Tokenizer(trained.model)  # without the trainer's idea that raw bytes are special tokens
    llama.pre_tokenizer = trained.pre_tokenizer

    words = sorted({w for text in texts for w in text.replace(" ", " ▁").split(" ") if w.isascii()})
    chars = sorted({c for text in texts for c in text if c.isascii() and c != " "} | {"▁"})
    pieces = [(c, -4.0) for c in chars] + [(w, -3.0) for w in words if len(w) > 1]
    vocab = [(t, 0.0) for t in specials] + [(t, -20.0) for t in raw] + pieces
    unigram = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    for core in (llama, unigram):
        core.decoder = decoders.Sequence(undo)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    cores = {"byte-level BPE": byte_level, "SentencePiece BPE": llama, "SentencePiece unigram": unigram}
    return {name: PreTrainedTokenizerFast(tokenizer_object=core, **named) for name, core in cores.items()}


def critique(rng: np.random.Generator) -> tuple[str, list[tuple[int, int, int]], Written]:
    """A text, its quoted spans (characters, sign), and the critique that quotes them."""
    known = [w for some in sentiment.prompts().values() for p in some for w in p.split() if w.isalpha()]
    odd = ["naïve", "café", "Ünlü", "😀", "👩‍👧", "日本の映画", "مرحبا", "l'été", "co-star", "“fine”", "(slow)", "50%"]
    words = [str(rng.choice(odd if rng.random() < 0.25 else known)) for _ in range(int(rng.integers(16, 40)))]
    marks = [
        str(m) for m in rng.choice(["", ",", ".", "!", " —", ":"], len(words), p=[0.7, 0.1, 0.1, 0.04, 0.03, 0.03])
    ]
    text, begins, ends = "", [], []
    for word, mark in zip(words, marks, strict=True):
        text += " " * bool(text)
        begins.append(len(text))
        text += word
        ends.append(len(text))
        text += mark
    cuts = np.sort(rng.choice(np.arange(1, len(words)), 7, replace=False))
    spans, sides = [], {1: [], -1: []}
    for a, b in zip(cuts[::2], cuts[1::2], strict=False):
        start, end, sign = begins[a], ends[min(a + int(rng.integers(1, 5)), b) - 1], int(rng.choice([1, -1]))
        phrase = text[start:end]
        if (
            text.lower().find(phrase.lower()) != start
        ):  # the first occurrence is meant: quote what is said nowhere before
            continue
        if rng.random() < 0.5:  # as a careless writer quotes
            phrase = f"  {phrase.swapcase().replace(' ', '  ').replace(',', '')}. "
        spans.append((start, end, sign))
        sides[sign].append(Quote(phrase))
    return text, spans, Written("Synthetic.", tuple(sides[1]), tuple(sides[-1]))


def round_trip(seed: int = 0) -> dict[str, tuple[float, float]]:
    """Of each tokenizer: share of characters in quoted spans whose token has the span's score, and of the characters
    outside whose token has none. White space and punctuation do not count."""
    out = {}
    for name, tokenizer in tokenizers().items():
        rng = np.random.default_rng(seed)
        right, total = np.zeros(2), np.zeros(2)
        for _ in range(CRITIQUES):
            text, spans, written = critique(rng)
            view = byte_view(tokenizer)
            ids, pieces = view.pieces_of_text(text)
            trace = Trace(
                prompt_ids=(0,),
                prompt_pieces=(b"",),
                completion_ids=ids,
                completion_pieces=pieces,
                tokenizer=view.fingerprint,
            )
            values = Text2GradReward(annotator=lambda *_, w=written: w.to_json()).score([trace])[0].values
            of_byte = np.repeat(np.arange(len(pieces)), [len(p) for p in pieces])  # the token that holds a byte
            want, at = np.zeros(len(text)), 0
            for start, end, sign in spans:
                want[start:end] = sign
            for char, wanted in zip(text, want, strict=True):
                own, at = of_byte[at : at + len(char.encode())], at + len(char.encode())
                if char.isalnum():
                    right[int(wanted == 0)] += bool((values[own] == wanted).all())
                    total[int(wanted == 0)] += 1
        out[name] = (float(right[0] / total[0]), float(right[1] / total[1]))
    return out


def main(options: Options) -> None:
    """Run it and print the tables."""
    out = Path(options.out or tempfile.mkdtemp(prefix="text2grad-"))
    trip = round_trip()
    print(f"round trip of {CRITIQUES} critiques: characters in spans right, characters outside right")
    for name, (inside, outside) in trip.items():
        print(f"  {name:<24}{inside:>9.2%}{outside:>9.2%}")
    world = real() if options.full else small()
    print(f"\n{world.name}; {options.batches} batches of {BATCH} rollouts, {EPOCHS} epochs each; seeds {options.seeds}")
    base = (BASE, options.minibatches)
    settings = [(BASE * k, options.minibatches) for k in (SWEEP if options.sweep else SWEEP[:1])]
    found = run_all([*settings, *([(BASE, 4 * options.minibatches)] if options.remedy else [])], options, out)
    rows, rows_of_ratio = [], []
    for setting, outcomes in found.items():
        named = f"rate {setting[0]:g}" + (f", {setting[1]} updates an epoch" if setting[1] > 1 else "")
        curves = {name: [curve(o) for o in some] for name, some in outcomes.items()}
        need = [reached({n: c[i] for n, c in curves.items()}) for i in range(len(curves["span"]))]
        ratio = [n["span"] / n["scalar"] for n in need]
        print(f"\n{named}: rollouts to 80 %, by seed; ratio {[round(r, 2) for r in ratio]}")
        for name, some in outcomes.items():
            final = [float(c[-LAST:].mean()) for c in curves[name]]
            said = {k: float(np.median([o.figures[k] for o in some])) for k in some[0].figures}
            start, best = (float(np.median([f(c) for c in curves[name]])) for f in (lambda c: c[0], np.max))
            print(
                f"  {name:<8}{[n[name] * BATCH for n in need]!s:<22} start {start:.2f}  final {np.median(final):.2f}"
                f"  best batch {best:.2f}   held out: " + "  ".join(f"{k} {v:.3f}" for k, v in said.items())
            )
            rows.append(
                (setting, name, float(np.median([n[name] for n in need])) * BATCH, float(np.median(final)), said)
            )
        rows_of_ratio.append((named, float(np.median(ratio))))
        if setting == base:
            base_ratio = float(np.median(ratio))
            lowest, highest = min(ratio), max(ratio)
    finals = {name: final for setting, name, _, final, _ in rows if setting == base}
    good = base_ratio <= 0.85 and finals["span"] >= finals["scalar"]
    whole = min(inside for inside, _ in trip.values())
    print(f"\nmedian ratio {base_ratio:.2f} (bound 0.85), final {finals}; {'reached' if good else 'MISSED'}")
    if len(found) > 1:
        for name in LEVELS:
            (rate, k), _, need_, final, _ = max((r for r in rows if r[1] == name), key=lambda r: r[3])
            print(f"{name} at its own best final mean: rate {rate:g} x {k}, {need_:.0f} rollouts, final {final:.2f}")
    if options.save:
        more: list[dict[str, Any]] = [
            {
                "metric": "characters in quoted spans on the right tokens, worst of 3 tokenizers",
                "value": whole,
                "bound": "at least 0.99",
                "reached": whole >= 0.99,
            }
        ]
        more += [{"metric": f"ratio of rollouts, {at} (median)", "value": ratio} for at, ratio in rows_of_ratio]
        for (rate, k), name, need_, final, said in rows:
            at = f"{name}, rate {rate:g}" + (f", {k} updates an epoch" if k > 1 else "")
            more.append({"metric": f"rollouts to 80 %, {at} (median)", "value": need_})
            more.append({"metric": f"final mean rule score, {at}", "value": final})
            more += [{"metric": f"held out {what}, {at}", "value": v} for what, v in said.items()]
        save_result(
            "text2grad",
            metric="rollouts to 80 % of the best mean, span scores / their sum at the end (less is better)",
            value=base_ratio,
            interval=None,
            baseline="scalar PPO",
            baseline_value=1.0,
            bound="at most 0.85, final mean not below the scalar arm's",
            reached=good,
            world=world.name,
            seeds=options.seeds,
            notes=f"median of seeds; by seed from {lowest:.2f} to {highest:.2f}",
            rows=more,
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
