"""``jaxlm serve``: keys from its environment, the end by SIGTERM, and what users get wrong."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from jaxlm.nn.config import DecoderConfig  # noqa: E402
from tests.cli.commands import save_model  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served") / "model", DecoderConfig, layers=1, max_positions=512)


def test_a_server_runs_until_it_is_told_to_end_and_then_ends_what_runs(jaxlm_command, model, monkeypatch):
    monkeypatch.setenv("JAXLM_API_KEYS", "a-secret-key")
    body = {"model": "small", "prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True}

    def ask():
        """Of the command's own standard output, where the address is; then the signal, while the answer is written."""
        end = time.monotonic() + 60
        while not (url := getattr(sys.stdout, "getvalue", str)().strip()):
            assert time.monotonic() < end
            time.sleep(0.02)
        try:
            refused = httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code
            headers = {"Authorization": "Bearer a-secret-key"}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                os.kill(os.getpid(), signal.SIGTERM)
                return refused, list(lines)
        except BaseException:
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the command has left the signal to others"))
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            status, out, err = jaxlm_command("serve", f"small={model}", "--port", "0", "--slots", "1")
            refused, rest = asked.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert refused == 401
    assert rest[-2] == "data: [DONE]" and '"finish_reason":"length"' in rest[-4]
    assert status == 0, err
    assert "a-secret-key" not in out + err and "SIGTERM" in err


def test_mistakes_are_one_line(jaxlm_command, model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, said in (
            ([model, "--port", port], "choose another --host or --port"),
            ([model, "--slots", 0], "--slots is 0"),
            ([model, model, "--port", 0], "a=model"),
            ([f"a b={model}", "--port", 0], "NAME="),
            ([tmp_path / "none", "--port", 0], "none"),
            ([model, "--api-keys", tmp_path / "none"], "No such file"),
            ([model, "--allow-origin", "example.org"], "example.org"),
        ):
            status, _, err = jaxlm_command("serve", *words)
            assert (status, err.count("\n")) == (2, 1) and said in err, err
