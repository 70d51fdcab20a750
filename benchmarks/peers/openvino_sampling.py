"""Sampling from the same sampler.onnx, by the same loop, with OpenVINO in place of ONNX Runtime."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.contender import Measure
from benchmarks.sampling import samples_per_second


def sample(
    model: str, sampler: str, num_steps: int, batch_size: int, precision: str | None = None
) -> Measure:
    """Batches of images, the first of which is drawn before.

    Args:
        model: path of a sampler.onnx.
        sampler, num_steps: as for `export.sampler.Sampler.sample`.
        batch_size: images of a batch; the network is compiled for it.
        precision: "f32" or "bf16"; None is what OpenVINO chooses on this processor.
    """
    import openvino

    from diffusion.process.samplers import trajectory
    from export.contract import X
    from export.noise import normal_noise
    from export.sampler import Sampler

    opened = Sampler(Path(model), "cpu")
    table, shape, level_input = (
        opened.table(sampler=sampler, num_steps=num_steps),
        opened.spec.shape,
        opened.spec.level_input,
    )
    core = openvino.Core()
    network = core.read_model(model)
    network.reshape({X: [batch_size, *shape], level_input: [batch_size]})
    hints = {"PERFORMANCE_HINT": "LATENCY"} | (
        {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    )
    request = core.compile_model(network, "CPU", hints).create_infer_request()

    def denoise(x: NDArray[np.float64], level: float) -> NDArray[np.float64]:
        inputs = {X: x.astype(np.float32), level_input: np.full(batch_size, level, dtype=np.int64)}
        return request.infer(inputs)[0].astype(np.float64)

    def noise(row: int) -> NDArray[np.float64]:
        return normal_noise(0, np.arange(batch_size), row + 1, shape)

    def draw() -> None:
        for x, _ in trajectory(denoise, noise(-1), table, noise):
            last = x
        opened.spec.denormalise(last)

    return samples_per_second(draw, batch_size)
