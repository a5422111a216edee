"""lm-evaluation-harness reads a saved folder as any model of transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch

from smoothquant import MixedQuantConfig, load_quantized, quantize, save_quantized
from smoothquant.bundled import load_bundled, wikitext

TASK = """
task: next_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
CHOICES = 12
WORDS = 30


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = load_bundled("tiny-opt")
    quantize(model, MixedQuantConfig(group_size=32, salient_prop=0.1), progress=False)
    save_quantized(model, tmp_path / "opt-w4a4", tokenizer)
    return tmp_path / "opt-w4a4"


def questions():
    """How does a line of WikiText-2 go on: as it does, or as the next one."""
    lines = [line.split() for line in wikitext("test") if len(line.split()) > WORDS][: CHOICES + 1]
    halves = [(" ".join(line[:15]), " ".join(line[15:WORDS])) for line in lines]
    return [
        {"context": halves[i][0], "choices": [halves[i][1], halves[i + 1][1]], "answer": 0}
        for i in range(CHOICES)
    ]


def log_likelihood(model, tokenizer, context, continuation):
    before, whole = (tokenizer(t).input_ids for t in (context, f"{context} {continuation}"))
    with torch.no_grad():  # without the last token, as lm-eval does: attention rounds by length
        logits = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
    return sum(logits[at - 1, whole[at]].item() for at in range(len(before), len(whole)))


@pytest.mark.long
def test_it_scores_a_saved_folder(folder, tmp_path):
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "tasks" / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions()))
    (tmp_path / "tasks" / "next_words.yaml").write_text(TASK.format(data=data))
    command = [
        *(sys.executable, "-m", "smoothquant", "lm-eval", "run", "--model", "hf"),
        *("--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"),
        *("--tasks", "next_words", "--include_path", str(tmp_path / "tasks")),
        *("--output_path", str(tmp_path / "results"), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (found,) = (tmp_path / "results").rglob("results_*.json")
    (samples,) = (tmp_path / "results").rglob("samples_next_words_*.jsonl")
    accuracy = json.loads(found.read_text())["results"]["next_words"]["acc,none"]
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == CHOICES and accuracy == sum(row["acc"] for row in rows) / CHOICES
    model, tokenizer = load_quantized(folder), load_bundled("tiny-opt")[1]
    for row in rows:
        scores = [float(response[0]) for response in row["filtered_resps"]]
        doc = row["doc"]
        own = [log_likelihood(model, tokenizer, doc["context"], c) for c in doc["choices"]]
        assert scores == pytest.approx(own, abs=0.01)
