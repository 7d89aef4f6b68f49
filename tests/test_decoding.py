"""Greedy decoding of cells: the tokens of a loop of full forward passes, whatever the batch, the pieces and the model's own settings."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_longctx import decoding, evaluation, scoring
from hf_longctx.decoding import decode_cells
from hf_longctx.evaluation import evaluate
from hf_longctx.method import load_methods
from hf_longctx.patching import patch_model
from hf_longctx.task import Cell, exact_match, load_task
from tests.conftest import byte_tokenizer, largest_tensor, tiny_config, tiny_model
from tests.test_state import FAMILIES as STATE_FAMILIES
from tests.test_state import stock

BYTES = byte_tokenizer()
NEW = 10


@functools.cache
def model_of(name: str):
    """A family, or a method on llama."""
    if name in STATE_FAMILIES:
        model = stock(name)
    elif name in ("alibi", "fire", "log_n", "sinusoidal", "yarn"):
        model = tiny_model()
        patch_model(model, load_methods([{"name": name} | ({"factor": 4} if name == "yarn" else {})]))
        model.eval()
    else:
        model = tiny_model(name)
    model.generation_config.eos_token_id = None
    return model


def prompts(model, lengths=(40, 40, 25, 40), new=NEW) -> list[Cell]:
    rng = np.random.default_rng(0)
    return [Cell(rng.integers(0, model.config.vocab_size, n), n, n + new) for n in lengths]


@torch.no_grad()
def reference(model, cell: Cell) -> tuple[list[int], list[float]]:
    """Tokens and -log p, from the whole text again for each of them."""
    ids, nll = torch.from_numpy(cell.ids)[None], []
    for _ in range(cell.stop - cell.start):
        log_p = model(ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
        nll.append(-log_p.max().item())
        ids = torch.cat([ids, log_p.argmax()[None, None]], 1)
    return ids[0, cell.start :].tolist(), nll


EACH = ["llama", "mistral", "gemma3_text", "gpt_neox", "phi3", "yarn", "alibi", "fire", "log_n", "sinusoidal", *STATE_FAMILIES]
SHORT = ("llama", "gemma3_text", "fire", "mamba", "bamba")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.floor] if name in SHORT else []) for name in EACH])
def test_it_is_a_loop_of_full_forward_passes(name):
    model = model_of(name)
    cells = [*prompts(model), replace(prompts(model)[0], stop=40 + NEW - 3)]  # some may write less than others
    wanted = [reference(model, cell) for cell in cells]
    assert len({tuple(tokens[:5]) for tokens, _ in wanted}) == 4
    for options in ({}, {"batch_size": 2, "chunk": 7}, {"batch_size": 1, "chunk": 39}):
        for output, (tokens, nll) in zip(decode_cells(model, cells, **options), wanted, strict=True):
            assert output.best.tolist() == tokens
            assert np.allclose(output.nll, nll, atol=1e-4)


TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of keys and values: layers, both, heads, their dimension, float32


@pytest.mark.parametrize(("name", "held", "together"), [
    ("llama", decoding._HELD, [5]), ("llama", 3 * (40 + NEW) * TOKEN, [3, 2]), ("llama", 1, [2, 2, 1]),
    ("gemma3_text", decoding._HELD, [5]), ("alibi", decoding._HELD, [5]),
])  # fmt: skip
def test_prompts_are_read_some_at_a_time_and_written_on_together(name, held, together, monkeypatch):
    model, read, written = model_of(name), [], []
    cells = prompts(model, (40, 40, 25, 40, 40, 40))
    alone = decode_cells(model, cells, batch_size=1)
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 80)
    monkeypatch.setattr(decoding, "_HELD", held)
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **given: written.append(len(given["input_ids"])) or generate(self, **given))
    watching = model.get_decoder().register_forward_pre_hook(lambda _, __, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    found = decode_cells(model, cells)
    watching.remove()
    assert written == [1, *together]
    assert [shape for shape in read if shape[1] > 1] == [(1, 24), *((rows, 39) for part in together for rows in [2] * (part // 2) + [1] * (part % 2))]
    for output, other in zip(found, alone, strict=True):
        assert output.best.tolist() == other.best.tolist()
        assert np.allclose(output.nll, other.nll, atol=1e-4)


def test_where_memory_does_not_suffice_prompts_are_tried_one_by_one():
    """Also those that are too long to be read two at a time."""
    long = scoring._TOKENS_AT_ONCE["cpu"] - NEW
    model, cells = tiny_model(), [Cell(np.zeros(long, np.int64), long, long + NEW)] * 2
    assert scoring.attempts(model.config, cells, None, None, "cpu")[:2] == [(None, None), (1, None)]
    assert (1, None) not in scoring.attempts(model.config, cells[:1], None, None, "cpu")
    assert (1, None) not in scoring.attempts(model.config, [Cell(np.zeros(long, np.int64), 1, long)] * 2, None, None, "cpu")


def test_adapters_count():
    model = tiny_model()
    before = decode_cells(model, prompts(model))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    adapted.generation_config.eos_token_id = None
    cells = prompts(adapted)
    found = [output.best.tolist() for output in decode_cells(adapted, cells)]
    assert found == [reference(adapted, cell)[0] for cell in cells]
    assert found != [output.best.tolist() for output in before]


@pytest.mark.parametrize("several", [False, True])
def test_a_row_ends_by_itself_and_the_others_go_on(several):
    model = tiny_model()
    model.generation_config.eos_token_id = None
    cells = prompts(model, (40, 40, 40))
    whole = [output.best.tolist() for output in decode_cells(model, cells)]
    end = next(token for token in whole[0][2:] if token not in whole[1] + whole[0][:2])
    model.generation_config.eos_token_id = [end, 299] if several else end
    for options in ({}, {"batch_size": 1}):
        first, second, _ = decode_cells(model, cells, **options)
        assert first.best.tolist() == whole[0][: whole[0].index(end)]
        assert len(first.nll) == len(first.best) + 1  # that of the end, too
        assert second.best.tolist() == whole[1]


@pytest.mark.floor
def test_the_models_own_settings_have_no_part_in_it():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    cells, before = prompts(model), decode_cells(model, prompts(model))
    model.generation_config.update(
        repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=[int(before[0].best[0])], do_sample=True, temperature=9.0, num_beams=2,
        max_length=20, begin_suppress_tokens=[int(before[1].best[0])], min_new_tokens=2,
    )  # fmt: skip
    own = model.generation_config
    assert [o.best.tolist() for o in decode_cells(model, cells)] == [o.best.tolist() for o in before]
    assert model.generation_config is own
    with pytest.raises(IndexError):
        decode_cells(model, [Cell(np.array([5, 4000]), 2, 9)])
    assert model.generation_config is own


def test_a_text_does_not_depend_on_the_one_before_it():
    """RoPE whose frequencies follow the longest text starts anew."""
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    model.generation_config.eos_token_id = None
    cells = prompts(model, (90, 90, 70), new=30)
    together = decode_cells(model, cells, batch_size=1)
    for cell, output in zip(cells, together, strict=True):
        model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
        model.generation_config.eos_token_id = None
        (alone,) = decode_cells(model, [cell])
        assert np.array_equal(alone.nll, output.nll)


def test_memory_is_linear_in_length():
    vocabulary, length = 3000, 600
    model = tiny_model(vocab_size=vocabulary)
    cell = Cell(np.random.default_rng(0).integers(3, vocabulary, length), length, length + 3)
    embedding = vocabulary * 64
    for options in ({}, {"chunk": 100}):
        assert embedding <= largest_tensor(lambda options=options: decode_cells(model, [cell], **options)) < length * length < length * vocabulary


@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize("options", [{}, {"chunk": 7}, {"batch_size": 1}])
def test_tokens_are_counted_to_the_last(name, options):
    model, counted = model_of(name), []
    cells = prompts(model)
    decode_cells(model, cells, on_tokens=counted.append, **options)
    assert sum(counted) == sum(cell.size for cell in cells)
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    counted.clear()
    outputs = decode_cells(model, cells, on_tokens=counted.append, **options)
    model.generation_config.eos_token_id = None
    assert {len(output.best) for output in outputs} == {0}
    assert sum(counted) == sum(cell.size for cell in cells)


def test_what_cannot_be_read_in_chunks_is_refused():
    with pytest.raises(ValueError, match=r"^gemma2 is not known .*; leave out chunk"):
        decode_cells(AutoModelForCausalLM.from_config(tiny_config("gemma2")), prompts(tiny_model()), chunk=8)


def test_forced_scoring_agrees():
    """An answer is right for `exact_match` where greedy decoding writes it, and only there."""
    model = model_of("llama")
    free = [Cell(np.random.default_rng(i).integers(3, 259, 60), 60, 64) for i in range(8)]
    written = [output.best for output in decode_cells(model, free)]
    answers = [np.array(tokens[:3]) for tokens in written]
    for i in range(0, 8, 2):
        answers[i][i % 3] = (answers[i][i % 3] + 1) % 300
    cells = [Cell(np.append(cell.ids, answer), 60, 64) for cell, answer in zip(free, answers, strict=True)]
    outputs = scoring.score_cells(model, cells)
    assert [exact_match(c, o, BYTES, lambda text: False) for c, o in zip(cells, outputs, strict=True)] == [False, True] * 4
    assert [o.best.tolist() for o in outputs[1::2]] == [tokens.tolist() for tokens in written[1::2]]


# --- evaluate

VT = {"name": "vt", "n": 3}
NIAH = {"name": "niah_single_1", "n": 1, "depths": 2, "scoring": "generated"}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(evaluation, "plot_results", lambda rows, folder: [])


def test_free_cells_are_evaluated_and_resumed(base, tmp_path, monkeypatch):
    calls, seen = [], []

    def counting(model, cells, *rest, **options):
        calls.append(cells[0].size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode_cells(model, cells, *rest, **options)

    monkeypatch.setattr(evaluation, "decode_cells", counting)
    arguments = {"out": tmp_path, "progress": lambda *now: seen.append(now[1:])}
    with pytest.raises(KeyboardInterrupt):
        evaluate(base, [VT, NIAH], [1500, 1600], **arguments)
    rows = evaluate(base, [VT, NIAH], [1500, 1600], **arguments)
    assert calls == [1500, 1600, 1500, 1500, 1600]
    assert seen[-1] == (2 * 1600, 2 * 1600)
    assert [(r["task"], r["length"], r["metric"], r["n"], r["tokens"]) for r in rows if r["depth"] is None] == [
        ("vt:n=3", 1500, "accuracy", 3, 4500), ("vt:n=3", 1600, "accuracy", 3, 4800),
        ("niah_single_1:n=1,depths=2,scoring=generated", 1500, "accuracy", 2, 3000), ("niah_single_1:n=1,depths=2,scoring=generated", 1600, "accuracy", 2, 3200),
    ]  # fmt: skip


def saying(texts):
    """In place of a model: what it writes, cell by cell."""

    def decode(model, cells, *_, **__):
        written = [np.array(BYTES(texts(model, cell))["input_ids"]) for cell in cells]
        return [decoding.Scored(np.zeros(len(ids)), ids) for ids in written]

    return decode


def test_partial_credit_is_paired_with_the_baseline(base, tmp_path, monkeypatch):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    BYTES.save_pretrained(tmp_path / "other")
    weights = [tiny_model().lm_head.weight]

    def names(model, cell):
        return " ".join(cell.answers[:3] if model.lm_head.weight.equal(weights[0]) else cell.answers[:1])

    monkeypatch.setattr(evaluation, "decode_cells", saying(names))
    rows = evaluate(base, {"name": "vt", "n": 6}, 1500, out=tmp_path / "out", baseline=tmp_path / "other")
    assert [(r["metric"], r["value"]) for r in rows] == [("accuracy", pytest.approx(0.6)), ("accuracy", pytest.approx(0.2)), ("change_from_baseline", pytest.approx(0.4))]
    assert (rows[2]["ci_low"], rows[2]["ci_high"]) == (pytest.approx(0.4), pytest.approx(0.4))  # the same in all of them


def test_out_of_memory_is_tried_again_with_less_at_a_time(base, tmp_path, monkeypatch):
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 6400)
    tried = []

    def tight(model, cells, batch_size=None, on_tokens=None, chunk=None, cache="dynamic"):
        tried.append((batch_size, chunk))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("no memory")
        return decode_cells(model, cells, batch_size, on_tokens, chunk)

    monkeypatch.setattr(evaluation, "decode_cells", tight)
    rows = evaluate(base, VT, 1500, out=tmp_path)
    assert tried == [(None, None), (1, None), (1, 100)]
    assert rows[0]["metric"] == "accuracy"


def test_a_model_that_gives_nan_has_failed(tmp_path):
    model = tiny_model()
    model.lm_head.weight.data[5] = math.nan
    model.save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    rows = evaluate(tmp_path / "model", VT, [1500], out=tmp_path / "out")
    assert [(r["metric"], r["error"]) for r in rows] == [("failed", "the model gives probabilities that are not finite")]


def test_what_a_state_space_model_writes_is_scored(tmp_path):
    model = stock("mamba")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    rows = evaluate(tmp_path / "model", VT, [1500], out=tmp_path / "out", chunk=512)
    assert [(r["metric"], r["n"]) for r in rows] == [("accuracy", 3)]


def test_scoring_is_an_option():
    assert load_task("niah_single_2").scoring == load_task("needle").scoring == "forced"
    with pytest.raises(ValueError, match="vt: scoring: input should be 'forced' or 'generated', got 'ruler'"):
        load_task({"name": "vt", "scoring": "ruler"})
