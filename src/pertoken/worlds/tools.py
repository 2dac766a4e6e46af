"""Requests and tool calls, and a small model that makes each kind of mistake at a known rate.

Twelve tools of one to three parameters; a request names a tool's purpose and values, three tools are at hand. An answer
is a call as JSON between ToolRL's tags (``form="toolrl"``) or ``name(parameter='value')`` (``form="call"``). The model
has seen answers in which, with probabilities of `MISTAKES`, another tool is called, a parameter is left out, a value is
another one of its type, or the closing is missing: there is something to be learned from each part of a reward.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.data import Example
from ..core.lm import LM, load
from ._tiny_lm import cached_folder, fit

Form = Literal["toolrl", "call"]
VALUES = {
    "city": ("Oslo", "Lima", "Rome", "Kyiv", "Cairo", "Quito", "Riga", "Bern"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "sunday"),
    "item": ("tea", "lamps", "shoes", "paper", "paint", "rope"),
    "number": ("two", "three", "four", "five", "six", "seven"),
    "person": ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn"),
}
TOOLS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "get_weather": ("weather in {city} on {day}", (("city", "city"), ("day", "day"))),
    "get_traffic": ("traffic in {city}", (("city", "city"),)),
    "book_room": ("a room in {city} for {nights} nights", (("city", "city"), ("nights", "number"))),
    "book_table": (
        "a table for {people} on {day} in {city}",
        (("people", "number"), ("day", "day"), ("city", "city")),
    ),
    "buy_item": ("buy {count} {item}", (("item", "item"), ("count", "number"))),
    "find_item": ("who sells {item} in {city}", (("item", "item"), ("city", "city"))),
    "send_note": ("a note to {to} on {day}", (("to", "person"), ("day", "day"))),
    "send_item": ("send {item} to {to}", (("item", "item"), ("to", "person"))),
    "call_person": ("call {to}", (("to", "person"),)),
    "find_person": ("who is {who} from {city}", (("who", "person"), ("city", "city"))),
    "plan_trip": (
        "a trip from {start} to {end} on {day}",
        (("start", "city"), ("end", "city"), ("day", "day")),
    ),
    "list_events": ("what is on in {city} on {day}", (("city", "city"), ("day", "day"))),
}
MISTAKES = {"tool": 0.2, "drop": 0.15, "value": 0.25, "broken": 0.1}
AT_HAND = 3
TEMPLATE = "{{ '<bos>' }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
CLEAN, MISTAKEN = 14_000, 4_000  # rows: right answers first, as copying is learned from them
SIZE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Problem:
    """A request, the tools at hand, and the right call."""

    request: str
    tools: tuple[str, ...]
    name: str
    values: dict[str, str]

    @property
    def prompt(self) -> str:
        """The tools at hand, and the request."""
        return f"{' '.join(self.tools)}\n{self.request}"

    def answer(self, form: Form) -> str:
        """The right answer."""
        return spoken(self.name, self.values, form)

    def example(self, form: Form, row: int = 0) -> Example:
        """A prompt with the columns that `toolrl` and `tl-training-reward` ask for."""
        extra = {
            "ground_truth": spoken(self.name, self.values, "toolrl"),
            "gold_call": spoken(self.name, self.values, "call"),
            "tools": {t: [p for p, _ in TOOLS[t][1]] for t in self.tools},
        }
        return Example(prompt=self.prompt, kind="prompt", row=row, extra=extra)


def spoken(name: str, values: dict[str, str], form: Form) -> str:
    """A call in one of the two forms."""
    if form == "call":
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in values.items())})"
    call = json.dumps({"name": name, "parameters": values})
    return f"<think> </think>\n<tool_call>\n{call}\n</tool_call>"


def problems(n: int, seed: int = 0) -> list[Problem]:
    """Problems drawn with replacement."""
    rng = np.random.default_rng([seed, 7])
    out = []
    for _ in range(n):
        at_hand = tuple(str(t) for t in rng.choice(list(TOOLS), AT_HAND, replace=False))
        name = at_hand[0]
        words, parameters = TOOLS[name]
        values = {p: str(rng.choice(VALUES[kind])) for p, kind in parameters}
        out.append(Problem(words.format(**values), tuple(rng.permutation(at_hand).tolist()), name, values))
    return out


def mistaken(problem: Problem, form: Form, rng: np.random.Generator) -> str:
    """An answer with the mistakes that fall to it."""
    name, values = problem.name, dict(problem.values)
    hit = {kind: rng.random() < p for kind, p in MISTAKES.items()}
    if hit["tool"]:
        name = str(rng.choice([t for t in problem.tools if t != name]))
    for parameter, kind in TOOLS[problem.name][1]:
        if rng.random() < MISTAKES["value"]:
            values[parameter] = str(rng.choice([v for v in VALUES[kind] if v != values[parameter]]))
    if hit["drop"]:
        del values[str(rng.choice(list(values)))]
    said = spoken(name, values, form)
    return said.replace("}}", "}").removesuffix(")") if hit["broken"] else said


def tokenizer() -> Any:
    """A byte-level BPE of 512 ids trained on answers of both forms: <pad>, <bos>, <eos> are 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [f"{p.prompt}\n{p.answer(form)}" for form in ("toolrl", "call") for p in problems(400, 1)]
    specials, alphabet = ["<pad>", "<bos>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    named = dict(zip(("pad_token", "bos_token", "eos_token"), specials, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=192, **named)
    made.chat_template = TEMPLATE
    return made


def policy(
    form: Form = "toolrl", *, seed: int = 0, folder: str | os.PathLike | None = None, progress: bool = True
) -> LM:
    """The model that makes mistakes; trained once (about three minutes on one core) and cached."""

    def build(path: Path) -> None:
        words, rng = tokenizer(), np.random.default_rng([seed, 9])
        size = SIZE | {"vocab_size": len(words), "num_key_value_heads": 4, "max_position_embeddings": 192}
        every = problems(CLEAN + MISTAKEN, seed + 1000)
        answers = [p.answer(form) for p in every[:CLEAN]] + [mistaken(p, form, rng) for p in every[CLEAN:]]
        rows = [
            [1, *words.encode(f"{p.prompt}\n"), *words.encode(said), 2] for p, said in zip(every, answers, strict=True)
        ]
        how: dict[str, Any] = {"size": size, "batch": 8, "learning_rate": 2e-3, "seed": seed, "progress": progress}
        model = fit(rows[:CLEAN], **how, description="tools: right answers")
        model = fit(rows[CLEAN:], **how, start=model, description="tools: mistakes")
        model.save_pretrained(path)
        words.save_pretrained(path)

    return load(cached_folder("tools", [form, seed, CLEAN, MISTAKEN, SIZE, MISTAKES, 1], build, folder))
