"""What the server does for all requests: keys, limits, queues, clients that leave, failures, the end."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time

import httpx
import pytest

from jaxlm.core.errors import UserError
from jaxlm.inference.engine.requests import Request
from jaxlm.serving.access import ApiKeys, host_name, is_loopback
from jaxlm.serving.app import RequestLimits, make_app
from jaxlm.serving.models import ModelSource, ServedModel
from jaxlm.serving.protocol.errors import ApiError
from jaxlm.serving.protocol.parsing import json_depth
from jaxlm.serving.worker import Caller, EngineWorker
from tests.serving.servers import running, wait_for

BODY = {"model": "tiny", "prompt": "the cat", "max_tokens": 4, "temperature": 0}
LONG = BODY | {"max_tokens": 80, "stream": True}


def post(server, body, path="/v1/completions", **options):
    return httpx.post(f"{server.url}{path}", json=body, timeout=120, **options)


@pytest.fixture(scope="module")
def engine(lms):
    """An engine with one slot; a server at a time has it."""
    return lms["tiny"].engine(slots=1, context=96)


def other(lms, *engines, queue=1, client_places=None, default_max_tokens=None, **options):
    """Another server, of one model; when an engine fails, the next one takes its place."""
    worker = EngineWorker("tiny", iter(engines).__next__, 1 + queue, client_places)
    return running(make_app([ServedModel("tiny", lms["tiny"], worker, 96, default_max_tokens)], **options))


def slow_down(monkeypatch, engine, seconds):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(seconds) or step())


@pytest.mark.parametrize(("data", "status"), [
    (b"{", 400), (b"[]", 400), (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400), (b"\xff", 400),
    (b"[" * 100 + b"]" * 100, 400), (b'{"model": "tiny", "prompt": "\\ud800"}', 400), (b"", 400),
    (b'{"model": "tiny", "prompt": "' + b"a" * (1 << 20) + b'"}', 413), (b"1" * 5000, 400),
])
def test_what_is_no_request_is_told_so(server, data, status):
    answer = httpx.post(f"{server.url}/v1/completions", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_prompts_have_special_tokens_and_messages_do_not(server, lms):
    answer = post(server, BODY | {"prompt": "<s>the cat</s>"}).json()
    assert answer["usage"]["prompt_tokens"] == 9
    assert answer["choices"][0]["text"] == lms["tiny"].generate("<s>the cat</s>", max_new_tokens=4)[0]
    chat = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "the cat</s>"}]}
    assert post(server, chat, "/v1/chat/completions").json()["usage"]["prompt_tokens"] == len("the cat</s>. ")


def test_forms_of_other_pages_are_refused(server):
    headers = {"content-type": "text/plain"}
    answer = httpx.post(f"{server.url}/v1/completions", content=json.dumps(BODY), headers=headers)
    assert answer.status_code == 415


def test_brackets_in_strings_are_not_depth():
    assert json_depth(b'{"a": ["[[[\\"[[", {}]}') == 3
    assert json_depth(b'"\\\\"[[') == 2
    assert json_depth(b'"never ends [[[') == 0


def test_paths_and_methods_that_are_not_there(server):
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"].endswith("/v1/nothing")
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/../../etc/passwd").status_code == 404


def test_headers_keep_browsers_careful(server):
    headers = httpx.get(f"{server.url}/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in httpx.get(
        f"{server.url}/health", headers={"origin": "https://example.org"}
    ).headers


def test_metrics_count(server):
    post(server, BODY)
    text = httpx.get(f"{server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['jaxlm_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(lines["jaxlm_open_requests"]) == 0
    assert 'jaxlm_engine_tokens_written_total{model="tiny"}' in lines


def test_keys_are_asked_for(lms, engine, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# ours\nfirst-key\n")
    monkeypatch.setenv("JAXLM_API_KEYS", "second-key,third-key")
    keys = ApiKeys.load(tmp_path / "keys")
    assert [keys.accept(f"Bearer {key}") for key in ("first-key", "second-key", "third-key", "fourth-key", "")] == [
        True, True, True, False, False
    ]
    assert not keys.accept("Basic first-key")
    with other(lms, engine, keys=keys) as server:
        assert post(server, BODY).json()["error"]["code"] == "invalid_api_key"
        assert post(server, BODY, headers={"Authorization": "Bearer wrong-key"}).status_code == 401
        assert post(server, BODY, headers={"Authorization": "Bearer first-key"}).status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
    (tmp_path / "none").write_text("# nothing\n")
    with pytest.raises(UserError, match="none"):
        ApiKeys.load(tmp_path / "none")
    with pytest.raises(UserError, match="5 characters.*8"):
        ApiKeys(["short"])


def test_origins_that_are_allowed_may_ask_and_names_that_are_not_ours_may_not(lms, engine):
    with other(lms, engine, origins=["https://example.org"], loopback_only=True) as server:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        for origin, allowed in (("https://example.org", "https://example.org"), ("https://evil.example", None)):
            answer = httpx.options(f"{server.url}/v1/completions", headers={"Origin": origin} | asked)
            assert answer.headers.get("access-control-allow-origin") == allowed
        assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 403
        assert httpx.get(f"{server.url}/health", headers={"Host": "localhost:99"}).status_code == 200
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "evil.example")] == [
        True, True, True, False, False
    ]
    assert [host_name(header) for header in ("a:80", "[::1]:80", "a", "[", "")] == ["a", "::1", "a", "", ""]


def test_a_full_queue_says_when_to_come_again_and_who_leaves_makes_room(lms, engine, monkeypatch):
    with other(lms, engine) as server:
        worker = server.app.models[0].worker
        slow_down(monkeypatch, engine, 0.1)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=120) as first:
            lines = first.iter_lines()
            next(lines)
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=120):
                refused = post(server, BODY)
                assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert worker.in_use == 2
        wait_for(lambda: worker.in_use == 0)
        wait_for(lambda: not worker.engine.busy)
        assert post(server, BODY).status_code == 200
        assert post(server, BODY | {"n": 3}).status_code == 400


def test_a_client_that_leaves_before_its_answer_is_forgotten(lms, engine, monkeypatch):
    with other(lms, engine) as server:
        worker = server.app.models[0].worker
        slow_down(monkeypatch, engine, 0.1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": False}, timeout=1.0)
        wait_for(lambda: worker.in_use == 0 and not worker.engine.busy)


def test_what_takes_too_long_is_given_up(lms, engine, monkeypatch):
    with other(lms, engine, limits=RequestLimits(timeout=0.5)) as server:
        worker = server.app.models[0].worker
        slow_down(monkeypatch, engine, 0.2)
        assert post(server, LONG | {"stream": False}).status_code == 504
        *written, last, done, _ = post(server, LONG).text.split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "timeout" and f" {len(written)} of at most 80 tokens" in error["message"]
        assert done == "data: [DONE]"
        wait_for(lambda: worker.in_use == 0)


@pytest.mark.parametrize(("tokens", "timeout", "fails"), [(4, 600.0, False), (80, 0.2, True)])
def test_places_are_free_when_the_work_ends_or_its_time_though_nobody_reads(
    lms, engine, monkeypatch, tokens, timeout, fails
):
    """A client that stops reading keeps its connection for a while, but no place."""

    async def open_and_wait(worker):
        request = Request((5, 6), tokens, ignore_eos=True, n=1)
        stream = await worker.open([request], Caller("me", timeout)).start()
        while worker.in_use or worker.engine.busy:
            await asyncio.sleep(0.01)
        try:
            return sum([len(event.tokens) async for _, event in stream])
        finally:
            stream.close()

    with other(lms, engine) as server:
        slow_down(monkeypatch, engine, 0.02)
        worker = server.app.models[0].worker
        if fails:
            with pytest.raises(ApiError, match=r"of at most 80 tokens") as caught:
                asyncio.run(open_and_wait(worker))
            assert caught.value.status == 504
        else:
            assert asyncio.run(open_and_wait(worker)) == tokens
        assert worker.in_use == 0


def test_a_client_has_part_of_the_places(lms, engine, monkeypatch):
    keys = ApiKeys(["first-key", "other-key"])
    first, second = ({"Authorization": f"bearer  {key}"} for key in ("first-key", "other-key"))
    with other(lms, engine, keys=keys, client_places=1) as server:
        slow_down(monkeypatch, engine, 0.1)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, headers=first, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            refused = post(server, BODY, headers={"Authorization": "Bearer first-key"})
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "client_queue_full"
            assert refused.headers["retry-after"]
            assert post(server, BODY | {"n": 2}, headers=second).status_code == 400
            assert server.app.models[0].worker.in_use == 1


def test_without_max_tokens_the_default_counts_as_far_as_there_is_room(lms, engine):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0, "ignore_eos": True}
    with other(lms, engine, default_max_tokens=7) as server:
        for path, body in (("/v1/completions", {**BODY, "max_tokens": None, "ignore_eos": True}),
                           ("/v1/chat/completions", chat)):
            assert post(server, body, path).json()["usage"]["completion_tokens"] == 7
        assert post(server, chat | {"max_tokens": 3}, "/v1/chat/completions").json()["usage"]["completion_tokens"] == 3
        full = post(server, {**BODY, "prompt": "a" * 94, "max_tokens": None, "ignore_eos": True})
        assert full.json()["usage"]["completion_tokens"] == 2


class FailingEngine:
    """Fails at its first step."""

    busy = False

    def submit(self, request):
        self.busy = True
        return 0

    def step(self):
        raise RuntimeError("out of memory")

    def cancel(self, request_id):
        """Nothing is left to cancel."""


def test_an_engine_that_fails_is_made_anew(lms, engine):
    with other(lms, FailingEngine(), engine) as server:
        answer = post(server, BODY)
        assert answer.status_code == 500 and "out of memory" not in answer.text
        assert server.app.models[0].worker.engine is engine
        assert post(server, BODY).status_code == 200


def test_a_server_that_drains_ends_what_runs_and_refuses_the_rest(lms, engine, monkeypatch):
    goes_on, step, steps = threading.Event(), engine.step, itertools.count()
    monkeypatch.setattr(engine, "step", lambda: (next(steps) < 3 or goes_on.wait(60)) and step())
    with other(lms, engine, queue=4) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.app.draining = True
            refused = post(server, BODY)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert httpx.get(f"{server.url}/health").status_code == 503
            goes_on.set()
            assert list(lines)[-2] == "data: [DONE]"


def test_requests_at_once_get_what_they_get_alone(server):
    bodies = [BODY | {"prompt": prompt, "max_tokens": 6} for prompt in ("a", "the cat", "on and on", "what is it")]
    alone = [post(server, body).json()["choices"][0]["text"] for body in bodies]
    found = [""] * len(bodies)

    def ask(i):
        found[i] = post(server, bodies[i]).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_sources_are_named(tmp_path):
    directory = tmp_path / "some.d+model"
    directory.mkdir()
    assert ModelSource.parse(f"a={directory}") == ModelSource("a", str(directory))
    assert ModelSource.parse("a=runs/b") == ModelSource("a", "runs/b")
    assert ModelSource.parse("runs/b+runs/poems") == ModelSource("poems", "runs/b", "runs/poems")
    assert ModelSource.parse("hf://org/name") == ModelSource("name", "hf://org/name")
    with pytest.raises(UserError, match="NAME="):
        ModelSource.parse("a b=runs/c")
    with pytest.raises(UserError, match="NAME="):
        ModelSource.parse(str(directory))
