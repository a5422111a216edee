"""Decoder layers fused around transformers' attention, against the same layers step by step."""

import copy
import pickle
import threading
import warnings
import weakref
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from length import at_length
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from smoothquant import MixedQuantConfig, dequantize, load_quantized, quantize, save_quantized
from smoothquant.layers import decoder
from smoothquant.layers.cache import GrowingLayer, cache_argument
from smoothquant.layers.decoder import use_fused_layers
from smoothquant.layers.linear import W4A4Linear, precomputed

# Output channels of every linear are whole panels, so that q, k and v can be one call.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
FUSED = ["llama", "llama-bias", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2"]
CONFIG = {"group_size": 16, "salient_prop": 0.1, "calibration": "weights"}


@contextmanager
def stepwise():
    use_fused_layers(False)
    try:
        yield
    finally:
        use_fused_layers(True)


def quantized(make_model, architecture="llama", dtype=torch.float32, changes=None, **fields):
    changes = changes or {}
    if architecture in ("qwen3", "gemma", "gemma2"):
        changes = {"head_dim": 16, **changes}
    model = make_model(architecture, **{**SIZES, **changes}).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize(model, MixedQuantConfig(**{**CONFIG, **fields}), progress=False)
    return model


def layers_of(model):
    return model.get_decoder().layers


def fused_calls(model):
    """How many layers have prepared calls."""
    states = [decoder._STATES.get(layer) for layer in layers_of(model)]
    return sum(state is not None and state[1] is not None for state in states)


def assert_close(a, b, tolerance):
    assert (a - b).float().norm() <= tolerance * b.float().norm()


def assert_same(a, b):
    """But for values that lie between two codes and fall to either side."""
    errors = (a - b).float().norm(dim=-1) / b.float().norm(dim=-1)
    assert errors.median() < 1e-5 and errors.max() < 0.1


def with_cache(cache):
    """The cache as an argument of a model's forward; its name depends on the version."""
    return {cache_argument(LlamaForCausalLM): cache}


def beside_the_steps(model, ids, new_cache, start, end):
    """Read tokens one at a time, fused and by separate steps, without padding and with 7 tokens of
    it.

    Args:
        ids: int64 [2, T]; the first `start` tokens are the prompt.
        new_cache: makes an empty cache.

    Yields:
        (position, cache of the fused layers, cache of the steps, relative errors of the logits)
    """
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for options in ({}, {"attention_mask": mask}):
        cache = new_cache()
        prompt = {key: m[:, :start] for key, m in options.items()}
        model(ids[:, :start], **with_cache(cache), **prompt)
        for at in range(start, end):
            other = copy.deepcopy(cache)
            more = {key: m[:, : at + 1] for key, m in options.items()}
            with stepwise():
                expected = model(ids[:, at : at + 1], **with_cache(other), **more).logits
            actual = model(ids[:, at : at + 1], **with_cache(cache), **more).logits
            errors = (actual - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
            yield at, cache, other, errors


@pytest.mark.parametrize(
    "architecture", at_length(FUSED, ["llama-bias", "qwen3", "phi3", "gemma2"])
)
@torch.no_grad()
def test_logits_are_those_of_the_separate_steps(make_model, architecture, token_ids):
    model = quantized(make_model, architecture, act_bits=8, salient_format="int8")
    with stepwise():
        expected = model(token_ids).logits
    assert fused_calls(model) == 0
    actual = model(token_ids).logits
    assert fused_calls(model) == 2
    assert_same(actual, expected)
    cache = with_cache(DynamicCache(config=model.config))
    one_by_one = [model(token_ids[:, i : i + 1], **cache).logits for i in range(6)]
    assert_same(torch.cat(one_by_one, 1), expected[:, :6])


@pytest.mark.parametrize(
    "fields",
    [
        {"recipe": "rtn"},
        {"recipe": "rtn", "act_quant": "per_token", "salient_prop": 0.0},
        {"recipe": "fast"},
        {"recipe": "fast", "act_bits": 8},
        {"recipe": "rtn", "act_format": "zero_point", "group_size": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype",
    at_length([torch.float32, torch.bfloat16, torch.float16], [torch.float32, torch.bfloat16]),
)
@torch.no_grad()
def test_every_format_and_dtype(make_model, token_ids, fields, dtype):
    """In a model of one layer, the only noise is that of the norms."""
    model = quantized(make_model, "qwen2", dtype, {"num_hidden_layers": 1}, **fields)
    for ids in (token_ids, token_ids[:1, :1]):
        with stepwise():
            expected = model(ids, use_cache=False).logits
        actual = model(ids, use_cache=False).logits
        assert fused_calls(model) == 1
        assert actual.dtype == expected.dtype
        same = (actual - expected).abs() <= 1e-4 * expected.abs().max()
        assert same.float().mean() > 0.95 and (len(ids) > 1 or dtype != torch.float32 or same.all())
        assert_close(actual, expected, 0.1)


@pytest.mark.parametrize("architecture", at_length(FUSED, ["llama", "gemma2"]))
def test_generation_with_padding_beams_and_caches(make_model, architecture, token_ids):
    model = quantized(make_model, architecture, act_bits=8)
    mask = torch.ones_like(token_ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        with stepwise():
            expected = model.generate(token_ids, **options, **more)
        assert torch.equal(model.generate(token_ids, **options, **more), expected)


@torch.no_grad()
def test_a_sliding_window(make_model, token_ids):
    model = quantized(make_model, "mistral", act_bits=8, changes={"sliding_window": 7})
    with stepwise():
        expected = model(token_ids).logits
    assert_same(model(token_ids).logits, expected)
    assert fused_calls(model) == 2


@torch.no_grad()
def test_static_caches(make_model, token_ids):
    model = quantized(make_model, act_bits=8)
    expected = model(token_ids).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    first = model(token_ids[:, :20], **with_cache(cache)).logits
    second = model(token_ids[:, 20:], **with_cache(cache)).logits
    assert_same(torch.cat((first, second), 1), expected)


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of sequences and layers in the calls that decoded one token per sequence."""
    calls, original = [], decoder._C.decode

    def counted(layers, *args):
        calls.append((args[-2], len(layers)))
        original(layers, *args)

    monkeypatch.setattr(decoder._C, "decode", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "architecture", at_length(["llama", "mistral", "qwen2", "gemma"], ["qwen2"])
)
@torch.no_grad()
def test_one_token_at_a_time(make_model, token_ids, decoded, architecture, dtype):
    one = {"num_hidden_layers": 1}
    if architecture == "mistral":
        one["sliding_window"] = None
    model = quantized(make_model, architecture, dtype, one, act_bits=8)
    near = 1e-3 if dtype == torch.float32 else 2e-2  # a code may fall to another side
    new_cache = partial(DynamicCache, config=model.config)
    for _, cache, other, errors in beside_the_steps(model, token_ids, new_cache, 10, 24):
        for mine, theirs in zip(cache.layers, other.layers, strict=True):
            assert_close(mine.values, theirs.values, near)
            assert_close(mine.keys, theirs.keys, near)
        assert errors.max() < 0.05
    # The first token is computed by the stack and by its layer.
    assert decoded == [(2, 1)] * 29


@torch.no_grad()
def test_all_layers_of_a_token_are_one_call(make_model, token_ids, decoded):
    """Unless something looks at what lies between two layers."""
    model = quantized(make_model, changes={"num_hidden_layers": 4}, act_bits=8)
    layers = layers_of(model)
    seen = []

    def look(layer, args, output):
        seen.append(output)

    def hooked():
        return layers[2].register_forward_hook(look)

    def wrapped():
        forward = layers[1].forward
        layers[1].forward = lambda x, **kwargs: seen.append(x) or forward(x, **kwargs)
        return type("Handle", (), {"remove": lambda _: layers[1].__dict__.pop("forward")})()

    def inner_hook():
        return layers[1].mlp.register_forward_hook(lambda *_: None)

    # {what is done to the model: the numbers of layers in the calls of a token}
    by_layers = [1] * 4
    for change, calls in (
        (None, [4, *by_layers]),  # the first token, computed in both ways
        (None, [4]),
        (hooked, by_layers),
        (wrapped, by_layers),
        (inner_hook, by_layers[1:]),
    ):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(token_ids[:, :5], **with_cache(cache))
        handle = change() if change else None
        decoded.clear(), seen.clear()
        actual = model(token_ids[:, 5:6], **with_cache(caches[0])).logits
        assert [layers for _, layers in decoded] == calls
        mine = seen[:]
        seen.clear()
        with stepwise():
            expected = model(token_ids[:, 5:6], **with_cache(caches[1])).logits
        assert_same(actual, expected)
        for a, b in zip(mine, seen, strict=True):
            assert_same(a, b)
        if handle:
            handle.remove()


@pytest.mark.parametrize(
    "architecture", at_length(["llama", "mistral", "qwen2", "gemma"], ["gemma", "mistral"])
)
@torch.no_grad()
def test_a_stack_gives_what_its_layers_give(make_model, token_ids, decoded, architecture):
    """Bit for bit, whatever it is called with."""
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    model = quantized(make_model, architecture, act_bits=8, changes=changes)
    embed = model.get_input_embeddings()
    mask = torch.ones_like(token_ids)
    mask[1, :3] = 0

    def logits(at, cache, kind):
        ids, options = token_ids[:, :5] if at == 5 else token_ids[:, at - 1 : at], {}
        if kind == "padding":
            options["attention_mask"] = mask[:, :at]
        if kind == "positions":
            options["position_ids"] = torch.arange(at - ids.shape[1], at).expand_as(ids) + 2
        if kind == "embeddings":
            options["inputs_embeds"], ids = embed(ids), None
        return model(ids, **options, **with_cache(cache)).logits

    for kind in ("ids", "padding", "positions", "embeddings", "inference mode"):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        with torch.inference_mode() if kind == "inference mode" else nullcontext():
            for at in range(5, 10):
                decoded.clear()
                together = logits(at, caches[0], kind)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(decoder, "_stack_of", lambda stack: None)
                    apart = logits(at, caches[1], kind)
                assert torch.equal(together, apart)
                assert decoded[0] == (2, 2) if at > 5 else not decoded
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
            assert one.get_seq_length() == 9


@torch.no_grad()
def test_a_window_counts_in_a_cache_that_keeps_all_tokens(make_model, token_ids):
    model = quantized(make_model, "mistral", act_bits=8, changes={"sliding_window": 7})
    with stepwise():
        expected = model(token_ids).logits
    cache = with_cache(DynamicCache())
    steps = [model(token_ids[:, i : i + 1], **cache).logits for i in range(token_ids.shape[1])]
    assert_same(torch.cat(steps, 1), expected)


@torch.no_grad()
def test_a_stack_that_computes_something_else_is_left_alone(make_model, token_ids, monkeypatch):
    """As a later version of transformers may have it."""
    cls = type(make_model("llama", **SIZES).get_decoder())
    plain = cls.forward

    def forward(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.last_hidden_state = 2 * out.last_hidden_state
        return out

    forward.__module__ = cls.__module__
    monkeypatch.setattr(cls, "forward", forward)
    monkeypatch.setattr(decoder, "_CLASSES", {})  # which remember the plain forward
    model = quantized(make_model, act_bits=8)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for i in range(4):
        ids = token_ids[:, i : i + 1]
        actual = model(ids, **with_cache(caches[0])).logits
        with stepwise():
            assert_same(actual, model(ids, **with_cache(caches[1])).logits)
    assert decoder._STACKS[model.get_decoder()].result is False


@torch.no_grad()
def test_a_stack_asks_the_cache_that_it_is_given(make_model, token_ids):
    """Layers put into a known cache, such as those of a stored prefix, count at once."""
    model = quantized(make_model, act_bits=8)
    cache, prefix = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(token_ids[:, :8], **with_cache(prefix))
    for i in range(9):
        model(token_ids[:, i : i + 1], **with_cache(cache))
    expected = model(token_ids[:, 8:9], **with_cache(copy.deepcopy(prefix))).logits
    cache.layers[:] = copy.deepcopy(prefix.layers)
    assert torch.equal(model(token_ids[:, 8:9], **with_cache(cache)).logits, expected)
    assert cache.get_seq_length() == 9


@torch.no_grad()
def test_a_stack_does_not_keep_a_cache_that_is_reset(make_model, token_ids):
    model = quantized(make_model, act_bits=8)
    cache = DynamicCache(config=model.config)
    for i in range(4):
        model(token_ids[:, i : i + 1], **with_cache(cache))
    keys = weakref.ref(cache.layers[0]._room[0])
    cache.reset()
    assert keys() is None


@torch.no_grad()
def test_odd_arguments_of_a_stack_are_those_of_transformers(make_model, token_ids):
    model = quantized(make_model, "qwen2", act_bits=8)
    cache = DynamicCache(config=model.config)
    for i in range(3):
        model(token_ids[:, i : i + 1], **with_cache(cache))

    def outcome(**options):
        try:
            return model(**options, **with_cache(copy.deepcopy(cache))).logits
        except (RuntimeError, ValueError) as error:
            return type(error)

    ids = token_ids[:, 3:4]
    for options in (
        {"inputs_embeds": torch.randn(2, 1, 16)},
        {"inputs_embeds": torch.randn(2, 1, 64)},
        {"inputs_embeds": torch.randn(2, 1, 64).half()},
        {"input_ids": ids, "attention_mask": {"full_attention": None}},
        {"input_ids": ids, "attention_mask": torch.ones(2, 3)},
        {"input_ids": ids, "attention_mask": torch.zeros(2, 4)},
        {"input_ids": ids, "position_ids": torch.tensor([[3], [5]])},
    ):
        actual = outcome(**options)
        with stepwise():
            expected = outcome(**options)
        if isinstance(expected, type):
            assert actual is expected
        else:
            assert torch.equal(actual.isnan(), expected.isnan())
            assert_same(actual.nan_to_num(), expected.nan_to_num())
    torch.set_default_device("meta")
    try:
        assert_same(outcome(input_ids=ids), model(ids, **with_cache(cache)).logits)
    finally:
        torch.set_default_device(None)


@torch.no_grad()
def test_a_stack_that_stops_early_still_runs_all_of_its_layers(make_model, token_ids, decoded):
    model = quantized(make_model, changes={"num_hidden_layers": 4}, act_bits=8)
    model.config.num_hidden_layers = 3
    caches = [DynamicCache() for _ in range(2)]
    for cache in caches:
        model(token_ids[:, :5], **with_cache(cache))
    actual = model(token_ids[:, 5:6], **with_cache(caches[0])).logits
    assert decoded == [(2, 1)] * 3
    with stepwise():
        assert_same(actual, model(token_ids[:, 5:6], **with_cache(caches[1])).logits)


@torch.no_grad()
def test_two_layers_with_one_cache_do_not_wait_for_each_other(make_model, token_ids, decoded):
    model = quantized(make_model, act_bits=8)
    layers_of(model)[1].self_attn.layer_idx = 0
    cache = DynamicCache(config=model.config)
    logits = [model(token_ids[:, i : i + 1], **with_cache(cache)).logits for i in range(3)]
    assert all(torch.isfinite(found).all() for found in logits)
    assert decoded and {layers for _, layers in decoded} == {1}


@torch.no_grad()
def test_a_patched_stack_sees_what_lies_between_its_layers(make_model, token_ids, monkeypatch):
    model = quantized(make_model, act_bits=8)
    stack = model.get_decoder()
    original, seen = stack.float_class.forward, []

    def patched(self, *args, **kwargs):
        first = type(self.layers[0])
        forward = first.forward

        def watched(layer, x, *more, **options):
            seen.append(x.clone())
            return forward(layer, x, *more, **options)

        with monkeypatch.context() as patch:
            patch.setattr(first, "forward", watched)
            return original(self, *args, **kwargs)

    cache = DynamicCache(config=model.config)
    model(token_ids[:, :5], **with_cache(cache))
    monkeypatch.setattr(stack.float_class, "forward", patched)
    model(token_ids[:, 5:6], **with_cache(cache))
    assert len(seen) == 2 and not torch.equal(*seen)


@torch.no_grad()
def test_a_layer_by_itself_is_computed_at_once(make_model, token_ids, decoded):
    model = quantized(make_model, act_bits=8)
    layer, cache = layers_of(model)[0], DynamicCache(config=model.config)
    model(token_ids[:, :5], **with_cache(cache))
    position = model.get_decoder().rotary_emb(torch.zeros(1), torch.tensor([[5]]))
    x = torch.randn(2, 1, 64)
    assert not torch.equal(layer(x, position_embeddings=position, **with_cache(cache)), x)
    assert decoded == [(2, 1)]


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_behind(make_model, token_ids, monkeypatch):
    model = quantized(make_model, act_bits=8)
    cache = DynamicCache(config=model.config)
    model(token_ids[:, :5], **with_cache(cache))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layers_of(model)[1].float_class, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            model(token_ids[:, 5:6], **with_cache(cache))
    with stepwise():
        expected = model(token_ids).logits
    assert_same(model(token_ids).logits, expected)


@torch.no_grad()
def test_unusual_attention_is_left_to_transformers(make_model, token_ids, decoded):
    for changes, cls in (
        ({"attn_implementation": "eager"}, DynamicCache),
        ({"sliding_window": 7}, DynamicCache),
        ({}, lambda config: StaticCache(config=config, max_cache_len=32)),
    ):
        implementation = changes.get("attn_implementation")
        model = quantized(
            make_model,
            "mistral",
            act_bits=8,
            changes={k: v for k, v in changes.items() if k != "attn_implementation"},
        )
        if implementation:
            model.set_attn_implementation(implementation)
        with stepwise():
            expected = model(token_ids).logits
        cache = with_cache(cls(config=model.config))
        steps = [model(token_ids[:, i : i + 1], **cache).logits for i in range(24)]
        assert_same(torch.cat(steps, 1), expected)
    assert not decoded


@torch.no_grad()
def test_a_cache_grows_in_place_and_never_changes_what_it_returned(make_model, token_ids):
    model = quantized(make_model, act_bits=8)
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ids = token_ids[:, :3]
    returned, addresses = [], set()
    for step in range(100):
        model(ids, **with_cache(cache))
        for mine, other in zip(cache.layers, plain.layers, strict=True):
            assert type(mine) is GrowingLayer
            new = ids.shape[1]
            other.update(mine.keys[..., -new:, :].clone(), mine.values[..., -new:, :].clone())
            assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)
        layer = cache.layers[0]
        returned.append((layer.keys, layer.keys.clone()))
        addresses.add(layer.keys.data_ptr())
        ids = torch.full((len(layer.keys), 1), step % 90)
        if step in (50, 52):
            cache.crop(-3), plain.crop(-3)
        if step == 70:
            order = torch.tensor([1, 0])
            cache.reorder_cache(order), plain.reorder_cache(order)
        if step == 80:
            cache.batch_repeat_interleave(2), plain.batch_repeat_interleave(2)
            ids = ids.repeat(2, 1)
    assert all(torch.equal(view, value) for view, value in returned)
    assert len(addresses) < 10
    with torch.inference_mode():
        inside = copy.deepcopy(cache)
        model(ids, **with_cache(inside))
    model(ids, **with_cache(inside))
    first, second = copy.deepcopy(cache), copy.deepcopy(cache)
    model(ids, **with_cache(first))
    model(torch.zeros_like(ids), **with_cache(second))
    assert not torch.equal(first.layers[0].keys, second.layers[0].keys)
    assert torch.equal(first.layers[0].keys[..., :-1, :], cache.layers[0].keys)
    cache.reset()
    model(token_ids, **with_cache(cache))
    assert cache.get_seq_length() == token_ids.shape[1]


@torch.no_grad()
def test_a_token_does_not_depend_on_others_in_the_batch(make_model):
    model = quantized(make_model)
    layer = layers_of(model)[0]
    x = torch.randn(5, 1, 64)
    rotary = model.get_decoder().rotary_emb(x, torch.zeros(5, 1, dtype=torch.long))
    whole = layer(x, position_embeddings=rotary)
    for i in range(5):
        alone = layer(x[i : i + 1], position_embeddings=tuple(t[i : i + 1] for t in rotary))
        assert torch.equal(alone, whole[i : i + 1])
    assert fused_calls(model) == 1


def test_gradients_training_and_autocast_take_the_steps(make_model, token_ids):
    model = quantized(make_model)
    model(token_ids).logits.sum().backward()
    assert model.get_decoder().norm.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(token_ids)
    with torch.no_grad():
        model.train()(token_ids)
    assert fused_calls(model) == 0
    with torch.inference_mode():
        model.eval()(token_ids)
    assert fused_calls(model) == 2


@torch.no_grad()
def test_hooks_see_what_they_always_saw(make_model, token_ids):
    model = quantized(make_model)
    model(token_ids)
    seen = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp", "input_layernorm", "self_attn"):
        module = layers_of(model)[0].get_submodule(name)
        handle = module.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
        expected = model(token_ids).logits
        handle.remove()
        out = seen[name][0] if isinstance(seen[name], tuple) else seen[name]
        assert out.isfinite().all() and out.shape[:2] == token_ids.shape
        assert_close(model(token_ids).logits, expected, 0.1)
    called = []
    inner = layers_of(model)[0].mlp.up_proj
    plain = inner.forward
    inner.forward = lambda x: called.append(x.shape) or plain(x)
    model(token_ids)
    assert called
    del inner.forward
    model(token_ids)
    assert len(called) == 1
    with stepwise():
        steps = model(token_ids, output_attentions=True, output_hidden_states=True)
    fused = model(token_ids, output_attentions=True, output_hidden_states=True)
    assert len(fused.hidden_states) == 3
    if steps.attentions is not None:
        assert len(fused.attentions) == len(steps.attentions)


@torch.no_grad()
def test_replaced_modules_and_tensors_are_noticed(make_model, token_ids):
    model = quantized(make_model)
    before = model(token_ids).logits
    layer = layers_of(model)[0]

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    plain = layer.mlp.down_proj
    layer.mlp.down_proj = Doubled(plain)
    with stepwise():
        expected = model(token_ids).logits
    assert_close(model(token_ids).logits, expected, 0.05)
    assert fused_calls(model) == 1
    layer.mlp.down_proj = plain
    assert torch.equal(model(token_ids).logits, before)
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 3
    with stepwise():
        expected = model(token_ids).logits
    assert_close(model(token_ids).logits, expected, 0.05)
    model.to(torch.bfloat16)
    with stepwise():
        expected = model(token_ids).logits
    actual = model(token_ids).logits
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected, 0.1)


def hooked_anew(layer):
    layer.mlp._forward_hooks = OrderedDict()
    layer.mlp.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = {
    "bias in place": lambda layer: layer.self_attn.q_proj.bias.add_(1),
    "bias of o in place": lambda layer: layer.self_attn.o_proj.bias.add_(1),
    "a bias where there was none": lambda layer: setattr(
        layer.mlp.down_proj, "bias", torch.ones(64)
    ),
    "weights in place": lambda layer: layer.mlp.down_proj.scales.mul_(2),
    "norm in place": lambda layer: layer.input_layernorm.weight.data.mul_(3),
    "perm of k in place": lambda layer: layer.self_attn.k_proj.perm.copy_(
        layer.self_attn.k_proj.perm.flip(0)
    ),
    "activation": lambda layer: setattr(layer.mlp, "act_fn", nn.Tanh()),
    "hook on the activation": lambda layer: layer.mlp.act_fn.register_forward_hook(
        lambda module, args, out: 2 * out
    ),
    "hooks replaced": hooked_anew,
    "epsilon": lambda layer: setattr(
        layer, "input_layernorm", type(layer.input_layernorm)(64, eps=10.0)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_after_a_call_count(make_model, token_ids, change):
    one = {"num_hidden_layers": 1}
    model = quantized(make_model, "llama-bias", changes=one | {"mlp_bias": False}, act_bits=8)
    before = model(token_ids).logits
    change(layers_of(model)[0])
    with stepwise():
        expected = model(token_ids).logits
    assert not torch.allclose(before, expected, rtol=1e-3)
    assert_same(model(token_ids).logits, expected)


@torch.no_grad()
def test_only_the_classes_of_transformers_are_fused(make_model, token_ids, monkeypatch):
    model = quantized(make_model, act_bits=8)
    layer = layers_of(model)[0]

    class Other(layer.float_class):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    dequantize(model)
    for layer in layers_of(model):
        layer.__class__ = Other
    quantize(model, MixedQuantConfig(**CONFIG), progress=False)
    with stepwise():
        expected = model(token_ids).logits
    assert torch.equal(model(token_ids).logits, expected)
    assert fused_calls(model) == 0

    model = quantized(make_model, act_bits=8)
    model(token_ids)
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * plain(self, x))
    with stepwise():
        expected = model(token_ids).logits
    assert torch.equal(model(token_ids).logits, expected)


@torch.no_grad()
def test_attention_functions_of_another_dtype(make_model, token_ids):
    def in_fp32(module, query, key, value, mask, **kwargs):
        out, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return out.float(), weights

    ALL_ATTENTION_FUNCTIONS.register("in_fp32", in_fp32)
    ALL_MASK_ATTENTION_FUNCTIONS.register("in_fp32", sdpa_mask)
    model = quantized(make_model, dtype=torch.bfloat16, changes={"num_hidden_layers": 1})
    model.set_attn_implementation("in_fp32")
    outputs = []
    for context in (stepwise(), nullcontext()):
        with context:
            try:
                outputs.append(model(token_ids).logits.float())
            except RuntimeError as error:
                outputs.append(str(error))
    assert type(outputs[0]) is type(outputs[1])
    if isinstance(outputs[0], str):
        assert outputs[0] == outputs[1]
    else:
        assert_close(outputs[1], outputs[0], 0.05)


@torch.no_grad()
def test_caches_that_do_more_are_asked(make_model, token_ids):
    seen = []

    class Recording(DynamicCache):
        def update(self, keys, *args, **kwargs):
            seen.append(keys.shape[-2])
            return super().update(keys, *args, **kwargs)

    model = quantized(make_model, act_bits=8)
    cache = with_cache(Recording(config=model.config))
    for part in (token_ids[:, :5], token_ids[:, 5:6], token_ids[:, 6:7]):
        model(part, **cache)
    assert seen == [5, 5, 1, 1, 1, 1]


@torch.no_grad()
def test_forked_caches_do_not_write_to_each_other(make_model, token_ids):
    model = quantized(make_model, act_bits=8)
    base = DynamicCache(config=model.config)
    model(token_ids[:, :10], **with_cache(base))
    forks = []
    for _ in range(2):
        fork = DynamicCache(config=model.config)
        fork.layers = [copy.copy(layer) for layer in base.layers]
        forks.append(fork)
    ids = [torch.full((2, 1), 5), torch.full((2, 1), 50)]
    first = model(ids[0], **with_cache(forks[0])).logits
    model(ids[1], **with_cache(forks[1]))
    model(ids[0], **with_cache(forks[0]))
    again = DynamicCache(config=model.config)
    model(torch.cat((token_ids[:, :10], ids[0]), 1), **with_cache(again))
    for mine, other in zip(forks[0].layers, again.layers, strict=True):
        assert_close(mine.keys[..., :11, :], other.keys, 0.02)
    assert first.isfinite().all()


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(make_model, token_ids):
    small = quantized(make_model, changes={"num_key_value_heads": 1, "head_dim": 16})
    model = quantized(make_model)
    cache = DynamicCache(config=small.config)
    small(token_ids[:, :5], **with_cache(cache))
    with pytest.raises(RuntimeError):
        model(token_ids[:, 5:6], **with_cache(cache))
    layer = layers_of(model)[0]
    rotary = model.get_decoder().rotary_emb(torch.randn(1, 2, 64), torch.arange(2)[None])
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(1, 2, 60), position_embeddings=rotary)


@torch.no_grad()
def test_copies_and_pickles(make_model, token_ids, tmp_path):
    model = quantized(make_model)
    expected = model(token_ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        weight = layers_of(other)[0].mlp.down_proj.qweight
        assert weight.data_ptr() != layers_of(model)[0].mlp.down_proj.qweight.data_ptr()
        assert_close(other(token_ids).logits, expected, 0.05)
        weight.zero_()  # of the copy only
        assert torch.equal(model(token_ids).logits, expected)
    save_quantized(model, tmp_path / "q")
    for load in (load_quantized, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path / "q")
        assert torch.equal(again(token_ids).logits, expected)
        assert fused_calls(again) == 2
    assert type(layers_of(model)[0]).__name__ == "LlamaDecoderLayer"


@torch.no_grad()
def test_dequantizing_gives_the_classes_back(make_model, token_ids):
    model = quantized(make_model)
    model(token_ids)
    dequantize(model)
    plain = make_model("llama", **SIZES)
    assert type(layers_of(model)[0]) is type(layers_of(plain)[0])


@torch.no_grad()
def test_threads(make_model, token_ids):
    model = quantized(make_model)
    prompts = [token_ids[:, : 4 + i] for i in range(6)]
    expected = [model(ids).logits for ids in prompts]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(prompts[i]).logits, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_what_cannot_be_fused_takes_the_steps(make_model, token_ids):
    odd = make_model("llama")  # k and v have 24 outputs, one and a half panels
    quantize(odd, MixedQuantConfig(**CONFIG), progress=False)
    simulated = quantized(make_model, backend="fake")
    kept = quantized(make_model, ignore=["model.layers.0.mlp.up_proj"])
    outputs = quantized(make_model, quantize_output=True)
    moe = make_model("mixtral", **SIZES)
    quantize(moe, MixedQuantConfig(**CONFIG), progress=False)
    for model, count in ((odd, 0), (simulated, 0), (kept, 1), (outputs, 0), (moe, 0)):
        with stepwise():
            expected = model(token_ids).logits
        assert_close(model(token_ids).logits, expected, 0.05)
        assert fused_calls(model) == count


def test_a_result_is_handed_over_once_or_it_is_an_error():
    layer = W4A4Linear(32, 16, config=MixedQuantConfig(recipe="rtn", group_size=16))
    x, ready = torch.randn(2, 32), torch.randn(2, 16)
    with precomputed({layer: ready}):
        assert layer(x) is ready
        assert torch.equal(layer(x), torch.zeros(2, 16))
    with pytest.raises(RuntimeError, match="was not called"), precomputed({layer: ready}):
        pass
    assert torch.equal(layer(x), torch.zeros(2, 16))


@pytest.mark.long
def test_an_environment_variable_turns_it_off(run_python):
    code = "from smoothquant.layers import decoder; print(decoder._enabled)"
    assert run_python(code, MIXEDQUANT_FUSED_LAYERS="0").stdout.strip() == "False"
    assert run_python(code).stdout.strip() == "True"
