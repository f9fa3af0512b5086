"""Reads the configs of a model's folder or GGUF file; config.json becomes a DecoderConfig."""

from collections.abc import Callable, Container, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxtrain.model import rope
from jaxtrain.model.config import Activation, ComputeConfig, DecoderConfig, Norm, group_layers
from jaxtrain.model.decoder import abstract
from jaxtrain.model.families import (
    FAMILIES,
    NO_EFFECT,
    REQUIRED,
    SIZES_OF_LAYER,
    Family,
    FieldError,
)
from jaxtrain.model.fp8 import BLOCK
from jaxtrain.model.gguf import read_gguf_config
from jaxtrain.model.weights import has_own_head, tensor_shapes
from jaxtrain.model_folder import is_complete, read_json
from jaxtrain.recipe.errors import Fault, RecipeError, did_you_mean, show
from jaxtrain.recipe.model import ModelConfig

MAX_LAYERS = 1000  # many more would take minutes to group
UNTIED = {"tie_word_embeddings": False}

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""`hidden_act` → ours"""

_is_bool = lambda value: isinstance(value, bool)
_is_number = lambda value: isinstance(value, int | float) and not _is_bool(value)
_is_count = lambda value: isinstance(value, int) and not _is_bool(value) and 0 <= value < 2**31
_is_size = lambda value: _is_count(value) and value > 0
_is_positive = lambda value: _is_number(value) and 0 < value <= rope.MAX_FLOAT


def _are_sizes_of_layers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        str(layer).isdecimal()
        and isinstance(fields, Mapping)
        and all(name in SIZES_OF_LAYER and _is_size(size) for name, size in fields.items())
        for layer, fields in value.items()
    )


SIZES = (*REQUIRED, "max_position_embeddings")
RULES: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (
        _is_size,
        "a positive whole number",
        (
            *SIZES, "sliding_window_pattern", "no_rope_layer_interval", "num_experts",
            "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
            "n_shared_experts", "n_group", "topk_group", "kv_lora_rank", "qk_nope_head_dim",
            "v_head_dim",
            "full_attention_interval", "linear_num_key_heads", "linear_num_value_heads",
            "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
            "conv_L_cache", "block_multiple_of",
            "global_head_dim", "vocab_size_per_layer_input",
        ),
    ),
    (
        lambda value: value is None or _is_size(value),
        "a positive whole number or null",
        (
            "num_key_value_heads", "head_dim", "sliding_window", "q_lora_rank",
            "num_global_key_value_heads", "moe_experts", "moe_experts_per_token", "moe_width",
        ),
    ),
    (
        _is_count,
        "a whole number of at least 0",
        (
            "max_window_layers", "first_k_dense_replace", "num_nextn_predict_layers",
            "num_kv_shared_layers",
        ),
    ),
    (
        lambda value: value is None or _is_count(value),
        "a whole number of at least 0 or null",
        ("hidden_size_per_layer_input",),
    ),
    (
        lambda value: value is None or _are_sizes_of_layers(value),
        f"a map from numbers of layers to {' and '.join(SIZES_OF_LAYER)}, or null",
        ("per_layer_config",),
    ),
    (
        lambda value: value is None or (isinstance(value, list) and all(map(_is_count, value))),
        "a list of numbers of layers or null",
        ("mlp_only_layers", "full_attn_idxs"),
    ),
    (
        lambda value: _is_number(value) and 0 <= value <= rope.MAX_FLOAT,
        "a float32 number of at least 0",
        ("rms_norm_eps", "initializer_range", "router_aux_loss_coef"),
    ),
    (
        _is_positive,
        "a positive number",
        (
            "query_pre_attn_scalar", "embedding_multiplier", "residual_multiplier",
            "attention_multiplier", "logits_scaling", "logit_scale", "swiglu_alpha",
            "swiglu_limit", "routed_scaling_factor", "block_ffn_dim_multiplier",
        ),
    ),
    (
        lambda value: value is None or _is_positive(value),
        "a positive number or null",
        ("final_logit_softcapping", "attn_logit_softcapping"),
    ),
    (
        _is_bool,
        "true or false",
        (
            "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window",
            "use_parallel_residual", "scale_attn_weights", "norm_topk_prob",
            "output_router_logits", "rope_interleave", "use_qk_norm", "conv_bias",
            "block_auto_adjust_ff_dim",
            "enable_moe_block", "attention_k_eq_v", "use_double_wide_mlp",
        ),
    ),
    (
        lambda value: isinstance(value, str) and value in ACTIVATIONS,
        f"one of {', '.join(ACTIVATIONS)}",
        ("hidden_act",),
    ),
)  # fmt: skip
"""What fields must be: whether a value is, in words, and which."""


def read_config(path: Path, config: ModelConfig) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the decoder, and its config.json with `hf_config_kwargs` applied.

    RecipeError if those change the shape of a tensor, unless the model is trained from scratch.
    """
    hf, kwargs = read_hf_config(path), config.hf_config_kwargs
    where = str(path / "config.json") if path.is_dir() else str(path)
    new = _override_config(hf, kwargs, where) if kwargs else hf
    decoder = decoder_config(new, where)
    if config.from_scratch:
        if family_of(new).carried:
            raise RecipeError(
                f"model.from_scratch: {where} has parts beside the text model, which keep their "
                "weights; use a folder of the text model alone"
            )
        return decoder, new
    if decoder.tied and _has_own_head(path, family_of(new, where)):
        hf = replace_text_fields(hf, UNTIED)
        if "tie_word_embeddings" not in kwargs:
            new = replace_text_fields(new, UNTIED)
            decoder = decoder_config(new, where)
    if kwargs:
        # What the family refuses may be what `kwargs` replace.
        supported = {k: v for k, v in kwargs.items() if k in family_of(hf, where).only}
        _check_same_shapes(decoder_config(replace_text_fields(hf, supported), where), decoder)
    return decoder, new


def _has_own_head(path: Path, family: Family) -> bool:
    """Whether a folder's weights contradict a tied config, which then does not count, as in
    transformers."""
    if not path.is_dir() or not is_complete(path, with_weights=True):
        return False
    return has_own_head(path, family)


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or the equivalent from a GGUF file."""
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf_config(path)
    return read_json(path / "config.json")


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """generation_config.json of a folder, or the equivalent from a GGUF file."""
    if path.is_dir():
        file = path / "generation_config.json"
        if not file.is_file():
            return None
        generation = read_json(file)
        if what := _check_stop_tokens(generation):
            raise RecipeError(f"{file}: eos_token_id: {what}")
        return generation
    config = read_gguf_config(path)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {token: config[token] for token in tokens if token in config}


def add_stop_tokens(
    generation: dict[str, Any] | None, hf: Mapping[str, Any], stop_tokens: Sequence[int]
) -> dict[str, Any] | None:
    """Adds `stop_tokens` to those of a generation config, or of a config.json without one."""
    known = (hf if generation is None else generation).get("eos_token_id")
    listed = [] if known is None else known if isinstance(known, list) else [known]
    if missing := [token for token in stop_tokens if token not in listed]:
        stops = [*listed, *missing]
        return {**(generation or {}), "eos_token_id": stops if len(stops) > 1 else stops[0]}
    return generation


def family_of(hf: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that a config.json names; RecipeError lists the supported ones."""
    architectures, kind = hf.get("architectures"), hf.get("model_type")
    named = architectures[0] if architectures and isinstance(architectures, list) else architectures
    for family in FAMILIES:
        if named == family.architecture or (not named and kind == family.name):
            if kind not in (None, family.name):
                raise RecipeError(
                    f"{where}: model_type: {show(kind)} contradicts architectures, "
                    f"{show(named)}, whose model_type is {show(family.name)}"
                )
            return family
    field = "architectures" if named else "model_type"
    raise RecipeError(
        f"{where}: {field}: unsupported architecture, found {show(named or kind)}"
        f"{_nearest_family(str(named or kind))}; `jaxtrain models` lists what there is"
    )


def _nearest_family(name: str) -> str:
    """The families of a similar name, by what stands before `For…`."""
    stem = lambda name: name.partition("For")[0].lower().replace("_", "")
    near = get_close_matches(stem(name), {stem(f.architecture) for f in FAMILIES}, n=1)
    found = [f.architecture for f in FAMILIES if stem(f.architecture) in near]
    return f"; the nearest family is {' or '.join(found)}" if found else ""


def decoder_config(hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder of a config.json; RecipeError names every invalid or unsupported field."""
    family = family_of(hf, where)
    written = text_fields(hf, family)
    hf = _in_names_of_llama(written, family)
    numbers = _number_faults(hf)
    faults = _unsupported_fields(hf, family) | (numbers or _size_faults(hf, family))
    layers, ropes = [], {}
    rope_field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    try:
        ropes = rope.read_ropes(hf, family.ropes, interleaved=family.interleaved_rope)
    except ValueError as error:
        faults[rope_field] = str(error)
    try:
        layers = family.layers(hf, ropes) if not faults else []
    except FieldError as error:
        faults[error.field] = str(error)
    except (ValueError, TypeError, LookupError) as error:  # a list or number is something else
        faults["layer_types"] = f"{error}; see max_window_layers and sliding_window too"
    try:
        rope.check_sizes((layer.rope, layer.head_size or _head_size(hf)) for layer in layers)
    except ValueError as error:
        faults[rope_field] = str(error)
    if faults:
        theirs = {ours: name for name, ours in family.aliases.items() if name in written}
        place = f"{where}: {family.text}." if family.text else f"{where}: "
        raise RecipeError([
            Fault(place + theirs.get(field, field), what) for field, what in faults.items()
        ])  # fmt: skip
    traits = {"activation": ACTIVATIONS[hf["hidden_act"]], "ffn_width": hf["intermediate_size"]}
    return DecoderConfig(
        family=family.name,
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"] or hf["num_attention_heads"],
        head_size=_head_size(hf),
        groups=group_layers(tuple(layers)),
        norm=Norm(float(hf["rms_norm_eps"]), **family.norm),
        max_positions=hf["max_position_embeddings"],
        tied=hf["tie_word_embeddings"],
        initializer_range=float(hf["initializer_range"]),
        **{**traits, **family.traits(hf)},
    )


def text_fields(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of the text model in a config.json."""
    if family.text is None:
        return dict(hf)
    inner = hf.get(family.text) or {}
    if not isinstance(inner, Mapping):
        raise RecipeError(f"config.json: {family.text}: must be a map, found {show(inner)}")
    whole = {name: hf[name] for name in ("tie_word_embeddings", *family.only) if name in hf}
    return {**inner, **whole, "model_type": inner.get("model_type")}


def replace_text_fields(
    hf: Mapping[str, Any], fields: Mapping[str, Any], *, drop: Container[str] = ()
) -> dict[str, Any]:
    """A config.json with other fields of the text model, and without those of `drop`."""
    text = next((family.text for family in FAMILIES if family.text and family.text in hf), None)
    if text is None:
        return {**{k: v for k, v in hf.items() if k not in drop}, **fields}
    inner = {**{k: v for k, v in (hf[text] or {}).items() if k not in drop}, **fields}
    tied = {k: v for k, v in fields.items() if k == "tie_word_embeddings"}
    return {**hf, **tied, text: inner}


def _in_names_of_llama(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields that a family reads and their defaults, each under Llama's name."""
    aliases = {name: ours for name, ours in family.aliases.items() if name in hf}
    fields = {ours: hf[name] for name, ours in aliases.items()}
    fields |= {k: v for k, v in hf.items() if k not in aliases and k not in family.ignored}
    fields = {**family.defaults, **fields}
    if fields.get("rope_parameters") is None:
        fields["rope_parameters"] = family.defaults.get("rope_parameters")
    if fields.get("intermediate_size") is None and _is_size(fields.get("hidden_size")):
        fields["intermediate_size"] = family.default_ffn_ratio * fields["hidden_size"] or None
    return fields


def _head_size(hf: Mapping[str, Any]) -> int:
    return hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]


def _number_faults(hf: Mapping[str, Any]) -> dict[str, str]:
    """Fields that are missing or not valid numbers or switches."""
    faults = {
        field: f"must be {what}, found {show(hf.get(field))}"
        for holds, what, fields in RULES
        for field in fields
        if (field in hf or field in SIZES) and not holds(hf.get(field))
    }
    if not faults and hf["num_hidden_layers"] > MAX_LAYERS:
        found = hf["num_hidden_layers"]
        faults["num_hidden_layers"] = f"must be at most {MAX_LAYERS:,}, found {found:,}"
    if what := _check_stop_tokens(hf):
        faults["eos_token_id"] = what
    return faults


def _check_stop_tokens(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the tokens that end a generation, to which an export adds others."""
    found = config.get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        return None
    return f"must be the number of a token or a list of them, found {show(found)}"


def _unsupported_fields(hf: Mapping[str, Any], family: Family) -> dict[str, str]:
    faults = {}
    for field, values in family.only.items():
        if field in hf and hf[field] not in values and not _is_read(field, hf[field], family):
            allowed = " or ".join(show(value) for value in values)
            faults[field] = f"must be {allowed}, found {show(hf[field])}, which is not supported"
            if field == "quantization_config":
                faults[field] += "; save its weights in bfloat16 first"
            if "drop" in field:
                faults[field] += f"; write model.hf_config_kwargs.{field}: 0 to train without"
    return faults


def _size_faults(hf: Mapping[str, Any], family: Family) -> dict[str, str]:
    """Sizes that do not fit together, among valid numbers."""
    faults = {}
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    if kv_heads is not None and heads % kv_heads:
        faults["num_key_value_heads"] = f"must divide the {heads} attention heads, found {kv_heads}"
    values = "linear_num_value_heads"
    if values in family.defaults and hf[values] % (keys := hf["linear_num_key_heads"]):
        faults[values] = f"must be a multiple of the {keys} key heads, found {hf[values]}"
    if "num_experts" in hf and hf["num_experts_per_tok"] > hf["num_experts"]:
        faults["num_experts_per_tok"] = (
            f"must be at most the {hf['num_experts']} experts, found {hf['num_experts_per_tok']}"
        )
    if "n_group" in hf and (what := _group_fault(hf)):
        faults["n_group"] = what
    if hf["head_dim"] is None and hf["hidden_size"] % heads:
        faults["hidden_size"] = (
            f"must be a multiple of the {heads} attention heads without a head_dim, "
            f"found {hf['hidden_size']}"
        )
    elif (size := _head_size(hf)) % 2:
        faults["head_dim"] = f"must be even, since heads are rotated in pairs, found {size}"
    return faults


def _group_fault(hf: Mapping[str, Any]) -> str | None:
    """What is wrong with the groups of experts of which a token takes some."""
    experts, groups, taken = hf["num_experts"], hf["n_group"], hf["topk_group"]
    size, rest = divmod(experts, groups)
    if not rest and size > 1 and taken <= groups and hf["num_experts_per_tok"] <= taken * size:
        return None
    return (
        f"must cut the {experts} experts into groups of at least 2, of which topk_group have the "
        f"{hf['num_experts_per_tok']} of a token, found {groups} with topk_group {taken}"
    )


def _is_read(field: str, value: Any, family: Family) -> bool:
    """Whether this says how weights are quantised, in a way that is read."""
    is_map = field == "quantization_config" and isinstance(value, Mapping)
    is_known = is_map and value.get("quant_method") in family.quantizations
    return is_known and value.get("weight_block_size") in (None, [BLOCK, BLOCK])


def _override_config(
    hf: Mapping[str, Any], kwargs: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Replaces fields of a config.json; RecipeError for fields that the family does not have."""
    family = family_of({**hf, **kwargs}, where)
    known = {
        *family.defaults, *family.only, *family.aliases, *REQUIRED, *rope.FIELDS, *NO_EFFECT,
    } - {*family.ignored}  # fmt: skip
    faults = [
        Fault(
            f"model.hf_config_kwargs.{field}",
            f"not a field of {family.name} (found {show(value)}){did_you_mean(field, known)}",
        )
        for field, value in kwargs.items()
        if field not in known
    ]
    if faults:
        raise RecipeError(faults)
    fields = hf if family.text is None else hf.get(family.text) or {}
    kept = _drop_replaced_rope(fields, kwargs)
    return replace_text_fields(hf, {**kept, **kwargs}, drop=rope.FIELDS)


def _drop_replaced_rope(hf: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the file's rope fields in one style if the recipe overrides them in the other."""
    kept = dict(hf)
    replaced = [field for field in rope.FIELDS if field in kwargs]
    if "rope_parameters" in replaced or "rope_scaling" in replaced:
        kept.pop("original_max_position_embeddings", None)
    if "rope_parameters" in replaced:
        kept.pop("rope_theta", None)
        kept.pop("rope_scaling", None)
    elif replaced and (parameters := kept.pop("rope_parameters", None)):
        parameters = dict(parameters)
        kept["rope_theta"] = parameters.pop("rope_theta", kept.get("rope_theta"))
        kept["rope_scaling"] = parameters
    if "rope_theta" in replaced and kept.get("rope_scaling"):
        kept["rope_scaling"] = {k: v for k, v in kept["rope_scaling"].items() if k != "rope_theta"}
    return kept


def _check_same_shapes(old: DecoderConfig, new: DecoderConfig) -> None:
    before, after = (tensor_shapes(c, abstract(c, ComputeConfig()).shapes) for c in (old, new))
    for name in {**before, **after}:
        was, would_be = (list(shapes.get(name, ())) or "none" for shapes in (before, after))
        if was != would_be:
            raise RecipeError(
                f"model.hf_config_kwargs: would change the shape of {name} from {was} to "
                f"{would_be}; set model.from_scratch: true for random weights"
            )
