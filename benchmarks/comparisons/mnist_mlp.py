"""The MLP of 5 blocks of width 2048 on MNIST, batch 128, T = 1000.

The tutorial's network on both sides, on the same normalised images. Updates are timed in blocks after a
first one; the loss is that of epsilon on 256 validation examples after each block, with the same noise, by
our averaged weights and by the tutorial's only ones. bf16 is measured on CPUs with instructions for it.
"""

from benchmarks.comparison import Comparison, Options, Report
from benchmarks.contender import MEMORY, Contender
from benchmarks.table import Unit
from benchmarks.training_data import CPU_MS, LOSS, UPDATES, load
from diffusion.devices import cpu_has_bf16
from diffusion.errors import InputError

TITLE = "The tutorial's MLP on MNIST"
WORK = "MNIST MLP 2048x5, batch 128, CPU"
WORKS = (WORK,)
AS_IT_IS, IN_BF16 = "the tutorial's loop", "the tutorial's loop in bf16"
AT_ITS_BEST = "the tutorial's loop at its best"
BLOCK = 20
VALUES = {
    "network.kind": "mlp",
    "network.hidden_size": 2048,
    "network.num_blocks": 5,
    "network.time_embedding_size": 100,
    "network.output_norm": True,
    "network.dropout": 0.0,
    "training.batch_size": 128,
    "training.learning_rate": 1e-3,
}


def run(options: Options) -> Report:
    report = Report()
    try:
        load(options.mnist)
    except InputError as error:
        report.leave_out(comparison(options), str(error))
    else:
        report.add(comparison(options), options.repeats)
    return report


def comparison(options: Options) -> Comparison:
    common = {"data": options.mnist, "num_updates": BLOCK, "horizon": BLOCK * (options.repeats + 1)}

    def ours(precision: str) -> Contender:
        return Contender(
            "benchmarks.ours:train_images", common | {"values": VALUES | {"training.precision": precision}}
        )

    def tutorial(**settings: bool) -> Contender:
        return Contender("benchmarks.peers.tutorial:train_mnist", common | settings)

    precisions = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    best = {
        f"tutorial, cut batches, fused, {precision}{how}": tutorial(
            as_its_script=False, bf16=precision == "bf16", compiled=bool(how)
        )
        for precision in precisions
        for how in ("", ", compiled")
    }
    in_bf16 = {IN_BF16: tutorial(bf16=True)} if "bf16" in precisions else {}
    return Comparison(
        WORK,
        {f"ours, {precision}": ours(precision) for precision in precisions},
        {AS_IT_IS: {AS_IT_IS: tutorial()}, IN_BF16: in_bf16, AT_ITS_BEST: best},
        [
            Unit(UPDATES, higher_is_better=True, goals={AS_IT_IS: "2.5", IN_BF16: "1.2"}),
            Unit(CPU_MS),
            Unit(LOSS, goals={AS_IT_IS: "1", IN_BF16: "1"}),
            Unit(MEMORY),
        ],
    )
