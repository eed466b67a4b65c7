"""The one place where options are read: it builds a job's parts and checks them before anything compiles."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import logging
import math
import operator
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import hosts
from grpo_jax.data.batches import Steps, count_steps
from grpo_jax.data.gold import gold_calls, gold_texts, show_call, unpadded
from grpo_jax.data.rows import load_examples, parsed_text, row_tools
from grpo_jax.models import hf
from grpo_jax.models.cache import with_tokenizer
from grpo_jax.models.lora import Frozen, LoraConfig, init_adapters, join, merge
from grpo_jax.models.peft import adapter_base, is_adapter_folder, load_adapter, save_adapter
from grpo_jax.models.qwen import ModelConfig, Params, abstract_params
from grpo_jax.models.scratch import make_tiny_checkpoint
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.rollout.conversation import Conversation, load_conversation
from grpo_jax.rollout.loop import ToolLoop
from grpo_jax.rollout.sampler import Sampler, make_sampler
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.run.checkpoint import Checkpoints, is_step_folder
from grpo_jax.run.console import Console
from grpo_jax.run.inputs import check_context, templated
from grpo_jax.run.lock import LEAVINGS, start_over
from grpo_jax.run.log import PhaseTimer
from grpo_jax.run.options import GRPOConfig, compute_dtype
from grpo_jax.run.rules import SOFT_OVERLONG, reward_problems
from grpo_jax.run.weights import merged, restore_weights, source_of
from grpo_jax.scoring.credit import Credit, soft_overlong
from grpo_jax.scoring.rewards import (
    RewardFunction,
    RewardOutcome,
    TrainerState,
    call_rewards,
    joined,
    load_rewards,
    rewards_of,
)
from grpo_jax.text import shorten
from grpo_jax.tools import (
    Isolation,
    Limits,
    PurityCheck,
    Toolbox,
    ToolRunner,
    final_tools,
    load_tools,
    signature_line,
    tools_of,
)
from grpo_jax.tools.arguments import check_arguments
from grpo_jax.types import Example, Prompt, Schema, ToolCall, Trajectory
from grpo_jax.update.batch import Tree, make_tree, response_shapes, update_shapes
from grpo_jax.update.optimizer import Optimizer, make_optimizer, make_rule
from grpo_jax.update.schedules import make_schedule
from grpo_jax.update.update import GrpoObjective

log = logging.getLogger(__name__)
SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The prompts of a data set in its order, and their prefix tree."""

    prompts: list[Prompt]
    tree: Tree


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the user brings, loaded and checked.

    Args:
        train: the training examples, or what else a command reads.
        evaluation: the evaluation's examples; None for no evaluation.
    """

    toolbox: Toolbox
    rewards: list[RewardFunction]
    train: list[Example]
    evaluation: list[Example] | None


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a job.

    Args:
        folder: HF folder of the model that the job starts from.
        checkpoint: a step's folder whose weights take the place of the folder's; or None.
        adapter: a PEFT folder whose adapters are merged into the folder's weights; or None.
        model_name: what others call the model: its hub id, or its folder.
        purity: runs a sample of the calls again; None when that is not asked for.
    """

    config: GRPOConfig
    console: Console
    timer: PhaseTimer
    toolbox: Toolbox
    rewards: list[RewardFunction]
    runner: ToolRunner
    folder: Path
    checkpoint: Path | None
    adapter: Path | None
    model_name: str
    model: ModelConfig
    conversation: Conversation
    mesh: Mesh
    dtype: Any
    purity: PurityCheck | None

    @property
    def training(self) -> Layout:
        """The training column of the sharding tables."""
        return Layout(self.mesh)

    @property
    def row_devices(self) -> int:
        """Devices along data and fsdp, over which completions are spread."""
        return self.training.row_devices

    def sampler(self, sampling: Sampling) -> Sampler:
        """The jitted rollout functions for one way of sampling; all ways share what is compiled."""
        return make_sampler(
            self.model,
            Layout(self.mesh, rollout=True),
            dtype=self.dtype,
            sampling=sampling,
            stop_ids=self.conversation.stop_ids,
            budget=self.config.max_grpo_completion_length,
        )

    @functools.cached_property
    def greedy(self) -> Sampler:
        """The sampler of every evaluation."""
        return self.sampler(Sampling(temperature=0))

    @functools.cached_property
    def sampled(self) -> Sampler:
        """The sampler of training, and of an evaluation's samples."""
        config = self.config
        return self.sampler(Sampling(config.temperature, config.top_k, config.top_p, config.min_p or 0.0))

    def tool_loop(self, sampler: Sampler, tree: Tree) -> ToolLoop:
        """The multi-turn loop over a data set's prefix tree."""
        config = self.config
        return ToolLoop(
            sampler,
            self.conversation,
            self.runner,
            tree,
            config.max_tool_calling_iterations,
            config.malformed_call_feedback,
            config.stop_after_tools,
            self.final_tools,
            max_turn=config.max_turn_length,
        )

    @functools.cached_property
    def final_tools(self) -> dict[str, str]:
        """The tools whose call ends a conversation, each with the parameter that is its answer."""
        return final_tools(self.toolbox, self.config.final_tool)

    def last_turn(self, answer: str, refused: bool = False) -> str | ToolCall | None:
        """The turn with which a written conversation tells its answer: a text, a final tool's call, or none.

        Args:
            refused: the answer is the text of a call's error, which a final tool need not take; it is then a text.

        Raises:
            ValueError: the final tool does not take this answer, as text or as the JSON that it is.
        """
        if self.config.stop_after_tools:
            return None
        for name, of in self.final_tools.items():
            for value in (answer, parsed_text(answer)):
                with contextlib.suppress(ValueError):
                    check_arguments(self.toolbox.functions[name], {of: value})
                    return ToolCall(name, {of: value})
            if refused:
                break
            raise ValueError(
                f"the final tool {name} does not take the answer {shorten(answer, 100)!r} as its {of!r}, so that a "
                "conversation written with it would never end; give the parameter a type that it fits, such as str"
            )
        return answer

    def prompt(self, example: Example) -> Prompt:
        """An example with its token ids and the schemas of the tools that it shows."""
        return encoded([example], self.toolbox, self.conversation)[0]

    @property
    def reward_names(self) -> list[str]:
        """Of the rewards of a batch, in the order of their values."""
        added = [SOFT_OVERLONG] if self.config.soft_overlong_cache is not None else []
        return [reward.name for reward in self.rewards] + added

    @property
    def reward_weights(self) -> list[float]:
        """One per name."""
        given = self.config.reward_weights or [1.0] * len(self.rewards)
        return given + [self.config.soft_overlong_penalty] * (len(self.reward_names) - len(given))

    def score(self, trajectories: Sequence[Trajectory], trainer_state: TrainerState) -> RewardOutcome:
        """The reward functions on a batch, with every column of its examples; see `reward_names`."""
        if log.isEnabledFor(logging.DEBUG):
            for t in trajectories:
                calls = [f"\n{show_call(call, result)} in {result.seconds:.3f} s" for call, result in t.calls]
                log.debug(
                    "Completion, %s:\n%s%s",
                    t.status,
                    self.conversation.decode(t.completion_ids),
                    "".join(calls),
                )
        examples = [t.prompt.example for t in trajectories]
        columns = {name for example in examples for name in example.extra}
        values = {name: [e.extra.get(name) for e in examples] for name in sorted(columns)}
        if "tool_call" in values:
            of_row = {id(example): example for example in examples}  # a group has one
            calls = {row: unpadded(example, self.toolbox.functions) for row, example in of_row.items()}
            values["tool_call"] = [calls[id(example)] for example in examples]
        outcome = call_rewards(
            self.rewards,
            completions=[t.messages for t in trajectories],
            answer=[e.answer for e in examples],
            prompts=[e.messages for e in examples],
            completion_ids=[t.completion_ids for t in trajectories],
            trainer_state=trainer_state,
            columns=values | {"statuses": [t.status.value for t in trajectories]},
        )
        if self.config.soft_overlong_cache is None:
            return outcome
        lengths = [len(t.completion_ids) for t in trajectories]
        truncated = [t.status.truncated for t in trajectories]
        budget, cache = self.config.max_grpo_completion_length, self.config.soft_overlong_cache
        added = soft_overlong(lengths, truncated, budget, cache)
        applies = ~np.isnan(outcome.means).all(axis=1)  # a row without any reward gets no penalty either
        return dataclasses.replace(
            outcome, values=np.column_stack([outcome.values, np.where(applies, added, np.nan)])
        )

    def score_all(self, trajectories: Sequence[Trajectory], trainer_state: TrainerState) -> RewardOutcome:
        """`score` over several hosts: each scores the completions whose tools it ran, and all get them all."""
        own = hosts.share(trajectories)
        gathered = hosts.gather(lambda: (self.score(own, trainer_state), self.runner.cache_hit_rate))
        outcomes, hit_rates = zip(*gathered, strict=True)
        outcome = joined(outcomes)
        outcome.metrics["tools/cache_hit_rate"] = sum(hit_rates) / len(hit_rates)
        return outcome

    def load_params(self, dtype: jax.typing.DTypeLike | None = None) -> Params:
        """The weights that the job starts from, straight into their shards.

        Args:
            dtype: None for that of the trained weights, `param_dtype`.
        """
        dtype, began = jnp.dtype(dtype or self.config.param_dtype), time.perf_counter()
        if self.checkpoint is None:
            shapes = abstract_params(self.model)
            shardings = self.training.params(shapes)
            params = hf.load_params(self.folder, self.model, shardings, dtype)
            if self.adapter is not None:
                params = merged(params, load_adapter(self.adapter, shapes["layers"]), dtype, shardings)
        else:
            with Checkpoints(self.checkpoint.parent) as checkpoints:
                params = restore_weights(checkpoints, int(self.checkpoint.name), self.training.params, dtype)
        size = sum(x.size for x in jax.tree.leaves(jax.block_until_ready(params)))
        seconds = time.perf_counter() - began
        self.console.line(f"Loaded {size:,} parameters as {dtype} in {seconds:.1f} s")
        return params

    def load_trained(self) -> tuple[Params, Frozen | None]:
        """What updates change and what they only read: all weights and None, or fresh adapters and their base."""
        frozen = self.load_frozen()
        return self.first_weights(frozen), frozen

    def first_weights(self, frozen: Frozen | None) -> Params:
        """What updates change, as it is before the first."""
        if frozen is None:
            return self.load_params()
        return init_adapters(frozen.base["layers"], frozen.config, self.config.seed)

    def trained_shapes(self, frozen: Frozen | None) -> Params:
        """The shapes of `first_weights`."""
        if frozen is not None:
            return jax.eval_shape(lambda: self.first_weights(frozen))
        dtype = jnp.dtype(self.config.param_dtype)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(self.model))

    def load_frozen(self) -> Frozen | None:
        """The base under trained adapters; None when all weights are trained.

        Raises:
            ValueError: adapters on a checkpoint, which nothing but this program could name as their base.
        """
        config = self.config
        if not config.use_peft:
            return None
        if self.checkpoint is not None:
            raise ValueError(
                f"use_peft starts from a model folder or hub id, got the checkpoint {self.checkpoint}; make it "
                f"a folder with python -m grpo_jax.export --checkpoint {self.checkpoint}"
            )
        if self.adapter is not None:
            raise ValueError(
                f"use_peft starts from a model folder or hub id, got the adapters {self.adapter}; name the merged "
                "model, which a run leaves in model/, next to adapter/"
            )
        lora = lora_config(config)
        frozen = Frozen(self.load_params(dtype=self.dtype), jnp.uint32(config.seed), lora)
        trees = self.trained_shapes(frozen), frozen.base
        trained, rest = (sum(x.size for x in jax.tree.leaves(tree)) for tree in trees)
        self.console.line(
            f"LoRA of rank {lora.rank} on {', '.join(lora.modules)}: {trained:,} weights are trained, "
            f"{rest:,} are frozen"
        )
        return frozen

    def save_model(
        self, trained: Params, frozen: Frozen | None, folder: Path, adapter: Path | None = None
    ) -> None:
        """Write the trained model as an HF folder, adapters merged, and these alone as a PEFT folder.

        All hosts call it; the first writes, and it is there for all when it returns.

        Args:
            trained, frozen: as `load_trained` returns them, after training.
            adapter: PEFT folder; left out where there are no adapters.
        """
        params = hosts.fetch(merge(join(trained, frozen), hosts.fetch))
        size = self.config.max_shard_size
        hosts.of_first(lambda: hf.save_model(folder, params, self.model, self.folder, size))
        if frozen is not None and adapter is not None:
            adapters = hosts.fetch(trained)
            hosts.of_first(lambda: save_adapter(adapter, adapters, frozen.config, self.model_name))


def setup_jax(config: GRPOConfig, console: Console) -> None:
    """The persistent compile cache, and a loud line when an accelerator is present and unused."""
    if config.compilation_cache_dir not in (None, "none"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache_dir))
        # every program: the small ones are 6 of the smoke run's 17 and cost a second start 10 of its 16 s
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    idle = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if jax.default_backend() == "cpu" and idle:
        console.line(
            f"*** {idle[0]} is present but JAX runs on the CPU: install the accelerator build with "
            'pip install -e ".[cuda]" (NVIDIA) or pip install -e ".[tpu]" (Cloud TPU) ***'
        )


def read_examples(config: GRPOConfig, source: Any) -> list[Example]:
    """A data set, read as the options say; see `load_examples`."""
    return load_examples(source, system_prompt=config.system_prompt, columns=config.dataset_columns)


def read_inputs(
    config: GRPOConfig, train: Any, evaluation: Any = None, tools: Any = None, rewards: Any = None
) -> Inputs:
    """Load and check tools, rewards and data; nothing is written.

    Args:
        train: a data set, as `load_examples` takes it.
        tools: functions, in place of those that the options name.
        rewards: functions and names of built-in ones, one alone or several, in place of the options'.

    Raises:
        ValueError, TypeError, FileNotFoundError: bad input; says what, where, and the fix.
    """
    script, module = config.tools_script, config.tool_functions_module
    toolbox = load_tools(script, module) if tools is None else tools_of(tools)
    files, names = config.reward_fn, config.reward_function_name
    final_tools(toolbox, config.final_tool)  # raises where one cannot be
    functions = load_rewards(files, names) if rewards is None else rewards_of(rewards)
    if problems := [*reward_problems(config, [reward.name for reward in functions])]:
        raise ValueError("\n".join(text for _, text in problems))
    examples = read_examples(config, train)
    evaluated = None if evaluation is None else read_examples(config, evaluation)
    return Inputs(toolbox, functions, examples, evaluated)


def open_job(config: GRPOConfig, console: Console, timer: PhaseTimer, inputs: Inputs) -> Job:
    """Load and check model and tokenizer, and print what was found.

    Raises:
        ValueError, FileNotFoundError: bad input; says what, where, and the fix.
    """
    toolbox, rewards = inputs.toolbox, inputs.rewards
    console.tools([signature_line(f) for f in toolbox.functions.values()])
    for reward in rewards:
        console.line(f"Reward function: {reward.name} ({reward.source})")
    log.debug("Tool schemas:\n%s", json.dumps(toolbox.schemas, indent=2))
    setup_jax(config, console)
    mesh = make_mesh(config.mesh_data, config.mesh_fsdp, config.mesh_tensor)
    name = config.required("model_name_or_path")
    adapter = Path(name).absolute() if is_adapter_folder(name) else None
    base = config if adapter is None else dataclasses.replace(config, model_name_or_path=adapter_base(name))
    folder, checkpoint = _model_folder(base, inputs, console)
    if config.tokenizer_name_or_path is not None:
        folder = with_tokenizer(folder, hf.fetch_tokenizer(config.tokenizer_name_or_path))
    folder = templated(folder, config.chat_template)
    model_name = str(folder.absolute()) if name == SCRATCH or Path(name).exists() else name
    model = hf.read_config(folder)
    conversation = load_conversation(folder, chat_template_kwargs=config.chat_template_kwargs)
    if conversation.vocab_size > model.V:
        raise ValueError(
            f"the tokenizer has {conversation.vocab_size} tokens, but the model's embedding only {model.V} rows; "
            "use the model's own tokenizer"
        )
    dtype = compute_dtype(config.dtype, jax.default_backend() == "cpu")
    console.line(
        f"Model: {folder} ({model.model_type}, {model.L} layers, width {model.D}, vocabulary {model.V}), "
        f"{dtype} on {mesh.size} {jax.default_backend()} device{'s' if mesh.size > 1 else ''}"
    )
    runner = ToolRunner(
        toolbox,
        executor=config.tool_executor,
        limits=Limits(config.tool_timeout, config.tool_memory_limit, config.tool_result_limit),
        lax=config.tool_arg_validation == "lax",
        cache=config.tool_cache,
        isolation=Isolation(tuple(config.tool_env or ()), config.tool_sandbox),
    )
    return Job(
        config,
        console,
        timer,
        toolbox,
        rewards,
        runner,
        folder,
        checkpoint,
        adapter,
        model_name,
        model,
        conversation,
        mesh,
        jnp.dtype(dtype),
        PurityCheck(toolbox, runner, console.line) if config.verify_purity else None,
    )


@contextlib.contextmanager
def starting_over(config: GRPOConfig, other: Sequence[str], lost: str) -> Iterator[None]:
    """A block that opens a run's model and data; with `overwrite_output_dir` an earlier run's files are then removed.

    Not before, since what is wrong with the input must not cost that run. Only where the model is `scratch`, which is
    made in output_dir and cannot be missing, they are removed first.

    Args:
        other: files or folders by which another command's run is known, which a model of this one would replace.
        lost: says what is then lost.

    Raises:
        ValueError: the run would start from what it is to write or remove, or replace another command's model.
    """
    if not config.overwrite_output_dir and any(
        hosts.of_first((Path(config.output_dir) / name).exists) for name in other
    ):
        raise ValueError(
            f"output_dir {config.output_dir} holds {lost}; choose another --output_dir, or start over with "
            "--overwrite_output_dir"
        )
    out, made = Path(config.output_dir), config.model_name_or_path == SCRATCH
    names = ["model_name_or_path", "tokenizer_name_or_path"]
    names += ["resume_from_checkpoint"] if config.overwrite_output_dir else []
    for name in names:
        path = Path(value := getattr(config, name) or "").expanduser().resolve()
        if value and any(path.is_relative_to(out.resolve() / leaving) for leaving in LEAVINGS):
            raise ValueError(
                f"{name} {value} is in output_dir {out}, whose run would overwrite it; choose another output_dir"
            )

    def remove(now: bool) -> None:
        if config.overwrite_output_dir and now:
            hosts.of_first(lambda: start_over(out))

    remove(made)
    yield
    remove(not made)


def _model_folder(config: GRPOConfig, inputs: Inputs, console: Console) -> tuple[Path, Path | None]:
    """The model's HF folder, and the checkpoint when its name is one's folder.

    `scratch` makes a small HF folder in output_dir once.
    """
    name = config.required("model_name_or_path")
    if is_step_folder(name):
        checkpoint = Path(name).absolute()
        with Checkpoints(checkpoint.parent) as checkpoints:
            meta = checkpoints.meta(int(checkpoint.name))
            return source_of(meta, checkpoint.parent.parent), checkpoint
    if name != SCRATCH:
        return hf.fetch_model(name, config.model_revision, weights=not config.check), None
    folder = Path(config.output_dir) / "base_model"

    def make() -> None:
        if not folder.exists():
            # What the tokenizer learns its merges from: schemas, questions, gold calls, answers. Every prompt holds the
            # schemas; a twentieth of that is enough to make their words tokens.
            schemas = [json.dumps(schema) for schema in inputs.toolbox.schemas]
            texts = schemas * (len(inputs.train) // 20 + 1)
            for example in inputs.train:
                texts += [m["content"] for m in example.messages if isinstance(m.get("content"), str)]
                texts.append(example.answer)
                texts += gold_texts(example, inputs.toolbox.functions)
            make_tiny_checkpoint(folder, texts, seed=config.seed)
            console.line(f"Made a small model with its own tokenizer in {folder}")

    make() if config.check else hosts.of_first(make)  # a check has a temporary folder in every host
    return folder, None


def schemas_of(example: Example, toolbox: Toolbox) -> list[Schema]:
    """What an example's prompt shows of the tools: all, or those that its column `tools` names."""
    names = row_tools(example, toolbox.functions)
    return [schema for schema in toolbox.schemas if schema["function"]["name"] in names]


def encoded(examples: Sequence[Example], toolbox: Toolbox, conversation: Conversation) -> list[Prompt]:
    """Examples with their token ids and the schemas of the tools that they show."""
    prompts = []
    shown = ((example, schemas_of(example, toolbox)) for example in examples)
    for schemas, group in itertools.groupby(shown, operator.itemgetter(1)):
        rows = [example for example, _ in group]
        try:
            ids = conversation.prompts_ids([row.messages for row in rows], schemas)
        except ValueError:
            for row in rows:  # which of them the template refuses
                try:
                    conversation.prompt_ids(row.messages, schemas)
                except ValueError as error:
                    raise ValueError(f"{row.source}: {error}" if row.source else str(error)) from error
            raise
        prompts += [Prompt(*one, schemas) for one in zip(rows, ids, strict=True)]
    return prompts


def lora_config(config: GRPOConfig) -> LoraConfig:
    """The adapters that the options describe."""
    # rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales by alpha / √r: another alpha
    alpha = config.lora_alpha * (math.sqrt(config.lora_r) if config.use_rslora else 1)
    return LoraConfig.of(config.lora_r, alpha, config.lora_dropout, config.lora_target_modules)


def schedule_of(config: GRPOConfig, updates: int) -> optax.Schedule:
    """The learning rate by updates done, of a run with so many.

    Raises:
        ValueError: they are too few for the schedule's phases.
    """
    warmup, arguments = config.warmup_updates(updates), config.lr_scheduler_kwargs
    return make_schedule(config.lr_scheduler_type, config.learning_rate, warmup, updates, arguments)


def optimizer_of(config: GRPOConfig, schedule: optax.Schedule) -> Optimizer:
    """The optimizer that the options describe, with a schedule."""
    settings = (config.adam_beta1, config.adam_beta2, config.adam_epsilon, jnp.dtype(config.optim_dtype))
    return make_optimizer(
        make_rule(config.optim, *settings),
        schedule=schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def grpo_objective(config: GRPOConfig) -> GrpoObjective:
    """The loss that the options describe."""
    return GrpoObjective(
        epsilon=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        max_completion_length=config.max_grpo_completion_length,
        top_entropy_quantile=config.top_entropy_quantile,
        use_bias_correction_kl=config.use_bias_correction_kl,
        sapo_temperatures=(config.sapo_temperature_pos, config.sapo_temperature_neg),
        vespo_positive=(config.vespo_k_pos, config.vespo_lambda_pos),
        vespo_negative=(config.vespo_k_neg, config.vespo_lambda_neg),
        entropy_coef=config.entropy_coef,
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        sampler_correction=config.sampler_correction,
        sampler_correction_bounds=(config.sampler_correction_min, config.sampler_correction_max),
    )


def credit_of(config: GRPOConfig) -> Credit:
    """The credit of turns and calls that the options describe."""
    penalties = (config.malformed_call_penalty, config.failed_call_penalty)
    return Credit(config.turn_advantage_coef, *penalties, config.scale_rewards)


def steps_of(config: GRPOConfig, rows: int, row_devices: int) -> Steps:
    """The steps of a job over so many rows of data, on so many devices along data and fsdp."""
    return count_steps(
        rows,
        P=config.batch_size(row_devices) // config.num_generations,
        G=config.num_generations,
        epochs=config.num_train_epochs,
        max_updates=config.max_steps,
        updates_per_batch=config.num_iterations,
    )


def load_data(job: Job, examples: Sequence[Example]) -> DataSet:
    """Encode the prompts of a data set.

    Raises:
        ValueError: a prompt is longer than max_prompt_length (and overlong_prompts is "error"), or with its
            completion longer than the model's context; a gold call is not usable.
    """
    config, source = job.config, examples[0].source
    prompts = encoded(examples, job.toolbox, job.conversation)
    for prompt in prompts:
        if prompt.example.extra.get("tools") is not None:  # a gold call outside of them could never be made
            gold_calls(prompt.example, job.toolbox.functions)
        row_tools(prompt.example, job.toolbox.functions, "must_state")
    limit = config.max_prompt_length
    if limit is not None:
        kept = [p for p in prompts if len(p.ids) <= limit]
        if len(kept) < len(prompts) and config.overlong_prompts == "error":
            first = next(p for p in prompts if len(p.ids) > limit)
            raise ValueError(
                f"{first.example.source}: the prompt has {len(first.ids)} tokens, more than max_prompt_length "
                f"{limit}; raise that, shorten the prompt, or set overlong_prompts to drop"
            )
        if not kept:
            raise ValueError(f"{source}: every prompt is longer than max_prompt_length {limit}; raise it")
        if len(kept) < len(prompts):
            job.console.line(
                f"Dropped {len(prompts) - len(kept)} of {len(prompts)} prompts over {limit} tokens"
            )
        prompts = kept
    ids = [p.ids for p in prompts]
    check_context(prompts, config.max_grpo_completion_length, job.model.positions)
    local = dataclasses.replace(config, compilation_cache_dir=None)  # the one option that hosts may differ in
    hosts.check_alike(f"the options or the prompts from {source} on", (local, ids))
    tree = make_tree(ids, config.max_grpo_completion_length, job.row_devices)
    log.debug("First prompt of %s:\n%s", source, job.conversation.decode(ids[0]))
    log.debug(
        "Shapes of %s: preamble [1, %d], prompts [P, %d], tool responses [B, one of %s], completions [B, T2] "
        "with J loss positions a row, (T2, J) one of %s",
        *(source, tree.T0, tree.T1, response_shapes(tree.budget), update_shapes(tree.budget)),
    )
    return DataSet(prompts, tree)
