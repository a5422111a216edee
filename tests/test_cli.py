"""The command line: what it answers, with which exit code, and what it leaves behind."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from spoil import put, set_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging
from typer.testing import CliRunner

import smoothquant.bundled
from smoothquant import load_quantized, load_stats
from smoothquant.bundled import DATA, load_bundled, load_model, wikitext
from smoothquant.calibration import get_act_scales, save_act_scales
from smoothquant.checkpoints import folder as checkpoint
from smoothquant.cli.commands import app
from smoothquant.core.config import read_fields
from smoothquant.layers.linear import QuantizedLinear
from smoothquant.model_size import Byte, get_model_size
from smoothquant.quantization.undo import dequantize

TOKENS = ("--calibration-tokens", "512")
LAYER = "model.decoder.layers.1.fc2"


def answer(*words, code=0):
    """Runs a command in this process; its result has stdout and stderr."""
    result = CliRunner().invoke(app, list(map(str, words)))
    unforeseen = result.exception and not isinstance(result.exception, SystemExit)
    assert not unforeseen, result.exception
    assert result.exit_code == code, result.output
    if code == 1:
        assert result.stderr.splitlines()[-1].startswith("smoothquant: error: ")
    return result


def program(*words, **environment):
    """Runs a command as users do, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "smoothquant", *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A quantized tiny-opt, with salient channels."""
    target = tmp_path_factory.mktemp("cli") / "q"
    answer("quantize", "tiny-opt", target, "--group-size", 32, *TOKENS)
    return target


@pytest.fixture(scope="module")
def plain_order(tmp_path_factory):
    """A quantized tiny-opt that other formats can express."""
    target = tmp_path_factory.mktemp("cli") / "q"
    words = ("--recipe", "rtn", "--no-calibration", "--salient-prop", 0, "--group-size", 32)
    words += ("--set", "sort=none")
    answer("quantize", "tiny-opt", target, *words)
    return target


# ---- The program


def test_help_and_version_do_not_wait_for_torch(run_python):
    found = run_python(
        "import sys\n"
        "from smoothquant.cli import app\n"
        "from typer.testing import CliRunner\n"
        "names = [c.name or c.callback.__name__ for c in app.registered_commands]\n"
        "own = [n for n in names if n not in ('sweep', 'plot', 'lm-eval')]\n"
        "for words in [[], ['--version']] + [[n] for n in own]:\n"
        "    words = words if words == ['--version'] else [*words, '--help']\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 0 and result.stdout, words\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "import smoothquant\n"
        "assert callable(smoothquant.quantize) and callable(smoothquant.dequantize)\n"
        "import torch; torch.ops.mixedquant.w4a4_linear\n"
        "print(*names)"
    )
    assert set(found.stdout.split()) == {
        "bench", "calibrate", "dequantize", "doctor", "eval", "export", "generate", "inspect",
        "lm-eval", "plot", "quantize", "serve", "sweep", "verify",
    }  # fmt: skip


def test_the_program_quantizes_and_checks(tmp_path):
    words = ("--no-calibration", "--set", "salient_format=int8")
    made = program("quantize", "tiny-opt", tmp_path / "q", *words)
    assert made.returncode == 0, made.stderr
    assert f"The quantized model is in {tmp_path / 'q'}" in made.stdout
    assert "quantizing" not in made.stderr  # no progress bar in a log
    checked = program("verify", tmp_path / "q", "--json")
    assert checked.returncode == 0 and json.loads(checked.stdout)["ok"] is True
    absent = program("verify", tmp_path / "absent")
    assert absent.returncode == 1 and absent.stdout == ""
    assert absent.stderr.startswith("smoothquant: error: FOLDER must be a quantized model folder")
    assert len(absent.stderr.splitlines()) == 1


def test_ctrl_c_answers_130_and_leaves_nothing(tmp_path):
    target, texts = tmp_path / "made" / "q", tmp_path / "some.txt"
    texts.write_text("\n".join(wikitext("validation")[:400]))
    words = ["quantize", "tiny-opt", str(target), "--recipe", "best", "--calibration", str(texts)]
    words += ["--calibration-tokens", "8192"]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # else it has no columns
    with subprocess.Popen(
        [sys.executable, "-m", "smoothquant", *words],
        stderr=end,
        # a shell has its background jobs ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.close(end)
        said = b""
        while b"calibrating" not in said:  # the progress bar, which is shown in terminals alone
            said += os.read(terminal, 64)  # OSError once the program has ended
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while part := os.read(terminal, 1024):
                said += part
    os.close(terminal)
    assert process.returncode == 130, said
    assert said.endswith(b"\r\nsmoothquant: interrupted\r\n")
    assert list(tmp_path.iterdir()) == [texts]


@pytest.mark.long
def test_a_reader_that_leaves_is_no_fault(folder):
    command = f"{sys.executable} -m smoothquant inspect {folder} | head -n 1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert found.stdout.startswith("folder") and "error" not in found.stderr


def test_shells_complete_commands():
    found = program(
        _SMOOTHQUANT_COMPLETE="complete_bash", COMP_WORDS="smoothquant in", COMP_CWORD="1"
    )
    assert found.stdout.split() == ["inspect"]


def test_wrong_usage_answers_2(tmp_path):
    for words in (
        ["nonsense"],
        ["quantize", "tiny-opt"],
        ["quantize", "tiny-opt", tmp_path / "q", "--recipe", "worst"],
        ["quantize", "tiny-opt", tmp_path / "q", "--group-size", "many"],
        ["quantize", "tiny-opt", tmp_path / "q", "--no-calibration", "--stats", "x"],
        ["export", tmp_path, tmp_path / "x", "--format", "onnx"],
        ["generate", "tiny-opt", "text", "--max-new-tokens", 0],
        ["inspect", tmp_path, "--quiet", "--verbose"],
        ["quantize", "tiny-opt", tmp_path / "q", "--by-layer", "--dtype", "float32"],
        ["quantize", "tiny-opt", tmp_path / "q", "--by-layer", "--device", "auto"],
    ):
        assert "Usage: " in answer(*words, code=2).stderr
    assert not any(tmp_path.iterdir())


# ---- quantize


@pytest.mark.parametrize(
    "words, message",
    [
        (["--group-size", 0], "--group-size must be"),
        (["--salient-prop", 2], "--salient-prop must be in [0, 1]; got 2.0"),
        (["--set", "nonsense"], "'nonsense' is not FIELD=VALUE"),
        (["--set", "surprise=1"], "unknown MixedQuantConfig field(s): surprise"),
        (["--recipe", "best", "--no-calibration"], "needs calibration"),
        (["--calibration", "nowhere.txt"], "no such file: 'nowhere.txt'"),
        (["--stats", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--calibration-tokens", 10**7], "--calibration-tokens must be at most"),
    ],
)
def test_quantize_refuses_in_one_line_and_writes_nothing(words, message, tmp_path):
    result = answer("quantize", "tiny-opt", tmp_path / "q", *words, code=1)
    assert message in result.stderr.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_quantize_takes_no_folder_that_is_taken(folder, tmp_path):
    taken = shutil.copytree(folder, tmp_path / "q")
    words = ("quantize", "tiny-opt", taken, "--no-calibration", "--bits", 6)
    assert "folder already exists" in answer(*words, code=1).stderr
    assert load_quantized(taken).mixedquant_config.group_size == 32
    answer(*words, "--overwrite")
    assert load_quantized(taken).mixedquant_config.bits == 6
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    save = PreTrainedModel.save_pretrained

    def fail(*args, **kwargs):
        save(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    result = answer("quantize", "tiny-opt", tmp_path / "q", "--no-calibration", code=1)
    assert "No space left on device" in result.stderr
    assert not any(tmp_path.iterdir())


def test_dry_run_tells_what_quantize_makes(folder, tmp_path):
    words = ("quantize", "tiny-opt", tmp_path / "q", "--group-size", 32, *TOKENS)
    dry = answer(*words, "--dry-run")
    assert not any(tmp_path.iterdir())
    assert "group_size          32" in dry.stdout
    total = next(line for line in dry.stdout.splitlines() if line.startswith("total "))
    after = total.split()[-1].replace(",", "")
    assert int(after) * Byte == get_model_size(load_quantized(folder))


def test_modules_are_left_out(tmp_path):
    words = ("quantize", "tiny-opt", tmp_path / "q", "--no-calibration", "--ignore", "fc1")
    printed = answer(*words, "--ignore", "re:.*layers[.]0[.]").stdout
    names = load_quantized(tmp_path / "q").mixedquant_config.ignore
    assert names == ("fc1", "re:.*layers[.]0[.]")
    layers = json.loads(answer("inspect", tmp_path / "q", "--json").stdout)["layers"]
    quantized = {layer["name"] for layer in layers if layer["action"] == "quantized"}
    quantized.remove("model.decoder.embed_tokens.packed")
    assert len(quantized) == 3 * 5 and not any("fc1" in name or ".0." in name for name in quantized)
    assert "% of the weights are quantized: " in printed
    answer(*words, "--ignore", "fc3", code=1)


def test_quantize_calibrates_and_takes_a_tokenizer_along(folder):
    model, tokenizer = load_model(folder)
    assert tokenizer("some words").input_ids == load_bundled("tiny-opt")[1]("some words").input_ids
    config = model.mixedquant_config
    assert config.calibration == "wikitext2" and config.calibration_tokens == 512


@pytest.mark.long
@pytest.mark.parametrize("calibration", [("--no-calibration",), TOKENS])
def test_by_layer_gives_the_same_model(calibration, tmp_path):
    words = ("quantize", DATA / "tiny-opt")
    for name, how in (("whole", ()), ("layers", ("--by-layer",))):
        answer(*words, tmp_path / name, "--group-size", 32, *calibration, *how)
    whole, layers = (load_quantized(tmp_path / name) for name in ("whole", "layers"))
    assert list(layers.state_dict()) == list(whole.state_dict())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(layers.state_dict()[name], tensor), name
    assert load_model(tmp_path / "layers")[1]("some words").input_ids
    answer(*words, tmp_path / "q", "--by-layer", "--fold", code=2)
    answer(*words, tmp_path / "q", "--spill", code=2)


def test_dry_run_by_layer_says_the_same_and_holds_no_weights(tmp_path, monkeypatch):
    shares = ("--set", "salient_allocation=output")  # needs statistics, which are to come
    words = ("quantize", DATA / "tiny-opt", tmp_path / "q", "--dry-run", *shares, *TOKENS)
    whole = answer(*words).stdout.partition("peak memory")
    monkeypatch.setattr(torch, "frombuffer", None)
    layers = answer(*words, "--by-layer").stdout.partition("peak memory")
    assert layers[0] == whole[0]
    assert "float model" in whole[2] and "float model" not in layers[2]
    assert "hidden states" in layers[2]
    assert "hidden states" not in answer(*words, "--by-layer", "--spill").stdout
    assert not any(tmp_path.iterdir())


def test_statistics_come_from_a_file(folder, tmp_path):
    answer("calibrate", "tiny-opt", tmp_path / "s.safetensors", *TOKENS)
    assert len(load_stats(tmp_path / "s.safetensors")) == 25  # 24 linears and the head
    assert (
        "already exists"
        in answer("calibrate", "tiny-opt", tmp_path / "s.safetensors", *TOKENS, code=1).stderr
    )
    assert "must end in" in answer("calibrate", "tiny-opt", tmp_path / "s.pt", code=1).stderr
    words = ("--group-size", 32, "--stats", tmp_path / "s.safetensors")
    answer("quantize", "tiny-opt", tmp_path / "q", *words)
    own, other = load_quantized(folder).state_dict(), load_quantized(tmp_path / "q").state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_published_activation_scales_are_statistics(tmp_path):
    model, tokenizer = load_bundled("tiny-opt")
    scales = get_act_scales(model, tokenizer, ["some words to calibrate on"] * 3, seq_len=16)
    save_act_scales(scales, tmp_path / "tiny.pt")
    answer("quantize", "tiny-opt", tmp_path / "q", "--stats", tmp_path / "tiny.pt")
    layer = load_quantized(tmp_path / "q").get_submodule(LAYER)
    largest = scales[LAYER].topk(layer.num_salient).indices
    assert set(largest.tolist()) == set(layer.perm[-layer.num_salient :].tolist())


@pytest.mark.parametrize("how", [(), ("--by-layer",)])
def test_quantize_ends_with_what_it_made_and_the_next_command(how, tmp_path):
    words = ("quantize", "tiny-opt", tmp_path / "q", "--no-calibration", *how)
    printed = answer(*words).stdout
    for part in (" bits per quantized weight", " times smaller than tiny-opt, after ", " s\n"):
        assert part in printed
    want = f"Next: smoothquant eval {tmp_path / 'q'} --windows 8 --compare tiny-opt"
    assert printed.splitlines()[-1] == want
    found = json.loads(answer(*words, "--overwrite", "--json").stdout)
    size = get_model_size(load_quantized(tmp_path / "q")) // Byte
    assert found["bytes"] == size and found["ratio"] == found["bytes_before"] / size > 1
    assert f"{found['ratio']:.2f} times" in printed and 0.9 < found["share_quantized"] <= 1
    logging.disable_progress_bar()  # as --quiet does before transformers is imported
    quiet = answer(*words, "--overwrite", "--quiet")
    logging.enable_progress_bar()
    assert quiet.stdout == quiet.stderr == ""


def test_fields_come_from_a_file_and_options_override_it(tmp_path):
    (tmp_path / "c.yaml").write_text("group_size: 64\nsalient_prop: 0.1\nsort: max\nrecipe: rtn\n")
    words = ("quantize", "tiny-opt", tmp_path / "q", "--dry-run", "--json", "--no-calibration")
    words += ("--config", tmp_path / "c.yaml", "--salient-prop", 0.05, "--set", "sort=none")
    config = json.loads(answer(*words).stdout)["config"]
    found = {name: config[name] for name in ("group_size", "salient_prop", "sort", "recipe")}
    assert found == {"group_size": 64, "salient_prop": 0.05, "sort": "none", "recipe": "rtn"}
    assert config["calibration"] == "weights"


@pytest.mark.parametrize("suffix, text", [("toml", 'sort = "max"'), ("json", '{"sort": "max"}')])
def test_files_of_fields(suffix, text, tmp_path):
    path = tmp_path / f"c.{suffix}"
    path.write_text(text)
    if suffix == "toml" and sys.version_info < (3, 11):
        with pytest.raises(RuntimeError, match="needs Python 3.11"):
            read_fields(path)
    else:
        assert read_fields(path) == {"sort": "max"}


def test_quiet_and_json_are_everywhere(folder, tmp_path):
    passed_on = ("lm-eval", "serve", "sweep", "plot")
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        names = {option for parameter in command.params for option in parameter.opts}
        assert ({"--json", "--quiet", "--verbose"} <= names) == (name not in passed_on)
    assert answer("inspect", folder, "--quiet").stdout == answer("inspect", folder).stdout
    found = json.loads(answer("inspect", tmp_path / "no", "--json", code=1).stdout)
    assert found["ok"] is False and "FOLDER must be a quantized model folder" in found["error"]
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "no"), "--verbose"])
    assert isinstance(result.exception, ValueError)


def test_device_and_dtype(folder, monkeypatch):
    words = ("generate", "tiny-opt", "The game was", "-n", 4, "--json")
    found = [json.loads(answer(*words, "--device", d).stdout) for d in ("cpu", "auto")]
    assert found[0] == found[1] and found[0]["new_tokens"] == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = answer(*words, "--device", "cuda", code=1).stderr
    assert "--device cuda cannot be used: PyTorch finds no GPU" in refused
    seen = []
    load = smoothquant.bundled.load_model
    monkeypatch.setattr(
        smoothquant.bundled, "load_model", lambda name, dtype: seen.append(dtype) or load(name)
    )
    answer(*words, "--dtype", "bfloat16")
    assert seen == [torch.bfloat16]
    kept = answer("generate", folder, "The", "--dtype", "float16", code=1).stderr
    assert "--dtype must not be given for a quantized folder" in kept


# ---- Other forms of a quantized folder


def test_dequantize(folder, tmp_path):
    answer("dequantize", folder, tmp_path / "plain")
    want = load_quantized(folder)
    dequantize(want)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(found) is type(want) and not hasattr(found.config, "quantization_config")
    tensors = found.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in want.state_dict().items())
    assert "already exists" in answer("dequantize", folder, tmp_path / "plain", code=1).stderr
    answer("dequantize", folder, tmp_path / "plain", "--overwrite")
    refused = answer("dequantize", tmp_path / "plain", tmp_path / "again", code=1)
    assert "not a quantized model: it has no quantization_config" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_export(folder, plain_order, tmp_path):
    to = ("--format", "compressed-tensors")
    refused = answer("export", folder, tmp_path / "ct", *to, code=1)
    assert "of its channels are salient" in refused.stderr
    assert not any(tmp_path.iterdir())
    answer("export", plain_order, tmp_path / "ct", *to)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    refused = answer("export", folder, tmp_path / "x.gguf", "--format", "gguf", code=1)
    assert "MODEL must be a LlamaForCausalLM" in refused.stderr or "got OPT" in refused.stderr
    taken = answer("export", folder, tmp_path / "ct", "--format", "gguf", "--overwrite", code=1)
    assert "DST must be a file" in taken.stderr and (tmp_path / "ct").is_dir()
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    spared = answer("export", folder, weights, "--format", "gguf", "--overwrite", code=1)
    assert "other than a GGUF file" in spared.stderr and weights.read_bytes() == before
    words = ("--format", "compressed-tensors", "--round-to", "q4_0")
    assert "--round-to requires" in answer("export", folder, tmp_path / "x", *words, code=2).stderr


# ---- Looking at a folder


def test_inspect_reads_no_weights(folder, monkeypatch):
    size = get_model_size(load_quantized(folder)) // Byte

    def read(headers):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint, "_read", read)
    found = json.loads(answer("inspect", folder, "--json").stdout)
    assert found["bytes"] == sum(found["kinds"].values()) == size
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers[LAYER]["shape"] == [128, 512] and layers[LAYER]["num_salient"] == 25
    assert sum(layer["bytes"] for layer in found["layers"]) == size
    table = layers["model.decoder.embed_tokens.packed"]  # the output head, too
    assert table["shape"] == [2048, 128] and table["bits_per_weight"] > 8
    text = answer("inspect", folder).stdout
    assert LAYER in text and f"{size:,} bytes" in text


@pytest.mark.parametrize(
    "name, value, fault",
    [
        (f"{LAYER}.perm", 4, "is not a permutation"),
        ("model.decoder.final_layer_norm.weight", float("nan"), "holds NaN or Inf"),
    ],
)
def test_verify_names_what_is_broken(name, value, fault, folder, tmp_path):
    assert "ok: permutations are valid" in answer("verify", folder).stdout
    spoilt = shutil.copytree(folder, tmp_path / "q")
    set_tensor(name, put(3, value))(spoilt)
    result = answer("verify", spoilt, "--json", code=1)
    found = json.loads(result.stdout)
    assert found["ok"] is False and f"safetensors: tensor {name} {fault}" in found["error"]
    assert found["error"] in result.stderr


def test_eval(folder):
    text = "smoothquant/data/README.md"
    words = ("--windows", 2, "--seq-len", 64)
    found = json.loads(answer("eval", folder, *words, "--compare", "tiny-opt", "--json").stdout)
    assert 1 < found["perplexity"] < 2048 and 0 < found["kl"] < 1 and 0.5 < found["top1"] < 1
    assert found["windows"] == 2 and found["seq_len"] == 64
    reference = json.loads(answer("eval", "tiny-opt", *words, "--json").stdout)["perplexity"]
    assert found["reference_perplexity"] == pytest.approx(reference, rel=1e-5)
    alone = json.loads(answer("eval", folder, *words, "--json").stdout)
    assert alone["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    assert "perplexity " in answer("eval", folder, *words).stdout
    assert "--text must end in" in answer("eval", folder, "--text", text, code=1).stderr
    assert "MODEL must be" in answer("eval", "no/such/model", code=1).stderr


@pytest.mark.long
def test_eval_writes_the_card(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "q")
    before = (own / "README.md").read_text()
    assert "## Evaluation" not in before
    words = ("eval", own, "--windows", 2, "--seq-len", 32, "--card", "--json")
    found = json.loads(answer(*words).stdout)
    row = f"| perplexity, WikiText-2 test, 2 of {found['of_windows']} windows of 32 tokens | "
    for _ in range(2):
        after = (own / "README.md").read_text()
        card = ModelCard(after)
        assert card.text.startswith(ModelCard(before).text) and after.count(row) == 1
        assert after.endswith(f"{row}{found['perplexity']:.5g} |\n")
        metadata = card.data.to_dict()
        (index,) = metadata.pop("model-index")
        assert metadata == ModelCard(before).data.to_dict()
        assert [r["metrics"] for r in index["results"]] == [
            [{"type": "perplexity", "value": found["perplexity"]}]
        ]
        answer(*words)
    assert (
        "--card needs a quantized model folder"
        in answer("eval", "tiny-opt", "--card", code=1).stderr
    )


def test_lm_eval_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert "pip install lm-eval" in answer("lm-eval", "--help", code=1).stderr


def test_eval_scores_a_text_of_ones_own(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("the game was played in the city . " * 40)
    words = ("eval", "tiny-opt", "--seq-len", 32, "--json")
    found = json.loads(answer(*words, "--text", text).stdout)
    assert found["windows"] == found["of_windows"] > 1
    text.write_text("too short")
    assert "less than one window" in answer(*words, "--text", text, code=1).stderr


def test_generate_prints_what_the_model_says(folder):
    model, tokenizer = load_model(folder)
    prompt = tokenizer("The game was", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    want = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert answer("generate", folder, "The game was", "-n", 6).stdout.strip() == want.strip()
    cached = answer("generate", folder, "The game was", "-n", 6, "--kv-cache", "int8").stdout
    assert cached.strip() == want.strip()  # so few tokens are not quantized yet
    sampled = ("generate", folder, "The game was", "-n", 6, "--temperature", 2)
    one, same, other = (answer(*sampled, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == same != other


def test_bench(folder, monkeypatch):
    monkeypatch.setattr("smoothquant.evaluation.speed.LEAST_SECONDS", 0.0005)
    found = json.loads(answer("bench", folder, "--prompt", 4, "--new", 2, "--json").stdout)
    assert [row["tokens"] for row in found["layer"]] == [1, 64, 512]
    assert [row["phase"] for row in found["model"]] == ["prefill", "decode"]
    for row in found["layer"] + found["model"]:
        assert all(isinstance(v, str) or v > 0 for v in row.values())
    assert "One 1024 x 1024 layer" in answer("bench").stdout


# ---- Sweeps, and the machine


@pytest.mark.long
def test_sweep_and_plot(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    words = [
        "--preset", "rtn", "--model", "tiny-opt",
        "--group-sizes", 64, "--salient-props", 0.05, "--sorts", "rms",
        "--backends", "int4", "--windows", 1, "--seqlen", 32, "--calibration-blocks", 1,
        "--output", tmp_path / "store",
    ]  # fmt: skip
    assert "no result of this sweep" in CliRunner().invoke(app, ["plot", *map(str, words)]).stderr
    answer("sweep", *words, "--figures", tmp_path / "one")
    results = sorted((tmp_path / "store").glob("*.json"))
    drawn = answer("plot", *words, "--figures", tmp_path / "two")
    assert "3 of 3 cells" in drawn.stdout
    assert sorted((tmp_path / "store").glob("*.json")) == results and len(results) == 3
    for name in ("tiny-opt_ppl_vs_bits.png", "tiny-opt_results.md"):
        assert (tmp_path / "two" / name).is_file()
    table = (tmp_path / "two" / "tiny-opt_results.md").read_text()
    assert "--plot" not in table and "rms" in table
    assert "--salient-props" in answer("sweep", "--help").stdout
    assert CliRunner().invoke(app, ["sweep", "--nonsense"]).exit_code == 2


def test_doctor_tells_what_is_installed():
    found = json.loads(answer("doctor", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or (
        found["packages"]["torch"] == torch.__version__
    )
    assert found["kernels"]["active"] in found["kernels"]["instruction_sets"]
    assert f"kernels.active              {found['kernels']['active']}" in answer("doctor").stdout


def test_doctor_answers_where_the_kernels_do_not_load(run_python):
    found = run_python(
        "import sys\n"
        "sys.argv = ['smoothquant', 'doctor']\n"
        "sys.modules['smoothquant._C'] = None\n"
        "from smoothquant.cli import main\n"
        "main()",
        check=False,
    )
    assert found.returncode == 1 and "processor" in found.stdout
    assert found.stderr.startswith("smoothquant: error: smoothquant does not work here: ")


def test_mistakes_can_be_traced(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXEDQUANT_TRACEBACK", "1")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "x")])
    assert isinstance(result.exception, ValueError)


def test_a_model_that_is_quantized_is_not_quantized_again(folder, tmp_path):
    words = ("quantize", folder, tmp_path / "q", "--no-calibration")
    assert "quantized already" in answer(*words, code=1).stderr
    assert any(isinstance(m, QuantizedLinear) for m in load_quantized(folder).modules())
    assert not any(tmp_path.iterdir())
