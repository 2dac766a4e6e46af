# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
"""Guided decoding: the formula, its identities, weights of each request's own, and what must be refused."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pertoken.core.decode import LMGuide, Product, decode
from pertoken.core.lm import LM, load
from pertoken.core.rollout import Sampling
from pertoken.generate.genarm import GenARM, guided_logps
from pertoken.score.arm_reward import ARMReward
from tests import tiny
from tests.methods.one_pass import exact_lm

BASE, ARM, OTHER = exact_lm(0), exact_lm(1), exact_lm(2)
STOPS = [i for i in BASE.stop_ids if i < len(tiny.tokenizer())]
PROMPTS = ["the plot", "a film and a friend"]
LONG = Sampling(max_new_tokens=6, min_new_tokens=6)


def logits(lm, ids):
    with torch.no_grad():
        return lm.causal(torch.tensor([ids])).logits[0, -1].numpy()


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def ids_of(drawn):
    return [d.trace.completion_ids for some in drawn for d in some]


def check(trace, arms, alpha, temperature=1.0, asked=None):
    """Every token's log-prob against the models' plain forwards."""
    for t, token in enumerate(trace.completion_ids):
        done = trace.completion_ids[:t]
        base = log_softmax(logits(BASE, trace.prompt_ids + done))
        total = base + sum(
            a * log_softmax(logits(arm, (asked or trace.prompt_ids) + done)) for arm, a in zip(arms, alpha)
        )
        if len(done) < trace.sampling["min_new_tokens"]:
            total[STOPS] = -np.inf
        assert trace.sampled_logps[t] == pytest.approx(log_softmax(total / temperature)[token], abs=1e-6)
        assert trace.policy_logps[t] == pytest.approx(base[token], abs=1e-6)


# the formula


def test_draws_are_from_the_formula():
    """Two rewards at a temperature, one of them steered away from; no sum of alphas is special."""
    for alpha in ((0.7, -0.4), (-1.5, 0.0), (-1.0, 0.0)):
        how = dataclasses.replace(LONG, temperature=0.8)
        for some in GenARM(arms=[ARM, OTHER], alpha=alpha).generate(BASE, PROMPTS, n=2, sampling=how, seed=1):
            for drawn in some:
                check(drawn.trace, (ARM, OTHER), alpha, 0.8)


def test_arithmetic_on_tables():
    rng = np.random.default_rng(0)
    base, one, two = (torch.tensor(rng.normal(size=(3, 9)) * 3) for _ in range(3))
    rows = [[log_softmax(x) for x in table.numpy()] for table in (base, one, two)]
    wanted = [log_softmax((b + 0.5 * p - 2.0 * q) / 0.7) for b, p, q in zip(*rows, strict=True)]
    q = guided_logps(base, [one, two], (0.5, -2.0), 0.7)
    np.testing.assert_allclose(q, wanted, atol=1e-12)
    np.testing.assert_allclose(q.exp().sum(-1), 1.0, rtol=1e-12)
    shifted = guided_logps(base + 5.0, [one - 3.0, two + 40.0], (0.5, -2.0), 0.7)  # constants cancel
    torch.testing.assert_close(shifted, q)
    by_row = guided_logps(base, [one], (torch.tensor([0.0, 1.0, -1.0]),))
    for i, a in enumerate((0.0, 1.0, -1.0)):
        torch.testing.assert_close(by_row[i], guided_logps(base, [one], (a,))[i], rtol=0, atol=0)


def test_the_releases_normalisation_gives_the_same():
    """(log p + sum alpha log p_k) / (1 + sum alpha), renormalised, at temperature T / (1 + sum alpha)."""
    rng = np.random.default_rng(1)
    base, one, two = (log_softmax(rng.normal(size=9) * 3) for _ in range(3))
    share = 1 + 0.2 + 4
    theirs = log_softmax(log_softmax((base + 0.2 * one + 4 * two) / share) / (0.9 / share))
    ours = guided_logps(*(torch.tensor(base)[None], [torch.tensor(x)[None] for x in (one, two)]), (0.2, 4.0), 0.9)
    np.testing.assert_allclose(ours[0], theirs, atol=1e-12)


def test_temperature_0_is_the_argmax_of_the_sum():
    how = Sampling(max_new_tokens=5, temperature=0.0)
    ((one,),) = GenARM(arms=ARM, alpha=(2.0,)).generate(BASE, PROMPTS[:1], sampling=how)
    for t, token in enumerate(one.trace.completion_ids):
        ids = one.trace.prompt_ids + one.trace.completion_ids[:t]
        assert token == (log_softmax(logits(BASE, ids)) + 2 * log_softmax(logits(ARM, ids))).argmax()
    assert not one.trace.sampled_logps.any()
    q = guided_logps(torch.tensor([[0.0, 1.0]]), [torch.tensor([[2.0, 0.0]])], (1.0,), 0.0)
    assert q.tolist() == [[0.0, -math.inf]]


def test_infinite_entries():
    inf = math.inf
    base, arm = torch.tensor([[0.0, -inf, -inf, 1.0]]), torch.tensor([[-inf, -inf, 0.0, 1.0]])
    for alpha in (1.0, -1.0, 5.0):
        assert guided_logps(base, [arm], (alpha,)).tolist() == [[-inf, -inf, -inf, 0.0]]
    torch.testing.assert_close(guided_logps(base, [arm], (0.0,)), base.log_softmax(-1), rtol=0, atol=0)  # 0 x -inf = 0


def test_low_precision_is_combined_in_float32():
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 49152, generator=gen).mul(4).to(torch.bfloat16) for _ in range(2))
    found = guided_logps(a, [b], (1.0,))
    wanted = log_softmax(log_softmax(a.double()) + log_softmax(b.double()))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double(), wanted, atol=1e-4)  # in bfloat16 it is off by some 1e-2
    lm = tiny.lm(0, torch.bfloat16)
    guide = GenARM(arms=tiny.lm(1, torch.bfloat16)).guides(lm)[0]
    assert guide.step(guide.start(["a"]), None).dtype == torch.float32


def test_product_and_tilted_base_differ_by_local_normalisers():
    """Three tokens, three steps, enumerated: pi* tilts whole sequences, q renormalises each step."""
    rng = np.random.default_rng(2)
    sequences = list(itertools.product(range(3), repeat=3))

    def gap(prefix_dependent):
        tables = {}

        def row(name, prefix):
            key = (name, prefix) if prefix_dependent else (name, len(prefix))
            return tables.setdefault(key, log_softmax(rng.normal(size=3) * 2))

        def logps(name, y):
            return sum(row(name, y[:t])[y[t]] for t in range(3))

        def local(y):
            total = [log_softmax(row("base", y[:t]) + 0.7 * row("arm", y[:t]))[y[t]] for t in range(3)]
            return sum(total)

        def normalisers(y):
            return sum(np.log(np.exp(row("base", y[:t]) + 0.7 * row("arm", y[:t])).sum()) for t in range(3))

        q = np.array([local(y) for y in sequences])
        tilted = np.array([logps("base", y) + 0.7 * logps("arm", y) for y in sequences])
        z = np.log(np.exp(tilted).sum())
        ratio = z - np.array([normalisers(y) for y in sequences])  # Z / prod Z_t, as the docstring says
        np.testing.assert_allclose(q - (tilted - z), ratio, atol=1e-12)
        assert np.exp(q).sum() == pytest.approx(1.0)
        # Z is the mean of prod Z_t under q
        assert z == pytest.approx(np.log((np.exp(q) * np.exp([normalisers(y) for y in sequences])).sum()))
        return np.abs(ratio).max()

    assert gap(prefix_dependent=False) < 1e-12
    assert gap(prefix_dependent=True) > 0.05


# identities of whole generations


def test_alpha_0_is_the_base_bit_for_bit():
    plain = [
        t
        for some in decode(BASE, Product([LMGuide(lm=BASE)], (1.0,)), PROMPTS, n=2, sampling=LONG, seed=4)
        for t in some
    ]
    narrow = LM(GPT2LMHeadModel(_config(vocab=318)).double().eval(), tiny.tokenizer())  # cuts nothing at 0
    for arms, alpha in ((ARM, (0.0,)), ([narrow, OTHER], (0.0, 0.0))):
        drawn = GenARM(arms=arms, alpha=alpha).generate(BASE, PROMPTS, n=2, sampling=LONG, seed=4)
        for trace, one in zip(plain, [d for some in drawn for d in some], strict=True):
            assert one.trace.completion_ids == trace.completion_ids
            np.testing.assert_array_equal(one.trace.sampled_logps, trace.sampled_logps)
            np.testing.assert_array_equal(one.trace.policy_logps, trace.policy_logps)
            assert not one.credit.values.any()


def test_a_reward_without_weight_is_not_computed(monkeypatch):
    silent = exact_lm(5)
    monkeypatch.setattr(silent.causal.base_model, "forward", lambda *a, **k: pytest.fail("computed for nothing"))
    one = GenARM(arms=[ARM, silent], alpha=(0.6, 0.0)).generate(BASE, PROMPTS, sampling=LONG)
    two = GenARM(arms=ARM, alpha=(0.6,)).generate(BASE, PROMPTS, sampling=LONG)
    assert ids_of(one) == ids_of(two)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a[0].trace.sampled_logps, b[0].trace.sampled_logps)
        np.testing.assert_array_equal(a[0].credit.values, b[0].credit.values)


def test_the_base_as_its_own_reward_is_a_temperature():
    a = 1.5
    cold = decode(
        BASE, LMGuide(lm=BASE), PROMPTS, n=3, sampling=dataclasses.replace(LONG, temperature=1 / (1 + a)), seed=7
    )
    drawn = GenARM(arms=BASE, alpha=(a,)).generate(BASE, PROMPTS, n=3, sampling=LONG, seed=7)
    for trace, one in zip([t for some in cold for t in some], [d for some in drawn for d in some], strict=True):
        assert one.trace.completion_ids == trace.completion_ids
        np.testing.assert_allclose(one.trace.sampled_logps, trace.sampled_logps, atol=1e-9)


def test_weights_of_each_request():
    """One batch, the same prompt at several weights: each draws what it draws when all have that weight."""
    asked, table = ["the plot"] * 4, ((0.0, 0.0), (1.0, 0.0), (0.0, -0.5), (0.3, 2.0))
    together = GenARM(arms=[ARM, OTHER], per_prompt=table).generate(BASE, asked, n=2, sampling=LONG, seed=3)
    for i, alpha in enumerate(table):
        alone = GenARM(arms=[ARM, OTHER], alpha=alpha).generate(BASE, asked, n=2, sampling=LONG, seed=3)[i]
        for a, b in zip(together[i], alone, strict=True):
            assert a.trace.completion_ids == b.trace.completion_ids
            np.testing.assert_array_equal(a.trace.sampled_logps, b.trace.sampled_logps)
            np.testing.assert_array_equal(a.credit.values, b.credit.values)
            check(a.trace, (ARM, OTHER), alpha)
    one = GenARM(arms=[ARM], per_prompt=torch.tensor([1.0, 0.0])).generate(BASE, PROMPTS, sampling=LONG)
    assert [d[0].meta["alpha"]["arm0 exact-1"] for d in one] == [1.0, 0.0]


def test_sequences_that_end_leave_the_others_alone():
    """Rows drop out of all caches together: unequal lengths, and every log-prob is still the formula's."""
    how = Sampling(max_new_tokens=30, temperature=1.5)
    drawn = GenARM(arms=ARM, per_prompt=(0.5, -0.2)).generate(BASE, PROMPTS, n=12, sampling=how, seed=2)
    assert len({len(d.trace) for some in drawn for d in some}) > 2
    for some, alpha in zip(drawn, (0.5, -0.2), strict=True):
        for one in some[:2]:
            check(one.trace, (ARM,), (alpha,), 1.5)


def test_credit_is_the_weighted_token_reward():
    how = Sampling(max_new_tokens=12, temperature=0.7, top_p=0.9)
    drawn = [
        d for s in GenARM(arms=[ARM, OTHER], alpha=(2.0, -0.5)).generate(BASE, PROMPTS, n=2, sampling=how) for d in s
    ]
    traces = [d.trace for d in drawn]
    rewards = [ARMReward(lm=lm).score(traces) for lm in (ARM, OTHER)]
    for one, first, second in zip(drawn, *rewards, strict=True):
        np.testing.assert_allclose(one.credit.values, 2 * first.values - 0.5 * second.values, atol=1e-6)
        assert one.credit.kind == "reward" and one.credit.method == "genarm"
        parts = one.meta["parts"]
        assert list(parts) == ["arm0 exact-1", "arm1 exact-2"] and one.meta["tokens"] == len(one.trace)
        assert list(parts.values()) == pytest.approx([2 * first.reduce(), -0.5 * second.reduce()], abs=1e-6)
        assert one.credit.reduce() == pytest.approx(sum(parts.values()))


def test_the_guided_model_stops_where_its_reward_says():
    """A reward model that puts all on the terminator ends responses; one that cannot end them never does."""
    ender = exact_lm(6)
    with torch.no_grad():
        ender.causal.lm_head = torch.nn.Linear(32, len(tiny.tokenizer()), dtype=torch.float64)
        ender.causal.lm_head.weight.zero_()
        ender.causal.lm_head.bias.zero_()
        ender.causal.lm_head.bias[BASE.terminator] = 60.0
    for alpha, lengths in ((1.0, {1}), (-1.0, {8})):
        some = GenARM(arms=ender, alpha=(alpha,)).generate(BASE, PROMPTS, sampling=Sampling(max_new_tokens=8))
        assert {len(d.trace) for (d,) in some} == lengths and all(d.trace.ended == (alpha > 0) for (d,) in some)


# whose guides, which prompts, which ids


def test_own_templates_and_caches():
    made = GenARM(arms=[ARM, OTHER], alpha=(1.0, 0.5), templates=("BEGINNING: {prompt} ASSISTANT:", ""))
    for prompt, (one,) in zip(PROMPTS, made.generate(BASE, PROMPTS, sampling=LONG), strict=True):
        own = (0, *BASE.tokenizer.encode(f"BEGINNING: {prompt} ASSISTANT:", add_special_tokens=False))
        asked = made.guides(BASE)[0].ids(prompt)
        assert asked in (own, own[1:])  # with or without BOS, as the tokenizer does
        assert one.trace.prompt_ids == BASE.encode_prompt(prompt) != asked
        for t, token in enumerate(one.trace.completion_ids):
            done = one.trace.completion_ids[:t]
            total = log_softmax(logits(BASE, one.trace.prompt_ids + done))
            total = total + log_softmax(logits(ARM, asked + done))
            total = total + 0.5 * log_softmax(logits(OTHER, one.trace.prompt_ids + done))
            total[STOPS] = -np.inf
            assert one.trace.sampled_logps[t] == pytest.approx(log_softmax(total)[token], abs=1e-6)
    message = [[{"role": "user", "content": PROMPTS[0]}]]
    (same,) = made.generate(BASE, message, sampling=LONG)
    assert same[0].trace.completion_ids == made.generate(BASE, PROMPTS[:1], sampling=LONG)[0][0].trace.completion_ids


def _config(vocab=320, width=32, layers=2, positions=256):
    return GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=4, initializer_range=0.3
    )


def test_weak_to_strong_any_size():
    with torch.random.fork_rng():
        torch.manual_seed(9)
        small = LM(GPT2LMHeadModel(_config(width=16, layers=1)).double().eval(), tiny.tokenizer(), name="small")
    for (one,) in GenARM(arms=small).generate(BASE, PROMPTS, sampling=LONG):
        check(one.trace, (small,), (1.0,))


def test_heads_of_different_widths():
    """Common ids only: nothing that one of the heads lacks is drawn, and q is normalised over what is left."""
    for vocab in (318, 352):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            arm = LM(GPT2LMHeadModel(_config(vocab=vocab)).double().eval(), tiny.tokenizer(), name="padded")
        ((one,),) = GenARM(arms=arm).generate(BASE, PROMPTS[:1], sampling=dataclasses.replace(LONG, temperature=3.0))
        both = min(vocab, 320)
        assert max(one.trace.completion_ids) < both
        for t, token in enumerate(one.trace.completion_ids):
            ids = one.trace.prompt_ids + one.trace.completion_ids[:t]
            total = log_softmax(logits(BASE, ids))[:both] + log_softmax(logits(arm, ids))[:both]
            total[STOPS] = -np.inf
            assert one.trace.sampled_logps[t] == pytest.approx(log_softmax(total / 3)[token], abs=1e-6)


def test_a_narrow_head_beside_requests_that_do_not_weigh_it():
    """They draw ids that it lacks, as the base alone does, while it guides others in the batch."""
    arm = LM(GPT2LMHeadModel(_config(vocab=318)).double().eval(), tiny.tokenizer())
    how = dataclasses.replace(LONG, temperature=5.0)
    free, guided = GenARM(arms=arm, per_prompt=(0.0, 1.0)).generate(BASE, PROMPTS, n=30, sampling=how)
    assert max(max(d.trace.completion_ids) for d in free) >= 318 > max(max(d.trace.completion_ids) for d in guided)
    alone = GenARM(arms=arm, alpha=(0.0,)).generate(BASE, PROMPTS, n=30, sampling=how)[0]
    assert ids_of([free]) == ids_of([alone])
    short = LM(GPT2LMHeadModel(_config(positions=22)).double().eval(), tiny.tokenizer())  # nor can it read this prompt
    asked = ["a plot " * 9, PROMPTS[0]]
    assert len(BASE.encode_prompt(asked[0])) > 22
    mixed = GenARM(arms=short, per_prompt=(0.0, 1.0)).generate(BASE, asked, sampling=LONG)
    check(mixed[0][0].trace, (), ())
    check(mixed[1][0].trace, (short,), (1.0,))


def test_one_set_of_weights_with_and_without_an_adapter():
    arm = tiny.lm(0).clone(lora=2)
    with torch.no_grad():
        for name, p in arm.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    base = arm.as_reference()
    apart = GenARM(arms=arm).generate(tiny.lm(0), PROMPTS, sampling=LONG)
    assert ids_of(GenARM(arms=arm).generate(base, PROMPTS, sampling=LONG)) == ids_of(apart)
    assert ids_of(GenARM(arms=arm, alpha=(0.0,)).generate(base, PROMPTS, sampling=LONG)) != ids_of(apart)


def test_from_a_folder(tmp_path):
    ARM.save(tmp_path / "arm")
    named = GenARM(reward_models=f"{tmp_path / 'arm'}").generate(BASE, PROMPTS, sampling=LONG)
    assert ids_of(named) == ids_of(GenARM(arms=ARM).generate(BASE, PROMPTS, sampling=LONG))


def test_an_adapter_from_a_folder_is_added_into_the_weights(tmp_path):
    tiny.lm(0).save(tmp_path / "base")
    arm = load(tmp_path / "base", dtype="float64", device="cpu", lora=2)
    with torch.no_grad():
        for name, p in arm.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    arm.save(tmp_path / "arm")
    (guide,) = GenARM(reward_models=f"{tmp_path / 'arm'}").guides(tiny.lm(0))
    assert isinstance(guide, LMGuide) and not hasattr(guide.lm.model, "disable_adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found, wanted = (lm.causal(ids).logits.double() for lm in (guide.lm, arm))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (found - tiny.lm(0).causal(ids).logits).abs().max() > 0.01


def swapped():
    """A tokenizer of the same size in which two tokens have changed places."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    definition = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    vocab = definition["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), bos_token="<|start|>", eos_token="<|end|>"
    )
    fast.chat_template = tiny.CHAT
    return fast


def test_tokenizers_are_compared_by_their_maps():
    assert len(swapped()) == len(tiny.tokenizer())
    with pytest.raises(ValueError, match=r"different tokenizers: id .* is '[ab]' in one, '[ab]' in the other"):
        GenARM(arms=LM(tiny.llama(), swapped())).generate(BASE, PROMPTS)
    more = LM(tiny.llama(vocab=400), _with_a_token_more(), name="more")  # a pad token more is no other tokenizer
    assert GenARM(arms=more).generate(BASE, PROMPTS[:1], sampling=LONG)[0][0].trace.completion_ids


def _with_a_token_more():
    import copy

    fast = copy.deepcopy(tiny.tokenizer())
    fast.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    assert len(fast) == len(tiny.tokenizer()) + 1
    return fast


def test_a_reward_that_ends_elsewhere_is_told():
    fast = _with_a_token_more()
    fast.eos_token, fast.chat_template = "<|more|>", None
    with pytest.warns(UserWarning, match="does not end responses with the base's terminator"):
        GenARM(arms=LM(tiny.llama(vocab=330), fast, name="other end")).guides(BASE)


def test_bad_input():
    short = LM(GPT2LMHeadModel(_config(positions=16)).double().eval(), tiny.tokenizer(), name="short")
    ids = tuple(BASE.encode_prompt("the plot"))
    cases = (
        (dict(), PROMPTS, "needs a reward model"),
        (dict(arms=[]), PROMPTS, "needs a reward model"),
        (dict(arms=[ARM, OTHER], alpha=(1.0, 1.0, 1.0)), PROMPTS, r"alpha of shape \(3,\) for 2 prompts and 2"),
        (dict(arms=[ARM], per_prompt=(1.0,)), PROMPTS, r"shape \(1,\) for 2 prompts"),
        (dict(arms=[ARM], per_prompt=(1.0, math.nan)), PROMPTS, "finite"),
        (dict(arms=[ARM, OTHER], templates=("{prompt}",) * 3), PROMPTS, "3 templates for 2"),
        (dict(arms=[ARM], templates=("no place",)), PROMPTS, "does not say where the prompt goes"),
        (dict(arms=[ARM], templates=("{prompt}",)), [ids], "a template takes one text"),
        (dict(arms=LMGuide(lm=ARM), templates=("{prompt}",)), PROMPTS, "templates to language models only"),
        (dict(arms=short), PROMPTS, "positions of short"),
        (dict(arms=LM(tiny.llama(vocab=300), tiny.tokenizer(), name="small")), PROMPTS, "id 316, and small only 300"),
    )
    for options, prompts, what in cases:
        with pytest.raises(ValueError, match=what):
            GenARM(**options).generate(BASE, prompts, sampling=LONG)
    for options, what in (
        ({"batch": 0}, "batch=0"),
        ({"alpha": (math.inf,)}, "finite"),
        ({"alpha": 0.5}, "in a tuple"),
    ):
        with pytest.raises(ValueError, match=what):
            GenARM(arms=ARM, **options)
    assert GenARM(arms=short, alpha=(0.0,)).generate(BASE, PROMPTS, sampling=LONG)  # not read, so no limit


def test_any_guide_and_a_narrow_batch():
    guide = LMGuide(lm=ARM, temperature=2.0)
    ((one,),) = GenARM(arms=guide).generate(BASE, PROMPTS[:1], sampling=LONG)
    first = log_softmax(logits(BASE, one.trace.prompt_ids)) + log_softmax(logits(ARM, one.trace.prompt_ids) / 2)
    first[STOPS] = -np.inf
    assert one.trace.sampled_logps[0] == pytest.approx(log_softmax(first)[one.trace.completion_ids[0]], abs=1e-6)
    wide, narrow = (GenARM(arms=ARM, batch=b).generate(BASE, PROMPTS, n=3, sampling=LONG) for b in (64, 1))
    assert ids_of(wide) == ids_of(narrow)
