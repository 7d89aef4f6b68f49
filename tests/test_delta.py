"""State-space models as checkpoints of every kind, and the delta slot: changed step sizes on every path through a model.

Random models of two layers, as in test_state.py. Formulas are checked in tests/oracles/test_delta_oracles.py.
"""

import copy
import functools
import json
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import hf_longctx
from hf_longctx import checkpoint, files
from hf_longctx.calibration import TextSteps, calibrate, choose_windows
from hf_longctx.card import Base, make_card
from hf_longctx.data import Documents, load_documents
from hf_longctx.integration import auto, configs, delta, state, steps
from hf_longctx.integration.state import StatePassingCache
from hf_longctx.lora import state_targets
from hf_longctx.method import load_method, method, method_names
from hf_longctx.patching import patch_model
from hf_longctx.recipe import DataSource, parse_recipe
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell
from tests.conftest import byte_tokenizer, refused_in_a_line, tiny_model
from tests.test_cli import longctx  # noqa: F401 (a fixture)
from tests.test_state import EVERY, FAMILIES, TOKENS, VOCABULARY, assert_close, gradients, ids
from tests.test_state import stock as small

DELTA = pytest.mark.parametrize("family", configs.DELTA_FAMILIES)
HYBRIDS = [family for family in FAMILIES if state.CACHE_ARGUMENT[family] == "past_key_values"]
OF_HYBRIDS = pytest.mark.parametrize("family", HYBRIDS)
SCAN, UPDATE = "mamba2_chunk_scan", "mamba2_selective_state_update"  # of Mamba-2 and of hybrids
CHOSEN = {
    "mamba_extend": {"scales": [0.5, 0.8]},
    "delta_filter": {"trained": 40, "target": 160, "samples": 3},
}  # fmt: skip
METHODS = pytest.mark.parametrize("name", CHOSEN)


def stock(family):
    """A tiny model as in test_state.py; the weights of a hybrid are larger, without which its states hardly matter."""
    model = small(family)
    for parameter in model.parameters() if family in HYBRIDS else ():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    return model


def write_ids(path, count=4, length=120):
    rng = np.random.default_rng(0)
    np.savez(path, *[rng.integers(3, VOCABULARY, length) for _ in range(count)])
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Four documents of 120 tokens that every model here knows."""
    return write_ids(tmp_path_factory.mktemp("text") / "text.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder("mamba")`: a checkpoint with a tokenizer, made once; treat it as read-only."""

    @functools.cache
    def make(family):
        path = tmp_path_factory.mktemp(family)
        stock(family).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="module")
def patched(folder, text, tmp_path_factory):
    """`patched("mamba", "delta_filter")`: the checkpoint, patched, made once; treat it as read-only."""

    @functools.cache
    def make(family, name):
        out = tmp_path_factory.mktemp("patched") / family
        hf_longctx.patch(folder(family), spec(name), out, data=text if name == "delta_filter" else None)
        return out

    return make


def spec(name):
    return {"name": name, **CHOSEN[name]}


def load(path, **options):
    return hf_longctx.load(path, device="cpu", **options).model


def forward(model, tokens, cache=None, **arguments):
    family = configs.family(model.config)
    if family in HYBRIDS and cache is not None:  # bamba takes no positions from a cache
        start = cache.layers[1].get_seq_length()
        arguments["position_ids"] = torch.arange(start, start + tokens.shape[1])[None]
    return model(tokens, **{state.CACHE_ARGUMENT[family]: cache}, **arguments)


def logits(model, tokens=None, cache=None, **arguments):
    with torch.no_grad():
        return forward(model, ids() if tokens is None else tokens, cache, **arguments).logits.float()


def close(got, want, tolerance=1e-5):
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# --- Checkpoints of state-space models ---------------------------------------------------------------------------------


@EVERY
def test_save_and_load(family, folder, tmp_path):
    loaded = hf_longctx.load(folder(family), device="cpu")
    assert loaded.tokenizer.model_max_length == 64, "that of the base"
    checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "saved")
    for path in (folder(family), tmp_path / "saved"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert type(model) is type(stock(family))
        assert torch.equal(logits(model), logits(stock(family)))
    assert (tmp_path / "saved" / "tokenizer_config.json").read_bytes() == (folder(family) / "tokenizer_config.json").read_bytes()


def add_adapter(model):
    """A LoRA adapter with something in it, on the projections that PEFT accepts."""
    torch.manual_seed(1)
    found = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["in_proj", "x_proj"], init_lora_weights=False))
    return found.eval()


def save_adapter(model, base, out):
    """What finetune does, with the library's own functions."""
    model.save_pretrained(out)
    config = model.get_base_model().config
    checkpoint.finish_folder(out, config, {}, files.read_json(base / "config.json"))
    memory = getattr(config, "longctx", None)
    mark = checkpoint.fingerprint(checkpoint.load(base, device="cpu").model)
    checkpoint.write_sidecar(out, str(base), None, [load_method(item) for item in memory["methods"]] if memory else [], mark, checkpoint.window_of(config))


@pytest.mark.parametrize(
    ("family", "name"), [*((family, None) for family in FAMILIES), ("mamba", "delta_filter"), ("mamba2", "mamba_extend"), ("mamba2", "delta_filter"), ("bamba", "delta_filter")]
)
def test_an_adapter_equals_what_it_merges_into(family, name, folder, patched, tmp_path):
    base = folder(family) if name is None else patched(family, name)
    model = add_adapter(load(base))
    save_adapter(model, base, tmp_path / "adapter")
    steps_lost = "A LoRA adapter carries no step sizes" in make_card(tmp_path / "adapter", "me/it").text
    assert steps_lost == (name is not None)
    assert checkpoint.read_sidecar(tmp_path / "adapter")["window"] == (64 if family in HYBRIDS else None)
    found = load(tmp_path / "adapter")
    close(logits(found.get_base_model()), logits(model.get_base_model()))
    hf_longctx.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert isinstance(merged, auto.LongctxStateModel) == (name is not None)
    close(logits(merged), logits(model.get_base_model()), 1e-4)
    assert (logits(merged) - logits(load(base))).abs().max() > 0.1
    assert hf_longctx.inspect_model(tmp_path / "adapter")["kind"] == "adapter"
    if name == "delta_filter":
        assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) > 0
        with pytest.raises(ValueError, match="has not been calibrated"):  # the thresholds are in the patched base, not in the adapter
            load(tmp_path / "adapter", base=str(folder(family)))


@EVERY
def test_inspect(family, folder):
    facts = hf_longctx.inspect_model(folder(family))
    assert (facts["family"], facts["state"], facts["supported"], facts["needs_plugin"]) == (family, True, True, False)
    hybrid = family in HYBRIDS
    assert facts["window"] == (64 if hybrid else None)
    assert ("trained_window" in facts, "rope" in facts) == (hybrid, hybrid)
    assert facts["loads_with"] == (["transformers>=5"] if hybrid else ["transformers>=5", "vLLM"])
    assert json.loads(json.dumps(facts)) == facts


def test_a_model_without_a_state_says_so(base):
    assert hf_longctx.inspect_model(base)["state"] is False


def test_a_hybrid_without_rope_has_none_to_change(tmp_path):
    config = copy.deepcopy(stock("granitemoehybrid").config)
    config.position_embedding_type = "nope"
    config.save_pretrained(tmp_path)
    assert hf_longctx.inspect_model(tmp_path)["window"] == 64
    refused_in_a_line(lambda: auto.rope.read_shape(config), "granitemoehybrid has no rotary position embedding, so there is no rope to change")


@EVERY
def test_card(family, folder):
    text = make_card(folder(family), "me/it").text
    assert f"| family | {family} |" in text
    assert ("which has no window" in text) == (family not in HYBRIDS)
    assert "None" not in text


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
@METHODS
def test_card_of_a_patched_model(name, family, patched):
    text = make_card(patched(family, name), "me/it").text
    assert "instead of" not in text
    assert "import hf_longctx" in text
    assert f"with `{name}:" in text
    assert f"- {name}" in text
    assert "None" not in text


def test_card_of_a_model_that_was_trained_with_states(folder):
    recipe = parse_recipe(
        {
            "model": {"name": "org/base"},
            "methods": [{"name": "carry", "probability": 0.1}],
            "window": 32,
            "data": {"path": "org/books"},
            "train": {"max_steps": 2},
        }
    )
    first = make_card(folder("mamba"), "me/it", base=Base("org/base"), recipe=recipe).text
    assert "| windows start from | `carry:probability=0.1` |" in first
    assert "`org/base`: a state-space model, which has no window" in first
    tagged = first.replace("- long-context\n", "- long-context\n- mamba_extend\n- mine\n")
    assert "- mamba_extend" in tagged
    again = make_card(folder("mamba"), "me/it", base=Base("org/base"), recipe=recipe, existing=tagged).text
    assert "- mine" in again
    assert "- mamba_extend" not in again


@EVERY
@pytest.mark.parametrize("name", ["nope", "alibi", "key_norm", "carry", "pose"])
def test_methods_that_do_not_fit(name, family, folder, tmp_path):
    hybrid = family in HYBRIDS
    if hybrid and name == "nope":
        hf_longctx.patch(folder(family), name, tmp_path / "out")
        assert hf_longctx.inspect_model(tmp_path / "out")["methods"] == [{"name": "nope"}]
        return
    expected = {"nope": f"{family} has no rotary position embedding", "alibi": "alibi works on llama", "key_norm": "key_norm works on llama"}
    refused_in_a_line(lambda: hf_longctx.patch(folder(family), name, tmp_path / "out"), expected.get(name, f"{name} fills the "))
    assert not (tmp_path / "out").exists()


# --- The delta slot: laws ----------------------------------------------------------------------------------------------


def test_every_method_of_the_slot_is_under_these_laws():
    assert set(method_names("delta")) == set(CHOSEN)


@METHODS
def test_round_trip(name):
    item = load_method(spec(name))
    assert load_method(json.loads(json.dumps(item.to_dict()))) == item


@DELTA
@METHODS
def test_it_changes_the_model(name, family, patched):
    model = load(patched(family, name))
    assert isinstance(model, auto.LongctxStateModel)
    assert model.config.model_type == f"hf_longctx_{family}"
    assert (logits(model) - logits(stock(family))).abs().max() > 0.1


@pytest.mark.floor
@DELTA
@METHODS
def test_cached_decoding_equals_one_pass(name, family, patched):
    """A token at a time, in pieces with Transformers' cache, and in pieces with ours. In double precision: rounding may take a step over a threshold."""
    model = load(patched(family, name)).double()
    whole = logits(model)
    for size in (1, 7):
        for cache in (DynamicCache(config=model.config), StatePassingCache(model.config, keys="carry")):
            pieces = []
            for first in range(0, TOKENS, size):
                pieces.append(logits(model, ids()[:, first : first + size], cache, use_cache=True))
                cache = cache.next() if isinstance(cache, StatePassingCache) else cache
            close(torch.cat(pieces, 1), whole)


@DELTA
@METHODS
def test_generation_is_that_of_whole_passes(name, family, patched):
    model = load(patched(family, name))
    got = model.generate(ids(), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = ids()
    for _ in range(4):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, expected)


@DELTA
@METHODS
def test_left_padding(name, family, patched):
    model, padding = load(patched(family, name)), 5
    tokens = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids(rows=1, tokens=TOKENS - padding)], 1)
    batch = torch.cat([tokens, ids(seed=1, rows=1)])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    close(logits(model, batch, attention_mask=mask)[:1, padding:], logits(model, tokens[:, padding:]))


@DELTA
@METHODS
def test_save_and_load_of_a_patched_model(name, family, patched, tmp_path):
    model = load(patched(family, name))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    half = load(tmp_path, dtype="bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert {b.dtype for b in half.longctx_delta.buffers()} == {torch.float32}
    for got, want in zip(half.longctx_delta.buffers(), model.longctx_delta.buffers(), strict=True):
        assert torch.equal(got, want)
    assert logits(half).isfinite().all()


@DELTA
@METHODS
def test_patching_twice_equals_once(name, family, folder, patched, text, tmp_path):
    data = text if name == "delta_filter" else None
    once = load(patched(family, name))
    twice = hf_longctx.patch(hf_longctx.patch(stock(family), {"name": "mamba_extend", "scales": 0.3}), spec(name), data=data)
    assert torch.equal(logits(twice), logits(once))
    assert twice.config.longctx == once.config.longctx
    if name == "mamba_extend":
        hf_longctx.patch(patched(family, name), {"name": name, "scales": 0.3}, tmp_path / "other")
        hf_longctx.patch(tmp_path / "other", spec(name), tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again")), logits(once))
    else:
        refused_in_a_line(
            lambda: hf_longctx.patch(patched(family, name), spec(name), tmp_path / "other", data=text),
            f"{patched(family, name)} holds what its methods learned",
        )


@DELTA
@METHODS
def test_a_copy_is_a_model_of_its_own(name, family, patched):
    """Hooks of a deep copy belong to the copy."""
    model = load(patched(family, name))
    other = copy.deepcopy(model)
    for module in other.longctx_delta.layers:
        for buffer in module.buffers():
            buffer.fill_(0.25)
    assert (logits(other) - logits(model)).abs().max() > 0.1
    assert torch.equal(logits(model), logits(load(patched(family, name))))


@DELTA
@METHODS
def test_training_reaches_every_weight_with_and_without_checkpointing(name, family, patched):
    found = {}
    for checkpointing in (False, True):
        model = add_adapter(load(patched(family, name))).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        forward(model.get_base_model(), ids(), labels=ids()).loss.backward()
        found[checkpointing] = gradients(model)
        assert not list(model.get_base_model().longctx_delta.parameters())
    assert sum("lora_B" in key for key in found[True]) == (4 if family in ("mamba", "falcon_mamba") else 2)
    assert all(gradient.abs().max() > 0 for gradient in found[True].values())
    assert_close(found[True], found[False])


@DELTA
def test_a_factor_of_one_is_the_stock_model(family):
    model = hf_longctx.patch(stock(family), {"name": "mamba_extend", "scales": 1})
    close(logits(model), logits(stock(family)))
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for t in range(5):
        close(logits(model, ids()[:, t : t + 1], cache, use_cache=True), logits(stock(family), ids()[:, t : t + 1], other, use_cache=True))


@DELTA
@METHODS
def test_switched_off_it_is_the_stock_model(name, family, patched):
    model = load(patched(family, name))
    with auto.switched_off(model):
        close(logits(model), logits(stock(family)))
    assert (logits(model) - logits(stock(family))).abs().max() > 0.1


@pytest.mark.parametrize("family", ["mamba2", *HYBRIDS])
def test_limits_of_step_sizes_hold_on_every_path(family):
    """Mamba-2 may clip Delta; Transformers does so in the scan and forgets it for single tokens."""
    base = stock(family)
    for mixer, _ in state.mixers(base):
        mixer.time_step_limit = (0.2, 0.4)
    model = hf_longctx.patch(copy.deepcopy(base), {"name": "mamba_extend", "scales": 1})
    close(logits(model), logits(base))
    cache = DynamicCache(config=model.config)
    pieces = [logits(model, ids()[:, t : t + 1], cache, use_cache=True) for t in range(TOKENS)]
    close(torch.cat(pieces, 1), logits(base))


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
@METHODS
def test_a_kernel_gets_the_same_step_sizes(name, family, patched, monkeypatch):
    """Transformers' scan in the place of mamba-ssm's, from nothing and from a state; a kernel takes one dtype."""
    model, dtypes = load(patched(family, name), dtype="bfloat16"), set()
    entry = sys.modules[state.stock_class(next(iter(state.mixers(model)))[0]).__module__].mamba_selective_scan
    stock_scan = entry.stock

    def scan(u, dt, a, b, c, **options):
        dtypes.add((u.dtype, dt.dtype, b.dtype, c.dtype))
        assert options["delta_bias"] is None
        return stock_scan(u, dt, a, b, c, **options)

    want = [logits(model), *cut(model)]
    monkeypatch.setattr(entry, "stock", scan)
    monkeypatch.setattr(state, "has_kernel", lambda tensor: True)
    for got, each in zip([logits(model), *cut(model)], want, strict=True):
        close(got, each, 2e-2)
    assert dtypes == {(torch.float32,) * 4}


def cut(model):
    """Logits of a text in two pieces."""
    cache = StatePassingCache(model.config)
    first = logits(model, ids()[:, :20], cache)
    return [first, logits(model, ids()[:, 20:], cache.next())]


@DELTA
@METHODS
def test_kernels_that_fuse_projections_and_scan_are_not_taken(name, family, patched, monkeypatch):
    """As if mamba-ssm were here: its fused function would compute with the step sizes as they are."""
    model = load(patched(family, name)).train()
    modeling = sys.modules[state.stock_class(next(iter(state.mixers(model)))[0]).__module__]
    fused = getattr(modeling, "mamba_inner_fn" if hasattr(modeling, "mamba_inner_fn") else "mamba2_split_conv1d_scan_combined")
    called = []
    monkeypatch.setattr(fused, "stock", lambda *args, **kwargs: called.append(1))
    want = logits(load(patched(family, name)))
    close(logits(model, use_cache=False), want)
    assert not called
    logits(stock(family).train(), use_cache=False)
    assert called, "the function that was replaced is not the one that mixers call"


@DELTA
def test_other_models_pass_through_unchanged(family, patched, monkeypatch):
    before = logits(stock(family))
    model = load(patched(family, "mamba_extend"))
    logits(model)
    assert torch.equal(logits(stock(family)), before)
    mixer, _ = next(iter(state.mixers(model)))
    monkeypatch.setattr(mixer.out_proj, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    assert steps.current() is None, "a pass that fails leaves nothing behind"


# --- Proof -------------------------------------------------------------------------------------------------------------


@DELTA
@pytest.mark.parametrize("function", ["scan", "update"])
def test_the_proof_misses_no_path(family, function, monkeypatch):
    """A function that takes step sizes and was not wrapped is found out."""
    modeling = sys.modules[state.stock_class(next(iter(state.mixers(stock(family))))[0]).__module__]
    hf_longctx.patch(stock(family), {"name": "mamba_extend", "scales": 0.5})
    if function == "update":
        name = UPDATE if hasattr(modeling, UPDATE) else "mamba_selective_state_update"
        monkeypatch.setattr(modeling, name, getattr(modeling, name).stock)
        monkeypatch.setattr(steps, "_CHANGES", {key: value for key, value in steps._CHANGES.items() if key != name})
    elif hasattr(modeling, SCAN):
        monkeypatch.setattr(modeling, SCAN, modeling.mamba2_chunk_scan.stock)
        monkeypatch.setattr(steps, "_CHANGES", {key: value for key, value in steps._CHANGES.items() if key != SCAN})
    else:
        monkeypatch.setattr(modeling, "mamba_selective_scan", modeling.mamba_selective_scan.stock)
        monkeypatch.setattr(state, "_dispatch", lambda module: True)
    second = 2 if family in HYBRIDS else 1
    with pytest.raises(RuntimeError, match=rf"the step sizes of layer 0 \({function}\), layer {second} \({function}\) never met"):
        hf_longctx.patch(stock(family), {"name": "mamba_extend", "scales": 0.5})


@METHODS
def test_the_proof_sees_a_wrong_value(name, patched):
    model = load(patched("mamba", name))
    kept = model.longctx_delta.layers[1].formula
    model.longctx_delta.layers[1].formula = lambda values, delta: delta * 0.99
    with pytest.raises(RuntimeError, match=r"the step sizes of layer 1 \(scan\) are not what their method computes"):
        auto.prove(model)
    model.longctx_delta.layers[1].formula = kept
    auto.prove(model)


def test_a_constant_that_was_lost_is_found(patched):
    model = load(patched("mamba", "mamba_extend"))
    model.longctx_delta.layers[0].scale.fill_(1.0)
    with pytest.raises(RuntimeError, match="the step sizes of layer 0"):
        auto.prove(model)


# --- Calibration -------------------------------------------------------------------------------------------------------


def test_windows_are_spread_over_all_places():
    documents = Documents.join([np.arange(5), np.arange(100, 110), np.arange(200, 203), np.arange(300, 312)])
    windows = choose_windows(documents, 4, 4, "it")
    assert windows.dtype == np.int64
    places = [*range(0, 2), *range(100, 107), *range(300, 309)]  # where four tokens fit
    assert windows.tolist() == [list(range(places[i * 18 // 4], places[i * 18 // 4] + 4)) for i in range(4)]
    assert len(choose_windows(documents, 40, 12, "it")) == 40
    refused_in_a_line(lambda: choose_windows(documents, 4, 13, "it"), "no document of it has 13 tokens, which a calibration window has: the longest has 12")


@pytest.mark.parametrize(("family", "channels"), [("mamba", 32), ("granitemoehybrid", 4)])
def test_calibration_is_measured_on_the_model(family, channels, text):
    """Perplexity is that of the model's own loss, which may scale logits; step sizes are those that reach the scan, whatever was patched before."""
    model = stock(family)
    model.config.logits_scaling = 3.0
    windows = torch.from_numpy(choose_windows(load_documents(DataSource(str(text)), None), 3, 20, "it"))
    item = method("mamba_extend", scales=[0.7, 1.6])
    found = TextSteps(model, windows)
    live = hf_longctx.patch(copy.deepcopy(model), item)
    with torch.no_grad():
        want = np.exp(np.mean([float(live(row[None], labels=row[None]).loss) for row in windows]))
    assert abs(found.perplexity(item) / want - 1) < 1e-5
    assert abs(TextSteps(live, windows).perplexity(item) / want - 1) < 1e-5
    for (one, a), (other, b) in zip(found.layers(), TextSteps(live, windows).layers(), strict=True):
        assert one.shape == (3, 20, channels)
        assert torch.equal(one, other)
        assert torch.equal(a, b)


@pytest.mark.parametrize("held", [1, 3 * 20 * 32 * 2, 2**28])
@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_layers_are_recorded_a_few_at_a_time(family, held, monkeypatch):
    monkeypatch.setattr("hf_longctx.calibration._RECORDED", held)
    windows = ids(rows=3, tokens=20)
    model = stock(family)
    runs = []
    mixers = [mixer for mixer, _ in state.mixers(model)]
    mixers[0].register_forward_hook(lambda *_: runs.append(1))
    found, decays = zip(*TextSteps(model, windows).layers(), strict=True)
    for mixer, decay in zip(mixers, decays, strict=True):
        torch.testing.assert_close(decay.flatten(), -mixer.A_log.exp().flatten())
    assert len(runs) == 3 * (2 if held == 1 else 1)
    seen = []
    with torch.no_grad(), delta.using(model, lambda layer: torch.nn.Identity(), seen):
        model(windows)
    for layer, recorded in enumerate(found):
        torch.testing.assert_close(recorded, seen[layer][2])


@DELTA
def test_calibrated_scales_are_remembered_and_no_worse(family, text, folder, tmp_path):
    item = {"name": "mamba_extend", "target": 60, "samples": 2, "steps": 2}
    hf_longctx.patch(folder(family), item, tmp_path / "out", data=text)
    (found,) = hf_longctx.inspect_model(tmp_path / "out")["methods"]
    assert found.items() >= item.items()
    assert len(found["scales"]) == 2
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder(family) / name).read_bytes()
    again, _ = calibrate(stock(family), None, [method(**item)], text)
    assert again[0].to_dict() == found
    windows = torch.from_numpy(choose_windows(load_documents(DataSource(str(text)), None), 2, 60, "it"))
    measured = TextSteps(stock(family), windows)
    assert measured.perplexity(load_method(found)) <= 1.0001 * measured.perplexity(method("mamba_extend", scales=1))
    assert torch.equal(logits(load(tmp_path / "out")), logits(hf_longctx.patch(stock(family), item, data=text)))


def test_text_needs_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text("#$%&'()*+,-" * 20)
    item = {"name": "mamba_extend", "target": 60, "samples": 1, "steps": 1}
    refused_in_a_line(
        lambda: hf_longctx.patch(stock("mamba"), item, data=tmp_path / "book.txt"), f"{tmp_path / 'book.txt'} is text, and a live model has no tokenizer"
    )
    model = hf_longctx.patch(stock("mamba"), item, data=tmp_path / "book.txt", tokenizer=byte_tokenizer())
    assert len(model.config.longctx["methods"][0]["scales"]) == 2


# --- Hybrids ----------------------------------------------------------------------------------------------------------


@OF_HYBRIDS
def test_a_rope_method_may_stand_beside(family, folder, tmp_path):
    """Frequencies and step sizes change together; another patch starts from the trained frequencies, as ever."""
    both = [spec("mamba_extend"), {"name": "theta", "theta": 500, "target": 256}]
    hf_longctx.patch(folder(family), both, tmp_path / "both")
    facts = hf_longctx.inspect_model(tmp_path / "both")
    assert [item["name"] for item in facts["methods"]] == ["mamba_extend", "theta"]
    assert (facts["rope"]["rope_theta"], facts["trained_window"], facts["window"]) == (500, 64, 256)
    model = load(tmp_path / "both")
    assert torch.equal(logits(model), logits(hf_longctx.patch(stock(family), both)))
    alone = {item["name"]: logits(hf_longctx.patch(stock(family), item)) for item in both}
    assert min((logits(model) - each).abs().max() for each in alone.values()) > 0.02
    whole, cache = logits(model), DynamicCache(config=model.config)
    close(torch.cat([logits(model, part, cache, use_cache=True) for part in ids().split(7, dim=1)], 1), whole)
    assert torch.equal(logits(hf_longctx.patch(model, both[0])), alone["mamba_extend"])
    model.set_attn_implementation("eager")
    back = hf_longctx.patch(model, both[1])
    assert (type(back), back.config._attn_implementation) == (type(stock(family)), "eager")
    close(logits(back), alone["theta"])


def test_a_hybrid_without_rope(tmp_path):
    """Its window stays as it was, and nothing is said of a rope."""
    model = stock("granitemoehybrid")
    config = model.config
    config.position_embedding_type = "nope"
    without = type(model)(config)
    without.load_state_dict(model.state_dict())
    without.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    hf_longctx.patch(tmp_path / "base", spec("mamba_extend"), tmp_path / "out")
    facts = hf_longctx.inspect_model(tmp_path / "out")
    assert (facts["window"], facts["needs_plugin"], "rope" in facts) == (64, True, False)
    assert (logits(load(tmp_path / "out")) - logits(load(tmp_path / "base"))).abs().max() > 0.1
    refused_in_a_line(
        lambda: hf_longctx.patch(tmp_path / "base", [spec("mamba_extend"), {"name": "linear", "factor": 2}], tmp_path / "other"),
        "granitemoehybrid has no rotary position embedding",
    )


def test_experts_stand_beside(tmp_path):
    """Attention comes first, so that no layer is at its place among those with a state; the proof on a folder has no values to choose experts by."""
    config = copy.deepcopy(stock("granitemoehybrid").config)
    config.num_local_experts, config.num_experts_per_tok = 4, 2
    config.layer_types = ["full_attention", "linear_attention", "linear_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(15 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    before = logits(model)
    hf_longctx.patch(tmp_path / "base", spec("mamba_extend"), tmp_path / "out")
    found = logits(load(tmp_path / "out"))
    assert (found - before).abs().max() > 0.1
    close(found, logits(hf_longctx.patch(model, spec("mamba_extend"))))


@METHODS
def test_attention_alone_has_no_step_sizes(name, text):
    config = copy.deepcopy(stock("granitemoehybrid").config)
    config.layer_types = ["full_attention"] * 3
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"^no layer of this granitemoehybrid is a state-space layer, so {name} finds no step size to change$"):
        hf_longctx.patch(model, spec(name), data=text if name == "delta_filter" else None)


@OF_HYBRIDS
@METHODS
def test_evaluation_in_chunks_is_that_of_the_whole(name, family, patched):
    model = load(patched(family, name))
    cell = Cell(ids(rows=1)[0].numpy(), 1, TOKENS)
    whole, pieces = (score_cells(model, [cell], chunk=chunk)[0].nll for chunk in (None, 7))
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert abs(float(model(ids(rows=1), labels=ids(rows=1), use_cache=False).loss) - whole.mean()) < 1e-4


@OF_HYBRIDS
def test_it_trains_from_states_and_merges(family, folder, patched, text, tmp_path):
    """An adapter beside changed step sizes, on what it would reach in the stock model."""
    assert state_targets(load(patched(family, "delta_filter"))) == state_targets(stock(family))
    train = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "gradient_checkpointing": True, "disable_tqdm": True}
    recipe = {
        "model": {"name": str(folder(family))}, "methods": [spec("mamba_extend"), {"name": "carry"}], "window": 16, "data": {"path": str(text)},
        "lora": {"r": 2}, "train": train,
    }  # fmt: skip
    hf_longctx.finetune(recipe, tmp_path / "adapter")
    hf_longctx.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.config.model_type == f"hf_longctx_{family}"
    close(logits(merged), logits(load(tmp_path / "adapter").get_base_model()), 1e-4)
    assert (logits(merged) - logits(load(patched(family, "mamba_extend")))).abs().max() > 1e-3


# --- Refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_refused(folder, text, tmp_path, base):
    def patch(item, data=None, family="mamba"):
        return lambda: hf_longctx.patch(folder(family) if family in FAMILIES else base, item, tmp_path / "out", data=data)

    def live(item, data=None):
        return lambda: hf_longctx.patch(stock("mamba"), item, data=data)

    seek, sift = {"name": "mamba_extend", "target": 60}, {"name": "delta_filter", "target": 160, "trained": 40}
    for call in (patch, live):
        refused_in_a_line(call(seek), "mamba_extend has to be calibrated: give training text as data (--data FILE), or scales")
        refused_in_a_line(call(sift), "delta_filter has to be calibrated: give training text as data (--data FILE)")
        refused_in_a_line(
            call({"name": "mamba_extend", "scales": 0.5}, text), "data is for methods that have to be calibrated, and mamba_extend has nothing to calibrate"
        )
        refused_in_a_line(call({"name": "mamba_extend", "scales": [0.5] * 3}), "mamba_extend: 3 scales for the 2 state-space layers of this mamba")
        refused_in_a_line(call(sift | {"trained": 130}, text), f"no document of {text} has 130 tokens")
        refused_in_a_line(call([seek, {"name": "linear", "factor": 2}], text), "mamba has no rotary position embedding")
    for family in HYBRIDS:
        for scales in ([0.5] * 3, [0.5]):
            refused_in_a_line(
                patch({"name": "mamba_extend", "scales": scales}, family=family), f"mamba_extend: {len(scales)} scales for the 2 state-space layers of this {family}"
            )
        both = [{"name": "mamba_extend", "scales": 0.5}, "alibi"]
        refused_in_a_line(patch(both, family=family), f"alibi works on {', '.join(configs.FAMILIES)} so far, not on {family}")
    known = "mamba, falcon_mamba, mamba2, bamba, granitemoehybrid"
    refused_in_a_line(patch({"name": "mamba_extend", "scales": 0.5}, family="llama"), f"mamba_extend works on {known} so far, not on llama")
    refused_in_a_line(patch(sift, text, family="llama"), f"delta_filter works on {known} so far, not on llama")
    refused_in_a_line(lambda: hf_longctx.patch(tiny_model(), sift, data=text), "delta_filter works on mamba")
    refused_in_a_line(lambda: load(folder("mamba"), methods=sift), "delta_filter has not been calibrated: give data to `longctx patch`")
    refused_in_a_line(lambda: load(folder("mamba"), methods=seek), "mamba_extend has not been calibrated: give data to `longctx patch`")
    np.savez(tmp_path / "wrong.npz", np.full(60, VOCABULARY))
    refused_in_a_line(patch(seek, tmp_path / "wrong.npz"), f"{tmp_path / 'wrong.npz'} holds token id {VOCABULARY}")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_anything_is_loaded(base, folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *args, **options: pytest.fail("it was loaded"))
    refused_in_a_line(lambda: hf_longctx.patch(base, {"name": "mamba_extend", "target": 60}, tmp_path / "out", data=text), "mamba_extend works on mamba")
    refused_in_a_line(
        lambda: hf_longctx.patch(folder("mamba"), [{"name": "mamba_extend", "target": 60}, "nope"], tmp_path / "out", data=text), "mamba has no rotary"
    )


def test_a_refused_live_model_is_as_it_was():
    model = stock("mamba")
    with pytest.raises(ValueError, match="3 scales"):
        hf_longctx.patch(model, {"name": "mamba_extend", "scales": [0.5] * 3})
    assert type(model) is type(stock("mamba"))
    assert not hasattr(model.config, "longctx")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mamba_extend", {}, "give scales"),
        ("mamba_extend", {"scales": [0.5, 0]}, "scales must be a positive number, got 0"),
        ("mamba_extend", {"scales": -1}, "scales must be a positive number, got -1"),
        ("mamba_extend", {"target": 60, "steps": 0}, "samples and steps must be at least 1"),
        ("delta_filter", {"target": 40, "trained": 40}, "target must be longer than trained, got 40 and 40"),
        ("delta_filter", {"target": 80, "trained": 40, "threshold": 1}, "threshold is a decay, between 0 and 1, got 1"),
        ("delta_filter", {"target": 80, "trained": 40, "samples": 0}, "samples must be at least 1"),
    ],
)
def test_values_that_cannot_be(name, fields, message):
    with pytest.raises(ValueError, match=message):
        method(name, **fields)


# --- The command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "window"), [("mamba2", "none"), ("bamba", "64")])
def test_patch_and_inspect_on_the_command_line(family, window, longctx, folder, text, tmp_path):  # noqa: F811
    run = longctx("patch", folder(family), "-m", "delta_filter:target=160,trained=40", "--data", text, "--out", "out")
    assert (run.status, run.out) == (0, "out: step sizes changed by delta_filter; proved\n")
    run = longctx("inspect", "out")
    lines = dict(line.split(maxsplit=1) for line in run.out.splitlines() if line.split()[0] in ("family", "methods", "window", "state"))
    assert lines == {"family": family, "methods": "delta_filter:target=160,trained=40", "window": window, "state": "yes"}
    run = longctx("patch", folder(family), "-m", "mamba_extend:target=60", "--out", "other")
    assert (run.status, run.out) == (2, "")
    assert run.err == "longctx: mamba_extend has to be calibrated: give training text as data (--data FILE), or scales\n"


def test_the_tensors_lie_beside_the_weights(patched):
    path = patched("mamba", "delta_filter")
    assert checkpoint.method_tensors(path) == ["longctx_delta.layers.0.least", "longctx_delta.layers.1.least"]
    saved = load_file(path / "model.safetensors")
    assert torch.equal(saved["longctx_delta.layers.1.least"], load(path).longctx_delta.layers[1].least)
    assert not checkpoint.method_tensors(patched("mamba", "mamba_extend"))


def test_measured_values_of_the_wrong_model_are_refused():
    model = stock("mamba")
    with pytest.raises((ValueError, RuntimeError)):
        patch_model(model, [method("delta_filter", target=160, trained=40)], [{"least": torch.zeros(32)}])
