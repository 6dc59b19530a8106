#!/usr/bin/env bash
# Run all checks and measurements that need an NVIDIA GPU. Without a GPU, prints that nothing was measured.
#   - build the ops and compare each with its reference on the GPU (fp32 and bf16, poisoned outputs)
#   - compute-sanitizer memcheck and racecheck, where it runs
#   - layers (attention kernels on packs, FP8, Transformer Engine if installed, recomputation, optimizer) against their
#     plain forms, and host syncs of a training step
#   - benchmarks of all ops and of training steps
#
#   bash tests/gpu/run.sh [DIR]      default DIR: runs/gpu
#
# Results: DIR/ops_gpu.txt (for tools/report_ops.py --gpu), DIR/layers.txt, DIR/training/, DIR/fp8/.
# Uses python3, or $PYTHON, if its torch sees the GPU; else the environment of tools/environment.sh with CUDA's torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:-runs/gpu}"

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "tests/gpu: no NVIDIA GPU here (nvidia-smi lists none): nothing was compared and nothing was measured"
    exit 0
fi
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    source tools/environment.sh
    prepare_environment gpu,dev
    python=python
fi
# cuBLAS is deterministic only with this workspace setting; poisoned outputs need torch's deterministic mode.
export PYTHONPATH="$PWD" CUBLAS_WORKSPACE_CONFIG=:4096:8
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1

echo "== build"
"$python" tools/build_ops.py
echo "== every op against its reference"
"$python" tests/ops_walk.py --cuda
for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed: nothing was checked"
        continue
    fi
    log="$out/$tool.txt" code=0
    # Caching would hide accesses between tensors of one block of memory.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" tests/ops_walk.py --cuda >"$log" 2>&1 || code=$?
    if grep -q "Device not supported" "$log"; then
        echo "compute-sanitizer cannot use this device: nothing was checked"
    elif [ "$code" -ne 0 ]; then
        tail -n 40 "$log" >&2
        echo "error: $tool found faults, or ops_walk.py failed under it (exit code $code); full output: $log" >&2
        exit 1
    else
        tail -n 2 "$log"
    fi
done
echo "== layers"
"$python" tests/gpu/layers.py | tee "$out/layers.txt"
echo "== speed of the ops"
"$python" tools/bench_ops.py --device cuda | tee "$out/ops_gpu.txt"
echo "== speed of training"
"$python" tools/bench_gpu.py --out "$out/training"
echo "== FP8 against BF16 over 200 steps"
"$python" tools/bench_fp8.py --out "$out/fp8"
