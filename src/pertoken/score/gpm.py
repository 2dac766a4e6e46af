"""GPM — General Preference Model: a reward model that can say "A beats B beats C beats A".

Zhang, Zhang, Wu, Xu, Gu, "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment", ICML
2025, arXiv 2410.02197. Each response has an embedding of 2k dimensions, and two are compared by a skew product:

    v = H h(x, y),  v / |v| if normalised                      h: hidden state at the last token, the terminator
    s(a > b | x) = sum_{l=1..k} lambda_l ( a_{2l-1} b_{2l} - a_{2l} b_{2l-1} )        lambda = softmax(G h(x)), or 1
    P(a > b | x) = sigmoid( s(a > b | x) / tau )                                      loss: -log P(y_w > y_l)
    score of y among K candidates = mean over all of them, itself included (0), of s(y > y') / tau

One forward a response, then all K^2 comparisons are one product of matrices. The score is a Borda-type order: it is of
the set of candidates (here: the items of one prompt) and no global reward; `cycles` says how far an order can be
trusted. Bradley-Terry (``form="bt"``) is the case v = (r, 1). Heads are fitted here on frozen features, of an LM or any
encoder of texts; the method `gpm-reward` trains them with their backbone, and its output folder is read as `folder`.

Shapes: items K, embeddings (K, 2k), lambda (K, k), tables (K, K) with s(row > column). Units: tables and scores are in
s / tau (the logit of P), margins in s.

Differs from the authors' code: a response without its terminator gets one (the release overwrites the last token); one
that is too long is cut just left of it. The release scores by table - table^T, which is twice s / tau
(`compat="reference"`); its second gate has an undefined name and crashes (here: ``gate="scaled"``).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.checkpoint import RESULT, checkpoints
from ..core.credit import Credit
from ..core.describe import describe
from ..core.embed import TextEncoder
from ..core.lm import LM, load
from ..core.pairwise import HeadOptions, PairConfig, PreferenceHead, cyclic_triples, fit_pairs, skew_score, skew_table
from ..core.record import read_json, write_json
from ..core.trace import Trace
from ._features import response_features

SCALE = "mean of s/tau against the candidates of its prompt: an order within this set (Borda), no global reward"


@dataclass(frozen=True, kw_only=True)
class GPM:
    """A general preference model: options, features, and the fitted heads."""

    head: HeadOptions = field(default_factory=HeadOptions)
    """Heads to fit: form, dimension, normalisation, gate, tau, loss."""
    compat: Literal["paper", "reference"] = "paper"
    """reference: tables and scores of the release, twice s / tau."""
    folder: str = ""
    """Heads that were saved (`save`), or the output folder of a gpm-reward run; overrides head."""
    lm: LM | None = None
    """Backbone whose hidden states are the features; one that the folder holds goes before it."""
    encoder: Any = None
    """From Python: texts -> features (N, H) in place of a backbone, such as core.embed.TextEncoder()."""
    module: Any = None
    """The fitted heads (`fit` fills it)."""
    record: Any = None
    """What fitting found: pairs, dropped ones, losses, the largest |s|."""

    def __post_init__(self) -> None:
        if self.compat not in ("paper", "reference"):
            raise ValueError(f"compat={self.compat!r} is not one of paper, reference")
        if self.folder and self.module is None:
            for name, value in _read(Path(self.folder), self).items():
                object.__setattr__(self, name, value)

    @classmethod
    def example(cls, lm: LM | None = None, **options: Any) -> GPM:
        """One with random heads, for tests."""
        made = cls(lm=lm, **options)
        width = 4 if lm is None else int(lm.causal.config.get_text_config().hidden_size)
        return dataclasses.replace(made, module=PreferenceHead(width, made.head, torch.Generator().manual_seed(0)))

    def features(self, items: Sequence[Trace]) -> tuple[Tensor, Tensor | None]:
        """Features (N, H) of responses after their prompts, and of the prompts alone if there is a gate."""
        return response_features(items, self.lm, self.encoder, prompts=self.head.gate != "none")

    @torch.no_grad()
    def table(self, features_KH: Tensor | np.ndarray, prompts_KH: Tensor | np.ndarray | None = None) -> Tensor:
        """s(row > column) / tau from features, (K, K), antisymmetric to the bit.

        Raises:
            ValueError: no heads; with a gate, several prompts, whose responses have no common lambda.
        """
        if self.module is None:
            raise ValueError("this GPM has no heads; fit it (GPM(...).fit(items, pairs)), or name a folder")
        at = self.module.embed.device
        gate = self.module.gates(None if prompts_KH is None else torch.as_tensor(prompts_KH, device=at))
        if gate is not None and len(gate) and not torch.equal(gate, gate[:1].expand_as(gate)):
            raise ValueError("with a gate, only responses to one prompt compare; call it prompt by prompt")
        gate = gate if gate is None else gate[:1]
        table = (skew_table(self.module(torch.as_tensor(features_KH, device=at)), gate) / self.module.tau).cpu()
        return 2 * table if self.compat == "reference" else table

    def pairwise_table(self, items: Sequence[Trace]) -> np.ndarray:
        """s(row > column) / tau of all pairs, float64 (K, K).

        Raises:
            ValueError: as `features`; with a gate, items of several prompts.
        """
        if self.head.gate != "none" and len({t.prompt_ids for t in items}) > 1:
            raise ValueError("with a gate, only responses to one prompt compare; call it prompt by prompt")
        ends, prompts = self.features(items)
        prompts = prompts if prompts is None else prompts[:1].expand_as(prompts)  # one prompt, so one lambda
        return self.table(ends, prompts).double().numpy()

    def prefer(self, items: Sequence[Trace]) -> np.ndarray:
        """P(row beats column), float64 (K, K), 0.5 on the diagonal."""
        table = self.pairwise_table(items) / (2 if self.compat == "reference" else 1)
        return 0.5 * (1 + np.tanh(0.5 * table))

    def rank(self, items: Sequence[Trace]) -> list[int]:
        """Indices by mean score against the set, best first (the first of equals before the others). Another set may
        order the same items otherwise: see `cycles`."""
        return np.argsort(-self.pairwise_table(items).mean(1), kind="stable").tolist()

    def cycles(self, items: Sequence[Trace]) -> int:
        """How many threes of these items beat each other in a circle: 0 means that an order loses nothing."""
        return cyclic_triples(self.pairwise_table(items))

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Sequence-level credit of kind reward: mean s / tau against the items of the same prompt, itself included.

        It orders this set, and an item that stands alone gets 0; ``meta`` holds the number of candidates, of cyclic
        threes among them, and the largest |s / tau|.
        """
        ends, prompts = self.features(items)
        sets: dict[tuple[int, ...], list[int]] = {}
        for i, trace in enumerate(items):
            sets.setdefault(trace.prompt_ids, []).append(i)
        out: dict[int, Credit] = {}
        for some in sets.values():
            table = self.table(ends[some], None if prompts is None else prompts[some[:1] * len(some)]).double().numpy()
            meta = {"scale": SCALE, "candidates": len(some), "cycles": cyclic_triples(table)}
            meta["max_abs"] = float(np.abs(table).max())
            for i, value in zip(some, table.mean(1), strict=True):
                named: dict[str, Any] = {"kind": "reward", "method": "gpm", "version": 1, "meta": meta}
                out[i] = Credit.of_sequence(items[i], float(value), **named)
        return [out[i] for i in range(len(items))]

    def fit(self, items: Sequence[Trace], pairs_B2: Any, **options: Any) -> GPM:
        """A model fitted on pairs (winner, loser) of items, features frozen. Pairs of identical responses teach nothing
        (s = 0, loss log 2) and are dropped; ``record`` counts them. Options: as `fit_features`.

        Raises:
            ValueError: a pair of responses to two prompts.
        """
        kept, margins = [], options.pop("margins", None)
        for row, (i, j) in enumerate(np.asarray(pairs_B2).tolist()):
            if items[i].prompt_ids != items[j].prompt_ids:
                raise ValueError(f"pair {row} compares responses to two prompts; pair responses to one")
            if items[i].completion_ids != items[j].completion_ids:
                kept.append((row, i, j))
        ends, prompts = self.features(items)
        options.setdefault("groups", [items[i].prompt_ids for _, i, _ in kept])
        margins = None if margins is None else [margins[row] for row, _, _ in kept]
        made = self.fit_features(ends, [(i, j) for _, i, j in kept], prompts_NH=prompts, margins=margins, **options)
        return dataclasses.replace(made, record=made.record | {"dropped_identical": len(pairs_B2) - len(kept)})

    def fit_features(
        self,
        features_NH: Tensor | np.ndarray,
        pairs_B2: Any,
        *,
        prompts_NH: Tensor | np.ndarray | None = None,
        margins: Sequence[float] | None = None,
        config: PairConfig | None = None,
        groups: Sequence[Hashable] | None = None,
        progress: bool = False,
    ) -> GPM:
        """The same from features (N, H) of items; `margins` of pairs are in units of s. Others: `core.fit_pairs`."""
        if margins is not None and self.head.loss == "regression":
            raise ValueError("the regression loss has no margin; leave margins out, or take loss='preference'")
        config = config or PairConfig()
        features, pairs = torch.as_tensor(features_NH), torch.as_tensor(np.asarray(pairs_B2), dtype=torch.long)
        module = PreferenceHead(features.shape[1], self.head, torch.Generator().manual_seed(config.seed))
        prompts = None if prompts_NH is None else torch.as_tensor(prompts_NH)
        margin = None if margins is None else torch.as_tensor(margins, dtype=module.embed.dtype)
        scores = lambda a, b, rows: skew_score(a, b, module.gates(None if prompts is None else prompts[pairs[rows, 0]]))
        losses = lambda a, b, rows: module.losses(scores(a, b, rows), None if margin is None else margin[rows])
        found = fit_pairs(module, features, pairs, losses, config, groups=groups, progress=progress)
        with torch.no_grad():
            v_ND = module(features)
            s_B = scores(v_ND[pairs[:, 0]], v_ND[pairs[:, 1]], torch.arange(len(pairs)))
        record = {"pairs": len(pairs), "epoch": found.best, **found.history[found.best]}
        record |= {"accuracy": float((s_B > 0).float().mean()), "max_abs_score": float(s_B.abs().max())}
        return dataclasses.replace(self, module=module, record=record)

    def identity(self) -> dict[str, Any]:
        """What its numbers depend on, for hashes: options, weights, and what computes the features."""
        weights = hashlib.blake2b(digest_size=12)
        for name, tensor in sorted(self.module.state_dict().items()) if self.module is not None else ():
            weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        made = {"type": "GPM", "version": 1, "head": asdict(self.head), "compat": self.compat}
        source = {"features": describe(self.encoder if self.encoder is not None else self.lm)}
        return made | source | {"weights": weights.hexdigest()}

    def save(self, folder: str | Path, *, backbone: bool = False) -> Path:
        """Heads as safetensors and options as JSON; with `backbone`, the LM, too (else it is named and checked)."""
        from safetensors.torch import save_file

        folder, encoder = Path(folder), getattr(self.encoder, "name", None)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.module.state_dict().items()}, folder / "gpm.safetensors")
        if backbone and self.lm is not None:
            self.lm.save(folder / "model")
        about = {"name": None if self.lm is None else self.lm.name, "encoder": encoder, "record": self.record}
        return write_json(folder / "gpm.json", self.identity() | about).parent


def _read(folder: Path, given: GPM) -> dict[str, Any]:
    """Head options, heads and features of a saved model, or of a gpm-reward run."""
    from safetensors.torch import load_file

    if (folder / "gpm.json").exists():
        about, weights = read_json(folder / "gpm.json"), load_file(folder / "gpm.safetensors")
    elif (folder / RESULT).exists() and read_json(folder / RESULT)["method"] == "gpm-reward" and checkpoints(folder):
        options = read_json(folder / RESULT)["options"]
        options |= {"form": options["head"], "loss": options["loss_form"]}
        about = {"head": {f.name: options[f.name] for f in dataclasses.fields(HeadOptions)}, "record": None}
        every = load_file(checkpoints(folder)[-1][1] / "weights.safetensors")
        weights = {k.removeprefix("state."): v for k, v in every.items() if k.startswith("state.")}
    else:
        raise ValueError(f"{folder} holds neither a saved GPM (gpm.json) nor a finished gpm-reward run")
    head = HeadOptions(**about["head"])
    module = PreferenceHead(weights["embed"].shape[1], head)
    module.load_state_dict(weights)
    lm, encoder, own = given.lm, given.encoder, (folder / "model").exists()
    if own:
        lm = load(folder / "model", **({"device": str(lm.device)} if lm is not None else {}))
    elif about.get("encoder") and encoder is None:
        encoder = TextEncoder(about["encoder"])
    elif lm is None and encoder is None and about.get("name"):
        lm = load(about["name"])
    wanted, now = about.get("features"), describe(encoder if encoder is not None else lm)
    if isinstance(wanted, dict) and isinstance(now, dict):  # a model may lie elsewhere now; its weights are the same
        wanted, now = ({k: v for k, v in x.items() if k not in ("name", "note")} for x in (wanted, now))
    if wanted is not None and not own and wanted != now:
        raise ValueError(f"{folder} was fitted on other features ({about['name'] or about['encoder']}); give those")
    kept = {"compat": about.get("compat", given.compat), "record": about["record"]}
    return {"head": head, "module": module, "lm": lm, "encoder": encoder, **kept}
