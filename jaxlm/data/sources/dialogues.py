"""Rows of fine-tuning data, in the forms that are about, as what a model is to say and what comes before.

    chat        {"messages": [{"role": ..., "content": ...}, ...]}, with "tools" where there are some; a message with
                "weight": 0 is not learned. ShareGPT's {"conversations": [{"from": ..., "value": ...}, ...]} too
    instruct    {"prompt": ..., "completion": ...}, both texts or both messages; or Alpaca's {"instruction": ...,
                "input": ..., "output": ...}
    preference  {"prompt": ..., "chosen": ..., "rejected": ...}, texts or messages; without a prompt, what the two
                conversations begin with is the prompt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.data.sources.jsonl import RowError

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text, and what is to follow it."""

    prompt: str
    reply: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which the chat template of the tokenizer writes; replies of the assistant are to be learned."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    plain: Completion | None = None  # what it is where the tokenizer has no template


Dialogue = Completion | Chat

_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ALPACA = (  # the prompts of Stanford Alpaca, which models of its kind expect
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


def chat_row(row: Mapping[str, Any]) -> Chat:
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif isinstance(row.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in row["conversations"]]
        unknown = [turn.get("from") for turn in turns if turn.get("from") not in _SHAREGPT]
        if unknown:
            raise RowError('a turn "from" nobody known', f"write {', '.join(_SHAREGPT)}")
        messages = _messages(
            [{"role": _SHAREGPT[turn["from"]], "content": turn.get("value")} for turn in turns], "conversations"
        )
    else:
        raise RowError('no "messages"', 'write {"messages": [{"role": "user", "content": "..."}, ...]} on each line')
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError('"tools" is not a list of objects')
    return _learnable(Chat(messages, tools or None))


def instruct_row(row: Mapping[str, Any]) -> Dialogue:
    if "instruction" in row:
        instruction, given, output = (_text(row, name) for name in ("instruction", "input", "output"))
        if not output.strip():
            raise RowError('an empty "output"')
        prompt = _ALPACA.format(
            paired=_PAIRED * bool(given), instruction=instruction, input=f"### Input:\n{given}\n\n" * bool(given)
        )
        asked = "\n\n".join(filter(None, (instruction, given)))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return Chat(messages, plain=Completion(prompt, output))
    if "prompt" not in row or "completion" not in row:
        raise RowError(
            'neither "prompt" and "completion" nor "instruction" and "output"',
            'write {"prompt": "...", "completion": "..."} on each line',
        )
    return _joined(row["prompt"], row["completion"], "completion")


def preference_row(row: Mapping[str, Any]) -> tuple[Dialogue, Dialogue]:
    """What is preferred, and what it is preferred to, after the same prompt."""
    if "chosen" not in row or "rejected" not in row:
        raise RowError(
            'no "chosen" and "rejected"', 'write {"prompt": "...", "chosen": "...", "rejected": "..."} on each line'
        )
    if row["chosen"] == row["rejected"]:
        raise RowError('"chosen" and "rejected" are the same')
    if "prompt" in row and not _is_whole(row["chosen"]):
        return tuple(_joined(row["prompt"], row[name], name) for name in ("chosen", "rejected"))
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise RowError('no "prompt"', "texts need one")
    both = [_messages(row[name], name) for name in ("chosen", "rejected")]
    same = 0
    while same < min(map(len, both)) and both[0][same] == both[1][same]:
        same += 1
    return tuple(_learnable(Chat([*map(_muted, messages[:same]), *messages[same:]])) for messages in both)


def _is_whole(messages: Any) -> bool:
    """Whether some messages are a conversation with its prompt, not only a reply to one."""
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and (
        messages[0].get("role") in ("system", "user")
    )


def _joined(prompt: Any, reply: Any, name: str) -> Dialogue:
    """Texts, or messages of which only those of the reply are learned."""
    if isinstance(prompt, str) and isinstance(reply, str):
        if not reply:
            raise RowError(f'an empty "{name}"')
        return Completion(prompt, reply)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
    if isinstance(reply, str):
        reply = {"role": "assistant", "content": reply}
    after = _messages([reply] if isinstance(reply, dict) else reply, name)
    return _learnable(Chat([*map(_muted, before), *after]))


def _muted(message: Message) -> Message:
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


def is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _learnable(chat: Chat) -> Chat:
    if not any(map(is_learned, chat.messages)):
        raise RowError('no reply of the "assistant" to learn')
    return chat
