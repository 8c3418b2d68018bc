# megamoe on NVIDIA GPUs: docs/reference/launch.md#containers says how to build and run it. /megamoe is the clone that
# launch_scripts/ expect on each host.
FROM debian:trixie-slim

ENV VIRTUAL_ENV=/opt/venv CUDA_HOME=/opt/cuda PATH=/opt/venv/bin:/opt/cuda/bin:$PATH
WORKDIR /megamoe
# Before the rest, so that a change of megamoe downloads nothing again.
COPY constraints.txt tools/container.sh ./
RUN ./container.sh constraints.txt && rm container.sh
COPY . .
ARG EXTRAS=wandb,s3,gguf,fast
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[$EXTRAS]"

# What DeepSpeed, Triton and Inductor compile goes there, whatever user a cluster starts it as.
RUN useradd --uid 1000 --create-home megamoe && chmod 1777 /home/megamoe
ENV HOME=/home/megamoe
USER 1000
