"""An estimate of how data-parallel training scales to 8, 64 and 512 GPUs. Nothing is measured.

    python -m benchmarks.efficiency

A step is a forward pass, then a backward pass (twice the work) that overlaps with NCCL's gradient averaging:

    bytes      4 per parameter (gradients are float32), 2 (n - 1) / n of them over each link
    time       bytes / bandwidth + 2 log2(n) hops of latency (trees), bandwidth that of the slowest link
    compute    3 x FLOPs of a forward pass x examples per GPU / sustained FLOPs
    step       forward + max(backward, averaging)
    efficiency compute / step, against one GPU with as many examples

The global batch is constant, as in train.py, so with more GPUs each gets fewer examples. Not included: small
batches that leave a GPU idle (kernels of about 10 microseconds each), stragglers, data loading (the data are
in the GPU's memory), evaluation (one GPU works, the others wait). Writes
benchmarks/results/efficiency.md.
"""

import math
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "efficiency.md"
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Network:
    """A network and the global batch that it is trained with."""

    name: str
    parameters: float
    forward_flops: float  # of one example
    batch: int


@dataclass(frozen=True)
class Cluster:
    """Machines, each link's bandwidth in bytes/s, and what a GPU sustains."""

    name: str
    flops: float
    within: float
    between: float
    gpus_a_machine: int
    latency: float = 1e-5


NETWORKS = (
    Network("U-Net of train.py at 28x28, 0.3M parameters", 0.29e6, 0.1e9, 2048),
    Network("DDPM's CIFAR-10 U-Net, 36M parameters", 36e6, 6e9, 2048),
    Network("a U-Net of 300M parameters at 64x64", 300e6, 100e9, 2048),
)
CLUSTERS = (
    Cluster("g5.xlarge: one A10G each, 10 Gbit/s at most", 20e12, 1.25e9, 1.25e9, 1, latency=5e-5),
    Cluster("p5.48xlarge: eight H100 each, NVLink, 3200 Gbit/s", 200e12, 300e9, 400e9, 8),
)


def efficiency(network: Network, cluster: Cluster, gpus: int) -> float:
    """Fraction of the GPUs' time that is spent on the network, from 0 to 1."""
    examples = network.batch / gpus
    forward = network.forward_flops * examples / cluster.flops
    bandwidth = cluster.within if gpus <= cluster.gpus_a_machine else min(cluster.within, cluster.between)
    share = (gpus - 1) / gpus
    averaging = 2 * share * 4 * network.parameters / bandwidth + 2 * math.log2(gpus) * cluster.latency
    return 3 * forward / (forward + max(2 * forward, averaging))


def main() -> None:
    lines = [
        "# How data-parallel training would scale: a model, not a measurement",
        "",
        "Efficiency against one GPU, global batch held; assumptions in `benchmarks/efficiency.py`.",
        "",
        "| network, global batch | machines | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |",
        "|---|---|" + "---|" * len(GPUS),
    ]
    for network in NETWORKS:
        for cluster in CLUSTERS:
            cells = [f"{100 * efficiency(network, cluster, gpus):.0f}%" for gpus in GPUS]
            lines.append(f"| {network.name}, {network.batch} | {cluster.name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "So: machines with one GPU and 10 Gbit/s are for sweeps, whose trials do not talk to each other; "
        "one model over many GPUs wants fast links, and a network large enough to be worth it.",
        "",
    ]
    RESULTS.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
