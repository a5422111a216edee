"""Plans: what is salient, in which order the rest stands, and in which blocks."""

import pytest
import torch

from smoothquant import collect_stats, quantize
from smoothquant.channels.sorting import (
    MASSIVE_RATIO,
    ChannelPlan,
    choose_channels,
    choose_within_heads,
    is_massive,
    salient_per_block,
)
from smoothquant.channels.statistics import ChannelStats
from smoothquant.core.config import MixedQuantConfig
from smoothquant.layers.linear import W4A4Linear

pytestmark = pytest.mark.usefixtures("linears_alone")


def stats_of(x: torch.Tensor) -> ChannelStats:
    stats = ChannelStats.empty(x.shape[-1])
    stats.update(x)
    return stats


def random_stats(k: int, rows: int = 50) -> ChannelStats:
    return stats_of(torch.randn(rows, k) * torch.rand(k))


def part(stats: ChannelStats, channels: slice) -> ChannelStats:
    fields = stats.to_dict().items()
    return ChannelStats({name: t if name == "count" else t[channels] for name, t in fields})


def parts_of(plan: ChannelPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The INT4 and the salient channels of a plan."""
    k4 = len(plan.perm) - plan.num_salient
    return plan.perm[:k4].long(), plan.perm[k4:].long()


# ---- What is salient


def test_number_of_salient_channels_given_directly():
    stats = random_stats(30)
    for num_salient in (0, 7, 30):
        plan = choose_channels(stats, salient_prop=0.5, num_salient=num_salient)
        assert plan.num_salient == num_salient
        assert sorted(plan.perm.tolist()) == list(range(30))
    assert torch.equal(
        choose_channels(stats, num_salient=3).perm, choose_channels(stats, salient_prop=0.1).perm
    )
    for wrong in (-1, 31):
        with pytest.raises(ValueError, match=rf"num_salient must be in \[0, 30\]; got {wrong}"):
            choose_channels(stats, num_salient=wrong)


def test_output_metric_is_what_a_channel_adds_to_the_squared_outputs():
    x, w = torch.randn(200, 20), torch.randn(33, 20) * torch.logspace(-2, 2, 20)
    added = [(x[:, [c]] @ w[:, [c]].T).double().square().sum() for c in range(20)]
    best = torch.stack(added).topk(5).indices.sort().values
    norms = w.double().square().sum(0)
    plan = choose_channels(stats_of(x), num_salient=5, salient_metric="output", column_norms=norms)
    assert torch.equal(parts_of(plan)[1], best)
    assert not torch.equal(parts_of(choose_channels(stats_of(x), num_salient=5))[1], best)


@pytest.mark.parametrize("norms", [None, torch.ones(20), torch.ones(19).double()])
def test_output_metric_needs_column_norms(norms):
    with pytest.raises(ValueError, match=r"'output' needs column_norms, float64 \(20,\); got "):
        choose_channels(random_stats(20), salient_metric="output", column_norms=norms)


def test_output_metric_of_a_model_sums_over_the_linears_that_share_an_input(make_model, token_ids):
    model = make_model("llama")
    block = model.model.layers[1].self_attn
    linears = (block.q_proj, block.k_proj, block.v_proj)
    # columns of very different norms, and channels of very different magnitudes
    for module in (*linears, model.model.layers[1].input_layernorm):
        module.weight.data *= torch.logspace(-1, 1, 48)[torch.randperm(48)]
    stats = collect_stats(model, [token_ids], progress=False)
    squares = stats["model.layers.1.self_attn.q_proj"].sq_sum

    def best(*weights):
        score = squares * sum(weight.double().square().sum(0) for weight in weights)
        return score.topk(9).indices.sort().values

    weights = [linear.weight.detach() for linear in linears]
    expected = best(*weights)
    assert not any(torch.equal(expected, best(weight)) for weight in weights)
    config = MixedQuantConfig(group_size=20, salient_prop=0.2, salient_metric="output")
    quantize(model, config, stats, progress=False)
    assert torch.equal(block.k_proj.perm[-9:].long(), expected)


def massive_stats(k: int, massive: dict[int, float]) -> ChannelStats:
    """10^9 rows of magnitude 1; but of 0.1 in some channels, save for one row with the value."""
    stats = ChannelStats.empty(k)
    stats.count.fill_(10**9)
    stats.abs_max.fill_(3.0)
    stats.abs_sum.fill_(1e9)
    stats.sq_sum.copy_(1e9 + torch.arange(k).double())
    for channel, value in massive.items():
        stats.abs_max[channel] = value
        stats.abs_sum[channel] = 1e8 + value
        stats.sq_sum[channel] = 1e7 + value**2
    return stats


def test_massive_channels_are_salient_before_all_others():
    # they are rare, so that their mean and root mean square are the smallest
    over, under = 1.01 * MASSIVE_RATIO, 0.99 * MASSIVE_RATIO
    stats = massive_stats(12, {2: over, 5: under, 9: 2 * over})
    assert is_massive(stats).nonzero().flatten().tolist() == [2, 9]
    for metric in ("mean", "rms"):
        score = stats.mean if metric == "mean" else stats.rms
        assert set(score.topk(9).indices.tolist()).isdisjoint({2, 5, 9})
        for num_salient, chosen in enumerate([[], [9], [2, 9]]):
            plan = choose_channels(stats, num_salient=num_salient, salient_metric=metric)
            assert parts_of(plan)[1].tolist() == chosen
        plan = choose_channels(stats, num_salient=4, salient_metric=metric)
        assert set(parts_of(plan)[1].tolist()) > {2, 9} and plan.num_salient == 4


def test_massive_channels_are_judged_by_their_own_block():
    stats = massive_stats(12, {2: 1.5 * MASSIVE_RATIO})
    stats.abs_sum[:6] *= 2  # twice the median, for which 1.5 is too little
    assert is_massive(stats).any() and not is_massive(stats, 2).any()


def test_means_alone_know_no_massive_channels():
    stats = ChannelStats.from_mean(torch.tensor([1e-3, 1e9, 1e-3, 1e-3]))
    assert not is_massive(stats).any()
    assert not is_massive(ChannelStats.empty(0)).any()


# ---- Blocks


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("num_salient", [0, 1, 5, 12, 24])
def test_salient_channels_per_block_come_as_near_as_equal_counts_can(blocks, num_salient):
    count = salient_per_block(num_salient, blocks)
    assert (count > 0) == (num_salient > 0) and count <= 24 // blocks
    if num_salient:
        others = range(1, 24 // blocks + 1)
        nearest = min(abs(blocks * other - num_salient) for other in others)
        assert abs(blocks * count - num_salient) == nearest


@pytest.mark.parametrize("sort", ["none", "max", "mean3std", "argmax", "rms"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 24])
@pytest.mark.parametrize("salient_prop", [0, 0.01, 0.3, 1])
def test_every_block_of_a_plan_is_the_plan_of_the_block_alone(sort, blocks, salient_prop):
    stats, weights, size = random_stats(24), random_stats(24), 24 // blocks
    norms = weights.sq_sum
    choices = {"salient_metric": "output", "sort": sort}
    plan = choose_channels(
        stats,
        salient_prop=salient_prop,
        sort_stats=weights,
        column_norms=norms,
        tp_blocks=blocks,
        **choices,
    )
    assert plan.perm.dtype == torch.int32
    int4, salient = (chosen.view(blocks, -1) for chosen in parts_of(plan))
    for block in range(blocks):
        channels = slice(block * size, (block + 1) * size)
        alone = choose_channels(
            part(stats, channels),
            num_salient=plan.num_salient // blocks,
            sort_stats=part(weights, channels),
            column_norms=norms[channels],
            **choices,
        )
        expected = parts_of(alone)
        assert torch.equal(int4[block] - block * size, expected[0])
        assert torch.equal(salient[block] - block * size, expected[1])


def test_tensor_parallelism_can_slice_a_layer():
    """Groups that cross no block boundary: the layers of the blocks are slices of the layer."""
    k, n, blocks, group_size = 72, 40, 3, 10
    size, weight, stats = k // blocks, torch.randn(n, k), random_stats(k)
    config = MixedQuantConfig(group_size=group_size, rotation=8, tp_blocks=blocks)
    plan = choose_channels(stats, num_salient=12, tp_blocks=blocks)
    whole = W4A4Linear.from_weight(weight, None, config, plan)
    int4 = size - plan.num_salient // blocks
    assert int4 % group_size == 0
    x, total = torch.randn(7, k), torch.zeros(7, n)
    for block in range(blocks):
        channels = slice(block * size, (block + 1) * size)
        alone = choose_channels(part(stats, channels), num_salient=plan.num_salient // blocks)
        layer = W4A4Linear.from_weight(weight[:, channels], None, config, alone)
        groups, salient = int4 // group_size, plan.num_salient // blocks
        pairs = groups * 3 // 2  # of quads, three to a group
        assert torch.equal(layer.qweight, whole.qweight[:, block * pairs :][:, :pairs])
        assert torch.equal(layer.scales, whole.scales[:, block * groups :][:, :groups])
        assert torch.equal(
            layer.salient_weight, whole.salient_weight[:, block * salient :][:, :salient]
        )
        assert torch.equal(layer.dequantize(), whole.dequantize()[:, channels])
        total += layer(x[:, channels])
    torch.testing.assert_close(total, whole(x), rtol=1e-5, atol=1e-5)


def test_blocks_must_divide_the_channels():
    with pytest.raises(ValueError, match="tp_blocks must divide the 30 channels .*; got 4"):
        choose_channels(random_stats(30), tp_blocks=4)
    with pytest.raises(ValueError, match="tp_blocks must be >= 1; got 0"):
        choose_channels(random_stats(30), tp_blocks=0)
    empty = choose_channels(ChannelStats.empty(0), salient_prop=0.5, tp_blocks=4)
    assert empty.perm.shape == (0,) and empty.num_salient == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tp_blocks": 3}, "divide the 88 channels of model.layers.0.mlp.down_proj; got 3"),
        (
            {"tp_blocks": 8, "sort_within_heads": True},
            "divide the 4 heads of model.layers.0.self_attn.o_proj with sort_within_heads.*got 8",
        ),
    ],
)
def test_a_layer_that_does_not_fall_into_blocks_is_named(fields, message, make_model):
    model = make_model("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"tp_blocks must {message}"):
        quantize(model, MixedQuantConfig(group_size=20, **fields), progress=False)
    assert before == {name: id(module) for name, module in model.named_modules()}


def test_blocks_reach_every_layer_of_a_model(make_model):
    model = make_model("llama")
    config = MixedQuantConfig(group_size=20, salient_prop=0.1, tp_blocks=4)
    quantize(model, config, progress=False)
    for layer in (m for m in model.modules() if isinstance(m, W4A4Linear)):
        k = layer.in_features
        salient = salient_per_block(int(0.1 * k), 4)
        assert layer.num_salient == 4 * salient
        for channels in parts_of(ChannelPlan(layer.perm, layer.num_salient)):
            assert torch.equal(
                channels.view(4, -1) // (k // 4),
                torch.arange(4)[:, None].expand(4, len(channels) // 4),
            )


# ---- Heads


@pytest.mark.parametrize("num_heads, num_values", [(6, 6), (6, 3), (6, 2), (6, 1), (1, 1)])
@pytest.mark.parametrize("sort", ["none", "max", "mean3std", "rms"])
@pytest.mark.parametrize("metric", ["mean", "max", "rms", "output"])
def test_heads_that_share_a_head_of_v_have_the_plan_of_their_rows_together(
    num_heads, num_values, sort, metric
):
    size, shared = 7, num_heads // num_values
    x = torch.randn(40, num_heads, size) * torch.rand(num_heads, size)
    w = torch.randn(30, num_heads, size) * torch.rand(num_heads, size)
    norms = w.double().square().sum(0)
    plan = choose_within_heads(
        stats_of(x.flatten(1)),
        num_heads,
        num_values,
        salient_prop=0.3,
        salient_metric=metric,
        sort=sort,
        column_norms=norms.flatten(),
    )
    assert sorted(plan.perm.tolist()) == list(range(num_heads * size))
    assert plan.num_salient == 2 * num_heads  # the nearest to 0.3 * 7
    int4, salient = (chosen.view(num_heads, -1) for chosen in parts_of(plan))
    for value in range(num_values):
        heads = slice(value * shared, (value + 1) * shared)
        rows = x[:, heads].reshape(-1, size)  # of all heads that share it
        squared = (x.double().square() * norms).sum(0)[heads].sum(0)
        alone = choose_channels(
            stats_of(rows),
            num_salient=2,
            salient_metric=metric,
            sort=sort,
            column_norms=squared / rows.double().square().sum(0),
        )
        for head in range(num_heads)[heads]:
            assert torch.equal(int4[head] - head * size, parts_of(alone)[0])
            assert torch.equal(salient[head] - head * size, parts_of(alone)[1])


def test_the_row_of_the_maximum_is_that_of_the_head_that_holds_it():
    x = torch.zeros(5, 2, 3)
    x[4, 0, 0], x[1, 1, 0] = 1.0, 9.0  # channel 0: row 1
    x[3, 0, 1], x[0, 1, 1] = 9.0, 1.0  # channel 1: row 3
    x[2, 0, 2] = 5.0  # channel 2: row 2
    plan = choose_within_heads(stats_of(x.flatten(1)), 2, 1, sort="argmax")
    assert plan.perm.tolist() == [1, 2, 0, 4, 5, 3]


def test_means_alone_are_taken_together_too():
    means = ChannelStats.from_mean(torch.tensor([1.0, 5.0, 3.0, 9.0, 2.0, 1.0]))
    plan = choose_within_heads(
        means,
        2,
        1,
        num_salient=2,
        sort="none",
        salient_metric="output",
        column_norms=torch.ones(6).double(),
    )
    assert plan.perm.tolist() == [1, 2, 4, 5, 0, 3]


def test_a_model_sorts_within_heads_where_it_is_asked_to(make_model, token_ids):
    stats = collect_stats(make_model("llama"), [token_ids], progress=False)
    name = "model.layers.0.self_attn.o_proj"
    for within in (False, True):
        model = make_model("llama")
        config = MixedQuantConfig(group_size=20, salient_prop=0.1, sort_within_heads=within)
        quantize(model, config, stats, progress=False)
        plan = choose_channels(stats[name], salient_prop=0.1)
        if within:
            plan = choose_within_heads(stats[name], 4, 2, salient_prop=0.1)
        assert torch.equal(model.get_submodule(name).perm, plan.perm)
        down = model.model.layers[0].mlp.down_proj
        alone = choose_channels(stats["model.layers.0.mlp.down_proj"], salient_prop=0.1)
        assert torch.equal(down.perm, alone.perm)
