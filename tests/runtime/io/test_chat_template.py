"""Chat templates: where they are found, what they may use, and what hostile ones cannot do."""

import json
import subprocess
import sys
import time

import pytest
from support.tokenizers import CHAT_TEMPLATE, write_json
from transformers.utils.chat_template_utils import render_jinja_template

from afnext.runtime.errors import CheckpointError, PromptError
from afnext.runtime.io import chat_template
from afnext.runtime.io.chat_template import PromptTemplate

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "text", "text": "<hi>"}]}]

RENDERED_LIKE_THE_REFERENCE = {
    "chatml": CHAT_TEMPLATE,
    "trimmed blocks": "  {% if true %}\n  x\n  {% endif %}\ny\n\n",
    "loop variables": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }};{% endfor %}",
    "loop filter and else": "{% for m in messages if m.role == 'system' %}a{% else %}none{% endfor %}",
    "nested and recursive": "{% for m in [1, [2, [3]]] recursive %}{{ m if m is number else loop(m) }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "unpacking": "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v }}{% endfor %}",
    "namespace": "{% set n = namespace(v='') %}{% for m in messages %}{% set n.v = n.v + 'x' %}{% endfor %}{{ n.v }}",
    "generation block": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "macro": "{% macro turn(m, end='') %}[{{ m.role }}{{ end }}]{% endmacro %}{{ turn(messages[0], end='!') }}",
    "arithmetic": "{{ 3 * 4 + 2 ** 5 }}{{ '-' * 3 }}{{ 3 * '+' }}{{ [1] * 2 }}{{ 'x' ~ 1 ~ none }}",
    "absent names": "{{ tools is none }}{{ documents is none }}{{ other is defined }}{% for x in other %}{% endfor %}",
    "special names": "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}",
    "membership": "{{ 'user' in messages | map(attribute='role') }}{{ 'x' in 'xyz' }}{{ messages[0] == messages[0] }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join('|', attribute='role') }}"
    "{{ 'a-b-c' | replace('-', '+') }}{{ 'a\\nb' | indent(2, first=true) }}{{ [3, 1, 2] | sort | list }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '<b>' | safe }}{{ none | default('d') }}"
    "{{ ' x ' | trim | upper }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2] | sum }}{{ '7' | int + 1 }}",
    "methods": "{{ ' a,b '.strip().split(',') }}{{ 'x'.join(['1', '2']) }}{{ 'aXb'.replace('X', 'Y', 1) }}"
    "{{ messages[0].get('role').upper() }}{{ 'abc'.startswith('ab') }}{{ 'abc'[::-1] }}{{ messages[::-1][0].role }}",
    "set block": "{% set x %}a{{ messages[0].role }}{% endset %}{{ x }}{% filter upper %}{{ x }}{% endfilter %}",
    "today": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("source", RENDERED_LIKE_THE_REFERENCE.values(), ids=RENDERED_LIKE_THE_REFERENCE.keys())
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_like_the_reference(source, add_generation_prompt):
    names = {"bos_token": "[BOS]", "eos_token": "<|im_end|>"}
    (expected,), _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=add_generation_prompt, **names
    )
    template = PromptTemplate(source)
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt, variables=names) == expected


def test_found_in_the_jinja_file_before_any_config(tmp_path):
    with pytest.raises(PromptError, match="no chat template"):
        PromptTemplate.from_folder(tmp_path)
    named = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": "from tokenizer"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert PromptTemplate.from_folder(tmp_path).source == "from tokenizer"
    write_json(tmp_path / "chat_template.json", {"chat_template": "from chat_template"})
    assert PromptTemplate.from_folder(tmp_path).source == "from chat_template"
    write_json(tmp_path / "processor_config.json", {"chat_template": {"default": "from processor"}})
    assert PromptTemplate.from_folder(tmp_path).source == "from processor"
    (tmp_path / "chat_template.jinja").write_text("from jinja — ü", encoding="utf-8")
    assert PromptTemplate.from_folder(tmp_path).source == "from jinja — ü"


@pytest.mark.parametrize("value", [5, ["a"], [{"name": "rag", "template": "x"}], {"default": None}])
def test_a_config_without_a_usable_template_is_refused(tmp_path, value):
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(PromptError, match=r"chat_template in tokenizer_config\.json"):
        PromptTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * (2**20 + 1)])
def test_a_damaged_or_huge_file_is_refused(tmp_path, content):
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        PromptTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 +", "{% unknown %}", "(" * 3 + "{{" + "(" * 5000 + "}}"])
def test_broken_templates_do_not_compile(source):
    with pytest.raises(PromptError, match="does not compile"):
        PromptTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__ }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_filename }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.x }}",
        "{% set messages[0].role = 'system' %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum(100000) }}",
    ],
)
def test_nothing_outside_the_sandbox_is_reached_or_changed(source):
    before = json.dumps(MESSAGES)
    with pytest.raises(PromptError):
        PromptTemplate(source).render(MESSAGES)
    assert json.dumps(MESSAGES) == before


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set s = 'x' * 9999 %}{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    ],
)
def test_endless_work_meets_the_deadline(source, monkeypatch):
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(PromptError, match="did not finish within"):
        PromptTemplate(source).render(MESSAGES)
    assert time.monotonic() - start < 5


COPIES = "{% set n = namespace(v=['x' * 1000]) %}{% for i in range(40) %}{% set n.v = [n.v, n.v] %}{% endfor %}"
LONG = "{% set s = 'ab' * 1000000 %}"


BOMBS = [
    "{{ 'x' | center(10 ** 9) }}",
    "{{ 'x'.center(10 ** 9) }}{{ 'x'.ljust(10 ** 9) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ 'a' * 4000 | replace('a', 'b' * 4000) }}",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "{{ ('a' * 9999).replace('', 'b' * 9999) }}",
    "{{ ('b' * 9999).join('a' * 9999) }}",
    "{{ ('a' * 9999) | join('b' * 9999) }}",
    "{{ ('\\n' * 9999) | indent(9999) }}",
    "{{ range(9) | batch(10 ** 9, 1) | list }}",
    "{{ 'x' | slice(10 ** 9) | list }}",
    "{{ range(99999) | map('string') | map('list') | sum(start=[]) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ messages | tojson(separators=('x' * 1000000, 'y')) }}",
    *(COPIES + use for use in ("{{ n.v }}", "{{ n.v | tojson }}", "{{ n.v | string }}", "{{ n.v == n.v }}", "")),
    "{% set n = namespace(v='') %}{% for i in range(60) %}{% set n.v = namespace(a=n, b=n) %}{% endfor %}{{ n }}",
    LONG + "{% for i in range(9999) %}{% if s ~ 'x' == s ~ 'y' %}{% endif %}{% endfor %}",
    LONG + "{% macro f() %}" + "{{ s }}" * 5000 + "{% endmacro %}{{ f() }}",
    LONG + "{% set x %}" + "{{ s }}" * 5000 + "{% endset %}",
    LONG + "".join(f"{{% set s{i} = s[1:] %}}" for i in range(2000)),
    LONG + "{% if " + " or ".join(["'c' in s"] * 2000) + " %}{% endif %}",
    LONG + "{{ s | list }}{{ s.split('a') }}",
    LONG + "{{ s | int(0, 16) // 7 }}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}",
    "{{ strftime_now('%999999999d') }}",
    "{{ [1, 2] | random }}",
]
RENDER_IN_CHILD = """
import json, resource, sys, time
from afnext.runtime.errors import PromptError
from afnext.runtime.io import chat_template
bombs, messages = json.load(sys.stdin)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
chat_template.RENDER_SECONDS = 1
for bomb in bombs:
    start = time.process_time()
    try:
        chat_template.PromptTemplate(bomb).render(messages)
    except PromptError as error:
        if len(str(error)) < 1000 and time.process_time() - start < 20:
            continue
    print(bomb[:200])
print("done")
"""


def test_no_single_operation_takes_time_or_memory_without_bound():
    """In a child with little memory: some of these would take many gigabytes."""
    done = subprocess.run(
        [sys.executable, "-c", RENDER_IN_CHILD],
        input=json.dumps([BOMBS, MESSAGES]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'x' * 10 ** 12 }}", "characters"),
        ("{{ (10 ** 12) * 'x' }}", "characters"),
        ("{{ [0] * 10 ** 12 }}", "characters"),
        ("{{ 9 ** (9 ** 9) }}", "huge numbers"),
        ("{% set n = namespace(v='ab') %}{% for i in range(60) %}{% set n.v = n.v + n.v %}{% endfor %}", "characters"),
        ("{% set n = namespace(v='ab') %}{% for i in range(60) %}{% set n.v = n.v ~ n.v %}{% endfor %}", "characters"),
        ("{% set n = namespace(v=7) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}", "huge numbers"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses without end"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].role }}", "failed on these messages"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 'b' }}", "failed on these messages"),
        ("{{ messages | nothing }}", "compile"),
    ],
)
def test_bombs_and_failures_end_in_a_clear_error(source, says):
    with pytest.raises(PromptError, match=says):
        PromptTemplate(source).render(MESSAGES)
