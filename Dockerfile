FROM python:3.11-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# Before the source, so that a change of code alone does not install this again. Wheels only: this
# image has no compiler, and a missing wheel should say so instead of failing in a build.
COPY requirements.lock requirements-build.lock ./
RUN python -m venv --without-pip /opt/beacon \
    && pip --python /opt/beacon/bin/python install --only-binary :all: --require-hashes -r requirements.lock \
    && pip install --only-binary :all: --require-hashes -r requirements-build.lock

COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY beacon_proxy beacon_proxy
COPY middleware middleware
COPY providers providers
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/beacon/bin/python install --no-deps --no-index /wheels/*.whl


FROM python:3.11-slim-bookworm

# The work folder is the one place the process may write: beacon.yaml is read there, a ledger is kept there.
RUN useradd --system --user-group --uid 10001 --home-dir /var/lib/beacon --create-home beacon
COPY --from=build /opt/beacon /opt/beacon
ENV PATH=/opt/beacon/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/lib/beacon
USER beacon
# Backends come from the environment; a mounted beacon.yaml replaces this one. How long streams may go on
# after SIGTERM is the platform's to say (kill_timeout in fly.toml, docker stop --timeout), so it is long here.
RUN echo 'server: {drain_timeout: 290}' > beacon.yaml

EXPOSE 8080
# Python asks, since the slim image has no curl; never by a proxy that the environment may name.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('PORT', '8080') + '/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["beacon-proxy"]
CMD ["serve"]
