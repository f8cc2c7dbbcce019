# syntax=docker/dockerfile:1
# GPU Service for NVIDIA GPUs (and for CPUs).
#
#   docker build -t gpu-service .
#   docker run --gpus all -p 8765:8765 -v gpu-service-models:/models gpu-service
#
# torch's own Linux wheel brings CUDA 13, which needs driver 580 or newer on the host; an nvidia/cuda base
# would carry CUDA twice. For an older driver:
#
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t gpu-service .

FROM python:3.12-slim

ARG TORCH_INDEX=https://pypi.org/simple

WORKDIR /app

# Dependencies before the code, so that a change of the code does not install them again; the pip cache is
# the builder's, not a part of the image.
COPY requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    grep '^torch[<>=]' requirements.txt > torch.txt \
    && pip install --index-url "$TORCH_INDEX" -r torch.txt \
    && pip install -r requirements.txt

# Numeric ids, for platforms that check that an image is not root's. A host directory mounted on /models
# has to belong to 10001.
RUN groupadd --gid 10001 service \
    && useradd --uid 10001 --gid 10001 --no-log-init --create-home service \
    && install -d -o 10001 -g 10001 /models

ENV HF_HOME=/models/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

COPY web/ web/
COPY gpu_engine/ gpu_engine/
COPY gpu_service.py .

USER 10001:10001
VOLUME /models
EXPOSE 8765

# Liveness only: /health answers before the models are loaded. No curl in slim, and no proxy on the way.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('PORT', '8765') + '/health', timeout=4)"]

CMD ["python", "gpu_service.py"]
