"""Write what the repository says about its methods: the README's tables and one page a method in docs/methods/.

Sources: the catalog, the docstring and options of each method's module (parsed, never imported: no torch), and the
figures in results/*.json, whose schema CONTRIBUTING.md gives. `--check` writes nothing and exits 1 where files differ.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import textwrap
from pathlib import Path

from pertoken import catalog

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "methods"
STAMP = "<!-- written by tools/readme.py: edit its sources and run `make docs` -->"
ORIGIN = {"slug", "world", "seeds", "command", "commit", "date"}
UNSTATED = {"interval": None, "baseline": None, "baseline_value": None, "bound": "", "reached": None, "notes": ""}
FIELDS = {"metric", "value", *ORIGIN, *UNSTATED}


def results(slugs: set[str]) -> dict[str, list[dict]]:
    """The figures of each slug, the main one first; a row of `rows` has the origin of the result that it stands in."""
    figures = {}
    for path in sorted((ROOT / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        origin = {key: result[key] for key in ORIGIN & result.keys()}
        figures[path.stem] = [result, *(origin | UNSTATED | row for row in result.pop("rows", []))]
        for row in figures[path.stem]:
            if wrong := FIELDS ^ row.keys():
                raise ValueError(f"{path.name}: {', '.join(sorted(wrong))} missing or unknown, see CONTRIBUTING.md")
        if result["slug"] != path.stem:
            raise ValueError(f"{path.name} says slug {result['slug']!r}: name the file after it")
        script = f"{path.stem.replace('-', '_')}.py"
        if path.stem not in slugs and not any(
            (ROOT / folder / script).exists() for folder in ("benchmarks", "examples")
        ):
            raise ValueError(f"{path.name} belongs to no method of the catalog and no script in benchmarks or examples")
    return figures


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def figure(result: dict) -> str:
    """One figure in one line, an acceptance bound that was missed said aloud."""
    text = f"{result['metric']}: {number(result['value'])}"
    if result["interval"]:
        text += f" [{', '.join(map(number, result['interval']))}]"
    if result["baseline"]:
        text += f" vs {number(result['baseline_value'])} ({result['baseline']})"
    return f"{text}, {result['world']}" + ("; **bound missed**" if result["reached"] is False else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def paper(method) -> str:
    """The paper as a link, when it has an arXiv id; baselines are told from the papers' own methods."""
    is_arxiv = re.fullmatch(r"\d{4}\.\d{4,5}", method.paper)
    link = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if is_arxiv else method.paper
    return link if method.paper_row else f"{link} (baseline)".strip()


def source(method) -> tuple[Path, str, str]:
    """The module of a method, its docstring, and its options as they are written."""
    module, _, name = method.path.partition(":")
    path = ROOT / "src" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    owner = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    fields = [node for node in (owner.body if owner else []) if isinstance(node, ast.AnnAssign)]
    lines, options = text.splitlines(), ""
    if fields:
        start = fields[0].lineno - 1
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1
        after = owner.body[owner.body.index(fields[-1]) + 1 :][:1]  # what the last one is, in words
        told = [node for node in after if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
        options = textwrap.dedent("\n".join(lines[start : (told or fields)[-1].end_lineno]))
    return path, ast.get_docstring(tree) or "", options


def page(method, figures: list[dict]) -> str:
    path, docstring, options = source(method)
    summary, _, rest = docstring.partition("\n\n")
    name = method.slug.replace("-", "_")
    examples = dict.fromkeys(f"examples/{s.replace('-', '_')}.py" for s in (method.slug, method.system))
    files = [path.relative_to(ROOT).as_posix(), *examples, f"tests/methods/test_{name}.py"]
    facts = {
        "paper": paper(method),
        "system": method.system,
        "family": method.family,
        "level": method.level,
        "works on": method.item,
        "data": method.data,
        "models beside the policy": ", ".join(method.models),
        "version": str(method.version),
        "batch coupled": "yes" if method.batch_coupled else "",
        "stochastic": "yes" if method.stochastic else "",
        "files": " · ".join(f"[{file}](../../{file})" for file in files if (ROOT / file).exists()),
    }
    has_command = method.room in (
        "score",
        "train",
        "generate",
        "explain",
        "tokenize",
    )  # the other rooms are reached from Python so far
    command = f"pertoken {method.room} {method.slug} --help\n" if has_command else ""
    parts = [
        STAMP,
        f"# {method.slug}: {method.title}",
        summary,
        table(["room", method.room], [[key, value] for key, value in facts.items() if value]),
        f"```text\n{rest.strip()}\n```" if rest.strip() else "",
        f"## Options\n\n```python\n{options}\n```" if options else "",
        f"## Use\n\n```bash\npertoken about {method.slug}\n{command}```",
        "## Measured",
    ]
    parts.append(measured(figures) if figures else "Nothing yet.")
    return "\n\n".join(part for part in parts if part) + "\n"


def measured(figures: list[dict]) -> str:
    """Each figure with what is needed to judge it and, where it differs from the one before, to get it again."""
    items, last = [], None
    for result in figures:
        bound = result["bound"] and f"bound: {result['bound']}"
        seeds = ", ".join(map(str, result["seeds"]))
        origin = f"from `{result['command']}`, seeds {seeds}, commit `{result['commit']}`, {result['date']}"
        lines = [figure(result), bound, result["notes"], origin if origin != last else ""]
        items.append("- " + "\\\n  ".join(line for line in lines if line))
        last = origin
    return "\n".join(items)


def fill(readme: str, blocks: dict[str, str]) -> str:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->` for each block."""
    for name, text in blocks.items():
        head, mark, rest = readme.partition(f"<!-- {name} -->")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        if not (mark and end):
            raise ValueError(f"README.md needs <!-- {name} --> and <!-- /{name} --> around its generated part")
        readme = f"{head}{mark}\n\n{text}\n\n{end}{tail}"
    return readme


def build() -> dict[Path, str | None]:
    """Every generated file with the text it should have, None for pages of methods that are gone."""
    methods = [method for method in catalog.methods() if method.path.startswith("pertoken.")]  # ours, not plugins'
    slugs = {method.slug for method in methods}
    figures = results(slugs)
    rows = [
        [
            f"[{method.slug}](docs/methods/{method.slug}.md)",
            method.room,
            paper(method),
            figure(figures[method.slug][0]) if method.slug in figures else "not measured yet",
        ]
        for method in methods
    ]
    benches = [[slug, figure(row)] for slug, rows in figures.items() if slug not in slugs for row in rows]
    readme = ROOT / "README.md"
    blocks = {
        "methods": table(["method", "room", "paper", "figure"], rows),
        "benchmarks": table(["benchmark", "figure"], benches) if benches else "Nothing measured yet.",
    }
    files: dict[Path, str | None] = {path: None for path in PAGES.glob("*.md") if STAMP in path.read_text("utf-8")}
    files |= {PAGES / f"{method.slug}.md": page(method, figures.get(method.slug, [])) for method in methods}
    files[readme] = fill(readme.read_text(encoding="utf-8"), blocks)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not what it should be")
    check = parser.parse_args().check
    try:
        files = build()
    except (ValueError, OSError) as error:
        sys.exit(f"tools/readme.py: {error}")
    on_disk = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in files}
    drifted = {path: text for path, text in files.items() if text != on_disk[path]}
    for path, text in drifted.items():
        print(f"{'out of date' if check else 'wrote' if text else 'removed'}: {path.relative_to(ROOT)}")
        if check:
            continue
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and drifted:
        print("run `make docs` and commit what it writes")
    return int(check and bool(drifted))


if __name__ == "__main__":
    sys.exit(main())
