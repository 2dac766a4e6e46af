"""What rows of data look like outside: files, folders, Hub ids and mixtures; TRL's columns, messages, HH transcripts.

`rows_of` yields the raw rows of any source, `kind_of_columns` says what their columns make, `example_of` brings one row
into the one form of `Example` or refuses it. `data.py` counts what is refused.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from .examples import Example, Refused, Text, Turns

COLUMNS = {  # kind -> the columns that make it; columns that fit several kinds make the first
    "pair": (("chosen", "rejected"),),
    "unpaired": (("prompt", "completion", "label"),),
    "sft": (("prompt", "completion"), ("messages",)),
    "prompt": (("prompt",),),
}
# kind wanted -> kinds of columns it is made of, best first. Labels count for sft: one does not imitate bad answers.
_MADE_OF = {
    "pair": ("pair",),
    "unpaired": ("unpaired", "pair"),
    "sft": ("unpaired", "sft", "pair"),
    "prompt": ("prompt", "pair", "sft"),
}
FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SPLITS = {name: name for name in ("train", "test", "validation")}
_SPLITS |= {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}
_THUMBS = {"up": True, "down": False}
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)  # Anthropic's HH
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ASSISTANT = "\n\nAssistant:"


def mixture_parts(source: Any) -> dict[Any, float] | None:
    """``{source: weight}`` of a mixture (a mapping to numbers, or ``"a.jsonl:0.7,b.jsonl:0.3"``), else None.

    Raises:
        ValueError: a part without a weight, or a weight that is not positive.
    """
    if isinstance(source, str) and not Path(source).exists():
        texts = source.split(",")
        found = [re.fullmatch(r"\s*(.+):([0-9.eE+-]+)\s*", text) for text in texts]
        if not any(found):
            return None
        if not all(found):
            missing = texts[found.index(None)].strip()
            raise ValueError(f"{missing!r} in the mixture {source!r} has no weight; write 'a.jsonl:0.7,b.jsonl:0.3'")
        pairs = [(match.group(1), match.group(2)) for match in found if match]
    elif isinstance(source, Mapping) and source and all(isinstance(w, int | float) for w in source.values()):
        pairs = list(source.items())
    else:
        return None
    parts: dict[Any, float] = {}
    for name, weight in pairs:
        try:
            parts[name] = float(weight)
        except ValueError as error:
            raise ValueError(f"weight {weight!r} of {name} in the mixture is not a number") from error
        if not 0 < parts[name] < float("inf"):
            raise ValueError(f"weight {weight} of {name} in the mixture is not positive; leave the source out instead")
    return parts


def rows_of(source: Any, split: str, on_error: str, hub: Mapping[str, Any]) -> Iterator[Any]:
    """The raw rows of a source that is no mixture, in order: a mapping each, or a `Refused` for a line that is none.

    Raises:
        ValueError: no such source or split, a file of an unknown kind, or (``on_error="raise"``) an unreadable line.
    """
    if isinstance(source, Mapping):  # the splits of a `datasets.DatasetDict`
        if split not in source:
            raise ValueError(f"no split {split!r} among {', '.join(map(str, source))}; name one of them with split=")
        source = source[split]
    if not isinstance(source, str | os.PathLike):
        yield from source
        return
    path = Path(source).expanduser()
    if path.is_dir():
        for file in _files_of(path, split):
            yield from _rows_of_file(file, on_error)
    elif path.exists():
        yield from _rows_of_file(path, on_error)
    else:
        yield from _rows_of_hub(str(source), split, hub)


def rename(rows: list[Any], columns: Mapping[str, str], source: str) -> list[Any]:
    """The rows with their columns renamed.

    Raises:
        ValueError: a column that no row has, or a new name that is taken.
    """
    if not columns:
        return rows
    found = _columns_of(rows)
    for old, new in columns.items():
        if old not in found:
            raise ValueError(f"columns= renames {old!r}, which {source} has not; found: {', '.join(found)}")
        if new in found and new not in columns:
            raise ValueError(f"columns= renames {old!r} to {new!r}, which {source} has already; rename that one, too")
    return [{columns.get(k, k): v for k, v in r.items()} if isinstance(r, Mapping) else r for r in rows]


def kind_of_columns(rows: Sequence[Any], kind: str | None, source: str) -> str:
    """The kind that the rows are read as: what their columns make, preferring what `kind` (if given) is made of.

    Raises:
        ValueError: no such kind; says the columns found and expected. Or there is no row.
    """
    if not rows:
        raise ValueError(f"{source} holds no rows; give data")
    found = _columns_of(rows)
    fits = [k for k, choices in COLUMNS.items() if any(set(choice) <= set(found) for choice in choices)]
    usable = [k for k in (_MADE_OF[kind] if kind else COLUMNS) if k in fits]
    if not usable:
        wanted = _MADE_OF[kind] if kind else COLUMNS
        expected = "; ".join(f"{' + '.join(choice)} ({k})" for k in wanted for choice in COLUMNS[k])
        raise ValueError(
            f"{source} has the columns {', '.join(found) or '(none)'}; expected {expected}. Rename yours with "
            "columns={'yours': 'prompt'}"
        )
    return usable[0]


def example_of(row: Any, kind: str, *, source: str, row_number: int, transcripts: str) -> Example:
    """One row as an example of the kind that its columns make.

    Raises:
        Refused: the row is not like that.
    """
    if isinstance(row, Refused):  # by `rows_of` already
        raise row
    if not isinstance(row, Mapping):
        raise Refused("not an object with columns")
    left = dict(row)
    names = {"pair": ("chosen", "rejected"), "prompt": ()}.get(kind, ("completion",))
    if kind == "sft" and left.get("completion") is None:
        names = ("messages",)
    prompt, label = left.pop("prompt", None), left.pop("label", None) if kind == "unpaired" else None
    responses = [left.pop(name, None) for name in names]
    missing = [name for name, value in zip(names, responses, strict=True) if value is None]
    if missing or (kind == "prompt" and prompt is None):
        raise Refused(f"without {' and '.join(missing or ['prompt'])}")
    label = _label(label) if kind == "unpaired" else None
    shared, texts = conversation(prompt, responses, transcripts)
    if isinstance(prompt, str) and isinstance(shared, tuple) and not any(m["content"] in prompt for m in shared):
        left["prompt"] = prompt  # the conversations carry another prompt; this one is not lost
    score_names = {"pair": ("score_chosen", "score_rejected"), "prompt": ()}.get(kind, ("score",))
    given = [left.pop(name, None) for name in score_names]
    known = _known(left, len(texts))
    return Example(
        prompt=shared,
        responses=texts,
        kind=kind,
        label=label,
        scores=None if all(score is None for score in given) else tuple(_number(score) for score in given),
        source=source,
        row=row_number,
        extra=left,
        **known,
    )


def _known(left: dict[str, Any], k: int) -> dict[str, Any]:
    """Take the optional columns that are what their name says out of `left`; of others the name is a coincidence."""
    out: dict[str, Any] = {}
    if isinstance(left.get("criterion"), str):
        out["criterion"] = left.pop("criterion")
    if isinstance(left.get("annotator"), str | int):
        out["annotator"] = str(left.pop("annotator"))
    if isinstance(left.get("tags"), list | tuple) and all(isinstance(t, str) for t in left["tags"]):
        out["tags"] = tuple(left.pop("tags"))
    if isinstance(left.get("aspects"), Mapping):
        aspects = {a: v if isinstance(v, list | tuple) else (v,) for a, v in left["aspects"].items() if v is not None}
        if all(len(v) == k and all(isinstance(x, int | float) for x in v) for v in aspects.values()):
            del left["aspects"]
            out["aspects"] = {a: tuple(float(x) for x in v) for a, v in aspects.items()}
    return out


def _label(value: Any) -> bool:
    """A thumb: True or False, 1 or 0, "up" or "down"."""
    if isinstance(value, str) and value in _THUMBS:
        return _THUMBS[value]
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise Refused("label is not true or false, 1 or 0, up or down")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused("a score is not a number")
    return float(value)


def _columns_of(rows: Sequence[Any]) -> list[str]:
    """Names of the columns that hold anything, in the order they appear."""
    return list(dict.fromkeys(str(k) for r in rows if isinstance(r, Mapping) for k, v in r.items() if v is not None))


def conversation(prompt: Any, responses: Sequence[Any], transcripts: str) -> tuple[Text, tuple[Text, ...]]:
    """One form for the prompt and the responses of a row.

    Args:
        prompt: text, messages, a transcript ending in ``Assistant:``, or None when the responses carry it: the longest
            beginning that they share, followed by an assistant turn in each, is the prompt then (of a single
            conversation, all before the first assistant turn).
        responses: all text, or all messages; each alone, or the whole conversation.
        transcripts: ``messages`` or ``text``, see `data.load_examples`.

    Returns:
        The prompt, and the responses: text where one is a single assistant turn, else messages that begin and end with
        an assistant turn.

    Raises:
        Refused: no such form can be given to the row.
    """
    as_text = [isinstance(r, str) for r in responses]
    if any(as_text) and not all(as_text):
        raise Refused("one response is text and the other messages")
    if all(as_text):
        prompt, responses = _split_transcripts(prompt, list(responses), transcripts)
    if prompt is not None and not isinstance(prompt, str):
        prompt = _messages(prompt, "prompt")
        if not prompt or prompt[-1]["role"] == "assistant":
            raise Refused("the prompt has no turn to answer at its end")
    if all(isinstance(r, str) for r in responses):  # asked again: a transcript has become messages
        if prompt is None:
            raise Refused("without prompt")
        return prompt, tuple(responses)
    turns = [_messages(r, "a response") for r in responses]
    if any(not t or t[-1]["role"] != "assistant" for t in turns):
        raise Refused("a response does not end with an assistant turn")
    if any(t[0]["role"] != "assistant" for t in turns):  # whole conversations, the prompt in front
        cut = _prompt_length(turns) if not isinstance(prompt, tuple) else len(prompt)
        if isinstance(prompt, tuple) and any(t[:cut] != prompt for t in turns):
            raise Refused("a response is a conversation that does not begin with the prompt")
        prompt, turns = turns[0][:cut], [t[cut:] for t in turns]
    if prompt is None:
        raise Refused("without prompt")
    if any(t[0]["role"] != "assistant" for t in turns):
        raise Refused("a response does not begin with an assistant turn")
    return prompt, tuple(t[0]["content"] if len(t) == 1 and len(t[0]) == 2 else t for t in turns)


def _prompt_length(turns: list[Turns]) -> int:
    """How many messages the conversations share, so that each goes on with an assistant turn."""
    if len(turns) == 1:
        return next(i for i, m in enumerate(turns[0]) if m["role"] == "assistant")
    shortest = min(map(len, turns))
    length = next((i for i in range(shortest) if any(t[i] != turns[0][i] for t in turns)), shortest)
    length = min(length, shortest - 1)  # identical conversations keep a response each, to be counted as such
    while length and any(t[length]["role"] != "assistant" for t in turns):
        length -= 1
    if not length:
        raise Refused("the two conversations share no prompt")
    return length


def _split_transcripts(prompt: Any, texts: list[str], transcripts: str) -> tuple[Any, list[Any]]:
    """Take HH transcripts apart; other text is returned as it is."""
    replies: list[Any] = texts
    if prompt is None and texts and all(_TRANSCRIPT.match(t) for t in texts):
        shared = os.path.commonprefix(texts)  # noqa: RUF071 (characters are what is meant, not folders)
        cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
        if cut < len(_ASSISTANT):
            raise Refused("the two transcripts share no prompt")
        prompt, replies = shared[:cut], [t[cut:] for t in texts]
        if transcripts == "messages":  # the two may have gone on for several turns
            replies = [_turns(_ASSISTANT + t) for t in replies]
    elif isinstance(prompt, str) and _TRANSCRIPT.match(prompt) and prompt.rstrip().endswith(_ASSISTANT):
        replies = [t.removeprefix(prompt) for t in texts]
        if transcripts == "messages":  # white space about a turn belongs to the transcript
            replies = [t.strip() for t in replies]
    else:
        return prompt, texts
    return (_turns(prompt)[:-1], replies) if transcripts == "messages" else (prompt, replies)


def _turns(transcript: str) -> Turns:
    parts = _TURN.split(transcript.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        {"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _messages(value: Any, what: str) -> Turns:
    good = isinstance(value, list | tuple) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not good:
        raise Refused(f"{what} is neither text nor messages with role and content")
    # a Parquet column gives every message every key, None where it had none
    return tuple({key: v for key, v in m.items() if v is not None} for m in value)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a folder in the order of their names; those of the split, if their names say splits."""
    files = sorted(p for p in folder.iterdir() if p.name.endswith(FILES) and not p.name.startswith("."))
    if not files:
        raise ValueError(f"the folder {folder} holds no {', '.join(FILES)} file; name the folder that does")
    splits = {p: [_SPLITS[w] for w in re.split(r"[^a-z]+", p.name.lower()) if w in _SPLITS] for p in files}
    if not any(splits.values()):
        return files
    found = [p for p in files if (_SPLITS[split] in splits[p] if split in _SPLITS else split in p.name)]
    if not found:
        raise ValueError(
            f"no file for split {split!r} in {folder}, which holds {', '.join(p.name for p in files)}; "
            "name another split, or the file itself"
        )
    return found


def _rows_of_hub(name: str, split: str, hub: Mapping[str, Any]) -> Iterator[Any]:
    if name.endswith(FILES) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no file or folder {name}; check the path (the working folder is {Path.cwd()})")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, **hub)
    except (OSError, ValueError) as error:  # not found, no network, no such split or configuration
        raise ValueError(
            f"{name!r} is no file or folder, and the Hub gave no dataset of this name with split {split!r}: {error}; "
            "check the name, or give a path"
        ) from error
    yield from cast(Any, rows)


def _rows_of_file(path: Path, on_error: str) -> Iterator[Any]:
    if not path.name.endswith(FILES):
        raise ValueError(f"{path}: no reader for this ending; give one of {', '.join(FILES)}")
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable Parquet file ({error}); write it again") from error
        yield from table.to_pylist()
        return
    number = 0
    try:
        with cast(BinaryIO, gzip.open(path) if path.name.endswith(".gz") else path.open("rb")) as lines:
            for number, line in enumerate(lines, 1):
                if number == 1 and ".jsonl" not in path.name and line.lstrip().startswith(b"["):
                    yield from _array(path, line + lines.read())
                    return
                if line.strip():
                    yield _object(path, number, line, on_error)
    except (OSError, EOFError, zlib.error) as error:  # a cut or damaged gzip
        raise ValueError(f"{path}: unreadable after line {number} ({error}); fetch or write the file again") from error


def _object(path: Path, number: int, line: bytes, on_error: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        if on_error == "refuse":
            return Refused("unreadable line")
        raise ValueError(
            f"{path}, line {number}: not a JSON object ({error}); mend or remove the line, or pass on_error='refuse' "
            "to go on without it"
        ) from error


def _array(path: Path, content: bytes) -> list[Any]:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); mend it, or write one object a line") from error
