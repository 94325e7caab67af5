"""Chat templates of the published kinds, in words of our own, and tokenizers that fit them."""

from pathlib import Path

from minilm.data import BPETokenizer
from minilm.data.library import library
from minilm.files import write_json

CHATML = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

LLAMA2 = """
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- for message in messages[first:] -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('users and assistants must take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set rules = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}
        {{- bos_token + '[INST] ' + (rules if first and loop.first else '') }}
        {{- message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""

LLAMA3 = """
{{- bos_token }}
{%- if tools is not none %}{{ raise_exception('no tools') }}{% endif %}
{%- set ns = namespace(day=date_string if date_string is defined else strftime_now('%d %b %Y')) %}
{%- for m in messages if m.content is string %}
    {%- if loop.first and m.role == 'system' -%}
        {% set body = 'Today: ' + ns.day + '\\n\\n' + m.content|trim %}
    {%- else %}{% set body = m.content|trim %}{% endif %}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ body ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """
{%- set rules = messages[0]['content'] if messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] if rules else messages %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role not in ['user', 'assistant'] %}
        {{- raise_exception('only users and assistants, not ' + turn.role) }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- '[INST]' + ((rules + '\\n\\n') if rules and loop.last else '') + turn.content }}
        {{- '[/INST]' }}
    {%- else %}{{ turn.content + eos_token }}{% endif %}
{%- endfor %}
"""

ZEPHYR = """
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}
{%- for m in messages %}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
{{ '<start_of_turn>model' }}
{% endif %}
"""

# Only the last answer has a thought, as in models that reason: texts of earlier turns change.
THINKING = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

GENERATION = """
{%- for m in messages %}
    {%- if m.role == 'assistant' -%}
        <|im_start|>assistant{{ '\\n' }}
        {%- generation -%} {{- m.content + '<|im_end|>' -}} {%- endgeneration -%}
    {%- else -%}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' -}}
    {%- endif -%} {{- '\\n' -}}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LOOPS = """
{%- for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}
{%- if m.role == 'system' %}{% continue %}{% endif %}
{{- m | tojson }}{{ {'b': '<é>', 'a': [1]} | tojson(indent=2, sort_keys=true) }}
{%- for key, value in m | dictsort %}{{ key }}={{ value | length }};{% endfor %}
{{- dict(a=1)['a'] }}{{ missing }}{{ tools is none }}{{ documents is none }}
{%- endfor %}{{ eos_token }}
"""

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL,
             "zephyr": ZEPHYR, "gemma": GEMMA, "thinking": THINKING, "generation": GENERATION,
             "loops": LOOPS}
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
PROSE = ["the cat and the dog sat on the mat. Who sat on it? The cat did. " * 20,
         "naïve café 数学 😀 user assistant system model " * 10]


def byte_level() -> BPETokenizer:
    """Byte-level BPE, as Llama 3's and Qwen's."""
    tokenizer = BPETokenizer.train(PROSE, 340)
    tokenizer.tokenizer.add_special_tokens(MARKS)
    return BPETokenizer(tokenizer.tokenizer)


def with_spaces() -> BPETokenizer:
    """Words with ▁ in front, and bytes for what is unknown, as Llama 2's and Gemma's."""
    tokens = library()
    words = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aehtcdogs", "▁t", "he",
             "▁the", "▁c", "at", "▁cat"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    tokenizer = tokens.Tokenizer(tokens.models.BPE(
        {word: id for id, word in enumerate(words)}, merges, byte_fallback=True))
    tokenizer.normalizer = tokens.normalizers.Sequence(
        [tokens.normalizers.Prepend("▁"), tokens.normalizers.Replace(" ", "▁")])
    tokenizer.decoder = tokens.decoders.Sequence(
        [tokens.decoders.Replace("▁", " "), tokens.decoders.ByteFallback(), tokens.decoders.Fuse(),
         tokens.decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(MARKS)
    return BPETokenizer(tokenizer)


def write_folder(path: Path, tokenizer, source: str | None = None, where: str = "config") -> Path:
    """A tokenizer's folder whose template is in the config, in a list there, or in a file."""
    path.mkdir(exist_ok=True)
    tokenizer.save(path / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    if where == "config" and source:
        config["chat_template"] = source
    elif where == "list":
        config["chat_template"] = [{"name": "default", "template": source},
                                   {"name": "tool_use", "template": "{{ tools }}"}]
    elif where == "file":
        config["chat_template"] = "an older one"
        (path / "chat_template.jinja").write_text(source)
    write_json(path / "tokenizer_config.json", config)
    return path
