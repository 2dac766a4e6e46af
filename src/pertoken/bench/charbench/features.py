"""How a tokenizer cuts a word, bare or inside its question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.bytes import byte_view


@dataclass(frozen=True)
class Cut:
    """Numbers about one word and one tokenizer; None where the tokens do not spell the word.

    Attributes:
        number_of_tokens, word_length, unique_characters, gold_truth: as they say.
        compression_rate: letters a token. gold_share: gold / length.
        target_token_length: letters of the token that covers the asked place (index tasks).
    """

    number_of_tokens: int | None
    word_length: int
    compression_rate: float | None
    unique_characters: int
    gold_truth: int
    gold_share: float
    target_token_length: int | None


def features(question: Any, tokenizer: Any, where: str = "bare") -> Cut:
    """Features of a question's word.

    Args:
        where: ``bare``, the word alone; ``question``, as it stands there, between quotes (a token that reaches beyond
            the word counts with the letters that it has of it).

    Raises:
        ValueError: another `where`.
    """
    if where not in ("bare", "question"):
        raise ValueError(f"where={where!r} is not one of bare, question")
    word, gold = question.word, int(question.answer)
    text = word if where == "bare" else question.question
    start = 0 if where == "bare" else text.rindex(f"'{word}'") + 1
    lengths, at = [], 0
    for piece in byte_view(tokenizer).pieces_of_text(text)[1]:
        inside = min(at + len(piece), start + len(word)) - max(at, start)  # ASCII up to the word: bytes are letters
        at += len(piece)
        if inside > 0:
            lengths.append(inside)
    spells = sum(lengths) == len(word)
    target = None
    if spells and question.task.startswith("find"):
        place = 0
        for size in lengths:
            if place <= gold < place + size:
                target = size
            place += size
    n = len(lengths) if spells else None
    rate = len(word) / n if n else None
    return Cut(n, len(word), rate, len(set(word)), gold, gold / len(word), target)
