"""A run from data to a model in a folder: what is prepared once, what is cached, what is recorded, what is refused."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportCallIssue=false

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import pertoken
from pertoken import catalog
from pertoken.core.cache import ArrayCache
from pertoken.core.checkpoint import checkpoints
from pertoken.core.credit import Credit
from pertoken.core.data import Group, encode, load_examples
from pertoken.core.describe import describe
from pertoken.core.lm import LM, load
from pertoken.core.protocols import Batch, FunctionScorer, Loss, as_scorer
from pertoken.core.run import Run, add_reference_logps, completions_stats
from pertoken.core.stats import Stats
from pertoken.core.step import REFERENCE
from pertoken.train.dpo import DPO
from pertoken.train.kto import KTO
from pertoken.train.sft import SFT
from tests import tiny
from tests.core.training import config, log, make_groups, timeless
from tests.methods.one_pass import exact_lm

ROWS = [
    {
        "prompt": f"how was film {i % 5}",
        "chosen": "The plot was great" + "!" * (i % 3),
        "rejected": "A dull film" + "y" * (i % 4),
    }
    for i in range(10)
]


def data(lm: LM, rows: list[dict[str, Any]] = ROWS, kind: str | None = None) -> list[Group]:
    return encode(load_examples(rows, kind=kind)[0], lm)[0]


def make_run(tmp: Path, out: str = "run", objective: Any = None, lm: LM | None = None, **changes: Any) -> Run:
    """A short run of DPO on eight pairs and two held out."""
    lm = lm or exact_lm()
    groups = changes.pop("groups", None) or data(lm)
    settings = {
        "slug": "dpo",
        "objective": objective or DPO(beta=0.5),
        "policy": lm,
        "groups": groups[:8],
        "held_out": groups[8:],
        "config": config(),
        "out": tmp / out,
        "resolve": catalog.method,
        "cache": ArrayCache(tmp / "cache"),
        "progress": False,
    }
    return Run(**(settings | changes))


def logps(lm: LM, groups: list[Group]) -> np.ndarray:
    return np.concatenate([s["logp"] for s in completions_stats(lm, [t for g in groups for t in g.traces])])


def test_what_a_run_leaves(tmp_path):
    said: list[str] = []
    run = make_run(tmp_path, say=said.append, version_of=lambda slug: 3)
    start = run.policy.identity()
    record = run.go()
    assert sorted(p.name for p in run.out.iterdir()) == ["checkpoint-000004", "log.jsonl", "model", "results.json"]
    assert json.loads((run.out / "results.json").read_text()) == record
    assert (record["method"], record["updates"], record["options"]["beta"]) == ("dpo", 4, 0.5)
    assert record["final"] == pytest.approx({**log(run.out)[-1], "seconds": record["final"]["seconds"]})
    assert record["final"]["eval_loss"] < math.log(2) and record["config"] == dataclasses.asdict(config())
    found = record["provenance"]
    assert found["models"]["start"] == start and found["seed"] == 3 and found["methods"] == {"dpo": 3}
    for key in ("data", "versions", "git", "machine", "date", "command"):
        assert found[key]
    assert said == ["reference log-probs of 20 responses (0 known or repeated)"]

    again = load(run.out / "model", dtype="float64", device="cpu")
    groups = data(exact_lm())
    np.testing.assert_allclose(logps(again, groups), logps(run.policy, groups), atol=1e-9)
    assert abs(logps(again, groups) - logps(exact_lm(), groups)).max() > 0.1
    assert run.policy.identity()["weights"] == again.identity()["weights"] != start["weights"]


def test_a_folder_with_a_run_and_a_finished_run(tmp_path):
    record = make_run(tmp_path).go()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="holds a finished run; nothing is overwritten"):
        make_run(tmp_path).go()
    said: list[str] = []
    assert make_run(tmp_path, say=said.append).go(resume=True) == record
    assert said == [f"{tmp_path / 'run'} is finished; nothing to resume"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"objective": DPO(beta=0.1)}, "options.beta"),
        ({"config": config(lr=1e-5)}, "config.lr"),
        ({"lm": exact_lm(1)}, "start.weights"),
        ({"groups": data(exact_lm(), ROWS[1:] + ROWS[:1])}, "data"),
        ({"given": {"reference": exact_lm(2)}}, "given.reference"),
    ]
    for changes, named in cases:
        with pytest.raises(ValueError, match=rf"was run with other (.*, )?{named}"):
            make_run(tmp_path, **changes).go(resume=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


class Breaks(DPO):
    """DPO that is interrupted at a call of its loss."""

    left: ClassVar[int] = -1

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        if Breaks.left == 0:
            raise KeyboardInterrupt
        Breaks.left -= 1
        return super().loss(stats, batch, state)


@pytest.fixture
def breaks() -> Iterator[Callable[[int], Breaks]]:
    def make(after: int) -> Breaks:
        Breaks.left = after
        return Breaks(beta=0.5)

    yield make
    Breaks.left = -1


def test_an_interrupted_run_goes_on(tmp_path, breaks):
    settings = config(save_every=1)
    wanted = make_run(tmp_path, "whole", breaks(-1), config=settings)
    record = wanted.go()
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path, "half", breaks(2), config=settings).go()
    assert [s for s, _ in checkpoints(tmp_path / "half")] == [1, 2]
    half = make_run(tmp_path, "half", breaks(-1), config=settings)
    again = half.go(resume=True)
    assert log(half.out) == log(wanted.out)
    assert timeless([again["final"]]) == timeless([record["final"]]) and again["updates"] == record["updates"] == 4
    assert half.policy.identity()["weights"] == wanted.policy.identity()["weights"]


def test_other_labels_are_other_data(tmp_path):
    lm = exact_lm()
    groups = make_groups(lm, 10, "unpaired")
    turned = [dataclasses.replace(g, example=dataclasses.replace(g.example, label=not g.example.label)) for g in groups]
    a, b = (make_run(tmp_path, groups=g, objective=SFT(), lm=lm) for g in (groups, turned))
    assert a.data_key() != b.data_key() == make_run(tmp_path, groups=turned, lm=exact_lm(5)).data_key()
    moved = make_run(tmp_path, groups=groups, lm=lm)
    moved.groups, moved.held_out = [*moved.groups, moved.held_out[0]], moved.held_out[1:]
    assert moved.data_key() != a.data_key()


# ---- stages


class Firsts:
    """A scorer that counts its calls; its credit says which trace and token it belongs to."""

    def __init__(self) -> None:
        self.calls = 0

    def identity(self) -> dict[str, int]:  # the count is no part of what it is
        return {"firsts": 1}

    def score(self, items: Any) -> list[Credit]:
        self.calls += 1
        values = [np.array([sum(t.completion_ids) + 1000.0 * i for i in range(len(t))]) for t in items]
        assert all(t.meta["prompt"].startswith("how was film") for t in items)
        return [Credit(trace=t, values=v, kind="reward", method="firsts") for t, v in zip(items, values)]


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Imitation weighed by a credit that is computed before training."""

    scorer: Any = None
    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ()

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        return {"policy": frozenset({"logp"})}

    def prepare(self, run: Any) -> None:
        for group, values in zip(run.every, run.credits("firsts", as_scorer(self.scorer)), strict=True):
            group.add_column("first", values)

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        weight = 1e-4 * batch.columns["first"]
        return Loss(-(weight * stats["policy"].logp_NT).sum(), float(len(weight)))


def test_preparation_is_done_once_and_its_credit_is_in_order(tmp_path):
    scorer, said = Firsts(), []
    run = make_run(tmp_path, "a", Weighted(scorer), stage_folder=tmp_path / "stages", say=said.append)
    record = run.go()
    assert scorer.calls == 1 and record["stages"][0]["stage"] == "firsts" and not record["stages"][0]["reused"]
    assert len(run.every) == 10
    for group in run.every:
        for trace, values in zip(group.traces, group.columns["first"]):
            assert values.tolist() == [sum(trace.completion_ids) + 1000.0 * i for i in range(len(trace))]
    again = make_run(tmp_path, "b", Weighted(scorer), stage_folder=tmp_path / "stages")
    assert again.go()["stages"][0]["reused"] and scorer.calls == 1
    assert log(again.out) == log(run.out)
    make_run(
        tmp_path, "c", Weighted(scorer), stage_folder=tmp_path / "stages", groups=data(exact_lm(), ROWS[::-1])
    ).go()
    assert scorer.calls == 2, "other data were given the credit of the first"


class Calls:
    """A count that is no part of what a function is."""

    made = 0


class Constant:
    """A plain object that scores."""

    def __init__(self, value: float):
        self.value, self.by_word = value, {"a": value}

    def __call__(self, trace: Any) -> Any:
        Calls.made += 1
        return np.full(len(trace), self.value)


def test_another_function_is_another_scorer(tmp_path):
    Calls.made = 0

    def weight(power: float) -> Callable[[Any], Any]:
        table = {"power": power}

        def values(trace: Any, *, base: float = 0.1) -> Any:
            Calls.made += 1
            return np.full(len(trace), base ** table["power"])

        return values

    def run(out: str, function: Any) -> Any:
        scorer = FunctionScorer(function, on="trace")
        make_run(tmp_path, out, Weighted(scorer), stage_folder=tmp_path / "stages").go()
        return Calls.made

    assert run("a", weight(1)) == 20
    assert run("b", weight(1)) == 20, "the same function was computed twice"
    assert run("c", weight(2)) == 40, "a function that holds on to another number was taken for the first"
    assert run("d", lambda trace: np.zeros(len(trace))) == 40
    first = run("e", lambda trace: (setattr(Calls, "made", Calls.made + 1), np.ones(len(trace)))[1])
    assert first == 60, "one lambda was taken for another"
    assert run("f", functools.partial(weight(1), base=0.2)) == 80
    assert run("g", functools.partial(weight(1), base=0.3)) == 100, "a partial was taken for one with another keyword"
    assert run("h", Constant(0.1)) == 120
    assert run("i", Constant(0.1)) == 120
    assert run("j", Constant(0.4)) == 140, "an object was taken for another one of its class"


SCALE = 1.0


def scaled(trace: Any) -> Any:
    return SCALE * np.ones(len(trace))


def test_what_tells_things_apart(monkeypatch):
    def default(x: float, *, by: float = 2.0) -> float:
        return x * by

    before, scale = describe(default), describe(scaled)
    default.__kwdefaults__ = {"by": 3.0}
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    assert describe(default) != before and describe(scaled) != scale
    large = np.arange(1000.0)
    assert describe(large) == describe(large.copy()) != describe(large + 1)
    assert describe(torch.tensor([1.5, 2.0], dtype=torch.bfloat16)) == [1.5, 2.0]
    with torch.random.fork_rng():
        a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert describe(a) != describe(b) and describe(a) == describe(copy.deepcopy(a))
    ring: list[Any] = [1]
    ring.append(ring)
    assert describe(ring) == [1, "itself"]
    with pytest.raises(ValueError, match=r"give it a method identity\(\)"):
        describe(object())


def test_columns_and_observations_are_data(tmp_path):
    keys = []
    for value, emitted in ((0.4, True), (-0.4, True), (0.4, False)):
        groups = data(exact_lm())
        for g in groups:
            g.add_column("token_reward", [np.full(len(t), value) for t in g.traces])
        if not emitted:
            first = groups[0]
            cut = dataclasses.replace(first.traces[0], emitted=(False,) + (True,) * (len(first.traces[0]) - 1))
            groups[0] = dataclasses.replace(first, traces=(cut, first.traces[1]))
        keys.append(make_run(tmp_path, groups=groups).data_key())
    assert len(set(keys)) == 3
    again = make_run(tmp_path)
    for g in again.every:
        g.add_column("token_reward", [np.full(len(t), 0.4) for t in g.traces])
    assert again.data_key() == keys[0]
    add_reference_logps(again.every, exact_lm(), again.cache)
    assert again.data_key() == keys[0]  # the reference's log-probs follow from the rest


def test_a_new_version_of_a_method_is_computed_anew(tmp_path):
    def go(out: str, version: int) -> Any:
        run = make_run(tmp_path, out, Distilled(), stage_folder=tmp_path / "stages", version_of=lambda slug: version)
        return [s["reused"] for s in run.go()["stages"]]

    assert [go("a", 1), go("b", 1), go("c", 2)] == [[False], [True], [False]]
    assert not list((tmp_path / "stages").glob("*/run/checkpoint-*")), "a helper keeps its optimizer for nothing"


def test_views_of_a_model_learn_that_it_changed():
    lm = exact_lm()
    view, copied = lm.as_reference(), lm.reference()
    before = view.identity()
    assert copied.identity() == before == lm.identity()
    with torch.no_grad():
        next(lm.model.parameters()).add_(1.0)
    lm.changed()
    assert view.identity() == lm.identity() != before and copied.identity() == before


def test_options_as_json():
    def times(x: float, by: float = 2.0) -> float:
        return (lambda: x * by)()

    lm = exact_lm()
    found = describe({"a": DPO(), "b": [1, None, {"x", "y"}], "c": Path("p"), "d": np.arange(2), "e": times, "f": lm})
    assert json.loads(json.dumps(found)) == found
    assert found["a"] == {"type": "DPO", "beta": 0.1, "label_smoothing": 0.0}
    assert (found["b"], found["c"], found["d"]) == ([1, None, ["x", "y"]], "p", [0, 1])
    assert "0x" not in json.dumps(found["e"]), "an address differs in every process"
    assert found["f"] == lm.identity()
    assert describe(nn.Linear) == "Linear" and describe(exact_lm) != describe(make_run)

    class Fitted:
        def __init__(self, weights):
            self.weights = weights

        def identity(self):
            return {"weights": self.weights}

    assert describe([Fitted(2)]) == [{"weights": 2}] and describe(Fitted) == Fitted.__qualname__


@dataclasses.dataclass(frozen=True)
class Distilled(DPO):
    """DPO whose reference log-probs are a helper model's."""

    method: str = "sft"
    seen: ClassVar[list[LM]] = []

    def prepare(self, run: Any) -> None:
        Distilled.seen.append(run.train(self.method))


def test_a_helper_model_is_trained_once(tmp_path):
    Distilled.seen.clear()
    run = make_run(tmp_path, "a", Distilled(method="dpo"), stage_folder=tmp_path / "stages")
    record = run.go()
    plain = make_run(tmp_path, "plain", DPO())
    plain.go()
    groups = data(exact_lm())
    helper = Distilled.seen[0]
    np.testing.assert_allclose(logps(helper, groups), logps(plain.policy, groups), atol=1e-9)
    assert record["updates"] == 8 and record["stages"][0]["stage"] == "dpo-model"
    assert helper.template == run.policy.template and helper.view.fingerprint == run.policy.view.fingerprint
    again = make_run(tmp_path, "b", Distilled(method="dpo"), stage_folder=tmp_path / "stages")
    assert again.go()["stages"][0]["reused"] and log(again.out) == log(run.out)
    np.testing.assert_array_equal(logps(Distilled.seen[1], groups), logps(helper, groups))
    other = make_run(tmp_path, "c", Distilled(method="dpo"), lm=exact_lm(1), stage_folder=tmp_path / "stages")
    assert not other.go()["stages"][0]["reused"]


class WithHelper(KTO):
    """KTO after a helper on the same rows."""

    def prepare(self, run: Any) -> None:
        run.train("sft")


def test_a_helper_does_not_learn_from_mismatched_completions(tmp_path):
    lm = exact_lm()
    groups = make_groups(lm, 10, "unpaired", seed=2)
    make_run(tmp_path, "a", WithHelper(), lm, groups=groups, stage_folder=tmp_path / "stages").go()
    lm = exact_lm()
    plain = make_run(tmp_path, "b", SFT(), lm, groups=make_groups(lm, 10, "unpaired", seed=2))
    plain.go()
    (helper,) = (tmp_path / "stages").glob("sft-model-*/model")
    np.testing.assert_allclose(
        logps(load(helper, dtype="float64", device="cpu"), groups), logps(plain.policy, groups), atol=1e-9
    )


# ---- the reference


class Reversed(DPO):
    """A model of its own beside the policy: an adapter trained on swapped pairs. Chosen responses alone are left."""

    seen: ClassVar[list[LM]] = []

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        return {"policy": frozenset({"logp"}), "reverse": frozenset({"logp"})}

    def prepare(self, run: Any) -> None:
        swapped = [dataclasses.replace(g, traces=g.traces[::-1], columns={}) for g in run.groups]
        reverse = run.train("dpo", on=swapped, config={"steps": 2, "lr": 1e-2}, lora=2, beta=0.25)
        Reversed.seen.append(reverse)
        run.give("reverse", reverse)
        run.groups = [dataclasses.replace(g, traces=g.traces[:1]) for g in run.groups]
        run.held_out = []

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        assert batch.pairs_B2 is None
        gap = stats["policy"].sums() - stats["reverse"].sums()
        return Loss((gap**2).sum(), len(gap))


def test_a_helper_on_other_data_becomes_a_live_model(tmp_path):
    Reversed.seen.clear()
    record = make_run(tmp_path, "a", Reversed(), stage_folder=tmp_path / "stages").go()
    (helper,) = Reversed.seen
    lm = exact_lm()
    groups = data(lm)[:8]
    swapped = [dataclasses.replace(g, traces=g.traces[::-1]) for g in groups]
    same = config(steps=2, lr=1e-2)
    plain = make_run(tmp_path, "b", DPO(beta=0.25), lm.clone(lora=2), groups=swapped, config=same)
    plain.go()
    np.testing.assert_allclose(logps(helper, groups), logps(plain.policy, groups), atol=1e-6)  # merged, saved, read
    assert np.abs(logps(helper, groups) - logps(exact_lm(), groups)).max() > 1e-4
    assert record["updates"] == 4 + 2 and not hasattr(helper.model, "disable_adapter")
    again = make_run(tmp_path, "c", Reversed(), stage_folder=tmp_path / "stages").go()
    assert again["stages"][0]["reused"] and timeless([again["final"]]) == timeless([record["final"]])


class Round(DPO):
    """DPO that goes on from another model."""

    def prepare(self, run: Any) -> None:
        run.start_from(run.train("sft"))


def test_a_round_starts_from_another_model_which_is_its_reference(tmp_path):
    first = make_run(tmp_path, "a", Round(beta=0.5))
    record, groups = first.go(), data(exact_lm())
    sft = make_run(tmp_path, "sft", SFT())
    sft.go()
    second = make_run(tmp_path, "b", DPO(beta=0.5), lm=sft.policy)
    final = second.go()["final"]
    assert record["final"] == pytest.approx({**final, "seconds": record["final"]["seconds"]}, abs=1e-9)
    np.testing.assert_allclose(logps(first.policy, groups), logps(second.policy, groups), atol=1e-9)
    plain = make_run(tmp_path, "c")
    plain.go()
    assert np.abs(logps(first.policy, groups) - logps(plain.policy, groups)).max() > 1e-3
    with pytest.raises(ValueError, match="do not give it a reference"):
        make_run(tmp_path, "d", Round(), given={"reference": exact_lm(1)}).go()
    adapted = make_run(tmp_path, "e", lm=exact_lm().clone(lora=2))
    with pytest.raises(ValueError, match="an adapter cannot be"):
        adapted.start_from(exact_lm(1))
    with pytest.raises(ValueError, match="of another architecture"):
        make_run(tmp_path, "f").start_from(tiny.lm())


def test_reference_log_probs_are_computed_once(tmp_path):
    lm, cache, said = exact_lm(), ArrayCache(tmp_path / "cache"), []
    groups = data(lm)
    forwards: list[int] = []
    hook = lm.causal.base_model.register_forward_hook(lambda *_: forwards.append(1))
    add_reference_logps(groups, lm, cache, said.append)
    first, n = [g.columns.pop(REFERENCE) for g in groups], len(forwards)
    assert n > 0 and len(said) == 1
    add_reference_logps(groups, lm, ArrayCache(tmp_path / "cache"), said.append)
    assert len(forwards) == n and len(said) == 1
    for group, column in zip(groups, first):
        for a, b, trace in zip(column, group.columns[REFERENCE], group.traces):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, completions_stats(lm, [trace])[0]["logp"], atol=1e-10)
    more = data(lm, [*ROWS, {"prompt": "new", "chosen": "a", "rejected": "b"}])
    add_reference_logps(more, lm, cache, said.append)
    assert said[-1] == "reference log-probs of 2 responses (20 known or repeated)"
    hook.remove()
    with torch.no_grad():  # other weights, other numbers
        lm.causal.base_model.h[0].mlp.c_fc.bias += 0.1
    lm.changed()
    add_reference_logps(groups, lm, cache, said.append)
    assert said[-1].startswith("reference log-probs of 20 responses")


def test_a_reference_that_was_given(tmp_path):
    reference = exact_lm(2)
    run = make_run(tmp_path, given={"reference": reference})
    record = run.go()
    assert record["provenance"]["models"]["reference"] == reference.identity()
    wanted = logps(reference, run.every)
    np.testing.assert_allclose(np.concatenate([x for g in run.every for x in g.columns[REFERENCE]]), wanted, atol=1e-10)
    assert log(run.out)[0]["loss"] != pytest.approx(math.log(2), rel=1e-3)


def test_models_that_do_not_fit(tmp_path):
    other = LM(tiny.llama(vocab=400), tiny.sentencepiece(), name="other")
    with pytest.raises(ValueError, match="different tokenizers"):
        make_run(tmp_path, given={"reference": other})

    class Teacher(SFT):
        data = "pairs"

        @property
        def stats(self) -> Mapping[str, frozenset[str]]:
            return {"policy": frozenset({"logp"}), "teacher": frozenset({"logp"})}

    with pytest.raises(ValueError, match="dpo needs a model 'teacher'; pass it in given="):
        make_run(tmp_path, objective=Teacher()).go()


def test_a_live_reference_stays_what_it_was(tmp_path):
    tdpo = catalog.method("tdpo")()
    run = make_run(tmp_path, objective=tdpo)
    run.go()
    groups = data(exact_lm())
    np.testing.assert_array_equal(logps(run.reference, groups), logps(exact_lm(), groups))


# ---- LoRA, precision, recomputation


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a tiny model, as adapters need one to come back to."""
    return exact_lm().save(tmp_path_factory.mktemp("base") / "model")


def lora(base: Path) -> LM:
    torch.manual_seed(torch.seed() % 1000)  # whatever the global state is
    return load(base, dtype="float64", device="cpu", lora=4)


def test_an_adapter_is_trained_against_itself_switched_off(tmp_path, base, breaks):
    settings = config(lr=0.05, save_every=1)
    wanted = make_run(tmp_path, "whole", breaks(-1), lora(base), config=settings)
    wanted.go()
    groups = data(exact_lm())
    plain = logps(load(base, dtype="float64", device="cpu"), groups)
    assert log(wanted.out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-9)
    np.testing.assert_allclose(logps(wanted.policy.reference(), groups), plain, atol=1e-10)
    column = np.concatenate([x for g in wanted.every for x in g.columns[REFERENCE]])
    np.testing.assert_allclose(column, plain, atol=1e-10)

    files = {p.name for p in (wanted.out / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files
    again = load(wanted.out / "model", dtype="float64", device="cpu")
    np.testing.assert_allclose(logps(again, groups), logps(wanted.policy, groups), atol=1e-9)
    assert abs(logps(again, groups) - plain).max() > 0.1

    with pytest.raises(KeyboardInterrupt):  # the adapter that a resumed run starts from is the one it started from
        make_run(tmp_path, "half", breaks(2), lora(base), config=settings).go()
    half = make_run(tmp_path, "half", breaks(-1), lora(base), config=settings)
    half.go(resume=True)
    assert log(half.out) == log(wanted.out)


def test_layers_computed_again_change_nothing(tmp_path):
    wanted, again = make_run(tmp_path, "a"), make_run(tmp_path, "b", config=config(gradient_checkpointing=True))
    wanted.go()
    again.go()
    assert log(again.out) == log(wanted.out)
    assert not any("forward" in m.__dict__ for m in again.policy.model.modules())


def test_mixed_precision_computes_policy_and_reference_alike(tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it belongs to the process; as a new process would
    try:
        lm = tiny.lm(dtype=torch.float32)
        run = make_run(tmp_path, lm=lm, groups=data(lm), config=config(precision="bf16", lr=1e-3))
        run.go()
        assert log(run.out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        rounded = np.concatenate([x for g in run.every for x in g.columns[REFERENCE]])
        exact = logps(tiny.lm(dtype=torch.float32), run.every)
        assert 1e-4 < abs(rounded - exact).max() < 0.5
        assert all(p.dtype == torch.float32 for p in lm.model.parameters())
        full = data(lm)
        add_reference_logps(full, tiny.lm(dtype=torch.float32), run.cache)
        found = np.concatenate([x for g in full for x in g.columns[REFERENCE]])
        np.testing.assert_allclose(found, exact, atol=1e-4)  # not taken from the other precision's shelf
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_public_names_of_training():
    assert callable(pertoken.load)
