"""What a model is calibrated on that gets no statistics, tokens or texts."""

import logging
from types import SimpleNamespace

import pytest
import torch
from small_models import small_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from smoothquant import MixedQuantConfig, convert, load_quantized, quantize, save_quantized
from smoothquant.bundled import DATA, load_bundled, wikitext
from smoothquant.fake_quant import quantize_model
from smoothquant.models.running import max_positions

pytestmark = pytest.mark.usefixtures("linears_alone")

TOKENS = 512
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = SiglipVisionConfig(image_size=16, patch_size=8, **SMALL)


def same(model, other):
    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def as_stored():
    return AutoModelForCausalLM.from_pretrained(DATA / "tiny-opt", dtype="auto")


@pytest.fixture(scope="module")
def calibrated():
    """The tiny OPT, calibrated on texts that were named and a tokenizer that was given."""
    model, (_, tokenizer) = as_stored(), load_bundled("tiny-opt")
    config = MixedQuantConfig("fast", calibration=wikitext("validation"), calibration_tokens=TOKENS)
    quantize(model, config, tokenizer=tokenizer, progress=False)
    return model


def test_the_default_is_fast_on_the_bundled_text_in_every_way_in(calibrated, tmp_path, caplog):
    config = MixedQuantConfig(calibration_tokens=TOKENS)
    in_memory = as_stored()
    quantize(in_memory, config, progress=False)
    convert(DATA / "tiny-opt", tmp_path / "q", config, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(DATA / "tiny-opt", quantization_config=config)
    models = (in_memory, load_quantized(tmp_path / "q"), loaded)
    for model in models:
        assert same(calibrated, model)
        chosen = model.mixedquant_config
        assert (chosen.recipe, chosen.calibration) == ("fast", "wikitext2")
    lines = [r.message for r in caplog.records if r.message.startswith("calibrating on 512 tokens")]
    assert len(lines) == len(models)


def test_weights_alone_by_name(calibrated, caplog):
    model, tokenizer = load_bundled("tiny-opt")
    quantize(model, MixedQuantConfig(calibration="weights"), tokenizer=tokenizer, progress=False)
    assert not same(calibrated, model)
    assert {r.reason for r in model.mixedquant_report if r.action == "quantized"} == {"weights"}
    assert "weights alone" in caplog.text


def test_the_published_functions_neither_calibrate_nor_rotate():
    model, _ = load_bundled("tiny-opt")
    chosen = quantize_model(model, progress=False).mixedquant_config
    assert (chosen.recipe, chosen.rotation, chosen.calibration) == ("rtn", 0, "weights")


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: SiglipVisionModel(VISION), "SiglipVisionModel does not run on token ids alone"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(vocab_size=64, **SMALL)),
            "the model does not say where it was loaded from",
        ),
    ],
    ids=["no tokens", "no tokenizer"],
)
def test_without_a_text_the_weights_choose_and_the_log_says_why(build, why, tmp_path, caplog):
    config = MixedQuantConfig(group_size=16)
    model = build()
    quantize(model, config, progress=False)
    assert why in caplog.text and "not calibrated" in caplog.text
    assert model.mixedquant_config.calibration == "weights"
    with pytest.raises(ValueError, match="needs calibration tokens, but"):
        quantize(build(), MixedQuantConfig("best", group_size=16), progress=False)


def test_a_folder_without_a_tokenizer(tmp_path, caplog):
    load_bundled("tiny-opt")[0].save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=MixedQuantConfig()
        )
    assert model.mixedquant_config.calibration == "weights"
    assert f"not calibrated: the tokenizer of {str(tmp_path)!r}" in caplog.text
    named = MixedQuantConfig(calibration="wikitext2")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=named)


def test_named_texts_need_a_model_that_reads_them():
    with pytest.raises(ValueError, match="SiglipVisionModel does not run on token ids alone"):
        quantize(SiglipVisionModel(VISION), MixedQuantConfig(calibration="wikitext2"))


def test_an_encoder_decoder_is_calibrated(tmp_path):
    config = T5Config(
        vocab_size=2048,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    _, tokenizer = load_bundled("tiny-opt")
    model = T5ForConditionalGeneration(config)
    quantize(
        model,
        MixedQuantConfig(group_size=16, calibration_tokens=TOKENS),
        tokenizer=tokenizer,
        progress=False,
    )
    assert model.mixedquant_config.calibration == "wikitext2"
    reasons = {r.name: r.reason for r in model.mixedquant_report if r.action == "quantized"}
    assert set(reasons.values()) == {"calibration"} and any("decoder" in name for name in reasons)
    save_quantized(model, tmp_path / "q")


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "MPNetForMaskedLM"])
def test_blocks_fit_the_positions_of_a_model(name):
    """RoBERTa's positions begin after that of padding."""
    _, tokenizer = load_bundled("tiny-opt")
    model = small_model(name, vocab_size=2048)
    quantize(
        model,
        MixedQuantConfig(group_size=16, calibration_tokens=256),
        tokenizer=tokenizer,
        progress=False,
    )
    assert model.mixedquant_config.calibration == "wikitext2"


def test_a_limit_of_minus_one_is_none():
    model = torch.nn.Linear(2, 2)
    for positions, limit in ((-1, None), (None, None), (64, 64)):
        model.config = SimpleNamespace(max_position_embeddings=positions)
        assert max_positions(model) == limit
