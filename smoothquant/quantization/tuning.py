"""Tuning: train what a quantized model stores by its KL divergence from the float model.

Weight scales, salient weights and activation clips are trained; the codes of the weights stay. The
forward pass dequantizes one weight at a time and rounds activations as the kernels do. Gradients
pass through the rounding wherever a value was not clipped. A tenth of the tokens is held out: the
values that are kept, rounded as they are stored and run by the layers themselves, have the least KL
divergence on those, and may be the ones from before tuning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.config import MixedQuantConfig
from ..core.progress import progress_bar
from ..core.tensor_files import write_tensors
from ..core.version import __version__
from ..kernels import ops
from ..layers.linear import QuantizedLinear, grouped, kernel_choices
from ..layers.rounding import SMALLEST_NORMAL
from ..models.modules import is_transformers_model, module_copy, replace_module
from ..models.running import HeadReached, evaluating, hooked, run_tokens, runs_on_tokens
from ..models.tables import head_name

logger = logging.getLogger("smoothquant")

SEQUENCE = 256  # tokens per step
LOGIT_TOKENS = 64  # tokens whose logits are in memory at a time
HELD_OUT = 10  # one sequence in so many
RATES = {"scales": 3e-4, "salient": 4e-4, "clip": 1e-3}  # largest relative change per step
FACTORS = (1 / 3, 1.0, 3.0)  # of the rates; short trials choose one
TRIAL_STEPS = 12
WARM_UP = 10
EVALUATIONS = 4  # in the main run
SAVE_EVERY = 20  # steps
BETAS = (0.9, 0.99)
SMALLEST_CLIP = 0.5


def planned_steps(tokens: int) -> int:
    """Training steps of `SEQUENCE` tokens for so many calibration tokens, trials included."""
    count = max(2, tokens // SEQUENCE)
    steps = count - _held_out(count)
    return steps + len(FACTORS) * min(TRIAL_STEPS, steps)


def _held_out(sequences: int) -> int:
    return max(1, sequences // HELD_OUT)


class Tuning:
    """The tuning of one model. Creating it records the float model's hidden states.

    Args:
        model: the float model, before anything in it is quantized.
        config: with ``tune=True``.
        batches: int64 [B, T] token ids.
        state: a file for progress; the same call resumes from it. None keeps none.
        progress: show progress bars.

    Raises:
        ValueError: the model or config cannot be tuned; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MixedQuantConfig,
        batches: Sequence[Tensor],
        state: Path | None = None,
        progress: bool = False,
    ) -> None:
        check_tunable(model, config)
        self.config, self.state, self.progress = config, state, progress
        sequences = [row for batch in batches for row in batch.split(SEQUENCE, dim=1)]
        sequences = [row[None] for rows in sequences for row in rows if len(row) > 1]
        if len(sequences) < 2:
            raise ValueError(
                f"batches must hold two sequences for tune=True, one of them held out; "
                f"got {len(sequences)}"
            )
        random.Random(config.seed).shuffle(sequences)
        self.sequences, self.count = sequences, _held_out(len(sequences))
        name = head_name(model)
        assert name is not None
        self.head_name = name
        self.head = module_copy(model.get_submodule(name))  # shares the float weight
        shown = progress_bar(sequences, desc="16-bit outputs", unit="sequence", shown=progress)
        with evaluating(model), torch.no_grad():
            _check_logits(model, self.head, sequences[0], _hidden(model, name, sequences[0]))
            self.hidden = [_hidden(model, name, tokens).cpu() for tokens in shown]

    def run(self, model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        """Tune the quantized model in place; log the KL divergence before and after.

        Args:
            groups: names of the linears, those that share an input together.
        """
        _Run(self, model, groups).run()

    def divergence(self, model: nn.Module) -> float:
        """The mean KL divergence of the model, as it computes, on the held-out sequences."""
        head, total = model.get_submodule(self.head_name), 0.0
        tokens = 0
        with evaluating(model), torch.no_grad():
            for ids, wanted in zip(
                self.sequences[: self.count], self.hidden[: self.count], strict=True
            ):
                h = _hidden(model, self.head_name, ids)
                total += sum(float(kl) for _, kl in self.chunks(h, wanted, head))
                tokens += len(h)
        return total / tokens

    def chunks(
        self, h: Tensor, wanted: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of h, sum of its tokens' KL divergences), a few tokens at a time.

        Args:
            h: hidden states [T, H] of the quantized model.
            wanted: those of the float model.
            logits: the output head.
        """
        for part, target in zip(h.split(LOGIT_TOKENS), wanted.split(LOGIT_TOKENS), strict=True):
            if h.requires_grad:
                part = part.detach().requires_grad_()
            with torch.no_grad():
                expected = F.log_softmax(self.head(target.to(h.device)).float(), dim=-1)
            log_q = F.log_softmax(logits(part).float(), dim=-1)
            yield part, (expected.exp() * (expected - log_q)).sum()


def check_tunable(model: nn.Module, config: MixedQuantConfig) -> None:
    """Raise ValueError, with a remedy, if the model cannot be tuned."""
    why, remedy = "", "use recipe='best' or tune=False"
    kind = type(model).__name__
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if config.act_quant == "per_tensor":
        why = "act_quant='per_tensor' makes a token's result depend on the whole batch"
    elif torch.is_inference_mode_enabled():
        why, remedy = "torch.inference_mode() allows no gradients", "use torch.no_grad() instead"
    elif any(tensor.is_meta for tensor in model.parameters()):
        why, remedy = f"{kind} has weights on meta or offloaded", "load the whole model into memory"
    elif not is_transformers_model(model) or head_name(model) is None or encoder_decoder:
        why = f"{kind} has no output head that predicts the next token"
    elif not runs_on_tokens(model):
        why = f"{kind} does not run on token ids alone"
    if why:
        raise ValueError(f"tune=True cannot train this model: {why}; {remedy}")


def check_state(path: Path | None) -> None:
    """Raise ValueError if a file cannot hold the progress of tuning, or holds something else."""
    if path is None:
        return
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"tuning_state must be a file in an existing folder; got {str(path)!r}")
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                is_ours = "progress" in set(file.keys())
        except Exception:  # whatever it is
            is_ours = False
        if not is_ours:
            raise ValueError(
                f"tuning_state must be a new file, or one with the progress of tuning; "
                f"{str(path)!r} holds something else"
            )


def _check_logits(model: nn.Module, head: nn.Module, tokens: Tensor, hidden: Tensor) -> None:
    device = next(model.parameters()).device
    expected = run_tokens(model, tokens.to(device)).logits[0].float()
    if not torch.allclose(head(hidden.to(device)).float(), expected, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"tune=True cannot train this model: {type(model).__name__} scales or caps the logits "
            "of its output head; use recipe='best' or tune=False"
        )


def _hidden(model: nn.Module, head: str, tokens: Tensor) -> Tensor:
    """The inputs [T, H] of the output head for token ids [1, T]."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values())))[0])
        raise HeadReached

    device = next(model.parameters()).device
    with hooked(model, {head: stop}), contextlib.suppress(HeadReached):
        run_tokens(model, tokens.to(device))
    return seen[0]


class _Rotation(torch.autograd.Function):
    """`ops.group_hadamard`, whose matrix is orthonormal and symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_size: int, rotation: int) -> Tensor:
        ctx.sizes = group_size, rotation
        return ops.group_hadamard(x.contiguous(), group_size, rotation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ops.group_hadamard(grad.contiguous(), *ctx.sizes), None, None


class _Rounding(torch.autograd.Function):
    """Quantizes and dequantizes groups [T, G, g] as `reference.quantize_activation` does.

    The gradient passes where a value was not clipped. That of the clip is of the clipped values'
    bounds and of the rounding errors, which both scale with it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int, act_format: str) -> Tensor:
        symmetric = act_format == "symmetric"
        positive = x.amax(-1, keepdim=True).clamp_(min=0)
        negative = (-x.amin(-1, keepdim=True)).clamp_(min=0)
        span = torch.maximum(positive, negative) if symmetric else positive
        if act_format == "zero_point":
            span = positive + negative
        levels = 2 ** (bits - symmetric) - 1
        scale = clip * span / levels
        usable = scale >= SMALLEST_NORMAL
        scale = torch.where(usable, scale, 0)
        inverse = torch.where(usable, 1 / torch.where(usable, scale, 1), 0)
        low = torch.full_like(scale, -levels if symmetric else 0)
        if act_format == "zero_point":
            low = -(clip * negative * inverse).round_().clamp_(max=levels)
        high = torch.full_like(scale, levels) if symmetric else levels + low
        codes = x * inverse
        inside = (codes >= low - 0.5) & (codes <= high + 0.5)
        y = codes.clamp_(low, high).round_().mul_(scale)
        ctx.save_for_backward(x, y, inside, clip)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, y, inside, clip = ctx.saved_tensors
        change = torch.where(inside, y - x, y)
        return grad * inside, (grad * change).sum() / clip, None, None


class _Product(torch.autograd.Function):
    """x [T, K] times the transposed weight of codes [N, G, g], scales [N, G] and salient [N, K_s].

    The weight exists only during a call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, salient: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, scales, salient)
        return x @ _weight(codes, scales, salient, x.shape[1]).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:  # type: ignore[override]
        x, codes, scales, salient = ctx.saved_tensors
        to_x = grad @ _weight(codes, scales, salient, x.shape[1])
        to_weight = grad.T @ x
        k4 = x.shape[1] - salient.shape[1]
        groups = grouped(to_weight[:, :k4], codes.shape[2])
        return to_x, None, (groups * codes).sum(-1), to_weight[:, k4:].contiguous()


def _weight(codes: Tensor, scales: Tensor, salient: Tensor, k: int) -> Tensor:
    int4 = (codes * scales.unsqueeze(-1)).flatten(1)[:, : k - salient.shape[1]]
    return torch.cat((int4, salient), dim=1)


class _Input(nn.Module):
    """The rounding of an input, shared by the linears that read it."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        choices = kernel_choices(layer.config)
        self.choices, self.group_size = choices, layer.group_size
        self.perm, self.k4 = layer.perm, layer.in_features - layer.num_salient
        self.clip = torch.tensor(choices.clip, device=layer.perm.device)
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> fp32 [T, K] in packed order."""
        if self.last is not None and self.last[0] is x:
            return self.last[1]
        rows = x.reshape(-1, x.shape[-1]).float().index_select(1, self.perm)
        int4, salient = rows[:, : self.k4], rows[:, self.k4 :]
        rotation, bits, act_format, per_token, _ = self.choices
        if self.k4:
            if rotation > 1:
                int4 = _Rotation.apply(int4, self.group_size, rotation)
            groups = grouped(int4, self.k4 if per_token else self.group_size)
            rounded = _Rounding.apply(groups, self.clip, bits, act_format)
            int4 = rounded.flatten(1)[:, : self.k4]
        out = torch.cat((int4, salient), dim=1)
        self.last = (x, out)
        return out


class _Linear(nn.Module):
    """A quantized linear in differentiable form."""

    def __init__(self, layer: QuantizedLinear, reads: _Input) -> None:
        super().__init__()
        self.layer, self.reads = [layer], [reads]  # lists, so that they are no submodules
        self.bias = layer.bias
        self.codes, self.scales, self.salient = layer.grid()
        self.shared = {"per_group": (None, None), "per_channel": (None, 1), "per_tensor": (1, 1)}[
            layer.config.weight_quant
        ]
        self.groups = self.scales.shape
        self.scales = self.scales[: self.shared[0], : self.shared[1]].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        scales = self.scales.expand(self.groups)
        y = _Product.apply(self.reads[0](x), self.codes, scales, self.salient)
        y = y if self.bias is None else y + self.bias.float()
        y = y.unflatten(0, x.shape[:-1])
        layer = self.layer[0]
        if layer.quantize_output:
            y = y + (layer._quantize_output(y.detach()) - y.detach())
        return y.to(x.dtype)

    def store(self) -> None:
        """Round the values to their stored precision and give them to the quantized layer."""
        clip = self.reads[0].clip.item()
        self.layer[0].set_grid(self.codes, self.scales.expand(self.groups), self.salient, clip)


class _Value(NamedTuple):
    """A trained tensor.

    kind: as in `RATES`. unit: what relative steps are relative to. mean, square: Adam's.
    """

    kind: str
    owner: nn.Module
    unit: Tensor
    first: Tensor
    mean: Tensor
    square: Tensor

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.kind)


class _Run:
    """One run of `Tuning`: trials of the rates, then the training at the best of them."""

    def __init__(self, tuning: Tuning, model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        self.tuning, self.model = tuning, model
        self.student = module_copy(model)
        self.linears: list[_Linear] = []
        self.inputs: list[_Input] = []
        for names in groups:
            layers: list[Any] = [model.get_submodule(name) for name in names]
            reads = _Input(layers[0])
            self.inputs.append(reads)
            for name, layer in zip(names, layers, strict=True):
                self.linears.append(_Linear(layer, reads))
                replace_module(self.student, name, self.linears[-1])
        self.values = [self._value("clip", reads) for reads in self.inputs if reads.k4]
        for linear in self.linears:
            self.values += [
                self._value(kind, linear)
                for kind in ("scales", "salient")
                if getattr(linear, kind).numel()
            ]
        head: Any = model.get_submodule(tuning.head_name)
        weight, bias = head.weight.float(), head.bias
        self.logits = lambda h: F.linear(h.float(), weight, None if bias is None else bias.float())
        count = tuning.count
        self.training = list(zip(tuning.sequences[count:], tuning.hidden[count:], strict=True))
        self.at: dict[str, Any] = {"run": 0, "step": 0, "scores": [], "kept": None, "before": None}
        self.kept: list[Tensor] = []

    @staticmethod
    def _value(kind: str, owner: nn.Module) -> _Value:
        tensor = getattr(owner, kind).detach().clone()
        setattr(owner, kind, tensor)
        unit = torch.ones_like(tensor)
        if kind == "scales":
            unit = tensor.abs().mean(1, keepdim=True).clamp(min=SMALLEST_NORMAL)
        elif kind == "salient":
            unit = tensor.square().mean().sqrt().clamp(min=SMALLEST_NORMAL)
        zeros = torch.zeros_like(tensor)
        return _Value(kind, owner, unit, tensor.clone(), zeros, zeros.clone())

    def run(self) -> None:
        tuning, trial = self.tuning, min(TRIAL_STEPS, len(self.training))
        layers = [linear.layer[0] for linear in self.linears]
        originals = [(layer.config, dict(layer._buffers)) for layer in layers]
        identity = self._identity()
        self._resume(identity)
        if self.at["before"] is None:
            self.at["before"] = tuning.divergence(self.model)
        runs = [(factor, trial) for factor in FACTORS]
        total = sum(steps for _, steps in runs) + len(self.training)
        done = sum(steps for _, steps in runs[: self.at["run"]]) + self.at["step"]
        with (
            evaluating(self.student),
            progress_bar(
                total=total, initial=done, desc="tuning", unit="step", shown=tuning.progress
            ) as bar,
        ):
            while self.at["run"] <= len(runs):
                if self.at["run"] < len(runs):
                    factor, steps = runs[self.at["run"]]
                else:
                    scores = self.at["scores"][: len(runs)]
                    factor, steps = FACTORS[scores.index(min(scores))], len(self.training)
                self._train(factor, steps, identity, bar)
                self.at["run"], self.at["step"] = self.at["run"] + 1, 0
                self._reset()
                self._save(identity)
        before, kept = self.at["before"], self.at["kept"]
        if kept is None:
            for layer, (config, buffers) in zip(layers, originals, strict=True):
                layer.config = config
                layer._buffers.update(buffers)
            logger.warning("tuning found nothing better than KL %.5f on held-out tokens", before)
            return
        for value, tensor in zip(self.values, self.kept, strict=True):
            setattr(value.owner, value.kind, tensor)
        self._store()
        logger.info("tuning: KL on held-out tokens %.5f -> %.5f", before, kept)

    def _train(self, factor: float, steps: int, identity: str, bar: Any) -> None:
        """Train from the present step on, and judge the result on the held-out tokens."""
        is_main = self.at["run"] == len(FACTORS)
        every = max(1, -(-steps // EVALUATIONS)) if is_main else steps
        while self.at["step"] < steps:
            step = self.at["step"]
            warm = min(1.0, (step + 1) / min(WARM_UP, steps))
            rate = factor * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            divergence = self._step(step, rate)
            self.at["step"] = step + 1
            bar.set_postfix_str(f"KL {divergence:.4f}", refresh=False)
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                self._judge()
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
                self._save(identity)

    def _step(self, step: int, rate: float) -> float:
        """One step of Adam; returns the KL divergence on its tokens."""
        tokens, wanted = self.training[step]
        tensors = [value.tensor.requires_grad_() for value in self.values]
        with torch.enable_grad():
            h = _hidden(self.student, self.tuning.head_name, tokens)
            divergence, gradients = 0.0, []
            for part, kl in self.tuning.chunks(h, wanted, self.logits):
                (kl / len(h)).backward()
                assert part.grad is not None
                divergence += kl.item() / len(h)
                gradients.append(part.grad)
            gradient = torch.cat(gradients)
            grads = torch.autograd.grad(h, tensors, gradient, allow_unused=True)
        for reads in self.inputs:
            reads.last = None
        with torch.no_grad():
            for value, tensor, grad in zip(self.values, tensors, grads, strict=True):
                tensor.requires_grad_(False)
                if grad is not None:
                    self._update(value, tensor, grad * value.unit, step + 1, rate)
        return divergence

    @staticmethod
    def _update(value: _Value, tensor: Tensor, grad: Tensor, t: int, rate: float) -> None:
        b1, b2 = BETAS
        value.mean.mul_(b1).add_(grad, alpha=1 - b1)
        value.square.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        change = (value.mean / (1 - b1**t)) / ((value.square / (1 - b2**t)).sqrt() + 1e-12)
        tensor.sub_(change * value.unit * (RATES[value.kind] * rate))
        if value.kind == "clip":
            tensor.clamp_(min(SMALLEST_CLIP, value.first.item()), 1.0)
        elif value.kind == "scales":
            tensor.clamp_(min=0)

    def _judge(self) -> None:
        """Keep the values, as they are stored, if the held-out tokens like them best so far."""
        self._store()
        score = self.tuning.divergence(self.model)
        if self.at["run"] < len(FACTORS):
            self.at["scores"].append(score)
        best = self.at["before"] if self.at["kept"] is None else self.at["kept"]
        if score < best:
            self.at["kept"] = score
            self.kept = [value.tensor.clone() for value in self.values]

    def _store(self) -> None:
        for linear in self.linears:
            linear.store()

    def _reset(self) -> None:
        """Back to the values from before tuning."""
        for value in self.values:
            setattr(value.owner, value.kind, value.first.clone())
            value.mean.zero_()
            value.square.zero_()

    def _identity(self) -> str:
        """A hash of all that the result depends on."""
        digest = hashlib.sha256(json.dumps(self.tuning.config.to_dict()).encode())
        choices = (RATES, FACTORS, TRIAL_STEPS, WARM_UP, EVALUATIONS, BETAS, SMALLEST_CLIP)
        digest.update(repr((__version__, choices, HELD_OUT, LOGIT_TOKENS)).encode())
        codes = [linear.codes for linear in self.linears]
        first = [value.first for value in self.values]
        for tensor in (*self.tuning.sequences, *self.tuning.hidden, *codes, *first):
            tensor = tensor.detach().cpu().contiguous()
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _save(self, identity: str) -> None:
        if self.tuning.state is None:
            return
        text = json.dumps(self.at | {"identity": identity}).encode()
        tensors = {"progress": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        for i, value in enumerate(self.values):
            parts = {"value": value.tensor, "mean": value.mean, "square": value.square}
            tensors |= {f"{i}.{part}": tensor.detach().cpu() for part, tensor in parts.items()}
        tensors |= {f"{i}.kept": tensor.cpu() for i, tensor in enumerate(self.kept)}
        write_tensors(tensors, self.tuning.state)

    def _resume(self, identity: str) -> None:
        """Continue from the state of an earlier run of the same tuning, if there is one."""
        path = self.tuning.state
        if path is None or not path.exists():
            return
        try:
            tensors = load_file(path)
            at = json.loads(bytes(tensors["progress"].tolist()))
            known = at.pop("identity")
        except Exception as error:  # a broken file costs time, not the result
            logger.warning("%s cannot be read (%s): tuning starts anew", path, error)
            return
        if known != identity:
            logger.warning("%s is of another model or config: tuning starts anew", path)
            return
        self.at = at
        for i, value in enumerate(self.values):
            for name, tensor in (
                ("value", value.tensor),
                ("mean", value.mean),
                ("square", value.square),
            ):
                tensor.copy_(tensors[f"{i}.{name}"])
        if at["kept"] is not None:
            self.kept = [
                tensors[f"{i}.kept"].to(value.first.device) for i, value in enumerate(self.values)
            ]
