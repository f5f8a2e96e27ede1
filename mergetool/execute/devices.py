"""Where kernels run: the CPU, or a GPU through torch."""

from __future__ import annotations

from mergetool.errors import PlanError
from mergetool.kernels.backend import Backend, compiled


def backend_for(device: str) -> Backend:
    """Where a device's kernels run: ``cpu`` is compiled, ``torch:cpu`` the GPU's code on the CPU.

    Raises:
        PlanError: there is no such device.
    """
    if device == "cpu":
        return compiled()
    name = device.removeprefix("torch:")
    if name.split(":")[0] not in ("cuda", "cpu"):
        raise PlanError(f"there is no device `{device}`", "--device", "use cpu, cuda or cuda:<number>")
    import torch

    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        number = name.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= count:
            have = f"there are {count} GPUs" if count else "torch finds no GPU here"
            raise PlanError(f"cannot use `{device}`: {have}", "--device", "use `--device cpu`")
    from mergetool.kernels.torch_arrays import TorchArrays

    return TorchArrays(name)
