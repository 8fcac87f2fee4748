# Halftone in a container. Every step is one of the Makefile's, so what CI runs is what the image does.
#
#   CPU:   docker build -t halftone .
#   CUDA:  docker build -t halftone:cuda --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg PYTHON=python3.12 .
#
# pip's own settings choose where wheels come from: to keep the CPU image small, give PIP_EXTRA_INDEX_URL the address
# of PyTorch's CPU wheels as a build argument; without it pip takes the default torch wheel, which also runs on a CPU.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG PYTHON=python3.11
ARG PIP_EXTRA_INDEX_URL=
# wget is for KubeRay, which probes its pods with it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make wget \
    && (command -v ${PYTHON} || apt-get install --yes --no-install-recommends ${PYTHON} ${PYTHON}-venv) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 halftone

WORKDIR /halftone
COPY --chown=halftone:halftone . .
RUN chown halftone:halftone .
USER halftone
# The folder of artifacts is made here, so that a volume mounted on it belongs to this user.
RUN make install PYTHON=${PYTHON} && rm -rf ~/.cache/pip && mkdir -p ~/.cache/halftone/artifacts

# Inside a container the port must leave loopback to be published; outside, `halftone serve` stays on 127.0.0.1.
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=90s --retries=3 \
    CMD [".venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
STOPSIGNAL SIGINT
ENTRYPOINT [".venv/bin/halftone"]
CMD ["serve", "--host", "0.0.0.0"]
