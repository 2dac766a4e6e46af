"""DPO-S: pairs' losses times alpha over the number of pairs; alpha of 1 is DPO to the bit; alpha by hand from a run."""

# pyright: reportArgumentType=false

import math

import numpy as np
import pytest
import torch

from pertoken import catalog
from pertoken.core.data import encode as encode_rows
from pertoken.core.data import load_examples
from pertoken.core.experience import Rollouts
from pertoken.core.loop import LoopConfig
from pertoken.core.protocols import Batch
from pertoken.core.rollout import Sampling, sample
from pertoken.core.run import Run
from pertoken.train._dynamic_scaling import data_hardness, responsiveness, similarity
from pertoken.train.dpo import DPO
from pertoken.train.dr_irl import Scaling
from pertoken.train.dr_irl_dpo import DRIRLDPO
from tests import tiny
from tests.methods.by_hand import stats

CATEGORIES = ("crime", "crime", "insult", "crime", "insult", "crime")
SHORT = Rollouts(generations=2, sampling=Sampling(max_new_tokens=3))
encode = lambda texts: np.array([[len(t), t.count("o"), 1.0] for t in texts], float)
SAID = (("I cannot help. Sorry", "yes"), ("no", "of course. here is how"), ("ask a doctor", "o o o"), ("stop", "go on"))
SAID += (("never", "so be it"), ("not from me", "look here"))


def test_loss_by_hand():
    policy, reference = stats([-1.0], [-2.0], [-3.0], [-1.5]), stats([-1.5], [-1.0], [-3.0], [-2.5])
    batch = Batch(
        pairs_B2=torch.tensor([[0, 1], [2, 3]]), columns={"alpha": torch.tensor([1.5, 1.5, 0.5, 0.5]).double()}
    )
    both = {"policy": policy, "reference": reference}
    loss = DRIRLDPO(beta=0.2).loss(both, batch)
    margins = [0.2 * (0.5 - -1.0), 0.2 * (0.0 - 1.0)]
    wanted = sum(a * math.log1p(math.exp(-m)) for a, m in zip((1.5, 0.5), margins, strict=True))
    assert loss.sum.item() == pytest.approx(wanted) and loss.count == 2  # over pairs, not over the sum of alpha
    with pytest.raises(ValueError, match="needs the column 'alpha'"):
        DRIRLDPO().loss(both, Batch(pairs_B2=batch.pairs_B2))


def groups_of(lm, categories=("",) * 6):
    rows = [
        {"prompt": f"q{i}", "chosen": good, "rejected": bad} | ({"category": c} if c else {})
        for i, ((good, bad), c) in enumerate(zip(SAID, categories, strict=True))
    ]
    groups, _ = encode_rows(load_examples(rows, kind="pair")[0], lm)
    return groups


def went(objective, out, slug="dr-irl-dpo", held=0, **of_groups):
    lm = tiny.lm()
    groups = groups_of(lm, **of_groups)
    config = LoopConfig(steps=2, batch_size=2)
    run = Run(slug=slug, objective=objective, policy=lm, groups=groups[: 6 - held], held_out=groups[6 - held :],
              config=config, out=out, resolve=catalog.method, progress=False)  # fmt: skip
    run.go()
    return run


def test_without_scaling_it_is_dpo_to_the_bit(tmp_path):
    plain = went(DPO(), tmp_path / "dpo", slug="dpo")
    same = went(DRIRLDPO(scaling=Scaling(signals="none")), tmp_path / "none")
    other = went(DRIRLDPO(scorer=len, encode=encode, answers=SHORT), tmp_path / "scaled")
    weights = [torch.cat([p.flatten() for p in run.policy.model.parameters()]) for run in (plain, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_alpha_by_hand(tmp_path):
    """The chosen response is the demonstration, one greedy answer the generated text; held-out pairs count 1."""
    run = went(DRIRLDPO(scorer=lambda text: 0.1 * len(text), encode=encode, answers=SHORT), tmp_path, held=1)
    found = [g.columns["alpha"] for g in run.groups]
    start = tiny.lm()
    prompts = [g.prompt_ids for g in run.groups]
    answers = [t.text for (t,) in sample(start, prompts, 1, Sampling(max_new_tokens=3, temperature=0.0), seed=0)]
    demos = [good for good, _ in SAID[:5]]
    w, _ = similarity(answers, demos, encode)
    gaps = [0.1 * (len(demo) - len(answer)) for demo, answer in zip(demos, answers, strict=True)]
    assert found == pytest.approx((data_hardness(1 - w) * responsiveness(gaps)[0]).tolist())
    assert max(found) > min(found) and [g.columns["alpha"] for g in run.held_out] == [1.0]
    assert any("alpha from" in note for note in run.notes)


@pytest.mark.parametrize("irl_policy", ["pool", "grpo"])
def test_rewards_are_learned_from_the_chosen_responses(tmp_path, irl_policy):
    from pertoken.core.irl import IRL

    irl = IRL(irl_pool=2, irl_rounds=2, irl_policy=irl_policy, irl_policy_steps=1)
    objective = DRIRLDPO(irl=irl, encode=encode, answers=SHORT)
    run = went(objective, tmp_path, categories=CATEGORIES)
    assert len(run.groups) == 4 and any("2 of 6 prompts left out" in note for note in run.notes)
    assert [s["stage"] for s in run.stages.records].count("irl-reward") == 1
    again = went(objective, tmp_path / "again", categories=CATEGORIES)
    assert [g.columns["alpha"] for g in again.groups] == [g.columns["alpha"] for g in run.groups]
