#!/usr/bin/env python3
"""Cuts the layer this folder carries out of a folder of real model data.

    python3 tests/data/make_layer.py SOURCE [DESTINATION]

SOURCE holds minilm/layer_03.safetensors and
minilm/activations_layer_03.safetensors; tensors are copied byte for byte.
DESTINATION is this folder unless given.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cut:
    """One tensor of one file, and the file it becomes."""

    source: str
    tensor: str
    destination: str


CUTS = (
    Cut(
        "minilm/layer_03.safetensors",
        "encoder.layer.3.attention.output.dense.weight",
        "weights.safetensors",
    ),
    Cut(
        "minilm/activations_layer_03.safetensors",
        "layer.3.attn_out.x",
        "activations.safetensors",
    ),
)

METADATA = {
    "model": "sentence-transformers/all-MiniLM-L6-v2",
    "license": "Apache-2.0",
}


def copy_tensor(source: Path, tensor: str, destination: Path) -> None:
    """Writes a safetensors file that holds this tensor alone."""
    content = source.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + header_bytes])[tensor]
    begin, end = entry["data_offsets"]
    data = content[8 + header_bytes :][begin:end]
    header = json.dumps(
        {
            "__metadata__": METADATA,
            tensor: {
                "dtype": entry["dtype"],
                "shape": entry["shape"],
                "data_offsets": [0, len(data)],
            },
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    destination.write_bytes(len(header).to_bytes(8, "little") + header + data)


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(arguments[0])
    destination = Path(arguments[1]) if len(arguments) == 2 else Path(__file__).parent
    for cut in CUTS:
        target = destination / cut.destination
        copy_tensor(source / cut.source, cut.tensor, target)
        print(f"{target}: {cut.tensor}, {target.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
