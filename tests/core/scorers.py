"""A scorer that fails as asked. In a module without torch, so that a process that only has it starts quickly."""

import os
import signal
import threading
from dataclasses import dataclass

from pertoken.core.credit import Credit


@dataclass(frozen=True)
class Length:
    """A sequence-level scorer, which fails on texts that hold a word, in one of several ways."""

    word: str = ""
    how: str = "raise"

    def score(self, items):
        out = []
        for trace in items:
            if self.word and self.word in trace.text:
                if self.how == "raise":
                    raise KeyError("no such thing")
                if self.how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.how == "hang":
                    threading.Event().wait()
                out.append(Credit.of_sequence(trace, float("nan"), method="length"))
            else:
                out.append(Credit.of_sequence(trace, float(len(trace.text)), method="length"))
        return out


@dataclass(frozen=True)
class Scheduled:
    """A scorer that says which batch it is."""

    batch: int = 0

    def at(self, batch):
        return Scheduled(batch)

    def score(self, items):
        return [Credit.of_sequence(t, float(self.batch), method="scheduled") for t in items]
