"""Safe execution: a generated query against a SQLite database that it cannot change, in a bounded number of steps.

The file is opened read-only and immutable; an authoriser lets a statement select, read and call functions, and nothing
else (no ATTACH, no PRAGMA, no writes, no extension); a progress handler ends it after so many instructions of SQLite's
virtual machine, when memory grows, or when it takes far too long; limits bound its length, its strings, its nesting and
what it returns. What goes wrong is a value, not an exception: a reward has to score it.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "randomblob", "zeroblob"}
_EVERY = 200  # instructions between two looks at the budget


@dataclass(frozen=True, kw_only=True)
class SQLLimits:
    """What a query may cost."""

    steps: int = 1_000_000
    """Instructions of SQLite's virtual machine (some 0.1 s)."""
    rows: int = 5000
    """Rows that are fetched; the rest is left."""
    size: int = 4_000_000
    """Bytes of all values that are fetched."""
    length: int = 20_000
    """Bytes of the query."""
    value: int = 100_000
    """Bytes of the longest string or blob that it may make on its way."""
    memory: int = 256_000_000
    """Bytes by which the process may grow meanwhile (sorting keeps its rows in memory)."""
    seconds: float = 10.0
    """Of the clock: a net under `steps`, for queries whose single instructions are slow (functions of long strings)."""

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.size, self.length, self.value, self.memory) < 1 or not self.seconds > 0:
            raise ValueError(f"{self}: every limit is 1 or more, and seconds above 0")


@dataclass(frozen=True)
class SQLResult:
    """What a query gave.

    Attributes:
        rows: at most `SQLLimits.rows` of them. columns: their names.
        error: empty, or what went wrong.
        kind: empty; ``refused`` (writes, attaches, several statements, no query at all), ``stopped`` (too many steps),
            ``flood`` (too much), or ``error`` (SQLite's own).
        truncated: there were more rows.
    """

    rows: tuple[tuple, ...] = ()
    columns: tuple[str, ...] = ()
    error: str = ""
    kind: str = ""
    truncated: bool = False

    @property
    def ok(self) -> bool:
        """Whether the query ran."""
        return not self.kind


def run_sql(database: str | Path, sql: str, limits: SQLLimits | None = None) -> SQLResult:
    """Run one query.

    Args:
        database: a SQLite file; it is not changed, and nothing is written beside it.
        sql: untrusted text.

    Raises:
        ValueError: there is no such file, or it is no database: that is not the query's fault.
    """
    limits = limits or SQLLimits()
    path = Path(database)
    if not path.is_file():
        raise ValueError(f"there is no database {path}; give the path of a SQLite file")
    if not sql.strip():
        return SQLResult(error="the query is empty", kind="refused")
    connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1", uri=True)
    try:
        try:
            connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no SQLite database ({error})") from error
        _restrict(connection, limits)
        return _run(connection, sql, limits)
    finally:
        connection.close()


def _restrict(connection: sqlite3.Connection, limits: SQLLimits) -> None:
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA temp_store = MEMORY")  # no file is made for sorting
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, limits.value),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.length),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 20),
        (sqlite3.SQLITE_LIMIT_COLUMN, 200),
        (sqlite3.SQLITE_LIMIT_FUNCTION_ARG, 20),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 500),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):
        connection.setlimit(limit, value)
    connection.set_authorizer(_authorise)


def _authorise(action: int, one: str | None, two: str | None, database: str | None, source: str | None) -> int:
    forbidden = action == sqlite3.SQLITE_FUNCTION and (two or "").lower() in _FORBIDDEN
    return sqlite3.SQLITE_OK if action in _ALLOWED and not forbidden else sqlite3.SQLITE_DENY


def _run(connection: sqlite3.Connection, sql: str, limits: SQLLimits) -> SQLResult:
    left, most, grown = [limits.steps], _resident() + limits.memory, [False]
    end, late = time.monotonic() + limits.seconds, [False]

    def tick() -> int:
        left[0] -= _EVERY
        late[0] = time.monotonic() > end
        if left[0] // _EVERY % 5 == 0:  # reading the memory costs as much as the steps
            grown[0] = _resident() > most
        return int(left[0] < 0 or grown[0] or late[0])

    connection.set_progress_handler(tick, _EVERY)
    rows, size = [], 0
    try:
        cursor = connection.execute(sql)
        if cursor.description is None:
            return SQLResult(error="this is no query", kind="refused")
        columns = tuple(d[0] for d in cursor.description)
        for row in cursor:
            if len(rows) == limits.rows:
                return SQLResult(tuple(rows), columns, truncated=True)
            size += sum(len(v) if isinstance(v, (str, bytes)) else 8 for v in row)
            if size > limits.size:
                return SQLResult(error=f"more than {limits.size} bytes of results", kind="flood")
            rows.append(row)
        return SQLResult(tuple(rows), columns)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        what = str(error)
        if grown[0]:
            return SQLResult(error=f"more than {limits.memory} bytes of memory", kind="flood")
        if left[0] < 0:
            return SQLResult(error=f"stopped after {limits.steps} steps", kind="stopped")
        if late[0]:
            return SQLResult(error=f"stopped after {limits.seconds} seconds", kind="stopped")
        if "too big" in what or "too large" in what:
            return SQLResult(error=what, kind="flood")
        refused = any(
            words in what for words in ("not authorized", "authorization denied", "prohibited", "one statement")
        )
        return SQLResult(error=what, kind="refused" if refused else "error")


def _resident() -> int:
    """Bytes of memory that the process holds; where the system does not say, the most that it ever held."""
    import resource

    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
