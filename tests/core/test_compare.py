"""Comparisons: same data, own folders, and a killed one goes on where it was."""

import dataclasses
import shutil

import pytest

from pertoken import catalog
from pertoken.core.cache import ArrayCache
from pertoken.core.compare import Arm, check_arms, compare
from pertoken.core.data import encode
from pertoken.core.evaluate import pair_margins
from pertoken.core.examples import Example
from pertoken.core.loop import LoopConfig
from pertoken.train.dpo import DPO
from pertoken.train.sft import SFT
from tests import tiny

CONFIG = LoopConfig(lr=1e-3, batch_size=4, steps=3, save_every=1)


@pytest.fixture()
def go(tmp_path):
    groups = encode(
        [Example(prompt=f"film {i}", responses=("great plot", "dull " * (1 + i % 2))) for i in range(8)], tiny.lm()
    )[0]
    trained = []

    def evaluate(lm, reference, seed):
        trained.append(seed)
        return {"correct": [float(m > 0) for m in pair_margins(lm, reference, groups[6:])]}

    def run(out="out", betas=(0.1, 0.5), seeds=(1, 2)):
        arms = [Arm(name=f"beta {b}", slug="dpo", objective=DPO(beta=b)) for b in betas]
        cache = ArrayCache(tmp_path / "cache")
        options = {"resolve": catalog.method, "evaluate": evaluate, "cache": cache, "progress": False}
        return compare(arms, tiny.lm, groups[:6], groups[6:], CONFIG, tmp_path / out, seeds=seeds, **options)

    run.trained, run.path = trained, tmp_path
    return run


def test_arms_and_seeds_have_their_own_runs(go):
    outcomes = go()
    assert [(o.arm, o.seed) for o in outcomes] == [(f"beta {b}", s) for b in (0.1, 0.5) for s in (1, 2)]
    assert all(len(o.history) == 3 and o.record["updates"] == 3 for o in outcomes)
    losses = {(o.arm, o.seed): o.history[-1]["loss"] for o in outcomes}
    assert len(set(losses.values())) == 4  # beta and data order both show
    assert go.trained == [1, 2, 1, 2]


def test_finished_runs_are_read_and_a_killed_one_resumes(go):
    first = go()
    folder = go.path / "out" / "beta 0.5" / "seed-2"
    (folder / "figures.json").unlink()
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoint-000003")  # as if it had been killed in its last update
    again = go()
    assert go.trained == [1, 2, 1, 2, 2]

    def plain(outcome):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in outcome.history]

    assert [plain(o) for o in again] == [plain(o) for o in first]
    assert [o.figures for o in again] == [o.figures for o in first]


def test_other_options_in_the_same_folder_are_refused(go):
    go(betas=(0.1,), seeds=(1,))
    (go.path / "out" / "beta 0.1").rename(go.path / "out" / "beta 0.2")
    with pytest.raises(ValueError, match="other options"):
        go(betas=(0.2,), seeds=(1,))


def test_what_cannot_be_compared_is_refused_first():
    with pytest.raises(ValueError, match="takes sft data"):
        check_arms([Arm(name="a", slug="dpo", objective=DPO()), Arm(name="b", slug="sft", objective=SFT())], "pairs")
    with pytest.raises(ValueError, match="one name"):
        check_arms([Arm(name="a", slug="dpo", objective=DPO())] * 2, "pairs")


class Scored(DPO):
    """DPO that learns only from pairs with scores."""

    def check(self, groups):
        bare = [g.example.row for g in groups if g.example.scores is None]
        if bare:
            raise ValueError(f"row {bare[0]} has no score; give the columns score_chosen and score_rejected")


def test_data_that_one_method_cannot_use_are_refused_before_any_other_is_trained(go):
    lm = tiny.lm()
    scores = [(1.0, 0.0)] * 3 + [None]
    rows = [Example(prompt=f"f{i}", responses=("a", "b"), scores=s, row=i) for i, s in enumerate(scores)]
    groups = encode(rows, lm)[0]
    arms = [Arm(name="dpo", slug="dpo", objective=DPO()), Arm(name="scored", slug="dpo", objective=Scored())]
    check_arms(arms, "pairs", groups[:3])
    out = go.path / "refused"
    with pytest.raises(ValueError, match="scored cannot learn from these data: row 3 has no score"):
        compare(
            arms,
            lambda: lm,
            groups[:3],
            groups[3:],
            CONFIG,
            out,
            seeds=(1,),
            resolve=catalog.method,
            evaluate=lambda *_: {},
        )
    assert not out.exists()


@pytest.mark.parametrize(
    ("slug", "reason"), [("mm-dpo", "row 1 has no scores"), ("reward-augmented", "kept no row|no row|without scores")]
)
def test_methods_that_learn_from_scores_refuse_data_without_them(slug, reason):
    lm = tiny.lm()
    rows = [Example(prompt=f"f{i}", responses=("a", "b"), row=i + 1) for i in range(3)]
    arms = [Arm(name="dpo", slug="dpo", objective=DPO()), Arm(name=slug, slug=slug, objective=catalog.method(slug)())]
    with pytest.raises(ValueError, match=f"{slug} cannot learn from these data: .*({reason})"):
        check_arms(arms, "pairs", encode(rows, lm)[0])
    scored = [dataclasses.replace(e, scores=(8.0, 2.0 + e.row)) for e in rows]
    check_arms(arms, "pairs", encode(scored, lm)[0])
