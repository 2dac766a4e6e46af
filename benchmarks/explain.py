"""ReAGent beside inseq's, and SAR beside lm-polygraph's: the same models, prompts and samples, one thread each.

ReAGent. Converged scores on a small Llama of random weights over 24 letters (600 steps): Spearman's rank
correlation with inseq's. Time on SmolLM2: a fixed number of steps, and the default rule (a probe stops where the target
is among the first three predictions with five tokens kept, tested after every step). Replacements are uniform over the
same ids on both sides, S begins with the same kind of noise.

Where the time goes. inseq makes the stop test in every step, even where it can never be met, and ours does not: that is
half of the 3.1 x of fixed steps. With the stopping rule no probe stops within 15 steps on these prompts, so that both
sides run the same 241 rows, and ours runs none that is thrown away; what is left is the head at one position instead of
all (1.24 x as many multiplications for the peer) and its loops: 1.58 x. The rows of one step share nothing but what
stands before the first replaced token (2.3 of some 15 tokens at ratio 0.3), so 3 x cannot be had with the same draws.

SAR. K = 10 (the peer's default). Of given samples the same scores by both; time of scoring them, and of drawing samples
and scoring them (the time divided by the number of tokens that were drawn). Both use the same encoder.

The peers run in their own environments and exchange files with this; sides take turns: A B A B.

    make peers                                    makes .peers/, then runs the benchmarks
    python benchmarks/explain.py --quick          fewer prompts and steps: does it run?
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from pertoken.core.cache import ArrayCache
from pertoken.core.embed import TextEncoder, minilm_folder
from pertoken.core.lm import LM, embedded_folder, load
from pertoken.core.rollout import Sampling, sample
from pertoken.core.signals import token_signals
from pertoken.explain.reagent import ReAGent, Stop
from pertoken.explain.sar import SAR, minilm_similarity
from pertoken.results import save_result
from pertoken.worlds import planted

HERE = Path(__file__).resolve().parent
INSEQ, POLYGRAPH = "inseq 0.7.1", "lm-polygraph 0.7.0"
PROMPTS = (
    "Listen: the code is apple. We left at noon. Again, the code is",
    "The capital of France is Paris and the capital of Italy is",
    "She opened the door, took off her coat and sat down on the",
)
QUESTIONS = ("What is the capital of France?", "How many days are in 3 weeks?", "Who wrote the play Hamlet?")
INPUTS, LENGTH = 4, 10  # of the small model
PROBES, RATIO, KEPT, AMONG = 8, 0.3, 5, 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    turns: int = 2
    fixed_steps: int = 5
    """Steps of the fixed run on SmolLM2."""
    most_steps: int = 15
    """Most steps with the stopping rule."""
    converged_steps: int = 600
    """Steps on the small model."""
    answers: int = 10
    """K."""
    inseq: str = ".peers/inseq/bin/python"
    polygraph: str = ".peers/polygraph/bin/python"
    seed: int = 0
    quick: bool = False
    """A prompt and a question, few steps, one turn."""
    save: bool = False
    """Write results/explain.json."""


def small_model(folder: Path) -> LM:
    """A Llama of random weights, large enough ones that its predictions are sharp and hang on the input."""
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = planted.tokenizer()
    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        causal = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), initializer_range=0.1, **size)).eval()
    causal.save_pretrained(folder)
    letters.save_pretrained(folder)
    return load(str(folder), template="plain")


def method(task: dict[str, Any]) -> ReAGent:
    """Ours with the peer's settings."""
    stop = Stop(among=task["among"], rationale=task["rationale"], min_steps=0)
    common: dict[str, Any] = {"sampler": "uniform", "init": "uniform", "probes": task["probes"], "ratio": task["ratio"]}
    return ReAGent(max_steps=task["steps"], stop=stop, seed=task["seed"], **common)


def attributions(task: dict[str, Any], lm: LM) -> list[dict[str, Any]]:
    """Our scores and seconds of every prompt of a task."""
    out, ours = [], method(task)
    ours.attribute(lm, task["prompts"][0][:2], task["targets"][0])  # warm up: the pool of replacements
    for number, (ids, target) in enumerate(zip(task["prompts"], task["targets"], strict=True)):
        begin = time.perf_counter()
        found = ours.attribute(lm, ids, target, key=(number,))
        seconds = time.perf_counter() - begin
        out.append({"scores": found["scores"].tolist(), "seconds": seconds, "steps": max(found["steps"])})
    return out


def tasks(options: Options, lm: LM, small: LM, small_folder: Path) -> dict[str, dict[str, Any]]:
    """What both sides attribute. Targets are the models' own greedy tokens."""
    n = 1 if options.quick else len(PROMPTS)
    steps = (2, 4, 200) if options.quick else (options.fixed_steps, options.most_steps, options.converged_steps)
    out = {}
    rng = np.random.default_rng(options.seed)
    for name, of, folder, among, most in (
        ("fixed", lm, embedded_folder(), 0, steps[0]),
        ("stopping", lm, embedded_folder(), AMONG, steps[1]),
        ("converged", small, small_folder, 0, steps[2]),
    ):
        pool = [i for i in range(of.view.size) if i not in of.view.special_ids and of.view.piece(i)]
        prompts = [list(of.encode_completion(text, ended=False)[0]) for text in PROMPTS[:n]]
        if name == "converged":
            prompts = rng.choice(pool, (INPUTS, LENGTH)).tolist()
        with torch.no_grad():
            targets = [int(of.causal(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
        out[name] = {
            "model": str(folder),
            "pool": pool,
            "prompts": prompts,
            "targets": targets,
            "probes": PROBES,
            "ratio": RATIO,
            "rationale": KEPT,
            "among": among,
            "steps": most,
            "seed": options.seed,
        }
    return out


def questions(options: Options, lm: LM) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Sampled answers (without their ends, which the peer leaves out) and their log-probs."""
    asked = [f"Question: {q}\nAnswer:" for q in QUESTIONS[: 1 if options.quick else None]]
    how, out, traces = Sampling(max_new_tokens=16, temperature=1.0), [], []
    for i, text in enumerate(asked):
        drawn = sample(lm, [text], options.answers, how, seed=options.seed + i)[0]
        some = [
            lm.trace_of_ids(t.prompt_ids, t.completion_ids[: len(t) - bool(t.ended)], meta={"prompt": text})
            for t in drawn
            if len(t) - bool(t.ended) > 1
        ]
        logps = token_signals(lm, some, ("logp",))
        out.append(
            {
                "text": text,
                "tokens": [list(t.completion_ids) for t in some],
                "answers": [t.text for t in some],
                "log_likelihoods": [s["logp"].tolist() for s in logps],
            }
        )
        traces.append(some)
    return out, traces


def uncertainties(options: Options, lm: LM, given: list[dict[str, Any]], traces: list[list[Any]]) -> dict[str, Any]:
    """Our scores of given samples and our seconds, as the peer reports them."""
    out: dict[str, list[Any]] = {"scores": [], "scoring": [], "whole": [], "tokens": []}
    with tempfile.TemporaryDirectory() as folder:
        for i, (question, some) in enumerate(zip(given, traces, strict=True)):
            # a shelf of its own for every measurement: nothing is known already
            encoder = TextEncoder(cache=ArrayCache(Path(folder) / f"scored-{i}"))
            ours = SAR(join=" ", answers="alone", similarity=minilm_similarity(encoder))
            surprisals = [-np.array(row) for row in question["log_likelihoods"]]
            begin = time.perf_counter()
            found = ours.question(some, surprisals, ours.similarity)
            out["scoring"].append(time.perf_counter() - begin)
            first = float(found["values"][0].sum())
            out["scores"].append([found["scores"]["sar"], found["scores"]["sentence_sar"], first])
            encoder = TextEncoder(cache=ArrayCache(Path(folder) / f"drawn-{i}"))
            ours = SAR(join=" ", answers="alone", similarity=minilm_similarity(encoder))
            begin = time.perf_counter()
            how = Sampling(max_new_tokens=16, temperature=1.0)
            drawn = sample(lm, [question["text"]], options.answers, how, seed=options.seed)[0]
            ours.question(drawn, [-np.array(t.policy_logps) for t in drawn], ours.similarity)
            out["whole"].append(time.perf_counter() - begin)
            out["tokens"].append(sum(map(len, drawn)))
    return out


def theirs(python: str, script: str, given: Any, folder: str) -> Any:
    """What a peer makes of a task."""
    task, back = Path(folder, "given.json"), Path(folder, "out.json")
    task.write_text(json.dumps(given), "utf8")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([python, str(HERE / script), str(task), str(back)], check=True, env=offline)
    return json.loads(back.read_text("utf8"))


def spearman(a: Any, b: Any) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main(options: Options) -> None:
    """Measure, print, and write the result if asked to."""
    for python in (options.inseq, options.polygraph):
        if not Path(python).exists():
            raise ValueError(f"{python} is not there; `make peers` makes the peers' environments")
    torch.set_num_threads(1)
    lm, turns = load("smollm2", template="plain"), 1 if options.quick else options.turns
    with tempfile.TemporaryDirectory() as folder:
        small_folder = Path(folder, "small")
        small = small_model(small_folder)
        given = tasks(options, lm, small, small_folder)
        asked, traces = questions(options, lm)
        sar_task = {
            "model": str(embedded_folder()),
            "encoder": str(minilm_folder()),
            "answers": options.answers,
            "max_new_tokens": 16,
            "seed": options.seed,
            "questions": asked,
        }
        a: dict[str, list[Any]] = {name: [] for name in (*given, "sar")}
        b: dict[str, list[Any]] = {name: [] for name in (*given, "sar")}
        for turn in range(turns):
            now = {n: t | {"seed": options.seed + turn} for n, t in given.items() if turn == 0 or n != "converged"}
            for name, task in now.items():
                a[name].append(attributions(task, small if name == "converged" else lm))
            for name, rows in zip(now, theirs(options.inseq, "_inseq.py", list(now.values()), folder), strict=True):
                b[name].append(rows)
            a["sar"].append(uncertainties(options, lm, asked, traces))
            b["sar"].append(theirs(options.polygraph, "_polygraph.py", sar_task, folder))
    ratios: dict[str, float] = {}
    for name in given:
        ours, peer = ([row["seconds"] for rows in side[name] for row in rows] for side in (a, b))
        ratios[name] = float(np.median(peer) / np.median(ours))
        steps = [float(np.mean([row["steps"] for rows in side[name] for row in rows])) for side in (a, b)]
        print(
            f"ReAGent, {name:<10} {np.median(ours):8.2f} s, {INSEQ} {np.median(peer):8.2f} s: {ratios[name]:.2f} x"
            f" ({steps[0]:.1f} and {steps[1]:.1f} steps)"
        )
    pairs = zip(a["converged"][0], b["converged"][0], strict=True)
    correlations = [spearman(x["scores"], y["scores"]) for x, y in pairs]
    print(f"rank correlations of converged scores: {np.round(correlations, 3).tolist()}")
    off = np.abs(np.array(a["sar"][0]["scores"]) - np.array(b["sar"][0]["scores"])).max(0)
    print(f"SAR, greatest difference: SAR {off[0]:.1e}, sentSAR {off[1]:.1e}, tokenSAR {off[2]:.1e}")
    for name in ("scoring", "whole"):
        per = [
            [t / (n if name == "whole" else 1) for x in side["sar"] for t, n in zip(x[name], x["tokens"], strict=True)]
            for side in (a, b)
        ]
        ratios[f"SAR, {name}"] = float(np.median(per[1]) / np.median(per[0]))
        unit = "s a token" if name == "whole" else "s a question"
        print(
            f"SAR, {name:<8} {np.median(per[0]):.4f} {unit}, {POLYGRAPH} {np.median(per[1]):.4f}: "
            f"{ratios[f'SAR, {name}']:.2f} x"
        )
    checks = {
        "ReAGent at least 3 x faster, fixed steps": ratios["fixed"] >= 3,
        "ReAGent at least 3 x faster, default stopping rule": ratios["stopping"] >= 3,
        "SAR at least 3 x faster, samples drawn and scored": ratios["SAR, whole"] >= 3,
        "median rank correlation of converged scores at least 0.8": float(np.median(correlations)) >= 0.8,
        "scores of given samples within 1e-4": bool((off <= 1e-4).all()),
    }
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        rows: list[dict[str, Any]] = [
            {"metric": f"time of the peer / ours, {name}", "value": value} for name, value in ratios.items()
        ]
        rows += [
            {"metric": "median rank correlation of converged scores", "value": float(np.median(correlations))},
            {"metric": "least rank correlation of converged scores", "value": float(min(correlations))},
            {"metric": "greatest difference of SAR, sentSAR and tokenSAR of given samples", "value": float(off.max())},
        ]
        slowest = min(ratios[name] for name in ("fixed", "stopping", "SAR, whole"))
        save_result(
            "explain",
            metric="time of the peer / ours, the least of three jobs (more is better)",
            value=slowest,
            interval=None,
            baseline=f"{INSEQ}, {POLYGRAPH}",
            baseline_value=1.0,
            bound="; ".join(checks),
            reached=all(checks.values()),
            world=f"SmolLM2-135M, {len(given['fixed']['prompts'])} prompts, {PROBES} probes; {len(asked)} questions, "
            f"K = {options.answers}; one thread",
            seeds=list(range(options.seed, options.seed + turns)),
            notes=f"Medians of {turns} turns, A B A B; load {os.getloadavg()[0]:.1f}; "
            + "; ".join(f"{c}: {'yes' if g else 'no'}" for c, g in checks.items()),
            rows=rows,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
