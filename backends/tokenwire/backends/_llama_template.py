"""The chat template of a model in ChatML that was never told of tools.

llama.cpp finds out by itself how a template writes tool calls, holds the model to that grammar and reads the calls back.
A template without tools, as that of SmolLM2, makes it drop a request's tools without a word. Ours writes the same turns
in the same marks, and tool calls as the Hermes models were trained to write them, which many others have learnt since.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CALL_END", "CALL_MARK", "CHATML_WITH_TOOLS", "knows_tools", "template_for"]

CALL_MARK: Final = "<tool_call>\n"
"""How a turn that calls a tool begins."""

CALL_END: Final = "</tool_call>"
"""How the call ends."""

CHATML_WITH_TOOLS: Final = r"""
{%- set first_is_system = messages[0].role == 'system' %}
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if first_is_system %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- 'You can call these functions:\n<tools>\n' }}
{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{{- '</tools>\nTo call one, write its name and its arguments like this:\n' }}
{{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif first_is_system %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}
{{- call.function.arguments }}
{%- else %}
{{- call.function.arguments | tojson }}
{%- endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".lstrip()
"""The turns of ChatML with tools. There is no system turn where the client sent none: with the one that SmolLM2's own
template puts there, its 4-bit weights take the capital of France for a Marseillaise."""

_CHATML_MARK: Final = "<|im_start|>"


def knows_tools(template: str) -> bool:
    """Say whether a template has a place for tools."""
    return "tools" in template


def template_for(template: str) -> str | None:
    """Choose what stands in for a model's own template; None where it stays, because it knows tools or is no ChatML."""
    if knows_tools(template) or _CHATML_MARK not in template:
        return None
    return CHATML_WITH_TOOLS
