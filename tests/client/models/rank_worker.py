"""One rank of a data-parallel calibration: rank_worker.py SERVER RANK RANKS FOLDER SUMS MODE."""

import json
import os
import sys
from pathlib import Path

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import certiq
import certiq.torch
import models
import torch
import torch.distributed as dist

BATCHES = 6


def batches(rank: int) -> list[torch.Tensor]:
    """This rank's share; shares differ in size."""
    made = torch.Generator().manual_seed(100 + rank)
    return [
        torch.randint(0, models.VOCABULARY, (2 + rank, 32), generator=made)
        for _ in range(BATCHES - rank)
    ]


def main(server: str, rank: int, ranks: int, folder: Path, sums: str, mode: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    name = "mixtral" if mode == "experts" else "llama"
    model = models.make(name)
    certiq.torch.take_experts_apart(model)
    said: dict[str, object] = {}
    with certiq.Client(server) as client:
        recording = certiq.torch.record(
            model,
            client,
            select=lambda own, _: own.startswith("model.layers.0."),
            sums=sums,  # type: ignore[arg-type]
            held_out_fraction=0.25,
            sequence_rows=32,
            label=f"{folder.name}.",
        )
        try:
            with torch.no_grad(), recording:
                for index, batch in enumerate(batches(rank)):
                    if mode == "failing" and rank == 1 and index == 2:
                        raise ZeroDivisionError("rank 1 has enough")
                    model(input_ids=batch)
            said["groups"] = {
                group.name: {
                    "id": group.calibration.id,
                    "tokens": group.tokens,
                    "members": sorted(group.members),
                }
                for group in recording.groups.values()
            }
        except (ZeroDivisionError, certiq.torch.RecordingError) as error:
            said["error"] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    address, rank, ranks, folder, sums, mode = sys.argv[1:]
    main(address, int(rank), int(ranks), Path(folder), sums, mode)
