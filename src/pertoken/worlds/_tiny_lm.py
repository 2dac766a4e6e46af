"""Train a small Llama from scratch on rows of token ids, and keep what was trained: the worlds' language models."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def cached_folder(name: str, key: Any, build: Callable[[Path], None], folder: str | os.PathLike | None = None) -> Path:
    """The folder `<name>-<hash of key>` under `folder`, else $PERTOKEN_CACHE, else ~/.cache/pertoken; built if missing.

    build(path) fills a scratch folder that is then renamed: a cached folder is whole or absent; of concurrent callers
    the first one wins. key: anything that json can write.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    root = Path(folder or os.environ.get("PERTOKEN_CACHE") or Path.home() / ".cache" / "pertoken")
    target = root / f"{name}-{digest}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{target.name}-") as scratch:
        finished = Path(scratch) / "finished"
        finished.mkdir()
        build(finished)
        try:
            finished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def fit(
    rows: Sequence[Sequence[int]],
    *,
    size: Mapping[str, Any],
    batch: int,
    learning_rate: float,
    seed: int,
    start: Any = None,
    unscored: Sequence[int | Sequence[bool]] | None = None,
    description: str = "train LM",
    progress: bool = True,
) -> Any:
    """A LlamaForCausalLM (float32, eval mode) after one pass of next-token loss over the rows.

    rows: token ids with <bos> = 1 first and <eos> = 2 last (0 is <pad>). size: arguments of LlamaConfig. learning_rate:
    peak of the schedule (5 % warm-up, then cosine to 0) of AdamW. start: a model to go on from. unscored: of each row,
    so many first tokens have no loss (a question), or those that are True. The weights are a function of the arguments
    on one machine and thread count; no global random state is read or changed. Trained on the GPU where there is one;
    the model comes back where `start` was, else on the CPU.
    """
    import torch
    from rich.console import Console
    from rich.progress import track
    from transformers import LlamaConfig, LlamaForCausalLM

    # A batch holds rows of almost equal length, padded on the right: the causal mask alone hides the padding and no row
    # can attend to another one, so that a packed row's block mask is not needed.
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    skipped = [1 if unscored is None else unscored[i] for i in by_length]
    masks = [
        torch.arange(len(rows[i])) < s if isinstance(s, int) else torch.tensor(s) for i, s in zip(by_length, skipped)
    ]
    rows = [rows[i] for i in by_length]
    order = np.random.default_rng((seed, 1)).permutation(steps := len(rows) // batch)
    model = start
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**size, pad_token_id=0, bos_token_id=1, eos_token_id=2)).float()
    home, device = next(model.parameters()).device, "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in track(range(steps), description, console=Console(stderr=True), disable=not progress):
        warmup, decay = (step + 1) / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(warmup, decay)
        part = slice(order[step] * batch, (order[step] + 1) * batch)
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows[part]], batch_first=True)
        asked_BT = torch.nn.utils.rnn.pad_sequence(masks[part], batch_first=True)
        ids_BT, asked_BT = ids_BT.to(device), asked_BT.to(device)
        labels_BT = ids_BT.masked_fill(asked_BT, 0)[:, 1:]
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.to(home).eval()
