"""The defaults of TRL's arguments.

Of TRL 1.16.0 (PPO: 1.12.0, the last version that has it) and transformers 5.24.
"""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "seed": 42,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
}
_GROUPS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "max_completion_length": 512,
    "num_iterations": 1,
    "temperature": 1.0,
    "epsilon": 0.2,
}

CARRIED: dict[str, dict[str, Any]] = {
    "sft": _SHARED | {"learning_rate": 2e-5, "max_length": 1024, "packing": False},
    "reward": _SHARED | {"learning_rate": 1e-4, "max_length": 1024},
    "dpo": _SHARED
    | {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1, "loss_type": ["sigmoid"]},
    "kto": _SHARED | {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1},
    "ppo": _SHARED
    | {
        "learning_rate": 3e-6,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "response_length": 53,
        "temperature": 0.7,
        "whiten_rewards": False,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
    },
    "grpo": _SHARED
    | _GROUPS
    | {"num_generations": 8, "beta": 0.0, "loss_type": "dapo", "scale_rewards": "group"},
    "rloo": _SHARED | _GROUPS | {"num_generations": 2, "beta": 0.05},
}
"""Trainer → the defaults that a conversion writes out, since ours may differ."""

UNSET: dict[str, Any] = {
    "accelerator_config": {
        "split_batches": False,
        "dispatch_batches": None,
        "even_batches": True,
        "use_seedable_sampler": True,
        "non_blocking": False,
        "gradient_accumulation_kwargs": None,
    },
    "average_tokens_across_devices": True,
    "bnb_4bit_quant_type": "nf4",
    "dataloader_pin_memory": True,
    "dataset_test_split": "test",
    "dataset_text_field": "text",
    "dataset_train_split": "train",
    "ddp_timeout": 1800,
    "disable_dropout": True,
    "ds3_gather_for_generation": True,
    "entropy_coef_delta": 0.005,
    "entropy_coef_max": 1.0,
    "entropy_target": 0.2,
    "eval_do_concat_batches": True,
    "fsdp_config": {
        "min_num_params": 0,
        "xla": False,
        "xla_fsdp_v2": False,
        "xla_fsdp_grad_ckpt": False,
    },
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_strategy": "every_save",
    "log_level": "passive",
    "log_level_replica": "warning",
    "log_multimodal": True,
    "log_on_each_node": True,
    "logging_nan_inf_filter": True,
    "logging_strategy": "steps",
    "lora_task_type": "CAUSAL_LM",
    "multi_objective_aggregation": "sum_then_normalize",
    "num_sample_generations": 10,
    "pad_to_multiple_of": "auto",
    "per_device_eval_batch_size": 8,
    "project": "huggingface",
    "remove_unused_columns": True,
    "repetition_penalty": 1.0,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "skip_memory_metrics": True,
    "top_entropy_quantile": 1.0,
    "trackio_space_id": "trackio",
    "use_bias_correction_kl": True,
    "vespo_k_neg": 3.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_neg": 2.0,
    "vespo_lambda_pos": 3.0,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_group_port": 51216,
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_mode": "colocate",
    "vllm_model_impl": "vllm",
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_tensor_parallel_size": 1,
}
"""Defaults that are not off in themselves, of arguments without an option here: nothing to say."""


def is_off(name: str, value: Any) -> bool:
    """Whether an argument has no effect: its default, or a value that turns it off."""
    if name in UNSET and value == UNSET[name]:
        return True
    return value in (None, False, 0, "", "no", "none", [], {}, ["none"])
