"""RegMean: the matrix that gives on all sources' inputs what each source gives on its own, by least squares."""

from __future__ import annotations

from typing import Annotated, Any

from mergetool.methods.declare import Bounds, Doc, Fraction, method
from mergetool.methods.shared import Weight, weights_sum


def _checks(weight: tuple[float, ...], **rest: Any) -> list[tuple[str, str]]:
    negative = [("weight", "a negative weight has no least squares")] if min(weight) < 0 else []
    return negative or weights_sum(weight, True)


@method(
    title="RegMean",
    paper="arXiv:2212.09849",
    citation="Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023",
    base="ignored",
    reach="matrix",
    facts={"gram": "gram"},
    checks=_checks,
    differs="A ridge towards the mean of the sources keeps the solution defined where no data were seen; at the "
    "default it changes nothing that was. Grams are means over tokens, so that a source counts by its weight and not "
    "by how much text it was given. RegMean++ (arXiv:2508.03121) is `sequential`: inside a layer, and outside all "
    "layers, a source's own weights make the inputs, as in the released code; heads are solved too.",
)
def regmean(
    value: Any,
    gram: Any,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    off_diagonal: Annotated[
        Fraction, Doc("What the Gram matrices' other entries than the diagonal are scaled by.")
    ] = 0.9,
    ridge: Annotated[
        float, Doc("Pull towards the mean of the sources, relative to the diagonal."), Bounds(1e-12)
    ] = 1e-6,
    sequential: Annotated[
        bool, Doc("Measure a layer's inputs as the merged layers before it make them, as RegMean++ does.")
    ] = False,
) -> Any:
    """Solve every linear layer so that it does on each source's inputs what that source does.

    For sources of one base, with a little text of each; strong where the sources' inputs differ. Needs `calibration`
    data, one forward pass, and the inputs' Gram matrices on disk. What multiplies no inputs (embeddings, norms,
    biases) becomes the weighted mean.

    With ``sequential`` layers are solved in order, and each source's layer is measured on what the merged layers before
    it make of that source's data: the merged model's errors are seen by the layers behind them. Twice the reading; only
    for networks whose layers run one after the other, each once.

        G'[i] = off_diagonal · G[i], its diagonal left as it is
        merged = (Σ weight[i] · value[i] · G'[i] + r · mean) (Σ weight[i] · G'[i] + r · I)⁻¹
        r = ridge · mean diagonal of Σ weight[i] · G[i]

    ``value[i]`` is a float64 tensor of torch's [..., out, in], and ``gram[i]`` [..., in, in].
    """
    import torch

    inner: Any = 0.0
    target: Any = 0.0
    mean: Any = 0.0
    shares = 0.0
    for i in range(len(value)):
        each, seen = value[i], gram[i]
        scaled = seen * off_diagonal
        scaled.diagonal(dim1=-2, dim2=-1).copy_(seen.diagonal(dim1=-2, dim2=-1))
        inner = inner + weight[i] * scaled
        target = target + weight[i] * (each @ scaled)
        mean = mean + weight[i] * each
        shares += weight[i]
    mean = mean / shares
    least = ridge * inner.diagonal(dim1=-2, dim2=-1).mean(-1)
    least = torch.where(least > 0.0, least, 1.0)[..., None, None]  # inputs that were zero everywhere: the mean
    inner.diagonal(dim1=-2, dim2=-1).add_(least[..., 0])
    target = target + least * mean
    return torch.linalg.solve(inner, target, left=False)
