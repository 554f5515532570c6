# jaxalign on NVIDIA GPUs. From the root of the checkout:
#
#   docker build -f docker/gpu.Dockerfile -t jaxalign:cuda12 .
#   docker build -f docker/gpu.Dockerfile --build-arg CUDA=13 -t jaxalign:cuda13 .
#   docker run --gpus all --shm-size 16g -v jaxalign-cache:/cache -v "$PWD/runs:/jaxalign/runs" \
#     jaxalign:cuda12 sft configs/sft.yaml run.folder=runs/mine
#
# CUDA's libraries come with JAX's wheels: the host needs a driver and NVIDIA's container toolkit.
FROM python:3.12-slim

# 12 or 13, as the host's driver has it.
ARG CUDA=12

WORKDIR /jaxalign
COPY pyproject.toml README.md LICENSE ./
COPY constraints/py312.txt constraints/
COPY jaxalign jaxalign
RUN pip install --no-cache-dir -c constraints/py312.txt ".[cuda${CUDA}]"
COPY configs configs

# Models and data of the hub, and compiled programs: a volume that outlives the container.
RUN useradd --create-home --uid 1000 jaxalign \
    && mkdir -p /cache/hf /cache/programs runs \
    && chown -R jaxalign /cache runs
USER jaxalign
ENV HF_HOME=/cache/hf JAXALIGN_CACHE=/cache/programs
# All but a little of the memory is JAX's: nothing else runs on these GPUs.
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
VOLUME /cache
ENTRYPOINT ["jaxalign"]
