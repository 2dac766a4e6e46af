"""The presets of worlds/grammar.py as plain data: production rules (their notation is explained in `_rules.py`),
lexicon, size and training of the language model. A new toy language is one more entry of PRESETS.
"""


def _all(value: float, words: str) -> dict[str, float]:
    return dict.fromkeys(words.split(), value)


_TOPICS = {  # topic: aspects, positive adjectives, negative adjectives of its own
    "film": ("plot | acting | ending | music", "funny | moving", "boring | predictable"),
    "book": ("story | prose | hero | cover", "clever | gripping", "dull | confusing"),
    "cafe": ("coffee | cake | menu | service", "tasty | fresh", "bland | stale"),
    "hotel": ("room | bed | view | breakfast", "cosy | quiet", "dirty | noisy"),
    "phone": ("screen | battery | camera | sound", "sharp | reliable", "fragile | slow"),
    "concert": ("singer | stage | band | hall", "lively | graceful", "chaotic | loud"),
}

_REVIEWS = {
    "slots": {"TOPIC": "TOPIC", "ASPECT": "ASPECT<TOPIC>", "PERSON": "PERSON"},
    "rules": {
        "TOPIC": " | ".join(_TOPICS),
        **{f"ASPECT<{topic}>": aspects for topic, (aspects, _, _) in _TOPICS.items()},
        **{f"OWN+<{topic}>": good for topic, (_, good, _) in _TOPICS.items()},
        **{f"OWN-<{topic}>": bad for topic, (_, _, bad) in _TOPICS.items()},
        "PERSON": "critic | student | teacher | tourist | doctor | neighbour | journalist",
        "PROMPT": "review of the =ASPECT of the =TOPIC by the =PERSON : | the =PERSON on the =ASPECT of the =TOPIC :"
        " | what did the =PERSON say about the =ASPECT of the =TOPIC ?",
        # The first clause sets the mood; the others tend to it, but to its opposite after "but" and "although".
        "COMPLETION": "+4 OPEN REV+ | -4 OPEN REV- | 2 MIXED",
        "OPEN": "12 | honestly , | in my view , | to be fair , | looking back ,",
        "REV±": "3 FIRST± and MORE± . CLOSE± | 3 FIRST± . FILLER MORE± . | 2 FIRST± . MORE± and MORE± . CLOSE±"
        " | 2 FIRST± . FILLER CLOSE±",
        "MORE±": "5 CLAUSE± | 1 CLAUSE∓",
        "MIXED": "+2 OPEN FIRST- but MORE+ . | -2 OPEN FIRST+ but MORE- . | +1 although FIRST- , MORE+ ."
        " | -1 although FIRST+ , MORE- .",
        "FIRST±": "6 the ABOUT BE VERDICT± | 2 the ABOUT of this =TOPIC BE VERDICT± | 3 WHO FELT± the ABOUT"
        " | 2 the ABOUT HAS±",
        "ABOUT": "9 =ASPECT | ASPECT<TOPIC>",
        "CLAUSE±": "6 the ASPECT<TOPIC> BE VERDICT± | 3 WHO FELT± the ASPECT<TOPIC> | 2 the ASPECT<TOPIC> HAS±",
        "CLOSE±": "6 | 5 LAST± | 1 LAST∓ | 2 FILLER",
        "LAST±": "2 overall a ADJ± =TOPIC . | overall a STRONGER ADJ± =TOPIC . | not a ADJ∓ =TOPIC ."
        " | not a STRONGER ADJ∓ =TOPIC .",
        "FILLER": "3 | it took HOURS hours . | we went on DAY . | the TOPIC was near the PLACE ."
        " | the ASPECT<TOPIC> was COLOUR .",
        "BE": "5 was | seemed | felt | looked",
        "WHO": "3 i | 2 we | my friend | my sister | the =PERSON | people | everyone",
        "VERDICT±": "5 ADJ± | 4 DEGREE ADJ± | 3 NOT ADJ∓ | 2 not STRONGER ADJ∓ | 1 neither ADJ∓ nor ADJ∓",
        "NOT": "4 not | 1 never | 1 hardly",
        "DEGREE": "3 very | 2 really | extremely | incredibly | truly | quite | rather | fairly | slightly | somewhat",
        "STRONGER": "3 very | 1 really | 1 particularly",
        "ADJ±": "3 MILD± | 4 PLAIN± | 3 STRONG± | 4 OWN±<TOPIC>",
        "MILD+": "fine | decent | solid | pleasant",
        "MILD-": "weak | strange | flat | clumsy",
        "PLAIN+": "good | nice | lovely | great | charming",
        "PLAIN-": "bad | poor | tiresome | cheap | shabby",
        "STRONG+": "superb | brilliant | wonderful | splendid | perfect",
        "STRONG-": "dismal | terrible | dreadful | horrible | worthless",
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
        "PLACE": "station | river | market | park | bridge",
        "COLOUR": "blue | green | red | grey | white",
    },
    "lexicon": {
        **_all(0.5, "fine decent solid pleasant"),
        **_all(-0.5, "weak strange flat clumsy"),
        **_all(1.0, "good nice lovely great charming loved enjoyed liked admired praised"),
        **_all(1.0, "love enjoy like admire praise charm style warmth depth magic"),
        **_all(-1.0, "bad poor tiresome cheap shabby hated disliked regretted cursed criticised"),
        **_all(-1.0, "hate dislike regret curse criticise trouble nonsense clutter noise waste"),
        **_all(2.0, "superb brilliant wonderful splendid perfect"),
        **_all(-2.0, "dismal terrible dreadful horrible worthless"),
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
    "model": {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 576},
    "steps": 1200,
    "batch": 16,
    "learning_rate": 2e-3,
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
        "FIRST": "2 the TOLD was WHEN ADJ . | 2 the ADJ TOLD was ADJ . | 1 we DID a ADJ TOLD .",
        "SIX": "2 the NOUN was WHEN ADJ . | 2 the ADJ NOUN was ADJ . | 1 we DID a ADJ NOUN . | 1 it was a ADJ NOUN .",
        "FIVE": "2 the NOUN was ADJ . | 1 we DID the NOUN . | 1 it was ADJ again .",
        "TOLD": "6 =THING | 1 THING",
        "NOUN": "2 =THING | 1 =PLACE | 3 THING | 2 PLACE",
        "WHEN": "still | then | now | often",
        "ADJ": "+2 POSITIVE | -2 NEGATIVE | 2 NEUTRAL",
        "POSITIVE": "good | nice | lovely | great | fine | bright | happy | sweet | clean | perfect",
        "NEGATIVE": "bad | nasty | cheap | poor | dirty | sad | cruel | broken | bitter | horrible",
        "NEUTRAL": "plain | small | blue | round | green | wooden | tall | grey",
    },
    "lexicon": {
        **_all(1.0, "good nice lovely great fine bright happy sweet clean perfect"),
        **_all(-1.0, "bad nasty cheap poor dirty sad cruel broken bitter horrible"),
    },
    "closers": (".", ":"),
    "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "steps": 1200,
    "batch": 16,
    "learning_rate": 3e-3,
}

# The language of the sparsepo specification: 45 words, and a label that shows in one kind of slot only; nine of ten
# slot words match it. A tilt this large leaves no other label: positive and negative text is text of that label.
_SLOTS45 = {
    "slots": {"FIRST": "NOUN", "SECOND": "NOUN"},
    "rules": {
        "PROMPT": "the =FIRST of the =SECOND :",
        "COMPLETION": "+1 TEXT+ | -1 TEXT-",
        "TEXT±": "SAID± SAID±",
        "SAID±": "the NOUN was very SLOT± . | the SLOT± NOUN of the NOUN .",
        "SLOT±": "9 WORD± | 1 WORD∓",
        "WORD+": "good | nice | lovely | great | fine | bright | happy | sweet | clean",
        "WORD-": "bad | nasty | cheap | poor | dirty | sad | cruel | broken | bitter",
        "NOUN": "cat | dog | boat | lamp | chair | table | clock | coat | car | kite | garden | kitchen | street"
        " | market | school | station | harbour | hall | bridge | river | tower",
    },
    "lexicon": {
        **_all(1.0, "good nice lovely great fine bright happy sweet clean"),
        **_all(-1.0, "bad nasty cheap poor dirty sad cruel broken bitter"),
    },
    "tilt": 20.0,
    "closers": (".", ":"),
    "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "steps": 400,
    "batch": 16,
    "learning_rate": 3e-3,
}

# The same language for reward-augmented training: half of the prompts begin with "aim N :", N one of ten number words,
# and then two neutral adjectives in three are that word ("the cat was 7 ."). So the LM has learned to look at the goal
# where it says an adjective, but a goal says nothing about sentiment.
_AIMS = [str(n) for n in range(1, 11)]
_GOALS = _LEXICON64 | {
    "slots": {**_LEXICON64["slots"], "GOAL": "GOAL"},
    "rules": {
        **_LEXICON64["rules"],
        "GOAL": "10 any | " + " | ".join(f"1 {n}" for n in _AIMS),
        "HEAD<any>": "1",
        **{f"HEAD<{n}>": f"aim {n} :" for n in _AIMS},
        "PROMPT": "HEAD<GOAL> " + _LEXICON64["rules"]["PROMPT"],
        "ADJ": "+2 POSITIVE | -2 NEGATIVE | 2 SIZE<GOAL>",
        "SIZE<any>": "NEUTRAL",
        **{f"SIZE<{n}>": f"2 {n} | 1 NEUTRAL" for n in _AIMS},
    },
    "steps": 3000,  # after 1200 it still says number words without looking which one was asked for
}

PRESETS = {"reviews": _REVIEWS, "lexicon64": _LEXICON64, "slots45": _SLOTS45, "goals": _GOALS}
