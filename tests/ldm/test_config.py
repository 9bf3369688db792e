"""Layers, overrides, and the one line that a mistake is answered with."""

from typing import Annotated, Literal

import pydantic
import pytest
from pydantic import Field, field_validator

from ldm.config import (
    Config,
    Location,
    RequestError,
    canonical_json,
    differences,
    fields,
    load_yaml,
    parse,
    validate,
)


class Inner(Config):
    rate: float = Field(0.1, gt=0, description="a rate, 1/s")
    name: str | None = Field(None, description="a name")


class Outer(Config):
    """A stage."""

    source: Location | tuple[Location, ...] = Field(description="inputs")
    size: int = Field(64, gt=0, description="side, pixels")
    pair: tuple[int, int] = Field((1, 2), description="two numbers")
    amount: int | Literal["auto"] = Field("auto", description="a number or auto")
    output: Location | None = Field(None, description="a place")
    small: Annotated[int, Field(lt=10)] = Field(3, description="below 10")
    inner: Inner = Inner()

    @field_validator("size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"must be even; give {value + 1}")
        return value


def read(*overrides: str, **layer: object) -> Outer:
    return parse(Outer, [("layer", {"source": "a.tar", **layer})], overrides)


def problem(*overrides: str, **layer: object) -> str:
    with pytest.raises(RequestError) as caught:
        read(*overrides, **layer)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400
    return message


def test_later_layers_win_and_leave_the_rest():
    layers = [
        ("first", {"source": "a.tar", "size": 2, "inner": {"rate": 1, "name": "x"}}),
        ("second", {"inner": {"rate": 2}}),
    ]
    config = parse(Outer, layers, ["size=8"])
    assert (config.size, config.inner.rate, config.inner.name) == (8, 2.0, "x")


def test_layers_are_not_changed():
    first = {"source": "a.tar", "inner": {"rate": 1}}
    parse(Outer, [("first", first), ("second", {"inner": {"name": "y"}})], ["inner.rate=3"])
    assert first == {"source": "a.tar", "inner": {"rate": 1}}


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("size=128", "size", 128),
        ("amount=3", "amount", 3),
        ("amount=auto", "amount", "auto"),
        ("pair=[3, 4]", "pair", (3, 4)),
        ("pair=3,4", "pair", (3, 4)),
        ("output=null", "output", None),
        ("output=None", "output", None),
        ("output=on", "output", "on"),
        ("output=2024", "output", "2024"),
        ("output=a=b", "output", "a=b"),
        ("output=s3://bucket/x y", "output", "s3://bucket/x y"),
        ("output=", "output", ""),
        ("source=[a.tar, b.tar]", "source", ("a.tar", "b.tar")),
        ("source=a,b.tar", "source", "a,b.tar"),
        ("source=x-{00..03}.tar", "source", "x-{00..03}.tar"),
        ("source=x/{0..3}", "source", "x/{0..3}"),
        ("source={a.tar,b.tar}", "source", "{a.tar,b.tar}"),
        ("source={0..3}", "source", "{0..3}"),
        ("source={a,b}/x-{0..1}", "source", "{a,b}/x-{0..1}"),
        ("source={s3://b/a.tar,s3://b/b.tar}", "source", "{s3://b/a.tar,s3://b/b.tar}"),
        ("inner.rate=1e-3", "inner", Inner(rate=1e-3)),
        ("inner={rate: 2, name: z}", "inner", Inner(rate=2, name="z")),
        ('inner={"rate":2}', "inner", Inner(rate=2)),
        ("inner={}", "inner", Inner()),
    ],
)
def test_overrides(override, key, expected):
    assert getattr(read(override), key) == expected


def test_the_last_override_wins_and_null_can_be_overridden_from_below():
    assert read("size=2", "size=4").size == 4
    assert read("inner.rate=4", "inner.name=q", inner={"rate": 3}).inner == Inner(rate=4, name="q")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("siez=3", "siez=3: unknown key; did you mean 'size'?"),
        ("inner.rat=3", "inner.rat=3: unknown key; did you mean 'inner.rate'?"),
        ("rate=3", "rate=3: unknown key; did you mean 'inner.rate'?"),
        ("size=0", "size=0: input should be greater than 0"),
        ("size=7", "size=7: must be even; give 8"),
        ("size=large", "size=large: input should be a valid integer, unable to parse string as an integer"),
        ("size=a\nb", "size=a b: input should be a valid integer, unable to parse string as an integer"),
        ("small=11", "small=11: input should be less than 10"),
        ("pair=[1]", "pair=1: has too few values, expected tuple[int, int]"),
        ("pair=5", "pair=5: has too few values, expected tuple[int, int]"),
        ("pair=[1, x]", "pair=x: input should be a valid integer, unable to parse string as an integer"),
        ("source=null", "source=null: input should be a valid string; or input should be a valid tuple"),
        ("inner=3", "inner=3: input should be a valid dictionary or instance of Inner"),
        ("inner.rate=nan", "inner.rate=nan: input should be a finite number"),
        ("pair=[1", "pair=[1: input should be a valid integer, unable to parse string as an integer"),
        ("size", "'size': is no option and no key=value pair"),
        ("=3", "'=3': is no option and no key=value pair"),
    ],
)
def test_a_mistake_is_answered_with_one_line(override, expected):
    assert problem(override) == expected


def test_every_branch_of_a_union_is_named_under_the_one_key():
    assert problem("amount=foo").startswith("amount=foo: input should be a valid integer")
    assert problem("amount=foo").endswith("; or input should be 'auto'")


def test_a_misspelt_key_far_from_all_lists_them():
    message = problem("zzzzzz=1")
    assert message.startswith("zzzzzz=1: unknown key; the keys are ") and "inner.rate" in message


def test_a_misspelling_is_named_before_what_it_left_missing():
    with pytest.raises(RequestError, match=r"^sorce=a.tar: unknown key; did you mean 'source'\?$"):
        parse(Outer, [("yaml", {"sorce": "a.tar"})])


def test_a_missing_key_and_a_layer_that_is_no_mapping():
    with pytest.raises(RequestError, match="^source: missing; give source=VALUE$"):
        parse(Outer, [])
    with pytest.raises(RequestError, match=r"^my\.yaml: holds list, expected a mapping"):
        parse(Outer, [("my.yaml", ["size"])])  # type: ignore[list-item]


def test_a_config_is_frozen():
    config = read()
    with pytest.raises(pydantic.ValidationError):
        config.size = 3
    with pytest.raises(pydantic.ValidationError):
        config.inner.rate = 3


def test_what_is_printed_is_read_again():
    config = read("source=[a.tar, b.tar]", "inner.rate=0.3", "output=x")
    assert validate(Outer, config.model_dump(mode="json")) == config


def test_load_yaml(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("size: 4\ninner:\n  rate: 2\n")
    assert load_yaml(file) == {"size": 4, "inner": {"rate": 2}}
    file.write_text("# nothing\n")
    assert load_yaml(file) == {}
    for text, message in (("- a\n", "holds a list"), ("a: [\n", "cannot be read as YAML"), ("\x00", "cannot be read")):
        file.write_text(text)
        with pytest.raises(RequestError, match=message) as caught:
            load_yaml(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml")


def test_yaml_builds_no_objects(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("size: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(RequestError, match="cannot be read as YAML"):
        load_yaml(file)


def test_fields_lists_every_leaf():
    found = {key: (kind, default, description, place) for key, kind, default, description, place in fields(Outer)}
    assert found["source"] == ("str|tuple[str]", "required", "inputs", True)
    assert found["size"] == ("int", "64", "side, pixels", False)
    assert found["amount"] == ("int|auto", "auto", "a number or auto", False)
    assert found["output"] == ("str|null", "null", "a place", True)
    assert found["inner.rate"] == ("float", "0.1", "a rate, 1/s", False)
    assert found["pair"][:2] == ("tuple[int, int]", "[1, 2]")
    assert "inner" not in found


def test_differences_are_readable():
    old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "same": {"x": 0}, "gone": "x"}
    new = {"a": 1, "b": {"c": 3, "d": [1, 3]}, "same": {"x": 0}, "new": True}
    assert differences(old, new) == [
        "b.c: 2 != 3",
        "b.d: [1, 2] != [1, 3]",
        "gone: x != null",
        "new: null != true",
    ]
    assert differences(old, old) == []


def test_canonical_json_does_not_depend_on_the_order():
    assert canonical_json({"b": [1, 2], "a": "é"}) == canonical_json({"a": "é", "b": [1, 2]}) == '{"a":"é","b":[1,2]}'


def test_every_field_of_every_stage_has_a_description():
    import ldm.sampling
    import pipelines.encode
    import pipelines.train.config

    for model in (ldm.sampling.SampleConfig, pipelines.encode.EncodeConfig, pipelines.train.config.TrainConfig):
        for key, kind, _, description, _ in fields(model):
            assert description, f"{model.__name__}.{key}"
            assert "_IsLocation" not in kind and "<" not in kind, f"{model.__name__}.{key}: {kind}"
