"""The examples of docs/model.md run, and the benchmarks compare with the same numbers."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import Golden, relative_error

ROOT = Path(__file__).parents[2]


def test_every_example_of_the_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "model.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 9
    script = tmp_path / "examples.py"
    script.write_text("\n".join(blocks))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environment, check=True, timeout=100)


@pytest.mark.parametrize("name", ["default", "aloha"])
def test_the_plain_computation_of_the_benchmarks_is_exact(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    PlainModel = importlib.import_module("plain_model").PlainModel  # noqa: N806 -- a class

    golden = Golden(name)
    policy = golden.policy()
    plain, inputs = PlainModel(policy), policy.prepare_inputs(golden.batch)
    loss = plain.loss(inputs, golden.draw["noise"], golden.draw["time"])
    assert relative_error(loss, golden.expected("loss")) < 1e-5
    observed = {key: value for key, value in inputs.items() if key not in ("actions", "is_pad")}
    expected = policy.model.sample_actions(**observed, noise=golden.draw["noise"])
    found = plain.denoise(golden.draw["noise"], plain.encode(inputs))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("script", "flags", "names"),
    [
        (
            "model_step",
            [],
            {
                "step_speedup",
                "after_vision_speedup",
                "activation_memory_ratio",
                "repeated_noise_4_cost",
            },
        ),
        ("inference", [], {"denoise_speedup", "chunk_latency_s"}),
        (
            "device_step",
            ["--device", "cpu", "--batch", "2", "--backend", "aot_eager"],
            {"samples_per_s", "compile_speedup", "matrix_share", "chunk_latency_s"},
        ),
    ],
)
def test_the_last_line_of_a_benchmark_is_its_figures(script, flags, names, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module(script).main(["--quick", "--tiny", *flags])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert names <= set(figures)
    numbers = [value for value in figures.values() if not isinstance(value, str)]
    assert torch.tensor(numbers).isfinite().all()
