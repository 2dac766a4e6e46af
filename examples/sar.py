"""Which answers are wrong? SAR against plain entropies on short questions with checkable answers, SmolLM2.

300 generated questions (capitals, sums up to 40, conversions of units), K = 5 sampled answers of at most 16 tokens at
temperature 0.5, t = 0.001, all-MiniLM as the similarity. An answer is right if the greedy one holds the gold text as a
word. AUROC of each score for "wrong"; bound: SAR at least 0.02 above both LN-PE and PE, at an accuracy of 20 to 80 %.

    python examples/sar.py           300 questions
    python examples/sar.py --n 60    fewer
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import tyro

from pertoken.core.lm import load
from pertoken.core.rollout import Sampling, sample
from pertoken.explain.sar import SAR, lexical_similarity
from pertoken.results import save_result

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Kenya": "Nairobi", "Cuba": "Havana", "Greece": "Athens", "Poland": "Warsaw", "Ireland": "Dublin",
    "Austria": "Vienna", "Portugal": "Lisbon", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Hungary": "Budapest", "Romania": "Bucharest", "Bulgaria": "Sofia", "Latvia": "Riga", "Estonia": "Tallinn",
    "Lithuania": "Vilnius", "Ukraine": "Kyiv", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Syria": "Damascus", "Jordan": "Amman", "Lebanon": "Beirut", "India": "New Delhi", "Nepal": "Kathmandu",
    "Bangladesh": "Dhaka", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta",
    "Malaysia": "Kuala Lumpur", "Mongolia": "Ulaanbaatar",
    "China": "Beijing", "Australia": "Canberra", "Canada": "Ottawa", "Chile": "Santiago",
    "Ecuador": "Quito", "Colombia": "Bogot", "Venezuela": "Caracas", "Uruguay": "Montevideo", "Bolivia": "Sucre",
    "Argentina": "Buenos Aires", "Mexico": "Mexico City", "Jamaica": "Kingston", "Haiti": "Port-au-Prince",
    "Morocco": "Rabat", "Algeria": "Algiers", "Tunisia": "Tunis", "Libya": "Tripoli", "Sudan": "Khartoum",
    "Ethiopia": "Addis Ababa", "Somalia": "Mogadishu", "Uganda": "Kampala", "Rwanda": "Kigali", "Ghana": "Accra",
    "Nigeria": "Abuja", "Senegal": "Dakar", "Mali": "Bamako", "Angola": "Luanda", "Zambia": "Lusaka",
    "Zimbabwe": "Harare", "Namibia": "Windhoek", "Botswana": "Gaborone", "Madagascar": "Antananarivo",
    "Serbia": "Belgrade", "Croatia": "Zagreb", "Slovenia": "Ljubljana", "Slovakia": "Bratislava", "Albania": "Tirana",
    "Georgia": "Tbilisi", "Armenia": "Yerevan", "Azerbaijan": "Baku", "Kazakhstan": "Astana", "Uzbekistan": "Tashkent",
}  # fmt: skip
UNITS = (
    ("centimetres", "metre", 100), ("millimetres", "centimetre", 10), ("metres", "kilometre", 1000),
    ("days", "week", 7), ("hours", "day", 24), ("minutes", "hour", 60), ("seconds", "minute", 60),
    ("months", "year", 12), ("grams", "kilogram", 1000),
    ("inches", "foot", 12), ("years", "decade", 10), ("years", "century", 100),
)  # fmt: skip
SCORES = ("sar", "sentence_sar", "token_sar", "semantic_entropy", "length_normalised_entropy", "perplexity_entropy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    n: int = 300
    """Questions."""
    answers: int = 5
    """K."""
    seed: int = 10
    save: bool = False
    """Write results/sar.json."""


def questions(n: int) -> list[tuple[str, str]]:
    """Questions with their answers, in a seeded order."""
    rng = np.random.default_rng(0)
    some = [(f"What is the capital of {country}?", city) for country, city in CAPITALS.items()]
    sums = rng.permutation(400)[:110]
    some += [(f"What is {1 + i // 20} + {1 + i % 20}?", str(2 + i // 20 + i % 20)) for i in sums.tolist()]
    some += [
        (f"How many {small} are in {k} {big}{'s' * (k > 1)}?", str(k * factor))
        for small, big, factor in UNITS
        for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    ]
    return [some[i] for i in rng.permutation(len(some))[:n]]


def right(answer: str, gold: str) -> bool:
    """Whether the gold text stands in the answer as a word (digits without separators)."""
    return re.search(rf"(?<!\w){re.escape(gold)}(?![\d])", answer.replace(",", "")) is not None


def auroc(score: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the ROC curve (ties count half)."""
    a, b = score[wrong], score[~wrong]
    return float(np.mean((a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean()))


def main(options: Options) -> None:
    """Run it and print the table."""
    lm = load("smollm2")
    asked = questions(options.n)
    prompts = [f"{q} Answer briefly." for q, _ in asked]
    greedy = sample(lm, prompts, 1, Sampling(max_new_tokens=16, temperature=0))
    wrong = np.array([not right(t.text, gold) for (t,), (_, gold) in zip(greedy, asked, strict=True)])
    drawn = sample(lm, prompts, options.answers, Sampling(max_new_tokens=16, temperature=0.5), seed=options.seed)
    credits = SAR().explain(lm, [t for some in drawn for t in some])
    found = [credits[i * options.answers][0].meta["scores"] for i in range(len(asked))]
    scores = {name: np.array([f[name] for f in found]) for name in SCORES}
    scores["1 - lexical similarity"] = np.array([1 - lexical_similarity([t.text for t in some]) for some in drawn])
    print(f"{len(asked)} questions, accuracy {1 - wrong.mean():.3f}, K = {options.answers}")
    table = {name: auroc(s, wrong) for name, s in scores.items()}
    for name, value in sorted(table.items(), key=lambda row: -row[1]):
        print(f"{name:<28}{value:.4f}")
    rng, differences = np.random.default_rng(1), {}
    for rival in ("length_normalised_entropy", "perplexity_entropy"):
        draws = []
        for _ in range(1000):
            d = rng.integers(0, len(asked), len(asked))
            if wrong[d].any() and not wrong[d].all():
                draws.append(auroc(scores["sar"][d], wrong[d]) - auroc(scores[rival][d], wrong[d]))
        differences[rival] = (table["sar"] - table[rival], *np.quantile(draws, [0.025, 0.975]).tolist())
        d, low, high = differences[rival]
        print(f"SAR less {rival}: {d:+.4f} [{low:+.4f}, {high:+.4f}]")
    reached = all(d >= 0.02 for d, *_ in differences.values()) and 0.2 <= 1 - wrong.mean() <= 0.8
    print("reached" if reached else "MISSED")
    if options.save:
        d, low, high = differences["length_normalised_entropy"]
        save_result(
            "sar",
            metric="AUROC of SAR for wrong answers, less that of length-normalised entropy",
            value=d,
            interval=(low, high),
            baseline="length-normalised entropy, AUROC",
            baseline_value=table["length_normalised_entropy"],
            bound="at least 0.02, over plain entropy, too, at an accuracy of 20 to 80 %",
            reached=bool(reached),
            world=f"SmolLM2-135M-Instruct, {len(asked)} short questions, accuracy {1 - wrong.mean():.3f}, all-MiniLM",
            seeds=[options.seed],
            notes="interval: 1,000 bootstrap draws of questions; over plain entropy "
            + "{:+.4f} [{:+.4f}, {:+.4f}]".format(*differences["perplexity_entropy"]),
            rows=[{"metric": f"AUROC, {name}", "value": value} for name, value in table.items()],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
