"""What holds for every method of the bias, attention and embedding slots, on every family it works on.

Each law is a function, so that something deliberately broken can be handed to it and be caught.
"""

import copy
import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, StaticCache
from transformers.masking_utils import sdpa_mask

import hf_longctx
from hf_longctx import checkpoint, files
from hf_longctx.integration import attention, auto, configs, rope
from hf_longctx.method import SLOTS, load_methods, method_class, method_names
from hf_longctx.methods import key_norm
from hf_longctx.modules import Bias, Formula, Scaling
from hf_longctx.patching import patch_model
from tests.conftest import FAMILIES, TINY, WINDOW, byte_tokenizer, largest_tensor, tiny_model
from tests.test_laws import law_decoding_equals_prefill, law_padding_changes_nothing, logits, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
floor = pytest.mark.floor
BIAS = {
    "alibi": {"name": "alibi"},
    "kerple": {"name": "kerple"},
    "kerple_power": {"name": "kerple", "form": "power", "per_layer": True},
    "sandwich": {"name": "sandwich", "dim": 16},
    "fire": {"name": "fire", "threshold": 16, "width": 4},
    "t5": {"name": "t5", "max_distance": 48},
    "wavelet_bias": {"name": "wavelet_bias", "scales": 6, "per_layer": True},
    "mkl_alibi": {"name": "mkl_alibi"},
    "mkl_learned": {"name": "mkl_alibi", "preset": "mep_learned", "learn_weights": True, "per_layer": True},
}
ATTENTION = {
    "log_n": {"name": "log_n", "reference": 16},
    "ssmax": {"name": "ssmax", "offset": True},
    "key_norm": {"name": "key_norm", "by": "mean"},
    "key_norm_sum": {"name": "key_norm", "by": "sum", "gain": 30.0, "learn_gain": True},
}
EMBEDDING = {
    "sinusoidal": {"name": "sinusoidal", "gain": 0.5},
    "learned": {"name": "learned", "gain": 5.0},
    "legendre": {"name": "legendre", "gain": 0.2},
    "wavelet": {"name": "wavelet", "gain": 0.5, "psi": "ricker"},
}
ROPE = {"yarn": {"name": "yarn", "factor": 2.5}, "nope": {"name": "nope", "target": 160}}
SPECS = BIAS | ATTENTION | EMBEDDING | ROPE
ALONE = [("llama", (name,)) for name in (*BIAS, *ATTENTION, *EMBEDDING)]


ONE_EACH = ["alibi", "kerple", "sandwich", "fire", "t5", "wavelet_bias", "mkl_learned"]


def together(family: int, i: int) -> tuple[str, ...]:
    """A method of every slot, so that over all i each family meets each method, alone with its RoPE, with another and without."""
    others = [list(ATTENTION)[(i + family) % 4], list(EMBEDDING)[(i + family // 2) % 4]]
    return (ONE_EACH[i], *others, *[(), ("yarn",), ("nope",)][(i + family) % 3])


COVERING = [(name, together(f, i)) for f, name in enumerate(FAMILIES) for i in range(len(ONE_EACH))]
CASES = [*ALONE, *COVERING[::2]]
OTHER_CASES = [*ALONE, *COVERING[1::2]]
FAMILY_EACH = [(name, together(f, f % len(ONE_EACH))) for f, name in enumerate(FAMILIES)]
FEW = [*ALONE, *FAMILY_EACH]  # for what depends little on the family
MET = {SPECS[name]["name"] for _, names in FAMILY_EACH for name in names}
ONCE = [*((f, n) for f, n in ALONE if SPECS[n[0]]["name"] not in MET), *FAMILY_EACH]  # each family and each method once


def cases(those: list[tuple[str, tuple[str, ...]]], short: Iterable[str] = ("llama", "gemma3_text", "gpt_neox")) -> Any:
    """A parametrisation; the first case of each family of `short` is in the short leg."""
    first = {family: (family, names) for family, names in reversed(those) if family in short}
    marked = [pytest.param(f, n, id=f"{f}-{'+'.join(n)}", marks=[floor] if first.get(f) == (f, n) else []) for f, n in those]
    return pytest.mark.parametrize(("family", "names"), marked)


def specs(names: tuple[str, ...]) -> tuple[Any, ...]:
    return load_methods([SPECS[name] for name in names])


def stir(model):
    """Parameters as after some training: none at zero, none like another layer's."""
    generator = torch.Generator().manual_seed(1)
    for formula in formulas(model):
        for parameter in formula.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).abs()  # some have a least value
    return model


def formulas(model) -> list[Formula]:
    return [module for module in model.modules() if isinstance(module, Formula)]


def patched(family: str = "llama", names: tuple[str, ...] = ("alibi",), **changes):
    return stir(patch_model(tiny_model(family, **changes), specs(names)))


def stock(family: str, names: tuple[str, ...] = ()):
    """The same weights with the rope methods of `names` only, in Transformers' own class."""
    model = patch_model(tiny_model(family), specs(tuple(name for name in names if name in ROPE)))
    if family == "mistral":
        model.config.sliding_window = None
    assert not isinstance(model, auto.LongctxModel)
    return model


def close(got: Tensor, want: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-4)


# --- Attention once more, in float64 and one piece: visible keys are counted in the mask, bias tables are looked up.


@dataclasses.dataclass
class Reference:
    """What a stock model has to add and multiply, by layer."""

    bias: dict[int, Tensor]
    factor: dict[int, Any]


def reference_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, reference=None, **rest):
    groups, layer = query.shape[1] // key.shape[1], module.layer_idx
    q, k, v = query.double(), key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    scores = q @ k.mT * scaling
    if layer in reference.factor:
        scores = scores * reference.factor[layer](attention_mask, k)[..., None]
    if layer in reference.bias:
        scores = scores + reference.bias[layer].double()
    weights = scores.masked_fill(~attention_mask, -1e300).softmax(-1)
    return (weights @ v).to(query.dtype).transpose(1, 2).contiguous(), None


def whole_mask(**arguments):
    return sdpa_mask(**arguments | {"allow_is_causal_skip": False})


AttentionInterface.register("reference_eager", reference_attention)
AttentionMaskInterface.register("reference_eager", whole_mask)


def factor(item, formula: Formula | None):
    """[batch, heads, queries]: what an attention method multiplies logits by."""

    def compute(mask: Tensor, key: Tensor) -> Tensor:
        seen = mask.sum(-1).double()
        if item.name == "log_n":
            return (seen.log() / math.log(item.reference)).clamp(min=1)
        if item.name == "ssmax":
            return formula.s[:, None].double() * seen.log() + formula.b[:, None].double()
        lengths = key.norm(dim=-1)[:, :, None, :] * mask
        total = lengths.sum(-1) / (seen if item.by == "mean" else 1)
        gain = formula.gain[:, None].double() if item.learn_gain else item.gain
        return gain * math.sqrt(key.shape[-1]) / total

    return compute


def expected(family: str, names: tuple[str, ...], model, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits of the stock model with the parameters of `model`, computed as above."""
    plain, chosen = stock(family, names), specs(names)
    count = plain.config.num_hidden_layers
    layers = [5] if family == "gemma3_text" else range(count)  # the others slide
    reference = Reference({}, {})
    heads = torch.arange(plain.config.num_attention_heads)[:, None, None]
    for item in chosen:
        for layer in layers:
            if "bias" in item.slots:
                q_pos, k_pos = positions[:, None, :, None], positions[:, None, None, :]
                reference.bias[layer] = model.longctx_bias.of(layer)(heads, q_pos, k_pos)
            if "attention" in item.slots:
                reference.factor[layer] = factor(item, model.longctx_attention.layers[layer])
    embeds = plain.get_input_embeddings()(ids)
    if hasattr(model, "longctx_embedding"):
        formula = model.longctx_embedding.layers[0]
        embeds = embeds + formula.gain * formula.formula(formula.values(), positions)
    plain.set_attn_implementation("reference_eager")
    with torch.no_grad():
        return plain(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, reference=reference, use_cache=False).logits


def padded(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of two rows, the first one padded on the left."""
    ids = tokens(length, rows=2)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


# --- The laws.


def law_equals_the_reference(model, family: str, names: tuple[str, ...]) -> None:
    ids, mask, positions = padded(WINDOW)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    want = expected(family, names, model, ids, mask, positions)
    close(got[mask.bool()], want[mask.bool()], 1e-4)


def law_equals_position_bias(model, family: str, names: tuple[str, ...]) -> None:
    """Transformers' own keyword: one table for all layers."""
    ids, plain = tokens(WINDOW, rows=2), stock(family, names)
    where = torch.arange(WINDOW)
    table = model.longctx_bias.of(0)(torch.arange(plain.config.num_attention_heads)[:, None, None], where[:, None], where[None])
    with torch.no_grad():
        want = plain(input_ids=ids, position_bias=table[None].expand(2, -1, -1, -1)).logits
    close(logits(model, ids), want, 1e-4)


def law_chunks_equal_prefill(model, cache=None) -> None:
    """A left-padded batch, in pieces: one ends inside the padding."""
    ids, mask, positions = padded(36)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        found, begin = [], 0
        for size in (5, 17, 1, 2, 11):
            end = begin + size
            out = model(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
            begin = end
    close(torch.cat(found, 1)[mask.bool()], whole[mask.bool()])


WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 7},
}


def generated(model, ids: Tensor, mask: Tensor, **way: Any) -> tuple[Tensor, Tensor]:
    """Eight tokens and their logits, [rows, 8] and [rows, 8, vocabulary]."""
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **way
        )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def law_generation_agrees(model, length: int = 24) -> None:
    """Whatever the cache, and whether a row is alone or padded."""
    ids, mask, _ = padded(length)
    wanted, values = generated(model, ids, mask)
    for way in list(WAYS)[1:]:
        got, others = generated(model, ids, mask, **WAYS[way])
        assert got.equal(wanted), way
        close(others, values)
    begin = length // 3
    for way in ("dynamic", "static"):  # a static cache without padding is read up to where it is filled, without a mask
        alone, others = generated(model, ids[:1, begin:], mask[:1, begin:], **WAYS[way])
        assert alone.equal(wanted[:1]), way
        close(others, values[:1])


def run(model, ids: Tensor, checkpointing: bool, positions: Tensor | None = None) -> list[Tensor]:
    """Hidden states and the gradients of everything."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    hidden = model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    model.gradient_checkpointing_disable()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def law_rows_do_not_mix(model, length: int = WINDOW) -> None:
    """Each row gets what it gets alone, also where no mask says how many there are."""
    ids = tokens(length, rows=3)
    with torch.no_grad():
        close(model(input_ids=ids).logits, torch.cat([model(input_ids=row[None]).logits for row in ids]), 1e-5)


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that are read, and shapes that depend on them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        return func(*args, **(kwargs or {}))


def law_promised_rows_are_not_looked_at(model, positions: Tensor, runs: int) -> None:
    """Hidden states and gradients stay what they are, and a step waits for nothing, so that it can be recorded."""
    ids = tokens(positions.shape[1], rows=len(positions))
    with Waits() as looking:
        wanted = run(model, ids, False, positions)
    model = copy.deepcopy(model)
    assert attention.expect_full_rows(model, attention.Rows(runs, 2 * WINDOW))
    with Waits() as waits:
        got = run(model, ids, False, positions)
    assert looking.count > waits.count == 0
    for found, want in zip(got, wanted, strict=True):
        close(found, want, 1e-5)
    assert "full_rows" not in model.config.to_json_string(use_diff=False)
    packed = (positions.shape[1] // 2 > torch.arange(positions.shape[1])).int()
    given = {"attention_mask": ((packed[:, None] == packed) & torch.ones(len(packed), len(packed)).tril().bool())[None, None].expand(len(ids), -1, -1, -1)}
    with torch.no_grad():
        of_documents = model(input_ids=ids, use_cache=False, **given).logits  # 4-D masks are no part of the promise
        model.set_attn_implementation("sdpa")  # with which it ends
        close(of_documents, model(input_ids=ids, use_cache=False, **given).logits, 1e-5)
    law_padding_changes_nothing(model, WINDOW)


def law_blocks_equal_the_whole(model, monkeypatch, block: int = 12000) -> None:
    """And nothing of heads x tokens x tokens is there, forward or backward."""
    ids = tokens(2 * WINDOW)
    whole = run(model, ids, checkpointing=False)
    monkeypatch.setattr(attention, "BLOCK", block)
    table = model.config.num_attention_heads * ids.shape[1] ** 2
    scale = max(value.abs().max().item() for value in whole)
    for checkpointing in (False, True):
        parts: list[Tensor] = []
        largest = largest_tensor(lambda flag=checkpointing, parts=parts: parts.extend(run(model, ids, flag)))
        assert largest < table / 2
        assert len(parts) == len(whole)
        for got, want in zip(parts, whole):
            torch.testing.assert_close(got, want, atol=1e-5 * scale, rtol=1e-3)  # of some gradients nothing but rounding is left


def law_saving_keeps_it(model, folder) -> None:
    ids = tokens(2 * WINDOW)
    hf_longctx.save(model, byte_tokenizer(), folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    close(logits(plain, ids), logits(model, ids), 1e-5)
    assert type(plain) is type(model)
    assert AutoConfig.from_pretrained(folder).longctx == model.config.longctx
    assert plain.state_dict().keys() == model.state_dict().keys()


def law_float32_in_bfloat16(model, half) -> None:
    """Parameters and constants of methods are as exact as ever, and positions far out do no harm."""
    assert next(half.get_decoder().parameters()).dtype == torch.bfloat16
    for got, want in zip(formulas(half), formulas(model), strict=True):
        for name, value in want.values().items():
            assert got.values()[name].dtype == torch.float32
            assert got.values()[name].equal(value), name
    assert logits(half, tokens(4 * WINDOW)).isfinite().all()


def law_gradients_are_the_slopes(model, monkeypatch) -> None:
    """Of every parameter tensor along a random direction, against a difference, in float64."""
    model, to = model.double(), Tensor.to
    # Norms go through float32, and so do some formulas.
    monkeypatch.setattr(Tensor, "to", lambda self, *a, **k: to(self, torch.float64) if a == (torch.float32,) else to(self, *a, **k))
    monkeypatch.setattr(Tensor, "float", lambda self: to(self, torch.float64))
    ids, generator = tokens(WINDOW), torch.Generator().manual_seed(0)
    weight = torch.randn(1, WINDOW, TINY["vocab_size"], generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits * weight).sum()

    loss().backward()
    learned = {name: p for name, p in model.named_parameters() if name.startswith("longctx_")}
    assert learned
    for name, parameter in learned.items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        start, step, ends = parameter.data.clone(), 1e-5, []
        for sign in (1, -1):
            parameter.data = start + sign * step * direction
            with torch.no_grad():
                ends.append(loss().item())
        parameter.data = start
        slope = (ends[0] - ends[1]) / (2 * step)
        grad = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
        assert slope != 0, name
        assert grad == pytest.approx(slope, rel=1e-4, abs=1e-6 * weight.numel() ** 0.5), name


def law_skips_are_distances(model, positions: Tensor) -> None:
    """PoSE: an all-ones mask, and positions that jump."""
    ids = tokens(positions.shape[1])
    want = expected("llama", ("alibi", "log_n"), model, ids, torch.ones_like(ids), positions)
    for more in ({}, {"use_cache": False}):
        with torch.no_grad():
            close(model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, **more).logits, want, 1e-4)


def law_a_copy_is_independent(model, other) -> None:
    ids = tokens(WINDOW)
    before = logits(model, ids)
    close(logits(other, ids), before, 0)
    for formula in formulas(other):
        for name, value in formula.values().items():
            value.data += name != "bucket"  # an index
    assert (logits(other, ids) - before).abs().max() > 0.01
    close(logits(model, ids), before, 0)


def law_an_adapter_holds_the_methods(model, folder, kept: list[str]) -> None:
    """Trained, switched off, saved, loaded and merged with LoRA."""
    from peft import LoraConfig, PeftModel, get_peft_model

    ids, base = tokens(WINDOW), copy.deepcopy(model)
    before = logits(model, ids)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=kept))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    start = {name: p.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    for _ in range(2):
        loss = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = [name for name, p in wrapped.named_parameters() if name in start and not p.equal(start[name])]
    assert all(any(slot in name for name in moved) for slot in ("lora_B", *(f"longctx_{slot}" for slot in auto.SLOTS if hasattr(base, f"longctx_{slot}"))))
    for name, parameter in wrapped.named_parameters():
        if "longctx_" in name and parameter.requires_grad:
            parameter.data += 0.2
    after = logits(wrapped.eval(), ids)
    assert (after - before).abs().max() > 0.01
    with wrapped.disable_adapter():
        close(logits(wrapped, ids), before, 1e-5)
    wrapped.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter").eval()
    close(logits(loaded, ids), after, 1e-5)
    merged = loaded.merge_and_unload()
    close(logits(merged, ids), after, 1e-4)
    law_saving_keeps_it(merged, folder / "merged")


# --- Held to.


def test_every_method_is_under_the_laws():
    for slot, table in (("bias", BIAS), ("attention", ATTENTION), ("embedding", EMBEDDING)):
        assert {spec["name"] for spec in table.values()} == set(method_names(slot))
    assert set(configs.FAMILIES) == set(FAMILIES)
    met = {(f, SPECS[name]["name"]) for f, names in COVERING for name in names}
    assert met == {(f, spec["name"]) for f in FAMILIES for spec in SPECS.values()}


@pytest.mark.parametrize("name", method_names())
def test_no_field_is_called_like_a_slot(name):
    """It would hide the slot's method: `bias: bool = True` makes a method fill the bias slot with True."""
    assert not {field.name for field in dataclasses.fields(method_class(name))} & set(SLOTS)


@cases(CASES, short=FAMILIES)
def test_it_equals_the_reference(family, names):
    model = patched(family, names)
    law_equals_the_reference(model, family, names)
    assert model.config.model_type == f"hf_longctx_{family}"


def test_the_reference_law_catches_another_slope():
    model = patched()
    model.longctx_bias.layers[0].slopes *= 1.01
    wrong = copy.deepcopy(model)
    wrong.longctx_bias.layers[0].slopes *= 1.01
    ids, mask, positions = padded(WINDOW)
    with pytest.raises(AssertionError):
        close(expected("llama", ("alibi",), wrong, ids, mask, positions), expected("llama", ("alibi",), model, ids, mask, positions), 1e-4)


@pytest.mark.parametrize("name", list(ATTENTION))
def test_the_reference_law_catches_a_count_that_is_off_by_one(name, monkeypatch):
    forward = Scaling.forward
    monkeypatch.setattr(Scaling, "forward", lambda self, q, k, q_pos, q_index, k_valid: forward(self, q, k, q_pos, (q_index - 1).clamp(min=1), k_valid))
    with pytest.raises(AssertionError):
        law_equals_the_reference(patched(names=(name,)), "llama", (name,))


@pytest.mark.parametrize("name", list(EMBEDDING))
def test_the_reference_law_catches_embeddings_of_other_positions(name, monkeypatch):
    locate = auto.locate
    monkeypatch.setattr(auto, "locate", lambda *a: dataclasses.replace(t := locate(*a), q_pos=t.q_pos + 1, k_pos=t.k_pos + 1))
    with pytest.raises(AssertionError):
        law_equals_the_reference(patched(names=(name,)), "llama", (name,))


OWN = [("alibi",), ("fire", "yarn"), ("mkl_alibi", "nope")]


@cases([*(("llama", names) for names in OWN), *((name, OWN[i % 3]) for i, name in enumerate(FAMILIES) if name not in ("llama", "gemma3_text"))])
def test_a_bias_equals_transformers_own(family, names):
    law_equals_position_bias(patched(family, names), family, names)


def test_transformers_own_bias_catches_a_bias_of_later_positions(monkeypatch):
    locate = auto.locate
    monkeypatch.setattr(auto, "locate", lambda *a: dataclasses.replace(t := locate(*a), k_pos=t.k_pos - 1))  # alibi would not see it
    with pytest.raises(AssertionError):
        law_equals_position_bias(patched(names=("t5",)), "llama", ("t5",))


@cases(FAMILY_EACH, short=FAMILIES)
def test_decoding_equals_prefill(family, names):
    law_decoding_equals_prefill(patched(family, names), WINDOW + 8)


def test_the_decoding_law_catches_a_scale_that_counts_all_keys(monkeypatch):
    monkeypatch.setattr(method_class("log_n"), "attention", lambda self, shape: Scaling(lambda values, q, k, *rest: (q * math.log(k.shape[2]), k)))
    with pytest.raises(AssertionError):
        law_decoding_equals_prefill(patched(names=("log_n",)), WINDOW)


@cases(OTHER_CASES)
def test_chunks_equal_prefill(family, names):
    law_chunks_equal_prefill(patched(family, names))


@cases(ONCE)
def test_chunks_of_a_static_cache_equal_prefill(family, names):
    model = patched(family, names)
    law_chunks_equal_prefill(model, StaticCache(config=model.config, max_cache_len=48))


def test_the_chunk_law_catches_positions_counted_from_padding(monkeypatch):
    """`generate` gives padding position 0; a chunk that begins inside it does not tell where its keys stand."""
    locate = auto.locate

    def first(length, device, mask, position_ids, cache, layer, *rest):
        found = locate(length, device, mask, position_ids, cache, layer, *rest)
        start = cache.get_query_offset(layer) if cache is not None else 0
        keys = found.k_pos.shape[1]
        return found if keys == length else dataclasses.replace(found, k_pos=torch.arange(keys)[None] - start + position_ids[:, :1])

    monkeypatch.setattr(auto, "locate", first)
    with pytest.raises(AssertionError):
        law_chunks_equal_prefill(patched())


@cases(FAMILY_EACH, short=FAMILIES)
def test_padding_changes_nothing(family, names):
    law_padding_changes_nothing(patched(family, names), WINDOW)


@pytest.mark.parametrize("name", ["log_n", "key_norm"])
def test_the_padding_law_catches_padding_that_is_counted(name, monkeypatch):
    locate = auto.locate
    monkeypatch.setattr(auto, "locate", lambda length, device, mask, *rest: locate(length, device, None, *rest))
    with pytest.raises(AssertionError):
        law_padding_changes_nothing(patched(names=(name,)), WINDOW)


@cases(ONCE)
def test_generation_agrees(family, names):
    law_generation_agrees(patched(family, names))


def test_a_pipeline_generates(tmp_path, capfd):
    """By the name of a folder, a prompt alone and two of different length together, without a word about an unknown model."""
    hf_longctx.save(patched("llama", ("mkl_alibi", "log_n", "nope")), byte_tokenizer(), tmp_path)
    model, tokenizer = hf_longctx.load(tmp_path, device="cpu")
    prompts = ["Where does it say so?", "Here"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        wanted.append(tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True))
    writer = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu", dtype=torch.float32)
    assert isinstance(writer.model, auto.LongctxModel)
    writer.tokenizer.padding_side = "left"
    together = writer(prompts, batch_size=2, return_full_text=False, **options)
    alone = [writer(prompt, return_full_text=False, **options) for prompt in prompts]
    assert [[row["generated_text"] for row in rows] for rows in together] == [[row["generated_text"] for row in rows] for rows in alone] == [[w] for w in wanted]
    assert "not supported" not in capfd.readouterr().err


def test_the_generation_law_catches_a_cache_whose_end_is_read(monkeypatch):
    """A static cache is longer than what is in it."""
    monkeypatch.setattr(method_class("key_norm"), "attention", lambda self, shape: Scaling(lambda values, q, k, *rest: (q / (1 + k.shape[2]), k)))
    with pytest.raises(AssertionError):
        law_generation_agrees(patched(names=("key_norm",)))


@cases(FEW)
def test_rows_do_not_mix(family, names):
    law_rows_do_not_mix(patched(family, names))


def test_the_law_of_rows_catches_a_length_taken_from_the_first(monkeypatch):
    seen = key_norm.visible_length
    monkeypatch.setattr(key_norm, "visible_length", lambda *args: seen(*args)[:1])
    with pytest.raises(AssertionError):
        law_rows_do_not_mix(patched(names=("key_norm",)))


SKIPPING = torch.tensor([[*range(10), *range(30, 52), *range(60, 92)], [*range(40), *range(40, 64)]])  # three runs, and one


@pytest.mark.parametrize(("positions", "runs"), [(torch.arange(64).repeat(2, 1), 1), (SKIPPING, 3)], ids=["plain", "skips"])
@cases(ONCE, short=())
def test_promised_rows_are_not_looked_at(family, names, positions, runs):
    law_promised_rows_are_not_looked_at(patched(family, names), positions, runs)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rotation_beside_a_bias_looks_at_no_positions(family):
    """Longrope would, and so a GPU would be waited for in every pass; phi3 accepts nothing else."""
    assert rope.reads_lengths(patched(family, ("alibi", "nope")).config) is (family == "phi3")


def test_rows_that_skip_too_often_are_not_promised():
    for rows in (attention.Rows(attention.CHUNKS + 1, 64), attention.Rows(2, attention.REACH + 1)):
        model = patched()
        assert not attention.expect_full_rows(model, rows)
        assert model.config._attn_implementation == attention.LONGCTX


BLOCKED = [("llama", (name,)) for name in BIAS] + [("gemma3_text", ("fire", "ssmax", "learned")), ("gpt_neox", ("kerple", "key_norm", "sinusoidal"))]


@cases(BLOCKED)
def test_blocks_equal_the_whole(family, names, monkeypatch):
    law_blocks_equal_the_whole(patched(family, names), monkeypatch)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", [name for name in BIAS if name != "fire"])
def test_a_bias_of_the_distance_is_looked_up(name, skips, monkeypatch):
    """Once a pass each of its distances is computed, where layers share it; forward and backward give what the formula gives for every pair."""
    model, ids = patched(names=(name,)), tokens(2 * WINDOW, rows=2)
    positions = torch.arange(2 * WINDOW).repeat(2, 1)
    positions[1, WINDOW:] += 300 * skips
    computed = []
    model.longctx_bias.of(0).register_forward_pre_hook(lambda module, args: computed.append(args[1].shape))
    got = run(model, ids, False, positions)
    assert {shape[-1] for shape in computed} == {2 * WINDOW + 300 * skips}
    assert len(computed) <= 2  # backward makes it again
    monkeypatch.setattr(attention.Tokens, "reach", None)
    for found, want in zip(got, run(model, ids, False, positions), strict=True):
        close(found, want, 2e-5 * want.abs().max().item())


@pytest.mark.parametrize(("family", "names"), [("llama", ("mkl_learned", "key_norm")), ("llama", ("fire", "sinusoidal")), ("gpt_neox", ("alibi", "log_n"))])
def test_a_compiled_model_is_one_graph(family, names):
    """As stock ones are: nothing is read back where positions are not given. Padding is in the mask, not in the graph."""
    model, ids = patched(family, names).eval(), tokens(WINDOW, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    padded = torch.ones_like(ids).index_fill_(1, torch.arange(3), 0)
    with torch.no_grad():
        for given in ({"use_cache": False}, {"attention_mask": padded}):
            close(compiled(input_ids=ids, **given).logits, model(input_ids=ids, **given).logits, 1e-5)


def test_what_has_more_distances_than_pairs_is_not_looked_up():
    where = torch.tensor([[0, 5000]])
    assert attention.Tokens(where, where, where, None, True).reach is None
    assert attention.Tokens(where[:, 1:], torch.arange(5001)[None], where, None, True).reach is None  # decoding
    padding = torch.tensor([[False, True, True]])
    assert attention.Tokens(torch.tensor([[1, 0, 1]]), torch.tensor([[-900, 0, 1]]), where, padding, True).reach == 2


@pytest.mark.parametrize("alike", [True, False])
def test_a_bias_is_computed_once_for_rows_that_stand_alike(alike, monkeypatch):
    model, ids = patched(names=("fire",)), tokens(2 * WINDOW, 3)
    positions = torch.arange(ids.shape[1]).repeat(3, 1)
    if not alike:
        positions[1, WINDOW:] += 5  # skips, as PoSE
    mask = torch.ones_like(ids)  # without one, Transformers takes a skip for the border of two documents
    one_by_one = [model(input_ids=row[None], attention_mask=mask[:1], position_ids=where[None], use_cache=False).logits for row, where in zip(ids, positions)]
    rows, biased = set(), attention._biased
    monkeypatch.setattr(attention, "_biased", lambda q, k, v, m, q_pos, *rest: (rows.add(len(q_pos)), biased(q, k, v, m, q_pos, *rest))[1])
    close(model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits, torch.cat(one_by_one), 1e-5)
    assert rows == ({1} if alike else {3})


@pytest.mark.parametrize("where", [torch.zeros(2, 1), torch.zeros(1, 5)], ids=["a decoding step", "one row"])
def test_nobody_waits_for_the_device_to_compare_what_is_not_worth_it(where, monkeypatch):
    """Decoding steps may be recorded as a CUDA graph, where waiting is an error."""
    monkeypatch.setattr(Tensor, "__bool__", lambda self: pytest.fail("a tensor was read"))
    found = attention.Tokens(where, where, where, None, True)
    assert found.places == (found.q_pos, found.k_pos)


def test_the_block_law_catches_a_whole_table(monkeypatch):
    with pytest.raises(AssertionError):
        law_blocks_equal_the_whole(patched(), monkeypatch, block=2**24)


def test_the_block_law_catches_rows_that_see_too_little(monkeypatch):
    biased = attention._biased
    model = patched()
    whole = run(model, tokens(2 * WINDOW), checkpointing=False)[0]
    monkeypatch.setattr(attention, "_biased", lambda q, k, v, m, qp, kp, first, *rest: biased(q, k, v, m, qp, kp, max(0, first - 1), *rest))
    monkeypatch.setattr(attention, "BLOCK", 12000)
    with pytest.raises(AssertionError):
        close(run(model, tokens(2 * WINDOW), checkpointing=False)[0], whole)


@cases(ONCE)
def test_saving_keeps_it(family, names, tmp_path):
    law_saving_keeps_it(patched(family, names), tmp_path)


@pytest.mark.parametrize("names", [("alibi",), ("legendre",)], ids="+".join)
def test_the_saving_law_catches_constants_that_are_not_made_anew(names, tmp_path, monkeypatch):
    """They are in no checkpoint: Transformers leaves what was in memory."""
    model = patched(names=names)
    init = auto.LongctxModel._init_weights

    def forget(self, module):
        if not isinstance(module, Formula):
            return init(self, module)
        for name in module.fixed:
            getattr(module, name).data.fill_(0.123)

    monkeypatch.setattr(auto.LongctxModel, "_init_weights", forget)
    with pytest.raises(AssertionError):
        law_saving_keeps_it(model, tmp_path)
    with pytest.raises(RuntimeError, match="is not what its method computes"):
        hf_longctx.load(tmp_path, device="cpu")


@cases(ONCE, short=())
def test_bfloat16_keeps_float32(family, names, tmp_path):
    model = patched(family, names)
    hf_longctx.save(model, byte_tokenizer(), tmp_path)
    law_float32_in_bfloat16(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    law_float32_in_bfloat16(model, copy.deepcopy(model).to(torch.bfloat16))


def test_the_float32_law_catches_rounded_constants(monkeypatch):
    model = patched(names=("sandwich",))
    monkeypatch.setattr(Formula, "_apply", torch.nn.Module._apply)
    with pytest.raises(AssertionError):
        law_float32_in_bfloat16(model, copy.deepcopy(model).to(torch.bfloat16))


@cases(ONCE)
def test_patching_a_folder_equals_patching_live(family, names, family_folder, tmp_path):
    """Learned parameters included, which the folder does not hold."""
    folder = hf_longctx.patch(family_folder(family), specs(names), tmp_path / "out")
    live = patch_model(tiny_model(family), specs(names))
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokens(2 * WINDOW)
    close(logits(stored, ids), logits(live, ids), 1e-5)
    assert stored.config.longctx == live.config.longctx
    for (name, got), want in zip(stored.state_dict().items(), live.state_dict().values(), strict=True):
        assert got.equal(want), name
    hf_longctx.patch(folder, specs(names), tmp_path / "twice")
    assert (tmp_path / "twice/config.json").read_text() == (folder / "config.json").read_text()
    patch_model(live, specs(names))
    close(logits(live, ids), logits(stored, ids), 1e-5)


def test_the_folder_law_catches_parameters_drawn_anew(family_folder, tmp_path, monkeypatch):
    start = Formula.start
    monkeypatch.setattr(Formula, "start", staticmethod(lambda values: [(n, v if v.is_meta else v + torch.randn(()).item()) for n, v in start(values)]))
    monkeypatch.setattr(auto, "prove", lambda model: None)
    with pytest.raises(AssertionError):
        test_patching_a_folder_equals_patching_live("llama", ("kerple",), family_folder, tmp_path)


SEQUENCES = [(("alibi",), ("yarn",)), (("fire", "ssmax", "yarn"), ("nope",)), (("t5", "learned"), ("mkl_alibi", "log_n")), (("yarn",), ("kerple",))]


@pytest.mark.parametrize(("family", "first", "second"), [("llama", *s) for s in SEQUENCES] + [(f, *SEQUENCES[i]) for i, f in enumerate(list(FAMILIES)[1:5])], ids=str)
def test_the_last_patch_counts(family, first, second, family_folder, tmp_path):
    source, ids = family_folder(family), tokens(2 * WINDOW)
    hf_longctx.patch(source, specs(first), tmp_path / "first")
    both = hf_longctx.patch(tmp_path / "first", specs(second), tmp_path / "both")
    only = hf_longctx.patch(source, specs(second), tmp_path / "only")
    live = patch_model(patch_model(tiny_model(family), specs(first)), specs(second))
    assert (both / "config.json").read_text() == (only / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(both, dtype=torch.float32)
    close(logits(loaded, ids), logits(live, ids), 1e-5)
    assert type(loaded) is type(live)
    assert loaded.state_dict().keys() == live.state_dict().keys()
    assert not live.get_decoder()._forward_pre_hooks or auto.needs_class(specs(second))


def test_back_to_rope_is_a_stock_model(family_folder, tmp_path):
    hf_longctx.patch(family_folder("llama"), specs(("alibi", "learned")), tmp_path / "ours")
    back = hf_longctx.patch(tmp_path / "ours", specs(("yarn",)), tmp_path / "back")
    assert AutoConfig.from_pretrained(back).architectures == ["LlamaForCausalLM"]
    assert type(AutoModelForCausalLM.from_pretrained(back)).__name__ == "LlamaForCausalLM"
    live = patch_model(patch_model(tiny_model(), specs(("alibi", "learned"))), specs(("yarn",)))
    assert type(live).__name__ == "LlamaForCausalLM"
    assert live.config._attn_implementation == "sdpa"
    assert not formulas(live)
    close(logits(live, tokens(WINDOW)), logits(patch_model(tiny_model(), specs(("yarn",))), tokens(WINDOW)), 1e-6)


@pytest.mark.parametrize("second", [("alibi",), ("yarn",)], ids="+".join)
def test_what_was_trained_is_not_forgotten_by_a_second_patch(second):
    model = patched(names=("kerple",))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^longctx_bias\.layers\.0\.\w+ was trained, and another patch would start it anew; patch the model that it was made from$"):
        patch_model(model, specs(second))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model).__name__ == "LongctxLlamaForCausalLM"


# --- Other processes.


def python(code: str, *arguments: Any) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


READ = """
import sys, torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    saved = torch.load(folder + '/expected.pt')
    assert model.config.model_type.startswith('hf_longctx_')
    print('equal' if torch.allclose(model(input_ids=saved['ids']).logits, saved['logits'], atol=1e-5, rtol=1e-5) else 'different', end=' ')
"""
ORDERS = {
    "ours first": "import hf_longctx, sys; assert not {'torch', 'transformers'} & set(sys.modules)\nfrom transformers import AutoModelForCausalLM",
    "AutoConfig first": "from transformers import AutoConfig\nimport hf_longctx, sys\n"
    "assert 'hf_longctx.integration.configs' in sys.modules and not {'hf_longctx.integration.auto', 'transformers.modeling_utils'} & set(sys.modules)\n"
    "AutoConfig.from_pretrained(sys.argv[1])\nfrom transformers import AutoModelForCausalLM",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list:
    """A folder a family, with logits beside it."""
    folders = []
    for family, names in FAMILY_EACH:
        folder, model, ids = tmp_path_factory.mktemp(family), patched(family, names), tokens(2 * WINDOW)
        hf_longctx.save(model, byte_tokenizer(), folder)
        torch.save({"ids": ids, "logits": logits(model, ids)}, folder / "expected.pt")
        folders.append(folder)
    return folders


@pytest.mark.parametrize("order", [pytest.param(order, marks=[floor] if order == "ours first" else []) for order in ORDERS])
def test_a_fresh_process_loads_it(order, saved, tmp_path):
    """The last folder has the logits of other weights beside it, which must not pass."""
    hf_longctx.save(stir(AutoModelForCausalLM.from_pretrained(saved[0])), byte_tokenizer(), tmp_path)
    (tmp_path / "expected.pt").symlink_to(saved[0] / "expected.pt")
    assert python(ORDERS[order] + READ, *saved[:2], tmp_path).split() == ["equal", "equal", "different"]


@floor
def test_without_us_it_is_refused_by_name(saved, family_folder, tmp_path):
    """What was patched back to RoPE alone is loaded, and the others are once we have been imported."""
    hf_longctx.patch(family_folder("gpt_neox"), specs(("alibi", "learned")), tmp_path / "ours")
    back = hf_longctx.patch(tmp_path / "ours", specs(("yarn",)), tmp_path / "back")
    code = """
import sys, transformers
for reader in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
    for folder in sys.argv[2:]:
        try:
            reader.from_pretrained(folder)
        except ValueError as error:
            assert 'hf_longctx_' in str(error), error
        else:
            raise AssertionError('loaded')
assert 'hf_longctx' not in sys.modules
assert type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv.pop(1))).__name__ == 'GPTNeoXForCausalLM'
import hf_longctx
from transformers import AutoModelForCausalLM
"""
    assert python(code + READ, back, *saved).split() == ["equal"] * len(saved)


# --- Training.


GRADED = [(f, n) for f, n in FEW if any(SPECS[name]["name"] in ("kerple", "fire", "t5", "wavelet_bias", "ssmax") or name in ("mkl_learned", "key_norm_sum", *EMBEDDING) for name in n)]


@cases([(f, n) for f, n in GRADED if f != "gemma3_text"], short=())
def test_gradients_are_the_slopes(family, names, monkeypatch):
    law_gradients_are_the_slopes(patched(family, names), monkeypatch)


def test_the_gradient_law_catches_a_detached_parameter(monkeypatch):
    forward = Bias.forward
    monkeypatch.setattr(Bias, "forward", lambda self, *where: forward(self, *where).detach())
    with pytest.raises(AssertionError):
        law_gradients_are_the_slopes(patched(names=("kerple",)), monkeypatch)


JUMPS = torch.tensor([[*range(20), *range(70, 90), *range(140, 160)]])


@floor
def test_skips_are_distances():
    law_skips_are_distances(patched(names=("alibi", "log_n")), JUMPS)


def test_the_skip_law_catches_indices_in_place_of_positions(monkeypatch):
    locate = auto.locate
    monkeypatch.setattr(auto, "locate", lambda length, device, mask, position_ids, *rest: locate(length, device, mask, None, *rest))
    with pytest.raises(AssertionError):
        law_skips_are_distances(patched(names=("alibi", "log_n")), JUMPS)


@cases(FAMILY_EACH, short=())
def test_a_copy_is_independent(family, names):
    model = patched(family, names)
    law_a_copy_is_independent(model, copy.deepcopy(model))


def test_the_copy_law_catches_a_shared_module():
    model = patched()
    with pytest.raises(AssertionError):
        law_a_copy_is_independent(model, copy.deepcopy(model, {id(model.longctx_bias): model.longctx_bias}))


ADAPTED = [("llama", ("kerple", "ssmax", "learned")), ("gemma3_text", ("mkl_learned", "key_norm_sum", "sinusoidal")), ("phi3", ("fire",))]


@cases(ADAPTED)
def test_an_adapter_holds_the_methods(family, names, tmp_path):
    model = patched(family, names)
    law_an_adapter_holds_the_methods(model, tmp_path, [f"longctx_{slot}" for slot in auto.SLOTS if hasattr(model, f"longctx_{slot}")])


def test_the_adapter_law_catches_methods_that_are_not_saved(tmp_path):
    with pytest.raises(AssertionError):
        law_an_adapter_holds_the_methods(patched(names=("kerple",)), tmp_path, [])


def test_the_adapter_law_catches_a_hook_that_reads_the_original(tmp_path, monkeypatch):
    model = patched(names=("kerple",))
    original, hook = model.longctx_bias, auto.LongctxModel._longctx_hook

    def stale(self, *arguments):
        args, kwargs = hook(self, *arguments)
        kwargs["longctx"].bias, kwargs["longctx"].table = original, None
        return args, kwargs

    monkeypatch.setattr(model, "_longctx_hook", stale.__get__(model))
    model._longctx_handles.pop().remove()
    model._longctx_handles.append(model.get_decoder().register_forward_pre_hook(model._longctx_hook, with_kwargs=True))
    with pytest.raises((AssertionError, TypeError)):
        law_an_adapter_holds_the_methods(model, tmp_path, ["longctx_bias"])


# --- Refusals and warnings.


def test_a_call_past_the_model_is_refused():
    model = patched()
    hidden = torch.zeros(1, 4, TINY["hidden_size"])
    where = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(RuntimeError, match="without the keyword longctx"):
        model.model.layers[0](hidden, position_embeddings=where)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention", attention.FULL_ROWS])
def test_other_attention_is_refused(name, tmp_path):
    model = patched(names=("alibi", "log_n"))
    with pytest.raises(ValueError, match=f"a model with a bias and a attention method has attn_implementation 'sdpa' only, got '{name}'$"):
        model.set_attn_implementation(name)
    close(logits(model, tokens(9)), logits(patched(names=("alibi", "log_n")), tokens(9)), 1e-6)
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == attention.LONGCTX


def test_other_attention_is_refused_while_loading(tmp_path):
    hf_longctx.save(patched(), byte_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="'sdpa' only, got 'eager'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")


@floor
def test_an_unknown_family_is_refused_by_name():
    model = tiny_model("olmo2")
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"alibi works on llama, .*, not on olmo2$"):
        patch_model(model, specs(("alibi",)))
    assert model.config.to_dict() == before
    patch_model(model, specs(("yarn",)))


def test_a_model_without_a_head_is_refused():
    model = tiny_model().model
    with pytest.raises(ValueError, match=r"work on LlamaForCausalLM, not on LlamaModel$"):
        patch_model(model, specs(("alibi",)))
    assert type(model).__name__ == "LlamaModel"
    assert not hasattr(model.config, "longctx")


DIVERGENT = {"alibi": False, "mkl_alibi": False, "kerple_power": False, "kerple": True, "sandwich": True, "fire": True, "t5": True, "wavelet_bias": True, "mkl_learned": True}


@pytest.mark.parametrize("name", BIAS)
def test_a_divergent_bias_warns_once(name, base, tmp_path, caplog):
    """A process, which may plan with it, patch a model and load it again."""
    auto._warn_of_divergence.cache_clear()
    patch_model(tiny_model(), specs((name,)))
    hf_longctx.patch(base, specs((name,)), tmp_path / "out")
    told = [message for message in caplog.messages if "does not converge for" in message]
    assert len(told) == DIVERGENT[name]
    assert all(SPECS[name]["name"] in message for message in told)


@floor
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_patch_starts_is_not_reported_as_missing(family, family_folder, tmp_path):
    """Its parameters are in no checkpoint until they are trained; weights of the model that are not there still are."""
    folder = hf_longctx.patch(family_folder(family), specs(("fire",)), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    wanted = load_methods(specs(("fire",)))[0].bias(model._longctx_shape)
    for name, value in wanted.named_parameters():
        assert torch.equal(model.longctx_bias.of(0).get_parameter(name), value), name
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("down_proj.weight") or name.endswith("dense_4h_to_h.weight"))
    file.unlink()  # it may be a link to the base
    save_file({name: value for name, value in weights.items() if name != lost}, file, metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {lost}


def test_the_proof_catches_a_layer_that_never_asks():
    model = patched()
    auto.prove(model)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **rest: (hidden_states, None)
    with pytest.raises(RuntimeError, match=r"attention of layers \[1\] never asked"):
        auto.prove(model)


@floor
def test_the_proof_catches_the_name_of_a_stock_model(family_folder, tmp_path, monkeypatch):
    """Plain Transformers would load it without its methods."""
    finish = checkpoint.finish_folder

    def stock_name(folder, *arguments):
        finish(folder, *arguments)
        files.write_json(folder / "config.json", files.read_json(folder / "config.json") | {"model_type": "llama"})

    monkeypatch.setattr(checkpoint, "finish_folder", stock_name)
    with pytest.raises(RuntimeError, match=r"its methods need a model_type of ours, but it is llama$"):
        hf_longctx.patch(family_folder("llama"), specs(("alibi",)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_lengths_that_decide_frequencies_are_no_obstacle(family_folder, tmp_path):
    """The proof runs on meta, where positions cannot be read."""
    methods = load_methods([{"name": "dynamic_ntk", "factor": 2}, {"name": "alibi"}])
    folder = hf_longctx.patch(family_folder("llama"), methods, tmp_path / "out")
    close(logits(AutoModelForCausalLM.from_pretrained(folder), tokens(WINDOW)), logits(patch_model(tiny_model(), methods), tokens(WINDOW)), 1e-5)


def test_a_tokenizer_is_the_base_s(family_folder, tmp_path):
    """AutoTokenizer knows no model_type of ours and takes what tokenizer_config.json says."""
    folder = hf_longctx.patch(family_folder("gemma"), specs(("alibi",)), tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(family_folder("gemma"))
    assert ours("one two").input_ids == theirs("one two").input_ids
    assert type(ours) is type(theirs)


def test_the_proof_catches_a_family_that_drops_the_keyword(family_folder, tmp_path, monkeypatch):
    attend = attention.attend
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.LONGCTX, lambda module, *a, **k: attend(module, *a, **k | ({"longctx": None} if module.layer_idx else {})))
    with pytest.raises(RuntimeError, match="without the keyword longctx"):
        hf_longctx.patch(family_folder("llama"), specs(("alibi",)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- Sliding windows.


def test_mistrals_windows_become_full_attention(family_folder, tmp_path):
    """As for rope; also where the windows are as long as what was trained, past which a bias is meant to reach."""
    for size in (WINDOW // 2, WINDOW):
        model = patched("mistral", ("alibi",), sliding_window=size)
        assert model.config.sliding_window is None
        ids = tokens(3 * WINDOW)
        mask, positions = torch.ones_like(ids), torch.arange(3 * WINDOW)[None]
        close(logits(model, ids), expected("mistral", ("alibi",), model, ids, mask, positions), 1e-4)
    folder = hf_longctx.patch(family_folder("mistral"), specs(("alibi",)), tmp_path / "out")
    assert AutoConfig.from_pretrained(folder).sliding_window is None


def test_all_sliding_layer_types_are_refused_live():
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=WINDOW // 2, max_window_layers=0)
    assert set(model.config.layer_types) == {"sliding_attention"}
    with pytest.raises(ValueError, match="every layer of this qwen2 slides over 32 tokens: patch the checkpoint"):
        patch_model(model, specs(("alibi",)))
    assert model.config.model_type == "qwen2"


def test_gemmas_sliding_layers_stay_as_they_are():
    """Stock attention, no bias: what they attend to is what stock layers do."""
    model, plain = patched("gemma3_text", ("alibi", "log_n")), stock("gemma3_text")
    assert auto.full_layers(model.config) == {5}
    ids, found = tokens(2 * WINDOW), {}
    for key, each in (("ours", model), ("stock", plain)):
        each.model.layers[4].register_forward_hook(lambda module, args, out, key=key: found.__setitem__(key, out))
        found[f"{key} logits"] = logits(each, ids)
    close(found["ours"], found["stock"], 1e-5)
    assert (found["ours logits"] - found["stock logits"]).abs().max() > 0.01


def test_a_bias_changes_the_output():
    """The laws above would hold where nothing matters."""
    ids = tokens(WINDOW)
    for _, names in ALONE:
        assert (logits(patched(names=names), ids) - logits(tiny_model(), ids)).abs().max() > 0.01, names
