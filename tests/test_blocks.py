"""Models run one decoder layer at a time: the same numbers as in one piece."""

import copy

import pytest
import torch
from torch import nn

from smoothquant.calibration.blocks import blocks
from smoothquant.models.families import decoder_layers, layer_inputs
from smoothquant.models.running import hooked


def inputs_of_layers(run, names):
    """{name: the inputs that run(hooks) shows}."""
    seen = {name: [] for name in names}

    def hook_for(name):
        return lambda module, args, kwargs: seen[name].append(
            (args[0] if args else kwargs["hidden_states"]).clone()
        )

    run({name: hook_for(name) for name in names})
    return seen


def in_one_piece(model, batches):
    def run(hooks):
        with torch.no_grad(), hooked(model, hooks):
            for batch in batches:
                model(batch, use_cache=False)

    return run


def test_every_family_layer_by_layer(architecture, make_model, token_ids):
    model = make_model(architecture)
    names = [item.name for item in layer_inputs(model)]
    batches = [token_ids, token_ids[:1, :9], token_ids.flip(1)]
    whole = inputs_of_layers(in_one_piece(model, batches), names)
    found = list(decoder_layers(model))
    assert len(found) == model.config.num_hidden_layers
    count = 0
    for block, layer in zip(blocks(model, names, batches), found, strict=True):
        assert block.name == layer
        inside = [name for name in names if block.holds(name)]
        for name, inputs in inputs_of_layers(block.run, inside).items():
            count += 1
            for one, other in zip(inputs, whole[name], strict=True):
                assert torch.equal(one, other), name
    assert count == len(names)


def test_a_change_shows_in_the_next_block(make_model, token_ids):
    model = make_model("llama")
    names = [item.name for item in layer_inputs(model)]
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.down_proj.weight.data.zero_()
    expected = inputs_of_layers(in_one_piece(changed, [token_ids]), names)
    for block in blocks(model, names, [token_ids]):
        if block.name.endswith(".0"):
            model.model.layers[0].mlp.down_proj.weight.data.zero_()
        else:
            name = "model.layers.1.self_attn.q_proj"
            seen = inputs_of_layers(block.run, [name])
            assert torch.equal(seen[name][0], expected[name][0])


class Crossing(nn.Module):
    """Two layers that do more than hand on hidden states."""

    def __init__(self, make_model):
        super().__init__()
        self.inner = make_model("llama")
        self.config = self.inner.config

    def forward(self, ids, use_cache=False):
        first, second = self.inner.model.layers
        x = self.inner.model.embed_tokens(ids)
        position = self.inner.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        return second(first(x, position_embeddings=position) + x, position_embeddings=position)


def test_what_cannot_be_cut_is_one_block(make_model, token_ids):
    model = Crossing(make_model)
    names = [item.name for item in layer_inputs(model)]
    found = list(blocks(model, names, [token_ids]))
    assert [block.name for block in found] == [""]
    assert all(found[0].holds(name) for name in names)
    seen = inputs_of_layers(found[0].run, names)
    assert all(len(inputs) == 1 for inputs in seen.values())


def test_at_most_spreads_over_the_batches(make_model):
    model = make_model("llama")
    batches = [torch.full((1, 4), 3 + i) for i in range(10)]
    name = "model.layers.0.self_attn.q_proj"
    block = next(blocks(model, [name], batches))
    seen = inputs_of_layers(lambda hooks: block.run(hooks, at_most=3), [name])
    every = inputs_of_layers(block.run, [name])
    assert [x.flatten()[0] for x in seen[name]] == [every[name][i].flatten()[0] for i in (0, 3, 6)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_models_that_would_cache(use_cache, make_model, token_ids):
    """A cache that one batch left behind must not reach the next one."""
    model = make_model("mistral")
    model.config.use_cache = use_cache
    names = [item.name for item in layer_inputs(model)]
    assert len(list(blocks(model, names, [token_ids, token_ids]))) == 2
