"""Options as JSON: what an encoder is, whichever object holds it; what has an identity is described by it."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import json
from dataclasses import dataclass

from pertoken.core.cache import ArrayCache
from pertoken.core.describe import describe
from pertoken.core.embed import TextEncoder
from tests import tiny


def test_an_encoder_is_its_weights_and_windows(tmp_path):
    from transformers import BertConfig, BertModel

    tokenizer = tiny.wordpiece()
    tokenizer.save_pretrained(tmp_path)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size)).save_pretrained(tmp_path)
    make = lambda **options: TextEncoder(tmp_path, cache=ArrayCache(tmp_path / "cache"), device="cpu", **options)
    one = describe(make())
    assert one == describe(make()) and one != describe(make(long="truncate"))
    json.dumps(one)
    encoder = make(max_tokens=4)
    texts = ["the plot", "the plot was great", "", "the film was great the film"]
    sizes = [len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    for _ in range(2):  # whether their vectors are known or not
        assert encoder.too_long(texts) == sum(n > 4 for n in sizes) > 0
        encoder(texts)
    assert encoder.too_long([]) == 0


@dataclass(frozen=True)
class Large:
    """Data that would fill a record."""

    values: tuple[int, ...]

    def identity(self):
        return {"sum": sum(self.values)}


def test_what_has_an_identity_is_described_by_it():
    assert describe(Large((1, 2, 3))) == {"sum": 6} == describe({"data": Large((6,))})["data"]
    assert describe(Large) == "Large"  # the class itself has none
    lm = tiny.lm(0)
    assert describe(lm) == lm.identity() and describe(lm)["name"] == "tiny-0"
