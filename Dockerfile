# certiq-server in a container; how to build, run and pin it: deploy/README.md, "Image".

# Releases name a digest: --build-arg DEBIAN=docker.io/library/debian@sha256:...
ARG DEBIAN=docker.io/library/debian:bookworm-slim

FROM ${DEBIAN} AS build
WORKDIR /src
COPY deploy/install_packages.sh deploy/packages.txt deploy/
RUN bash deploy/install_packages.sh build image
COPY . .
# A folder of the builder's own keeps what ccache knows from one build to the next.
RUN --mount=type=cache,id=certiq-ccache,target=/ccache \
    export CCACHE_DIR=/ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache && \
    cmake -S . -B /build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX=/opt/certiq \
      -DCERTIQ_TESTS=OFF -DCERTIQ_BENCHMARKS=OFF && \
    cmake --build /build --target certiq-server && \
    cmake --install /build --component server --strip && \
    install -D -m 644 LICENSE /opt/certiq/share/LICENSE && \
    dpkg-query -W -f '${Package}\t${Version}\n' >/opt/certiq/share/build-packages.tsv

FROM ${DEBIAN}
# The libraries that the server was built with. Their upstream versions are pinned; Debian's
# security fixes on top of them are wanted. What exactly came is in share/packages.tsv.
# Nothing is left behind that differs from build to build.
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      'libabsl20220623=20220623.1-*' \
      'libfmt9=9.1.0+ds1-*' \
      'libgrpc++1.51=1.51.1-*' \
      'libmicrohttpd12=0.9.75-*' \
      'libprometheus-cpp-core1.0=1.0.1-*' \
      'libprotobuf32=3.21.12-*' \
      'libspdlog1.10=1:1.10.0+ds-*' \
      'libsqlite3-0=3.40.1-*' \
      'libssl3=3.0.*' \
      'libstdc++6=12.2.0-*' \
      'libxxhash0=0.8.1-*' && \
    apt-get clean && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/ldconfig/aux-cache /var/log/* \
      /var/lib/dpkg/*-old && \
    echo 'certiq:x:65532:65532:certiq:/var/lib/certiq:/usr/sbin/nologin' >>/etc/passwd && \
    echo 'certiq:x:65532:' >>/etc/group && \
    install -d -m 700 -o 65532 -g 65532 /var/lib/certiq && \
    install -d /opt/certiq/share && \
    dpkg-query -W -f '${Package}\t${Version}\n' >/opt/certiq/share/packages.tsv
COPY --from=build /opt/certiq /opt/certiq

# Clear text beyond the loopback is refused until someone says CERTIQ_ALLOW_CLEARTEXT=true or
# gives a certificate.
ENV PATH=/opt/certiq/bin:/usr/bin:/bin \
    CERTIQ_LISTEN=0.0.0.0:8470 \
    CERTIQ_METRICS_LISTEN=0.0.0.0:8471 \
    CERTIQ_DATA_DIR=/var/lib/certiq/store \
    CERTIQ_LOG_FORMAT=json
LABEL org.opencontainers.image.title="certiq-server" \
      org.opencontainers.image.description="Post-training quantization as a service, with a certificate" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that Kubernetes can tell that it is not root.
USER 65532:65532
WORKDIR /
# The only place that is written to.
VOLUME /var/lib/certiq
EXPOSE 8470 8471
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 \
  CMD ["certiq-server", "--probe"]
ENTRYPOINT ["certiq-server"]
