"""Every example recipe runs as it stands, and a misspelt key in any of them is found where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mergetool.cli.group import mergetool as cli
from mergetool.storage.header import read_header

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))
REPORTED = ("align", "align-repair", "dam", "fisher", "greedy-soup", "regmean", "tact")
"""Those that look at whole models first, and so have something to show."""


def names(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of every example, by its name."""
    folder = tmp_path_factory.mktemp("examples")
    for recipe in RECIPES:
        result = CliRunner().invoke(cli, ["run", "--quiet", str(recipe), str(folder / recipe.stem)])
        assert result.exit_code == 0, result.output
    return {recipe.stem: folder / recipe.stem for recipe in RECIPES}


def folders(output: Path) -> list[Path]:
    """The model folders of an output: itself, or one for each task."""
    return [output] if (output / "provenance.json").exists() else sorted(output.iterdir())


@pytest.mark.parametrize("recipe", RECIPES, ids=names)
def test_an_example_makes_complete_model_folders(recipe: Path, merged: dict[str, Path]) -> None:
    base = EXAMPLES / "models" / "base"
    for folder in folders(merged[recipe.stem]):
        assert {path.name for path in base.iterdir()} | {
            "README.md",
            "mergetool.yaml",
            "provenance.json",
            ".mergetool",
            *(("report", "report.html") if recipe.stem in REPORTED else ()),
        } == {path.name for path in folder.iterdir()}
        assert recipe.read_text() == (folder / "mergetool.yaml").read_text()
        written = list(read_header(folder / "model.safetensors").entries)
        added = [name for name in written if name.endswith(".bias")]  # that hold what is corrected
        assert bool(added) == ("correct:" in recipe.read_text())
        own = [name for name in written if name not in added]
        assert own == list(read_header(base / "model.safetensors").entries)


def test_every_task_has_a_model(merged: dict[str, Path]) -> None:
    assert [folder.name for folder in folders(merged["tact"])] == ["python", "spanish", "speeches"]


@pytest.mark.parametrize("recipe", RECIPES, ids=names)
def test_an_example_loads_with_transformers_and_passes_verify(recipe: Path, merged: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    for folder in folders(merged[recipe.stem]):
        _, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loaded.values())

    result = CliRunner().invoke(cli, ["verify", str(merged[recipe.stem])])
    assert result.exit_code == 0, result.output


def test_merging_helps_somewhere(merged: dict[str, Path]) -> None:
    """Task arithmetic recovers a third of the specialists' mean gain, measured on part of the test texts."""
    from mergetool.execute.evaluate import evaluate

    domains = ("python", "speeches", "spanish")
    models = [EXAMPLES / "models" / name for name in ("base", *domains)] + [merged["task-arithmetic"]]
    data = {name: EXAMPLES / "data" / f"{name}.txt" for name in domains}
    scores = evaluate(models, data, limit=4096)
    nll = {(Path(score.model).name, score.data): score.nll for score in scores}

    recovered = [
        (nll["base", name] - nll["task-arithmetic", name]) / (nll["base", name] - nll[name, name]) for name in domains
    ]
    for home in domains:
        assert min(nll[model, home] for model in ("base", *domains)) == nll[home, home]
    assert sum(recovered) / 3 > 1 / 3


def _keys(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield from _keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keys(item)


def _misspelt() -> Iterator[object]:
    for recipe in RECIPES:
        for key in _keys(yaml.compose(recipe.read_text())):
            line, column = key.start_mark.line + 1, key.start_mark.column + 1
            yield pytest.param(recipe, key, id=f"{recipe.stem}-{line}:{column}-{key.value}")


@pytest.mark.parametrize(("recipe", "key"), list(_misspelt()))
def test_a_misspelt_key_of_an_example_is_found(recipe: Path, key: yaml.ScalarNode, tmp_path: Path) -> None:
    """Exit code 2, the line and the column, and the right name."""
    text = recipe.read_text()
    middle = key.start_mark.index + len(key.value) // 2
    wrong = text[:middle] + text[middle + 1 :] if len(key.value) > 1 else text[:middle] + key.value + text[middle:]
    path = tmp_path / "recipe.yaml"
    path.write_text(wrong)
    (tmp_path / "models").symlink_to(EXAMPLES / "models")

    result = CliRunner().invoke(cli, ["check", str(path)])

    assert result.exit_code == 2
    assert f"recipe.yaml:{key.start_mark.line + 1}:{key.start_mark.column + 1}: " in result.stderr
    assert f"`{key.value}`" in result.stderr


def test_overrides_change_a_recipe_that_runs(tmp_path: Path) -> None:
    recipe = EXAMPLES / "task-arithmetic.yaml"
    args = ["run", "--quiet", "--set", "parameters.lambda=0", str(recipe), str(tmp_path / "out")]
    assert CliRunner().invoke(cli, args).exit_code == 0

    base = (EXAMPLES / "models" / "base" / "model.safetensors").read_bytes()
    header = read_header(tmp_path / "out" / "model.safetensors")
    source = read_header(EXAMPLES / "models" / "base" / "model.safetensors")
    assert base[source.data_start :] == (tmp_path / "out" / "model.safetensors").read_bytes()[header.data_start :]
    assert yaml.safe_load((tmp_path / "out" / "mergetool.yaml").read_text())["parameters"]["lambda"] == 0


def test_a_source_with_another_layout_of_files_merges_the_same(tmp_path: Path) -> None:
    """Sharded and single-file sources are the same model."""
    from mergetool.storage.header import lay_out
    from mergetool.storage.reader import Reader

    models = tmp_path / "models"
    shutil.copytree(EXAMPLES / "models", models)
    whole = models / "python" / "model.safetensors"
    header = read_header(whole)
    names = list(header.entries)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    with Reader(whole) as reader:
        for file, held in parts.items():
            entries = [header.entries[name] for name in held]
            _, preamble = lay_out([(e.name, e.dtype, e.shape) for e in entries], {"format": "pt"})
            data = b"".join(reader.read(entry).tobytes() for entry in entries)
            (models / "python" / file).write_bytes(preamble + data)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (models / "python" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()
    (tmp_path / "ties.yaml").write_text((EXAMPLES / "ties.yaml").read_text())

    for recipe, out in ((EXAMPLES / "ties.yaml", "one"), (tmp_path / "ties.yaml", "two")):
        result = CliRunner().invoke(cli, ["run", "--quiet", str(recipe), str(tmp_path / out)])
        assert result.exit_code == 0, result.output

    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
