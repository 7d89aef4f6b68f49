"""RULER's niah_single_2 (Hsieh et al. 2024): a number for a word, hidden in running prose."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahInProse


@dataclass(frozen=True)
class NiahSingle2(NiahInProse):
    """One sentence gives a seven-digit number for a word, somewhere in a document; correct if greedy decoding gives it.

    As in RULER but for these: the haystack is the user's text (RULER: essays), cut at a token (between sentences), depths are
    evenly spaced (random), keys are one word (adjective-noun), and the answer must come first (anywhere in 128 tokens)."""
