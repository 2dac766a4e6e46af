"""DR-IRL's rewards: one small reward model a harm category, learned from demonstrations by inverse RL.

Cheng, Ma, Wang, Duan, Liu, Jia, Qin, Cao, Liu, Jia, "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM
Alignment", ICLR 2026, arXiv 2503.18991 (maximum-likelihood IRL as in Li et al., 2405.17888: see `core.irl`).

    max_theta min_pi E_{(x,y) ~ D_j, y' ~ pi}[ ( r_j(x, y) - r_j(x, y') ) / beta + KL( pi || pi_ref ) ]

for each category j: good answers y, and samples of the reference in the place of rejected ones. r_j is an MLP on frozen
features: of an encoder of texts, the response's and (``prompts``) the prompt's, or hidden states of an LM at the end of
the response. Shapes: demonstrations P, samples (P, K), features F. Unit: of no meaning outside of a category.

Differs from the authors' code: there is none in public; the schedule, the pool in the place of a trained policy, and
the frozen features are this library's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.credit import Credit
from ..core.describe import describe
from ..core.embed import TextEncoder
from ..core.irl import IRL, RewardHead, fit_reward
from ..core.lm import LM
from ..core.record import read_json, write_json
from ..core.trace import Trace
from ._features import response_features

FILE = "irl-reward"


@dataclass(frozen=True, kw_only=True)
class IRLReward:
    """Reward models of categories: options, features and fitted heads."""

    folder: str = ""
    """Heads that were saved (`save`, or a dr-irl run's stage)."""
    irl: IRL = field(default_factory=IRL)
    """How heads are fitted."""
    prompts: bool = True
    """r(x, y): the prompt's features beside the response's (off: of an encoder, the response's alone)."""
    lm: LM | None = None
    """Backbone whose hidden states are the features, if there is no encoder."""
    encoder: Any = None
    """From Python: texts -> features (N, H), such as core.embed.TextEncoder()."""
    heads: Any = None
    """The fitted heads, by category (`fit` fills it)."""
    record: Any = None
    """What fitting found, by category."""

    columns: ClassVar[Mapping[str, str]] = {"category": "which reward model judges the row, where there are several"}

    def __post_init__(self) -> None:
        if self.folder and self.heads is None:
            for name, value in _read(Path(self.folder), self).items():
                object.__setattr__(self, name, value)

    @classmethod
    def example(cls, lm: LM | None = None, **options: Any) -> IRLReward:
        """One with a random head, for tests."""
        made = cls(lm=lm, **options)
        width = 4 if lm is None else int(lm.causal.config.get_text_config().hidden_size)
        return dataclasses.replace(made, heads={"": RewardHead(width, made.irl.irl_hidden).eval()})

    def features(self, items: Sequence[Trace]) -> Tensor:
        """Features (N, F) of responses, float32."""
        if self.encoder is None:
            return response_features(items, self.lm)[0].float()
        said = torch.as_tensor(self.encoder([t.text for t in items]))
        asked = [torch.as_tensor(self.encoder([_asked(t) for t in items]))] if self.prompts else []
        return torch.cat([said, *asked], -1).float()

    def category(self, trace: Trace) -> str:
        """The category whose model judges a trace.

        Raises:
            ValueError: there are several and the row names none, or none of them.
        """
        if self.heads is None:
            raise ValueError(
                "these rewards are not fitted; IRLReward(...).fit(demonstrations, pools), or name a folder"
            )
        if len(self.heads) == 1:
            return next(iter(self.heads))
        named = trace.meta.get("category")
        if named not in self.heads:
            raise ValueError(
                f"row {trace.meta.get('row')}: category {named!r} is not one of {', '.join(sorted(self.heads))}; "
                "give every row a column 'category'"
            )
        return str(named)

    @torch.no_grad()
    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Sequence-level credit of kind reward: r_j of each response by the model of its category."""
        names = [self.category(t) for t in items]
        rewards = torch.zeros(len(items))
        features = self.features(items) if items else torch.zeros(0, 0)
        for name in set(names):
            rows = [i for i, n in enumerate(names) if n == name]
            rewards[rows] = self.heads[name](features[rows])
        made = []
        for trace, name, value in zip(items, names, rewards.tolist(), strict=True):
            meta = {"category": name, "scale": "IRL reward: comparable within a category, no zero of its own"}
            made.append(Credit.of_sequence(trace, value, kind="reward", method="irl-reward", version=1, meta=meta))
        return made

    def fit(
        self,
        demonstrations: Sequence[Trace],
        pools: Sequence[Sequence[Trace]],
        *,
        draw: Callable[[int, IRLReward, list[int]], Sequence[Sequence[Trace]]] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> IRLReward:
        """Fit a head a category (of ``meta["category"]``; one, if no row names any).

        Args:
            demonstrations: good responses. pools: for each, K samples of the reference to the same prompt.
            draw: for ``irl_policy="grpo"``: (round, the reward so far, indices of demonstrations of one category) ->
                samples of the current policy for these.

        Raises:
            ValueError: pools of several sizes, or not one a demonstration; some rows without a category; nothing
                sampled to compare with.
        """
        sizes = {len(p) for p in pools}
        if len(pools) != len(demonstrations) or len(sizes) != 1 or not min(sizes):
            raise ValueError(f"{len(demonstrations)} demonstrations, pools of {sorted(sizes)}: give each one K samples")
        named = [str(t.meta.get("category", "")) for t in demonstrations]
        if "" in named and len(set(named)) > 1:
            raise ValueError(f"{named.count('')} demonstrations name no category and others do; give all of them one")
        if self.irl.irl_policy == "grpo" and draw is None:
            raise ValueError("irl_policy='grpo' trains a policy between rounds; use it in dr-irl, or choose pool")
        demo_PF, pool_PKF = self.features(demonstrations), self._stacked(pools)
        heads: dict[str, RewardHead] = {}
        record: dict[str, Any] = {}
        for name in sorted(set(named)):
            rows = [i for i, n in enumerate(named) if n == name]

            def samples(number: int, head: RewardHead, rows: list[int] = rows, name: str = name) -> Tensor:
                if self.irl.irl_policy == "pool" or number == 0 or draw is None:
                    return pool_PKF[rows] if self.irl.irl_policy == "pool" else pool_PKF[rows][:, :1]
                return self._stacked(draw(number, dataclasses.replace(self, heads={name: copy_of(head)}), rows))

            keys = [demonstrations[i].prompt_ids for i in rows]
            heads[name], record[name] = fit_reward(demo_PF[rows], samples, self.irl, groups=keys, say=say)
        return dataclasses.replace(self, heads=heads, record=record)

    def _stacked(self, pools: Sequence[Sequence[Trace]]) -> Tensor:
        flat = self.features([t for pool in pools for t in pool])
        return flat.view(len(pools), -1, flat.shape[-1])

    def identity(self) -> dict[str, Any]:
        """What its numbers depend on, for hashes: options, weights, and what computes the features."""
        made = {"type": "IRLReward", "version": 1, "irl": asdict(self.irl), "prompts": self.prompts}
        source = describe(self.encoder if self.encoder is not None else self.lm)
        return made | {"features": source, "heads": {k: describe(h) for k, h in sorted((self.heads or {}).items())}}

    def save(self, folder: str | Path) -> Path:
        """Heads as one safetensors file, options as JSON."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(self.heads)
        tensors = {f"{i}.{k}": v for i, n in enumerate(names) for k, v in self.heads[n].state_dict().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{FILE}.safetensors")
        about = {"categories": names, "record": self.record, "encoder": getattr(self.encoder, "name", None)}
        return write_json(folder / f"{FILE}.json", self.identity() | about).parent


def copy_of(head: RewardHead) -> RewardHead:
    """The head as it is now, frozen."""
    made = RewardHead(head.net[0].in_features, head.net[0].out_features)
    made.load_state_dict(head.state_dict())
    return made.eval().requires_grad_(False)


def _asked(trace: Trace) -> str:
    """The words of the prompt, without the template where they are known."""
    prompt = trace.meta.get("prompt")
    if prompt is None:
        return trace.prompt_text
    return prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)


def _read(folder: Path, given: IRLReward) -> dict[str, Any]:
    from safetensors.torch import load_file

    if not (folder / f"{FILE}.json").exists():
        raise ValueError(f"{folder} holds no saved rewards ({FILE}.json); save some with IRLReward(...).fit(...).save")
    about, weights = read_json(folder / f"{FILE}.json"), load_file(folder / f"{FILE}.safetensors")
    irl, heads = IRL(**about["irl"]), {}
    for i, name in enumerate(about["categories"]):
        state = {k.partition(".")[2]: v for k, v in weights.items() if k.startswith(f"{i}.")}
        heads[name] = RewardHead(state["mean"].shape[0], irl.irl_hidden)
        heads[name].load_state_dict(state)
        heads[name].eval().requires_grad_(False)
    encoder = given.encoder or (TextEncoder(about["encoder"]) if about["encoder"] else None)
    made = {"irl": irl, "heads": heads, "encoder": encoder, "prompts": about["prompts"], "record": about["record"]}
    now = describe(encoder if encoder is not None else given.lm)
    named = lambda x: {k: v for k, v in x.items() if k not in ("name", "note")} if isinstance(x, dict) else x
    if now is not None and about["features"] is not None and named(about["features"]) != named(now):
        raise ValueError(f"{folder} was fitted on other features; give the model or encoder it was fitted on")
    return made
