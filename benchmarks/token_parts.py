"""Where the time of a forward pass in `generate` goes, module by module."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smoothquant.evaluation.speed import TokenTimes, greedy
from smoothquant.layers.decoder import FusedStack, runs_fused
from smoothquant.layers.embedding import QuantizedEmbedding
from smoothquant.layers.linear import QuantizedLinear
from smoothquant.models.families import decoder_layers
from smoothquant.models.kept import output_heads

HEAD, LINEARS, ATTENTION = "output head", "linears", "attention"
LAYERS = "fused layers, embedding"
SMALL, OTHER = "norms, activation, residuals", "generate, other Python"
PARTS = (LAYERS, LINEARS, HEAD, ATTENTION, SMALL, OTHER)


class PartTimes(TokenTimes):
    """A streamer and a clock: the seconds that each part of a model has taken, at each token.

    A module's time includes its Python and excludes that of the modules inside it that have a part
    of their own. The time spent here is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.at_token: list[dict[str, float]] = []
        self.inside = [OTHER]
        self.since = time.perf_counter()

    def enter(self, part: str) -> None:
        self._charge()
        self.inside.append(part)
        self.since = time.perf_counter()

    def leave(self) -> None:
        self._charge()
        self.inside.pop()
        self.since = time.perf_counter()

    def put(self, ids: torch.Tensor) -> None:
        self._charge()
        self.at_token.append(dict(self.seconds))
        self.since = time.perf_counter()

    def _charge(self) -> None:
        self.seconds[self.inside[-1]] += time.perf_counter() - self.since


def parts_of(model: nn.Module) -> dict[str, str]:
    """{full name of a module: its part} for the modules of a decoder-only model.

    Fused decoder layers are one part, with the embedding and the last norm where a stack of them
    is one call; timing their modules would make them run step by step.

    Raises:
        ValueError: the model's family is not known.
    """
    layers = set(decoder_layers(model))
    # A tied quantized head is found under the embedding's name.
    heads = {model.get_submodule(name) for name in output_heads(model)}
    heads.add(model.get_output_embeddings())
    embeddings = {m.packed for m in model.modules() if isinstance(m, QuantizedEmbedding)}
    embeddings.discard(model.get_output_embeddings())
    if not layers:
        raise ValueError(f"the decoder layers of a {type(model).__name__} are not known")
    parts = {}
    fused = {name for name in layers if runs_fused(model.get_submodule(name))}
    stack = next(iter(layers)).rpartition(".")[0].rpartition(".")[0]
    if fused == layers and isinstance(model.get_submodule(stack), FusedStack):
        fused = {stack}
    for name, module in model.named_modules():
        if name in fused:
            parts[name] = LAYERS
        elif module in heads:
            parts[name] = HEAD
        elif (
            fused & {name[:end] for end, letter in enumerate(name) if letter == "."}
            or module in embeddings
        ):
            continue
        elif isinstance(module, QuantizedLinear | nn.Linear):
            parts[name] = LINEARS
        elif type(module).__name__.endswith("Attention"):
            parts[name] = ATTENTION
        elif name in layers or "Norm" in type(module).__name__:
            parts[name] = SMALL
    return parts


def weight_bytes(model: nn.Module, parts: dict[str, str]) -> dict[str, int]:
    """Bytes of the tensors in the linears, fused layers and the output head."""
    sizes: dict[str, int] = defaultdict(int)
    for name, part in parts.items():
        if part in (LAYERS, LINEARS, HEAD):
            module = model.get_submodule(name)
            module = module.layers if isinstance(module, FusedStack) else module
            tensors = [*module.parameters(), *module.buffers()]
            sizes[part] += sum(tensor.nbytes for tensor in tensors)
    return sizes


@contextmanager
def timed(model: nn.Module, parts: Mapping[str, str], clock: PartTimes) -> Iterator[None]:
    """Let a clock time the modules in `parts`, until exit.

    Each module's forward is wrapped, because hooks take longer than the clock.
    """

    def wrap(part: str, forward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            clock.enter(part)
            y = forward(*args, **kwargs)
            clock.leave()
            return y

        return wrapped

    modules = {name: model.get_submodule(name) for name in parts}
    own = {name: module.__dict__.get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = wrap(parts[name], module.forward)
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if own[name] is not None:
                module.forward = own[name]


def token_parts(
    model: Any, prompt: torch.Tensor, new: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each part: until the first new token, and per token after it.

    Args:
        model: a decoder-only transformers model of a known family.
        prompt: int64 [1, T].
        new: number of tokens to generate, >= 2.
    """
    clock = PartTimes()
    with timed(model, parts_of(model), clock):
        greedy(model, prompt, new, clock)
    start, first, last = (clock.at_token[index] for index in (0, 1, -1))
    prefill = {part: first.get(part, 0.0) - start.get(part, 0.0) for part in PARTS}
    decode = {part: (last.get(part, 0.0) - first.get(part, 0.0)) / (new - 1) for part in PARTS}
    return prefill, decode
