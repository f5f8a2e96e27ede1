"""Three small Llama checkpoints to merge: a base and two sources near it."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of `base`, `first` and `second`: two layers, random float32 weights, head and embedding untied.

    `first` is a light fine-tune of the base; `second` is far enough from it that SLERP meets both regimes.
    """
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file

    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    base = load_file(folder / "base" / "model.safetensors")
    for seed, (name, distance) in enumerate({"first": 2e-3, "second": 1e-2}.items(), start=1):
        random = np.random.default_rng(seed)
        near = {
            key: (tensor + random.normal(scale=distance, size=tensor.shape)).astype(np.float32)
            for key, tensor in base.items()
        }
        (folder / name).mkdir()
        save_file(near, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    return {name: folder / name for name in ("base", "first", "second")}
