"""Encodes dialogues as token ids, and marks the tokens that a model is trained on: the replies, each with the token
that ends it.

What precedes a reply is encoded exactly as for generation, so that a model is trained on the prompts that it will get.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.sources.dialogues import Chat, Completion, Dialogue, Message, is_trained_on
from jaxlm.data.sources.jsonl import RowError
from jaxlm.data.tokenizers.tokenizer import Tokenizer

Spans = list[tuple[int, int]]  # of characters


class DialogueEncoder:
    """Calling it with a dialogue gives its ids [N] int32, up to the last token that the model is trained on, and the
    loss mask [N] bool."""

    def __init__(self, tokenizer: Tokenizer, parse_special: bool = False):
        """``parse_special``: prompts and completions that are texts have the special tokens that they spell."""
        self._tokenizer, self._parse_special = tokenizer, parse_special

    @functools.cached_property
    def _marks_replies(self) -> bool:
        """Whether the chat template marks replies itself, with {% generation %} blocks."""
        return re.search(r"{%-?\s*generation\b", self._tokenizer.chat_template.source) is not None

    def __call__(self, dialogue: Dialogue) -> tuple[np.ndarray, np.ndarray]:
        """
        Raises:
            RowError: when the dialogue cannot be used.
            UserError: when the tokenizer has no chat template, or no eos token, and the dialogue needs one.
        """
        if isinstance(dialogue, Completion):
            return self._completion(dialogue, self._parse_special)
        if dialogue.without_template and not self._tokenizer.chat_template:
            return self._completion(dialogue.without_template, parse_special=False)  # it contains messages
        return self._chat(dialogue)

    def _completion(self, row: Completion, parse_special: bool) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = self._tokenizer
        prompt = tokenizer.encode_prompt(row.prompt, parse_special)
        # Prompt and reply are encoded together, so that a word has the space before it; and apart where that would
        # change the tokens of the prompt.
        whole = tokenizer.encode_prompt(row.prompt + row.reply, parse_special)
        same = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        reply = whole[len(prompt) :] if same else tokenizer.encode(row.reply, parse_special)
        if not (parse_special and reply and reply[-1] in tokenizer.backend.special_tokens.values()):
            if tokenizer.eos_id is None:
                raise UserError("the tokenizer has no eos token to end a completion with; use another")
            reply = [*reply, tokenizer.eos_id]
        ids = np.array([*prompt, *reply], np.int32)
        return ids, np.arange(len(ids)) >= len(prompt)

    def _chat(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        marks = self._marks_replies  # without a template a UserError: that is not the fault of the row
        specials = self._tokenizer.special_tokens
        for message in filter(is_trained_on, chat.messages):
            if found := specials.first(json.dumps(message, ensure_ascii=False)):
                raise RowError(f"a reply that spells the special token {found}", "take it out")
        try:
            chat = replace(chat, messages=specials.protect(chat.messages), tools=specials.protect(chat.tools))
            text, spans = self._marked_spans(chat) if marks else self._compared_spans(chat)
        except UserError as error:
            raise RowError(str(error)) from None
        ids, loss_mask = self._tokenizer.encode_spans(specials.release(text, spans))
        if not loss_mask.any():
            raise RowError("replies that the chat template leaves out")
        end = int(np.flatnonzero(loss_mask)[-1]) + 1
        return ids[:end], loss_mask[:end]

    def _marked_spans(self, chat: Chat) -> tuple[str, Spans]:
        messages = [_without_weight(message) for message in chat.messages]
        text, spans = self._tokenizer.chat_template.render_with_spans(messages, tools=chat.tools)
        replies = [message for message in chat.messages if message["role"] == "assistant"]
        if len(spans) != len(replies):
            raise RowError(f"{len(replies)} replies, and the chat template marks {len(spans)}")
        return text, [span for span, message in zip(spans, replies, strict=True) if is_trained_on(message)]

    def _compared_spans(self, chat: Chat) -> tuple[str, Spans]:
        """A reply begins after the prompt of all messages before it, and ends with the token that ends its turn."""
        messages = [_without_weight(message) for message in chat.messages]
        text, spans = self._render(messages, chat), []
        for i, message in enumerate(chat.messages):
            if not is_trained_on(message):
                continue
            before = self._render(messages[:i], chat, add_generation_prompt=True)
            through = self._render(messages[: i + 1], chat).rstrip()
            if not text.startswith(before) or not through.startswith(before):
                raise RowError(
                    "an earlier turn that the chat template renders differently when more turns follow",
                    "mark replies in the template with {% generation %}",
                )
            end = len(through)
            if not text.startswith(through):  # a template may remove the reasoning from all but the last reply
                content = str(message.get("content") or "").strip()
                at = through.rfind(content)
                turn = through[at:] if content and at >= 0 else None
                at = text.find(turn, len(before)) if turn else -1
                if at < 0:
                    raise RowError("a reply that the chat template renders differently when more turns follow")
                end = at + len(turn)
            spans.append((len(before), end))
        return text, spans

    def _render(self, messages: list[Message], chat: Chat, add_generation_prompt: bool = False) -> str:
        return self._tokenizer.chat_template.render(
            messages, tools=chat.tools, add_generation_prompt=add_generation_prompt
        )


def _without_weight(message: Message) -> Mapping:
    return {name: value for name, value in message.items() if name != "weight"}
