# One image for a laptop, SageMaker, Argo and Kubeflow. Build it with containers/build; see docs/container.md.
# There is no `# syntax=` line: it would pull a frontend from Docker Hub, which a build behind a mirror cannot reach.

# The base image needs Python 3.11 or newer with venv, and setpriv. CUDA is in PyTorch's wheels, the driver on the host.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

# -- environment: the dependencies -----------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS environment

# cu126 has kernels for T4 (7.5), A100 (8.0) and A10G (8.6); L4 (8.9) runs those of 8.6. The host needs driver 525 or
# newer. The xformers wheel is built for CUDA 12 as well, and does not load under cu130. cpu: build without CUDA.
ARG CUDA=cu126
ARG TORCH_VERSION=2.13.0
# Index of PyTorch's builds, with one folder per CUDA version. Empty: the build in pip's own index.
ARG TORCH_INDEX=https://download.pytorch.org/whl

# pip's own settings, for mirrors: build arguments, or a pip.conf in the build secret `pip_conf`, which is in no layer.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_NO_INDEX
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /build
# Resolve links: if python3 in PATH later becomes a link into the environment, a venv created with it would be circular.
RUN "$(readlink -f "$(command -v python3)")" -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

COPY constraints.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    sed -i "s/^torch==.*/torch==${TORCH_VERSION}/" constraints.txt \
    && if [ -n "${TORCH_INDEX}" ]; then \
        pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}/${CUDA}" "torch==${TORCH_VERSION}+${CUDA}"; \
    else \
        pip install -c constraints.txt "torch==${TORCH_VERSION}"; \
    fi

COPY pyproject.toml ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python -c "import os, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = ['s3', 'managed-mlflow', 'tensorboard', 'wandb'] + ([] if os.environ['CUDA'] == 'cpu' else ['cuda']); \
more = [need for extra in extras for need in project['optional-dependencies'].get(extra, [])]; \
print(*project['dependencies'], *more, sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

# -- wheel: the project itself ---------------------------------------------------------------------------------------
FROM environment AS wheel

COPY README.md LICENSE NOTICE ./
COPY conf conf
COPY hydra_plugins hydra_plugins
COPY dreambooth dreambooth
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip wheel --no-deps --wheel-dir /wheels .

# -- final image: environment, wheel and entrypoint; no source, no pip settings --------------------------------------
FROM ${BASE_IMAGE}

# This layer has nearly the whole size of the image, and does not change with the code.
COPY --from=environment /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/venv/bin/pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && /opt/venv/bin/pip check
COPY containers/entrypoint /usr/local/bin/dreambooth-entrypoint
# A login shell (`bash -lc`, which some drivers use) resets PATH: the profile adds the environment again.
# hadolint ignore=SC2016
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin dreambooth \
    && mkdir -p /opt/ml \
    && chown dreambooth: /opt/ml \
    && echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/dreambooth.sh

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface \
    MLFLOW_DISABLE_TELEMETRY=true

ARG VERSION=unknown
ARG REVISION=unknown
ENV DREAMBOOTH_GIT_REVISION=${REVISION}
LABEL org.opencontainers.image.title="dreambooth" \
      org.opencontainers.image.description="DreamBooth fine-tuning of Stable Diffusion" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

WORKDIR /opt/ml
ENTRYPOINT ["/usr/local/bin/dreambooth-entrypoint"]
