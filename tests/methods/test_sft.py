"""SFT: token and sequence means by hand, and what counts."""

import math

import pytest
import torch

from pertoken.core.protocols import Batch
from pertoken.train.sft import SFT, sft_loss
from tests.methods.by_hand import gradient, mean, stats

BATCH = Batch(None)


def given():
    return {"policy": stats([-1.0, -2.0, -3.0], [-5.0], rank=[[0, 4, 0], [2]])}


def test_token_mean_by_hand():
    s = given()
    loss = SFT().loss(s, BATCH)
    assert loss.sum.item() == 11 and float(loss.count) == 4 and mean(loss) == 2.75
    assert gradient(loss, s["policy"]).tolist() == [[-1, -1, -1], [-1, 0, 0]]
    assert mean(loss, "mean_token_accuracy") == 0.5  # two of four tokens are the likeliest
    assert mean(loss, "logps/chosen") == -5.5 and mean(loss, "completions/mean_length") == 2


def test_sequence_mean_by_hand():
    s = given()
    loss = SFT(average="sequence").loss(s, BATCH)
    assert mean(loss) == (2 + 5) / 2
    torch.testing.assert_close(gradient(loss, s["policy"])[0], torch.full((3,), -1 / 3, dtype=torch.float64))


def test_equals_cross_entropy():
    """Values equal torch's cross entropy over the labels that are not masked, as in TRL's `nll`."""
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 5, 11, dtype=torch.float64), torch.randint(0, 11, (3, 5))
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    total, count = sft_loss(logp, mask)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~mask, -100).flatten())
    torch.testing.assert_close(total / count, wanted)


def test_empty_completion_adds_nothing():
    for average in ("token", "sequence"):
        loss = SFT(average=average).loss({"policy": stats([-1.0, -3.0], [], rank=[[0, 0], []])}, BATCH)
        assert loss.sum.item() == {"token": 4, "sequence": 2}[average] and float(loss.count) == 2
        loss = SFT(average=average).loss({"policy": stats([], rank=[[]])}, BATCH)
        assert loss.sum.item() == 0


def test_extreme_log_probs():
    assert mean(SFT().loss({"policy": stats([-1e4], rank=[[9]])}, BATCH)) == 1e4
    assert math.isclose(mean(SFT().loss({"policy": stats([0.0], rank=[[0]])}, BATCH)), 0)


def test_options():
    with pytest.raises(ValueError, match="average="):
        SFT(average="word")  # type: ignore[arg-type]
