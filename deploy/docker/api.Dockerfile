# An API pod: docker build -f deploy/docker/api.Dockerfile -t baton-api .
# Neither torch nor transformers, and no room that needs them: tokens are made with `tokenizers` alone.

FROM python:3.11.14-slim-bookworm AS packages
WORKDIR /app
RUN python -m venv /opt/baton
ENV PATH=/opt/baton/bin:$PATH
# Before the rooms are copied: a change of ours does not install the packages again.
COPY pyproject.toml requirements.lock ./
RUN pip install --no-cache-dir --constraint requirements.lock '.[api]'

FROM python:3.11.14-slim-bookworm
COPY --from=packages /opt/baton /opt/baton
WORKDIR /app
COPY shared/ shared/
COPY api/ api/
COPY deploy/ deploy/
ENV PATH=/opt/baton/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 30000
# Alive; whether it is ready to take requests is what /ready says.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:30000/health', timeout=2)"]
CMD ["baton", "api", "--host", "0.0.0.0", "--port", "30000"]
