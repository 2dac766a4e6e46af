"""What stands beside the methods of `test_devices` computes on an accelerator what it computes on the CPU, too: whole
runs, readers of merged tokens, models over words, helpers of explainers, encoders."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from pertoken import catalog
from pertoken.bench.charbench import CharBench
from pertoken.core.cache import ArrayCache
from pertoken.core.embed import TextEncoder
from pertoken.core.run import Run
from pertoken.core.signals import prompt_states
from pertoken.explain._prompt_task import Asked
from pertoken.explain.pawn import Signals, Training, fit_pawn, judge
from pertoken.tokenize import _pooled_training as pooled
from pertoken.tokenize.dynamic_tokenization import Draw, DynamicTokenization, Hypernetwork, Index, generate
from pertoken.tokenize.word_pooled import measure
from tests import tiny
from tests.contracts.test_devices import DEVICE, close, on, pytestmark  # noqa: F401
from tests.core import training
from tests.core.test_embed import folder  # noqa: F401
from tests.core.test_run import data
from tests.methods.one_pass import exact_lm
from tests.methods.test_claps import TASK
from tests.methods.test_dynamic_tokenization import large
from tests.methods.test_word_pooled import CODEC, TINY, sharp

WHOLE = DEVICE != "pretend"  # which has neither copies of whole modules nor autocasting
WORDS = [b" ab", b" cd", b" abcdefg"] * 12


def test_a_run(tmp_path):
    """From groups to the record: helper models of preparation, reference log-probs, updates, evaluation, weights."""
    found = []
    for device in ("cpu", DEVICE):
        lm = on(exact_lm(), device)
        groups = data(lm)
        run = Run(
            slug="aligndistil",
            objective=catalog.method("aligndistil")(),
            policy=lm,
            groups=groups[:8],
            held_out=groups[8:],
            config=training.config(),
            out=tmp_path / device,
            resolve=catalog.method,
            cache=ArrayCache(tmp_path / f"cache-{device}"),
            progress=False,
        )
        final = run.go()["final"]
        found.append([final[name] for name in ("loss", "eval_loss")])
    close(*found)


def test_states_of_prompts():
    one, other = (prompt_states(on(tiny.lm(), device), ["So?", "how was the film"], 1) for device in ("cpu", DEVICE))
    close(other, one, 1e-5)


def test_encoders_of_texts(folder, tmp_path):  # noqa: F811
    texts = ["the plot was great", "a friend", "the score " * 60]
    one, other = (
        TextEncoder(folder, cache=ArrayCache(tmp_path / device), device=device)(texts) for device in ("cpu", DEVICE)
    )
    close(other, one, 1e-5)


def test_merged_tokens():
    """Reading and scoring merged tokens, adapting to them, and generation over a large vocabulary of them."""
    found: list[Any] = []
    rows = [tiny.tokenizer().encode(text, add_special_tokens=False) for text in tiny.TEXTS[:3]]
    for device in ("cpu", DEVICE):
        model: Any = tiny.llama()  # its `to` is wrapped in a type that forgets self
        net = Hypernetwork.fresh(model, seed=1, width=16)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.nn.init.normal_(net.leave.weight)
        read = DynamicTokenization(hypernetwork=net.to(device)).on(model.to(device), tiny.tokenizer())
        merged = read.merge(rows)
        words = large(read)
        prompts = [words.encode([0, *rows[0][:3]]), [0]]
        index = Index(words.outputs, words.bias)
        said = generate(read, words, index, prompts, stop=[1], most=8, draw=Draw(temperature=1.5), seed=3)
        nats, hidden = read.nats(rows, merged)[0], read.hidden(merged.rows)[0].detach().cpu()
        losses = read.adapt(rows, steps=2, batch=2)[1] if WHOLE else []
        found.append((said, nats, losses, hidden))
    (a, *one), (b, *other) = found
    assert a == b
    for x, y in zip(one, other, strict=True):
        close(y, x, 1e-4)


def test_words():
    """Models over words and over bytes: training, what is measured, what is written."""
    found = []
    for device in ("cpu", DEVICE):
        model = sharp(copy.deepcopy(TINY.build(CODEC, seed=1))).to(device)
        arm: Any = measure.PooledArm(model, CODEC)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            gpt = sharp(measure.GPT(vocabulary=258, places=40, width=8, layers=1, heads=1, dropout=0.0)).to(device)
        flat: Any = measure.GPTArm(gpt, *measure.byte_pieces())
        here = [a.model.loss(a.batch([WORDS[:4]]).to(device)).item() for a in (arm, flat)]
        told = [measure.measure(a, WORDS[:9], window=4) for a in (arm, flat)]
        written = model.generate(CODEC.encode(WORDS[:2]).to(device), 2).tolist()
        found.append((here, [t.nats for t in told], [t.hits for t in told], written))
        for a in (arm, flat):
            assert pooled.forward_flops(a, WORDS, window=4, batch=2, seed=0, batches=1) > 0
            if WHOLE:  # in bfloat16 there, so that only its running is shown
                assert pooled.train(a, WORDS, steps=2, window=4, batch=2, lr=1e-3, seed=0) == 2
    for x, y in zip(*found, strict=True):
        close(y, x, 1e-6)


def test_a_classification_task():
    one, other = (Asked(on(tiny.lm(), device), TASK).logits([(), (40,), (41, 50)]) for device in ("cpu", DEVICE))
    close(other, one, 1e-4)


def test_a_detector_is_trained():
    rng = np.random.default_rng(0)
    texts = [Signals(rng.normal(size=(n, 5)) + n % 2, rng.normal(size=(n + 1, 8))) for n in (3, 4, 5, 6, 7, 8)]
    labels = [n % 2 == 1 for n in (3, 4, 5, 6, 7, 8)]
    for branch in ("pawn", "metrics", "hidden"):
        made = fit_pawn(texts, labels, Training(epochs=2, batch=3), device=DEVICE, features=8, gates=4, branch=branch)
        logits, weights = judge(made, texts)
        here, same = judge(copy.deepcopy(made).cpu(), texts)
        close(logits, here, 1e-4)
        for a, b in zip(weights, same, strict=True):
            close(a, b, 1e-4)


def test_questions_about_letters():
    questions = CharBench(per_cell=1).items([f"{a}{b}cd" for a in "abcdefgh" for b in "xyz"])[0]
    one, other = (CharBench().choose(on(tiny.lm(), device), questions) for device in ("cpu", DEVICE))
    assert one == other and len(one) == len(questions)
