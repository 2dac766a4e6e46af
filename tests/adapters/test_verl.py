"""The reward manager on verl's data structure (its own class, where verl is installed; else one of the same shape)."""

# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

# pyright: reportMissingImports=false

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.adapters.verl import TokenRewardManager
from pertoken.core.credit import Credit
from pertoken.score.vader import Vader
from tests import tiny

TEXTS = ("a great film", "bad", "it was so so, great")


def tensors():
    """Prompts padded on the left, responses on the right."""
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer.encode(p) for p in ("How was the film?", "So?", "And?")]
    responses = [tokenizer.encode(t) for t in TEXTS]
    pad, p, t = tokenizer.pad_token_id, max(map(len, prompts)), max(map(len, responses)) + 2
    left = [[pad] * (p - len(x)) + x for x in prompts]
    right = [x + [pad] * (t - len(x)) for x in responses]
    mask = [
        [0] * (p - len(a)) + [1] * len(a) + [1] * len(b) + [0] * (t - len(b))
        for a, b in zip(prompts, responses, strict=True)
    ]
    batch = {"prompts": left, "responses": right, "attention_mask": mask}
    columns = {
        "data_source": np.array(["films"] * 3, object),
        "reward_model": np.array([{"ground_truth": x, "style": "rule"} for x in "abc"], object),
        "extra_info": np.array([{"split": "train"}] * 3, object),
    }
    return {k: torch.tensor(v) for k, v in batch.items()}, columns, [len(r) for r in responses]


def plain(batch, columns):
    return SimpleNamespace(batch=batch, non_tensor_batch=columns)


def verls_own(batch, columns):
    verl = pytest.importorskip("verl")
    return verl.DataProto.from_dict(tensors=batch, non_tensors=columns)


@pytest.mark.parametrize("make", [plain, verls_own])
def test_the_token_tensor_is_the_credit(make):
    batch, columns, lengths = tensors()
    manager = TokenRewardManager(tiny.tokenizer(), scorer=Vader())
    found = manager(make(batch, columns), return_dict=True)
    rewards = found["reward_tensor"]
    assert rewards.shape == batch["responses"].shape and rewards.dtype == torch.float32
    lm = tiny.lm(0)
    for n, (text, length) in enumerate(zip(TEXTS, lengths, strict=True)):
        values = Vader().score([lm.trace("?", text, ended=False)])[0].values
        np.testing.assert_allclose(rewards[n, :length], values, atol=1e-6)
        assert not rewards[n, length:].any()
    assert found["reward_extra_info"]["failed"] == [False] * 3
    assert {"pertoken", "words", "punctuation", "failed"} == found["reward_extra_info"].keys()
    torch.testing.assert_close(manager(make(batch, columns)), rewards)


def test_rows_know_their_ground_truth_and_tools_earn_nothing():
    batch, columns, lengths = tensors()
    seen = []

    class All:
        def score(self, items):
            seen.extend(items)
            return [Credit(trace=t, values=np.ones(len(t))) for t in items]

    batch["response_mask"] = batch["attention_mask"][:, batch["prompts"].shape[1] :].clone()
    batch["response_mask"][0, 1] = 0
    found = TokenRewardManager(tiny.tokenizer(), scorer=All())(plain(batch, columns))
    assert found[0].tolist() == [1.0, 0.0, *[1.0] * (lengths[0] - 2), *[0.0] * (found.shape[1] - lengths[0])]
    assert [t.meta["ground_truth"] for t in seen] == ["a", "b", "c"]
    assert seen[0].meta["split"] == "train" and seen[0].meta["source"] == "films"


def test_scores_that_are_there_are_passed_on_and_a_scorer_is_asked_for(capsys):
    batch, columns, _ = tensors()
    scores = torch.rand(batch["responses"].shape)
    manager = TokenRewardManager(tiny.tokenizer(), num_examine=1, scorer=Vader())
    assert manager(plain(batch | {"rm_scores": scores}, columns)) is scores
    manager(plain(batch, columns))
    assert "a great film" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no scorer"):
        TokenRewardManager(tiny.tokenizer())


def test_a_row_that_fails():
    batch, columns, _ = tensors()

    def table(text):
        return {"bad": 1.0}[text]

    with pytest.raises(ValueError, match="failed on row 0"):
        TokenRewardManager(tiny.tokenizer(), scorer=table)(plain(batch, columns))
    found = TokenRewardManager(tiny.tokenizer(), scorer=table, on_error="skip")(plain(batch, columns), return_dict=True)
    assert found["reward_extra_info"]["failed"] == [True, False, True]
    assert found["reward_tensor"].sum(1).tolist() == [0.0, 1.0, 0.0]
