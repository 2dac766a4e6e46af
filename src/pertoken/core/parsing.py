"""Sentences and their trees: a chunker that needs nothing, and real constituency or dependency parsers if they are
installed. A tree is nested spans of characters; its leaves are words."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

Tree = tuple[int, int, tuple["Tree", ...]]
"""(start, end, parts): characters [start, end) of the text that was parsed; no parts: a word."""
Parser = Callable[[str], Tree]


class Unparsed(ValueError):
    """A parser and the text (or its tokens) do not agree; whoever asked may cut by another rule, and count it."""


_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_OPENS_CLAUSE = frozenset(
    "and but or nor so yet because although though while when whenever where if unless until since after before that "
    "which who whom whose what why how whether than".split()
)
_OPENS_PHRASE = frozenset(
    "a an the this these those my your his her its our their some any no every each in on at by for from of to with "
    "without about into over under between through during against is are was were be been has have had do does did "
    "will would can could shall should may might must".split()
)
_HINTS = {
    "benepar": ("benepar", 'pip install benepar, then benepar.download("benepar_en3")'),
    "constituent-treelib": ("constituent_treelib", "pip install constituent-treelib, and its spaCy and benepar models"),
    "spacy": ("spacy", "pip install spacy, then python -m spacy download en_core_web_sm"),
}


def sentences(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each sentence: cut after . ! ? with white space, and at newlines."""
    edges = [0, *(e for m in _SENTENCE.finditer(text) for e in m.span()), len(text)]
    found = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        inner = text[start:end]
        start, end = start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip())
        if start < end:
            found.append((start, end))
    return found


def leaves(tree: Tree) -> Iterator[Tree]:
    """The words of a tree, in order."""
    if not tree[2]:
        yield tree
    for part in tree[2]:
        yield from leaves(part)


def clauses(text: str) -> Tree:
    """A sentence's clauses (after , ; : and dashes, before conjunctions), their phrases (before determiners,
    prepositions and auxiliaries: not before the second of two in a row) and words, by word lists: English."""
    words: list[Tree] = [(*m.span(), ()) for m in _WORD.finditer(text)]
    spoken = [text[a:b].lower() for a, b, _ in words]
    groups: list[list[list[Tree]]] = [[[]]]
    for k, word in enumerate(words):
        before = spoken[k - 1] if k else ""
        opens = _OPENS_CLAUSE | _OPENS_PHRASE
        if k and (before in tuple(",;:—–") or (spoken[k] in _OPENS_CLAUSE and before not in _OPENS_CLAUSE)):
            groups.append([[]])
        elif k and spoken[k] in _OPENS_PHRASE and before not in opens:
            groups[-1].append([])
        groups[-1][-1].append(word)
    if not words:
        return 0, len(text), ()
    return _over([_over([_over(phrase) for phrase in clause]) for clause in groups])


def _over(parts: list[Tree]) -> Tree:
    """Parts under one node; a part alone is itself."""
    return parts[0] if len(parts) == 1 else (parts[0][0], parts[-1][1], tuple(parts))


def of_nltk(text: str, tree: Any) -> Tree:
    """An nltk.Tree (nested iterables of words) laid on the text that was parsed.

    Raises:
        Unparsed: a word of the tree is not in the text where it should be.
    """
    place = 0

    def lay(node: Any) -> Tree:
        nonlocal place
        if not isinstance(node, str):
            return _over([lay(part) for part in node])
        word = {"-LRB-": "(", "-RRB-": ")", "``": '"', "''": '"'}.get(node, node)
        found = text.find(word, place)
        if found < 0 or text[place:found].strip():
            raise Unparsed(f"the parser's word {node!r} is not what follows {text[:place]!r} in the text")
        place = found + len(word)
        return found, place, ()

    return lay(tree)


def of_spacy(sentence: Any) -> Tree:
    """A spaCy sentence or document: each word's subtree in the dependency tree is a constituent (words that another's
    subtree is interleaved with, in trees that cross, stand beside it)."""

    def under(token: Any) -> Tree:
        word: Tree = (token.idx, token.idx + len(token.text), ())
        parts = [*map(under, token.lefts), word, *map(under, token.rights)]
        return _over(parts)

    return _over([under(token) for token in sentence if token.head is token or token.head.i == token.i])


@lru_cache(maxsize=4)
def real_parser(name: str) -> Parser:
    """A parser of a package: ``benepar``, ``constituent-treelib`` or ``spacy`` (its models must be there already). What
    it raises on a sentence (too long, no sentence at all) is `Unparsed`, so that one answer does not end a run.

    Raises:
        ValueError: another name. ImportError: the package or its model is not installed; the sentence says how.
    """
    if name not in _HINTS:
        raise ValueError(f"parser={name!r} is not one of clauses, {', '.join(_HINTS)}; from Python, give a segmenter")
    module, hint = _HINTS[name]
    try:
        package = importlib.import_module(module)
        parse = _loaded(name, package)
    except (ImportError, OSError, LookupError) as error:  # what they raise where the package or the model is missing
        raise ImportError(f"parser={name!r} is not installed ({error}): {hint}; or use parser=clauses") from error

    def parsed(text: str) -> Tree:
        try:
            return parse(text)
        except Exception as error:  # anything: it is another's code, on whatever a policy wrote
            raise Unparsed(f"{name} does not parse {text[:80]!r}: {type(error).__name__}: {error}") from error

    return parsed


def _loaded(name: str, package: Any) -> Parser:
    if name == "spacy":
        nlp = package.load("en_core_web_sm")
        return lambda text: of_spacy(nlp(text))
    if name == "benepar":
        parser = package.Parser("benepar_en3")
        return lambda text: of_nltk(text, parser.parse(text))
    kind = package.ConstituentTree
    nlp = kind.create_pipeline(kind.Language.English, kind.SpacyModelSize.Medium)
    return lambda text: of_nltk(text, kind(text, nlp).nltk_tree)
