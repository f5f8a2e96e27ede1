"""A method's signature is its declaration: types, ranges, choices and words come from it alone."""

from typing import Annotated, Any, Literal

import pytest

from mergetool.methods import METHODS
from mergetool.methods.declare import REQUIRED, Bounds, Doc, Fraction, Parameter, PerSource, method

DECLARED = {"title": "Toy", "paper": "", "citation": "", "base": "ignored"}


def declared(function, **more):
    return method(**{**DECLARED, **more})(function)


def everything(
    base: Any,
    delta: Any,
    *,
    weight: Annotated[PerSource[float], Doc("The weight.")] = REQUIRED,
    share: Annotated[PerSource[Fraction], Doc("The share.")] = 0.5,
    steps: Annotated[int, Doc("The steps."), Bounds(1, None)] = 3,
    cold: Annotated[float, Doc("The cold."), Bounds(None, 0)] = -1.0,
    flag: Annotated[bool, Doc("The flag.")] = False,
    how: Annotated[Literal[True, "half"], Doc("How.")] = True,
    lambda_: Annotated[float, Doc("The factor.")] = 1.0,
) -> Any:
    """Do everything.

    And more.
    """


def test_a_declaration_is_read_from_the_signature():
    toy = declared(everything)
    assert (toy.name, toy.tensors, toy.random) == ("everything", ("base", "delta"), False)
    assert (toy.summary, toy.text) == ("Do everything.", "Do everything.\n\nAnd more.")
    assert list(toy.parameters) == ["weight", "share", "steps", "cold", "flag", "how", "lambda"]
    assert toy.parameters["lambda"] == Parameter("lambda", "lambda_", float, False, 1.0, "The factor.")
    assert toy.parameters["share"] == Parameter("share", "share", float, True, 0.5, "The share.", 0.0, 1.0)
    assert [n for n, p in toy.parameters.items() if p.required] == ["weight"]
    assert [n for n, p in toy.parameters.items() if p.per_source] == ["weight", "share"]


def test_a_type_is_said_in_words():
    kinds = {name: parameter.kind for name, parameter in declared(everything).parameters.items()}
    assert kinds == {
        "weight": "number",
        "share": "number from 0 to 1",
        "steps": "integer",
        "cold": "number",
        "flag": "true | false",
        "how": "true | half",
        "lambda": "number",
    }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("weight", 2, 2.0),
        ("weight", "1e-5", 1e-5),
        ("weight", -0.5, -0.5),
        ("share", 0, 0.0),
        ("share", 1.0, 1.0),
        ("steps", 1, 1),
        ("cold", 0, 0.0),
        ("flag", True, True),
        ("how", True, True),
        ("how", "half", "half"),
    ],
)
def test_a_right_value_comes_back_in_its_type(name, value, expected):
    checked = declared(everything).parameters[name].check(value)
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", "much", "must be a number, not 'much'"),
        ("weight", True, "must be a number, not true"),
        ("weight", None, "must be a number, not None"),
        ("weight", "nan", "must be a finite number, not nan"),
        ("weight", float("inf"), "must be a finite number, not inf"),
        ("share", 1.5, "must be from 0 to 1, not 1.5"),
        ("share", -1e-9, "must be from 0 to 1, not -1e-09"),
        ("steps", 0, "must be at least 1, not 0"),
        ("steps", 2.0, "must be integer, not 2.0"),
        ("steps", True, "must be integer, not true"),
        ("cold", 0.5, "must be at most 0, not 0.5"),
        ("flag", 1, "must be true or false, not 1"),
        ("flag", "true", "must be true or false, not 'true'"),
        ("how", 1, "must be one of true, half, not 1"),
        ("how", False, "must be one of true, half, not false"),
        ("how", "hlaf", "must be one of true, half, not 'hlaf'; did you mean half?"),
    ],
)
def test_a_wrong_value_is_refused_with_the_end_of_a_sentence(name, value, message):
    with pytest.raises(ValueError, match=r"^must") as caught:
        declared(everything).parameters[name].check(value)
    assert str(caught.value) == message


def test_a_number_beyond_float64_is_refused():
    with pytest.raises(ValueError, match="must be a finite number"):
        declared(everything).parameters["weight"].check(10**400)


def test_a_parameter_without_words_is_refused():
    def bare(value: Any, *, weight: float = 1.0) -> Any:
        """Say nothing of the weight."""

    with pytest.raises(AssertionError, match="weight needs a Doc"):
        declared(bare)


def test_a_parameter_of_no_known_type_is_refused():
    def odd(value: Any, *, weights: Annotated[dict, Doc("The weights.")] = REQUIRED) -> Any:
        """Take a dict."""

    with pytest.raises(AssertionError, match="is no type of parameter"):
        declared(odd)


def test_what_does_not_go_together_is_said_by_the_method():
    linear = METHODS["linear"]
    assert linear.check({"weight": (1.0, 2.0), "normalize": True}) == []
    ((name, message),) = linear.check({"weight": (1.0, -1.0), "normalize": True})
    assert name == "weight"
    assert message == "the weights sum to zero, so they cannot be normalised"
    assert linear.check({"weight": (1.0, -1.0), "normalize": False}) == []
    assert METHODS["ties"].check({"weight": (1.0, -1.0)}) == []


@pytest.mark.parametrize("declaration", METHODS.values(), ids=METHODS)
def test_every_method_is_documented(declaration):
    """Its first line is a sentence, every parameter is described by one, and a paper comes with its citation."""
    assert declaration.summary.endswith(".")
    assert "\n    merged = " in f"\n{declaration.text}"
    assert all(parameter.description.endswith(".") for parameter in declaration.parameters.values())
    assert bool(declaration.paper) == bool(declaration.citation)
    assert not declaration.differs or declaration.differs.endswith(".")


@pytest.mark.parametrize("declaration", METHODS.values(), ids=METHODS)
def test_every_default_is_a_right_value(declaration):
    for parameter in declaration.parameters.values():
        if not parameter.required:
            assert parameter.check(parameter.default) == parameter.default


@pytest.mark.parametrize("declaration", METHODS.values(), ids=METHODS)
def test_a_method_is_listed_by_its_name_and_takes_what_its_measures_are_called(declaration):
    assert METHODS[declaration.name] is declaration
    known = {"base", "value", "delta", "chance", *declaration.measures, *declaration.facts}
    assert set(declaration.tensors) <= known
    assert set(declaration.measures) <= set(declaration.tensors)
    assert declaration.random == ("chance" in declaration.tensors)
    if declaration.base != "required":
        assert not {"base", "delta"} & set(declaration.tensors)


def test_a_text_is_a_plain_function_of_numbers():
    """One coordinate at a time, as it is written."""
    assert METHODS["linear"]((1.0, 5.0), weight=(3.0, 1.0), normalize=True) == 2.0
    assert METHODS["ties"](
        1.0, (4.0, -1.0), (0.0, 2.0), weight=(1.0, 1.0), normalize=True, lambda_=0.5
    ) == pytest.approx(3.0)
