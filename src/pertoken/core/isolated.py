"""A scorer in a process of its own."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Sequence
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

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """What the scorer says.

        Raises:
            WorkerDied: its process ended, or took longer than `timeout` (it is ended then).
            RuntimeError: the scorer raised; the message is its own. NotFinite: it gave a value that is not finite.
        """
        try:
            if self._process is None or not self._process.is_alive():
                self._start()
            self._pipe.send(list(items))
            if not self._pipe.poll(self.timeout):
                self.close()
                raise WorkerDied(f"{self.name} took more than {self.timeout:g} seconds")
            how, found = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            process: Any = self._process
            process.join()
            code = process.exitcode
            self.close()
            raise WorkerDied(f"the process of {self.name} ended with code {code}") from error
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
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self.scorer, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is there: starting takes seconds that are not the scorer's

    def __getstate__(self) -> dict[str, Any]:
        return {"scorer": self.scorer, "timeout": self.timeout, "name": self.name, "_process": None, "_pipe": None}


def _serve(scorer: Any, pipe: Any) -> None:
    pipe.send(("ready", None))
    while True:
        try:
            items = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", scorer.score(items)))
        except NotFinite as error:
            pipe.send(("not finite", str(error)))
        except Exception as error:  # told to the process that asked
            pipe.send(("error", f"{type(error).__name__}: {error}"))
