# GPU image: NVIDIA's PyTorch container with this package. Not built by the tests, whose machines reach no image
# registry.
#
#   docker build -t share4v .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --network host -v /shared:/shared share4v \
#       bash examples/launch/single_node.sh tools/doctor.py env
#
# The container's torch, CUDA, NCCL, cuDNN, Transformer Engine and DALI were built for each other and stay: no extra
# that pins torch is installed, and PIP_CONSTRAINT, which the base image sets, keeps dependencies from replacing them.
# 25.11 is the release that megatron-core 0.16.1 was tested with.
ARG BASE=nvcr.io/nvidia/pytorch:25.11-py3
FROM ${BASE}

ENV OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

WORKDIR /opt/megatron_share4v
COPY . .

# Fail the build, rather than a run, if pip replaced torch or megatron-core does not recognise the container's
# libraries.
RUN python -c "import torch; print(torch.__version__)" >/tmp/torch_before \
    && python -m pip install --no-cache-dir -e ".[serve,evaluate]" \
    && python -c "import torch; print(torch.__version__)" | diff /tmp/torch_before - \
    && python -c "import megatron.core, transformer_engine_torch; import megatron_share4v" \
    && python tools/build_ops.py --output megatron_share4v/ops/prebuilt
