# syntax=docker/dockerfile:1
# t5_trt with TensorRT on an NVIDIA GPU. Build: docker build -t t5-trt .   Run: see compose.yaml.
# Stage "test" adds the suite: docker build --target test -t t5-trt-test . && docker run --rm t5-trt-test
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS runtime

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --create-home --uid 10001 t5 \
    && install --directory --owner t5 --mode 700 /cache /home/t5/.cache /home/t5/.cache/huggingface
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    T5_TRT_CACHE=/cache

# TensorRT first: it is the largest layer and changes least
RUN pip install --extra-index-url https://pypi.nvidia.com "tensorrt-cu13>=10.13.2"
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY t5_trt ./t5_trt
RUN pip install --extra-index-url https://pypi.nvidia.com --constraint constraints.txt ".[cu13,serve]"

USER 10001
VOLUME /cache
ENTRYPOINT ["t5-trt"]
CMD ["info"]

FROM runtime AS test

USER 0
COPY . .
RUN pip install --constraint constraints.txt --editable ".[dev]" && chown -R t5 /app
USER 10001
ENTRYPOINT ["python", "-m", "pytest"]
CMD ["-q", "-n", "auto"]

# the default target
FROM runtime
