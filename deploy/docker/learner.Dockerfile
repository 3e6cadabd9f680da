# syntax=docker/dockerfile:1.7
# The learner; from the repository's root, VARIANT is cpu or cuda:
#     docker build -f deploy/docker/learner.Dockerfile --build-arg VARIANT=cpu -t aspo-learner:cpu .
# It runs as 10001:10001 on a read-only root file system and writes to
#     /runs   the runs: checkpoints, published weights, figures; a volume, to be kept
#     /cache  downloaded models and compiled kernels; a volume that allows exec, may be lost
#     /tmp    a tmpfs; a few MiB
# and reads /etc/aspo/aspo.toml; what that names by relative paths, and reward modules, lies in /project.
# `FROM ...-${VARIANT}` names a stage, not an image, so there is no tag to pin (DL3006).
ARG VARIANT=cpu
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS tools
ENV PATH=/opt/aspo/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/aspo
COPY constraints.txt ./

FROM tools AS torch-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'

FROM tools AS torch-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt 'torch==2.13.0'

# hadolint ignore=DL3006
FROM torch-${VARIANT} AS build
WORKDIR /src
COPY LICENSE README.md pyproject.toml ./
COPY shared shared
COPY services services
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt '.[learner]'

FROM python:${PYTHON}
ARG VARIANT
ARG REVISION=unknown
LABEL org.opencontainers.image.title="aspo-learner" \
      org.opencontainers.image.description="ASPO learner: trains on stale rollouts and serves the weights (${VARIANT})" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 aspo \
    && useradd --uid 10001 --gid aspo --no-create-home --home-dir /cache aspo \
    && install -d -o aspo -g aspo /runs /cache /models /project
COPY --from=build /opt/aspo /opt/aspo
# The API listens on all of the container's addresses; USER is for libraries that ask who they are.
ENV PATH=/opt/aspo/bin:$PATH \
    HOME=/cache \
    USER=aspo \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ASPO_RUN__DIR=/runs \
    ASPO_LEARNER__HOST=0.0.0.0
WORKDIR /project
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["aspo", "learner"]
CMD ["--config", "/etc/aspo/aspo.toml"]
