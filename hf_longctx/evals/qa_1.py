"""RULER's qa_1 (Hsieh et al. 2024): questions of SQuAD 2.0 (Rajpurkar et al. 2018) about one of many paragraphs."""

from dataclasses import dataclass
from typing import Any

from hf_longctx.evals._documents import Corpus, DocumentQa, Question


@dataclass(frozen=True)
class Qa1(DocumentQa):
    """A paragraph of Wikipedia among others, those of its article first, in a random order; right if an answer stands in 32 tokens.

    As in RULER: prompt, questions that can be answered, and any of a question's answers counts. Unlike it: questions are drawn
    (its first ones), the last paragraph that is taken is cut to make the length exact, and none comes twice. `path` is SQuAD's
    dev-v2.0.json."""

    file = "SQuAD's dev-v2.0.json"

    @staticmethod
    def read(content: Any) -> Corpus:
        articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in content["data"]]
        texts = sorted({text for article in articles for text in article})
        number = {text: i for i, text in enumerate(texts)}
        questions = []
        for article, its in zip(content["data"], articles, strict=True):
            for paragraph in article["paragraphs"]:
                own = number[paragraph["context"]]
                near = tuple(sorted({number[text] for text in its} - {own}))
                for asked in paragraph["qas"]:
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    if not asked["is_impossible"]:
                        questions.append(Question(asked["question"], answers, (own,), near))
        return questions, texts
