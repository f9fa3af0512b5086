"""The `deepspeed` section: every key of DeepSpeed, and what it becomes here."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from jaxtrain.recipe.section import (
    HalfDType,
    Section,
    equals,
    mapped,
    no_effect,
    not_supported,
    refused_when_on,
    sets,
)

_HAS_NO_COUNTERPART = no_effect("belongs to DeepSpeed's engine")
_CHANGES_RESULT = refused_when_on("is not supported: it would change the result")
KEYS: dict[str, dict[Any, str]] = {
    "": {
        no_effect("collectives carry the array's dtype, but gradients are summed in fp32"): """
            communication_data_type seq_parallel_communication_data_type
            seq_parallel_comm_data_type""",
        no_effect("gradients are summed in fp32 and divided once"): """
            prescale_gradients gradient_predivide_factor""",
        no_effect("see `wandb`"): "wandb csv_monitor comet",
        no_effect("times, memory and FLOPs are always in the metrics"): """
            steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level comms_logger
            flops_profiler""",
        _HAS_NO_COUNTERPART: """
            gradient_allreduce_op managed_gradient_accumulation pipeline nebula vocabulary_size
            use_data_before_expert_parallelism zero_allow_untested_optimizer
            zero_force_ds_cpu_optimizer sparse_gradients disable_allgather dataloader_drop_last
            checkpoint aio compile graph_harvesting timers""",
        _CHANGES_RESULT: """
            autotuning elasticity compression_training curriculum_learning data_efficiency
            progressive_layer_drop eigenvalue sparse_attention hybrid_engine quantize_training""",
        refused_when_on("use `model.dtype`"): "amp",
        refused_when_on("write it under `optimizer:`"): "optimizer",
        refused_when_on("write it under `scheduler:`"): "scheduler",
    },
    "zero_optimization": {
        no_effect("XLA schedules communication; exports always gather"): """
            reduce_bucket_size allgather_bucket_size sub_group_size overlap_comm
            contiguous_gradients reduce_scatter allgather_partitions round_robin_gradients
            memory_efficient_linear use_multi_rank_bucket_allreduce stage3_prefetch_bucket_size
            stage3_param_persistence_threshold stage3_model_persistence_threshold
            stage3_max_live_parameters stage3_max_reuse_distance
            stage3_use_all_reduce_for_fetch_params stage3_module_granularity_threshold
            stage3_allgather_sequential stage3_partition_stream_chunk_size
            stage3_gather_16bit_weights_on_model_save
            stage3_gather_fp16_weights_on_model_save""",
        _HAS_NO_COUNTERPART: """
            elastic_checkpoint load_from_fp32_weights leaf_module prefetch_bucket_size
            param_persistence_threshold model_persistence_threshold max_live_parameters
            max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold
            use_all_reduce_for_fetch_params allgather_sequential partition_stream_chunk_size
            ignore_unused_parameters legacy_stage1 override_module_apply log_trace_cache_warnings
            cpu_offload_use_pin_memory enable_sanity_checks mics_hierarchical_params_gather
            pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory""",
        _CHANGES_RESULT: """
            zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
            zeropp_loco_param zenflow""",
    },
    "zero_optimization.offload_param": {
        no_effect("XLA moves the arrays"): """
            pin_memory ratio buffer_count buffer_size max_in_cpu pipeline pipeline_read
            pipeline_write fast_init super_offload convert_grad_on_cpu cpuadam_cores_perc"""
    },
    "activation_checkpointing": {
        no_effect("layers are rematerialised per policy"): """
            partition_activations contiguous_memory_optimization number_checkpoints
            synchronize_checkpoint_boundary profile"""
    },
    "bf16": {
        no_effect("see `on_nonfinite`"): "check_grad_overflow immediate_grad_update",
        no_effect("see `model.param_dtype` and `optimizer.state_dtype`"): """
            bf16_master_weights_and_grads bf16_optimizer_states""",
    },
    "fp16": {
        no_effect("see `model.dtype` and `model.param_dtype`"): """
            auto_cast fused_mode fp16_master_weights_and_grads"""
    },
    "torch_autocast": {
        no_effect("norms, softmax and losses are always in fp32"): "lower_precision_safe_modules"
    },
    "tensorboard": {no_effect("see `tensorboard`"): "output_path job_name"},
}
"""Part of the section → marker → the keys that have no other meaning than it."""


class DeepSpeedSection(Section):
    """A part of the section, in which `auto` counts as not written."""

    @model_validator(mode="before")
    @classmethod
    def _auto_is_not_written(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v != "auto" or k not in cls.model_fields}


def _keys(section: str) -> Any:
    """A base class with the keys of a part of the section."""
    fields: dict[str, Any] = {
        name: (Annotated[Any, marker], None)
        for marker, names in KEYS[section].items()
        for name in names.split()
    }
    return create_model(f"{section}Keys", __base__=DeepSpeedSection, __module__=__name__, **fields)


_SHARDS_IN_A_GROUP = "use `mesh.fsdp` to shard inside a group"


OFFLOAD_OPTIMIZER = "deepspeed.zero_optimization.offload_optimizer.device"
OFFLOAD_PARAM = "deepspeed.zero_optimization.offload_param.device"
Device = Literal["none", "cpu", "nvme"]


class OffloadConfig(_keys("zero_optimization.offload_param")):
    """Where a part of the state is stored."""

    device: Annotated[Device | None, not_supported("use `device: cpu`", "none", "cpu")] = None
    """Where it is: with the device's other arrays (`none`), in host memory, or on a disk."""
    nvme_path: Annotated[Any, refused_when_on("is not supported: use `device: cpu`")] = None


_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_STAGES = {
    0: "parameters, gradients and optimizer state are copied to every device of `mesh.data`",
    1: "optimizer state and master weights are sharded over `mesh.data`, gathered once per step",
    2: "as 1, and gradients are reduce-scattered over `mesh.data`",
    3: "as 2, and parameters stay sharded over `mesh.data`, gathered per layer",
}


class ZeroConfig(_keys("zero_optimization")):
    """ZeRO: what is sharded over the data-parallel devices."""

    stage: Annotated[int, mapped("", _STAGES)] = Field(default=0, ge=0, le=3)
    """0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Annotated[
        OffloadConfig | None, mapped("placement of the moments; without effect on CPU")
    ] = None
    offload_param: Annotated[
        OffloadConfig | None,
        mapped("placement of layers' matrices (the base's, with adapters); without effect on CPU"),
    ] = None
    """Where the weights of a layer are until it is computed, forward, backward and in the update;
    `cpu` needs `stage: 3` and every layer recomputed."""
    cpu_offload: Annotated[bool | None, mapped("offload_optimizer.device: cpu")] = None
    cpu_offload_param: Annotated[bool | None, mapped("offload_param.device: cpu")] = None
    zero_hpz_partition_size: Annotated[Any, refused_when_on(_SHARDS_IN_A_GROUP, None, 1)] = None
    mics_shard_size: Annotated[Any, refused_when_on(_SHARDS_IN_A_GROUP, None, -1)] = None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for older, newer in _OFFLOADS.items():
            wanted, offload = getattr(self, older), getattr(self, newer)
            device = offload and offload.device
            if wanted is not None and device and wanted != (device == "cpu"):
                found = str(wanted).lower()
                yield older, f"{found} contradicts {newer}.device {device!r}"
        if self.offloads("cpu_offload_param") and self.stage != 3:
            key = "cpu_offload_param" if self.cpu_offload_param else "offload_param.device"
            yield key, f"needs stage: 3, which gathers parameters per layer, found {self.stage}"

    def offloads(self, older: Literal["cpu_offload", "cpu_offload_param"]) -> bool:
        """Whether a part of the state is in the host's memory, named by its older key."""
        offload = getattr(self, _OFFLOADS[older])
        return bool(getattr(self, older)) or (offload is not None and offload.device == "cpu")


class EnabledConfig(_keys("bf16")):
    enabled: bool | None = None
    """Compared with `model.dtype`."""


_LOSS_SCALER = mapped("our own loss scaler")
_MOVING = (
    "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
    "min_loss_scale",
)  # fmt: skip
SCALER_KEYS = ("loss_scale", *_MOVING)


class FP16Config(_keys("fp16")):
    """How the loss is scaled where products are in float16. A step whose scaled gradients overflow
    is none: it changes the scale alone."""

    enabled: bool | None = None
    """Compared with `model.dtype`."""
    loss_scale: Annotated[float, _LOSS_SCALER] = Field(default=0, ge=0)
    """A fixed scale, with which `on_nonfinite` decides on an overflow; 0 is one that moves."""
    initial_scale_power: Annotated[int, _LOSS_SCALER] = Field(default=16, ge=0, le=64)
    """The first scale is 2 to this power."""
    loss_scale_window: Annotated[int, _LOSS_SCALER] = Field(default=1000, ge=1)
    """Steps without an overflow after which the scale doubles."""
    hysteresis: Annotated[int, _LOSS_SCALER] = Field(default=2, ge=1)
    """The overflow at which the scale is first halved, as at each that follows until it has
    grown."""
    consecutive_hysteresis: Annotated[bool, _LOSS_SCALER] = False
    """Any step without an overflow starts the count of `hysteresis` anew."""
    min_loss_scale: Annotated[float, _LOSS_SCALER] = Field(default=1, gt=0)
    """The scale falls no lower: an overflow that would ask for it ends the run."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not self.loss_scale and self.min_loss_scale > 2.0**self.initial_scale_power:
            first = f"the first scale, 2^{self.initial_scale_power}"
            yield "min_loss_scale", f"{self.min_loss_scale:g} is above {first}; raise its power"

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.loss_scale:
            yield from ((key, "`loss_scale` is fixed") for key in _MOVING)


class AutocastConfig(_keys("torch_autocast")):
    """Products in a dtype of their own."""

    enabled: bool = False
    """Whether the section counts."""
    dtype: Annotated[HalfDType, mapped("the compute dtype; exports keep `model.dtype`")] = (
        "bfloat16"
    )
    """Compute dtype, beside which `model.dtype` may be fp32."""

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.enabled:
            yield "dtype", "`enabled` is not true"


class ActivationConfig(_keys("activation_checkpointing")):
    cpu_checkpointing: Annotated[bool, sets("activation_checkpoint_cpu_offload")] = False


class DataTypesConfig(DeepSpeedSection):
    grad_accum_dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, not_supported("use fp32", "fp32")
    ] = None
    """Dtype of the summed gradient."""


class TensorParallelConfig(DeepSpeedSection):
    autotp_size: Annotated[int, sets("mesh.tensor")] = Field(default=0, ge=0)


class MonitorConfig(_keys("tensorboard")):
    enabled: Annotated[bool, sets("tensorboard.enable")] = False


_COMPARED = mapped("compared with model.dtype")
_COUNT = Field(default=None, ge=1)


class DeepSpeedConfig(_keys("")):
    """A config of DeepSpeed."""

    zero_optimization: Annotated[ZeroConfig | None, mapped("what is sharded over mesh.data")] = None
    gradient_clipping: Annotated[float | None, sets("max_grad_norm")] = Field(default=None, ge=0)
    train_batch_size: Annotated[
        int | None, mapped("compared with micro_batch_size x accumulation x batch shards")
    ] = _COUNT
    train_micro_batch_size_per_gpu: Annotated[int | None, equals("micro_batch_size")] = _COUNT
    gradient_accumulation_steps: Annotated[int | None, equals("gradient_accumulation_steps")] = (
        _COUNT
    )
    sequence_parallel_size: Annotated[int | None, equals("mesh.context")] = _COUNT
    bf16: Annotated[EnabledConfig | None, _COMPARED] = None
    bfloat16: Annotated[EnabledConfig | None, _COMPARED] = None
    fp16: Annotated[FP16Config | None, _COMPARED] = None
    torch_autocast: Annotated[AutocastConfig | None, mapped("the compute dtype")] = None
    data_types: Annotated[DataTypesConfig | None, mapped("dtype of the summed gradient")] = None
    tensor_parallel: Annotated[TensorParallelConfig | None, mapped("mesh.tensor")] = None
    activation_checkpointing: ActivationConfig | None = None
    """What is kept for the backward pass."""
    tensorboard: Annotated[MonitorConfig | None, mapped("tensorboard.enable")] = None

    @property
    def zero_stage(self) -> int:
        """`zero_optimization.stage`; 2 without that section, as upstream."""
        return 2 if self.zero_optimization is None else self.zero_optimization.stage

    @property
    def offloads_optimizer(self) -> bool:
        """Whether moments are in the host's memory."""
        return (self.zero_optimization or ZeroConfig()).offloads("cpu_offload")

    @property
    def offloads_params(self) -> bool:
        """Whether parameters are in the host's memory."""
        return (self.zero_optimization or ZeroConfig()).offloads("cpu_offload_param")

    @property
    def autocast_dtype(self) -> Literal["bfloat16", "float16"] | None:
        """The compute dtype that the section asks for."""
        autocast = self.torch_autocast
        return autocast.dtype if autocast is not None and autocast.enabled else None
