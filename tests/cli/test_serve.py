"""``jaxlm serve`` as a process: keys from its environment, the end by SIGTERM, and what users get wrong."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from jaxlm.nn.config import DecoderConfig  # noqa: E402
from tests.cli.commands import child_environment, save_model  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served") / "model", DecoderConfig, layers=1, max_positions=512)


def test_a_server_runs_until_it_is_told_to_end_and_then_ends_what_runs(model, tmp_path):
    command = [sys.executable, "-m", "jaxlm", "serve", f"small={model}", "--port", "0", "--slots", "1"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True,
            env=child_environment(JAXLM_API_KEYS="a-secret-key"),
        )
        try:
            url = process.stdout.readline().strip()
            body = {"model": "small", "prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 401
            headers = {"Authorization": "Bearer a-secret-key"}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert rest[-2] == "data: [DONE]" and '"finish_reason":"length"' in rest[-4]
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "a-secret-key" not in (tmp_path / "log").read_text()
    assert "SIGTERM" in (tmp_path / "log").read_text()


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
        ):
            status, _, err = jaxlm_command("serve", *words)
            assert (status, err.count("\n")) == (2, 1) and said in err, err
