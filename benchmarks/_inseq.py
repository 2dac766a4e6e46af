"""inseq's side of `benchmarks/explain.py`, run in an environment of its own, without pertoken.

python benchmarks/_inseq.py GIVEN.json OUT.json

The parts of its ReAGent are put together as its operator does, with one change: its sampler of replacements needs the
data of a part-of-speech tagger, so replacements are uniform over given ids. What its `attribute` does around them is
not timed.
"""

import json
import sys
import time

import torch
from inseq.attr.feat.ops.reagent_core import (
    AggregateRationalizer,
    DeltaProbImportanceScoreEvaluator,
    TopKStoppingConditionEvaluator,
    UniformTokenReplacer,
)
from inseq.attr.feat.ops.reagent_core.token_sampler import TokenSampler
from transformers import AutoModelForCausalLM


class Uniform(TokenSampler):
    """Any of the given ids."""

    def __init__(self, ids):
        self.ids = torch.tensor(ids)

    def __call__(self, ids, **_):
        return self.ids[torch.randint(len(self.ids), ids.shape)]


def main(given: str, out: str) -> None:
    """Scores, seconds and steps of every prompt of every task."""
    torch.set_num_threads(1)
    with open(given, encoding="utf8") as file:
        tasks = json.load(file)
    found = []
    for task in tasks:
        model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()
        sampler = Uniform(task["pool"])
        # the stop test is made with top_k = 0, too, but never met
        stop = TopKStoppingConditionEvaluator(model, sampler, task["among"], keep_top_n=task["rationale"])
        replacer = UniformTokenReplacer(sampler, task["ratio"])
        evaluator = DeltaProbImportanceScoreEvaluator(model, None, replacer, stop, task["steps"])
        evaluator.tokenizer = type("Silent", (), {"decode": staticmethod(lambda ids: "")})()
        rationalizer = AggregateRationalizer(evaluator, task["probes"], 0, True, task["rationale"])
        torch.manual_seed(task["seed"])
        rows = []
        with torch.no_grad():
            model(torch.tensor([task["prompts"][0]]).repeat(task["probes"], 1))  # warm up
        for ids, target in zip(task["prompts"], task["targets"], strict=True):
            begin = time.perf_counter()
            rationalizer(torch.tensor([ids]), torch.tensor([target]))
            seconds = time.perf_counter() - begin
            stopped = evaluator.stop_mask
            scores = evaluator.importance_score[stopped if stopped.any() else ~stopped].mean(0)
            rows.append({"scores": scores.tolist(), "seconds": seconds, "steps": evaluator.num_steps})
        found.append(rows)
    with open(out, "w", encoding="utf8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
