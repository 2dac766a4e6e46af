"""The presets of worlds/grammar.py as plain data: production rules (their notation is explained in `_rules.py`), lexicon,
size and training of the language model. A new toy language is one more entry of PRESETS.
"""


def _all(value: float, words: str) -> dict[str, float]:
    return dict.fromkeys(words.split(), value)


_TOPICS = {  # topic: aspects, positive adjectives, negative adjectives of its own
    "film": ("plot | acting | ending | music", "funny | moving", "boring | predictable"),
    "book": ("story | prose | hero | cover", "clever | gripping", "dull | confusing"),
    "cafe": ("coffee | cake | menu | service", "tasty | fresh", "bland | stale"),
    "hotel": ("room | bed | view | breakfast", "cosy | quiet", "dirty | noisy"),
    "phone": ("screen | battery | camera | sound", "sharp | reliable", "fragile | slow"),
    "concert": ("singer | stage | band | hall", "lively | elegant", "chaotic | loud"),
    "museum": ("garden | guide | tour | shop", "fascinating | friendly", "crowded | rude"),
    "game": ("puzzle | level | design | voice", "addictive | smooth", "tedious | broken"),
}

_REVIEWS = {
    "slots": {"TOPIC": "TOPIC", "ASPECT": "ASPECT<TOPIC>", "PERSON": "PERSON"},
    "rules": {
        "TOPIC": " | ".join(_TOPICS),
        **{f"ASPECT<{topic}>": aspects for topic, (aspects, _, _) in _TOPICS.items()},
        **{f"OWN+<{topic}>": good for topic, (_, good, _) in _TOPICS.items()},
        **{f"OWN-<{topic}>": bad for topic, (_, _, bad) in _TOPICS.items()},
        "PERSON": "critic | student | teacher | tourist | doctor | neighbour | journalist",
        "PROMPT": "3 review of the =ASPECT of the =TOPIC by the =PERSON : | 3 the =PERSON on the =ASPECT of the =TOPIC :"
        " | 3 what did the =PERSON say about the =ASPECT of the =TOPIC ?",
        # The first clause sets the mood of a review and the others tend to it; "but" and "although" demand the opposite.
        "COMPLETION": "+4 OPEN REV+ | -4 OPEN REV- | 2 MIXED",
        "OPEN": "12 | honestly , | in my view , | to be fair , | looking back ,",
        "REV±": "3 FIRST± and MORE± . CLOSE± | 3 FIRST± . FILLER MORE± . | 2 FIRST± . MORE± and MORE± . CLOSE±"
        " | 2 FIRST± . FILLER CLOSE±",
        "MORE±": "5 CLAUSE± | 1 CLAUSE∓",
        "MIXED": "+2 OPEN FIRST- but CLAUSE+ . | -2 OPEN FIRST+ but CLAUSE- . | +1 although FIRST- , CLAUSE+ ."
        " | -1 although FIRST+ , CLAUSE- .",
        "FIRST±": "6 the =ASPECT BE VERDICT± | 2 the =ASPECT of this =TOPIC BE VERDICT± | 3 WHO FELT± the =ASPECT"
        " | 2 the =ASPECT HAS±",
        "CLAUSE±": "6 the ASPECT<TOPIC> BE VERDICT± | 3 WHO FELT± the ASPECT<TOPIC> | 2 the ASPECT<TOPIC> HAS±",
        "CLOSE±": "6 | 5 LAST± | 1 LAST∓ | 2 FILLER",
        "LAST±": "2 overall a ADJ± =TOPIC . | 1 overall a DEGREE ADJ± =TOPIC . | 1 not a ADJ∓ =TOPIC ."
        " | 1 not a very ADJ∓ =TOPIC .",
        "FILLER": "4 | 1 it took HOURS hours . | 1 we went on DAY . | 1 this was in MONTH . | 1 the TOPIC was near the PLACE ."
        " | 1 the ASPECT<TOPIC> was COLOUR .",
        "BE": "5 was | seemed | felt | looked",
        "WHO": "3 i | 2 we | my friend | my sister | the =PERSON | people | everyone",
        "VERDICT±": "5 ADJ± | 4 DEGREE ADJ± | 3 NOT ADJ∓ | 2 not STRONGER ADJ∓ | 1 neither ADJ∓ nor ADJ∓",
        "NOT": "4 not | 1 never | 1 hardly",
        "DEGREE": "3 very | 2 really | 1 extremely | 1 incredibly | 1 truly | 1 quite | 1 rather | 1 fairly | 1 slightly | 1 somewhat",
        "STRONGER": "3 very | 1 really | 1 particularly",
        "ADJ±": "3 MILD± | 4 PLAIN± | 3 STRONG± | 4 OWN±<TOPIC>",
        "MILD+": "fine | decent | okay | pleasant",
        "MILD-": "weak | odd | flat | clumsy",
        "PLAIN+": "good | nice | lovely | great | charming",
        "PLAIN-": "bad | poor | annoying | cheap | ugly",
        "STRONG+": "superb | brilliant | wonderful | excellent | perfect",
        "STRONG-": "awful | terrible | dreadful | horrible | worthless",
        "FELT±": "4 PAST± | 1 really PAST± | 2 did not BASE∓ | 1 did not really BASE∓ | 1 never PAST∓",
        "PAST+": "loved | enjoyed | liked | admired | praised",
        "PAST-": "hated | disliked | regretted | cursed | criticised",
        "BASE+": "love | enjoy | like | admire | praise",
        "BASE-": "hate | dislike | regret | curse | criticise",
        "HAS±": "2 had NOUN± | 1 had much NOUN± | 1 had no NOUN∓ | 1 had little NOUN∓ | 1 lacked NOUN∓"
        " | 1 did not have much NOUN∓ | 1 was without NOUN∓",
        "NOUN+": "charm | style | warmth | depth | magic",
        "NOUN-": "trouble | nonsense | clutter | noise | waste",
        "HOURS": "two | three | four | six",
        "DAY": "monday | tuesday | wednesday | thursday | friday | saturday | sunday",
        "MONTH": "march | april | june | july | october",
        "PLACE": "station | river | market | park | bridge",
        "COLOUR": "blue | green | red | grey | white",
    },
    "lexicon": {
        **_all(0.5, "fine decent okay pleasant"),
        **_all(-0.5, "weak odd flat clumsy"),
        **_all(1.0, "good nice lovely great charming loved enjoyed liked admired praised"),
        **_all(1.0, "love enjoy like admire praise charm style warmth depth magic"),
        **_all(-1.0, "bad poor annoying cheap ugly hated disliked regretted cursed criticised"),
        **_all(-1.0, "hate dislike regret curse criticise trouble nonsense clutter noise waste"),
        **_all(2.0, "superb brilliant wonderful excellent perfect"),
        **_all(-2.0, "awful terrible dreadful horrible worthless"),
        **{word: 1.0 for _, good, _ in _TOPICS.values() for word in good.split(" | ")},
        **{word: -1.0 for _, _, bad in _TOPICS.values() for word in bad.split(" | ")},
    },
    "degrees": {
        **_all(1.5, "very really truly particularly much"),
        **_all(2.0, "extremely incredibly"),
        **_all(1.25, "quite"),
        **_all(0.75, "rather fairly"),
        **_all(0.5, "slightly somewhat"),
    },
    "negators": {
        **_all(-0.75, "not never no neither nor lacked without"),
        **_all(-0.5, "hardly little"),
    },
    "closers": (".", ",", ":", "?", "and", "but", "although"),
    "hidden": 160,
    "layers": 4,
    "heads": 5,
    "feed_forward": 432,
    "steps": 500,
    "batch": 48,
    "learning_rate": 3e-3,
}

# The synthetic sentiment language of the t-reg and tdpo specifications: 64 words, every completion 23 words + eos = 24
# tokens, credit +-1 on ten positive and ten negative words and 0 elsewhere. No negation: here credit IS a bag of words.
_LEXICON64 = {
    "slots": {"DID": "DID", "THING": "THING", "PLACE": "PLACE"},
    "rules": {
        "DID": "saw | found | kept | left | sold",
        "THING": "cat | dog | boat | lamp | chair | table | clock | coat | car | kite",
        "PLACE": "garden | kitchen | street | market | school | station | harbour | hall",
        "PROMPT": "we =DID the =THING in the =PLACE :",
        "COMPLETION": "FIRST SIX SIX FIVE",
        "FIRST": "2 the =THING was WHEN ADJ . | 2 the ADJ =THING was ADJ . | 1 we =DID a ADJ =THING .",
        "SIX": "2 the NOUN was WHEN ADJ . | 2 the ADJ NOUN was ADJ . | 1 we DID a ADJ NOUN . | 1 it was a ADJ NOUN .",
        "FIVE": "2 the NOUN was ADJ . | 1 we DID the NOUN . | 1 it was ADJ again .",
        "NOUN": "2 =THING | 1 =PLACE | 3 THING | 2 PLACE",
        "WHEN": "still | then | now | often",
        "ADJ": "+2 POSITIVE | -2 NEGATIVE | 2 NEUTRAL",
        "POSITIVE": "good | nice | lovely | great | fine | bright | happy | sweet | clean | perfect",
        "NEGATIVE": "bad | ugly | awful | poor | dirty | sad | cruel | broken | bitter | horrible",
        "NEUTRAL": "old | small | blue | round | green | wooden | tall | grey",
    },
    "lexicon": {
        **_all(1.0, "good nice lovely great fine bright happy sweet clean perfect"),
        **_all(-1.0, "bad ugly awful poor dirty sad cruel broken bitter horrible"),
    },
    "closers": (".", ":"),
    "hidden": 64,
    "layers": 2,
    "heads": 4,
    "feed_forward": 256,
    "steps": 400,
    "batch": 64,
    "learning_rate": 5e-3,
}

PRESETS = {"reviews": _REVIEWS, "lexicon64": _LEXICON64}
