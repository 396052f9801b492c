"""The chat that a row holds, whatever form it is written in.

- `messages`: turns with `role` and `content`, as transformers' chat templates take them.
- ShareGPT's `conversations`: turns with `from` and `value`; a `function_call` is a call of a tool.
- Alpaca's `instruction` and `input`, answered by `output`, after the pairs of `history`.
- `prompt` and `completion`, where the prompt is a list of turns.

A column `system` is the first turn. Lists and objects may be JSON text, as in a CSV. So may the arguments of
a tool's call, as OpenAI has them: templates take objects, and so servers parse them before they render. Turns
go to the template with all keys that they have, save those without a value, as transformers does it. What
decides how much the loss counts on a turn (`weight`, `train`) is refused where it asks for anything but the
usual.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from emloc.errors import DataError
from emloc.integrations.transformers.data.columns import FORMS, form_of
from emloc.integrations.transformers.data.texts import answer_of, listed, mapped, text_of
from emloc.machine.bounded_json import parse_json

Turn: TypeAlias = dict[str, Any]
ReadContent: TypeAlias = Callable[[Any, str, str], Any]
"""Content as it is written, what it is and where it stands: content as the template takes it."""

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "chatgpt": "assistant", "bard": "assistant", "observation": "tool", "tool": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's names of who speaks."""
WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_weight")


@dataclass(frozen=True)
class Chat:
    """A chat as a template takes it.

    Attributes:
        turns: the last one is the assistant's.
        tools: schemas of the tools that it may call; None without any.
        options: variables of the template, beside the turns.
        completion: turns at the end that the row gives as its completion; None where it does not tell.
    """

    turns: Sequence[Turn]
    tools: list[Any] | None
    options: Mapping[str, Any]
    completion: int | None = None


def text_content(value: Any, what: str, where: str) -> str:
    """Content of a text model: text, or a list of parts that are text.

    Raises:
        DataError: it is something else, such as a picture.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        return text_of(value, what, where)
    texts: list[str] = []
    for part in cast("Sequence[Any]", value):
        kind = cast("Mapping[str, Any]", part).get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise DataError(
                f"{where}: {what} has a part {_named(part)}; a text model reads only parts of type 'text'."
            )
        texts.append(
            text_of(cast("Mapping[str, Any]", part).get("text"), f"a part of {what}", where)
        )
    return "".join(texts)


def chat_of(
    row: Mapping[str, Any], where: str, read_content: ReadContent = text_content
) -> Chat | None:
    """The row's chat; None where it is plain text.

    Raises:
        DataError: it is malformed, or does not end with the assistant's turn.
    """
    form, completion = form_of(row, FORMS), None
    if form in ("messages", "conversations"):
        turns = [
            _turn(turn, f"turn {number} of {form}", where, read_content)
            for number, turn in enumerate(listed(row[form], form, where), start=1)
        ]
    elif form == "alpaca":
        turns = _alpaca(row, where, read_content)
    elif form == "prompt" and _is_turns(row["prompt"]):
        turns = _part(row["prompt"], "prompt", where, read_content)
        answered = _completion(row["completion"], where, read_content)
        turns, completion = [*turns, *answered], len(answered)
    else:
        return None
    system = row.get("system")
    if system is not None and system != "":
        turns = _with_system(turns, text_of(system, "system", where), where, read_content)
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: the chat must end with the assistant's turn.")
    tools = row.get("tools")
    tool_list = listed(tools, "tools", where) if tools not in (None, "") else []
    if not all(isinstance(tool, Mapping) for tool in tool_list):
        raise DataError(f"{where}: tools should be a list of objects.")
    options = row.get("chat_template_kwargs")
    given = mapped(options, "chat_template_kwargs", where) if options else {}
    return Chat(turns, tool_list or None, given, completion)


def alpaca_question(row: Mapping[str, Any], where: str) -> str:
    """Alpaca's instruction, and its input where there is one."""
    instruction = text_of(row["instruction"], "instruction", where)
    given = row.get("input")
    more = "" if given is None else text_of(given, "input", where)
    return "\n\n".join(part for part in (instruction, more) if part)


def _alpaca(row: Mapping[str, Any], where: str, read_content: ReadContent) -> list[Turn]:
    history = row.get("history")
    pairs = [] if history in (None, "") else listed(history, "history", where)
    texts: list[tuple[Any, Any, str]] = []
    for number, pair in enumerate(pairs, start=1):
        what = f"pair {number} of history"
        both = listed(pair, what, where)
        if len(both) != 2:
            raise DataError(f"{where}: {what} should be a question and its answer.")
        texts.append((both[0], both[1], what))
    output = answer_of(row["output"], "output", where)
    texts.append((alpaca_question(row, where), output, "output"))
    turns: list[Turn] = []
    for question, answer, what in texts:
        turns += [
            {"role": "user", "content": read_content(text_of(question, what, where), what, where)},
            {
                "role": "assistant",
                "content": read_content(text_of(answer, what, where), what, where),
            },
        ]
    return turns


def _is_turns(part: Any) -> bool:
    """Return whether a prompt or completion is turns, maybe as JSON text; other JSON is text as any."""
    if not isinstance(part, str):
        return isinstance(part, (list, tuple))
    if not part.lstrip().startswith("["):
        return False
    try:
        parsed = parse_json(part)
    except ValueError:
        return False
    return bool(parsed) and all(
        isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in parsed
    )


def _part(part: Any, column: str, where: str, read_content: ReadContent) -> list[Turn]:
    """The turns of a prompt or a completion."""
    return [
        _turn(turn, f"turn {number} of {column}", where, read_content)
        for number, turn in enumerate(listed(part, column, where), start=1)
    ]


def _completion(completion: Any, where: str, read_content: ReadContent) -> list[Turn]:
    """The turns of a completion, which may be the words of one."""
    if not _is_turns(completion):
        answer = answer_of(completion, "completion", where)
        completion = [{"role": "assistant", "content": answer}]
    return _part(completion, "completion", where, read_content)


def _turn(turn: Any, what: str, where: str, read_content: ReadContent) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(
            f"{where}: {what} is {_named(turn)} but should be an object with role and content."
        )
    given = {key: one for key, one in cast("Mapping[str, Any]", turn).items() if one is not None}
    made = _shared(given, what, where) if "role" not in given and "from" in given else given
    role = made.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(
            f"{where}: {what} has no role; it should be user, assistant, system or tool."
        )
    made = {**made, "role": "user" if role == "human" else "assistant" if role == "gpt" else role}
    made = _with_calls(made, what, where)
    _check_weight(made, what, where)
    made = {key: one for key, one in made.items() if key not in WEIGHTS}
    if made.get("content") is not None:
        made["content"] = read_content(made["content"], f"the content of {what}", where)
    elif not made.get("tool_calls"):
        raise DataError(f"{where}: {what} has no content.")
    return made


def _shared(turn: Mapping[str, Any], what: str, where: str) -> Turn:
    """A turn of ShareGPT's."""
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"{where}: a turn from {speaker!r}; expected {', '.join(sorted(ROLES))}.")
    rest = {key: one for key, one in turn.items() if key not in ("from", "value", "content")}
    value = turn.get("value", turn.get("content"))
    if speaker == "function_call":
        calls = _call_texts(value, what, where)
        return {**rest, "role": "assistant", "tool_calls": calls}
    return {**rest, "role": ROLES[speaker], "content": value}


def _call_texts(value: Any, what: str, where: str) -> list[dict[str, Any]]:
    """Calls out of `{"name", "arguments"}`, or a list of them, as JSON."""
    what = f"the function_call of {what}"
    is_list = isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    calls = listed(value, what, where) if is_list else [mapped(value, what, where)]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise DataError(f"{where}: {what} should be an object with name and arguments.")
    return [{"type": "function", "function": call} for call in calls]


def _with_calls(turn: Turn, what: str, where: str) -> Turn:
    """Calls of tools as a list of objects; OpenAI's older `function_call` is one of them."""
    if "function_call" in turn:
        call = mapped(turn["function_call"], f"the function_call of {what}", where)
        turn = {key: one for key, one in turn.items() if key != "function_call"}
        turn.setdefault("tool_calls", [{"type": "function", "function": call}])
    if "tool_calls" not in turn:
        return turn
    calls = listed(turn["tool_calls"], f"tool_calls of {what}", where)
    if not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{where}: tool_calls of {what} should be a list of objects.")
    calls = [
        _with_arguments(call, f"call {number} of {what}", where)
        for number, call in enumerate(calls, start=1)
    ]
    return {**turn, "tool_calls": calls} if calls else _without(turn, "tool_calls")


def _with_arguments(call: Mapping[str, Any], what: str, where: str) -> dict[str, Any]:
    """The call with its arguments as an object: as text, templates would write JSON within JSON."""
    function = call.get("function")
    if isinstance(function, Mapping):
        inner = cast("Mapping[str, Any]", function)
        return {**call, "function": _with_arguments(inner, what, where)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    parsed = mapped(arguments, f"arguments of {what}", where) if arguments.strip() else {}
    return {**call, "arguments": parsed}


def _without(turn: Turn, key: str) -> Turn:
    return {name: one for name, one in turn.items() if name != key}


def _check_weight(turn: Turn, what: str, where: str) -> None:
    for key in WEIGHTS:
        value = turn.get(key)
        usual = (None, True, 1) if turn["role"] == "assistant" else (None, False, 0, True, 1)
        if value not in usual:
            raise DataError(
                f"{where}: {what} has {key}={value!r}, but no assistant turn can be weighted or left out of "
                f"the loss; remove the turn, or the key to train on it."
            )


def _with_system(turns: list[Turn], text: str, where: str, read_content: ReadContent) -> list[Turn]:
    content = read_content(text, "system", where)
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"] == content:
            return turns
        raise DataError(
            f"{where}: there is a column system and another system turn in the chat; remove one."
        )
    return [{"role": "system", "content": content}, *turns]


def _named(part: Any) -> str:
    """A part or turn, for messages: by its type, or as it is."""
    if isinstance(part, Mapping):
        return f"of type {cast('Mapping[str, Any]', part).get('type')!r}"
    text = repr(part)
    return text if len(text) <= 60 else text[:60] + "…"
