"""Deferral rules: what is seen of an answer, and the scores made of it. Higher is less certain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...core.cache import ArrayCache
from ...core.lm import LM
from ...core.signals import prompt_states, token_signals
from ...core.trace import Trace
from .learning import Learning, predict_with

GRID = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Quantiles of the learned rules."""
FLOOR = -1e4
"""Where log-probs of -inf (cut off by top-p) are capped, before anything is summed."""
Signal = Literal["logp", "entropy", "max-prob", "margin"]
NEEDS = {"logp": "logp", "entropy": "entropy", "max-prob": "top1_logp", "margin": "margin"}


@dataclass(frozen=True, eq=False)
class Answer:
    """What is seen of an answer of T tokens.

    Attributes:
        signals: ``logp``, ``entropy``, ``margin``, ``top1_logp``, those that were asked for, (T,) each.
        truncated: it was cut off by the limit of tokens, so that it looks more certain than it is.
        states: ``embed-1``, the mean over its tokens of the small model's last hidden states, (H1,); ``embed-2``, what
            the large model's first layers make of the prompt, (H2,); those that were asked for.
    """

    signals: Mapping[str, np.ndarray]
    truncated: bool = False
    states: Mapping[str, np.ndarray] = field(default_factory=dict)

    def certainty(self, signal: Signal = "logp") -> np.ndarray:
        """The list c (T,) that the rules look at, higher is more certain: log-prob, -entropy, max prob - 1, margin."""
        values = np.asarray(self.signals[NEEDS[signal]], np.float64)
        if signal == "entropy":
            return -values
        return np.maximum(np.expm1(values) if signal == "max-prob" else values, FLOOR)


def chow_sum(c_T: np.ndarray) -> float:
    """- sum_i c_i."""
    return -float(np.sum(np.maximum(c_T, FLOOR)))


def chow_average(c_T: np.ndarray) -> float:
    """- 1/n sum_i c_i; +inf of an empty answer."""
    return -float(np.mean(np.maximum(c_T, FLOOR))) if len(c_T) else np.inf


def chow_quantile(c_T: np.ndarray, alpha: float) -> float:
    """- quantile_alpha(c), between two tokens by straight lines; +inf of an empty answer."""
    return -float(np.quantile(np.maximum(c_T, FLOOR), alpha)) if len(c_T) else np.inf


@dataclass(frozen=True)
class FixedRule:
    """A rule without parameters to learn."""

    kind: Literal["sum", "average", "quantile"] = "quantile"
    signal: Signal = "logp"
    alpha: float = 0.0
    """Of ``quantile``: 0 looks at the least certain token, 1 at the most certain one."""

    inputs = ()

    def __post_init__(self) -> None:
        if self.kind not in ("sum", "average", "quantile") or self.signal not in NEEDS or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"{self}: kind is sum, average or quantile, signal one of {', '.join(NEEDS)}, alpha within [0, 1]"
            )

    @property
    def wants(self) -> tuple[str, ...]:
        """Signals it reads."""
        return (NEEDS[self.signal],)

    def score(self, answers: Sequence[Answer]) -> np.ndarray:
        """s (N,); +inf of an empty answer, whatever the kind."""
        lists = [a.certainty(self.signal) for a in answers]
        of = {"sum": chow_sum, "average": chow_average, "quantile": lambda c: chow_quantile(c, self.alpha)}[self.kind]
        return np.array([of(c) if len(c) else np.inf for c in lists], np.float64)


def features(answers: Sequence[Answer], inputs: Sequence[str] = ()) -> np.ndarray:
    """phi (N, D): quantiles of the log-probs on `GRID`, Chow-Sum, Chow-Average, whether it was truncated, then the
    states that `inputs` names. A row of NaN for an empty answer."""
    rows = []
    for answer in answers:
        c = answer.certainty()
        plain = [*np.quantile(c, GRID), chow_sum(c), chow_average(c)] if len(c) else [np.nan] * (len(GRID) + 2)
        rows.append(np.concatenate([plain, [float(answer.truncated)], *(answer.states[name] for name in inputs)]))
    return np.array(rows, np.float64)


@dataclass(frozen=True, eq=False)
class LearnedRule:
    """A post-hoc rule: s(x) = sigmoid(g(phi(x))), averaged over members.

    Attributes:
        arrays: what `Learning.fit` found. inputs: states among the features: ``embed-1``, ``embed-2``.
        layer: of the large model, which ``embed-2`` enters.
        told: how it was learned.
    """

    arrays: Mapping[str, np.ndarray]
    inputs: tuple[str, ...] = ()
    layer: int = 1
    told: Mapping[str, Any] = field(default_factory=dict)

    wants = ("logp",)

    @classmethod
    def learn(
        cls,
        answers: Sequence[Answer],
        q1_N: Any,
        q2_N: Any,
        *,
        inputs: Sequence[str] = (),
        layer: int = 1,
        learning: Learning | None = None,
        fallback: FixedRule | None = None,
    ) -> LearnedRule | FixedRule:
        """Learn when to defer from answers and both models' qualities, on prompts that neither was trained on.

        Args:
            inputs: () is Post-Hoc-Quantile, ("embed-1",) Post-Hoc-Embed-1, ("embed-1", "embed-2") -Embed-1+2.
            fallback: what is returned, with a warning, where the large model is almost never better; default:
                Chow-Quantile(0).
        """
        learned = (learning or Learning()).fit(features(answers, inputs), q1_N, q2_N)
        if learned is None:
            return fallback or FixedRule()
        return cls(learned[0], tuple(inputs), layer, learned[1])

    def score(self, answers: Sequence[Answer]) -> np.ndarray:
        """s (N,) in (0, 1); +inf of an empty answer."""
        return predict_with(self.arrays, features(answers, self.inputs)) if len(answers) else np.zeros(0)

    def save(self, path: str | Path) -> Path:
        """A safetensors file that `load` reads."""
        from safetensors.numpy import save_file

        told = json.dumps({"inputs": self.inputs, "layer": self.layer, "told": self.told})
        save_file({k: np.ascontiguousarray(v) for k, v in self.arrays.items()}, str(path), {"rule": told})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> LearnedRule:
        """What `save` wrote.

        Raises:
            ValueError: it is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                told = json.loads((file.metadata() or {})["rule"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} is no saved deferral rule ({error}); LearnedRule.save writes one") from error
        return cls(arrays, tuple(told["inputs"]), told["layer"], told["told"])


Rule = FixedRule | LearnedRule


def observe(
    lm: LM,
    traces: Sequence[Trace],
    rules: Sequence[Rule],
    *,
    eos: bool = True,
    large: LM | None = None,
    prompts: Sequence[Any] = (),
    cache: ArrayCache | None = None,
) -> list[Answer]:
    """What `rules` need to see of answers of `lm`; recorded log-probs (at temperature 1) are taken as they are.

    Args:
        eos: the terminator is one of the tokens.
        large, prompts: for ``embed-2``: the large model and each trace's prompt, which it encodes for itself.

    Raises:
        ValueError: ``embed-2`` without them.
    """
    inputs = {name for rule in rules for name in rule.inputs}
    wants = {name for rule in rules for name in rule.wants} | ({"hidden"} if "embed-1" in inputs else set())
    recorded = wants == {"logp"} and all(t.policy_logps is not None for t in traces)
    found = (
        [{"logp": np.asarray(t.policy_logps)} for t in traces]
        if recorded
        else token_signals(lm, traces, sorted(wants), cache=cache)
    )
    seconds: Sequence[np.ndarray] = ()
    if "embed-2" in inputs:
        if large is None or len(prompts) != len(traces):
            raise ValueError("embed-2 is what the large model makes of the prompts; give large and a prompt a trace")
        (layer,) = {rule.layer for rule in rules if isinstance(rule, LearnedRule) and "embed-2" in rule.inputs}
        seconds = prompt_states(large, prompts, layer)
    out = []
    for i, (trace, signals) in enumerate(zip(traces, found, strict=True)):
        t = len(trace) if eos or not trace.ended else len(trace) - 1
        kept = {name: values[:t] for name, values in signals.items()}
        states = {"embed-2": seconds[i]} if len(seconds) else {}
        if (hidden := kept.pop("hidden", None)) is not None:
            states["embed-1"] = hidden.mean(0) if t else np.full(hidden.shape[1], np.nan)
        out.append(Answer(kept, not trace.ended, states))
    return out
