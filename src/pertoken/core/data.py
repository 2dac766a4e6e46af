"""Data: rows become examples, examples become groups of token ids, and every row is accounted for.

`load_examples` reads files, folders, Hub ids, lists and mixtures with TRL's column names (`formats.py` knows them).
`encode` tokenizes each response once and puts the responses of a prompt after the same prompt ids. What either cannot
use is refused, counted by reason and kept with its row numbers in a `DataReport`; objectives never see a bad row.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .examples import KINDS, PINNED, DataReport, Example, Refused, Text, as_kind, one_of, said_by, split_by_prompt
from .formats import example_of, kind_of_columns, mixture_parts, rename, rows_of
from .trace import Trace

if TYPE_CHECKING:
    from .lm import LM

__all__ = [
    "DataReport",
    "Example",
    "Group",
    "as_kind",
    "batches",
    "check_data",
    "encode",
    "fit_prompt",
    "load_examples",
    "split_by_prompt",
]

Read = Callable[[Any, int | None], tuple[list[Example], DataReport]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The K responses to one prompt, as traces that share its ids, and columns that preparation adds.

    Attributes:
        example: what it was made of.
        prompt_ids: ids of the prompt, template included, cut to what fits.
        traces: one a response (none for a prompt to sample from).
        columns: name -> a number for the group, or K entries: a number each, or an array of shape (T_k,) each.

    Raises:
        ValueError: a trace with another prompt.
    """

    example: Example
    prompt_ids: tuple[int, ...]
    traces: tuple[Trace, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if any(trace.prompt_ids != self.prompt_ids for trace in self.traces):
            raise ValueError(f"row {self.example.row}: traces of several prompts; give them one with Trace.with_prompt")

    @property
    def pair(self) -> tuple[Trace, Trace]:
        """(chosen, rejected).

        Raises:
            ValueError: the example is no pair.
        """
        if self.example.kind != "pair":
            raise ValueError(
                f"row {self.example.row} is of kind {self.example.kind}; give data with chosen and rejected"
            )
        return self.traces[0], self.traces[1]

    def add_column(self, name: str, values: float | Sequence[Any]) -> None:
        """Check a column and keep it (a column of that name is replaced).

        Args:
            name: ``reference_logps``...
            values: a number for the group, or one entry a completion: all numbers, or all arrays of shape (T_k,).

        Raises:
            ValueError: another number of entries or of values, or one that is not finite.
        """
        where = f"column {name!r} of row {self.example.row}"
        alone = isinstance(values, int | float | np.number)
        entries: list[Any] = [values] if isinstance(values, int | float | np.number) else list(values)
        if not alone and len(entries) != len(self.traces):
            raise ValueError(f"{where} has {len(entries)} entries for {len(self.traces)} completions; give one each")
        for k, entry in enumerate(entries):
            shape = np.shape(entry)
            if shape and shape != (len(self.traces[k]),):
                raise ValueError(f"{where} has shape {shape} for {len(self.traces[k])} tokens; give one value a token")
            if not np.isfinite(entry).all():
                raise ValueError(f"{where} holds a value that is not finite; mend it, or leave the row out")
        self.columns[name] = values if alone else entries


def check_data(objective: Any, groups: Sequence[Group]) -> None:
    """Have an objective refuse data that it cannot learn from, where it has something to say (`Objective.check`)."""
    check = getattr(objective, "check", None)
    if check is not None:
        check(groups)


def load_examples(
    source: Any,
    *,
    kind: str | None = None,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    transcripts: str = "messages",
    seed: int = 0,
    on_error: str = "raise",
    hub: Mapping[str, Any] | None = None,
) -> tuple[list[Example], DataReport]:
    """Read examples, in the order of the source.

    Columns are TRL's: ``prompt, chosen, rejected`` (pair), ``prompt, completion, label`` (unpaired), ``prompt,
    completion`` or ``messages`` (sft), ``prompt``; text or messages. What both conversations of a pair begin with is
    the prompt if there is none. Also read: ``score_chosen, score_rejected`` or ``score``, ``aspects`` (aspect -> a
    number, or one a response), ``annotator``, ``criterion``, ``tags``. Other columns go to `Example.extra`; of them,
    ``pinned`` is text of the prompt that is never cut off.

    Args:
        source: a JSONL or JSON file (also .gz), or Parquet; a folder of them; a Hub dataset id, if there is no such
            path; dicts, or a `datasets` object; a mixture, as ``{source: weight}`` or ``"a.jsonl:0.7,b.jsonl:0.3"``:
            as many rows as the weights allow without repeating one, drawn and shuffled by `seed`.
        kind: what is wanted; default what the columns say. See `as_kind` for what is made of what.
        split: of a Hub dataset, or of a folder whose file names say train, test...; a single file has none.
        limit: read only the first so many rows (of a mixture: draw at most so many).
        columns: names to change first, ``{"question": "prompt"}``.
        transcripts: what is made of Anthropic's ``Human: ... Assistant: ...``: ``messages``, or ``text`` as it stands.
        on_error: at a line that is no JSON, ``raise`` with its file and number, or ``refuse`` it, counted.
        hub: more arguments of ``datasets.load_dataset`` (name, revision, streaming...).

    Returns:
        The examples, and the report of all rows read.

    Raises:
        ValueError: no such source; columns that make no kind (says those found and expected); an unreadable line or
            file; an unknown option; or not one row that can be used (says why).
    """
    one_of("kind", kind or "pair", KINDS)
    one_of("transcripts", transcripts, ("messages", "text"))
    one_of("on_error", on_error, ("raise", "refuse"))
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no row; give 1 or more, or None for all")

    def read(part: Any, limit: int | None) -> tuple[list[Example], DataReport]:
        name = str(part) if isinstance(part, str | os.PathLike) else "rows"
        rows = rename(list(itertools.islice(rows_of(part, split, on_error, hub or {}), limit)), columns or {}, name)
        native = kind_of_columns(rows, kind, name)
        examples, report = [], DataReport()
        for number, row in enumerate(rows):
            try:
                examples.append(example_of(row, native, source=name, row_number=number, transcripts=transcripts))
            except Refused as reason:
                report.refuse(str(reason), number)
        report.kept = len(examples)
        report.some_kept(name)
        return examples, report

    parts = mixture_parts(source)
    examples, report = read(source, limit) if parts is None else _mix(parts, read, limit, seed)
    kinds = sorted({e.kind for e in examples})
    if kind is None and len(kinds) > 1:
        raise ValueError(f"the mixture holds examples of kinds {', '.join(kinds)}; say which one you want with kind=")
    if kind is not None:
        for example in examples:
            if not as_kind([example], kind):
                reason = f"undesirable, so nothing to imitate{_in(example, parts is not None)}"
                report.skipped.setdefault(reason, []).append(example.row)
                report.kept -= 1
        report.some_kept("the data")
        examples = as_kind(examples, kind)
    return examples, report


def encode(
    examples: Sequence[Example],
    lm: LM,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    system: str | None = None,
) -> tuple[list[Group], DataReport]:
    """Tokenize examples, each response once.

    Refused are: an empty response, an identical pair, a score that is not finite, a response that leaves no room for a
    single prompt token, and what the model's template refuses. A prompt that is too long loses its left end, so that
    the longest response fits whole (`fit_prompt`); this is noted as ``prompt cut``.

    Args:
        examples: of any kind.
        lm: whose tokenizer and template are used.
        max_length: most tokens of prompt and response together; default and upper bound: the model's context.
        max_prompt_length: most tokens of the prompt.
        system: a system turn before every prompt.

    Returns:
        One group an example that is kept, in order, and the report of all of them.

    Raises:
        ValueError: lengths that cannot be; or not one example that can be used (says why).
    """
    from jinja2 import TemplateError

    length = lm.context if max_length is None else max_length
    if not 2 <= length <= lm.context:
        raise ValueError(f"max_length={length} does not lie between 2 and the model's context of {lm.context} tokens")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length={max_prompt_length} leaves no prompt; give 1 or more")
    groups: list[Group] = []
    report = DataReport()
    several = len({e.source for e in examples}) > 1
    for example in examples:
        try:
            group, was_cut = _group(example, lm, length, max_prompt_length, system)
        except (ValueError, TemplateError) as reason:  # ours, or what the model's template does not take
            report.refuse(f"{reason}{_in(example, several)}", example.row)
            continue
        groups.append(group)
        if was_cut:
            report.noted.setdefault(f"prompt cut{_in(example, several)}", []).append(example.row)
    report.kept = len(groups)
    if examples:
        report.some_kept("the data")
    return groups, report


def fit_prompt(
    prompt: Text, lm: LM, room: int, *, pinned: Any = None, system: str | None = None
) -> tuple[tuple[int, ...], bool]:
    """Ids of a prompt in at most `room` tokens, and whether something was cut off.

    What is cut is the left end of the ids (a BOS stays). A prompt that holds `pinned` text, at the beginning of its
    system turn or of its first user turn, keeps that text and its system turn whole: it loses its oldest turns, then
    the beginning of the user's last words.

    Raises:
        Refused: the pinned text alone does not fit.
    """
    ids = lm.encode_prompt(prompt, system)
    if len(ids) <= room:
        return ids, False
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] in ("system", "user")]
    if isinstance(pinned, str) and pinned and any(text.startswith(pinned) for text in texts):
        return _cut_words(prompt, lm, room, pinned, system), True
    bos = getattr(lm.view.tokenizer, "bos_token_id", None)
    # models do badly without their BOS; a template whose every turn begins with that id has no such thing
    keep = ids[:1] if room > 1 and ids[0] == bos and ids.count(bos) == 1 else ()
    return keep + ids[len(ids) - room + len(keep) :], True


def _cut_words(prompt: Text, lm: LM, room: int, pinned: str, system: str | None) -> tuple[int, ...]:
    """Ids of a prompt whose turns and words were left out from the oldest on, all but the pinned ones."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    head = [m for m in turns if m["role"] == "system"]
    first = next((m for m in turns if m["role"] == "user" and m["content"].startswith(pinned)), None)
    if first is not None:
        first["content"] = first["content"].removeprefix(pinned)
    body = [m for m in turns if m["role"] != "system"]
    starts = [i for i, m in enumerate(body) if m["role"] == "user"]

    def ids(start: int, skip: int = 0) -> tuple[int, ...]:
        words = body[start]["content"][skip:]
        turn = body[start] | {"content": words if first is None else pinned + words}
        kept = [*head, turn, *body[start + 1 :]]
        return lm.encode_prompt(turn["content"] if isinstance(prompt, str) else kept, system)

    for start in starts:
        if len(whole := ids(start)) <= room:
            return whole
    start = starts[-1] if starts else -1
    low, high = 0, len(body[start]["content"]) if starts else 0
    if not starts or len(ids(start, high)) > room:
        raise Refused(f"{pinned!r} does not fit into {room} tokens; raise max_length")
    while low < high:  # the shortest cut that fits
        middle = (low + high) // 2
        low, high = (middle + 1, high) if len(ids(start, middle)) > room else (low, middle)
    while len(ids(start, low)) > room:  # a cut may fall between two merged letters and add a token
        low += 1
    return ids(start, low)


def batches(n: int, batch_size: int, *, seed: int, epoch: int, drop_last: bool = False) -> list[list[int]]:
    """The order of `n` groups in one epoch, as lists of indices: a pure function of its arguments, so that a resumed
    run and every method of a comparison see the same order.

    Args:
        n: how many groups.
        batch_size: indices a batch; the last has what is left.
        seed, epoch: each pair of them has its own order.
        drop_last: leave a last batch out that is not full.

    Raises:
        ValueError: a batch size below 1, or `drop_last` with fewer groups than one batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; give 1 or more")
    if drop_last and n < batch_size:
        raise ValueError(f"{n} groups do not fill a batch of {batch_size} and drop_last leaves none; lower batch_size")
    order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    out = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return out[:-1] if drop_last and len(out[-1]) < batch_size else out


def _mix(parts: Mapping[Any, float], read: Read, limit: int | None, seed: int) -> tuple[list[Example], DataReport]:
    """Draw from each source in proportion to its weight, as much as the scarcest allows, and shuffle all."""
    loaded = {part: read(part, None) for part in parts}
    share = {part: weight / math.fsum(parts.values()) for part, weight in parts.items()}
    size = min([len(examples) / share[part] for part, (examples, _) in loaded.items()])
    size = size if limit is None else min(size, limit)
    mixed, total = [], DataReport()
    for number, (part, (examples, report)) in enumerate(loaded.items()):
        order = np.random.default_rng([seed, number]).permutation(len(examples))
        take = round(size * share[part])
        drawn, left = sorted(order[:take].tolist()), sorted(order[take:].tolist())
        report = DataReport(len(drawn), {f"{reason} in {part}": rows for reason, rows in report.refused.items()})
        if left:
            report.skipped[f"not drawn by the mixture's weights in {part}"] = [examples[i].row for i in left]
        mixed += [examples[i] for i in drawn]
        total = total.merge(report)
    total.some_kept("the mixture")
    return [mixed[i] for i in np.random.default_rng(seed).permutation(len(mixed))], total


def _group(
    example: Example, lm: LM, length: int, max_prompt_length: int | None, system: str | None
) -> tuple[Group, bool]:
    """One example as a group, and whether its prompt was cut."""
    for response in example.responses:
        if not all(text.strip() for text in said_by("assistant", response)):
            raise Refused("empty response")
    if not all(math.isfinite(x) for numbers in (example.scores or (), *example.aspects.values()) for x in numbers):
        raise Refused("a score is not finite")
    said = [_completion(example.prompt, response, lm) for response in example.responses]
    if example.kind == "pair" and said[0]["completion_ids"] == said[1]["completion_ids"]:
        raise Refused("identical pair")
    longest = max((len(fields["completion_ids"]) for fields in said), default=1)  # a sampled one needs a token, too
    if longest >= length:
        raise Refused(f"a response does not fit into {length} tokens beside its prompt; shorten it or raise max_length")
    room = min(length - longest, max_prompt_length or length)
    prompt_ids, cut = fit_prompt(example.prompt, lm, room, pinned=example.extra.get(PINNED), system=system)
    shared = {
        "prompt_ids": prompt_ids,
        "prompt_pieces": lm.view.pieces(prompt_ids, at_start=not cut),
        "tokenizer": lm.view.fingerprint,
        "ended": True,
        "meta": {"source": example.source, "row": example.row},
    }
    traces = tuple(Trace(**shared, **fields) for fields in said)
    return Group(example=example, prompt_ids=prompt_ids, traces=traces), cut


def _completion(prompt: Text, response: Text, lm: LM) -> dict[str, Any]:
    """The fields of a trace that belong to its response; the prompt is not among them, all responses share one."""
    if isinstance(response, str):
        ids, pieces = lm.encode_completion(response)
        return {"completion_ids": ids, "completion_pieces": pieces}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    trace = lm.trace_messages(turns, response)
    return {name: getattr(trace, name) for name in ("completion_ids", "completion_pieces", "emitted")}


def _in(example: Example, several: bool) -> str:
    """Row numbers of several sources are told apart by the reason they are counted under."""
    return f" in {example.source}" if several else ""
