"""A constraint costs the requests of others nothing: it is compiled once, elsewhere, and within limits."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import pytest

pytest.importorskip("llguidance")

from jaxlm.core.errors import UserError  # noqa: E402
from jaxlm.inference.engine.constraints import Constraint, Grammar  # noqa: E402
from jaxlm.inference.engine.requests import Request  # noqa: E402
from jaxlm.serving import grammars  # noqa: E402
from jaxlm.serving.protocol.errors import ApiError  # noqa: E402

ENDLESS = {"allOf": [{"type": "string", "pattern": f"^.*{i}.*$"} for i in range(200)]}  # llguidance takes hours
WIDE = {"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(5000)}}
CIRCLE = {"$ref": "#"}
ENUM = {"enum": ["yes", "no"]}


@pytest.fixture
def engine(lms):
    return lms["tiny"].engine(slots=2, context=64)


@pytest.fixture
def queue(engine):
    queue = grammars.GrammarQueue("tiny", lambda: engine.grammars)
    yield queue
    queue.close()


def ask(server, schema, **options):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 8, "temperature": 0} | options
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    return httpx.post(f"{server.url}/v1/completions", json=body | {"response_format": form}, timeout=120)


def test_a_schema_over_the_limits_is_an_error_of_its_request(server, monkeypatch):
    monkeypatch.setattr(grammars, "_SECONDS", 1)
    for schema, named in (
        (WIDE, "131,072"), (ENDLESS, "more than 1 s"), (CIRCLE, "allows no text"), ({"allOf": [CIRCLE]}, "no text"),
        ({"type": "object", "properties": {"a": CIRCLE}, "required": ["a"]}, "Too many items"),
    ):
        answer = ask(server, schema)
        assert answer.status_code == 400 and named in answer.text, answer.text
        assert len(answer.text) < 600
    assert json.loads(ask(server, ENUM).json()["choices"][0]["text"]) in ENUM["enum"]


def test_what_takes_too_much_memory_ends_its_process_alone(queue, monkeypatch):
    monkeypatch.setattr(grammars, "_MEMORY", 1 << 20)
    with pytest.raises(ApiError, match="MiB to compile"):
        asyncio.run(queue.compile(Constraint(json={"const": "x" * 100_000})))
    monkeypatch.undo()
    assert isinstance(asyncio.run(queue.compile(Constraint(json=ENUM))), Grammar)


def test_samples_share_a_grammar_and_the_last_ones_are_kept(engine, monkeypatch):
    compiler, compiled = engine.grammars, []
    library, bitmasks = compiler._library
    kinds = library.LLMatcher
    monkeypatch.setattr(compiler, "_library", (library, bitmasks))
    monkeypatch.setattr(library, "LLMatcher", Counting(kinds, compiled))
    for _ in range(2):
        engine.submit(Request((5,), 4, n=16, constraint=Constraint(json=ENUM)))
    assert len(compiled) == 1
    for i in range(20):
        compiler.compile(Constraint(choice=(f"{i}",)))
    assert len(compiler._kept) == 16
    for i in range(3):
        compiler.compile(Constraint(choice=("x" * 100_000, f"{i}")))
    assert [len(source) > 100_000 for source in compiler._kept] == [True]
    before = len(compiled)
    compiler.compile(Constraint(choice=("x" * 100_000, "2")))
    assert len(compiled) == before


class Counting:
    """A class whose making of objects is counted."""

    def __init__(self, kind, made):
        self._kind, self._made = kind, made

    def __call__(self, *args, **options):
        self._made.append(args)
        return self._kind(*args, **options)

    def __getattr__(self, name):
        return getattr(self._kind, name)


def test_a_forced_text_is_tokenized_as_far_as_it_is_used(engine):
    lengths = []
    vocabulary = engine.grammars.vocabulary
    encode = vocabulary._tokenizer.encode
    vocabulary._tokenizer = type("Tokenizer", (), {"encode": lambda self, x: lengths.append(len(x)) or encode(x)})()
    matcher = engine.grammars.compile(Constraint(json={"const": "ab" * 20_000})).matcher()
    matcher.prepare()
    assert 0 < max(lengths) <= 1024


def test_who_leaves_the_queue_is_not_waited_for(queue, engine):
    """One constraint is being compiled and seven wait; a ninth is refused, and those that left are never compiled."""
    entered, go, compiled = threading.Event(), threading.Event(), []

    def check(compiler, source):
        entered.set()
        assert go.wait(60)
        compiled.append(source)

    queue._trials.check = check

    async def run():
        tasks = [asyncio.create_task(queue.compile(Constraint(choice=(str(i),)))) for i in range(8)]
        await asyncio.to_thread(entered.wait, 60)
        while queue._waiting < 8:
            await asyncio.sleep(0)
        with pytest.raises(ApiError, match="try again") as caught:
            await queue.compile(Constraint(choice=("more",)))
        assert caught.value.status == 429
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        assert queue._waiting == 1
        go.set()
        assert isinstance(await tasks[0], Grammar)
        assert await queue.compile(Constraint(choice=("0",))) is await tasks[0]

    asyncio.run(run())
    assert len(compiled) == 1


def test_a_schema_that_is_none_is_no_failure(engine):
    for schema in ("true", "[]", '{"maximum": 1e400}'):
        with pytest.raises(UserError, match="constraint"):
            engine.grammars.compile(Constraint(json=schema))
