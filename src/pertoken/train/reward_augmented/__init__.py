"""Reward-augmented DPO (DPO-RA) — Reward-Augmented Data Enhances Direct Preference Alignment of LLMs.

Zhang, Liu, Zhang, Yang, Liu, Chen, Sun, Wang, ICML 2025, arXiv 2410.08067. A pair (x, y_w, y_l) with scores r_w, r_l
becomes two rows, one for each goal g in {r_w, r_l}; the goal is said in the prompt of both responses:

    R(x, y, g) = - ( r(x, y) - g )^2                    preferred under g: the response with the larger R
    g = r_w: chosen y_w, rejected y_l                   g = r_l: chosen y_l, rejected y_w
    L = -log sigmoid( beta [ log pi/pi_ref(y+ | g, x) - log pi/pi_ref(y- | g, x) ] ), mean over the 2N rows

Log-probs are sums over response tokens in nats; the reference is the starting model, under the same goal. At inference
the top score is the goal (`ask`), or none is said: report which. As an objective it augments the run's pairs; as a
transform (``--transform reward-augmented``) it does so for any other objective.

`augment`, `strip`, `to_trl` and `scored_pairs` are the data side alone. Response ids never change: only prompts are
encoded again, and where one is too long its words are cut, not its goal.

Differs from the authors' code: the variant without system turns builds the g = r_l rows by exchanging the (identical)
user turns, so that they prefer y_w under the goal r_l; here the responses are exchanged. Rows are copies (a second call
of the release stacks a second goal, here it is refused), ties are dropped and counted, and the goal is worded anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import nn

from ...core.data import Group, fit_prompt
from ...core.examples import PINNED, DataReport, Example, Refused, Text
from ...core.protocols import Batch, Loss, Preparation, as_scorer
from ...core.stats import Stats
from ...core.trace import Trace
from .._preference import LOGP, implicit_rewards, log_sigmoid_loss, pair_loss
from .augmentation import RECORD, augment, plan, strip, to_trl
from .goals import Goal, turns_of
from .ultrafeedback import scored_pairs

if TYPE_CHECKING:
    from ...core.lm import LM


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How responses are scored where the data have no scores."""

    score_with: str = ""
    """Scorer of the catalog (vader...), its values summed over a response; default: the data's own scores."""
    worst: float = -1.0
    """Its value that becomes the lowest score of the scale."""
    best: float = 1.0
    """Its value that becomes the highest; values beyond are put at the end of the scale and counted."""

    def __post_init__(self) -> None:
        if not 0 < abs(self.best - self.worst) < np.inf:
            raise ValueError(f"worst={self.worst} and best={self.best} leave no scale; give the scorer's range")


@dataclass(frozen=True, kw_only=True)
class RewardAugmented:
    """Options of DPO-RA; without beta and label_smoothing, those of the transform."""

    beta: float = 0.01
    """beta of DPO, strength of the constraint to the reference."""
    label_smoothing: float = 0.0
    """Share of rows expected to be flipped; the recipes take 0.3 for Gemma-2 and Qwen2, 0 for Mistral."""
    goal: Goal = field(default_factory=Goal)
    """How the goal g is said, and the scale of the scores."""
    order: Literal["interleaved", "blocks"] = "interleaved"
    """Both rows of a pair together, or (the release) all rows with g = r_w before those with g = r_l."""
    tie: Literal["drop", "keep"] = "drop"
    """Pairs with r_w = r_l, whose two rows contradict each other."""
    disagreement: Literal["score", "drop"] = "score"
    """Pairs with r_l > r_w: the score decides which is preferred under which goal, or the pair is dropped."""
    aspects: tuple[str, ...] = ()
    """Condition on these aspect scores of the data together, instead of the overall score."""
    scoring: Scoring = field(default_factory=Scoring)
    """Scores from a scorer instead of the data's."""
    scorer: Any = None
    """From Python: any scorer, or a callable from a response's text to a number, in its place."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt with its goal (the recipes take 512); default: what the context leaves."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if not 0 < self.beta < np.inf:
            raise ValueError(f"beta={self.beta} must be above 0 and finite")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} is a share of flipped rows: from 0 to below 0.5")
        plan([], self.goal, required=False, **self._choices())
        if self.aspects and (self.scorer is not None or self.scoring.score_with):
            raise ValueError("aspects are scores of the data; leave out the scorer, or the aspects")

    def _choices(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("order", "tie", "disagreement", "aspects")}

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse data that no goal can be made of, before anything runs."""
        if self.scorer is None and not self.scoring.score_with:
            plan([g.example for g in groups], self.goal, required=True, **self._choices())

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of policy and reference."""
        return dict.fromkeys(("policy", *self.models), LOGP)

    def transform(
        self, examples: Sequence[Example], lm: LM | None = None, scorer: Any = None, *, required: bool = True
    ) -> tuple[list[Example], DataReport]:
        """`augment` with these options, for any objective to train on.

        Args:
            examples: pairs.
            lm: the model that will be trained: says where the goal goes (default: in a system turn), and whose tokens
                the scorer's values stand on.
            scorer: what `scoring` names, ready to score; the option `scorer` goes before it.
            required: as `augment`.

        Raises:
            ValueError: as `augment`; a scorer is named but none, or no `lm`, is given.
        """
        scorer, clipped = self.scorer if self.scorer is not None else scorer, []
        if scorer is None and self.scoring.score_with:
            raise ValueError(f"scoring names {self.scoring.score_with!r}: hand that scorer to transform")
        if scorer is not None:
            if lm is None:
                raise ValueError("scores are computed on a model's tokens; give transform its lm")
            values = iter([c.reduce("sum") for c in as_scorer(scorer).score(_traces(examples, lm))])
            examples, clipped = self._scored(examples, [[next(values) for _ in e.responses] for e in examples])
        rows, report = augment(examples, self.goal_for(lm), required=required, **self._choices())
        if clipped:
            report.noted["a score beyond the scorer's range, put at its end"] = clipped
        return rows, report

    def goal_for(self, lm: LM | None) -> Goal:
        """The goal with its place decided for a model."""
        if self.goal.place != "auto" or lm is None:
            return self.goal
        return dataclasses.replace(self.goal, place="system" if takes_system(lm) else "user")

    def ask(self, prompt: Text, score: float | tuple[float, ...] | None = None, lm: LM | None = None) -> Text:
        """A prompt for inference: the same words with the top score (or another) as goal, for `lm.encode_prompt`."""
        goal = self.goal_for(lm)
        top = (goal.high,) * len(self.aspects) if self.aspects else goal.high
        said = goal.say(top if score is None else score, self.aspects)
        return goal.put(prompt, said, "user" if goal.place == "user" else "system")[0]

    def prepare(self, run: Preparation) -> None:
        """Put two groups in the place of each: the same responses after the prompt with the goal.

        Raises:
            ValueError: as `augment`; prompts that are not the words of their examples; nothing left to train on.
        """
        every = [g.example for g in run.every]
        if self.scorer is not None or self.scoring.score_with:
            scorer = as_scorer(self.scorer) if self.scorer is not None else run.scorer(self.scoring.score_with)
            sums = [[float(np.sum(v)) for v in values] for values in run.credits("goal-scores", scorer)]
            every, clipped = self._scored(every, sums)
            if clipped:
                run.report(
                    f"reward-augmented: scores of {len(clipped)} pairs beyond the scorer's range, put at its end"
                )
        goal, n, sides = self.goal_for(run.policy), len(run.groups), []
        for name, part in (("training", slice(0, n)), ("held-out", slice(n, None))):
            rows, report = plan(every[part], goal, required=name == "training", **self._choices())
            sides.append(_encoded(rows, run.every[part], run.policy, self.max_prompt_length, report))
            for line in report.lines():
                run.report(f"reward-augmented, {name} pairs: {line}")
        if not sides[0]:
            raise ValueError("no training pair is left to augment: the report's lines above say why")
        run.groups, run.held_out = sides

    def _scored(
        self, examples: Sequence[Example], values: Sequence[Sequence[float]]
    ) -> tuple[list[Example], list[int]]:
        """Examples with the scorer's values as scores, mapped to the scale, and the rows whose lay beyond its range."""
        s, g = self.scoring, self.goal
        share = [(np.asarray(v, np.float64) - s.worst) / (s.best - s.worst) for v in values]
        clipped = [e.row for e, x in zip(examples, share, strict=True) if ((x < 0) | (x > 1)).any()]
        scores = [tuple((g.low + (g.high - g.low) * x.clip(0, 1)).tolist()) for x in share]
        return [dataclasses.replace(e, scores=one) for e, one in zip(examples, scores, strict=True)], clipped

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """DPO's, mean over rows."""
        r_N = implicit_rewards(stats, self.beta)
        margin_B = r_N[batch.chosen] - r_N[batch.rejected]
        return pair_loss(log_sigmoid_loss(margin_B, self.label_smoothing), r_N, stats, batch)


def takes_system(lm: LM) -> bool:
    """Whether a model's chat template says system turns."""
    from jinja2 import TemplateError

    if lm.template != "chat":
        return False
    user = {"role": "user", "content": "?"}
    try:
        one, other = (lm.encode_prompt([{"role": "system", "content": text}, user]) for text in ("a", "b"))
    except (ValueError, TemplateError):
        return False
    return one != other


def _traces(examples: Sequence[Example], lm: LM) -> list[Trace]:
    """Every response after its prompt, for a scorer."""
    out = []
    for e in examples:
        for r in e.responses:
            trace = lm.trace(e.prompt, r) if isinstance(r, str) else lm.trace_messages(turns_of(e.prompt), r)
            out.append(dataclasses.replace(trace, meta={"prompt": e.prompt}))
    return out


def _encoded(
    rows: Sequence[tuple[int, Example]], groups: Sequence[Group], lm: LM, most: int | None, report: DataReport
) -> list[Group]:
    """Augmented rows as groups: the responses' own ids after the new prompt; what does not fit is refused."""
    out: list[Group] = []
    for i, row in rows:
        group = groups[i]
        bare = lm.encode_prompt(group.example.prompt)
        was_cut = len(group.prompt_ids) < len(bare)
        if group.prompt_ids != bare and not (
            was_cut and group.prompt_ids[1:] == bare[1 + len(bare) - len(group.prompt_ids) :]
        ):
            raise ValueError(
                f"row {row.row}: its prompt was not encoded from its words alone (a system turn beside them?), so no "
                "goal can be put in; make the system turn part of the prompt's messages"
            )
        room = min(lm.context - max(len(t) for t in group.traces), most or lm.context)
        room = min(room, len(group.prompt_ids)) if was_cut else room
        try:
            ids, cut = fit_prompt(row.prompt, lm, room, pinned=row.extra[PINNED])
        except Refused as reason:
            report.refuse(str(reason), row.row)
            continue
        if cut:
            report.noted.setdefault("prompt cut, its goal kept", []).append(row.row)
        traces = group.traces[::-1] if row.extra[RECORD]["flipped"] else group.traces
        out.append(Group(example=row, prompt_ids=ids, traces=tuple(t.with_prompt(ids, lm.view) for t in traces)))
    return out


__all__ = ["Goal", "RewardAugmented", "Scoring", "augment", "scored_pairs", "strip", "to_trl"]
