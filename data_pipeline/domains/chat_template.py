"""The chat templates of exported models, in Jinja, for transformers' `apply_chat_template`.

They render what `chat.render` renders, without its final <|user|>: text as it is, one <|image|> per image and one
<|video|> per video. A caller may set the variables `enable_thinking` and `add_generation_prompt`.
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
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
  {%- set content = visible(message.content) -%}
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

CHAT_TEMPLATES = {"glm45v": _GLM45V, "glm41v": _GLM41V}
