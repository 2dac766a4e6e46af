"""Ids to bytes: pieces concatenate to the text, for every family of tokenizer and every kind of character."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from pertoken.core.bytes import ByteView, byte_view
from tests import tiny

TOKENIZERS = {
    "byte_level": tiny.tokenizer,
    "sentencepiece_bpe": tiny.sentencepiece,
    "unigram": lambda: tiny.sentencepiece("unigram"),
    "unigram_first": lambda: tiny.sentencepiece("unigram", "first"),
    "unigram_never": lambda: tiny.sentencepiece("unigram", "never"),
    "wordpiece": tiny.wordpiece,
}
EXACT = [name for name in TOKENIZERS if name != "wordpiece"]
TEXTS = [
    "The plot was great, the acting was not.",
    "café naïve Zürich",
    "e\u0301 combining, ﬁ ligature, İstanbul",
    "👩‍👩‍👧 and 😀😀",
    "日本語 中文",
    "مرحبا بالعالم",
    "a\nb\n\n c\r\n\td",
    "a  b   c",
    "  lead",
    " one",
    "trail  ",
    "zqj XYZ 12345 ~^",
    "a literal \ufffd replacement character",
    "a literal ▁ mark, Ġ and ##s",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_concatenate_to_the_text(name, text):
    tokenizer = TOKENIZERS[name]()
    ids, pieces = byte_view(tokenizer).pieces_of_text(text)
    assert b"".join(pieces) == text.encode()
    assert list(ids) == tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_texts(name):
    rng = np.random.default_rng(0)
    view = byte_view(TOKENIZERS[name]())
    for _ in range(150):
        text = tiny.random_text(rng)
        ids, pieces = view.pieces_of_text(text)
        assert b"".join(pieces) == text.encode(), text
        if name in EXACT:  # ids alone say the same
            assert b"".join(view.pieces(ids, at_start=True)) == text.encode()


@pytest.mark.parametrize("name", EXACT)
def test_exact_families_cut_where_the_ids_cut(name):
    """An emoji that is split over several ids is split in the pieces too, byte by byte."""
    ids, pieces = byte_view(TOKENIZERS[name]()).pieces_of_text("a 👍")
    assert len(pieces[-1]) < 4 and b"".join(pieces) == "a 👍".encode()
    assert [p for p in pieces if p][-2:] == ["👍".encode()[-2:-1], "👍".encode()[-1:]]


@pytest.mark.parametrize("name", EXACT)
def test_pieces_of_one_id_stand_inside_a_text(name):
    """Without `at_start` nothing is stripped: completion ids are read as they follow the prompt."""
    view = byte_view(TOKENIZERS[name]())
    ids, _ = view.pieces_of_text("so good was the plot")
    inside = view.pieces(ids)
    prefixed = name not in ("byte_level", "unigram_never")
    assert b"".join(inside) == (b" " if prefixed else b"") + b"so good was the plot"
    assert view.pieces(list(np.array(ids))) == inside


def test_families():
    found = {name: byte_view(make()).family for name, make in TOKENIZERS.items()}
    assert found == {"byte_level": "byte_level", "wordpiece": "wordpiece"} | {
        name: "byte_fallback" for name in TOKENIZERS if "gram" in name or "sentence" in name
    }
    assert byte_view(_bare(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))).family == "wordpiece"


def test_byte_level_as_a_normalizer():
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = _bare(models.BPE(alphabet, []), normalizer=normalizers.ByteLevel())
    ids, pieces = byte_view(tokenizer).pieces_of_text("é 😀")
    assert byte_view(tokenizer).family == "byte_level"
    assert [len(p) for p in pieces] == [1] * len("é 😀".encode()) and len(ids) == len(pieces)


def test_byte_level_with_prefix_space_and_a_space_of_the_text():
    """GPT-2's `add_prefix_space`: a text that starts with a space keeps it, one that does not loses the added one."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = _bare(models.BPE(alphabet, []), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    view = byte_view(tokenizer)
    for text in ("one 😀", " one 😀", "  one"):
        _, pieces = view.pieces_of_text(text)
        assert b"".join(pieces) == text.encode()
        assert max(map(len, pieces)) == 1  # from the ids, not from offsets, which do not cut inside a character


def test_wordpiece_gets_case_accents_and_white_space_from_the_text():
    view = byte_view(tiny.wordpiece())
    text = "The  PLOT was\nnaïve"
    ids, pieces = view.pieces_of_text(text)
    words = tiny.wordpiece().convert_ids_to_tokens(list(ids))
    assert words[0] == "the" and pieces[0] == b"The"
    assert b"".join(pieces) == text.encode()
    assert view.pieces(ids, at_start=True)[0] == b"the"  # ids alone: the normalised rendering
    assert b"".join(view.pieces(ids, at_start=True)) == b"the plot was naive"
    ids, pieces = view.pieces_of_text("  lead and trail  ")
    assert pieces[0].startswith(b"  ") and pieces[-1].endswith(b"  ")


def test_wordpiece_has_no_token_for_white_space():
    assert byte_view(tiny.wordpiece()).pieces_of_text(" \n ") == ((), ())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_empty_text(name):
    assert byte_view(TOKENIZERS[name]()).pieces_of_text("") == ((), ())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_specials_and_holes_say_nothing(name):
    tokenizer = TOKENIZERS[name]()
    view = byte_view(tokenizer)
    hole = max(tokenizer.get_vocab().values()) + 7
    assert view.special_ids == frozenset(tokenizer.all_special_ids)
    assert set(view.pieces([*tokenizer.all_special_ids, hole, -1])) == {b""}
    assert view.eos_id == tokenizer.eos_token_id


def test_specials_that_a_template_adds():
    view = byte_view(tiny.tokenizer())
    ids = tiny.tokenizer().encode("<|start|>user\nhi<|end|>")
    assert b"".join(view.pieces(ids, at_start=True)) == b"user\nhi"


@pytest.mark.parametrize("name, literal", [("byte_level", "<|end|>"), ("unigram", "</s>"), ("wordpiece", "[SEP]")])
def test_a_special_token_written_out_in_the_text(name, literal):
    """Its bytes are in the text, so they are in the pieces: with the next token, with the last, or alone."""
    view = byte_view(TOKENIZERS[name]())
    special = TOKENIZERS[name]().get_vocab()[literal]
    for text in (f"one {literal} two", f"one {literal}", literal, literal * 2):
        ids, pieces = view.pieces_of_text(text)
        assert special in ids and b"".join(pieces) == text.encode()
    ids, pieces = view.pieces_of_text(f"one {literal} two")
    assert pieces[ids.index(special)] == b""


def test_unknown_tokens_cover_their_text():
    view = byte_view(tiny.wordpiece())
    text = "the 日 plot 😀😀"
    ids, pieces = view.pieces_of_text(text)
    unknown = [p for i, p in zip(ids, pieces, strict=True) if i == tiny.wordpiece().unk_token_id]
    assert unknown == [" 日".encode(), " 😀😀".encode()]
    assert view.piece(tiny.wordpiece().get_vocab()["[UNK]"]) == b""


def test_added_tokens():
    """An added token that is no control token is text; in the SentencePiece family its ▁ is a space, as in Gemma."""
    for make, content, text in (("byte_level", "<té>", "<té>"), ("sentencepiece_bpe", "▁▁▁▁", "    ")):
        tokenizer = _copy(TOKENIZERS[make]())
        before = byte_view(tokenizer)
        tokenizer.backend_tokenizer.add_tokens([AddedToken(content, normalized=False)])
        tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<ctl>")])
        view = byte_view(tokenizer)
        assert view is not before and view.fingerprint != before.fingerprint
        assert view.piece(tokenizer.get_vocab()[content]) == text.encode()
        assert view.piece(tokenizer.get_vocab()["<ctl>"]) == b""
    ids, pieces = byte_view(_with_added("<té>")).pieces_of_text("a <té> b")
    assert "<té>".encode() in pieces and b"".join(pieces) == "a <té> b".encode()


def test_special_ids_are_kept_when_asked_for():
    tokenizer = _copy(tiny.tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 0), ("<|end|>", 1)]
    )
    ids, pieces = ByteView(tokenizer).pieces_of_text("naïve", special=True)
    assert (ids[0], ids[-1]) == (0, 1) and (pieces[0], pieces[-1]) == (b"", b"")
    assert b"".join(pieces) == "naïve".encode()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fingerprint_survives_saving(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert byte_view(again).fingerprint == byte_view(tokenizer).fingerprint
    assert byte_view(again) is not byte_view(tokenizer) and byte_view(again) is byte_view(again)
    again(["a", "b c d"], padding=bool(again.pad_token), truncation=True, max_length=2)  # settings of a call
    assert ByteView(again).fingerprint == byte_view(tokenizer).fingerprint


def test_fingerprints_differ():
    prints = [byte_view(make()).fingerprint for make in TOKENIZERS.values()]
    prints += [byte_view(tiny.tokenizer(vocab=300)).fingerprint, byte_view(_with_added("<x>")).fingerprint]
    assert len(set(prints)) == len(prints) and all(len(p) == 16 for p in prints)
    assert byte_view(tiny.tokenizer(chat=False, vocab=300)) is not byte_view(tiny.tokenizer(vocab=300))


def test_a_slow_tokenizer_that_rewrites_its_text_is_refused():
    view = byte_view(_Words(unk_token="?", eos_token="."))
    assert view.pieces(view.tokenizer.encode("THE plot", add_special_tokens=False)) == (b" the", b" plot")
    with pytest.raises(ValueError, match="use_fast=True"):
        view.pieces_of_text("THE plot")


def test_byt5():
    """A slow tokenizer whose tokens are the bytes themselves."""
    view = byte_view(ByT5Tokenizer())
    ids, pieces = view.pieces_of_text("café 😀")
    assert pieces == tuple(bytes([b]) for b in "café 😀".encode()) and len(ids) == len(pieces)


class _Words(PreTrainedTokenizer):
    """A slow tokenizer: lower-case words."""

    words = ("?", ".", "##s", "the", "plot")

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def _tokenize(self, text, **kwargs):
        return text.lower().split()

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index):
        return self.words[index]


def _bare(model, *, normalizer=None, pre_tokenizer=None) -> PreTrainedTokenizerFast:
    core = Tokenizer(model)
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
        core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def _copy(tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token
    )


def _with_added(content: str) -> PreTrainedTokenizerFast:
    tokenizer = _copy(tiny.tokenizer())
    tokenizer.backend_tokenizer.add_tokens([AddedToken(content, normalized=False)])
    return tokenizer
