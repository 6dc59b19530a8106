#!/usr/bin/env bash
# The whole main job on a plain CPU: draw scenes, prepare shards, train both stages at tensor 2 x pipeline 2, export to Hugging Face's layout and
# compare with transformers, serve the model and ask it over HTTP, evaluate it on held-out questions.
#   bash examples/quickstart/run.sh [--out DIR]     default: runs/quickstart; a second call goes on where the first one stopped
set -euo pipefail
started=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=runs/quickstart make_data=() train=() score=()
while [ $# -gt 0 ]; do
    case "$1" in
    --out) out="$2"; shift 2 ;;
    --brief) make_data=(--train-scenes 256 --held-out-scenes 128) train=(train.steps=4) score=(--captions 4 --no-floors); shift ;;  # a smoke test: learns nothing
    *) echo "error: unknown argument $1; usage: bash examples/quickstart/run.sh [--out DIR] [--brief]" >&2; exit 2 ;;
    esac
done
source tools/environment.sh
prepare_environment cpu,hf,serve
export OMP_NUM_THREADS=1  # several ranks share the cores of one machine

stage() {  # NAME [dotted.key=value ...]
    torchrun --nproc-per-node 4 tools/train.py "examples/quickstart/$1.yaml" run.directory="$out/$1" data.train="$out/data/$1" \
        data.validation="$out/data/$1_validation" data.tokenizer="$out/tokenizer.model" "${train[@]}" "${@:2}"
}
python examples/quickstart/make_data.py --out "$out" "${make_data[@]}"
stage pretrain
stage finetune checkpoint.initialize_from="$out/pretrain/checkpoints/latest"
rm -rf "$out/hf"  # an export is of one checkpoint, and a second call may have trained further
python tools/convert.py export --from "$out/finetune" --to "$out/hf" --layout llava-hf
python examples/quickstart/compare_export.py --out "$out"
python examples/quickstart/ask_server.py --out "$out"
rm -rf "$out/evaluation"
torchrun --nproc-per-node 2 tools/evaluate.py "$out/finetune" --benchmark custom --data "$out/scenes" --out "$out/evaluation" --name quickstart
torchrun --nproc-per-node 2 examples/quickstart/score.py --out "$out" --started "$started" "${score[@]}"
