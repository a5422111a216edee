"""Every model class of transformers: loaded quantized, saved and loaded again, bit for bit."""

import copy
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from length import at_length
from small_models import model_classes, small_model

from smoothquant import MixedQuantConfig, convert, load_quantized, quantize, save_quantized
from smoothquant.core.progress import progress_bar
from smoothquant.layers.linear import is_quantized
from smoothquant.models.families import decoder_layers
from smoothquant.models.kept import output_heads
from smoothquant.models.linears import is_linear

CONFIG = MixedQuantConfig(group_size=16)


def has_linears(model):
    """Whether there is a linear to quantize."""
    linears = {name for name, module in model.named_modules() if is_linear(module)}
    return bool(linears - output_heads(model))


def differing(got, want):
    """Names of the tensors that are not the same in two models."""
    got, want = got.state_dict(), want.state_dict()
    names = set(got) ^ set(want)
    for name in set(got) & set(want):
        if got[name].dtype != want[name].dtype or not got[name].equal(want[name]):
            names.add(name)
    return sorted(names)


def check(model, folder):
    """Check that a float model is quantized, saved and loaded alike in every way."""
    cls = type(model)
    model.save_pretrained(folder / "float")
    want = cls.from_pretrained(folder / "float", dtype=torch.float32).eval()
    quantize(want, CONFIG, progress=False)
    loaded = cls.from_pretrained(
        folder / "float", dtype=torch.float32, quantization_config=copy.deepcopy(CONFIG)
    )
    assert is_quantized(loaded)
    assert differing(loaded, want) == [], "quantized on load"
    save_quantized(want, folder / "q")
    assert differing(load_quantized(folder / "q"), want) == [], "load_quantized"
    assert differing(cls.from_pretrained(folder / "q"), want) == [], "from_pretrained"
    if decoder_layers(model):
        convert(folder / "float", folder / "c", CONFIG, progress=False)
        assert differing(load_quantized(folder / "c"), want) == [], "convert"


# Causal and masked LMs, encoder-decoders, classifiers, vision, audio and several of them at once.
SHORT = [
    "LlamaForSequenceClassification",
    "Qwen3MoeForCausalLM",
    "Qwen3OmniMoeThinkerModel",
    "MambaForCausalLM",
    "JambaForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "BertForMaskedLM",
    "ModernBertForMaskedLM",
    "AlbertForMaskedLM",
    "ElectraForTokenClassification",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "MarianMTModel",
    "ViTForImageClassification",
    "SiglipModel",
    "CLIPModel",
    "Data2VecVisionForImageClassification",
    "GraniteSpeech5ForCTC",
    "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration",
    "ASTForAudioClassification",
    "LlavaForConditionalGeneration",
    "BlipForConditionalGeneration",
    "RTDetrV2ForObjectDetection",
    "GPT2DoubleHeadsModel",
    "ClvpForCausalLM",
    "Llama4ForConditionalGeneration",
    "Llama4ForCausalLM",
    "AriaForConditionalGeneration",
    "AriaTextForCausalLM",
    "NemotronHForCausalLM",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", at_length(SHORT, SHORT[::4]))
def test_a_class_is_loaded_as_it_is(name, tmp_path):
    check(small_model(name), tmp_path)


def check_all(names):
    """Check the classes that can be built small and have a linear.

    Returns:
        covered: their names; left_out and wrong: {name of a class: why}.
    """
    covered, left_out, wrong = [], {}, {}
    for name in progress_bar(names, desc="classes", unit="class"):
        try:
            model = small_model(name)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        if not has_linears(model):
            left_out[name] = "no linear to quantize"
            continue
        covered.append(name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(model, Path(folder))
            except Exception as error:
                wrong[name] = f"{type(error).__name__}: {error}"
    return covered, left_out, wrong


PARTS = 4
COVERED = 40  # classes in each part, at least, that can be built small and have a linear


def one_class_per_type():
    """A class for each model type, with another kind of head for each."""
    by_type = {}
    for name, model_type in model_classes().items():
        by_type.setdefault(model_type, []).append(name)
    return [names[index % len(names)] for index, names in enumerate(by_type.values())]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_a_class_of_every_model_type_is_loaded_as_it_is(part):
    """Of every second one: `python tests/test_all_models.py` takes all classes, for an hour."""
    covered, left_out, wrong = check_all(one_class_per_type()[::2][part::PARTS])
    assert wrong == {}
    assert len(covered) >= COVERED, left_out


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    covered, left_out, wrong = check_all(list(model_classes()))
    print(f"{len(covered)} classes, {len(left_out)} cannot be built small or have no linear")
    for name, why in wrong.items():
        print(f"{name}: {why}")
    sys.exit(bool(wrong))
