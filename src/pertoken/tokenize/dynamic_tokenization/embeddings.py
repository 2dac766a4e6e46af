"""Embeddings of tokens that the model does not have: the mean of their parts (FVT), or a small hypernetwork.

    fvt(t) = mean_k E[c_k],   c = t under the base tokenizer (a base token: its own row; nothing: unk)
    hypernetwork(t) = fvt(t) + s W f(E[c_1] .. E[c_6])

f is a transformer of two layers over the parts (of untied models input and output rows side by side), pooled; s the
root mean square of E; W begins at 0, so that untrained it is FVT. It gives an input row, an output row and a bias. It
is trained twice, the model frozen: `reproduce` (real tokens from random splits of them into 2 to 6 tokens, mean squared
error over s^2) and `distill` (KL of the base model on unmerged text to the model on merged text, over the places where
both end a token; M uniform between 0 and the limit in each batch).

Differs from the authors' code: they take large hypernetworks trained elsewhere (zett); rows of base tokens stay as they
are unless `predict_base`; no language index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...core.head import Head, at_least_float32, kl_divergence
from .._hypernetwork import Hypernetwork, Rows
from .merging import Boundary, Merged, Symbols, merge, random_split


class Embeddings:
    """Rows of any token, by FVT or a hypernetwork, of a causal model or an encoder; predicted ones are cached.

    Args:
        predict_base: base tokens, too, get what the hypernetwork says (specials never do).
        cache: rows kept, the last used; those of the current batch always are.
    """

    def __init__(
        self,
        model: Any,
        symbols: Symbols,
        hypernetwork: Hypernetwork | None = None,
        *,
        predict_base: bool = False,
        cache: int = 5000,
    ):
        self.model, self.symbols, self.hypernetwork = model, symbols, hypernetwork
        self.predict_base, self.cache = predict_base, cache
        self.table, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.kept: OrderedDict[int, tuple[Tensor, Tensor, Tensor]] = OrderedDict()
        self._parts: dict[int, tuple[int, ...]] = {}

    def new(self, symbol: int) -> bool:
        """It has no row, or none that is used."""
        return symbol >= self.symbols.base or (self.predict_base and not self.symbols.special(symbol))

    def parts(self, symbol: int) -> tuple[int, ...]:
        """Base ids of a token; the unknown token's if there are none.

        Raises:
            ValueError: none, and no unknown token.
        """
        if symbol < self.symbols.base:
            return (symbol,)
        found = self._parts.get(symbol)
        if found is None:
            found = self._parts[symbol] = self._decompose(self.symbols.piece(symbol))
        return found

    def _decompose(self, piece: bytes) -> tuple[int, ...]:
        tokenizer, of = self.symbols.tokenizer, self.symbols.known
        ids = tuple(tokenizer.encode(piece.decode("utf-8", "replace"), add_special_tokens=False))
        if ids and b"".join(map(self.symbols.piece, ids)) == piece:
            return ids
        out, start = [], 0  # no text (or not as the tokenizer writes it): the longest base token that begins it
        while start < len(piece):
            ends = (e for e in range(len(piece), start, -1) if (of(piece[start:e]) or 0) < self.symbols.base)
            end = next((e for e in ends if of(piece[start:e]) is not None), None)
            if end is None:
                unknown = tokenizer.unk_token_id
                if unknown is None:
                    raise ValueError(f"{piece!r} is nothing in base tokens, and this tokenizer has no unknown token")
                return (unknown,)
            out.append(of(piece[start:end]))
            start = end
        return tuple(out)

    def fvt(self, parts: Sequence[Sequence[int]]) -> Rows:
        """Means of the parts' rows."""
        sizes = torch.tensor([len(some) for some in parts])
        owner = torch.arange(len(parts)).repeat_interleave(sizes).to(self.table.weight.device)
        rows = self._source([i for some in parts for i in some])

        def mean(x: Tensor) -> Tensor:
            wide = at_least_float32(x.reshape(len(x), -1))
            total = wide.new_zeros(len(parts), wide.shape[1]).index_add(0, owner, wide)
            return (total / sizes.to(x.device)[:, None]).reshape(-1, *x.shape[1:]).to(x.dtype)

        return mean(rows[0]), mean(rows[1]), mean(rows[2])

    def _source(self, ids: Sequence[int]) -> Rows:
        where = torch.as_tensor(ids, device=self.table.weight.device)
        rows = self.table(where).detach()  # some models scale their rows here
        out = rows if self.head is None else self.head.weight.detach()[where]
        bias = None if self.head is None else self.head.bias
        return rows, out, rows.new_zeros(len(ids)) if bias is None else bias.detach()[where]

    def predict(self, parts: Sequence[Sequence[int]]) -> Rows:
        """Rows of tokens from their parts, with gradients to the hypernetwork."""
        means = self.fvt(parts)
        if self.hypernetwork is None:
            return means
        net = self.hypernetwork
        width = min(net.parts, max(map(len, parts)))
        ids = torch.zeros(len(parts), width, dtype=torch.long)
        mask = torch.zeros(len(parts), width, dtype=torch.bool)
        for row, some in enumerate(parts):  # parts beyond the sixth are in the mean alone
            ids[row, : len(some)] = torch.as_tensor(some[:width])
            mask[row, : len(some)] = True
        inputs, outputs, _ = self._source(ids.flatten().tolist())
        sources = inputs if net.config["sources"] == 1 else torch.cat([inputs, outputs], -1)
        added = net(sources.reshape(*ids.shape, -1), mask.to(sources.device))
        return tuple(m + a.to(m.dtype) for m, a in zip(means, added))  # type: ignore[return-value]

    def rows(self, some: Sequence[int]) -> Rows:
        """Rows of tokens: without gradients, through the cache; with gradients, made now."""
        if torch.is_grad_enabled() and self.hypernetwork is not None:
            return self.predict([self.parts(s) for s in some])
        missing = list(dict.fromkeys(s for s in some if s not in self.kept))
        if missing:
            made = self.predict([self.parts(s) for s in missing])
            self.kept.update({s: (made[0][k], made[1][k], made[2][k]) for k, s in enumerate(missing)})
        for s in some:
            self.kept.move_to_end(s)
        found = [torch.stack([self.kept[s][k] for s in some]) for k in range(3)]
        while len(self.kept) > max(self.cache, len(set(some))):
            self.kept.popitem(last=False)
        return found[0], found[1], found[2]

    def inputs(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """Input embeddings (N, T, H) and attention mask (N, T) of rows of symbols, padded on the right or left."""
        width, device = max(1, *map(len, rows)), self.table.weight.device
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for n, row in enumerate(rows):
            begin = width - len(row) if left else 0
            ids[n, begin : begin + len(row)], mask[n, begin : begin + len(row)] = row, 1
        some = [s for s in np.unique(ids[mask == 1]).tolist() if self.new(s)]
        place = np.full(len(self.symbols), -1)
        place[some] = np.arange(len(some))
        which = torch.from_numpy(np.where(mask == 1, place[ids], -1)).to(device)
        embedded = self.table(torch.from_numpy(np.where((which.cpu().numpy() >= 0), 0, ids)).to(device))
        if some:
            made = self.rows(some)[0].to(embedded.dtype)
            embedded = torch.where((which >= 0)[..., None], made[which.clamp(min=0)], embedded)
        return embedded, torch.from_numpy(mask).to(device)


def reproduce(
    embeddings: Embeddings, *, steps: int = 2000, batch: int = 512, lr: float = 3e-4, seed: int = 0
) -> list[float]:
    """Train the hypernetwork on random splits of real tokens; the losses (FVT's would be the first)."""
    symbols, net, rng = embeddings.symbols, embeddings.hypernetwork, np.random.default_rng((seed, 1))
    assert net is not None
    usable = [i for i in range(symbols.base) if not symbols.special(i) and len(symbols.piece(i)) > 1]
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=lr), []
    for _ in range(steps):
        pairs = [
            (i, p)
            for i in rng.choice(usable, batch).tolist()
            if (p := random_split(symbols.piece(i), symbols, rng, net.parts))
        ]
        made, real = embeddings.predict([p for _, p in pairs]), embeddings.fvt([(i,) for i, _ in pairs])
        errors = [(m.float() - r.float()).square().mean() / net.scale**2 for m, r in zip(made, real)]
        loss = torch.stack(errors).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    embeddings.kept.clear()
    return losses


def backbone(model: Any, embedded: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (N, T, H) of a causal model or an encoder, rows padded on the right."""
    return model.base_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state


def distill(
    embeddings: Embeddings,
    rows: Sequence[Sequence[int]],
    boundary: Boundary,
    *,
    steps: int = 2000,
    batch: int = 32,
    lr: float = 3e-4,
    seed: int = 0,
    places: int | None = None,
    chunk: int = 256,
) -> list[float]:
    """Train the hypernetwork to keep what the frozen base model says after merged tokens; the losses, nats a boundary.

    Args:
        rows: base ids of texts. places: boundaries a batch that the loss looks at, drawn anew; None: all.
        chunk: boundaries whose logits exist together.
    """
    net, model, rng = embeddings.hypernetwork, embeddings.model, np.random.default_rng((seed, 2))
    assert net is not None
    head, taught = Head(model), dict[int, Tensor]()
    optimizer, losses, order = torch.optim.Adam(net.parameters(), lr=lr), [], list[int]()

    def divergence(teacher: Tensor, student: Tensor) -> Tensor:
        return kl_divergence(head(teacher).log_softmax(-1), head(student).log_softmax(-1)).sum()

    for _ in range(steps):
        while len(order) < min(batch, len(rows)):
            order += rng.permutation(len(rows)).tolist()
        drawn, order = order[:batch], order[batch:]
        some = [rows[i] for i in drawn]
        limit = len(merge(some, boundary).steps)
        merged: Merged = merge(some, boundary, int(rng.integers(limit + 1)))
        unseen = [i for i in dict.fromkeys(drawn) if i not in taught]
        if unseen:
            with torch.no_grad():
                whole = Embeddings(model, embeddings.symbols).inputs([rows[i] for i in unseen])
                taught |= {i: h[: len(rows[i])].clone() for i, h in zip(unseen, backbone(model, *whole))}
        student = backbone(model, *embeddings.inputs(merged.rows))
        teacher = torch.cat([taught[i][merged.ends(n, len(rows[i]))] for n, i in enumerate(drawn)])
        student = torch.cat([student[n, : len(row)] for n, row in enumerate(merged.rows)])
        if places is not None and len(teacher) > places:
            kept = torch.from_numpy(np.sort(rng.choice(len(teacher), places, replace=False)))
            teacher, student = teacher[kept], student[kept]
        parts = zip(teacher.split(chunk), student.split(chunk))
        loss = torch.stack([checkpoint(divergence, t, s, use_reentrant=False) for t, s in parts]).sum() / len(teacher)
        losses.append(float(loss.detach()))
        if not loss.requires_grad:
            continue  # M = 0 was drawn: nothing was merged
        for parameter, grad in zip(net.parameters(), torch.autograd.grad(loss, [*net.parameters()], allow_unused=True)):
            parameter.grad = grad
        optimizer.step()
    embeddings.kept.clear()
    return losses
