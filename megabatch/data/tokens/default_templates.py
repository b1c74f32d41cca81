"""Chat templates for tokenizers that bring none: ChatML, and plain text for base models.

Both read `tools`, `tool_calls`, `tool` messages and `reasoning_content`. They write a call as JSON between
`<tool_call>` tags, like Hermes and Qwen, and a result between `<tool_response>` tags.
"""

from __future__ import annotations

_MACROS = r"""
{%- macro functions() %}
{{- 'You can call these functions, each described by a JSON schema:\n<tools>\n' }}
{%- for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}
{{- '</tools>\nTo call one, write its name and arguments as JSON:\n<tool_call>\n' }}
{{- '{"name": <name>, "arguments": <arguments>}\n</tool_call>' }}
{%- endmacro %}
{%- macro said(message) %}
{%- if message['reasoning_content'] %}
{{- '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' }}
{%- endif %}
{{- message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
{%- set function = call['function'] or call %}
{{- '\n' if message['content'] or not loop.first }}
{{- '<tool_call>\n{"name": ' + (function['name'] | tojson) + ', "arguments": ' }}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{%- endmacro %}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- set listed = (system + '\n\n' if system else '') + functions() if tools else '' %}"""

CHATML = (
    _MACROS
    + r"""
{%- if tools %}{{ '<|im_start|>system\n' + listed + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'tool' %}
{%- if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}
{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- elif not (tools and loop.first and message['role'] == 'system') %}
{{- '<|im_start|>' + message['role'] + '\n' + said(message) + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
).lstrip("\n")
"""ChatML, for tokenizers whose vocabulary has its two tokens."""

PLAIN = (
    _MACROS
    + r"""
{%- if tools %}{{ 'System: ' + listed + '\n' }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'tool' %}
{{- 'Tool: <tool_response>\n' + message['content'] + '\n</tool_response>\n' }}
{%- elif not (tools and loop.first and message['role'] == 'system') %}
{{- (message['role'] | capitalize) + ': ' + said(message) }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{{- '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""
).lstrip("\n")
"""For base models without chat tokens: `User: …\\nAssistant: …<eos>\\n`."""


OWN_TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
"""By name in `data.template`."""


def with_bos(source: str) -> str:
    """The template for a tokenizer that puts BOS before every text."""
    return "{{- bos_token }}" + source
