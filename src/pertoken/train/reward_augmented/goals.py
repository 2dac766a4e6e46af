"""What a target score looks like in a prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...core.examples import Refused, Text, Turns

Score = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How a target score is said to the model."""

    sentence: str = "Give an answer that would be scored {goal} on a scale from {low} (lowest) to {high} (highest)."
    """The goal sentence: it holds {goal} and, besides it, only the scale."""
    place: Literal["auto", "system", "user"] = "auto"
    """A system turn (merged with one that is there), or the beginning of the first user turn; auto: a system turn
    where the model's chat template has one."""
    separator: str = "\n\n"
    """Between the sentence and the text that follows it in its turn."""
    low: float = 1.0
    """Lowest score of the scale."""
    high: float = 10.0
    """Highest score of the scale, asked for at inference."""
    decimals: int | None = None
    """Round scores to so many decimals (default: as they are)."""

    def __post_init__(self) -> None:
        if self.place not in ("auto", "system", "user"):
            raise ValueError(f"place={self.place!r} is not one of auto, system, user")
        if "{goal}" not in self.sentence:
            raise ValueError(f"the goal sentence {self.sentence!r} says no goal; write {{goal}} into it")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low={self.low} must be below high={self.high}, both finite")
        try:
            self.say(self.high)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"the goal sentence {self.sentence!r} holds braces other than {{goal}}, {{low}}, {{high}}; leave "
                "them out, or double them"
            ) from error

    def say(self, score: Score, aspects: Sequence[str] = ()) -> str:
        """The goal sentence: integral scores as integers, others as they are; several as "aspect score, ..."."""
        if isinstance(score, tuple):
            goal = ", ".join(f"{a.replace('_', ' ')} {number(s)}" for a, s in zip(aspects, score, strict=True))
        else:
            goal = number(score)
        return self.sentence.format(goal=goal, low=number(self.low), high=number(self.high))

    def put(self, prompt: Text, said: str, place: str) -> tuple[Text, str]:
        """The prompt with the sentence in its place, and the text that must never be cut off."""
        front = said + self.separator
        if place == "user":
            if isinstance(prompt, str):
                return front + prompt, front
            at = next((i for i, m in enumerate(prompt) if m["role"] == "user"), None)
            if at is None:
                raise Refused("a prompt without a user turn to put the goal before")
            turn = prompt[at] | {"content": front + prompt[at]["content"]}
            return (*prompt[:at], turn, *prompt[at + 1 :]), front
        turns = turns_of(prompt)
        if turns and turns[0]["role"] == "system":
            return (turns[0] | {"content": front + turns[0]["content"]}, *turns[1:]), said
        return ({"role": "system", "content": said}, *turns), said

    def stands_in(self, prompt: Text) -> bool:
        """Whether a prompt has a goal already, of this sentence."""
        parts = [part.format(low=number(self.low), high=number(self.high)) for part in self.sentence.split("{goal}")]
        pattern = re.compile(r"(?:[\w .,:-]{0,200}? )?-?\d[\d.e+-]*".join(map(re.escape, parts)))  # ends in a number
        return any(pattern.match(m["content"]) for m in turns_of(prompt) if m["role"] in ("system", "user"))


def number(score: float) -> str:
    """A score as it is written: 8 for 8.0, 7.5 for 7.5."""
    return str(int(score)) if score == int(score) else repr(float(score))


def turns_of(prompt: Text) -> Turns:
    """A prompt as messages."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
