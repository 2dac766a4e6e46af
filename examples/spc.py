"""Steering a language model towards positive reviews: SPC against sampling, best-of-n and FUDGE, by another judge.

SmolLM2-135M-Instruct continues hand-written openings of restaurant reviews (as plain text). Verifier: a linear head on
the mean of its token embeddings, trained on labelled sentences about films and products. Judge: logistic regression on
MiniLM embeddings, trained on the sentences about restaurants (all in the folder that PERTOKEN_DATA names); it reads
opening and continuation, and steers nothing. Top-k sampling, the k of all arms: one pool of samples a prompt, as many
as cost what SPC costs in LM tokens, gives the base (all of them), best-of-5 (the verifier picks of each five; the mean
over the fives) and best-of-n (it picks of all). FUDGE: a verifier trained on prefixes, no look-ahead.

Bound: judged positive at least base + 25 points and best-of-5 + 5 points, perplexity under the LM at most 1.3 times
that of top-k sampling. Intervals: bootstrap over prompts.

Chosen beforehand: the verifier's learning rate, by cross-entropy on 400 held-out sentences of its own two domains; on
the openings of `--dev`, the main arm's log-odds times four in logit space, as a verifier that seldom says more than 0.8
tilts little. The other openings were written before any measurement.

Missed, on 40 openings with 4 draws each (judged positive, %): base 56.0, SPC 66.9 (verifier as trained 64.4), FUDGE
59.0, best-of-5 73.8; at SPC's cost, SMC with the verifier as critic 67.5 and best-of-30 87.5. Perplexity x 1.02. (A
first run, 20 of them drawn once: 58, 55, as trained 70.) The verifier calls 89 % of SPC's continuations positive: what
a linear head on mean embeddings is pleased with, token by token, is not what pleases the judge; best-of-5 stays within
what the LM says.

Remedies (`--remedies`), for the verifier and for how hard it steers: a deep verifier, logistic regression on the mean
of what the LM's first ten layers make of the embeddings, alone and averaged with the first one; a verifier that also
learns from the LM's own continuations of other openings, labelled by VADER's lexicon (positive against all others,
without the neutral ones, on prefixes, or a second round with labelled outputs of SPC); other sharpness; four look-ahead
samples; look-ahead to the last token. They are compared on the openings DEV and MORE_DEV. The rule, written before they
were run: the greatest least margin to the two bounds (base + 25; the better of best-of-5 by the remedy's own and by the
first verifier + 5) at a perplexity of at most 1.3 times the base's; of equals the first. The chosen one is measured
once on the reported openings, beside best-of-5 and best-of-n by its own verifier; the main figure stays that of the
setting as it was. Chosen: labels by lexicon, sharpness 4, with 75.0: 19.0 [12.1, 25.7] above the base, 2.9 below its
best-of-5 (77.9). Missed, too, if 8 points above SPC as it was. On the development openings the deep verifier gave next
to nothing (59.2, base 57.7).

    python examples/spc.py            three arms of SPC's rivals and two of its own (three minutes)
    python examples/spc.py --remedies --openings 40 --draws 4    the result; seven minutes on a GPU
    python examples/spc.py --prefixes the third verifier, too
    python examples/spc.py --full     40 prompts, 20 tokens, k = 10, 2 look-ahead samples: half an hour
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from pertoken.core.decode import Drawn, LMGuide
from pertoken.core.embed import TextEncoder
from pertoken.core.lm import LM, load
from pertoken.core.particles import Particles, smc
from pertoken.core.rollout import Sampling, inverse_cdf, sample
from pertoken.core.signals import token_signals
from pertoken.core.trace import Trace
from pertoken.generate.spc import SPC, Verifier, VerifierOptions, train_verifier
from pertoken.results import save_result
from pertoken.score.vader import compound

DEV = (
    "The lady at the counter",
    "My husband had the burger and it",
    "I have been to this diner before and",
    "The tables in the back",
    "We waited for the bill and",
    "The curry I ordered",
    "Their pizza is",
    "The manager told us that",
    "For lunch I had the soup, which",
    "The room where we sat",
)
MORE_DEV = (
    "The burrito I picked up",
    "Our table by the door",
    "The pancakes at this place",
    "I asked the cook about",
    "The wine list",
    "They opened last month and",
    "The drive-through here",
    "My parents took us to dinner and",
    "The salmon on my plate",
    "After we paid, the cashier",
    "The music in the dining room",
    "Our order for delivery",
    "The ramen they serve",
    "I came in for a quick bite and",
    "The cheese on the nachos",
    "We shared a large plate of",
    "The young man who took our order",
    "For my birthday we went there and",
    "The tea they poured",
    "The chef sent out",
)
TRAIN = (
    "The soup of the day",
    "We had lunch at this bistro and",
    "The cook at the grill",
    "I got the sandwich to go and",
    "The fries that came with my meal",
    "Our dinner at the hotel",
    "The people who work here",
    "The lobster",
    "We sat at the bar and",
    "My daughter ordered the noodles and they",
    "The tables were",
    "I had been told about this pizzeria and",
    "The cake we ordered",
    "When we asked for water, the waitress",
    "The prices at this restaurant",
    "The beer selection",
    "The rolls they served",
    "On our last visit, the kitchen",
    "The taste of the chicken",
    "The line was long and",
    "We booked a table for six and",
    "The shrimp",
    "The smell in the room",
    "I would say the food",
)
TEST = (
    "The waiter",
    "We ordered the pasta and it",
    "After waiting for our table, we",
    "The owner came over and",
    "The steak was",
    "I tried the fish and",
    "When the food came, it",
    "The service at this restaurant",
    "My friend had the salad and said that",
    "We went there on a Friday night and",
    "The coffee here",
    "The dessert menu",
    "I will say that the staff",
    "The portions are",
    "Our server",
    "The place itself",
    "The sushi tasted",
    "For the price, the meal",
    "I have eaten here twice and",
    "The breakfast buffet",
    "The bread they brought us",
    "The chicken in my sandwich",
    "It took a while, but our drinks",
    "The menu has",
    "My first visit to this cafe",
    "The tacos at this stand",
    "The hostess led us to a table that",
    "The rice that came with it",
    "We asked for the special and",
    "The noodles were",
    "The bartender",
    "On a second visit, the ribs",
    "The plates on the next table",
    "I called to book and",
    "The sauce on the wings",
    "Their lunch deal",
    "The patio outside",
    "The eggs came",
    "The vegetables on the side",
    "By the time we left, I",
)
LAYERS = 10
"""Of the LM, which the deep verifier reads through."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    full: bool = False
    """40 prompts, 20 tokens, k = 10, 2 look-ahead samples."""
    dev: bool = False
    """The openings for trying things."""
    sharpness: float = 4.0
    """Factor of the verifier's log-odds in the main arm."""
    draws: int = 1
    """Continuations of each opening by each SPC arm; of one, the standard error of 20 openings is eleven points."""
    openings: int = 20
    """How many of the reported openings."""
    prefixes: bool = False
    """Measure SPC with a verifier of prefixes, too."""
    remedies: bool = False
    """Compare the remedies on the development openings, and measure the chosen one."""
    development: int = len(DEV) + len(MORE_DEV)
    """Development openings that remedies are compared on."""
    development_draws: int = 4
    """Continuations of each."""
    minutes: float = 3.5
    """Begin no further remedy after so many; what was not tried is named."""
    seed: int = 0
    save: bool = False
    """Write results/spc.json."""


def read() -> dict[str, tuple[list[str], list[int]]]:
    """Texts and labels by domain.

    Raises:
        ValueError: PERTOKEN_DATA is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds sentiment/sentences.jsonl.gz")
    with gzip.open(Path(folder) / "sentiment" / "sentences.jsonl.gz", "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    out: dict[str, tuple[list[str], list[int]]] = {}
    for row in rows:
        texts, labels = out.setdefault(row["domain"], ([], []))
        texts.append(row["text"])
        labels.append(row["label"])
    return out


class Judge:
    """Logistic regression on MiniLM embeddings; `accuracy` is cross-validated."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_score

        self.encoder = TextEncoder()
        features = self.encoder(texts)
        self.model = LogisticRegression(C=10.0, max_iter=1000)
        self.accuracy = float(cross_val_score(self.model, features, labels, cv=5).mean())
        self.model.fit(features, labels)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Whether each is judged positive."""
        return self.model.predict(self.encoder(texts)) == 1


def picked(lm: LM, verifier: Any, rows: list[list[Trace]]) -> np.ndarray:
    """Which of its traces the verifier likes best, by prompt."""
    words = [[[i for i in t.ids("all") if i not in lm.view.special_ids] for t in row] for row in rows]
    odds = verifier.log_odds([ids for row in words for ids in row]).reshape(len(rows), -1)
    return odds.argmax(1)


def distinct(traces: Sequence[Trace]) -> float:
    """Share of different words among all words of the continuations."""
    words = [w for t in traces for w in t.text.lower().split()]
    return len(set(words)) / max(1, len(words))


def perplexity(traces: Sequence[Trace]) -> float:
    """Of the continuations under the LM, by token."""
    return float(np.exp(-np.concatenate([t.policy_logps for t in traces if t.policy_logps is not None]).mean()))


class TopK:
    """The LM cut to its k likeliest tokens, as a guide."""

    def __init__(self, lm: LM, k: int):
        self.base, self.how = LMGuide(lm=lm), Sampling(top_k=k)
        self.vocabulary, self.start, self.reorder = self.base.vocabulary, self.base.start, self.base.reorder

    def step(self, state: Any, last_ids: Tensor | None) -> Tensor:
        """log p of the k, renormalised."""
        return self.how.logps(self.base.step(state, last_ids))


class Draws:
    """Particles' tokens, drawn from the guide: no increment; being cut off costs nothing."""

    def start(self, n: int) -> None:
        """Nothing is remembered."""

    def step(self, state: None, logw_NV: Tensor, draws: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and zeros."""
        uniform = torch.tensor([g.random() for g in draws], dtype=torch.float64, device=logw_NV.device)
        return inverse_cdf(logw_NV, uniform).cpu().numpy(), np.zeros(len(draws))

    def end(self, state: None, logw_NV: Tensor) -> np.ndarray:
        """Zeros."""
        return np.zeros(len(logw_NV))

    def reorder(self, state: None, index: Sequence[int]) -> None:
        """Nothing to reorder."""


def particles(
    lm: LM, verifier: Verifier, prompts: Sequence[str], k: int, n: int, tokens: int, seed: int
) -> list[Trace]:
    """SMC with the verifier as a critic: n particles of top-k sampling, log phi of all text so far as the twist; one
    particle of the last weights a prompt."""
    how, out = Particles(particles=n, max_tokens=tokens), []
    for place, prompt in enumerate(prompts):
        ids = lm.encode_prompt(prompt)
        before = [i for i in ids if i not in lm.view.special_ids]

        def critic(some: list[list[int]], _: list[bool], before: list[int] = before) -> np.ndarray:
            return -np.logaddexp(0, -verifier.log_odds([[*before, *row] for row in some]))

        found = smc(TopK(lm, k), ids, Draws(), how, stops=sorted(lm.stop_ids), seed=seed, place=place, critic=critic)
        chosen = np.random.default_rng([seed, place]).choice(n, p=found.weights())
        ended = len(found.tokens[chosen]) < tokens
        out.append(lm.trace_of_ids(ids, [*found.tokens[chosen], *[lm.terminator] * ended], ended=ended))
    known = [s["logp"] for s in token_signals(lm, out, ("logp",))]
    return [dataclasses.replace(t, policy_logps=logp) for t, logp in zip(out, known, strict=True)]


def bootstrap(values: np.ndarray, seed: int = 0) -> list[float]:
    """95 % interval of the mean over prompts."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (10_000, len(values)))].mean(1)
    return [float(q) for q in np.quantile(means, (0.025, 0.975))]


class Deep:
    """A verifier that reads in context: the mean over a text's tokens of what the first layers of the LM make of their
    embeddings, and logistic regression on it.

    The LM's BOS stands before each text and is not pooled: the first position of a language model is a sink.
    """

    def __init__(self, lm: LM, texts: Sequence[str], labels: Sequence[int], layers: int = LAYERS):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_score

        base = lm.causal.base_model
        self.model = copy.copy(base)  # shares its weights; only the list of layers is its own
        self.model._modules = dict(base._modules)
        self.model.layers = torch.nn.ModuleList(base.layers[:layers])
        self.model.config = copy.deepcopy(base.config)
        self.model.config.num_hidden_layers = layers
        self.fingerprint, self.sharpness = lm.view.fingerprint, torch.tensor(1.0, device=lm.device)
        self.embedding = lm.causal.get_input_embeddings().weight.detach()
        self.start = self.embedding[lm.tokenizer.bos_token_id][None, None]
        rows = [lm.view.pieces_of_text(text)[0][:128] for text in texts]
        with torch.no_grad():
            seen = [self.pooled(*self.read(rows[i : i + 64])).double().cpu() for i in range(0, len(rows), 64)]
        x = torch.cat(seen).numpy()
        mean, spread = x.mean(0), x.std(0)
        x = (x - mean) / spread
        ways = [LogisticRegression(C=c, max_iter=500) for c in (1e-3, 1e-2, 1e-1)]
        held = [cross_val_score(w, x, labels, cv=5, scoring="neg_log_loss").mean() for w in ways]
        found = ways[int(np.argmax(held))].fit(x, labels)
        weight = found.coef_[0] / spread
        self.weight = torch.tensor(weight, dtype=torch.float32, device=lm.device)
        self.bias = float(found.intercept_[0] - mean @ weight)

    def read(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Embeddings (N, T, d) and mask (N, T) of id rows, padded on the right."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(row), dtype=torch.long) for row in rows], True)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
        return self.embedding[ids.to(self.embedding.device)], mask.to(self.embedding.device)

    def pooled(self, embeds_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """Features (N, d)."""
        whole = torch.cat([self.start.expand(len(embeds_NTD), 1, -1), embeds_NTD], 1)
        mask = torch.nn.functional.pad(mask_NT, (1, 0), value=True)
        hidden = self.model(inputs_embeds=whole, attention_mask=mask.long(), use_cache=False).last_hidden_state[:, 1:]
        count = mask_NT.sum(1, keepdim=True).clamp(min=1)
        return torch.where(mask_NT[..., None], hidden, 0.0).sum(1) / count

    def __call__(self, embeds_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """Log-odds (N,)."""
        return (self.pooled(embeds_NTD, mask_NT) @ self.weight + self.bias) * self.sharpness

    @torch.no_grad()
    def log_odds(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-odds (N,) of ids."""
        parts = [self(*self.read(rows[i : i + 128])).double().cpu().numpy() for i in range(0, len(rows), 128)]
        return np.concatenate(parts) if parts else np.zeros(0)


class Both:
    """The mean log-odds of two verifiers."""

    def __init__(self, first: Any, second: Any):
        self.parts, self.fingerprint, self.embedding = (first, second), first.fingerprint, first.embedding

    def __call__(self, embeds_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """Log-odds (N,)."""
        return (self.parts[0](embeds_NTD, mask_NT) + self.parts[1](embeds_NTD, mask_NT)) / 2

    def log_odds(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-odds (N,) of ids."""
        return (self.parts[0].log_odds(rows) + self.parts[1].log_odds(rows)) / 2


def steered(
    lm: LM,
    verifier: Verifier | Deep | Both,
    sharpness: float,
    prompts: Sequence[str],
    tokens: int,
    n: int,
    seed: int,
    **how: Any,
) -> list[list[Drawn]]:
    """n continuations by SPC, the verifier's log-odds times `sharpness` meanwhile."""
    parts = verifier.parts if isinstance(verifier, Both) else (verifier,)
    for part in parts:
        part.sharpness.fill_(sharpness)
    space = "probability" if sharpness == 1 else "logit"
    drawn = SPC(verifier=verifier, space=space, **how).generate(
        lm, prompts, n=n, sampling=Sampling(max_new_tokens=tokens), seed=seed
    )
    for part in parts:
        part.sharpness.fill_(1.0)
    return drawn


def labelled(lm: LM, sentences: Sequence[str], tokens: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Continuations of the LM with their openings, and VADER's compound of each."""
    rng, openings = np.random.default_rng((seed, 9)), []
    for i in rng.permutation(len(sentences)):
        words = sentences[i].split()
        if len(words) >= 6:
            openings.append(" ".join(words[: int(rng.integers(2, 6))]))
        if len(openings) == SOURCES:
            break
    how = Sampling(max_new_tokens=tokens, top_k=20)
    rows = [
        *sample(lm, openings, 2, how, seed=seed + 7, batch=128),
        *sample(lm, TRAIN, 20, how, seed=seed + 8, batch=160),
    ]
    texts = [f"{o}{t.text}" for o, row in zip([*openings, *TRAIN], rows, strict=True) for t in row]
    return texts, np.array([compound(text) for text in texts])


SOURCES = 300
"""Openings that are first words of sentences about films and products."""
TRIALS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "as it is": ("first", 4.0, {}),
    "deep": ("deep", 1.0, {}),
    "deep, sharpness 4": ("deep", 4.0, {}),
    "labels by lexicon, sharpness 4": ("lexicon", 4.0, {}),
    "mean of first and deep, sharpness 4": ("both", 4.0, {}),
    "deep, sharpness 4, look to the end": ("deep", 4.0, {"lookahead": 19}),
    "labels by lexicon, second round, sharpness 4": ("second", 4.0, {}),
    "deep, sharpness 8": ("deep", 8.0, {}),
    "deep, sharpness 4, four samples": ("deep", 4.0, {"samples": 4}),
    "labels by lexicon, no neutral texts, sharpness 8": ("polar", 8.0, {}),
    "labels by lexicon, prefixes, sharpness 8": ("prefixes", 8.0, {}),
}
"""Verifier, sharpness, options of SPC beside those of the main arm."""


class Makers:
    """The verifiers of the remedies, each trained when it is first asked for."""

    def __init__(self, lm: LM, first: Verifier, texts: list[str], labels: list[int], common: dict[str, Any], seed: int):
        self.lm, self.seed, self.old = lm, seed, (texts, labels)
        self.known: dict[str, Any] = {"first": first}
        self.tokens, self.how = common["tokens"], {name: x for name, x in common.items() if name != "tokens"}
        began = time.perf_counter()
        self.new, self.score = labelled(lm, texts, self.tokens, seed)
        print(
            f"{len(self.new)} continuations labelled: {(self.score > POSITIVE).mean():.2f} positive, "
            f"{(self.score < -POSITIVE).mean():.2f} negative ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )

    def __call__(self, name: str) -> Verifier | Deep | Both:
        """By name."""
        began = time.perf_counter()
        if name == "both":
            return Both(self("first"), self("deep"))
        if name == "deep" and name not in self.known:
            self.known[name] = Deep(self.lm, *self.old)
            print(f"  verifier deep: {time.perf_counter() - began:.0f} s", flush=True)
        if name not in self.known:
            if name == "second":  # what the first round's verifier is pleased with, labelled
                drawn = steered(self.lm, self("lexicon"), 4.0, TRAIN, self.tokens, 8, self.seed + 9, **self.how)
                more = [f"{o}{d.trace.text}" for o, row in zip(TRAIN, drawn, strict=True) for d in row]
                self.new = [*self.new, *more]
                self.score = np.array([*self.score, *map(compound, more)])
            keep = np.abs(self.score) > POSITIVE if name == "polar" else np.ones(len(self.new), bool)
            texts = [*self.old[0], *(t for t, k in zip(self.new, keep, strict=True) if k)]
            labels = [*self.old[1], *(int(s > POSITIVE) for s in self.score[keep])]
            how = {
                "prefixes": VerifierOptions(prefixes=True),
            }.get(name, VerifierOptions())
            self.known[name] = train_verifier(self.lm, texts, labels, how, seed=self.seed)
            print(f"  verifier {name}: {time.perf_counter() - began:.0f} s", flush=True)
        return self.known[name]


POSITIVE = 0.3
"""VADER's compound above which a text is positive."""


def remedied(
    lm: LM, make: Makers, judge: Judge, options: Options, prompts: Sequence[str], pool: list[list[Trace]], common: Any
) -> list[dict[str, Any]]:
    """Remedies compared on development openings; the chosen one measured once on the reported ones.

    Args:
        pool: top-k samples of the reported openings. common: tokens, and SPC's options.
    """
    began, tokens = time.perf_counter(), common["tokens"]
    settings = {name: value for name, value in common.items() if name != "tokens"}
    development = [*DEV, *MORE_DEV][: options.development]
    how = Sampling(max_new_tokens=tokens, top_k=settings["candidates"])
    tries = sample(lm, development, 10, how, seed=options.seed + 11, batch=160)

    def good(openings: Sequence[str], rows: list[list[Trace]]) -> np.ndarray:
        whole = [f"{p}{t.text}" for p, row in zip(openings, rows, strict=True) for t in row]
        return judge(whole).reshape(len(openings), -1).mean(1)

    def best(verifier: Any, rows: list[list[Trace]], n: int) -> list[list[Trace]]:
        groups = [[row[i : i + n] for row in rows] for i in range(0, len(rows[0]) - n + 1, n)]
        picks = np.stack([picked(lm, verifier, group) for group in groups], 1)
        return [[group[i][j] for group, j in zip(groups, row, strict=True)] for i, row in enumerate(picks)]

    base, usual = 100 * good(development, tries).mean(), perplexity([t for row in tries for t in row])
    first_five = 100 * good(development, best(make("first"), tries, 5)).mean()
    print(f"development openings ({len(development)}): base {base:.1f}, perplexity {usual:.2f}", flush=True)
    margins: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, (which, sharpness, more) in TRIALS.items():
        if time.perf_counter() - began > 60 * options.minutes:
            print(f"  {name}: not tried, {options.minutes:g} minutes are over", flush=True)
            continue
        verifier, start = make(which), time.perf_counter()
        drawn = steered(
            lm, verifier, sharpness, development, tokens, options.development_draws, options.seed, **settings | more
        )
        traces = [[d.trace for d in row] for row in drawn]
        each, ratio = 100 * good(development, traces), perplexity([t for row in traces for t in row]) / usual
        five = 100 * good(development, best(verifier, tries, 5)).mean()
        share, error = float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5)
        margins[name] = min(share - base - 25, share - max(five, first_five) - 5) if ratio <= 1.3 else -np.inf
        told = f"best of 5 by its verifier {five:.1f} (by the first {first_five:.1f}), perplexity x {ratio:.2f}"
        print(f"  {name:<50}{share:5.1f} +- {error:.1f}; {told} ({time.perf_counter() - start:.0f} s)", flush=True)
        rows.append(
            {
                "metric": f"judged positive (%) on {len(development)} development openings: remedy, {name}",
                "value": share,
                "baseline": f"top-{settings['candidates']} sampling",
                "baseline_value": float(base),
                "notes": told,
            }
        )
    fit = [n for n in margins if n != "as it is"]
    if not fit:
        return rows
    chosen = max(fit, key=lambda n: margins[n])
    which, sharpness, more = TRIALS[chosen]
    verifier = make(which)
    drawn = steered(lm, verifier, sharpness, prompts, tokens, options.draws, options.seed, **settings | more)
    flat = [d for row in drawn for d in row]
    cost = sum(d.meta["lm_tokens"] for d in flat) / sum(len(d.trace) for d in flat)
    n = len(pool[0])
    arms = {
        f"SPC, remedy chosen on development openings: {chosen}": [[d.trace for d in row] for row in drawn],
        "best of 5 by the remedy's verifier": best(verifier, pool, 5),
        f"best of {n} by the remedy's verifier": best(verifier, pool, n),
    }
    shares = {name: 100 * good(prompts, traces) for name, traces in arms.items()}
    base_each, odd = 100 * good(prompts, pool), perplexity([t for row in pool for t in row])
    ours, five, _ = shares.values()
    by_first = 100 * good(prompts, best(make("first"), pool, 5))
    ratio = perplexity([d.trace for d in flat]) / odd
    over_base, over_five = float((ours - base_each).mean()), float(ours.mean() - max(five.mean(), by_first.mean()))
    reached = over_base >= 25 and over_five >= 5 and ratio <= 1.3
    spans = [f"[{low:.1f}, {high:.1f}]" for low, high in (bootstrap(ours - base_each), bootstrap(ours - five))]
    told = (
        f"over base {over_base:+.1f} {spans[0]}, over its best of 5 {float((ours - five).mean()):+.1f} {spans[1]}, "
        f"over the first verifier's {float((ours - by_first).mean()):+.1f}, perplexity x "
        f"{ratio:.2f}; {cost:.0f} LM tokens a token; bound {'reached' if reached else 'missed'}"
    )
    print(f"\n{len(prompts)} reported openings, {options.draws} draws: {told}", flush=True)
    for name, each in shares.items():
        error = float(each.std(ddof=1) / len(each) ** 0.5)
        print(f"  {name:<90}{each.mean():5.1f} +- {error:.1f}", flush=True)
    return [
        {
            "metric": f"continuations judged positive (%): {name}",
            "value": float(each.mean()),
            "interval": bootstrap(each),
            **({"notes": told} if name.startswith("SPC") else {}),
        }
        for name, each in shares.items()
    ] + rows


def main(options: Options) -> None:
    """Run it and print the table."""
    k, samples, ahead, tokens = (10, 2, 8, 20) if options.full else (5, 1, 8, 16)
    prompts = list(DEV if options.dev else TEST if options.full else TEST[: options.openings])
    data, started = read(), time.perf_counter()
    lm, judge = load("smollm2", template="plain", attention="sdpa"), Judge(*data["restaurant"])
    texts, labels = (data["movie"][i] + data["product"][i] for i in (0, 1))
    phi = train_verifier(lm, texts, labels, seed=options.seed)
    prefix_phi = train_verifier(lm, texts, labels, VerifierOptions(prefixes=True), seed=options.seed)
    third = phi.log_odds([lm.view.pieces_of_text(t)[0] for t in data["restaurant"][0]]) > 0
    transfer = float((third == np.array(data["restaurant"][1])).mean())
    print(
        f"accuracy on restaurants: verifier {transfer:.3f} (other domains), judge {judge.accuracy:.3f} (5 folds); "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )

    how = Sampling(max_new_tokens=tokens, top_k=k)
    plain = Sampling(max_new_tokens=tokens)
    began = time.perf_counter()
    spc = {}
    trials = [("SPC, verifier as trained", phi, 1.0), ("SPC", phi, options.sharpness)]
    trials += [("SPC, verifier of prefixes", prefix_phi, options.sharpness)] if options.prefixes else []
    common: dict[str, Any] = {"candidates": k, "lookahead": ahead, "samples": samples}
    for name, verifier, sharpness in trials:
        spc[name] = steered(lm, verifier, sharpness, prompts, tokens, options.draws, options.seed, **common)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    seconds = (time.perf_counter() - began) / len(trials)
    main_draws = [d for row in spc["SPC"] for d in row]
    spent = sum(d.meta["lm_tokens"] for d in main_draws) / sum(len(d.trace) for d in main_draws)
    n = max(5, round(spent / 5) * 5)
    pool = sample(lm, prompts, n, how, seed=options.seed + 1)
    fudge = SPC(verifier=prefix_phi, candidates=k, lookahead=0, samples=1)
    looked = [[d.trace for d in row] for row in fudge.generate(lm, prompts, n=5, sampling=plain, seed=options.seed + 2)]
    phi.sharpness.fill_(options.sharpness)
    smc_drawn = particles(lm, phi, prompts, k, n, tokens, options.seed + 3)
    phi.sharpness.fill_(1.0)
    print(f"rivals drawn: {time.perf_counter() - began:.0f} s", flush=True)
    groups = [[row[i : i + 5] for row in pool] for i in range(0, n, 5)]
    best_PG = np.stack([picked(lm, phi, group) for group in groups], 1)
    fives = [[group[i][j] for group, j in zip(groups, row, strict=True)] for i, row in enumerate(best_PG)]
    arms: dict[str, list[list[Trace]]] = {
        f"top-{k} sampling": pool,
        "best of 5": fives,
        f"best of {n} (equal LM tokens)": [[row[j]] for row, j in zip(pool, picked(lm, phi, pool), strict=True)],
        f"SMC, verifier as critic, {n} particles (equal LM tokens)": [[t] for t in smc_drawn],
        "FUDGE": looked,
        **{name: [[d.trace for d in row] for row in drawn] for name, drawn in spc.items()},
    }

    figures: dict[str, dict[str, Any]] = {}
    print(f"\n{len(prompts)} prompts, judged positive (%) with the opening and alone")
    print(f"{'':<58}{'positive':>9}{'+-':>6}{'alone':>8}{'verifier':>9}{'perplexity':>11}{'distinct-1':>11}")
    for name, rows in arms.items():
        flat = [t for row in rows for t in row]
        whole = [f"{p}{t.text}" for p, row in zip(prompts, rows, strict=True) for t in row]
        odds = phi.log_odds([[i for i in t.ids("all") if i not in lm.view.special_ids] for t in flat])
        good = judge(whole).reshape(len(prompts), -1).mean(1)
        alone = float(judge([t.text for t in flat]).mean())
        figures[name] = {"good": good, "share": 100 * float(good.mean()), "alone": 100 * alone, "ppl": perplexity(flat)}
        figures[name] |= {"verifier": 100 * float((odds > 0).mean()), "distinct": distinct([row[0] for row in rows])}
        f = figures[name]
        error = 100 * float(good.std(ddof=1)) / len(good) ** 0.5
        print(
            f"{name:<58}{f['share']:9.1f}{error:6.1f}{f['alone']:8.1f}{f['verifier']:9.1f}{f['ppl']:11.2f}{f['distinct']:11.3f}"
        )
    base, five, ours = figures[f"top-{k} sampling"], figures["best of 5"], figures["SPC"]
    over_base, over_five = ours["share"] - base["share"], ours["share"] - five["share"]
    interval = bootstrap(100 * (ours["good"] - base["good"]))
    interval_five = bootstrap(100 * (ours["good"] - five["good"]))
    ratio = ours["ppl"] / base["ppl"]
    clipped = sum(d.meta["clipped"] for d in main_draws) / sum(d.meta["estimates"] for d in main_draws)
    reached = over_base >= 25 and over_five >= 5 and ratio <= 1.3
    print(
        f"\nover base {over_base:+.1f} [{interval[0]:.1f}, {interval[1]:.1f}], over best of 5 {over_five:+.1f} "
        f"[{interval_five[0]:.1f}, {interval_five[1]:.1f}], perplexity x {ratio:.2f}; bound reached: {reached}\n"
        f"{clipped:.3f} of the estimates clipped; {spent:.0f} LM tokens a token drawn; {seconds:.0f} s"
    )
    for p, (d, *_) in list(zip(prompts, spc["SPC"], strict=True))[:6]:
        print(f"  {p} |{d.trace.text!r}")

    def save(more: list[dict[str, Any]]) -> None:
        if not options.save:
            return
        save_result(
            "spc",
            metric="continuations judged positive (%)",
            value=ours["share"],
            interval=bootstrap(100 * ours["good"]),
            baseline=f"top-{k} sampling",
            baseline_value=base["share"],
            bound="at least base + 25 points and best-of-5 + 5 points, perplexity at most 1.3 x",
            reached=reached,
            world=f"SmolLM2-135M-Instruct, {len(prompts)} restaurant openings, {options.draws} x {tokens} new tokens",
            seeds=[options.seed],
            notes=f"Over base {over_base:+.1f} [{interval[0]:.1f}, {interval[1]:.1f}], over best of 5 {over_five:+.1f} "
            f"[{interval_five[0]:.1f}, {interval_five[1]:.1f}] points (bootstrap over prompts); perplexity x "
            f"{ratio:.2f}; {clipped:.3f} of the estimates clipped. The judge's accuracy on its domain (5 folds): "
            f"{judge.accuracy:.3f}; verifier there {transfer:.3f}.",
            rows=[
                {
                    "metric": f"continuations judged positive (%): {name}",
                    "value": f["share"],
                    "interval": bootstrap(100 * f["good"]),
                    "notes": f"perplexity {f['ppl']:.2f}, distinct-1 {f['distinct']:.3f}, verifier-positive "
                    f"{f['verifier']:.1f} %, the continuation alone judged positive {f['alone']:.1f} %",
                }
                for name, f in figures.items()
                if name != "SPC"
            ]
            + more,
        )

    save([])
    if options.remedies:
        common |= {"tokens": tokens}
        make = Makers(lm, phi, texts, labels, common, options.seed)
        save(remedied(lm, make, judge, options, prompts, pool, common))
    print(f"all: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
