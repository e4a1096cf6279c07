"""Long jobs come in slices between the engine's steps; what they answer is bounded and is that of the library."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import httpx
import jax
import numpy as np
import pytest

from jaxlm.evaluation.insight import score_tokens
from jaxlm.serving.worker import Worker


class Stepping(Worker):
    """A worker that has steps to do as long as it is told so, and that notes what it does."""

    def __init__(self):
        super().__init__("it", capacity=4)
        self.log, self.steps_left = [], 0

    @property
    def _busy(self):
        return self.steps_left > 0

    def _step(self):
        if self.steps_left:
            self.steps_left -= 1
            self.log.append("step")
            time.sleep(0.001)


@pytest.fixture
def worker():
    worker = Stepping()
    yield worker
    worker.close()


def make_slices(log, count, traced=None):
    """Adds up numbers; notes each slice, and where the program was traced."""
    @jax.jit
    def add(x, y):
        if traced is not None:
            traced.append(threading.current_thread().name)
        return x + y

    def slices():
        total = np.float32(0)
        try:
            for i in range(count):
                log.append("slice")
                total = yield partial(add, total, np.float32(i))
            return float(total)
        finally:
            log.append("end")

    return slices()


def test_steps_come_between_slices_and_programs_are_compiled_elsewhere(worker):
    traced = []
    worker.steps_left = 200

    async def run():
        result = asyncio.ensure_future(worker.run(make_slices(worker.log, 9, traced), ""))
        await asyncio.sleep(0)
        worker.start()
        return await result

    assert asyncio.run(run()) == sum(range(9))
    assert len(traced) == 1 and traced[0].startswith("jaxlm-programs")
    while worker.steps_left:
        time.sleep(0.01)
    done = worker.log[: worker.log.index("end")]
    places = [i for i, what in enumerate(done) if what == "slice"]
    assert all(after - before > 1 for before, after in zip(places, places[1:], strict=False)), done


def test_who_leaves_ends_the_slices(worker):
    log = []

    async def run():
        worker.start()
        endless = asyncio.ensure_future(worker.run(make_slices(log, 10**9), ""))
        while log.count("slice") < 3:
            await asyncio.sleep(0.001)
        endless.cancel()
        assert await worker.run(make_slices([], 3), "") == 3  # whoever comes next has a turn
        while "end" not in log:
            await asyncio.sleep(0.001)

    asyncio.run(run())
    assert log[-1] == "end" and worker.in_use == 0


def test_a_slice_that_fails_is_a_failure_of_its_job_alone(worker):
    def failing():
        yield partial(jax.jit(lambda x: x.reshape(7)), np.zeros(3, np.float32))

    async def run():
        worker.start()
        with pytest.raises(Exception, match="the server failed"):
            await worker.run(failing(), "")
        assert await worker.run(make_slices([], 3), "") == 3

    asyncio.run(run())


def complete(server, **body):
    return httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "max_tokens": 0} | body, timeout=120)


def test_an_echo_is_scored_as_the_library_does(server, lms):
    prompts = ["the cat", "on and on and on"]
    answer = complete(server, prompt=prompts, echo=True, logprobs=2).json()
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        tokens = lms["tiny"].tokenizer.encode_prompt(prompt)
        wanted = score_tokens(lms["tiny"], tokens, top=2)
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx(wanted.logprobs, abs=1e-4)
        assert [len(each) for each in found["top_logprobs"][1:]] == [2] * (len(tokens) - 1)
    both = complete(server, prompt="the", echo=True, logprobs=1, max_tokens=3, temperature=0).json()["choices"][0]
    offsets = both["logprobs"]["text_offset"]
    assert len(offsets) == len("the") + 3 and both["text"][offsets[3] :].startswith(both["logprobs"]["tokens"][3])


def test_a_response_has_so_many_log_probabilities_at_most(server):
    for body in (
        {"prompt": ["a" * 90] * 100, "echo": True, "logprobs": 20},
        {"prompt": ["a"] * 100, "max_tokens": 90, "logprobs": 20},
    ):
        answer = complete(server, **body)
        assert answer.status_code == 400 and "131,072" in answer.text and answer.json()["error"]["param"] == "logprobs"
