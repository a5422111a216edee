"""What the command lines say about mistakes: one line, in the words that the user typed."""

import dataclasses
import functools
import os
import re
import sys

import pytest
import typer
from length import at_length
from transformers.utils import logging
from typer.testing import CliRunner

import smoothquant.bundled
from run_experiments import runner
from run_experiments.run_experiments import main as sweep
from run_experiments.run_experiments import parse_args
from smoothquant import MixedQuantConfig, ppl_eval
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.calibration.tokens import calibration_batches
from smoothquant.checkpoints.folder import save_quantized
from smoothquant.cli import console
from smoothquant.cli.commands import app
from smoothquant.core.config import CHOICES
from smoothquant.core.messages import LONGEST, in_words, naming, one_line, option_words
from smoothquant.evaluation.perplexity import Evaluator
from smoothquant.in_memory import quantize

HUGE, DIGITS = str(10**30), "9" * 5000
NO_INTEGER = ["x", "", "1.5", "nan", DIGITS]
COUNT = [*NO_INTEGER, "0", "-1"]
NO_NUMBER = ["x", "", "nan", "inf", "-1", "1e400"]
TEXTS = ["", "no.txt", "folder.txt", "latin.txt", "x.md", "bad.jsonl", "bad.parquet", "\0.txt"]
TEXTS += ["a" * 5000 + ".txt", "a\nb.txt", "\udcff.txt"]
MODELS = ["", "no/such/model", "folder.txt", "broken", "a" * 5000, "a\nb", "\0", "/", "\udcff"]
FOLDERS = ["no", "folder.txt", "broken", "a" * 5000, "a\nb", "\0", "latin.txt"]
TAKEN = ["", ".", "/", "folder.txt/../broken", "latin.txt", "latin.txt/x", "a" * 5000, "\0"]

# Bad values of every parameter of every command, by the parameter's name.
BAD = {
    "model": MODELS,
    "source": MODELS,
    "folder": FOLDERS,
    "target": TAKEN,
    "output": ["s.pt", "", "latin.txt/x.safetensors", "a" * 5000 + ".safetensors", "\0"],
    "prompt": ["\udcff", "the " * 3000],
    "calibration": [*TEXTS, "empty.txt", "short.txt"],
    "stats": [*TEXTS, "bad.safetensors", "bad.pt"],
    "text": [*TEXTS, "empty.txt", "short.txt"],
    "compare": MODELS,
    "config_file": ["", "no.toml", "x.md", "folder.txt", "bad.toml", "list.json", "other.yaml"],
    "device": ["gpu", ""],
    "kv_cache": ["int2", "8"],
    "dtype": ["int8", ""],
    "ignore": ["", "nothing", "re:(", "x" * 4000],
    "recipe": ["worst", ""],
    "to": ["onnx", ""],
    "round_to": ["q2", ""],
    "group_size": [*COUNT, HUGE],
    "calibration_tokens": [*COUNT, HUGE],
    "windows": [*COUNT, HUGE],
    "seq_len": [*COUNT, "1", "2049", HUGE],
    "max_new_tokens": [*COUNT, "2048", HUGE],
    "new": [*COUNT, "1", "2048", HUGE],
    "salient_prop": [*NO_NUMBER, "2"],
    "bits": [*NO_NUMBER, "33", "1"],
    "temperature": [*NO_NUMBER, "1e-300"],
    "seed": NO_INTEGER,
    "fields": ["", "=", "x", "=1", "x=1", "a\nb=1", "x" * 4000 + "=1", "sort=" + "[" * 5000]
    + [
        f"{field.name}={value}"
        for field in dataclasses.fields(MixedQuantConfig)
        for value in at_length(['""', "[]", "{}", "NaN", "-1", DIGITS], ["{}"])
        if (field.name, value) not in [("calibration", '""'), ("calibration", "[]")]
    ],
}
PROMPT_TOKENS = [*COUNT, "1", "2048", HUGE]  # `bench --prompt`

COMMANDS = typer.main.get_command(app).commands
REST = {
    "calibrate": ["tiny-opt", "s.safetensors"],
    "quantize": ["tiny-opt", "out"],
    "dequantize": ["quantized", "out"],
    "export": ["quantized", "out", "--format", "compressed-tensors"],
    "inspect": ["quantized"],
    "verify": ["quantized"],
    "eval": ["tiny-opt"],
    "generate": ["tiny-opt", "the"],
    "bench": ["quantized"],
}
# Names that a message may hold: what `--set` takes.
KNOWN = {field.name for field in dataclasses.fields(MixedQuantConfig)}
KNOWN |= {choice for choices in CHOICES.values() for choice in choices}
SNAKE = re.compile(r"'[^']*'|\"[^\"]*\"|(?<![\w./-])[a-z]+(?:_[a-z0-9]+)+\b(?!\.\w)")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a quantized model and with files that are no good."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("folder.txt", "broken"):
        (folder / name).mkdir()
    (folder / "broken" / "config.json").write_text("nonsense")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    for name in ("empty.txt", "x.md"):
        (folder / name).write_text("")
    (folder / "short.txt").write_text("some words\n")
    (folder / "bad.jsonl").write_text("{\n")
    for name in ("bad.parquet", "bad.safetensors", "bad.pt", "bad.toml"):
        (folder / name).write_bytes(b"x")
    (folder / "list.json").write_text("[1]")
    (folder / "other.yaml").write_text("surprise: 1")
    model, tokenizer = load_bundled("tiny-opt")
    quantize(model, MixedQuantConfig(), progress=False)
    save_quantized(model, folder / "quantized", tokenizer)
    return folder


one_model = functools.cache(load_bundled)


@pytest.fixture(autouse=True)
def in_folder(files, monkeypatch):
    """Runs in that folder, with one copy of the model and a part of the texts."""
    monkeypatch.chdir(files)
    for module in (smoothquant.bundled, ppl_eval, runner):
        monkeypatch.setattr(module, "wikitext", lambda split: wikitext(split)[:200])
    monkeypatch.setattr(smoothquant.bundled, "load_bundled", one_model)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def foreign_words(line, words, known=frozenset()):
    """The names of Python arguments in a message that the user did not type."""
    found = {word for word in SNAKE.findall(line) if word[0] not in "'\""}
    return [word for word in found - known if word not in " ".join(words)]


def check(command_line, words, known=KNOWN):
    """Runs a command that must refuse its arguments; returns the message."""
    words = list(map(str, words))
    result = CliRunner().invoke(command_line, words)
    shown = f"{[word[:80] for word in words]}: {result.stderr}"
    assert isinstance(result.exception, SystemExit), f"{shown} {result.exception!r}"
    assert result.exit_code in (1, 2), shown
    lines = result.stderr.splitlines()
    if result.exit_code == 2:
        assert lines[0].startswith("Usage: ") and len(lines[-1]) < 350, shown
        assert sum(line.startswith("Error: ") for line in lines) == 1, shown
    else:
        assert len(lines) == 1 and lines[0].startswith("smoothquant: error: "), shown
        assert len(lines[0]) <= 300, shown
    assert not foreign_words(lines[-1], words, known), shown
    return lines[-1]


def values_of(command, parameter):
    if (command, parameter.name) == ("bench", "prompt"):
        return PROMPT_TOKENS
    if command in ("dequantize", "export") and parameter.name == "source":
        return FOLDERS
    return BAD[parameter.name]


PARAMETERS = [
    (name, parameter)
    for name in REST
    for parameter in COMMANDS[name].params
    if not getattr(parameter, "is_flag", False)
]


@pytest.mark.parametrize(
    "name, parameter", PARAMETERS, ids=[f"{name}-{p.name}" for name, p in PARAMETERS]
)
def test_every_bad_value_is_refused_in_the_users_words(name, parameter, files):
    for value in values_of(name, parameter):
        words = [name, *REST[name]]
        if parameter.param_type_name == "argument":
            places = [p.name for p in COMMANDS[name].params if p.param_type_name == "argument"]
            words[1 + places.index(parameter.name)] = value
        else:
            words += [max(parameter.opts, key=len), value]
        if name == "quantize" and parameter.name not in ("calibration", "calibration_tokens"):
            words += [] if parameter.name in ("stats", "fields") else ["--no-calibration"]
        check(app, words)
    assert not [path for path in files.iterdir() if path.name in ("out", "s.safetensors")]


def test_the_sweep_knows_every_command():
    assert set(COMMANDS) == {*REST, "doctor", "lm-eval", "plot", "serve", "sweep"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["eval", "tiny-opt", "--windows", 10**6], "--windows must be at most "),
        (["eval", "tiny-opt", "--seq-len", 2049], "--seq-len must be at most 2048"),
        (["generate", "tiny-opt", "a " * 2500], "PROMPT + --max-new-tokens must be at most 2048"),
        (["bench", "quantized", "--prompt", 2040], "--prompt + --new must be at most 2048"),
        (["quantize", "tiny-opt", "q", "--group-size", 0], "--group-size must be"),
        (["quantize", "no/such/model", "q"], "SRC must be one of"),
        (["eval", "no/such/model"], "MODEL must be one of"),
        (["eval", "tiny-opt", "--compare", "no/such/model"], "--compare must be one of"),
        (["eval", "tiny-opt", "--text", "no.txt"], "--text: no such file: 'no.txt'"),
        (["calibrate", "tiny-opt", "s.safetensors", "--calibration", "no.txt"], "--calibration: "),
        (
            ["calibrate", "tiny-opt", "s.safetensors", "--calibration", "short.txt"],
            "--calibration-tokens must be at most 7, the number of tokens in the calibration",
        ),
        (["dequantize", "no", "q"], "FOLDER must be a quantized model folder"),
        (
            ["quantize", "tiny-opt", "q", "--bits", 5, "--salient-prop", 0.1],
            "--salient-prop and --bits exclude each other",
        ),
        (["a\nb"], "No such command"),
        (["x" * 5000], "No such command"),
        (["eval", "tiny-opt", "--no\nsuch"], "No such option"),
    ],
)
def test_messages_name_options(words, message):
    assert message in check(app, words)


def test_errors_of_libraries_are_folded_and_shortened(monkeypatch):
    def fail(*_):
        raise OSError("first\n\n  second\x1b[31m " + "very long " * 500 + "end")

    monkeypatch.setattr(smoothquant.bundled, "_load_folder", fail)
    line = check(app, ["eval", "some/model"])
    assert line.startswith("smoothquant: error: MODEL: cannot load 'some/model': first second\\x1b")
    assert line.endswith("very long end")


# ---- Tokenizers and models that do not belong together


@pytest.fixture
def small_model(monkeypatch, make_model):
    """tiny-opt's tokenizer with a model of 96 tokens, wherever a model is loaded."""
    tokenizer = load_bundled("tiny-opt")[1]
    pair = make_model("opt", max_position_embeddings=2048), tokenizer
    monkeypatch.setattr(smoothquant.bundled, "load_model", lambda *_, **__: pair)
    return pair


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "tiny-opt", "--windows", 1],
        ["generate", "tiny-opt", "the game"],
        ["calibrate", "tiny-opt", "s.safetensors", "--calibration-tokens", 64],
        ["quantize", "tiny-opt", "out", "--calibration-tokens", 64],
        ["bench", "quantized", "--prompt", 8],
    ],
    ids=lambda words: words[0],
)
def test_a_tokenizer_bigger_than_its_model_is_named(words, small_model, monkeypatch):
    model, tokenizer = small_model
    monkeypatch.setattr("smoothquant.checkpoints.folder.load_quantized", lambda folder: model)
    monkeypatch.setattr("smoothquant.models.loading.load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr("smoothquant.evaluation.speed.layer_speeds", lambda config: [])
    assert re.search(r"model has 96 token ids, but .* gave id \d+", check(app, words))


def test_a_tokenizer_bigger_than_its_model_is_a_value_error(small_model):
    model, tokenizer = small_model
    config = MixedQuantConfig(calibration=wikitext("validation")[:50], calibration_tokens=64)
    with pytest.raises(ValueError, match="model has 96 token ids"):
        calibration_batches(model, tokenizer, config)
    with pytest.raises(ValueError, match="model has 96 token ids"):
        quantize(model, config, tokenizer=tokenizer)
    evaluator = Evaluator(wikitext("test")[:50], tokenizer, n_samples=1, seq_len=8)
    with pytest.raises(ValueError, match="model has 96 token ids"):
        evaluator.evaluate(model)


# ---- Sweeps and ppl_eval

TINY = ["--preset", "tiny", "--output", "store", "--figures", "figures"]
NOT_NAMED = ("--model", "--set", "--cells", "--output", "--keep")
SWEEP = {
    "--preset": ["huge", ""],
    "--model": MODELS,
    "--group-sizes": [*COUNT, HUGE],
    "--salient-props": ["x", "", "nan", "-1", "2"],
    "--sorts": ["", "size", "a" * 5000],
    "--backends": ["", "int5"],
    "--recipes": ["", "good"],
    "--methods": ["", "magic"],
    "--set": BAD["fields"][:8],
    "--windows": ["x", "", "0", "-1", HUGE],
    "--seqlen": [*COUNT, "1", "2049", HUGE],
    "--calibration-blocks": [*COUNT, HUGE],
    "--calibration-block-size": [*COUNT, "2049", HUGE],
    "--gptq-blocks": COUNT,
    "--seed": NO_INTEGER,
    "--layers": [*NO_INTEGER, "-1", "100000"],
    "--dtype": ["", "int8"],
    "--output": ["latin.txt", "latin.txt/x", "a" * 5000, "\0"],
    "--keep": ["latin.txt", "a" * 5000, "\0"],
    "--cells": ["no.jsonl", "folder.txt", "latin.txt", "bad.jsonl"],
    "--threads": COUNT,
    "--executor": ["", "cloud", "dask://host", "\n"],
    "--jobs": COUNT,
    "--budget": ["", "x", "0", "-1m", "nan"],
    "--slurm": ["", "x", "=1", "time=1"],
}


@pytest.mark.parametrize("option", SWEEP)
def test_sweeps_refuse_bad_values_in_the_users_words(option, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run_cell", None)
    for value in SWEEP[option]:
        words = [*TINY, option, value] + (["--search"] if option == "--budget" else [])
        try:
            code = sweep(words)
        except SystemExit as stop:
            code = stop.code
        _, found, line = capsys.readouterr().err.splitlines()[-1].partition("error: ")
        assert code in (1, 2) and found and len(line) <= 300, value
        assert not foreign_words(line, words, KNOWN), value
        # the option itself, unless a library says more about the file
        assert option in line or option in NOT_NAMED, line


def test_the_sweep_of_sweeps_knows_every_option():
    words = parse_args([]).words
    own = {words[name] for name in words} - {"--help", "--plot", "--search", "--figures"}
    assert own == set(SWEEP)


PPL = {
    "--model_path": MODELS,
    "--act_scales_path": [*TEXTS, "bad.pt"],
    "--alpha": NO_NUMBER,
    "--num_bits": [*COUNT, "9"],
    "--group_size": [*COUNT, HUGE],
    "--salient_prop": [*NO_NUMBER, "2"],
    "--sort": ["", "size"],
    "--backend": ["", "int5"],
    "--calibration_path": [*TEXTS, "empty.txt", "short.txt"],
    "--calibration_blocks": COUNT,
    "--dataset_path": [*TEXTS, "empty.txt", "short.txt"],
    "--n_samples": [*COUNT, HUGE],
    "--seq_len": [*COUNT, "1", "2049", HUGE],
}


@pytest.mark.parametrize("option", PPL)
def test_ppl_eval_refuses_bad_values(option):
    for value in PPL[option]:
        words = ["--model_path", "tiny-opt", "--quantize", "--smooth"]
        words += [option, value]
        if option != "--act_scales_path":
            words.remove("--smooth")
        check(ppl_eval.app, words, KNOWN)


def test_ppl_eval_reports_what_is_no_mistake_with_code_1(monkeypatch):
    def fail(*_):
        raise RuntimeError("no\npackage")

    monkeypatch.setattr(ppl_eval, "load_model", fail)
    result = CliRunner().invoke(ppl_eval.app, ["--model_path", "tiny-opt"])
    assert (result.exit_code, result.stderr) == (1, "Error: no package\n")


# ---- The mechanism

WORDS = {"seq_len": "--seq-len", "prompt": "PROMPT", "new": "--new", "bits": "--bits"}


@pytest.mark.parametrize(
    "message, shown",
    [
        ("seq_len must be >= 2; got 1", "--seq-len must be >= 2; got 1"),
        ("prompt + new must be at most 5", "PROMPT + --new must be at most 5"),
        (
            "bits must be at least 4 bits; got bits=2",
            "--bits must be at least 4 bits; got --bits=2",
        ),
        ("the prompt is new", "the prompt is new"),
        ("x: 'seq_len' in /a/seq_len/b.seq_len", "x: 'seq_len' in /a/seq_len/b.seq_len"),
        ("the model's seq_len isn't known", "the model's --seq-len isn't known"),
        ("", ""),
    ],
)
def test_names_of_arguments_become_options(message, shown):
    assert in_words(message, WORDS) == shown


def test_option_words_come_from_the_parameters():
    words = option_words(COMMANDS["quantize"].params)
    assert words["group_size"] == "--group-size" and words["name_or_folder"] == "SRC"
    assert option_words(COMMANDS["generate"].params)["max_new_tokens"] == "--max-new-tokens"
    assert option_words(COMMANDS["bench"].params)["folder"] == "FOLDER"
    assert parse_args([]).words["layer_windows"] == "--layers"


def test_one_line():
    assert one_line(OSError(28, "No space left", "x")) == "No space left: 'x'"
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line(ValueError("a\n b\tc\x00")) == "a b c\\x00"
    assert len(one_line(ValueError("name, " * 1000))) <= LONGEST
    long = one_line(ValueError(f"first: {'x' * 5000} last"))
    assert long.startswith("first: xxx") and long.endswith("xxx last") and len(long) <= LONGEST


def test_naming_keeps_the_kind_of_error():
    with pytest.raises(ValueError, match="^text: "), naming(source="text"):
        raise ValueError("source: m")
    with pytest.raises(TypeError, match="^text must"), naming(source="text"):
        raise TypeError("source must")


def test_logs_get_no_progress_bars(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    console.prepare_streams()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
