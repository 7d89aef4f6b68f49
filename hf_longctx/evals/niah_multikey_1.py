"""RULER's niah_multikey_1 (Hsieh et al. 2024): four words have a number each, one is asked for."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahInProse


@dataclass(frozen=True)
class NiahMultikey1(NiahInProse):
    """As `niah_single_2`, with three more sentences in the document that give other numbers for other words.

    `depth` is that of the word asked for; the others stand at random depths (RULER: all four at random ones of 40). It departs
    from RULER also where `niah_single_2` does."""

    others = 3
