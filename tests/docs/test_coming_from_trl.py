"""docs/coming-from-trl.md names every argument of TRL's configurations, and options that exist."""

import pathlib
import re

import pytest

from jaxalign.commands.convert_trl.table import SECTIONS, arguments, sections
from jaxalign.commands.options.table import all_sections

PAGE = (pathlib.Path(__file__).parents[2] / "docs/coming-from-trl.md").read_text("utf-8")
NAMES = set(re.findall(r"`(\w+)`", PAGE))

# Own arguments of TRL 1.16.0's configurations (PPOConfig: 1.12.0) and the base class's, read from
# their sources; TrainingArguments of transformers 5.24.
ARGUMENTS = {
    "SFTConfig": """
        learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
        chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token
        max_length truncation_mode shuffle_dataset packing packing_strategy padding_free
        pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type
        activation_offloading pad_token
    """,
    "DPOConfig": """
        learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
        disable_dropout dataset_num_proc max_length truncation_mode padding_free
        pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type
        loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta
        use_weighting discopop_tau activation_offloading sync_ref_model
        ref_model_mixup_alpha ref_model_sync_steps pad_token
    """,
    "RewardConfig": """
        learning_rate model_init_kwargs trust_remote_code chat_template_path disable_dropout
        dataset_num_proc eos_token max_length pad_to_multiple_of center_rewards_coefficient
        activation_offloading pad_token
    """,
    "PPOConfig": """
        learning_rate dataset_num_proc num_mini_batches total_episodes
        local_rollout_forward_batch_size num_sample_generations response_length stop_token
        stop_token_id temperature missing_eos_penalty sft_model_path world_size
        num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size
        mini_batch_size push_to_hub reward_model_path model_adapter_name ref_adapter_name
        num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value
        gamma lam ds3_gather_for_generation
    """,
    "GRPOConfig": """
        learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
        disable_dropout cast_lm_head_to_fp32 remove_unused_columns num_generations
        num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset
        pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p
        top_k min_p generation_kwargs chat_template_kwargs repetition_penalty
        cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
        vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
        vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
        vllm_max_model_length vllm_tensor_parallel_size beta num_iterations epsilon delta
        epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
        vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights
        multi_objective_aggregation scale_rewards loss_type mask_truncated_completions
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile
        entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max
        entropy_coef_delta entropy_target max_tool_calling_iterations
        vllm_importance_sampling_correction vllm_importance_sampling_mode
        vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
        off_policy_mask_threshold use_bias_correction_kl log_completions log_multimodal
        num_completions_to_print log_unique_prompts log_completions_hub_repo
        use_transformers_continuous_batching transformers_continuous_batching_config
        use_transformers_paged vllm_importance_sampling_cap
    """,
    "RLOOConfig": """
        learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
        disable_dropout remove_unused_columns num_generations num_generations_eval
        max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
        generation_batch_size steps_per_generation temperature top_p top_k min_p
        generation_kwargs chat_template_kwargs repetition_penalty cache_implementation
        use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
        vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
        vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
        vllm_max_model_length vllm_tensor_parallel_size beta num_iterations epsilon
        epsilon_high reward_weights normalize_advantages reward_clip_range
        mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
        log_completions log_multimodal num_completions_to_print log_unique_prompts
        use_transformers_continuous_batching transformers_continuous_batching_config
        use_transformers_paged
    """,
    "KTOConfig": """
        learning_rate train_sampling_strategy model_init_kwargs trust_remote_code
        router_aux_loss_coef disable_dropout dataset_num_proc max_length pad_to_multiple_of
        precompute_ref_log_probs precompute_ref_batch_size loss_type beta desirable_weight
        undesirable_weight activation_offloading sync_ref_model ref_model_mixup_alpha
        ref_model_sync_steps
    """,
    "ModelConfig": """
        model_name_or_path model_revision dtype attn_implementation use_peft lora_r
        lora_alpha lora_dropout lora_target_modules lora_target_parameters
        lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit
        bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    """,
    "_BaseConfig": """
        logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel
        torch_empty_cache_steps
    """,
    "TrainingArguments": """
        output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
        lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
        adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
        average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
        bf16_full_eval fp16_full_eval tf32 activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
        torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
        liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps
        auto_find_batch_size logging_strategy logging_steps logging_first_step
        log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
        log_level_replica disable_tqdm report_to run_name project trackio_space_id
        trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
        eval_use_gather_object eval_accumulation_steps include_for_metrics
        batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node
        save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
        hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
        metric_for_best_model greater_is_better ignore_data_skip
        restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
        accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
        label_names train_sampling_strategy length_column_name ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict
        resume_from_checkpoint local_rank
    """,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_named(name):
    assert not set(ARGUMENTS[name].split()) - NAMES


def rows():
    """The cells of every row of every table."""
    for line in PAGE.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_our_names_are_options():
    """What stands in the second column as `section.option` is one."""
    options = {option.name for section in all_sections().values() for option in section.options}
    sections = {name.split(".")[0] for name in all_sections()}
    shown = [
        name
        for cells in rows()
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)", " ".join(cells[1:]))
        if name.split(".")[0] in sections
    ]
    assert len(shown) > 80
    assert not set(shown) - options - set(all_sections())


def test_the_page_shows_the_table_of_convert_trl():
    """The rows of each section, cell by cell: they stand in commands/convert_trl/table.py."""
    shown: dict[str, list[tuple[str, ...]]] = {}
    heading = ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("| `") and heading in sections():
            names, ours, note = re.split(r" \| ?", line[2:].removesuffix("|") + " ")[:3]
            cells = (" ".join(re.findall(r"`(\w+)`", names)), ours.strip(), note.strip())
            shown.setdefault(heading, []).append(cells)
    table = {
        heading: [(" ".join(row.names), row.ours, row.note) for row in rows]
        for heading, rows in sections().items()
    }
    for heading, rows in table.items():
        assert shown[heading] == rows, f"{heading}: page and table differ"


@pytest.mark.parametrize("trainer", SECTIONS)
def test_the_table_knows_every_argument_of_a_trainer(trainer):
    own = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "ppo": "PPO"}
    config = {"grpo": "GRPOConfig", "rloo": "RLOOConfig"}.get(trainer) or f"{own[trainer]}Config"
    for name in (config, "ModelConfig", "_BaseConfig", "TrainingArguments"):
        assert not set(ARGUMENTS[name].split()) - set(arguments(trainer))


def test_a_name_that_is_gone_would_be_seen():
    assert "warmup_ratio_of_old" not in NAMES
    assert len(NAMES) > 250
