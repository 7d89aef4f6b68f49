"""Conversations: what the chat template says is what is read, and the answers are what is trained."""

import json
import re
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_longctx import data, planning, training
from hf_longctx.chat import encode_chat
from hf_longctx.data import IGNORE, Documents, Windows, collate, load_documents
from hf_longctx.method import method
from hf_longctx.recipe import DataSource
from tests.conftest import byte_tokenizer, tiny_model

LOOP = "{% for m in messages %}"
PLAIN = LOOP + "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
MARKED = (
    LOOP + "<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CHATML = (  # SmolLM2's: no markers, and a system message of its own
    LOOP + "{% if loop.first and m.role != 'system' %}{{ '<s>system\nBe kind</s>\n' }}{% endif %}{{ '<s>' + m.role + '\n' + m.content + '</s>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
LLAMA_2 = "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
FORGETS = LOOP + "{{ m.role }}: {% if m.role == 'user' or loop.last %}{{ m.content }}{% else %}(cut){% endif %}\n{% endfor %}"
REFUSES = LOOP + "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m.content }}{% endfor %}"
CHAT = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Héllo."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long!"},
]
POSE = method("pose", target=256)


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def spoken(tokenizer, ids, flags) -> list[str]:
    """The runs of tokens that are to be predicted, as text."""
    runs = [[i for i, _ in run] for flag, run in groupby(zip(ids, flags, strict=True), key=lambda pair: bool(pair[1])) if flag]
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.floor
@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (MARKED, ["Héllo.</s>", "So long!</s>"]),
        (PLAIN, ["Héllo.</s>\n", "So long!</s>\n"]),
        (CHATML, ["Héllo.</s>\n", "So long!</s>\n"]),
        (LLAMA_2, [" Héllo. </s>", " So long! </s>"]),
    ],
)
def test_answers_and_their_ends_are_what_is_trained(template, wanted):
    tokenizer = tokenizer_with(template)
    ids, flags = encode_chat(tokenizer, CHAT, answers=True)
    assert spoken(tokenizer, ids, flags) == wanted
    assert ids == tokenizer.apply_chat_template(CHAT)["input_ids"]  # as in use: no second <s>, nothing at the end
    same, every = encode_chat(tokenizer, CHAT, answers=False)
    assert same == ids
    assert all(every)


def test_a_message_that_opens_the_conversation_answers_nothing():
    tokenizer = tokenizer_with(PLAIN)
    assert spoken(tokenizer, *encode_chat(tokenizer, CHAT[1:], answers=True)) == ["So long!</s>\n"]


def test_absent_keys_stay_absent():
    """Parquet gives every message every key."""
    tokenizer = tokenizer_with(LOOP + "{{ m.content }}{% if m.tools is defined %}{{ m.tools }}{% endif %}{% endfor %}")
    ids, _ = encode_chat(tokenizer, [message | {"tools": None} for message in CHAT], answers=False)
    assert tokenizer.decode(ids) == "Hello?Héllo.ByeSo long!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (FORGETS, "renders the first 2 messages otherwise than as the beginning of all 4: set loss_on: all"),
        (REFUSES, "refuses a conversation: no system here"),
    ],
)
def test_templates_that_cannot_work_are_named(template, message):
    chat = [{"role": "system", "content": "x"}, *CHAT] if template == REFUSES else CHAT
    with pytest.raises(ValueError, match=message) as caught:
        encode_chat(tokenizer_with(template), chat, answers=True)
    assert "\n" not in str(caught.value)
    if template == FORGETS:
        assert all(encode_chat(tokenizer_with(template), chat, answers=False)[1])


# --- reading


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, chats):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    else:
        pq.write_table(pa.table({"messages": chats}), path)
    return path


def source(path, **kwargs):
    return DataSource(str(path), column="messages", **kwargs)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_are_read_and_cached_with_their_labels(suffix, tmp_path, cache, monkeypatch):
    tokenizer = tokenizer_with(MARKED)
    file = write(tmp_path / f"c{suffix}", [CHAT, CHAT[:2]])
    found = load_documents(source(file), tokenizer)
    monkeypatch.setattr(data, "read_texts", None)
    again = load_documents(source(file), tokenizer)
    for documents in (found, again):
        assert [documents[i].tolist() for i in (0, 1)] == [encode_chat(tokenizer, chat, True)[0] for chat in (CHAT, CHAT[:2])]
        assert documents.trained.tolist() == [flag for chat in (CHAT, CHAT[:2]) for flag in encode_chat(tokenizer, chat, True)[1]]


@pytest.mark.parametrize("change", ["template", "loss_on", "bos"])
def test_the_cache_is_left_when_the_template_or_the_loss_changes(change, tmp_path, cache, monkeypatch):
    file, tokenizer = write(tmp_path / "c.jsonl", [CHAT]), tokenizer_with(MARKED)
    load_documents(source(file), tokenizer)
    if change == "bos":
        tokenizer.bos_token = "</s>"
    monkeypatch.setattr(data, "read_texts", lambda source: iter(()))
    with pytest.raises(ValueError, match="holds no text"):
        load_documents(source(file, loss_on="all" if change == "loss_on" else None), tokenizer_with(PLAIN) if change == "template" else tokenizer)


def test_a_token_budget_cuts_labels_with_the_tokens(tmp_path, cache):
    found = load_documents(source(write(tmp_path / "c.jsonl", [CHAT, CHAT]), tokens=100), tokenizer_with(MARKED))
    assert len(found.ids) == len(found.trained) == 100


@pytest.mark.parametrize(
    ("rows", "kwargs", "template", "message"),
    [
        ([{"messages": CHAT}], {}, None, "c.jsonl: .*has no chat template"),
        ([{"messages": CHAT}], {}, FORGETS, "c.jsonl: the chat template renders"),
        ([{"messages": CHAT[:1]}], {}, MARKED, "c.jsonl holds no answer.*set loss_on: all"),
        ([{"messages": [{"from": "human", "value": "x"}]}], {}, MARKED, "column 'messages' holds list, not text or lists of messages with role"),
        ([{"messages": "text"}], {"loss_on": "answers"}, MARKED, "loss_on: answers needs conversations, but column 'messages' holds text"),
    ],
)
def test_bad_conversations_are_one_line(rows, kwargs, template, message, tmp_path, cache):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message) as caught:
        load_documents(source(tmp_path / "c.jsonl", **kwargs), tokenizer_with(template))
    assert "\n" not in str(caught.value)


def test_token_ids_have_no_answers(tmp_path):
    np.savez(tmp_path / "t.npz", [3, 4, 5])
    with pytest.raises(ValueError, match="loss_on: answers needs conversations"):
        load_documents(DataSource(str(tmp_path / "t.npz"), loss_on="answers"), byte_tokenizer())


# --- windows


def conversation(flags, first=0) -> np.ndarray:
    """Tokens that are their own numbers, and which of them are predicted."""
    return np.stack([np.arange(first, first + len(flags)), flags], axis=1).astype(np.uint16)


def flags(length, *answers) -> np.ndarray:
    made = np.zeros(length, bool)
    for start, stop in answers:
        made[start:stop] = True
    return made


def check_labels(row, trained):
    """Labels are the tokens to be predicted, but for the first of each text."""
    begins = np.diff(row["segments"], prepend=-2) != 0
    wanted = np.where(trained[row["input_ids"]] & ~begins & (row["segments"] >= 0), row["input_ids"], IGNORE)
    assert np.array_equal(row["labels"], wanted)


def test_labels_go_with_their_tokens_through_windows_and_packing():
    marks = [flags(n, *answers) for n, answers in ((100, [(30, 40), (90, 100)]), (7, [(3, 6)]), (5, [(0, 5)]), (9, []), (6, [(0, 1)]))]
    starts = np.cumsum([0, *map(len, marks)])
    documents = Documents.join([conversation(mark, start) for mark, start in zip(marks, starts[:-1], strict=True)])
    assert documents.last_labels.tolist() == [99, 5, 4, 0, 0]
    rows = Windows(documents, 16, POSE, [0])
    assert rows.full == 7  # the last one ends with the document
    assert sorted(d for pack in rows.packs for d in pack) == [1, 2]  # the others have nothing that could be predicted
    for i in range(3 * len(rows)):
        row = rows[i]
        check_labels(row, np.concatenate(marks))
        assert (row["labels"] != IGNORE).any()


def test_windows_behind_the_last_answer_are_left_out():
    rows = Windows(Documents.join([conversation(flags(100, (20, 33)))]), 16, POSE, [0])
    assert len(rows) == 2  # from token 32 on nothing is predicted that has something before it in its window
    assert len(Windows(Documents.join([conversation(flags(100, (20, 34)))]), 16, POSE, [0])) == 3


def test_one_answer_at_the_end_of_a_long_conversation_is_met_again_and_again():
    mark = flags(4000, (3950, 4000))
    rows = Windows(Documents.join([conversation(mark)]), 64, POSE, [0])
    met = [(rows[i]["labels"] != IGNORE).sum() for i in range(len(rows))]
    assert len(rows) == 63
    assert sum(n > 0 for n in met) > 60  # drawn once, a few would


def test_a_conversation_keeps_its_beginning():
    """A model whose tokenizer begins text with <s> may have a template that does not."""
    rows = Windows(Documents.join([conversation(flags(40, (0, 40)), 100), conversation(flags(9, (0, 9)), 200)]), 16, method("plain"), [0], first_token=1)
    firsts = {int(rows[i]["input_ids"][0]) for i in range(len(rows))}
    assert firsts == {100, 200, 1}


def test_windows_of_conversations_make_batches():
    rows = Windows(Documents.join([conversation(flags(40, (0, 40))), conversation(flags(9, (0, 9))), conversation(flags(5, (0, 5)))]), 16, POSE, [0])
    assert collate([rows[i] for i in range(len(rows))])["attention_mask"].shape == (4, 1, 16, 16)


# --- training


@pytest.fixture
def chat_recipe(recipe, tmp_path, cache):
    """The usual recipe, on conversations; the base has a chat template."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer_with(PLAIN).save_pretrained(tmp_path / "base")
    chats = [[{"role": "user", "content": f"{'What is it? ' * 9}{i}"}, {"role": "assistant", "content": f"{i}!"}] for i in range(8)]
    return recipe | {"model": {"name": str(tmp_path / "base")}, "data": {"path": str(write(tmp_path / "chats.jsonl", chats)), "column": "messages"}}


@pytest.mark.floor
def test_a_recipe_trains_on_answers_alone(chat_recipe, tmp_path):
    what = planning.plan(planning.as_recipe(chat_recipe))
    said = set()
    for i in range(len(what.dataset)):
        row = what.dataset[i]
        said.add(what.tokenizer.decode(row["labels"][row["labels"] != IGNORE]))
    assert all(any(text in f"{i}!</s>\n" for i in range(8)) for text in said)
    assert any(re.fullmatch(r"\d!</s>\n", text) for text in said)
    every = planning.plan(planning.as_recipe(chat_recipe | {"data": chat_recipe["data"] | {"loss_on": "all"}}))
    assert (every.dataset[0]["labels"] != IGNORE).sum() == 31
    assert training.finetune(chat_recipe, tmp_path / "out")


@pytest.mark.parametrize("loss", ["blocks", "model"])
def test_a_batch_without_an_answer_has_no_loss_and_not_nan(chat_recipe, loss, tmp_path):
    """Plain positions: no draw can bring the answer into an early window."""
    chat_recipe |= {"methods": [{"name": "yarn", "factor": 4}], "loss": loss}
    chat_recipe["train"] |= {"per_device_train_batch_size": 1, "max_steps": 16}
    out = training.finetune(chat_recipe, tmp_path / "out")
    history = json.loads((out / "checkpoint-16/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert all(np.isfinite(losses))
    assert 0 in losses
    assert max(losses) > 1
