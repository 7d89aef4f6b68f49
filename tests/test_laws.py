"""What holds for every method on every family: the method fills its slot, and nothing else about the model changes.

Each law is a function, so that something deliberately broken can be handed to it and be caught.
"""

import copy
import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_longctx
from hf_longctx import checkpoint, files, patching
from hf_longctx.integration import rope
from hf_longctx.method import Method, load_method, method, method_class, method_names
from hf_longctx.patching import patch_model
from tests.conftest import FAMILIES, TINY, WINDOW, byte_tokenizer, tiny_config, tiny_model

FACTOR = 2.5  # 64 -> 160: windows need not be powers of two
SPECS = {
    "linear": {"factor": FACTOR},
    "ntk": {"factor": FACTOR},
    "dynamic_ntk": {"factor": FACTOR},
    "yarn": {"factor": FACTOR},
    "llama3": {"factor": FACTOR},
    "longrope": {"factor": FACTOR},
    "theta": {"theta": 2e7, "target": 160},
    "nope": {"target": 160},
}
VARIANTS = {
    "wavelength": {"name": "yarn", "factor": FACTOR, "blend": "wavelength"},
    "fractional": {"name": "yarn", "factor": 2.3, "truncate": False, "beta_fast": 16.0},
    "two_lists": {"name": "longrope", "factor": FACTOR, "short_factor": True},
}
ALL = [*SPECS, *VARIANTS]
PAIRS = [(family, name) for family in FAMILIES for name in ALL if (family, name) != ("phi3", "dynamic_ntk")]
LAWS = ["decoding", "padding", "saving", "folder"]
floor = pytest.mark.floor


def covering(law: str) -> list[tuple[str, str]]:
    """Every method on llama, and three on each other family: others for each law, so that over the laws each family meets each method."""
    first = 3 * LAWS.index(law)
    chosen = {(family, ALL[(first + f + i) % len(ALL)]) for f, family in enumerate(FAMILIES) for i in range(3)}
    return [pair for pair in PAIRS if pair[0] == "llama" or pair in chosen]


def cases(law: str):
    """`covering` as a parametrisation; yarn on llama and the first method of each other family are in the short leg."""
    first = {family: name for family, name in reversed(covering(law))} | {"llama": "yarn"}
    return pytest.mark.parametrize(("family", "name"), [pytest.param(f, n, marks=[floor] if first[f] == n else []) for f, n in covering(law)])


def build(name: str, family: str = "llama") -> Method:
    """The method of `SPECS` or `VARIANTS`; lists of factors as long as the family has rotary pairs."""
    spec = {"name": name, **SPECS[name]} if name in SPECS else dict(VARIANTS[name])
    if spec["name"] == "longrope":
        pairs = 2 if family == "gpt_neox" else 8
        spec["long_factor"] = [1.0 + i / 2 for i in range(pairs)]
        if spec.pop("short_factor", False):
            spec["short_factor"] = [1.0 + i / 8 for i in range(pairs)]
    return load_method(spec)


def patched(family: str, name: str):
    return patch_model(tiny_model(family), [build(name, family)])


def tokens(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(length))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def frequencies(model) -> tuple[torch.Tensor, float]:
    found = rope.frequencies(rope.rotary_of(model), rope.layer_type(model.config))
    return torch.tensor(found.inv_freq), found.attention_factor


def regime(name: str) -> int:
    """A length past the window and the sliding windows, or, where frequencies depend on the length, inside the window."""
    return WINDOW + 32 if build(name).static else WINDOW


# --- The laws. float32 sums in another order differ by some 1e-5 at logits of some 10.


def law_decoding_equals_prefill(model, length: int) -> None:
    ids = tokens(length)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-3], use_cache=True).past_key_values
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(length - 3, length)]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, ids)[:, -3:], atol=2e-4, rtol=1e-4)


def law_padding_changes_nothing(model, length: int, mask_padding: bool = True) -> None:
    short, long = tokens(length // 2), tokens(length)
    pad = length - short.shape[1]
    ids = torch.cat([torch.nn.functional.pad(short, (pad, 0)), long])
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0 if mask_padding else 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(both[:1, pad:], logits(model, short), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(both[1:], logits(model, long), atol=2e-4, rtol=1e-4)


def law_saving_keeps_it(model, folder) -> None:
    ids = tokens(3 * WINDOW)
    wanted = logits(model, ids)
    hf_longctx.save(model, byte_tokenizer(), folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(plain, ids), wanted, atol=1e-5, rtol=1e-5)
    assert AutoConfig.from_pretrained(folder).longctx == model.config.longctx


def law_finite_in_bfloat16(folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert logits(model, tokens(4 * WINDOW)).isfinite().all()


def law_patching_twice_is_patching_once(folder, first: Method, second: Method, tmp_path) -> None:
    """Whatever was patched before, a patch starts from what the model was trained with: same configuration, byte for byte."""
    hf_longctx.patch(folder, first, tmp_path / "first")
    hf_longctx.patch(tmp_path / "first", second, tmp_path / "both")
    hf_longctx.patch(folder, second, tmp_path / "second")
    assert (tmp_path / "both/config.json").read_text() == (tmp_path / "second/config.json").read_text()


def law_the_trained_rope_is_remembered(after, before, item: Method) -> None:
    assert after.longctx["trained"] == {"rope_parameters": before.rope_parameters, "window": WINDOW}
    assert rope.read_shape(after) == rope.read_shape(before)
    assert [load_method(m) for m in after.longctx["methods"]] == [item]
    assert after.rope_parameters.get("sliding_attention") == before.rope_parameters.get("sliding_attention")  # gemma3's local layers


def law_the_window_is_written(config, name: str) -> None:
    """A whole number; for dynamic_ntk the trained one, from which Transformers computes the length ratio."""
    window = WINDOW * 2.3 if name == "fractional" else WINDOW * FACTOR
    assert type(config.max_position_embeddings) is int, name
    assert config.max_position_embeddings == (WINDOW if name == "dynamic_ntk" else round(window)), name
    assert patching.window_of(config) == round(window), name


# --- Held to by every method and family.


def test_every_rope_method_is_under_the_laws():
    assert set(SPECS) == set(method_names("rope"))
    assert {pair for law in LAWS for pair in covering(law)} == set(PAIRS)


@pytest.mark.parametrize("name", ALL)
def test_a_method_survives_its_dictionary(name):
    """Through JSON, since that is what recipes and configurations hold."""
    item = build(name)
    assert load_method(json.loads(json.dumps(item.to_dict()))) == item


@pytest.mark.parametrize("name", method_names("positions"))
@pytest.mark.parametrize("fields", [{}, {"target": "2k"}])
def test_a_sampler_survives_its_dictionary(name, fields):
    item = method(name, **({} if name == "plain" else fields))
    assert load_method(json.loads(json.dumps(item.to_dict()))) == item


def test_the_dictionary_law_catches_a_method_that_rewrites_its_fields(monkeypatch):
    monkeypatch.setattr(method_class("linear"), "__post_init__", lambda self: object.__setattr__(self, "factor", self.factor * 2))
    item = method("linear", factor=2)
    assert load_method(item.to_dict()) != item


@cases("decoding")
def test_decoding_equals_prefill(family, name):
    law_decoding_equals_prefill(patched(family, name), regime(name))


def test_the_decoding_law_catches_frequencies_that_move():
    """dynamic_ntk past its window: cached keys keep the base they were rotated with. Why its `static` is False."""
    with pytest.raises(AssertionError):
        law_decoding_equals_prefill(patched("llama", "dynamic_ntk"), WINDOW + 32)


@cases("padding")
def test_padding_changes_nothing(family, name):
    law_padding_changes_nothing(patched(family, name), regime(name))


def test_the_padding_law_catches_an_unmasked_pad():
    with pytest.raises(AssertionError):
        law_padding_changes_nothing(patched("llama", "yarn"), WINDOW, mask_padding=False)


@cases("saving")
def test_saving_keeps_it(family, name, tmp_path):
    law_saving_keeps_it(patched(family, name), tmp_path)


@pytest.mark.parametrize("name", [name for name in ALL if name != "nope"])
def test_the_saving_law_catches_a_lost_change(name, tmp_path, monkeypatch):
    """A save that writes the trained frequencies back: every method but `nope` turns visibly otherwise at three windows."""
    finish = checkpoint.finish_folder

    def forget(folder, config, others, raw):
        config = copy.deepcopy(config)
        config.rope_parameters = config.longctx["trained"]["rope_parameters"]
        finish(folder, config, others, raw)

    monkeypatch.setattr(checkpoint, "finish_folder", forget)
    with pytest.raises(AssertionError):
        law_saving_keeps_it(patched("llama", name), tmp_path)


@cases("folder")
def test_patching_a_folder_equals_patching_live(family, name, family_folder, tmp_path):
    """And what a method changed survives bfloat16."""
    folder = hf_longctx.patch(family_folder(family), build(name, family), tmp_path / "out")
    live, ids = patched(family, name), tokens(3 * WINDOW)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(stored, ids), logits(live, ids), atol=1e-5, rtol=1e-5)
    assert stored.config.longctx == live.config.longctx
    law_finite_in_bfloat16(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_patching_changes(family):
    """The output: the laws above would hold for a patch that does nothing, or where positions do not matter. And the configuration, for good."""
    ids, stock = tokens(3 * WINDOW), tiny_model(family)
    before = logits(stock, ids)
    for name in [name for f, name in PAIRS if f == family]:
        model = patched(family, name)
        assert (logits(model, ids) - before).abs().max() > 0.01, name
        law_the_trained_rope_is_remembered(model.config, stock.config, build(name, family))
        law_the_window_is_written(model.config, name)


def test_the_bfloat16_law_catches_an_overflow(family_folder, tmp_path):
    folder = hf_longctx.patch(family_folder("llama"), build("yarn"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["attention_factor"] = 1e39  # 1e25, times itself in a logit, does not show on every CPU
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        law_finite_in_bfloat16(folder)


FOLLOWING = [(a, ALL[(i + step) % len(ALL)]) for i, a in enumerate(ALL) for step in (0, 1, 4)]  # each one after itself and two others


@pytest.mark.parametrize(("first", "second"), [pytest.param(a, b, marks=[floor] if a == b else []) for a, b in FOLLOWING])
def test_patching_twice_is_patching_once(first, second, family_folder, tmp_path):
    law_patching_twice_is_patching_once(family_folder("llama"), build(first), build(second), tmp_path)


SEQUENCES = [("wavelength", "linear"), ("two_lists", "yarn"), ("linear", "wavelength"), ("yarn", "theta")]


@pytest.mark.parametrize(("family", "first", "second"), [(f, *SEQUENCES[(i + j) % 4]) for i, f in enumerate(list(FAMILIES)[1:]) for j in range(2)])
def test_patching_twice_is_patching_once_in_other_families(family, first, second, family_folder, tmp_path):
    law_patching_twice_is_patching_once(family_folder(family), build(first, family), build(second, family), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_a_live_model_twice_is_patching_it_once(family):
    twice, once = patched(family, "wavelength"), patched(family, "yarn")
    patch_model(twice, [build("yarn", family)])
    assert twice.config.to_dict() == once.config.to_dict()
    assert frequencies(twice)[1] == frequencies(once)[1]
    torch.testing.assert_close(frequencies(twice)[0], frequencies(once)[0], rtol=0, atol=0)


def test_the_twice_law_catches_a_patch_that_starts_from_the_last_one(family_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(rope, "trained_window", lambda config: config.max_position_embeddings)
    with pytest.raises(AssertionError):
        law_patching_twice_is_patching_once(family_folder("llama"), build("linear"), build("yarn"), tmp_path)


@pytest.mark.parametrize("factor", [1, 1.0, 1.37, math.pi, 64])
@pytest.mark.parametrize("name", [name for name in SPECS if "factor" in SPECS[name]])
def test_any_factor_from_one_up(name, factor):
    fields = {"long_factor": [1.5] * 8} if name == "longrope" else {}
    model = patch_model(tiny_model(), [method(name, factor=factor, **fields)])
    assert patching.window_of(model.config) == round(WINDOW * factor)
    if factor == 1 and name != "longrope":  # nothing to extend, nothing changes
        torch.testing.assert_close(logits(model, tokens(WINDOW)), logits(tiny_model(), tokens(WINDOW)), atol=1e-5, rtol=1e-5)


# --- A patch proves itself.


@dataclasses.dataclass(frozen=True)
class Lying(Method):
    """`native` says one thing, `at` another: as after a slip in a formula, or in Transformers."""

    lie: str = "frequency"

    def rope(self, shape):
        true = method("yarn", factor=4).rope(shape)
        ((length, told),) = true.at.items()
        if self.lie == "frequency":
            told = dataclasses.replace(told, inv_freq=(*told.inv_freq[:-1], told.inv_freq[-1] * 1.0001))
        elif self.lie == "temperature":
            told = dataclasses.replace(told, attention_factor=told.attention_factor * 1.0001)
        elif self.lie == "missing":
            told = dataclasses.replace(told, inv_freq=told.inv_freq[:-1])
        else:
            told = dataclasses.replace(told, inv_freq=(math.nan, *told.inv_freq[1:]))
        return dataclasses.replace(true, at={length: told})


LIES = ["frequency", "temperature", "missing", "nan"]


@pytest.mark.parametrize("lie", LIES)
def test_the_proof_catches_another_frequency_on_a_live_model(lie):
    with pytest.raises(RuntimeError, match="did not take effect"):
        patch_model(tiny_model(), [Lying(lie)])


@floor
@pytest.mark.parametrize("lie", LIES)
def test_the_proof_catches_another_frequency_in_a_folder(lie, family_folder, tmp_path):
    with pytest.raises(RuntimeError, match="did not take effect"):
        hf_longctx.patch(family_folder("llama"), Lying(lie), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@floor
@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_catches_a_module_that_was_not_rebuilt(family, monkeypatch):
    """The trap of Transformers: a changed configuration alone changes nothing in a live model."""
    monkeypatch.setattr(rope, "rebuild", lambda model, config: None)
    with pytest.raises(RuntimeError, match="did not take effect"):
        patched(family, "linear")


def test_the_proof_catches_keys_that_were_not_written(family_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "finish_folder", lambda folder, config, others, raw: files.write_json(folder / "config.json", raw))
    with pytest.raises(RuntimeError, match="did not take effect"):
        hf_longctx.patch(family_folder("llama"), build("yarn"), tmp_path / "out")


def test_the_proof_looks_at_every_length(monkeypatch):
    """dynamic_ntk is right inside the window whatever happens beyond."""
    monkeypatch.setattr(method_class("dynamic_ntk"), "rope", lambda self, shape: dataclasses.replace(method("linear", factor=1).rope(shape), at={
        WINDOW: shape.trained, 4 * WINDOW: shape.trained}, native={"rope_type": "dynamic", "factor": 4.0}, raise_limit=False))  # fmt: skip
    with pytest.raises(RuntimeError, match="at length 256"):
        patch_model(tiny_model(), [method("dynamic_ntk", factor=4)])


# --- A base that its vendor has scaled.

VENDORS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "one list": {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [1.5] * 8, "attention_factor": 1.1, "original_max_position_embeddings": 16},
}


REFUSING = ("theta", "longrope", "dynamic_ntk")  # their formulas start from base^(-2j/D); nope starts from nothing


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("name", REFUSING)
def test_a_vendors_scaling_is_refused(name, vendor):
    model = tiny_model(rope_parameters={"rope_theta": 1e4, **VENDORS[vendor]})
    with pytest.raises(ValueError, match=f"{name} needs a model trained with plain RoPE; this one was trained with {VENDORS[vendor]['rope_type']}$"):
        patch_model(model, [build(name)])
    assert not hasattr(model.config, "longctx")


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("name", [name for name in SPECS if name not in (*REFUSING, "nope")])
def test_a_vendors_scaling_is_scaled_further(name, vendor):
    """Never thrown away: the slowest pair turns `factor` times slower than it was trained to, none turns faster."""
    model = tiny_model(rope_parameters={"rope_theta": 1e4, **VENDORS[vendor]})
    trained, temperature = frequencies(model)
    found, new_temperature = frequencies(patch_model(model, [build(name)]))
    ratio = (trained / found).tolist()
    assert math.isclose(ratio[-1], FACTOR, rel_tol=1e-5)
    assert all(1 - 1e-5 < r < FACTOR + 1e-5 for r in ratio)
    assert new_temperature >= temperature - 1e-9
    assert model.config.longctx["trained"]["rope_parameters"]["rope_type"] == VENDORS[vendor]["rope_type"]
    assert frequencies(patch_model(model, [build(name)]))[0].equal(found)


def test_the_vendor_law_catches_a_method_that_starts_from_the_plain_frequencies(monkeypatch):
    read = rope.read_shape
    plain = read(tiny_config()).trained
    monkeypatch.setattr(rope, "read_shape", lambda config: dataclasses.replace(read(config), trained=plain))
    with pytest.raises(AssertionError):
        test_a_vendors_scaling_is_scaled_further("linear", "llama3")


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("name", ["linear", "yarn"])
def test_a_vendors_scaling_survives_saving(name, vendor, tmp_path):
    model = tiny_model(rope_parameters={"rope_theta": 1e4, **VENDORS[vendor]})
    law_saving_keeps_it(patch_model(model, [build(name)]), tmp_path)


def test_a_vendors_two_lists_are_refused():
    """Phi-3-mini-128k: which list applies depends on the length, so there is no one set of frequencies to scale."""
    lists = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = tiny_model("phi3", original_max_position_embeddings=16, rope_parameters={"rope_theta": 1e4, **lists})
    with pytest.raises(ValueError, match="phi3 was trained with rope_type 'longrope', whose frequencies depend on the length"):
        patch_model(model, [build("linear")])
