"""vLLM's plug-in: it serves folders of quantized models (docs/serving.md).

vLLM finds `register` by the entry point in the group "vllm.general_plugins" and calls it in each of
its processes. From then on, "mixedquant" in a folder's config.json selects `ServedConfig`, which
gives every quantized layer a `PackedMethod`. Nothing in vLLM is replaced.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..checkpoints.folder import open_quantized
from ..checkpoints.manifest import Manifest, check_linear, check_unaltered, tied_tables
from ..core.config import MixedQuantConfig
from ..core.errors import CheckpointError
from ..core.tensor_files import CONFIG
from ..core.tensors import FLOATS, dtype_name
from ..kernels import ops
from ..layers.int8 import sum_of_planes
from ..layers.linear import KernelChoices, QuantizedLinear, kernel_choices
from . import shards
from .launch import INSTALL

logger = logging.getLogger("smoothquant")

MADE_FOR = "0.32"  # of vLLM

try:
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        QKVParallelLinear,
        RowParallelLinear,
        UnquantizedLinearMethod,
    )
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )
except ImportError as error:
    raise RuntimeError(
        f"vLLM {MADE_FOR} is missing or is another version ({error}): {INSTALL}"
    ) from error

# Whose loaders in vLLM take packed tensors as they are. Others may permute or split them: BLOOM's
# does, by their names.
SERVED = frozenset(
    {
        "Gemma2ForCausalLM",
        "GemmaForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "OPTForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)
# Of those, whose embeddings in vLLM cannot be quantized.
FLOAT_TABLES = frozenset({"Gemma2ForCausalLM", "OPTForCausalLM"})

PARTS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of shards; others are numbers


class ServedConfig(QuantizationConfig):
    """What vLLM knows about a quantized model.

    Attributes:
        manifest: the folder's manifest, with the names of modules that vLLM uses.
        source: the folder, or the model's name, for messages.
    """

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.manifest = manifest
        self.source = CONFIG

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServedConfig:
        """The config of a manifest's fields.

        Raises:
            CheckpointError: the manifest is not valid.
            ValueError: such models are not served.
        """
        manifest = Manifest.from_dict(config)
        check_unaltered(manifest, Path(CONFIG))
        check_served(manifest)
        return cls(manifest)

    def get_name(self) -> str:
        """The name that config.json gives the method."""
        return MixedQuantConfig.quant_method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of activations."""
        return list(FLOATS)

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest CUDA architecture that has kernels: Turing."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files besides config.json: none."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse what cannot be served, before any process is started or memory is taken.

        Raises:
            ValueError: the architecture is not served.
            CheckpointError: files in the folder are missing or inconsistent. Those of a model that
                is not a folder are not there yet; its tensors are checked one by one.
        """
        self.source = model_name
        rounded = [n for n in self.manifest.dtypes if n.endswith("inv_freq")]
        if rounded:
            logger.warning(
                "%s: the model was quantized with rounded rotary frequencies (%s). vLLM computes "
                "exact ones, so results differ from those in transformers",
                model_name,
                rounded[0],
            )
        check_architectures(getattr(hf_config, "architectures", None) or [], self.manifest)
        if Path(model_name).is_dir():
            open_quantized(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules in the manifest as vLLM does."""
        self.manifest = self.manifest.renamed(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer; None is vLLM's own for its class.

        Raises:
            ValueError: the layers that vLLM fuses into it cannot be fused.
        """
        if isinstance(layer, VocabParallelEmbedding):
            return self._table_method(isinstance(layer, ParallelLMHead), prefix)
        if not isinstance(layer, LinearBase):
            return None
        parent, dot, leaf = prefix.rpartition(".")
        names = [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        quantized = [name for name in names if name in self.manifest.linears]
        if not quantized:
            return UnquantizedLinearMethod()
        if len(quantized) < len(names):
            raise ValueError(
                f"vLLM fuses {', '.join(names)}, of which only {', '.join(quantized)} are "
                "quantized: ignore all of them or none"
            )
        return PackedMethod(self, names)

    def _table_method(self, is_head: bool, prefix: str) -> PackedMethod | None:
        tied = tied_tables(self.manifest)
        tables = [name for name, entry in self.manifest.linears.items() if entry["table"]]
        packed = next((name for name in tables if name.endswith(".packed")), None)
        if not is_head:  # some models give it no prefix
            return PackedTable(self, [packed]) if packed else None
        if prefix in tables:
            return PackedTable(self, [prefix])
        return TiedTable(self, [packed]) if packed and prefix in tied else None


def check_served(manifest: Manifest) -> None:
    """Raise ValueError for a model that no architecture of vLLM can serve."""
    config = manifest.config
    refused = {
        f"backend={config.backend!r}, which simulates quantization": config.backend != "int4",
        "quantize_output=True": any(e["quantize_output"] for e in manifest.linears.values()),
        "non_finite='raise'": config.non_finite == "raise",
        "quantized experts": any(".experts." in name for name in manifest.linears),
    }
    remedy = {
        "quantized experts": "load the model with transformers",
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(
                f"vLLM cannot serve a model with {what}: "
                f"{remedy.get(what, 'quantize it again without')}"
            )


def check_architectures(architectures: Sequence[str], manifest: Manifest) -> None:
    """Raise ValueError if a model's class is not served, or not with quantized embeddings."""
    for name in architectures:
        if name not in SERVED:
            raise ValueError(
                f"{name} is not served in vLLM, only {', '.join(sorted(SERVED))}: load the model "
                "with transformers"
            )
        if name in FLOAT_TABLES and any(e["table"] for e in manifest.linears.values()):
            raise ValueError(
                f"vLLM cannot quantize the output head or the embeddings of a {name}: quantize the "
                "model with head='16bit' and embeddings='16bit'"
            )


class Piece(NamedTuple):
    """A linear's output channels in a layer of vLLM, which may hold several linears.

    rows: output channels in the folder.
    start, stop: those of this process.
    offset: the first one's place in the layer.
    """

    rows: int
    start: int
    stop: int
    offset: int


class PackedMethod(LinearMethodBase):
    """The weights of one layer, of one or more linears that read the same input.

    Attributes:
        config, names: the model's config and the full names of the linears.
        part: the slice of this process as a layer on meta, for shapes, options and checks.
        pieces: a `Piece` for each linear, in the order of vLLM's shards.
        parts, rank: processes that hold slices of the input channels, and the number of this one.
    """

    part: QuantizedLinear
    pieces: list[Piece]
    choices: KernelChoices
    parts = 1
    rank = 0

    def __init__(self, config: ServedConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.config, self.names = config, list(names)
        self.loaded: dict[str, set[int]] = {}
        entries = [config.manifest.linears[name] for name in names]
        for name, entry in zip(names, entries, strict=True):
            for field in ("num_salient", "choices", "table"):
                if entry[field] != entries[0][field]:
                    raise ValueError(
                        f"vLLM fuses {names[0]} with {name}, but their {field} differ: "
                        f"{entries[0][field]} and {entry[field]}"
                    )

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the packed tensors of this process's slice.

        Raises:
            ValueError: the layer cannot be cut or fused as vLLM does.
        """
        sizes, cuts = output_partition_sizes, output_size // sum(output_partition_sizes)
        if len(self.names) == 1 and cuts == 1:  # linears that the folder has fused stay so
            sizes = [output_size]
        heads = [size * cuts for size in sizes]
        if isinstance(layer, QKVParallelLinear) and len(sizes) > 1:
            heads = [layer.total_num_heads] + 2 * [layer.total_num_kv_heads]
        whole = self._blank(input_size)
        if isinstance(layer, RowParallelLinear):
            self.parts, self.rank = input_size // input_size_per_partition, layer.tp_rank
        fault = shards.channels_fault(whole, self.parts)
        self.pieces = []
        for size, count in zip(sizes, heads, strict=True):
            rows = size * min(cuts, count)
            fault = fault or shards.rows_fault(rows, count, cuts, fused=len(sizes) > 1)
            start, stop = shards.share(rows, count, layer.tp_rank if cuts > 1 else 0, cuts)
            self.pieces.append(Piece(rows, start, stop, sum(p.stop - p.start for p in self.pieces)))
        if fault:
            raise ValueError(f"{', '.join(self.names)}: {fault}")
        self._register(layer, whole, input_size_per_partition, sum(sizes))

    def _blank(self, channels: int) -> QuantizedLinear:
        """A layer with the options of these linears, on meta."""
        return self.config.manifest.blank(self.names[0], channels, ops.PANEL)

    def _register(self, module: nn.Module, whole: QuantizedLinear, k: int, n: int) -> None:
        self.part = type(whole)(
            k,
            n,
            bias=False,
            config=whole.config,
            num_salient=whole.num_salient // self.parts,
            dtype=self.config.manifest.dtype,
            device="meta",
        )
        self.choices = kernel_choices(whole.config)
        for key, buffer in self.part.state_dict().items():
            stored = self.config.manifest.dtypes.get(f"{self.names[0]}.{key}", buffer.dtype)
            # zeros, as output channels that pad a vocabulary stay
            fill = shards.ZERO_CODES if key == "qweight" else 0
            parameter = Parameter(torch.full(buffer.shape, fill, dtype=stored), requires_grad=False)
            parameter.weight_loader = functools.partial(self._load, key)  # type: ignore[attr-defined]
            module.register_parameter(key, parameter)
        if "salient_scales" not in self.part.state_dict():
            module.register_parameter("salient_scales", None)

    def _load(self, key: str, parameter: Parameter, tensor: Tensor, shard: Any = None) -> None:
        """Copy this process's slice of a stored tensor.

        shard: vLLM's name of the linear; None if the layer is stored as one. Some versions write it
            to the tensor instead.

        Raises:
            CheckpointError: dtype or shape is not what the manifest says, or the tensor does not
                fit the other processes or linears.
        """
        shard = getattr(tensor, "shard_id", shard)
        index = PARTS.get(shard, shard)
        name = f"{self.names[index or 0]}.{key}"
        if tensor.dtype != parameter.dtype:
            expected, got = dtype_name(parameter.dtype), dtype_name(tensor.dtype)
            self._fail(name, f"must not be {got}; {CONFIG} says {expected}")
        if key == "perm":
            mine = self._cut(name, key, tensor)
            if self.loaded.get(key) and not torch.equal(parameter.data, mine.to(parameter.device)):
                self._fail(name, f"differs from that of {self.names[0]}, with which vLLM fuses it")
            parameter.data.copy_(mine)
            self.loaded.setdefault(key, set()).add(index or 0)
            return
        panels, count = 0, sum(-(-piece.rows // ops.PANEL) for piece in self.pieces)
        if index is not None:
            count = -(-self.pieces[index].rows // ops.PANEL)
        if len(tensor) != count:
            self._fail(name, f"must have {count} panels; got {len(tensor)}")
        for i, piece in enumerate(self.pieces):
            if index not in (None, i):
                continue
            rows = shards.output_slice(key, tensor[panels:], piece.start, piece.stop)
            mine = self._cut(name, key, rows)
            offset = piece.offset // ops.PANEL
            target = parameter.data[offset : offset + len(mine)]
            if mine.shape != target.shape:
                self._fail(name, f"must have shape {tuple(target.shape)}; got {tuple(mine.shape)}")
            target.copy_(mine)
            panels += piece.rows // ops.PANEL
            self.loaded.setdefault(key, set()).add(i)

    def _cut(self, name: str, key: str, tensor: Tensor) -> Tensor:
        if self.parts == 1:
            return tensor
        salient = self.part.num_salient * self.parts
        try:
            return shards.input_slice(key, tensor, salient, self.rank, self.parts)
        except CheckpointError as error:
            raise CheckpointError(f"{self.config.source}: tensor {name}: {error}") from None

    def _fail(self, name: str, fault: str) -> None:
        raise CheckpointError(f"{self.config.source}: tensor {name} {fault}")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that every tensor has arrived and is safe for the kernels.

        Raises:
            CheckpointError: one has not, or is not.
        """
        tensors: Mapping[str, Tensor]
        tensors = {key: getattr(layer, key).data for key in self.part.state_dict()}
        for key in tensors:
            for i, name in enumerate(self.names):
                if i not in self.loaded.get(key, ()):
                    raise CheckpointError(f"{self.config.source}: lacks tensor {name}.{key}")
        check_linear(self.config.source, self.names[0], self.part, tensors)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, as `QuantizedLinear.forward`."""
        packed: Any = layer
        if self.part.planes > 1:
            x = torch.cat([x] * self.part.planes, dim=-1)
        return ops.w4a4_linear(
            x,
            packed.qweight,
            packed.scales,
            packed.salient_weight,
            packed.salient_scales,
            packed.perm,
            bias,
            self.part.out_features,
            self.part.group_size,
            *self.choices,
        )


class PackedTable(PackedMethod):
    """The weight of an output head or of embeddings, cut by tokens.

    That of embeddings is stored, and registered, in a module "packed".
    """

    dtype: torch.dtype

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the packed tensors of this process's tokens.

        Raises:
            ValueError: the tokens of the processes do not fill panels.
        """
        self.dtype, (size,) = params_dtype, output_partition_sizes
        fault = shards.rows_fault(output_size, output_size, layer.tp_size, fused=False)
        if fault:
            raise ValueError(f"{self.names[0]}: {fault}")
        start = layer.tp_rank * size
        self.pieces = [Piece(layer.org_vocab_size, start, start + size, 0)]
        module = layer
        if self.names[0].endswith(".packed"):
            module = layer.packed = nn.Module()
        self._register(module, self._blank(input_size), input_size, size)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Token ids of this process, int64 [...], -> [..., K] in the model's dtype."""
        packed = _packed(layer)
        rows = ops.unpack_rows(
            packed.qweight,
            packed.scales,
            packed.salient_weight,
            packed.salient_scales,
            packed.perm,
            input_.flatten(),
            self.part.out_features,
            self.part.group_size,
            self.choices.rotation,
        )
        rows = sum_of_planes(rows) if self.part.planes > 1 else rows
        return rows.to(self.dtype).unflatten(0, input_.shape)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Hidden states [..., K] -> logits of this process's tokens [..., N], in x's dtype."""
        return super().apply(_packed(layer), x, bias)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As in PackedMethod."""
        super().process_weights_after_loading(_packed(layer))

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A head with a weight of its own keeps it, whatever config.json says."""
        return layer


class TiedTable(PackedTable):
    """An output head whose weight is that of the embeddings."""

    def create_weights(self, layer: Any, *sizes: Any, **extra_weight_attrs: Any) -> None:
        """Nothing: `tie_weights` does it."""
        layer.packed = None
        self.sizes, self.options = sizes, extra_weight_attrs

    def tie_weights(self, layer: Any, embed_tokens: Any) -> nn.Module:
        """Share the packed weight of the embeddings."""
        table = embed_tokens.quant_method
        if not isinstance(table, PackedTable):  # vLLM has asked for no method (Gemma)
            table = embed_tokens.quant_method = PackedTable(self.config, self.names)
            del embed_tokens.weight
            table.create_weights(embed_tokens, *self.sizes, **self.options)
        layer.quant_method, layer.packed = table, embed_tokens.packed
        return layer


def _packed(layer: Any) -> Any:
    """The module with a table's tensors."""
    return getattr(layer, "packed", layer)


def register() -> None:
    """Tell vLLM about quantized folders. Calls may be repeated."""
    register_quantization_config(MixedQuantConfig.quant_method)(ServedConfig)
