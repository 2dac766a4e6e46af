"""Options as JSON: what an encoder is, whichever object holds it."""

import json

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
