"""The perplexity protocol, checked against the plainest computation, and its command line."""

import json
import math
import subprocess
import sys

import pytest
import torch

from smoothquant import ppl_eval, quantize
from smoothquant.bundled import load_bundled, wikitext
from smoothquant.checkpoints.folder import save_quantized
from smoothquant.core.config import MixedQuantConfig
from smoothquant.evaluation import perplexity
from smoothquant.evaluation.perplexity import Evaluator, HeadLogits
from smoothquant.ppl_eval import main

ROWS = wikitext("test")[:50]


@pytest.fixture(scope="module")
def tiny_opt():
    return load_bundled("tiny-opt")


def plain_perplexity(model, tokenizer, rows, num_windows, seq_len):
    """The protocol, word by word, in float64 and one token at a time."""
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]
    total, count = 0.0, 0
    for index in range(num_windows):
        window = ids[index * seq_len : index * seq_len + seq_len]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for position in range(seq_len - 1):
            row = logits[position]
            total += (torch.logsumexp(row, dim=0) - row[window[position + 1]]).item()
            count += 1
    return math.exp(total / count)


def test_protocol(tiny_opt, capsys):
    model, tokenizer = tiny_opt
    evaluator = Evaluator({"text": ROWS}, tokenizer, "cpu", n_samples=3, seq_len=80, progress=False)
    perplexity = evaluator.evaluate(model)
    assert perplexity.ndim == 0 and perplexity.is_floating_point()
    expected = plain_perplexity(model, tokenizer, ROWS, 3, 80)
    assert perplexity.item() == pytest.approx(expected, rel=1e-5)
    total = len(tokenizer("\n\n".join(ROWS)).input_ids) // 80
    printed = capsys.readouterr().out
    assert f"on 3 of {total} windows, seqlen 80, " in printed and "tokens/s" in printed
    assert f"perplexity {expected:.2f}"[:-1] in printed


def test_all_windows_and_the_dropped_rest(tiny_opt):
    model, tokenizer = tiny_opt
    ids = tokenizer("\n\n".join(ROWS)).input_ids
    seq_len = len(ids) // 4 - 1  # four windows and a partial one
    evaluator = Evaluator(ROWS, tokenizer, "cpu", None, seq_len=seq_len, progress=False)
    assert evaluator.num_windows == evaluator.available_windows == 4
    expected = plain_perplexity(model, tokenizer, ROWS, 4, seq_len)
    assert evaluator.evaluate(model).item() == pytest.approx(expected, rel=1e-5)
    nlls = evaluator.token_nlls(model)
    assert nlls.shape == (4, seq_len - 1) and nlls.dtype == torch.float64
    assert nlls.mean().exp().item() == pytest.approx(expected, rel=1e-5)


def test_chunks_do_not_change_the_loss(tiny_opt, monkeypatch):
    model, tokenizer = tiny_opt
    evaluator = Evaluator(ROWS, tokenizer, "cpu", 2, seq_len=64, progress=False)
    whole = evaluator.token_nlls(model)
    for chunk in (1, 7, 63):
        monkeypatch.setattr(perplexity, "LOSS_CHUNK", chunk)
        assert torch.equal(evaluator.token_nlls(model), whole)


# ---- comparison with a reference ----


@pytest.fixture(scope="module")
def pair(tiny_opt):
    """(evaluator, quantized model, float model)."""
    model = load_bundled("tiny-opt")[0]
    quantize(model, MixedQuantConfig(group_size=32), progress=False)
    evaluator = Evaluator(ROWS, tiny_opt[1], "cpu", 3, seq_len=80, progress=False)
    return evaluator, model, tiny_opt[0]


def plain_comparison(evaluator, model, reference):
    """Perplexity, KL and top-1 agreement word by word, in float64 and one token at a time."""
    nll, kl, same = [], [], []
    for index in range(evaluator.num_windows):
        window = evaluator.window(index)
        with torch.no_grad():
            q, p = (m(window).logits[0].double().log_softmax(-1) for m in (model, reference))
        for t in range(evaluator.seq_len - 1):
            nll.append(-q[t, window[0, t + 1]].item())
            kl.append(sum(p[t].exp() * (p[t] - q[t])).item())
            same.append(int(p[t].argmax() == q[t].argmax()))
    return math.exp(sum(nll) / len(nll)), sum(kl) / len(kl), sum(same) / len(same)


def test_comparison(pair, capsys):
    evaluator, model, reference = pair
    result = evaluator.compare(model, reference)
    perplexity, kl, top1 = plain_comparison(*pair)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.kl == pytest.approx(kl, abs=1e-5) and kl > 0.01
    assert result.top1 == top1 and 0.5 < top1 < 1
    assert result.perplexity == pytest.approx(evaluator.evaluate(model).item(), rel=1e-6)
    of_reference = evaluator.evaluate(reference).item()
    assert result.reference_perplexity == pytest.approx(of_reference, rel=1e-5)
    printed = capsys.readouterr().out
    assert f"KL divergence {result.kl:.5f} nats" in printed
    assert f"top-1 agreement {top1:.2%} on 3 of" in printed


def test_a_model_compared_with_itself(pair):
    evaluator, _, model = pair
    nlls, kls, same = evaluator.token_comparison(model, model)
    assert torch.equal(nlls, evaluator.token_nlls(model))
    assert (kls == 0).all() and same.all()


def test_kl_is_not_symmetric_and_not_negative(pair):
    evaluator, model, reference = pair
    one, other = (evaluator.token_comparison(*pair)[1] for pair in (pair[1:], pair[:0:-1]))
    assert min(one.min(), other.min()) > -1e-6
    assert abs(one.mean() - other.mean()) > 1e-4


def test_chunks_do_not_change_the_comparison(pair, monkeypatch):
    whole = pair[0].token_comparison(*pair[1:])
    for chunk in (1, 7, 79):
        monkeypatch.setattr(perplexity, "LOSS_CHUNK", chunk)
        for found, wanted in zip(pair[0].token_comparison(*pair[1:]), whole, strict=True):
            assert torch.allclose(found.double(), wanted.double(), rtol=0, atol=1e-6)


def test_recorded_head_inputs_stand_for_the_model(pair):
    evaluator, model, reference = pair
    nlls, inputs = evaluator.head_inputs(reference)
    assert torch.equal(nlls, evaluator.token_nlls(reference))
    assert inputs.shape == (3, 79, reference.config.word_embed_proj_dim)
    recorded = HeadLogits(reference.get_output_embeddings(), inputs)
    again = evaluator.token_comparison(model, recorded)
    for found, wanted in zip(again, evaluator.token_comparison(model, reference), strict=True):
        assert torch.allclose(found.double(), wanted.double(), rtol=0, atol=1e-6)


def test_logits_that_the_head_does_not_give_are_not_recorded(tiny_opt, pair, make_model):
    class Rows:
        def __call__(self, text, **_):
            ids = torch.randint(3, 96, (1, 64), generator=torch.Generator().manual_seed(0))
            return type("Encoding", (), {"input_ids": ids})

    evaluator = Evaluator(ROWS, Rows(), "cpu", 2, seq_len=24, progress=False)
    model = make_model("gemma2")
    model.config.final_logit_softcapping = None
    assert evaluator.head_inputs(model)[1] is not None
    model.config.final_logit_softcapping = 5.0
    nlls, inputs = evaluator.head_inputs(model)
    assert inputs is None and torch.equal(nlls, evaluator.token_nlls(model))


def test_comparison_refuses_what_does_not_fit(pair, make_model):
    evaluator, model, reference = pair
    with pytest.raises(ValueError, match=r"reference must give logits of shape \(79, 2048\)"):
        evaluator.compare(model, [torch.zeros(79, 96)])
    with pytest.raises(ValueError, match="model has 96 token ids"):
        evaluator.compare(model, make_model("opt"))


def test_every_kind_of_dataset_is_the_same_text(tiny_opt, tmp_path):
    tokenizer = tiny_opt[1]
    (tmp_path / "a.raw").write_text(
        "".join(row or " \n" for row in ROWS), encoding="utf-8", newline="\n"
    )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in ROWS))
    ids = tokenizer("\n\n".join(ROWS), return_tensors="pt").input_ids
    for dataset in (
        {"text": ROWS},
        ROWS,
        tuple(ROWS),
        tmp_path / "a.raw",
        str(tmp_path / "a.jsonl"),
    ):
        evaluator = Evaluator(dataset, tokenizer, n_samples=1, seq_len=64)
        assert torch.equal(evaluator.dataset, ids)


def test_the_bundled_split_is_read_by_the_row_rule(tiny_opt):
    """The file itself, given as a path, is the same dataset as its rows."""
    from smoothquant.bundled import DATA

    path = DATA / "wikitext-2-raw" / "wiki.test.raw"
    assert list(perplexity._rows(path)) == list(perplexity._rows({"text": wikitext("test")}))


def test_tiny_opt_perplexity(tiny_opt):
    """The published number of the bundled model, first window of 2,048 tokens."""
    evaluator = Evaluator(wikitext("test"), tiny_opt[1], n_samples=1, progress=False)
    assert evaluator.evaluate(tiny_opt[0]).item() == pytest.approx(91.0835, rel=1e-3)


def test_evaluate_restores_each_modules_mode_and_fills_no_cache(tiny_opt):
    model = load_bundled("tiny-opt")[0].train()
    model.model.decoder.layers[1].eval()
    modes, asked = [module.training for module in model.modules()], []
    model.register_forward_pre_hook(lambda m, args, kw: asked.append(kw), with_kwargs=True)
    Evaluator(ROWS, tiny_opt[1], n_samples=1, seq_len=16, progress=False).evaluate(model)
    assert [module.training for module in model.modules()] == modes
    assert asked == [{"use_cache": False}]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"n_samples": 0}, ValueError, "n_samples .*0"),
        ({"n_samples": -2}, ValueError, "n_samples .*-2"),
        ({"n_samples": 10**6}, ValueError, "n_samples must be at most .*1000000"),
        ({"n_samples": 2.0}, TypeError, "n_samples .*2.0"),
        ({"seq_len": 1}, ValueError, "seq_len .*1"),
        ({"seq_len": "64"}, TypeError, "seq_len .*'64'"),
        ({"seq_len": 10**6}, ValueError, "seq_len: .*1000000"),
        ({"dataset": {"words": ROWS}}, ValueError, "dataset .*text"),
        ({"dataset": "nowhere.txt"}, ValueError, "nowhere.txt"),
        ({"dataset": [1, 2]}, TypeError, "item 0 is int"),
        ({"dataset": 5}, TypeError, "5"),
    ],
)
def test_bad_arguments(tiny_opt, arguments, error, message):
    arguments = {"dataset": ROWS, "n_samples": 1, "seq_len": 64} | arguments
    with pytest.raises(error, match=message):
        Evaluator(arguments.pop("dataset"), tiny_opt[1], "cpu", **arguments)


def test_a_model_that_does_not_fit(tiny_opt, make_model):
    tokenizer = tiny_opt[1]
    with pytest.raises(ValueError, match="model has 96 token ids"):
        Evaluator(ROWS, tokenizer, n_samples=1, seq_len=32).evaluate(make_model("opt"))
    long = Evaluator(wikitext("test"), tokenizer, n_samples=1, seq_len=2049)
    with pytest.raises(ValueError, match="seq_len must be at most 2048.*2049"):
        long.evaluate(tiny_opt[0])


def test_import_runs_nothing():
    code = "import sys; sys.argv = ['x', '--no-such-flag']; import smoothquant.ppl_eval"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model_path", "/no/such/folder"], "/no/such/folder"),
        (["--n_samples", "0"], "n_samples"),
        (["--seq_len", "1"], "seq_len"),
        (["--smooth"], "--act_scales_path"),
        (["--smooth", "--act_scales_path", "nowhere.pt"], "nowhere.pt"),
        (["--smooth", "--alpha", "1.5"], "alpha"),
        (["--compare"], "--compare needs --smooth or --quantize"),
        (["--quantize", "--group_size", "0"], "group_size"),
        (["--quantize", "--salient_prop", "1.5"], "salient_prop"),
        (["--quantize", "--backend", "int5"], "int5"),
        (["--quantize", "--sort", "upwards"], "upwards"),
        (["--quantize", "--calibration_path", "nowhere.txt"], "nowhere.txt"),
        (["--dataset_path", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_command_line_refuses_before_loading(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(ppl_eval, "load_model", lambda name: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_samples", "100000"], "n_samples must be at most"),
        (["--seq_len", "2049"], "seq_len must be at most 2048"),
        (["--quantize", "--calibration_path", "{}/short.txt"], "less than one block of 512"),
        (["--quantize", "--calibration_path", "{}/bad.txt"], "bad.txt"),
        (["--smooth", "--act_scales_path", "{}/other.pt"], "scales has no entry for"),
        (["--quantize", "--model_path", "{}/quantized"], "model is quantized already"),
        (["--model_path", "{}/broken"], "broken does not hold a readable model"),
    ],
)
def test_user_errors_after_loading(argv, message, tiny_opt, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    if "{}/quantized" in argv:
        model, tokenizer = load_bundled("tiny-opt")
        quantize(model, MixedQuantConfig(calibration="weights"), progress=False)
        save_quantized(model, tmp_path / "quantized", tokenizer)
    with pytest.raises(SystemExit) as stopped:
        main(["--model_path", "tiny-opt", *(arg.format(tmp_path) for arg in argv)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def perplexity_of(argv, capsys):
    main(["--model_path", "tiny-opt", "--n_samples", "2", "--seq_len", "256", *argv])
    printed = capsys.readouterr().out
    return float(printed.rpartition("Perplexity: ")[2]), printed


@pytest.mark.long
def test_command_line(tiny_opt, capsys, tmp_path):
    plain, printed = perplexity_of([], capsys)
    expected = plain_perplexity(*tiny_opt, wikitext("test"), 2, 256)
    assert plain == pytest.approx(expected, rel=1e-5) and "not quantized" in printed

    from smoothquant.calibration import get_act_scales, save_act_scales

    scales = get_act_scales(*tiny_opt, wikitext("validation")[:200], num_samples=16)
    save_act_scales(scales, tmp_path / "scales.pt")
    smooth = ["--smooth", "--act_scales_path", str(tmp_path / "scales.pt")]
    smoothed, printed = perplexity_of(smooth, capsys)
    assert smoothed == pytest.approx(plain, rel=1e-4) and "alpha 0.5" in printed

    quantize = ["--quantize", "--calibration_blocks", "4", "--group_size", "32"]
    quantized, printed = perplexity_of(quantize, capsys)
    assert (
        "W4A4" in printed
        and "bits per weight" in printed
        and "group size 32" in printed
        and "5%" in printed
    )
    assert plain < quantized < 3 * plain
    without_salient, _ = perplexity_of([*quantize, "--salient_prop", "0"], capsys)
    assert quantized < without_salient

    main(
        ["--model_path", "tiny-opt", "--n_samples", "2", "--seq_len", "256", *quantize, "--compare"]
    )
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines()[-3:])
    assert float(printed["Perplexity"]) == pytest.approx(quantized, rel=1e-6)
    assert 0 < float(printed["KL divergence"]) < 1 and 0.5 < float(printed["Top-1 agreement"]) < 1
