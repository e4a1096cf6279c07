"""Encodes dialogues as token ids, and marks the tokens that a model is trained on: the replies, each with the token
that ends it.

What precedes a reply is encoded exactly as for generation, so that a model is trained on the prompts that it will get.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.sources.dialogues import Chat, Completion, Dialogue, Message, is_trained_on
from jaxlm.data.sources.jsonl import RowError
from jaxlm.data.tokenizers.tokenizer import Tokenizer

Spans = list[tuple[int, int]]  # of characters


class DialogueEncoder:
    """Calling it with a dialogue gives its ids [N] int32, up to the last token that the model is trained on, and the
    loss mask [N] bool."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._specials = re.compile("|".join(map(re.escape, tokenizer.vocabulary.special_tokens)) or r"(?!)")

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
        if isinstance(dialogue, Chat) and dialogue.without_template and not self._tokenizer.chat_template:
            dialogue = dialogue.without_template
        return self._completion(dialogue) if isinstance(dialogue, Completion) else self._chat(dialogue)

    def _completion(self, row: Completion) -> tuple[np.ndarray, np.ndarray]:
        if self._tokenizer.eos_id is None:
            raise UserError("the tokenizer has no eos token to end a completion with; use another")
        prompt = self._tokenizer.encode_prompt(row.prompt)
        # Prompt and reply are encoded together, so that a word has the space before it; and apart where that would
        # change the tokens of the prompt.
        whole = self._tokenizer.encode_prompt(row.prompt + row.reply)
        same = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        reply = whole[len(prompt) :] if same else self._tokenizer.encode(row.reply)
        ids = np.array([*prompt, *reply, self._tokenizer.eos_id], np.int32)
        return ids, np.arange(len(ids)) >= len(prompt)

    def _chat(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        marks = self._marks_replies  # without a template a UserError: that is not the fault of the row
        found = self._specials.search(json.dumps(chat.messages, ensure_ascii=False))
        if found:
            raise RowError(f"a message that spells the special token {found[0]}", "take it out")
        try:
            text, spans = self._marked_spans(chat) if marks else self._compared_spans(chat)
        except UserError as error:
            raise RowError(str(error)) from None
        ids, loss_mask = self._tokenizer.encode_spans(text, spans)
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
