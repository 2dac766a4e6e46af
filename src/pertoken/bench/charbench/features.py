"""How a tokenizer cuts a word, bare or inside its question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.bytes import byte_view
from ...core.trace import byte_offsets


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
    first = 0 if where == "bare" else text.rindex(f"'{word}'") + 1
    begins = byte_offsets(text)  # places are characters, tokens are bytes: a token has the letters that begin in it
    start, end = begins[first], begins[first + len(word)]
    view, lengths, at, known = byte_view(tokenizer), [], 0, True
    for token, piece in zip(*view.pieces_of_text(text), strict=True):
        a, b = max(at, start), min(at + len(piece), end)
        at += len(piece)
        if a < b:
            lengths.append(sum(a <= begin < b for begin in begins))
            known = known and token not in view.special_ids  # the unknown token stands for the word, and spells nothing
    spells = known and sum(lengths) == len(word)
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
