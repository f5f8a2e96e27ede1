"""Calibration data: what is chosen of texts, rows and an adapter's files, and what is said where there is nothing."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest

from mergetool.errors import CheckpointError, MergetoolError, PlanError
from mergetool.recipe import load
from mergetool.recipe.data import Data
from mergetool.recipe.files import absent, fingerprint

torch = pytest.importorskip("torch")

from mergetool.execute.calibration import open_tokenizer, read  # noqa: E402
from mergetool.execute.calibration_adapter import load_adapter  # noqa: E402
from mergetool.execute.calibration_text import spread  # noqa: E402

BOS, EOS = 0, 1
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WINDOW = 8


def make_tokenizer(template=None, special="<s> $A", pad=None):
    """A token for each byte, after the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({"<s>": BOS, "</s>": EOS} | {letter: i + 2 for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if special:
        numbers = [("<s>", BOS), ("</s>", EOS)]
        made.post_processor = processors.TemplateProcessing(special, special_tokens=numbers)
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token=pad)
    found.chat_template = template
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEMPLATE)


def texts(tokenizer, samples):
    return [tokenizer.decode(part["input_ids"][0], skip_special_tokens=True) for part in samples.parts]


def said(tokenizer, part):
    """The text whose tokens are to be predicted."""
    return tokenizer.decode(part["labels"][0][part["labels"][0] != -100])


def write(folder, name, *rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data("some", name, max_length=WINDOW)


def refusal(*arguments, **more):
    with pytest.raises(PlanError) as caught:
        read(*arguments, **more)
    (problem,) = caught.value.problems
    return problem


# What is chosen


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (3, 128), (10, 3), (128, 128), (1000, 7)])
def test_choices_are_spread_and_each_thing_has_one_chance(count, wanted):
    runs = spread(count, wanted, 0)
    assert len(runs) == min(count, wanted)
    assert sorted(i for run in runs for i in run) == list(range(count))
    assert all(max(before) < min(after) for before, after in pairwise(runs))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_choices_depend_on_the_seed_alone():
    assert [run[0] for run in spread(1000, 5, 0)] == [45, 318, 409, 699, 934]
    assert spread(1000, 5, 0) == spread(1000, 5, 0) != spread(1000, 5, 1)


# Texts


def test_a_text_is_cut_into_full_windows(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrst")
    samples = read(Data("some", "a.txt", samples=9, max_length=WINDOW), tokenizer, tmp_path, labels=True)
    assert texts(tokenizer, samples) == ["abcdefg", "hijklmn"]  # and "opqrst" does not fill one
    (batch,) = samples.batches()
    assert batch["input_ids"].shape == (2, WINDOW)
    assert batch["input_ids"][:, 0].tolist() == [BOS, BOS]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].all()
    assert batch["labels"].tolist() == [[-100, *row[1:]] for row in batch["input_ids"].tolist()]
    assert samples.notes == ("some: 2 samples, not the 9 asked for",)


def test_windows_are_spread_over_a_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"{i:07}" for i in range(100)))
    data = Data("some", "a.txt", samples=10, max_length=WINDOW)
    chosen = [int(text) for text in texts(tokenizer, read(data, tokenizer, tmp_path))]
    assert [number // 10 for number in chosen] == list(range(10))
    assert chosen != [int(text) for text in texts(tokenizer, read(data, tokenizer, tmp_path, 1))]
    assert read(data, tokenizer, tmp_path).notes == ()


@pytest.mark.parametrize(
    ("special", "first"),
    [("<s> $A </s>", [BOS, 66, 67, EOS]), ("$A </s>", [66, 67, 68, EOS]), (None, [66, 67, 68, 69])],
)
def test_windows_stand_between_the_tokenizers_special_tokens(tmp_path, special, first):
    (tmp_path / "a.txt").write_text("abcdefgh")
    samples = read(Data("some", "a.txt", max_length=4), make_tokenizer(special=special), tmp_path)
    assert samples.parts[0]["input_ids"].tolist() == [first]


def test_the_same_content_gives_the_same_samples(tmp_path, tokenizer):
    data = Data("some", "a.txt", samples=5, max_length=WINDOW)
    (tmp_path / "a.txt").write_text("\ufeffno byte order mark is part of this text, which is long enough for five")
    (tmp_path / "b.txt").write_text("no byte order mark is part of this text, which is long enough for five")
    one, other = read(data, tokenizer, tmp_path), read(replace(data, path="b.txt", name="x"), tokenizer, tmp_path)
    assert one.digest == other.digest
    assert one.digest != read(data, tokenizer, tmp_path, 3).digest
    assert one.digest != read(replace(data, samples=4), tokenizer, tmp_path).digest
    assert one.digest != read(data, tokenizer, tmp_path, labels=True).digest


def test_a_text_too_short_for_a_window(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdef")
    data = Data("some", "a.txt", max_length=WINDOW)
    problem = refusal(data, tokenizer, tmp_path)
    assert problem.what == "the text has 6 tokens, fewer than one window of 7"
    assert problem.fix == "add text, or lower `max_length` of `some`"
    assert texts(tokenizer, read(replace(data, max_length=7), tokenizer, tmp_path)) == ["abcdef"]
    problem = refusal(replace(data, max_length=2), make_tokenizer(special="<s> $A </s>"), tmp_path)
    assert "no room" in problem.what


def test_samples_longer_than_the_models_take(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrst")
    data = Data("some", "a.txt", max_length=WINDOW)
    assert len(read(data, tokenizer, tmp_path, longest=WINDOW)) == 2
    problem = refusal(data, tokenizer, tmp_path, longest=4)
    assert problem.what == "samples have 8 tokens, and the models take 4 at most"
    assert problem.fix == "set `max_length: 4`"


# Rows


def test_rows_are_cut_off_and_padded_on_the_right(tmp_path, tokenizer):
    data = write(tmp_path, "a.jsonl", {"text": "abc"}, {"text": "abcdefghijkl"}, {"text": "x"})
    samples = read(data, tokenizer, tmp_path, labels=True)
    assert texts(tokenizer, samples) == ["abc", "abcdefg", "x"]
    one, two = samples.batches(rows=2)
    assert one["input_ids"].shape == (2, WINDOW)
    assert one["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert one["labels"].tolist()[0][4:] == [-100] * 4
    assert (one["labels"] == one["input_ids"])[one["attention_mask"] == 1].all()
    assert two["input_ids"].shape == (1, 2)
    assert "labels" not in next(read(data, tokenizer, tmp_path).batches())


def test_the_padding_is_the_tokenizers(tmp_path):
    data = write(tmp_path, "a.jsonl", {"text": "abc"}, {"text": "x"})
    (batch,) = read(data, make_tokenizer(pad="</s>"), tmp_path).batches()
    assert batch["input_ids"][1].tolist()[2:] == [EOS, EOS]


def test_rows_are_spread_and_empty_ones_passed_over(tmp_path, tokenizer):
    rows = [{"text": str(i) if i % 10 == 3 else " "} for i in range(100)]
    data = replace(write(tmp_path, "a.jsonl", *rows), samples=10)
    samples = read(data, tokenizer, tmp_path)
    assert texts(tokenizer, samples) == [str(10 * i + 3) for i in range(10)]
    (note,) = samples.notes
    assert note.startswith("some: ")
    assert note.endswith(" rows passed over: empty, or cut off before their response")
    assert texts(tokenizer, read(replace(data, samples=100), tokenizer, tmp_path)) == texts(tokenizer, samples)


def test_another_column(tmp_path, tokenizer):
    data = write(tmp_path, "a.jsonl", {"text": "abc", "body": "xyz"})
    assert texts(tokenizer, read(replace(data, column="body"), tokenizer, tmp_path)) == ["xyz"]
    problem = refusal(replace(data, column="bodi"), tokenizer, tmp_path)
    assert problem.what == "there is no column `bodi`"
    assert problem.fix == "did you mean `body`?"
    assert problem.where == f"{tmp_path / 'a.jsonl'}:1"


def test_of_a_prompt_and_its_response_the_response_is_predicted(tmp_path, tokenizer):
    rows = [
        {"prompt": "ab", "response": "cd"},
        {"prompt": "", "response": "xy"},
        {"prompt": "long" * 9, "response": "z"},
    ]
    data = write(tmp_path, "a.jsonl", *rows)
    assert texts(tokenizer, read(data, tokenizer, tmp_path)) == ["abcd", "xy", "longlon"]
    samples = read(data, tokenizer, tmp_path, labels=True)
    assert [said(tokenizer, part) for part in samples.parts] == ["cd", "xy"]
    assert samples.parts[1]["labels"][0, 0] == -100  # the special token is no response
    assert samples.notes == (
        "some: 1 rows passed over: empty, or cut off before their response",
        "some: 2 samples, not the 128 asked for",
    )


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "!"},
]


def test_messages_are_written_by_the_chat_template(tmp_path, tokenizer):
    data = replace(write(tmp_path, "a.jsonl", {"messages": CHAT}), max_length=100)
    samples = read(data, tokenizer, tmp_path, labels=True)
    assert texts(tokenizer, samples) == ["[user]hi;[assistant]yo;[user]?;[assistant]!;"]
    assert samples.parts[0]["input_ids"][0, 0] != BOS  # special tokens are the template's affair
    assert said(tokenizer, samples.parts[0]) == "yo;!;"
    other = replace(write(tmp_path, "b.jsonl", {"talk": CHAT}), max_length=100, column="talk")
    assert read(other, tokenizer, tmp_path, labels=True).digest == samples.digest


def test_a_template_that_does_not_show_who_speaks(tmp_path):
    reverse = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    data = replace(write(tmp_path, "a.jsonl", {"messages": CHAT[:2]}), samples=1)
    samples = read(data, make_tokenizer(reverse), tmp_path, labels=True)
    assert said(make_tokenizer(), samples.parts[0]) == "yohi"
    what = "it cannot be told which tokens are responses, so all of them are to be predicted"
    assert samples.notes == (f"some: {what}",)


def test_messages_without_a_template_or_against_it(tmp_path):
    data = write(tmp_path, "a.jsonl", {"messages": CHAT})
    problem = refusal(data, make_tokenizer(), tmp_path)
    assert problem.what == "`messages` need a chat template, and the tokenizer has none"
    assert "or write the conversation as `text`" in problem.fix
    picky = "{{ raise_exception('only system messages') }}"
    assert refusal(data, make_tokenizer(picky), tmp_path).what.endswith("only system messages")


@pytest.mark.parametrize("message", ["hi", {"role": "user"}, {"role": 3, "content": "x"}, {"content": "x"}])
def test_messages_of_another_shape(tmp_path, tokenizer, message):
    problem = refusal(write(tmp_path, "a.jsonl", {"messages": [message]}), tokenizer, tmp_path)
    assert problem.what == "`messages` must be messages with `role` and `content`"
    assert problem.where == f"{tmp_path / 'a.jsonl'}:1"


# What is wrong with files


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_missing_and_empty_files(tmp_path, tokenizer, name):
    data = Data("some", name)
    problem = refusal(data, tokenizer, tmp_path)
    assert (problem.where, problem.what) == ("some", f"there is no file {name}")
    assert problem.fix == "paths are relative to the recipe's folder"
    (tmp_path / f"b{name}").touch()
    assert refusal(data, tokenizer, tmp_path).fix == f"did you mean `b{name}`?"
    for content in ("", " \n\n", "\ufeff\n"):
        (tmp_path / name).write_text(content)
        problem = refusal(data, tokenizer, tmp_path)
        assert (problem.where, problem.what) == (str(tmp_path / name), "the file is empty")
    (tmp_path / "folder.txt").mkdir()
    assert refusal(Data("some", "folder.txt"), tokenizer, tmp_path).what == "folder.txt is no file"


def test_not_utf8(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    problem = refusal(Data("some", "a.txt"), tokenizer, tmp_path)
    assert (problem.what, problem.fix) == ("is not UTF-8 text: byte 3", "save it as UTF-8")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    problem = refusal(Data("some", "a.jsonl"), tokenizer, tmp_path)
    assert problem.what == "is not UTF-8 text: byte 10 of the line"
    assert problem.where == f"{tmp_path / 'a.jsonl'}:2"


@pytest.mark.parametrize(
    ("line", "where", "what"),
    [
        ('{"text": a}', ":3:10", "is not JSON: Expecting value"),
        ('{"text": "a"', ":3:13", "is not JSON: Expecting ',' delimiter"),
        ("text", ":3:1", "is not JSON: Expecting value"),
        ('["text"]', ":3", "the line holds no JSON object"),
        ('{"a":' * 100_000, ":3", "is not JSON that can be read: it is nested too deep"),
        ('{"body": "a", "x": 1}', ":3", "the row has no `text`; its columns are `body`, `x`"),
        ('{"text": 3}', ":3", "`text` must be text or a list of messages, not int"),
        ('{"text": {"a": 1}}', ":3", "`text` must be text or a list of messages, not dict"),
    ],
)
def test_a_line_that_is_wrong(tmp_path, tokenizer, line, where, what):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    problem = refusal(Data("some", "a.jsonl"), tokenizer, tmp_path)
    assert problem.where == f"{tmp_path / 'a.jsonl'}{where}"
    assert problem.what.startswith(what)


def test_rows_with_nothing_to_run_on(tmp_path, tokenizer):
    data = write(tmp_path, "a.jsonl", {"question": "a", "answer": "b"})
    problem = refusal(data, tokenizer, tmp_path)
    assert problem.what.endswith("`prompt` and `response`; their columns are `question`, `answer`")
    assert problem.fix == "name one under `data`: `some: {path: …, column: …}`"
    data = write(tmp_path, "a.jsonl", {"text": ""}, {"text": None})
    assert refusal(data, tokenizer, tmp_path).what == "none of 2 rows holds anything to run on"
    data = write(tmp_path, "a.jsonl", {"messages": []})
    assert refusal(data, tokenizer, tmp_path).what == "none of 1 rows holds anything to run on"


# The extra


@pytest.mark.parametrize(("path", "module"), [("a.parquet", "pyarrow"), ("hub:org/name:train", "datasets")])
def test_without_the_extra(tmp_path, tokenizer, monkeypatch, path, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").touch()
    problem = refusal(Data("some", path), tokenizer, tmp_path)
    assert "the libraries of the extra `data`" in problem.what
    assert problem.fix == "install them: `pip install 'mergetool[data]'`"


def test_parquet(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i}", "messages": CHAT} for i in range(50)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    as_lines = write(tmp_path, "a.jsonl", *rows)
    for column in (None, "messages"):
        data = replace(as_lines, samples=5, column=column)
        other = replace(data, path="a.parquet")
        assert read(other, tokenizer, tmp_path).digest == read(data, tokenizer, tmp_path).digest
    problem = refusal(replace(as_lines, path="a.parquet", column="txt"), tokenizer, tmp_path)
    assert (problem.fix, problem.where) == ("did you mean `text`?", f"{tmp_path / 'a.parquet'}: row 1")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert refusal(other, tokenizer, tmp_path).what.startswith("cannot be read as Parquet: ")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert refusal(other, tokenizer, tmp_path).what == "there are no rows in it"


class Loaded(list):
    column_names = ("text",)


def stand_in(load_dataset):
    """What is used of the `datasets` library, so that no test asks the Hub."""
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.are_progress_bars_disabled = lambda: True
    module.disable_progress_bars = lambda: None
    return module


def test_a_data_set_on_the_hub(tokenizer, monkeypatch):
    asked = []

    def load_dataset(*arguments, **more):
        asked.append((arguments, more))
        return Loaded({"text": f"row {i}"} for i in range(3))

    monkeypatch.setitem(sys.modules, "datasets", stand_in(load_dataset))
    data = Data("some", "hub:org/name@v1:plain:train[:3]", max_length=WINDOW)
    assert texts(tokenizer, read(data, tokenizer)) == ["row 0", "row 1", "row 2"]
    assert asked == [(("org/name", "plain"), {"split": "train[:3]", "revision": "v1"})]


def test_a_data_set_by_the_library_itself(tokenizer, tmp_path, monkeypatch):
    """It takes a folder of that name for the repo, so that nobody need ask the Hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3))
    (tmp_path / "org" / "name" / "train.jsonl").write_text(rows)
    data = Data("some", "hub:org/name:train", max_length=WINDOW)
    assert texts(tokenizer, read(data, tokenizer)) == ["row 0", "row 1", "row 2"]
    problem = refusal(Data("some", "hub:org/name:nosuch"), tokenizer)
    assert problem.what.startswith('cannot be loaded: Unknown split "nosuch"')


def test_a_data_set_that_cannot_be_loaded(tokenizer, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network\nhere") from OSError("the cable\nis out")

    monkeypatch.setitem(sys.modules, "datasets", stand_in(load_dataset))
    problem = refusal(Data("some", "hub:org/name:train"), tokenizer)
    assert (problem.where, problem.what) == ("hub:org/name:train", "cannot be loaded: no network: the cable")


# Adapters

ADAPTER = """\
import torch
from dataclasses import dataclass

@dataclass
class Config:
    width: int

def network(config):
    return torch.nn.Linear(Config(**config).width, 2)

def read(path, samples, seed):
    values = torch.tensor([float(x) for x in path.read_text().split()])[:samples]
    return [{"input": x[:, None], "labels": torch.zeros(len(x))} for x in values.split(4)]
"""


@pytest.fixture
def adapted(tmp_path):
    """A folder with an adapter, and numbers for it to read."""
    (tmp_path / "adapter.py").write_text(ADAPTER)
    (tmp_path / "numbers.dat").write_text("1 2 3 4 5 6")
    return tmp_path


def test_an_adapter_makes_networks_and_batches(adapted):
    adapter = load_adapter(adapted / "adapter.py", trust_code=True)
    data = Data("some", "numbers.dat", samples=6)
    samples = read(data, adapter, adapted)
    assert [batch["input"].flatten().tolist() for batch in samples.batches(rows=1)] == [[1, 2, 3, 4], [5, 6]]
    assert all(set(part) == {"input"} for part in samples.parts)
    assert set(read(data, adapter, adapted, labels=True).parts[0]) == {"input", "labels"}
    assert (len(samples), samples.notes) == (6, ())
    assert read(replace(data, samples=9), adapter, adapted).notes == ("some: 6 samples, not the 9 asked for",)
    assert samples.digest != read(replace(data, samples=5), adapter, adapted).digest
    assert adapter.network({"width": 3})(torch.zeros(1, 3)).shape == (1, 2)
    assert sorted(path.name for path in adapted.iterdir()) == ["adapter.py", "numbers.dat"]


def test_an_adapter_does_not_run_unless_it_is_trusted(adapted):
    (adapted / "adapter.py").write_text("raise SystemExit")
    with pytest.raises(PlanError, match="not run unless you say so") as caught:
        load_adapter(adapted / "adapter.py", trust_code=False)
    assert caught.value.problems[0].fix == "read it, and add `--trust-code` if you trust it"


@pytest.mark.parametrize(
    ("old", "new", "what", "line"),
    [
        ("import torch\n", "import torhc\n", "the adapter fails: ModuleNotFoundError: No module named 'torhc'", ":1"),
        ("@dataclass", "@@dataclass", "the adapter fails: SyntaxError: ", ":4"),
        ("def network", "def net", "the adapter has no function `network`", ""),
        ("def read", "def reed", "the adapter has no function `read`", ""),
    ],
)
def test_an_adapter_that_cannot_be_used(adapted, old, new, what, line):
    (adapted / "adapter.py").write_text(ADAPTER.replace(old, new, 1))
    with pytest.raises(PlanError) as caught:
        load_adapter(adapted / "adapter.py", trust_code=True)
    (problem,) = caught.value.problems
    assert problem.what.startswith(what)
    assert problem.where == f"{adapted / 'adapter.py'}{line}"


def test_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="there is no file"):
        load_adapter(tmp_path / "adapter.py", trust_code=True)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise ValueError('odd')", "`read` fails on FILE: ValueError: odd"),
        ("return None", "`read` of FILE gives nothing, not a list of batches"),
        ("return []", "`read` of FILE gives nothing, not a list of batches"),
        ("return {'x': torch.zeros(1)}", "`read` of FILE gives a dict of Tensor, not a list of batches"),
        ("return [torch.zeros(1)]", "`read` of FILE gives a Tensor as a batch"),
        ("return [{'x': 1}]", "`read` of FILE gives a dict of int as a batch"),
        ("return [{'labels': torch.zeros(1)}]", "`read` of FILE gives a dict of Tensor as a batch"),
        (
            "return [{'x': torch.zeros(2), 'y': torch.zeros(3)}]",
            "`read` of FILE gives a batch of unequal or no samples: 2 of `x`, 3 of `y`",
        ),
        ("return [{'x': torch.zeros(0)}]", "`read` of FILE gives a batch of unequal or no samples: 0 of `x`"),
        ("return [{'x': torch.zeros(2)}]", "`read` of FILE gives no `labels`, and they are needed"),
    ],
)
def test_an_adapter_that_gives_no_batches(adapted, body, what):
    head, _, _ = ADAPTER.partition("    values")
    (adapted / "adapter.py").write_text(f"{head}    {body}\n")
    adapter = load_adapter(adapted / "adapter.py", trust_code=True)
    problem = refusal(Data("some", "numbers.dat"), adapter, adapted, labels=True)
    assert problem.what == what.replace("FILE", str(adapted / "numbers.dat"))
    assert problem.where.startswith(str(adapted / "adapter.py"))


def test_an_adapter_reads_folders_but_not_the_hub(adapted):
    adapter = replace(load_adapter(adapted / "adapter.py", True), read=lambda *_: [{"x": torch.zeros(1)}])
    (adapted / "images").mkdir()
    assert len(read(Data("some", "images"), adapter, adapted)) == 1
    assert refusal(Data("some", "nothing"), adapter, adapted).what == "there is no file nothing"
    assert refusal(Data("some", "hub:a/b:c"), adapter, adapted).what == "an adapter reads files, not the Hub"


# Tokenizers, and files ahead of time


def test_the_tokenizer_of_a_model(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    found = open_tokenizer(tmp_path / "model", "model")
    assert found("ab").input_ids == tokenizer("ab").input_ids
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match="has no tokenizer that can be loaded"):
        open_tokenizer(tmp_path / "bare", "bare")


def test_files_that_are_not_there_are_found_before_they_are_read(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\ncalibration:\n  data:\n"
    recipe.write_text(text + "    a: a.txt\n    b: {path: b.jsonl}\n    c: hub:org/c:train\n  adapter: adapt.py\n")
    (tmp_path / "b.json").touch()
    found = [(problem.where.removeprefix(f"{recipe}:"), problem.what, problem.fix) for problem in absent(load(recipe))]
    assert found == [
        ("6:8", "there is no file a.txt", "paths are relative to the recipe's folder"),
        ("7:8", "there is no file b.jsonl", "did you mean `b.json`?"),
        ("9:12", "there is no file adapt.py", "paths are relative to the recipe's folder"),
    ]
    for name in ("a.txt", "b.jsonl", "adapt.py"):
        (tmp_path / name).touch()
    assert absent(load(recipe)) == []
    assert absent(load(text.partition("calibration")[0])) == []


def test_a_fingerprint_is_of_content_and_settings(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    data = Data("some", "a.txt")
    known = fingerprint(data, tmp_path)
    assert fingerprint(Data("other", "b.txt"), tmp_path) == known
    changed = [replace(data, samples=1), replace(data, max_length=9), replace(data, column="x")]
    others = {fingerprint(each, tmp_path) for each in changed} | {
        fingerprint(data, tmp_path, seed=1),
        fingerprint(data, tmp_path, adapter=tmp_path / "b.txt"),
        fingerprint(Data("some", "hub:org/a:train"), tmp_path),
    }
    (tmp_path / "a.txt").write_text("two")
    others.add(fingerprint(data, tmp_path))
    assert len(others | {known}) == 8
    (tmp_path / "sub").mkdir()
    empty = fingerprint(Data("some", "sub"), tmp_path)
    (tmp_path / "sub" / "x").touch()
    assert fingerprint(Data("some", "sub"), tmp_path) != empty
    with pytest.raises(MergetoolError):
        fingerprint(Data("some", "absent.txt"), tmp_path)
