"""Data: examples are a function of (seed, i); packing never leaks; sources are read once; bad input is one line."""

import json
import os
import pickle
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from hf_longctx import data
from hf_longctx.data import IGNORE, Documents, Mixture, Windows, collate, coverage, load_documents, read_texts
from hf_longctx.method import method
from hf_longctx.recipe import DataSource
from tests.conftest import byte_tokenizer, tiny_model

WINDOW = 16
POSE = method("pose", target=128)


def documents(lengths, seed=0) -> Documents:
    rng = np.random.default_rng(seed)
    return Documents.join([rng.integers(3, 259, n).astype(np.uint16) for n in lengths])


def numbered(lengths) -> Documents:
    """Every token is its own number, so that a row tells where it was cut from."""
    ends = np.cumsum([0, *lengths])
    return Documents.join([np.arange(a, b, dtype=np.uint16) for a, b in pairwise(ends)])


def mixture(total, seed=5, weights=(1.0, 3.0)) -> Mixture:
    sources = [Windows(documents([100, 7, 40, 9], s), WINDOW, POSE, [seed, s]) for s in range(len(weights))]
    return Mixture(sources, weights, total, seed)


def same(a, b) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in a | b)


# --- determinism


def test_example_i_does_not_depend_on_the_total_or_on_what_was_read_before():
    short, long = mixture(50), mixture(3000)
    assert all(same(short[i], long[i]) for i in range(50))
    fresh = mixture(3000)  # a restart begins in the middle
    assert all(same(fresh[i], long[i]) for i in (2999, 0, 1500))


def test_another_seed_is_another_order():
    a, b = mixture(20, seed=1), mixture(20, seed=2)
    assert not all(same(a[i], b[i]) for i in range(20))


def test_workers_do_not_change_the_batches():
    rows = mixture(40)
    alone, shared = (DataLoader(rows, batch_size=4, num_workers=n, collate_fn=collate) for n in (0, 2))
    for a, b in zip(alone, shared, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_examples_travel_to_workers_that_are_not_forked():
    rows = mixture(4)
    assert same(pickle.loads(pickle.dumps(rows))[3], rows[3])


def test_a_new_process_gives_the_same_example():
    """Nothing hangs on Python's hash seed or on global random state."""
    code = "from tests.test_data import mixture; print(mixture(1500)[1234]['input_ids'].tolist())"
    env = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.strip() == str(mixture(1500)[1234]["input_ids"].tolist())


def test_every_window_comes_once_before_any_comes_again():
    rows = Windows(numbered([100, 50, 40]), WINDOW, method("plain"), [0], short="drop")
    firsts = {0, 16, 32, 48, 64, 80, 100, 116, 132, 150, 166}  # every full window of the three documents
    orders = []
    for epoch in range(3):
        seen = [int(rows[epoch * len(rows) + i]["input_ids"][0]) for i in range(len(rows))]
        assert sorted(seen) == sorted(firsts)
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_sources_are_mixed_by_weight_each_in_its_own_order():
    total, share = 4000, np.array([1, 2, 5]) / 8
    sources = [Windows(numbered([WINDOW * 50]), WINDOW, method("plain"), [0, s]) for s in range(3)]
    mixed = Mixture(sources, [1, 2, 5], total, seed=0)
    drawn = np.concatenate([mixed._draw(block) for block in range(4)])[:total]
    assert np.abs(np.bincount(drawn) / total - share).max() < 5 * np.sqrt(0.25 / total)  # five standard deviations
    counts = [0, 0, 0]
    for i in range(1100):  # past the first block of draws
        assert same(mixed[i], sources[drawn[i]][counts[drawn[i]]])
        counts[drawn[i]] += 1


def test_a_mixture_ends():
    with pytest.raises(IndexError):
        mixture(5)[5]
    assert len(list(mixture(5))) == 5


def test_a_long_run_costs_no_memory():
    rows = mixture(2_000_000)
    assert rows.before.nbytes < 100_000


# --- rows


def test_pose_takes_text_from_the_rest_of_the_document_and_only_from_there():
    rows = Windows(numbered([100, 200]), WINDOW, POSE, [0])
    for i in range(2 * len(rows)):
        ids = rows[i]["input_ids"]
        assert (np.diff(ids) > 0).all()
        assert ids[-1] < 100 or ids[0] >= 100


def test_seams_are_masked_on_request():
    plain, masked = (Windows(documents([400]), WINDOW, POSE, [0], mask_seams=m) for m in (False, True))
    skipped = 0
    for i in range(len(plain)):
        a, b = plain[i], masked[i]
        seam = np.flatnonzero(np.diff(a["position_ids"]) != 1) + 1
        assert (a["labels"][1:] == a["input_ids"][1:]).all()
        assert (b["labels"][seam] == IGNORE).all()
        assert (b["labels"] == IGNORE).sum() == 1 + len(seam)
        skipped += len(seam)
    assert skipped


def test_the_first_token_opens_every_window_and_is_never_a_label():
    rows = Windows(documents([100, 10, 5]), WINDOW, POSE, [0], first_token=1)
    for i in range(len(rows)):
        row = rows[i]
        starts = np.flatnonzero(np.diff(row["segments"], prepend=-2) > 0)
        assert (row["input_ids"][starts] == 1).all()
        assert (row["labels"][starts] == IGNORE).all()


# --- packing


def test_packing_keeps_every_short_document_whole_and_drops_none():
    lengths = [5, 9, 3, 12, 2, 15, 1, 7]
    rows = Windows(documents(lengths), WINDOW, POSE, [0])
    packed = sorted(d for row in rows.packs for d in row)
    assert packed == [0, 1, 2, 3, 4, 5, 7]  # a single token predicts nothing
    assert all(sum(lengths[d] for d in row) <= WINDOW for row in rows.packs)
    assert len(rows) == 4  # 53 tokens do not fit three rows of 16
    assert rows.dropped == 0


def test_short_documents_are_dropped_with_a_count_on_request():
    rows = Windows(documents([5, 40, 9]), WINDOW, POSE, [0], short="drop")
    assert (len(rows), rows.dropped, rows.packs) == (2, 2, [])


def test_padding_has_no_label_and_no_document():
    row = Windows(documents([5, 6]), WINDOW, POSE, [0])[0]
    pad = row["segments"] == -1
    assert pad.sum() == 5
    assert (row["labels"][pad] == IGNORE).all()
    assert (row["labels"] == IGNORE).sum() == 5 + 2


def test_unpacked_rows_get_a_mask_of_ones():
    """Without a mask Transformers cuts attention at every skip (design, rule 1)."""
    batch = collate([Windows(documents([400]), WINDOW, POSE, [0])[i] for i in range(3)])
    assert torch.equal(batch["attention_mask"], torch.ones(3, WINDOW, dtype=torch.long))


@pytest.mark.floor
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_packed_documents_never_see_each_other(family):
    model = tiny_model(family)
    rows = Windows(documents([7, 6, 3]), WINDOW, POSE, [0])
    row = rows[0]
    changed = row | {"input_ids": np.where(row["segments"] == 0, (row["input_ids"] + 11) % 200 + 3, row["input_ids"])}

    def logits(given, **kwargs):
        batch = collate([given]) | kwargs
        batch.pop("labels")
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0]

    others = torch.from_numpy(row["segments"] > 0)
    assert others.any()
    assert torch.equal(logits(row)[others], logits(changed)[others])
    # The law can fail: under a causal mask of the whole row they do see each other.
    whole = {"attention_mask": torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril()[None, None]}
    assert (logits(row, **whole)[others] - logits(changed, **whole)[others]).abs().max() > 1e-3


def test_a_packed_document_scores_as_it_does_alone():
    model = tiny_model()
    row = Windows(documents([7, 6]), WINDOW, POSE, [0])[0]
    batch = collate([row])
    second = torch.from_numpy(row["segments"] == 1)
    with torch.no_grad():
        packed = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]).logits[0, second]
        ones = torch.ones(1, int(second.sum()), dtype=torch.long)
        alone = model(batch["input_ids"][:, second], attention_mask=ones, position_ids=batch["position_ids"][:, second]).logits[0]
    assert torch.allclose(packed, alone, atol=1e-5)


# --- reading


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


TEXTS = ["first document", "the second, a little longer", "third"]


def write(folder, kind):
    """The same three documents in every format that is read."""
    folder.mkdir(exist_ok=True)
    if kind == "folder":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)
        return folder
    path = folder / f"d.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    else:
        pq.write_table(pa.table({"text": TEXTS}), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_every_format_gives_the_same_documents(kind, tmp_path, cache):
    tokenizer = byte_tokenizer()
    found = load_documents(DataSource(str(write(tmp_path / "in", kind))), tokenizer)
    assert [tokenizer.decode(found[i]) for i in range(len(found))] == [text + "</s>" for text in TEXTS]


def test_a_text_file_is_one_document(tmp_path, cache):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read_texts(DataSource(str(tmp_path / "a.txt")))) == ["one\n\ntwo\n"]


def test_token_ids_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "t.npz", [5, 6, 7], np.array([8, 9], np.uint64))
    found = load_documents(DataSource(str(tmp_path / "t.npz")), byte_tokenizer())
    assert [found[i].tolist() for i in range(len(found))] == [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize("budget", [1, 15, 16, 30, 1000])
def test_the_token_budget_cuts_the_last_document(budget, tmp_path, cache):
    path = write(tmp_path / "in", "jsonl")
    whole = load_documents(DataSource(str(path)), byte_tokenizer())
    cut = load_documents(DataSource(str(path), tokens=budget), byte_tokenizer())
    assert np.array_equal(cut.ids, whole.ids[:budget])
    assert cut.lengths.sum() == min(budget, len(whole.ids))


def forbid_reading(monkeypatch):
    def fail(*args):
        raise AssertionError("read again")

    monkeypatch.setattr(data, "read_texts", fail)


def test_the_second_call_reads_the_cache(tmp_path, cache, monkeypatch):
    source = DataSource(str(write(tmp_path / "in", "jsonl")))
    first = load_documents(source, byte_tokenizer())
    forbid_reading(monkeypatch)
    again = load_documents(DataSource(source.path, weight=3.0, short="drop"), byte_tokenizer())  # these do not change the tokens
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.starts, again.starts)
    assert len(list((cache / "tokens").iterdir())) == 1  # no scratch folder is left


def another_pre_tokenizer(tokenizer):
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("what", ["file", "budget", "rules"])
def test_the_cache_is_left_when_what_made_it_changes(what, tmp_path, cache, monkeypatch):
    path = write(tmp_path / "in", "jsonl")
    tokenizer = byte_tokenizer()
    load_documents(DataSource(str(path)), tokenizer)
    forbid_reading(monkeypatch)
    if what == "file":
        path.write_text('{"text": "other"}\n')
    if what == "rules":  # the same vocabulary, another way to split
        another_pre_tokenizer(tokenizer)
    with pytest.raises(AssertionError, match="read again"):
        load_documents(DataSource(str(path), tokens=7 if what == "budget" else None), tokenizer)


def test_a_full_disk_leaves_no_half_cache(tmp_path, cache, monkeypatch):
    source = DataSource(str(write(tmp_path / "in", "jsonl")))

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space"):
            load_documents(source, byte_tokenizer())
    assert list((cache / "tokens").iterdir()) == []
    assert len(load_documents(source, byte_tokenizer())) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("nobody/nothing", None, "neither a file here nor a dataset on the hub"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "latin.jsonl is not UTF-8 text"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b'{"text": ""}\n', "holds no text"),
        ("bad.jsonl", b"{oops\n", "cannot be read"),
        ("bad.parquet", b"nope", "cannot be read"),
        ("col.jsonl", b'{"body": "x", "id": 1}\n', "no column 'text'; it has: body, id"),
        ("num.jsonl", b'{"text": 3}\n', "column 'text' holds int, not text"),
        ("t.csv", b"a,b", "expected .txt, .jsonl, .parquet"),
        ("none.npz", None, "does not exist"),
        ("bad.npz", b"nope", "must hold 1-D integer arrays"),
        ("empty.npz", b"", "must hold 1-D integer arrays"),
        ("float.npz", [0.5, 1.0], "must hold 1-D integer arrays"),
        ("square.npz", [[1, 2]], "must hold 1-D integer arrays"),
        ("pickle.npz", np.array([{}]), "must hold 1-D integer arrays"),
        ("negative.npz", [3, -1], "negative token ids"),
        ("nothing.npz", np.zeros(0, np.int64), "holds no tokens"),
    ],
)
def test_bad_input_is_one_line(name, content, message, tmp_path, cache):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_documents(DataSource(name if name == "nobody/nothing" else str(path)), byte_tokenizer())
    assert "\n" not in str(caught.value)


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    write(tmp_path / "in", "folder")
    write(tmp_path / "in", "jsonl")
    with pytest.raises(ValueError, match="one kind in a folder"):
        next(read_texts(DataSource(str(tmp_path / "in"))))


# --- coverage


@pytest.mark.parametrize("name", ["pose", "plain"])
def test_coverage_equals_counting_all_pairs(name):
    window, target, draws = 12, 60, 30
    sampler = method("pose", target=target, chunks=3) if name == "pose" else method("plain")
    found = coverage(sampler, window, target, draws, seed=1)
    seen, far, pairs = np.zeros(target), 0, 0
    for i in range(draws):
        _, p = sampler.positions(window, target, np.random.default_rng([1, i]))
        distances = [int(p[a] - p[b]) for a in range(window) for b in range(a + 1)]
        seen[sorted(set(distances))] += 1
        far += sum(d >= window for d in distances)
        pairs += len(distances)
    assert np.allclose(found["probability"], seen / draws, atol=1e-12)
    assert found["never"] == pytest.approx((seen == 0).mean())
    assert found["far_pairs"] == pytest.approx(far / pairs)
    assert found["last_window"] == pytest.approx((seen / draws)[-window // 2 :].mean())
    assert len(found["bins"]) == 16
