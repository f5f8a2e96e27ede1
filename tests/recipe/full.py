"""A recipe that uses every key there is."""

from __future__ import annotations

FULL = """\
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: {model: {path: org/code, revision: main}, lora: {path: org/lora, revision: v1}}
    parameters:
      weight: 0.3
      density:
        - filter: self_attn
          value: [0.2, 0.5]
        - value: 0.4
  - model: org/chat
    parameters: {weight: 0.7}
parameters:
  normalize: true
  lambda: 0.9
  scope: tensor
  int8_mask: true
rules:
  - where: {part: embedding, name: "*.embed_tokens.*"}
    keep: org/chat
  - where:
      layers: [0-3, -1]
    parameters:
      density: 1
    models:
      - model: org/chat
        parameters: {weight: 0}
  - where: {part: [norm]}
    merge_method: linear
    parameters: {weight: 1}
  - where: {name: [rotary.*]}
    drop: true
dtype: bfloat16
out_dtype: float16
seed: 7
output: merged
tokenizer_source: base
"""
