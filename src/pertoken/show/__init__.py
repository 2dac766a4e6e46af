"""Credit and runs for human eyes: terminal heatmaps, single-file HTML pages, reports. Names load on first use."""

from importlib import import_module
from typing import Any

_WHERE = {
    "heatmap": "terminal",
    "heatmap_html": "html",
    "page": "html",
    "build_report": "report",
    "Frontier": "charts",
    "Heatmaps": "report",
    "Interval": "tables",
    "Lines": "charts",
    "Point": "charts",
    "Provenance": "report",
    "Series": "charts",
    "Column": "tables",
    "Table": "tables",
    "Prose": "report",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"pertoken.show has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
