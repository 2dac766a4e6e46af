"""All pairwise objectives on real human preferences, side by side: who agrees with held-out human choices?

Data: Anthropic's HH pairs (harmless and helpful) in the folder that PERTOKEN_DATA names, or any pairs by --data (a
file, a folder, a Hub id). Prompts are split once: a fifth is held out. By default the policy is a 4-layer LM of 1M
parameters that is first trained, in about a minute, on the training conversations (both responses, so that it knows
nothing of the preferences); --full takes SmolLM2 and more pairs. Every objective makes the same updates on the same
pairs in the same order; those that want scores get them from a Bradley-Terry head on MiniLM embeddings fitted on the
training pairs, and GPO gets a general preference model fitted likewise.

Accuracy is the share of held-out pairs whose chosen response gained more log-probability than the rejected one did.
What to expect: HH's label noise is large (humans agree on about two thirds of such pairs), the policy is tiny, and the
intervals are wide; a method is better than another here only where their intervals are apart. What came out (two
settings, 24 or 30 updates of 8 pairs): no objective is told apart from chance, nor is the reward model on
sentence embeddings. So few pairs do not teach so small a model what holds for other conversations; the default run
shows that all objectives run on real pairs side by side, and ranks none of them.

    python examples/human_preferences.py          a few minutes
    python examples/human_preferences.py --only dpo tdpo t-reg
    python examples/human_preferences.py --full   SmolLM2 (hours)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pertoken import catalog
from pertoken.comparison import CompareOptions, compare_train, interval
from pertoken.core.data import Example, load_examples, split_by_prompt
from pertoken.core.embed import TextEncoder
from pertoken.core.loop import LoopConfig
from pertoken.core.pairwise import HeadOptions, PairConfig
from pertoken.core.record import write_json
from pertoken.core.rollout import Sampling
from pertoken.results import save_result
from pertoken.score.gpm import GPM
from pertoken.worlds import human

REWARD_MODELS = ("gpm-reward",)  # trains a head to judge with, and no policy
NEED_A_REWARD = "reinforcement"  # the family that learns from scored rollouts, though its data may be pairs


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    data: str = ""
    """Pairs (default: hh_harmless and hh_helpful in the folder that PERTOKEN_DATA names)."""
    only: tuple[str, ...] = ()
    """Methods (default: all of the catalog that learn a policy from pairs)."""
    pairs: int = 480
    """Training pairs."""
    held_out: int = 240
    """Held-out pairs."""
    longest: int = 600
    """Characters of the longest conversation."""
    steps: int = 24
    """Updates of each method."""
    seeds: tuple[int, ...] = (1,)
    full: bool = False
    """SmolLM2 instead of the small LM."""
    out: str = ""
    """Keep the runs and the report here (default: a temporary folder)."""
    save: bool = False
    """Write results/human-preferences.json."""


def words(example: Example, k: int) -> str:
    """The last turn of the prompt and a response, as one text."""
    prompt = example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])
    return f"{prompt}\n{example.responses[k]}"


def read(options: Options) -> tuple[list[Example], list[Example]]:
    """Training and held-out pairs, short ones (`longest` characters at most), split by prompt.

    Raises:
        ValueError: no data named.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not options.data and not folder:
        raise ValueError("no data: set PERTOKEN_DATA, or give --data FILE (or a Hub id such as Anthropic/hh-rlhf)")
    sources = [options.data] if options.data else [f"{folder}/{name}" for name in ("hh_harmless", "hh_helpful")]
    every = [e for source in sources for e in load_examples(source, kind="pair")[0]]
    short = [e for e in every if sum(len(words(e, k)) for k in (0, 1)) + len(str(e.prompt)) <= options.longest]
    train, held_out = split_by_prompt(short, test=0.2, seed=0)
    rng = np.random.default_rng(0)
    pick = lambda some, n: [some[i] for i in rng.permutation(len(some))[:n]]
    return pick(train, options.pairs), pick(held_out, options.held_out)


def judges(train: Sequence[Example], held_out: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, GPM]:
    """Scores (n, 2) of the responses of both sides by a Bradley-Terry head, and a general preference model."""
    encoder = TextEncoder()
    features = [np.stack([encoder([words(e, k) for e in side]) for k in (0, 1)], 1) for side in (train, held_out)]
    flat = features[0].reshape(-1, features[0].shape[-1])
    pairs = np.arange(len(flat)).reshape(-1, 2)
    config = PairConfig(seed=0)
    reward = GPM(head=HeadOptions(form="bt", tau=1.0)).fit_features(flat, pairs, config=config)
    preference = GPM(head=HeadOptions(dim=6), encoder=encoder).fit_features(flat, pairs, config=config)
    score = lambda x: reward.module(_tensor(x))[..., 0].detach().numpy()
    return score(features[0]), score(features[1]), preference


def _tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x)


def write(path: Path, examples: Sequence[Example], scores: np.ndarray, scale: tuple[float, float]) -> str:
    """Examples as a JSON file in TRL's columns, scores on a scale of 1 to 10."""
    ten = np.clip(5.5 + 1.5 * (scores - scale[0]) / scale[1], 1.0, 10.0).round(1)
    rows = []
    for example, (chosen, rejected) in zip(examples, ten.tolist(), strict=True):
        row = {"prompt": example.prompt, "score_chosen": chosen, "score_rejected": rejected}
        sides = example.responses
        if not isinstance(example.prompt, str):
            sides = tuple([{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in sides)
        rows.append(row | {"chosen": sides[0], "rejected": sides[1]})
    return str(write_json(path, rows))


def main(options: Options) -> None:
    """Run it and print the table."""
    out = Path(options.out or tempfile.mkdtemp(prefix="human-"))
    train, held_out = read(options)
    scores, held_scores, preference = judges(train, held_out)
    scale = (float(scores.mean()), float(scores.std()))
    data, eval_data = (
        write(out / f"{name}.json", *side, scale)
        for name, side in (("train", (train, scores)), ("test", (held_out, held_scores)))
    )
    model = "smollm2" if options.full else str(human.train_lm(train))
    rows = [m for m in catalog.methods() if m.room == "train" and m.data == "pairs" and m.slug not in REWARD_MODELS]
    rows = [m for m in rows if m.family != NEED_A_REWARD]
    names = options.only or tuple(m.slug for m in rows)
    settings = {"gpo": {"scorer": preference, "rounds": 1, "samples": 3, "sampling": Sampling(max_new_tokens=24)}}
    found = compare_train(
        names,
        CompareOptions(
            data=data,
            eval_data=eval_data,
            model=model,
            out=str(out / "compare"),
            seeds=options.seeds,
            samples=32,
            loop=LoopConfig(lr=2e-5 if options.full else 5e-4, batch_size=8, steps=options.steps),
        ),
        settings,
        say=print,
    )
    longer = np.mean([len(e.responses[0]) > len(e.responses[1]) for e in held_out])
    print(f"\n{len(train)} training pairs, {len(held_out)} held-out pairs; {model}; seeds {options.seeds}")
    print(f"{'(the longer response)':<24}{longer:9.3f}")
    print(f"{'(reward model, MiniLM)':<24}{float(np.mean(held_scores[:, 0] > held_scores[:, 1])):9.3f}")
    print(f"{'method':<24}{'accuracy':>9}   95 % interval   {'KL':>6}{'updates':>9}{'seconds':>9}")
    table = {}
    for name in names:
        some = [o for o in found.outcomes if o.arm == name]
        accuracy, kl = (interval([o.figures.get(key) for o in some]) for key in ("correct", "kl"))
        assert accuracy is not None and kl is not None
        table[name] = accuracy
        spent = some[0].record
        print(
            f"{name:<24}{accuracy.value:9.3f}   {accuracy.low:.3f} to {accuracy.high:.3f}  {kl.value:6.2f}"
            f"{spent['updates']:9d}{spent['seconds']:9.1f}"
        )
    print(f"report: {found.report}")
    if options.save:
        best = max(table, key=lambda name: table[name].value)
        save_result(
            "human-preferences",
            metric=f"accuracy on held-out human pairs, the best of {len(table)} objectives ({best})",
            value=table[best].value,
            interval=(table[best].low, table[best].high),
            baseline="dpo",
            baseline_value=table["dpo"].value if "dpo" in table else None,
            bound="",
            reached=None,
            world=f"HH pairs (harmless and helpful), {'SmolLM2' if options.full else 'a 1M-parameter LM of its own'}",
            seeds=options.seeds,
            notes="No bound is set. The best of many is an optimistic figure: read the intervals of all rows. "
            "Interval: bootstrap over held-out pairs with one seed, Student-t over seeds with more.",
            rows=[
                {"metric": f"accuracy on held-out human pairs, {name}", "value": v.value, "interval": [v.low, v.high]}
                for name, v in table.items()
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
