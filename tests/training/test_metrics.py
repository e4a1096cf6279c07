"""Metrics: FLOPs, speed, memory, and the rows of the log."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten
from jaxlm.training import metrics as metrics_module
from jaxlm.training.flops import peak_flops, step_flops
from jaxlm.training.metrics import MetricsWriter, Throughput, peak_memory_bytes, read_metrics
from jaxlm.training.run.reporter import Reporter

B, S, T = 4, 12, 10


def flops(config, **shapes):
    return step_flops(config, flatten(nn.abstract(config)[1]), shapes)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_flops(tied):
    """Written out by hand: 4 attention matrices with 2 of 4 heads for keys and values, 3 of SwiGLU, the head."""
    config = nn.DecoderConfig(
        vocab_size=50, width=16, heads=4, kv_heads=2, ffn=24, layers=3, windows=(0, 4), qkv_bias=True,
        tie_embeddings=tied,
    )
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24
    attention = 12 * 16 * (T + 4 + T)  # full, windowed, full
    assert flops(config, inputs=(B, T)) == B * T * (6 * (3 * layer + 16 * 50) + attention)


def test_translation_flops():
    """The encoder and the cross-attention's keys and values work on the source, the rest on the target."""
    config = nn.preset("tiny", vocab_size=50, width=16, heads=4, ffn=24, encoder_layers=2, decoder_layers=3)
    on_source = 2 * (4 * 256 + 2 * 16 * 24) + 3 * 2 * 256
    on_target = 3 * (4 * 256 + 2 * 256 + 2 * 16 * 24) + 16 * 50
    attention = 12 * 16 * (2 * S * S + 3 * T * T + 3 * T * S)
    assert flops(config, src=(B, S), inputs=(B, T)) == B * (6 * (on_source * S + on_target * T) + attention)


def test_lstm_flops():
    config = nn.LSTMConfig(vocab_size=50, width=16, layers=2)
    assert flops(config, inputs=(B, T)) == B * T * 6 * (2 * 2 * 16 * 64 + 16 * 50)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v5 lite", 197e12), ("cpu", None)],
)
def test_peak(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_meter(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    meter = Throughput(peak=1000.0)
    for _ in range(2):
        now[0] += 1
        meter.add(tokens=30, flops=500.0)
    with meter.paused():
        now[0] += 100
    assert meter.read() == {"step_ms": 1000.0, "tokens_per_second": 30.0, "mfu": 0.5}
    now[0] += 4
    meter.add(tokens=8, flops=0.0)
    assert meter.read() == {"step_ms": 4000.0, "tokens_per_second": 2.0, "mfu": 0.0}
    assert meter.read() == {"step_ms": None, "tokens_per_second": None, "mfu": None}


def test_rows_past_the_resumed_step_are_dropped(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.5 / step, "start": {"device": "cpu"}})
    writer.close()
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(log)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 2)
    writer.write({"step": 3, "loss": 0.25})
    writer.close()
    assert [json.loads(line)["loss"] for line in log.read_text().splitlines()] == [1.5, 0.75, 0.25]
    MetricsWriter(tmp_path, 0).close()
    assert read_metrics(log) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_said_in_one_line(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer._file = open("/dev/full", "w")
    with pytest.raises(UserError, match="no space left for .*metrics.jsonl"):
        writer.write({"step": 1})


def test_memory():
    assert peak_memory_bytes() > 1e7


def test_plain_progress(capsys):
    row = {"step": 40, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 12345.6, "step_ms": 50.0}
    for enabled in (True, False):
        reporter = Reporter(100, 0, enabled=enabled)
        reporter.advance(1)
        reporter.line("validation [loss]")
        reporter.train(row)
        reporter.train(row | {"step": 80, "loss": None, "step_ms": 3.7e5})
        reporter.close()
    assert capsys.readouterr().out.splitlines() == [
        "validation [loss]",
        "step 40/100  loss 2.5000  lr 1.00e-03  12,346 tokens/s  50.0 ms/step  eta 0:03",
        "step 80/100  loss (no update)  lr 1.00e-03  12,346 tokens/s  370000.0 ms/step  eta 2:03:20",
    ]
