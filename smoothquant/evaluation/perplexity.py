"""Perplexity, KL divergence and top-1 agreement on a text, window by window."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.config import check_integer
from ..core.messages import naming
from ..core.progress import progress_bar
from ..core.texts import read_texts
from ..models.loading import text_tokenizer
from ..models.running import check_positions, check_token_ids, evaluating, run_tokens

# Positions to convert to float32 log-probabilities at a time. With a vocabulary of 128,000 that
# takes 128 MB; a whole window of 2,048 would take 1 GB, twice.
LOSS_CHUNK = 256


class Comparison(NamedTuple):
    """A model compared with a reference on the same windows: means over the scored tokens.

    Attributes:
        perplexity: the model's perplexity.
        kl: KL(P || Q) in nats, where P is the reference's next-token distribution and Q the
            model's.
        top1: fraction of tokens for which both have the same most likely next token, in [0, 1].
        reference_perplexity: the reference's perplexity.
    """

    perplexity: float
    kl: float
    top1: float
    reference_perplexity: float


class HeadLogits:
    """A model's logits on the windows of an evaluator, recomputed from the inputs of its head.

    One recorded pass of a reference serves any number of comparisons. Head inputs are smaller than
    logits by the ratio of vocabulary to hidden size (85 for SmolLM2).

    Args:
        head: the model's output head.
        inputs: [num_windows, seq_len - 1, H] from `Evaluator.head_inputs`, or any object that
            returns one window when indexed by its number (such as a slice of a safetensors file).
    """

    def __init__(self, head: Any, inputs: Tensor) -> None:
        self.head, self.inputs = head, inputs

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        """Logits [seq_len - 1, V] of one window."""
        # A quantized head has no parameters, and dequantizes its weight on every access.
        tensors = itertools.chain(self.head.parameters(), self.head.buffers())
        return self.head(self.inputs[index].to(next(tensors).device))


class Evaluator:
    """Scores models on one text, such as WikiText-2, cut into windows of tokens.

    Args:
        dataset: a mapping with a list of rows under "text" (such as a Hugging Face dataset), a list
            of rows, or the path of a file that `smoothquant.core.texts.read_texts` reads.
        tokenizer: the tokenizer of the models to score.
        device: device of the token ids. A model's forward pass runs on the model's own device.
        n_samples: number of windows to score, from the start; None for all.
        seq_len: tokens per window, >= 2. The first token of each window is context only.
        progress: show a progress bar.

    Attributes:
        dataset: int64 [1, T], the token ids of the whole text.
        num_windows: number of windows that `evaluate` scores.
        available_windows: number of full windows in the text.

    Raises:
        ValueError: the text is too short for one window or for `n_samples`, or an argument is out
            of range; the message names the argument.
        TypeError: `dataset` or a count has the wrong type.
    """

    def __init__(
        self,
        dataset: Mapping[str, Sequence[str]] | Sequence[str] | str | os.PathLike,
        tokenizer: Any,
        device: str | torch.device = "cpu",
        n_samples: int | None = 40,
        *,
        seq_len: int = 2048,
        progress: bool = True,
    ) -> None:
        check_integer("seq_len", seq_len, 2)
        if n_samples is not None:
            check_integer("n_samples", n_samples, 1)
        tokenizer = text_tokenizer(tokenizer)
        with naming(source="dataset"):
            text = "\n\n".join(_rows(dataset))
        token_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        self.dataset = token_ids.to(device)
        self.device = device
        self.seq_len = seq_len
        self.progress = progress
        self.available_windows = token_ids.shape[1] // seq_len
        if self.available_windows == 0:
            raise ValueError(
                f"seq_len: dataset has {token_ids.shape[1]} tokens, less than one window of "
                f"{seq_len}"
            )
        if n_samples is not None and n_samples > self.available_windows:
            raise ValueError(
                f"n_samples must be at most {self.available_windows}, the number of windows of "
                f"{seq_len} tokens in dataset; got {n_samples}"
            )
        self.n_samples = n_samples
        self.num_windows = n_samples or self.available_windows

    @torch.no_grad()
    def token_nlls(self, model: nn.Module) -> Tensor:
        """The negative log-likelihood (natural log) of every scored token.

        Returns:
            float64 [num_windows, seq_len - 1] on the CPU.

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
        """Score a model and record the inputs of its output head, for `HeadLogits`.

        Returns:
            A pair. First, the result of `token_nlls`. Second, the head inputs
            [num_windows, seq_len - 1, H] in the model's dtype, on the CPU; None if the logits are
            not the head's plain output, because the model scales or caps them.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
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
        recomputed = _nlls(HeadLogits(head, inputs)[last], self._labels(last))
        same = torch.allclose(recomputed, nlls[last], rtol=1e-5, atol=1e-4, equal_nan=True)
        return nlls, inputs if same else None

    @torch.no_grad()
    def token_comparison(
        self, model: nn.Module, reference: nn.Module | HeadLogits | Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare the predictions of a model and a reference for every scored token.

        Args:
            model: the model to score.
            reference: another model, or an object that returns the logits [seq_len - 1, V] of a
                window when indexed by its number, such as `HeadLogits`. Only one window of logits
                of each is in memory at a time.

        Returns:
            Three tensors [num_windows, seq_len - 1] on the CPU: `token_nlls` of the model
            (float64), KL(reference || model) in nats (float64), and whether the most likely token
            is the same (bool).

        Raises:
            ValueError: as `check_model`, or the vocabularies differ in size.
        """
        return self._token_comparison(model, reference)[:3]

    @torch.no_grad()
    def _token_comparison(
        self, model: nn.Module, reference: nn.Module | HeadLogits | Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`token_comparison`, and `token_nlls` of the reference."""
        shape = (self.num_windows, self.seq_len - 1)
        nlls, kls, reference_nlls = torch.empty(3, *shape, dtype=torch.float64)
        same = torch.empty(shape, dtype=torch.bool)
        with ExitStack() as modes:
            for scored in (model, reference):
                if isinstance(scored, nn.Module):
                    self.check_model(scored)
                    modes.enter_context(evaluating(scored))
            for index in self._progress():
                logits, expected = self._logits(model, index), self._logits(reference, index)
                if expected.shape != logits.shape:
                    raise ValueError(
                        f"reference must give logits of shape {tuple(logits.shape)} for a window, "
                        f"like the model; got {tuple(expected.shape)}"
                    )
                scores = _compare(logits, expected, self._labels(index))
                nlls[index], kls[index], same[index], reference_nlls[index] = scores
        return nlls, kls, same, reference_nlls

    def compare(
        self, model: nn.Module, reference: nn.Module | HeadLogits | Sequence[Tensor]
    ) -> Comparison:
        """Measure a model's perplexity, KL divergence from a reference and top-1 agreement with it.

        The arguments are those of `token_comparison`. Prints the result and how it was measured.
        """
        started = time.perf_counter()
        nlls, kls, same, reference_nlls = self._token_comparison(model, reference)
        seconds = time.perf_counter() - started
        result = Comparison(
            nlls.mean().exp().item(),
            kls.mean().item(),
            same.double().mean().item(),
            reference_nlls.mean().exp().item(),
        )
        print(
            f"perplexity {result.perplexity:.4f} (reference "
            f"{result.reference_perplexity:.4f}), KL divergence {result.kl:.5f} nats, "
            f"top-1 agreement {result.top1:.2%} {self._measured(seconds)}"
        )
        return result

    def evaluate(self, model: nn.Module) -> Tensor:
        """Measure a model's perplexity and print it with how it was measured.

        Returns:
            The perplexity, a 0-d float32 tensor; the mean is taken in float64. NaN or Inf if the
            model's logits are not finite.

        Raises:
            ValueError: as `check_model`.
        """
        started = time.perf_counter()
        nlls = self.token_nlls(model)
        seconds = time.perf_counter() - started
        perplexity = nlls.mean().exp()
        print(f"perplexity {perplexity:.4f} {self._measured(seconds)}")
        return perplexity.float()

    def window(self, index: int) -> Tensor:
        """The token ids of one window, int64 [1, seq_len], on the evaluator's device."""
        return self.dataset[:, index * self.seq_len : (index + 1) * self.seq_len]

    def _progress(self) -> Iterator[int]:
        windows = range(self.num_windows)
        return progress_bar(windows, desc="evaluating", unit="window", shown=self.progress)

    def _logits(self, model: nn.Module | HeadLogits | Sequence[Tensor], index: int) -> Tensor:
        """Logits [seq_len - 1, V] of one window, on the model's device."""
        if not isinstance(model, nn.Module):
            return model[index]
        window = self.window(index).to(next(model.parameters()).device)
        return run_tokens(model, window).logits[0, :-1]

    def _labels(self, index: int) -> Tensor:
        return self.window(index)[0, 1:]

    def _measured(self, seconds: float) -> str:
        tokens = self.num_windows * self.seq_len
        return (
            f"on {self.num_windows} of {self.available_windows} windows, seqlen {self.seq_len}, "
            f"{tokens / seconds:.1f} tokens/s"
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError if the model does not predict the next token, or has too few token ids
        or positions for the windows."""
        config: Any = model.config
        can_generate: Any = getattr(model, "can_generate", None)
        other = type(model).__module__.startswith("transformers.") and not can_generate()
        if other or getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model must be a causal language model; got {type(model).__name__}")
        check_token_ids(model, self.dataset)
        check_positions(model, seq_len=self.seq_len)


def _rows(dataset: Any) -> Iterable[str]:
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
    """Logits [T, V] of any float dtype and labels int64 [T] to float64 [T] on the CPU."""
    return torch.cat(
        [
            nn.functional.cross_entropy(chunk.float(), label, reduction="none").double().cpu()
            for chunk, label in _in_chunks(logits, labels.to(logits.device))
        ]
    )


def _compare(
    logits: Tensor, expected: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token NLL, KL divergence, top-1 agreement and the reference's NLL, each [T] on the CPU.

    Args:
        logits, expected: [T, V], the logits of the model and of the reference.
        labels: int64 [T].
    """
    parts = []
    device = logits.device
    for chunk, reference, label in _in_chunks(logits, expected.to(device), labels.to(device)):
        log_q = nn.functional.log_softmax(chunk.float(), dim=-1)
        log_p = nn.functional.log_softmax(reference.float(), dim=-1)
        # Not exp(log_p): its last bits depend on where threads split the tensor.
        p = nn.functional.softmax(reference.float(), dim=-1)
        expected_nll = nn.functional.nll_loss(log_p, label, reduction="none").double()
        kl = (p * log_p.sub_(log_q)).sum(-1, dtype=torch.float64)
        nll = nn.functional.nll_loss(log_q, label, reduction="none").double()
        same = chunk.argmax(-1) == reference.argmax(-1)
        parts.append((nll.cpu(), kl.cpu(), same.cpu(), expected_nll.cpu()))
    nll, kl, same, expected_nll = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll, kl, same, expected_nll


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(LOSS_CHUNK) for tensor in tensors), strict=True)
