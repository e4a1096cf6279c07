"""Chat templates: equal to transformers' ``apply_chat_template``, and unable to do anything else."""

from __future__ import annotations

import json

import jinja2
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.templates.sandbox import render_template
from jaxlm.data.tokenizers.tokenizer import Tokenizer

LLAMA3 = """{{- bos_token }}
{%- set system = "Be brief." %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|head|>system<|end|>\\n\\nToday: " + strftime_now("%Y") + "\\n" + system + "<|eot|>" }}
{%- if tools is not none and tools %}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {{- "<|head|>" + message.role + "<|end|>\\n\\n" + message.content | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|head|>assistant<|end|>\\n\\n" }}{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must take turns, user first') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}"""
CHATML = """{% for message in messages %}
    {%- if loop.last and message.role == "ignored" %}{% break %}{% endif -%}
    {{ "<|im_start|>" ~ message.role ~ "\\n" }}
    {%- if message.role == "assistant" -%}
        {% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
    {%- else -%}
        {{ message.content }}<|im_end|>
    {%- endif %}
    {{- "\\n" }}
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% if thinking is defined and not thinking %}<think></think>{% endif %}{% endif %}"""
GEMMA = """{{ bos_token }}{% set ns = namespace(first=true, count=0) %}
{% for message in messages %}
{% set ns.count = ns.count + 1 %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{% if ns.first %}{% set ns.first = false %}{% else %}{{ '\\n' }}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + (message['content'] | trim) + '<end_of_turn>' }}{% endfor %}
{% if add_generation_prompt %}{{ '\\n<start_of_turn>model\\n' }}{% endif %}{{ ns.count }}{{ dict(a=1) }}"""
TALK = [
    {"role": "user", "content": " Is <b>1 & 2</b> more than “3”? \n"},
    {"role": "assistant", "content": "Nein, weil 3 < 4 😀."},
    {"role": "user", "content": "Why?"},
]
SYSTEM = [{"role": "system", "content": " You are a bot.\n"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number", "enum": [1, 2.5]}}}}]
TOKENIZER = Tokenizer.train(["what is said"], vocab_size=270)


def tokenizer(template, directory, **config) -> Tokenizer:
    TOKENIZER.save(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template} | config))
    return Tokenizer.load(directory)


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, CHATML, GEMMA], ids=["llama3", "mistral", "chatml", "gemma"])
def test_templates_write_what_they_write_in_transformers(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer(template, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    cases = [(TALK, {}), (TALK[:1], {}), (TALK[:2], {"add_generation_prompt": False})]
    if template is not MISTRAL:
        cases += [(SYSTEM + TALK, {}), (SYSTEM + TALK, {"tools": TOOLS}), (TALK, {"thinking": False})]
    for messages, options in cases:
        options = {"add_generation_prompt": True} | options
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.chat_template.render(messages, **options) == expected
        ids = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert ours.encode_chat(messages, **options) == ours.encode_prompt(expected) == ids


def test_templates_by_hand(tmp_path):
    def render(template, messages):
        return tokenizer(template, tmp_path).chat_template.render(messages)

    assert render(MISTRAL, [{"role": "user", "content": "a"}]) == "<s>[INST] a [/INST]\n"
    assert render(CHATML, TALK[2:]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert render("{{ 'a<b>&' | tojson }}{{ messages | tojson }}", [{"ü": 1}]) == '"a<b>&"[{"ü": 1}]'
    marked = tokenizer("{{ bos_token }}a{{ eos_token }}", tmp_path)
    assert marked.encode_chat([]) == [1, *marked.encode("a"), 2]


def test_where_templates_are_found(tmp_path):
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    named = tokenizer(several, tmp_path)
    assert (named.chat_template.render(TALK), named.chat_template.render(TALK, tools=TOOLS)) == ("plain", "tools")
    assert tokenizer(several[:1], tmp_path).chat_template.render(TALK, tools=TOOLS) == "plain"
    with pytest.raises(UserError, match="chat templates named tool_use and no default; add one"):
        tokenizer(several[1:], tmp_path).chat_template.render(TALK)
    with pytest.raises(UserError, match="not a list of names and templates"):
        tokenizer([1], tmp_path).chat_template.render(TALK)
    tokenizer(None, tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Tokenizer.load(tmp_path).chat_template.render(TALK) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja ü", encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template.render(TALK) == "from jinja ü"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    both = Tokenizer.load(tmp_path)
    for given, name in ((loaded, "one"), (both, "two")):
        given.save(tmp_path / name)
        again = Tokenizer.load(tmp_path / name)
        for tools in (None, TOOLS):
            assert again.chat_template.render(TALK, tools=tools) == given.chat_template.render(TALK, tools=tools)
        if transformers := _transformers():
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
            assert theirs.apply_chat_template(TALK, tokenize=False) == "from jinja ü"
    assert both.chat_template.render(TALK, tools=TOOLS) == "with tools"
    with pytest.raises(UserError, match="the tokenizer has no chat template; put a chat_template.jinja beside it"):
        TOKENIZER.chat_template.render(TALK)


def _transformers():
    try:
        import transformers
    except ImportError:
        return None
    return transformers


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ ''['__class__'] }}{{ '' | attr('__class__') + '' }}",
    "{{ '{0.__class__.__mro__}'.format('') }}{{ '{0.__class__}'.format_map({'0': ''}) }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n._x = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
])
def test_templates_do_not_get_out(template):
    message = dict(TALK[0])
    with pytest.raises(UserError, match="^the chat template") as caught:
        out = render_template(template, {"messages": [message]})
        assert "class" not in out and "root" not in out and "uid" not in out, "reached something"
        raise UserError("the chat template was harmless")
    assert "\n" not in str(caught.value)
    assert message == TALK[0], "the caller's messages are as they were"


@pytest.mark.parametrize("template", [
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% for a in range(90000) %}{% for b in range(90000) if b == -1 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 10 ** 12 }}", "{{ 10 ** (10 ** 9) }}", "{{ [1] * 10 ** 12 }}", "{{ range(10 ** 9) | list }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s * 8 %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% for i in range(1000) %}{{ 'a' * 1000000 }}{% endfor %}",
])
def test_templates_end(template):
    with pytest.raises(UserError, match="^the chat template"):
        render_template(template, {})


@pytest.mark.parametrize(("template", "message"), [
    ("{% if %}", "cannot be read, line 1: "),
    ("{{ messages[0].content + 1 }}", r"fails on this conversation \(TypeError: "),
    ("{{ 1 / 0 }}", r"fails on this conversation \(ZeroDivisionError: "),
    ("{{ missing.name }}", "needs something that was not given: 'missing' is undefined"),
    ("{{ raise_exception('no\n\nsystem') }}", "refuses this conversation: no system$"),
])
def test_failures_are_one_line(template, message):
    with pytest.raises(UserError, match=f"^the chat template {message}") as caught:
        render_template(template, {"messages": TALK})
    assert "\n" not in str(caught.value)


def test_loops_keep_their_variables():
    """Counting turns does not take away what a loop knows about itself."""
    template = (
        "{% for a in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last }}{% endfor %}"
        "{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}{% for a in nothing %}{% else %}none{% endfor %}"
        "{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}"
    )
    assert render_template(template, {}) == jinja2.Environment().from_string(template).render() == "1/32/33/3.x1none12"


def test_what_a_chat_is_made_of(tmp_path):
    chatting = tokenizer("{{ messages[0].content }}", tmp_path)
    with pytest.raises(UserError, match='a chat is a list of messages such as {"role": "user"'):
        chatting.chat_template.render("hello")
    with pytest.raises(UserError, match='a chat is a list of messages such as {"role": "user"'):
        chatting.chat_template.render(["hello"])
    with pytest.raises(UserError, match="a chat is made of texts, numbers, lists and mappings, not PosixPath"):
        chatting.chat_template.render([{"content": tmp_path}])
