"""U-Net training beside diffusers' UNet2DModel of equal parameters and FLOPs, in the same precision.

Both have one residual block a level, widths in the ratio 1:2:2 and attention with one head at the lowest
resolution; ours has it once more, in the middle: 1.5% more parameters and 2% more FLOPs. Both see the same
normalised images (scikit-learn's digits, enlarged, at 32x32 coloured) in batches of 32, T = 1000, epsilon.
Updates are timed in blocks after a first one; the loss is that of epsilon on validation examples after each
block, with the same noise, by our averaged weights and by diffusers' only ones. bf16 is measured on CPUs
with instructions for it.
"""

from benchmarks.comparison import Comparison, Options, Report
from benchmarks.contender import MEMORY, Contender
from benchmarks.table import Unit
from benchmarks.training_data import COLOUR_32, CPU_MS, GREY_28, LOSS, UPDATES
from diffusion.devices import cpu_has_bf16

TITLE = "U-Net training"
BLOCK = {GREY_28: 60, COLOUR_32: 20}
BASE_CHANNELS = {GREY_28: 16, COLOUR_32: 32}
MULTIPLIERS, BATCH_SIZE, LEARNING_RATE = (1, 2, 2), 32, 1e-3
PRECISIONS = ("fp32", "bf16")


def work(data: str, precision: str) -> str:
    return f"U-Net {data.partition(' at ')[2]}, batch {BATCH_SIZE}, CPU, {precision}"


WORKS = tuple(work(data, precision) for data in BLOCK for precision in PRECISIONS)
AS_IT_IS, AT_ITS_BEST = "diffusers UNet2DModel", "diffusers UNet2DModel at its best"


def values(data: str, precision: str) -> dict[str, object]:
    """Of our config."""
    return {
        "network.kind": "unet",
        "network.prediction_type": "epsilon",
        "network.base_channels": BASE_CHANNELS[data],
        "network.channel_multipliers": MULTIPLIERS,
        "network.num_res_blocks": 1,
        "network.attention_resolutions": (7, 8),
        "network.time_embedding_size": BASE_CHANNELS[data],
        "network.dropout": 0.0,
        "training.batch_size": BATCH_SIZE,
        "training.learning_rate": LEARNING_RATE,
        "training.precision": precision,
    }


def run(options: Options) -> Report:
    report = Report()
    for data in BLOCK:
        for precision in PRECISIONS:
            works = comparison(data, precision, options.repeats)
            if precision == "bf16" and not cpu_has_bf16():
                report.leave_out(works, "this CPU has no instructions for bf16")
            else:
                report.add(works, options.repeats)
    return report


def comparison(data: str, precision: str, repeats: int) -> Comparison:
    common = {"data": data, "num_updates": BLOCK[data], "horizon": BLOCK[data] * (repeats + 1)}
    ours = Contender("benchmarks.ours:train_images", common | {"values": values(data, precision)})
    network = {
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "base_channels": BASE_CHANNELS[data],
        "channel_multipliers": MULTIPLIERS,
        "bf16": precision == "bf16",
    }

    def diffusers(**settings: bool) -> Contender:
        return Contender("benchmarks.peers.diffusers_training:train_images", common | network | settings)

    best = {
        "diffusers, cut batches, fused": diffusers(as_its_script=False),
        "the same, channels-last": diffusers(as_its_script=False, channels_last=True),
        "the same, compiled": diffusers(as_its_script=False, compiled=True),
        "the same, compiled, channels-last": diffusers(
            as_its_script=False, compiled=True, channels_last=True
        ),
    }
    return Comparison(
        work(data, precision),
        {"ours": ours},
        {AS_IT_IS: {AS_IT_IS: diffusers()}, AT_ITS_BEST: best},
        [
            Unit(UPDATES, higher_is_better=True, goals={AS_IT_IS: "1.3"}),
            Unit(CPU_MS),
            Unit(LOSS, goals={AS_IT_IS: "1"}),
            Unit(MEMORY),
        ],
    )
