# ruff: noqa: I001  (sorting would put every name on a line of its own)
"""Denoising diffusion models: the mathematics, the networks, the data, training and evaluation.

Nothing here depends on Ray, MLflow or ONNX.

    process         noise schedules, the forward process and its posterior, samplers, checks of schedules
    networks        the denoising networks (MLP and U-Net) and the sinusoidal embeddings
    data            data sets from names, image folders and tables; splits and normalisation statistics
    training        the loss, the choice of timesteps, the training loop and its checkpoints
    evaluation      likelihood bounds, and distances between samples and data
    config          every setting of a run; presets has the defaults for each kind of data
    seeding         random numbers as a function of seed and update
    normalisation   conversion between data units and normalised units
    manifest        size and SHA-256 of every file in a folder, to detect damage
    plots           pictures and animations of samples
    registry        samplers, schedules, networks, metrics, objectives and data sources by name
    metrics         names of metrics, and the objectives that a sweep can rank by
    devices         cuda, mps or cpu, and float64 where a device has it
    files, errors   atomic file writes and format versions; the exception for invalid input

The names below are imported from this package, `from diffusion import linear_betas`; each loads its module
when it is first used, so the schedules, samplers and configs load no PyTorch. `train` trains a model in this
process, `TrainedModel.load` loads one:

    dataset = load_dataset(DataConfig(name="heart"))
    model = train(preset("heart"), dataset)
    points = model.sample(1000)

docs/source-documents.md maps the formulas of DDPM (arXiv:2006.11239), and of the documents that this
project implements, to these modules.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion.config import (
        Config as Config,
        DataConfig as DataConfig,
        MetricsConfig as MetricsConfig,
        NetworkConfig as NetworkConfig,
        SamplerConfig as SamplerConfig,
        ScheduleConfig as ScheduleConfig,
        TrainingConfig as TrainingConfig,
    )
    from diffusion.data.dataset import DataSpec as DataSpec, Dataset as Dataset, load_dataset as load_dataset
    from diffusion.data.memory import dataset_from_memory as dataset_from_memory
    from diffusion.errors import InputError as InputError
    from diffusion.evaluation.elbo_window import ElboWindow as ElboWindow, elbo_window as elbo_window
    from diffusion.evaluation.variational_bound import (
        VariationalBound as VariationalBound,
        variational_bound as variational_bound,
    )
    from diffusion.networks.build import build_network as build_network
    from diffusion.networks.embeddings import sinusoidal_embedding as sinusoidal_embedding
    from diffusion.networks.mlp import JointMLP as JointMLP
    from diffusion.networks.unet import UNet as UNet
    from diffusion.plots import draw_samples as draw_samples
    from diffusion.presets import preset as preset
    from diffusion.process.forward import (
        q_posterior as q_posterior,
        q_sample as q_sample,
        q_step as q_step,
        to_epsilon as to_epsilon,
        to_score as to_score,
        to_v as to_v,
        to_x_0 as to_x_0,
    )
    from diffusion.process.generate import Condition as Condition, generate as generate
    from diffusion.process.inpainting import Inpainting as Inpainting
    from diffusion.process.samplers import (
        SamplerTable as SamplerTable,
        sampler_table as sampler_table,
        step as step,
    )
    from diffusion.process.schedules import (
        NoiseSchedule as NoiseSchedule,
        constant_betas as constant_betas,
        cosine_betas as cosine_betas,
        linear_betas as linear_betas,
        quadratic_betas as quadratic_betas,
        respaced_timesteps as respaced_timesteps,
        scaled_linear_betas as scaled_linear_betas,
        sigmoid_betas as sigmoid_betas,
        zero_terminal_snr as zero_terminal_snr,
    )
    from diffusion.registry import (
        DATA_SOURCES as DATA_SOURCES,
        NETWORKS as NETWORKS,
        OBJECTIVES as OBJECTIVES,
        SAMPLERS as SAMPLERS,
        SAMPLE_METRICS as SAMPLE_METRICS,
        SCHEDULES as SCHEDULES,
        Registry as Registry,
    )
    from diffusion.training.checkpoints import TrainedModel as TrainedModel
    from diffusion.training.loop import (
        EvaluationResult as EvaluationResult,
        Training as Training,
        train as train,
    )
else:
    from diffusion.lazy import lazy_names

    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "diffusion.config": (
                "Config DataConfig MetricsConfig NetworkConfig SamplerConfig ScheduleConfig TrainingConfig"
            ),
            "diffusion.data.dataset": "DataSpec Dataset load_dataset",
            "diffusion.data.memory": "dataset_from_memory",
            "diffusion.errors": "InputError",
            "diffusion.evaluation.elbo_window": "ElboWindow elbo_window",
            "diffusion.evaluation.variational_bound": "VariationalBound variational_bound",
            "diffusion.networks.build": "build_network",
            "diffusion.networks.embeddings": "sinusoidal_embedding",
            "diffusion.networks.mlp": "JointMLP",
            "diffusion.networks.unet": "UNet",
            "diffusion.plots": "draw_samples",
            "diffusion.presets": "preset",
            "diffusion.process.forward": "q_posterior q_sample q_step to_epsilon to_score to_v to_x_0",
            "diffusion.process.generate": "Condition generate",
            "diffusion.process.inpainting": "Inpainting",
            "diffusion.process.samplers": "SamplerTable sampler_table step",
            "diffusion.process.schedules": (
                "NoiseSchedule constant_betas cosine_betas linear_betas quadratic_betas "
                "respaced_timesteps scaled_linear_betas sigmoid_betas zero_terminal_snr"
            ),
            "diffusion.registry": (
                "DATA_SOURCES NETWORKS OBJECTIVES SAMPLERS SAMPLE_METRICS SCHEDULES Registry"
            ),
            "diffusion.training.checkpoints": "TrainedModel",
            "diffusion.training.loop": "EvaluationResult Training train",
        },
    )
