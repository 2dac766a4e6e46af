"""Byte-exact beside genlm-bytes: bits a byte, forwards a byte, time, and how far pruning is from exact.

The same sentences byte by byte from the model's BOS, whole texts searched: ours in both modes (canonical, exact; every
sequence, pruned as the peer prunes, and almost not at all, which is what errors are measured against), genlm-bytes
0.2.0 in the environment that `make peers` makes. One thread each, in one run; loading and building tries are not timed.

    python benchmarks/byte_exact_peer.py --save
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from pertoken.core.lm import LM, embedded_folder, load
from pertoken.generate.byte_exact import ByteExact
from pertoken.generate.byte_exact import keep as forget
from pertoken.results import save_result

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the benchmark."""

    texts: int = 3
    """Sentences."""
    length: int = 40
    """Bytes of each."""
    beam: int = 10
    """K of both."""
    threshold: float = 1e-3
    """Least share of a candidate, of both."""
    almost: float = 1e-7
    """Least share of a candidate in what errors are measured against."""
    peer: Path = HERE.parent / ".peers" / "genlm" / "bin" / "python"
    """Python of the peer's environment."""
    save: bool = False
    """Write results/byte-exact-peer.json."""


def sentences(n: int, length: int) -> list[bytes]:
    """Beginnings of texts of PERTOKEN_DATA's corpora."""
    with gzip.open(Path(os.environ["PERTOKEN_DATA"]) / "corpora" / "domains.jsonl.gz", "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows if row["domain"] in ("science", "wikipedia") and row["text"].isascii()]
    chosen = np.random.default_rng(0).permutation(len(texts))[:n]
    return [texts[i].strip()[:length].encode() for i in chosen]


def ours(lm: LM, method: ByteExact, texts: list[bytes]) -> dict[str, Any]:
    """Log-probs of the bytes of each text, and what they cost."""
    out: dict[str, Any] = {"logps": [], "seconds": 0.0, "forwards": 0}
    method.state(lm, b"")  # ranges and rules are made once
    for text in texts:
        began, logps = time.perf_counter(), []
        state = method.state(lm, b"")
        for byte in text:
            logps.append(state.logps()[byte])
            state = state.advance(byte)
            forget(state) if byte != text[-1] else None
        out["seconds"] += time.perf_counter() - began
        out["forwards"] += state.model.tree.forwards
        out["logps"].append(np.array(logps))
    return out


def theirs(options: Options, lm: LM, texts: list[bytes]) -> dict[str, Any]:
    """The peer's, through files.

    Raises:
        ValueError: its environment is not there.
    """
    if not options.peer.exists():
        raise ValueError(f"there is no {options.peer}; make it with `make peers`")
    with tempfile.TemporaryDirectory() as folder:
        request, found = Path(folder) / "request.json", Path(folder) / "out.npz"
        asked = {"folder": str(embedded_folder()), "texts": [list(t) for t in texts]}
        asked |= {"beam": options.beam, "threshold": options.threshold, "end": lm.tokenizer.eos_token}
        request.write_text(json.dumps(asked), "utf8")
        # PYTHONPATH would put this environment's packages into that one.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [str(options.peer), str(HERE / "_genlm_bytes.py"), str(request), str(found)]
        subprocess.run(command, check=True, env=environment)
        with np.load(found) as arrays:
            logps = [arrays[f"logps_{i}"] for i in range(len(texts))]
            return {
                "logps": logps,
                "seconds": float(arrays["seconds"].sum()),
                "forwards": int(arrays["forwards"].sum()),
            }


def main(options: Options) -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    lm = load("smollm2", template="plain")
    texts = sentences(options.texts, options.length)
    pruned = ByteExact(mode="all", search="text", beam=options.beam, threshold=options.threshold)
    found = {
        "every sequence, almost exact": ours(lm, ByteExact(mode="all", search="text", threshold=options.almost), texts),
        "every sequence, pruned": ours(lm, pruned, texts),
        "canonical, exact (fast)": ours(lm, ByteExact(search="text"), texts),
        "canonical, pruned": ours(lm, ByteExact(search="text", threshold=options.threshold), texts),
        "genlm-bytes": theirs(options, lm, texts),
    }
    exact = np.concatenate(found["every sequence, almost exact"]["logps"])
    count, rows = len(exact), {}
    for name, one in found.items():
        logps = np.concatenate(one["logps"])
        rows[name] = {
            "bits": float(-logps.mean() / np.log(2)),
            "error": float(np.abs(logps - exact).mean() / np.log(2)),
            "forwards": one["forwards"] / count,
            "milliseconds": 1e3 * one["seconds"] / count,
        }
        cells = "  ".join(f"{k} {v:.4f}" for k, v in rows[name].items())
        print(f"{name:30s} {cells}", flush=True)
    if options.save:
        mine, peer = rows["every sequence, pruned"], rows["genlm-bytes"]
        extra = [
            {"metric": f"{name}: {what}", "value": one[key], "baseline": "genlm-bytes", "baseline_value": peer[key]}
            for name, one in rows.items()
            if name != "genlm-bytes"
            for key, what in (
                ("bits", "bits a byte"),
                ("error", "mean |difference| to almost exact, bits a byte"),
                ("forwards", "forwards a byte"),
                ("milliseconds", "milliseconds a byte"),
            )
        ]
        save_result(
            "byte-exact-peer",
            metric="time a byte of genlm-bytes over ours, every sequence, same pruning (more is better)",
            value=peer["milliseconds"] / mine["milliseconds"],
            interval=None,
            baseline="genlm-bytes 0.2.0",
            baseline_value=1.0,
            bound="",
            reached=None,
            world=f"SmolLM2-135M, {options.texts} texts of {options.length} bytes, K {options.beam}, threshold "
            f"{options.threshold:g}, CPU, 1 thread",
            seeds=[0],
            notes="Both read each text from BOS, byte by byte. To the peer, special tokens are their names.",
            rows=extra,
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
