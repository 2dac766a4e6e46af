"""The command line. Listing and help load neither torch nor any method; every command imports what it needs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_HELP = "pertoken — reward, credit and control at the level of the token"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for what a user can fix, whose sentence says how."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        _usage()
        return 0
    if words[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    command = _COMMANDS.get(words[0])
    try:
        if command is None:
            import difflib

            near = difflib.get_close_matches(words[0], _COMMANDS, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(_COMMANDS)}"
            raise ValueError(f"there is no command {words[0]!r}; {hint}")
        return command[1](words[1:]) or 0
    except (ValueError, ImportError) as error:
        if os.environ.get("PERTOKEN_DEBUG"):
            raise
        print(f"pertoken: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("pertoken: stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def _usage() -> None:
    print(f"{_HELP}\n\nusage: pertoken COMMAND ...   (pertoken COMMAND --help)\n")
    for name, (text, _) in _COMMANDS.items():
        print(f"  {name:<9} {text}")


def _parse(kind: Any, words: Sequence[str], command: str, description: str, default: Any = None) -> Any:
    """Options of a dataclass from words, by tyro."""
    import tyro

    extra = {} if default is None else {"default": default}
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, prog=f"pertoken {command}", description=description, args=list(words), config=config, **extra)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _methods(words: Sequence[str]) -> None:
    """List the catalog; words narrow it down: a room, or text that a row holds."""
    from .catalog import methods

    if "--help" in words or "-h" in words:
        print("usage: pertoken methods [--room ROOM] [TEXT]\n\nTEXT filters by slug, room, title or arXiv id.")
        return
    words = [w for w in words if w != "--room"]
    rows = [m for m in methods() if all(w.lower() in f"{m.slug} {m.room} {m.title} {m.paper}".lower() for w in words)]
    width = max((len(m.slug) for m in rows), default=0)
    for m in rows:
        print(f"{m.slug:<{width}}  {m.room:<8}  {m.level:<8}  {m.paper or '-':<11}  {m.title}")
    papers = len({m.system for m in rows if m.paper_row})
    print(f"\n{len(rows)} methods of {papers} published systems and their baselines; pertoken about METHOD tells more")


def _about(words: Sequence[str]) -> None:
    """What a method is: its row, its module's docstring, its options, its measured figure."""
    import ast
    import importlib.util
    import json

    from .catalog import about

    if len(words) != 1 or words[0].startswith("-"):
        print("usage: pertoken about METHOD")
        return
    row = about(words[0])
    module, _, attribute = row.path.partition(":")
    spec = importlib.util.find_spec(module)
    tree = ast.parse(Path(spec.origin).read_text("utf8")) if spec and spec.origin else None
    print(f"{row.slug} · {row.room} · {row.level}-level · {'arXiv ' + row.paper if row.paper else 'baseline'}\n")
    print(((ast.get_docstring(tree) if tree else "") or row.title) + "\n")
    options = (
        next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == attribute), None) if tree else None
    )
    body = options.body if options else []
    fields = [n for n in body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
    if fields:
        print("Options:")
    for field in fields:
        after = body[body.index(field) + 1 : body.index(field) + 2]
        text = (
            after[0].value.value
            if after and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant)
            else ""
        )
        default = f" = {ast.unparse(field.value)}" if field.value else ""
        print(f"  {ast.unparse(field.target)}: {ast.unparse(field.annotation)}{default}\n      {text}")
    result = Path("results") / f"{row.slug}.json"
    if result.exists():
        r = json.loads(result.read_text("utf8"))
        print(f"\nMeasured: {r['metric']} {r['value']} against {r['baseline_value']} ({r['baseline']}), {r['world']}")
    print(f"\nRun it: pertoken {row.room} {row.slug} --help")


@dataclasses.dataclass
class _ScoreArgs:
    """Put credit on the tokens of responses."""

    data: str | None = None
    """Rows to score (JSONL, Parquet, Hub id); every response of every row."""
    prompt: str = ""
    """Or one prompt..."""
    response: str | None = None
    """...and one response."""
    model: str = "smollm2"
    """Model whose tokens carry the credit, and which scores where the method needs one."""
    reference: str | None = None
    """Reference model, for methods that compare two."""
    system: str | None = None
    """System turn put before every text prompt."""
    limit: int | None = 8
    """Rows at most."""
    set: tuple[str, ...] = ()
    """Options of the methods: METHOD.NAME=VALUE or NAME=VALUE."""
    save: Path | None = None
    """Write the credits as JSONL."""
    html: Path | None = None
    """Write a page of heatmaps."""


def _score(words: Sequence[str]) -> None:
    from . import api, show
    from .catalog import method
    from .core.credit import save_credits
    from .core.data import Example, load_examples
    from .core.lm import load
    from .run_file import checked

    slugs, rest = _leading(words)
    args = _parse(_ScoreArgs, rest, "score METHOD [METHOD...]", "Put credit on the tokens of responses.")
    if not slugs:
        raise ValueError(
            "name a method: pertoken score vader --response '...'; pertoken methods --room score lists them"
        )
    settings = {s: checked(method(s)(), given, s) for s, given in _settings(args.set, slugs).items()}
    lm = load(args.model)
    reference = load(args.reference) if args.reference else None
    scorers = [api.make_scorer(s, lm, reference, **settings[s]) for s in slugs]
    if args.response is not None:
        examples = [Example(prompt=args.prompt, responses=(args.response,), kind="sft")]
    elif args.data:
        examples, report = load_examples(args.data, limit=args.limit)
        for line in report.lines():
            _say(line)
    else:
        raise ValueError("nothing to score: give --data FILE, or --prompt and --response")
    credits, traces, report = api.score_rows(scorers, examples, lm, system=args.system)
    for line in report.lines():
        _say(line)
    if args.save:
        print(save_credits([c for some in credits for c in some], args.save))
    groups = [list(some) for some in zip(*credits, strict=True)]
    if args.html:
        body = "\n".join(show.heatmap_html(group) for group in groups)
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(show.page("Token credit: " + ", ".join(slugs), body), "utf8")
        print(args.html)
    if not args.html or len(traces) <= 3:
        for group in groups:
            show.heatmap(group)


def _train_kind(slug: str) -> Any:
    """The options of one command: the method's own first, the run's after them, all without prefixes."""
    from .api import TrainOptions
    from .catalog import method

    own, run = _typed(method(slug)), _on_one_screen(TrainOptions)
    fields = [
        ("method", own, dataclasses.field(default_factory=own)),
        ("run", run, dataclasses.field(default_factory=run)),
    ]
    return dataclasses.make_dataclass("Train", fields)


def _generate(words: Sequence[str]) -> None:
    from . import generation
    from .catalog import method

    slugs, rest = _leading(words)
    row = _one_of(slugs, "generate", "generate", "generates", "sampling --prompt '...'")
    args = _parse(_two(method(row.slug), generation.GenerateOptions), rest, f"generate {row.slug}", row.title)
    alone = args.run.n == 1 and len(args.run.prompt) + bool(args.run.data) == 1 and not args.run.data
    shown: list[bytes] = []

    def stream(token: Any) -> None:
        shown.append(token.piece)
        sys.stdout.buffer.write(token.piece)
        sys.stdout.buffer.flush()

    prompts, drawn = generation.generate(row.slug, args.run, args.method, stream=stream if alone else None, say=_say)
    if shown:
        print()
        if drawn[0][0].meta.get("posterior"):
            generation.tell_particles(drawn[0][0], print)
    else:
        generation.tell(prompts, drawn, print)
    for path in generation.write(prompts, drawn, row.slug, args.run):
        _say(str(path))


def _on_one_screen(kind: type[Any]) -> type[Any]:
    """The options of a run without one that only a run file needs to say (keep): thirty are enough for one help."""
    import typing

    import tyro

    from .core.loop import LoopConfig

    hidden = [("keep", typing.Annotated[int, tyro.conf.Suppress], dataclasses.field(default=LoopConfig().keep))]
    loop = dataclasses.make_dataclass("LoopConfig", hidden, bases=(LoopConfig,), frozen=True, kw_only=True)
    shown = [("loop", loop, dataclasses.field(default_factory=loop))]
    run = dataclasses.make_dataclass(kind.__name__, shown, bases=(kind,), frozen=True, kw_only=True)
    loop.__doc__, run.__doc__ = LoopConfig.__doc__, kind.__doc__
    return run


def _typed(kind: type[Any]) -> type[Any]:
    """The options as a command line can give them: without those that only Python can (a scorer, a callable: annotated
    Any), and as text where text will do (a model or its folder, a constraint or how it is written: str | Any)."""
    import typing

    import tyro

    hints, fields = typing.get_type_hints(kind), []
    for f in dataclasses.fields(kind):
        hint, among = hints[f.name], typing.get_args(hints[f.name])
        if hint is Any:
            shown_as, default = typing.Annotated[Any, tyro.conf.Suppress], dataclasses.field(default=f.default)
        elif Any in among and str in among:
            shown_as, default = str if isinstance(f.default, str) else str | None, dataclasses.field(default=f.default)
        elif f.default_factory is hint and (inner := _typed(hint)) is not hint:
            shown_as, default = inner, dataclasses.field(default_factory=inner)
        else:
            continue
        fields.append((f.name, shown_as, default))
    if not fields:
        return kind
    shown = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)
    shown.__doc__ = kind.__doc__
    return shown


def _train(words: Sequence[str]) -> None:
    from . import api
    from .catalog import about

    slugs, rest = _leading(words)
    if len(slugs) != 1:
        raise ValueError(
            "name one method: pertoken train dpo --data pairs.jsonl; pertoken methods --room train lists them"
        )
    row = about(slugs[0])
    if row.room != "train":
        raise ValueError(
            f"{row.slug} is of the {row.room} room and trains nothing; pertoken methods --room train lists those"
        )
    from .run_file import read_run_file, without_config, write_run_file

    rest, config = without_config(rest)
    kind = _train_kind(row.slug)
    default = read_run_file(config, kind()) if config else kind()
    text = f"{row.title}. A YAML run file may hold the same options: --config FILE."
    args = _parse(kind, rest, f"train {row.slug}", text, default)
    record = api.align(row.slug, args.run, args.method, say=_say)
    write_run_file(Path(args.run.out) / "run.yaml", row.slug, args)
    final = record["final"]
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "loss"):
        if name in final:
            print(f"{name:<26} {final[name]:.4f}")
    print(f"{'model':<26} {Path(args.run.out) / 'model'}\n{'record':<26} {Path(args.run.out) / 'results.json'}")


def _compare(words: Sequence[str]) -> None:
    from . import comparison

    if not words or words[0] not in ("train", "explain"):
        raise ValueError(
            "compare what? pertoken compare train dpo t-reg --data pairs.jsonl --seeds 1 2 3, or "
            "pertoken compare explain reagent sar --prompt '...'"
        )
    if words[0] == "explain":
        return _compare_explain(words[1:])
    slugs, rest = _leading(words[1:])
    kind = _on_one_screen(comparison.CompareOptions)
    args = _parse(kind, rest, "compare train METHOD METHOD...", "Train methods side by side.")
    settings = _settings(args.set, [s.partition("=")[0] for s in slugs])
    print(comparison.compare_train(slugs, args, settings, say=_say).report)


def _compare_explain(words: Sequence[str]) -> None:
    from . import explanation

    slugs, rest = _leading(words)
    if len(slugs) < 2:
        raise ValueError(
            "name two methods or more: pertoken compare explain reagent:max_steps=60 sar --prompt '...' --html p.html"
        )
    args = _parse(explanation.ExplainOptions, rest, "compare explain METHOD METHOD...", "Explain side by side.")
    _told(explanation.explain(slugs, args, say=_say), args)


def _explain(words: Sequence[str]) -> None:
    from . import explanation
    from .catalog import method

    slugs, rest = _leading(words)
    row = _one_of(slugs, "explain", "explain", "explains", "sar --prompt '...'")
    args = _parse(_two(method(row.slug), explanation.ExplainOptions), rest, f"explain {row.slug}", row.title)
    _told(explanation.explain(slugs, args.run, [args.method], say=_say), args.run)


def _told(found: Any, options: Any) -> None:
    from . import explanation, show

    explanation.tell(found, print)
    if not options.html:
        for credits, _ in explanation.figures(found)[:8]:
            show.heatmap(credits)
    for path in explanation.write(found, options):
        _say(str(path))


def _tokenize(words: Sequence[str]) -> None:
    from . import explanation
    from .catalog import method

    slugs, rest = _leading(words)
    row = _one_of(slugs, "tokenize", "pieces", "cuts", "stochastok --text '...'")
    args = _parse(_two(method(row.slug), explanation.TokenizeOptions), rest, f"tokenize {row.slug}", row.title)
    for rows in explanation.tokenize(row.slug, args.run, args.method):
        for name, pieces in rows.items():
            print(f"{name:<14}{len(pieces):>5}  {'|'.join(pieces)}")


def _one_of(slugs: Sequence[str], room: str, attribute: str, does: str, example: str) -> Any:
    """The row of the one method that is named, which must be of the room and usable from here."""
    from .catalog import about, method

    if len(slugs) != 1:
        raise ValueError(f"name one method: pertoken {room} {example}; pertoken methods --room {room} lists them")
    row = about(slugs[0])
    if row.room != room or not hasattr(method(row.slug), attribute):
        raise ValueError(
            f"{row.slug} is of the {row.room} room and {does} nothing here; pertoken methods --room {room} lists what "
            "does"
        )
    return row


def _two(own: type[Any], run: type[Any]) -> Any:
    """One command's options: the method's own, then the run's."""
    typed = _typed(own)
    kinds = [
        ("method", typed, dataclasses.field(default_factory=typed)),
        ("run", run, dataclasses.field(default_factory=run)),
    ]
    return dataclasses.make_dataclass("Command", kinds)


@dataclasses.dataclass
class _CheckArgs:
    """Check that recorded log-probs are those of a fresh forward."""

    model: str = "smollm2"
    dtype: str = "float32"
    prompts: int = 4
    """Prompts to sample from."""
    samples: int = 4
    """Completions a prompt."""
    tokens: int = 24
    """Longest completion."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def _check(words: Sequence[str]) -> int:
    if not words or words[0] != "logprobs":
        raise ValueError("check what? pertoken check logprobs --model smollm2")
    args = _parse(_CheckArgs, words[1:], "check logprobs", "Sample, then recompute the log-probs packed.")
    from .core.lm import load
    from .core.rollout import Sampling, check_logprobs, sample
    from .worlds.sentiment import prompts

    lm = load(args.model, dtype=args.dtype)
    sampling = Sampling(max_new_tokens=args.tokens, temperature=args.temperature, top_p=args.top_p)
    traces = sample(lm, prompts()["test"][: args.prompts], args.samples, sampling, seed=args.seed)
    found = check_logprobs(lm, [t for group in traces for t in group])
    good = found["max_difference"] <= found["bound"]
    print(
        f"{int(found['tokens'])} tokens: largest difference {found['max_difference']:.2e}, mean "
        f"{found['mean_difference']:.2e} nats; {args.dtype} bound {found['bound']:g}: {'ok' if good else 'EXCEEDED'}"
    )
    return 0 if good else 1


def _view(words: Sequence[str]) -> None:
    from . import show
    from .core.credit import load_credits

    paths, rest = _leading(words)
    if len(paths) != 1 or "--help" in rest:
        print("usage: pertoken view CREDITS.jsonl [--html PAGE] | RUN_FOLDER")
        return
    path = Path(paths[0])
    if path.is_dir():
        page = path / "report.html"
        if page.exists():
            print(page)
            return
        from .comparison import show_run

        show_run(path)
        return
    if not path.exists():
        raise ValueError(f"there is no file {path}; make one with pertoken score METHOD --save {path}")
    credits = load_credits(path)
    by_tokens: dict[Any, list[Any]] = {}
    for credit in credits:
        key = (credit.trace.tokenizer, credit.trace.prompt_ids, credit.trace.completion_ids)
        by_tokens.setdefault(key, []).append(credit)
    if rest[:1] == ["--html"] and len(rest) == 2:
        Path(rest[1]).write_text(show.page(path.name, "\n".join(map(show.heatmap_html, by_tokens.values()))), "utf8")
        print(rest[1])
        return
    for group in by_tokens.values():
        show.heatmap(group)


def _demo(words: Sequence[str]) -> None:
    from .demo import DemoOptions, demo

    args = _parse(DemoOptions, words, "demo", "The main job: align SmolLM2 with token-level credit, in one command.")
    print(demo(args, say=_say))


def _leading(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, and the rest."""
    n = next((i for i, w in enumerate(words) if w.startswith("-")), len(words))
    return list(words[:n]), list(words[n:])


def _settings(pairs: Sequence[str], slugs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``t-reg.alpha=0.5`` and ``beta=0.1`` as options by method; values are read as YAML."""
    from .run_file import value_of

    out: dict[str, dict[str, Any]] = {s: {} for s in slugs}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        slug, dot, option = name.partition(".")
        if not equals or (dot and slug not in out):
            raise ValueError(f"--set {pair}: write METHOD.OPTION=VALUE with a method of {', '.join(slugs)}")
        for target in [slug] if dot else list(out):
            out[target][option if dot else name] = value_of(value, f"--set {pair}")
    return out


_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int | None]]] = {
    "demo": ("the main job in one command: sample, score, train, compare, report", _demo),
    "methods": ("list the catalog", _methods),
    "about": ("tell what a method is: equation, options, measured figure", _about),
    "score": ("put credit on the tokens of responses", _score),
    "train": ("train a model by a method", _train),
    "generate": ("continue prompts by a method, with weights and credit", _generate),
    "explain": ("what tokens say of an answer, and what it came from", _explain),
    "tokenize": ("cut text as a method does", _tokenize),
    "compare": ("train or explain by several methods side by side", _compare),
    "check": ("check a promise of the library on your model", _check),
    "view": ("look at saved credits or at a run", _view),
}

if __name__ == "__main__":
    sys.exit(main())
