# dfrot in a container, for CPUs or for NVIDIA GPUs.
#
#   docker build -t dfrot .                              # CPU
#   docker build -t dfrot --build-arg TORCH=cu128 .      # GPU; run with --gpus all
#   docker run --rm -v "$PWD:/data" dfrot quantize MODEL -o ckpt
#
# The kernels are compiled in the first stage; the second has no compiler.
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md CHANGELOG.md LICENSE CITATION.cff ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim-bookworm
ARG TORCH=cpu
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/${TORCH}
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[gguf,eval,report]" && rm -r /wheels
ENV HF_HOME=/data/.cache/huggingface DFROT_CACHE=/data/.cache/dfrot
WORKDIR /data
ENTRYPOINT ["dfrot"]
CMD ["--help"]
