# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# An image with one exported bundle, for GPUs; how to build and run it: docs/container.md
#   python tools/export_bundle.py mae_resenc_l --output dist
#   docker build --build-arg BUNDLE=mae_resenc_l -t mae_resenc_l .

# sha256:... of the base, so that it is that image and no later one; docs/container.md says how to look it up
ARG BASE_DIGEST=""
FROM python:3.11.14-slim-bookworm${BASE_DIGEST:+@}${BASE_DIGEST}

# the wheels of torch on PyPI bring CUDA; https://download.pytorch.org/whl/cpu as an extra index keeps it out
ARG EXTRA_INDEX=""
COPY locks/requirements.txt locks/cuda.txt /tmp/build/locks/
COPY tools/commanding/environment.py /tmp/build/tools/commanding/
RUN PIP_EXTRA_INDEX_URL="${EXTRA_INDEX}" PIP_NO_CACHE_DIR=1 \
    python /tmp/build/tools/commanding/environment.py install requirements.txt \
    && pip check \
    && rm -r /tmp/build

# folder below dist/, with configs, scripts and, if it was exported so, weights
ARG BUNDLE
COPY dist/${BUNDLE}/ /opt/bundle/
RUN test -f /opt/bundle/configs/inference.json \
    || { echo "no bundle in dist/${BUNDLE}: export it, and name it with --build-arg BUNDLE=..." >&2; exit 1; }

# scans are read from /data, everything is written to /output; the bundle itself is not to be written to
RUN useradd --uid 1000 --no-create-home bundle \
    && mkdir /data /output \
    && chown 1000:1000 /output
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib
USER 1000:1000
WORKDIR /opt/bundle
VOLUME ["/data", "/output"]
ENTRYPOINT ["python", "-m", "monai.bundle", "run"]
CMD ["--config_file", "configs/inference.json", "--dataset_dir", "/data", "--output_dir", "/output"]
