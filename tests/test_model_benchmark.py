"""The parts of benchmarks/model.py that need neither llama.cpp nor a quiet machine."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from run_experiments.drawing import draw_stacks
from smoothquant import MixedQuantConfig, quantize

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import llamacpp
import model as benchmark
import token_parts

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | fields)).eval()


@pytest.mark.parametrize("vocabulary", [64, 97])
def test_log_probabilities_for_llama_perplexity(vocabulary):
    logits = 9 * torch.randn(5, vocabulary)
    rows = llamacpp.packed_log_probabilities(logits)
    assert rows.shape == (5, vocabulary + vocabulary % 2 + 4)
    scale, smallest = torch.from_numpy(rows[:, :4].copy().view(np.float32)).T[:, :, None]
    unpacked = scale * torch.from_numpy(rows[:, 4 : 4 + vocabulary].astype(np.float32)) + smallest
    lowest = logits.amax(-1, keepdim=True) - llamacpp.LOG_RANGE
    expected = logits.maximum(lowest) - logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(unpacked, expected, rtol=0, atol=16 / 65535)
    assert not llamacpp.packed_log_probabilities(torch.zeros(1, 64))[:, 4:].any()


def test_the_file_of_a_reference(tmp_path):
    windows = torch.arange(12).view(2, 6)
    logits = [torch.randn(5, 8), torch.randn(5, 8)]
    llamacpp.write_base_logits(tmp_path / "base", windows, logits, 8)
    data = (tmp_path / "base").read_bytes()
    assert data[:8] == b"_logits_"
    assert np.frombuffer(data[8:20], np.int32).tolist() == [6, 8, 2]
    assert np.frombuffer(data[20:68], np.int32).tolist() == list(range(12))
    rows = np.frombuffer(data[68:], np.uint16).reshape(2, 2, 12)  # positions 3 and 4 of each
    for window, packed in zip(logits, rows, strict=True):
        np.testing.assert_array_equal(packed, llamacpp.packed_log_probabilities(window[3:]))


def test_what_llama_perplexity_prints():
    printed = "Mean PPL(Q)  :  21.5 ±   1.2\nMean    KLD:   0.012345 ±   0.0003\n"
    values = llamacpp.parse_comparison(f"{printed}Same top p: 91.250 ± 0.6 %\n")
    assert values == {"perplexity": 21.5, "kl": 0.012345, "top1": 0.9125}
    with pytest.raises(RuntimeError, match=r"no comparison:\nMean PPL"):
        llamacpp.parse_comparison(printed)


def test_without_llama_cpp_the_error_says_how_to_build_it(tmp_path):
    with pytest.raises(RuntimeError, match=f"not built in {tmp_path}.*benchmarks/llamacpp.py"):
        llamacpp.version(tmp_path)


def test_a_program_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"failed \(3\):\nwhy"):
        llamacpp._run([sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="cannot be run"):
        llamacpp._run(["/nowhere/llama-bench"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "15"], "--prompt must be at least 16; got 15"),
        (["--new", "1"], "--new must be at least 2; got 1"),
        (["--batch", "0"], "--batch must be at least 1; got 0"),
        (["--turns", "0"], "--turns must be at least 1; got 0"),
        (["--windows", "-1"], "--windows must be at least 0; got -1"),
        (["--window", "1"], "--window must be at least 4; got 1"),
        (["--figure", "token"], "--figure needs --profile"),
        (["--contenders", "llama.cpp", "--llama-cpp", "/nowhere"], "not built in /nowhere"),
        (["--contenders", "W3A3"], "invalid choice: 'W3A3'"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.parse_args(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name, baseline", [("llama.cpp Q4_0", "llama.cpp"), ("fp32", "fp32")])
def test_the_gate_names_the_phases_that_are_too_slow(name, baseline):
    floors = benchmark.FLOORS[baseline]
    ours = {"contender": "W4A4", "ratio": dict(floors)}
    rows = [{"contender": name, "ratio": dict.fromkeys(floors, 1.0)}, ours]
    assert benchmark.too_slow(rows) == []
    ours["ratio"]["decode"] -= 0.01
    (line,) = benchmark.too_slow(rows)
    assert line.startswith("W4A4, decode: ") and line.endswith(f"at least {floors['decode']}")


def test_a_module_is_charged_without_the_modules_inside_it(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(token_parts.time, "perf_counter", lambda: float(next(now)))
    clock = token_parts.PartTimes()  # each call of the clock takes one second
    clock.enter("attention")
    clock.enter("linears")
    clock.leave()
    clock.leave()
    clock.put(torch.zeros(1))
    seconds = {"attention": 2.0, "linears": 1.0, token_parts.OTHER: 2.0}
    assert clock.at_token == [seconds]


def test_fused_layers_are_one_part():
    model = llama(pad_token_id=0, hidden_size=64, intermediate_size=96, head_dim=16)
    config = MixedQuantConfig(recipe="rtn", group_size=16, calibration="weights")
    quantize(model, config, progress=False)
    parts = token_parts.parts_of(model)
    assert parts == {"model": token_parts.LAYERS, "lm_head": token_parts.HEAD}
    layers = 4 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert layers / 8 < token_parts.weight_bytes(model, parts)[token_parts.LAYERS] < layers / 3
    seconds = token_parts.token_parts(model, torch.ones(1, 8, dtype=torch.long), 3)[1]
    assert seconds[token_parts.LAYERS] > 0 == seconds[token_parts.LINEARS]
    tied = llama(tie_word_embeddings=True, hidden_size=64, intermediate_size=96, head_dim=16)
    quantize(tied, config, progress=False)
    assert sorted(token_parts.parts_of(tied).values()) == sorted(parts.values())


@pytest.mark.parametrize("quantized", [False, True])
def test_the_parts_of_a_token(quantized):
    model = llama(pad_token_id=0)
    if quantized:
        config = MixedQuantConfig(
            recipe="rtn", group_size=16, calibration="weights", head="16bit", embeddings="16bit"
        )
        quantize(model, config, progress=False)
    parts = token_parts.parts_of(model)
    linears = [name for name, part in parts.items() if part == token_parts.LINEARS]
    assert len(linears) == 14
    assert parts["lm_head"] == token_parts.HEAD
    sizes = token_parts.weight_bytes(model, parts)
    assert sizes[token_parts.HEAD] == 4 * 97 * 48
    plain = 4 * 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 88)
    linears = sizes[token_parts.LINEARS]
    assert plain / 8 < linears < plain / 3 if quantized else linears == plain
    for seconds in token_parts.token_parts(model, torch.ones(1, 8, dtype=torch.long), 3):
        assert list(seconds) == list(token_parts.PARTS)
        assert all((value > 0) != (part == token_parts.LAYERS) for part, value in seconds.items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_drawing_of_stacked_bars(tmp_path):
    bars = {"one thread": {"linears": 2.0, "rest": 1.0}, "llama.cpp": {"all": 0.5}}
    picture = draw_stacks("A token", "here", "Milliseconds", bars, tmp_path / "token")
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "token.svg").read_text()
    assert all(text in drawn for text in ("one thread", "linears", "A token"))
    with open(tmp_path / "token.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["bar", "part", "Milliseconds"]
    assert rows == [
        ["one thread", "linears", "2.0"], ["one thread", "rest", "1.0"], ["llama.cpp", "all", "0.5"]
    ]  # fmt: skip
