# syntax=docker/dockerfile:1
# docker build --target train -t darkroom-train .    runs flows, a worker, the servers of compose.yaml
# docker build --target serve -t darkroom-serve .    serves $MODEL_URI from $MLFLOW_TRACKING_URI
# For a machine with GPUs pass --build-arg BASE=… with an image that has the CUDA libraries and Python 3.11 or 3.12.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Torch comes with CUDA; for the small CPU build pass PyTorch's CPU index: --build-arg TORCH_INDEX=…
ARG TORCH_INDEX=
WORKDIR /app
RUN python -m venv /opt/venv
COPY requirements.lock ./
RUN /opt/venv/bin/pip install "$(grep '^uv==' requirements.lock)" \
    && /opt/venv/bin/uv pip install --no-cache --python /opt/venv/bin/python \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match} -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN /opt/venv/bin/uv pip install --no-cache --python /opt/venv/bin/python --no-deps -e .

FROM ${BASE} AS base
# tini is process 1: it passes signals on and reaps what is left. git is what DVC and the run's commit need.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git tini \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu 24.04 has a user of this number, from which nothing is needed.
RUN if getent passwd 1000 >/dev/null; then userdel "$(getent passwd 1000 | cut -d: -f1)"; fi \
    && useradd --create-home --uid 1000 --user-group darkroom \
    && install --directory --owner darkroom --group darkroom /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DVC_NO_ANALYTICS=1 \
    DO_NOT_TRACK=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    OMP_WAIT_POLICY=PASSIVE
WORKDIR /app

# Variables from a file that is mounted, a KEY=VALUE on each line: unlike a container's own they are not there to be listed.
COPY --chmod=755 <<"EOF" /usr/local/bin/with-secrets
#!/bin/sh
if [ -e /run/secrets/darkroom.env ]; then
    # Docker makes a directory where a file that is to be mounted does not exist.
    if ! [ -f /run/secrets/darkroom.env ] || ! [ -r /run/secrets/darkroom.env ]; then
        echo "/run/secrets/darkroom.env: expected a file of lines KEY=VALUE that user $(id -u) can read" >&2
        exit 1
    fi
    while IFS= read -r line || [ -n "$line" ]; do
        case "$line" in \#*) ;; *=*) export "$line" ;; esac
    done < /run/secrets/darkroom.env
fi
exec "$@"
EOF
ENTRYPOINT ["tini", "-g", "--", "with-secrets"]

# The checkout's history comes with it, so that runs carry their commit and `dvc exp` works.
FROM base AS train
COPY --from=builder /opt/venv /opt/venv
COPY --chown=darkroom:darkroom . .
RUN install --directory --owner darkroom /opt/venv/share/darkroom
USER darkroom
ENV DARKROOM_PROJECT=/app
# The volumes' directories have to exist as the user's, or they would be root's.
RUN mkdir -p .darkroom .dvc/cache reports && python -m flows.offline_plots
# Outputs, DVC's cache and the local registry; mount a volume over each that has to outlive the container.
VOLUME ["/app/.darkroom", "/app/.dvc/cache", "/app/data", "/app/models", "/app/reports"]
STOPSIGNAL SIGTERM
CMD ["python", "-m", "flows.retrain"]

# The model brings its own code: nothing of the project is needed here but the installed versions.
FROM base AS serve
COPY --from=builder /opt/venv /opt/venv
USER darkroom
ENV MODEL_URI=models:/digits@champion PORT=5001
EXPOSE 5001
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/ping\", timeout=5)"]
CMD ["sh", "-c", "exec mlflow models serve --model-uri \"$MODEL_URI\" --env-manager local --host 0.0.0.0 --port \"$PORT\" --timeout 600"]
