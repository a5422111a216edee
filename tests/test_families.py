"""The table of families against what the real transformers classes do when they run."""

import warnings

import pytest
import torch
from torch import nn

from smoothquant.models.families import FAMILIES, MADE_FROM, layer_inputs
from smoothquant.models.kept import output_heads
from smoothquant.models.linears import is_linear
from smoothquant.models.routing import is_fused_experts


def traced(model, token_ids):
    """[(name, input, output)] of every linear, norm and experts module, in call order."""
    calls = []
    names = {module: name for name, module in model.named_modules()}

    def record(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        calls.append((names[module], x.detach().clone(), output))

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in names if _is_leaf(m)]
    with torch.no_grad():
        model(token_ids)
    for handle in handles:
        handle.remove()
    return calls


def _is_leaf(module):
    return hasattr(module, "weight") or is_fused_experts(module)


def test_readers_of_an_input_read_the_same_tensor_in_forward_order(
    architecture, make_model, token_ids
):
    model = make_model(architecture)
    items = layer_inputs(model)
    calls = traced(model, token_ids)
    read = {name: x for name, x, _ in calls}
    made = {name: y for name, _, y in calls}
    order = [name for name, _, _ in calls]
    for item in items:
        readers = [*item.linears, *filter(None, (item.experts, item.router))]
        for reader in readers:
            x = read[item.linears[0] if item.linears else item.experts]
            assert torch.equal(read[reader].flatten(0, -2), x.flatten(0, -2)), (reader, item.name)
        if item.norm:
            assert torch.equal(made[item.norm].flatten(0, -2), x.flatten(0, -2)), item
    first_calls = [order.index(item.name) for item in items]
    assert first_calls == sorted(first_calls)
    inputs = [read[item.name].flatten(0, -2) for item in items]
    for i, x in enumerate(inputs):
        assert not any(x.shape == y.shape and torch.equal(x, y) for y in inputs[:i]), items[i]


def test_every_decoder_linear_is_covered_once(architecture, make_model):
    model = make_model(architecture)
    covered = [name for item in layer_inputs(model) for name in item.linears]
    linears = {name for name, module in model.named_modules() if is_linear(module)}
    outside, heads = linears - set(covered), output_heads(model)
    assert len(covered) == len(set(covered))
    assert all(
        name.rpartition(".")[2] in ("project_in", "project_out", "shared_expert_gate", "router")
        for name in outside - heads
    )
    # of GPT-NeoX it was embed_out in older transformers
    assert heads <= outside and heads in ({"lm_head"}, {"embed_out"})


def test_a_norm_that_also_feeds_the_residual_is_not_offered(make_model):
    for architecture in ("opt-post-norm", "bloom-post-norm"):
        assert all(item.norm is None for item in layer_inputs(make_model(architecture)))
    assert any(item.norm for item in layer_inputs(make_model("opt")))


def test_headless_models_have_the_same_inputs(make_model):
    model = make_model("llama")
    with_head = [item.name for item in layer_inputs(model)]
    assert [f"model.{item.name}" for item in layer_inputs(model.model)] == with_head


def test_expert_names(make_model):
    item = next(item for item in layer_inputs(make_model("mixtral")) if item.experts)
    assert item.expert_linear(3, "gate_up_proj") == "model.layers.0.mlp.experts.3.gate_up_proj"


class Unknown(nn.Module):
    """A model without a row in the table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.fused = nn.Parameter(torch.zeros(2, 6, 6))
        self.score = nn.Linear(6, 3)
        self.tied = nn.Linear(6, 10, bias=False)
        self.tied.weight = self.embed.weight


def test_unknown_model_is_walked_with_a_warning_that_names_the_guesses():
    with pytest.warns(UserWarning) as caught:
        items = layer_inputs(Unknown())
    assert [item.linears for item in items] == [(f"blocks.{i}",) for i in range(3)]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert all(word in message for word in ("blocks.0", "blocks.2", "score", "tied", "fused"))


def test_known_models_do_not_warn(architecture, make_model):
    model = make_model(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_inputs(model)


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match="no quantizable nn.Linear: Embedding"):
        layer_inputs(nn.Embedding(3, 4))


def test_every_row_is_tried_on_a_real_model(make_model):
    from conftest import ARCHITECTURES

    # `test_all_models` tries the rows of models with more than text.
    text = {model_type for model_type, family in FAMILIES.items() if not family.more}
    assert text == {model_type for model_type, _ in ARCHITECTURES.values()}


def test_every_way_an_input_is_made_is_in_the_table():
    ways = {reads.made_from for family in FAMILIES.values() for reads in family.reads}
    assert ways == {None, *MADE_FROM}
    for reads in (reads for family in FAMILIES.values() for reads in family.reads):
        assert bool(reads.made_by) == (reads.made_from is not None)
        assert not (reads.made_by and reads.norms) and (
            not reads.made_by or len(reads.linears) == 1
        )
