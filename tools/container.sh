#!/bin/sh
# Install what megamoe needs on Debian with NVIDIA GPUs, into /opt/venv and /opt/cuda: `tools/container.sh constraints.txt`
# in the Dockerfile and in apptainer.def, as root.
#
# CUDA's libraries come with torch; cuda-toolkit adds the nvcc and the headers of the same version, with which DeepSpeed
# compiles an operator at the first start that needs one.
set -eu
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
  ca-certificates g++ openssh-client pdsh procps python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/venv
pip="/opt/venv/bin/pip install --no-cache-dir --constraint $1"
$pip torch
cuda=$(/opt/venv/bin/python -c 'from importlib.metadata import version; print(version("cuda-toolkit"))')
$pip deepspeed "cuda-toolkit[nvcc,cccl]==$cuda"

# As CUDA_HOME is laid out where it is installed by itself.
ln -s /opt/venv/lib/python3*/site-packages/nvidia/cu13 /opt/cuda
ln -sfn lib /opt/cuda/lib64
for name in cudart cublas curand; do
  ln -sf "$(basename /opt/cuda/lib/lib$name.so.*)" "/opt/cuda/lib/lib$name.so"
done
