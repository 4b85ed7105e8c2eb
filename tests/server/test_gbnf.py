"""GBNF and vLLM's words for structured output: what a grammar accepts, its errors by line, and answers of a real model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import ollama
import openai
import pytest
from llguidance import LLMatcher, LLTokenizer

from ollamapy.errors import BadRequest
from ollamapy.server.gbnf_lark import to_lark
from ollamapy.server.grammar_check import END, ByteTokens
from tests.server.daemon import Daemon

MODEL = "smollm2"
USER: list[Any] = [{"role": "user", "content": "Say something."}]
JSON = r"""
# a comment with "quotes" and ::= signs
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws   # and one here
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
CASES = [
    ('root ::= "a" "b"', ["ab"], ["", "a", "abb", "b"]),
    ('root ::= "a" | "bc"\n', ["a", "bc"], ["b", "abc", ""]),
    ('root ::= "a" |\n  "b" |\n  # nothing\n  "c"', ["a", "b", "c"], [""]),
    ('root ::= | "a"', ["", "a"], ["aa"]),
    ('root ::= ("ab")* "c"', ["c", "abc", "ababc"], ["ac", "abac"]),
    ('root ::= "ab"* "c"', ["c", "ababc"], ["abbc"]),
    ('root ::= "ab"{2} "c"{1,} "d"{0,2} [e]{2,3}', ["ababcee", "ababccddeee"], ["abcee", "ababee", "ababcdddee", "ababce"]),
    ('root ::= "a"+ "b"?', ["a", "aab"], ["b", "abb"]),
    ("root ::= [a-c^-]+", ["abc", "^-"], ["d", ""]),
    ("root ::= [^a-c\\]]", ["d", "é", "\n", "["], ["a", "]", "de"]),
    (r"root ::= [\x41-\x43] [\u00e4-\u00fc] [\U0001F600-\U0001F64F]", ["Aäß😀".replace("ß", "")], ["Da😀", "Aä"]),
    (r'root ::= "\x41\u00e9\U0001F600\n\t\\\"\[\]"', ['Aé😀\n\t\\"[]'], ["A"]),
    (r'root ::= "a/b.*+?(){}|^$&&--~~ #"', ["a/b.*+?(){}|^$&&--~~ #"], ["a/bb"]),
    (r"root ::= [!#$%&'()*+,./:;<=>?@\\^_`{|}~&&~~-]+", ["~&-|\\", "()[".replace("[", "")], ["a", "["]),
    ("root ::= . .", ["ab", "\né"], ["a", "abc"]),
    ('root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" expr ")"', ["1", "(1+2)*3", "((4))"], ["1+", "(1"]),
    ('root ::= "(" root ")" | a-b\na-b ::= "x" A_b\nA_b ::= "y"', ["xy", "((xy))"], ["(xy", "x"]),
    ('root ::= [a-z]+ "end" | "(" root ")"', ["abend", "(enend)", "endend"], ["abc", "(end)"]),
    (JSON, ['{"a": [1, -2.5e3, true], "ü": {"x": null}}', "{}", '{"\\u00e9": "\\n"}'], [ '{"a"}', '{"a": 01}', '{"a": tru}']),
]  # fmt: skip


def accepts(grammar: str, text: str) -> bool:
    tokenizer = LLTokenizer(ByteTokens(), slices=[])  # type: ignore[arg-type]
    matcher = LLMatcher(
        tokenizer, msgspec.json.encode({"grammars": [{"lark_grammar": to_lark(grammar)}]}).decode(), log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    tokens = [*text.encode(), END]
    return matcher.validate_tokens(tokens) == len(tokens)


@pytest.mark.parametrize(("grammar", "inside", "outside"), CASES)
def test_what_a_grammar_accepts(grammar: str, inside: list[str], outside: list[str]) -> None:
    for given in (grammar, grammar.replace("\n", "\r\n")):
        assert [text for text in inside if not accepts(given, text)] == []
        assert [text for text in outside if accepts(given, text)] == []


@pytest.mark.parametrize(("grammar", "problem"), [
    ('start: "a"', "line 1: '::=' is expected after the name 'start'"),
    ('a ::= "x"', "there is no rule 'root'"),
    ('root ::= a\n\na ::= "x" b\n', "line 3: there is no rule 'b'"),
    ('root ::= "a"\nroot ::= "b"', "line 2: there is a rule 'root' already"),
    ('root ::= "a" # fine\n\nb ::= ("x" | [y)', "line 3: the text ends inside quotes or brackets"),
    ('root ::= ("a"\n"b"\n', "line 3: ')' is expected"),
    ('root ::= "a" )', "line 1: the end of the line is expected, at ')'"),
    (r'root ::= "\q"', r"line 1: an unknown escape, at '\\q"),
    (r'root ::= "\x4"', "line 1: an unknown escape"),
    (r'root ::= "\ud800"', "line 1: an unknown escape"),
    ("root ::= [z-a]", "line 1: a range of characters that is empty"),
    ("root ::= []", "line 1: a set of no characters"),
    ('root ::= "a"{3,2}', "line 1: from 3 to 2 repetitions"),
    ('root ::= "a"{2001}', "line 1: more than 2000 repetitions"),
    ('root ::= "a"{x}', "line 1: a number is expected, at 'x}'"),
    ('root ::=\n<think> "a"', "line 2: tokens in angle brackets are not supported"),
    ("root ::= " + "(" * 99, "more than 64 parentheses"),
])  # fmt: skip
def test_errors_name_the_line(grammar: str, problem: str) -> None:
    with pytest.raises(BadRequest) as caught:
        to_lark(grammar)
    assert problem in str(caught.value) and str(caught.value).startswith("invalid grammar: ")


def test_rules_that_double_stay_small() -> None:
    rules = "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40))
    assert len(to_lark(f'root ::= r0\n{rules}\nr40 ::= "x"')) < 100_000
    chain = "\n".join(f"r{i} ::= (((((r{i + 1})))))" for i in range(1500))
    try:
        to_lark(f'root ::= r0\n{chain}\nr1500 ::= "x"')
    except BadRequest as error:
        assert "nested too deeply" in str(error)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


LIST = 'root ::= item{2,3}\nitem ::= "- " [a-z]{2,9} "\\n"'
LISTS = r"(- [a-z]{2,9}\n){2,3}"


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_keep_to_a_grammar(daemon: Daemon, client: ollama.Client, temperature: float) -> None:
    options = {"temperature": temperature, "top_k": 0, "seed": 1, "num_predict": 200}
    asked = {"model": MODEL, "prompt": "A list:", "stream": False, "options": options}
    answers = [
        daemon.post("/api/generate", {**asked, "grammar": LIST}),
        daemon.post("/api/generate", {**asked, "format": {"gbnf": LIST}}),
        daemon.post("/api/generate", {**asked, "options": {**options, "grammar": LIST}}),
    ]
    texts = [answer.json()["response"] for answer in answers]
    assert texts[0] == texts[1] == texts[2] and re.fullmatch(LISTS, texts[0]), [answer.text for answer in answers]
    client.create("listing", from_=MODEL, parameters={"grammar": LIST})
    assert daemon.post("/api/generate", {**asked, "model": "listing"}).json()["response"] == texts[0]
    own = daemon.post("/api/generate", {**asked, "model": "listing", "format": {"choices": ["yes"]}})
    assert own.json()["response"] == "yes", "the request's comes before the model's"


@pytest.mark.parametrize(("body", "pattern"), [
    ({"grammar": LIST}, LISTS),
    ({"guided_grammar": LIST}, LISTS),
    ({"guided_grammar": 'start: "a" | "b"'}, "a|b"),
    ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
    ({"guided_choice": ["red", "green"]}, "red|green"),
    ({"guided_json": {"enum": [None, 5]}}, "null|5"),
    ({"guided_json": '{"const": 7}'}, "7"),
    ({"json_schema": {"const": 8}}, "8"),
    ({"response_format": {"type": "json_object", "schema": {"const": 9}}}, "9"),
    ({"structured_outputs": {"json": {"const": 1}, "regex": None}}, "1"),
    ({"structured_outputs": {"regex": "x{4}"}}, "xxxx"),
    ({"structured_outputs": {"choice": ["left"]}}, "left"),
    ({"structured_outputs": {"grammar": LIST}}, LISTS),
])  # fmt: skip
def test_the_words_of_others(api: openai.OpenAI, body: dict[str, Any], pattern: str) -> None:
    made = api.chat.completions.create(model=MODEL, messages=USER, temperature=1.2, seed=3, max_tokens=90, extra_body=body)
    assert re.fullmatch(pattern, made.choices[0].message.content or ""), made
    plain = api.completions.create(model=MODEL, prompt="Say it:", temperature=0, max_tokens=90, extra_body=body)
    assert re.fullmatch(pattern, plain.choices[0].text), plain


@pytest.mark.parametrize(("body", "text"), [
    ({"grammar": 'root ::= "a"\nb ::= ['}, "invalid grammar: line 2: the text ends inside quotes or brackets"),
    ({"guided_regex": "(("}, "unclosed group"),
    ({"guided_json": "{"}, "guided_json: "),
    ({"guided_json": [1]}, "guided_json: a JSON Schema is an object"),
    ({"guided_choice": [5]}, "invalid request: Expected `str`"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex and guided_choice: an answer can be held to only one"),
    ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "response_format and guided_choice: "),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.regex and structured_outputs.choice: "),
    ({"structured_outputs": {"regex": "a"}, "grammar": LIST}, "grammar and structured_outputs.regex: "),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs: structural_tag: not supported"),
    ({"structured_outputs": {"regex": ["a"]}}, '"regex" must be a str'),
])  # fmt: skip
def test_refusals(api: openai.OpenAI, body: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model=MODEL, messages=USER, max_tokens=3, extra_body=body)
    assert text in caught.value.message


def test_two_forms_at_once_are_refused(daemon: Daemon) -> None:
    for more in ({"grammar": LIST}, {"options": {"grammar": LIST}}):
        refused = daemon.post("/api/generate", {"model": MODEL, "prompt": "x", "format": "json", **more})
        assert refused.status_code == 400 and "format and grammar: " in refused.json()["error"]
