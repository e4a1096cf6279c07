"""Dialogues as token ids, with the tokens that a model is to learn: the replies, each with the token that ends it.

What comes before a reply is encoded as it is for generation: a model is trained on the prompts that it will be given.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.sources.dialogues import Chat, Completion, Dialogue, Message, is_learned
from jaxlm.data.sources.jsonl import RowError
from jaxlm.data.tokenizers.tokenizer import Tokenizer

Spans = list[tuple[int, int]]  # of characters


class DialogueEncoder:
    """``ids [N]`` of a dialogue, up to its last token to be learned, and ``learned [N]``, bool."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._specials = re.compile("|".join(map(re.escape, tokenizer.vocabulary.special_tokens)) or r"(?!)")

    @functools.cached_property
    def _marks(self) -> bool:
        """Whether the chat template says itself what the model writes, in {% generation %} blocks."""
        return re.search(r"{%-?\s*generation\b", self._tokenizer.chat_template.source) is not None

    def __call__(self, dialogue: Dialogue) -> tuple[np.ndarray, np.ndarray]:
        """RowError where the dialogue is no good; UserError where the tokenizer is not."""
        if isinstance(dialogue, Chat) and dialogue.plain and not self._tokenizer.chat_template:
            dialogue = dialogue.plain
        return self._completion(dialogue) if isinstance(dialogue, Completion) else self._chat(dialogue)

    def _completion(self, row: Completion) -> tuple[np.ndarray, np.ndarray]:
        if self._tokenizer.eos_id is None:
            raise UserError("the tokenizer has no eos token to end a completion with; use another")
        prompt = self._tokenizer.encode_prompt(row.prompt)
        # Encoded together, a word may begin with the space before it; where that changes the prompt it is left alone.
        whole = self._tokenizer.encode_prompt(row.prompt + row.reply)
        same = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        reply = whole[len(prompt) :] if same else self._tokenizer.encode(row.reply)
        ids = np.array([*prompt, *reply, self._tokenizer.eos_id], np.int32)
        return ids, np.arange(len(ids)) >= len(prompt)

    def _chat(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        marks = self._marks  # UserError where there is no template, which is no fault of the row
        found = self._specials.search(json.dumps(chat.messages, ensure_ascii=False))
        if found:
            raise RowError(f"a message that spells the special token {found[0]}", "take it out")
        try:
            text, spans = self._marked(chat) if marks else self._compared(chat)
        except UserError as error:
            raise RowError(str(error)) from None
        ids, learned = self._tokenizer.encode_spans(text, spans)
        if not learned.any():
            raise RowError("replies that the chat template leaves out")
        end = int(np.flatnonzero(learned)[-1]) + 1
        return ids[:end], learned[:end]

    def _marked(self, chat: Chat) -> tuple[str, Spans]:
        messages = [_plain(message) for message in chat.messages]
        text, spans = self._tokenizer.chat_template.render_with_spans(messages, tools=chat.tools)
        replies = [message for message in chat.messages if message["role"] == "assistant"]
        if len(spans) != len(replies):
            raise RowError(f"{len(replies)} replies of which the chat template marks {len(spans)}")
        return text, [span for span, message in zip(spans, replies, strict=True) if is_learned(message)]

    def _compared(self, chat: Chat) -> tuple[str, Spans]:
        """A reply begins where the prompt made of all before it ends, and ends with the token that ends the turn."""
        messages = [_plain(message) for message in chat.messages]
        text, spans = self._write(messages, chat), []
        for i, message in enumerate(chat.messages):
            if not is_learned(message):
                continue
            before = self._write(messages[:i], chat, add_generation_prompt=True)
            through = self._write(messages[: i + 1], chat).rstrip()
            if not text.startswith(before) or not through.startswith(before):
                raise RowError(
                    "an earlier turn that the chat template writes otherwise once more follow",
                    "mark replies in the template with {% generation %}",
                )
            end = len(through)
            if not text.startswith(through):  # a template may take thoughts out of all but the last reply
                content = str(message.get("content") or "").strip()
                at = through.rfind(content)
                turn = through[at:] if content and at >= 0 else None
                at = text.find(turn, len(before)) if turn else -1
                if at < 0:
                    raise RowError("a reply that the chat template writes otherwise once more follow")
                end = at + len(turn)
            spans.append((len(before), end))
        return text, spans

    def _write(self, messages: list[Message], chat: Chat, add_generation_prompt: bool = False) -> str:
        return self._tokenizer.chat_template.render(
            messages, tools=chat.tools, add_generation_prompt=add_generation_prompt
        )


def _plain(message: Message) -> Mapping:
    return {name: value for name, value in message.items() if name != "weight"}
