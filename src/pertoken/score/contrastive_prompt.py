"""The self-generated token reward of T-REG: one response under a better and a worse prompt.

Zhou, Zhang, Zhao, Meng, ACL 2025, arXiv 2412.02685 (steps 1 and 2; `t-reg` trains with it):

    rhat_t = sigmoid( log pi_eval(y_t|x_better,y_<t) - log pi_eval(y_t|x_worse,y_<t) ) - 0.5      in (-0.5, 0.5)

Both prompts ask for a revision of y and contain the question and y as the draft. y is never generated and never
tokenized again: its ids are teacher-forced after either prompt. The terminator is scored like any other token; what
the policy did not emit is 0. rhat is computed as tanh(x / 2) / 2, so that swapping the prompts negates it exactly.

Small models copy the draft under both prompts, so that mean |rhat| (in ``meta["mean_abs"]``) is near 0: give them
``axis="tone", draft=False``. In place of two prompts of one model, two class-conditional models (`policies`) will do.

Differs from the authors' code: it was not released when this was written; the prompts are ours, on the paper's four
axes and their opposites. A prompt that is too long loses the question's left and the draft's right end, in proportion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.credit import Credit
from ..core.lm import LM
from ..core.trace import Trace
from ._logps import completion_logps, same_tokenizer, where

_REVISE = (
    "Below are a question and a draft answer.\n\nQuestion:\n{question}\n\nDraft answer:\n{draft}\n\n"
    "Revise the draft answer so that it becomes %s. Reply with the revised answer only."
)
_ANSWER = "{question}\n\nGive %s reply."
PROMPTS = {  # axis, draft -> x_better, x_worse
    ("helpfulness", True): (
        _REVISE % "more helpful, more correct, more coherent and more concise",
        _REVISE % "less helpful, less correct, less coherent and more verbose",
    ),
    ("helpfulness", False): (
        _ANSWER % "a helpful, correct, coherent and concise",
        _ANSWER % "an unhelpful, incorrect, incoherent and verbose",
    ),
    ("tone", True): (_REVISE % "more positive in tone", _REVISE % "more negative in tone"),
    ("tone", False): (_ANSWER % "a very positive, enthusiastic", _ANSWER % "a very negative, disappointed"),
}


@dataclass(frozen=True, kw_only=True)
class ContrastivePrompt:
    """Options of the contrastive reward, and the model (or two) that it asks."""

    axis: str = "helpfulness"
    """What better means: helpfulness (the paper's helpful, correct, coherent, concise) or tone (positive, negative)."""
    draft: bool = True
    """Put the response into the prompts as the draft to revise; switch it off for small models."""
    better: str = ""
    """x_better in your own words, with {question} and {draft} where they belong; overrides axis and draft."""
    worse: str = ""
    """x_worse, likewise."""
    max_length: int | None = None
    """Most tokens of a prompt and the response together; default: the model's context."""
    lm: LM | None = None
    """pi_eval, the checkpoint that training starts from."""
    policies: tuple[LM, LM] | None = None
    """Two class-conditional models that stand for pi_eval under x_better and x_worse; `lm` is not asked then."""

    def __post_init__(self) -> None:
        if bool(self.better) != bool(self.worse):
            raise ValueError("a contrast has two prompts; give both better and worse, or neither")
        if self.better and self.better == self.worse:
            raise ValueError("better and worse are one prompt, so that every token reward is 0; give two")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} leaves no token; give 1 or more, or None for the context")
        if (self.axis, self.draft) not in PROMPTS:
            known = ", ".join(dict.fromkeys(axis for axis, _ in PROMPTS))
            raise ValueError(f"axis={self.axis!r} is not one of {known}; prompts of your own go into better and worse")

    @property
    def prompts(self) -> tuple[str, str]:
        """The templates of x_better and x_worse."""
        return (self.better, self.worse) if self.better else PROMPTS[self.axis, self.draft]

    def score(self, items: Sequence[Trace], questions: Sequence[Any] | None = None) -> list[Credit]:
        """Credit of kind reward over the completion of each trace, in order.

        Args:
            items: traces of the model's tokenizer.
            questions: the question (text or messages) of each; default ``trace.meta["prompt"]``, and where a trace does
                not carry it, its prompt as text, with what the chat template wrote into it.

        Raises:
            ValueError: no model; another tokenizer; a response that does not fit the context (says which).
        """
        if questions is not None and len(questions) != len(items):
            raise ValueError(f"{len(questions)} questions for {len(items)} traces; give one each")
        if self.policies is not None:
            names = [lm.name for lm in self.policies]
            logps = completion_logps(dict(zip(("better", "worse"), self.policies, strict=True)), items)
            better, worse, cut = logps["better"], logps["worse"], [False] * len(items)
        elif self.lm is not None:
            names = list(self.prompts)
            better, worse, cut = self._after_prompts(self.lm, items, questions)
        else:
            raise ValueError("the contrast is one a model makes; give ContrastivePrompt(lm=core.lm.load(...))")
        credits = []
        for trace, b, w, was_cut in zip(items, better, worse, cut, strict=True):
            values = token_reward(b, w)
            size = float(np.abs(values[trace.mask]).mean()) if trace.mask.any() else 0.0
            meta = {"mean_abs": size, "better": names[0], "worse": names[1], "scale": "in [-0.5, 0.5]"}
            meta |= {"prompt_cut": True} if was_cut else {}
            credits.append(Credit(trace=trace, values=values, method="contrastive-prompt", version=1, meta=meta))
        return credits

    def _after_prompts(
        self, lm: LM, items: Sequence[Trace], questions: Sequence[Any] | None
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[bool]]:
        """Log-probs after x_better and after x_worse, and whether a prompt was cut, one a trace."""
        same_tokenizer(lm, items)
        traces: tuple[list[Trace], list[Trace]] = ([], [])
        cut = []
        for i, trace in enumerate(items):
            question = questions[i] if questions is not None else trace.meta.get("prompt", trace.prompt_text)
            ids, was_cut = self._fit(lm, trace, question_text(question), where(trace, i))
            for side, prompt_ids in zip(traces, ids, strict=True):
                side.append(trace.with_prompt(prompt_ids, lm.view))
            cut.append(was_cut)
        logps = completion_logps({"pi_eval": lm}, [*traces[0], *traces[1]])["pi_eval"]
        return logps[: len(items)], logps[len(items) :], cut

    def _fit(self, lm: LM, trace: Trace, question: str, name: str) -> tuple[list[tuple[int, ...]], bool]:
        """Ids of both prompts beside which the response fits; if they are too long, the same is cut from both."""
        limit = min(self.max_length or lm.context, lm.context)
        room = limit - len(trace)
        if room < 1:
            raise ValueError(
                f"the response of {name} takes {len(trace)} of {limit} tokens, which leaves no prompt; "
                "shorten it or take a scorer with a longer context"
            )
        templates, draft = self.prompts, trace.text
        q: tuple[bytes, ...] = ()
        d: tuple[bytes, ...] = ()
        was_cut = False
        while True:
            ids = [lm.encode_prompt(fill(template, question, draft)) for template in templates]
            over = max(map(len, ids)) - room
            if over <= 0:
                return ids, was_cut
            if not was_cut:
                used = "".join(templates)
                q = lm.view.pieces_of_text(question)[1] if "{question}" in used else ()
                d = lm.view.pieces_of_text(draft)[1] if "{draft}" in used else ()
            total = len(q) + len(d)
            if not total:
                raise ValueError(
                    f"the response of {name} takes {len(trace)} of {limit} tokens, too many beside the "
                    "prompt's own words; give shorter prompts (better, worse), or take a scorer with a longer context"
                )
            from_q = min(len(q), -(-over * len(q) // total))
            q, d = q[from_q:], d[: max(len(d) - max(over - from_q, 0), 0)]
            question, draft = (b"".join(p).decode("utf-8", errors="ignore") for p in (q, d))
            was_cut = True


def token_reward(logp_better: np.ndarray, logp_worse: np.ndarray) -> np.ndarray:
    """sigmoid(logp_better - logp_worse) - 0.5, elementwise: in [-0.5, 0.5], the ends only by float saturation."""
    return 0.5 * np.tanh(0.5 * (np.asarray(logp_better, np.float64) - np.asarray(logp_worse, np.float64)))


def fill(template: str, question: str, draft: str) -> str:
    """The template with its placeholders replaced, in one pass: braces in a question or a draft are left alone."""
    said = {"{question}": question, "{draft}": draft}
    return re.sub(r"\{(?:question|draft)\}", lambda match: said[match.group()], template)


def question_text(prompt: Any) -> str:
    """A prompt as one text: itself, its only message's words, or a dialogue with the speakers' names."""
    if isinstance(prompt, str):
        return prompt
    turns: list[Mapping[str, Any]] = list(prompt)
    if len(turns) == 1:
        return _words(turns[0])
    return "\n\n".join(f"{turn['role'].capitalize()}: {_words(turn)}" for turn in turns)


def _words(turn: Mapping[str, Any]) -> str:
    """What a turn says; a turn that only calls tools says nothing.

    Raises:
        ValueError: content with parts that are no text.
    """
    content = turn.get("content") or ""
    if isinstance(content, str):
        return content
    if all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError(f"the {turn['role']} turn holds more than text; give the question as words (questions=...)")
