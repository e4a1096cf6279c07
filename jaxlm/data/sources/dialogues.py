"""Rows of fine-tuning data: parses the usual formats into prompts and replies.

    chat        {"messages": [{"role": ..., "content": ...}, ...]}, with "tools" if there are any; the model is not
                trained on a message with "weight": 0. Also ShareGPT's {"conversations": [{"from": ..., "value": ...}]}
    instruct    {"prompt": ..., "completion": ...}, both texts or both messages; or Alpaca's {"instruction": ...,
                "input": ..., "output": ...}
    preference  {"prompt": ..., "chosen": ..., "rejected": ...}, texts or messages; without a prompt, the messages that
                both conversations begin with are the prompt

To add a format, write a function from the object of a line to a row, and enter it in ``data.sources.spec``. The token
cache knows the function by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.data.sources.jsonl import RowError

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text, and the reply that should follow it."""

    prompt: str
    reply: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which the chat template of the tokenizer renders. The model is trained on the replies of the
    assistant."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    without_template: Completion | None = None  # used in place of it if the tokenizer has no chat template


Dialogue = Completion | Chat

_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ALPACA = (  # the prompts of Stanford Alpaca, which models trained on its format expect
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


def chat_row(row: Mapping[str, Any]) -> Chat:
    """A row of ``chat:``. Raises RowError when it is in none of the formats."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif isinstance(row.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in row["conversations"]]
        unknown = [turn.get("from") for turn in turns if turn.get("from") not in _SHAREGPT]
        if unknown:
            raise RowError('an unknown "from" of a turn', f"write {', '.join(_SHAREGPT)}")
        messages = _messages(
            [{"role": _SHAREGPT[turn["from"]], "content": turn.get("value")} for turn in turns], "conversations"
        )
    else:
        raise RowError('no "messages"', 'write {"messages": [{"role": "user", "content": "..."}, ...]} on each line')
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError('"tools" is not a list of objects')
    return _with_reply(Chat(messages, tools or None))


def instruct_row(row: Mapping[str, Any]) -> Dialogue:
    """A row of ``instruct:``. Raises RowError when it is in none of the formats."""
    if "instruction" in row:
        instruction, given, output = (_text(row, name) for name in ("instruction", "input", "output"))
        if not output.strip():
            raise RowError('an empty "output"')
        prompt = _ALPACA.format(
            paired=_PAIRED * bool(given), instruction=instruction, input=f"### Input:\n{given}\n\n" * bool(given)
        )
        asked = "\n\n".join(filter(None, (instruction, given)))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return Chat(messages, without_template=Completion(prompt, output))
    if "prompt" not in row or "completion" not in row:
        raise RowError(
            'neither "prompt" and "completion" nor "instruction" and "output"',
            'write {"prompt": "...", "completion": "..."} on each line',
        )
    return _joined(row["prompt"], row["completion"], "completion")


def preference_row(row: Mapping[str, Any]) -> tuple[Dialogue, Dialogue]:
    """The dialogue with the preferred reply, and the one with the rejected reply. Raises RowError when the row has
    another format."""
    if "chosen" not in row or "rejected" not in row:
        raise RowError(
            'no "chosen" and "rejected"', 'write {"prompt": "...", "chosen": "...", "rejected": "..."} on each line'
        )
    if row["chosen"] == row["rejected"]:
        raise RowError('"chosen" and "rejected" are the same')
    if "prompt" in row and not _includes_prompt(row["chosen"]):
        return tuple(_joined(row["prompt"], row[name], name) for name in ("chosen", "rejected"))
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise RowError('no "prompt"', "texts need one")
    both = [_messages(row[name], name) for name in ("chosen", "rejected")]
    shared = 0
    while shared < min(map(len, both)) and both[0][shared] == both[1][shared]:
        shared += 1
    return tuple(
        _with_reply(Chat([*map(_without_loss, messages[:shared]), *messages[shared:]])) for messages in both
    )


def _includes_prompt(messages: Any) -> bool:
    """Whether messages are a whole conversation, not only a reply."""
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and (
        messages[0].get("role") in ("system", "user")
    )


def _joined(prompt: Any, reply: Any, name: str) -> Dialogue:
    """A prompt and a reply, both texts or messages; the model is trained on the messages of the reply only."""
    if isinstance(prompt, str) and isinstance(reply, str):
        if not reply:
            raise RowError(f'an empty "{name}"')
        return Completion(prompt, reply)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
    if isinstance(reply, str):
        reply = {"role": "assistant", "content": reply}
    after = _messages([reply] if isinstance(reply, dict) else reply, name)
    return _with_reply(Chat([*map(_without_loss, before), *after]))


def _without_loss(message: Message) -> Message:
    return {**message, "weight": 0}


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f'"{name}" is not a list of messages', 'write [{"role": "user", "content": "..."}, ...]')
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError('a message without a "role"', 'write {"role": "user", "content": "..."}')
        if message.get("content") is None and not message.get("tool_calls"):
            raise RowError('a message without "content"', 'write {"role": "user", "content": "..."}')
        if message.get("weight", 1) not in (0, 1):
            raise RowError('a "weight" that is neither 0 nor 1')
    return value


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "" if name == "input" else None)
    if not isinstance(value, str):
        raise RowError(f'no string under "{name}"')
    return value


def is_trained_on(message: Message) -> bool:
    """Whether the model is trained to write a message."""
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _with_reply(chat: Chat) -> Chat:
    if not any(map(is_trained_on, chat.messages)):
        raise RowError('no reply of the "assistant" to train on')
    return chat
