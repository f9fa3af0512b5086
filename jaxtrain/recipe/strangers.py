"""Keys of other trainers' configs, and the keys here that say the same."""

ELSEWHERE = {
    # Hugging Face's TrainingArguments and TRL
    "num_train_epochs": "epochs", "max_steps": "train_iters",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "micro_batch_size",
    "learning_rate": "optimizer.learning_rate", "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps", "optim": "optimizer.type",
    "lr_scheduler_type": "scheduler.name", "lr_scheduler": "scheduler.name",
    "lr_scheduler_kwargs": "scheduler.scheduler_specific_kwargs",
    "warmup_steps": "scheduler.warmup_steps", "warmup_ratio": "scheduler.warmup_ratio",
    "bf16": "model.dtype", "fp16": "model.dtype", "dtype": "model.dtype",
    "torch_dtype": "model.dtype", "output_dir": "run_dir", "logging_dir": "tensorboard.dir",
    "logging_steps": "train_log_iter_interval", "eval_steps": "eval_interval",
    "evaluation_strategy": "eval_interval", "eval_strategy": "eval_interval",
    "save_steps": "checkpoint.save_every_n_steps",
    "save_strategy": "checkpoint.save_every_n_steps",
    "save_total_limit": "checkpoint.keep_last_n", "save_only_model": "checkpoint.save_model_only",
    "resume_from_checkpoint": "checkpoint.auto_resume", "resume": "checkpoint.auto_resume",
    "load_best_model_at_end": "checkpoint.keep_best_n",
    "metric_for_best_model": "checkpoint.metric", "early_stopping_patience": "early_stopping",
    "gradient_checkpointing": "model.remat", "data_seed": "data.seed", "report_to": "wandb",
    "run_name": "wandb.name", "label_smoothing_factor": "label_smoothing",
    "dataloader_num_workers": "data.dl_num_workers", "dataset_num_proc": "data.num_proc",
    "max_seq_length": "data.max_length", "max_length": "data.max_length",
    "packing": "data.pack_samples", "completion_only_loss": "data.completion_only",
    "assistant_only_loss": "data.mask_inputs", "dataset_name": "data.sources",
    "dataset": "data.sources", "train_dataset": "data.sources", "eval_dataset": "data.eval_sources",
    "dataset_text_field": "data.sources", "model_name_or_path": "model.name_or_path",
    "attn_implementation": "model.attn_implementation", "use_liger_kernel": "model.type",
    "chat_template": "tokenizer.chat_template", "fsdp_config": "mesh.fsdp",
    # axolotl
    "base_model": "model.name_or_path", "datasets": "data.sources",
    "test_datasets": "data.eval_sources", "val_set_size": "data.train_eval_split",
    "sequence_len": "data.max_length", "sample_packing": "data.pack_samples",
    "train_on_inputs": "data.mask_inputs", "num_epochs": "epochs",
    "saves_per_epoch": "checkpoint.save_every_n_epochs", "evals_per_epoch": "eval_interval",
    "flash_attention": "model.attn_implementation", "gradient_clipping": "max_grad_norm",
    "tokenizer_config": "tokenizer.name_or_path", "special_tokens": "tokenizer.pad_token",
    "wandb_project": "wandb.project", "wandb_entity": "wandb.entity", "wandb_name": "wandb.name",
    # torchtune
    "batch_size": "micro_batch_size", "max_steps_per_epoch": "train_iters",
    "clip_grad_norm": "max_grad_norm", "enable_activation_checkpointing": "model.remat",
    "checkpointer": "checkpoint", "metric_logger": "wandb", "log_every_n_steps":
    "train_log_iter_interval", "profiler": "profile", "save_every_n_steps":
    "checkpoint.save_every_n_steps", "packed": "data.pack_samples",
}  # fmt: skip
"""Key of Hugging Face, TRL, axolotl or torchtune → the key of a recipe."""
COMMANDS = {
    "inference": "`jaxtrain generate` and `jaxtrain chat` reply",
    "finetune": "`jaxtrain RECIPE` trains", "sft": "`jaxtrain RECIPE` trains",
    "init": "`jaxtrain recipes` lists recipes to copy", "resume": "write auto_resume: true on an "
    "`orbax` entry of `checkpoint:`; the same command resumes",
    "convert": "`jaxtrain export` writes a folder for transformers",
    "prepare": "`jaxtrain data` prepares the data",
    "preprocess": "`jaxtrain data` prepares the data",
}  # fmt: skip
"""Command of other programs → the nearest thing there is."""
