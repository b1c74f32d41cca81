"""Chat templates in the manner of well-known models, each a short version of our own."""

from __future__ import annotations

QWEN2_5 = """\
{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role in ('user', 'assistant') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Thinking is kept after the last question and dropped before it; an answer without any gets an empty block.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = '' %}
{%- if '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + answer }}
{%- else %}
{{- '<|im_start|>assistant\\n' + answer }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The generation prompt opens the thinking block, which the template never writes into the history.
REASONER = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].strip() + eos_token }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

LLAMA3 = """\
{{- '<|begin_of_text|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# No generation prompt at all; a space before the end of the turn.
LLAMA2 = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content.strip() + ' ' + eos_token }}
{%- else %}{{- '<<SYS>>' + m.content + '<</SYS>>' }}{%- endif %}
{%- endfor %}"""

# Marks the turns itself, with the newline inside the mark.
MARKED = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Marks a turn's text and its end apart, and the end of the conversation too.
MARKED_IN_PARTS = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{- m.content }}{% endgeneration %}
{%- else %}{{- m.content }}{%- endif %}
{%- if m.role == 'assistant' %}{% generation %}{{- '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{% generation %}{{- '</s>' }}{% endgeneration %}"""

# Two tokens end a turn, and nothing stands between turns.
TWO_ENDS = """\
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content }}
{%- if m.role == 'assistant' %}{{- '</s>' }}{%- endif %}{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>' }}{%- endif %}"""

# The generation prompt closes the thinking block; a turn with thoughts opens another one.
NO_THINKING = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and '</think>' not in m.content %}{{- '<think></think>' }}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think></think>' }}{%- endif %}"""

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
