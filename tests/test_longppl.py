"""LongPPL: the tokens of a window behind a long and a short context, and which of them count."""

import math

import numpy as np
import pytest
import torch

from hf_longctx import checkpoint
from hf_longctx.evaluation import evaluate, score_cells
from hf_longctx.task import Scored, load_task
from tests.conftest import byte_tokenizer, refused_in_a_line, tiny_model
from tests.test_ruler import tokenizer_of

SMALL = {"name": "longppl", "context": 8, "stride": 4}
NO_LIMIT = {"alpha": 0.0, "beta": -100.0}
BYTES = byte_tokenizer()


def text(tokens=50, seed=0):
    return np.random.default_rng(seed).integers(3, 250, tokens)


# --- cells


@pytest.mark.parametrize("kind", ["bytes", "bos"])
@pytest.mark.parametrize("length", [23, 24, 25, 40])
def test_every_token_beyond_the_short_context_is_scored_behind_a_long_and_a_short_one(kind, length):
    tokenizer = tokenizer_of(kind)
    opens = kind == "bos"
    task = load_task(SMALL | {"windows": 2})
    whole, *pieces = task.cells(tokenizer, [text(1000)], length, 0)[: 1 + math.ceil((length - 8 - opens) / 4)]
    assert (len(whole.ids), whole.start, whole.stop) == (length, 8 + opens, length)
    assert np.array_equal(np.concatenate([piece.targets for piece in pieces]), whole.targets)
    for number, piece in enumerate(pieces):
        place = whole.start + 4 * number  # of the first token that it scores
        assert np.array_equal(piece.ids[opens:], whole.ids[opens:][4 * number : 4 * number + 12])
        assert np.array_equal(piece.ids[: piece.start][opens:], whole.ids[place - 8 : place])
        assert [cell.ids[0] == 1 for cell in (whole, piece)] == [opens, opens]
    assert len(pieces[-1].targets) == (length - 8 - opens - 1) % 4 + 1


def test_the_defaults_are_those_of_the_paper():
    task = load_task("longppl")
    assert (task.context, task.stride, task.alpha, task.beta) == (4096, 1024, 2, -2)


def test_a_length_without_a_long_context_is_refused_before_anything_is_loaded(tmp_path):
    message = "longppl needs more than the 4096 tokens of its short context, got 2048; leave out such lengths or set context lower"
    refused_in_a_line(lambda: evaluate("/nowhere", ["longppl"], [2048, 8192], out=tmp_path / "e"), message)
    refused_in_a_line(lambda: load_task(SMALL).cells(tokenizer_of("bos"), [text()], 9, 0), "longppl needs more than the 8 tokens of its short context, got 8;")
    refused_in_a_line(lambda: evaluate("/nowhere", [{"name": "longppl", "by": str(tmp_path / "none")}], [8192], out=tmp_path / "e"), f"'{tmp_path / 'none'}' is neither a folder")
    assert not (tmp_path / "e").exists()


# --- which tokens count


def outputs_of(long, short, stride=4):
    said = [Scored(np.array(long, np.float32), np.zeros(len(long), int))]
    return said + [Scored(np.array(short[i : i + stride], np.float32), np.zeros(stride, int)) for i in range(0, len(short), stride)]


def test_key_tokens_gain_from_the_long_context_and_are_likely_with_it():
    task = load_task(SMALL)
    cells = task.cells(BYTES, [text(14)], 14, 0)
    #       key  key    gain 2  gain 1.9  unlikely  loses
    long = [1.0, 1.999, 1.0, 1.0, 2.0, 3.0]
    short = [3.5, 5.0, 3.0, 2.9, 9.0, 1.0]
    key, everything, share = task.score(cells, outputs_of(long, short), BYTES)
    assert (key.metric, key.n, key.value) == ("perplexity", 2, pytest.approx(math.exp((1.0 + 1.999) / 2)))
    assert (everything.metric, everything.n, everything.value) == ("perplexity_of_all", 6, pytest.approx(math.exp(sum(long) / 6)))
    assert (share.metric, share.n, share.value) == ("key_share", 6, pytest.approx(2 / 6))
    assert not any(result.values for result in (key, everything, share))  # other models have other key tokens: nothing to pair
    (loose, *_) = load_task(SMALL | NO_LIMIT).score(cells, outputs_of(long, short), BYTES)
    assert (loose.n, loose.value) == (5, pytest.approx(math.exp(sum(long[:5]) / 5)))


def test_every_token_counts_the_same_and_whole_documents_are_resampled():
    task = load_task(SMALL | NO_LIMIT | {"windows": 1})
    cells = task.cells(BYTES, [text(12, seed) for seed in range(3)], 12, 0)
    said = [each for long, short in (([1.0] * 4, [2.0] * 4), ([4.0] * 4, [5.0, 0, 0, 0]), ([7.0] * 4, [0.0] * 4)) for each in outputs_of(long, short)]
    key, _, share = task.score(cells, said, BYTES)
    assert key.value == pytest.approx(math.exp((4 * 1.0 + 4.0) / 5))
    assert (share.ci_low, share.ci_high) == (0.0, 1.0)
    assert math.isnan(key.ci_low)  # three times the document without a key token says nothing
    with_one = task.score(cells[:4], said[:4], BYTES)[0]
    assert (with_one.ci_low, with_one.ci_high) == pytest.approx((math.e, math.exp(4)))


def test_no_key_token_is_no_longppl():
    task = load_task(SMALL)
    cells = task.cells(BYTES, [text(12)], 12, 0)
    refused_in_a_line(lambda: task.score(cells, outputs_of([1.0] * 4, [1.0] * 4), BYTES), "none of 4 tokens gains more than 2 nats from the long context")


# --- with a model


@torch.no_grad()
def by_hand(model, ids, context, stride, alpha, beta, judge=None):
    """Of one text, token by token, from full logits."""

    def log_p(which, piece):
        logits = which(torch.from_numpy(piece)[None]).logits[0, -2].double()
        return logits.log_softmax(-1)[piece[-1]].item()

    kept = []
    for place in range(context, len(ids)):
        begin = (place - context) // stride * stride
        long, short = (log_p(judge or model, ids[start : place + 1]) for start in (0, begin))
        if long - short > alpha and long > beta:
            kept.append(-log_p(model, ids[: place + 1]))
    return len(kept), math.exp(np.mean(kept))


@pytest.mark.parametrize("judged", [False, True])
def test_a_model_gives_what_token_by_token_scoring_gives(base, tmp_path, judged):
    model, tokenizer = checkpoint.load(base)
    judge = None
    if judged:
        judge = tiny_model(seed=1)
        judge.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    options = {"alpha": 0.5, "beta": -6.0}
    task = load_task(SMALL | options | ({"by": str(tmp_path)} if judged else {}))
    ids = text(30)
    cells = task.cells(tokenizer, [ids], 30, 0)
    assert len(cells) == (1 if judged else 7)
    key, *_ = task.score(cells, score_cells(model, cells), tokenizer)
    wanted = by_hand(model, ids, 8, 4, **options, judge=judge)
    assert 1 < wanted[0] < 20
    assert (key.n, key.value) == (wanted[0], pytest.approx(wanted[1], rel=1e-4))


@pytest.mark.parametrize("judged", [False, True])
def test_only_with_one_judge_are_models_paired(base, family_folder, tokens, tmp_path, judged):
    task = SMALL | NO_LIMIT | {"windows": 1} | ({"by": str(base)} if judged else {})
    rows = evaluate(base, [task], [40], out=tmp_path / "e", data=tokens, baseline=family_folder("llama"), methods=[{"name": "yarn", "factor": 2}])
    found = {(row["model"] == str(family_folder("llama")), row["metric"]): row for row in rows}
    assert ((False, "change_from_baseline") in found) == judged
    key, other = (found[which, "perplexity"] for which in (False, True))
    if judged:
        assert key["n"] == other["n"]
        change = found[False, "change_from_baseline"]
        assert change["value"] == pytest.approx(key["value"] / other["value"] - 1)
        assert change["ci_low"] < change["value"] < change["ci_high"]
    else:
        assert key["n"] != other["n"]


def test_a_judge_reads_the_same_tokens(base, family_folder):
    task = load_task(SMALL | {"by": str(base)})
    other = tokenizer_of("merging")
    cells = task.cells(BYTES, [text()], 40, 0)
    refused_in_a_line(lambda: task.score(cells, [Scored(np.zeros(32), np.zeros(32))], other), f"{base} has another tokenizer than the model, so it cannot choose")
