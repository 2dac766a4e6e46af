"""Constraints on bytes, read incrementally: may this text go on, may it end here?

A constraint is a language of byte strings. Its states are immutable, so that particles share them: `allows(piece)` asks
whether what was read, and `piece`, begin something of the language, `complete()` whether what was read is something of
it, `after(piece)` is the state behind. Pieces are the bytes of tokens, which may end inside a UTF-8 character.

    regex:[a-z]+@[a-z]+     a regular expression of the whole text (Rust's syntax: no look-around, no back-references)
    json:schema.json        JSON of a schema (a file, or the schema itself; keywords that cannot be kept are refused)
    lark:grammar.lark       a context-free grammar in llguidance's dialect of Lark: terminals are matched greedily
    Predicate(prefix, ...)  any two Python functions of bytes

The first three are llguidance's parser over an alphabet of single bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


class State(Protocol):
    """What a constraint has read. Immutable. It may also have ``reads(piece) -> int``, how many bytes of a piece can
    follow: then what one call refuses is known of every token that begins like it."""

    def allows(self, piece: bytes) -> bool:
        """Whether what was read, followed by `piece`, is a prefix of something in the language."""
        ...

    def complete(self) -> bool:
        """Whether what was read is in the language."""
        ...

    def after(self, piece: bytes) -> State:
        """The state behind `piece`, which must be allowed."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """A language of byte strings."""

    @property
    def name(self) -> str:
        """What to call it in reports."""
        ...

    def start(self) -> State:
        """The state before anything is read.

        Raises:
            ValueError: the language is empty, where that can be told.
        """
        ...


def constraint_of(given: Any, *, debug: bool = False) -> Constraint:
    """A constraint from text (``regex:``, ``json:``, ``lark:``), from an object with the functions ``prefix`` and
    ``complete`` of bytes, or as it is.

    Args:
        debug: have predicates checked for monotonicity.

    Raises:
        ValueError: text of another form, a file that is not there, nothing given.
    """
    if isinstance(given, str):
        kind, colon, rest = given.partition(":")
        if not colon or kind not in ("regex", "json", "lark"):
            raise ValueError(f"constraint={given!r}: write regex:PATTERN, json:SCHEMA.json or lark:GRAMMAR.lark")
        if kind == "regex":
            return Grammar.regex(rest)
        if kind == "json":
            return Grammar.json_schema(rest if rest.lstrip().startswith(("{", "true", "false")) else _read(rest))
        return Grammar.lark(_read(rest))
    if isinstance(given, Predicate) and debug and not given.debug:
        return replace(given, debug=True)
    if isinstance(given, Constraint):
        return given
    if callable(getattr(given, "prefix", None)) and callable(getattr(given, "complete", None)):
        return Predicate(prefix=given.prefix, complete=given.complete, debug=debug)
    raise ValueError(
        "no constraint: give regex:PATTERN, json:SCHEMA.json, lark:GRAMMAR.lark, or an object with the functions "
        "prefix(bytes) -> bool and complete(bytes) -> bool"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf8")
    except OSError as error:
        raise ValueError(f"the constraint's file cannot be read ({error}); give its path") from error


def _matcher() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ImportError("these constraints need llguidance: pip install 'pertoken[grammars]'") from error
    return LLMatcher


@lru_cache(maxsize=1)
def _alphabet() -> Any:
    """llguidance's tokenizer whose tokens are the 256 bytes."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
        tokens = (*(bytes([b]) for b in range(256)), b"<|eos|>")

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    return LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=257, eos_token=256, slices=[])


@dataclass(frozen=True, eq=False)
class Grammar:
    """A regular expression, a JSON schema or a Lark grammar, by llguidance. Whether a regular expression can still be
    matched is decided exactly; a rule that never ends (a: "x" a) is noticed only in that no particle does.

    Raises:
        ValueError: it does not compile; it asks for what cannot be kept; nothing matches it.
    """

    definition: str
    """In llguidance's own form."""
    name: str

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Of the texts that a pattern matches as a whole."""
        return cls(_matcher().grammar_from_regex(pattern), f"regex:{pattern}")

    @classmethod
    def json_schema(cls, schema: str | dict[str, Any]) -> Grammar:
        """Of the JSON documents of a schema."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return cls(_matcher().grammar_from_json_schema(text), f"json:{text}")

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """Of the texts of a Lark grammar."""
        return cls(_matcher().grammar_from_lark(grammar), f"lark:{grammar}")

    def start(self) -> State:
        """The parser before the first byte."""
        matcher = _matcher()(_alphabet(), self.definition, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the constraint {self.name} does not compile: {matcher.get_error()}")
        state = _Parser(matcher)
        if not state.complete() and not any(state.allows(bytes([b])) for b in range(256)):
            raise ValueError(f"nothing matches the constraint {self.name}; its language is empty")
        return state


class _Parser:
    """A state of llguidance's parser. `matcher` is never moved on once it is in a state."""

    __slots__ = ("matcher",)

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def allows(self, piece: bytes) -> bool:
        return self.reads(piece) == len(piece)

    def reads(self, piece: bytes) -> int:
        return self.matcher.validate_tokens(piece)

    def complete(self) -> bool:
        return self.matcher.is_accepting()

    def after(self, piece: bytes) -> _Parser:
        grown = self.matcher.deep_copy()
        if not grown.consume_tokens(piece):
            raise ValueError(f"the parser of the constraint cannot read {piece!r}: {grown.get_error()}")
        return _Parser(grown)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicate:
    """Any check of bytes: a parser, a lookup, a simulator. ``prefix`` must be monotone: no extension of what it rejects
    may be accepted, or the target changes silently.

    Raises:
        ValueError: from its states: a value that is no Boolean, an exception of a function (with the text that it was
            asked about), with `debug` a function that is not monotone.
    """

    prefix: Callable[[bytes], bool]
    """Whether a text may go on."""
    complete: Callable[[bytes], bool]
    """Whether a text may end."""
    debug: bool = False
    """Ask for every byte of what is accepted whether what came before was accepted, too (slow)."""

    @property
    def name(self) -> str:
        """Of the function."""
        return f"predicate:{getattr(self.prefix, '__qualname__', type(self.prefix).__name__)}"

    def start(self) -> State:
        """Nothing read."""
        if not self.ask("prefix", b""):
            raise ValueError(f"{self.name} rejects the empty text, so it accepts nothing; let prefix(b'') be True")
        return _Read(self, b"")

    def ask(self, what: str, text: bytes) -> bool:
        """The value of a function at a text."""
        try:
            value = getattr(self, what)(text)
        except Exception as error:
            raise ValueError(f"{what} of the constraint raised {type(error).__name__} at {text!r}: {error}") from error
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{what} of the constraint gave {value!r} at {text!r}; return True or False")
        return bool(value)


@dataclass(frozen=True)
class _Read:
    owner: Predicate
    text: bytes

    def allows(self, piece: bytes) -> bool:
        text, ask = self.text + piece, self.owner.ask
        if not ask("prefix", text):
            return False
        if self.owner.debug:
            for end in range(len(self.text), len(text)):
                if not ask("prefix", text[:end]):
                    raise ValueError(f"prefix is not monotone: it accepts {text!r} but rejects {text[:end]!r}")
        return True

    def complete(self) -> bool:
        value = self.owner.ask("complete", self.text)
        if value and self.owner.debug and not self.owner.ask("prefix", self.text):
            raise ValueError(f"complete accepts {self.text!r}, which prefix rejects; prefix must accept it, too")
        return value

    def after(self, piece: bytes) -> _Read:
        return _Read(self.owner, self.text + piece)
