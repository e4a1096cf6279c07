"""The chat template of a tokenizer: how a conversation becomes the prompt that the model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.backends import role_tokens
from jaxlm.data.tokenizers.templates.sandbox import generation_spans, render_template

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """The ``chat_template`` of tokenizer_config.json, which may be one template or several with names. False in a
    condition where the tokenizer has none."""

    def __init__(self, config: Mapping[str, Any]):
        """``config`` is the content of tokenizer_config.json."""
        self._config = config

    def __bool__(self) -> bool:
        return bool(self._config.get("chat_template"))

    @property
    def source(self) -> str:
        """The text of the template that is used where no tools are given.

        Raises:
            UserError: when there is no template, or none of several is the default.
        """
        return self._choose(with_tools=False)

    @property
    def by_name(self) -> dict[str, str]:
        """All templates; one alone is named "default".

        Raises:
            UserError: when ``chat_template`` is a list of something else.
        """
        templates = self._config.get("chat_template")
        if isinstance(templates, list):
            try:
                return {entry["name"]: entry["template"] for entry in templates}
            except (TypeError, KeyError):
                raise UserError(
                    "chat_template in tokenizer_config.json is not a list of names and templates"
                ) from None
        if isinstance(templates, dict):
            return dict(templates)
        return {"default": templates} if isinstance(templates, str) and templates else {}

    def render(
        self, messages: Messages, *, add_generation_prompt: bool = True, tools: Tools | None = None, **variables: Any
    ) -> str:
        """The prompt of a conversation, as text. ``Tokenizer.encode_chat`` gives its ids, in which no message has
        special tokens.

        Args:
            messages: each has a "role" and usually a "content".
            add_generation_prompt: whether the prompt ends where the model's answer begins.
            tools: JSON schemas of functions that the model may call.
            **variables: other variables that the template reads.

        Raises:
            UserError: when there is no template, or when it fails, refuses the conversation, or tries something that
                the sandbox forbids.
        """
        return self._render(messages, tools, {**variables, "add_generation_prompt": add_generation_prompt})

    def render_with_spans(self, messages: Messages, *, tools: Tools | None = None) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation as ``render`` writes it, and the spans (first character, end) of what the template marks
        as written by the model, in ``{% generation %}`` blocks.

        Raises:
            UserError: as ``render``, and when the blocks are nested.
        """
        return generation_spans(self._render(messages, tools, {"add_generation_prompt": False}, mark_generation=True))

    def _render(
        self, messages: Messages, tools: Tools | None, variables: Mapping[str, Any], mark_generation: bool = False
    ) -> str:
        template = self._choose(with_tools=tools is not None)
        if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
            raise UserError('a chat is a list of messages such as {"role": "user", "content": "Hello"}')
        tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in role_tokens(self._config).items()
        }
        variables = {**tokens, "documents": None, **variables, "messages": messages, "tools": tools}
        return render_template(template, variables, mark_generation)

    def _choose(self, with_tools: bool) -> str:
        templates = self.by_name
        found = (with_tools and templates.get("tool_use")) or templates.get("default")
        if templates and not found:
            names = ", ".join(templates)
            raise UserError(f"the tokenizer has chat templates named {names} and no default; add one")
        if not found:
            raise UserError("the tokenizer has no chat template; put a chat_template.jinja beside it or use prompts")
        return found
