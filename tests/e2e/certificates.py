"""Certificates made by openssl, for the tests of TLS."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path

    def flags(self) -> list[str]:
        return ["--tls_cert", str(self.cert), "--tls_key", str(self.key)]


KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_authority(folder: Path, name: str) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    openssl(
        *("req", "-x509", *KEY, "-days", "2", "-subj", f"/CN={name}"),
        *("-keyout", pair.key, "-out", pair.cert),
    )
    return pair


def make_pair(folder: Path, authority: Pair, name: str, alternatives: str) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    request = folder / f"{name}.csr"
    extensions = folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={alternatives}\n")
    openssl("req", "-new", *KEY, "-subj", f"/CN={name}", "-keyout", pair.key, "-out", request)
    openssl(
        *("x509", "-req", "-in", request, "-CA", authority.cert, "-CAkey", authority.key),
        *("-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", pair.cert),
    )
    return pair
