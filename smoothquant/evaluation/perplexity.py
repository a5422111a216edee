"""Perplexity, KL divergence and top-1 agreement on a text, window by window."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.config import check_integer
from ..core.progress import progress_bar
from ..core.texts import read_texts
from ..models.running import evaluating, no_cache

# Positions whose logits are turned into float32 and log-probabilities at a time: for a vocabulary
# of 128,000 that is 128 MB, where a whole window of 2,048 would take 1 GB twice.
LOSS_CHUNK = 256


class Comparison(NamedTuple):
    """A model against a reference on the same windows; means over the scored tokens.

    perplexity: of the model.
    kl: KL(P || Q) in nats, P the reference's distribution of the next token and Q the model's.
    top1: share of tokens for which both hold the same next token most likely, in [0, 1].
    """

    perplexity: float
    kl: float
    top1: float


class HeadLogits:
    """A model's logits on the windows of an evaluator, made anew by its output head.

    What the head reads is smaller than what it gives by the ratio of vocabulary to hidden size (85
    for SmolLM2): one recorded pass of the reference serves any number of comparisons.

    Args:
        head: the model's output head.
        inputs: [num_windows, seq_len - 1, H], as `Evaluator.head_inputs` gives them, or anything
            that gives a window of them by its number (a slice of a safetensors file).
    """

    def __init__(self, head: nn.Module, inputs: Tensor) -> None:
        self.head, self.inputs = head, inputs

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        """Logits [seq_len - 1, V] of a window."""
        return self.head(self.inputs[index].to(self.head.weight.device))


class Evaluator:
    """Scores models on one text: WikiText-2 and its like, cut into windows of tokens.

    Args:
        dataset: a mapping with a list of rows under "text" (a Hugging Face dataset, for one), a
            list of rows, or the path of a file that `calibration.read_texts` reads.
        tokenizer: the tokenizer of the models to be scored.
        device: device of the token ids; a model's own device is used for its forward pass.
        n_samples: windows to score, from the beginning; None for all of them.
        seq_len: tokens in a window, >= 2. The first token of each window is context only.
        progress: show a progress bar.

    Attributes:
        dataset: int64 [1, T], the ids of the whole text.
        num_windows: windows that `evaluate` scores.
        available_windows: windows that the text gives.

    Raises:
        ValueError: the text is too short for one window or for `n_samples`, or an argument is out
            of range; the message names it.
        TypeError: `dataset` or a count has the wrong type.
    """

    def __init__(
        self,
        dataset: Mapping | Sequence[str] | str | os.PathLike,
        tokenizer,
        device="cpu",
        n_samples: int | None = 40,
        *,
        seq_len: int = 2048,
        progress: bool = True,
    ) -> None:
        check_integer("seq_len", seq_len, 2)
        if n_samples is not None:
            check_integer("n_samples", n_samples, 1)
        text = "\n\n".join(_rows(dataset))
        token_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        self.dataset = token_ids.to(device)
        self.device = device
        self.seq_len = seq_len
        self.progress = progress
        self.available_windows = token_ids.shape[1] // seq_len
        if self.available_windows == 0:
            raise ValueError(
                f"seq_len: dataset holds {token_ids.shape[1]} tokens, less than one window of "
                f"{seq_len}"
            )
        if n_samples is not None and n_samples > self.available_windows:
            raise ValueError(
                f"n_samples must be at most {self.available_windows}, the windows of {seq_len} "
                f"tokens in dataset; got {n_samples} (None scores all)"
            )
        self.n_samples = n_samples
        self.num_windows = n_samples or self.available_windows

    @torch.no_grad()
    def token_nlls(self, model: nn.Module) -> Tensor:
        """Return the negative log-likelihood (natural log) of every scored token.

        Returns:
            float64 [num_windows, seq_len - 1], CPU; the windows are those of `evaluate`.

        Raises:
            ValueError: as `check_model`.
        """
        self.check_model(model)
        nlls = torch.empty(self.num_windows, self.seq_len - 1, dtype=torch.float64)
        with evaluating(model):
            for index in self._progress():
                nlls[index] = _nlls(self._logits(model, index), self._labels(index))
        return nlls

    @torch.no_grad()
    def head_inputs(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Score a model and keep what its output head reads, for `HeadLogits`.

        Returns:
            (`token_nlls`; [num_windows, seq_len - 1, H] in the model's dtype, CPU, or None where
            the logits are not the head's output as it is: some models scale or cap them.)
        """
        head = model.get_output_embeddings()
        if head is None:
            return self.token_nlls(model), None
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, :-1].cpu()))
        try:
            nlls = self.token_nlls(model)
        finally:
            hook.remove()
        inputs = torch.stack(seen)
        last = self.num_windows - 1
        again = _nlls(HeadLogits(head, inputs)[last], self._labels(last))
        same = torch.allclose(again, nlls[last], rtol=1e-5, atol=1e-4, equal_nan=True)
        return nlls, inputs if same else None

    @torch.no_grad()
    def token_comparison(
        self, model: nn.Module, reference: nn.Module | HeadLogits | Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare a model's predictions with a reference's, for every scored token.

        Args:
            model: the model to be scored.
            reference: another model, or the logits [seq_len - 1, V] of each window by its number
                (a `HeadLogits`, for one). A window of both is in memory at a time.

        Returns:
            (`token_nlls` of the model; KL(reference || model) in nats; whether the most likely
            token is the same), float64, float64 and bool [num_windows, seq_len - 1], CPU.

        Raises:
            ValueError: as `check_model`, or the vocabularies differ in size.
        """
        shape = (self.num_windows, self.seq_len - 1)
        nlls, kls = torch.empty(2, *shape, dtype=torch.float64)
        same = torch.empty(shape, dtype=torch.bool)
        with ExitStack() as modes:
            for each in (model, reference):
                if isinstance(each, nn.Module):
                    self.check_model(each)
                    modes.enter_context(evaluating(each))
            for index in self._progress():
                found, wanted = self._logits(model, index), self._logits(reference, index)
                if wanted.shape != found.shape:
                    raise ValueError(
                        f"reference must give logits of shape {tuple(found.shape)} for a window, "
                        f"as the model does; got {tuple(wanted.shape)}"
                    )
                scores = _compared(found, wanted, self._labels(index))
                nlls[index], kls[index], same[index] = scores
        return nlls, kls, same

    def compare(
        self, model: nn.Module, reference: nn.Module | HeadLogits | Sequence[Tensor]
    ) -> Comparison:
        """Perplexity of a model, its KL divergence from a reference and their top-1 agreement.

        Arguments as in `token_comparison`; prints the result and how it was measured.
        """
        started = time.perf_counter()
        nlls, kls, same = self.token_comparison(model, reference)
        seconds = time.perf_counter() - started
        result = Comparison(
            nlls.mean().exp().item(), kls.mean().item(), same.double().mean().item()
        )
        print(
            f"perplexity {result.perplexity:.4f}, KL divergence {result.kl:.5f} nats, "
            f"top-1 agreement {result.top1:.2%} {self._measured(seconds)}"
        )
        return result

    def evaluate(self, model: nn.Module) -> Tensor:
        """Return the model's perplexity, a 0-d float tensor, and print how it was measured.

        The mean is taken in float64. A model whose logits are not finite has the perplexity NaN or
        Inf; ValueError as `check_model`.
        """
        started = time.perf_counter()
        nlls = self.token_nlls(model)
        seconds = time.perf_counter() - started
        perplexity = nlls.mean().exp()
        print(f"perplexity {perplexity:.4f} {self._measured(seconds)}")
        return perplexity.float()

    def window(self, index: int) -> Tensor:
        """The token ids of a window, int64 [1, seq_len], on the evaluator's device."""
        return self.dataset[:, index * self.seq_len : (index + 1) * self.seq_len]

    def _progress(self) -> Iterator[int]:
        windows = range(self.num_windows)
        return progress_bar(windows, desc="evaluating", unit="window", shown=self.progress)

    def _logits(self, model: nn.Module | HeadLogits | Sequence[Tensor], index: int) -> Tensor:
        """Logits [seq_len - 1, V] of a window, on the model's device."""
        if not isinstance(model, nn.Module):
            return model[index]
        window = self.window(index).to(next(model.parameters()).device)
        return model(window, **no_cache(model)).logits[0, :-1]

    def _labels(self, index: int) -> Tensor:
        return self.window(index)[0, 1:]

    def _measured(self, seconds: float) -> str:
        tokens = self.num_windows * self.seq_len
        return (
            f"on {self.num_windows} of {self.available_windows} windows, seqlen {self.seq_len}, "
            f"{tokens / seconds:.1f} tokens/s"
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError if the model lacks token ids or positions that the windows need."""
        embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
        largest = int(self.dataset.max())
        if embeddings is not None and largest >= embeddings:
            raise ValueError(
                f"model knows {embeddings} token ids, the tokenizer gave {largest}: "
                "they do not belong together"
            )
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and positions < self.seq_len:
            raise ValueError(
                f"seq_len must be at most {positions}, the model's positions; got {self.seq_len}"
            )


def _rows(dataset) -> Iterable[str]:
    if isinstance(dataset, (str, os.PathLike)):
        return read_texts(dataset)
    try:
        rows = dataset["text"]
    except KeyError:
        raise ValueError('dataset has no rows under "text"') from None
    except (TypeError, IndexError):
        rows = dataset
    return read_texts(rows)


def _nlls(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [T, V] of any float dtype, labels int64 [T] -> float64 [T], CPU."""
    return torch.cat(
        [
            nn.functional.cross_entropy(some.float(), label, reduction="none").double().cpu()
            for some, label in _in_chunks(logits, labels.to(logits.device))
        ]
    )


def _compared(found: Tensor, wanted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, V] of a model and its reference, labels [T] -> nll, KL, same top-1: [T], CPU."""
    parts = []
    device = found.device
    for some, reference, label in _in_chunks(found, wanted.to(device), labels.to(device)):
        log_q = nn.functional.log_softmax(some.float(), dim=-1)
        log_p = nn.functional.log_softmax(reference.float(), dim=-1)
        # softmax anew, not exp(log_p), whose last bits depend on where threads cut the tensor
        p = nn.functional.softmax(reference.float(), dim=-1)
        kl = (p * log_p.sub_(log_q)).sum(-1, dtype=torch.float64)
        nll = nn.functional.nll_loss(log_q, label, reduction="none").double()
        parts.append((nll.cpu(), kl.cpu(), (some.argmax(-1) == reference.argmax(-1)).cpu()))
    nll, kl, same = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll, kl, same


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(LOSS_CHUNK) for tensor in tensors), strict=True)
