"""Strategies for bodies of requests that are right in most places, so that most get past the first check."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from saddle.server.responses_items import READ_ITEMS
from tests.unit.server.test_anthropic_any_body import mostly, values

texts = st.text(max_size=6) | st.sampled_from(["", "<think>", "</think>", "]~b]ai", "\ud83d\ude00", "a b"])
SCHEMA = {"type": "object", "properties": {"p": {"type": "string"}, "n": {"type": "integer"}}, "required": ["p"]}
CLOSED = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "additionalProperties": False}
plain = st.sampled_from([SCHEMA, CLOSED, {"enum": [1, "a"]}, {"type": "string", "pattern": "^a+$"}, {"not": {}},
                         {"$ref": "#"}, {"type": "string"}])  # fmt: skip
KEYWORDS = ("type", "format", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "properties", "items",
            "required", "pattern", "minLength", "maximum", "multipleOf", "additionalProperties",
            "prefixItems")  # fmt: skip
bent = st.builds(lambda schema, key, value: {"anyOf": [{**schema, key: value}]}, plain, st.sampled_from(KEYWORDS),
                 values)  # fmt: skip
SCHEMAS = plain | bent
part_lists = st.lists(st.builds(lambda text: {"type": "text", "text": text}, texts), max_size=2)
call = st.builds(lambda i, name, a: {"id": i, "type": "function", "function": {"name": name, "arguments": a}},
                 mostly(st.sampled_from(["a", "b"])), mostly(st.sampled_from(["ls", "cp"])),
                 mostly(st.sampled_from(['{"p": "x"}', "{}", {"p": "x"}, ""])))  # fmt: skip
user = st.fixed_dictionaries({"role": mostly(st.just("user")), "content": mostly(texts | part_lists)})
system = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer"]), "content": mostly(texts)})
assistant = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": mostly(texts | st.none())},
    optional={"reasoning_content": mostly(texts), "reasoning": mostly(texts), "tool_calls": st.lists(call, max_size=2)},
)
loop = st.tuples(call, texts).map(lambda both: [
    {"role": "assistant", "content": None, "tool_calls": [both[0]]},
    {"role": "tool", "tool_call_id": both[0]["id"], "content": both[1]},
])  # fmt: skip
chat_turns = st.lists((user | system | assistant).map(lambda one: [one]) | loop, min_size=1, max_size=4).map(
    lambda parts: [message for part in parts for message in part]
)
functions = st.permutations(["ls", "cp"]).flatmap(lambda names: st.tuples(*(
    st.fixed_dictionaries({"name": mostly(st.just(name))}, optional={
        "description": mostly(texts), "parameters": mostly(st.sampled_from([SCHEMA, CLOSED]), SCHEMAS),
        "strict": mostly(st.sampled_from([False, None, True]))})
    for name in names)).map(list))  # fmt: skip
tools = functions.map(lambda found: [{"type": "function", "function": function} for function in found])
choices = mostly(st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "ls"}},
                                  {"type": "function", "function": {"name": "rm"}}]))  # fmt: skip
formats = mostly(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}])
    | SCHEMAS.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}})
)
structured = mostly(
    st.sampled_from([{"regex": "a+"}, {"regex": "("}, {"choice": ["a", "b"]}, {"grammar": 'root ::= "a"'}, {}])
    | SCHEMAS.map(lambda schema: {"json": schema})
)
ids = st.integers(0, 99)
sampling: dict[str, Any] = {
    "temperature": st.floats(0, 2), "top_p": st.floats(0.1, 1), "top_k": st.integers(-1, 50), "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1), "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.just(0.5),
    "repetition_penalty": st.floats(0.5, 2), "min_tokens": st.integers(0, 3), "n": st.integers(1, 2),
    "stop": texts.filter(bool) | st.lists(texts.filter(bool), max_size=2), "stop_token_ids": st.lists(ids, max_size=2),
    "include_stop_str_in_output": st.booleans(), "ignore_eos": st.booleans(), "skip_special_tokens": st.booleans(),
    "logit_bias": st.dictionaries(ids.map(str), st.floats(-100, 100), max_size=2),
    "bad_words": st.lists(texts.filter(str.strip), max_size=2), "max_tokens": st.integers(1, 60),
    "thinking_token_budget": st.integers(-1, 9), "priority": st.integers(-2, 2), "cache_salt": st.just("s"),
    "truncate_prompt_tokens": st.just(-1) | st.integers(1, 500), "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(), "echo": st.booleans(), "response_format": formats,
    "structured_outputs": structured, "prompt_logprobs": st.integers(0, 2), "unknown": values,
}  # fmt: skip


def few(fields: dict[str, Any], most: int = 5) -> st.SearchStrategy[dict[str, Any]]:
    """A few of the fields at a time: one that is wrong hides all others."""
    chosen = st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: mostly(fields[name]) for name in names}))


def merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


chat_bodies = merged(
    few({**sampling, "max_completion_tokens": st.integers(1, 60), "logprobs": st.just(True), "tools": tools,
         "parallel_tool_calls": st.booleans(), "reasoning_effort": st.sampled_from(["none", "low"]),
         "include_reasoning": st.booleans(), "chat_template_kwargs": st.just({"x": 1})}),
    few({"tool_choice": choices, "continue_final_message": st.booleans(), "logprobs": st.booleans(),
         "top_logprobs": st.integers(0, 3), "add_generation_prompt": st.booleans()}, most=1),
    st.fixed_dictionaries({"messages": mostly(chat_turns)}),
)  # fmt: skip
prompts = texts | st.lists(texts, min_size=1, max_size=2) | st.lists(ids, min_size=1) | st.just([[1], [2, 3]])
text_bodies = merged(
    few({**sampling, "logprobs": st.integers(0, 2)}, most=3),
    st.fixed_dictionaries({"prompt": mostly(prompts)}, optional={"echo": st.booleans()}),
)
items = mostly(texts) | st.lists(mostly(st.fixed_dictionaries(
    {"type": mostly(st.just("message")), "role": mostly(st.sampled_from(["user", "assistant", "system"])),
     "content": mostly(texts | st.lists(st.fixed_dictionaries({"type": st.just("input_text"), "text": texts})))},
) | st.fixed_dictionaries(
    {"type": mostly(st.sampled_from(sorted(READ_ITEMS))), "call_id": mostly(st.sampled_from(["a", "b"])),
     "name": mostly(st.just("ls")), "arguments": mostly(st.just('{"p": "x"}')), "output": mostly(texts),
     "role": st.just("assistant"),
     "content": mostly(st.lists(st.fixed_dictionaries({"type": st.just("reasoning_text"), "text": texts}), max_size=1)),
     "summary": st.just([])},
    optional={"encrypted_content": mostly(texts), "id": mostly(st.just("fc_0123456789abcdef_0"))},
)), min_size=1, max_size=4)  # fmt: skip
response_bodies = merged(
    st.fixed_dictionaries({"input": items}),
    few({
        "instructions": texts, "tools": functions.map(lambda found: [{"type": "function", **one} for one in found]),
        "tool_choice": choices, "parallel_tool_calls": st.booleans(), "max_output_tokens": st.integers(1, 60),
        "reasoning": st.fixed_dictionaries({}, optional={"effort": st.sampled_from(["none", "high"]),
                                                         "summary": st.just("auto")}),
        "text": st.fixed_dictionaries({}, optional={"verbosity": st.just("low"), "format": mostly(SCHEMAS.map(
            lambda schema: {"type": "json_schema", "name": "r", "schema": schema}))}),
        "include": st.lists(st.sampled_from(["reasoning.encrypted_content", "message.output_text.logprobs"])),
        "truncation": st.sampled_from(["auto", "disabled"]), "metadata": st.just({"k": "v"}), "store": st.booleans(),
        "temperature": st.floats(0, 2), "top_logprobs": st.integers(0, 2), "stop": texts.filter(bool),
        "previous_response_id": st.just("resp_0"), "return_token_ids": st.booleans(), "unknown": values,
    }),
)  # fmt: skip
