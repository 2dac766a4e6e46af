"""Learning from comparisons, for every reward model: heads on features, their one trainer, one Bradley-Terry fit.

Parts that know nothing of each other. `PreferenceHead` turns hidden states into preference embeddings (GPM, arXiv
2410.02197; Bradley-Terry is one of them). `fit_pairs` trains any head on pairs of items, whose features are an array or
come from an encoder. `fit_bradley_terry` (in `bradley_terry`) gives each compared item a strength with its error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bradley_terry import BradleyTerry, fit_bradley_terry
from .data import batches

__all__ = [
    "BradleyTerry",
    "HeadOptions",
    "PairConfig",
    "PairFit",
    "PreferenceHead",
    "bt_embedding",
    "cyclic_triples",
    "fit_bradley_terry",
    "fit_pairs",
    "preference_loss",
    "regression_loss",
    "skew_score",
    "skew_table",
]

TAU_START, TAU_FLOOR = -2.25, 0.01  # softplus(-2.25) = 0.1
REGRESSION_TARGET = 10.0
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]

# ---- preference embeddings


def skew_score(a: Tensor, b: Tensor, gate: Tensor | None = None) -> Tensor:
    """s(a > b) = sum over blocks l of lambda_l (a_{2l-1} b_{2l} - a_{2l} b_{2l-1}): antisymmetric to the bit.

    Args:
        a, b: embeddings (..., 2k). gate: lambda (..., k); None: 1.

    Raises:
        ValueError: an odd dimension.
    """
    if a.shape[-1] % 2:
        raise ValueError(f"embeddings of {a.shape[-1]} dimensions have no blocks of two; give an even dimension")
    blocks = a[..., 0::2] * b[..., 1::2] - a[..., 1::2] * b[..., 0::2]
    return (blocks if gate is None else gate * blocks).sum(-1)


def skew_table(v_KD: Tensor, gate: Tensor | None = None) -> Tensor:
    """s(i > j) of all pairs, (K, K): one product of matrices, antisymmetric to the bit, zeros on the diagonal."""
    if v_KD.shape[-1] % 2:
        raise ValueError(f"embeddings of {v_KD.shape[-1]} dimensions have no blocks of two; give an even dimension")
    first = v_KD[:, 0::2] if gate is None else gate * v_KD[:, 0::2]
    half_KK = first @ v_KD[:, 1::2].T
    return half_KK - half_KK.T


def cyclic_triples(table_KK: Tensor | np.ndarray) -> int:
    """How many sets of three items beat each other in a circle (positive entries are wins)."""
    wins = (np.asarray(table_KK) > 0).astype(np.int64)
    return int(np.trace(wins @ wins @ wins)) // 3


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """A preference head: what it is, and the loss it is trained by."""

    form: Literal["gpm", "bt"] = "gpm"
    """gpm: embeddings of `dim`; bt: one reward r, which embeds as (r, 1), neither normalised nor gated."""
    dim: int = 2
    """2k, dimensions of the embedding (even)."""
    normalize: bool = True
    """Divide embeddings by their length, so that |s| <= 1 without a gate."""
    gate: Literal["none", "softmax", "scaled"] = "none"
    """lambda from the prompt: none (all 1), softmax(G h), or k softmax(G h / sqrt(hidden))."""
    tau: float = 0.1
    """tau, the temperature of s."""
    learn_tau: bool = False
    """tau = max(softplus(t), 0.01) with t trained from -2.25."""
    loss: Literal["preference", "regression"] = "preference"
    """-log sigmoid((s - margin) / tau), or 0.5 (s / tau - 10)^2 without margin."""

    def __post_init__(self) -> None:
        for name, known in (("form", ("gpm", "bt")), ("gate", ("none", "softmax", "scaled"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.loss not in ("preference", "regression"):
            raise ValueError(f"loss={self.loss!r} is not one of preference, regression")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim={self.dim}: embeddings have blocks of two, so give an even dimension of 2 or more")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau={self.tau} must be above 0")
        if self.learn_tau and self.tau != 0.1:
            raise ValueError(f"a learned tau starts at 0.1; leave tau={self.tau} out, or keep it fixed")
        if self.form == "bt" and self.gate != "none":
            raise ValueError("a gate weighs the blocks of a GPM against each other, and Bradley-Terry has one; drop it")


class PreferenceHead(nn.Module):
    """Hidden states (N, hidden) to embeddings (N, 2k), in the dtype of its weights (float32).

    Args:
        hidden: width of the hidden states.
        options: what it is.
        generator: of the initial weights: normal, standard deviation 1 / (hidden + 1); None: torch's own.
    """

    def __init__(self, hidden: int, options: HeadOptions, generator: torch.Generator | None = None):
        super().__init__()
        self.options, self.hidden = options, hidden
        width, std = options.dim if options.form == "gpm" else 1, 1.0 / (hidden + 1)
        self.embed = nn.Parameter(std * torch.randn(width, hidden, generator=generator))
        if options.gate != "none":
            self.gate = nn.Parameter(std * torch.randn(options.dim // 2, hidden, generator=generator))
        if options.learn_tau:
            self.t = nn.Parameter(torch.tensor(TAU_START))

    @property
    def tau(self) -> Tensor:
        """The temperature, a scalar with gradient if it is learned."""
        if self.options.learn_tau:
            return F.softplus(self.t).clamp(min=TAU_FLOOR)
        return self.embed.new_tensor(self.options.tau)

    def forward(self, h_NH: Tensor) -> Tensor:
        """Embeddings v = H h, of length 1 where they are normalised."""
        v_ND = F.linear(h_NH.to(self.embed.dtype), self.embed)
        if self.options.form == "bt":
            return bt_embedding(v_ND[..., 0])
        return F.normalize(v_ND, dim=-1) if self.options.normalize else v_ND

    def gates(self, h_prompt_NH: Tensor | None) -> Tensor | None:
        """lambda (N, k) of the prompts' hidden states; None without a gate.

        Raises:
            ValueError: there is a gate and no prompt.
        """
        if self.options.gate == "none":
            return None
        if h_prompt_NH is None:
            raise ValueError("the gate reads the prompt's hidden state; give it, or choose gate='none'")
        logits = F.linear(h_prompt_NH.to(self.gate.dtype), self.gate)
        if self.options.gate == "scaled":
            return logits.shape[-1] * torch.softmax(logits / math.sqrt(self.hidden), -1)
        return torch.softmax(logits, -1)

    def losses(self, s_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
        """Losses (B,) of pairs from s(winner > loser); margins in units of s, for the preference loss alone."""
        if self.options.loss == "regression":
            return regression_loss(s_B, self.tau)
        return preference_loss(s_B, self.tau, margin_B)


def bt_embedding(r: Tensor) -> Tensor:
    """Bradley-Terry rewards (...) as embeddings (r, 1): s(a > b) = r_a - r_b."""
    return torch.stack([r, torch.ones_like(r)], -1)


def preference_loss(s_B: Tensor, tau: Tensor | float, margin_B: Tensor | None = None) -> Tensor:
    """-log sigmoid((s(y_w > y_l) - margin) / tau), one a pair; the margin is in units of s."""
    return -F.logsigmoid((s_B if margin_B is None else s_B - margin_B) / tau)


def regression_loss(s_B: Tensor, tau: Tensor | float) -> Tensor:
    """0.5 (s / tau - 10)^2, one a pair."""
    return 0.5 * (s_B / tau - REGRESSION_TARGET) ** 2


# ---- the trainer


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How a head is trained on pairs."""

    lr: float = 1e-3
    batch_size: int = 64
    """Pairs an update."""
    epochs: int = 50
    optimizer: Literal["adamw", "adam"] = "adamw"
    weight_decay: float = 0.0
    dev_share: float = 0.1
    """Share of the groups that is not trained on; the epoch with the least loss on it is kept (0: the last one)."""
    patience: int = 5
    """Epochs without a smaller loss on the development share before it stops (0: it goes on to the end)."""
    seed: int = 0
    """Of the split and of the order."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.batch_size >= 1 and self.epochs >= 1 and 0 <= self.dev_share < 1):
            raise ValueError(f"{self}: lr > 0, batch_size >= 1, epochs >= 1 and 0 <= dev_share < 1 are needed")
        if self.optimizer not in ("adamw", "adam"):
            raise ValueError(f"optimizer={self.optimizer!r} is not one of adamw, adam")


@dataclass(frozen=True)
class PairFit:
    """What a training came to: loss (and dev_loss) of every epoch, the epoch whose weights were kept, and the rows."""

    history: list[dict[str, float]]
    best: int
    train_rows: np.ndarray
    dev_rows: np.ndarray


def fit_pairs(
    head: nn.Module,
    items: np.ndarray | Tensor | Sequence[Any],
    pairs_B2: np.ndarray | Tensor | Sequence[tuple[int, int]],
    losses: Losses,
    config: PairConfig | None = None,
    *,
    encoder: Callable[[Sequence[Any]], Tensor] | None = None,
    groups: Sequence[Hashable] | None = None,
    progress: bool = False,
) -> PairFit:
    """Train a head in place.

    Args:
        head: module of features (n, H), trained.
        items: features (N, H); with an encoder, whatever it takes.
        pairs_B2: (first, second) indices of items, B of them.
        losses: (head of the firsts, head of the seconds, rows (b,)) -> losses (b,) of these rows of the pairs; labels,
            margins and weights are looked up by row.
        config: see there.
        encoder: some items -> features (n, H); trained, too, if it is a module. Each item of a batch is encoded once.
        groups: of each pair; the development split takes whole groups (give prompts). Default: each pair is one.
        progress: show a bar.

    Raises:
        ValueError: no pair, indices without item, too few groups for the split, or a loss that is not finite (names
            rows).
    """
    config = config or PairConfig()
    pairs = torch.as_tensor(np.asarray(pairs_B2), dtype=torch.long)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs of shape {tuple(pairs.shape)}; give at least one (first, second)")
    if int(pairs.min()) < 0 or int(pairs.max()) >= len(items):
        raise ValueError(f"the pairs name items up to {int(pairs.max())}, and there are {len(items)}")
    modules = [head, *([encoder] if isinstance(encoder, nn.Module) else [])]
    weights = [p for m in modules for p in m.parameters() if p.requires_grad]
    table = torch.as_tensor(items) if encoder is None else None
    train_rows, dev_rows = _split(groups if groups is not None else range(len(pairs)), len(pairs), config)

    def run(rows: np.ndarray) -> Tensor:
        index = torch.from_numpy(rows)
        which, back = pairs[index].unique(return_inverse=True)
        x = table[which] if table is not None else encoder([items[i] for i in which.tolist()])  # type: ignore[misc]
        said = head(x.to(weights[0].device))
        found = losses(said[back[:, 0]], said[back[:, 1]], index)
        if not torch.isfinite(found).all():
            bad = rows[(~torch.isfinite(found)).nonzero()[:8, 0].cpu().numpy()]
            raise ValueError(f"the loss of pairs {bad.tolist()} is not finite; look at their features, or lower lr")
        return found

    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(weights, lr=config.lr, weight_decay=config.weight_decay)
    history: list[dict[str, float]] = []
    best, kept = 0, None
    from rich.progress import track

    for epoch in track(range(config.epochs), "fit pairs", disable=not progress, transient=True):
        total = 0.0
        for m in modules:
            m.train()
        for chosen in batches(len(train_rows), config.batch_size, seed=config.seed, epoch=epoch):
            optimizer.zero_grad()
            found = run(train_rows[chosen])
            found.mean().backward()
            optimizer.step()
            total += float(found.detach().sum())
        history.append({"loss": total / len(train_rows)})
        for m in modules:
            m.eval()
        if len(dev_rows):
            with torch.no_grad():
                parts = [run(dev_rows[i : i + 1024]).sum() for i in range(0, len(dev_rows), 1024)]
            history[-1]["dev_loss"] = float(sum(parts)) / len(dev_rows)
            if history[-1]["dev_loss"] < history[best]["dev_loss"] or kept is None:
                best, kept = epoch, [copy.deepcopy(m.state_dict()) for m in modules]
            if config.patience and epoch - best >= config.patience:
                break
        else:
            best = epoch
    for m, state in zip(modules, kept or [], strict=bool(kept)):
        m.load_state_dict(state)
    return PairFit(history, best, train_rows, dev_rows)


def _split(groups: Sequence[Hashable], n: int, config: PairConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to choose the epoch by."""
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} pairs; give one each")
    names = list(dict.fromkeys(groups))
    count = round(config.dev_share * len(names))
    if config.dev_share and not 0 < count < len(names):
        raise ValueError(f"a dev_share of {config.dev_share} of {len(names)} groups leaves one side empty; give 0")
    order = np.random.default_rng([config.seed, 1]).permutation(len(names))[:count]
    held = {names[i] for i in order}
    dev = np.array([g in held for g in groups], bool)
    return np.flatnonzero(~dev), np.flatnonzero(dev)
