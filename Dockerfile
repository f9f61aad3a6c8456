# Three images from one file: `api` (no torch), `worker` (CPU), `worker-gpu`.
#   docker build --target api -t modelpress-api .
# What is built stays behind in the build stages: the images hold an interpreter, a virtual environment and nothing else.
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE NOTICE ./
# Without pip of its own: nothing can be installed into a running container.
RUN pip install -c requirements.lock pip setuptools \
    && python -m venv --without-pip /opt/venv

FROM build AS build-api
COPY app app
COPY workers workers
COPY migrations migrations
RUN pip --python /opt/venv/bin/python install -c requirements.lock '.[s3,traces]'

FROM build AS build-worker
# Which build of torch this brings is up to where pip looks, e.g. --build-arg TORCH_PIP_ARGS="--index-url …" for CPU alone.
ARG TORCH_PIP_ARGS=""
# A layer of its own, since it is by far the largest and changes least.
# hadolint ignore=SC2086,SC2046
RUN pip --python /opt/venv/bin/python install -c requirements.lock $TORCH_PIP_ARGS $(grep '^torch==' requirements.lock)
COPY app app
COPY workers workers
COPY migrations migrations
RUN pip --python /opt/venv/bin/python install -c requirements.lock '.[s3,traces,worker]'

FROM python:3.11-slim-bookworm AS base
# A fixed id, so that the API and the workers may write to one volume, and a host can be told who owns it.
RUN groupadd --gid 10001 modelpress \
    && useradd --uid 10001 --gid modelpress --no-create-home --home-dir /var/lib/modelpress modelpress \
    && install -d -o modelpress -g modelpress /var/lib/modelpress
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    MODELPRESS_DATA_DIR=/var/lib/modelpress MODELPRESS_HOST=0.0.0.0 MODELPRESS_ANONYMOUS=false
WORKDIR /var/lib/modelpress
VOLUME /var/lib/modelpress
USER 10001:10001
ENTRYPOINT ["modelpress"]

FROM base AS api
COPY --from=build-api /opt/venv /opt/venv
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["modelpress", "healthy", "api"]
CMD ["serve", "--api-only"]

FROM base AS worker
COPY --from=build-worker /opt/venv /opt/venv
HEALTHCHECK --interval=30s --timeout=15s --start-period=30s \
    CMD ["modelpress", "healthy", "worker"]
CMD ["worker"]

# torch's CUDA builds bring the CUDA libraries; the driver comes from the host through the NVIDIA container toolkit.
FROM worker AS worker-gpu
ENV MODELPRESS_WORKER_QUEUES=gpu,cpu \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
