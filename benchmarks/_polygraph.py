"""lm-polygraph's side of `benchmarks/explain.py`, run in an environment of its own, without pertoken.

python benchmarks/_polygraph.py GIVEN.json OUT.json

Its calculators of samples and similarities, and its estimators. Its cross-encoder (not in reach here) is replaced by
the encoder that pertoken uses, which embeds each text of a call once.
"""

import json
import sys
import time

import numpy as np
import torch
from lm_polygraph import WhiteboxModel
from lm_polygraph.estimators.sar import SAR
from lm_polygraph.estimators.sentence_sar import SentenceSAR
from lm_polygraph.estimators.token_sar import TokenSAR
from lm_polygraph.stat_calculators.cross_encoder_similarity import CrossEncoderSimilarityMatrixCalculator
from lm_polygraph.stat_calculators.sample import SamplingGenerationCalculator
from lm_polygraph.utils.generation_parameters import GenerationParameters
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


class Cosines:
    """max(0, cosine) of mean-pooled sentence embeddings, as a cross-encoder is called."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def predict(self, pairs, batch_size=64):
        texts = sorted({str(text) for pair in pairs for text in pair}, key=len)
        vectors = {}
        for start in range(0, len(texts), 64):
            some = texts[start : start + 64]
            given = self.tokenizer(some, padding=True, truncation=True, max_length=256, return_tensors="pt")
            mask = given["attention_mask"][..., None]
            hidden = self.model(**given).last_hidden_state
            mean = torch.where(mask.bool(), hidden, 0.0).sum(1) / mask.sum(1)
            vectors |= dict(zip(some, torch.nn.functional.normalize(mean.double(), dim=-1).numpy(), strict=True))
        return np.array([max(0.0, float(vectors[str(a)] @ vectors[str(b)])) for a, b in pairs])


def scored(stats, calculator, model):
    """SAR, sentSAR and the token SAR of the greedy answers, by question."""
    stats = stats | calculator(stats, stats["input_texts"], model)
    return [estimator(stats) for estimator in (SAR(), SentenceSAR(), TokenSAR())]


def main(given: str, out: str) -> None:
    """Scores of given samples, and the seconds of scoring them and of drawing and scoring others."""
    torch.set_num_threads(1)
    with open(given, encoding="utf8") as file:
        task = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    causal = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()
    model = WhiteboxModel(causal, tokenizer, generation_parameters=GenerationParameters(allow_newlines=True))
    calculator = CrossEncoderSimilarityMatrixCalculator()
    calculator.crossencoder, calculator.crossencoder_setup = Cosines(task["encoder"]), True
    calculator.crossencoder.predict([("warm", "up")])
    draw = SamplingGenerationCalculator(task["answers"])
    table, scoring, whole, tokens = [], [], [], []
    for question in task["questions"]:
        stats = {
            "input_texts": [question["text"]],
            "sample_tokens": [question["tokens"]],
            "sample_texts": [question["answers"]],
            "sample_log_likelihoods": [question["log_likelihoods"]],
            "sample_log_probs": [[sum(row) for row in question["log_likelihoods"]]],
            "greedy_tokens": [question["tokens"][0]],  # one number an answer: that of the first
            "greedy_log_likelihoods": [question["log_likelihoods"][0]],
        }
        begin = time.perf_counter()
        scores = scored(stats, calculator, model)
        scoring.append(time.perf_counter() - begin)
        table.append([float(s[0]) for s in scores])
        torch.manual_seed(task["seed"])
        begin = time.perf_counter()
        drawn = {"input_texts": [question["text"]]} | draw({}, [question["text"]], model, task["max_new_tokens"])
        drawn |= {name: stats[name] for name in ("greedy_tokens", "greedy_log_likelihoods")}
        scored(drawn, calculator, model)
        whole.append(time.perf_counter() - begin)
        tokens.append(sum(map(len, drawn["sample_tokens"][0])))
    with open(out, "w", encoding="utf8") as file:
        json.dump({"scores": table, "scoring": scoring, "whole": whole, "tokens": tokens}, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
