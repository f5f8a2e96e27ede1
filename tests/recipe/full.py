"""Two recipes that use every key there is, one of them those about data and the stages around the merge."""

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

STAGES = """\
merge_method: task_arithmetic
base_model: org/base
models:
  - {model: org/code, data: python}
  - model: org/chat
    data: talk
parameters: {weight: 0.5}
calibration:
  data:
    python: {path: python.txt, samples: 64, max_length: 256}
    talk:
      path: hub:org/talk@v1:train
      column: dialogue
    mixed: mixed.jsonl
  adapter: adapter.py
align:
  method: activation_matching
  reference: {model: {path: org/base}}
  groups: [mlp, heads]
  data: mixed
  max_sweeps: 50
  score: inner_product
  margin: 0.02
  seed: 3
  verify: false
correct:
  method: tact
  scope: output
  statistic: mean_std
  clamp: 5
  data: [python, talk]
  samples: 32
  fold: head
train:
  steps: 100
  learning_rate: 1e-3
  schedule: linear
  warmup: 0.1
  clip: 2
  batch_tokens: 4096
  topk: 50
  held_out: 0.1
  every: 10
  patience: 4
  seed: 5
evaluate:
  data: [python, mixed]
  metric: accuracy
  dtype: float32
"""
