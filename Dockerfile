# Targets: service and playground (no torch in them), worker (for a GPU), worker-cpu.
#   docker build --target service -t safelatent-service .
#
# Dependencies go into a virtual environment in a stage of their own, so that the images hold no
# build tools and a change of our code rebuilds nothing else. The applications run from the tree, which
# is given to the user that runs them: in your checkout, files may be readable by their owner only.

# Any image with Python 3.11 or newer and its venv module.
ARG BASE=python:3.11-slim-bookworm
# torch's wheels bring CUDA's libraries and the host brings the driver, so the same base serves a
# GPU; name a CUDA base (with Python) where your platform wants one.
ARG CUDA_BASE=${BASE}

# hadolint global ignore=DL3006

FROM ${BASE} AS service-venv
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python3 -m venv /opt/venv \
 && python3 requirements.py service otel > requirements.txt \
 && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -c constraints.txt

FROM ${CUDA_BASE} AS worker-venv
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python3 -m venv /opt/venv \
 && python3 requirements.py worker otel > requirements.txt \
 && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -c constraints.txt

FROM ${BASE} AS worker-cpu-venv
# PyTorch's index of CPU builds; without it the image works too, and is some GB larger.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python3 -m venv /opt/venv \
 && python3 requirements.py worker otel > requirements.txt \
 && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -c constraints.txt

FROM ${BASE} AS playground-venv
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python3 -m venv /opt/venv \
 && python3 requirements.py playground > requirements.txt \
 && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -c constraints.txt


FROM ${BASE} AS service
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SAFELATENT_HOST=0.0.0.0 \
    SAFELATENT_PORT=8000 \
    SAFELATENT_STORE_URL=file:///var/lib/safelatent/store
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin safelatent \
 && install -d -o safelatent -g safelatent /var/lib/safelatent/store
WORKDIR /app
COPY --from=service-venv /opt/venv /opt/venv
COPY --chown=10001:10001 safelatent safelatent
COPY --chown=10001:10001 service service
COPY --chown=10001:10001 deploy/healthy.py ./
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["python", "healthy.py", "service"]
CMD ["python", "-m", "service"]


FROM ${CUDA_BASE} AS worker
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/var/lib/safelatent/hub \
    SAFELATENT_STORE_URL=file:///var/lib/safelatent/store
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin safelatent \
 && install -d -o safelatent -g safelatent /var/lib/safelatent/store /var/lib/safelatent/hub
WORKDIR /app
COPY --from=worker-venv /opt/venv /opt/venv
COPY --chown=10001:10001 safelatent safelatent
COPY --chown=10001:10001 worker worker
COPY --chown=10001:10001 models models
COPY --chown=10001:10001 deploy/healthy.py ./
USER 10001:10001
# Loading a large checkpoint takes minutes; after that the worker says every 2 s that it is there.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s CMD ["python", "healthy.py", "worker"]
CMD ["python", "-m", "worker"]


FROM ${BASE} AS worker-cpu
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/var/lib/safelatent/hub \
    SAFELATENT_STORE_URL=file:///var/lib/safelatent/store
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin safelatent \
 && install -d -o safelatent -g safelatent /var/lib/safelatent/store /var/lib/safelatent/hub
WORKDIR /app
COPY --from=worker-cpu-venv /opt/venv /opt/venv
COPY --chown=10001:10001 safelatent safelatent
COPY --chown=10001:10001 worker worker
COPY --chown=10001:10001 models models
COPY --chown=10001:10001 deploy/healthy.py ./
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "healthy.py", "worker"]
CMD ["python", "-m", "worker"]


FROM ${BASE} AS playground
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SAFELATENT_PLAYGROUND_HOST=0.0.0.0 \
    GRADIO_TEMP_DIR=/tmp/gradio
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin safelatent
WORKDIR /app
COPY --from=playground-venv /opt/venv /opt/venv
COPY --chown=10001:10001 safelatent safelatent
COPY --chown=10001:10001 playground playground
COPY --chown=10001:10001 deploy/healthy.py ./
USER 10001:10001
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "healthy.py", "playground"]
CMD ["python", "-m", "playground"]
