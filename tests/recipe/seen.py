"""Where the effect of each key of a recipe is seen. A key that changes a run has a row in one of
these tables; what is refused, or changes nothing, is seen by the tests of its own table.

To add a key, write the test that changes it and sees the change, and name that test in `BY_TEST`:
file under tests/ and function, which must mention the key. Where `jaxtrain check` says the change,
a row of `BY_CHECK` is enough, and where every other value is refused, a row of `BY_REFUSAL`.
"""

CHAT = {"name_or_path": "m"}
HELD_OUT = {"data": {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]}}
RUN = "recipe/test_effects.py::test_a_run_follows_its_keys"
FACTS = "recipe/test_effects.py::test_the_facts_of_a_run_follow_the_key"
MESH = "trainer/test_mesh.py::test_a_mesh_changes_no_number"
RATES = "scheduler/test_schedules.py::test_the_rate_of_every_update"
UPDATES = "optimizer/test_optimizers.py::test_every_key_changes_the_update"
GROUPS = "optimizer/test_groups.py::test_a_group_is_the_optimizer_with_its_settings"
AVERAGE = "trainer/test_average.py::test_it_is_the_exponential_average_from_its_start_on"
RETENTION = "checkpoint/test_retention.py::test_the_last_the_best_and_every_nth_stay"
STOPPING = "trainer/test_guards.py::test_early_stopping_counts_evaluations_without_a_better_value"
DIVERGENCE = "trainer/test_guards.py::test_divergence_follows_its_keys"
EVALUATIONS = "trainer/test_repeats.py::test_evaluations_fall_where_the_recipe_says"
DUE = "checkpoint/test_orbax.py::test_saves_are_due_by_the_step_number"
EXPORT = "trainer/test_resume.py::test_an_export_is_written_as_its_entry_says"
SNOWFLAKE = "data/test_snowflake.py::test_limits_slices_and_text"
SAMPLING = "model/test_generate.py::test_sampling_follows_the_seed_and_a_small_top_p_is_greedy"
SAMPLES = "data/test_sources.py::test_samples_are_drawn_once_and_kept_in_order"

ROWS = "metrics/test_rows.py::test_fewer_rows_count_and_print_the_same_run"
WANDB = "metrics/test_wandb_run.py::test_one_run_over_three_starts_with_rising_steps"
PROMPTS = (
    "data/test_preference.py::test_prepared_pairs_are_found_again_and_keys_of_length_are_told_apart"
)

BY_TEST = {
    "code": "recipe/test_resolve.py::test_user_code_that_fails_is_named_by_line",
    "skip_validation": "recipe/test_keys.py::test_skip_validation_lifts_one_refusal",
    "base": "recipe/test_compose.py::test_maps_merge_and_lists_are_replaced",
    "logger.level": "metrics/test_log.py::test_the_terminal_has_a_level_and_the_file_has_all",
    "logger.print_output_ranks": "metrics/test_log.py::test_ranks_are_process_numbers",
    "logger.file_output_ranks": "metrics/test_log.py::test_ranks_are_process_numbers",
    "train_log_iter_interval": ROWS,
    "loss_log_interval": ROWS,
    "eval_log_iter_interval": ROWS,
    "train_log_metrics_path": "trainer/test_run_folder.py::"
    "test_rows_go_where_the_recipe_says_and_are_cut_on_resume",
    "profile.start_step": "metrics/test_profile.py::test_a_trace_has_its_updates",
    "profile.num_steps": "metrics/test_profile.py::test_a_trace_has_its_updates",
    "profile.dir": "metrics/test_profile.py::"
    "test_a_trace_has_a_folder_and_ends_with_a_run_that_fails",
    "mem_profiler": "metrics/test_profile.py::test_memory_profiles_lie_in_the_run",
    "mem_profiler_dir": "metrics/test_profile.py::test_memory_profiles_have_a_folder",
    "tensorboard.enable": "metrics/test_tensorboard.py::"
    "test_a_restart_that_goes_back_leaves_one_value_a_step",
    "tensorboard.dir": "metrics/test_tensorboard.py::test_another_folder_is_taken_and_never_shared",
    "wandb.enable": WANDB,
    "wandb.mode": WANDB,
    "wandb.name": WANDB,
    "wandb.project": WANDB,
    "wandb.entity": WANDB,
    "wandb.id": "metrics/test_wandb_run.py::test_a_written_id_is_used_and_no_secret_is_sent",
    "data.max_prompt_length": PROMPTS,
    "data.dpo_prompt_truncation_mode": PROMPTS,
    "deepspeed.train_batch_size": "trainer/test_geometry.py::test_the_batch_of_deepspeed_is_compared",
    "deepspeed.zero_optimization.stage": "trainer/test_zero.py::"
    "test_a_stage_changes_no_loss_and_holds_what_it_says",
    "mesh.data": MESH,
    "mesh.fsdp": MESH,
    "mesh.pipeline": MESH,
    "mesh.tensor": MESH,
    "pipeline.microbatches": FACTS,
    "epochs": RUN,
    "train_iters": FACTS,
    "micro_batch_size": FACTS,
    "gradient_accumulation_steps": "trainer/test_step.py::test_accumulation_equals_one_larger_batch",
    "exit_iteration": "trainer/test_resume.py::test_a_resumed_run_is_bitwise_the_unbroken_one",
    "max_grad_norm": "trainer/test_step.py::test_the_norm_is_of_the_mean_gradient_and_before_clipping",
    "z_loss": "trainer/test_loss.py::test_z_loss_is_trained_and_told_apart",
    "label_smoothing": "trainer/test_loss.py::test_smoothing_is_trained_and_not_evaluated",
    "loss_weighting": "trainer/test_loss.py::test_by_sample_each_document_counts_once",
    "ema.decay": AVERAGE,
    "ema.start_step": AVERAGE,
    "ema.eval": "trainer/test_average.py::test_it_is_evaluated_and_exported",
    "tiled_mlp_compute": FACTS,
    "seed": "recipe/test_effects.py::test_the_seed_makes_the_weights",
    "eval_interval": RUN,
    "eval_at_start": RUN,
    "eval_after_step": EVALUATIONS,
    "eval_every_n_epochs": EVALUATIONS,
    "early_stopping.metric": STOPPING,
    "early_stopping.mode": STOPPING,
    "early_stopping.patience": STOPPING,
    "early_stopping.min_delta": STOPPING,
    "divergence.metric": DIVERGENCE,
    "divergence.threshold": DIVERGENCE,
    "divergence.short_alpha": DIVERGENCE,
    "divergence.long_alpha": DIVERGENCE,
    "divergence.action": "trainer/test_guards.py::"
    "test_divergence_goes_on_where_it_was_and_may_stop_or_warn",
    "on_nonfinite": "trainer/test_guards.py::test_skip_drops_the_update_and_consumes_the_batch",
    "kill_switch_path": "trainer/test_ending.py::test_a_stop_file_ends_the_run_and_is_removed",
    "exit_iteration_this_run": "trainer/test_ending.py::"
    "test_the_updates_of_one_process_can_be_limited",
    "min_iterations": "trainer/test_repeats.py::"
    "test_training_rows_are_repeated_until_they_fill_an_epoch",
    "overfit_first_batch": "trainer/test_repeats.py::"
    "test_the_first_batch_for_ever_is_learnt_by_heart",
    "eval_at_end": RUN,
    "max_eval_batches": RUN,
    "eval_samples.prompts": "test_cli.py::test_a_run_ends_with_a_folder_of_results",
    "eval_samples.system": RUN,
    "eval_samples.every_n_evals": RUN,
    "eval_samples.max_new_tokens": "model/test_generate.py::"
    "test_a_prompt_generates_the_same_alone_and_among_others",
    "eval_samples.temperature": SAMPLING,
    "eval_samples.top_p": SAMPLING,
    "run_dir": "trainer/test_resume.py::test_a_folder_of_checkpoints_is_not_written_over",
    "model.name_or_path": "model/test_source.py::test_a_model_that_is_nowhere_names_the_places",
    "model.dtype": FACTS,
    "model.param_dtype": "model/test_families.py::test_param_dtype_is_the_dtype_of_every_parameter",
    "model.attn_implementation": FACTS,
    "model.from_scratch": "model/test_source.py::test_from_scratch_needs_no_more_than_the_config",
    "model.hf_config_kwargs": "model/test_source.py::"
    "test_replaced_fields_of_the_config_are_used_and_exported",
    "model.disable_activation_checkpoint": FACTS,
    "model.remat": FACTS,
    "model.remat_every_nth_layer": FACTS,
    "model.resize_vocab": "trainer/test_vocabulary.py::"
    "test_new_rows_are_the_mean_and_the_export_is_whole",
    "tokenizer.extra_tokens": "tokenizer/test_tokenizer.py::"
    "test_extra_tokens_are_special_and_whole",
    "tokenizer.pad_token": "tokenizer/test_tokenizer.py::"
    "test_a_pad_token_of_the_vocabulary_is_taken",
    "tokenizer.tokenize_kwargs": "trainer/test_causal.py::"
    "test_arguments_of_the_tokenizer_decide_the_tokens",
    "tokenizer.name_or_path": "tokenizer/test_tokenizer.py::"
    "test_the_recipes_tokenizer_goes_before_the_models",
    "tokenizer.chat_template": "tokenizer/test_tokenizer.py::test_a_template_as_text_or_as_a_file",
    "data.sources.*.type": "recipe/test_check.py::test_the_updates_of_local_rows_are_counted",
    "data.sources.*.table_name": SNOWFLAKE,
    "data.sources.*.limit": SNOWFLAKE,
    "data.sources.*.column_mapping": SNOWFLAKE,
    "data.sources.*.sql": "data/test_snowflake.py::test_a_query_reaches_the_package",
    "data.sources": "data/test_sft.py::test_sources_are_told_apart",
    "data.eval_sources": "data/test_mixtures.py::test_named_eval_sets",
    "data.train_eval_split": "data/test_sft.py::test_the_split_is_disjoint_by_content_and_by_seed",
    "data.max_length": FACTS,
    "data.num_proc": "data/test_tokens_and_text.py::"
    "test_a38_text_rows_do_not_depend_on_the_number_of_processes",
    "data.dl_num_workers": "recipe/test_effects.py::test_a25_batches_are_made_ahead_or_in_the_loop",
    "data.seed": "data/test_mixtures.py::test_a_mixture_is_the_same_each_time_and_another_by_seed",
    "data.max_length_buckets": "trainer/test_packed_rows.py::"
    "test_further_padding_changes_no_loss_and_each_length_compiles_once",
    "data.max_rows_with_errors": "data/test_tokens_and_text.py::"
    "test_skipped_rows_are_counted_and_one_too_many_stops",
    "data.cache_dir": "data/test_cache.py::test_the_folder_is_private_or_the_persons_own",
    "data.fail_on_missing_cache": "data/test_cache.py::"
    "test_a_demanded_entry_that_is_missing_is_refused",
    "data.div_length": "data/test_sft.py::test_one_length_for_every_row_of_a_run",
    "data.pad_to": "data/test_sft.py::test_one_length_for_every_row_of_a_run",
    "data.mask_inputs": "data/test_masks.py::"
    "test_without_masking_all_but_the_first_token_is_trained",
    "data.pack_samples": "data/test_sft.py::test_an_epoch_trains_every_conversation_once",
    "data.packing": "data/test_sft.py::test_an_epoch_trains_every_conversation_once",
    "data.filter_samples": "data/test_sft.py::test_truncated_rows_are_counted",
    "data.overlong": "data/test_masks.py::test_a47_overlong_conversations",
    "data.always_max_length": "data/test_mixtures.py::"
    "test_a3_always_max_length_fills_each_pack_and_splits_the_row_that_is_over",
    "data.drop_last": "data/test_mixtures.py::test_drop_last_drops_one_short_pack",
    "data.fuse_positions_prob": "data/test_mixtures.py::test_fused_packs_are_one_sequence",
    "data.repeat_to_pack_max_length": "data/test_mixtures.py::"
    "test_a_small_set_is_repeated_into_one_pack",
    "data.loss_roles": "data/test_masks.py::test_other_roles_are_trained_where_the_recipe_says_so",
    "data.completion_only": "data/test_masks.py::"
    "test_of_a_pair_the_reply_alone_is_trained_even_if_the_prompt_has_replies",
    "data.ignore_empty_think": "data/test_masks.py::test_an_empty_think_block_is_left_out_if_asked",
    "data.sources.*.split": "data/test_sources.py::test_splits_of_a_file_are_slices",
    "data.sources.*.sample_ratio": SAMPLES,
    "data.sources.*.sample_count": SAMPLES,
    "data.sources.*.sample_seed": SAMPLES,
    "data.sources.*.process": "data/test_tokens_and_text.py::"
    "test_tokenised_rows_are_taken_as_they_stand",
    "data.sources.*.weight": "data/test_mixtures.py::"
    "test_shares_are_met_and_no_document_is_favoured",
    "data.sources.*.name": "data/test_sft.py::test_sources_are_told_apart",
    "data.sources.*.role_mapping": "data/test_sources.py::test_folders_that_datasets_saved",
    "data.sources.*.content_key": "data/test_conversation.py::"
    "test_a41_the_content_key_is_found_or_said",
    "data.sources.*.name_or_path": "data/test_sources.py::test_a34_local_files_by_the_hubs_source",
    "data.sources.*.kwargs": "data/test_sources.py::test_a34_local_files_by_the_hubs_source",
    "data.sources.*.split_mapping": "data/test_sources.py::test_folders_that_datasets_saved",
    "data.sources.*.column": "data/test_tokens_and_text.py::test_the_column_of_the_text",
    "data.sources.*.rows": "data/test_tokens_and_text.py::"
    "test_made_up_rows_are_full_and_depend_on_the_seed",
    "data.sources.*.vocab_size": "data/test_tokens_and_text.py::"
    "test_made_up_rows_are_full_and_depend_on_the_seed",
    "data.sources.*.path": "data/test_sources.py::test_files_globs_lists_and_folders",
    "data.sources.*.columns": "data/test_conversation.py::test_every_form_gives_the_same_turns",
    "data.sources.*.per_line": "data/test_sources.py::test_text_is_a_row_a_file_or_a_line",
    "data.sources.*.format": "recipe/test_effects.py::test_a_format_is_what_all_files_are",
    "optimizer.learning_rate": RUN,
    "optimizer.weight_decay": "optimizer/test_optimizers.py::"
    "test_decay_shrinks_weights_and_leaves_norms",
    "optimizer.betas": UPDATES,
    "optimizer.eps": UPDATES,
    "optimizer.momentum": UPDATES,
    "optimizer.nesterov": UPDATES,
    "optimizer.groups.match": GROUPS,
    "optimizer.groups.lr_scale": GROUPS,
    "optimizer.groups.weight_decay": GROUPS,
    "optimizer.groups.freeze": GROUPS,
    "optimizer.state_dtype": "optimizer/test_groups.py::test_moments_have_the_dtype_that_is_said",
    "scheduler.warmup_ratio": "scheduler/test_schedules.py::test_warmup_is_a_share_of_the_horizon",
    "scheduler.warmup_steps": RATES,
    "scheduler.min_lr_ratio": "scheduler/test_schedules.py::test_a_floor_is_where_the_rate_ends",
    "scheduler.name": RATES,
    "scheduler.scheduler_specific_kwargs": RATES,
    "checkpoint.*.output_dir": RUN,
    "checkpoint.*.enabled": RUN,
    "checkpoint.*.auto_resume": "trainer/test_resume.py::"
    "test_a_resumed_run_is_bitwise_the_unbroken_one",
    "checkpoint.*.save_every_n_steps": "trainer/test_callbacks.py::"
    "test_events_come_in_the_documented_order",
    "checkpoint.*.save_every_n_epochs": RUN,
    "checkpoint.*.save_end_of_training": RUN,
    "checkpoint.*.save_after_step": DUE,
    "checkpoint.*.save_model_only": "checkpoint/test_orbax.py::"
    "test_all_but_the_newest_are_cut_down_to_weights",
    "checkpoint.*.reset": "trainer/test_resume.py::test_each_part_of_the_state_is_reset_alone",
    "checkpoint.*.on_corrupt": "checkpoint/test_orbax.py::"
    "test_a_damaged_newest_is_passed_over_when_the_recipe_says_so",
    "checkpoint.*.resume_from": "checkpoint/test_orbax.py::"
    "test_a_start_that_is_named_is_taken_once_with_auto_resume",
    "checkpoint.*.max_shard_size": EXPORT,
    "checkpoint.*.verify_export": EXPORT,
    "checkpoint.*.keep_every_n_steps": RETENTION,
    "checkpoint.*.keep_last_n": RETENTION,
    "checkpoint.*.keep_best_n": RETENTION,
    "checkpoint.*.mode": "checkpoint/test_retention.py::"
    "test_larger_is_better_when_the_metric_says_so",
    "checkpoint.*.async_save": RUN,
}
"""Key → the test that changes it and sees the change."""

WSD = {"scheduler": {"type": "wsd", "num_warmup_steps": 7, "num_decay_steps": 9}, "train_iters": 50}
BY_CHECK = {
    "type": ({"type": "causal"}, "trainer    causal"),
    "name": ({"name": "causal"}, "trainer    causal"),
    "logger.output_dir": (
        {"logger": {"output_dir": "logs"}},
        "files      logs: recipe.yaml, run.json, logs, train-log-metrics.jsonl, loss.png",
    ),
    "model.type": (
        {"model": {"type": "liger", **CHAT}},
        "mapped     model.type: the same model as `huggingface`; fused kernels are always on",
    ),
    "optimizer.type": ({"optimizer": {"type": "fused_adam"}}, "mapped     optimizer.type: `adamw`"),
    "scheduler.type": (WSD, "warm-up    7 updates"),
    "scheduler.num_warmup_steps": (WSD, "warm-up    7 updates"),
    "checkpoint.*.type": (
        {"checkpoint": {"type": "huggingface", "output_dir": "a", "save_end_of_training": True}},
        "checkpoint a/global_step_N (huggingface), at the end",
    ),
}
"""Key → a recipe, and the line of `jaxtrain check` that is there because of it."""

BY_REFUSAL = {
    "tokenizer.type": (
        {"tokenizer": {"type": "own"}},
        "tokenizer.type: unknown tokenizer type 'own' (known: huggingface)",
    ),
    "data.type": (
        {"data": {"type": "causal", "sources": ["a/b"]}},
        "data.type: 'causal' is not allowed with trainer 'sft', skip_validation: true allows it "
        "(allowed: sft)",
    ),
    "scheduler.num_decay_steps": (
        {"scheduler": {"type": "wsd", "num_warmup_steps": 7}},
        "scheduler.num_decay_steps: is required",
    ),
    "checkpoint.*.metric": (
        HELD_OUT
        | {"eval_interval": 1}
        | {"checkpoint": {"output_dir": "a", "keep_best_n": 1, "metric": "x", "mode": "min"}},
        "checkpoint.0.metric: must be one of eval/loss, eval/perplexity, eval/token_accuracy, "
        "found 'x'",
    ),
    "pipeline.stages_per_device": (
        {"pipeline": {"stages_per_device": 2}},
        "pipeline.stages_per_device: 2 needs schedule: interleaved, found gpipe",
    ),
    "deepspeed.zero_optimization.zero_hpz_partition_size": (
        {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 8}}},
        "deepspeed.zero_optimization.zero_hpz_partition_size: use `mesh.fsdp` to shard inside a "
        "group, found 8",
    ),
    "deepspeed.zero_optimization.mics_shard_size": (
        {"deepspeed": {"zero_optimization": {"mics_shard_size": 8}}},
        "deepspeed.zero_optimization.mics_shard_size: use `mesh.fsdp` to shard inside a group, "
        "found 8",
    ),
    **{
        f"deepspeed.{name}.enabled": (
            {"deepspeed": {name: {"enabled": enabled}}, "model": {"dtype": dtype, **CHAT}},
            f"deepspeed.{name}.enabled: disagrees with model.dtype {full}; write model.dtype and "
            "remove it",
        )
        for name, enabled, dtype, full in (
            ("bf16", False, "bf16", "bfloat16"),
            ("bfloat16", True, "fp32", "float32"),
            ("fp16", True, "bf16", "bfloat16"),
        )
    },
}
"""Key → a recipe, and the line that refuses it: other values have no way to be honoured."""
