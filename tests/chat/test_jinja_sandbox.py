"""A chat template is a stranger's code: it may neither leave the sandbox nor use more than its share."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamapy.chat import jinja
from ollamapy.errors import TemplateError

SECRET = "the-secret-5c1e"


class _Guarded:
    """An object of the program that a template must not reach into."""

    _secret = SECRET

    def __repr__(self) -> str:
        return "guarded"


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__']['__subclasses__']() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('__mro__') }}",
    "{{ ()|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "{{ [].__class__.__base__.__subclasses__()[0] }}",
    "{{ {}.__class__.__init__.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ range.__self__ }}",
    "{{ range.__globals__ }}",
    "{{ dict.__class__.__base__ }}",
    "{{ dict.mro() }}",
    "{{ raise_exception.__globals__['jinja2'] }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ raise_exception.__builtins__ }}",
    "{{ config.items() }}",
    "{{ request.application.__globals__.__builtins__.__import__('os') }}",
    "{{ get_flashed_messages.__globals__.__builtins__ }}",
    "{{ url_for.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(guarded) }}",
    "{{ '{0._secret}'.format(guarded) }}",
    "{{ '{x._secret}'.format_map({'x': guarded}) }}",
    "{{ ('{0._secret}'|attr('format'))(guarded) }}",
    "{% set f = '{0._secret}'.format %}{{ f(guarded) }}",
    "{{ ['{0._secret}']|map('format', guarded)|first }}{{ guarded._secret }}",
    "{{ [guarded]|map(attribute='_secret')|join }}",
    "{{ [guarded]|selectattr('_secret')|list }}",
    "{{ [guarded]|groupby('_secret') }}",
    "{{ [guarded]|sum('_secret') }}",
    "{{ [guarded]|sort(attribute='_secret') }}{{ guarded['_secret'] }}",
    "{{ guarded|attr('_secret') }}",
    "{% for x in (1,).__class__.__mro__ %}{{ x }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ m._environment }}",
    "{% macro m() %}{{ caller.__globals__ }}{{ caller._func }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(_x=1) %}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages.__setitem__(0, 1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].__init__() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{% from 'os' import system %}{{ system('id') }}",
    "{{ (1).__class__.__bases__ }}",
    "{{ (x for x in [1]).gi_frame }}",
    "{{ loop.__init__ }}{% for x in [1] %}{{ loop._iterator }}{{ loop.__class__ }}{% endfor %}",
    "{% for x in [1]|map('upper') %}{{ loop._iterable }}{% endfor %}{{ ([1]|map('upper')).gi_frame.f_globals }}",
    "{{ ([1]|select).gi_frame.f_back.f_globals }}",
    "{{ ([1]|select).gi_code }}",
    "{{ 'a'|map.__globals__ }}",
    "{{ undefined_thing.__init__.__globals__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ ''.encode().__class__ }}",
    "{{ 'x'.translate({120: 'y'}) }}",
    "{{ (1).to_bytes(1, 'big') }}",
    "{{ x.__doc__ }}{{ ''.__doc__ }}",
    "{% do messages.append(1) %}",
    "{% debug %}",
    "{{ environment.globals }}",
    "{{ context.parent }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_inert(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    try:
        made = jinja.render(source, {"messages": messages, "guarded": _Guarded()})
    except TemplateError:
        made = ""
    for trace in (SECRET, "<class", "<function", "<module", "<built-in", "uid=", "root:", "__builtins__", "frame at"):
        assert trace not in made
    assert messages == [{"role": "user", "content": "hi"}]


GROW = "{% set ns = namespace(s='aaaaaaaaaa', l=[1], t=(1,), d={'a': 1}, n=3) %}{% for i in range(100) %}"
BOMBS = [
    "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
    "{% for i in big %}{% for j in big %}{% endfor %}{% endfor %}",
    "{% for j in range(1000) %}{% for i in range(100000) if i < 0 %}{% endfor %}{% endfor %}",
    "{{ range(10**9) }}",
    "{{ range(10**9) | list }}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**9 * 'ab' }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(n=2**4000) %}{% for i in range(99999) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    GROW + "{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}{{ ns.d | tojson }}",
    GROW + "{% set ns.d = dict(a=ns.d, b=ns.d) %}{% endfor %}{{ ns.d == ns.d }}",
    GROW + "{% set ns.s = '%s%s' | format(ns.s, ns.s) %}{% endfor %}",
    GROW + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    GROW + "{% set ns.s = '{0}{0}{0}'.format(ns.s) %}{% endfor %}",
    GROW + "{% set ns.s = '{x}{x}'.format_map({'x': ns.s}) %}{% endfor %}",
    GROW + "{% set ns.s = ns.s.join([ns.s, ns.s, ns.s]) %}{% endfor %}",
    GROW + "{% set ns.s = [ns.s, ns.s] | join(ns.s) %}{% endfor %}",
    GROW + "{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    GROW + "{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
    GROW + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    GROW + "{% set t %}{% for j in range(9000) %}" + "A" * 5000 + "{% endfor %}{% endset %}{% endfor %}",
    GROW + "{% set ns.a = ns %}{% endfor %}{{ ns }}",
    "{% macro m(s, n) %}{% if n %}{{ m(s ~ s, n - 1) }}{{ m(s, n - 1) }}{% endif %}{% endmacro %}{{ m('aaaa', 50) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}{% for i in range(100000) %}"
    "{% call m() %}{% call m() %}{% call m() %}xxxxxxxx{% endcall %}{% endcall %}{% endcall %}{% endfor %}",
    "{% for i in [1, 2, 3] recursive %}x{{ loop([1, 2, 3]) }}{% endfor %}",
    "{% block x %}{{ self.x() }}{% endblock %}",
    "{% filter upper %}{% for i in range(100000) %}{{ big }}{% endfor %}{% endfilter %}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '\\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ ('{:1000000000}' | attr('format'))(1) }}",
    "{{ 'a' | indent(10**9, true) }}",
    "{{ ('a\\n' * 10000) | indent('x' * 100000) }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ {'a': [1, 2]} | tojson(indent=10**9) }}",
    "{{ [1, 2] | tojson(separators=(big, big)) }}",
    "{{ [[1] * 1000] * 1000 | sum(start=[]) }}",
    "{{ range(100000) | map('center', 90000) | join }}",
    "{{ ([big] * 100) | join }}",
    "{{ [big] * 100000 }}",
    "{{ ([big] * 100) | string }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{% for i in range(100000) %}{{ big }}{% endfor %}",
    *[
        "{% for i in range(100000) %}{% set x = " + expression + " %}{% endfor %}"
        for expression in (
            "big ~ i", "big[1:]", "big == big ~ ''", "'zz' in big", "big.upper()", "big | title", "big.split('x')",
            "big | list", "range(100000) | sum", "range(100000) | max",
            "range(100000) | map('string') | join", "99999 in range(100000) | list",
            "range(100000) | sort", "dict.fromkeys(range(100000))", "big | wordcount", "big.encode().hex()",
        )
    ],
    "{% set a = [big[1:]" + ", big[1:]" * 5000 + "] %}",
    "{{ big == big ~ ''" + " and big == big ~ ''" * 5000 + " }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for i in range(9) %}" * 60 + "x" + "{% endfor %}" * 60,
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "x" * 300_000,
]  # fmt: skip


@pytest.mark.parametrize("source", BOMBS, ids=lambda source: source[:70])
def test_bombs_are_stopped(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError):
        jinja.render(source, {"big": "x" * 1_000_000})
    assert time.monotonic() - started < 4  # 1 s by the clock, and what one large step may take on a busy machine


def test_other_renderings_go_on_meanwhile() -> None:
    """Each rendering has a budget of its own."""
    failed: list[str] = []

    def wedge() -> None:
        try:
            jinja.render(BOMBS[1], {})
        except TemplateError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=wedge) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert jinja.render("{% for x in range(100) %}{{ x % 10 }}{% endfor %}", {}) == "0123456789" * 10
    for thread in threads:
        thread.join()
    assert len(failed) == 3


def test_what_a_prompt_needs_is_within_the_limits() -> None:
    """A long chat with long texts is no bomb."""
    source = (
        "{% for m in messages %}{% if 'x' in m.content %}{{ '<' ~ m.role ~ '>' + m.content | trim }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x" * 3000}] * 1000
    assert len(jinja.render(source, {"messages": messages})) == 1000 * 3006


PIECES = (
    "{{ }} {% %} {%- -%} if else endif for in endfor set endset macro endmacro m call x messages[0].role loop.index | ~ + * % "
    "** ( ) [ ] , : = == not and 'ab' '%s{0}' 3 100000 range( .format( .join( |join |tojson |list |replace( "
    "|map( |sort |indent( namespace("
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES.split(" ")), max_size=25))
def test_any_text_renders_or_is_a_template_error(pieces: list[str]) -> None:
    try:
        jinja.render(" ".join(pieces), {"messages": [{"role": "user"}], "x": ["a", {"b": 1}]})
    except TemplateError as error:
        assert str(error)
