"""Texts of the task: the Alpaca wrapper of prompts, which part is the rewrite, and the Appropriateness Corpus."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = (
    "Rewrite the following argument to be more appropriate and make only minimal changes to the original argument."
)
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{argument}"
    "\n\n### Response:\n"
)
_INPUT, _RESPONSE = re.compile(r"(?:^|(?<=\n))### Input:"), re.compile(r"(?:^|(?<=\n))### Response:")
SPLITS = ("TRAIN", "VALID", "TEST")


@dataclass(frozen=True)
class Labelled:
    """A text of the corpus, and whether it is inappropriate."""

    text: str
    inappropriate: bool
    row: str = ""


def alpaca_prompt(argument: str, instruction: str = INSTRUCTION) -> str:
    """The paper's zero-shot prompt for an argument."""
    return ALPACA.format(instruction=instruction, argument=argument)


def rewrite_of(text: str) -> str:
    """What follows "### Response:" (up to a second one), without ``</s>`` and white space around it; "" without it."""
    return "".join(text[i] for i in rewrite_places(text, alpaca=True))


def argument_of(text: str) -> str | None:
    """What stands between "### Input:" and "### Response:"; None if either is not there."""
    begin = _INPUT.search(text)
    end = _RESPONSE.search(text, begin.end()) if begin else None
    return text[begin.end() : end.start()].strip() if begin and end else None


def rewrite_places(text: str, alpaca: bool, start: int = 0) -> Sequence[int]:
    """Which characters of a text are the rewrite: those of it after `start`, or of them those that the Alpaca template
    says (`rewrite_of`)."""
    begin, end = start, len(text)
    if alpaca:
        marks = list(_RESPONSE.finditer(text))
        marks = marks[max(0, sum(m.start() < start for m in marks) - 1) :]  # an argument may quote the template
        if not marks:
            return range(0)
        begin, end = max(start, marks[0].end()), marks[1].start() if len(marks) > 1 else len(text)
    cut = {i for m in re.finditer("</s>", text) for i in range(*m.span())}
    kept = [i for i in range(begin, end) if i not in cut]
    said = [k for k, i in enumerate(kept) if not text[i].isspace()]
    return kept[said[0] : said[-1] + 1] if said else range(0)


def load_corpus(path: str | Path, fold: str = "fold0.0") -> dict[str, list[Labelled]]:
    """The splits of a fold of the Appropriateness Corpus (``..._w_folds.csv``); the issue is no part of a text.

    CAUTION: in the released files the column ``Appropriateness`` has 1 for INAPPROPRIATE; later ones call the same
    numbers ``Inappropriateness``.

    Raises:
        ValueError: a column that is not there; both columns, and they differ; a label that is not 0 or 1; a split that
            is not TRAIN, VALID or TEST.
    """
    made: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
    with Path(path).open(encoding="utf8", newline="") as file:
        rows = csv.DictReader(file)
        names = [n for n in ("Inappropriateness", "Appropriateness") if n in (rows.fieldnames or ())]
        missing = [n for n in ("post_text", fold) if n not in (rows.fieldnames or ())]
        if missing or not names:
            wanted = ", ".join([*missing, *([] if names else ["Inappropriateness (or Appropriateness)"])])
            raise ValueError(f"{path} has no column {wanted}; give the corpus's CSV with folds")
        for number, row in enumerate(rows):
            who = f"{path}, row {row.get('post_id') or number}"
            labels = {(row[n] or "").strip() for n in names}  # a short row has None
            if len(labels) > 1:
                raise ValueError(f"{who}: {' and '.join(names)} differ, though 1 means inappropriate in both; mend it")
            label = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}.get(*labels)
            if label is None or row[fold] not in SPLITS:
                raise ValueError(f"{who}: label {labels} or split {row[fold]!r} is not known; leave the row out")
            made[row[fold]].append(Labelled(row["post_text"], bool(label), str(row.get("post_id") or number)))
    return made
