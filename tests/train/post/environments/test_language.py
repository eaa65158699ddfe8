"""The small language: what it computes, and that no program does more than it may."""

import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train.post.environments.language import Limits, Outcome, ProgramError, call, compile_program, run

SMALL = Limits(steps=400, bits=64, length=50, memory=500, depth=8)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x=2+3*4-10/3%2;", 13),
        ("x=-7/2;", -4),
        ("x=-7%3;", 2),
        ("x=- -3;", 3),
        ("x=(2+3)*4;", 20),
        ("x=1<2;", 1),
        ("x=1<2 and 3>=4 or 2!=2;", 0),
        ("x=not 0;", 1),
        ("x=not 1==2;", 1),
        ("x=0 and 1/0;", 0),
        ("x=3 or 1/0;", 3),
        ('x="ab"+"c";', "abc"),
        ('x="abc"[1];', "b"),
        ('x="a"<"b";', 1),
        ('x=len("abc")+len([1,2]);', 5),
        ('x=str(-12)+"";', "-12"),
        ("x=[1,2]+[3];", (1, 2, 3)),
        ('x=[1,"a"][1];', "a"),
        ("x=[[1,2][0],3];", (1, 3)),
        ("x=[]==[];", 1),
        ('x=1=="1";', 0),
        ("x=1;if x{x=2;}", 2),
        ("x=0;if x{x=2;}else{x=3;}", 3),
        ("x=0;while x<5{x=x+1;}", 5),
        ("def f(a,b){return a-b;}x=f(5,2);", 3),
        ("def f(n){if n<2{return n;}return f(n-1)+f(n-2);}x=f(9);", 34),
        ("def f(n){while 1{n=n+1;if n>9{return n;}}}x=f(0);", 10),
        ("def f(){}x=f();", 0),
        ("x=1;def f(x){x=5;return x;}y=f(2);", 1),
        (" x = 1 ;\n\t x = x + 1 ; ", 2),
        ("def len(a){return 7;}x=len(1);", 7),
    ],
)
def test_programs_compute(source, expected):
    outcome = run(source)
    assert outcome.error == ""
    assert outcome.variables["x"] == expected and type(outcome.variables["x"]) is type(expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x=y;", "y has no value"),
        ("def f(){return x;}x=1;y=f();", "x has no value"),
        ("x=1/0;", "/ by zero"),
        ("x=1%0;", "% by zero"),
        ('x=1+"a";', "cannot compute integer + string"),
        ('x="a"*3;', "cannot compute string * integer"),
        ("x=[1]<[2];", "cannot compute list < list"),
        ("x=-[1];", "expected an integer, got a list"),
        ("x=[1][1];", "no item 1 of 1"),
        ("x=[1][-1];", "no item -1 of 1"),
        ("x=1[0];", "an integer has no items"),
        ("x=len(1);", "an integer has no length"),
        ("x=str([1]);", "a list has no text"),
        ("x=f(1);", "no function f"),
        ("def f(a){}x=f();", "f takes 1 values, got 0"),
        ("x=len(1,2);", "len takes 1 value, got 2"),
        ("def f(a,a){}", "f has two parameters of one name"),
        ("def f(){}def f(){}", "f is defined twice"),
        ("x=1", "expected ';', got 'the end'"),
        ("if 1 x=1;", "expected '{', got 'x'"),
        ("x=;", "expected a value, got ';'"),
        ("while=1;", "expected a value, got '='"),
        ("x=1<2<3;", "expected ';', got '<'"),
        ("1=2;", "expected a name, got '1'"),
        ("if 1{def f(){}}", "expected a name, got 'def'"),
        ("x=a.b;", "no word of the language at character 4: '.b;'"),
        ('x="ab', "no word of the language at character 3: '\"ab'"),
        ("x=__import__;", "__import__ has no value"),
        ("x=1;}", "expected a name, got '}'"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(source, message):
    outcome = run(source)
    assert outcome.error == message
    assert outcome.variables == {} and outcome.value is None


HOSTILE = {
    "endless loop": ("while 1{}", "more than 10000 steps"),
    "nested loops": ("i=0;while 1{j=0;while j<99{j=j+1;}}", "more than 10000 steps"),
    "huge product": ("x=3;while 1{x=x*x;}", "an integer of more than 256 bits"),
    "huge sum": ("x=1;while 1{x=x+x;}", "an integer of more than 256 bits"),
    "huge negative": ("x=-3;while 1{x=x*x*x;}", "an integer of more than 256 bits"),
    "huge number": ("x=" + "9" * 5000 + ";", "a number has at most 70 digits, got 5000"),
    "huge string": ('x="ab";while 1{x=x+x;}', "a string or list longer than 1000"),
    "huge list": ("x=[1,2];while 1{x=x+x;}", "a string or list longer than 1000"),
    "many strings": ('x="' + "a" * 900 + '";while 1{y=x+"";}', "more than 200000 characters and entries made"),
    "endless calls": ("def f(n){return f(n+1);}x=f(0);", "calls nest deeper than 64"),
    "two that call each other": ("def f(){return g();}def g(){return f();}x=f();", "calls nest deeper than 64"),
    "forking": ("def f(n){if n==0{return 0;}f=f(n-1);return f(n-1);}x=f(40);", "more than 10000 steps"),
    "a list that holds itself": ("x=[1];x=[x];", "a list cannot hold a list"),
    "deep brackets": ("x=" + "(" * 3000 + "1" + ")" * 3000 + ";", "blocks and expressions nest deeper than 48"),
    "deep lists": ("x=" + "[" * 3000, "blocks and expressions nest deeper than 48"),
    "deep blocks": ("if 1{" * 1500 + "}" * 1500, "blocks and expressions nest deeper than 48"),
    "deep signs": ("x=" + "-" * 9000 + "1;", "blocks and expressions nest deeper than 48"),
    "deep nots": ("x=" + "not " * 2000 + "1;", "blocks and expressions nest deeper than 48"),
    "deep items": ("x=1" + "[x" * 3000, "blocks and expressions nest deeper than 48"),
    "long": ("x=1;" * 5000, "a program has at most 10000 characters, got 20000"),
    "blanks": (" " * 10_001, "a program has at most 10000 characters, got 10001"),
    "a surrogate": ("x=\ud800;", "no word of the language at character 3: '\\ud800;'"),
    "a NUL": ("x=\0;", "no word of the language at character 3: '\\x00;'"),
    "other digits": ("x=\u0663;", "no word of the language at character 3: '\u0663;'"),
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_programs_are_stopped(source, message):
    outcome = run(source)
    assert outcome.error == message and outcome.variables == {}
    assert outcome.steps <= Limits().steps + 1


def test_the_longest_chain_without_nesting_compiles():
    """A long sum is no deep one."""
    assert run("x=" + "+".join(["1"] * 4000) + ";").variables["x"] == 4000


def test_a_function_is_called_with_values_and_statements_outside_do_not_run():
    source = "y=1/0;def f(a,b){return [a]+b;}"
    assert call(source, "f", ["x", (1, 2)]).value == ("x", 1, 2)
    assert call(source, "g", []) == Outcome(error="no function g")
    assert call(source, "f", [1]) == Outcome(error="f takes 2 values, got 1")
    assert call("def f(", "f", [1]).error == "expected a name, got 'the end'"


def test_variables_may_be_given_and_are_not_changed():
    given = {"x": 3}
    assert run("x=x+1;y=x;", given).variables == {"x": 4, "y": 4}
    assert given == {"x": 3}


def test_every_limit_can_be_set_and_is_checked():
    assert run("x=[1,2,3,4];", limits=Limits(length=3)).error == "a string or list longer than 3"
    assert run("x=1000;", limits=Limits(bits=8)).error == "an integer of more than 8 bits"
    for name in ("steps", "bits", "length", "memory", "depth"):
        with pytest.raises(ValueError, match=f"limits.{name} must be at least 1, got 0"):
            Limits(**{name: 0})
    with pytest.raises(ValueError, match="limits.bits must be at most 4096"):
        Limits(bits=5000)  # of which Python refuses to write the digits


def test_steps_are_counted_exactly():
    """Three instructions: the constant, the store, the stop."""
    assert run("x=1;").steps == 3
    assert run("x=1;", limits=Limits(steps=3)).error == ""
    assert run("x=1;", limits=Limits(steps=2)).error == "more than 2 steps"


def test_compiling_raises_its_own_error_alone():
    with pytest.raises(ProgramError):
        compile_program("x=")


def is_value(value):
    if isinstance(value, tuple):
        return len(value) <= SMALL.length and all(is_value(each) and not isinstance(each, tuple) for each in value)
    if isinstance(value, str):
        return len(value) <= SMALL.length
    return type(value) is int and value.bit_length() <= SMALL.bits


def check(source):
    """Whatever a source is, running it gives an outcome within its limits, and the same one again."""
    outcome = run(source, {"n": 3}, limits=SMALL)
    assert outcome.steps <= SMALL.steps + 1
    assert len(outcome.error) < 200 and "\n" not in outcome.error
    assert all(is_value(value) for value in outcome.variables.values())
    assert outcome.value is None or is_value(outcome.value)
    assert run(source, {"n": 3}, limits=SMALL) == outcome
    assert pickle.loads(pickle.dumps(outcome)) == outcome


@given(st.text(max_size=200))
@example("x=" + "(" * 190)
def test_any_text_is_harmless(source):
    check(source)


PIECES = [
    *"()[]{};,=+-*/%<>",
    *("==", "!=", "<=", ">=", "def", "return", "while", "if", "else", "and", "or", "not"),
    *("f", "g", "n", "x", "len", "str", "0", "1", "2", "999999999999", '"ab"', '""', "f(n)", "x=x+x;", "n=n-1;"),
    *("while 1{", "if n{", "def f(n){", "return f(n);", "x=[n,x];", 'x="ab"+x;'),
]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=60))
def test_any_row_of_the_languages_own_words_is_harmless(pieces):
    check(" ".join(pieces))


NAMES = st.sampled_from(["n", "x", "y"])
EXPRESSIONS = st.recursive(
    NAMES | st.integers(0, 10**12).map(str) | st.sampled_from(['"ab"', '"z"', "[1,2]", "[]", "f(n)", "f(x)"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+ - * / % < > == != and or".split()), inner).map(
            lambda p: f"({' '.join(p)})"
        ),
        inner.map(lambda e: f"len({e})"),
        inner.map(lambda e: f"str({e})"),
        inner.map(lambda e: f"-{e}"),
        inner.map(lambda e: f"(not {e})"),
        st.lists(inner, max_size=3).map(lambda e: f"[{','.join(e)}]"),
        st.tuples(inner, inner).map(lambda p: f"{p[0]}[{p[1]}]"),
    ),
    max_leaves=6,
)
STATEMENTS = st.recursive(
    st.tuples(NAMES, EXPRESSIONS).map(lambda p: f"{p[0]}={p[1]};") | EXPRESSIONS.map(lambda e: f"return {e};"),
    lambda inner: st.one_of(
        st.tuples(EXPRESSIONS, inner).map(lambda p: f"while {p[0]}{{{p[1]}}}"),
        st.tuples(EXPRESSIONS, inner, inner).map(lambda p: f"if {p[0]}{{{p[1]}}}else{{{p[2]}}}"),
        st.lists(inner, max_size=4).map("".join),
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(STATEMENTS, STATEMENTS)
def test_well_formed_programs_are_harmless_and_compile(inside, outside):
    source = f"def f(n){{{inside}}}x=1;y=2;{outside}"
    check(source)
    error = run(source, {"n": 3}, limits=SMALL).error
    assert not error.startswith(("expected", "no word")) or error.startswith("expected an integer")


@pytest.mark.variants
@settings(max_examples=20_000)
@given(st.lists(st.sampled_from(PIECES), max_size=120))
def test_long_rows_of_words_are_harmless(pieces):
    check(" ".join(pieces))
