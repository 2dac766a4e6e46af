"""The rules of the house (CONTRIBUTING.md), each a short test over the source, none of which imports it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pertoken.catalog import methods

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "pertoken"
ROOMS = ("score", "train", "generate", "select", "explain", "tokenize", "rank", "bench")
OURS = [row for row in methods() if row.path.startswith("pertoken.")]  # not those of installed packages
FILES = sorted(SOURCE.rglob("*.py"))
ROOM_FILES = [path for path in FILES if path.relative_to(SOURCE).parts[0] in ROOMS]
TREES = {path: ast.parse(path.read_text("utf8")) for path in FILES}
MAY_IMPORT = {"core": {"core", "__version__"}, "worlds": {"core", "worlds", "catalog"}, "catalog.py": set()}
MAY_IMPORT |= {"show": {"core", "show", *ROOMS}, "adapters": {"core", "adapters", *ROOMS}}
MAY_IMPORT |= {room: {"core", room} for room in ROOMS}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked(*patterns: str) -> list[Path]:
    """Files under version control (or, without it, all that are there), new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in found.stdout.splitlines() if (ROOT / line).is_file()]


def imports(path: Path) -> set[str]:
    """Dotted names under `pertoken` that a file imports, anywhere in it."""
    out = set()
    package = ("pertoken", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            out |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in out if name.split(".")[0] == "pertoken"}


def test_arrows_run_one_way():
    """cli -> show, adapters -> rooms -> core; no room imports another one; worlds import no room."""
    wrong = []
    for path in FILES:
        allowed = MAY_IMPORT.get(path.relative_to(SOURCE).parts[0])
        wrong += [
            f"{name_of(path)} imports {name}"
            for name in sorted(imports(path))
            if allowed is not None and name.split(".")[1] not in allowed
        ]
    assert not wrong


def test_sizes():
    """No method file over 250 lines, no core file over 400, no method's folder of more than four files."""
    limits = {path: 250 for path in ROOM_FILES} | {path: 400 for path in FILES if path.parent == SOURCE / "core"}
    lines = {path: len(path.read_text("utf8").splitlines()) for path in limits}
    assert not [f"{name_of(path)}: {lines[path]} lines" for path, limit in limits.items() if lines[path] > limit]
    folders = {path.parent for path in ROOM_FILES if path.parent.parent != SOURCE}
    assert not [name_of(folder) for folder in folders if len(list(folder.glob("*.py"))) > 4]


def code_lines(path: Path) -> list[str]:
    """Lines that are neither blank nor comment, import, docstring or a field's string."""
    lines = path.read_text("utf8").splitlines()
    for node in ast.walk(TREES[path]):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if isinstance(node, ast.stmt) and (text or isinstance(node, ast.Import | ast.ImportFrom)):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def test_no_block_is_written_twice():
    """No identical block of more than five lines in two method files. The signature of `Decoder.generate`, which all
    decoders share as objectives share that of `loss`, is longer than five and does not count."""
    signature = ["lm: LM,", "prompts: Sequence[Prompt],", "*,", "n: int = 1,", "seed: int = 0,"]
    first: dict[tuple[str, ...], Path] = {}
    twice = set()
    for path in ROOM_FILES:
        lines = [line for line in code_lines(path) if line.strip() not in signature]
        for block in {tuple(lines[i : i + 6]) for i in range(len(lines) - 5)}:
            if first.setdefault(block, path) != path:
                twice.add(f"{name_of(first[block])} and {name_of(path)}: {' / '.join(block)}")
    assert not twice


def test_listing_loads_no_torch():
    script = (
        "import sys, pertoken; assert 'torch' not in sys.modules; pertoken.methods(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def module_of(row) -> Path:
    path = ROOT.joinpath("src", *row.path.partition(":")[0].split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_rows_have_their_module():
    wrong = []
    for row in OURS:
        path, attribute = module_of(row), row.path.partition(":")[2]
        stem = path.parent.name if path.name == "__init__.py" else path.stem
        if not path.exists():
            wrong.append(f"{row.slug}: there is no {name_of(path)}")
        elif path.relative_to(SOURCE).parts[0] != row.room or stem != row.slug.replace("-", "_"):
            wrong.append(f"{row.slug} of room {row.room} stands in {name_of(path)}")
        elif attribute not in {getattr(node, "name", None) for node in TREES[path].body}:
            wrong.append(f"{row.slug}: {name_of(path)} defines no {attribute}")
    assert not wrong


def test_modules_have_their_row():
    in_tree = set()
    for path in ROOM_FILES:
        part = path.relative_to(SOURCE).parts[1]
        if not part.startswith("_"):
            in_tree.add(path if part.endswith(".py") else path.parent / "__init__.py")
    assert not [name_of(path) for path in in_tree - {module_of(row) for row in OURS}]


def test_rows_have_their_test_example_and_result():
    """A test for every row; an example and a result for every paper's, its own or those of its specification
    (`system`: a reward and its trainer are measured together)."""
    missing = []
    for row in OURS:
        test = f"tests/methods/test_{row.slug.replace('-', '_')}.py"
        missing += [] if (ROOT / test).exists() else [test]
        for kind in ("examples/{}.py", "results/{}.json") if row.paper_row else ():
            names = [kind.format(s.replace("-", "_") if kind[0] == "e" else s) for s in (row.slug, row.system)]
            there = any((ROOT / name).exists() for name in names)
            missing += [] if there else [names[0]]
    assert not missing


def test_no_file_is_called_utils():
    assert not [name_of(path) for path in tracked("*.py") if path.stem.strip("_") in ("utils", "util", "helpers")]


def test_no_exception_is_swallowed():
    """No bare `except`, and no handler that only passes: contextlib.suppress says what it means."""
    wrong = []
    for path in tracked("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or isinstance(node.body[0], ast.Pass)):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong


def test_no_path_of_a_machine():
    """No absolute path of somebody's machine in tracked text ("/home/ann" is nobody's)."""
    absolute = re.compile(r"(?<![\w.~])/(?:home/(?!ann\b)\w|root/\w|Users/\w|work/\w|mnt/\w)|\b[A-Z]:\\\\?Users")
    wrong = []
    for path in tracked():
        try:
            text = path.read_text("utf8")
        except UnicodeDecodeError:
            continue
        if path != Path(__file__).resolve():
            wrong += [f"{name_of(path)}: {found.group()}" for found in absolute.finditer(text)]
    assert not wrong
