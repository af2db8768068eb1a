# A worker: docker build -f deploy/docker/worker.Dockerfile -t baton-worker .
# For an NVIDIA GPU: add --build-arg TORCH_INDEX= (an empty one: the build of the package index, with CUDA).

FROM python:3.11.14-slim-bookworm AS packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
RUN python -m venv /opt/baton
ENV PATH=/opt/baton/bin:$PATH
# Before the rooms are copied: a change of ours does not download torch again.
COPY pyproject.toml requirements.lock ./
RUN grep '^torch==' requirements.lock >torch.lock \
    && pip install --no-cache-dir ${TORCH_INDEX:+--no-deps --index-url "$TORCH_INDEX"} --requirement torch.lock \
    && pip install --no-cache-dir --constraint requirements.lock '.[worker]'

FROM python:3.11.14-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Triton launches kernels for a GPU through a stub that it compiles.
# hadolint ignore=DL3008
RUN if [ -z "$TORCH_INDEX" ]; then apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
COPY --from=packages /opt/baton /opt/baton
WORKDIR /app
COPY shared/ shared/
COPY worker/ worker/
COPY deploy/ deploy/
# Models from the hub are kept in /models: a volume there spares the next worker the download.
RUN install -d -o 10001 -g 10001 /models
ENV PATH=/opt/baton/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A compiler's caches go where a read-only container may write.
ENV HF_HOME=/models HOME=/tmp
USER 10001:10001
VOLUME /models
# No HEALTHCHECK: a worker that makes no progress loses its lease and its jobs at once, and ends itself.
CMD ["baton", "worker"]
