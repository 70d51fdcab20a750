"""The loop of a well-known tutorial on diffusion with an MLP, written anew with its settings.

As its script runs it: a DataLoader that collates single examples, a progress bar, the loss fetched twice in
every update for the log, AdamW as PyTorch defaults to. At its best: batches cut from one tensor, nothing
logged, the fused AdamW, and what else `Settings` offers. What is computed is the same.

Points are embedded coordinate by coordinate and neither normalised nor fed in themselves; images are
flattened, in [-1, 1]. Gradients are clipped to norm 1, the learning rate decays linearly to 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contender import Figures, Measure, since_start
from benchmarks.sharpness import MEAN_DISTANCE, NUM_SAMPLES, mean_distance


@dataclass(frozen=True)
class Settings:
    """What the tutorial's command line sets.

    Attributes:
        hidden_size, num_blocks, embedding_size: of the MLP.
        num_train_timesteps: T; betas are linear.
        batch_size, learning_rate: of AdamW, whose weight decay is PyTorch's default.
    """

    hidden_size: int
    num_blocks: int
    embedding_size: int
    num_train_timesteps: int
    batch_size: int
    beta_start: float = 1e-4
    beta_end: float = 0.02
    embedding_scale: float = 25.0
    learning_rate: float = 1e-3
    max_gradient_norm: float = 1.0


HEART = Settings(hidden_size=32, num_blocks=1, embedding_size=32, num_train_timesteps=200, batch_size=32)
MNIST = Settings(hidden_size=2048, num_blocks=5, embedding_size=100, num_train_timesteps=1000, batch_size=128)


class Sinusoids(nn.Module):
    """[batch] numbers -> [batch, size]: sines, then cosines, of frequencies from 1 down to 1/10000."""

    def __init__(self, size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("frequencies", torch.logspace(0.0, -4.0, size // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = (x * self.scale)[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """x + GELU(Linear(LayerNorm(x)))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.linear(self.norm(x)))


class TutorialMLP(nn.Module):
    """(x [batch, values], t [batch]) -> [batch, values].

    Args:
        num_values: of an example.
        settings: sizes.
        embedded: whether each value is embedded, as those of points are.
    """

    def __init__(self, num_values: int, settings: Settings, embedded: bool) -> None:
        super().__init__()
        size = settings.embedding_size
        self.time = Sinusoids(size)
        count = num_values if embedded else 0
        self.values = nn.ModuleList(Sinusoids(size, settings.embedding_scale) for _ in range(count))
        width = size + (size if embedded else 1) * num_values
        self.layers = nn.Sequential(
            nn.Linear(width, settings.hidden_size),
            nn.GELU(),
            *(Block(settings.hidden_size) for _ in range(settings.num_blocks)),
            nn.LayerNorm(settings.hidden_size),
            nn.Linear(settings.hidden_size, num_values),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        parts = [embed(x[:, place]) for place, embed in enumerate(self.values)] or [x]
        return self.layers(torch.cat([*parts, self.time(t)], dim=1))


class Loop:
    """The tutorial's training.

    Args:
        x_0: [examples, values].
        settings: what its command line sets.
        num_updates: updates over which the learning rate decays.
        embedded: as for `TutorialMLP`.
        seed: of weights, batches and noise.
        as_its_script: with DataLoader, progress bar and logged losses, else without.
        compiled: whether the network is compiled by torch.compile.
        bf16: whether it runs in bfloat16 by autocast.
    """

    def __init__(
        self,
        x_0: Tensor,
        settings: Settings,
        num_updates: int,
        *,
        embedded: bool,
        seed: int,
        as_its_script: bool,
        compiled: bool = False,
        bf16: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.settings, self.as_its_script, self.bf16 = settings, as_its_script, bf16
        self.network = TutorialMLP(x_0.shape[1], settings, embedded)
        self.forward: Callable[[Tensor, Tensor], Tensor] = self.network
        if compiled:
            self.forward = torch.compile(self.network)
        self.betas = torch.linspace(settings.beta_start, settings.beta_end, settings.num_train_timesteps)
        self.alphas_cumprod = (1.0 - self.betas).cumprod(0)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.learning_rate, fused=None if as_its_script else True
        )
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0 - step / num_updates)
        self.batches = self._loaded(x_0) if as_its_script else self._cut(x_0)
        self.losses: list[float] = []

    def run(self, num_updates: int) -> None:
        """Update this often."""
        bar = None
        if self.as_its_script:
            from tqdm.auto import tqdm

            bar = tqdm(total=num_updates)
        for _ in range(num_updates):
            self._update(next(self.batches), bar)
        if bar is not None:
            bar.close()

    def _update(self, x_0: Tensor, bar: Any) -> None:
        noise = torch.randn(x_0.shape)
        timesteps = torch.randint(0, self.settings.num_train_timesteps, (len(x_0),))
        level = self.alphas_cumprod[timesteps][:, None]
        x_t = level**0.5 * x_0 + (1.0 - level) ** 0.5 * noise
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out = self.forward(x_t, timesteps)
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.decay.step()
        if bar is not None:
            bar.update(1)
            self.losses.append(loss.detach().item())
            bar.set_postfix(loss=loss.detach().item(), step=len(self.losses), lr=self.decay.get_last_lr()[0])

    def _loaded(self, x_0: Tensor) -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(x_0, self.settings.batch_size, shuffle=True, drop_last=True)
        while True:
            yield from loader

    def _cut(self, x_0: Tensor) -> Iterator[Tensor]:
        while True:
            order = x_0[torch.randperm(len(x_0))]
            yield from (
                batch
                for batch in order.split(self.settings.batch_size)
                if len(batch) == self.settings.batch_size
            )

    @torch.no_grad()
    def samples(self, num_samples: int) -> Tensor:
        """[num_samples, values] by ancestral sampling through all timesteps, unclipped."""
        x = torch.randn(num_samples, self.network.layers[-1].out_features)
        previous = F.pad(self.alphas_cumprod[:-1], (1, 0), value=1.0)
        for t in reversed(range(self.settings.num_train_timesteps)):
            beta, level = self.betas[t], self.alphas_cumprod[t]
            out = self.network(x, torch.full((num_samples,), t))
            mean = (x - beta / (1.0 - level) ** 0.5 * out) / (1.0 - beta) ** 0.5
            x = mean + (beta * (1.0 - previous[t]) / (1.0 - level)) ** 0.5 * torch.randn(x.shape)
        return x


def heart_points() -> NDArray[np.float64]:
    """[8000, 2] points on the outline of a heart, as our data set of that name."""
    u = np.random.default_rng(42).uniform(0.0, 2.0 * np.pi, 8000)
    y = 13.0 * np.cos(u) - 5.0 * np.cos(2.0 * u) - 2.0 * np.cos(3.0 * u) - np.cos(4.0 * u)
    return np.stack([16.0 * np.sin(u) ** 3, y], axis=1) / 5.0


def train_heart(
    num_updates: int,
    seed: int = 0,
    as_its_script: bool = True,
    compiled: bool = False,
    num_train_timesteps: int = HEART.num_train_timesteps,
) -> Measure:
    """Train on the heart from the start of the process; then, off the clock, the samples' sharpness."""
    settings = replace(HEART, num_train_timesteps=num_train_timesteps)
    if not as_its_script:
        torch.set_num_threads(1)  # a second one has nothing to do

    def measure() -> Figures:
        x_0 = torch.from_numpy(heart_points()).float()
        loop = Loop(
            x_0,
            settings,
            num_updates,
            embedded=True,
            seed=seed,
            as_its_script=as_its_script,
            compiled=compiled,
        )
        loop.run(num_updates)
        return since_start() | {MEAN_DISTANCE: mean_distance(loop.samples(NUM_SAMPLES).numpy())}

    return measure


def train_mnist(
    data: str,
    num_updates: int,
    horizon: int,
    as_its_script: bool = True,
    compiled: bool = False,
    bf16: bool = False,
) -> Measure:
    """Updates on MNIST, a block of them at each measurement; the first block is over before.

    Args:
        data: as for `training_data.load`; the images as our training normalises them, so that losses mean
            the same.
        num_updates: of a block.
        horizon: updates over which the learning rate decays.
    """
    from benchmarks.training_data import held_out_loss, load, updates_in_blocks

    dataset = load(data)
    loop = Loop(
        dataset.train[:].flatten(1),
        MNIST,
        horizon,
        embedded=False,
        seed=0,
        as_its_script=as_its_script,
        compiled=compiled,
        bf16=bf16,
    )
    return updates_in_blocks(
        loop.run,
        num_updates,
        lambda: held_out_loss(
            lambda x, t: loop.network(x.flatten(1), t).view_as(x), dataset, loop.alphas_cumprod
        ),
    )
