"""RULER's niah_multivalue (Hsieh et al. 2024): one key has four numbers, all are asked for."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahOfFour


@dataclass(frozen=True)
class NiahMultivalue(NiahOfFour):
    """Four sentences of a document give four seven-digit numbers for one key; what share of them does the model list?

    As in RULER: prompt, keys, values, 128 tokens to answer in, in any order. Unlike it: the text is the user's (essays), depths are
    any (of 40), keys come from a list of our own (wonderwords), and the length is exact."""
