"""Activations of named modules as one number a position each, reduced while the model runs: no (N, T, H) is kept.

A want is ``HOW:NAMES``. HOW is ``mean`` (over the module's features) or ``sigmoid`` (the mean of their sigmoids). NAMES
are alternatives between ``|``. Each names the END of a module's path, part by part, with shell wildcards inside a part:
``mlp.act_fn`` is the activation of every layer's MLP, ``layers.*`` are the layers themselves. ``<`` before a name takes
the module's input instead of its output, and ``/K`` behind it cuts the features into K equal pieces (``attn.c_attn/3``
are GPT-2's q, k and v). ``@rotary`` are the q and k of every layer after their rotation, which no module puts out: they
are read where the attention function gets them. Names that an architecture lacks are passed over; if nothing is left
it is an error.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

HOW = ("mean", "sigmoid")
ROTARY = "@rotary"
_ROUNDING = 1e-6


def reduce_features(x: Tensor, how: str) -> Tensor:
    """One number for each position: features are the last axis. float32 or better, without gradient.

    A mean that is rounding beside what it is a mean of (that of a plain LayerNorm's output, which is 0) counts as 0.
    """
    dtype, x = x.dtype, x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
    if how == "sigmoid":
        return x.sigmoid().mean(-1)
    mean = x.mean(-1)
    noise = torch.finfo(dtype).eps / math.sqrt(x.shape[-1])  # of a mean of numbers that were rounded one by one
    floor = max(_ROUNDING, noise) * x.abs().mean(-1)
    return torch.where(mean.abs() > floor, mean, torch.zeros_like(mean))


def named(path: str, pattern: str) -> bool:
    """Whether a pattern names the end of a module's path."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[::-1], wanted[::-1]))


class Captures:
    """Hooks on a model for some wants, as long as the stack is open.

    Args:
        causal: the model. wants: as the module's docstring says.
        positions: rows and columns that its layers compute. gather: (rows, columns, F) -> (M, F).

    Raises:
        ValueError: names of which the model has none.
    """

    def __init__(
        self,
        causal: nn.Module,
        wants: list[str],
        positions: torch.Size,
        gather: Callable[[Tensor], Tensor],
        stack: contextlib.ExitStack,
    ):
        self.taken: dict[str, dict[tuple[str, str], list[Tensor]]] = {}
        self.positions, self.gather = positions, gather
        for want in wants:
            how, _, names = want.partition(":")
            places = self.taken[want] = {}
            for path, module in causal.named_modules():
                for name in names.split("|"):
                    pattern, _, pieces = name.strip().removeprefix("<").partition("/")
                    if not named(path, pattern):
                        continue
                    places[path, name] = []
                    hook = self._hook(path, places[path, name], how, name.strip()[0] == "<", int(pieces or 1))
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            if ROTARY in names.split("|") and any(named(path, "rotary_emb") for path, _ in causal.named_modules()):
                places["", ROTARY] = []
                stack.enter_context(_attention_seen(causal, self._attention(places["", ROTARY], how)))
            if not places:
                raise ValueError(f"the model has no module called {names}; print(model) lists their names")

    def _hook(self, path: str, taken: list[Tensor], how: str, before: bool, pieces: int) -> Callable[..., None]:
        def keep(_m: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            first = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            x = first if before else output[0] if isinstance(output, tuple) else output
            if not isinstance(x, Tensor) or x.shape[:2] != self.positions or x.ndim < 3:
                raise ValueError(f"the module {path!r} does not compute position by position; leave it out")
            x = self.gather(x.detach().flatten(2))  # heads are features, too
            if x.shape[-1] % pieces:
                raise ValueError(f"{x.shape[-1]} features of {path!r} do not make {pieces} equal pieces")
            taken.append(reduce_features(x.unflatten(-1, (pieces, -1)), how))

        return keep

    def _attention(self, taken: list[Tensor], how: str) -> Callable[[Tensor, Tensor], None]:
        def keep(*both: Tensor) -> None:  # (rows, heads, columns, features) each
            taken.extend(
                reduce_features(self.gather(x.detach().transpose(1, 2).flatten(2)), how)[:, None] for x in both
            )

        return keep

    def values(self) -> dict[str, Tensor]:
        """What was seen: (M, K) by want, K tensors in the order of the model's modules.

        Raises:
            ValueError: no module of a want ran.
        """
        out = {}
        for want, places in self.taken.items():
            seen = [value for values in places.values() for value in values]
            if not seen:
                raise ValueError(f"{want} did not run in the backbone; ask for a module inside of it")
            out[want] = torch.cat(seen, dim=-1)
        return out


@contextlib.contextmanager
def _attention_seen(causal: Any, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `see` is told the q and k that the model's attention function gets: transformers' table of such functions
    holds one that tells, and then calls the one that was there."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    name = causal.config.get_text_config()._attn_implementation
    before = FUNCTIONS.get(name)  # None for eager, which each architecture has in its own file

    def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        see(query, key)
        compute = before or sys.modules[type(module).__module__].eager_attention_forward
        return compute(module, query, key, *args, **kwargs)

    FUNCTIONS[name] = attend
    try:
        yield
    finally:
        del FUNCTIONS[name]
        if FUNCTIONS.get(name) is not before:  # somebody else had put his there
            FUNCTIONS[name] = before
