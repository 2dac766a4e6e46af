"""The command line: what a user types, what comes back, and sentences for what is wrong."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pertoken.catalog import methods
from pertoken.cli import main
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model as a folder."""
    import torch

    folder = tmp_path_factory.mktemp("model")
    return str(tiny.lm(dtype=torch.float32).save(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": f"film {i}", "chosen": f"great plot {i}", "rejected": "dull"} for i in range(12)]
    rows.append({"prompt": "film", "chosen": " ", "rejected": "dull"})
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_methods_lists_without_torch():
    script = "import sys; from pertoken.cli import main; main(['methods']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "t-reg" in out and "2412.02685" in out and out.strip().endswith("False")


@pytest.mark.parametrize("slug", [row.slug for row in methods() if row.room == "train"])
def test_every_training_method_shows_its_options(slug, capsys):
    """No name of an option is one of the run's, too: nested groups are flattened."""
    with pytest.raises(SystemExit) as ended:
        main(["train", slug, "--help"])
    assert ended.value.code == 0 and "method options" in capsys.readouterr().out


def test_about_shows_equation_and_options(capsys):
    assert main(["about", "dpo"]) == 0
    said = capsys.readouterr().out
    assert "log sigmoid" in said and "label_smoothing" in said and "2305.18290" in said


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["about", "t-rge"], "did you mean t-reg"),
        (["trian"], "did you mean train"),
        (["train", "vader"], "trains nothing"),
        (["train"], "name one method"),
        (["train", "dpo"], "no data"),
        (["score", "dpo", "--response", "x"], "scores nothing"),
        (["compare", "train", "dpo", "--set", "beta"], "METHOD.OPTION=VALUE"),
        (["compare", "train", "dpo", "--set", "gamma=1"], "no option 'gamma'"),
        (["compare", "train", "dpo", "kto"], "takes unpaired data"),
        (["view", "nowhere.jsonl"], "there is no file"),
        (["train", "dpo", "--config", "nowhere.yaml"], "no run file"),
    ],
)
def test_mistakes_get_a_sentence(words, hint, capsys, model):
    if words[0] in ("train", "score", "compare") and len(words) > 1:
        words = [*words, "--model", model]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1


def test_train_writes_a_model_a_record_and_a_run_file(tmp_path, model, data, capsys):
    out = tmp_path / "run"
    words = ["train", "dpo", "--beta", "0.2", "--data", data, "--model", model, "--out", str(out)]
    assert main([*words, "--steps", "2", "--batch-size", "4"]) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["options"]["beta"] == 0.2 and record["updates"] == 2
    assert any("empty" in note for note in record["notes"])  # the bad row is counted in the record
    assert (out / "model" / "model.safetensors").exists()
    assert main([*words, "--steps", "2", "--batch-size", "4"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    again = tmp_path / "again"
    assert main(["train", "dpo", "--config", str(out / "run.yaml"), "--out", str(again)]) == 0
    other = json.loads((again / "results.json").read_text())
    assert other["final"]["loss"] == record["final"]["loss"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    rows = [
        {"prompt": f"film {i}", "chosen": f"great plot {i}", "rejected": "dull", "score_chosen": 7 + i % 3}
        | {"score_rejected": None if i == 5 else 2.5}
        for i in range(24)
    ]
    path = tmp_path_factory.mktemp("scored") / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_a_transform_goes_before_any_objective(tmp_path, model, scored, capsys):
    words = ["--data", scored, "--model", model, "--steps", "2", "--batch-size", "4", "--system", "Be brief."]
    goal = "reward-augmented:goal.sentence=aim {goal},order=blocks"
    assert main(["train", "simpo", *words, "--transform", goal, "--out", str(tmp_path / "s")]) == 0
    assert "refused 1: a score is not a number (row 5)" in capsys.readouterr().err
    again = ["train", "simpo", "--config", str(tmp_path / "s" / "run.yaml"), "--out", str(tmp_path / "a")]
    assert main(again) == 0
    out = str(tmp_path / "c")
    assert main(["compare", "train", "dpo", "ipo", *words, "--transform", "reward-augmented", "--out", out]) == 0
    capsys.readouterr()
    for wrong, hint in (
        ("dpo", "transforms no data"),
        ("reward-augmented:tie", "NAME=VALUE"),
        ("reward-augmented:ties=keep", "no option 'ties'"),
    ):
        assert main(["train", "simpo", *words, "--transform", wrong, "--out", str(tmp_path / "w")]) == 2
        assert hint in capsys.readouterr().err
    assert main(["train", "kto", *words, "--transform", "reward-augmented", "--out", str(tmp_path / "k")]) == 2
    assert "rewrites pairs" in capsys.readouterr().err


def test_a_transform_finds_the_system_turn_and_both_sides(scored):
    from pertoken.api import TrainOptions, training_data

    options = TrainOptions(data=scored, system="Be brief.", transform="reward-augmented:goal.sentence=aim {goal}")
    groups, held_out, report = training_data("pairs", options, tiny.lm(), lambda line: None)
    assert len(groups) + len(held_out) == report.kept == 46 and held_out
    for group in (*groups, *held_out):
        text = group.traces[0].prompt_text
        assert text.count("aim ") == 1 and "\n\nBe brief." in text and text.count("system\n") == 1
    assert not {g.example.row for g in groups} & {g.example.row for g in held_out}, "both rows of a pair on one side"


def test_the_runs_options_fit_on_a_screen(capsys):
    with pytest.raises(SystemExit):
        main(["train", "dpo", "--help"])
    flags = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ --")]
    assert len(flags) - 2 <= 30  # without DPO's own two


def test_unknown_option_in_a_run_file_is_named(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("method: {betta: 1}")
    assert main(["train", "dpo", "--config", str(path)]) == 2
    assert "'betta'" in capsys.readouterr().err


def test_values_of_options_are_of_their_types(tmp_path, capsys):
    """YAML reads 1e-5 as text and takes any value for any option."""
    import yaml

    from pertoken.api import make_method
    from pertoken.cli import _settings, _train_kind
    from pertoken.run_file import merged, read_run_file

    path = tmp_path / "run.yaml"
    path.write_text("method: {beta: 1e-2}\nrun: {loop: {lr: 1e-5, steps: 3}}")
    read = read_run_file(path, _train_kind("dpo")())
    assert (read.method.beta, read.run.loop.lr, read.run.loop.steps) == (0.01, 1e-5, 3)
    assert make_method("reagent:max_steps=6e1,stop.rationale_ratio=1e-1")[1].max_steps == 60
    assert make_method("reagent:fixed=[1,2],stop.among=0")[1].fixed == (1, 2)
    assert make_method("stochastok:cap=null")[1].cap is None and make_method("stochastok:cap=2")[1].cap == 2
    assert make_method("sar:t=1,join=', '")[1].join == ", " and make_method('sar:join="a,b",t=1')[1].t == 1
    assert make_method("reward-transform:references={values: {a: [1], b: [2]}, default: [3]},q=0.5")[1].q == 0.5
    assert make_method("sar:join=it's,t=1")[1].join == "it's" and make_method("sar:join=' it''s, so',t=1")[1].t == 1
    assert repr(make_method("genarm:alpha=[1,2e-1]")[1].alpha) == "(1.0, 0.2)"
    assert make_method("sparsepo:normalize_mask=off")[1].normalize_mask == "off"  # to YAML, off is false
    assert _settings(["beta=1e-1", "x.name=e5"], ["x"]) == {"x": {"beta": 0.1, "name": "e5"}}
    for words, hint in (
        ("reagent:max_steps=soon", "max_steps='soon' is no int"),
        ("reagent:max_steps=", "max_steps=None is no int"),
        ("reagent:max_steps=1.5", "is no int"),
        ("reagent:max_steps=true", "is no int"),
        ("reagent:max_steps.x=1", "is no int"),
        ("reagent:max_steps=.inf", "is no int"),
        ("stochastok:cap=1e999", "is no int | None"),
        ("reagent:stop=3", "is a group of options"),
        ("reagent:max_steps.y=2,max_steps=1", "max_steps is given twice"),
        ("sar:join=3", "is no str; give one, in quotes"),
        ("arm-reward:lm=folder", "is no pertoken.core.lm.LM | None"),
        ("reasoning-sql:judge=fair", "judge='fair' is no"),
        ("reward-transform:references.values={a: 1}", "is no dict[str, tuple[float, ...]]"),
        ("aligndistil:mode=true", "mode=True is no Literal"),
        ("reagent:init=one", "is no Literal['zero', 'uniform']"),
        ("reagent:fixed=[1,b]", "is no tuple[int, ...]"),
        ("stochastok:cap=few", "is no int | None"),
        ("reagent:max_steps=1,max_steps.y=2", "max_steps is given a value and options of its own"),
        ("reagent:max_steps={a", "mend what YAML cannot read"),
    ):
        with pytest.raises(ValueError) as error:
            make_method(words)
        assert hint in str(error.value)
    path.write_text("method: {1: 2}")
    with pytest.raises(ValueError, match="there is no option 1"):
        read_run_file(path, _train_kind("dpo")())
    path.write_text("method: {beta: [")
    assert main(["train", "dpo", "--config", str(path)]) == 2
    assert "run.yaml" in capsys.readouterr().err
    whole = _train_kind("dpo")()
    assert merged(whole, yaml.safe_load("run: {out: there}"), "x").run.out in ("there", Path("there"))


def test_every_methods_run_file_reads_back(tmp_path):
    """What was written is what is read, types and all, also where an option is a table."""
    from pertoken.api import make_method
    from pertoken.catalog import method, methods
    from pertoken.run_file import read_run_file, write_run_file

    told = [method(row.slug)() for row in methods() if dataclasses.is_dataclass(method(row.slug))]
    told.append(make_method("reward-transform:references={values: {a: [1, 2.5]}, default: [0]}")[1])
    for options in told:
        read = read_run_file(write_run_file(tmp_path / "run.yaml", "x", options), type(options)())
        assert (read, repr(read)) == (options, repr(options))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["compare", "train", "dpo", "kto", "--set", "dpo.beta=much"], "dpo: beta='much' is no float; give one"),
        (["compare", "train", "mine=dpo", "--set", "mine.beta=true"], "mine: beta=True is no float; give one"),
        (["score", "vader", "--response", "x", "--set", "level=3"], "vader: level=3 is no"),
        (["score", "vader", "--response", "x", "--set", "levle=token"], "no option 'levle'"),
    ],
)
def test_set_values_are_of_their_types(words, hint, capsys, model):
    assert main([*words, "--model", model]) == 2
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1


def test_score_saves_and_view_draws(tmp_path, model, data, capsys):
    saved, page = tmp_path / "credit.jsonl", tmp_path / "page.html"
    words = ["score", "vader", "--data", data, "--model", model, "--limit", "2"]
    assert main([*words, "--save", str(saved), "--html", str(page)]) == 0
    assert len(saved.read_text().splitlines()) == 4 and "<html" in page.read_text()
    assert main(["view", str(saved)]) == 0
    assert "great" in capsys.readouterr().out


def test_compare_ends_with_a_report(tmp_path, model, data, capsys):
    words = ["compare", "train", "dpo", "soft=dpo", "--set", "soft.label_smoothing=0.2", "--data", data]
    options = ["--model", model, "--steps", "2", "--batch-size", "4", "--seeds", "1", "2", "--sample-tokens", "4"]
    options += ["--reward", "vader"]  # so that the report has its frontier
    assert main([*words, *options, "--out", str(tmp_path / "c")]) == 0
    report = capsys.readouterr().out.strip().splitlines()[-1]
    assert "soft" in Path(report).read_text("utf8")
    record = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [(o["arm"], o["seed"]) for o in record["outcomes"]] == [("dpo", 1), ("dpo", 2), ("soft", 1), ("soft", 2)]


def test_check_logprobs(model, capsys):
    assert main(["check", "logprobs", "--model", model, "--prompts", "2", "--samples", "2", "--tokens", "5"]) == 0
    assert "ok" in capsys.readouterr().out


TWINS = {
    "awrs": ("--constraint", "--proposal"),
    "spc": ("--verifier", "--masked"),
    "lm-cascades": ("--large", "--rule", "--peek"),
    "genarm": ("--reward-models",),
    "best-of-n": ("--reward",),
    "byte-exact": ("--ensemble",),
}


@pytest.mark.parametrize("slug", [row.slug for row in methods() if row.room == "generate"])
def test_every_decoder_shows_its_options(slug, capsys):
    """No name of an option is one of the run's, too: nested groups are flattened."""
    from pertoken.catalog import method

    if not hasattr(method(slug), "generate"):
        return
    with pytest.raises(SystemExit) as ended:
        main(["generate", slug, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--n" in shown
    for option in TWINS.get(slug, ()):  # Python may give an object, the command line its text
        assert f"{option} " in shown, option


def test_generate_streams_writes_and_tells(model, tmp_path, capfdbinary):
    base = ["--model", model, "--max-new-tokens", "4"]
    assert main(["generate", "sampling", "--prompt", "how was the film", *base]) == 0
    streamed = capfdbinary.readouterr().out
    save, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    words = ["--prompt", "how", "--n", "2", "--candidates", "2", "--save", str(save), "--html", str(page)]
    assert main(["generate", "best-of-n", *words, *base]) == 0
    told = capfdbinary.readouterr().out.decode(errors="replace")
    rows = [json.loads(line) for line in save.read_text("utf8").splitlines()]
    assert len(streamed) > 0 and told.startswith("--- prompt 0: how") and len(rows) == 2
    assert all(len(r["meta"]["rewards"]) == 2 and r["tokens"] <= 4 for r in rows)
    assert "best-of-n" in page.read_text("utf8") and (tmp_path / "out.credits.jsonl").exists()


def test_generate_shows_the_weighted_particles(model, capfdbinary):
    """The posterior is that of the particles, however few draws were asked for; deaths are said."""
    base = ["generate", "awrs", "--model", model, "--prompt", "how was the film", "--max-new-tokens", "6"]
    shares = {}
    for n in ("1", "3"):
        assert main([*base, "--constraint", "regex:[ab]", "--particles", "8", "--n", n]) == 0
        told = capfdbinary.readouterr().out.decode()
        assert "posterior of 8 particles" in told and "given regex:[ab]" in told and "among the model's: -" in told
        lines = (line.split() for line in told.splitlines() if line.startswith("   "))
        shares[n] = {text: float(share) for share, text in lines}
        assert sum(shares[n].values()) == pytest.approx(1, abs=2e-3) and shares[n].keys() <= {"a", "b"}
    assert shares["1"] == shares["3"]
    assert main([*base, "--constraint", "regex:(~#){9}", "--n", "2"]) == 0
    told = capfdbinary.readouterr().out.decode()
    assert told.count("dead (weight 0)") == 2 and "every particle died" in told


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate"], "name one method"),
        (["generate", "vader"], "generates nothing"),
        (["generate", "sampling"], "nothing to continue"),
        (["explain"], "name one method"),
        (["explain", "dpo"], "explains nothing"),
        (["explain", "sar"], "nothing to explain"),
        (["compare", "explain", "sar"], "two methods or more"),
        (["tokenize"], "name one method"),
        (["tokenize", "sar"], "cuts nothing"),
        (["tokenize", "stochastok"], "nothing to cut"),
    ],
)
def test_other_rooms_say_what_is_missing(words, hint, capsys):
    assert main(words) == 2 and hint in capsys.readouterr().err


def test_explain_compares_and_draws(model, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["--prompt", "how", "--response", "fine", "--model", model, "--html", str(page)]
    assert main(["explain", "reagent", *words, "--max-steps", "2", "--probes", "2"]) == 0
    assert "reagent, 0:" in capsys.readouterr().out and "reagent of" in page.read_text("utf8")
    both = ["reagent:max_steps=2,probes=2,stop.among=0", "sar"]
    assert main(["compare", "explain", *both, *words]) == 0
    drawn = page.read_text("utf8")
    assert "reagent of" in drawn and "sar" in drawn and "reagent, 0:" in capsys.readouterr().out
    assert main(["compare", "explain", "reagent:steps=2", "sar", *words]) == 2
    assert "steps" in capsys.readouterr().err
    saved = tmp_path / "credits.jsonl"
    base = ["--prompt", "how", "--samples", "2", "--max-new-tokens", "3", "--model", model]
    assert main(["explain", "sar", *base, "--save", str(saved)]) == 0
    assert main(["explain", "sar", "--text", "a great plot", "dull", "--model", model]) == 0
    told = capsys.readouterr().out
    assert "sar, 1:" in told and "answers 2" in told
    assert main(["explain", "sar", "--text", "", "--model", model]) == 2
    assert "text 0 is empty" in capsys.readouterr().err
    saved = tmp_path / "credits.jsonl"
    assert main(["explain", "sar", *base, "--save", str(saved)]) == 0
    assert "token_sar" in capsys.readouterr().out and len(saved.read_text("utf8").splitlines()) >= 2


def test_tokenize_shows_both_cuts(model, tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_text("the plot was great\nso", "utf8")
    assert main(["tokenize", "stochastok", "--file", str(file), "--model", model, "--proportion", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("ordinary") and lines[1].startswith("stochastok")
    assert lines[0].split("  ")[-1].replace("|", "") == lines[1].split("  ")[-1].replace("|", "")
    words = ["--file", str(file), "--model", model, "--reduction", "1", "--cache", "9"]
    assert main(["tokenize", "dynamic-tokenization", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith("dynamic-tokenization")
    assert [line.split("  ")[-1] for line in lines[1::2]] == ["the| plot| was| great", "so"]
    file.write_bytes(b"\xff\xfe")
    assert main(["tokenize", "stochastok", "--file", str(file), "--model", model]) == 2
    assert "not UTF-8 at byte 0" in capsys.readouterr().err
