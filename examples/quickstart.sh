#!/bin/sh
# Install mergetool into .venv, merge the bundled models in several ways, and see what each merge is worth.
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh
set_up ""

bin=.venv/bin
echo
echo "A base model and three specialists fine-tuned from it: Python, speeches, Spanish (examples/models)."
echo "What task arithmetic will do with them, from their headers alone:"
echo
$bin/mergetool plan examples/task-arithmetic.yaml
for method in linear task-arithmetic ties dare-linear; do
    echo
    echo "== mergetool run examples/$method.yaml"
    $bin/mergetool run examples/$method.yaml
done
echo
echo "== mergetool verify examples/output/task-arithmetic"
$bin/mergetool verify examples/output/task-arithmetic
echo
echo "Perplexity on held-out texts (lower is better). Each specialist wins at home and loses abroad;"
echo "a merge keeps a part of every skill:"
echo
cd examples
../$bin/mergetool evaluate models/base models/python models/speeches models/spanish \
    output/linear output/task-arithmetic output/ties output/dare-linear \
    --data python=data/python.txt --data speeches=data/speeches.txt --data spanish=data/spanish.txt
echo
echo "The merged models are in examples/output; examples/output/task-arithmetic loads with transformers:"
echo "    AutoModelForCausalLM.from_pretrained(\"examples/output/task-arithmetic\")"
