"""preference_step.py on a GPU: SmolLM2-1.7B's shape with random weights in bfloat16, 16 pairs a step.

On a GPU a forward of SmolLM2-135M costs its launches, not its tokens (20 ms for 3,000 tokens, 26 ms for 12,000 on an
H200), so that there is nothing to gain; hence the larger shape. Losses in bfloat16 are compared to 2e-2 (they are
equal to 1e-3 in float32, which preference_step.py shows). Not run to its end yet: 65 seconds were too few.

    python benchmarks/preference_step_cuda.py --json
"""

from __future__ import annotations

from dataclasses import replace

import tyro
from preference_step import Options, main

DEFAULT = replace(Options(), model="smollm2-1.7b", device="cuda", dtype="bfloat16", batch=16, max_tokens=16384)

if __name__ == "__main__":
    main(tyro.cli(Options, default=DEFAULT, description=__doc__), slug="preference-step-cuda", gap=2e-2)
