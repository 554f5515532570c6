# jaxalign on Cloud TPUs. From the root of the checkout:
#
#   docker build -f docker/tpu.Dockerfile -t jaxalign:tpu .
#   docker run --privileged --net host -v jaxalign-cache:/cache -v "$PWD/runs:/jaxalign/runs" \
#     jaxalign:tpu sft configs/sft.yaml run.folder=runs/mine
#
# libtpu comes with JAX's wheels. The hosts of a slice find each other by the host's network.
FROM python:3.12-slim

WORKDIR /jaxalign
COPY pyproject.toml README.md LICENSE ./
COPY constraints/py312.txt constraints/
COPY jaxalign jaxalign
RUN pip install --no-cache-dir -c constraints/py312.txt ".[tpu]"
COPY configs configs

# Models and data of the hub, and compiled programs: a volume that outlives the container.
RUN useradd --create-home --uid 1000 jaxalign \
    && mkdir -p /cache/hf /cache/programs runs \
    && chown -R jaxalign /cache runs
USER jaxalign
ENV HF_HOME=/cache/hf JAXALIGN_CACHE=/cache/programs
VOLUME /cache
ENTRYPOINT ["jaxalign"]
