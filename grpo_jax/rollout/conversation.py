"""Messages to token ids and back, exactly as the chat template writes them.

Token in, token out: sampled ids are carried as they are. What follows them (tool
responses, the next generation prompt) is encoded once by `response_ids` and
appended; nothing is rendered again. The appended ids equal the template's own
rendering of the whole conversation wherever the template is prefix-preserving.
Two published exceptions, both in Qwen3's (hybrid) template when it renders a
*finished* conversation again: it drops the think blocks of turns before the last
user message, and the empty think block of a turn that is not the last. Appended ids keep them, as the
policy saw them when it sampled.

Text is text: a control token's string (`<|im_end|>`, `<tool_call>`) inside user
text, a tool's output or a schema is encoded as plain characters. Contents are
rendered with private placeholders in place of such strings; every control string
left in the rendering then comes from the template, or from an assistant message,
which is in the model's own format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from grpo_jax.models.hf import read_json_object
from grpo_jax.rollout.parsing import CallFormat, assistant_message, parse_turn
from grpo_jax.text import replace_lone_surrogates
from grpo_jax.types import Message, ParsedTurn, Schema, ToolCall

_SENTINEL = "SENTINEL"  # stands for the text of an assistant turn
_RENDERED = 256  # conversations whose texts are held at once: with 8 tools each is 25 kB


@contextlib.contextmanager
def _refusal_explained() -> Iterator[None]:
    """A block in which what the template does not take is a ValueError."""
    try:
        yield
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"the model's chat template does not take this conversation: {error}") from error


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A tokenizer with its chat template; made by `load_conversation`.

    Args:
        encode_plain: text to ids, never to a control token.
        control_ids: every added token of the tokenizer, special or not, with its id.
        control: matches any of them, the longest first.
        end_of_turn: the control token that the template closes an assistant turn with.
        stop_ids: ids that end a turn; the first is the end-of-turn token.
        pad_id: id for positions that are never read.
        vocab_size: every id of the tokenizer lies below; a model may have more rows.
        opens_thinking: the generation prompt ends inside an open think block.
        template_kwargs: passed to every rendering, e.g. `{"enable_thinking": False}`.
    """

    tokenizer: Any
    encode_plain: Callable[[str], tuple[int, ...]]
    control_ids: Mapping[str, int]
    control: re.Pattern[str]
    end_of_turn: str
    stop_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    call_format: CallFormat
    opens_thinking: bool
    template_kwargs: Mapping[str, Any]

    def prompt_ids(self, messages: list[Message], schemas: list[Schema]) -> list[int]:
        """The ids of a prompt with its tools, up to the first token to be sampled.

        Raises:
            ValueError: a message's content is not text (templates render that as nothing).
        """
        return self.prompts_ids([messages], schemas)[0]

    def prompts_ids(self, prompts: Sequence[list[Message]], schemas: list[Schema]) -> list[list[int]]:
        """`prompt_ids` of each of many prompts that show the same tools, in a fraction of the time."""
        for message in itertools.chain.from_iterable(prompts):
            if not isinstance(message.get("content") or "", str):
                kind = type(message["content"]).__name__
                raise ValueError(f"content of a {message.get('role')} message must be text, got {kind}")
        parts = (prompts[at : at + _RENDERED] for at in range(0, len(prompts), _RENDERED))
        return [self._encode(*one) for part in parts for one in self._render_all(part, schemas)]

    def response_ids(self, results: list[tuple[str, str]]) -> list[int]:
        """What the template puts between a sampled end-of-turn token and the next sampled token.

        Args:
            results: (tool name, result text) of each call of the turn, in order.

        Returns:
            The ids of all tool responses and of the next generation prompt.
        """
        return self.following_ids([{"role": "tool", "name": name, "content": text} for name, text in results])

    def following_ids(self, messages: list[Message]) -> list[int]:
        """`response_ids` of any messages that follow an assistant turn, as the user's next one."""
        question = {"role": "user", "content": "…"}
        text, hidden = self._render([question, {"role": "assistant", "content": _SENTINEL}, *messages])
        return self._encode(text.split(_SENTINEL + self.end_of_turn, 1)[1], hidden)

    def assistant_ids(self, content: str, calls: list[ToolCall]) -> list[int]:
        """A gold assistant turn as the policy should sample it, end-of-turn token included.

        It is encoded separately from the prompt, as the sampler meets it: no token spans
        the generation prompt's end.

        Raises:
            ValueError: the template does not continue its own generation prompt with
                this turn, e.g. one with reasoning although thinking is off.
        """
        turn = assistant_message(ParsedTurn(content, None, tuple(calls), None))
        question = [{"role": "user", "content": "…"}]
        prompt, _ = self._render(question)
        text, hidden = self._render([*question, turn], add_generation_prompt=False)
        end = text.rfind(self.end_of_turn)
        if not text.startswith(prompt) or end < len(prompt):
            raise ValueError(
                "the chat template does not continue its generation prompt with this gold turn; check its "
                f"reasoning and chat_template_kwargs={dict(self.template_kwargs)}: {content[:80]!r}"
            )
        return self._encode(text[len(prompt) : end + len(self.end_of_turn)], hidden)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a sampled turn without its closing stop token; other control tokens are kept."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def parse(self, ids: list[int], schemas: list[Schema]) -> ParsedTurn:
        """Read a sampled turn strictly; see `parsing.parse_turn`."""
        text = "<think>" * self.opens_thinking + self.decode(ids)
        return parse_turn(text, schemas, self.call_format)

    assistant_message = staticmethod(assistant_message)

    def _render(self, messages: list[Message], **options: Any) -> tuple[str, dict[str, str]]:
        """`_render_all` of one conversation without tools."""
        return self._render_all([messages], [], **options)[0]

    @_refusal_explained()
    def _render_all(
        self,
        conversations: Sequence[list[Message]],
        schemas: list[Schema],
        *,
        add_generation_prompt: bool = True,
    ) -> list[tuple[str, dict[str, str]]]:
        """The template's texts with the contents' control strings hidden, and what each placeholder hides.

        Those in which the same is hidden are rendered by one call, which takes the schemas in once.
        """

        def data_of(message: Message) -> Message:
            """The parts of a message that are data, so that control strings in them are text."""
            if message.get("role") == "assistant":
                return {key: message[key] for key in ("tool_calls",) if key in message}
            return {key: value for key, value in message.items() if key != "role"}

        data = [[data_of(message) for message in messages] for messages in conversations]
        known = _strings_of_json(json.dumps(schemas))
        alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for i, parts in enumerate(data):  # each control string gets a private-use character that is not there
            strings = "\0".join([*_strings(parts), known])
            unused = (char for char in map(chr, range(0xF0000, 0x10FFFE)) if char not in strings)
            pairs = ((token, next(unused)) for token in sorted(set(self.control.findall(strings))))
            alike.setdefault(tuple(pairs), []).append(i)
        rendered: list[tuple[str, dict[str, str]]] = [("", {})] * len(data)
        for pairs, members in alike.items():
            placeholders, shown, tools = dict(pairs), [data[i] for i in members], schemas
            if placeholders:
                hide = functools.partial(_replace, new=placeholders)
                shown, tools = _map_strings([shown, tools], hide)
            texts = self.tokenizer.apply_chat_template(
                [
                    [{**message, **part} for message, part in zip(conversations[i], parts, strict=True)]
                    for i, parts in zip(members, shown, strict=True)
                ],
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_kwargs,
            )
            hidden = {placeholder: token for token, placeholder in pairs}
            for i, text in zip(members, texts, strict=True):
                rendered[i] = text, hidden
        return rendered

    def _encode(self, text: str, hidden: Mapping[str, str]) -> list[int]:
        """Ids of a rendering: its control strings as control tokens, hidden ones as plain text."""
        ids: list[int] = []
        at = 0
        for match in self.control.finditer(text):
            ids += self.encode_plain(_replace(text[at : match.start()], hidden))
            ids.append(self.control_ids[match[0]])
            at = match.end()
        return ids + list(self.encode_plain(_replace(text[at:], hidden)))


def load_conversation(
    folder: str | Path, *, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Conversation:
    """Load a tokenizer and learn from its chat template how turns and calls are written.

    Args:
        chat_template_kwargs: extra variables for the template; None for its own defaults.

    Raises:
        ValueError: the tokenizer cannot be found or loaded, its template is missing or cannot
            carry tool calls, or generation_config.json holds no ids; the message names the fix.
    """
    tokenizer = _load_tokenizer(Path(folder))
    kwargs = dict(chat_template_kwargs or {})
    fixed = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents", "kwargs"}
    if taken := sorted(kwargs.keys() & fixed):
        raise ValueError(
            f"chat_template_kwargs are variables of the template and may not set {', '.join(taken)}; leave it out"
        )
    for token in tokenizer.added_tokens_decoder.values():
        # splitting at the string of such a token would not give the tokenizer's own ids
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(f"added token {token.content!r} must not set lstrip, rstrip or single_word")
    control_ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    control = _any_of(control_ids)
    try:
        prompt, end_of_turn = _probe_template(tokenizer, kwargs, control)
        _probe_tools(tokenizer, kwargs, str(folder))
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the chat template in {str(folder)!r} cannot be rendered ({type(error).__name__}: {error}); copy it "
            "again from the model's repository, or correct chat_template_kwargs"
        ) from None
    path = Path(folder) / "generation_config.json"
    eos = read_json_object(path).get("eos_token_id") if path.exists() else None
    configured = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(one) is not int or one < 0 for one in configured):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, got {eos!r}")
    ends = [control_ids[end_of_turn], tokenizer.eos_token_id, *configured]
    stop_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
    conversation = Conversation(
        tokenizer=tokenizer,
        encode_plain=_plain_encoder(tokenizer),
        control_ids=control_ids,
        control=control,
        end_of_turn=end_of_turn,
        stop_ids=stop_ids,
        pad_id=stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        call_format="qwen3_coder" if "<function=" in tokenizer.chat_template else "hermes",
        opens_thinking=prompt.rfind("<think>") > prompt.rfind("</think>"),
        template_kwargs=kwargs,
    )
    ids = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
    if conversation._encode(prompt, {}) != ids:
        raise ValueError(
            f"the tokenizer in {str(folder)!r} writes the text between control tokens in another way than on its own, "
            "which is not supported; use another model's"
        )
    return conversation


def _load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"folder {folder} has no tokenizer.json; copy it from the model's repository")
    source = str(folder)
    try:
        # what tokenizer.json says: AutoTokenizer rebuilds the classes that it knows, some with other rules to split text
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    except Exception as error:  # the libraries raise anything from KeyError to a bare Exception
        raise ValueError(
            f"the tokenizer in {source!r} cannot be loaded ({type(error).__name__}: {error}); copy its files "
            "again from the model's repository"
        ) from error
    if isinstance(templates := tokenizer.chat_template, dict):  # several by name, chosen as transformers does
        tokenizer.chat_template = templates.get("tool_use", templates.get("default"))
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {source!r} needs a chat template; use an Instruct model's, or give one with --chat_template FILE "
            "or --chat_template hermes"
        )
    if "<tool_call>" not in tokenizer.chat_template:
        raise ValueError(
            f"the chat template of {source!r} writes no <tool_call>; use a model whose template does, or give one "
            "with --chat_template FILE or --chat_template hermes"
        )
    return tokenizer


def _probe_template(tokenizer: Any, kwargs: dict[str, Any], control: re.Pattern[str]) -> tuple[str, str]:
    """The rendered prompt of a one-word question, and the token that closes an assistant turn."""
    question = {"role": "user", "content": "…"}
    answer = {"role": "assistant", "content": _SENTINEL}
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **kwargs)
    close = control.match(render([question, answer]).rpartition(_SENTINEL)[2])
    if close is None:
        raise ValueError(
            "the chat template must close an assistant turn with an added token, such as <|im_end|>"
        )
    return render([question], add_generation_prompt=True), close[0]


def _probe_tools(tokenizer: Any, kwargs: dict[str, Any], source: str) -> None:
    """Whether the template writes what a conversation with tools consists of.

    Raises:
        ValueError: it drops one of them; says which.
    """
    parameters = {"type": "object", "properties": {}}
    tool = {"name": "probe_tool", "description": "Probe.", "parameters": parameters}
    question = {"role": "user", "content": "…"}
    call = assistant_message(ParsedTurn("", None, (ToolCall("probe_call", {}),), None))
    result = {"role": "tool", "name": "probe_call", "content": "probe result"}
    for part, word, messages in (
        ("the tools", "probe_tool", [question]),
        ("an assistant's tool calls", "probe_call", [question, call]),
        ("tool results", "probe result", [question, call, result]),
    ):
        schemas = [{"type": "function", "function": tool}]
        if word not in tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False, **kwargs):
            raise ValueError(
                f"the chat template of {source!r} drops {part}: rendered with {word!r}, the text lacks it; give another "
                "with --chat_template FILE or --chat_template hermes"
            )


def _plain_encoder(tokenizer: Any) -> Callable[[str], tuple[int, ...]]:
    """The tokenizer without its added tokens.

    Cached, because all prompts share their longest piece: 6,000 tokens of tools take
    7 ms to encode, and a data set has thousands of rows.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    split = state["pre_tokenizer"] or {}
    for part in [split, *split.get("pretokenizers", [])]:
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"  # a piece follows a control token and does not begin a text
    plain = Tokenizer.from_str(json.dumps(state | {"added_tokens": []}))

    @functools.lru_cache(maxsize=4096)
    def encode(text: str) -> tuple[int, ...]:
        # A lone surrogate, which a tool may return, has no UTF-8 form.
        return tuple(plain.encode(replace_lone_surrogates(text), add_special_tokens=False).ids)

    return encode


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings; the longest wins, as in the tokenizer."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))))


def _replace(text: str, new: Mapping[str, str]) -> str:
    return _any_of(new).sub(lambda match: new[match[0]], text) if new else text


def _strings(value: Any) -> Iterator[str]:
    """Every string inside nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


@functools.lru_cache(maxsize=64)
def _strings_of_json(text: str) -> str:
    """The strings inside JSON, joined; cached, because thousands of prompts have the same schemas."""
    return "\0".join(_strings(json.loads(text)))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same nested lists and dicts with every string, keys included, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value
