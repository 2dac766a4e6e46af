"""genlm-control's side of `benchmarks/awrs_step.py`, run in an environment of its own, without pertoken.

python benchmarks/_genlm.py CASES.npz OUT.npz RUNS
"""

import asyncio
import sys
import time

import numpy as np
import torch
from genlm.control import Potential
from genlm.control.sampler.token import AWRS


class Logits(Potential):
    """Next-token log-weights that are given."""

    def __init__(self, vocabulary):
        super().__init__(vocabulary)
        self.logw = None

    async def prefix(self, context):
        return 0.0

    async def complete(self, context):
        return 0.0

    async def logw_next(self, context):
        return self.make_lazy_weights(self.logw)


class Allowed(Potential):
    """A Boolean condition that is an array, and counts its calls."""

    def __init__(self, vocabulary):
        super().__init__(vocabulary)
        self.allowed, self.calls = None, 0

    async def prefix(self, context):
        self.calls += 1
        return 0.0 if self.allowed[context[-1]] else -np.inf

    async def complete(self, context):
        self.calls += 1
        return 0.0 if self.allowed[-1] else -np.inf


def main(cases: str, out: str, runs: int) -> None:
    """Calls, seconds and weights of every run of every case, (cases, runs)."""
    torch.set_num_threads(1)
    with np.load(cases) as data:
        logw, allowed = data["logw"], data["allowed"]
    vocabulary = list(range(logw.shape[1] - 1))  # the last one is the end, which the library adds
    potential, condition = Logits(vocabulary), Allowed(vocabulary)
    sampler = AWRS(potential, condition, seed=0, autobatch=False)
    found = np.zeros((3, len(logw), runs))

    async def measure() -> None:
        for case in range(len(logw)):
            potential.logw, condition.allowed = torch.from_numpy(logw[case]), allowed[case]
            for run in range(-3, runs):  # three to warm up
                condition.calls, begin = 0, time.perf_counter()
                _, w, _ = await sampler.sample([])
                if run >= 0:
                    found[:, case, run] = condition.calls, time.perf_counter() - begin, np.exp(w)

    asyncio.run(measure())
    np.savez(out, calls=found[0], seconds=found[1], weights=found[2])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
