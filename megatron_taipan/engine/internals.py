"""Every attribute of DeepSpeed and torch that this room replaces or reads beyond their documented interface.

No other room names one. `tests/engine/test_internals.py` compares the list with the room's source and with what is
installed, so that an upgrade that moves something fails there, in words; `tests/test_private_names.py` finds private
names, and lists the few that other rooms may use. The torch versions that all of it was tried with: versions.py.
"""

from typing import NamedTuple

TRIED = "0.19.8"  # the DeepSpeed that all of this was written against and is tested with

ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
PIPELINE = "deepspeed.runtime.pipe.engine:PipelineEngine"
ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
MAPPING = "deepspeed.utils.tensor_fragment:tensor_fragment"
SCALER = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"
PIPELINE_MODULE = "deepspeed.runtime.pipe.module:PipelineModule"


class Internal(NamedTuple):
    """Attributes of a class or a module."""

    owner: str  # module:class, or module: for what is in the module itself
    names: str  # separated by blanks
    why: str


REPLACED = (
    Internal(ZERO_12, "check_overflow get_grad_norm_direct", "few launches in place of several a parameter (zero.py)"),
    Internal(ZERO_12, "reset_cpu_buffers", "drops the gradients of a skipped step with offloaded state (zero.py)"),
    Internal(
        ZERO_12,
        "process_gradients backward_epilogue reduce_gradients unscale_and_clip_grads",
        "gradients are added up where they are sent and where AdamW reads them (zero.FlatGradients)",
    ),
    Internal(
        ZERO_12,
        "step scaled_global_norm check_grad_overflow overflow _global_grad_norm",
        "AdamW is launched before the host reads the norm (zero.QueuedStep); one norm over all stages",
    ),
    Internal(ZERO_12, "_epilogue_ran_this_backward averaged_gradients", "what the replaced methods leave behind"),
    Internal(ZERO_12, "_model_parallel_all_reduce", "once for all groups of parameters (pipeline_engine.py)"),
    Internal(PIPELINE, "_INSTRUCTION_MAP", "tied gradients, and one backward pass a stage (pipeline_engine.py)"),
    Internal(PIPELINE, "_running_engine_backward", "else its hooks take the pass for one of the user's"),
    Internal(PIPELINE_MODULE, "_partition_layers", "stages by the pattern's cuts or by operations (pipeline.py)"),
    Internal(ENGINE, "_config micro_steps", "the batch, where a stage of the run changes it (build.py)"),
    Internal(ZERO_12, "gradient_accumulation_steps", "the same"),
    Internal(ZERO_3, "gradient_accumulation_steps", "the same"),
    Internal(ENGINE, "_cast_module_mixed_precision", "some parameters stay float32 under bf16 and fp16 (build.py)"),
    Internal(
        ZERO_3,
        "_get_parameter_partitions _set_fp16_partitioned_groups_flat _create_param_groups_fp16_flat_cpu_memory"
        " param_groups_fp16_flat_cpu_memory trainable_param_groups",
        "parameters of more than one type (build.py)",
    ),
)  # fmt: skip

READ = (
    Internal(
        ZERO_12,
        "bit16_groups bit16_groups_flat params_in_partition param_names partition_gradients has_moe_layers"
        " use_grad_accum_attribute compute_grad_norm cpu_offload dp_process_group model_parallel_rank device dtype"
        " is_gradient_accumulation_boundary loss_scale clip_grad optimizer get_gradient_for_reduction",
        "where parameters and their gradients are, and which rank owns them",
    ),
    Internal("deepspeed.runtime.zero.stage_1_and_2:", "_zero_padding", "what of the gradients is padding (zero.py)"),
    Internal(ZERO_12, "single_partition_of_fp32_groups update_lp_params", "the masters (state_shards.py)"),
    Internal(
        ZERO_3,
        "grad_position get_param_id fp32_partitioned_groups_flat fp16_partitioned_groups_flat"
        " checkpoint_event_prologue checkpoint_event_epilogue fp16_groups lp_param_buffer",
        "the masters (state_shards.py), and the flat buffers of partitions (build.py)",
    ),
    Internal("deepspeed.utils.mixed_precision_linkage:", "_hp_mapping", "a parameter's part of the masters"),
    Internal(MAPPING, "lp_fragment_address hp_fragment_address param_group_index", "where masters are"),
    Internal(SCALER, "cur_scale cur_iter last_overflow_iter cur_hysteresis dynamic", "the loss scale in checkpoints"),
    Internal(
        PIPELINE,
        "grad_layer pipe_buffers _exec_backward_pass is_last_stage reset_activation_shape module",
        "a stage's backward pass, and evaluation with other batches than training's",
    ),
    Internal(PIPELINE_MODULE, "_layer_specs _set_bounds", "which of all layers a stage builds"),
    Internal(ENGINE, "basic_optimizer zero_optimization_stage", "the optimizer that ZeRO wraps"),
    Internal("torch:", "_foreach_norm", "norms of many gradients in float32 in one launch (zero.py)"),
    Internal("torch:", "_foreach_mul_", "the scales of many matrices in one launch (matrices.py)"),
    Internal("torch:", "_foreach_lerp_", "the moving average of many weights in one launch (ema.py)"),
    Internal("torch.distributed.distributed_c10d:", "_world _set_pg_timeout", "all groups' timeouts (timeouts.py)"),
)  # fmt: skip
