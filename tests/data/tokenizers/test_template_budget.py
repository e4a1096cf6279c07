"""Chat templates pay for what they do: none takes much time or memory, and real ones write what Jinja writes."""

from __future__ import annotations

import json
from datetime import datetime

import jinja2
import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.templates import budget
from jaxlm.data.tokenizers.templates.sandbox import _generation_extension, render_template
from tests.data.tokenizers.test_chat_template import CHATML, GEMMA, LLAMA3, MISTRAL, SYSTEM, TALK, TOOLS

NESTED = "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
TWO_NESTED = (
    "{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}"
    "{% set ns.t = [ns.t, ns.t] %}{% endfor %}"
)
NESTED_TUPLES = "{% set ns = namespace(s=(1,)) %}{% for i in range(60) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}"
# What a list of 2^60 items is given to, though it takes no memory: texts, comparisons, hashes.
OF_NESTED = [
    "{{ ns.s }}", "{{ ns.s|string|length }}", "{{ ns.s|tojson|length }}", "{{ ns.s|pprint|length }}", "{{ ns }}",
    "{{ raise_exception(ns.s) }}", "{{ '%s' % [ns.s] }}", "{{ '' ~ ns.s }}",
]
OF_TWO_NESTED = [
    "{{ ns.s == ns.t }}", "{{ [ns.s, ns.t]|sort|length }}", "{{ ns.s is eq ns.t }}", "{{ ns.s in [ns.t] }}",
]
OF_NESTED_TUPLES = [
    "{{ {ns.s: 1} }}", "{{ {}[ns.s] }}", "{{ {}.get(ns.s) }}", "{{ [ns.s,ns.s]|unique|list|length }}",
]
# What doubles a text sixty times.
DOUBLINGS = [
    "{% set ns.s = ns.s * 8 %}", "{% set ns.s = ns.s ~ ns.s %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
    "{% set ns.s = [ns.s, ns.s]|join %}", "{% set ns.s = '%s%s' % (ns.s, ns.s) %}",
    "{% set ns.s = '{0}{0}'.format(ns.s) %}", "{% set ns.s = '%s%s'|format(ns.s, ns.s) %}",
    "{% set ns.s = ns.s.replace('a','aa') %}", "{% set ns.s = ns.s|replace('a','aa') %}",
    "{% set ns.s = ns.s.join([ns.s,ns.s]) %}",
]
# What is done 90,000 times to a list of 90,000, or to a text of 10 million characters.
WITH_A_LIST = [
    "l|sort", "l|sum", "l|map('string')|list", "l|reverse|list", "l|unique|list", "l|groupby('real')",
    "l.index(89999)", "89999 in l", "l|max",
]
WITH_A_TEXT = [
    "t[1:]", "'b' in t", "t|upper", "t.count('b')",
]
OTHERS = [
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (1000000000, 1) }}", "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 1000000000) }}", "{{ '{:.1000000000f}'.format(1.0) }}",
    "{{ '{a:>1000000000}'.format_map({'a': 1}) }}", "{{ '%1000000000d'|format(1) }}", "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.center(1000000000) }}", "{{ 'a'.zfill(1000000000) }}", "{{ 'a'|center(1000000000) }}",
    "{{ ('\\t'*100000).expandtabs(100000)|length }}", "{{ ('a\\n'*100000)|indent(100000)|length }}",
    "{{ ('a\\n'*100000)|indent('b'*100000)|length }}", "{{ lipsum(100000) }}", "{{ lipsum(1, max=1000000000) }}",
    "{{ [1]|batch(1000000000, 2)|list|length }}", "{{ [1]|slice(1000000000, 2)|list|length }}",
    "{{ 1.5|round(1000000000, 'ceil') }}", "{{ (1).to_bytes(1000000000, 'big')|length }}",
    "{{ {'a':1}|tojson(indent=1000000000) }}", "{{ {'a':1}|tojson(separators=('x'*10000000,'y'*10000000)) }}",
    "{{ (range(90000)|list)|tojson(separators=('x'*1000,'y'))|length }}", "{{ strftime_now('%c' * 4000000)|length }}",
    "{{ ('a'*1000000).translate({97: 'b'*1000000})|length }}", "{{ ('a,'*8000000).split(',')|length }}",
    "{{ ('a '*8000000).split()|length }}", "{{ ('a'*16000000)|list|length }}",
    "{% for i in range(100000) %}{% set x = ('a'*1000000)[::-1] %}{% endfor %}",
    "{% set l = range(90000) %}{{ [[1]*90000, [1]*90000]|sum(start=[])|length }}{{ ([[1]*1000]*90000"
    ")|sum(start=[])|length }}",
    "{{ ('<!-- --><b>'*1000000)|striptags|length }}", "{{ ('http://a.bc '*1000000)|urlize(rel='x'*100000)|length }}",
    "{{ ('a '*1000000)|wordwrap(1, wrapstring='x'*100000)|length }}",
    '{{ {\'a\':\'"\'*10000000,\'b\':\'"\'*10000000}|xmlattr|length }}',
    '{{ (\'"\'*16000000)|escape|length }}{{ (\'"\'*16000000)|escape|length }}{{ (\'"\'*16000000)|escape|le'
    'ngth }}{{ (\'"\'*16000000)|escape|length }}',
    "{{ ('ü'*8000000)|urlencode|length }}", "{{ ('a'*1000000)|trim('b'*1000000 ~ 'a') }}",
    "{{ ('a'*10000000).strip('b'*10000000) }}", "{{ ''.maketrans('a'*10000000, 'b'*10000000)|length }}",
    "{{ ('ab'*5000000)|wordcount }}{{ ('a '*5000000)|wordcount }}", "{{ ('a '*8000000)|title|length }}",
    "{{ cycler(*range(90000)) }}{% for i in range(90000) %}{% set c = cycler(*range(90000)) %}{% endfor %}",
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{{ f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f(f("
    "f(f(f(f('aaaaaaaa')))))))))))))))))))))))))))) }}",
    "{% set x %}{% for i in range(90000) %}{% for j in range(1000) %}lllllllllllllllllllllllllllllll"
    "llllllllllllllllllllllllllllllllllllllllllllllllllll{% endfor %}{% endfor %}{% endset %}{{ x|le"
    "ngth }}",
    "{% filter upper %}{% for i in range(90000) %}{% for j in range(1000) %}llllllllllllllllllllllll"
    "lllllllll{% endfor %}{% endfor %}{% endfilter %}",
    "{% macro g() %}{% for a in [1,2,3,4,5,6,7,8] %}{{ caller() }}{% endfor %}{% endmacro %}{% call "
    "g() %}{% call g() %}{% call g() %}{% call g() %}{% call g() %}{% call g() %}{% call g() %}{% ca"
    "ll g() %}{% call g() %}xxxxxxxxxxxx{% endcall %}{% endcall %}{% endcall %}{% endcall %}{% endca"
    "ll %}{% endcall %}{% endcall %}{% endcall %}{% endcall %}",
    "{% autoescape true %}{% set ns = namespace(s='<') %}{% for i in range(60) %}{% set ns.s = ns.s "
    "~ ns.s %}{% endfor %}{{ ns.s }}{% endautoescape %}",
    "{% autoescape true %}{% set ns = namespace(s='<'|safe) %}{% for i in range(60) %}{% set ns.s = "
    "ns.s + ('<'*1000000) %}{% endfor %}{{ ns.s }}{% endautoescape %}",
    "{% block b %}{% for i in range(10) %}{{ self.b() }}{% endfor %}{% endblock %}",
    "{% for i in range(99999) %}{% set j = joiner('a'*1000000) %}{{ j() }}{{ j() }}{% endfor %}",
    "{{ dict.fromkeys('a') }}{% for i in range(99999) %}{% set d = {}.fromkeys(range(99999)) %}{% endfor %}",
    "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = dict(ns.x if i else {}, *"
    "*{('k' ~ i): i}) %}{% endfor %}",
    "{{ ('a'*16000000).encode().hex()|length }}{{ ('a'*8000000).encode().hex('b')|length }}{{ ('a'*8"
    "000000).encode('utf-32').decode('utf-32')|length }}{{ ('a'*8000000).encode('utf-32').decode('ut"
    "f-32')|length }}",
    "{% set t = [ [ ] ] %}{% for i in range(99999) %}{{ loop.changed(range(99999)|list) }}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ 'x'|truncate(10**18, leeway=10**18) }}{% for i in range(99999) %}{% set y = ('a'*16000000)|t"
    "runcate(15999999, true) %}{% endfor %}",
]
BOMBS = [
    *(NESTED + each for each in OF_NESTED), *(TWO_NESTED + each for each in OF_TWO_NESTED),
    *(NESTED_TUPLES + each for each in OF_NESTED_TUPLES),
    *("{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}" + each + "{% endfor %}" for each in DOUBLINGS),
    *("{% set l = range(90000)|list %}{% for i in range(90000) %}{% set x = " + each + " %}{% endfor %}"
      for each in WITH_A_LIST),
    *("{% set t = 'a'*10000000 %}{% for i in range(100000) %}{% set x = " + each + " %}{% endfor %}"
      for each in WITH_A_TEXT), *OTHERS,
]  # fmt: skip


def test_what_would_take_long_or_much_is_refused_before(monkeypatch):
    monkeypatch.setattr(budget, "_WORK", 1 << 22)  # a part of it: these are many
    for template in BOMBS:
        with pytest.raises(UserError, match="^the chat template") as caught:
            render_template(template, {"messages": TALK})
            pytest.fail(f"not refused: {template}")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        assert "Error" not in str(caught.value) or "RecursionError" in str(caught.value), (template, caught.value)


def test_a_template_is_not_longer_than_any_that_is_needed():
    with pytest.raises(UserError, match="more than 262,144 characters"):
        render_template("{{ 1 }}" * 50_000, {})


def test_a_long_conversation_may_do_more_than_a_short_one():
    """The budget grows with the conversation, so that long ones can be written."""
    with pytest.raises(UserError, match="bytes and steps"):
        render_template("{% for i in range(99999) %}{{ messages[0].content|trim * 9 }}{% endfor %}", {"messages": TALK})
    talk = [{"role": "user", "content": "ü" * 9_000}, {"role": "assistant", "content": "a" * 9_000}] * 400
    variables = {"messages": talk, "add_generation_prompt": True}
    assert len(ours := render_template(QWEN, variables)) > 7_200_000 and ours == reference(QWEN, variables)


QWEN = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not(
        message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
EVERYTHING = r"""
{{ 'ab' ~ 1 ~ none ~ nothing ~ [1,'a'] }}|{{ 'x'|center(9) }}|{{ ['b','a','C']|sort|join(', ') }}|{{
{'b':1,'a':2}|dictsort }}
{{ [{'n':1,'g':'x'},{'n':2,'g':'y'},{'n':3,'g':'x'}]|groupby('g') }}{% for g, l in
[{'n':1,'g':'x'},{'n':2,'g':'y'},{'n':3,'g':'x'}]|groupby('g') %}{{ g }}:{{ l|map(attribute='n')|list }}{% endfor %}
{{ [1,2,3,4,5]|batch(2, 0)|list }}{{ [1,2,3,4,5]|slice(3)|list }}{{ [1,1,2]|unique|list }}{{ [1,2,3]|sum }}{{
[{'a':1},{'a':2}]|sum(attribute='a', start=3) }}{{ [[1],[2]]|sum(start=[]) }}
{{ 'a\nb'|indent }}{{ 'a\nb'|indent(2, first=true) }}{{ 'a\nb'|indent('> ') }}{{ 'some long text here'|wordwrap(5)
}}{{ 'hello world'|title }}{{ 'hello'|capitalize }}{{ 'a-b'|replace('-', '+') }}
{{ [3,1,2]|max }}{{ [3,1,2]|min }}{{ ['a','b']|map('upper')|join }}{{ [0,1,2]|select('odd')|list }}{{
[0,1,2]|reject('equalto', 1)|list }}{{ messages|selectattr('role','equalto','user')|list|length }}{{
messages|rejectattr('role','in',['user'])|map(attribute='content')|join('\n') }}
{{ 1.2345|round(2) }}{{ '12'|int + 3 }}{{ '1.5'|float }}{{ -3|abs }}{{ 'x'|default('y') }}{{ nothing|default('y')
}}{{ ''|d('z', true) }}{{ [1,2]|first }}{{ [1,2]|last }}{{ 'abc'|length }}{{ 'abc'|reverse }}{{ [1,2]|reverse|list
}}{{ ' a '|trim }}{{ 'xxax'|trim('x') }}
{{ '<a>'|escape }}{{ '<a>'|e|safe }}{{ '<b>x</b> y'|striptags }}{{ 'http://x.y z'|urlize }}{{ 'ü /'|urlencode }}{{
{'a':1,'b':none}|xmlattr }}{{ 'one two'|wordcount }}{{ 'long text that is long'|truncate(9) }}{{
123456|filesizeformat }}{{ '%s-%s'|format('a', 1) }}{{ '%05.1f|%-5s|%(x)s' % {'x': 1} if false else '%05.1f|%-5s|' %
(1.5, 'a') }}{{ '{:>5}|{a}'.format('x', a=[1]) }}{{ '{a}'.format_map({'a': 1}) }}
{{ 'a,b'.split(',') }}{{ 'a b'.split() }}{{ ' x'.lstrip() }}{{ 'x\n'.rstrip('\n') }}{{ 'abc'.startswith('a') }}{{
'a</think>b'.split('</think>')[-1].lstrip('\n') }}{{ 'abc'[::-1] }}{{ [1,2,3][1:] }}{{ 'ab'.upper() }}{{
'a'.ljust(3) }}|{{ '7'.zfill(3) }}{{ '-'.join(['a','b']) }}{{ 'a\tb'.expandtabs(2) }}{{ 'aXb'.partition('X') }}{{
'ab'.encode() }}{{ 'a'.translate({97: 'b'}) }}
{{ 2 ** 5 }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 7 / 2 }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 1 - 2 }}{{ 1 < 2 <= 2 }}{{ 'a' in
'abc' }}{{ 1 not in [2] }}{{ 'a' == 'a' }}{{ 3 is even }}{{ 3 is gt 2 }}{{ 'a' is in 'abc' }}{{ 'A' is upper }}{{ x
is defined }}{{ messages is iterable }}{{ {} is mapping }}{{ none is none }}{{ 'a' is string }}
{% set ns = namespace(a=1, b=[]) %}{% for m in messages %}{% set ns.a = ns.a + loop.index %}{% if loop.first %}{%
continue %}{% endif %}{{ loop.cycle('o','e') }}{{ loop.changed(m.role) }}{{ loop.previtem.role }}{{ loop.last }}{%
else %}none{% endfor %}{{ ns.a }}
{% macro f(x, y='d') %}{{ x }}{{ y }}{{ caller() if caller }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{
f(1, 2, 3, z=4) }}{% call f('c') %}inner{% endcall %}{{ f.name }}
{% set block %}text {{ 1 }}{% endset %}{{ block }}{% filter upper %}low{% endfilter %}{% with a = 1 %}{{ a }}{%
endwith %}{{ range(3)|list }}{{ dict(a=1, b=[1]) }}{{ {'k': {'v': 1}}.k.v }}{{ {'a':1}|items|list }}{% for k, v in
{'a':1}|items %}{{ k }}{{ v }}{% endfor %}
{% set c = cycler('a','b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}{{ j() }}{{
{'a':[1,{'b':'<ü>'}]}|tojson }}{{ {'a':[1]}|tojson(indent=2) }}{{ {'b':1,'a':2}|tojson(sort_keys=true,
separators=(',',':')) }}{{ 'x'|string|list }}{{ {'a':1}|pprint }}{{ [1,'a']|string }}{{ 'a' if 1 > 2 }}{{
messages[0]['role'] }}{{ messages[-1].content }}{{ messages|length }}{{ messages[:1] }}{{ {'a': 1, ('t', 1): 2} }}{{
[[1,[2]]]|map('first')|list }}
{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}{% autoescape true %}{{ '<' ~ '>'
}}{{ '<' }}{% endautoescape %}{% for x in [3,1,2]|sort(reverse=true) if x > 1 %}{{ x }}{% endfor %}{{
messages|map(attribute='role')|unique|list }}{{ strftime_now('%Y') }}{{ [1,2,3]|random in [1,2,3] }}{{ {'z':
1}.items()|list }}{{ {'z': 1}.get('q', 'none') }}{{ nothing }}{{ (1,2) }}{{ true }}{{ 'é'|upper }}{{
['a','B']|sort(case_sensitive=true) }}{{ [{'a':2},{'a':1}]|sort(attribute='a') }}{{ '%s' % messages[0].role }}{{
"%d%%" % 5 }}{{ messages|tojson|length }}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CALLS = [{"function": {"name": "add", "arguments": {"a": [1, {"b": "<ü>"}]}}}]


def reference(template: str, variables: dict) -> str:
    """What Jinja writes, set up as transformers does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(False), loopcontrols]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **options: json.dumps(
        x, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template).render(**variables)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@pytest.mark.parametrize(
    "template", [LLAMA3, MISTRAL, CHATML, GEMMA, QWEN, EVERYTHING],
    ids=["llama3", "mistral", "chatml", "gemma", "qwen", "everything"],
)
def test_templates_write_what_jinja_writes(template):
    called = [*TALK, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes", "tool_calls": CALLS}]
    talks = [TALK] if template is MISTRAL else [TALK, SYSTEM + TALK, SYSTEM + called]
    for messages in talks:
        for tools in (None, TOOLS):
            variables = {"messages": messages, "tools": tools, "add_generation_prompt": True, **TOKENS}
            assert render_template(template, variables) == reference(template, variables)
