"""The measurement for GPUs runs where there is none: on the CPU, and on the simulated device up to the export."""

from __future__ import annotations

import re

from agent.config import Config
from tests.bench import bench_gpu
from tests.simulated_cuda import simulated_cuda
from tests.tiny import tiny_clip

SMALL = Config.model_validate(
    {"method": {"gapstream": {"features": 64}, "mgclip": {"batch_size": 8}}, "release": {"max_batch": 4}}
)
PHASES = ("decoding alone", "frozen part alone", "decoding and frozen part", "adapters", "statistics", "export")


def test_every_phase_is_measured_on_a_cpu(capsys):
    bench_gpu.measure(tiny_clip(), SMALL, 20)
    out = capsys.readouterr().out
    for name in PHASES:
        seconds, rate = re.search(rf"^{name}.*? ([\d.]+) +(\d+) +\d+$", out, re.MULTILINE).groups()
        assert float(seconds) >= 0 and int(rate) > 0, name
    assert re.search(r"adapters: [\d.]+ ms a step of 8 images, \d+ images/s, [\d.e-]+ TFLOP, [\d.]+% of the peak", out)


def test_so_it_is_on_the_simulated_device(capsys, monkeypatch):
    monkeypatch.setattr(bench_gpu, "export", lambda *parts: {"trace": 0.0})  # tested above
    monkeypatch.setattr(bench_gpu, "matmul_flops", lambda device: 1e12)  # of matrices that are too large for a CPU
    with simulated_cuda():
        bench_gpu.measure(tiny_clip(device="cuda", precision="auto"), SMALL, 20)
    out = capsys.readouterr().out
    assert all(f"\n{name}" in out for name in PHASES) and "% of the peak" in out
