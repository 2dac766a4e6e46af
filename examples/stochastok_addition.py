"""Does splitting tokens at random teach sums? 3-digit addition from scratch, with and without StochasTok.

"$a+b=", then the digits of the sum, last one first, and "$". A number of up to three digits is one token. Three arms
learn the same problems in the same order (a small Llama, loss on the answer): in those tokens; in the same tokens split
at random, p = 1 on blocks of 1,000 ids, once, as the release does; in single digits. Measured are the steps until 90 %
of 1,000 held-out problems (no arm learns their pairs, in either order) are right to the last digit, asked in ordinary
tokens and answered greedily in any. An arm stops there, or after --steps. Also: the share that is right when the same
problems are asked in single digits, which the first arm never saw.

Bound: StochasTok needs at most half of the steps that ordinary tokens need (where these never get there: half of
--steps). Rate, width and batch were not searched for.

Missed by the rule: StochasTok was there after 3,200 steps (0.15 after 2,800, then 0.97), single digits after 1,200;
ordinary tokens had 0.757 after 4,089, where --minutes 2 cut them off on a shared GPU: 0.78 of their steps, and the
baseline not there yet. Asked in digits: ordinary tokens 0.00, StochasTok 0.99, single digits 0.90. Two digits on
another seed (the last command): ordinary tokens 0.20, StochasTok 0.74 (in digits 0.84), single digits 0.96.

    python examples/stochastok_addition.py                minutes on a GPU
    python examples/stochastok_addition.py --minutes 2    the result
    python examples/stochastok_addition.py --digits 2 --layers 2 --width 64 --pool 8000 --held-out 300 --batch 128 \\
        --steps 1600 --learning-rate 2e-3 --seeds 7    five minutes on a core
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro

from pertoken.results import save_result
from pertoken.tokenize.stochastok import StochasTok
from pertoken.worlds import langgame

ARMS = {"ordinary tokens": None, "stochastok": StochasTok(proportion=1.0), "single digits": None}
BLOCK, GOAL = 1000, 0.9


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1,)
    digits: int = 3
    layers: int = 4
    width: int = 256
    pool: int = 300_000
    """Problems that are learned, again and again."""
    batch: int = 512
    steps: int = 12_000
    """An arm's most."""
    minutes: float = 0.0
    """An arm's most, if it is not 0: the steps until then count, so that a slow baseline looks better, not worse."""
    every: int = 200
    """Steps between two looks at the held-out problems."""
    held_out: int = 1000
    learning_rate: float = 1e-3
    device: str = ""
    """Default: cuda if there is one."""
    save: bool = False
    """Write results/stochastok-addition.json."""


def tokenizer(longest: int) -> Any:
    """A byte-level BPE: every number of up to `longest` digits is one token; <pad>, <bos>, <eos> are 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = [f"{i:0{n}d}" for n in range(1, longest + 1) for i in range(10**n)]
    specials = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {word: i for i, word in enumerate([*specials, "$", "+", "=", *numbers])}
    core = Tokenizer(models.BPE(vocabulary, [(word[:-1], word[-1]) for word in numbers if len(word) > 1]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def problems(n: int, held_out: int, digits: int, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Problems to learn, and held-out ones of other pairs."""
    drawn = list(dict.fromkeys(langgame.additions(4 * (n + held_out), digits, seed)))
    numbers = lambda asked: frozenset(asked.strip("$=").split("+"))
    judged = drawn[:held_out]
    kept = {numbers(asked) for asked, _ in judged}
    learned = [one for one in drawn[held_out:] if numbers(one[0]) not in kept][:n]
    return learned, judged


def rows(some: list[tuple[str, str]], words: Any, arm: StochasTok | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (N, L), padded on the right with 0, and which of them are of the answer."""
    cut: list[list[int]] = words([f"{asked}{answer}$" for asked, answer in some])["input_ids"]
    equals = words.convert_tokens_to_ids("=")
    answers = [[False] * (row.index(equals) + 1) + [True] * (len(row) - row.index(equals) - 1) for row in cut]
    if arm is not None:
        out, marks, start = [], [], 0
        while start < len(cut):
            end, size = start, 0
            while end < len(cut) and size < BLOCK:
                size += len(cut[end])
                end += 1
            flat = [i for row in cut[start:end] for i in row]
            place = [(k, a) for k in range(start, end) for a in answers[k]]
            made: dict[int, tuple[list[int], list[bool]]] = {k: ([], []) for k in range(start, end)}
            for token, origin in zip(*arm.expand(flat, words, start), strict=True):
                k, a = place[origin]
                made[k][0].append(token)
                made[k][1].append(a)
            out += [made[k][0] for k in range(start, end)]
            marks += [made[k][1] for k in range(start, end)]
            start = end
        cut, answers = out, marks
    pad: Any = lambda table, dtype: torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=dtype) for row in table], batch_first=True
    )
    return pad(cut, torch.long), pad(answers, torch.bool)


@torch.no_grad()
def exact(model: Any, words: Any, some: list[tuple[str, str]], longest: int, single: bool = False) -> float:
    """Share of problems whose greedy answer is right up to its "$"; `single`: asked digit by digit."""
    by_length: dict[int, list[tuple[list[int], str]]] = {}
    for asked, answer in some:
        ids = [words.convert_tokens_to_ids(c) for c in asked] if single else words(asked)["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, answer))
    right, table = 0, words.convert_ids_to_tokens(range(len(words)))
    model.eval()
    for length, part in by_length.items():
        ids = torch.tensor([row for row, _ in part], device=model.device)
        for _ in range(longest + 1):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        for row, (_, answer) in zip(ids[:, length:].tolist(), part, strict=True):
            right += "".join(table[i] for i in row).partition("$")[:2] == (answer, "$")
    model.train()
    return right / len(some)


def learned(
    name: str, some: list[tuple[str, str]], judged: list[tuple[str, str]], options: Options, seed: int, device: str
) -> tuple[int, float, float, float]:
    """Steps, to the goal or to the end of the budget; exact match then, also asked in digits; tokens a problem."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(1 if name == "single digits" else options.digits)
    ids_NL, answer_NL = rows(some, words, ARMS[name])
    labels_NL = torch.where(answer_NL, ids_NL, -100).to(device)
    tokens, ids_NL = float((ids_NL > 0).sum() / len(ids_NL)), ids_NL.to(device)
    size = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "vocab_size": len(words)}
    size |= {"num_hidden_layers": options.layers, "num_attention_heads": options.width // 32}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig(**size, **ends, max_position_embeddings=64)).float()
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    rng, order, began = np.random.default_rng([seed, 14]), np.zeros(0, int), time.perf_counter()
    share, late = 0.0, False
    for step in range(1, options.steps + 1):
        optimizer.param_groups[0]["lr"] = options.learning_rate * min(1.0, step / 200)
        if len(order) < options.batch:
            order = np.concatenate([order, rng.permutation(len(some))])
        part, order = torch.from_numpy(order[: options.batch]).to(device), order[options.batch :]
        logits = model(input_ids=ids_NL[part, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_NL[part, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        late = bool(options.minutes) and time.perf_counter() - began > 60 * options.minutes
        if step % options.every == 0 or step == options.steps or late:
            share = exact(model, words, judged, options.digits + 1)
            spent = f"loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s"
            print(f"seed {seed}, {name:<15} step {step:>6}: {share:.3f} right, {spent}", flush=True)
            if share >= GOAL or late:
                break
    apart = exact(model, words, judged, options.digits + 1, single=True)
    return step, share, apart, tokens


def main(options: Options) -> None:
    """Run it and print the table."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, list[tuple[int, float, float, float]]] = {name: [] for name in ARMS}
    for seed in options.seeds:
        some, judged = problems(options.pool, options.held_out, options.digits, seed)
        print(f"{len(some)} problems of {options.digits} digits to learn, {len(judged)} held out; {device}", flush=True)
        for name in ARMS:
            found[name].append(learned(name, some, judged, options, seed, device))
    spent = {name: [step for step, *_ in each] for name, each in found.items()}
    there = {name: all(share >= GOAL for _, share, *_ in each) for name, each in found.items()}
    rest = {name: np.mean([one[1:] for one in each], axis=0) for name, each in found.items()}
    for name, (share, apart, tokens) in rest.items():
        steps = ", ".join(f"{n}" if each >= GOAL else f"not within {n}" for n, each, *_ in found[name])
        print(f"{name:<15} steps to {GOAL:.0%}: {steps}; at the end {share:.3f}, asked in digits {apart:.3f}, "
              f"{tokens:.1f} tokens a problem")  # fmt: skip
    ratios = [a / b for a, b in zip(spent["stochastok"], spent["ordinary tokens"], strict=True)]
    reached = there["stochastok"] and max(ratios) <= 0.5
    print(f"{'reached' if reached else 'MISSED'}: {', '.join(f'{r:.2f}' for r in ratios)} of the steps (bound 0.5)")
    if options.save:
        mean = {name: float(np.mean(each)) for name, each in spent.items()}
        short = [name for name, good in there.items() if not good]
        save_result(
            "stochastok-addition",
            metric=f"steps to {GOAL:.0%} exact match on held-out {options.digits}-digit sums, StochasTok",
            value=mean["stochastok"],
            interval=(min(spent["stochastok"]), max(spent["stochastok"])),
            baseline="the same tokens, never split",
            baseline_value=mean["ordinary tokens"],
            bound="at most half of the steps, in every seed",
            reached=reached,
            world=f"{options.layers} layers x {options.width}, {options.pool} problems, batch {options.batch}",
            seeds=options.seeds,
            notes="interval: least and greatest of the seeds"
            + (f"; not there within their steps, which are counted: {', '.join(short)}" if short else ""),
            rows=[
                {"metric": "steps, single digits", "value": mean["single digits"]},
                *({"metric": f"exact match at the end, {name}", "value": float(r[0])} for name, r in rest.items()),
                *({"metric": f"the same, asked in digits, {name}", "value": float(r[1])} for name, r in rest.items()),
                *({"metric": f"tokens a problem, {name}", "value": float(r[2])} for name, r in rest.items()),
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
