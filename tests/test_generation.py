"""`generate` chooses the tokens that transformers' own loop chooses."""

import pytest
import torch
from length import at_length

from smoothquant import MixedQuantConfig, quantize
from smoothquant.bundled import load_bundled
from smoothquant.evaluation.speed import TokenTimes, greedy
from smoothquant.layers import decoder
from smoothquant.models.generation import generate


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got = []

    def put(self, ids):
        self.got.append(ids.tolist())

    def end(self):
        self.got.append("end")


OPTIONS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "penalties": {"do_sample": False, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    "least length": {"do_sample": False, "min_new_tokens": 12},
    "any end": {"do_sample": False, "eos_token_id": list(range(0, 96, 3))},
    "sampled to any end": {"do_sample": True, "eos_token_id": list(range(0, 96, 9))},
}


def both(model, ids, **options):
    """(ids, what the streamer got), by transformers and by `generate`. A streamer takes one
    prompt."""
    for run in (type(model).generate, generate):
        torch.manual_seed(0)
        recorder = Recorder() if len(ids) == 1 else None
        options = {"max_new_tokens": 12, "pad_token_id": 0, **options}
        chosen = run(model, ids, streamer=recorder, **options)
        yield chosen, recorder and recorder.got


@pytest.mark.parametrize(
    "architecture", at_length(["opt", "llama", "mistral", "gemma2", "qwen2_moe"], ["llama"])
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_chooses_the_same_tokens(make_model, architecture, options):
    model = make_model(architecture)
    for ids in (torch.arange(3, 12)[None], torch.arange(3, 23).reshape(2, 10)):
        (expected, streamed), (actual, mine) = both(model, ids, **options)
        assert torch.equal(actual, expected) and streamed == mine


def test_a_quantized_model_is_called_with_nothing_but_tokens_positions_and_cache(
    make_model, monkeypatch
):
    model = make_model("llama", hidden_size=64, intermediate_size=96)
    quantize(model, MixedQuantConfig(group_size=16, calibration="weights"), progress=False)
    (expected, _), (actual, _) = both(model, torch.arange(3, 12)[None])
    assert torch.equal(actual, expected)
    calls, forward = [], model.forward

    def spied(**inputs):
        calls.append({name for name, value in inputs.items() if value is not None})
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", spied)
    generate(model, torch.arange(3, 12)[None], max_new_tokens=12, pad_token_id=0)
    extra = {"use_cache", "return_dict", "logits_to_keep"}
    cache = "cache" if "cache" in calls[0] else "past_key_values"
    allowed = {"input_ids", "position_ids", cache} | extra
    assert len(calls) == 12 and all(names <= allowed for names in calls)


def test_what_needs_more_goes_through_transformers_own_loop(make_model):
    model = make_model("llama")
    ids = torch.arange(3, 23).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    (expected, _), (actual, _) = both(model, ids, attention_mask=mask)
    assert torch.equal(actual, expected)
    (expected, _), (actual, _) = both(model, ids, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(actual.sequences, expected.sequences) and len(actual.scores) == 12
    far = torch.arange(20, 40, 2)[None].expand(2, -1)
    for options in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"position_ids": far},
    ):
        (expected, _), (actual, _) = both(model, ids, **options)
        assert torch.equal(actual, expected)


def test_what_transformers_keeps_from_a_custom_loop_still_counts():
    model, tokenizer = load_bundled("tiny-opt")
    ids = tokenizer("The game was", return_tensors="pt").input_ids
    stop = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, -2:])
    options = {"stop_strings": [stop], "tokenizer": tokenizer}
    (expected, _), (actual, _) = both(model, ids, **options, do_sample=False)
    assert torch.equal(actual, expected) and actual.shape[1] <= ids.shape[1] + 4


def test_beams_are_refused(make_model):
    with pytest.raises(ValueError, match="greedily or samples, .*; got beam_search"):
        generate(make_model("llama"), torch.arange(3, 9)[None], num_beams=3, max_new_tokens=2)


def test_modules_are_compared_once_and_after_it_again(make_model, monkeypatch):
    model = make_model("llama", hidden_size=64, intermediate_size=96)
    quantize(model, MixedQuantConfig(group_size=16, calibration="weights"), progress=False)
    ids, options = torch.arange(3, 12)[None], {"max_new_tokens": 12, "pad_token_id": 0}
    calls, original = [], decoder._C.all_hold
    monkeypatch.setattr(decoder._C, "all_hold", lambda given: calls.append(1) or original(given))
    before = generate(model, ids, **options)
    assert len(calls) == 1
    layer = model.get_decoder().layers[0]
    layer.mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
    (expected, _), (actual, _) = both(model, ids, **options)
    assert torch.equal(actual, expected) and not torch.equal(actual, before)


def test_a_measured_text_has_exactly_so_many_tokens(make_model):
    model = make_model("llama")
    model.generation_config.eos_token_id = list(range(96))
    model.generation_config.do_sample = True
    times = TokenTimes()
    greedy(model, torch.arange(3, 12)[None], 10, times)
    assert len(times.times) == 1 + 10  # the prompt is one
