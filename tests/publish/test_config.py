import json

from mergetool.publish.config import with_dtype

RAW = b'{\n   "z": 1e-06, "torch_dtype": "float16",\n "a": {"b": "\\u00e9"}, "tie_word_embeddings": true\n}'


def test_without_a_dtype_asked_for_the_bytes_stay():
    assert with_dtype(RAW, None) is RAW


def test_a_dtype_that_is_there_already_leaves_the_bytes():
    assert with_dtype(RAW, "float16") is RAW
    assert with_dtype(b'{"model_type": "x"}', "bfloat16") == b'{"model_type": "x"}'


def test_only_the_dtype_changes_and_the_order_stays():
    changed = json.loads(with_dtype(RAW, "BF16"))
    assert changed == json.loads(RAW) | {"torch_dtype": "bfloat16"}
    assert list(changed) == list(json.loads(RAW))


def test_configs_inside_are_changed_too_but_not_that_of_a_quantiser():
    config = {
        "dtype": None,
        "text_config": {"torch_dtype": "torch.float32", "dtype": "float32"},
        "vision_config": {"hidden_size": 3},
        "audio": {"dtype": {"odd": 1}},
        "quantization_config": {"dtype": "float32"},
        "index": {"dtype": "int64"},
    }
    changed = json.loads(with_dtype(json.dumps(config).encode(), "bfloat16"))
    assert changed == config | {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
    }


def test_a_byte_order_mark_and_escapes_survive():
    raw = b'\xef\xbb\xbf{"dtype": "float32", "x": "\\ud83d \\u5929"}'
    assert json.loads(with_dtype(raw, "bfloat16")) == {"dtype": "bfloat16", "x": "\ud83d 天"}
