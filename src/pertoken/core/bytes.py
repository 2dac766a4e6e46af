"""Token ids to bytes, for any tokenizer: the common ground on which two tokenizations of one text meet.

Three families are told apart by what their vocabulary says, not by class names:

* ``byte_level`` (GPT-2, Llama 3, SmolLM2, Qwen): every byte of the text has a printable stand-in character (ByT5: it is
  its own);
* ``byte_fallback`` (SentencePiece: Llama 2, Gemma, T5): ``▁`` is a space, ``<0x41>`` is a raw byte;
* ``wordpiece`` (BERT): ``##`` glues to the left, and the vocabulary has lost case and white space. A vocabulary of
  whole words (WordLevel) is one without ``##``.

The first two give exact bytes from ids alone. WordPiece, and any tokenizer that normalises its input, gives them only
together with the text (`ByteView.pieces_of_text`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

_RAW_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_META = "▁"


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's stand-ins: printable bytes stand for themselves, the others are moved up to 256 and beyond."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class ByteView:
    """What each id of a tokenizer says in bytes. Build it with `byte_view(tokenizer)`, which keeps one a tokenizer.

    Attributes:
        fingerprint: 16 hex digits of the tokenizer's own definition (vocabulary, merges, normalisers, added tokens);
            two tokenizers with one fingerprint give the same ids for every text.
        family: ``byte_level``, ``byte_fallback`` or ``wordpiece``.
        special_ids: ids that stand for no text (their piece is ``b""``), the unknown token too.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special
        }
        vocab: dict[str, int] = tokenizer.get_vocab()
        self.fingerprint = _fingerprint(tokenizer, vocab)
        backend = _backend_definition(tokenizer)
        self._prefix_space = _prepends_space(backend)
        kinds = {p.get("type") for name in ("normalizer", "pre_tokenizer", "decoder") for p in _parts(backend, name)}
        self._raw = {"\x00", "\xff"} <= vocab.keys()
        if "ByteLevel" in kinds or self._raw:
            self.family = "byte_level"
        elif (backend.get("model") or {}).get("type") == "WordPiece" or "WordPiece" in kinds:
            self.family = "wordpiece"
        elif any(t.startswith(_META) for t in vocab) or "<0x0A>" in vocab:
            self.family = "byte_fallback"
        elif {_strip_byte_level(t) for t in list(vocab)[:4096]} != {None} and "Ġ" in "".join(list(vocab)[:4096]):
            self.family = "byte_level"  # a slow tokenizer without a backend definition
        else:
            words = any(t.startswith("##") for t in vocab) or (backend.get("model") or {}).get("type") == "WordLevel"
            self.family = "wordpiece" if words else "byte_fallback"
        self.size = len(tokenizer)
        self._token_of = {i: t for t, i in vocab.items()}
        self._added = frozenset(getattr(tokenizer, "added_tokens_decoder", {}))
        self._cache: dict[int, bytes] = {}

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text or a turn, as the tokenizer says now."""
        return self.tokenizer.eos_token_id

    def piece(self, token_id: int) -> bytes:
        """Bytes of one id as it stands inside a text; ``b""`` for specials and for holes in the vocabulary."""
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._compute_piece(int(token_id))
        return found

    def pieces(self, ids: Sequence[int], *, at_start: bool = False) -> tuple[bytes, ...]:
        """Bytes of each id, from the ids alone.

        Args:
            ids: token ids, length T.
            at_start: the ids begin a text, so the space that the tokenizer put before its first word is taken off.

        Returns:
            T byte strings whose concatenation is the text (for WordPiece: its normalised rendering).
        """
        out = [self.piece(int(i)) for i in ids]
        if at_start and (self._prefix_space or self.family == "wordpiece"):
            for k, piece in enumerate(out):
                if piece:
                    out[k] = piece[1:] if piece.startswith(b" ") else piece
                    break
        return tuple(out)

    def pieces_of_text(self, text: str, *, special: bool = False) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Tokenize `text` once; return its ids and the bytes of `text` that each id covers.

        The pieces always concatenate to ``text.encode()``: where a tokenizer drops or rewrites characters (white space,
        case, accents) the pieces are cut from the text by the tokenizer's offsets, and what lies between two tokens
        goes to the later one (what trails, to the last). The one exception is a text without a single token (white
        space, to WordPiece): no pieces at all.

        Raises:
            ValueError: the tokenizer neither gives exact bytes from ids nor offsets (a slow tokenizer that normalises).
        """
        data = text.encode("utf-8")
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=special))
        for at_start in (True, False):  # a text that begins with a space of its own may not have been given another
            pieces = self.pieces(ids, at_start=at_start)
            if b"".join(pieces) == data:
                return ids, pieces
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                "this tokenizer rewrites its text and is a slow one, so its tokens cannot be traced back to bytes; "
                "load its fast version (use_fast=True)"
            )
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        byte_at = [0]
        for char in text:
            byte_at.append(byte_at[-1] + len(char.encode("utf-8")))
        cuts = [byte_at[end] for _, end in encoded["offset_mapping"]]
        out, start = [], 0
        for token_id, cut in zip(encoded["input_ids"], cuts, strict=True):
            cut = start if token_id in self.special_ids and token_id != self.tokenizer.unk_token_id else max(cut, start)
            out.append(data[start:cut])
            start = cut
        if out and start < len(data):
            last = next((k for k in reversed(range(len(out))) if out[k]), len(out) - 1)
            out[last] += data[start:]
        return tuple(encoded["input_ids"]), tuple(out)

    def _compute_piece(self, token_id: int) -> bytes:
        token = self._token_of.get(token_id)
        if token is None or token_id in self.special_ids:
            return b""
        if token_id in self._added and self.family != "byte_fallback":  # there ▁ is a space in added tokens, too
            return token.encode("utf-8")
        if self.family == "byte_level":
            exact = token.encode("latin-1") if self._raw else _strip_byte_level(token)
            return token.encode("utf-8") if exact is None else exact
        if self.family == "wordpiece":
            return token[2:].encode("utf-8") if token.startswith("##") else b" " + token.encode("utf-8")
        raw = _RAW_BYTE.match(token)
        return bytes([int(raw.group(1), 16)]) if raw else token.replace(_META, " ").encode("utf-8")


_views: WeakKeyDictionary[Any, ByteView] = WeakKeyDictionary()


def byte_view(tokenizer: Any) -> ByteView:
    """The `ByteView` of a tokenizer, made once, and again when tokens were added to it."""
    view = _views.get(tokenizer)
    if view is None or view.size != len(tokenizer):
        view = _views[tokenizer] = ByteView(tokenizer)
    return view


def _strip_byte_level(token: str) -> bytes | None:
    table = _byte_of_char()
    try:
        return bytes(table[c] for c in token)
    except KeyError:
        return None


def _backend_definition(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {}


def _parts(definition: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A component of a tokenizers definition as a flat list (a `Sequence` holds several)."""
    part = definition.get(name) or {}
    inner = part.get("pretokenizers") or part.get("decoders") or part.get("normalizers")
    return list(inner) if inner else [part] if part else []


def _prepends_space(definition: dict[str, Any]) -> bool:
    for part in _parts(definition, "pre_tokenizer") + _parts(definition, "normalizer"):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            return True
        if part.get("type") == "Prepend":
            return True
    return False


def _fingerprint(tokenizer: Any, vocab: dict[str, int]) -> str:
    definition = _backend_definition(tokenizer)
    for name in ("truncation", "padding"):  # settings of a call, not of the vocabulary
        definition.pop(name, None)
    text = json.dumps(definition or sorted(vocab.items()), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
