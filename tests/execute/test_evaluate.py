import json
import math
import shutil

import pytest

from mergetool.errors import CheckpointError, PlanError
from mergetool.execute.evaluate import Score, evaluate, table

torch = pytest.importorskip("torch")

LENGTH = 24
TEXT = "It was the best of times, it was the worst of times; été, naïve. "


def tokenizer(folder, bos=False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", model_max_length=8).save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small take longer to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two random Llamas, the second with a tokenizer that begins texts with BOS; and two texts."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    home = tmp_path_factory.mktemp("evaluate")
    logging.disable_progress_bar()
    for seed, name in enumerate(("plain", "begins")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=260,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
            initializer_range=0.5,
        )
        LlamaForCausalLM(config).save_pretrained(home / name)
        tokenizer(home / name, bos=seed == 1)
    logging.enable_progress_bar()
    (home / "long.txt").write_text(TEXT, encoding="utf-8")
    (home / "short.txt").write_text("Call me Ishmael.", encoding="utf-8")
    return home


@pytest.fixture
def broken(home, tmp_path):
    return shutil.copytree(home / "plain", tmp_path / "broken")


def naive(folder, text, context, bos):
    """Each token by a forward pass of its own over what stands before it in its window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, verbose=False).input_ids
    step = context - bos
    nlls = []
    for at, token in enumerate(ids):
        before = [0] * bos + ids[at // step * step : at]
        if before:
            with torch.inference_mode():
                logits = model(torch.tensor([before])).logits[0, -1]
            nlls.append(-float(torch.log_softmax(logits, 0)[token]))
    return len(nlls), sum(nlls) / len(nlls)


@pytest.mark.parametrize("context", [2, 7, LENGTH])
@pytest.mark.parametrize("name", ["plain", "begins"])
def test_the_score_is_that_of_a_loop_over_tokens(home, name, context):
    (score,) = evaluate([home / name], {"long": home / "long.txt"}, context=context, dtype="float64", batch=3)
    tokens, nll = naive(home / name, TEXT, context, name == "begins")
    assert score.tokens == tokens
    assert score.nll == pytest.approx(nll, rel=1e-12)
    assert score.perplexity == pytest.approx(math.exp(nll), rel=1e-11)
    assert (score.model, score.data) == (str(home / name), "long")


def test_the_batch_changes_nothing(home):
    data = {"long": home / "long.txt"}
    scores = [evaluate([home / "plain"], data, batch=batch, dtype="float64")[0] for batch in (1, 2, 8, 100)]
    assert len({score.tokens for score in scores}) == 1
    assert [score.nll for score in scores] == pytest.approx([scores[0].nll] * 4, rel=1e-13)


def test_the_default_context_is_what_all_models_take(home, broken):
    config = json.loads((broken / "config.json").read_text()) | {"max_position_embeddings": 9}
    (broken / "config.json").write_text(json.dumps(config))
    data = {"long": home / "long.txt"}
    asked = evaluate([home / "plain"], data, context=9)
    assert evaluate([home / "plain", broken], data)[0] == asked[0]
    assert evaluate([home / "plain"], data) == evaluate([home / "plain"], data, context=LENGTH)


def test_models_come_in_order_and_each_with_all_texts(home):
    data = {"long": home / "long.txt", "short": home / "short.txt"}
    scores = evaluate([home / "begins", home / "plain"], data)
    found = [(score.model.rsplit("/", 1)[1], score.data) for score in scores]
    assert found == [("begins", "long"), ("begins", "short"), ("plain", "long"), ("plain", "short")]
    assert [score.tokens for score in scores][1::2] == [16, 15]


def test_a_limit_takes_the_first_tokens(home):
    (score,) = evaluate([home / "plain"], {"short": home / "short.txt"}, limit=5)
    assert score.tokens == 4


def test_nothing_is_printed(home, capfd):
    evaluate([home / "plain"], {"long": home / "long.txt"}, dtype="bfloat16")
    assert capfd.readouterr() == ("", "")


def test_texts_that_cannot_be_scored_are_all_named(home, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    data = {name: tmp_path / f"{name}.txt" for name in ("empty", "latin", "gone")}
    with pytest.raises(PlanError) as error:
        evaluate([home / "plain"], data)
    said = [(problem.where.rsplit("/", 1)[1], problem.what) for problem in error.value.problems]
    assert said == [
        ("empty.txt", "the text is empty"),
        ("latin.txt", "is not UTF-8 text: byte 0"),
        ("gone.txt", "cannot be read: No such file or directory"),
    ]


def test_a_text_of_one_token_is_too_short(home, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(PlanError, match="too short"):
        evaluate([home / "plain"], {"x": tmp_path / "x.txt"})
    assert evaluate([home / "begins"], {"x": tmp_path / "x.txt"})[0].tokens == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 1}, "context must be at least 2"),
        ({"context": LENGTH + 1}, f"takes {LENGTH} tokens at most"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"limit": 1}, "limit must be at least 2"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "cuda:77"}, "no device 'cuda:77'"),
        ({"device": "nonsense"}, "no device 'nonsense'"),
    ],
)
def test_arguments_out_of_range_are_refused(home, options, said):
    with pytest.raises(PlanError, match=said):
        evaluate([home / "plain"], {"short": home / "short.txt"}, **options)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "its config cannot be used"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nobodys"}'), "its config cannot be used"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot be loaded"),
        (lambda folder: amend(folder, architectures=["LlamaModel"]), "is not a causal language model: LlamaModel"),
        (lambda folder: amend(folder, num_hidden_layers=3), "lacks weights that its config asks for: `model.layers.2"),
        (lambda folder: amend(folder, vocab_size=300), "lacks weights that its config asks for: `lm_head"),
    ],
)
def test_models_that_cannot_be_scored_say_why(home, broken, harm, said):
    harm(broken)
    with pytest.raises(CheckpointError, match=said):
        evaluate([broken], {"short": home / "short.txt"})


def amend(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(home, broken):
    words = (broken / "tokenizer.json").read_text()
    assert '"<s>": 0' in words
    made = json.loads(words)
    made["model"]["vocab"]["C"] = 999
    (broken / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(CheckpointError, match="its tokenizer gives token 999, the model knows 260"):
        evaluate([broken], {"short": home / "short.txt"})


def test_a_model_of_another_kind_is_refused(home, broken):
    (broken / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(CheckpointError, match="not a causal language model: T5ForConditionalGeneration"):
        evaluate([broken], {"short": home / "short.txt"})


def test_a_model_that_is_not_there_is_named(home):
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate([home / "plane"], {"short": home / "short.txt"})


def test_the_table_has_a_line_for_each_model():
    scores = [
        Score("base", "en", 10, math.log(4)),
        Score("base", "es", 10, math.log(9)),
        Score("merged model", "en", 10, math.log(2)),
        Score("merged model", "es", 10, 1000.0),
        Score("half", "en", 10, 0.0),
    ]
    assert table(scores).splitlines() == [
        "nats a token      en         es      mean",
        "base          1.3863     2.1972    1.7918",
        "merged model  0.6931  1000.0000  500.3466",
        "half          0.0000          -    0.0000",
        "",
        "perplexity        en         es      mean",
        "base           4.000      9.000     6.000",
        "merged model   2.000        inf    2e+217",
        "half           1.000          -     1.000",
    ]
