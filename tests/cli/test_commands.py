"""Every command does its thing, on models of a few hundred weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mergetool.cli import summary
from mergetool.cli.group import COMMANDS, mergetool
from mergetool.execute.run import run as execute
from mergetool.methods import METHODS
from mergetool.plan import check

NAME = "model.layers.1.mlp.down_proj.weight"


def test_run_writes_the_folder_and_sums_it_up(folder, run):
    result = run("run", "merge.yaml", "out")
    assert result.exit_code == 0, result.stderr
    assert (folder / "out" / "model.safetensors").is_file()
    assert "merged   6 tensors" in result.stdout
    assert "copied   3 tensors" in result.stdout


def test_a_speed_is_said_only_where_it_says_something(folder, run):
    assert "MB/s" not in run("run", "merge.yaml", "out").stdout
    report = execute(check("merge.yaml"), "other")
    large = replace(report, bytes_read=3_000_000_000, seconds=2.0)
    said = "\n".join(summary.lines(large))
    assert "1,500 MB/s read and written" in said
    assert "read     3.00 GB" in said
    assert summary.as_json(large)["bytes_read"] == 3_000_000_000
    assert "MB/s" not in "\n".join(summary.lines(replace(large, resumed=1)))


def test_run_again_does_nothing(folder, run):
    run("run", "merge.yaml", "out")
    before = (folder / "out" / "model.safetensors").stat().st_mtime_ns
    result = run("run", "merge.yaml", "out")
    assert "nothing was done" in result.stdout
    assert (folder / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_run_reports_json_alone_on_stdout(folder, run):
    report = json.loads(run("run", "merge.yaml", "out", "--json").stdout)
    assert (report["merged"], report["copied"], report["unchanged"]) == (6, 3, False)
    assert set(report["digests"]) == set(json.loads(run("plan", "merge.yaml", "--json").stdout)["shards"][0]["tensors"])


def test_run_takes_the_output_of_the_recipe(folder, run):
    assert run("run", "merge.yaml", "--set", "output=there", "--quiet").stdout == ""
    assert (folder / "there" / "config.json").is_file()


def test_run_without_an_output_says_what_to_do(folder, run):
    result = run("run", "merge.yaml")
    assert result.exit_code == 2
    assert "add `output: …`" in result.stderr


def test_run_refuses_a_foreign_folder_unless_forced(folder, run):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("years of work")
    refused = run("run", "merge.yaml", "out")
    assert refused.exit_code == 4
    assert "--force" in refused.stderr
    assert run("run", "merge.yaml", "out", "--force").exit_code == 0


def test_plan_shows_the_table_and_a_job(folder, run):
    assert "Sources" in run("plan", "merge.yaml", "out").stdout
    assert "down_proj" in run("plan", "merge.yaml", "--tensor", NAME).stdout
    assert json.loads(run("plan", "merge.yaml", "--tensor", NAME, "--json").stdout)["method"] == "ties"


def test_plan_suggests_the_nearest_tensor(folder, run):
    result = run("plan", "merge.yaml", "--tensor", "model.layers.1.mlp.downproj.weight")
    assert result.exit_code == 3
    assert f"did you mean `{NAME}`?" in result.stderr


def test_check_refuses_the_output_that_run_would_refuse(folder, run):
    for output in ("a", "merge.yaml"):
        refused = run("check", "merge.yaml", "--set", f"output={output}")
        assert refused.exit_code == run("run", "merge.yaml", output).exit_code == 4
        assert refused.stderr.count("error:") == 1


def test_check_says_ok_in_a_line(folder, run):
    assert run("check", "merge.yaml").stdout == "OK: ties, 3 models, 9 tensors, 7.78 kB to write\n"


def test_methods_lists_all_and_explains_one(run):
    table = run("methods").stdout
    assert all(name in table for name in METHODS)
    page = run("methods", "ties").stdout
    assert all(parameter in page for parameter in METHODS["ties"].parameters)
    assert "arXiv:2306.01708" in page
    assert "2.1" not in page
    misspelt = run("methods", "teis")
    assert misspelt.exit_code == 2
    assert "did you mean `ties`?" in misspelt.stderr


def test_schema_is_json(run):
    assert "merge_method" in json.loads(run("schema").stdout)["properties"]


@pytest.mark.parametrize("data", ["prose.txt", "=prose.txt", "prose="])
def test_evaluate_wants_names_for_texts(run, data):
    result = run("evaluate", "model", "--data", data)
    assert result.exit_code == 2
    assert "prose=prose.txt" in result.stderr


def test_evaluate_wants_one_text_for_a_name(run):
    assert "named twice" in run("evaluate", "model", "--data", "a=1", "--data", "a=2").stderr


def test_evaluate_prints_what_it_measures(run, monkeypatch, tmp_path):
    from mergetool.execute import evaluate

    asked = {}

    def measure(models, data, **options):
        asked.update(options)
        return [evaluate.Score(model, name, 10, 1.0) for model in models for name in data]

    monkeypatch.setattr(evaluate, "evaluate", measure)
    arguments = ("evaluate", "m1", "m2", "--data", "prose=p.txt", "--context", 64)
    assert "2.718" in run(*arguments).stdout
    assert asked["context"] == 64
    assert json.loads(run(*arguments, "--json").stdout)[1]["model"] == "m2"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(run, name):
    text = run(name, "--help").stdout
    assert "Example:" in text
    assert f"mergetool {name}" in text.split("Example:")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    command = mergetool.get_command(None, name)
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help, f"{name} {option.opts} has no help"
            assert option.help.endswith("."), f"{name} {option.opts}"


def test_the_same_option_has_the_same_help_everywhere():
    found = {}
    for name in COMMANDS:
        for option in mergetool.get_command(None, name).params:
            if option.param_type_name == "option":
                assert found.setdefault(option.opts[0], option.help) == option.help


def test_verify_prints_each_check_and_fails_when_one_does(folder, run):
    run("run", "merge.yaml", "out")
    good = run("verify", "out", "--sample", 2)
    assert good.exit_code == 0, good.output
    assert "ok       tensors  9 digests agree" in good.stdout
    assert "ok       sources  2 of 9 tensors made again, the same bytes" in good.stdout
    weights = folder / "out" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    bad = run("verify", "out", "--sample", 0)
    assert bad.exit_code == 4
    assert "WRONG    tensors" in bad.stdout


def test_verify_wants_a_merge(folder, run):
    result = run("verify", "base")
    assert result.exit_code == 3
    assert "provenance" in result.stderr
