# Halftone in a container. Every step is one of the Makefile's, so what CI runs is what the image does.
#
#   CPU:   docker build -t halftone .
#   CUDA:  docker build -t halftone:cuda --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg PYTHON=python3.12 .
#
# pip's own settings choose where wheels come from: to keep the CPU image small, give PIP_EXTRA_INDEX_URL the address
# of PyTorch's CPU wheels as a build argument; without it pip takes the default torch wheel, which also runs on a CPU.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS base
ARG PYTHON=python3.11
# wget is for KubeRay, which probes its pods with it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make wget \
    && (command -v ${PYTHON} || apt-get install --yes --no-install-recommends ${PYTHON} ${PYTHON}-venv) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 halftone
WORKDIR /halftone
RUN chown halftone:halftone .

# The compiler stays in this stage; what it makes, for every CPU that the kernels know, is copied.
FROM base AS build
ARG PYTHON=python3.11
ARG PIP_EXTRA_INDEX_URL=
RUN apt-get update && apt-get install --yes --no-install-recommends g++
COPY --chown=halftone:halftone . .
USER halftone
# The folder of artifacts is made here, so that a volume mounted on it belongs to this user.
RUN make install PYTHON=${PYTHON} && mkdir -p ~/.cache/halftone/artifacts
RUN make kernels PYTHON=${PYTHON}

FROM base
COPY --from=build --chown=halftone:halftone /halftone /halftone
COPY --from=build --chown=halftone:halftone /home/halftone/.cache/halftone /home/halftone/.cache/halftone
USER halftone

# Inside a container the port must leave loopback to be published; outside, `halftone serve` stays on 127.0.0.1.
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=90s --retries=3 \
    CMD [".venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
STOPSIGNAL SIGINT
ENTRYPOINT [".venv/bin/halftone"]
CMD ["serve", "--host", "0.0.0.0"]
