"""The engine gives the tokens of ``generate``, whatever else it serves, loses nothing, and compiles nothing late."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core.sharding import make_mesh, shardings
from jaxlm.inference.decoding import generate_tokens
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Request
from tests.inference.engine.serving import serve
from tests.inference.models import decoder, with_special_token

MODELS = {
    "rotary": {},
    "learned": {"positions": "learned", "max_positions": 64, "norm": "layernorm", "qkv_bias": True},
    "relative": {"positions": "relative"},
    "local": {
        "windows": (4, 0), "rope_local_theta": 500.0, "attention_softcap": 5.0, "logit_softcap": 9.0, "experts": 4,
        "expert_ffn": 24, "layers": 3, "dense_layers": (0,),
    },
}
SHAPE = {"slots": 3, "context": 64, "page_size": 4, "prefill_chunk": 16, "num_pages": 16}


def prompts(count: int, seed: int = 0, most: int = 40) -> list[tuple[int, ...]]:
    """Prompts of many lengths; a third of them begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, 31, 21).tolist()
    heads = [shared[: rng.integers(4, 21)] if rng.random() < 0.34 else [] for _ in range(count)]
    return [(*head, *rng.integers(3, 31, rng.integers(1, most - len(head))).tolist()) for head in heads]


def wanted(lm, rows, limits) -> list[list[int]]:
    found = generate_tokens(lm, rows, max_new_tokens=max(limits))
    return [tokens[:limit] for tokens, limit in zip(found, limits, strict=True)]


def check_against_generate(lm, engine: Engine, *, count: int = 14, seed: int = 0) -> None:
    """Greedy requests that arrive at random, some of them cancelled on the way."""
    rng = np.random.default_rng(seed)
    rows = prompts(count, seed)
    limits = rng.integers(8, 24, count).tolist()
    arrival = np.sort(rng.integers(0, 12, count))
    arrival[0] = 0
    cancelled = {int(i): int(arrival[i] + rng.integers(1, 12)) for i in rng.choice(count, 3, replace=False)}
    numbers: dict[int, int] = {}

    def each_step(step):
        for i in np.flatnonzero(arrival == step):
            numbers[int(i)] = engine.submit(Request(rows[i], limits[i]))
        for i, when in cancelled.items():
            if when == step:
                engine.cancel(numbers[i])

    answers = serve(engine, each_step=each_step)
    for i, want in enumerate(wanted(lm, rows, limits)):
        answer = answers[numbers[i], 0]
        if i in cancelled and answer.finish == "cancelled":
            assert answer.tokens == want[: len(answer.tokens)]
        else:
            assert answer.tokens == want
            assert answer.finish == "length"
            assert answer.text == lm.tokenizer.decode(want)
    assert engine.stats.pages_used == engine.stats.running == engine.stats.waiting == 0


@contextmanager
def compilations():
    """The programs that are compiled meanwhile."""
    seen: list[str] = []

    def listen(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def warm(*models, **options) -> Engine:
    """An engine that has compiled all its programs. They are new: no other module has an engine of these sizes."""
    engine = Engine(*models, **SHAPE, **options)
    with compilations() as seen:
        engine.warm_up()
    assert len(seen) >= engine.stats.compilations == 3
    return engine


@pytest.fixture(scope="module")
def engine():
    return warm(decoder())


@pytest.fixture(scope="module")
def drafted():
    """An engine whose draft is nearly the model."""
    lm = decoder()
    noise = lambda x: 0.004 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)  # noqa: E731
    near = jax.tree.map(lambda x: jax.device_put(np.asarray(x) + noise(x)), lm.params)
    return warm(lm, draft=replace(lm, params=near), num_draft_tokens=2)


def test_greedy_is_that_of_generate(engine):
    check_against_generate(engine.lm, engine)
    assert engine.stats.cached_tokens and engine.stats.preemptions


def test_a_special_token_that_is_a_stop_string_ends_a_text(engine, monkeypatch):
    prompt = tuple(engine.lm.tokenizer.encode("the cat"))
    full = engine.lm.tokenizer.decode(wanted(engine.lm, [prompt], [20])[0])
    monkeypatch.setattr(engine, "lm", with_special_token(engine.lm, full[4]))
    (answer,) = serve(engine, [Request(prompt, 20, stop=(full[4],))]).values()
    assert (answer.text, answer.finish) == (full[: full.index(full[4])], "stop")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "rotary"])
def test_greedy_of_other_models_is_that_of_generate(name):
    lm = decoder(**MODELS[name])
    engine = Engine(lm, **SHAPE)
    check_against_generate(lm, engine)
    assert engine.stats.cached_tokens and engine.stats.preemptions


@pytest.mark.parametrize("kind", ["int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4", "fp8"))])
def test_rounded_caches_are_those_of_generate(kind):
    lm = decoder(kv_cache=kind)
    check_against_generate(lm, Engine(decoder(), kv_cache=kind, **SHAPE))


def test_a_draft_changes_nothing(drafted):
    check_against_generate(drafted.lm, drafted)
    assert 0.2 < drafted.stats.accepted_tokens / drafted.stats.draft_tokens < 1
    assert drafted.stats.preemptions


@pytest.mark.slow
def test_a_model_that_is_its_own_draft_is_always_right():
    lm = decoder()
    engine = Engine(lm, draft=lm, num_draft_tokens=3, **SHAPE)
    serve(engine, [Request(row, 20) for row in prompts(6, 3)])
    assert engine.stats.accepted_tokens > 0.95 * engine.stats.draft_tokens  # products of other shapes round otherwise


@pytest.fixture
def split():
    """An engine on a mesh."""
    lm, mesh = decoder(), make_mesh(data=1, tensor=2, devices=jax.devices()[:2])
    return warm(replace(lm, params=jax.device_put(lm.params, shardings(lm.params, mesh))))


@pytest.mark.parametrize("name", ["engine", "drafted", pytest.param("split", marks=pytest.mark.slow)])
def test_nothing_compiles_after_warming_up(name, request):
    engine = request.getfixturevalue(name)
    constrained = Request((5,), 9, logit_bias={7: 2.0}, presence_penalty=0.5, repetition_penalty=1.3)
    sampled = [Request(row, 12, temperature=0.9, top_p=0.8, logprobs=3, n=2) for row in prompts(6)]
    with compilations() as seen:
        answers = serve(engine, [*sampled, constrained, Request(prompts(1)[0], 30)])
    assert not seen and len(answers) == 14


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"data": 2, "fsdp": 2}])
def test_a_model_on_many_devices_says_the_same(sizes):
    lm = decoder(heads=4, kv_heads=2)
    devices = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**{"data": 1} | sizes, devices=jax.devices()[:devices])
    spread = replace(lm, params=jax.device_put(lm.params, shardings(lm.params, mesh)))
    engine = Engine(spread, kv_cache="int8", **SHAPE)
    rows = prompts(5)
    want = wanted(decoder(heads=4, kv_heads=2, kv_cache="int8"), rows, [10] * 5)
    answers = serve(engine, [Request(row, 10) for row in rows])
    assert [answer.tokens for _, answer in sorted(answers.items())] == want
    codes = engine._runner._state.pools[0].keys[0].codes
    assert codes.sharding.shard_shape(codes.shape)[2] == 2 // sizes.get("tensor", 1)


def test_long_prompts_do_not_keep_others_waiting(engine):
    first = engine.submit(Request((5, 6), 30))
    engine.step()
    before = engine.stats.prefill_tokens
    engine.submit(Request(prompts(1, 5, 60)[0][:1] * 50, 5))
    for _ in range(4):  # chunks of 16
        assert [event.request_id for event in engine.step()][:1] == [first]
    assert engine.stats.prefill_tokens - before >= 48
    serve(engine)


def test_owners_share_the_slots_and_say_the_same(engine):
    row = (5, 6, 7)
    many = Request(row, 20, n=5, temperature=1.0, seed=3)
    other, third = Request(row, 6, temperature=1.0, seed=4), Request(row, 4, temperature=1.0, seed=5)
    alone = serve(engine, [many, other, third])
    ids, order = {}, []

    def each_step(step):
        if step == 0:
            ids["many"] = engine.submit(replace(many, owner=("a", "1")))
        if step == 4:  # all slots are taken by then
            ids["other"] = engine.submit(replace(other, owner=("b", "2")))
            ids["third"] = engine.submit(replace(third, owner=("a", "3")))
        if step == 5:
            order.extend(sorted(each.request_id for each in engine._scheduler.running))

    shared = serve(engine, each_step=each_step)
    assert order == [ids["many"], ids["other"], ids["third"]]
    numbers = dict(zip(sorted({number for number, _ in alone}), ("many", "other", "third"), strict=True))
    for (number, index), answer in alone.items():
        assert shared[ids[numbers[number]], index].tokens == answer.tokens
    assert not engine._scheduler._slots_of


def test_copies_read_their_prompt_once(engine):
    row, before = tuple(range(30, 3, -1)) + tuple(range(4, 10)), engine.stats
    serve(engine, [Request(row, 6, n=3, temperature=1.0, seed=1)])
    after = engine.stats
    assert after.prefill_tokens - before.prefill_tokens == 32
    assert after.cached_tokens - before.cached_tokens == 2 * 32
    serve(engine, [Request(row, 6)])
    assert engine.stats.cached_tokens - before.cached_tokens == 3 * 32
