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
RETENTION = "checkpoint/test_retention.py::test_the_last_and_the_best_stay"
SAMPLING = "model/test_generate.py::test_sampling_follows_the_seed_and_a_small_top_p_is_greedy"
SAMPLES = "data/test_sources.py::test_samples_are_drawn_once_and_kept_in_order"

BY_TEST = {
    "code": "recipe/test_resolve.py::test_user_code_that_fails_is_named_by_line",
    "skip_validation": "recipe/test_keys.py::test_skip_validation_lifts_one_refusal",
    "base": "recipe/test_compose.py::test_maps_merge_and_lists_are_replaced",
    "logger.level": "recipe/test_effects.py::test_the_level_is_what_the_terminal_shows",
    "deepspeed.train_batch_size": "trainer/test_geometry.py::test_the_batch_of_deepspeed_is_compared",
    "deepspeed.zero_optimization.stage": "recipe/test_arctic.py::test_a_mapped_key_arrives",
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
    "seed": "recipe/test_effects.py::test_the_seed_makes_the_weights",
    "eval_interval": RUN,
    "eval_at_start": RUN,
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
    "model.name_or_path": "model/test_source.py::test_a_folder_is_found_where_it_is",
    "model.dtype": FACTS,
    "model.param_dtype": "model/test_families.py::test_param_dtype_is_the_dtype_of_every_parameter",
    "model.attn_implementation": FACTS,
    "model.from_scratch": "model/test_source.py::test_from_scratch_needs_no_more_than_the_config",
    "model.hf_config_kwargs": "model/test_source.py::"
    "test_replaced_fields_of_the_config_are_used_and_exported",
    "model.disable_activation_checkpoint": FACTS,
    "model.remat": FACTS,
    "tokenizer.name_or_path": "tokenizer/test_tokenizer.py::"
    "test_the_recipes_tokenizer_goes_before_the_models",
    "tokenizer.chat_template": "tokenizer/test_tokenizer.py::test_a_template_as_text_or_as_a_file",
    "data.sources": "data/test_sft.py::test_sources_are_told_apart",
    "data.eval_sources": "data/test_mixtures.py::test_named_eval_sets",
    "data.train_eval_split": "data/test_sft.py::test_the_split_is_disjoint_by_content_and_by_seed",
    "data.max_length": FACTS,
    "data.num_proc": "data/test_tokens_and_text.py::"
    "test_a38_text_rows_do_not_depend_on_the_number_of_processes",
    "data.dl_num_workers": "recipe/test_effects.py::test_a25_batches_are_made_ahead_or_in_the_loop",
    "data.seed": "data/test_mixtures.py::test_a_mixture_is_the_same_each_time_and_another_by_seed",
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
        "files      logs: recipe.yaml, run.json, train-log-metrics.jsonl, loss.png, logs/",
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
