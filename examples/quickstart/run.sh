#!/usr/bin/env bash
# The quickstart, on a plain CPU: draw scenes, prepare shards, train both stages at pipeline 2 x data 2 and the last
# steps at tensor 2 x pipeline 2, export to Hugging Face's layout and compare with transformers, serve the model and
# query it over HTTP, score held-out questions.
#   bash examples/quickstart/run.sh [--pair NAME] [--out DIR] [--seed N] [--brief]
#     --pair NAME tower and language model, in small: clip_llama_2 (default), clip_llama_3 or siglip_qwen2.5
#     --out DIR   default: runs/quickstart, or runs/quickstart_NAME of a pair; a second call continues where the first
#                 one stopped
#     --seed N    seed of the scenes, the first weights and the order of the data; default: 1
#     --brief     a smoke test with few scenes and four steps, which learns nothing
set -euo pipefail
started=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
pair=clip_llama_2 out="" seed=1 exit_at_step=1400 make_data=() train=() score=()
usage="usage: bash examples/quickstart/run.sh [--pair NAME] [--out DIR] [--seed N] [--brief]"
while [ $# -gt 0 ]; do
    case "$1" in
    --pair | --out | --seed)
        [ $# -ge 2 ] || { echo "error: $1 needs a value; $usage" >&2; exit 2; }
        case "$1" in --pair) pair="$2" ;; --out) out="$2" ;; --seed) seed="$2" ;; esac
        shift 2
        ;;
    --brief)
        make_data=(--train-scenes 256 --held-out-scenes 128) train=(train.steps=4) exit_at_step=2
        score=(--captions 4 --no-floors)
        shift
        ;;
    *) echo "error: unknown argument $1; $usage" >&2; exit 2 ;;
    esac
done
[[ "$seed" =~ ^[0-9]+$ ]] || { echo "error: --seed must be a whole number of 0 or more, not $seed" >&2; exit 2; }
case "$pair" in
clip_llama_2) configs=examples/quickstart tokenizer=tokenizer.model out="${out:-runs/quickstart}" ;;
clip_llama_3 | siglip_qwen2.5)
    configs="examples/quickstart/$pair" tokenizer=tokenizer.json out="${out:-runs/quickstart_$pair}"
    ;;
*) echo "error: there is no pair $pair; choose clip_llama_2, clip_llama_3 or siglip_qwen2.5" >&2; exit 2 ;;
esac
source tools/environment.sh
prepare_environment cpu,hf,serve
export OMP_NUM_THREADS=1  # several ranks share the cores of one machine

train_stage() {  # NAME SEED [dotted.key=value ...]
    torchrun --nproc-per-node 4 tools/train.py "$configs/$1.yaml" run.directory="$out/$1" run.seed="$2" \
        data.train="$out/data/$1" data.validation="$out/data/$1_validation" data.tokenizer="$out/$tokenizer" \
        "${train[@]}" "${@:3}"
}
python examples/quickstart/make_data.py --configs "$configs" --out "$out" --seed "$seed" "${make_data[@]}"
train_stage pretrain "$seed"
# Stage 2 ends early and goes on at another layout: a checkpoint fits all of them.
train_stage finetune $((seed + 1)) checkpoint.initialize_from="$out/pretrain/checkpoints/latest" \
    run.exit_at_step="$exit_at_step"
train_stage finetune $((seed + 1)) checkpoint.initialize_from="$out/pretrain/checkpoints/latest" \
    parallel.tensor=2
rm -rf "$out/hf"  # an export belongs to one checkpoint, and a second call may have trained further
python tools/convert.py export --from "$out/finetune" --to "$out/hf" --layout llava-hf
python examples/quickstart/compare_export.py --out "$out"
python examples/quickstart/ask_server.py --out "$out"
rm -rf "$out/evaluation"
torchrun --nproc-per-node 2 tools/evaluate.py "$out/finetune" --benchmark custom --data "$out/scenes" \
    --out "$out/evaluation" --name quickstart
torchrun --nproc-per-node 2 examples/quickstart/score.py --out "$out" --started "$started" "${score[@]}"
