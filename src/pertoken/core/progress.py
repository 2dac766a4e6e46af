"""What a run shows while it goes on: a progress bar, and the trackers of accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any


@contextlib.contextmanager
def tracking(accelerator: Any, tracker: str, same: Mapping[str, Any]):
    """Yields a function that is called with each record; the tracker is closed however the run ends."""
    if tracker == "none":
        yield lambda record: None
        return
    accelerator.init_trackers("pertoken", config=_flat(same))
    try:
        yield lambda record: accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
    finally:
        for one in accelerator.trackers:  # not end_training: it ends the process group, too
            one.finish()


@contextlib.contextmanager
def bar(total: int, done: int, show: bool):
    """A progress bar with the remaining time; yields a function that is called after each update."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), disable=not show, transient=True) as shown_bar:
        task = shown_bar.add_task("train", total=total, completed=done, figures="")

        def tick(record: Mapping[str, float]) -> None:
            shown = [f"loss {record['loss']:.4f}"]
            if "rewards/accuracies" in record:
                shown.append(f"accuracy {record['rewards/accuracies']:.2f}")
            if "reward" in record:
                shown.append(f"reward {record['reward']:.3f}")
            shown_bar.update(task, advance=1, figures="  ".join(shown))

        yield tick


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as the flat names and plain values that trackers take."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}/")
        else:
            out[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out
