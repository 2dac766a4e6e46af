"""A scorer in a process of its own."""

from __future__ import annotations

import multiprocessing as mp
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .credit import Credit, NotFinite
from .trace import Trace


class WorkerDied(RuntimeError):
    """The process of an `Isolated` scorer ended while it was asked."""


class Isolated:
    """A scorer in a process of its own: one that is killed, runs for ever or eats its memory takes no run with it.

    The process is started again when it is asked the next time.

    Args:
        scorer: what can be pickled.
        timeout: seconds that one call may take.
    """

    def __init__(self, scorer: Any, timeout: float = 60.0):
        self.scorer, self.timeout = scorer, timeout
        self.name = str(getattr(scorer, "name", "") or type(scorer).__name__.lower())
        self._process: Any = None
        self._pipe: Any = None

    def at(self, batch: int) -> _Moved:
        """The scorer as it is in a batch with that number (one with a schedule moves on), in the same process."""
        return _Moved(self, batch)

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """What the scorer says.

        Raises:
            WorkerDied: its process ended, or took longer than `timeout` (it is ended then).
            RuntimeError: the scorer raised; the message is its own. NotFinite: it gave a value that is not finite.
        """
        return self._ask(items, None)

    def _ask(self, items: Sequence[Trace], batch: int | None) -> list[Credit]:
        try:
            if self._process is None or not self._process.is_alive():
                self._start()
            self._pipe.send((list(items), batch))
            if not self._pipe.poll(self.timeout):
                raise WorkerDied(f"{self.name} took more than {self.timeout:g} seconds")
            how, found = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            process: Any = self._process
            process.join()
            code = process.exitcode
            self.close()
            raise WorkerDied(f"the process of {self.name} ended with code {code}") from error
        except BaseException:  # an interrupt, too: an answer that comes later must not be taken for the next one's
            self.close()
            raise
        if how != "ok":
            raise NotFinite(found) if how == "not finite" else RuntimeError(found)
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        self.close()
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.scorer, theirs), daemon=True)
        try:
            process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # what pickle raises
            raise ValueError(
                f"{self.name} cannot go to another process ({error}); give a scorer that is defined in a module"
            ) from error
        theirs.close()
        self._process, self._pipe = process, ours
        self._pipe.recv()  # it is there: starting takes seconds that are not the scorer's

    def __getstate__(self) -> dict[str, Any]:
        return {"scorer": self.scorer, "timeout": self.timeout, "name": self.name, "_process": None, "_pipe": None}


@dataclass(frozen=True)
class _Moved:
    isolated: Isolated
    batch: int

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        return self.isolated._ask(items, self.batch)


def _serve(scorer: Any, pipe: Any) -> None:
    pipe.send(("ready", None))
    while True:
        try:
            items, batch = pipe.recv()
        except EOFError:
            return
        try:
            now = scorer.at(batch) if batch is not None and hasattr(scorer, "at") else scorer
            pipe.send(("ok", now.score(items)))
        except NotFinite as error:
            pipe.send(("not finite", str(error)))
        except Exception as error:  # told to the process that asked
            pipe.send(("error", f"{type(error).__name__}: {error}"))
