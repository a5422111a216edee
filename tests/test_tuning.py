"""The recipe "tuned": training what a quantized model stores by the KL divergence."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from length import at_length
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from smoothquant import convert, load_quantized, quantize, save_quantized
from smoothquant.cli.commands import app
from smoothquant.core.config import MixedQuantConfig
from smoothquant.layers.linear import QuantizedLinear
from smoothquant.quantization import tuning
from smoothquant.quantization.memory import planned_memory

FIELDS = {"recipe": "tuned", "group_size": 16, "salient_prop": 0.1, "weight_rounding": "nearest"}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on tiny matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short(monkeypatch):
    """Few and short steps, at rates that tiny models need."""
    monkeypatch.setattr(tuning, "SEQUENCE", 32)
    monkeypatch.setattr(tuning, "TRIAL_STEPS", 3)
    monkeypatch.setattr(tuning, "RATES", {"scales": 5e-3, "salient": 5e-3, "clip": 5e-3})


def batches():
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(3, 96, (12, 1, 32), generator=generator))


def sharp(model):
    """Larger output weights: the logits of a random model hardly differ."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


def buffers(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def divergence(monkeypatch):
    """The divergences that a run measures, in order."""
    seen, measure = [], tuning.Tuning.divergence
    monkeypatch.setattr(
        tuning.Tuning, "divergence", lambda *args: seen.append(measure(*args)) or seen[-1]
    )
    return seen


CASES = [
    ("opt", {}),
    ("llama", {"act_bits": 8}),
    ("llama", {"backend": "fake", "act_format": "symmetric"}),
    ("llama", {"weight_quant": "per_channel", "salient_format": "int8"}),
    ("llama", {"act_quant": "per_token"}),
]


@pytest.mark.parametrize(("architecture", "fields"), at_length(CASES, CASES[:3]))
def test_it_lowers_the_divergence_on_held_out_tokens(
    architecture, fields, make_model, short, monkeypatch, tmp_path
):
    seen, models = divergence(monkeypatch), []
    for recipe in ("best", "tuned"):
        model = sharp(make_model(architecture))
        config = MixedQuantConfig(**FIELDS | fields | {"recipe": recipe})
        quantize(model, config, batches=batches(), progress=False)
        models.append(model)
    best, tuned = map(buffers, models)
    assert min(seen[1:]) < seen[0]  # the first one is that of "best"
    changed = {name.rpartition(".")[2] for name in best if not torch.equal(best[name], tuned[name])}
    assert changed and changed <= {
        "scales", "salient_weight", "salient_scales", "simulated_weight"
    }  # fmt: skip

    save_quantized(models[1], tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved")
    assert loaded.mixedquant_config == config
    ids = batches()[0]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, models[1](ids).logits)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tuned[name]), name


def test_what_was_judged_is_what_is_stored(make_model, short, monkeypatch):
    seen, kept = divergence(monkeypatch), []
    run = tuning.Tuning.run

    def judge_again(self, model, groups):
        run(self, model, groups)
        kept.append(min(seen))
        kept.append(self.divergence(model))

    monkeypatch.setattr(tuning.Tuning, "run", judge_again)
    quantize(
        sharp(make_model("llama")), MixedQuantConfig(**FIELDS), batches=batches(), progress=False
    )
    assert kept[0] == kept[1]


def test_a_bad_rate_leaves_the_model_as_it_was(make_model, short, monkeypatch):
    monkeypatch.setattr(tuning, "RATES", dict.fromkeys(tuning.RATES, 3.0))
    states = []
    for recipe in ("best", "tuned"):
        model = sharp(make_model("llama"))
        config = MixedQuantConfig(**FIELDS | {"recipe": recipe})
        quantize(model, config, batches=batches(), progress=False)
        clips = [m.config.act_clip for m in model.modules() if isinstance(m, QuantizedLinear)]
        states.append((buffers(model), clips))
    (best, best_clips), (tuned, clips) = states
    assert clips == best_clips and all(torch.equal(best[name], tuned[name]) for name in best)


@pytest.mark.parametrize("act_format", ["symmetric", "zero_point", "unsigned"])
def test_the_differentiable_form_computes_what_the_layer_computes(act_format, make_model):
    model = make_model("llama")
    fields = {"recipe": "fast", "act_format": act_format, "group_size": 16, "backend": "fake"}
    quantize(model, MixedQuantConfig(**fields), batches=batches(), progress=False)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    twin = tuning._Linear(layer, tuning._Input(layer))
    assert torch.allclose(twin(x), layer(x), atol=1e-5)


RUN = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    import test_tuning
    from conftest import ARCHITECTURES
    from smoothquant import quantize
    from smoothquant.core.config import MixedQuantConfig
    from smoothquant.quantization import tuning
    from transformers import AutoConfig, AutoModelForCausalLM

    tuning.SEQUENCE, tuning.TRIAL_STEPS, tuning.SAVE_EVERY = 32, 3, 2
    saves, save = [], tuning._Run._save

    def save_and_die(self, identity):
        save(self, identity)
        saves.append(1)
        if len(saves) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    tuning._Run._save = save_and_die
    torch.set_num_threads(1)
    model = torch.load({model!r}, weights_only=False)
    quantize(model, MixedQuantConfig(**test_tuning.FIELDS), batches=test_tuning.batches(),
             tuning_state={state!r}, progress=False)
"""


class Interruption(Exception):
    pass


def interrupted(monkeypatch, model, state):
    """Quantize until the fifth time that the state is saved."""
    saves, save = [], tuning._Run._save

    def save_and_stop(self, identity):
        save(self, identity)
        saves.append(1)
        if len(saves) == 5:
            raise Interruption

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(tuning._Run, "_save", save_and_stop)
        config = MixedQuantConfig(**FIELDS)
        quantize(model, config, batches=batches(), tuning_state=state, progress=False)


def killed(folder, state):
    """The same in a process that is killed."""
    tests, model = str(Path(__file__).parent), str(folder / "model.pt")
    code = textwrap.dedent(RUN).format(tests=tests, model=model, state=str(state))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=300)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.long)])
def test_it_resumes(kill, make_model, short, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "RATES", {"scales": 3e-4, "salient": 4e-4, "clip": 1e-3})
    monkeypatch.setattr(tuning, "SAVE_EVERY", 2)
    torch.save(sharp(make_model("llama")), tmp_path / "model.pt")
    state = tmp_path / "state"
    if kill:
        killed(tmp_path, state)
    else:
        interrupted(monkeypatch, torch.load(tmp_path / "model.pt", weights_only=False), state)
    assert state.exists()

    steps, step = [], tuning._Run._step
    monkeypatch.setattr(tuning._Run, "_step", lambda *args: steps.append(1) or step(*args))
    states = []
    for path in (state, None):
        model = torch.load(tmp_path / "model.pt", weights_only=False)
        quantize(
            model, MixedQuantConfig(**FIELDS), batches=batches(), tuning_state=path, progress=False
        )
        states.append(buffers(model))
        states[-1]["steps"] = torch.tensor(len(steps))
        steps.clear()
    resumed, whole = states
    assert 0 < resumed.pop("steps") < whole.pop("steps")
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_a_state_of_another_run_is_not_resumed(make_model, short, tmp_path, caplog):
    for seed in (1, 2):
        config = MixedQuantConfig(**FIELDS, seed=seed)
        model = sharp(make_model("llama"))
        quantize(model, config, batches=batches(), tuning_state=tmp_path / "s", progress=False)
    assert "of another model or config" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_quant": "per_tensor", "backend": "fake", "act_clip": 0.9}, "per_tensor"),
        ({"calibration": "weights"}, "needs batches"),
        ({"tune": 1}, "tune must be a bool"),
    ],
)
def test_configs_that_cannot_be_tuned(fields, message, make_model):
    given = None if "calibration" in fields else batches()
    with pytest.raises((ValueError, TypeError), match=message):
        quantize(make_model("llama"), MixedQuantConfig(**FIELDS | fields), batches=given)


def test_models_that_cannot_be_tuned(make_model):
    config = MixedQuantConfig(**FIELDS)
    with pytest.raises(ValueError, match="no output head .*; use recipe='best'"):
        quantize(make_model("llama").model, config, batches=batches())
    with pytest.raises(ValueError, match="no output head"):
        quantize(nn.Sequential(nn.Linear(32, 32)), config, batches=batches())
    with pytest.raises(ValueError, match="on meta"):
        tuning.check_tunable(make_model("llama").to("meta"), config)
    model = make_model("llama")
    model.forward = lambda *a, call=model.forward, **k: _scaled(call(*a, **k))
    with pytest.raises(ValueError, match="scales or caps"):
        quantize(model, config, batches=batches(), progress=False)


def test_states_are_checked_before_any_work(make_model, tmp_path):
    (tmp_path / "folder").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "other")
    (tmp_path / "text").write_text("mine")
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    config, refused = MixedQuantConfig(**FIELDS), "tuning_state must be"
    for name in ("folder", "absent/state", "other", "text"):
        model = make_model("llama")
        with pytest.raises(ValueError, match=refused):
            quantize(model, config, batches=batches(), tuning_state=tmp_path / name)
        assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == kept
    with pytest.raises(ValueError, match="tuning_state needs tune=True"):
        quantize(make_model("llama"), MixedQuantConfig(), tuning_state=tmp_path / "state")
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        quantize(make_model("llama"), config, batches=batches())


def _scaled(output):
    output.logits = output.logits * 0.5
    return output


def test_config_and_plan(make_model):
    config = MixedQuantConfig(**FIELDS)
    assert config.tune and config.to_dict()["tune"] is True
    assert MixedQuantConfig.from_dict(config.to_dict()) == config
    assert "tune" not in MixedQuantConfig(recipe="best").to_dict()
    assert MixedQuantConfig(recipe="tuned", weight_rounding="nearest", act_clip=1.0,
                            act_format="symmetric").needs_tokens == "tune=True"  # fmt: skip
    memory = planned_memory(make_model("llama"), config, 0, 32768)
    assert memory["tuning"] > 32768 * 48 * 4
    assert tuning.planned_steps(32768) == 116 + 3 * tuning.TRIAL_STEPS


def test_by_layer_is_refused_before_any_work(tmp_path):
    source = tmp_path / "float"
    source.mkdir()
    with pytest.raises(ValueError, match="tune=True needs the whole model.*without --by-layer"):
        convert(source, tmp_path / "out", MixedQuantConfig(**FIELDS))
    command = ["quantize", str(source), str(tmp_path / "out"), "--recipe", "tuned"]
    result = CliRunner().invoke(app, [*command, "--by-layer", "--dry-run"])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
