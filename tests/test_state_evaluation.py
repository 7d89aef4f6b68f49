"""State-space models under evaluation: read in chunks they say what one whole forward pass says, in memory that does not grow."""

import json
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_longctx import evaluation, scoring, stats, task
from hf_longctx.cli.main import _default_lengths, main
from hf_longctx.evaluation import evaluate
from hf_longctx.html_report import write_report
from hf_longctx.integration import state
from hf_longctx.method import load_methods
from hf_longctx.patching import patch_model
from hf_longctx.reporting import plot_results, table
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell, Scored, load_task
from tests.conftest import byte_tokenizer, largest_tensor, tiny_config, tiny_model, write_tokens
from tests.test_evaluation import assert_equal
from tests.test_ruler import tokenizer_of
from tests.test_state import EVERY, MAMBA_1, SSM_ONLY, TOKENS, VOCABULARY, stock

SPANS = ((1, TOKENS), (10, TOKENS + 1), (20, 24), (5, 9), (TOKENS, TOKENS + 1))  # some end with the model's choice after the last token


def cells_of(spans=SPANS, tokens=TOKENS, seed=0, **asked) -> list[Cell]:
    rng = np.random.default_rng(seed)
    return [Cell(rng.integers(3, VOCABULARY, tokens), *span, **asked) for span in spans]


@torch.no_grad()
def one_whole(model, cell: Cell) -> Scored:
    """What the model as Transformers makes it says in one forward pass without a cache."""
    logits = model(torch.from_numpy(cell.ids)[None], use_cache=False).logits[0, cell.start - 1 : cell.stop - 1].float()
    known = torch.from_numpy(cell.targets)
    nll = F.cross_entropy(logits[: len(known)], known, reduction="none").numpy()
    return Scored(np.append(nll, [np.nan] * (cell.stop - cell.start - len(known))), logits.argmax(-1).numpy(), logits.softmax(-1).numpy())


def law_chunks_are_one_whole(family, chunk, batch_size=None):
    cells = cells_of()
    assert_equal(score_cells(stock(family), cells, batch_size, chunk=chunk), [one_whole(stock(family), cell) for cell in cells])


# --- chunks


@EVERY
@pytest.mark.parametrize(("chunk", "batch_size"), [(1, None), (7, None), (11, 2), (16, None), (33, None), (1000, 2), (None, None)])
def test_chunks_are_one_whole(family, chunk, batch_size, monkeypatch):
    """Sizes that divide the 33 tokens and that do not; scored spans lie within a chunk, over borders, and end behind the text."""
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 1)  # 16 tokens a block
    if chunk is None:
        monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 48)  # 16 rows of 3 tokens, or a hybrid's single rows
    law_chunks_are_one_whole(family, chunk, batch_size)


@pytest.mark.parametrize("family", MAMBA_1)
def test_what_stock_transformers_does_with_a_cache_is_another_model(family, monkeypatch):
    """The law sees a state that was dropped: DynamicCache in the place of ours, or a model that was not prepared."""
    with monkeypatch.context() as patch:
        patch.setattr(state, "prepare", lambda model: None)
        with pytest.raises(AssertionError):
            law_chunks_are_one_whole(family, 16)

    class Stock(DynamicCache):
        def __init__(self, config, keys):
            super().__init__(config=config)

        def next(self):
            return self

    monkeypatch.setattr(state, "prepare", lambda model: None)
    monkeypatch.setattr(state, "StatePassingCache", Stock)
    with pytest.raises(AssertionError):
        law_chunks_are_one_whole(family, 16)


@pytest.mark.parametrize("family", ["bamba", "granitemoehybrid"])
def test_a_hybrids_keys_go_on(family, monkeypatch):
    real = state.StatePassingCache.__init__
    monkeypatch.setattr(state.StatePassingCache, "__init__", lambda self, *args, **kwargs: real(self, *args, **(kwargs | {"keys": "restart"})))
    with pytest.raises(AssertionError):
        law_chunks_are_one_whole(family, 16)


def passes_over(model, run) -> list[tuple[int, int]]:
    """The shapes of the token ids that its decoder reads while `run()` runs."""
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    run()
    hook.remove()
    return seen


def test_a_pass_has_as_many_tokens_at_any_length(monkeypatch):
    """Long texts are read 16 beside each other or as many as there are, a hybrid's and those of a small batch by themselves."""
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 64)

    def shapes(family, rows, length, **options):
        model, counted = stock(family), []
        cells = cells_of([(1, length)] * rows, length)
        found = passes_over(model, lambda: score_cells(model, cells, on_tokens=counted.append, **options))
        found = [shape for shape in found if shape != (1, 1)]  # for the output embedding
        assert counted == [a * b for a, b in found]
        return found

    assert shapes("mamba2", 20, 10) == [(16, 4), (16, 4), (16, 2), (4, 10)]
    assert shapes("mamba2", 5, 40) == [(5, 12), (5, 12), (5, 12), (5, 4)]
    assert shapes("mamba2", 1, 100) == [(1, 64), (1, 36)]
    assert shapes("mamba2", 40, 2) == [(32, 2), (8, 2)]
    assert shapes("mamba2", 5, 40, chunk=32) == [(2, 32), (2, 8), (2, 32), (2, 8), (1, 32), (1, 8)]
    assert shapes("mamba2", 3, 40, batch_size=2) == [(2, 32), (2, 8), (1, 40)]
    assert shapes("bamba", 2, 40) == [(1, 40), (1, 40)]
    assert shapes("bamba", 2, 66)[:2] == [(1, 4), (1, 4)]
    assert shapes("bamba", 4, 32, chunk=16) == [(2, 16)] * 4


class _Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive at a time, of those made while it is on."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        holders, size = self.alive.get(key, (0, storage.nbytes()))
        if holders == 0:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.alive[key] = (holders + 1, size)
        weakref.finalize(tensor, self._free, key)

    def _free(self, key):
        holders, size = self.alive.pop(key)
        if holders > 1:
            self.alive[key] = (holders - 1, size)
        else:
            self.bytes -= size


def peak_of(run) -> int:
    with _Memory() as memory:
        run()
    return memory.peak


@SSM_ONLY
def test_memory_does_not_grow_with_the_length(family):
    """But for a token's id, its label, its -log p and its rank's winner: 8 + 8 + 4 + 8 bytes, twice where they are joined."""
    model, chunk = stock(family), 64
    score_cells(model, cells_of([(1, 4)]))  # prepared, and what is made once is made

    def run(length):
        cells = cells_of([(1, length)], length)
        return lambda: score_cells(model, cells, chunk=chunk)

    lengths = (256, 2048)
    assert largest_tensor(run(lengths[0])) == largest_tensor(run(lengths[1]))
    short, long = (peak_of(run(length)) for length in lengths)
    assert long - short <= 48 * (lengths[1] - lengths[0])
    assert short >= chunk * VOCABULARY * 4  # the measure sees the logits of a chunk

    def whole(length):
        cells = cells_of([(1, length)], length)
        return lambda: score_cells(model, cells, chunk=length)

    assert peak_of(whole(1024)) - peak_of(whole(256)) > 48 * (1024 - 256) * 3  # and hidden states that are held


@EVERY
def test_the_hidden_states_of_one_chunk_are_gone_before_the_next(family):
    model, made, held = stock(family), [], []
    decoder = model.get_decoder()

    def before(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:  # and not the one token for the output embedding
            held.append(sum(each() is not None for each in made))

    decoder.register_forward_pre_hook(before, with_kwargs=True)
    decoder.register_forward_hook(lambda module, args, output: made.append(weakref.ref(output.last_hidden_state)))
    score_cells(model, cells_of([(20, 24), (10, TOKENS)]), batch_size=1, chunk=11)
    assert held == [0] * 6


@EVERY
def test_the_device_is_not_waited_for_between_chunks(family):
    """Nothing is read back to the host chunk by chunk, and the work of a chunk does not depend on how many there were."""
    model, found = stock(family), []
    score_cells(model, cells_of([(1, 4)]))
    for chunks in (2, 4, 6):
        cells = cells_of([(1, 16 * chunks)] * 2, 16 * chunks)
        with _Reads() as seen:
            score_cells(model, cells, 2, chunk=16)
        found.append((seen.reads, seen.count))
    assert found[0][0] == found[1][0] == found[2][0] <= 1
    assert found[2][1] - found[1][1] == found[1][1] - found[0][1]


class _Reads(TorchDispatchMode):
    """Operations, and those whose result the host waits for."""

    reads = count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


def test_cells_that_ask_for_different_things_are_told_apart():
    model, plain = stock("mamba2"), cells_of()
    cells = [plain[0], cells_of(states_at=(4, 9))[1], cells_of(distribution=True)[2], plain[3]]
    found = score_cells(model, cells, chunk=8)
    wanted = [one_whole(stock("mamba2"), cell) for cell in cells]
    assert_equal(found, wanted)
    assert [output.norms is None for output in found] == [True, False, True, True]
    assert [output.probabilities is None for output in found] == [True, True, False, True]
    assert np.allclose(found[2].probabilities, wanted[2].probabilities, atol=1e-6)


# --- models without states


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("chunk", [7, 33, 64])
def test_attention_in_chunks_is_attention_at_once(family, chunk):
    """Windows that slide, too."""
    model = tiny_model(family)
    cells = [Cell(np.random.default_rng(i).integers(3, 300, 100), *span) for i, span in enumerate([(1, 100), (30, 101), (50, 60)])]
    wanted = [one_whole(model, cell) for cell in cells]
    assert_equal(score_cells(model, cells, chunk=chunk), wanted)
    read = passes_over(model, lambda: score_cells(model, cells[:1], chunk=chunk))
    assert sorted(read) == sorted([(1, 1), *[(1, min(chunk, 100 - first)) for first in range(0, 100, chunk)]])


@pytest.mark.parametrize("spec", [{"name": "alibi"}, {"name": "yarn", "factor": 4}, {"name": "log_n"}])
def test_methods_in_chunks_are_methods_at_once(spec):
    model = tiny_model()
    patch_model(model, load_methods([spec]))
    cells = [Cell(np.random.default_rng(0).integers(3, 300, 100), 1, 101)]
    assert_equal(score_cells(model, cells, chunk=16), [one_whole(model, cell) for cell in cells])


def test_models_that_cannot_be_read_in_chunks_are_refused_in_one_line():
    for config, words in (
        (tiny_config("gemma2"), r"^gemma2 is not known .* in chunks; leave out chunk \(families that do: bamba, .*qwen3\)$"),
        (
            tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "^with rope_type dynamic the first chunk .*; leave out chunk$",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            score_cells(AutoModelForCausalLM.from_config(config), cells_of(), chunk=16)


# --- evaluate, and the command line


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    """A checkpoint folder of a tiny Mamba, whose configuration knows of no window."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=3, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.data.mul_(3.0)
    folder = tmp_path_factory.mktemp("mamba")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (evaluation, task):
        monkeypatch.setattr(module, "bootstrap", lambda statistic, clusters: stats.bootstrap(statistic, clusters, draws=200))


def test_passkey_and_tail_perplexity_of_a_mamba(mamba, tokens, tmp_path):
    """Through `evaluate`, in chunks, against the stock model's own logits."""
    wanted = [{"name": "passkey", "n": 1, "depths": 2}, {"name": "tail_perplexity", "spans": 2}]
    rows = evaluate(mamba, wanted, [380, 420], out=tmp_path / "a", data=long_tokens(tmp_path), chunk=64)
    assert [(r["task"].partition(":")[0], r["length"], r["metric"]) for r in rows if r["depth"] is None] == [
        ("passkey", 380, "accuracy"), ("passkey", 420, "accuracy"),
        ("tail_perplexity", 380, "perplexity"), ("tail_perplexity", 420, "perplexity"), ("tail_perplexity", 420, "change_from_380"),
    ]  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(mamba).eval(), byte_tokenizer()
    text = [np.load(tmp_path / "tokens.npz")[name] for name in ("arr_0", "arr_1")]
    found = {r["length"]: r["value"] for r in rows if r["metric"] == "perplexity"}
    asked = load_task(wanted[1]).for_lengths([380, 420])
    for length, value in found.items():
        nll = np.concatenate([one_whole(model, cell).nll for cell in asked.cells(tokenizer, text, length, 0)])
        assert value == pytest.approx(np.exp(nll.mean(dtype=np.float64)), rel=1e-5)
    assert json.loads((tmp_path / "a/run.json").read_text())["trained_windows"] == {str(mamba): None}
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {"passkey.png", "tail_perplexity.png"}
    page = write_report(tmp_path / "a", tmp_path / "r.html").read_text()
    assert "tail_perplexity" in page
    assert "trained window" not in page


def long_tokens(folder):
    return write_tokens(folder, 2, 500)


def test_the_command_line_on_a_mamba(mamba, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = f"longctx eval {mamba} --lengths 450 --task passkey:n=1,depths=1 --task tail_perplexity:spans=2 --data {long_tokens(tmp_path)} --chunk 128 --device cpu --out out"
    monkeypatch.setattr("sys.argv", command.split())
    chunks, real = [], evaluation.score_cells
    monkeypatch.setattr(evaluation, "score_cells", lambda *given, **named: chunks.append(given[-1]) or real(*given, **named))
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert chunks == [128, 128]
    assert "450" in capsys.readouterr().out
    assert [row["metric"] for row in json.loads((tmp_path / "out/results.json").read_text())] == ["accuracy", "accuracy", "perplexity"]


def test_a_model_without_a_window_is_measured_to_16_times_the_training_window():
    assert _default_lengths({"window": None}, 32) == [32, 64, 128, 256, 512]
    assert _default_lengths({"window": 256, "trained_window": 64}, 32) == [64, 128, 256]
    assert _default_lengths({"window": 100}, 32) == [100]


# --- the norm of the state


@EVERY
@pytest.mark.parametrize("chunk", [None, 5])
@torch.no_grad()
def test_norms_are_those_of_reading_token_by_token(family, chunk):
    """By stock Transformers, which is exact one token at a time; whatever the chunks."""
    places, model = (1, 4, 15, 16, 33), stock(family)
    cells = cells_of([(TOKENS, TOKENS), (1, TOKENS)], states_at=places)
    found = score_cells(stock(family), cells, chunk=chunk)
    cache, wanted = DynamicCache(config=model.config), []
    for i in range(TOKENS):
        ids = torch.tensor([[cell.ids[i]] for cell in cells])
        model(ids, use_cache=True, **{state.CACHE_ARGUMENT[family]: cache}, **({"position_ids": torch.tensor([[i]])} if family == "bamba" else {}))
        states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
        wanted.append(torch.stack([s.double().square().flatten(1).sum(1).sqrt() for s in states], 1).numpy())
    for row, output in enumerate(found):
        assert output.norms.shape == (len(places), 2)
        assert output.norms == pytest.approx(np.array([wanted[place - 1][row] for place in places]), rel=1e-5)
    assert len(found[0].nll) == 0
    assert_equal(found[1:], [one_whole(model, cells[1])])


def growing(task, length, windows=4, layers=3):
    """Cells, and norms that grow with the place in the last layer alone, by the square root; windows differ a little."""
    texts = [np.arange(3, 3 + length) for _ in range(windows)]
    cells = task.cells(byte_tokenizer(), texts, length, 0)
    places = np.array(cells[0].states_at)
    norms = np.ones((len(cells), len(places), layers))
    norms[:, :, -1] = np.sqrt(places) * np.linspace(0.5, 1.5, len(cells))[:, None]
    return cells, [Scored(np.zeros(0), np.zeros(0), None, each) for each in norms], places, norms


def test_places_are_doublings_and_hold_the_window_and_the_end():
    task = load_task({"name": "state_norm", "points": 1}).for_lengths([100, 1000])
    assert task.window == 100
    assert growing(task, 1000)[2].tolist() == [1, 2, 4, 8, 16, 32, 64, 100, 128, 256, 512, 1000]
    assert growing(task, 100)[2].tolist() == [1, 2, 4, 8, 16, 32, 64, 100]
    assert {(len(cell.ids), len(cell.targets)) for cell in growing(task, 100)[0]} == {(100, 0)}
    assert growing(load_task({"name": "state_norm"}), 64)[2].tolist() == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64]
    assert load_task({"name": "state_norm", "window": "1k"}).for_lengths([4096]).window == 1024


def test_growth_and_the_place_where_a_layer_leaves():
    task = load_task({"name": "state_norm", "window": 64})
    cells, outputs, places, norms = growing(task, 1024)
    rows = task.score(cells, outputs, None)
    overall = {row.metric: row for row in rows if row.depth is None}
    assert list(overall) == ["state_norm", "state_growth", "state_left_at"]
    assert overall["state_norm"].value == pytest.approx(np.sqrt((norms[:, -1] ** 2).sum(1)).mean())
    assert overall["state_growth"].value == pytest.approx(32 / 8)
    assert (overall["state_growth"].ci_low, overall["state_growth"].ci_high) == (pytest.approx(4), pytest.approx(4))
    assert overall["state_left_at"].value == 181  # its mean, sqrt(181), is above 8 x 1.5, sqrt(128) is not
    assert [row.metric for row in rows[3:]] == [name for name in ("state_norm", *(f"state_norm_layer_{i}" for i in range(3))) for _ in places]
    last = rows[-len(places) :]
    assert [row.depth * 1024 for row in last] == places.tolist()
    assert [row.value for row in last] == pytest.approx(np.sqrt(places))
    assert all(row.ci_low < row.value < row.ci_high and row.n == 4 for row in last)
    assert all(row.value == 1 for row in rows if row.metric == "state_norm_layer_0")


def test_a_state_that_stays_or_is_read_within_the_window_has_not_left():
    task = load_task({"name": "state_norm", "window": 64})
    cells, outputs, _, norms = growing(task, 1024)
    steady = [Scored(np.zeros(0), np.zeros(0), None, np.ones_like(each)) for each in norms]
    for output in steady:
        output.norms[3] = 2  # it came and went
    assert [(row.metric, row.value) for row in task.score(cells, steady, None) if row.depth is None][1:] == [("state_growth", 1)]
    assert [row.metric for row in task.score(*growing(task, 64)[:2], None) if row.depth is None] == ["state_norm"]
    norms[1, 5, 0] = np.inf
    with pytest.raises(ValueError, match=r"^the state is not finite after 8 tokens$"):
        task.score(cells, outputs, None)


# --- effective remembrance


def test_remembrance_is_the_total_variation_to_the_text_without_its_beginning():
    task = load_task({"name": "effective_remembrance", "halvings": 3, "windows": 1})
    texts = [np.arange(3, 67), np.arange(70, 134)]
    cells = task.cells(byte_tokenizer(), texts, 64, 0)
    assert [(len(cell.ids), cell.cluster, cell.depth) for cell in cells] == [(64 - t, number, t / 64) for number in (0, 1) for t in (0, 8, 16, 32)]
    assert all((cell.ids[-1], len(cell.targets), cell.stop - cell.start) == (texts[cell.cluster][-1], 0, 1) for cell in cells)
    said = [[1, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]
    overall, *rows = task.score(cells, [Scored(np.zeros(1), np.zeros(1), np.array([each], np.float32)) for each in said], None)
    assert [(row.metric, row.depth, row.value, row.n) for row in rows] == [
        ("effective_remembrance", depth, value, 2) for depth, value in ((0.125, 0), (0.25, 0.25), (0.5, 0.625))
    ]
    assert (overall.value, overall.depth, overall.values, overall.clusters) == (0.625, None, (1.0, 0.25), (0, 1))
    assert (overall.ci_low, overall.ci_high) == (0.25, 1)


def test_texts_that_are_read_differently_are_not_compared():
    """Nothing of them is scored, so what is read decides."""
    one, same, other = ([Cell(ids, 8, 9, distribution=True)] for ids in (np.arange(8), np.arange(8), np.arange(1, 9)))
    assert evaluation._same_text(one) == evaluation._same_text(same) != evaluation._same_text(other)


def test_the_opening_token_stays():
    tokenizer = tokenizer_of("bos")
    cells = load_task({"name": "effective_remembrance", "halvings": 2}).cells(tokenizer, [np.arange(10, 30)], 16, 0)
    assert [cell.ids.tolist() for cell in cells] == [[1, *range(10 + t, 25)] for t in (0, 4, 8)]


@torch.no_grad()
def test_diagnostics_of_a_mamba_and_of_a_model_without_a_state(mamba, base, tmp_path):
    """Through `evaluate`: remembrance against stock logits; a LLaMA has no state and says so in a row."""
    tasks = [{"name": "effective_remembrance", "halvings": 2, "windows": 1}, {"name": "state_norm", "windows": 1}]
    rows = evaluate(base, tasks, [32, 128], out=tmp_path / "out", data=long_tokens(tmp_path), baseline=mamba)
    failed = [row for row in rows if row["metric"] == "failed"]
    assert [(row["model"], row["task"].partition(":")[0], row["length"]) for row in failed] == [(str(base), "state_norm", 32), (str(base), "state_norm", 128)]
    assert failed[0]["error"].startswith("llama has no state that state methods can pass on; families that have: bamba")
    text = [np.load(tmp_path / "tokens.npz")[name][:128] for name in ("arr_0", "arr_1")]
    for folder in (base, mamba):
        model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), []
        for ids in text:
            p, *others = (model(torch.from_numpy(ids[None, t:].astype(np.int64))).logits[0, -1].double().softmax(-1) for t in (0, 32, 64))
            found.append([(p - q).abs().sum().item() / 2 for q in others])
        mine = [row["value"] for row in rows if (row["model"], row["metric"], row["length"]) == (str(folder), "effective_remembrance", 128)]
        assert mine == pytest.approx([np.mean(found, 0)[1], *np.mean(found, 0)], rel=1e-4)
    change = next(row for row in rows if row["metric"] == "change_from_baseline" and row["length"] == 128 and row["depth"] is None)
    values = {row["model"]: row["value"] for row in rows if row["metric"] == "effective_remembrance" and row["depth"] is None and row["length"] == 128}
    assert change["value"] == pytest.approx(values[str(base)] - values[str(mamba)])
    assert table(rows)[-1][-1].startswith(f"{100 * change['value']:+.1f} points")
    norms = [row for row in rows if row["metric"] == "state_norm" and row["length"] == 128]
    assert norms[0]["value"] == norms[-1]["value"] > 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"effective_remembrance.png", "state_norm.png"}
    page = write_report(tmp_path / "out", tmp_path / "r.html").read_text()
    assert "Where in the context" not in page
    assert "state growth" in page


# --- loss by position, paired


@torch.no_grad()
def test_each_bucket_of_positions_has_its_paired_change(mamba, tmp_path, figures):
    """Against another model, over the same tokens, far beyond its training: by stock logits."""
    other = AutoModelForCausalLM.from_pretrained(mamba).eval()
    other.backbone.layers[0].mixer.dt_proj.bias.data.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    task = {"name": "position_nll", "buckets": 4, "windows": 1}
    rows = evaluate(tmp_path / "other", task, [200], out=tmp_path / "out", data=long_tokens(tmp_path), baseline=mamba, chunk=30)
    losses = []
    for model in (other, AutoModelForCausalLM.from_pretrained(mamba).eval()):
        text = torch.from_numpy(np.stack([np.load(tmp_path / "tokens.npz")[name][:200].astype(np.int64) for name in ("arr_0", "arr_1")]))
        logits = model(text).logits[:, :-1].double()
        losses.append(F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").numpy())
    buckets = [slice(a - 1, b - 1) for a, b in ((1, 50), (50, 100), (100, 150), (150, 200))]
    here = [row for row in rows if row["metric"] == "nll"]
    assert [row["value"] for row in here] == pytest.approx([loss[:, k].mean() for loss in losses for k in buckets], rel=1e-5)
    changes = [row for row in rows if row["metric"] == "change_from_baseline" and row["depth"] is not None]
    assert [row["depth"] for row in changes] == [row["depth"] for row in here[:4]]
    assert [row["value"] for row in changes] == pytest.approx([np.expm1((losses[0] - losses[1])[:, k].mean()) for k in buckets], rel=1e-3, abs=1e-6)
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in changes)
    above, below = figures[0].axes
    assert [line.get_ydata().tolist() for line in below.lines[:1]] == [pytest.approx([100 * row["value"] for row in changes])]
    assert len(above.lines) == 2
    assert len(table(rows)) == 4  # the header, two perplexities and their change


def test_the_norms_are_drawn_on_logarithmic_axes_with_the_trained_window(tmp_path, figures):
    task = load_task({"name": "state_norm", "window": 64})
    rows = []
    for model, length in (("m", 256), ("m", 1024), ("n", 1024)):
        for result in task.score(*growing(task, length)[:2], None):
            about = {"model": model, "task": "state_norm", "length": length}
            rows.append(
                about | {key: None if (number := getattr(result, key)) != number else number for key in ("metric", "value", "depth", "ci_low", "ci_high")}
            )
    (tmp_path / "run.json").write_text(json.dumps({"trained_windows": {"m": 128, "n": None}}))
    (path,) = plot_results(rows, tmp_path)
    assert path.name == "state_norm.png"
    first, second = figures[0].axes
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in first.texts] == [" a layer leaves at 181", " trained window 128"]
    assert [text.get_text() for text in second.texts] == [" a layer leaves at 181"]
    assert first.lines[2].get_xydata()[-1].tolist() == [1024, pytest.approx(32)]
    assert [line.get_label() for line in first.lines[:4]][::3] == ["layer 0", "all layers"]
