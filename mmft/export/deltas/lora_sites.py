"""Which step the LoRA family takes at a module: by the layer's type, the config's patterns and the tensors' shapes."""

from __future__ import annotations

import math

from torch import nn

from mmft.errors import ExportError
from mmft.export.deltas.base import DAMAGED, Homeless, Site, Step, is_conv, is_linear, is_transposed
from mmft.export.deltas.lora import Ada, Experts, Kind, Lora, Vera, delta_shape
from mmft.export.deltas.plain import BiasAdd

LORA_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
ADALORA_PARTS = ("lora_A", "lora_B", "lora_E")
VERA_PARTS = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")
LORA_FIELDS = frozenset(
    {"lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern"}
    | {"megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora"}
    | {"velora_config", "runtime_config", "lora_bias", "qalora_group_size", "target_parameters"}
    | {"ensure_weight_tying"}
)
ADALORA_FIELDS = LORA_FIELDS | {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
ADALORA_FIELDS |= {"total_step"}
VERA_FIELDS = frozenset(
    {"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out", "init_weights"}
)
_LAYERS = "Linear, Conv1D, Embedding, Conv1d to Conv3d with one group"
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_start(site: Site) -> None:
    """Refuse an adapter that belongs to a residual base, which the folder does not hold."""
    start = site.option("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_STARTS_THAT_CHANGE_THE_BASE):
        raise ExportError(
            f"the adapter was started with init_lora_weights = {start!r}, which also changes the base weights it is "
            "trained on; W + s·BA with the original base would count the start twice",
            where=str(site.adapter.folder),
            do="save it converted (peft: save_pretrained(path_initial_model_for_weight_conversion=…)) and merge that",
        )


def lora_steps(site: Site) -> list[tuple[str, Step]]:
    """LoRA, rsLoRA and DoRA on a module or a bare parameter."""
    check_start(site)
    leaf = _bare_parameter(site)
    if leaf is not None:
        return [(site.name(leaf), _bare(site, leaf))]
    layer = _kind(site)
    table = layer == "embedding"
    a = site.need("lora_embedding_A" if table else "lora_A.weight")
    b = site.need("lora_embedding_B" if table else "lora_B.weight")
    shape = site.shape()
    product = delta_shape(layer, site.adapter.shape(a), site.adapter.shape(b))
    if product[1:] != shape[1:]:  # the rows are compared when it is known whether the table has grown
        raise Homeless
    magnitude = site.parts.get("lora_magnitude_vector", site.parts.get("lora_magnitude_vector.weight"))
    if bool(site.option("use_dora")) != (magnitude is not None):
        raise ExportError(
            f"DoRA on {site.module}: its lora_magnitude_vector is {'not asked for' if magnitude else 'missing'}",
            where=str(site.adapter.folder),
            do=DAMAGED,
        )
    scaling = scaling_of(site, site.adapter.shape(a)[0])
    step = Lora(layer, a, b, scaling, product, magnitude, early=table)
    found: list[tuple[str, Step]] = [(site.name(), step)]
    if "lora_B.bias" in site.parts:
        if site.name("bias") not in site.shapes:
            raise ExportError(
                f"{site.module} has a LoRA bias, but the base layer has none",
                where=str(site.adapter.folder),
                do=DAMAGED,
            )
        found.append((site.name("bias"), BiasAdd(site.parts["lora_B.bias"], scaling)))
    return found


def scaling_of(site: Site, rank: int, key: str | None = None) -> float:
    """`alpha / r`, with the patterns of the config; `alpha / sqrt(r)` for rsLoRA."""
    stated = site.pattern("rank_pattern", "r", key)
    if stated != rank:
        raise ExportError(
            f"{site.module}: the adapter's tensors have rank {rank}, its config says {stated}",
            where=str(site.adapter.folder),
            do=DAMAGED,
        )
    alpha = site.pattern("alpha_pattern", "lora_alpha", key)
    return alpha / math.sqrt(rank) if site.option("use_rslora") else alpha / rank


def _kind(site: Site) -> Kind:
    layer = site.layer
    if isinstance(layer, nn.MultiheadAttention):
        # peft 0.21 adds out_proj's change twice in each forward and each merge (github.com/huggingface/peft, pull
        # request 3774), so the same folder is another model as soon as that is mended.
        raise ExportError(
            f"LoRA on {site.module} (nn.MultiheadAttention) is another model in each version of peft: up to 0.21 the "
            "change of its output projection counts twice",
            where=str(site.adapter.folder),
            allowed=_LAYERS,
            do="merge with merge_and_unload of the peft version that trained it",
        )
    if is_conv(layer) and layer.groups == 1:  # type: ignore[union-attr]
        return "conv"
    if is_linear(layer):
        return "linear"
    if is_transposed(layer):
        return "conv1d"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    raise site.refuse("LoRA", _LAYERS)


def _bare_parameter(site: Site) -> str | None:
    """The parameter that `target_parameters` wraps here; wrappers of one module nest, the first parameter innermost."""
    targets = site.option("target_parameters") or ()
    if site.layer is None or not targets:
        return None
    own = [name for name, _ in site.layer.named_parameters(recurse=False)]
    for module in dict.fromkeys((site.module, site.spelled)):
        hits = [name for name in own if any(f".{module}.{name}".endswith(f".{target}") for target in targets)]
        if hits:
            if site.depth >= len(hits):
                raise Homeless
            return hits[len(hits) - 1 - site.depth]
    return None


def _bare(site: Site, leaf: str) -> Step:
    a, b = site.need("lora_A.weight"), site.need("lora_B.weight")
    shape = site.shape(leaf)
    (rows, inputs), (outputs, columns) = site.adapter.shape(a), site.adapter.shape(b)
    if len(shape) == 2:
        if (outputs, inputs) != shape or rows != columns:
            raise Homeless
        return Lora("linear", a, b, scaling_of(site, rows, site.name(leaf)), shape, early=True)
    transposed = bool(getattr(site.layer, "is_transposed", False))
    wanted = (inputs, outputs) if transposed else (outputs, inputs)
    if len(shape) != 3 or shape[1:] != wanted or rows != columns or rows % shape[0]:
        raise Homeless
    return Experts(a, b, scaling_of(site, rows // shape[0], site.name(leaf)), shape, transposed)


def adalora_steps(site: Site) -> list[tuple[str, Step]]:
    """AdaLoRA on a linear layer; rows that its budget pruned are not in the file."""
    if not (is_linear(site.layer) or is_transposed(site.layer)):
        raise site.refuse("AdaLoRA", "Linear, Conv1D")
    a, b, e = site.need("lora_A"), site.need("lora_B"), site.need("lora_E")
    rank = site.adapter.shape(a)[0]
    transposed = is_transposed(site.layer)
    if delta_shape("conv1d" if transposed else "linear", site.adapter.shape(a), site.adapter.shape(b)) != site.shape():
        raise Homeless
    if site.adapter.shape(e) != (rank, 1):
        raise Homeless
    began = int(site.option("init_r"))
    alpha = site.option("lora_alpha")
    scaling = alpha if alpha > 0 else float(rank if site.option("rank_pattern") else began)
    return [(site.name(), Ada(a, b, e, scaling, float(began), transposed))]


def vera_steps(site: Site, sites: list[Site]) -> list[tuple[str, Step]]:
    """VeRA on a linear layer; `sites` are all adapted modules, whose largest sides size the shared matrices."""
    if not (is_linear(site.layer) or is_transposed(site.layer)):
        raise site.refuse("VeRA", "Linear, Conv1D")
    lambda_b, lambda_d = site.need("vera_lambda_b"), site.need("vera_lambda_d")
    sides = [other.shape()[:: -1 if is_transposed(other.layer) else 1] for other in sites]
    outputs, inputs = site.shape()[:: -1 if is_transposed(site.layer) else 1]
    largest = (max(side[0] for side in sides), max(side[1] for side in sides))
    shared = None
    if "vera_A" in site.parts or site.option("save_projection"):
        shared = site.need("vera_A"), site.need("vera_B")
        rank, width = site.adapter.shape(shared[0])
        height, other_rank = site.adapter.shape(shared[1])
        if rank != other_rank or width < inputs or height < outputs:
            raise Homeless
    if site.adapter.shape(lambda_b) != (outputs,) or site.adapter.shape(lambda_d) != (site.option("r"),):
        raise Homeless
    seed = int(site.option("projection_prng_key") or 0)
    return [(site.name(), Vera(lambda_b, lambda_d, shared, seed, largest, is_transposed(site.layer)))]
