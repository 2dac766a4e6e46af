"""Shared-prefix packing: the prompt is computed once, and padding is not computed at all.

A *group* is one prompt and its K completions. As a **tree** it takes one stretch of a row: the trunk (prompt), then
K branches; a branch attends to the trunk and to itself, and its positions restart at the trunk's end. **Flat**, it
takes K stretches, the prompt repeated in each. Both give the same log-probs and gradients (tests: 1e-4 in float32);
`pack` chooses by counting multiplications, because a dense tree mask wastes branch x branch work that flat rows do not
have. Models that count by column (ALiBi) or carry a state along (Mamba) are always laid out flat (`shares_prompts`).

Several stretches share a row, and several rows a pack, when that is cheaper than another forward. A pack whose rows are
plain causal needs no mask at all (right padding is invisible to a causal model).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .attention import Stretch, TreeMask, additive_mask, block_mask
from .trace import Trace

log = logging.getLogger(__name__)
_PADDING = -1
_FULL = 512  # positions of a row on the CPU beyond which sharing it saves less than a twentieth


@dataclass(frozen=True)
class Cost:
    """What a forward costs, in multiply-adds.

    Attributes:
        linear: of one token through the layers (about the number of non-embedding parameters).
        attention: of one query-key pair through all layers (2 x hidden x layers).
        launch: fixed cost of one forward, in the same unit (Python and kernel launches).
        shares: whether the model can take trees, and several stretches in a row, at all (`shares_prompts`).
        skips: whether attention computes only what the mask allows (`attention.TreeMask`), not the whole row.
        masked: how many times as much a pair costs under a dense mask, of which SDPA's fast GPU kernels take none.
    """

    linear: float
    attention: float
    launch: float
    shares: bool = True
    skips: bool = False
    masked: float = 1.0

    @classmethod
    def of(cls, model: Any) -> Cost:
        """Read off a causal LM."""
        config, ends = model.config.get_text_config(), {model.get_input_embeddings().weight, _head_weight(model)}
        linear = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in ends)
        # Every forward reads all weights once, which takes as long as computing some 16 tokens with them, and launches
        # about ten operations a layer; on a GPU that takes half a millisecond, enough for 1e11 multiply-adds (an H200).
        launch = 16.0 * linear + (8e6 if model.device.type == "cpu" else 1e11) * config.num_hidden_layers
        attention = 2.0 * config.hidden_size * config.num_hidden_layers
        masked = 4.0 if model.device.type != "cpu" and config._attn_implementation == "sdpa" else 1.0
        return cls(float(linear), attention, launch, shares_prompts(model), _skips(model), masked)

    def stretch(self, trunk: int, lengths: Sequence[int] = ()) -> float:
        """One stretch of a row, alone."""
        tokens = trunk + sum(lengths)
        pairs = tokens * tokens
        if self.skips:
            first, *others = lengths or (0,)
            pairs = (trunk + first) ** 2 + sum(n * (trunk + n) for n in others)
        return self.linear * tokens + self.attention * pairs * (self.masked if len(lengths) > 1 else 1.0)


@dataclass(frozen=True, eq=False)
class Pack:
    """R rows of C columns that hold N completions of at most T tokens.

    Attributes:
        input_ids_RC, position_ids_RC: what the model reads.
        segment_RC: which stretch a column belongs to (-1: padding); branch_RC: 0 in the trunk, 1..K in a branch.
        predict_NT: flat index into R*C of the position whose output predicts token t of completion n.
        prompt_N: flat index of the prompt's last token; end_N: of the completion's (None: it was not laid out).
        ids_NT: the completion ids (0 beyond the end).
        present_NT: True on real tokens, emitted or not; mask_NT: True on tokens that the policy emitted.
        order: for each of the N completions, (group, completion) in the caller's groups.
        causal: plain causal rows, so no mask is needed.
        stretches: of a single row without padding, (tokens of the trunk, of each branch) one after the other; else ().
    """

    input_ids_RC: Tensor
    position_ids_RC: Tensor
    segment_RC: Tensor
    branch_RC: Tensor
    predict_NT: Tensor
    ids_NT: Tensor
    present_NT: Tensor
    mask_NT: Tensor
    order: tuple[tuple[int, int], ...]
    causal: bool
    stretches: tuple[Stretch, ...] = ()
    prompt_N: Tensor | None = None
    end_N: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Positions computed, padding included."""
        return self.input_ids_RC.numel()

    def to(self, device: torch.device) -> Pack:
        """The pack on a device."""
        if self.input_ids_RC.device == device:
            return self
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    def inputs(self, model: Any) -> dict[str, Any]:
        """Keyword arguments of the model's backbone: ids, positions, and the mask its attention wants.

        SDPA and eager get an additive mask of shape (R, 1, C, C), SDPA on the CPU one that skips what is masked;
        FlexAttention a block mask; a model whose layers differ (full and sliding) a dict of masks, sliding windows
        counted by position, not by column.

        Raises:
            ValueError: rows that are not plain causal, for a model that cannot compute them.
        """
        if not self.causal and not shares_prompts(model):
            raise ValueError(
                f"{type(model).__name__} does not keep the branches of a prompt apart (it carries a state along, or "
                "counts by column); pack with tree='never', or with cost=Cost.of(model)"
            )
        return self._inputs(model)

    def _inputs(self, model: Any) -> dict[str, Any]:
        if self.causal:
            return {"input_ids": self.input_ids_RC, "position_ids": self.position_ids_RC, "use_cache": False}
        config = model.config.get_text_config()
        kinds, window = _windows(config)
        unknown = kinds - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(f"no mask is known for layers of type {', '.join(sorted(unknown))}")

        dtype, rows = next(model.parameters()).dtype, (self.segment_RC, self.branch_RC, self.position_ids_RC)

        def build(window: int | None) -> Any:
            if config._attn_implementation == "flex_attention":
                return block_mask(*rows, window)
            mask = additive_mask(*rows, window, dtype)
            return TreeMask.of(mask, self.stretches) if self.stretches and window is None and _skips(model) else mask

        mixed = "sliding_attention" in kinds and "full_attention" in kinds
        mask = {"full_attention": build(None), "sliding_attention": build(window)} if mixed else build(window)
        return {
            "input_ids": self.input_ids_RC,
            "position_ids": self.position_ids_RC,
            "attention_mask": mask,
            "use_cache": False,
        }


def pack(
    groups: Sequence[Sequence[Trace]],
    *,
    cost: Cost | None = None,
    tree: str = "auto",
    max_tokens: int = 4096,
    pad_left: bool = False,
    ends: bool = False,
) -> list[Pack]:
    """Lay groups out for the model.

    Args:
        groups: each a sequence of K >= 1 traces with one and the same prompt.
        cost: decides tree or flat, and how many groups share a forward; default: of a 100M-parameter model.
        tree: ``auto`` (cheaper of both), ``always``, or ``never``: then every row is one prompt and one completion,
            plain causal, which any architecture can compute.
        max_tokens: most positions (padding included) of one pack; a single larger group still gets a pack.
        pad_left: put padding first (only to show that it does not matter).
        ends: feed the last token of each completion, too: it predicts nothing, but its hidden state may be wanted.

    Returns:
        Packs that together hold every completion once; a group is never divided, so that objectives which need its
        completions together can be computed pack by pack.

    Raises:
        ValueError: a group without traces or with differing prompts, an empty prompt, an unknown `tree`.
    """
    if tree not in ("auto", "always", "never"):
        raise ValueError(f"tree={tree!r} is not one of auto, always, never")
    cost = cost or Cost(1e8, 4e4, 1.8e9)
    tree = "never" if tree == "auto" and not cost.shares else tree
    layouts = [_layout(g, group, cost, tree, ends) for g, group in enumerate(groups)]
    packs: list[list[list[_Stretch]]] = []
    # Groups of similar length share a pack, so that rows waste little padding.
    queue = sorted(layouts, key=lambda stretches: -max(s.size for s in stretches))
    if cost.skips and tree != "never" and not pad_left:
        packs, queue = [[row] for row in _fill(layouts, max_tokens)], []
    while queue:
        rows: list[list[_Stretch]] = []
        width = max(s.size for s in queue[0])
        rest = []
        for stretches in queue:
            more = rows + [[s] for s in stretches]
            alone = sum(cost.stretch(s.size) for s in stretches) + cost.launch
            padded = len(stretches) * cost.stretch(width)
            if rows and (len(more) * width > max_tokens or padded > alone):
                rest.append(stretches)
            else:
                rows = more
        packs.append(rows if tree == "never" else _merge_short(rows, width, cost))
        queue = rest
    made = [_build(rows, groups, pad_left, ends) for rows in packs]
    trees = sum(len(stretches) == 1 and stretches[0].k > 1 for stretches in layouts)
    flat = sum(len(t.prompt_ids) + len(t) for group in groups for t in group)
    log.info(
        "packed %d groups (%d as trees: cheaper there) into %d forwards of %d positions; flat and unpadded: %d",
        len(groups),
        trees,
        len(made),
        sum(p.tokens for p in made),
        flat,
    )
    return made


@dataclass(frozen=True)
class _Stretch:
    """Part of a row: a trunk of one group and some of its completions."""

    group: int
    completions: tuple[int, ...]
    trunk: int
    lengths: tuple[int, ...]

    @property
    def k(self) -> int:
        return len(self.completions)

    @property
    def size(self) -> int:
        return self.trunk + sum(self.lengths)


def _layout(g: int, group: Sequence[Trace], cost: Cost, tree: str, ends: bool) -> list[_Stretch]:
    if not group:
        raise ValueError(f"group {g} has no completion; leave it out")
    prompt = group[0].prompt_ids
    if not prompt:
        raise ValueError(f"group {g} has an empty prompt, so nothing predicts its first token; start it with BOS")
    if any(t.prompt_ids != prompt for t in group):
        raise ValueError(f"the completions of group {g} follow different prompts; make one group a prompt")
    # The last token of a completion predicts nothing that is scored, so it is not fed unless its own state is wanted.
    lengths = tuple(len(t) if ends else max(len(t) - 1, 0) for t in group)
    one = _Stretch(g, tuple(range(len(group))), len(prompt), lengths)
    each = [_Stretch(g, (k,), len(prompt), (n,)) for k, n in enumerate(lengths)]
    if tree == "always" or len(group) == 1:
        return [one]
    if tree == "never":
        return each
    return [one] if cost.stretch(one.trunk, lengths) <= sum(cost.stretch(s.size) for s in each) else each


def _fill(layouts: list[list[_Stretch]], max_tokens: int) -> list[list[_Stretch]]:
    """Rows without padding, each one forward (first fit, the largest group first): as long as the largest group, which
    alone says how much memory is needed, and at least so long that launching another forward costs little."""
    sizes = [sum(s.size for s in stretches) for stretches in layouts]
    room = min(max_tokens, max([*sizes, _FULL]))
    rows: list[list[_Stretch]] = []
    for stretches, size in sorted(zip(layouts, sizes, strict=True), key=lambda pair: -pair[1]):
        home = next((row for row in rows if sum(s.size for s in row) + size <= room), None)
        if home is None:
            rows.append(list(stretches))
        else:
            home += stretches
    return rows


def _merge_short(rows: list[list[_Stretch]], width: int, cost: Cost) -> list[list[_Stretch]]:
    """Put several short stretches into one row (first fit) where that leaves fewer rows and is worth a mask."""
    merged: list[list[_Stretch]] = []
    for row in rows:
        size = sum(s.size for s in row)
        home = next((m for m in merged if sum(s.size for s in m) + size <= width), None)
        if home is None:
            merged.append(list(row))
        else:
            home += row
    now = cost.stretch(width, () if all(s.k == 1 for row in rows for s in row) else (0, 0))
    return merged if len(merged) * cost.stretch(width, (0, 0)) < len(rows) * now else rows


def _build(rows: list[list[_Stretch]], groups: Sequence[Sequence[Trace]], pad_left: bool, ends: bool = False) -> Pack:
    """Fill the tensors of one pack."""
    width = max(sum(s.size for s in row) for row in rows)
    longest = max((len(groups[s.group][k]) for row in rows for s in row for k in s.completions), default=0)
    n = sum(s.k for row in rows for s in row)
    ids, positions = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    segment, branch = np.full((len(rows), width), _PADDING, np.int32), np.zeros((len(rows), width), np.int32)
    predict, targets = np.zeros((n, longest), np.int64), np.zeros((n, longest), np.int64)
    present, mask = np.zeros((n, longest), bool), np.zeros((n, longest), bool)
    prompt, end = np.zeros(n, np.int64), np.zeros(n, np.int64)
    order: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        at = width - sum(s.size for s in row) if pad_left else 0
        for number, stretch in enumerate(row):
            group = groups[stretch.group]
            trunk = slice(at, at + stretch.trunk)
            ids[r, trunk] = group[0].prompt_ids
            positions[r, trunk] = np.arange(stretch.trunk)
            segment[r, at : at + stretch.size] = number
            at += stretch.trunk
            last_of_trunk = r * width + at - 1
            for b, (k, length) in enumerate(zip(stretch.completions, stretch.lengths, strict=True), start=1):
                trace, i = group[k], len(order)
                t = len(trace)
                here = slice(at, at + length)
                ids[r, here] = trace.completion_ids[:length]
                positions[r, here] = stretch.trunk + np.arange(length)
                branch[r, here] = b
                if t:
                    predict[i, 0] = last_of_trunk
                    predict[i, 1:t] = r * width + np.arange(at, at + t - 1)
                    targets[i, :t] = trace.completion_ids
                    present[i, :t] = True
                    mask[i, :t] = trace.mask
                order.append((stretch.group, k))
                at += length
                prompt[i], end[i] = last_of_trunk, r * width + at - 1 if length else last_of_trunk
    causal = not pad_left and all(len(row) == 1 and row[0].k == 1 for row in rows)
    if causal:  # positions that start again in the padding look like packed rows: transformers would build a mask
        positions[:] = np.arange(width)
    tensors = map(torch.from_numpy, (ids, positions, segment, branch, predict, targets, present, mask))
    last = {"prompt_N": torch.from_numpy(prompt), "end_N": torch.from_numpy(end) if ends else None}
    stretches = tuple((s.trunk, s.lengths) for s in rows[0]) if len(rows) == 1 and not pad_left else ()
    return Pack(*tensors, order=tuple(order), causal=causal, stretches=stretches, **last)


def _windows(config: Any) -> tuple[set[str], int | None]:
    """The kinds of layers that a model has, and the window of those that slide (of all, if it names no kinds)."""
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return kinds, None if kinds == {"full_attention"} else window


def _skips(model: Any) -> bool:
    """Whether a model's attention skips what a `TreeMask` forbids: on the CPU, where torch's SDPA is handed it."""
    return model.config.get_text_config()._attn_implementation == "sdpa" and model.device.type == "cpu"


def _head_weight(model: Any) -> Tensor:
    head = model.get_output_embeddings()
    return head.weight if head is not None else model.get_input_embeddings().weight


_shares: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def shares_prompts(model: Any) -> bool:
    """Whether a causal LM computes two branches of one trunk as it computes each alone: tried once, on a few tokens."""
    if model not in _shares:
        with evaluating(model), torch.no_grad():
            _shares[model] = _keeps_branches_apart(model)
    return _shares[model]


def _keeps_branches_apart(model: Any) -> bool:
    config = model.config.get_text_config()
    if hasattr(config, "attention_types"):
        return False  # GPT-Neo counts its windows by column, which shows on long rows only
    ids = tuple(i % config.vocab_size for i in range(1, 9))
    group = [
        Trace(
            prompt_ids=ids[:2], prompt_pieces=(b"",) * 2, completion_ids=c, completion_pieces=(b"",) * 3, tokenizer=""
        )
        for c in (ids[2:5], ids[5:8])
    ]
    tree, flat = [[_Stretch(0, (0, 1), 2, (2, 2))]], [[_Stretch(0, (0,), 2, (2,))], [_Stretch(0, (1,), 2, (2,))]]
    try:
        packs = [_build(rows, [group], False).to(next(model.parameters()).device) for rows in (tree, flat)]
        states = [model.base_model(**p._inputs(model)).last_hidden_state.flatten(0, 1)[p.predict_NT] for p in packs]
    except Exception as error:  # it cannot read the mask
        log.info("%s cannot share prompts: %r", type(model).__name__, error)
        return False
    difference = (states[0] - states[1]).abs().max()
    precise = states[0].dtype in (torch.float32, torch.float64)
    return bool(difference <= (1e-3 if precise else 5e-2) * states[1].abs().max())


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside the block; every module is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
