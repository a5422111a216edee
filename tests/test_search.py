"""Choices made by trial on calibration rows, each against all of its alternatives."""

import copy

import pytest
import torch

from smoothquant import collect_stats, load_quantized, quantize, save_quantized
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.calibration import token_blocks
from smoothquant.calibration.blocks import blocks
from smoothquant.calibration.hessian import SAMPLE_ROWS, sample_rows
from smoothquant.channels.sorting import ChannelPlan
from smoothquant.channels.statistics import ChannelStats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.layers.linear import FakeW4A4Linear, QuantizedLinear, W4A4Linear
from smoothquant.models.families import layer_inputs
from smoothquant.quantization.search import ACT_CLIPS, Trial, resolve

pytestmark = pytest.mark.usefixtures("linears_alone")

PLAN = ChannelPlan(torch.arange(64, dtype=torch.int32), 4)


def layer():
    x, weight = torch.randn(400, 64), torch.randn(32, 64)
    x[:, 5] *= 4
    return x, weight


def test_the_clip_of_least_error_is_taken():
    x, weight = layer()
    config = MixedQuantConfig("rtn", group_size=32, act_clip="search")
    chosen = resolve(config, x, weight, PLAN, False)
    errors = {
        clip: Trial(x, weight, x @ weight.T, PLAN).error(
            MixedQuantConfig("rtn", group_size=32, act_clip=clip)
        )
        for clip in ACT_CLIPS
    }
    assert chosen.act_clip == min(errors, key=errors.get) < 1.0
    assert chosen.act_format == "symmetric" and chosen.backend == "int4"


def test_unsigned_codes_only_where_nothing_was_negative():
    x, weight = layer()
    config = MixedQuantConfig(group_size=32, act_format="auto", rotation=32)
    chosen = resolve(config, x, weight, PLAN, False)
    assert (chosen.act_format, chosen.rotation) == ("zero_point", 32)
    sparse = x.relu() * (torch.rand_like(x) < 0.1)  # most channels 0: rotation would spread them
    chosen = resolve(config, sparse, weight, PLAN, True)
    assert (chosen.act_format, chosen.rotation) == ("unsigned", 0)


def test_without_rows_nothing_is_tried():
    config = MixedQuantConfig(act_format="auto", act_clip="search")
    chosen = resolve(config, None, torch.randn(32, 64), PLAN, True)
    assert (chosen.act_format, chosen.act_clip) == ("zero_point", 1.0)


def test_means_alone_decide_nothing_that_needs_more(tiny):
    model, batches, stats = tiny
    means = {name: ChannelStats.from_mean(entry.mean) for name, entry in stats.items()}
    for fields in ({"smooth_alpha": 0.5}, {"salient_allocation": "output"}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))}.* needs statistics with more"):
            quantize(copy.deepcopy(model), MixedQuantConfig(**fields), means)
    quantized = copy.deepcopy(model)
    quantize(quantized, MixedQuantConfig(act_format="auto"), means, batches[:1], progress=False)
    formats = {m.config.act_format for m in quantized.modules() if isinstance(m, QuantizedLinear)}
    assert formats == {"zero_point"}  # minima are not known


def test_smoothing_refuses_a_model_without_a_norm_to_fold_into(make_model, token_ids):
    model = make_model("opt-post-norm")
    with pytest.raises(ValueError, match="smooth_alpha must be None"):
        quantize(model, MixedQuantConfig(smooth_alpha=0.5), batches=[token_ids])


def test_rows_to_try_on_are_enough(tiny):
    model, batches, _ = tiny
    short = [part for batch in batches for part in batch.split(16, dim=1)]
    name = "model.decoder.layers.0.self_attn.q_proj"
    inputs = [item for item in layer_inputs(model) if item.name == name]
    for given in (short, batches):
        block = next(blocks(model, [name], given))
        assert SAMPLE_ROWS / 2 <= len(sample_rows(block, inputs, [name])[name]) <= 2 * SAMPLE_ROWS


@pytest.mark.parametrize("fields", [{"act_clip": "search"}, {"act_format": "auto"}])
def test_a_layer_alone_refuses_open_choices(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}='.*quantize"):
        W4A4Linear(64, 32, config=MixedQuantConfig(**fields))
    model, _ = load_bundled("tiny-opt")
    with pytest.raises(ValueError, match=f"{next(iter(fields))}='.*needs batches"):
        quantize(model, MixedQuantConfig(calibration="weights", **fields))


@pytest.mark.parametrize("value", ["searched", "1", True, 0.0, 2])
def test_bad_clips(value):
    with pytest.raises((ValueError, TypeError), match="act_clip"):
        MixedQuantConfig(act_clip=value)


@pytest.mark.long
def test_a_model_with_choices_per_layer_survives_saving(tmp_path):
    model, tokenizer = load_bundled("tiny-opt")
    batches = token_blocks(wikitext("validation"), tokenizer, 6, 256)
    stats = collect_stats(model, batches, progress=False)
    config = MixedQuantConfig(
        recipe="fast", group_size=64, act_format="auto", act_clip="search", rotation=64
    )
    fixed = copy.deepcopy(model)
    quantize(model, config, stats, batches, progress=False)
    own = {n: m.config for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len({c.act_clip for c in own.values()}) > 1
    # after a ReLU nothing is negative, elsewhere something is
    for name, choice in own.items():
        assert choice.act_format == "zero_point" or name.endswith("fc2")
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    ids = batches[-1]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.mixedquant_config == config
    again = tmp_path / "again"
    save_quantized(loaded, again)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    quantize(fixed, config, stats, batches, progress=False)
    with torch.no_grad():
        assert torch.equal(fixed(ids).logits, model(ids).logits)


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_bundled("tiny-opt")
    batches = token_blocks(wikitext("validation"), tokenizer, 8, 256)
    return model, batches, collect_stats(model, batches, progress=False)


def logit_error(model, expected, ids):
    with torch.no_grad():
        return float((model(ids).logits - expected).norm())


def test_smoothing_is_folded_and_found_per_input(tiny):
    model, batches, stats = tiny
    with torch.no_grad():
        expected = model(batches[-1]).logits
    errors, gains = {}, {}
    for alpha in (None, 0.5, "search"):
        quantized = copy.deepcopy(model)
        config = MixedQuantConfig(salient_prop=0, group_size=64, smooth_alpha=alpha)
        quantize(quantized, config, stats, batches, progress=False)
        errors[alpha] = logit_error(quantized, expected, batches[-1])
        gains[alpha] = [
            m.weight.detach() for n, m in quantized.named_modules() if n.endswith("layer_norm")
        ]
    # this model's outliers come from its norms' gains, which smoothing takes back
    assert errors["search"] < 0.8 * errors[None] and errors[0.5] < errors[None]
    assert not all(map(torch.equal, gains[None], gains["search"]))
    original = [m.weight for n, m in model.named_modules() if n.endswith("layer_norm")]
    assert all(map(torch.equal, original, gains[None]))


def test_smoothing_alone_keeps_the_function(tiny):
    """With all channels salient only the rounding to bfloat16 is left."""
    model, batches, stats = tiny
    quantized = copy.deepcopy(model)
    quantize(quantized, MixedQuantConfig(salient_prop=1, smooth_alpha=0.5), stats, progress=False)
    with torch.no_grad():
        expected = model(batches[0]).logits
    assert logit_error(quantized, expected, batches[0]) < 0.02 * float(expected.norm())


def test_smoothing_leaves_a_model_that_shares_its_tensors(tiny):
    model, batches, stats = tiny
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    quantize(shared, MixedQuantConfig(smooth_alpha=0.5), stats, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_smoothing_needs_maxima(tiny):
    model, batches, stats = tiny
    by_weights = {"calibration": "weights"}
    with pytest.raises(ValueError, match="smooth_alpha needs statistics"):
        quantize(copy.deepcopy(model), MixedQuantConfig(smooth_alpha=0.5, **by_weights))
    with pytest.raises(ValueError, match="smooth_alpha='search' needs batches"):
        quantize(model, MixedQuantConfig(smooth_alpha="search", **by_weights), stats)


@pytest.mark.filterwarnings("ignore:no token was routed")
@pytest.mark.parametrize("kind", ["mixtral", "gemma", "falcon-new", "phi3", "opt"])
def test_everything_at_once_on_every_kind_of_model(kind, make_model, token_ids):
    model = make_model(kind)
    config = MixedQuantConfig(
        recipe="best", group_size=16, salient_prop=0.1, smooth_alpha="search", act_clip="search",
        act_format="auto", salient_allocation="output", salient_metric="output",
        salient_format="int8",
    )  # fmt: skip
    with torch.no_grad():
        expected = model(token_ids).logits
    records = quantize(model, config, batches=[token_ids], progress=False)
    assert sum(record.action == "quantized" for record in records) > 4
    with torch.no_grad():
        error = float((model(token_ids).logits - expected).norm() / expected.norm())
    assert 0 < error < 0.5


@pytest.mark.long
def test_texts_in_the_config(tiny, tmp_path):
    model, _, _ = tiny
    _, tokenizer = load_bundled("tiny-opt")
    rows = wikitext("validation")[:400]
    (tmp_path / "texts.txt").write_text("".join(row or "\n" for row in rows))
    results = []
    for calibration in (str(tmp_path / "texts.txt"), rows, rows):
        config = MixedQuantConfig(
            recipe="best", group_size=64, calibration=calibration, calibration_tokens=2048
        )
        quantized = copy.deepcopy(model)
        quantize(quantized, config, tokenizer=tokenizer, progress=False)
        results.append(quantized.state_dict())
        stored = config.to_dict()["calibration"]
        assert stored == calibration if isinstance(calibration, str) else len(stored) == 71
        assert MixedQuantConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    for other in results[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in results[0].items())


def test_bad_calibration(tiny):
    model, _, _ = tiny
    _, tokenizer = load_bundled("tiny-opt")
    with pytest.raises(TypeError, match="calibration must be a path or a sequence of texts"):
        MixedQuantConfig(calibration=5)
    nowhere = copy.deepcopy(model)
    nowhere.name_or_path = ""
    with pytest.raises(ValueError, match="needs a tokenizer, but tokenizer is None"):
        quantize(nowhere, MixedQuantConfig(calibration=["some text"]))
    with pytest.raises(ValueError, match="calibration_tokens must be at most"):
        quantize(
            model,
            MixedQuantConfig(calibration=["some words " * 500], calibration_tokens=10**6),
            tokenizer=tokenizer,
        )
    with pytest.raises(ValueError, match="nowhere.txt"):
        quantize(model, MixedQuantConfig(calibration="nowhere.txt"), tokenizer=tokenizer)


def test_settled_leaves_what_is_decided():
    config = MixedQuantConfig(backend="fake", num_bits=8, act_clip="search")
    assert config.settled() == MixedQuantConfig(backend="fake", num_bits=8, act_clip=1.0)
    config = MixedQuantConfig(act_format="auto", act_clip=0.9)
    assert config.settled() == MixedQuantConfig(act_format="zero_point", act_clip=0.9)
    assert not MixedQuantConfig(recipe="best").settled().searches


def test_a_trial_holds_one_layer_at_a_time(monkeypatch):
    x, weight = layer()
    trial = Trial(x, weight, x @ weight.T, PLAN)
    make = FakeW4A4Linear.from_weight

    def made(*args):
        assert trial._layer is None
        return make(*args)

    monkeypatch.setattr(FakeW4A4Linear, "from_weight", made)
    for rotation in (0, 32, 0):
        trial.error(MixedQuantConfig(group_size=32, rotation=rotation))
