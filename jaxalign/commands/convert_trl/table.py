"""TRL's arguments and our options: the one table behind `convert-trl` and the page about TRL.

docs/coming-from-trl.md shows these rows; a test compares both, cell by cell.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_TABLE = """
## Models
model_name_or_path | `model.source` |
model_revision | `model.source: "owner/name@revision"` | wherever a hub id is accepted, so for reward models too
dtype | `model.dtype` | of the weights; `model.compute_dtype` of activations
attn_implementation | `model.attention` | auto, xla, splash, cudnn, pallas
model_init_kwargs | – | `model` has no further options
trust_remote_code | – | code of a repository is never run
cast_lm_head_to_fp32 | – | logits and softmax are always float32
use_cache cache_implementation | – | the cache is static; `ppo.cache_dtype` sets its type
use_peft | `model.lora` | set to train adapters; null trains all weights
lora_r lora_alpha | `model.lora.rank`, `model.lora.alpha` |
lora_target_modules | `model.lora.targets` | query, key, value, out, gate, up, down, embed, lm_head, or regular expressions: [adapters](adapters.md)
use_rslora use_dora | `model.lora.rslora`, `model.lora.dora` |
lora_modules_to_save | `model.lora.modules_to_save` | the head of a reward model is always trained and saved
lora_dropout | `model.lora.dropout` | 0 only
lora_target_parameters lora_task_type | – | experts have adapters by `gate`, `up`, `down`
load_in_4bit load_in_8bit use_bnb_nested_quant | `model.quantize` | nf4, int8, nf4-double; under adapters: [a quantised base](adapters.md#a-quantised-base)
bnb_4bit_quant_type bnb_4bit_quant_storage | – | nf4 it is, two codes a byte
model_adapter_name ref_adapter_name | – | under `model.lora` the base without adapters is the reference
router_aux_loss_coef | – | as `config.json` has it
chat_template_path | `model.chat_template` | a jinja file, or chatml, alpaca, none
eos_token pad_token | – | the tokenizer's and the template's; padding is another token if there is one, and masks never depend on it
disable_dropout | – | always off

## Data
dataset_name dataset_config dataset_train_split | `data.train` | `owner/name:config:split`, a file or a folder
dataset_test_split | `data.eval` | likewise
dataset_streaming | `data.streaming` | then `run.steps` must end the run
datasets | `data.train` | an entry for each
ignore_bias_buffers | – | of torch.distributed
dataset_text_field | `columns: {text: NAME}` of an entry of `data.train` |
dataset_kwargs | – | the options of `data`
dataset_num_proc | – | one process tokenises; with `data.streaming` it does so during training
max_length | `data.length` | tokens of a row
truncation_mode | `data.keep` | keep_start: `answer_start`; keep_end: `prompt_end`
shuffle_dataset train_sampling_strategy | `data.shuffle` |
packing | `data.packing` | true is the default of SFT
packing_strategy | `data.packing` | bfd: `best_fit`; bfd_split: `best_fit_split`; wrapped: `wrapped`
eval_packing | `data.packing` | held-out rows are packed like the others; figures do not depend on it
padding_free pad_to_multiple_of length_column_name | `data.buckets`, `data.packing` | shapes are static: packed rows, or a few widths
completion_only_loss | `data.train_on` | prompt and completion train the completion; `everything` trains both
assistant_only_loss | `data.train_on: all` | the default
remove_unused_columns label_names | – | columns that nothing reads are listed at the start
chat_template_kwargs | `data.chat_template_kwargs` |
dataloader_drop_last | – | empty rows of weight 0 fill up the last batch
dataloader_num_workers dataloader_prefetch_factor | `data.prefetch` | batches prepared ahead in a thread
dataloader_pin_memory dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order | – | of PyTorch's loader
ignore_data_skip | – | a resumed run continues with the next row, at no cost

## Batches, steps, optimizer
per_device_train_batch_size | `data.rows` | rows of a step, over all devices and hosts
per_device_eval_batch_size | `data.rows` |
gradient_accumulation_steps | `run.micro_batches` | splits a step's rows; it does not add any
average_tokens_across_devices | – | always
auto_find_batch_size | – | `jaxalign plan --search` finds what fits, before the run
num_train_epochs | `run.epochs` | fractions too; or `data.epochs`, whole
max_steps | `run.steps` | batches; for PPO, iterations
learning_rate | `optimizer.learning_rate` |
lr_scheduler_type | `optimizer.schedule` | constant, linear, cosine; `warmup_stable_decay` is `wsd`
lr_scheduler_kwargs | `optimizer.end_fraction` | last rate over peak, TRL's `min_lr_rate`; `num_decay_steps` is `optimizer.decay_ratio`
warmup_steps | `optimizer.warmup_steps`, `optimizer.warmup_ratio` | below 1 it is a ratio in transformers 5, which was `warmup_ratio`
optim optim_args optim_target_modules | `optimizer.name`, `optimizer.moments`, `optimizer.offload` | [docs/optimizers.md](optimizers.md); any optax in Python
weight_decay max_grad_norm | `optimizer.weight_decay`, `optimizer.max_grad_norm` |
adam_beta1 adam_beta2 adam_epsilon | `optimizer.b1`, `optimizer.b2`, `optimizer.eps` |
neftune_noise_alpha | `sft.neftune_alpha` | SFT
label_smoothing_factor | – | not for SFT
gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs | `model.remat` | block
activation_offloading | `model.remat: offload` |
bf16 fp16 bf16_full_eval fp16_full_eval tf32 | `model.compute_dtype` | float16 without loss scaling
use_liger_kernel liger_kernel_config | – | the fused head is built in
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps | – | all steps are compiled
fsdp fsdp_config deepspeed accelerator_config parallelism_config | `mesh` | `mesh.data`, `mesh.fsdp`, `mesh.tensor`, `mesh.sequence`, `mesh.expert`
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank ds3_gather_for_generation | – | of torch.distributed and DeepSpeed
seed data_seed | `run.seed` | seeds both
full_determinism | – | runs on one mesh are equal, bit for bit
use_cpu | – | `JAX_PLATFORMS=cpu`

## Evaluation, checkpoints, logs
output_dir | `run.folder` | must be free, or resumed
eval_strategy eval_steps | `run.eval_every` | batches, or epoch; with `data.eval` or `data.validation`
eval_on_start eval_delay | – | the start is always measured
eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only include_for_metrics | – | sums are added up on the devices
save_strategy save_steps | `run.save_every` | batches, or epoch; also by `run.save_minutes`
save_total_limit | `run.keep` |
save_only_model | `run.checkpoint: false` | the model alone, at the end
save_on_each_node enable_jit_checkpoint | – | all hosts write their parts to one folder; SIGTERM saves
load_best_model_at_end metric_for_best_model greater_is_better | `run.early_stopping`, `run.keep_best` | the first ends a run whose held-out figure no longer improves; the second keeps the best checkpoint, which `jaxalign export --best` exports
resume_from_checkpoint | `run.resume` | true: the newest in the folder
restore_callback_states_from_checkpoint | – | all state is restored, always
logging_steps | `run.log_every` | on the terminal; every step is in `metrics.jsonl`
logging_strategy logging_first_step logging_nan_inf_filter log_on_each_node log_level log_level_replica disable_tqdm | – | updates that are not finite are skipped; `run.bad_steps` in a row stop the run
include_num_input_tokens_seen | – | tokens are counted in `metrics.jsonl`
report_to project | `run.trackers`, `run.tracker_project` | [trackers](trackers.md), besides `metrics.jsonl` and `jaxalign report`
run_name trackio_space_id trackio_bucket_id trackio_static_space_id | – | a run has its folder's name; `TRACKIO_SPACE_ID`
push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision | `jaxalign export --push OWNER/NAME` | after the run; private unless `--public`; the token is `HF_TOKEN` or that of `hf auth login`
debug skip_memory_metrics | – | `jaxalign bench` measures memory
do_train do_eval do_predict | – | the command decides

## SFT
loss_type | `sft.loss_type` | nll, dft

## Reward models
center_rewards_coefficient | `reward.center_coef` |

## DPO
beta loss_type loss_weights label_smoothing ld_alpha discopop_tau | `dpo.beta`, `dpo.loss_type`, `dpo.loss_weights`, `dpo.label_smoothing`, `dpo.ld_alpha`, `dpo.discopop_tau` | all loss types of TRL, and simpo, orpo, cpo
f_divergence_type f_alpha_divergence_coef | `dpo.f_divergence`, `dpo.f_alpha` |
use_weighting | `dpo.wpo_weighting` |
precompute_ref_log_probs precompute_ref_batch_size | `reference_cache` | a folder, which later runs read too
sync_ref_model | `reference_sync` | null: the reference is frozen
ref_model_mixup_alpha ref_model_sync_steps | `reference_sync.alpha`, `reference_sync.every` |

## KTO
beta desirable_weight undesirable_weight | `kto.beta`, `kto.desirable_weight`, `kto.undesirable_weight` |
loss_type | – | kto; `dpo.loss_type: apo_zero` is for pairs
sync_ref_model | `reference_sync` | as in DPO
ref_model_mixup_alpha ref_model_sync_steps | `reference_sync.alpha`, `reference_sync.every` |
precompute_ref_log_probs precompute_ref_batch_size | – | the reference also reads new pairings of prompts and answers in every step

## PPO
sft_model_path reward_model_path | `model.source`, `reward_model` | the trainer's `value_model` is `critic`
total_episodes | `run.steps` | times `data.rows` × `ppo.samples`
num_ppo_epochs num_mini_batches | `ppo_epochs`, `minibatches` | at the top level of the YAML
world_size num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size | – | computed; `data.rows` is the batch
local_rollout_forward_batch_size | `ppo.slots` | answers written at a time
num_sample_generations | `dump_every`, `dump_samples` | written token by token to `rollouts.jsonl`
response_length | `ppo.max_new_tokens` |
stop_token stop_token_id | `ppo.stop_tokens` | ids; by default the template's end of turn and the tokenizer's eos
temperature missing_eos_penalty whiten_rewards kl_coef kl_estimator vf_coef gamma lam | `ppo.temperature`, `ppo.missing_eos_penalty`, `ppo.whiten_rewards`, `ppo.kl_coef`, `ppo.kl_estimator`, `ppo.vf_coef`, `ppo.gamma`, `ppo.lam` |
cliprange cliprange_value | `ppo.clip_range`, `ppo.clip_range_value` |

## GRPO and RLOO
reward_funcs reward_model_name_or_path | `rewards` | models, Python functions, checks and servers: [rewards](rewards.md)
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps | – | the reference is frozen
num_generations | `ppo.samples` | `data.rows` counts prompts
num_generations_eval | – | one answer to each held-out prompt
max_completion_length | `ppo.max_new_tokens` |
generation_batch_size steps_per_generation | `minibatches` | the rollout is `data.rows` × `ppo.samples` answers
num_iterations | `ppo_epochs` |
temperature top_p top_k | `ppo.temperature`, `ppo.top_p`, `ppo.top_k` |
min_p repetition_penalty generation_kwargs | – | what is sampled is what is trained
beta | `ppo.kl_coef` | GRPO's is in the loss (`ppo.kl_in: loss`, `ppo.kl_estimator: k3`), RLOO's in the reward
use_bias_correction_kl | – | sampler and trainer share weights and code; the KL term has no ratio
epsilon epsilon_high | `ppo.clip_range`, `ppo.clip_range_high` |
delta | `ppo.dual_clip` | of negative advantages
loss_type | `ppo.loss_aggregation` | grpo: `sequence`; dapo, bnpo: `token` (over the whole batch); dr_grpo: `constant`; no cispo, sapo, vespo, luspo
sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg | – | of losses that jaxalign lacks
importance_sampling_level | `ppo.importance_sampling_level` | token, sequence
scale_rewards | `ppo.scale_rewards` | group, batch, none
normalize_advantages | `ppo.whiten_advantages` |
reward_weights | `weight` of each entry of `rewards` |
multi_objective_aggregation | – | the weighted sum, then the advantage
reward_clip_range | `ppo.reward_clip` | ± one number
mask_truncated_completions | `ppo.mask_truncated` |
entropy_coef | `ppo.entropy_coef` | fixed
top_entropy_quantile use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target | – |
max_tool_calling_iterations | – | no tools or environments
off_policy_mask_threshold | `target_kl` | ends an iteration's updates
log_completions num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo | `dump_every`, `dump_samples` |
use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size | – | answers are sampled by the trainer's own program, on its own weights
vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap | `ppo.logprob_tolerance` | the two differ by rounding; the run stops above the tolerance
use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged | `ppo.slots` | a finished answer makes room for the next

## Older names
max_seq_length | `data.length` |
max_prompt_length | `data.length` | of prompts, in PPO and its relatives; elsewhere rows are cut by `data.length` as a whole
evaluation_strategy | `run.eval_every` | now `eval_strategy`
torch_dtype | `model.dtype` | now `dtype`
warmup_ratio | `optimizer.warmup_ratio` |
rpo_alpha | `dpo.sft_coef` |
"""  # noqa: E501

_COMMON = (
    "Models",
    "Data",
    "Batches, steps, optimizer",
    "Evaluation, checkpoints, logs",
    "Older names",
)
SECTIONS = {
    "sft": "SFT",
    "reward": "Reward models",
    "dpo": "DPO",
    "kto": "KTO",
    "ppo": "PPO",
    "grpo": "GRPO and RLOO",
    "rloo": "GRPO and RLOO",
}
"""Trainer → the section of the table with its own arguments."""

_OPTION = re.compile(r"`([a-z_]+(?:\.[a-z0-9_]+)*)`")


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      names: TRL's arguments.
      ours: the second cell: our options in Markdown, or a dash.
      note: the third cell: remarks, or why there is no such option.
    """

    names: tuple[str, ...]
    ours: str
    note: str

    def options(self) -> tuple[str, ...]:
        """Our options, if the cell is a plain list with one option per name."""
        found = tuple(_OPTION.findall(self.ours))
        plain = ", ".join(f"`{name}`" for name in found) == self.ours
        return found if plain and len(found) == len(self.names) else ()

    @property
    def missing(self) -> bool:
        """Whether there is no such option here."""
        return self.ours == "–"


@functools.cache
def sections() -> dict[str, tuple[Row, ...]]:
    """Heading → its rows, in the order of the page."""
    found: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for line in _TABLE.strip().splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line[3:], [])
        elif line:
            names, ours, *note = (cell.strip() for cell in line.split(" |"))
            rows.append(Row(tuple(names.split()), ours, note[0] if note else ""))
    return {heading: tuple(rows) for heading, rows in found.items()}


def arguments(trainer: str) -> dict[str, Row]:
    """Argument → its row, for one trainer: its own arguments first, then the shared ones."""
    found: dict[str, Row] = {}
    for heading in (SECTIONS[trainer], *_COMMON):
        for row in sections()[heading]:
            for name in row.names:
                found.setdefault(name, row)
    return found
