"""Every place that kernels run in, by name; all give the same bytes. A GPU is among them where there is one."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from mergetool.kernels import compile
from mergetool.kernels.arrays import NumpyArrays
from mergetool.kernels.backend import with_torch
from mergetool.kernels.torch_arrays import TorchArrays

BACKENDS = {"compiled": compile, "numpy": NumpyArrays(), "torch": TorchArrays("cpu")}
DEVICES = ["torch:cpu", "torch:cpu,torch:cpu", "cpu,torch:cpu"]
"""What runs may be told to use, besides the CPU's own kernels."""
if torch.cuda.is_available():
    BACKENDS["torch on cuda"] = TorchArrays("cuda")
    if find_spec("cuda") and find_spec("cuda.core"):  # else these are torch's own operations too, and warn of it
        BACKENDS["cuda"] = with_torch("cuda")
        DEVICES += ["cuda", "cuda:0,cuda:0", "cpu,cuda"]
