"""TRL's own trainer next to ours: whole updates, and the loss of every combination of options.

In an update both have the same weights, tokens, rewards and old log-probabilities. TRL runs unpatched: completions come in through its `rollout_func` (tool tokens through `env_mask`), and a
subclass records what passes. It adds old log-probabilities where a case asks for them, and claims that the
completions came from vLLM where TRL would otherwise not correct for the sampler. Ours is built from the same
options, through `Config`. A case mixes several options; each name says which.

AdamW's first steps are g / (|g| + epsilon): where |g| is about epsilon, rounding errors of g are magnified, so
epsilon is 1e-5 here.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from grpo_jax.models.lora import Frozen, init_adapters, join
from grpo_jax.models.peft import peft_tensors
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.run.job import grpo_objective, lora_config, optimizer_of
from grpo_jax.run.options import GRPOConfig as Config  # next to TRL's
from grpo_jax.scoring.advantages import batch_advantages
from grpo_jax.types import Example, Prompt, Status, Trajectory
from grpo_jax.update.batch import make_batch, make_tree
from grpo_jax.update.schedules import make_schedule
from grpo_jax.update.update import (
    LossInputs,
    ModelStep,
    Totals,
    init_state,
    make_score,
    make_update,
    update_sizes,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("trl")

P, G, BUDGET, UPDATES = 4, 4, 32, 3
EOS, PAD, TRUNCATED = 1, 0, {(0, 1), (1, 0), (1, 2), (3, 0), (3, 1), (3, 2), (3, 3)}
CHANGE_RTOL = 1e-4
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
AGAIN = {"num_iterations": 3, "learning_rate": 5e-3}
GSPO = {"importance_sampling_level": "sequence"}
MODELS = {
    "qwen3": parity.CASES["qwen3-tied"] | {"hidden_size": 32, "intermediate_size": 48},
    "qwen2": parity.CASES["qwen2"] | {"hidden_size": 36, "intermediate_size": 48},
}
# of prompt p, generation g and the completion's ids
REWARDS = {
    "sums": lambda p, g, ids: (sum(ids) % 11) / 10,
    "lengths": lambda p, g, ids: len(ids) / 20,
    "some_none": lambda p, g, ids: None if sum(ids) % 3 == 0 else (sum(ids) % 7) / 6,
    "some_none_too": lambda p, g, ids: None if sum(ids) % 3 != 1 else len(ids) / 10,
    "few": lambda p, g, ids: (
        (sum(ids) % 7) / 6 if (p, g) in {(0, 0), (1, 0), (1, 1), (1, 3)} or p == 3 else None
    ),
    "equal_groups": lambda p, g, ids: 0.1 if p % 2 == 0 else (sum(ids) % 11) / 10,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        options: of both sides, in TRL's names.
        model: a name out of `MODELS`.
        rewards: names out of `REWARDS`.
        old: give both sides old log-probabilities that are not the current ones.
        truncated: the completions of `TRUNCATED` do not end with the end-of-turn token.
        correction: `sampler_correction` and its bounds.
        micro_batches: ours alone.
        atol: of losses, log-probabilities and gradient norms (relative).
    """

    options: dict
    model: str = "qwen3"
    rewards: tuple[str, ...] = ("sums",)
    old: bool = False
    truncated: bool = False
    correction: tuple[str, float | None, float | None] = ("none", None, 3.0)
    micro_batches: int = 1
    atol: float = 1e-5

    @property
    def iterations(self):
        return self.options.get("num_iterations", 1)

    @property
    def config(self):
        """All of our options; TRL is given those that it knows too."""
        mode, low, high = self.correction
        ours = {"sampler_correction": mode, "sampler_correction_min": low, "sampler_correction_max": high}
        base = {
            "per_device_train_batch_size": P * G,
            "num_generations": G,
            "max_grpo_completion_length": BUDGET,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-5,
            "lr_scheduler_type": "constant",
            "reward_function_name": ["accuracy"] * len(self.rewards),
            "gradient_checkpointing": False,
        }
        return Config(**base | self.options | ours)


def kl(beta=0.04, **options):
    return {"beta": beta, **options}


CASES = {
    "dapo": Case({}),
    "grpo, 3 iterations, accumulation, qwen2": Case({"loss_type": "grpo", **SPLIT, **AGAIN}, "qwen2"),
    "bnpo, old, epsilon_high, scale batch, groups of 0 and 1 reward": Case(
        {"loss_type": "bnpo", "epsilon_high": 0.28, "scale_rewards": "batch"}, rewards=("few",), old=True
    ),
    "dr_grpo, old, delta, scale none, truncated rows learned, qwen2": Case(
        {"loss_type": "dr_grpo", "delta": 1.5, "scale_rewards": "none"}, "qwen2", old=True, truncated=True
    ),
    "sequence, grpo, 3 iterations": Case({"loss_type": "grpo", "num_iterations": 3, **GSPO}),
    "sequence, dapo, old, KL, truncated rows masked": Case(
        kl(mask_truncated_completions=True, **GSPO), old=True, truncated=True
    ),
    "dapo, KL, 3 iterations": Case(kl(**AGAIN)),
    "dapo, KL without the ratio, 3 iterations, qwen2": Case(
        kl(use_bias_correction_kl=False, **AGAIN), "qwen2"
    ),
    "grpo, KL, truncated rows masked, weighted rewards": Case(
        kl(loss_type="grpo", mask_truncated_completions=True, reward_weights=[0.7, 2.0]),
        rewards=("some_none", "lengths"),
        truncated=True,
    ),
    "dr_grpo, KL without the ratio, three rewards, all None in some rows, scale none, accumulation": Case(
        kl(
            loss_type="dr_grpo",
            use_bias_correction_kl=False,
            scale_rewards="none",
            reward_weights=[1.0, 0.5, -1.0],
            **SPLIT,
        ),
        rewards=("some_none", "few", "some_none_too"),
    ),
    "temperature 0.7, old, KL, entropy quantile": Case(
        kl(temperature=0.7, top_entropy_quantile=0.2), old=True, micro_batches=2
    ),
    "accumulation, dapo, 3 iterations, micro-batches": Case({**SPLIT, **AGAIN}, micro_batches=2),
    "LoRA on q and v, KL": Case({**LORA, **kl()}),
    "LoRA on all, 3 iterations, weight decay, qwen2": Case(
        {**LORA, **AGAIN, "lora_target_modules": ALL_LINEAR, "weight_decay": 0.5}, "qwen2"
    ),
    "two groups of equal rewards, weight decay, small norm": Case(
        {"weight_decay": 0.5, "max_grad_norm": 0.01}, rewards=("equal_groups",)
    ),
    "sgd, weight decay, polynomial schedule": Case(
        {
            "optim": "sgd",
            "weight_decay": 0.5,
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-4},
        }
    ),
    "cispo, KL, 3 iterations": Case(kl(loss_type="cispo", epsilon_high=1.2, **AGAIN)),
    "sapo, old, KL, truncated rows masked": Case(
        kl(loss_type="sapo", sapo_temperature_neg=3.0, mask_truncated_completions=True),
        old=True,
        truncated=True,
    ),
    "luspo, KL, accumulation": Case(kl(loss_type="luspo", **GSPO, **SPLIT)),
    "vespo, token_truncate, 3 iterations": Case(  # its ratio is a product: the tokens' rounding errors add up
        {"loss_type": "vespo", "num_iterations": 3}, correction=("token_truncate", 0.9, 1.1), atol=1e-4
    ),
    "entropy bonus, grpo, entropy quantile, micro-batches": Case(
        {"loss_type": "grpo", "entropy_coef": 0.05, "top_entropy_quantile": 0.5}, micro_batches=2
    ),
    "off-policy rows left out, entropy penalty, LoRA": Case(
        {**LORA, **AGAIN, "off_policy_mask_threshold": 0.02, "entropy_coef": -0.05}
    ),
    "sequence_mask": Case({}, correction=("sequence_mask", 0.3, 3.0)),
    "GDPO, weights, None": Case(
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.7, 2.0]},
        rewards=("some_none", "few"),
    ),
}


# --- what both sides are given -------------------------------------------------------------------------


@functools.cache
def prompts():
    rng = np.random.RandomState(0)
    shared = rng.randint(2, parity.V, 6).tolist()
    return [shared + rng.randint(2, parity.V, 3 + p).tolist() for p in range(P)]


@functools.cache
def completion(batch, p, g, truncated):
    """(ids, which were sampled) of a row: two or three turns of the model and tool responses between them."""
    rng = np.random.RandomState(10_000 * batch + 100 * p + g)
    sizes = [rng.randint(2, 7), rng.randint(1, 5), rng.randint(2, 7)]
    sizes += [rng.randint(1, 4), rng.randint(1, 5)] * (rng.rand() < 0.4)
    ids = rng.randint(2, parity.V, sum(sizes)).tolist()
    mask = np.repeat(np.arange(len(sizes)) % 2 == 0, sizes).tolist()
    if not (truncated and (p, g) in TRUNCATED):
        ids[-1] = EOS
    return ids, mask


def noise(ids, seed, size=0.3):
    """Nats per token of a completion, the same on both sides."""
    return np.random.RandomState((sum(ids) + seed) % 2**31).normal(0, size, len(ids)).astype(np.float32)


def rows_of(case, batch):
    return [(p, g, *completion(batch, p, g, case.truncated)) for p in range(P) for g in range(G)]


@functools.cache
def lora_weights(shapes):
    """B is not zero, so that the reference differs from the first update on."""
    rng = np.random.RandomState(11)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes}


@dataclasses.dataclass
class Record:
    """What one side did; rows are known by their completion's ids, updates by their number."""

    advantages: dict = dataclasses.field(default_factory=dict)
    losses: list = dataclasses.field(default_factory=list)
    norms: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    weights: list = dataclasses.field(default_factory=list)  # before, and after each update


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More would wait for each other: the matrices are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HF folders of the models, norms and biases included."""
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        config = config | {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
        parity.write_checkpoint(root / name, config, parity.random_tensors(config, seed=7))
    return root


# --- ours ----------------------------------------------------------------------------------------------


@functools.cache
def scorer(step):
    return make_score(step)


def run_ours(case, folder):
    config, record = case.config, Record()
    cfg, params = parity.load(folder)
    step = ModelStep(
        cfg, Layout(make_mesh()), jnp.float32, False, config.temperature, micro_batches=case.micro_batches
    )
    score = scorer(dataclasses.replace(step, micro_batches=1))
    trained, frozen = jax.tree.map(jnp.copy, params), None  # the state is donated
    if config.use_peft:
        lora = lora_config(config)
        shapes = jax.eval_shape(lambda: init_adapters(params["layers"], lora, 0))
        trained = jax.tree.map(jnp.asarray, lora_weights(tuple((k, v.shape) for k, v in shapes.items())))
        frozen = Frozen(params, jnp.uint32(0), lora)
    settings = (config.lr_scheduler_type, config.learning_rate, 0, UPDATES, config.lr_scheduler_kwargs)
    schedule = make_schedule(*settings)
    optimizer = optimizer_of(config, schedule)
    state, objective = init_state(trained, optimizer, step.layout), grpo_objective(config)
    update = make_update(step, optimizer, objective, state, frozen)
    sizes = () if objective.needs_all_rows else update_sizes(step, P, G)

    def published(tree):
        tree = jax.tree.map(np.array, tree)
        return peft_tensors(tree, lora) if frozen else parity.in_published_layout(cfg, tree)

    def by_row(values, rows, learned):
        values = np.asarray(values)
        return {
            tuple(ids): values[i, : len(ids)][mask] for i, (_, _, ids, mask) in enumerate(rows) if learned[i]
        }

    record.weights.append(published(state.params))
    for number in range(UPDATES // case.iterations):
        rows = rows_of(case, number)
        values = [[REWARDS[name](p, g, ids) for name in case.rewards] for p, g, ids, _ in rows]
        advantages = batch_advantages(
            np.array(values, float),
            config.reward_weights or [1.0] * len(case.rewards),
            G,
            scale=config.scale_rewards,
            aggregation=config.multi_objective_aggregation,
            estimator=config.advantage_estimator,
        )
        record.advantages |= {tuple(row[2]): a for row, a in zip(rows, advantages, strict=True)}
        truncated = [case.truncated and (p, g) in TRUNCATED for p, g, _, _ in rows]
        statuses = [Status.OVERLONG if one else Status.ANSWERED for one in truncated]
        trajectories = [
            Trajectory(
                Prompt(Example([], ""), prompts()[p], []),
                ids,
                mask,
                np.where(mask, sampler_logprobs(case, ids), 0).tolist(),
                status=status,
                advantage=float(advantage),
            )
            for (p, g, ids, mask), status, advantage in zip(rows, statuses, advantages, strict=True)
        ]
        learned = [not (config.mask_truncated_completions and t.status.truncated) for t in trajectories]
        tree = make_tree(prompts(), BUDGET)
        whole = make_batch(tree, trajectories, G)
        batch = make_batch(
            tree, trajectories, G, mask_truncated=config.mask_truncated_completions, sizes=sizes
        )
        if config.beta:
            batch = batch.with_logprobs(ref_logprobs=score(params, batch))
        if case.old:
            given = batch.completions
            old = np.zeros(given.targets.shape, np.float32)
            for i, (ids, valid) in enumerate(zip(given.targets, given.level.valid, strict=True)):
                old[i, : valid.sum()] = old_logprobs(case, ids[valid].tolist())
            batch = batch.with_logprobs(old_logprobs=jnp.asarray(old))
        elif case.iterations > 1:
            batch = batch.with_logprobs(old_logprobs=score(join(state.params, frozen), batch))
        for _ in range(case.iterations):
            logprobs = score(join(state.params, frozen), whole)
            record.logprobs.append(by_row(logprobs, rows, learned))
            state, metrics = update(state, batch)
            record.losses.append(float(metrics["loss"]))
            record.norms.append(float(metrics["grad_norm"]))
            record.weights.append(published(state.params))
    return record


BASE = {}  # (model, temperature, ids) -> log-probabilities of the first weights


def old_logprobs(case, ids):
    return BASE[case.model, case.config.temperature, tuple(ids)] + noise(ids, 0)


def sampler_logprobs(case, ids):
    return BASE[case.model, case.config.temperature, tuple(ids)] + noise(ids, 1, 0.1)


def fill_base(case, folder):
    """Log-probabilities of the first weights, from torch."""
    model = torch_model(folder)
    for number in range(UPDATES // case.iterations):
        for p, _, ids, _ in rows_of(case, number):
            key = case.model, case.config.temperature, tuple(ids)
            if key not in BASE:
                prompt = prompts()[p]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                table = torch.log_softmax(logits / case.config.temperature, -1)
                BASE[key] = table[torch.arange(len(ids)), torch.tensor(ids)].numpy()


# --- TRL -----------------------------------------------------------------------------------------------


@functools.cache
def torch_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, parity.V))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def run_trl(case, folder, adapters, tmp_path):
    """Train with TRL; `adapters` are PEFT tensors by name."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

    record, config, numbers = Record(), case.config, iter(range(UPDATES))
    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name in known}
    options |= {"output_dir": str(tmp_path), "max_steps": UPDATES, "max_completion_length": BUDGET}
    options |= {"save_strategy": "no", "logging_steps": 1, "log_level": "warning", "log_completions": False}
    options["optim"] = {"adamw": "adamw_torch"}.get(config.optim, config.optim)
    corrects = config.sampler_correction != "none"
    options |= {
        "vllm_importance_sampling_correction": corrects,
        "vllm_importance_sampling_mode": config.sampler_correction if corrects else "token_mask",
        "vllm_importance_sampling_clip_min": config.sampler_correction_min,
        "vllm_importance_sampling_clip_max": config.sampler_correction_max,
    }
    options = {
        name: value for name, value in options.items() if name not in ("eval_steps", "eval_strategy", "dtype")
    }
    peft = {name: value for name, value in dataclasses.asdict(config).items() if name.startswith("lora_")}
    with_sampler = corrects or config.off_policy_mask_threshold is not None

    def rollout(texts, trainer):
        number, seen, rows = next(numbers), {}, []
        for text in texts:
            seen[text] = seen.get(text, -1) + 1
            rows.append((int(text), *completion(number, int(text), seen[text], case.truncated)))
        logprobs = [sampler_logprobs(case, ids).tolist() for _, ids, _ in rows] if with_sampler else None
        return {
            "prompt_ids": [prompts()[p] for p, _, _ in rows],
            "completion_ids": [ids for _, ids, _ in rows],
            "logprobs": logprobs,
            "env_mask": [list(map(int, mask)) for _, _, mask in rows],
        }

    def reward(name):
        def function(prompts, completion_ids, **_):
            values, seen = [], {}
            for p, ids in zip(map(int, prompts), completion_ids, strict=True):
                seen[p] = seen.get(p, -1) + 1
                values.append(REWARDS[name](p, seen[p], ids))
            return values

        function.__name__ = name
        return function

    class Recorder(GRPOTrainer):
        def _generate(self, prompts):
            self.use_vllm = False  # it has no engine
            out = super()._generate(prompts)
            self.use_vllm = corrects
            return out

        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            keys = self.keys(out)
            record.advantages |= dict(zip(keys, out["advantages"].tolist(), strict=True))
            if case.old:
                old = torch.zeros(out["completion_ids"].shape)
                for i, key in enumerate(keys):
                    old[i, : len(key)] = torch.tensor(old_logprobs(case, key))
                out["old_per_token_logps"] = old
            return out

        def keys(self, inputs):
            return [tuple(t for t in row if t != PAD) for row in inputs["completion_ids"].tolist()]

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            self.last = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return self.last

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            masks = (inputs["completion_mask"] * inputs["tool_mask"]).bool().numpy()
            for key, row, mask in zip(self.keys(inputs), self.last[0].detach().numpy(), masks, strict=True):
                if mask.any():
                    record.logprobs[-1][key] = row[mask]
            record.losses[-1] += loss.item()
            return loss

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            record.losses.append(0.0)
            record.logprobs.append({})

        def on_step_end(self, args, state, control, model=None, **kwargs):
            record.weights.append(trained(model))

    def parameters(model):
        return [(n.replace(".default", ""), p) for n, p in model.named_parameters() if p.requires_grad]

    def trained(model):
        return {name: p.detach().numpy().copy() for name, p in parameters(model)}

    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        trainer = Recorder(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=[reward(name) for name in case.rewards],
            args=GRPOConfig(
                use_cpu=True, bf16=False, disable_tqdm=True, **options | {"shuffle_dataset": False}
            ),
            train_dataset=Dataset.from_list([{"prompt": str(p)} for p in range(P)]),
            processing_class=tokenizer(),
            rollout_func=rollout,
            peft_config=get_peft_config(ModelConfig(use_peft=True, **peft)) if config.use_peft else None,
            callbacks=[Steps()],
        )
        trainer.remove_callback(PrinterCallback)
        with torch.no_grad():
            for name, weight in parameters(trainer.model) if config.use_peft else ():
                weight.copy_(torch.tensor(adapters[name]))
        record.weights.append(trained(trainer.model))
        trainer.train()
    record.norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    return record


# --- the comparison ------------------------------------------------------------------------------------


def largest(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(np.asarray(a[key]) - np.asarray(b[key])).max() for key in a)


def change_error(ours, theirs, after):
    """Distance of the two sides' change of all parameters, relative to its norm."""
    assert ours[0].keys() == theirs[0].keys()
    size = error = 0.0
    for name in theirs[0]:
        mine, others = (np.float64(w[after][name]) - w[0][name] for w in (ours, theirs))
        size += (others**2).sum()
        error += ((mine - others) ** 2).sum()
    assert size > 0
    return (error / size) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_one_whole_update_equals_trls(name, folders, tmp_path):
    case = CASES[name]
    folder = folders / case.model
    fill_base(case, folder)
    ours = run_ours(case, folder)
    theirs = run_trl(case, folder, ours.weights[0], tmp_path)
    assert largest(ours.weights[0], theirs.weights[0]) == 0
    assert len(theirs.losses) == len(ours.losses) == UPDATES
    figures = {
        "advantages": largest(ours.advantages, theirs.advantages),
        "losses": max(np.abs(np.subtract(ours.losses, theirs.losses))),
        "log-probabilities": largest(ours.logprobs[0], theirs.logprobs[0]),
        "a tenth of the last ones": largest(ours.logprobs[-1], theirs.logprobs[-1]) / 10,
        "gradient norms": max(
            abs(a - b) / max(b, 1e-9) for a, b in zip(ours.norms, theirs.norms, strict=True)
        ),
    }
    assert max(figures.values()) <= case.atol, figures
    changes = [change_error(ours.weights, theirs.weights, after) for after in (1, UPDATES)]
    assert max(changes) <= CHANGE_RTOL, (changes, figures)


# --- the loss alone, of every combination --------------------------------------------------------------

KLS = [{}, {"beta": 0.04}, {"beta": 0.04, "use_bias_correction_kl": False}]
LOSS_OPTIONS = [
    "loss_type",
    "importance_sampling_level",
    "beta",
    "use_bias_correction_kl",
    "delta",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "top_entropy_quantile",
    "entropy_coef",
    "off_policy_mask_threshold",
]
EXTRAS = [{}, {"top_entropy_quantile": 0.4}, {"entropy_coef": 0.1}, {"off_policy_mask_threshold": 0.05}]
EXTRAS += [EXTRAS[1] | EXTRAS[2] | EXTRAS[3]]
CLIPS = {"cispo": {"epsilon_high": 1.1}, "sapo": {"sapo_temperature_pos": 2.0}, "vespo": {"vespo_k_neg": 1.0}}


def positions(seed):
    """Arrays of `LossInputs` with an empty row, a row of advantage 0, and entropies that two positions share."""
    rng = np.random.RandomState(seed)
    shape, mask = (6, 8), rng.rand(6, 8) < 0.7
    mask[2] = False
    logprobs, entropies = -rng.exponential(1.0, shape), rng.rand(*shape)
    entropies[0, 0] = entropies[1, 1]
    sampler, old, ref = logprobs + rng.normal(0, 0.2, (3, *shape))
    advantages = np.array([1.0, -0.5, 2.0, 0.0, -1.5, 0.3])
    arrays = (logprobs, entropies, mask, sampler, old, ref, advantages)
    return LossInputs(*(x if x.dtype == bool else x.astype(np.float32) for x in arrays))


@pytest.fixture(scope="module")
def trainer(folders, tmp_path_factory):
    """A trainer of TRL's, whose options `trls_loss` replaces."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    out = tmp_path_factory.mktemp("out")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": str(out)}
    return GRPOTrainer(
        model=torch_model(folders / "qwen3").train(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": "0"}]),
        processing_class=tokenizer(),
    )


def trls_loss(trainer, config, x):
    """(loss, its gradients in log-probabilities and entropies, metrics)."""
    for name in LOSS_OPTIONS:
        owner = trainer if hasattr(trainer, name) else trainer.args
        assert hasattr(owner, name), name
        setattr(owner, name, getattr(config, name))
    trainer.epsilon_low = config.epsilon
    trainer.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    trainer.max_completion_length = config.max_grpo_completion_length
    trainer._entropy_bonus_enabled = bool(config.entropy_coef)
    trainer.current_gradient_accumulation_steps = 1
    logprobs, entropies = (torch.tensor(v, requires_grad=True) for v in (x.logprobs, x.entropies))
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropies, None)
    mask, ones = torch.tensor(x.mask).long(), torch.ones(len(x.mask), 1, dtype=torch.long)
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": torch.ones_like(mask),
            "completion_mask": torch.ones_like(mask),
            "tool_mask": mask,
            "advantages": torch.tensor(x.advantages),
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": torch.tensor(x.old_logprobs),
            "ref_per_token_logps": torch.tensor(x.ref_logprobs),
            "sampling_per_token_logps": torch.tensor(x.sampler_logprobs),
        },
    )
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    no_gradient = torch.zeros_like(entropies)
    grads = [(no_gradient if v.grad is None else v.grad).numpy() for v in (logprobs, entropies)]
    return loss.item(), grads, metrics


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_the_loss_of_every_combination_equals_trls_with_its_gradient(loss_type, level, trainer):
    base = {"loss_type": loss_type, "importance_sampling_level": level, "max_grpo_completion_length": 10}
    clips = [CLIPS[loss_type]] if loss_type in CLIPS else [{}, {"epsilon_high": 0.28, "delta": 1.6}]
    compared = 0
    for seed, (kl, extra, clip) in enumerate(itertools.product(KLS, EXTRAS, clips)):
        options = base | kl | extra | clip
        try:
            config = Config(**options)
        except ValueError:  # luspo per token, vespo per sequence without a KL
            assert (loss_type, level) in {("luspo", "token"), ("vespo", "sequence")}
            continue
        x = positions(seed)
        tokens = x.mask.sum()
        totals = Totals(*(jnp.int32(n) for n in (tokens, len(x.mask), tokens)))
        objective = grpo_objective(config)

        def ours(logprobs, entropies):
            learned = x._replace(logprobs=logprobs, entropies=entropies)  # noqa: B023
            return objective(jax.tree.map(jnp.asarray, learned), totals)  # noqa: B023

        learned = (jnp.asarray(x.logprobs), jnp.asarray(x.entropies))
        (loss, metrics), grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(*learned)
        want_loss, want_grads, want_metrics = trls_loss(trainer, config, x)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-5, atol=1e-6, err_msg=str(options))
        for got, want in zip(grads, want_grads, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=str(options))
        same = {"kl", "entropy"}
        if level == "token" and not config.delta:
            same |= {"cispo_clip_ratio", *(f"clip_ratio/{name}_mean" for name in ("low", "high", "region"))}
        for name in same & metrics.sums.keys():
            np.testing.assert_allclose(metrics.sums[name], want_metrics[name], rtol=1e-5, err_msg=name)
        compared += 1
    assert compared or (loss_type, level) == ("luspo", "token")
