"""SparsePO's mask networks: a weight >= 0 for each token from the reference's hidden states BEFORE it.

Every net maps hidden states (N, T, L+1, H) (`hidden_all`; index 0, the embeddings, is left out) or the last ones
(N, T, H) to weights (N, T), with one explicit last dimension throughout: nothing is squeezed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["simple_all", "simple_last", "ml_all", "ml_last", "binary_all", "binary_last", "random"]
_WIDTH = 200  # of the heads of ml_*
_INNER = 0.1  # their inner dropout


class _Head(nn.Sequential):
    """One layer's weight: Dropout(ReLU(w x + b)), or with two linear maps (and nothing but dropout between them)."""

    def __init__(self, family: str, hidden: int, dropout: float):
        maps: list[nn.Module] = [nn.Linear(hidden, 1)]
        if family == "ml":
            maps = [nn.Linear(hidden, _WIDTH), nn.Dropout(_INNER), nn.Linear(_WIDTH, 1)]
        super().__init__(*maps, nn.ReLU(), nn.Dropout(dropout))


class MaskNet(nn.Module):
    """A network of one of the paper's kinds.

    Args:
        kind: ``<simple | ml | binary>_<all | last>``, or ``random``.
        layers, hidden, eps: L, H and the epsilon of the model's own norm. dropout: after each ReLU.
    """

    def __init__(self, kind: Kind, layers: int, hidden: int, eps: float, dropout: float):
        super().__init__()
        self.family, _, self.over = kind.partition("_")
        if kind == "random":
            return
        every = self.over == "all"
        self.heads = nn.ModuleList(_Head(self.family, hidden, dropout) for _ in range(layers if every else 1))
        if every:
            self.norm = nn.LayerNorm(hidden, eps=eps)  # one for all layers
            self.mixer = nn.Linear(layers, 1, bias=False)
            nn.init.constant_(self.mixer.weight, 1 / layers)  # negative weights would be a dead ReLU from the start
            # the release's ml nets end with the ReLU, and its binary ones drop what goes into the mixer
            self.before = nn.Dropout(dropout if self.family == "binary" else 0.0)
            self.after = nn.Dropout(dropout if self.family == "simple" else 0.0)

    def forward(self, hidden: Tensor | None, like_NT: Tensor) -> Tensor:
        """Weights (N, T). Random ones are redrawn in training and 0.5, their mean, in evaluation, as dropout does it.

        Args:
            hidden: (N, T, L+1, H) for ``*_all``, (N, T, H) for ``*_last``; None for ``random``.
            like_NT: of the shape, dtype and device of the result.
        """
        if self.family == "random":
            return torch.rand_like(like_NT) if self.training else torch.full_like(like_NT, 0.5)
        assert hidden is not None
        hidden = hidden.detach().to(next(self.parameters()).dtype)  # the reference stays as it is
        if self.over == "last":
            weight_NT1 = self.heads[0](hidden)
        else:
            each = [head(self.norm(hidden[:, :, i + 1])) for i, head in enumerate(self.heads)]
            weight_NT1 = self.after(torch.relu(self.mixer(self.before(torch.cat(each, dim=-1)))))
        if self.family == "binary":
            weight_NT1 = torch.sign(weight_NT1)
        return weight_NT1.flatten(1, 2).to(like_NT.dtype)


class MaskNets(nn.Module):
    """The networks of a run, by side: ``u`` (reward) and ``d`` (KL), or one for ``both``.

    Attributes:
        dead: for each network, updates since any token of a batch had a weight; checkpointed.
    """

    def __init__(self, nets: Mapping[str, MaskNet], lr_factor: float, weight_decay: float, patience: int):
        super().__init__()
        self.nets = nn.ModuleDict(nets)
        self.lr_factor, self.weight_decay, self.patience = lr_factor, weight_decay, patience
        self.dead: Tensor
        self.register_buffer("dead", torch.zeros(len(nets), dtype=torch.int64))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights decay; biases do not, nor does the LayerNorm's scale, as in the release."""
        scales = {m.weight for m in self.modules() if isinstance(m, nn.LayerNorm)}
        plain = [p for n, p in self.named_parameters() if n.endswith("bias") or p in scales]
        decayed = [p for n, p in self.named_parameters() if not (n.endswith("bias") or p in scales)]
        fixed = any(net.family == "binary" for net in self.nets.values())  # no gradient passes a sign, so no decay
        groups = [(decayed, 0.0 if fixed else self.weight_decay), (plain, 0.0)]
        return [{"params": ps, "lr_factor": self.lr_factor, "weight_decay": wd} for ps, wd in groups if ps]

    def forward(self, sides: tuple[str, ...], hidden: Tensor | None, like_NT: Tensor) -> dict[str, Tensor]:
        """Weights (N, T) of each side; one network's are drawn once for both."""
        of = {name: net(hidden, like_NT) for name, net in self.nets.items()}
        return {side: of["both"] if "both" in of else of[side] for side in sides}

    def watch(self, weights: Mapping[str, Tensor], mask_NT: Tensor) -> None:
        """Count updates without a single weight.

        Raises:
            ValueError: `patience` updates of which every weight of a network was 0; it never comes back by itself.
        """
        # the first part of an update is the one before which no gradient was left behind
        first = all(p.grad is None for p in self.parameters())
        for i, name in enumerate(self.nets):
            m_NT = weights.get(name, next(iter(weights.values())))
            if bool((m_NT[mask_NT] != 0).any()):
                self.dead[i] = 0
            elif first:
                self.dead[i] += 1
            if self.patience and int(self.dead[i]) >= self.patience:
                raise ValueError(
                    f"the mask network {name!r} gave every token the weight 0 for {int(self.dead[i])} updates, so it "
                    "has no gradient and the loss cannot move it: lower l1_u and l1_d or mask_lr_factor, take "
                    "another seed, or switch that mask off"
                )
