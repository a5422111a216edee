"""The key-value cache in INT8 and INT4, by itself and below models."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from length import at_length
from test_decoder import beside_the_steps, quantized, stepwise, with_cache
from transformers import AutoConfig, DynamicCache

from smoothquant import QuantizedKVCache
from smoothquant.layers import decoder
from smoothquant.layers.cache import (
    BLOCK,
    QuantizedLayer,
    QuantizedSlidingLayer,
    group_size,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
)

FAMILIES = ["gemma2", "opt", "mistral", "llama", "phi3", "qwen2", "qwen3", "gpt_neox"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PACKING = {"keys": (pack_keys, unpack_keys), "values": (pack_values, unpack_values)}


def states(tokens, dtype=torch.float32, shape=(2, 3), head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *shape, tokens, head_dim, generator=generator)
    return (x * torch.linspace(0.1, 9, head_dim) + 2).to(dtype).unbind()


def round_trip(x, kind, bits):
    pack, unpack = PACKING[kind]
    return unpack(pack(x, bits), x.shape[-1], bits, x.dtype)


def in_groups(x, kind):
    """[..., group] of the values that share a scale."""
    blocks = x.unflatten(-2, (-1, BLOCK))
    if kind == "keys":
        return blocks.transpose(-1, -2)
    return blocks.unflatten(-1, (-1, group_size(x.shape[-1])))


@pytest.mark.parametrize("kind", PACKING)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", at_length([64, 80, 61, 2, 1], [80, 61, 1]))
def test_values_move_by_at_most_half_a_scale(kind, bits, dtype, head_dim):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = states(2 * BLOCK, dtype, head_dim=head_dim)[0]
    x[0, 0] = 0
    x[0, 1, :, :] = largest
    x[0, 2, 3], x[0, 2, 4] = -largest / 2, largest / 2
    x[1, 0] *= tiny
    x[1, 1] = 1e4 + x[1, 1]
    back = round_trip(x, kind, bits)
    assert back.dtype == dtype and back.shape == x.shape and back.isfinite().all()
    given, got = in_groups(x.double(), kind), in_groups(back.double(), kind)
    low, high = given.amin(-1, keepdim=True), given.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    # a scale is rounded up to dtype, and is 0 below the smallest normal number of float32
    eps = torch.finfo(dtype).eps
    scale = scale * (1 + eps) + torch.finfo(dtype).smallest_normal * eps
    rounding = torch.maximum(low.abs(), high.abs()) * eps
    error = (got - given).abs()
    ordinary = scale > 2**bits * torch.finfo(torch.float32).tiny
    top = got + scale > largest  # no code there, if it could be beyond the largest number
    assert (error <= torch.where(top, scale, scale / 2) + rounding)[ordinary.expand_as(error)].all()
    assert (error <= high - low + rounding).all()
    assert torch.equal(got.amin(-1, keepdim=True), low)  # the least value is exact
    constant = (high == low).expand_as(given)
    assert torch.equal(got[constant], given[constant])


@pytest.mark.parametrize("kind", PACKING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_values_that_are_not_finite_are_not_hidden(kind, bad):
    x = states(2 * BLOCK, head_dim=64)[0]
    x[1, 2, 41, 35] = x[1, 2, 40, 36] = -1e38  # with 3.4e38, more than float32 can hold
    clean = round_trip(x, kind, 4)
    x[1, 2, 40, 35] = bad
    back = round_trip(x, kind, 4)
    groups = in_groups(back, kind)
    hit = groups.isnan().any(-1)
    assert hit.sum() == 1 and groups[hit].isnan().all()
    assert torch.equal(groups[~hit], in_groups(clean, kind)[~hit])


def test_the_bytes_of_a_block():
    """As csrc/mixedquant.h describes them."""
    x = torch.arange(32).float()[:, None] + torch.arange(3)  # [tokens, head_dim]
    keys, values = pack_keys(x, 4)[0], pack_values(x, 4)[0]
    assert keys.numel() == 32 * 2 + 2 * 3 * 4 and values.numel() == 32 * 2 + 2 * 32 * 4
    codes = keys[:64].view(32, 2)
    assert codes[31].tolist() == [15 | 15 << 4, 15] and codes[0].tolist() == [0, 0]
    scales, zeros = keys[64:].view(torch.float32).view(2, 3)
    assert torch.equal(scales, torch.tensor([31 / 15]).expand(3)) and zeros.tolist() == [0, 1, 2]
    codes = values[:64].view(32, 2)  # 0, 1 and 2 are codes 0, 7 and 15
    assert codes.tolist() == [[0 | 15 << 4, 7]] * 32
    scales, zeros = values[64:].view(torch.float32).view(2, 32)
    assert torch.equal(zeros, torch.arange(32.0)) and torch.equal(scales[3], torch.tensor(2 / 15))


def layer_with(tokens, bits=8, dtype=torch.float32, cls=QuantizedLayer, chunks=1, **options):
    layer = cls(bits, **options)
    keys, values = states(tokens, dtype)
    for k, v in zip(keys.chunk(chunks, -2), values.chunk(chunks, -2), strict=True):
        out = layer.update(k, v)
    return layer, (keys, values), out


def stored(layer):
    """All keys and values in a layer."""
    none = torch.zeros(*layer.keys.shape[:2], 0, layer.keys.shape[-1], dtype=layer.keys.dtype)
    return copy.deepcopy(layer).update(none, none)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [1, 10, 200])
def test_a_layer_returns_new_tokens_as_given_and_old_ones_dequantized(dtype, chunks):
    layer, (keys, values), out = layer_with(200, 8, dtype, chunks=chunks)
    assert layer.get_seq_length() == 200 and layer.blocks[0].shape[2] == 5
    expected = [
        torch.cat((round_trip(x[..., :160, :], kind, 8), x[..., 160:, :]), -2)
        for x, kind in ((keys, "keys"), (values, "values"))
    ]
    assert all(map(torch.equal, stored(layer), expected))
    new = 200 // chunks
    assert torch.equal(out[0][..., -new:, :], keys[..., -new:, :])
    assert out[1].shape == values.shape and out[1].dtype == dtype


@torch.no_grad()
def test_memory_is_the_sum_of_the_tensors_and_grows_in_place():
    layer, _, _ = layer_with(4096, 4, torch.bfloat16)
    assert layer.nbytes == sum(t.nbytes for t in (*layer.blocks, layer.keys, layer.values))
    rooms = set()
    returned = []
    for i in range(100):
        token = states(1, torch.bfloat16, seed=i)
        returned.append([(t, t.clone()) for t in layer.update(*token)])
        rooms.add(layer.keys.data_ptr())
        tensors = (*layer.blocks, *(layer._room or (layer.keys, layer.values)))
        assert layer.nbytes == sum(t.nbytes for t in tensors)
    assert len(rooms) < 12
    assert all(torch.equal(view, value) for pair in returned for view, value in pair)
    plain = 2 * 2 * 3 * 16 * 2  # keys and values of 2 sequences, 3 heads, 16 channels in 16 bits
    codes, scales = plain // 4, 2 * 2 * 2 * 3 * (16 // 32 + 16 // 16) * 2
    assert codes < layer.nbytes / 4196 < codes + scales + 0.06 * plain


def test_crop_within_recent_tokens_and_into_blocks():
    layer, _, _ = layer_with(200, 4)
    before = stored(layer)
    for removed, left in ((-5, 195), (-40, 155), (0, 155), (-27, 128), (100, 100), (500, 100)):
        layer.crop(removed)
        assert layer.get_seq_length() == left
        assert all(
            torch.equal(a, b[..., :left, :]) for a, b in zip(stored(layer), before, strict=True)
        )
    assert layer.nbytes == sum(t.nbytes for t in (*layer.blocks, layer.keys, layer.values))
    more = states(50, seed=1)
    keys, _ = layer.update(*more)
    assert keys.shape[-2] == 150 and torch.equal(keys[..., 100:, :], more[0])
    layer.crop(-1000)
    assert layer.get_seq_length() == 0 and layer.blocks is None
    layer.update(*states(3, shape=(1, 2), head_dim=8))  # as a new one
    assert layer.get_seq_length() == 3


def test_sequences_are_chosen_and_repeated():
    layer, _, _ = layer_with(150)
    keys, values = stored(layer)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(stored(layer)[0], keys.flip(0))
    layer.batch_repeat_interleave(3)
    assert torch.equal(stored(layer)[1], values.flip(0).repeat_interleave(3, 0))
    layer.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(stored(layer)[0], keys.flip(0))
    layer.update(*states(1))
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    layer.update(*states(2, torch.float16, (5, 1), 24))
    assert layer.get_seq_length() == 2


def test_copies_do_not_write_to_each_other():
    layer, _, _ = layer_with(95)
    fork = copy.copy(layer)
    expected = stored(layer)
    fork.update(*states(40, seed=1))
    layer.update(*states(40, seed=2))
    assert torch.equal(stored(fork)[0][..., :63, :], stored(layer)[0][..., :63, :])
    assert torch.equal(stored(fork)[0][..., -32:, :], states(40, seed=1)[0][..., -32:, :])
    assert torch.equal(stored(layer)[0][..., -32:, :], states(40, seed=2)[0][..., -32:, :])
    assert torch.equal(stored(layer)[0][..., :32, :], expected[0][..., :32, :])


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_a_sliding_window_keeps_what_it_needs(chunk):
    window = 90
    layer = QuantizedSlidingLayer(8, window)
    plain = DynamicCache(config=AutoConfig.for_model("mistral", sliding_window=window)).layers[0]
    for i in range(350 // chunk):
        token = states(chunk, seed=i)
        assert layer.get_mask_sizes(chunk) == plain.get_mask_sizes(chunk)
        for mine, other in zip(layer.update(*token), plain.update(*token), strict=True):
            assert mine.shape == other.shape and (mine - other).abs().max() < 0.2
        assert layer.get_seq_length() == plain.get_seq_length()
        assert layer.stored_tokens() < window + BLOCK + chunk
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-80)
    layer.activate_past_recording(), plain.activate_past_recording()
    token = states(60, seed=9)
    layer.update(*token), plain.update(*token)
    layer.crop(-55), plain.crop(-55)
    assert layer.get_seq_length() == plain.get_seq_length()
    token = states(1, seed=10)
    for mine, other in zip(layer.update(*token), plain.update(*token), strict=True):
        assert mine.shape == other.shape and (mine - other).abs().max() < 0.2


def test_what_cannot_be_stored_is_refused():
    config = AutoConfig.for_model("llama")
    for bits in (2, 16, True, "4", 4.0, None):
        with pytest.raises(ValueError, match="bits must be 4 or 8"):
            QuantizedKVCache(config, bits=bits)
    layer, (keys, values), _ = layer_with(70)
    before = layer.nbytes
    for k, v in (
        (keys[:1], values[:1]),
        (keys[:, :1], values[:, :1]),
        (keys[..., :8], values),
        (keys, values[..., :8]),
        (keys.half(), values.half()),
        (keys.double(), values.double()),
        (keys, values.half()),
        (keys, values[..., :3, :]),
        (keys[0], values[0]),
    ):
        with pytest.raises(ValueError, match="_states must be"):
            layer.update(k, v)
    with pytest.raises(ValueError, match="no_grad"):
        layer.update(keys.clone().requires_grad_(), values)
    assert layer.get_seq_length() == 70 and layer.nbytes == before


@pytest.mark.parametrize("bits", at_length([8, 4], [4]))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        *at_length([{"do_sample": True, "num_return_sequences": 3}], []),
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 17},
    ],
    ids=str,
)
@torch.no_grad()
def test_generation_is_alike_fused_and_by_steps(make_model, decoded, bits, options):
    model = quantized(make_model, act_bits=8, changes={"max_position_embeddings": 256})
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(
        90, (1 if "prompt_lookup_num_tokens" in options else 2, 80), generator=generator
    )
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    texts = []
    for context in (stepwise(), nullcontext()):
        with context:
            torch.manual_seed(0)
            cache = QuantizedKVCache(model.config, bits=bits)
            texts.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    **{"max_new_tokens": 34, "do_sample": False, "pad_token_id": 0, **options},
                    **with_cache(cache),
                )
            )
            assert cache.get_seq_length() >= 100 and cache.layers[0].blocks[0].shape[2] >= 2
    if not options.get("do_sample"):  # the last bits of a probability may choose another token
        assert torch.equal(*texts)
    assert decoded or "prompt_lookup_num_tokens" in options  # which checks several tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", at_length(FAMILIES, ["gemma2", "opt", "mistral"]))
@torch.no_grad()
def test_every_family_and_attention(make_model, architecture, attention):
    """8 bits change next to nothing, sliding windows included."""
    changes = {"max_position_embeddings": 256}
    if architecture in ("mistral", "gemma2"):
        changes["sliding_window"] = 70
    model = make_model(architecture, **changes)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{architecture} has eager attention only")
    model.set_attn_implementation(attention)
    ids = torch.randint(90, (2, 132), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    outputs = []
    for cache in (DynamicCache(config=model.config), QuantizedKVCache(model.config)):
        parts = [
            model(ids[:, a:b], attention_mask=mask[:, :b], **with_cache(cache)).logits
            for a, b in ((0, 100), (100, 120), *((i, i + 1) for i in range(120, 132)))
        ]
        outputs.append(torch.cat(parts, 1)[:, 9:])
    expected, actual = outputs
    assert not torch.equal(actual, expected)
    assert (actual - expected).norm() < 0.02 * expected.norm()
    assert 0 < cache.nbytes == sum(layer.nbytes for layer in cache.layers)


def test_layers_that_keep_something_else():
    mixed = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    kinds = {type(layer) for layer in QuantizedKVCache(mixed).layers}
    assert QuantizedLayer in kinds and len(kinds) == 2  # beside a linear attention's
    hybrid = AutoConfig.for_model("falcon_h1", num_hidden_layers=2)
    with pytest.raises(ValueError, match="LinearAttentionAndFullAttentionLayer"):
        QuantizedKVCache(hybrid)
    with pytest.raises(ValueError, match="encoder-decoder"):
        QuantizedKVCache(AutoConfig.for_model("t5"))


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of blocks that fused layers read."""
    calls, original = [], decoder._Room.decode

    def counted(room, *args):
        blocks = room.layers[0].blocks
        calls.append(blocks[0].shape[2] if blocks else 0)
        return original(room, *args)

    monkeypatch.setattr(decoder._Room, "decode", counted)
    return calls


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_fused_layers_read_the_codes(make_model, decoded, bits, dtype):
    changes = {"num_hidden_layers": 2, "max_position_embeddings": 256}
    model = quantized(make_model, "llama", dtype, changes, act_bits=8)
    ids = torch.randint(90, (2, 160), generator=torch.Generator().manual_seed(0))
    new_cache = partial(QuantizedKVCache, model.config, bits=bits)
    for at, cache, other, errors in beside_the_steps(model, ids, new_cache, 125, 131):
        assert errors.max() < 0.05
        mine, others = cache.layers[0], other.layers[0]
        assert mine.get_seq_length() == others.get_seq_length() == at + 1
        assert mine.blocks[0].shape == others.blocks[0].shape
    first = [2, 2]  # the first token is computed by the stack and by both layers
    assert decoded == first + ([2] * 3 + [3] * 3) * 2


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(make_model, decoded):
    model = quantized(make_model)
    small = quantized(make_model, changes={"num_key_value_heads": 1, "head_dim": 16})
    cache = QuantizedKVCache(small.config)
    small(torch.ones(2, 50, dtype=torch.long), **with_cache(cache))
    for sequences in (2, 1):
        with pytest.raises(ValueError, match="must be like those in the cache"):
            model(torch.ones(sequences, 1, dtype=torch.long), **with_cache(cache))
    assert not decoded and cache.get_seq_length() == 50
