"""Recipes: what matches, what wins, what a preset decides, and one line for each thing that can be wrong in a file."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantool.cli import cli
from quantool.cli.options import recipe_keys
from quantool.errors import UsageError
from quantool.recipe import INTEGER_METHODS, METHOD_DEFAULTS, Override, Recipe, build_recipe, load_section, matches
from quantool.scheme import METHOD_NAMES, PRESETS, MethodOptions, QuantScheme

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("[!g]*.yaml"))  # gguf-*: of convert-gguf
KNOWN = dict(recipe_keys(cli.commands["quantize"]))
DOWN = "model.layers.0.mlp.down_proj"
FLAG, ENVIRONMENT, FILE = 1, 2, 3
OPTIONS = {
    "method": "rtn",
    "format": None,
    "bits": 4,
    "group_size": None,
    "sym": None,
    "scheme": None,
    "act_bits": None,
    "act_dynamic": None,
    "act_sym": None,
    "double_quant": None,
    "outlier_threshold": None,
    "ignore": ("lm_head",),
    **asdict(MethodOptions()),
}


def load(tmp_path: Path, text: str, command: str = "quantize") -> dict[str, Any]:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode())
    return load_section(path, command, KNOWN)


def refused(tmp_path: Path, text: str, command: str = "quantize") -> tuple[str, str]:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, command)
    message = caught.value.message
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert "\n" not in message
    assert caught.value.hint
    return message.removeprefix(f"{tmp_path / 'recipe.yaml'}: "), caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.my_lm_head", False),
        ("head", "lm_head", False),
        ("mlp.down_proj", DOWN, True),
        ("down_proj", DOWN, True),
        ("p.down_proj", DOWN, False),
        (DOWN, DOWN, True),
        ("model.layers.0", DOWN, False),
        ("mlp.down_proj.weight", DOWN, False),
        ("mlp.down.proj", "mlp.downxproj", False),
        (r"re:.*\.down_proj", DOWN, True),
        ("re:down_proj", DOWN, False),  # re.match: from the beginning of the full name
        (r"re:model\.layers\.0\.", DOWN, True),  # and not to its end
        (r"re:model\.layers\.0$", DOWN, False),
        (r"re:.*layers\.[1-9]\.", DOWN, False),
    ],
)
def test_matches(pattern: str, name: str, *, expected: bool) -> None:
    assert matches(pattern, name) is expected


@given(st.lists(st.from_regex(r"[a-z_0-9]{1,6}", fullmatch=True), min_size=1, max_size=6), st.data())
def test_a_name_is_matched_by_all_its_dotted_ends_and_no_other_end(parts: list[str], data: st.DataObject) -> None:
    name = ".".join(parts)
    cut = data.draw(st.integers(0, len(name) - 1))
    assert matches(name[cut:], name) is (cut == 0 or name[cut - 1] == ".")


def test_scheme_for_resolves_auto_and_ignores() -> None:
    assert Recipe().scheme_for(DOWN, 64) == QuantScheme(bits=4, group_size=64, sym=True)
    assert Recipe(group_size=32, sym=False, bits=3).scheme_for(DOWN, 64) == QuantScheme(3, 32, sym=False)
    assert Recipe().scheme_for("lm_head", 64) is None
    assert Recipe(ignore=()).scheme_for("lm_head", 64) is not None
    assert Recipe(ignore=("re:.*mlp",)).scheme_for(DOWN, 64) is None


def test_the_first_override_that_matches_wins_and_keeps_the_rest() -> None:
    recipe = Recipe(
        sym=False,
        overrides=(Override("down_proj", bits=8), Override("mlp.down_proj", bits=2), Override("k_proj", ignore=True)),
    )
    assert recipe.scheme_for(DOWN, 64) == QuantScheme(8, 64, sym=False)
    assert recipe.scheme_for("model.layers.0.self_attn.k_proj", 64) is None
    assert recipe.scheme_for("model.layers.0.self_attn.q_proj", 64) == QuantScheme(4, 64, sym=False)
    assert Recipe(overrides=(Override("a", group_size=0, sym=False),)).scheme_for("a", 64) == QuantScheme(
        4, 0, sym=False
    )


def test_ignore_outranks_an_override() -> None:
    assert Recipe(overrides=(Override("lm_head", bits=8),)).scheme_for("lm_head", 64) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "awk"}, "unknown method 'awk'"),
        ({"format": "gguf"}, "unknown format 'gguf'"),
        ({"bits": 9}, "bits is 9, expected 2 to 8"),
        ({"group_size": -2}, "group_size is -2, expected"),
        ({"act_bits": 4}, "act_bits is 4, expected 8 or 16"),
        ({"method": "nf4"}, "dtype is int, method nf4 has nf4"),
        ({"dtype": "fp4"}, "dtype is fp4, method rtn has int"),
        ({"method": "smoothquant", "bits": 8}, "method smoothquant is for 8-bit activations, found --act-bits 16"),
        ({"overrides": (Override("a", method="smoothquant"),)}, "method smoothquant is for 8-bit activations"),
        ({"overrides": (Override("a", method="nf4"),)}, "an override asks for method nf4, whose weights cannot stand"),
        ({"act_bits": 8, "act_dynamic": False}, "a stored activation scale needs calibration, and method rtn looks"),
        ({"method": "gptq", "act_dynamic": False}, "--act-static has no effect on float activations"),
        ({"method": "awq", "act_sym": False}, "--act-asym has no effect on float activations"),
        ({"method": "llm-int8", "bits": 4}, "method llm-int8 has no --bits 4"),
        ({"method": "llm-int8", "bits": 8, "group_size": 64}, "method llm-int8 has no --group-size 64"),
        ({"method": "nf4", "dtype": "nf4", "bits": 8}, "method nf4 has no --bits 8"),
        ({"method": "fp4", "dtype": "fp4", "sym": False}, "method fp4 has no --asym"),
        (
            {"method": "nf4", "dtype": "nf4", "overrides": (Override("a", bits=8),)},
            "method nf4 has one scheme for all modules, the override of 'a' asks for another",
        ),
        ({"ignore": ("re:(",)}, "module pattern 're:(': "),
        ({"ignore": ("",)}, "module pattern '' is empty"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(**wrong)
    assert caught.value.message.startswith(message)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_grid": 0}, "n_grid is 0, expected at least 1"),
        ({"damp_percent": 0.0}, "damp_percent is 0, expected more than 0 and at most 1"),
        ({"damp_percent": 1.5}, "damp_percent is 1.5, expected more than 0 and at most 1"),
        ({"damp_percent": float("nan")}, "damp_percent is nan, expected more than 0 and at most 1"),
        ({"smoothing_strength": -0.1}, "smoothing_strength is -0.1, expected 0 to 1"),
        ({"smoothing_strength": float("nan")}, "smoothing_strength is nan, expected 0 to 1"),
        ({"actorder": "weight"}, "actorder is 'weight', expected static, group, none"),
        ({"starved_experts": "ignore"}, "starved_experts is 'ignore', expected error, all-tokens, rtn"),
        ({"min_expert_tokens": 0}, "min_expert_tokens is 0, expected at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        MethodOptions(**wrong)
    assert caught.value.message == message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "override of 'x' has nothing to change"),
        ({"bits": 4, "ignore": True}, "override of 'x' has both 'ignore' and other settings"),
        ({"bits": 1}, "bits is 1, expected 2 to 8"),
        ({"method": "gtpq"}, "override of 'x': unknown method 'gtpq'"),
        ({"match": "re:*", "bits": 4}, "module pattern 're:*': nothing to repeat"),
    ],
)
def test_an_override_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Override(**{"match": "x", **wrong})
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("options", "given_by", "expected"),
    [
        ({}, {}, (4, None, True)),
        ({"method": "awq"}, {"method": FLAG}, (4, None, False)),
        ({"method": "awq", "sym": True}, {"sym": FILE}, (4, None, True)),
        ({"scheme": "W8A16"}, {"scheme": FLAG}, (8, -1, True)),
        ({"scheme": "W4A16", "method": "awq"}, {"scheme": FLAG}, (4, 128, True)),
        ({"scheme": "W4A16_ASYM"}, {"scheme": FILE}, (4, 128, False)),
        ({"scheme": "W8A16", "bits": 5}, {"scheme": FLAG, "bits": FLAG}, (5, -1, True)),
        ({"scheme": "W8A16", "bits": 5}, {"scheme": FILE, "bits": ENVIRONMENT}, (5, -1, True)),
        ({"scheme": "W8A16", "bits": 5}, {"scheme": FLAG, "bits": FILE}, (8, -1, True)),
        ({"scheme": "W8A16", "group_size": None}, {"scheme": FLAG, "group_size": FLAG}, (8, None, True)),
        ({"scheme": "W3A16", "sym": True}, {"scheme": FILE, "sym": FLAG}, (3, 64, True)),
    ],
)
def test_presets_and_method_defaults(
    options: dict[str, Any], given_by: dict[str, int], expected: tuple[int, int | None, bool]
) -> None:
    recipe = build_recipe({**OPTIONS, **options}, given_by)
    assert (recipe.bits, recipe.group_size, recipe.sym) == expected


def test_build_recipe_passes_the_rest() -> None:
    own = {"mse": True, "n_grid": 7, "damp_percent": 0.1, "actorder": "group", "smoothing_strength": 0.5}
    own |= {"min_expert_tokens": 9, "starved_experts": "rtn"}
    options = {**OPTIONS, "format": "awq", "ignore": ("a", ""), **own}
    recipe = build_recipe(options, {"format": FLAG}, (Override("b", bits=8),))
    overrides = (Override("b", bits=8),)
    assert recipe == Recipe(format="awq", ignore=("a",), overrides=overrides, options=MethodOptions(**own))
    assert set(own) == set(asdict(MethodOptions())), "every option is in this test"


@pytest.mark.parametrize(
    ("method", "scheme", "format_"),
    [
        ("rtn", QuantScheme(4, 128), "compressed-tensors"),
        ("gptq", QuantScheme(4, 128), "compressed-tensors"),
        ("awq", QuantScheme(4, 128, sym=False), "compressed-tensors"),
        ("awq+gptq", QuantScheme(4, 128, sym=False), "compressed-tensors"),
        ("smoothquant", QuantScheme(8, -1, act_bits=8), "compressed-tensors"),
        ("nf4", QuantScheme(4, 64, dtype="nf4", double_quant=True), "bitsandbytes"),
        ("fp4", QuantScheme(4, 64, dtype="fp4", double_quant=True), "bitsandbytes"),
        ("llm-int8", QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0), "bitsandbytes"),
    ],
)
def test_what_a_method_does_by_default(method: str, scheme: QuantScheme, format_: str) -> None:
    recipe = build_recipe({**OPTIONS, "method": method}, {"method": FLAG})
    assert recipe.scheme_for(DOWN, 128) == scheme
    assert recipe.format == format_
    assert (recipe.method_for(DOWN), recipe.methods) == (method, (method,))


def test_every_method_has_defaults() -> None:
    assert set(METHOD_DEFAULTS) == set(METHOD_NAMES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_scheme(preset: str) -> None:
    method = "smoothquant" if PRESETS[preset].act_bits == 8 else "gptq"
    recipe = build_recipe({**OPTIONS, "method": method, "scheme": preset}, {"scheme": FLAG})
    assert recipe.scheme_for(DOWN, 32) == PRESETS[preset]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("nf4", {"double_quant": False}, QuantScheme(4, 64, dtype="nf4")),
        ("fp4", {"group_size": 256}, QuantScheme(4, 256, dtype="fp4", double_quant=True)),
        ("nf4", {"group_size": None}, QuantScheme(4, 64, dtype="nf4", double_quant=True)),  # auto
        ("llm-int8", {"outlier_threshold": 0.0}, QuantScheme(8, -1, act_bits=8, outlier_threshold=0.0)),
        ("llm-int8", {"group_size": None}, QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0)),
        ("smoothquant", {"act_dynamic": False, "act_sym": False}, QuantScheme(8, -1, True, 8, False, False)),
        ("gptq", {"bits": 8, "act_bits": 8, "group_size": 0}, QuantScheme(8, 0, act_bits=8)),
    ],
)
def test_the_options_of_a_scheme(method: str, options: dict[str, Any], expected: QuantScheme) -> None:
    recipe = build_recipe({**OPTIONS, "method": method, **options}, dict.fromkeys(options, FLAG))
    assert recipe.scheme_for(DOWN, 128) == expected


def test_an_override_chooses_the_method_too() -> None:
    overrides = (Override("down_proj", method="gptq"), Override("k_proj", bits=8, method="rtn"), Override("o_proj", 3))
    recipe = Recipe(method="awq", sym=False, overrides=overrides)
    assert recipe.methods == ("awq", "gptq", "rtn")
    found = {
        name: recipe.method_for(f"model.layers.0.x.{name}") for name in ("down_proj", "k_proj", "o_proj", "q_proj")
    }
    assert found == {"down_proj": "gptq", "k_proj": "rtn", "o_proj": "awq", "q_proj": "awq"}
    assert recipe.scheme_for(DOWN, 64) == QuantScheme(4, 64, sym=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_published_recipe_loads(path: Path) -> None:
    section = load_section(path, "quantize", KNOWN)
    assert [line.startswith("#") for line in path.read_text(encoding="utf-8").splitlines()[:3]] == [True, True, False]
    recipe = build_recipe({**OPTIONS, **section}, dict.fromkeys(section, FILE), section.get("overrides", ()))
    words = path.stem.split("-")
    assert recipe.method.replace("+", "-") in path.stem or recipe.overrides
    if recipe.method in INTEGER_METHODS:
        assert f"w{recipe.bits}" in path.stem
        assert f"w{recipe.bits}a{recipe.act_bits}" in words or recipe.overrides
        assert f"g{recipe.group_size}" in words or recipe.group_size == -1 or recipe.overrides
    assert ("static" in words) == (not recipe.act_dynamic)
    assert ("double" in words) == recipe.double_quant


def test_every_method_has_a_published_recipe() -> None:
    loaded = [load_section(path, "quantize", KNOWN)["method"] for path in CONFIGS]
    assert {*loaded, "fp4"} == set(METHOD_NAMES), "fp4 is nf4 with worse levels"


def test_a_section_is_read_with_its_types(tmp_path: Path) -> None:
    section = load(
        tmp_path,
        "quantize:\n  bits: 3\n  sym: false\n  group_size: auto\n  ignore: [lm_head, 're:.*gate']\n"
        "  overrides:\n  - {match: down_proj, bits: 8, group_size: -1}\n  - {match: k_proj, ignore: true}\n",
    )
    assert section == {
        "bits": 3,
        "sym": False,
        "group_size": "auto",
        "ignore": ["lm_head", "re:.*gate"],
        "overrides": (Override("down_proj", bits=8, group_size=-1), Override("k_proj", ignore=True)),
    }


def test_an_empty_section_and_unicode(tmp_path: Path) -> None:
    assert load(tmp_path, "quantize:\n") == {}
    assert load(tmp_path, "quantize: {dataset: Größe.txt}") == {"dataset": "Größe.txt"}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("quantize: {grop_size: 4}", "quantize: unknown key 'grop_size'", "did you mean 'group_size'?"),
        ("quantize: {overwrite: true}", "quantize: unknown key 'overwrite'", "override"),
        ("quantize: {4: 4}", "quantize: unknown key 4", "known are"),
        ("quantise: {bits: 4}", "unknown section 'quantise'", "did you mean 'quantize'?"),
        ("calibrate: {seed: 4}", "no section 'quantize', it has calibrate", "add 'quantize:'"),
        ("", "no section 'quantize', it has none", "add 'quantize:'"),
        ("quantize: {bits: four}", "quantize: bits is 'four', expected an integer", "configs/"),
        ("quantize: {bits: 4.0}", "quantize: bits is 4.0, expected an integer", "configs/"),
        ("quantize: {bits: true}", "quantize: bits is true, expected an integer", "configs/"),
        ("quantize: {bits: }", "quantize: bits is empty, expected an integer", "configs/"),
        ("quantize: {sym: 1}", "quantize: sym is 1, expected true or false", "configs/"),
        ("quantize: {split: 2020-01-01}", "quantize: split is 2020-01-01, expected text", "configs/"),
        ("quantize: {group_size: [64]}", "quantize: group_size is a list, expected an integer or text", "configs/"),
        ("quantize: {ignore: lm_head}", "quantize: ignore is 'lm_head', expected a list of text", "configs/"),
        ("quantize: {ignore: [1]}", "quantize: ignore is a list, expected a list of text", "configs/"),
        ("quantize: {overrides: {a: 1}}", "quantize: overrides is keys and values, expected a list", "configs/"),
        ("quantize: {overrides: [a]}", "overrides entry 1 is 'a', expected keys and values", "configs/"),
        ("quantize: {overrides: [{bits: 8}]}", "overrides entry 1: no 'match'", "match: mlp.down_proj"),
        (
            "quantize: {overrides: [{match: a, bits: 8}, {match: a, bit: 8}]}",
            "overrides entry 2: unknown key 'bit'",
            "did you mean 'bits'?",
        ),
        (
            "quantize: {overrides: [{match: a, bits: 9}]}",
            "overrides entry 1: bits is 9, expected 2 to 8",
            "use --bits 4",
        ),
        (
            "quantize: {overrides: [{match: 're:[', bits: 8}]}",
            "overrides entry 1: module pattern 're:[': unterminated character set at position 0",
            "regular expression",
        ),
        ("quantize: {overrides: [{match: 3, bits: 8}]}", "overrides entry 1: match is 3, expected text", "configs/"),
        ("quantize: [bits]", "section 'quantize' is a list, expected keys and values", "configs/"),
        ("- quantize", "the file is a list, expected keys and values", "configs/"),
        ("just words", "the file is 'just words', expected keys and values", "configs/"),
        ("quantize:\n  bits: 4\n  bits: 5\n", "line 3: 'bits' is said twice", "keep one"),
        ("quantize:\n  bits: [4\n", "line 3: ", "valid YAML"),
        ("quantize:\n\tbits: 4\n", "line 2: found character '\\t' that cannot start any token", "valid YAML"),
        ("quantize: !!python/object:os.system {}", "line 1: could not determine a constructor", "valid YAML"),
        ("quantize: \x00", "not a YAML text file", "configs/"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document", "valid YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path: Path, text: str, message: str, hint: str) -> None:
    found, found_hint = refused(tmp_path, text)
    assert found.startswith(message)
    assert hint in found_hint


def test_hostile_files_end_at_once(tmp_path: Path) -> None:
    assert refused(tmp_path, "[" * 100_000)[0] == "not a YAML text file"
    lol = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 'x'}]" for i in range(30))
    assert refused(tmp_path, lol)[0] == "unknown section 'l0'"
    assert refused(tmp_path, "quantize: &a {ignore: [*a]}")[0].startswith("quantize: ignore is a list")
    assert refused(tmp_path, f"quantize: {{split: [{'9' * 10_000}]}}")[0] in (
        "quantize: split is a list, expected text",
        "not a YAML text file",  # Python limits the digits of an integer
    )
    assert refused(tmp_path, "#" * 2**20 + "\n")[0] == "1048577 bytes, too large for a recipe"
    assert len(refused(tmp_path, f"quantize: {{bits: {'x' * 9999}}}")[0]) < 120


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_section(tmp_path / "none.yaml", "quantize", KNOWN)
    assert caught.value.message == f"{tmp_path / 'none.yaml'}: No such file or directory"
    (tmp_path / "latin.yaml").write_bytes(b"quantize: {dataset: \xff}")
    with pytest.raises(UsageError, match="not a YAML text file"):
        load_section(tmp_path / "latin.yaml", "quantize", KNOWN)
