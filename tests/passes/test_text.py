from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from prequant.passes import (
    ExampleBatches,
    Option,
    Pass,
    PassTextError,
    Program,
    QuantizeWeights,
    Report,
    known_passes,
    parse_pass,
)
from prequant.passes.options import DTYPES, is_function, is_union, options_of
from prequant.passes.text import default_text, parse_passes, shown
from prequant.runtime import Granularity, PrequantError


class Colour(Enum):
    RED = "red"
    DARK_BLUE = "dark blue"
    TWO = 2


@dataclass(frozen=True)
class Everything(Pass):
    """Has an option of every type that there may be."""

    name: ClassVar[str] = "everything"

    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    word: str = "mse"
    colour: Colour = Colour.RED
    mode: Literal["delta", "replace", 3] = "delta"
    dtype: torch.dtype = torch.float32
    maybe: float | None = None
    either: int | float | bool | str | None = None
    named: Granularity | str = Granularity.ROW
    words: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    nested: tuple[tuple[int, ...], ...] = ()
    some: tuple[str, ...] | None = None
    patterns: tuple[str | Callable[[Any], bool], ...] = field(default=(), kw_only=True)

    def run(self, program: Program) -> Report:
        return self.report()


@dataclass(frozen=True)
class Required(Pass):
    """Has an option without a default."""

    name: ClassVar[str] = "required"
    amount: int

    def run(self, program: Program) -> Report:
        return self.report()


TOYS: dict[str, type[Pass]] = {"everything": Everything, "required": Required}

FLOATS = st.floats(allow_nan=False)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: FLOATS,
    str: st.text()
    | st.sampled_from(
        ["none", "true", "4", "0.5", "*.query.weight", "type:Bert*", 'a"b', "[x]", "é ü", "row", "group"]
    ),
    torch.dtype: st.sampled_from(sorted(set(DTYPES.values()), key=str)),
    type(None): st.none(),
}


def values(type_: Any) -> st.SearchStrategy[Any]:
    arguments = get_args(type_)
    if is_union(type_):
        return st.one_of([values(part) for part in arguments if not (is_function(part) or part is ExampleBatches)])
    if get_origin(type_) is Literal:
        return st.sampled_from(arguments)
    if get_origin(type_) is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, arguments))
    if isinstance(type_, type) and issubclass(type_, Enum):
        return st.sampled_from(list(type_))
    return SCALARS[type_]


def passes(kind: type[Pass], sensible: bool = False) -> st.SearchStrategy[Pass]:
    """Passes with any options; ``sensible`` ones draw numbers that passes accept more often than not."""
    small = {int: st.integers(1, 8), float: st.floats(0, 1), str: st.just("mse")}

    def of(option: Option) -> st.SearchStrategy[Any]:
        drawn = values(option.type)
        if not sensible:
            return drawn
        plain = [small[part] for part in get_args(option.type) or (option.type,) if part in small]
        return st.one_of([*plain, st.just(option.default), *([] if plain else [drawn])])

    @st.composite
    def draw_pass(draw: Any) -> Pass:
        given = draw(st.fixed_dictionaries({}, optional={option.name: of(option) for option in options_of(kind)}))
        try:
            return kind(**given)
        except PrequantError:
            reject()

    return draw_pass()


def same(first: Any, second: Any) -> bool:
    """Equal, and of equal types: 1, 1.0 and True are three things."""
    return repr(first) == repr(second) and first == second


@given(passes(Everything))
@settings(max_examples=300, deadline=None)
def test_text_of_any_options_reads_back_as_the_same_pass(pass_: Pass) -> None:
    assert same(parse_pass(str(pass_), TOYS), pass_)


@pytest.mark.parametrize("name", sorted(known_passes()))
def test_every_registered_pass_reads_back_from_its_text(name: str) -> None:
    @given(passes(known_passes()[name], sensible=True))
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
    def check(pass_: Pass) -> None:
        assert same(parse_pass(str(pass_)), pass_)

    check()


@given(st.lists(passes(Everything), max_size=3))
@settings(max_examples=50, deadline=None)
def test_several_passes_read_back(many: list[Pass]) -> None:
    assert same(list(parse_passes(",".join(map(str, many)), TOYS)), many)


def test_the_documented_form() -> None:
    text = "quantize-weights{bits=3,granularity=tensor,include=[*.query.weight,type:Bert*]}"
    pass_ = QuantizeWeights(bits=3, granularity=Granularity.TENSOR, include=("*.query.weight", "type:Bert*"))
    assert parse_pass(text) == pass_
    assert str(pass_) == text


def test_defaults_are_left_out() -> None:
    assert str(QuantizeWeights()) == "quantize-weights"
    assert str(QuantizeWeights(bits=4, symmetric=True, include=())) == "quantize-weights"


def test_blanks_and_lines_between_the_parts_do_not_count() -> None:
    text = """
        everything { flag = true ,
                     words = [ a, "b c" ] } ,
        required{amount=-3}
    """
    assert parse_passes(text, TOYS) == (Everything(flag=True, words=("a", "b c")), Required(-3))
    assert parse_passes("  ", TOYS) == ()


def test_one_value_stands_for_a_list_of_one() -> None:
    assert parse_pass("everything{words=a}", TOYS) == Everything(words=("a",))


def test_words_that_could_be_read_as_something_else_are_quoted() -> None:
    assert str(Everything(either="4")) == 'everything{either="4"}'
    assert str(Everything(either=4)) == "everything{either=4}"
    assert str(Everything(either="none")) == 'everything{either="none"}'
    assert str(Everything(named=Granularity.GROUP)) == "everything{named=group}"
    assert str(Everything(named="group")) == 'everything{named="group"}'
    assert str(Everything(word="none")) == "everything{word=none}"
    assert str(Everything(colour=Colour.DARK_BLUE)) == 'everything{colour="dark blue"}'
    assert str(Everything(words=("a[bc]*", ""))) == 'everything{words=["a[bc]*",""]}'


def test_a_function_has_no_text_but_can_be_shown() -> None:
    def wide(node: Any) -> bool:
        return True

    pass_ = Everything(patterns=("a*", wide), count=2)
    with pytest.raises(
        PassTextError, match=r"option 'patterns' of pass 'everything' has no text form.*'wide' is a function"
    ):
        str(pass_)
    assert shown(pass_).startswith("everything{count=2,patterns=<")


def test_defaults_as_text() -> None:
    texts = {option.name: default_text(option) for option in options_of(Everything)}
    assert (
        texts["colour"] == "red" and texts["maybe"] == "none" and texts["words"] == "[]" and texts["pair"] == "[1,2.0]"
    )
    assert default_text(options_of(Required)[0]) == ""


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("everythin", "there is no pass 'everythin'; did you mean everything?", "everythin"),
        ("required{amount=1},everything{coun=2}", "pass 'everything' has no option 'coun'; did you mean count", "coun"),
        ("everything{count=many}", "option 'count' of pass 'everything': 'many' is not an int", "many"),
        ("everything{count=1_0}", "'1_0' is not an int", "1_0"),
        ("everything{count=2.0}", "'2.0' is not an int", "2.0"),
        ("everything{flag=yes}", r"'yes' is not a bool \(true or false\)", "yes"),
        ("everything{ratio=x}", "'x' is not a float", "x"),
        ("everything{maybe=x}", "'x' is not a float", "x"),
        ("everything{mode=replce}", "'replce' is not one of .*; did you mean replace", "replce"),
        ("everything{colour=read}", "'read' is not one of red, dark blue, 2; did you mean red", "read"),
        ("everything{dtype=float61}", "'float61' is not a dtype; did you mean float64", "float61"),
        ("everything{pair=[1]}", "1 values where 2 are due|has 1 values", "[1]"),
        ("everything{count=[1,2]}", "a list where int is due", "[1,2]"),
        ("everything{count=1,count=2}", "option 'count' is given twice", "count"),
        ("everything{count}", "expected '=' and a value after the option 'count'", "}"),
        ("everything{count=}", "expected a value", "}"),
        ("everything{count=1", "expected ',' or '}' after an option", " "),
        ("everything}", "expected ',' between passes", "}"),
        ("everything,,everything", "expected the name of a pass", ","),
        ("everything{words=[a}", r"expected ',' or '\]' in a list", "}"),
        ('everything{word="a}', "a string that JSON can't read", '"a}'),
        ("required", "pass 'required' needs the option 'amount'", "required"),
    ],
)
def test_what_is_wrong_is_named_and_marked(text: str, message: str, marked: str) -> None:
    with pytest.raises(PassTextError, match=message) as caught:
        parse_passes(text, TOYS)
    *_, line, marks = str(caught.value).splitlines()
    assert line == f"  {text}"
    start, end = marks.index("^"), marks.rindex("^") + 1
    assert (line + " ")[start:end] == marked


def test_the_line_with_the_mistake_is_shown_of_several() -> None:
    with pytest.raises(PassTextError) as caught:
        parse_passes("everything,\nrequired{amont=2},\neverything", TOYS)
    assert str(caught.value).splitlines()[-2:] == ["  required{amont=2},", "           ^^^^^"]


def test_a_value_that_the_pass_itself_refuses_is_marked_too() -> None:
    @dataclass(frozen=True)
    class Picky(Pass):
        name: ClassVar[str] = "picky"
        count: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.count > 2:
                raise PrequantError(f"count={self.count} is more than 2")

        def run(self, program: Program) -> Report:
            return self.report()

    with pytest.raises(PassTextError, match=r"count=3 is more than 2\n  picky\{count=3\}\n  \^{14}$"):
        parse_pass("picky{count=3}", {"picky": Picky})


def test_one_pass_is_one_pass() -> None:
    with pytest.raises(PassTextError, match="expected one pass, found 2"):
        parse_pass("everything,everything", TOYS)
