"""Layers that read the same input quantize it once, and never use what was another's."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from bits import assert_same_bits, forced_isa

from smoothquant import quantize
from smoothquant.core.config import MixedQuantConfig
from smoothquant.kernels import ops
from smoothquant.layers import linear, shared_input
from smoothquant.layers.linear import W4A4Linear

K, TOKENS = 64, 24


@pytest.fixture
def quantized(monkeypatch):
    """What `ops.quantize_input` gave, weakly: its calls are counted, its memory is watched."""
    made = []
    original = ops.quantize_input

    def count(*args):
        result = original(*args)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(ops, "quantize_input", count)
    monkeypatch.setattr(shared_input, "_last", shared_input._Last())
    return made


def layer_of(seed=0, n=48, perm=None, **choices):
    torch.manual_seed(seed)
    config = MixedQuantConfig("rtn", group_size=16, salient_prop=0.1, **choices)
    layer = W4A4Linear(K, n, config=config, num_salient=6)
    perm = torch.arange(K).int() if perm is None else perm
    for name, tensor in zip(
        ops.PACKED, ops.pack_weight(torch.randn(n, K), perm, 6, 16), strict=True
    ):
        setattr(layer, name, tensor)
    layer.perm = perm.clone()
    return layer


def alone(layer, x):
    """What the layer gives for x where nothing was shared: one token at a time."""
    return torch.stack([layer(row) for row in x])


def test_siblings_quantize_once(quantized):
    layers, x = [layer_of(seed) for seed in range(3)], torch.randn(TOKENS, K)
    for layer in layers:
        assert_same_bits(layer(x), alone(layer, x))
    assert len(quantized) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"perm": torch.arange(K - 1, -1, -1).int()},
        {"act_clip": 0.9},
        {"act_format": "zero_point"},
        {"act_quant": "per_token"},
    ],
)
def test_another_choice_is_another_quantization(other, quantized):
    x = torch.randn(TOKENS, K)
    for layer in (layer_of(), layer_of(1, **other)):
        assert_same_bits(layer(x), alone(layer, x))
    assert len(quantized) == 2


def test_a_changed_input_is_quantized_again(quantized):
    one, two, x = layer_of(), layer_of(1), torch.randn(TOKENS, K)
    one(x)
    x.mul_(2)
    assert_same_bits(two(x), alone(two, x))
    x[3] = 0
    assert_same_bits(one(x), alone(one, x))
    assert len(quantized) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.data.copy_(torch.randn_like(x)),
        lambda x: x.data[-1].neg_(),
        lambda x: x.view(torch.int16).numpy().__setitem__((3, 5), 1),
        lambda x: x.set_(torch.randn_like(x)),
        lambda x: torch.utils.dlpack.from_dlpack(x).zero_(),
    ],
    ids=["data", "data-row", "numpy", "set", "dlpack"],
)
@pytest.mark.parametrize("same", [True, False], ids=["same layer", "sibling"])
def test_an_input_written_behind_torch_is_quantized_again(write, dtype, same, quantized):
    one = layer_of()
    two = one if same else layer_of(1)
    x = torch.randn(TOKENS, K).to(dtype)
    one(x)
    write(x)
    assert_same_bits(two(x), alone(two, x))
    assert len(quantized) == 2


def test_a_permutation_written_in_place_is_another(quantized):
    one, two, x = (
        layer_of(),
        layer_of(1, perm=torch.arange(K).flip(0).int()),
        torch.randn(TOKENS, K),
    )
    one(x)
    one.load_state_dict(two.state_dict())
    assert_same_bits(two(x), alone(two, x))
    assert len(quantized) == 2


def test_replaced_weights_are_used(quantized):
    one, two, x = layer_of(), layer_of(1), torch.randn(TOKENS, K)
    one(x)
    two.load_state_dict(layer_of(2).state_dict())
    assert_same_bits(two(x), alone(layer_of(2), x))


def test_another_instruction_set_quantizes_again(quantized):
    one, two, x = layer_of(), layer_of(1), torch.randn(TOKENS, K)
    one(x)
    with forced_isa("scalar"):
        assert_same_bits(two(x), alone(two, x))


def test_nothing_outlives_the_input(quantized):
    layer, x = layer_of(), torch.randn(TOKENS, K)
    layer(x)
    assert quantized[0]() is not None
    del x
    assert quantized[0]() is None
    gc.disable()
    try:
        x, y = torch.randn(2, TOKENS, K)
        layer(x)
        layer(y)
        assert quantized[1]() is None  # y's is kept now
    finally:
        gc.enable()


def test_few_tokens_and_strided_inputs_are_not_shared(quantized):
    one, two = layer_of(), layer_of(1)
    for x in (torch.randn(shared_input.MIN_TOKENS, K), torch.randn(TOKENS, 2 * K)[:, ::2]):
        assert_same_bits(one(x), alone(one, x))
        assert_same_bits(two(x), alone(two, x))
    assert not quantized


def test_inference_tensors_are_shared(quantized):
    one, two = layer_of(), layer_of(1)
    with torch.inference_mode():
        x = torch.randn(TOKENS, K)
        one(x)
        two(x)
        assert len(quantized) == 1
        x.mul_(2)
        assert_same_bits(two(x), alone(two, x))
    assert len(quantized) == 2


def test_threads_do_not_share(quantized):
    one, two, x = layer_of(), layer_of(1), torch.randn(TOKENS, K)
    one(x)
    thread = threading.Thread(target=two, args=(x,))
    thread.start()
    thread.join()
    assert len(quantized) == 2


def test_compiled_layers(quantized):
    layers, x = [layer_of(seed) for seed in range(2)], torch.randn(TOKENS, K)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x):
        return [layer(x) for layer in layers]

    for layer, y in zip(layers, both(x), strict=True):
        assert_same_bits(y, alone(layer, x))


def test_a_model_quantizes_the_inputs_of_its_siblings_once(make_model, quantized):
    model = make_model("llama")
    config = model.config
    quantize(model, MixedQuantConfig(group_size=16), progress=False)
    quantized.clear()
    with torch.no_grad():
        model(torch.zeros(2, TOKENS, dtype=torch.int64))
    # q, k and v; o; gate and up; down
    assert len(quantized) == 4 * config.num_hidden_layers


def test_simulated_siblings_quantize_once(monkeypatch):
    made, original = [], linear.quantized_input
    monkeypatch.setattr(linear, "quantized_input", lambda *a: made.append(0) or original(*a))
    layers = [layer_of(seed).simulated() for seed in range(3)]
    x = torch.randn(TOKENS, K)
    found = [layer(x) for layer in layers]
    assert len(made) == 1
    for layer, y in zip(layers, found, strict=True):
        choices = layer.perm, layer.num_salient, layer.group_size, layer.config
        assert_same_bits(y, F.linear(original(x, *choices), layer.simulated_weight, layer.bias))
