"""THE table: one lazy row a method. Listing it imports neither torch nor any method's module.

Others add rows through the entry point group ``pertoken.methods``: its value names a JSON file as package data
(``package:file.json``, a list of objects with the fields of `Method`), so that listing imports nobody's code.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row of the catalog.

    Attributes:
        slug: the name users type; module, test, example and result carry it (underscores for hyphens).
        system: the specification it belongs to; one paper may have several rows.
        room: score, train, generate, select, explain, tokenize, rank or bench.
        path: ``module:attribute`` of its options class.
        paper: arXiv id, or empty.
        title: one line on what it is.
        family: preference, supervised, reward, ...
        level: the finest level its signal has: token, span, sequence.
        item: what it works on: trace, image, text, state.
        data: pairs, unpaired, sft, or empty.
        models: models it needs besides the policy.
        paper_row: False for the baselines that papers are measured against.
        version: raised when its numbers change.
        batch_coupled: its loss on a batch is not the mean of the losses of its parts.
        stochastic: it draws random numbers.
    """

    slug: str
    room: str
    path: str
    title: str
    system: str = ""
    paper: str = ""
    family: str = "preference"
    level: str = "sequence"
    item: str = "trace"
    data: str = ""
    models: tuple[str, ...] = ()
    paper_row: bool = True
    version: int = 1
    batch_coupled: bool = False
    stochastic: bool = False


def _baseline(slug: str, title: str, paper: str, **fields: Any) -> Method:
    names = {"sft": "SFT", "dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO", "kto": "KTO"}
    attribute = names.get(slug, slug.upper())
    path = f"pertoken.train.{slug}:{attribute}"
    return Method(slug, "train", path, title, system=slug, paper=paper, paper_row=False, **fields)


_ROWS = (
    _baseline(
        "sft", "Supervised fine-tuning on (chosen) responses", "", family="supervised", data="sft", level="token"
    ),
    _baseline("dpo", "Direct Preference Optimization", "2305.18290", data="pairs", models=("reference",)),
    _baseline("ipo", "Identity Preference Optimization", "2310.12036", data="pairs", models=("reference",)),
    _baseline("simpo", "Simple Preference Optimization with a reference-free reward", "2405.14734", data="pairs"),
    _baseline("orpo", "Odds Ratio Preference Optimization without a reference model", "2403.07691", data="pairs"),
    _baseline(
        "kto",
        "Kahneman-Tversky Optimization from unpaired labels",
        "2402.01306",
        data="unpaired",
        models=("reference",),
        batch_coupled=True,
        version=2,
    ),
    *(
        _baseline(
            slug, title, paper, family="reinforcement", level="token", data="prompts", models=models, stochastic=True
        )
        for slug, title, paper, models in (
            ("ppo", "Proximal Policy Optimization with a critic and a KL penalty", "1707.06347", ("reference",)),
            ("grpo", "Group Relative Policy Optimization (and Dr. GRPO, DAPO, GSPO, CISPO)", "2402.03300", ()),
            ("rloo", "REINFORCE leave-one-out, and REINFORCE++", "2402.14740", ("reference",)),
        )
    ),
    Method(
        "rto",
        "train",
        "pertoken.train.rto:RTO",
        "Reinforced Token Optimization: PPO with a DPO model's log-ratio as the reward of each token",
        system="rto",
        paper="2404.18922",
        family="reinforcement",
        level="token",
        data="pairs",
        models=("reference", "dpo"),
        stochastic=True,
    ),
    Method(
        "ma-rlhf",
        "train",
        "pertoken.train.ma_rlhf:MARLHF",
        "PPO whose actions are macro actions: spans of tokens share one value, one advantage, one return",
        system="ma-rlhf",
        paper="2410.02743",
        family="reinforcement",
        level="span",
        data="prompts",
        models=("reference",),
        stochastic=True,
    ),
    Method(
        "t-reg",
        "train",
        "pertoken.train.t_reg:TReg",
        "Preference Optimization with Token-Level Reward Regularization",
        system="t-reg",
        paper="2412.02685",
        level="token",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "tdpo",
        "train",
        "pertoken.train.tdpo:TDPO",
        "Token-level Direct Preference Optimization",
        system="tdpo",
        paper="2404.11999",
        level="token",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "sparsepo",
        "train",
        "pertoken.train.sparsepo:SparsePO",
        "Sparse learnt token masks on reward and KL, which show what the preference is about",
        system="sparsepo",
        paper="2410.05102",
        level="token",
        data="pairs",
        models=("reference",),
        stochastic=True,
    ),
    Method(
        "mapo",
        "train",
        "pertoken.train.mapo:MaPO",
        "Token masks on reward and KL from the reference's activations",
        system="sparsepo",
        paper="2410.05102",
        level="token",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "bco",
        "train",
        "pertoken.train.bco:BCO",
        "Binary Classifier Optimization from thumbs up and down",
        system="bco",
        paper="2404.04656",
        data="unpaired",
        models=("reference",),
        batch_coupled=True,
    ),
    Method(
        "sem-dpo",
        "train",
        "pertoken.train.sem_dpo:SemDPO",
        "DPO weighted by how much of the prompt's meaning the chosen response keeps",
        system="sem-dpo",
        paper="2507.20133",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "aligndistil",
        "train",
        "pertoken.train.aligndistil:AlignDistil",
        "Token-level alignment as adaptive distillation into a teacher extrapolated from two DPO models",
        system="aligndistil",
        paper="2503.02832",
        level="token",
        data="pairs",
        models=("dpo", "reverse"),
    ),
    Method(
        "tl-training",
        "train",
        "pertoken.train.tl_training:TLTraining",
        "Supervised tool use: failed calls are not imitated, tokens that pick the tool weigh more",
        system="tl-training",
        paper="2412.15495",
        level="token",
        data="sft",
    ),
    Method(
        "reward-augmented",
        "train",
        "pertoken.train.reward_augmented:RewardAugmented",
        "DPO on goal-conditioned pairs; as a transform, for any objective",
        system="reward-augmented",
        paper="2410.08067",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "mm-dpo",
        "train",
        "pertoken.train.mm_dpo:MMDPO",
        "DPO whose beta grows with a reward model's margin (Dynamic Reward Scaling)",
        system="mm-rlhf",
        paper="2502.10391",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "critical-token-dpo",
        "train",
        "pertoken.train.critical_token_dpo:CriticalTokenDPO",
        "cDPO: DPO that pushes down only the critical tokens of a wrong answer (not conservative DPO)",
        system="cdpo",
        paper="2411.19943",
        level="token",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "text2grad",
        "train",
        "pertoken.train.text2grad:Text2Grad",
        "Text2Grad: PPO on the spans that a written critique quotes",
        system="text2grad",
        paper="2505.22338",
        family="reinforcement",
        level="token",
        data="prompts",
        models=("reference",),
        batch_coupled=True,
        stochastic=True,
    ),
    Method(
        "arm",
        "train",
        "pertoken.train.arm:ARM",
        "Autoregressive reward model: pairs train a language model whose token log-probs are the reward",
        system="genarm",
        paper="2410.08193",
        family="reward",
        level="token",
        data="pairs",
    ),
    Method(
        "arm-reward",
        "score",
        "pertoken.score.arm_reward:ARMReward",
        "Token rewards of an autoregressive reward model: its log-probs",
        system="genarm",
        paper="2410.08193",
        family="reward",
        level="token",
    ),
    Method(
        "genarm",
        "generate",
        "pertoken.generate.genarm:GenARM",
        "Decoding guided by one or several autoregressive reward models, weighted per request",
        system="genarm",
        paper="2410.08193",
        family="decoding",
        level="token",
        stochastic=True,
    ),
    Method(
        "logratio",
        "score",
        "pertoken.score.logratio:LogRatio",
        "Implicit token reward of two models: beta times their log-ratio",
        system="logratio",
        paper="2305.18290",
        family="reward",
        level="token",
        models=("reference",),
        paper_row=False,
    ),
    Method(
        "contrastive-prompt",
        "score",
        "pertoken.score.contrastive_prompt:ContrastivePrompt",
        "Self-generated token reward of T-REG: one response under a better and a worse prompt",
        system="t-reg",
        paper="2412.02685",
        family="reward",
        level="token",
    ),
    Method(
        "gpm",
        "score",
        "pertoken.score.gpm:GPM",
        "General preference model: comparisons that may be cyclic, one forward a response",
        system="gpm",
        paper="2410.02197",
        family="reward",
        batch_coupled=True,
    ),
    Method(
        "gpm-reward",
        "train",
        "pertoken.train.gpm_reward:GPMReward",
        "General preference model (or Bradley-Terry) trained with its backbone",
        system="gpm",
        paper="2410.02197",
        family="reward",
        data="pairs",
    ),
    Method(
        "gpo",
        "train",
        "pertoken.train.gpo:GPO",
        "General Preference Optimization: on-policy rounds against a preference model",
        system="gpm",
        paper="2410.02197",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "contrastive-estimation",
        "score",
        "pertoken.score.contrastive_estimation:ContrastiveEstimation",
        "Contrastive estimation of critical tokens: softmax of a positive against a negative model, at the drawn token",
        system="cdpo",
        paper="2411.19943",
        family="reward",
        level="token",
        models=("reference",),
    ),
    Method(
        "critical-rollout",
        "score",
        "pertoken.score.critical_rollout:CriticalRollout",
        "Critical tokens by rollout: the share of correct completions from every prefix of a response",
        system="cdpo",
        paper="2411.19943",
        family="reward",
        level="token",
        stochastic=True,
    ),
    Method(
        "tl-training-reward",
        "score",
        "pertoken.score.tl_training_reward:TLTrainingReward",
        "Tool calls by the kind of their mistakes: tool, parameters, values, each on its tokens",
        system="tl-training",
        paper="2412.15495",
        family="reward",
        level="token",
    ),
    Method(
        "reasoning-sql",
        "score",
        "pertoken.score.reasoning_sql:ReasoningSQL",
        "SQL queries against gold ones: rows, names, n-grams, syntax and format, on the tokens that earned them",
        system="reasoning-sql",
        paper="2503.23157",
        family="reward",
        level="token",
    ),
    Method(
        "toolrl",
        "score",
        "pertoken.score.toolrl:ToolRL",
        "Tool calls against gold ones: format, names, parameters and values, on the tokens that earned them",
        system="toolrl",
        paper="2504.13958",
        family="reward",
        level="token",
    ),
    Method(
        "argument-rewriting",
        "score",
        "pertoken.score.argument_rewriting:ArgumentRewriting",
        "Rewrites: an appropriateness classifier and a similarity to the original, weighted",
        system="argument-rewriting",
        paper="2406.03363",
        family="reward",
        level="token",
    ),
    Method(
        "bleuberi",
        "score",
        "pertoken.score.bleuberi:Bleuberi",
        "n-gram overlap with reference answers, on the words that match",
        system="bleuberi",
        paper="2505.11080",
        family="reward",
        level="token",
    ),
    Method(
        "sampling",
        "generate",
        "pertoken.generate.sampling:Sampling",
        "Draws of the model itself: temperature, top-k, top-p",
        paper_row=False,
        family="decoding",
        level="token",
    ),
    Method(
        "best-of-n",
        "generate",
        "pertoken.generate.best_of_n:BestOfN",
        "The best of several draws by any reward",
        paper_row=False,
        family="decoding",
    ),
    Method(
        "sar",
        "explain",
        "pertoken.explain.sar:SAR",
        "Uncertainty of answers, where tokens that carry meaning and answers that agree count more",
        system="sar",
        paper="2307.01379",
        family="uncertainty",
        level="token",
    ),
    Method(
        "reagent",
        "explain",
        "pertoken.explain.reagent:ReAGent",
        "Which input tokens a predicted token came from, by replacing them: forward passes alone",
        system="reagent",
        paper="2402.00794",
        family="attribution",
        level="token",
        stochastic=True,
    ),
    Method(
        "charbench",
        "bench",
        "pertoken.bench.charbench:CharBench",
        "Questions about the characters of words, and what the tokenizer's cut has to do with errors",
        system="charbench",
        version=2,
        paper="2508.02591",
        family="benchmark",
        level="token",
        item="text",
    ),
    Method(
        "pawn",
        "explain",
        "pertoken.explain.pawn:PAWN",
        "Whether a text is machine-written, and which tokens say so",
        system="pawn",
        paper="2501.03940",
        family="detection",
        level="token",
    ),
    Method(
        "claps",
        "explain",
        "pertoken.explain.claps:ClaPS",
        "A discrete prompt without gradients: influential tokens of clusters, then a search among them",
        system="claps",
        paper="2310.12774",
        family="prompt search",
        level="token",
        item="text",
        stochastic=True,
    ),
    Method(
        "stochastok",
        "tokenize",
        "pertoken.tokenize.stochastok:StochasTok",
        "Random splits of tokens in training data, so that a model sees how words are spelled",
        system="stochastok",
        version=2,
        paper="2506.01687",
        family="tokenization",
        level="token",
        item="text",
    ),
    Method(
        "dynamic-tokenization",
        "tokenize",
        "pertoken.tokenize.dynamic_tokenization:DynamicTokenization",
        "Frequent neighbouring tokens of a batch merged on the fly, their embeddings predicted: shorter sequences",
        system="dynamic-tokenization",
        paper="2411.18553",
        family="tokenization",
        level="token",
        item="text",
        batch_coupled=True,
    ),
    Method(
        "word-pooled",
        "tokenize",
        "pertoken.tokenize.word_pooled:WordPooled",
        "A language model over words, pooled from their bytes and spelled byte by byte: no vocabulary",
        system="word-pooled",
        paper="2310.11628",
        family="tokenization",
        level="token",
        item="text",
        stochastic=True,
    ),
    Method(
        "bleuberi-select",
        "select",
        "pertoken.select.bleuberi_select:BleuberiSelect",
        "The prompts that the base model answers worst, by overlap with their references",
        system="bleuberi",
        paper="2505.11080",
        family="selection",
        item="text",
        stochastic=True,
    ),
    Method(
        "reward-transform",
        "score",
        "pertoken.score.reward_transform:RewardTransform",
        "Log-sigmoid centred rewards, and their sum: good in all properties",
        system="reward-transform",
        paper="2402.00742",
        family="reward",
        level="token",
    ),
    Method(
        "text2grad-reward",
        "score",
        "pertoken.score.text2grad_reward:Text2GradReward",
        "Critiques as rewards: quoted good and poor phrases, by a rule, a person, or a model that writes the JSON",
        system="text2grad",
        paper="2505.22338",
        family="reward",
        level="token",
    ),
    Method(
        "irl-reward",
        "score",
        "pertoken.score.irl_reward:IRLReward",
        "Reward models of harm categories, learned from demonstrations alone by inverse RL",
        system="dr-irl",
        paper="2503.18991",
        family="reward",
    ),
    Method(
        "dr-irl",
        "train",
        "pertoken.train.dr_irl:DRIRL",
        "Rewards from demonstrations by inverse RL, then GRPO scaled by how hard each prompt is (GRPO-S)",
        system="dr-irl",
        paper="2503.18991",
        family="reinforcement",
        level="token",
        data="prompts",
        models=("reference",),
        stochastic=True,
    ),
    Method(
        "dr-irl-ppo",
        "train",
        "pertoken.train.dr_irl_ppo:DRIRLPPO",
        "PPO on rewards from demonstrations, advantages scaled by how hard each prompt is (PPO-S)",
        system="dr-irl",
        paper="2503.18991",
        family="reinforcement",
        level="token",
        data="prompts",
        models=("reference",),
        stochastic=True,
    ),
    Method(
        "dr-irl-dpo",
        "train",
        "pertoken.train.dr_irl_dpo:DRIRLDPO",
        "DPO whose pairs count by how hard their prompts are, as rewards from demonstrations see it (DPO-S)",
        system="dr-irl",
        paper="2503.18991",
        data="pairs",
        models=("reference",),
    ),
    Method(
        "lm-cascades",
        "generate",
        "pertoken.generate.lm_cascades:LMCascade",
        "A small model answers, and a large one is called where quantiles of its token log-probs say so",
        system="lm-cascades",
        paper="2404.10136",
        family="decoding",
        level="token",
        models=("large",),
        stochastic=True,
    ),
    Method(
        "icn",
        "generate",
        "pertoken.generate.icn:ICN",
        "In-context navigation: listing what was found leads to first tokens that begin something else",
        system="icn",
        paper="2410.02284",
        family="decoding",
        level="token",
    ),
    Method(
        "spc",
        "generate",
        "pertoken.generate.spc:SPC",
        "Semantic control: candidates weighed by a differentiable verifier's expected verdict on the finished sentence",
        system="spc",
        paper="2505.01954",
        family="decoding",
        level="token",
        models=("verifier",),
        stochastic=True,
    ),
    Method(
        "awrs",
        "generate",
        "pertoken.generate.awrs:AWRS",
        "Constrained generation by adaptive weighted rejection sampling: a few checks a token, unbiased weights",
        system="awrs",
        paper="2504.05410",
        family="decoding",
        level="token",
        stochastic=True,
    ),
    Method(
        "byte-exact",
        "generate",
        "pertoken.generate.byte_exact:ByteExact",
        "Next-byte distributions of token models: prompts that end inside a token, ensembles across vocabularies",
        system="byte-exact",
        paper="2410.09303",
        family="decoding",
        level="token",
        stochastic=True,
    ),
    Method(
        "vader",
        "score",
        "pertoken.score.vader:Vader",
        "Rule-based sentiment (VADER), its lexicon words as token credit",
        system="vader",
        family="reward",
        level="token",
        paper_row=False,
    ),
)


@lru_cache(maxsize=1)
def methods() -> tuple[Method, ...]:
    """All rows: the library's own, then those of installed packages, by entry point."""
    rows = list(_ROWS)
    for point in importlib.metadata.entry_points(group="pertoken.methods"):
        package, _, file = point.value.partition(":")
        spec = importlib.util.find_spec(package.partition(".")[0])
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the entry point {point.name} names {point.value}, but there is no package {package}")
        data = Path(spec.submodule_search_locations[0], *package.split(".")[1:], file.replace(".json", "") + ".json")
        for row in json.loads(data.read_text("utf8")):
            rows.append(Method(**(row | {"models": tuple(row.get("models", ()))})))
    seen: set[str] = set()
    for row in rows:
        if row.slug in seen:
            raise ValueError(f"two catalog rows are called {row.slug!r}; rename the one of the installed package")
        seen.add(row.slug)
    return tuple(rows)


def about(slug: str) -> Method:
    """The row of a method.

    Raises:
        ValueError: no such method; the nearest names are suggested.
    """
    rows = {row.slug: row for row in methods()}
    if slug in rows:
        return rows[slug]
    near = difflib.get_close_matches(slug.lower().replace("_", "-"), rows, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "pertoken methods lists them all"
    raise ValueError(f"there is no method {slug!r}; {hint}")


def method(slug: str) -> type[Any]:
    """The options class of a method; imports its module."""
    module, _, attribute = about(slug).path.partition(":")
    return getattr(importlib.import_module(module), attribute)
