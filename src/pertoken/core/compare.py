"""Side by side: several methods on the same pairs, in the same order, for the same number of updates, over seeds.

An arm of one seed is one run in its own folder, so a comparison that was killed goes on where it stopped: finished runs
are read, a half-done one resumes. Reference log-probs are shared through the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cache import ArrayCache
from .data import Group, check_data
from .describe import describe
from .lm import LM, load
from .loop import RESULT, LoopConfig
from .record import read_json, write_json
from .run import Run

Evaluate = Callable[[LM, LM, int], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method with its options, under a name of its own."""

    name: str
    slug: str
    objective: Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one arm came to with one seed: the run's record, the history, and the figures of `evaluate`."""

    arm: str
    seed: int
    record: dict[str, Any]
    figures: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)


def check_arms(arms: Sequence[Arm], kind: str, groups: Sequence[Group] = ()) -> None:
    """Refuse what cannot be compared, before anything runs.

    Args:
        arms: the methods. kind: of data that the comparison has. groups: all of its data, once they are read.

    Raises:
        ValueError: two arms of one name, a method that takes other data than the comparison has, or one that says of
            these data why it cannot learn from them (`Objective.check`).
    """
    if len({a.name for a in arms}) < len(arms):
        raise ValueError("two arms have one name; give each its own (name=method)")
    for arm in arms:
        data = getattr(arm.objective, "data", None)
        if data != kind:
            raise ValueError(f"{arm.name} takes {data or 'no'} data and the comparison has {kind}; leave it out")
    for arm in arms if groups else ():
        try:
            check_data(arm.objective, groups)
        except ValueError as error:
            raise ValueError(f"{arm.name} cannot learn from these data: {error}") from error


def compare(
    arms: Sequence[Arm],
    policy: Callable[[], LM],
    groups: Sequence[Group],
    held_out: Sequence[Group],
    config: LoopConfig,
    out: str | Path,
    *,
    seeds: Sequence[int],
    resolve: Callable[[str], type[Any]],
    evaluate: Evaluate,
    cache: ArrayCache | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
    pack_tokens: int = 4096,
    version_of: Callable[[str], int] = lambda slug: 1,
) -> list[Outcome]:
    """Train every arm with every seed and evaluate each.

    Args:
        arms: the methods.
        policy: makes the untouched starting model (each run gets a fresh one).
        groups, held_out: the same encoded data for all.
        config: the loop's options; its seed is replaced by each of `seeds`.
        out: folder; ``<out>/<arm>/seed-<seed>`` is one run.
        evaluate: (trained policy, reference, seed) -> figures (JSON values); kept in ``figures.json`` of the run.

    Returns:
        One outcome an arm and seed, seeds within arms.
    """
    out, say = Path(out), say or (lambda line: None)
    if arms:
        check_arms(arms, arms[0].objective.data, [*groups, *held_out])
    outcomes = []
    for arm in arms:
        for seed in seeds:
            folder = out / arm.name / f"seed-{seed}"
            figures = folder / "figures.json"
            say(f"{arm.name}, seed {seed}: {'finished before' if figures.exists() else folder}")
            settings = dataclasses.replace(config, seed=seed)
            if figures.exists():
                was = read_json(folder / RESULT)
                now = settings.trajectory()
                if was["options"] != describe(arm.objective) or now != {k: was["config"].get(k) for k in now}:
                    raise ValueError(f"{folder} holds a run with other options; choose another output folder")
            else:
                lm = policy()
                run = Run(
                    slug=arm.slug,
                    objective=arm.objective,
                    policy=lm,
                    groups=[dataclasses.replace(g, columns=dict(g.columns)) for g in groups],
                    held_out=[dataclasses.replace(g, columns=dict(g.columns)) for g in held_out],
                    config=settings,
                    out=folder,
                    resolve=resolve,
                    version_of=version_of,
                    cache=cache,
                    say=say,
                    progress=progress,
                    stage_folder=out / "stages",  # what does not depend on the seed is prepared once for all
                    pack_tokens=pack_tokens,
                )
                resumes = folder.exists()
                reference = lm.reference() if not resumes else policy()
                run.go(resume=resumes)
                if (folder / RESULT).exists() and resumes:  # trained before it was stopped: read the model back
                    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
                    lm = load(folder / "model", dtype=dtype, device=str(lm.device), template=lm.template)
                write_json(figures, evaluate(lm, reference, seed))
            outcomes.append(_read(arm, seed, folder))
    return outcomes


def _read(arm: Arm, seed: int, folder: Path) -> Outcome:
    import json

    lines = (folder / "log.jsonl").read_text("utf8").splitlines()
    return Outcome(
        arm=arm.name,
        seed=seed,
        record=read_json(folder / RESULT),
        figures=read_json(folder / "figures.json"),
        history=[json.loads(line) for line in lines],
    )
