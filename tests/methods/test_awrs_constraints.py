# pyright: reportArgumentType=false
"""Constraints of bytes against brute force: every string over a small alphabet, whole and in pieces."""

import itertools
import json
import re

import numpy as np
import pytest

from pertoken.generate._constraints import Constraint, Grammar, Predicate, constraint_of


def strings(alphabet, longest):
    return [bytes(s) for n in range(longest + 1) for s in itertools.product(alphabet, repeat=n)]


def walk(constraint, text):
    """(viable, complete) of a text, read a byte at a time."""
    state = constraint.start()
    for byte in text:
        if not state.allows(bytes([byte])):
            return False, False
        state = state.after(bytes([byte]))
    return True, state.complete()


@pytest.mark.parametrize("pattern", ["(ab|b)+a?", "a{2,3}b*", "(a|ab)(b|ba)", "a?b?", "[^a]{1,3}a", "(aa)*b|a"])
def test_a_regex_says_of_every_string_what_brute_force_says(pattern):
    """A string is viable if an extension of it (by up to four letters, enough for these) matches as a whole."""
    grammar, whole = Grammar.regex(pattern), re.compile(pattern.encode())
    matching = {s for s in strings(b"ab", 9) if whole.fullmatch(s)}
    prefixes = {s[:n] for s in matching for n in range(len(s) + 1)}
    start = grammar.start()
    for text in strings(b"ab", 5):
        assert walk(grammar, text) == (text in prefixes, text in matching), text
        assert start.allows(text) == (text in prefixes)
        for cut in range(len(text)):
            if start.allows(text[:cut]):
                assert start.after(text[:cut]).allows(text[cut:]) == (text in prefixes)


def test_characters_may_be_cut_anywhere():
    start = Grammar.regex("(é|ü)+").start()
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert start.allows(first) and not start.allows(second) and not start.complete()
    half = start.after(first)
    assert half.allows(second + first) and not half.allows(first) and not half.complete()
    assert half.after(second).complete() and half.allows("ü".encode()[1:])
    assert not start.complete() and start.allows("é".encode())  # a state is what it was


def test_a_schema_is_kept_to_the_letter():
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 12}, "of": {"$ref": "#"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    grammar = Grammar.json_schema(schema)
    for n in range(-2, 30):
        assert walk(grammar, json.dumps({"n": n}).encode()) == ((True, True) if 3 <= n <= 12 else (False, False))
    assert walk(grammar, b'{"n": 5, "of": {"n": 7, "of": {"n": 3}}}') == (True, True)
    assert walk(grammar, b'{"n": 5, "of": {') == (True, False)
    assert walk(grammar, b'{"of"')[0] is False and walk(grammar, b'{"n": 5}x')[0] is False


def expressions(longest):
    """Texts of at most so many letters of: expr = term | expr + term, term = 1+ | ( expr ), grown from shorter ones."""
    terms = {b"1" * n for n in range(1, longest + 1)}
    found = set(terms)
    while True:
        terms |= {b"(" + e + b")" for e in found if len(e) + 2 <= longest}
        more = found | terms | {e + b"+" + t for e in found for t in terms if len(e + t) < longest}
        if more == found:
            return found
        found = more


def test_a_grammar_counts_parentheses():
    grammar = Grammar.lark('start: expr\nexpr: expr "+" term | term\nterm: INT | "(" expr ")"\nINT: /1+/')
    wanted = expressions(6)
    prefixes = {s[:n] for s in wanted for n in range(len(s) + 1)}
    for text in strings(b"1+()", 4):
        viable, complete = walk(grammar, text)
        assert complete == (text in wanted), text
        assert viable == (text in prefixes) or len(text) > 2, text  # what is longer may end beyond six letters


def test_text_names_a_back_end(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "boolean"}')
    (tmp_path / "g.lark").write_text('start: "a" | "b"')
    for text, yes, no in (
        ("regex:a:b", b"a:b", b"ab"),
        (f"json:{tmp_path / 's.json'}", b"true", b"truth"),
        ('json:{"type": "boolean"}', b"false", b"null"),
        (f"lark:{tmp_path / 'g.lark'}", b"b", b"c"),
    ):
        found = constraint_of(text)
        assert isinstance(found, Constraint) and walk(found, yes) == (True, True) and walk(found, no) == (False, False)
        assert constraint_of(found) is found


def starts(text):
    return b"aab".startswith(text)


def test_a_predicate_is_asked_about_whole_texts():
    asked = []
    predicate = Predicate(prefix=lambda b: asked.append(b) or starts(b), complete=lambda b: b == b"aab")
    state = predicate.start().after(b"a")
    assert state.allows(b"ab") and not state.allows(b"b") and asked == [b"", b"aab", b"ab"]
    assert state.after(b"ab").complete() and not state.complete()


def test_objects_with_the_two_functions_are_predicates():
    class Check:
        prefix = staticmethod(starts)

        @staticmethod
        def complete(text):
            return np.bool_(text == b"aab")

    assert walk(constraint_of(Check()), b"aab") == (True, True)


def test_what_is_wrong_with_a_predicate_is_said():
    def raises(text):
        if text == b"ab":
            raise KeyError("x")
        return True

    state = Predicate(prefix=raises, complete=lambda b: 1).start()
    with pytest.raises(ValueError, match=r"prefix of the constraint raised KeyError at b'ab'"):
        state.allows(b"ab")
    with pytest.raises(ValueError, match=r"complete of the constraint gave 1 at b''; return True or False"):
        state.complete()
    with pytest.raises(ValueError, match="accepts nothing"):
        Predicate(prefix=lambda b: False, complete=lambda b: False).start()


def test_debug_finds_a_predicate_that_takes_back_a_rejection():
    odd = Predicate(prefix=lambda b: len(b) % 2 == 0, complete=lambda b: True, debug=True)
    with pytest.raises(ValueError, match="accepts b'ab' but rejects b'a'"):
        odd.start().allows(b"ab")
    with pytest.raises(ValueError, match="complete accepts b'a', which prefix rejects"):
        odd.start().after(b"a").complete()
    asked = constraint_of(Predicate(prefix=odd.prefix, complete=odd.complete), debug=True)  # the decoder's option
    with pytest.raises(ValueError, match="accepts b'ab' but rejects b'a'"):
        asked.start().allows(b"ab")
    assert Predicate(prefix=starts, complete=starts, debug=True).start().allows(b"aab")
    assert Predicate(prefix=lambda b: len(b) % 2 == 0, complete=starts).start().allows(b"ab")  # unasked, unnoticed


def test_bad_input(tmp_path):
    for text, message in (
        ("regex:[", "does not compile"),
        ("regex:a(?=b)", "does not compile"),
        (r"regex:a[^\s\S]", "language is empty"),
        ('json:{"not": {"type": "string"}}', "does not compile"),
        ("json:{nothing}", "does not compile"),
        ("lark:nowhere.lark", "cannot be read"),
        ("peg:x", "regex:PATTERN"),
        ("a+", "regex:PATTERN"),
        (None, "no constraint"),
    ):
        with pytest.raises(ValueError, match=message):
            constraint_of(text).start()
