"""group_step.py on a GPU: SmolLM2-1.7B's shape with random weights in bfloat16, lengths four times as long.

Losses in bfloat16 are compared to 2e-2 (they are equal to 1e-3 in float32, which group_step.py shows).

    python benchmarks/group_step_cuda.py --save
"""

from __future__ import annotations

from dataclasses import replace

import tyro
from group_step import Options, main

DEFAULT = replace(Options(), model="smollm2-1.7b", device="cuda", dtype="bfloat16", longer=4, max_tokens=16384)

if __name__ == "__main__":
    main(tyro.cli(Options, default=DEFAULT, description=__doc__), slug="group-step-cuda", allowed=2e-2)
