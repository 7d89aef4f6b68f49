"""RULER's niah_multikey_2 (Hsieh et al. 2024): the whole haystack is made of needles; numbers."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahInNeedles


@dataclass(frozen=True)
class NiahMultikey2(NiahInNeedles):
    """Every line gives a seven-digit number for an adjective-noun key; one key is asked for; correct if greedy decoding gives its number.

    As in RULER: prompt, keys, values, needle between whole lines. Unlike RULER: depths are evenly spaced (random), the answer
    must come first (anywhere in 128 tokens), keys come from a list of our own (wonderwords), trials of one length share their
    distractors in other orders, none of which has the key asked for (left to chance), and the first line is cut to make the
    length exact."""
