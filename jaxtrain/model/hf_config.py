"""Reads the configs of a model's folder or GGUF file; config.json becomes a DecoderConfig."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.model import rope
from jaxtrain.model.config import ComputeConfig, DecoderConfig, LayerSpec, group_layers
from jaxtrain.model.decoder import abstract
from jaxtrain.model.families import FAMILIES, NO_EFFECT, REQUIRED, Family
from jaxtrain.model.gguf import read_gguf_config
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.model.weights import has_own_head, tensor_shapes
from jaxtrain.model_folder import is_complete, read_json
from jaxtrain.recipe.errors import Fault, RecipeError, did_you_mean, show
from jaxtrain.recipe.model import ModelConfig

MAX_LAYERS = 1000  # many more would take minutes to group


def read_config(path: Path, config: ModelConfig) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the decoder, and its config.json with `hf_config_kwargs` applied.

    RecipeError if those change the shape of a tensor, unless the model is trained from scratch.
    """
    hf, kwargs = read_hf_config(path), config.hf_config_kwargs
    where = str(path / "config.json") if path.is_dir() else str(path)
    if not config.from_scratch and decoder_config(hf, where).tied and _has_own_head(path):
        hf = hf | {"tie_word_embeddings": False}
    if not kwargs:
        return decoder_config(hf, where), hf
    new = _override_config(hf, kwargs, where)
    decoder = decoder_config(new, where)
    if not config.from_scratch:
        _check_same_shapes(decoder_config(hf, where), decoder)
    return decoder, new


def _has_own_head(path: Path) -> bool:
    """Whether a folder's weights contradict a tied config, which then does not count, as in
    transformers."""
    if not path.is_dir() or not is_complete(path, with_weights=True):
        return False
    return has_own_head(read_folder(path))


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
    raise RecipeError(
        f"{where}: architectures: unsupported architecture, found {show(named or kind)}; use one "
        f"of {', '.join(family.architecture for family in FAMILIES)}"
    )


def decoder_config(hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder of a config.json; RecipeError names every invalid or unsupported field."""
    family = family_of(hf, where)
    hf = {**family.defaults, **hf}
    faults = _number_faults(hf) or _field_faults(hf, family)
    try:
        position = rope.read_rope(hf)
    except ValueError as error:
        faults["rope_parameters" if hf.get("rope_parameters") else "rope_scaling"] = str(error)
    try:
        windows = family.windows(hf) if not faults else []
    except (ValueError, TypeError, LookupError) as error:  # a list or number is something else
        faults["layer_types"] = f"{error}; see max_window_layers and sliding_window too"
    if faults:
        raise RecipeError([Fault(f"{where}: {field}", what) for field, what in faults.items()])
    return DecoderConfig(
        family=family.name,
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"] or hf["num_attention_heads"],
        head_size=hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"],
        ffn_width=hf["intermediate_size"],
        groups=group_layers(tuple(LayerSpec(window=window) for window in windows)),
        rope=position,
        rms_eps=float(hf["rms_norm_eps"]),
        max_positions=hf["max_position_embeddings"],
        tied=hf["tie_word_embeddings"],
        initializer_range=float(hf["initializer_range"]),
        **family.traits(hf),
    )


def _number_faults(hf: Mapping[str, Any]) -> dict[str, str]:
    """Fields that are missing or not valid numbers or switches."""
    faults = {}
    for field in (*REQUIRED, "max_position_embeddings"):
        if not _is_size(hf.get(field)):
            faults[field] = f"must be a positive whole number, found {show(hf.get(field))}"
    if not faults and hf["num_hidden_layers"] > MAX_LAYERS:
        found = hf["num_hidden_layers"]
        faults["num_hidden_layers"] = f"must be at most {MAX_LAYERS:,}, found {found:,}"
    for field in ("num_key_value_heads", "head_dim", "sliding_window"):
        if hf.get(field) is not None and not _is_size(hf[field]):
            faults[field] = f"must be a positive whole number or null, found {show(hf[field])}"
    for field in ("rms_norm_eps", "initializer_range"):
        is_number = isinstance(hf[field], int | float) and not isinstance(hf[field], bool)
        if not is_number or not 0 <= hf[field] <= rope.MAX_FLOAT:
            faults[field] = f"must be a float32 number of at least 0, found {show(hf[field])}"
    if what := _check_stop_tokens(hf):
        faults["eos_token_id"] = what
    for field in ("tie_word_embeddings", "attention_bias", "use_sliding_window"):
        if not isinstance(hf.get(field, False), bool):
            faults[field] = f"must be true or false, found {show(hf[field])}"
    if not _is_count(hf.get("max_window_layers", 0)):
        faults["max_window_layers"] = (
            f"must be a whole number of at least 0, found {show(hf['max_window_layers'])}"
        )
    return faults


def _check_stop_tokens(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the tokens that end a generation, to which an export adds others."""
    found = config.get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        return None
    return f"must be the number of a token or a list of them, found {show(found)}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _field_faults(hf: Mapping[str, Any], family: Family) -> dict[str, str]:
    """Unsupported values, and sizes that do not fit together."""
    faults = {}
    for field, values in family.only.items():
        if field in hf and hf[field] not in values:
            allowed = " or ".join(show(value) for value in values)
            faults[field] = f"must be {allowed}, found {show(hf[field])}, which is not supported"
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    if kv_heads is not None and heads % kv_heads:
        faults["num_key_value_heads"] = f"must divide the {heads} attention heads, found {kv_heads}"
    if hf["head_dim"] is None and hf["hidden_size"] % heads:
        faults["hidden_size"] = (
            f"must be a multiple of the {heads} attention heads without a head_dim, "
            f"found {hf['hidden_size']}"
        )
    elif (size := hf["head_dim"] or hf["hidden_size"] // heads) % 2:
        faults["head_dim"] = f"must be even, since heads are rotated in pairs, found {size}"
    return faults


def _override_config(
    hf: Mapping[str, Any], kwargs: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Replaces fields of a config.json; RecipeError for fields that the family does not have."""
    family = family_of({**hf, **kwargs}, where)
    known = {*family.defaults, *family.only, *REQUIRED, *rope.FIELDS, *NO_EFFECT}
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
    return {**_drop_replaced_rope(hf, kwargs), **kwargs}


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
