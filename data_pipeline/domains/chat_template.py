"""The chat templates of exported models, in Jinja, for transformers' `apply_chat_template`.

They render what `chat.render` renders, without its final <|user|>: text as it is, one <|image|> per image and one
<|video|> per video. A caller may set the variables `tools`, `enable_thinking` and `add_generation_prompt`.
"""

from __future__ import annotations

_VISIBLE = """\
{%- macro visible(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part is string -%}
        {{- part -}}
      {%- elif part.type == 'text' -%}
        {{- part.text -}}
      {%- elif part.type in ('image', 'image_url') -%}
        {{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
      {%- elif part.type in ('video', 'video_url') -%}
        {{- '<|begin_of_video|><|video|><|end_of_video|>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

# The list of tools, an assistant's calls, and a response, as in tool_calls.py.
_TOOLS = """\
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
  {{- '<|system|>\\n# Tools\\n\\n' -}}
  {{- 'You may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' -}}
  {%- for tool in tools -%}
    {{- tool | tojson(ensure_ascii=False) + '\\n' -}}
  {%- endfor -%}
  {{- '</tools>\\n\\nFor each function call, ' -}}
  {{- 'output the function name and arguments within the following XML format:\\n<tool_call>{function-name}\\n' -}}
  {%- for number in ('1', '2') -%}
    {{- '<arg_key>{arg-key-' + number + '}</arg_key>\\n<arg_value>{arg-value-' + number + '}</arg_value>\\n' -}}
  {%- endfor -%}
  {{- '...\\n</tool_call>' -}}
{%- endif -%}
"""

_CALLS = """\
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function or call -%}
      {{- '\\n<tool_call>' + function.name + '\\n' -}}
      {%- for key, value in function.arguments.items() -%}
        {%- set written = value if value is string else value | tojson(ensure_ascii=False) -%}
        {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' + written + '</arg_value>\\n' -}}
      {%- endfor -%}
      {{- '</tool_call>' -}}
    {%- endfor -%}
"""

_RESPONSE = """\
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|observation|>' -}}
    {%- endif -%}
    {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
"""

_GLM45V = (
    _VISIBLE
    + """\
{%- set thinking = enable_thinking is not defined or enable_thinking -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- set last.user = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
"""
    + _TOOLS
    + """\
{%- for message in messages -%}
  {%- set content = visible(message.content or '') -%}
  {%- if message.role == 'system' -%}
    {{- '<|system|>\\n' + content -}}
  {%- elif message.role == 'user' -%}
    {{- '<|user|>\\n' + content -}}
    {%- if not thinking and not content.endswith('/nothink') -%}
      {{- '/nothink' -}}
    {%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if message.reasoning_content -%}
      {%- set reasoning = message.reasoning_content.strip() -%}
    {%- elif '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() -%}
      {%- set content = content.split('</think>')[-1] -%}
    {%- endif -%}
    {{- '<|assistant|>\\n' -}}
    {%- if thinking and reasoning and loop.index0 > last.user -%}
      {{- '<think>' + reasoning + '</think>' -}}
    {%- else -%}
      {{- '<think></think>' -}}
    {%- endif -%}
    {%- if content.strip() -%}
      {{- '\\n' + content.strip() -}}
    {%- endif -%}
"""
    + _CALLS
    + _RESPONSE
    + """\
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\\n' -}}
  {%- if not thinking -%}
    {{- '<think></think>\\n' -}}
  {%- endif -%}
{%- endif -%}
"""
)

_GLM41V = (
    _VISIBLE
    + """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
  {%- if message.role in ('system', 'user', 'assistant') -%}
    {{- '<|' + message.role + '|>\\n' -}}
    {%- if message.role == 'assistant' and message.reasoning_content -%}
      {{- '<think>' + message.reasoning_content + '</think>\\n' -}}
    {%- endif -%}
    {{- visible(message.content) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
)

# A response of text alone ends with a line break.
_GLM46V = _GLM45V.replace(
    _RESPONSE, _RESPONSE + "    {%- if message.content is string -%}\n      {{- '\\n' -}}\n    {%- endif -%}\n"
)

CHAT_TEMPLATES = {"glm45v": _GLM45V, "glm41v": _GLM41V, "glm46v": _GLM46V}
