"""RULER's qa_2 (Hsieh et al. 2024): questions of HotpotQA (Yang et al. 2018) about two of many paragraphs."""

from dataclasses import dataclass
from typing import Any

from hf_longctx.evals._documents import Corpus, DocumentQa, Question


@dataclass(frozen=True)
class Qa2(DocumentQa):
    """The ten paragraphs of a question, two of which answer it, among others in a random order; right if the answer stands in 32 tokens.

    As RULER's but where `qa_1` is not. `path` is HotpotQA's hotpot_dev_distractor_v1.json."""

    file = "HotpotQA's hotpot_dev_distractor_v1.json"

    @staticmethod
    def read(content: Any) -> Corpus:
        contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]] for asked in content]
        texts = sorted({text for context in contexts for text in context})
        number = {text: i for i, text in enumerate(texts)}
        pairs = zip(content, contexts, strict=True)
        return [Question(asked["question"], (asked["answer"],), tuple(number[text] for text in its)) for asked, its in pairs], texts
