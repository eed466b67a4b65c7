"""README.md of an exported model: where it comes from, what it can do, and how to call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from grpo_jax.files import write_text_atomic
from grpo_jax.run.log import interval_text, read_summary
from grpo_jax.run.report import changed_options
from grpo_jax.scoring.evaluation import FIGURES

CARD = """---
{header}---

# {name}

{made}

| | |
|---|---|
{facts}

{figures}

<details><summary>Options that are not the defaults</summary>

{options}

</details>

## Use

With transformers, for functions with type hints and docstrings; a turn that ends in a `<tool_call>` is answered with a
message of role `tool`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tools = "FOLDER", [...]  # the functions {tools}
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "…"}}]
inputs = tokenizer.apply_chat_template(
    messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```

In a terminal, with the tools run:

```
python -m grpo_jax.chat --model_name_or_path FOLDER --tools_script TOOLS.py
```

As a server with vLLM:

```
vllm serve FOLDER --enable-auto-tool-choice --tool-call-parser {parser}
```
"""


def write_model_card(folder: Path, run: Path, updates: int) -> None:
    """Write README.md of a model folder.

    Args:
        run: the run's output_dir, whose resolved_config.yaml and summary.json are read if they are there.
        updates: the model's; the evaluation after training is shown where it is of the same number.
    """
    config, summary = run / "resolved_config.yaml", read_summary(run)
    options = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    shown = {"before": summary.get("before"), "after": summary.get("after")}
    if summary.get("updates") != updates:
        shown["after"] = None
    made = f"trained by GRPO for {updates} updates" if updates else "as it was before any update"
    if (run / "sft.json").is_file():  # of the command `sft`
        summary = json.loads((run / "sft.json").read_text(encoding="utf-8"))
        shown, made = (
            {"validation": summary["validation"]},
            f"fine-tuned on gold calls for {summary['steps']} updates",
        )
    tools = ", ".join(f"`{name}`" for name in summary.get("tools", [])) or "of its run"
    base, data = options.get("model_name_or_path"), options.get("dataset_id_or_path")
    facts = {
        "base model": "a new small model" if base == "scratch" else base,
        "training data": data or "given in Python",
        "evaluation data": options.get("eval_dataset_id_or_path"),
        "tools": tools,
        "rewards": ", ".join(summary.get("rewards", [])),
        "adapters": f"LoRA of rank {options['lora_r']}, merged" if options.get("use_peft") else None,
    }
    changed = changed_options(config)
    header = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base and "/" in base and not Path(base).exists():  # what a hub can link to
        header["base_model"] = base
    files = (folder / file for file in ("chat_template.jinja", "tokenizer_config.json"))
    template = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    text = CARD.format(
        header=yaml.safe_dump(header | {"tags": ["tool-calling", "grpo"]}),
        name=run.absolute().name,
        made=f"A model that calls tools, {made}, with grpo_jax.",
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items() if value),
        figures=_figures({when: one for when, one in shown.items() if one}),
        options="\n".join(f"- `{name}`: `{value}`" for name, value in changed),
        tools=tools,
        parser="qwen3_coder" if "<function=" in template else "hermes",
    )
    write_text_atomic(folder / "README.md", text)


def _figures(shown: dict[str, dict[str, Any]]) -> str:
    if not shown:
        return "It has not been evaluated."
    rows = [("figure", *shown), ("---",) * (len(shown) + 1)]
    rows += [(f"`{name}`", *(interval_text(one, name) for one in shown.values())) for name in FIGURES]
    n = ", ".join(dict.fromkeys(str(one["n"]) for one in shown.values()))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"Greedy answers to {n} questions, with 95 % intervals (docs/evaluation.md of grpo_jax):\n\n{table}"
    )
