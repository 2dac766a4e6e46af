"""genlm-bytes on given texts, run by the python of its own environment: `python _genlm_bytes.py request.json out.npz`.

The request: ``folder`` of a model, ``texts`` (lists of bytes), ``beam``, ``threshold``, ``end`` (the text of EOS).
Written: for each text i ``logps_i`` (bytes,) natural log-probs of its bytes; ``seconds`` and ``forwards`` a text.
"""

import asyncio
import json
import sys
import time

import numpy as np
import torch
from genlm.backend import load_model_by_name
from genlm.bytes import BeamParams, ByteBeamState


async def read(request: dict) -> dict[str, np.ndarray]:
    """All texts, one after another."""
    llm = load_model_by_name(request["folder"], backend="hf", llm_opts={"timeout": 0.0})
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    llm.model.register_forward_pre_hook(count)
    params = BeamParams(
        K=request["beam"], prune_threshold=request["threshold"], eos_byte_strings=[request["end"].encode()]
    )
    first = await ByteBeamState.initial(llm, params)  # builds the trie, which is not timed
    await first.cleanup()
    out, seconds, passes = {}, [], []
    for i, text in enumerate(request["texts"]):
        llm.clear_cache()
        began, before, logps = time.perf_counter(), forwards, []
        beam = await ByteBeamState.initial(llm, params)
        for byte in text:
            said = await beam.logp_next()
            logps.append(said[byte])
            beam = await (beam.prune() << byte)
        seconds.append(time.perf_counter() - began)
        passes.append(forwards - before)
        out[f"logps_{i}"] = np.array(logps, np.float64)
        await beam.cleanup()
    return out | {"seconds": np.array(seconds), "forwards": np.array(passes)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf8") as file:
        asked = json.load(file)
    np.savez(sys.argv[2], **asyncio.run(read(asked)))
