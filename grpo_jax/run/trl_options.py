"""What becomes of TRL's, transformers' and the recipe's option names: one ruling each.

Covers TRL 1.16.0 (GRPOConfig, ModelConfig, ScriptArguments, GRPOScriptArguments,
DatasetMixtureConfig), transformers 5.23.0 (TrainingArguments), the original recipe's
script and launcher, and names of earlier releases that its YAML files still hold.

- supported: an option here, with the same name and meaning.
- alias: an option here under another name.
- warning: concerns only hardware, launching or logging; named, with what takes its place.
  Silent when the value asks for nothing (false, none, empty).
- error: would change numbers and is not supported. Silent when the value is `neutral`,
  which is to say: what happens here anyway.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

SUPPORTED = (
    # GRPOConfig
    "learning_rate num_generations temperature top_p top_k min_p chat_template_kwargs beta num_iterations "
    "epsilon delta epsilon_high importance_sampling_level reward_weights scale_rewards loss_type "
    "use_bias_correction_kl sapo_temperature_pos sapo_temperature_neg vespo_k_pos vespo_lambda_pos vespo_k_neg "
    "vespo_lambda_neg entropy_coef off_policy_mask_threshold multi_objective_aggregation "
    "top_entropy_quantile mask_truncated_completions max_tool_calling_iterations log_completions "
    # TrainingArguments
    "output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type warmup_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm "
    "gradient_checkpointing logging_steps log_level report_to eval_steps save_strategy save_steps "
    "save_total_limit seed resume_from_checkpoint "
    # ModelConfig
    "model_name_or_path model_revision dtype use_peft lora_r lora_alpha lora_dropout lora_target_modules "
    # the recipe
    "dataset_id_or_path tool_functions_module tools_script reward_function_name reward_fn "
    "tokenizer_name_or_path max_grpo_completion_length "
    # earlier releases
    "max_prompt_length overwrite_output_dir"
)

ALIASES = {
    "max_completion_length": "max_grpo_completion_length",
    "per_device_eval_batch_size": "eval_batch_size",
    "dataset_name": "dataset_id_or_path",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all updates, as in transformers 5
    "torch_dtype": "dtype",
}

# What takes their place -> the names.
WARNINGS = {
    "attention is one blockwise form chosen for the device": "attn_implementation",
    "models are this package's own code; nothing is run from the hub": "trust_remote_code",
    "the sampler is built in and shares the trainer's code and weights": (
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host "
        "vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size use_transformers_continuous_batching "
        "transformers_continuous_batching_config use_transformers_paged cache_implementation use_cache"
    ),
    "sampler and trainer are one program; sampler_correction corrects what rounding leaves between them": (
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min vllm_importance_sampling_cap"
    ),
    "one process drives all local devices; mesh_data, mesh_fsdp and mesh_tensor lay them out": (
        "num_process zero_stage deepspeed fsdp fsdp_config fsdp_min_num_params "
        "fsdp_transformer_layer_cls_to_wrap ds3_gather_for_generation accelerator_config parallelism_config "
        "local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "ddp_backend ddp_timeout average_tokens_across_devices tpu_num_cores"
    ),
    "set environment variables in the shell, before the command": "env",
    "set JAX_PLATFORMS=cpu in the shell": "use_cpu no_cuda",
    "dtype chooses the type of the computation, param_dtype that of the trained weights": (
        "bf16 bf16_full_eval fp16_full_eval half_precision_backend tf32"
    ),
    "XLA compiles and fuses every step": (
        "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel use_liger_loss "
        "liger_kernel_config torch_empty_cache_steps"
    ),
    "gradient_checkpointing recomputes layer by layer": (
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs"
    ),
    "shapes come from fixed buckets; micro_batches splits a batch that does not fit": (
        "pad_to_multiple_of auto_find_batch_size"
    ),
    "the models have no dropout; lora_dropout 0 turns the adapters' off": "disable_dropout",
    "every column of the data set reaches the reward functions": "remove_unused_columns label_names",
    "rows are read in the main process; an epoch's incomplete last batch is dropped": (
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "dataset_streaming streaming length_column_name"
    ),
    "the original script never applied it; max_prompt_length bounds prompts": "max_grpo_prompt_length",
    "evaluation runs before and after training, and every eval_steps updates; greedy, one completion a row": (
        "do_train do_eval do_predict eval_strategy evaluation_strategy eval_delay eval_on_start "
        "num_generations_eval prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps include_for_metrics batch_eval_metrics dataset_test_split"
    ),
    "metrics.jsonl holds every update; logging_steps and log_level choose what is printed": (
        "logging_strategy logging_first_step logging_nan_inf_filter logging_dir log_on_each_node "
        "log_level_replica include_num_input_tokens_seen disable_tqdm debug skip_memory_metrics"
    ),
    "a run bears its folder's name; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME name what it belongs to": (
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "rollouts/ holds every completion; log_completions prints a few": (
        "num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo"
    ),
    "checkpoints hold everything a bit-exact resume needs and are saved on SIGTERM too": (
        "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
        "restore_callback_states_from_checkpoint full_determinism"
    ),
    "the last weights are exported; any kept step can be, with python -m grpo_jax.export": (
        "metric_for_best_model greater_is_better"
    ),
    "model/ stays on this machine; upload it with `hf upload`": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "weights are not quantised": "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
    "a debugging aid of torch's DDP": "ignore_bias_buffers",
}

_ENTROPY = "the weight of the entropy is constant; use entropy_coef"
_REFERENCE = "the reference model stays frozen"
_DATA = "give one data set as dataset_id_or_path"

# Name -> (values that change nothing, why any other is an error and what to use).
ERRORS: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_init_kwargs": ((None, {}), "use dtype and model_revision"),
    "router_aux_loss_coef": ((None, 0), "only dense models are supported"),
    "cast_lm_head_to_fp32": ((False,), "the head computes in dtype; use dtype float32"),
    "shuffle_dataset": ((True,), "rows are always shuffled, from seed"),
    "generation_batch_size": ((None,), "every update samples its own batch; use gradient_accumulation_steps"),
    "steps_per_generation": (
        (None,),
        "every update samples its own batch; use num_iterations for more updates",
    ),
    "generation_kwargs": ((None, {}), "use temperature, top_p, top_k and min_p"),
    "repetition_penalty": ((1, None), "sampling knows temperature, top_p, top_k and min_p"),
    "vllm_structured_outputs_regex": ((None,), "sampling is not constrained by a pattern"),
    "vllm_guided_decoding_regex": ((None,), "sampling is not constrained by a pattern"),
    "sync_ref_model": ((False,), _REFERENCE),
    "ref_model_mixup_alpha": ((0.6,), _REFERENCE),
    "ref_model_sync_steps": ((512,), _REFERENCE),
    "use_adaptive_entropy": ((False,), _ENTROPY),
    "entropy_coef_min": ((0,), _ENTROPY),
    "entropy_coef_max": ((1,), _ENTROPY),
    "entropy_coef_delta": ((0.005,), _ENTROPY),
    "entropy_target": ((0.2,), _ENTROPY),
    "reward_model_name_or_path": ((None,), "rewards are Python functions; use reward_fn"),
    "reward_funcs": ((None, []), "use reward_fn for a file or reward_function_name for a built-in"),
    "optim": (
        ("adamw_torch", "adamw_torch_fused", "adamw_hf"),
        "the optimiser is AdamW; optim_dtype chooses the type of its moments",
    ),
    "optim_args": ((None, ""), "use adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "optim_target_modules": ((None,), "all weights are trained, or with use_peft those of the adapters"),
    "lr_scheduler_kwargs": ((None, {}), "schedules take learning_rate and warmup_steps only"),
    "label_smoothing_factor": ((0,), "GRPO has no labels to smooth"),
    "neftune_noise_alpha": ((None,), "no noise is added to embeddings"),
    "fp16": ((False,), "float16 needs loss scaling; use dtype bfloat16 or float32"),
    "load_best_model_at_end": ((False,), "the last weights are exported; use python -m grpo_jax.export"),
    "ignore_data_skip": ((False,), "a resumed run goes on where it stopped"),
    "data_seed": ((None,), "seed covers the data's order too"),
    "train_sampling_strategy": (("random",), "rows are shuffled from seed"),
    "group_by_length": ((False,), "rows are shuffled from seed"),
    "load_in_8bit": ((False,), "weights are not quantised; use dtype bfloat16"),
    "load_in_4bit": ((False,), "weights are not quantised; use dtype bfloat16"),
    "lora_target_parameters": ((None, []), "adapters sit on modules; use lora_target_modules"),
    "lora_modules_to_save": ((None, []), "with use_peft adapters alone are trained"),
    "lora_task_type": (("CAUSAL_LM",), "only causal language models are supported"),
    "use_rslora": ((False,), "the adapters are scaled by lora_alpha / lora_r; set lora_alpha accordingly"),
    "use_dora": ((False,), "adapters add to a weight and do not rescale it; use plain LoRA"),
    "dataset_config": ((None,), "use dataset_id_or_path tfds:name/config"),
    "dataset_train_split": (("train",), "use dataset_id_or_path tfds:name:split"),
    "datasets": ((None, []), _DATA),
    "test_split_size": ((None,), "give the test rows as eval_dataset_id_or_path"),
}

# Trackers that TRL knows and that are not built in; metrics.jsonl takes their place.
OTHER_TRACKERS = (
    "all azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow neptune swanlab trackio"
)


@dataclasses.dataclass(frozen=True)
class Ruling:
    """What becomes of an option name.

    Args:
        kind: see the module's docstring.
        text: the option's name here (supported, alias), else what takes its place or why not.
        neutral: values about which nothing is said.
    """

    kind: Literal["supported", "alias", "warning", "error"]
    text: str
    neutral: tuple[Any, ...] = ()

    def silent(self, value: Any) -> bool:
        """True when this value asks for nothing that would not happen anyway."""
        # 0 == False in Python, but only one of them is a value of a switch.
        return any(value == one and (value is one or type(value) is not bool) for one in self.neutral)


def _rulings() -> dict[str, Ruling]:
    asks_nothing = (None, False, "", "no", "none", "None", [], {})
    return (
        {name: Ruling("supported", name) for name in SUPPORTED.split()}
        | {name: Ruling("alias", target) for name, target in ALIASES.items()}
        | {n: Ruling("warning", text, asks_nothing) for text, ns in WARNINGS.items() for n in ns.split()}
        | {name: Ruling("error", text, neutral) for name, (neutral, text) in ERRORS.items()}
    )


RULINGS: dict[str, Ruling] = _rulings()
