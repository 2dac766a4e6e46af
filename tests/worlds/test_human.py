"""The small language model of human conversations: its template round-trips, its training is cached by content."""

from pertoken.core.data import encode, load_examples
from pertoken.core.lm import load
from pertoken.worlds.human import tokenizer_of, train_lm

ROWS = [
    {
        "prompt": f"Human: What is {i} plus {i}?\n\nAssistant: Why?\n\nHuman: I ask.\n\nAssistant:",
        "chosen": f"It is {2 * i}, and I am glad to help.",
        "rejected": "Go away." + "!" * i,
    }
    for i in range(12)
]


def test_trained_on_every_response_and_cached(tmp_path):
    examples = load_examples(ROWS, kind="pair")[0]
    folder = train_lm(examples, epochs=1, folder=tmp_path, progress=False)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_lm(examples, epochs=1, folder=tmp_path, progress=False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    others = {train_lm(examples[:9], epochs=1, folder=tmp_path, progress=False), folder}
    others.add(train_lm(examples, epochs=1, seed=1, folder=tmp_path, progress=False))
    assert len(others) == 3
    lm = load(folder, device="cpu")
    (group, *_), report = encode(examples, lm)
    assert report.kept == 12
    words = "<bos>user: What is 0 plus 0?<eos>assistant: Why?<eos>user: I ask.<eos>assistant: "
    assert lm.tokenizer.decode(group.prompt_ids) == words
    assert lm.tokenizer.decode(group.traces[0].completion_ids) == "It is 0, and I am glad to help.<eos>"
    assert group.traces[0].completion_ids[-1] == lm.terminator == 2


def test_special_tokens_have_the_ids_that_training_expects():
    tokenizer = tokenizer_of(["some words, and more words"], vocabulary=300)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode("naïve 😀", add_special_tokens=False)) == "naïve 😀"
