"""RULER's niah_single_1 (Hsieh et al. 2024): a number for a word, hidden in repetitions of one line."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahInNoise


@dataclass(frozen=True)
class NiahSingle1(NiahInNoise):
    """One line gives a seven-digit number for a word, between repetitions of one line; correct if greedy decoding gives it.

    As in RULER: prompt, noise, needle between whole lines. Unlike RULER: depths are evenly spaced (random), the answer must
    come first (anywhere in 128 tokens), keys are one word (adjective-noun), and the first line is cut to make the length exact."""
