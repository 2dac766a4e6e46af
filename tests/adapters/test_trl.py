"""Scorers in the TRL that is installed: a reward function, and advantages a token in real training steps."""

# pyright: reportOperatorIssue=false
# pyright: reportOptionalOperand=false

# pyright: reportMissingImports=false

import numpy as np
import pytest
import torch

from pertoken.core.advantage import GroupNormalised
from pertoken.core.credit import Credit
from pertoken.score.vader import Vader
from tests import tiny

trl = pytest.importorskip("trl")

from pertoken.adapters.trl import reward_function, token_credit_trainer  # noqa: E402


def test_a_reward_function_is_the_scorers_sum():
    tokenizer = tiny.tokenizer()
    texts = ["great film", "a horrible, bad one"]
    ids = [tokenizer.encode(t) for t in texts]
    reward = reward_function(Vader(), tokenizer)
    found = reward(prompts=["How?", "How?"], completions=texts, completion_ids=ids, trainer_state=None, log_extra=None)
    lm = tiny.lm(0)
    wanted = [Vader().score([lm.trace("How?", t)])[0].reduce() for t in texts]
    assert found == pytest.approx(wanted) and reward.__name__ == "vader" and found[0] > 0 > found[1]


def test_columns_reach_the_scorer_and_rows_that_fail_are_none():
    class Answer:
        name = "answer"

        def score(self, items):
            return [Credit.of_sequence(t, float(t.meta["answer"] == t.text)) for t in items]

    tokenizer = tiny.tokenizer()
    ids = [tokenizer.encode(t) for t in ("film", "plot")]
    messages = [[{"role": "user", "content": "what?"}]] * 2
    reward = reward_function(Answer(), tokenizer)
    assert reward(prompts=messages, completions=messages, completion_ids=ids, answer=["film", "film"]) == [1.0, 0.0]
    skipping = reward_function(lambda text: {"film": 2.0}[text], tokenizer, name="table", on_error="skip")
    with pytest.warns(UserWarning, match="table failed on completion 1"):
        assert skipping(prompts=["a", "a"], completions=["", ""], completion_ids=ids) == [2.0, None]


class Modulo:
    """0, 1 or 2 on a token, by its id."""

    def __init__(self):
        self.seen = []

    def score(self, items):
        self.seen.append(list(items))
        return [Credit(trace=t, values=np.array([float(i % 3) for i in t.completion_ids])) for t in items]


def trainer_of(folder, scorer, **options):
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=5,
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    model = tiny.llama(0, torch.float32)
    data = Dataset.from_list([{"prompt": "how was the film"}] * 4)
    return token_credit_trainer(
        scorer,
        model=model,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=config,
        train_dataset=data,
        processing_class=tiny.tokenizer(chat=False),
        **options,
    )


@pytest.mark.parametrize("alone", [True, False])
def test_advantages_are_one_a_token(tmp_path, alone):
    scorer, seen = Modulo(), []
    trainer = trainer_of(tmp_path, scorer, alone=alone, weight=0.5)
    inner = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or inner(model, inputs)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    advantages, mask = seen[0]["advantages"], seen[0]["completion_mask"].bool()
    assert advantages.shape == mask.shape
    ids = seen[0]["completion_ids"]
    rewards = torch.where(mask, ids % 3, 0).float()
    judge = GroupNormalised(supervision="process")
    tokens = 0.5 * judge.compute(rewards, None, torch.zeros(4, dtype=torch.long), mask).advantage_NT
    own = advantages - tokens
    if alone:
        torch.testing.assert_close(own, torch.zeros_like(own))
    else:  # what is left is TRL's own, one number a completion
        torch.testing.assert_close(own, own[:, :1].expand_as(own))
    assert all(t.meta["prompt"] == "how was the film" for t in scorer.seen[0])


def test_a_group_that_is_not_whole_is_refused(tmp_path):
    """As on each of two processes with half of a group's completions."""
    trainer = trainer_of(tmp_path, Modulo())
    with pytest.raises(ValueError, match=r"2 completions on a process .* groups of 4; make per_device_train"):
        trainer._generate_and_score_completions([{"prompt": "how was the film"}] * 2)


def test_a_tokenizer_is_asked_for():
    with pytest.raises(ValueError, match="processing_class"):
        token_credit_trainer(Vader(), model=None, reward_funcs=[])
