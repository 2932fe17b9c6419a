# clipmill as an image: every job, and a Ray head or worker of the same version.
#
#   docker build -t clipmill:0.1 .
#   docker build -t clipmill:0.1-gpu --build-arg LOCK=requirements-gpu.lock .
#   docker run --rm -v "$PWD/ws:/home/clipmill/ws" clipmill:0.1 status --workspace ws
#
# BuildKit is needed for the cache mount. Shared memory: Ray wants --shm-size of a gigabyte or more.
FROM python:3.11-slim

ARG LOCK=requirements.lock
ARG UV_VERSION=0.13.8

# Into the system's Python, not into a venv: whoever starts Ray by a login shell (KubeRay does) resets PATH.
ENV PYTHONUNBUFFERED=1 \
    UV_SYSTEM_PYTHON=1 \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    UV_PYTHON_DOWNLOADS=never \
    NO_ALBUMENTATIONS_UPDATE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    WANDB_MODE=disabled

RUN pip install --no-cache-dir "uv==${UV_VERSION}"

WORKDIR /opt/clipmill

# The dependencies first: this layer is built anew only when a lock changes.
COPY requirements.lock requirements-gpu.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --require-hashes -r "${LOCK}"

COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY pipeline pipeline
COPY jobs jobs
RUN uv pip install --no-cache --no-deps --no-build-isolation .

COPY conf conf

RUN useradd --create-home --uid 1000 clipmill
USER 1000
WORKDIR /home/clipmill

ENTRYPOINT ["clipmill"]
CMD ["--help"]
