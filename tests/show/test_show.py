"""Heatmaps and reports: what is escaped, what is visible, what is said in numbers, and that a page stands alone."""

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pertoken.core.credit import Credit
from pertoken.core.trace import Trace
from pertoken.show import (
    Column,
    Frontier,
    Heatmaps,
    Interval,
    Lines,
    Point,
    Prose,
    Provenance,
    Series,
    Table,
    build_report,
    heatmap,
    heatmap_html,
    page,
)
from pertoken.show._tokens import PART, shown
from pertoken.show.tables import best_of


def cut(*pieces, **given: Any):
    data = tuple(p.encode() if isinstance(p, str) else p for p in pieces)
    options: dict[str, Any] = {"prompt_ids": (3,), "prompt_pieces": (b"How <was> it?",), "tokenizer": "toy"} | given
    return Trace(completion_ids=tuple(range(10, 10 + len(data))), completion_pieces=data, **options)


def credit(trace, values, **options):
    return Credit(trace=trace, values=np.array(values, float), **options)


class Tree(HTMLParser):
    """Checks that tags nest, and collects tags, ids, references and the text."""

    VOID = ("meta", "br", "input", "path", "use", "rect", "circle", "image", "stop")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        self.see(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.see(attrs)

    def see(self, attrs):
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.refs += re.findall(r"url\((.*?)\)", value or "")
            self.refs += [value] if name in ("src", "href", "xlink:href") else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def tokens(html):
    return [attrs for _, attrs in Tree(html).tags if attrs.get("class", "").split()[:1] == ["t"]]


def printed(credits, title=None, **options):
    out = io.StringIO()
    heatmap(credits, title=title, console=Console(file=out, width=80, **options))
    return out.getvalue()


# What a token looks like


def test_shown_makes_everything_visible():
    emoji = "😀".encode()
    trace = cut("a\n", "\t", "\x1b[31m", emoji[:2], emoji[2:] + b"!", b"\xff", b"", ended=True)
    got = shown(trace)
    assert [t.text for t in got] == ["a⏎", "⇥", "␛[31m", PART, "😀!", "�", "<end>"]
    assert [t.lines for t in got] == [1, 0, 0, 0, 0, 0, 0]
    assert [t.role for t in got] == ["text", "text", "text", "part", "text", "text", "special"]
    assert got[3].raw == "bytes f0 9f"


def test_shown_of_cut_characters_specials_and_given_tokens():
    assert [t.text for t in shown(cut("x", b"\xf0\x9f", b"", ended=False))] == ["x", "�", "<12>"]
    trace = cut("a", "b", emitted=(True, False), prompt_ids=(3, 4), prompt_pieces=(b"", b"q"))
    assert [(t.text, t.role) for t in shown(trace, "all")] == [
        ("<3>", "special"),
        ("q", "text"),
        ("a", "text"),
        ("b", "given"),
    ]
    assert shown(cut()) == []


# Terminal


def test_terminal_says_in_numbers_what_it_says_in_colour():
    text = printed(credit(cut(" good", " bad", " so"), [0.5, -0.25, 0], method="vader"), title="An answer")
    assert "An answer" in text and " good bad so" in text
    assert "−0.5" in text and "+0.5" in text and "sum +0.25" in text and "3 tokens" in text and "vader reward" in text
    assert "“good” +0.5, “bad” −0.25" in text


def test_what_a_credit_reads_is_said_wherever_it_is_drawn():
    learnt = credit(cut(" a"), [1], kind="weight", meta={"reads": "the state before each token"})
    assert "reads the state before each token" in " ".join(printed(learnt).split())
    assert "reads the state before each token" in Tree(heatmap_html(learnt)).text
    assert "reads" not in printed(credit(cut(" a"), [1]))


def test_terminal_colours_by_sign_and_leaves_zero_alone():
    text = printed(credit(cut("p", "n", "z"), [1, -1, 0]), force_terminal=True, color_system="truecolor")
    first = text.splitlines()[0]
    assert "48;2;52;146;244mp" in first and "48;2;240;112;32mn" in first and first.endswith("z")
    level = printed(credit(cut("p"), [1], kind="entropy"), force_terminal=True, color_system="truecolor")
    assert "48;2;20;168;140mp" in level and "mean 1" in level


def test_terminal_of_nothing_and_of_escape_codes():
    assert "0 tokens" in printed(credit(cut(), []))
    assert "all zero" in printed(credit(cut("a"), [0]))
    assert "\x1b" not in printed([credit(cut("\x1b[2J"), [1.0])] * 2)


# HTML heatmaps


def test_html_escapes_tokens_titles_and_prompts():
    html = heatmap_html(credit(cut("<script>", 'alert("x")', "</script>"), [1, 0, -1]), titles=["<b>mine</b>"])
    tree = Tree(html)
    assert {"script", "b"}.isdisjoint({tag for tag, _ in tree.tags})
    assert '<script>alert("x")</script>' in tree.text and "<b>mine</b>" in tree.text and "How <was> it?" in tree.text


def test_html_says_token_id_and_value_to_four_digits():
    first, second = tokens(heatmap_html(credit(cut(" good", "\n"), [0.123456, 0])))
    assert first["title"] == first["aria-label"] == "' good', id 10: +0.1235"
    assert "p" in first["class"].split() and first["style"] == "--s:1.000"
    assert second["class"] == "t" and "style" not in second and second["data-v"] == "0"


def test_html_stacks_credits_of_one_trace_on_a_shared_scale_with_a_switch():
    trace = cut("a", "b")
    html = heatmap_html([credit(trace, [1, -4]), credit(trace, [2, 0]), credit(trace, [5, 9], kind="entropy")])
    styles = [t.get("style") for t in tokens(html)]
    assert html.count("<figure") == 1 and html.count('type="checkbox"') == 1
    assert styles == ["--s:0.250", "--s:1.000", "--s:0.500;--o:1.000", None, "--s:0.556", "--s:1.000"]
    zero = heatmap_html([credit(trace, [1, 0]), credit(trace, [0, 0])])
    assert 'class="pt-legend ls">−1<' in zero and 'class="pt-legend lo">all zero' in zero
    apart = heatmap_html([credit(trace, [1, 0]), credit(cut("c"), [1])])
    assert apart.count("<figure") == 2 and "checkbox" not in apart
    with pytest.raises(ValueError, match="1 titles for 2 credits"):
        heatmap_html([credit(trace, [1, 0])] * 2, titles=["one"])


def test_html_scale_ignores_a_terminator_that_dwarfs_the_words():
    html = heatmap_html(credit(cut("a", "b", b"", ended=True), [1, 2, -40]))
    assert [t["style"] for t in tokens(html)] == ["--s:0.500", "--s:1.000", "--s:1.000"]


def test_html_keeps_right_to_left_text_together():
    html = heatmap_html(credit(cut("فيلم", " جميل"), [1, -1]))
    assert 'class="pt-toks" dir="auto"' in html and "فيلم جميل" in Tree(html).text
    assert heatmap_html([]) == "" and "pt-toks" in heatmap_html(credit(cut(), []))


def test_page_stands_alone():
    html = page("A <title>", heatmap_html(credit(cut("a"), [1])))
    tree = Tree(html)
    assert html.startswith("<!doctype html>") and "A &lt;title&gt;" in html
    assert tree.refs == [] and "http" not in re.sub(r"http-equiv", "", html)
    assert "default-src 'none'" in html and "light-dark(" in html


# Reports


def report(tmp_path, **options):
    trace = cut("fine", " film")
    x = [0, 1, 2]
    runs = Series.of_runs("T-REG", x, [[1, 2, 3], [2, 3, 4]])
    sections = [
        Prose(title="What <was> done", text="One **bold** and *soft* `x<y`.\n\n- a\n- [b](https://example.org)"),
        Table(
            title="Figures",
            columns=[Column("r", "reward", "high", 2), Column("n", "steps")],
            rows=[
                {"name": "base", "r": Interval(0.1, 0.0, 0.2), "n": 3},
                {"name": "T-REG", "r": Interval(0.5, 0.4, 0.6), "n": None, "note": "ours"},
            ],
        ),
        Lines(title="Curves", panels={"loss": [Series(name="base", x=x, y=[1, 1, 1]), runs], "margin": [runs]}),
        Frontier(title="Cost", points=[Point(name="base", x=0, y=0), Point(name="T-REG", x=1, y=1, y_interval=(0, 2))]),
        Heatmaps(title="Words", groups=[[credit(trace, [1, -1])]], titles=[["mine"]]),
        Provenance(data={"seed": 0, "note": "</pre><script>"}),
    ]
    facts = [("reward", "0.5", "0.4 to 0.6")]
    return build_report(tmp_path, title="A & B", summary="It *works*.", facts=facts, sections=sections, **options)


def test_series_of_runs_is_mean_and_range():
    series = Series.of_runs("a", [0, 1], [[1, 2], [3, 6]])
    assert (list(series.y), list(series.low), list(series.high)) == ([2, 4], [1, 2], [3, 6])
    assert Series.of_runs("a", [0, 1], [[1, 2]]).low is None


def test_report_is_one_whole_file(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'pertoken[plots]'")
    path = report(tmp_path, baseline="base")
    html = path.read_text(encoding="utf8")
    assert path == tmp_path / "report.html" and list(tmp_path.iterdir()) == [path]
    tree = Tree(html)
    assert len(tree.ids) == len(set(tree.ids))
    outside = [r for r in tree.refs if not (r.startswith("#") and r[1:] in tree.ids)]
    assert outside == ["https://example.org"]  # a link of the author's, nothing that is fetched
    assert [a["href"] for t, a in tree.tags if t == "a"][:6] == [f"#s{k}" for k in range(1, 7)]
    assert html.count('class="pt-how"') == 5 and html.count("<svg role") == 4
    assert "#f0" not in html.split("</style>")[1], "a placeholder colour was left"
    assert "var(--base)" in html and "var(--c0)" in html and "</pre><script>" not in html
    assert '<tr style="--c:var(--c0)"><th scope="row"><span class="pt-chip"></span>T-REG<small>ours' in html
    assert "<b>bold</b> and <em>soft</em> <code>x&lt;y</code>" in html and "<li>a</li>" in html
    assert report(tmp_path / "again.html", baseline="base").read_text(encoding="utf8") == html, "not deterministic"


def test_report_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = report(tmp_path / "deep" / "r.html").read_text(encoding="utf8")
    assert html.count("pertoken[plots]") == 2 and "<svg role" not in html


def test_best_is_marked_only_when_intervals_separate():
    a, b, c = Interval(1, 0.9, 1.1), Interval(2, 1.2, 3), Interval(2, 1.05, 3)
    assert best_of([a, b], "high") == 1 and best_of([a, b], "low") == 0
    assert best_of([a, c], "high") is None and best_of([a, b], None) is None
    assert best_of([a, b, 0.5], "high") is None, "a bare number cannot be told apart"
    assert best_of([a, b, None], "high") == 1 and best_of([a], "high") is None
    assert best_of([a, Interval(float("nan"), 0, 1)], "high") is None
    table = Table(title="t", columns=[Column("r", "r", "high")], rows=[{"name": "x", "r": a}, {"name": "y", "r": c}])
    assert "No row is marked" in table.html({"x": 0, "y": 1})


def test_import_is_light_and_names_are_known():
    code = (
        "import sys, pertoken.show as s; s.heatmap, s.heatmap_html, s.build_report, s.Lines; "
        "bad = {'torch', 'matplotlib', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import pertoken.show

    with pytest.raises(AttributeError, match="heatmap_html"):
        _ = pertoken.show.heatmaps
    assert all(getattr(pertoken.show, name) for name in dir(pertoken.show))
