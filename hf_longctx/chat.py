"""Conversations to token ids, and which of these are answers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MARKER = re.compile(r"\{%[-+]?\s*generation\b")
_REMEDY = "set loss_on: all, or mark the answers in the template with {% generation %} ... {% endgeneration %}"

Messages = Sequence[Mapping[str, Any]]


def encode_chat(tokenizer: Any, messages: Messages, answers: bool) -> tuple[list[int], list[bool]]:
    """A conversation as the tokenizer's chat template renders it, special tokens and all, and nothing added to it.

    Args:
        tokenizer: with a chat template.
        messages: each with `role`, `content` and what else the template reads.
        answers: mark the answers alone: what the template has between its {% generation %} markers, or without these what it
            appends for each `assistant` message to the messages before it and their generation prompt, end of turn included.

    Returns:
        Token ids, and for each whether it is to be predicted.

    Raises:
        ValueError: no chat template; one that refuses these messages, or whose text of the first messages is no beginning of the
            text of all, so that answers cannot be found.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template to render conversations with; take a chat model's")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]  # Parquet fills absent keys
    try:
        if not answers:
            ids = _encode(tokenizer, messages)["input_ids"]
            return ids, [True] * len(ids)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not tell which token stands for which text, so answers cannot be found; set loss_on: all")
        if _MARKER.search(tokenizer.get_chat_template()):
            found = _encode(tokenizer, messages, return_assistant_tokens_mask=True)
            return found["input_ids"], [bool(flag) for flag in found["assistant_masks"]]
        return _compare_prefixes(tokenizer, messages)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a conversation: {error}") from None


def around_question(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and behind the first message of a user, so that the answer follows. Raises ValueError as `encode_chat`."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template to ask within; leave out chat, or take a chat model's")
    question = "QUESTION"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a question: {error}") from None
    before, _, behind = text.rpartition(question)
    return before, behind


def _encode(tokenizer: Any, messages: Messages, **kwargs: Any) -> Any:
    return tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs={"verbose": False}, **kwargs)


def _compare_prefixes(tokenizer: Any, messages: Messages) -> tuple[list[int], list[bool]]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = list(_answers(tokenizer, messages, text))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found["input_ids"], [any(first < end and begin < last for begin, end in spans) for first, last in found["offset_mapping"]]


def _answers(tokenizer: Any, messages: Messages, text: str) -> Iterator[tuple[int, int]]:
    """Where each answer begins and ends in `text`. A message that opens the conversation answers nothing."""
    for i in (i for i, message in enumerate(messages) if i and message["role"] == "assistant"):
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(f"the chat template renders the first {i + 1} messages otherwise than as the beginning of all {len(messages)}: {_REMEDY}")
        yield len(before), len(after)
