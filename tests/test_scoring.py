"""Forced scoring where cells begin alike: each beginning is read once, and the numbers are those of one whole forward pass."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, DynamicCache

from hf_longctx import scoring
from hf_longctx.integration import cache as caches
from hf_longctx.integration.attention import FULL_ROWS, LONGCTX
from hf_longctx.method import load_methods
from hf_longctx.patching import patch_model
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell, load_task
from tests.conftest import FAMILIES, byte_tokenizer, largest_tensor, refused_in_a_line, tiny_config, tiny_model
from tests.test_evaluation import assert_equal, reference

LENGTH = 96
SHARING = list(FAMILIES)
METHODS = {"bias": ["alibi"], "attention": ["log_n"], "both": ["alibi", "log_n"], "embedding": ["sinusoidal"], "rope": [{"name": "yarn", "factor": 4}]}


def grid(depths=(0.3, 0.6, 1.0), keys=4, length=LENGTH, seed=0, **asked) -> list[Cell]:
    """A passkey grid in the small: one haystack, a needle of five tokens at each depth, a question with an answer of three."""
    rng = np.random.default_rng(seed)
    hay, question = rng.integers(3, 250, length), rng.integers(3, 250, 4)
    found = []
    for depth in depths:
        cut = round(depth * (length - 12))
        for _ in range(keys):
            key = rng.integers(3, 250, 3)
            needle = np.array([7, 8, *key])
            ids = np.concatenate([hay[:cut], needle, hay[cut : length - 12], question, key])
            found.append(Cell(ids, length - 3, length + 1, depth, **asked))
    return [found[i] for i in rng.permutation(len(found))]


def tokens_read(model, run) -> int:
    """Tokens that the decoder reads while `run()` runs, without the single ones that ask for the output embedding's form."""
    return sum(a * b for a, b in shapes_read(model, run))


def shapes_read(model, run) -> list[tuple[int, int]]:
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(_shape(kwargs)), with_kwargs=True)
    run()
    hook.remove()
    return [shape for shape in seen if shape != (1, 1)]


def _shape(kwargs):
    given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    return tuple(given.shape[:2])


def distinct_beginnings(cells) -> int:
    """What has to be read at least: the tokens of a trie of all cells."""
    ordered = sorted(tuple(cell.ids) for cell in cells)
    common = [next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a)) for a, b in pairwise(ordered)]
    return sum(map(len, ordered)) - sum(common)


def small_passes(monkeypatch, tokens):
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", tokens)


def law_shared_is_whole(model, cells, **options):
    assert_equal(score_cells(model, cells, **options), [reference(model, cell) for cell in cells])


# --- the numbers


PIECES = [(4096, {}), (24, {}), (200, {"batch_size": 3}), (4096, {"chunk": 10})]


@pytest.mark.parametrize(
    ("family", "tokens", "options"),
    [
        pytest.param(family, *pieces, marks=[pytest.mark.floor] if i % 4 == j else [])
        for i, family in enumerate(SHARING)
        for j, pieces in enumerate(PIECES)
        if family in ("llama", "gemma3_text") or (i - j) % 2 == 0
    ],
)
def test_shared_is_whole(family, tokens, options, monkeypatch):
    """In one piece a cell, in many small ones, in batches that the rows do not fill; a sliding window is left behind by all of them."""
    small_passes(monkeypatch, tokens)
    model, cells = tiny_model(family), grid()
    law_shared_is_whole(model, cells, **options)
    assert tokens_read(model, lambda: score_cells(model, cells, **options)) < 0.7 * sum(len(cell.ids) for cell in cells)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_float64_only_rounding_is_left(family):
    model, cells = tiny_model(family).double(), grid()
    for found, wanted in zip(score_cells(model, cells), score_cells(model, cells, share=False), strict=True):
        np.testing.assert_allclose(found.nll, wanted.nll, atol=1e-6)  # a softmax in float32 is what remains
        assert found.best.tolist() == wanted.best.tolist()


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("tokens", [4096, 24])
def test_models_with_methods_share_too(methods, tokens, monkeypatch):
    small_passes(monkeypatch, tokens)
    model, cells = patch_model(tiny_model(), load_methods(methods)), grid()
    for name, parameter in model.named_parameters():
        if name.startswith("longctx_"):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    law_shared_is_whole(model, cells)
    assert tokens_read(model, lambda: score_cells(model, cells)) < 0.7 * sum(len(cell.ids) for cell in cells)
    assert model.config._attn_implementation == (LONGCTX if methods[0] in ("alibi", "log_n", "sinusoidal") else "sdpa")


def test_an_adapter_counts():
    plain, cells = tiny_model(), grid()
    before = score_cells(plain, cells)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    law_shared_is_whole(model, cells)
    assert not np.allclose(score_cells(model, cells)[0].nll, before[0].nll, atol=1e-2)


@pytest.mark.parametrize("implementation", ["eager", FULL_ROWS])
def test_other_attention_reads_over_a_cache_too(implementation, monkeypatch):
    small_passes(monkeypatch, 200)
    model, cells = tiny_model("mistral"), grid()
    model.set_attn_implementation(implementation)
    law_shared_is_whole(model, cells)
    assert model.config._attn_implementation == implementation


def test_what_a_cell_asks_for_it_gets(monkeypatch):
    """Spans of every kind, behind a common beginning, up to it and before it; probabilities; lengths that differ."""
    small_passes(monkeypatch, 200)
    rng = np.random.default_rng(1)
    hay = rng.integers(3, 250, 90)
    spans = [(60, 80), (60, 81), (61, 62), (59, 80), (30, 80), (1, 80), (80, 81), (12, 20)]
    cells = [Cell(np.append(hay[:60], rng.integers(3, 250, 20)), *span, distribution=i % 2 == 0) for i, span in enumerate(spans)]
    cells += [Cell(np.append(hay[:60], rng.integers(3, 250, n)), 62, 60 + n) for n in (5, 30, 30, 3)]
    cells += [Cell(hay[:70], 65, 71), Cell(hay, 65, 91), Cell(hay, 89, 91), Cell(hay, 89, 91)]
    model = tiny_model()
    found = score_cells(model, cells)
    assert_equal(found, [reference(model, cell) for cell in cells])
    whole = score_cells(model, cells, share=False)
    for cell, a, b in zip(cells, found, whole, strict=True):
        assert (a.probabilities is None) == (not cell.distribution)
        if cell.distribution:
            np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
    assert tokens_read(model, lambda: score_cells(model, cells)) < sum(len(cell.ids) for cell in cells)


def test_a_batch_leaves_no_more_behind_than_it_has_in_common():
    """The first two are scored from early on, so that they share less than they begin with, and less than the others take up."""
    text = np.random.default_rng(2).integers(3, 250, 80)
    cells = [Cell(np.append(text, [first, *range(10, 29)]), start, 100) for first, start in ((3, 61), (4, 61), (5, 81), (6, 81))]
    model = tiny_model()
    law_shared_is_whole(model, cells)
    assert tokens_read(model, lambda: score_cells(model, cells)) == 80 + 2 * 40 + 2 * 20


def test_the_model_is_left_as_it_was():
    model, cells = tiny_model(), grid()
    names = set(model.config.to_dict())
    score_cells(model, cells)
    assert model.config._attn_implementation == "sdpa"
    assert set(model.config.to_dict()) == names

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    handle = model.get_decoder().layers[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        score_cells(model, cells)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"


# --- what is read


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_a_beginning_is_read_once(batch_size):
    """All depths lie within a haystack that is read once; needles here differ at once, so that batches compute nothing twice."""
    model, cells = tiny_model(), grid(depths=(0.2, 0.4, 0.6, 0.8, 1.0), keys=6, length=200)
    whole = sum(len(cell.ids) for cell in cells)
    assert tokens_read(model, lambda: score_cells(model, cells, batch_size)) == distinct_beginnings(cells) < 0.6 * whole
    assert tokens_read(model, lambda: score_cells(model, cells, share=False)) == whole


def test_keys_that_begin_alike_have_passes_of_one_shape(monkeypatch):
    cells = load_task({"name": "passkey", "depths": 6, "n": 8}).cells(byte_tokenizer(), [], 1200, 0)
    model = tiny_model()
    shapes = shapes_read(model, lambda: score_cells(model, cells, 1))
    monkeypatch.setattr(scoring, "_SHAPES", 10**6)
    others = shapes_read(model, lambda: score_cells(model, cells, 1))
    assert len({*shapes}) < len({*others})
    assert sum(length for _, length in shapes) < 1.02 * sum(length for _, length in others)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_pass_is_no_longer_than_it_may_be(implementation, monkeypatch):
    """For the user's chunk, and for masks: rows that would need more are read one by one, in pieces."""
    model, cells = tiny_model(), grid()
    model.set_attn_implementation(implementation)
    assert max(length for _, length in shapes_read(model, lambda: score_cells(model, cells))) > 20
    for share in (True, False):
        shapes = shapes_read(model, lambda share=share: score_cells(model, cells, chunk=20, share=share))
        assert max(length for _, length in shapes) == 20
        assert max(rows for rows, _ in shapes) > 1
    small_passes(monkeypatch, 3 * LENGTH)
    assert max(rows for rows, _ in shapes_read(model, lambda: score_cells(model, cells))) == (3 if implementation == "eager" else 4)  # copies, or none
    monkeypatch.setattr(scoring, "queries_at_once", lambda cache, rows, keys, masked: max(1, 2000 // (rows * keys)) if masked else keys)
    over = [shape for shape in shapes_read(model, lambda: score_cells(model, cells)) if shape[1] != LENGTH]
    assert (max(rows * length for rows, length in over) <= 2000 // 60) == (implementation == "eager")
    law_shared_is_whole(model, cells)


@pytest.mark.parametrize("task", ["passkey", "niah_single_1"])
def test_the_grid_of_a_task_shares_its_haystack(task):
    """Tasks need not be known for it: ten depths of one haystack leave half of the tokens to be read."""
    cells = load_task({"name": task, "depths": 10, "n": 4}).cells(byte_tokenizer(), [], 1200, 0)
    model = tiny_model()
    share = tokens_read(model, lambda: score_cells(model, cells)) / sum(len(cell.ids) for cell in cells)
    assert share < 0.62


def test_texts_of_their_own_are_read_as_before():
    """Too little in common is not worth a cache; nor is anything where the first token is scored."""
    rng = np.random.default_rng(0)
    head = rng.integers(3, 250, 9)
    cells = [Cell(np.append(head, rng.integers(3, 250, 91)), 95, 101) for _ in range(4)]
    same = [Cell(cells[0].ids, 1, 100)] * 2
    model = tiny_model()
    assert shapes_read(model, lambda: score_cells(model, cells)) == [(4, 100)]
    assert shapes_read(model, lambda: score_cells(model, same)) == [(2, 100)]


def test_models_that_have_to_be_read_whole_share_nothing():
    cells = grid()
    whole = sum(len(cell.ids) for cell in cells)
    for model in (
        tiny_model("gemma2", head_dim=16),
        tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        tiny_model("mamba"),
    ):
        assert tokens_read(model, lambda model=model: score_cells(model, cells)) == whole


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"chunk": 16}, {"share": False}])
def test_progress_adds_up_to_the_tokens_of_all_cells(options, monkeypatch):
    small_passes(monkeypatch, 200)
    counted, cells = [], grid()
    score_cells(tiny_model(), cells, on_tokens=counted.append, **options)
    assert sum(counted) == sum(len(cell.ids) for cell in cells)
    assert min(counted) >= 0


# --- memory


def test_what_does_not_fit_into_a_cache_is_read_whole(monkeypatch, caplog):
    """Cells that were finished are not read again, and progress still adds up."""
    small_passes(monkeypatch, 200)
    model, cells, counted, seen = tiny_model(), grid(), [], []
    wanted = [reference(model, cell) for cell in cells]
    real = caches._Layer.update

    def tight(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(caches._Layer, "update", tight)
    found = []
    with caplog.at_level(logging.WARNING):
        shapes = shapes_read(model, lambda: found.extend(score_cells(model, cells, on_tokens=counted.append)))
    assert_equal(found, wanted)
    again = sum(rows for rows, length in shapes if length == LENGTH)
    assert 0 < again < len(cells)
    assert caplog.messages == [f"out of memory: {again} cells are read whole, without sharing what they begin with"]
    assert min(counted) < 0
    assert sum(counted) == sum(len(cell.ids) for cell in cells)


@pytest.mark.parametrize("share", [True, False])
def test_no_mask_of_queries_by_keys_is_built(share):
    """Over a cache neither: the largest tensor is linear in the length."""
    model, length = tiny_model(), 1024
    cells = grid((0.5,), 2, length) if share else [Cell(np.random.default_rng(0).integers(3, 250, length), 1000, length)]

    def run(**options):
        return largest_tensor(lambda: score_cells(model, cells, chunk=512, **options))

    assert run() <= length * 4 * 96
    model.set_attn_implementation("eager")
    assert run() >= 512 * length


def test_where_a_mask_is_needed_passes_are_small_enough_for_it():
    def once(family, rows, keys, masked, **changes):
        return caches.queries_at_once(caches.TextCache(tiny_config(family, **changes), keys), rows, keys, masked)

    assert once("llama", 1, 2**17, masked=True) == 2**11
    assert once("llama", 4, 2**17, masked=True) == 2**9
    assert once("llama", 1, 2**17, masked=False) >= 2**20
    for masked in (False, True):
        size = once("mistral", 1, 2**17, masked, sliding_window=2**12)
        assert 0.99 * 2**28 < size * (size + 2**12) <= 2**28
    assert once("gemma3_text", 1, 2**20, masked=True, sliding_window=2**10) == 2**8


# --- attention


def parts(rows=1, groups=3, queries=7, before=19, batch=None, dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    batch = batch or rows

    def random(*size):
        return torch.randn(*size, 16, generator=made, dtype=dtype)

    query = random(batch, queries, 2 * groups).transpose(1, 2)
    return query, tuple(random(batch, 2, queries) for _ in range(2)), tuple(random(rows, 2, before) for _ in range(2))


def dense(query, own, past, scale):
    batch, heads, queries, _ = query.shape
    key, value = (torch.cat([p.repeat_interleave(batch // p.shape[0], 0), o], 2).repeat_interleave(heads // o.shape[1], 1) for p, o in zip(past, own))
    logits = (query @ key.mT) * scale
    seen = torch.ones(queries, key.shape[2], dtype=torch.bool).tril(key.shape[2] - queries)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("block", [2**24, 1])
@pytest.mark.parametrize(
    "sizes", [{}, {"groups": 1}, {"rows": 2}, {"rows": 1, "batch": 4}, {"rows": 2, "batch": 6}, {"queries": 1}, {"before": 1}, {"queries": 40, "before": 3}]
)
def test_attention_in_two_parts_is_attention(sizes, kernel, block, monkeypatch):
    monkeypatch.setattr(caches, "_BLOCK", block)
    if not kernel:
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: SDPBackend.MATH.value)
    given = parts(**sizes)
    kept = [t.clone() for t in (given[0], *given[1], *given[2])]
    torch.testing.assert_close(caches.over_past(*given, 0.3), dense(*given, 0.3))
    for t, before in zip((given[0], *given[1], *given[2]), kept):
        assert torch.equal(t, before)


@pytest.mark.parametrize("choice", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
def test_the_kernels_of_a_gpu_take_what_they_are_given(choice, monkeypatch):
    """Without one: torch's own account of their arguments and of the shapes of what they return."""
    called = []
    name = {"FLASH_ATTENTION": "flash", "CUDNN_ATTENTION": "cudnn", "EFFICIENT_ATTENTION": "efficient"}[choice]
    real = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: SDPBackend.__members__[choice].value)
    monkeypatch.setattr(torch.ops.aten, real.__name__.split(".")[-1], lambda *args, **kwargs: called.append(args[0].shape) or real(*args, **kwargs))
    query, own, past = parts(rows=1, batch=4)
    query, *rest = (t.to("meta", torch.bfloat16) for t in (query, *own, *past))
    assert caches.over_past(query, rest[:2], rest[2:], 0.3).shape == query.shape
    assert called == [query.shape, (1, 2, 4 * 3 * query.shape[2], 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes_the_error_is_that_of_sdpa(dtype):
    wide = parts(rows=1, batch=2, queries=64, before=200)
    narrow = (wide[0].to(dtype), *(tuple(t.to(dtype) for t in pair) for pair in wide[1:]))
    exact = dense(*wide, 0.25)
    stock = (dense(*narrow, 0.25).double() - exact).abs().max()
    found = caches.over_past(*narrow, 0.25)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= 2 * stock


@pytest.mark.floor
def test_a_cache_of_transformers_is_read_the_same_way():
    """Keys come in one then, and are cut where the piece begins; padding or a window brings a mask, which is obeyed."""
    model, ids = tiny_model("gemma3_text"), torch.randint(3, 250, (2, 80))
    wanted = model(ids).logits
    for padded in (False, True):
        given = {"attention_mask": torch.ones(2, 80, dtype=torch.long)} if padded else {}
        if padded:
            given["attention_mask"][1, :11] = 0
            wanted = model(ids, **given).logits
        cache, logits = DynamicCache(config=model.config), []
        with caches.fast_over_cache(model) as fast:
            assert fast
            for start in range(0, 80, 16):
                mask = {name: t[:, : start + 16] for name, t in given.items()}
                logits.append(model(ids[:, start : start + 16], past_key_values=cache, **mask).logits)
        rows = given["attention_mask"].bool() if padded else torch.ones(2, 80, dtype=torch.bool)
        torch.testing.assert_close(torch.cat(logits, 1)[rows], wanted[rows], atol=1e-4, rtol=1e-4)


def test_the_law_sees_a_past_that_is_lost_or_not_causal(monkeypatch):
    model, cells = tiny_model(), grid()
    real = AttentionInterface()[caches.OVER_CACHE]

    def forgets(module, query, key, value, mask, text=None, **rest):
        return real(module, query, key, value, mask, text=None, **rest)

    monkeypatch.setitem(AttentionInterface._global_mapping, caches.OVER_CACHE, forgets)
    with pytest.raises(AssertionError):
        law_shared_is_whole(model, cells)
    monkeypatch.undo()
    law_shared_is_whole(model, cells)


# --- other caches


def test_caches_that_cannot_be_had_are_refused(monkeypatch):
    model, cells = tiny_model(), grid()
    refused_in_a_line(lambda: score_cells(model, cells, cache="offloaded"), "an offloaded cache moves keys and values off a CUDA GPU, but the model is on cpu")
    refused_in_a_line(lambda: score_cells(model, cells, cache="static"), "unknown cache 'static'")
    refused_in_a_line(lambda: score_cells(tiny_model("mamba"), cells, cache="quantized"), "mamba passes states on, not keys and values")
    refused_in_a_line(lambda: score_cells(tiny_model("gemma2", head_dim=16), cells, cache="offloaded"), "gemma2 is not known to give the same numbers")

    def missing(*args):
        raise ImportError("You need to install optimum-quanto")

    monkeypatch.setattr(caches, "QuantizedCache", missing)
    refused_in_a_line(lambda: score_cells(model, cells, cache="quantized"), "a quantized cache needs optimum-quanto")
    monkeypatch.undo()
    refused_in_a_line(lambda: score_cells(tiny_model("gemma3_text"), cells, cache="quantized"), "a quantized cache takes full attention in every layer")


class Offloaded(DynamicCache):
    """What remains of an offloaded cache without a GPU."""

    def __init__(self, config, offloading=False):
        super().__init__(config=config)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_offloaded_cache_shares_where_it_can_be_cropped(family, monkeypatch):
    """A sliding window of Transformers forgets; there each cell is read by itself, in chunks."""
    monkeypatch.setattr(caches, "_OffloadedCache", Offloaded)
    monkeypatch.setattr(scoring, "check_cache", lambda *args: None)
    monkeypatch.setattr(scoring, "make_cache", lambda kind, config, room, device: caches.make_cache(kind, config, room, "cuda"))
    small_passes(monkeypatch, 16 * 20)
    model, cells = tiny_model(family), grid()
    law_shared_is_whole(model, cells, cache="offloaded")
    shapes = shapes_read(model, lambda: score_cells(model, cells, cache="offloaded"))
    assert max(length for _, length in shapes) == 20
    assert (sum(a * b for a, b in shapes) < sum(len(cell.ids) for cell in cells)) == (family == "llama")


def test_an_offloaded_layer_is_fetched_when_it_has_left_the_device(monkeypatch):
    """The stream that fetches waits for the one that computes, which also copies to the host."""
    told = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "computing")
    monkeypatch.setattr(caches.DynamicCache, "prefetch", lambda self, layer, only_non_sliding=True: told.append(layer))
    cache = caches._OffloadedCache(config=tiny_model().config)
    cache.prefetch_stream = SimpleNamespace(wait_stream=told.append)
    cache.prefetch(1)
    assert told == ["computing", 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_offloaded_cache_gives_the_same_numbers():
    """Wide enough that copies to the host are still under way when the next layer is asked for."""
    model = tiny_model(num_hidden_layers=8, hidden_size=1024, intermediate_size=2048, max_position_embeddings=2**15).cuda().bfloat16()
    ids = torch.randint(3, model.config.vocab_size, (2**15,), generator=torch.Generator().manual_seed(0)).numpy()
    kept, offloaded = (score_cells(model, [Cell(ids, 1, len(ids))], chunk=4096, cache=kind)[0].nll for kind in ("dynamic", "offloaded"))
    assert np.abs(kept - offloaded).mean() < 0.01


def test_a_quantized_cache_reads_each_cell_by_itself(monkeypatch):
    """With a quantiser that rounds nothing the numbers are the same; chunks are of a sixteenth of what is read at once."""
    made = []

    def exact(backend, config):
        made.append(backend)
        return DynamicCache(config=config)

    monkeypatch.setattr(caches, "QuantizedCache", exact)
    small_passes(monkeypatch, 16 * 20)
    model, cells = tiny_model(), grid()
    law_shared_is_whole(model, cells, cache="quantized")
    assert set(made) == {"quanto"}
    shapes = shapes_read(model, lambda: score_cells(model, cells, cache="quantized"))
    assert sum(a * b for a, b in shapes) == sum(len(cell.ids) for cell in cells)
    assert max(length for _, length in shapes) == 20
    assert max(length for _, length in shapes_read(model, lambda: score_cells(model, cells, cache="quantized", chunk=50))) == 50
