#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Train a small diffusion model faster: four published accelerations in one file, to read, run and copy.

    python speedup_diffusion.py --strategy adaptive                     # rendered digits, no download, no GPU
    python speedup_diffusion.py --strategy speed --dataset cifar10      # all flags: --help
    python speedup_diffusion.py --resume runs/cifar10-speed             # goes on from the last checkpoint
    python speedup_diffusion.py --generate 64 --checkpoint runs/cifar10-speed/checkpoint.pt
    python speedup_diffusion.py --report runs/cifar10-uniform runs/cifar10-speed  # needs --fid-samples
    torchrun --nproc_per_node=8 speedup_diffusion.py --dataset cifar10  # eight GPUs

Contents: 1 Forward process   2 Accelerations   3 U-Net   4 Sampling   5 Data   6 Evaluation   7 Training
8 Report   9 Command line

Measured on two CPU cores and two small problems, 4 and 2 seeds: SpeeD reaches uniform sampling's last Frechet
distance in 2.4 and 1.2 times fewer steps, the other three gain at most 1.08 (README). No GPU was at hand.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# torchrun starts the processes and numbers them: over all machines, and on each.
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, LOCAL_RANK = int(TORCHRUN.get("RANK", "0")), int(TORCHRUN.get("LOCAL_RANK", "0"))
PROCESSES, LOCAL_PROCESSES = int(TORCHRUN.get("WORLD_SIZE", "1")), int(TORCHRUN.get("LOCAL_WORLD_SIZE", "1"))

# 1 Forward process ------------------------------------------------------------------------------------------
# Diffusion mixes noise into an image x0, little at t = 0, until at t = T - 1 nearly nothing else is left. A
# network sees the noisy x_t and t and predicts eps (epsilon), the noise in it; the loss is the mean square
# error (MSE) of that. Sampling starts from pure noise and steps back to t = 0. "The bound" is the variational
# bound on the likelihood: these MSEs, summed over t with the factors `vlb_coefficients`. ab is short for
# alphas_cumprod, [T]; SNR, the signal-to-noise ratio, is ab / (1 - ab). Images: [B, C, H, W] in [-1, 1].


class ForwardProcess:
    """q(x_t | x0) = N(sqrt(ab_t) x0, (1 - ab_t) I): all of diffusion that training needs.

    schedule: "linear" (beta from 1e-4 to 0.02, Ho et al., arXiv:2006.11239) or "quad" (the same ends, linear
    in sqrt(beta)), both times 1000 / T so that fewer timesteps end as noisy; "cosine" (Nichol and Dhariwal,
    arXiv:2102.09672). No beta exceeds 0.999. ValueError: an unknown schedule, or timesteps < 1.

    betas, alphas_cumprod: float32 [T], on device.
    vlb_coefficients: float32 [T], c_t = beta_t / (2 alpha_t (1 - ab_t) ln 2). For epsilon prediction with the
    fixed variance beta_t, c_t times the epsilon-MSE (mean over dimensions) is the part of the variational
    bound's term at t that depends on the model, in bits per dimension (at t = 0 of a KL term like the others,
    where the DDPM paper has a discrete likelihood).
    """

    def __init__(self, schedule: str = "linear", timesteps: int = 1000, device: str = "cpu"):
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        low, high = 1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps
        if schedule == "linear":
            betas = torch.linspace(low, high, timesteps, dtype=torch.float64)
        elif schedule == "quad":
            betas = torch.linspace(low**0.5, high**0.5, timesteps, dtype=torch.float64) ** 2
        elif schedule == "cosine":
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"schedule must be linear, cosine or quad, got {schedule!r}")
        betas = betas.clamp(max=0.999).to(device)
        ab = (1 - betas).cumprod(0)
        self.timesteps, self.betas, self.alphas_cumprod = timesteps, betas.float(), ab.float()
        self.vlb_coefficients = (betas / (2 * (1 - betas) * (1 - ab) * math.log(2))).float()
        # float64, because 1 - ab loses digits near t = 0; the appended 1 makes index -1 mean x0 itself.
        self._ab = torch.cat([ab, ab.new_ones(1)])

    def _ab_at(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self._ab[t].view(-1, *[1] * (x.dim() - 1))

    def q_sample(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise; x0 and noise [B, C, H, W], t int64 [B]."""
        ab = self._ab_at(t, x0)
        return ab.sqrt().to(x0.dtype) * x0 + (1 - ab).sqrt().to(x0.dtype) * noise

    def predict_x0(self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """q_sample backwards: the x0 that x_t and the noise eps in it imply. Not clipped."""
        ab = self._ab_at(t, x_t)
        return (x_t - (1 - ab).sqrt().to(x_t.dtype) * eps) / ab.sqrt().to(x_t.dtype)


# 2 Accelerations --------------------------------------------------------------------------------------------
# A timestep sampler decides which t are trained on, a loss weight how much each counts; any sampler goes with
# any weight. Every sampler has `probs` [T], its present distribution (sum 1), and `sample(x0, step)`: int64
# timesteps [B] on x0's device, drawn from torch's global generator. To copy a piece: it needs math, torch and
# what its docstring's first line names. "Measured" is our own figure: how many times fewer steps than uniform
# timesteps it took to uniform's last Frechet distance (between samples and data, section 6), first on digits
# (1,600 steps, 2 to 4 seeds), then on CIFAR-10 images shrunk to 16x16 (600 steps, 2 seeds), on two CPU cores.


class UniformSampler:
    """Every timestep equally often: the DDPM baseline, P(t) = 1 / T."""

    def __init__(self, timesteps: int):
        self.probs = torch.full((timesteps,), 1 / timesteps)

    def sample(self, x0: torch.Tensor, step: int) -> torch.Tensor:
        self.probs = self.probs.to(x0.device)
        return torch.randint(len(self.probs), (len(x0),), device=x0.device)


class LogitNormalSampler:
    """The middle more often than the ends: t = floor(T sigmoid(z)), z ~ N(0, 1). A baseline.

    Esser et al., arXiv:2403.03206 (Stable Diffusion 3). Measured: 1.3 on the digits, at a higher val_mse; not
    run on CIFAR-10.
    """

    def __init__(self, timesteps: int):
        edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        self.probs = torch.special.ndtr(torch.logit(edges)).diff().float()

    def sample(self, x0: torch.Tensor, step: int) -> torch.Tensor:
        self.probs = self.probs.to(x0.device)
        u = torch.sigmoid(torch.randn(len(x0), device=x0.device))
        return (u * len(self.probs)).long().clamp(max=len(self.probs) - 1)


class SpeeDSampler:
    """SpeeD's asymmetric sampling: the last timesteps are nearly pure noise, so draw them k times less often.

        P(t) = k / (T + tau (k - 1))  for t < tau,    1 / (T + tau (k - 1))  for t >= tau

    Source: Wang et al., "A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model
    Training", arXiv:2405.17403 (CVPR 2025). The formula, k = 5 and tau = 700 (linear schedule, T = 1000) are
    those of the authors' code. tau=None is our rule for any schedule: the number of timesteps with ab >=
    0.0069, which is 700 on that one. SpeeD is this sampler together with `change_aware_weights`.
    The authors' code also draws half of each batch as the mirror image of the other half about a step near
    642, which changes P(t); left out here.
    Cost: none. Measured: 2.4 (1.8 to 3.2) and 1.2 with those weights; 1.8 and 1.1 without.
    alphas_cumprod: [T]. ValueError: k < 1, or tau outside 1..T.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, k: float = 5.0, tau: int | None = None):
        T = len(alphas_cumprod)
        tau = max(1, int((alphas_cumprod >= 0.0069).sum())) if tau is None else tau
        if not k >= 1 or not 1 <= tau <= T:
            raise ValueError(f"k must be at least 1 and tau lie in 1..{T}, got k = {k}, tau = {tau}")
        before_tau = torch.arange(T, device=alphas_cumprod.device) < tau
        self.probs = torch.where(before_tau, k, 1.0) / (T + tau * (k - 1))

    def sample(self, x0: torch.Tensor, step: int) -> torch.Tensor:
        self.probs = self.probs.to(x0.device)
        return torch.multinomial(self.probs, len(x0), replacement=True)


class CurriculumSampler:
    """Curriculum timestep schedule (CLTS): begin with all timesteps, then train the easy, noisy ones less.

        p_n(t) = (1 - gamma_n) / T + gamma_n N(t; mu T, sigma T),    gamma_n = min(1, n / total_steps)

    with the Gaussian normalised over 0..T-1 and n the training step.
    Source: Xu et al., "Towards Faster Training of Diffusion Models: An Inspiration of A Consistency
    Phenomenon", arXiv:2404.07946: the idea is in its abstract, no code of the authors was found. Second-hand:
    the formula and mu = 0.3 (best in the paper's ablation, third parties say), sigma = 0.5 (one source; the
    paper's value is not known to us). Ours: gamma reaches 1 at the end of the run. SpeeD's repository has a
    CLTS whose exponent, -(t - mu)^2 / 2 * T^2, makes the Gaussian a spike at one t; not used here.
    Cost: none. Measured: 1.07 with one of four seeds and 1.08 with one of two, no gain with the others.
    `probs` is that of the last step sampled. ValueError: sigma <= 0, total_steps < 1.
    """

    def __init__(self, timesteps: int, total_steps: int, mu: float = 0.3, sigma: float = 0.5):
        if not sigma > 0 or total_steps < 1:
            raise ValueError(f"sigma must be above 0 and total_steps at least 1, got {sigma}, {total_steps}")
        t = torch.arange(timesteps, dtype=torch.float64) / timesteps
        self.gaussian = torch.softmax(-0.5 * ((t - mu) / sigma) ** 2, 0).float()
        self.probs = torch.full((timesteps,), 1 / timesteps)
        self.total_steps = total_steps

    def sample(self, x0: torch.Tensor, step: int) -> torch.Tensor:
        self.gaussian = self.gaussian.to(x0.device)
        gamma = min(1.0, step / self.total_steps)
        self.probs = (1 - gamma) / len(self.gaussian) + gamma * self.gaussian
        return torch.multinomial(self.probs, len(x0), replacement=True)


def average_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """In place, the mean of tensor over the processes of torch.distributed; unchanged where none are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


class AdaptiveSampler:
    """Adaptive non-uniform sampling: a policy learns which t lower the bound. Needs `average_over_processes`.

    A network pi(x0) gives (a, b) of a Beta distribution for each image; u ~ Beta(a, b), t = round(u (T - 1)).
    Every `every` steps, on the batch just drawn, with Delta^t = L_t before the model's update minus L_t after
    it, L_t being the variational bound's term at t in bits per dimension:
      1. Delta^t of ONE image at `probe` evenly spaced timesteps, and their sum, enter a queue of `queue`;
      2. Delta^t of EVERY image at the `selected` timesteps S gives its reward, the sum over S of Delta^t;
      3. REINFORCE: loss = -mean(log p(u_i) reward_i) - entropy mean(H_i), one Adam step of the policy;
      4. S becomes the `selected` timesteps whose column of the queue best predicts the sum (largest r^2,
         the ranking of scikit-learn's f_regression, which the authors use).
    Use: t = sampler.sample(x0, step); before_update(model, step); optimizer.step(); after_update(model).

    Source: Kim et al., "Adaptive Non-Uniform Timestep Sampling", arXiv:2411.09998 (CVPR 2025). Network and
    defaults (every 40 steps, |S| = 3, queue 20, Adam with lr 1e-2, gradient norm 1, entropy 1e-2) are those
    of the authors' code.
    Differs from it: before and after share x_t and noise, so that Delta shows the update and not the draw;
    step 1 probes 100 timesteps and not all T (probe=T does); Delta^t is
    vlb_coefficients[t] times the fall of the epsilon-MSE, the same thing when the variance is fixed to
    beta_t; S may change from the third probe on; adaptive pooling, for images of any size; a share `floor` of
    u is uniform, so that no t dies out.
    Cost: 2 (probe + selected B) image-forwards every `every` steps, beside 3 B a step for training, and the
    policy at every step: 11% of uniform's time with a U-Net of 0.64M parameters (`make bench`), less with a
    larger one. Measured: no gain on the digits (but the lowest bound, its reward), 1.03 in steps and 0.98 in
    time on CIFAR-10.

    alphas_cumprod: [T], on the images' device. model: a module, model(x_t, t) -> eps, not DDP's wrapper; as a
    whole it is put into eval mode to be measured, and back into its own.
    `probs` is the mixture over the images of the last policy update. Several processes must build the policy
    under one seed; each has its own images, all keep the same policy, queue, S and `probs`; a probe is the
    mean over one image of each.
    ValueError: fewer timesteps than `selected`, or a number that makes no sense.
    """

    def __init__(
        self, alphas_cumprod: torch.Tensor, in_channels: int, every: int = 40, selected: int = 3,
        queue: int = 20, probe: int = 100, lr: float = 1e-2, entropy: float = 1e-2, floor: float = 0.01,
    ):  # fmt: skip
        T, device = len(alphas_cumprod), alphas_cumprod.device
        probe = min(probe, T)
        if not 1 <= selected <= probe or every < 1 or queue < 3 or not 0 < floor < 1:
            raise ValueError(f"selected must lie in 1..{probe}; every >= 1, queue >= 3, 0 < floor < 1")
        ab = alphas_cumprod.double()
        alphas = ab / torch.cat([ab.new_ones(1), ab[:-1]])
        self.vlb_coefficients = ((1 - alphas) / (2 * alphas * (1 - ab) * math.log(2))).float()
        self.alphas_cumprod, self.every = alphas_cumprod.float(), every
        self.entropy, self.floor = entropy, floor
        layers: list[torch.nn.Module] = []
        for c_in, c_out in ((in_channels, 32), (32, 64), (64, 128)):
            conv = torch.nn.Conv2d(c_in, c_out, 3, padding=1)
            layers += [conv, torch.nn.MaxPool2d(2, ceil_mode=True), torch.nn.ReLU()]  # = pool(relu), cheaper
        layers += [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()]
        for c_in in (128 * 4 * 4, 256):
            layers += [torch.nn.Linear(c_in, 256), torch.nn.ReLU()]
        last = torch.nn.Linear(256, 2)
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, 0.5)  # a = b = softplus(0.5) = 0.974: nearly uniform
        self.policy = torch.nn.Sequential(*layers, last).to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)
        self.grid = torch.linspace(0, T - 1, probe, dtype=torch.float64).round().long().to(device)
        self.selected = torch.arange(selected, device=device)
        self.queue, self.filled = torch.zeros(queue, probe, device=device), 0
        one, (a, b) = torch.ones(1, device=device), torch.nn.functional.softplus(last.bias.detach()) + 1e-5
        self.uniform = self.beta_probs(one, one, T)
        self.probs = self.beta_probs(a[None], b[None], T).lerp(self.uniform, floor)
        self._drawn: tuple = ()
        self._look: tuple = ()

    @staticmethod
    def beta_probs(a: torch.Tensor, b: torch.Tensor, T: int) -> torch.Tensor:
        """[T]: the probability that round(u (T - 1)) is t, u ~ Beta(a_i, b_i), mean over i; a, b [n].

        Within 2e-5 for T = 1000 and a, b up to 30; of sharper peaks the nodes see less. The distribution
        function of Beta(a, b) is a closed form plus that of Beta(a + 1, b + 1), whose density has no poles,
        so that three Gauss-Legendre nodes a bin will do.
        """
        a, b = a.double()[:, None], b.double()[:, None]
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

        def kernel(u):  # u^a (1 - u)^b / B(a, b)
            return torch.exp(a * u.log() + b * (-u).log1p() - log_beta)

        edges = ((torch.arange(T + 1, dtype=a.dtype, device=a.device) - 0.5) / max(1, T - 1)).clamp(0, 1)
        edges[-1:] = 1  # for T = 1; edges[-1] would wait for a GPU
        middle, half = (edges[1:] + edges[:-1]) / 2, edges.diff() / 2
        nodes = ((-(0.6**0.5), 5 / 9), (0.0, 8 / 9), (0.6**0.5, 5 / 9))
        smooth = sum(weight * half * kernel(middle + node * half) for node, weight in nodes)
        closed = kernel(edges) * (b - (a + b) * edges)
        probs = ((closed.diff() + (a + b) * (a + b + 1) * smooth) / (a * b)).clamp(min=0)
        return (probs / probs.sum(1, keepdim=True).clamp(min=1e-300)).mean(0).float()

    def concentrations(self, x0: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(a, b), each [B], of the images' Beta distributions."""
        return (torch.nn.functional.softplus(self.policy(x0.float())) + 1e-5).clamp(max=1e5).unbind(1)

    @torch.no_grad()
    def sample(self, x0: torch.Tensor, step: int) -> torch.Tensor:
        # u = A / (A + B) with A ~ Gamma(a), B ~ Gamma(b), in logarithms: below 0.1 the draws themselves
        # underflow and torch's Beta returns 1/2. A Gamma(c) draw is a Gamma(c + 1) draw times U^(1/c).
        c = torch.stack(self.concentrations(x0))
        draw = torch.distributions.Gamma(c + 1, torch.ones_like(c), validate_args=False).sample()
        log_a, log_b = draw.log() + torch.rand_like(c).log() / c
        u = torch.sigmoid(log_a - log_b)
        u = torch.where(torch.rand_like(u) < self.floor, torch.rand_like(u), u)
        self._drawn = x0, u.clamp(1e-6, 1 - 1e-6)  # log p(u) is infinite at 0 and 1
        return (u * (len(self.probs) - 1)).round().long()

    @torch.no_grad()
    def _vlb_terms(self, model, x_t, t, noise, batch):
        training = model.training
        model.eval()  # no dropout, before and after
        batch = min(batch, 64) if x_t.device.type == "cpu" else batch  # larger ones outgrow a CPU's cache
        parts = zip(x_t.split(batch), t.split(batch), noise.split(batch))
        mse = torch.cat([(model(x, s).float() - n).square().flatten(1).mean(1) for x, s, n in parts])
        model.train(training)
        return self.vlb_coefficients[t] * mse

    def before_update(self, model: torch.nn.Module, step: int) -> None:
        """Measure L_t before the update. Does nothing unless step is a multiple of `every`."""
        if step % self.every:
            return
        x0, _ = self._drawn
        batch = len(x0)
        one = x0[torch.randint(batch, (1,), device=x0.device)]
        x = torch.cat([one.expand(len(self.grid), *one.shape[1:]), x0.repeat(len(self.selected), 1, 1, 1)])
        t = torch.cat([self.grid, self.selected.repeat_interleave(batch)])
        noise, ab = torch.randn_like(x), self.alphas_cumprod[t].view(-1, 1, 1, 1)
        fixed = ab.sqrt() * x + (1 - ab).sqrt() * noise, t, noise, batch
        self._look = fixed, self._vlb_terms(model, *fixed)

    def after_update(self, model: torch.nn.Module) -> None:
        """Measure L_t again, with the same x_t and noise; update the policy, the queue and S."""
        if not self._look:
            return
        (fixed, before), self._look = self._look, ()
        delta = torch.nan_to_num(before - self._vlb_terms(model, *fixed), 0.0, 0.0, 0.0)
        probed, rewards = delta[: len(self.grid)], delta[len(self.grid) :]
        self.update_policy(rewards.view(len(self.selected), -1).sum(0))
        self.queue[self.filled % len(self.queue)] = average_over_processes(probed)
        self.filled += 1
        if self.filled >= 3:  # two points always lie on a line
            best = self.most_predictive(self.queue[: self.filled], len(self.selected))
            self.selected = self.grid[best]

    def update_policy(self, reward: torch.Tensor) -> None:
        """One REINFORCE step on the images drawn last; reward [B], larger is better."""
        x0, u = self._drawn
        with torch.enable_grad(), torch.autocast(x0.device.type, enabled=False):
            a, b = self.concentrations(x0)
            beta = torch.distributions.Beta(a, b, validate_args=False)
            floor = torch.full_like(u[:1], self.floor)
            log_prob = torch.logaddexp(beta.log_prob(u) + torch.log1p(-floor), floor.log())
            loss = -(log_prob * reward).mean() - self.entropy * beta.entropy().mean()
            self.optimizer.zero_grad()
            loss.backward()
            for p in self.policy.parameters():
                if p.grad is not None:
                    average_over_processes(p.grad)
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.refresh_probs(x0)

    @torch.no_grad()
    def refresh_probs(self, x0: torch.Tensor) -> None:
        """Set `probs` to the mixture over the images x0."""
        a, b = self.concentrations(x0)
        probs = self.beta_probs(a, b, len(self.probs))
        self.probs = average_over_processes(probs).lerp(self.uniform, self.floor)

    @staticmethod
    def most_predictive(deltas: torch.Tensor, count: int) -> torch.Tensor:
        """Indices [count], ascending, of the columns of deltas [n, G] most correlated with the row sums."""
        x, y = deltas.double(), deltas.double().sum(1)
        x, y = x - x.mean(0), y - y.mean()
        r2 = (x * y[:, None]).sum(0) ** 2 / (x.square().sum(0) * y.square().sum())
        return torch.nan_to_num(r2, -1.0).topk(count).indices.sort().values

    def state_dict(self) -> dict:
        own = {name: getattr(self, name) for name in ("queue", "filled", "selected", "probs")}
        return own | {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("queue", "selected", "probs"):
            setattr(self, name, state[name].to(self.grid.device, copy=True))
        self.filled = state["filled"]


def change_aware_weights(alphas_cumprod: torch.Tensor, lam: float = 0.6) -> torch.Tensor:
    """SpeeD's weighting: timesteps where the noise changes fast count more. For `normalize_weights`.

        g = gradient of (1 - ab) along t, rescaled linearly so that min g -> 1 - lam, max g -> lam    [T]

    Source: Wang et al., arXiv:2405.17403. lam = 0.6: authors' code, which sets the weight to 1 for t >= tau;
    this is the formula as third parties read it, on all t. Cost: none. Measured alone: 1.1 and 1.05; with
    SpeeDSampler lam = 0.8 gave 3.6 (2.8 to 4.0) and 1.3, where 0.6 gave 2.4 and 1.2.
    alphas_cumprod: [T], T >= 3, not a straight line. ValueError: lam outside [0.5, 1], or T < 3.
    """
    if not 0.5 <= lam <= 1 or len(alphas_cumprod) < 3:
        raise ValueError(f"lam must lie in [0.5, 1] and T be at least 3, got {lam}, {len(alphas_cumprod)}")
    g = torch.gradient(1 - alphas_cumprod.double())[0]
    g = (g - g.min()) / (g.max() - g.min())
    return ((1 - lam) + (2 * lam - 1) * g).to(alphas_cumprod.dtype)


def min_snr_weights(alphas_cumprod: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Min-SNR-gamma for epsilon prediction, [T]: min(SNR, gamma) / SNR, SNR = ab / (1 - ab). A baseline.

    Hang et al., arXiv:2303.09556, gamma = 5 theirs. Measured: 1.6 and 1.15, at a higher val_mse.
    """
    return (gamma * (1 - alphas_cumprod) / alphas_cumprod).clamp(max=1)  # the same, also for SNR = 0


def p2_weights(alphas_cumprod: torch.Tensor, k: float = 1.0, gamma: float = 1.0) -> torch.Tensor:
    """P2 weighting, [T]: 1 / (k + SNR)^gamma, SNR = ab / (1 - ab). A baseline, not measured.

    Choi et al., arXiv:2204.00227, k = gamma = 1 theirs.
    """
    return (k + alphas_cumprod / (1 - alphas_cumprod)) ** -gamma


def normalize_weights(weights: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """weights [T] scaled so that sum(probs * result) = 1, probs [T] being the sampler's. Our choice.

    The expected weight is then 1, and a learning rate means the same for every sampler and weight. The probs
    of CurriculumSampler and AdaptiveSampler move: call it at every step.
    """
    return weights / (probs.to(weights.device) * weights).sum()


def momentum_decay(progress: float, beta1: float = 0.9) -> tuple[float, float]:
    """Momentum decay with learning-rate compensation (MDLRC): (beta1, lr_scale) at progress s = n / N.

        beta1(s) = b (1 - s) / ((1 - b) + b (1 - s)),    lr_scale(s) = (1 - b) / (1 - beta1(s)) = 1 - b s

    Large momentum oscillates on a smooth loss surface, so it is lowered as training goes on; lr (1 - beta1)
    stays constant, so that updates are not amplified. Write both into param_groups at every step, of an
    optimiser of the Adam family: there a new gradient enters with 1 - beta1.
    Source: Xu et al., arXiv:2404.07946: the idea is in its abstract, no code of the authors was found.
    Second-hand: the compensation and b = 0.9. The rule for beta1 is Demon's (Chen et al., arXiv:1910.04952).
    Cost: none. Measured: slower than without on both problems: lr falls linearly to a tenth, too.
    progress: in [0, 1]. ValueError: beta1 outside [0, 1).
    """
    if not 0 <= beta1 < 1:
        raise ValueError(f"beta1 must lie in [0, 1), got {beta1}")
    left = beta1 * (1 - progress)
    return left / ((1 - beta1) + left), 1 - beta1 * progress


# 3 U-Net ----------------------------------------------------------------------------------------------------


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of 4 channels or more: in one of its own the time embedding, a constant, cancels."""
    return nn.GroupNorm(math.gcd(32, channels, max(1, channels // 4)), channels)


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Start at zero, so that the block it ends begins as the identity."""
    for p in conv.parameters():
        nn.init.zeros_(p)
    return conv


class SelfAttention(nn.Module):
    """Self-attention over the H x W positions, heads of about 64 channels; keeps [B, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.heads = math.gcd(max(1, channels // 64), channels)
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).reshape(B, H * W, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, H W, C / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + self.out(h)


class ResBlock(nn.Module):
    """[B, c_in, H, W] and the time embedding [B, emb] -> [B, c_out, H, W]; attend: then self-attention."""

    def __init__(self, c_in, c_out, emb, dropout, attend):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb, c_out)
        self.norm2, self.dropout = group_norm(c_out), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = SelfAttention(c_out) if attend else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """DDPM's U-Net: model(x_t [B, C, H, W], t int64 [B]) -> eps [B, C, H, W].

    Level i has width * mults[i] channels and num_blocks residual blocks on the way down, one more on the way
    up, at half the resolution of level i - 1. attention: sides of the (square) feature maps that get
    self-attention; unless empty, the middle has it too. patch: images are folded
    to 1/patch of their side first (pixel-unshuffle), patch^2 times the channels: coarser, and cheaper.
    ValueError: an odd width, or an image_size that patch and the levels do not divide.
    """

    def __init__(self, in_channels, width, mults, num_blocks, attention, dropout, image_size=32, patch=1):
        super().__init__()
        shrink = patch * 2 ** (len(mults) - 1)
        if width % 2 or image_size % shrink:
            raise ValueError(f"width {width} must be even and image_size {image_size} divide by {shrink}")
        self.width, self.patch, emb = width, patch, 4 * width
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)

        size, channels, skips = image_size // patch, width, [width]  # size: of the level being built

        def stage(c_in, c_out):
            return ResBlock(c_in, c_out, emb, dropout, attend=size in attention)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, mult in enumerate(mults):
            if level:
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
                size //= 2
            for _ in range(num_blocks):
                self.down.append(stage(channels, width * mult))
                channels = width * mult
                skips.append(channels)
        self.middle1 = ResBlock(channels, channels, emb, dropout, attend=bool(attention))
        self.middle2 = ResBlock(channels, channels, emb, dropout, attend=False)
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(num_blocks + 1):
                self.up.append(stage(channels + skips.pop(), width * mult))
                channels = width * mult
            if level:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
                size *= 2
        self.norm = group_norm(channels)
        self.head = zero(nn.Conv2d(channels, in_channels * patch**2, 3, padding=1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
        angles = t.float()[:, None] * frequencies
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for block in self.down:
            h = block(h, emb) if isinstance(block, ResBlock) else block(h)
            skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for block in self.up:
            if isinstance(block, ResBlock):
                h = block(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = block(F.interpolate(h, scale_factor=2.0))
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)


# 4 Sampling -------------------------------------------------------------------------------------------------


class GaussianDiffusion(ForwardProcess):
    """The forward process and two ways back, DDPM's and DDIM's. Arguments as for ForwardProcess."""

    def ddim_step(self, x_t, t, t_prev, eps, eta, noise, clip=True) -> torch.Tensor:
        """One step t -> t_prev (int64 [B], -1 means x0) of DDIM, Song et al., arXiv:2010.02502, eq. 12.

        eta = 0 is deterministic and does not read noise (None will do); eta = 1 has DDPM's variance.
        clip: x0 is clipped to [-1, 1] and epsilon taken again from the clipped x0.
        """
        ab, ab_prev = self._ab_at(t, x_t), self._ab_at(t_prev, x_t)
        x0 = self.predict_x0(x_t, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x_t - ab.sqrt().to(x_t.dtype) * x0) / (1 - ab).sqrt().to(x_t.dtype)
        variance = eta**2 * (1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)
        direction = (1 - ab_prev - variance).clamp(min=0).sqrt()
        x_prev = ab_prev.sqrt().to(x_t.dtype) * x0 + direction.to(x_t.dtype) * eps
        return x_prev + variance.sqrt().to(x_t.dtype) * noise if eta > 0 else x_prev

    def ddpm_step(self, x_t, t, eps, noise, clip=True) -> torch.Tensor:
        """One step t -> t - 1 of DDPM with the posterior's own variance ("fixed-small"), arXiv:2006.11239.

        q(x_{t-1} | x_t, x0) is what DDIM's step with eta = 1 draws from, so there is nothing else to write.
        """
        return self.ddim_step(x_t, t, t - 1, eps, 1.0, noise, clip)

    @torch.no_grad()
    def sample(self, model, shape, method="ddim", steps=50, eta=0.0, generator=None) -> torch.Tensor:
        """Images of the given shape, clipped to [-1, 1], from noise; model(x_t, t) -> eps.

        method "ddim" visits `steps` evenly spaced timesteps from T-1 to 0; "ddpm" takes all T with eta = 1,
        whatever steps and eta say. generator: a torch.Generator on any device, for the same images again.
        ValueError: an unknown method, or steps outside 1..T.
        """
        if method not in ("ddim", "ddpm"):
            raise ValueError(f"method must be ddim or ddpm, got {method!r}")
        if method == "ddpm":
            steps, eta = self.timesteps, 1.0
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"sampling steps must lie in 1..{self.timesteps}, got {steps}")

        def gaussian():
            where = generator.device if generator is not None else self.betas.device
            return torch.randn(shape, generator=generator, device=where).to(self.betas.device)

        times = torch.linspace(self.timesteps - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        x = gaussian()
        for t, t_prev in zip(times, times[1:] + [-1]):
            t, t_prev = (torch.full((len(x),), s, device=x.device) for s in (t, t_prev))
            eps = model(x, t).to(x.dtype)
            x = self.ddim_step(x, t, t_prev, eps, eta, gaussian() if eta > 0 else None)
        return x


# 5 Data: one uint8 tensor [N, C, size, size] to train on, and one held out ----------------------------------
# From here on args are the settings, a Namespace; FLAGS in section 9 lists them. First, how errors are told.


class UserError(Exception):
    """What the user can mend: main prints it as one line and exits with status 2."""


def refuse(condition: object, message: str) -> None:
    if condition:
        raise UserError(message)


def one_line(error: BaseException) -> str:
    """The first sentence of what an exception says; of a traceback, that of its last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in str(error) else 0].split(". ")[0].strip().rstrip(":.")


def out_of_memory(error: BaseException) -> bool:
    texts = "out of memory", "not enough memory", "can't allocate memory"  # torch's, on GPU and CPU
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


@contextlib.contextmanager
def explained(problem):
    """Whatever the body raises, and libraries raise many kinds, becomes a UserError of one line."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or isinstance(error, torch.AcceleratorError):  # the machine's fault
            raise
        raise UserError(f"{problem}: {one_line(error)}") from error


def render_digits(count: int, size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits in Pillow's font at random size, place, angle: uint8 [count, 1, size, size], labels [count]."""
    rng = random.Random(seed)
    canvas = 4 * size  # drawn four times as large, so that strokes are smooth
    fonts = [ImageFont.load_default(canvas * s / 64) for s in range(50, 73, 3)]
    images, labels = np.empty((count, 1, size, size), np.uint8), np.empty(count, np.int64)
    for i in range(count):
        labels[i] = rng.randrange(10)
        x, y = (canvas / 2 + rng.uniform(-canvas, canvas) / 20 for _ in "xy")
        image = Image.new("L", (canvas, canvas))
        ImageDraw.Draw(image).text((x, y), str(labels[i]), fill=255, font=rng.choice(fonts), anchor="mm")
        image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        images[i, 0] = np.asarray(image.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(images), torch.from_numpy(labels)


def to_rgb(image):
    """A PIL image of any mode as RGB, upright: its first frame, 16 bits scaled to 8, alpha on white."""
    tags = getattr(image, "tag_v2", {})  # of TIFF: bits per sample, and whether 0 is white
    deep = image.mode.startswith(("I", "F"))  # Pillow itself would clip these to 255
    plain = tags.get(258, (16,)) == (16,) and tags.get(262) != 0 and "transparency" not in image.info
    refuse(deep and (image.mode == "F" or not plain), "of more than 8 bits only plain 16 bits are read")
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_images(open_image, names, size):
    """uint8 [N, C, size, size] of open_image(name) -> PIL image, centre-cropped; C = 1 if all are grey."""

    def read(name):
        with explained(f"{name} cannot be read as an image, mend or remove it"), open_image(name) as image:
            return np.array(ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC))

    images = torch.empty((len(names), 3, size, size), dtype=torch.uint8)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        bar = tqdm(pool.map(read, names), "reading images", len(names), leave=False, disable=RANK > 0)
        for i, pixels in enumerate(bar):  # an exception, as of Ctrl-C, cancels what is left to read
            images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
    grey = all((part == part[:, :1]).all() for part in images.split(1024))
    return images[:, :1].clone() if grey else images


def open_file(path):
    """Image.open of a file in one of these formats: a pipe never ends, EPS under any name runs code."""
    refuse(not path.is_file(), "no file, or a link that leads nowhere")
    return Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"))


def read_folder(folder, size):
    """Every image file below folder, in the order of their paths; a folder linked twice is read once."""

    def fail(error):
        raise UserError(f"--data-dir {folder}: {error}")

    refuse(not os.path.isdir(folder), f"--data-dir {folder}: no such folder")
    endings = ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
    seen, paths = set(), []
    for here, below, files in os.walk(folder, onerror=fail, followlinks=True):
        below.sort()
        if (real := os.path.realpath(here)) in seen:
            below.clear()  # a link that leads back, maybe in a circle
            continue
        seen.add(real)
        paths += [Path(here, name) for name in files if name.lower().endswith(endings)]
    refuse(not paths, f"--data-dir {folder}: no images ({' '.join(endings)}) in it or below it")
    return read_images(open_file, sorted(paths), size)


def load_dataset(name: str, data_dir: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, held_out), both uint8 [N, C, size, size], on the CPU.

    Held out: the test split where there is one, else the last 5% (at least 256) of a fixed shuffle, so that a
    folder sorted by class is held out evenly. digits are the same for every --seed: runs can be compared.
    """
    if name in ("digits", "folder"):
        images = render_digits(10_240, size)[0] if name == "digits" else read_folder(data_dir, size)
        count, held_out = len(images), max(256, len(images) // 20)
        refuse(count <= held_out, f"--data-dir {data_dir}: {count} images, 256 of them held out, are too few")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return images[order[:-held_out]], images[order[-held_out:]]
    from torchvision import datasets  # as slow to import as torch: a wrong flag should be known at once

    kinds = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    problem = f"{name} is not in {data_dir} and could not be downloaded; put its files there as torchvision"
    with explained(f"{problem} expects them, or use --dataset folder or digits"):
        if name == "celeba":
            parts = [datasets.CelebA(data_dir, split=split, download=True) for split in ("train", "test")]
        else:
            parts = [kinds[name](data_dir, train=train, download=True) for train in (True, False)]
    train, held_out = (read_images(lambda i, part=part: part[i][0], range(len(part)), size) for part in parts)
    return train, held_out


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], channels_last."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] -> uint8 0..255, on the CPU. UserError: not finite."""
    refuse(not images.isfinite().all(), "the samples are not finite: the training of this model diverged")
    return (images.cpu() * 127.5 + 127.5).round().clamp(0, 255).byte()


# 6 Evaluation -----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, diffusion, images: torch.Tensor, count: int = 1024) -> tuple[float, float]:
    """(val_mse, val_vlb) of model on held-out uint8 images, with evenly spaced t and fixed noise.

    val_mse: epsilon-MSE, mean over t. val_vlb: sum over t of vlb_coefficients[t] times the MSE at t, in bits
    per dimension: the part of the variational bound that depends on the model, without its constants.
    """
    device, generator, errors = images.device, torch.Generator().manual_seed(0), []
    which = torch.arange(count, device=device) % len(images)
    times = torch.linspace(0, diffusion.timesteps - 1, count, dtype=torch.float64).round().long().to(device)
    for i, t in zip(which.split(128), times.split(128)):
        x0 = to_float(images[i])
        noise = torch.randn(x0.shape, generator=generator).to(device)
        eps = model(diffusion.q_sample(x0, t, noise), t).float()
        errors.append((eps - noise).square().flatten(1).mean(1))
    mse = torch.cat(errors)
    return mse.mean().item(), diffusion.timesteps * (mse * diffusion.vlb_coefficients[times]).mean().item()


def draw_samples(model, diffusion, count, shape, args, seed, title, batch_size=256):
    """Yields count images (C, H, W) in [-1, 1], in batches; fixed by args, seed, count and batch_size."""
    how = args.method, args.sampling_steps, args.eta, torch.Generator().manual_seed(seed)
    batch = math.ceil(count / math.ceil(count / batch_size))  # all alike: a model is compiled for one size
    with tqdm(total=count, unit="img", desc=title, leave=False) as bar:
        while bar.n < count:
            yield diffusion.sample(model, (batch, *shape), *how)[: count - bar.n]
            bar.update(min(batch, count - bar.n))


def save_pngs(images, folder, first=0):
    """uint8 [N, C, H, W] as 000000.png, 000001.png ..., numbered from first."""
    from torchvision.transforms.functional import to_pil_image

    for number, image in enumerate(images, first):
        to_pil_image(image).save(Path(folder, f"{number:06d}.png"))


class FrechetDistance:
    """FID by clean-fid: how far the features of samples are from those of the training images, as Gaussians.

    features: None for InceptionV3, or a TorchScript file, float images [N, 3, H, W] in 0..255 -> [N, D] at
    the images' own size; that figure is not FID, and `name` says so. TorchScript runs code: open your own
    files.
    reference: (mu [D], sigma [D, D]) of the training images: from the file `saved` where it exists; else for
    published_cifar10 with InceptionV3 those of clean-fid; else measured from images, uint8 [N, C, H, W].
    Opens and tries all of it at once. UserError: what cannot be had, and what to do.
    """

    def __init__(self, features, device, images, published_cifar10=False, saved=None):
        self.name = f"FD ({Path(features).name})" if features else "FID"
        self.device, self.resize = torch.device(device), np.asarray if features else None  # their own size
        with explained("--fid-samples needs clean-fid, pip install clean-fid 'scipy<1.18'"):
            from cleanfid import features as inception
            from cleanfid import fid

            fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))  # fails with SciPy 1.18
        self.clean_fid = fid
        problem = "InceptionV3 or its reference cannot be had; give --fid-features FILE, or, if a download"
        problem += " broke off, delete inception-2015-12-05.pt"
        if features:
            problem = f"--fid-features {features} must map images in 0..255, float [N, 3, H, W], to [N, D]"
        with explained(problem), contextlib.ExitStack() as stack:
            stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
            socket.setdefaulttimeout(20)  # a machine that is cut off should say so soon
            if features:
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # it is to be replaced
                self.features = torch.jit.load(features, self.device).eval()
            else:
                self.features = inception.build_feature_extractor("clean", self.device, False)
            self.measure([images[:2]])  # before what may take long
            if saved and saved.is_file():
                with np.load(saved) as file:
                    self.reference = file["mu"], file["sigma"]
            elif published_cifar10 and not features:
                self.reference = inception.get_reference_statistics("cifar10", 32, split="train")
            else:
                self.reference = self.measure([images])

    def measure(self, batches):
        """(mu [D], sigma [D, D]) of the features of batches of uint8 [N, C, H, W]; grey ones become RGB."""
        # clean-fid's data set cannot be sent to workers that do not fork
        workers = len(os.sched_getaffinity(0)) if multiprocessing.get_start_method() == "fork" else 0
        options = {"num_workers": workers, "device": self.device, "batch_size": 32, "verbose": False}
        options |= {"custom_fn_resize": self.resize}
        with tempfile.TemporaryDirectory() as folder:
            count = 0
            for images in batches:
                save_pngs(images, folder, count)
                count += len(images)
            found = self.clean_fid.get_folder_features(folder, self.features, **options)
        if found.ndim != 2 or len(found) != count or not np.isfinite(found).all():
            raise ValueError(f"features of {count} images have shape {list(found.shape)} or are not finite")
        return found.mean(0), np.cov(found, rowvar=False)

    def __call__(self, batches) -> float:
        """The distance of batches of uint8 images to the reference."""
        return float(self.clean_fid.frechet_distance(*self.measure(batches), *self.reference))


def write_whole(path: Path, write) -> None:
    """write(temporary path), then rename: path holds the old content or the new, never a half. OSError."""
    temporary = path.with_name("new-" + path.name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # so that this holds when the power fails, too
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
        problem = f"{path} could not be written and is as it was ({one_line(error)})"
        raise OSError(f"{problem}: is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(images: torch.Tensor, path: Path) -> None:
    """A PNG of at most 64 images in [-1, 1], eight in a row, small ones enlarged."""
    from torchvision.utils import save_image

    images = F.interpolate(images[:64].float().cpu(), scale_factor=max(1, 64 // images.shape[-1]))
    options = {"nrow": 8, "normalize": True, "value_range": (-1, 1), "pad_value": 0.5}
    write_whole(path, functools.partial(save_image, images, **options))


def save_timesteps(drawn: torch.Tensor, path: Path) -> None:
    """A heat map of drawn [columns, T], how often each t was drawn, column by column as training went on."""
    density = F.adaptive_avg_pool1d(drawn.float().cpu(), min(50, drawn.shape[1]))
    density = (density / density.mean(1, keepdim=True).clamp(min=1e-9)).clamp(max=4).T.flip(0)
    pixels = Image.fromarray((255 - 255 / 4 * density).byte().numpy())
    picture = Image.new("L", (700, 400), 255)
    picture.paste(pixels.resize((660, 340), Image.Resampling.NEAREST), (20, 20))
    text = "t (upwards) drawn as training went on: white never, black 4 times as often as uniform"
    ImageDraw.Draw(picture).text((20, 370), text, 0, ImageFont.load_default(16))
    write_whole(path, picture.save)


# 7 Training -------------------------------------------------------------------------------------------------

LOG_EVERY = 25  # steps: reading the loss waits for the device
PATIENCE = 10  # so many losses in a row that are not finite end a run
MIN_SCALE = 1e-4  # of fp16, as fairseq: gradients that overflow even so are broken
COLUMNS = 50  # of timesteps.png
COMPILE_FROM = 5_000  # steps, or calls of the sampling: compiling takes a minute or two. An estimate
STRATEGIES = ("uniform", "logit-normal", "speed", "curriculum", "adaptive")
WEIGHTINGS = ("auto", "none", "change-aware", "min-snr", "p2")
METRICS = ("step", "images", "seconds", "loss", "lr", "beta1", "val_mse", "val_vlb", "fid")


def build_unet(args, channels: int) -> UNet:
    names = "width", "mults", "num_blocks", "attention", "dropout", "image_size", "patch"
    return UNet(channels, **{name: getattr(args, name) for name in names})


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: what it gives back costs a page fault per 4 KiB when it is used again."""
    with contextlib.suppress(AttributeError, TypeError):  # not on macOS, musl or Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks lie on the heap, too,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def build_model(args, channels: int) -> tuple[nn.Module, GaussianDiffusion]:
    if args.device == "cpu":
        keep_freed_memory()
    model = build_unet(args, channels).to(args.device).to(memory_format=torch.channels_last)
    return model, GaussianDiffusion(args.schedule, args.timesteps, args.device)


def build_strategy(args, ab: torch.Tensor, channels: int):
    """The timestep sampler and the raw loss weights [T] of these settings."""
    T, prefix, given = len(ab), "adaptive_", vars(args).items()
    adaptive = {name.removeprefix(prefix): value for name, value in given if name.startswith(prefix)}
    samplers = {
        "uniform": lambda: UniformSampler(T),
        "logit-normal": lambda: LogitNormalSampler(T),
        "speed": lambda: SpeeDSampler(ab, args.speed_k, args.speed_tau),
        "curriculum": lambda: CurriculumSampler(T, args.steps, args.curriculum_mu, args.curriculum_sigma),
        "adaptive": lambda: AdaptiveSampler(ab, channels, **adaptive),
    }
    weights = {
        "none": lambda: torch.ones_like(ab),
        "change-aware": lambda: change_aware_weights(ab, args.speed_lam),
        "min-snr": lambda: min_snr_weights(ab),
        "p2": lambda: p2_weights(ab),
    }
    auto = "change-aware" if args.strategy == "speed" else "none"
    return samplers[args.strategy](), weights[auto if args.weighting == "auto" else args.weighting]()


def make_autocast(args):
    """(a function that makes the autocast context, whether its fp16 needs loss scaling)."""
    device, amp = torch.device(args.device), args.amp
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)  # auto: none on a CPU, few gain by it
    return functools.partial(torch.autocast, device.type, dtype, enabled=bool(dtype)), amp == "fp16"


def compile_in_place(args, calls, *models):
    """torch.compile of the models, by --compile; with auto one that cannot be compiled runs uncompiled."""
    if args.compile == "off" or (args.compile == "auto" and (args.device == "cpu" or calls < COMPILE_FROM)):
        return
    config = torch._dynamo.config
    config.suppress_errors = args.compile == "auto"
    config.optimize_ddp = False  # it would cut the model into pieces
    config.recompile_limit = 16  # one graph for each size of a batch: training, probes, samples, measurements
    for model in models:
        model.compile(dynamic=False)


def join_processes() -> None:
    """Join the processes that torchrun started. Where one ends, what the others wait for fails."""
    if TORCHRUN:
        # NCCL between GPUs; gloo for what is on the CPU, such as waiting, maybe hours, while rank 0 measures.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1))


def to_device(tensor, device):
    """The tensor on device: from the host to a GPU through pinned memory, and nothing waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Training:
    """A run: all that its checkpoint holds, and one step. All of it is the same in every process.

    All randomness of a step follows from the seed and the step, so a checkpoint needs no generator: a resumed
    run draws what the unbroken one would. Every strategy sees the same images, flips and noise: they are
    drawn first. Of several processes each takes its share of the batch, with noise, timesteps and dropout of
    its own.
    """

    def __init__(self, args, images: torch.Tensor):
        """images: uint8 [N, C, H, W] on the CPU. They move to a GPU unless they take over a quarter of it."""
        self.args, self.device = args, (device := torch.device(args.device))
        self.order = torch.empty(0)  # of this epoch's images, drawn when it is needed
        gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        self.images = images if gpu and images.numel() > gpu.total_memory / 4 else images.to(device)
        self.autocast, self.fp16 = make_autocast(args)
        torch.manual_seed(args.seed)  # the model first: every strategy starts from the same one
        self.model, self.diffusion = build_model(args, images.shape[1])
        self.sampler, self.raw_weights = build_strategy(args, self.diffusion.alphas_cumprod, images.shape[1])
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        compile_in_place(args, args.steps, self.model, self.ema)
        # DDP averages the gradients of what passes through it; all else calls the bare model.
        self.ddp_model = nn.parallel.DistributedDataParallel(self.model) if TORCHRUN else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
        # Off fp16 its scale stays 1: there it only skips the updates that are not finite, on the device.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=65_536.0 if self.fp16 else 1.0)
        self.step, self.seconds = 0, 0.0
        self.drawn = torch.zeros(COLUMNS, args.timesteps, dtype=torch.int32, device=device)
        # A ring: the losses since the last look, at most LOG_EVERY, and the PATIENCE before them.
        self.losses = torch.zeros(LOG_EVERY + PATIENCE, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.parts: dict = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        self.parts |= {"sampler": self.sampler} if args.strategy == "adaptive" else {}
        self.parts |= {"scaler": self.scaler} if self.fp16 else {}

    def state_dict(self) -> dict:
        state = {"args": vars(self.args), "channels": self.images.shape[1]}
        state |= {name: getattr(self, name) for name in ("step", "seconds", "drawn", "losses", "skipped")}
        return state | {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        for name in ("drawn", "losses", "skipped"):
            getattr(self, name).copy_(state[name])
        for name, part in self.parts.items():
            if name in state or name != "scaler":  # a run that becomes fp16 has none
                part.load_state_dict(state[name])

    def batch(self) -> torch.Tensor:
        """The next images, float [B, C, H, W]: each epoch in its own order, less an incomplete last batch."""
        args = self.args
        epoch, batch = divmod(self.step, len(self.images) // args.batch_size)
        if batch == 0 or not len(self.order):
            shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            self.order = to_device(torch.randperm(len(self.images), generator=shuffle), self.images.device)
        share = args.batch_size // PROCESSES
        first = batch * args.batch_size + RANK * share
        x0 = to_float(to_device(self.images[self.order[first : first + share]], self.device))
        if args.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=self.device) < 0.5, x0.flip(-1), x0)
        return x0

    def train_step(self) -> None:
        """One update, from the images of this step to the average and the tallies. Never waits for a GPU."""
        args, step, model, sampler = self.args, self.step, self.model, self.sampler
        adaptive = args.strategy == "adaptive"
        # A CPU's generator keeps 32 bits of a seed; an odd factor, 2^32 / 1.618, spreads the ranks over them.
        seed = args.seed * 1_000_003 + RANK * 2_654_435_769
        torch.manual_seed(seed + 2 * step)
        x0 = self.batch()
        noise = torch.randn_like(x0)
        t = sampler.sample(x0, step)

        torch.manual_seed(seed + 2 * step + 1)  # for dropout and probes, whatever the sampler drew
        with self.autocast():
            eps = self.ddp_model(self.diffusion.q_sample(x0, t, noise), t)
        mse = (eps.float() - noise).square().flatten(1).mean(1)
        loss = (normalize_weights(self.raw_weights, sampler.probs)[t] * mse).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)

        beta1, lr_scale = momentum_decay(step / args.steps if args.momentum_decay else 0.0, args.beta1)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * lr_scale * min(1.0, (step + 1) / args.warmup)
            group["betas"] = beta1, 0.999
        if adaptive:
            with self.autocast():
                sampler.before_update(model, step)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.fp16 else 1.0)
        if adaptive:
            with self.autocast():
                sampler.after_update(model)
        # The average forgets the random start: its decay grows to the final value over the first steps.
        average = get_ema_multi_avg_fn(min(args.ema_decay, (1 + step) / (10 + step)))
        average(list(self.ema.parameters()), list(model.parameters()), None)

        # How often each t was drawn, and the loss: over all processes.
        tally = torch.zeros(args.timesteps + 1, device=self.device)
        tally.scatter_add_(0, t, torch.full(t.shape, float(PROCESSES), device=self.device))
        # A gradient that is not finite counts as such a loss, but with fp16, where it only lowers the scale.
        tally[-1] = loss.detach() + (0.0 if self.fp16 else 0 * norm)
        average_over_processes(tally)
        self.drawn[step * COLUMNS // args.steps] += tally[:-1].round().int()
        self.losses[step % len(self.losses)] = tally[-1]
        self.skipped += ~tally[-1].isfinite()
        self.step += 1

    def losses_since(self, logged: int) -> tuple[float, bool]:
        """(mean of the finite losses since that step, whether the last one is finite). Waits for the device.

        FloatingPointError after PATIENCE losses in a row that are not finite, or at a scale below MIN_SCALE.
        """
        kept, recent, in_a_row = self.losses.tolist(), [], 0
        for step in range(max(0, self.step - len(kept)), self.step):
            loss = kept[step % len(kept)]
            in_a_row = 0 if math.isfinite(loss) else in_a_row + 1
            if in_a_row == PATIENCE:
                problem = f"step {step + 1}: {PATIENCE} losses or gradients in a row were not finite"
                advice = "--amp bf16 or off, fp16 overflows" if self.fp16 else "a lower --lr, it diverges"
                raise FloatingPointError(f"{problem}: --resume the run with {advice}")
            if step >= logged and not in_a_row:
                recent.append(loss)
        if self.fp16 and (scale := self.scaler.get_scale()) < MIN_SCALE:
            problem = f"step {self.step}: gradients overflow fp16, its loss scale fell to {scale:.1g}"
            raise FloatingPointError(f"{problem}: --resume the run with --amp bf16 or off")
        return statistics.fmean(recent) if recent else math.nan, not in_a_row

    def predict(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The EMA model's epsilon."""
        with self.autocast():
            return self.ema(x_t, t)


@contextlib.contextmanager
def deferred_signals():
    """Meanwhile SIGINT and SIGTERM only set `received`, so that a step can be finished.

    While `at_once` is set (measuring, with the checkpoint written) they interrupt, saying what is `kept`; a
    second one ends the process in any case.
    """
    signals = argparse.Namespace(received=0, at_once=False, kept="")

    def receive(number, frame):
        signals.received = number
        for either in before:
            signal.signal(either, signal.SIG_DFL)
        if signals.at_once:
            raise KeyboardInterrupt(number, signals.kept)

    both = signal.SIGINT, signal.SIGTERM
    heard = [number for number in both if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
    before = {number: signal.signal(number, receive) for number in heard}
    try:
        yield signals
    except RuntimeError as error:  # the first process that a signal ends breaks what the others wait for
        if signals.received and PROCESSES > 1:
            raise KeyboardInterrupt(signals.received, signals.kept) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def loop(run, folder, rows, held_out, distance):
    """Train to the end. Rank 0 writes checkpoints, rows and pictures when due, while the others wait."""
    args, saved, clock = run.args, run.step or None, time.perf_counter()  # saved: the step of checkpoint.pt
    logged = int(rows[-1]["step"]) if rows else 0
    options = {"initial": run.step, "unit": "img", "unit_scale": args.batch_size, "disable": RANK > 0}
    with deferred_signals() as signals, tqdm(desc=args.strategy, total=args.steps, **options) as bar:
        while True:
            step, last, stop = run.step, run.step == args.steps, torch.tensor(int(signals.received))
            if TORCHRUN:  # a signal to one process stops all
                distributed.all_reduce(stop, distributed.ReduceOp.MAX)
            evaluates = last or step % args.eval_every == 0
            compares = args.fid_samples and (last or step % (args.fid_every or args.steps) == 0)
            logs = evaluates or compares or step % LOG_EVERY == 0
            saves = evaluates or compares or step % args.checkpoint_every == 0 or stop
            if logs or saves:
                mean_loss, healthy = run.losses_since(logged)
                run.seconds += time.perf_counter() - clock  # of training alone
                # The checkpoint comes before what takes long, and a resumed run measures what its metrics.csv
                # lacks: nothing is lost wherever a run ends. While losses are not finite the last one stays.
                if saves and healthy and step != saved:
                    if RANK == 0:
                        write_whole(folder / "checkpoint.pt", functools.partial(torch.save, run.state_dict()))
                    saved = step
                signals.kept = f" with the checkpoint of step {saved}: --resume {shlex.quote(str(folder))}"
                if stop:
                    raise KeyboardInterrupt(stop.item(), signals.kept)
                if RANK == 0 and logs and step > logged:
                    signals.at_once = saved == step or not healthy
                    if signals.received and signals.at_once:  # while the checkpoint was written
                        raise KeyboardInterrupt(signals.received, signals.kept)
                    due = held_out if evaluates else None, distance if compares else None
                    rows.append(measure(run, folder, mean_loss, *due, signals))
                    with open(folder / "metrics.csv", "a") as file:
                        file.write(",".join(rows[-1].get(name, "") for name in METRICS) + "\n")
                    bar.set_postfix(loss=f"{mean_loss:.4f}")
                    signals.at_once = False
                logged, clock = step if logs else logged, time.perf_counter()
            if last:
                return
            run.train_step()
            bar.update()


def measure(run, folder, mean_loss, held_out, distance, signals):
    """A row of metrics.csv: with held_out the EMA model's figures and new pictures, with distance its FID."""
    args, group = run.args, run.optimizer.param_groups[0]
    values = run.step, run.step * args.batch_size, run.seconds, mean_loss, group["lr"], group["betas"][0]
    row = dict(zip(METRICS, values))
    options = {"shape": run.images.shape[1:], "args": args, "seed": 0}
    draw = functools.partial(draw_samples, run.predict, run.diffusion, **options)
    if held_out is not None:
        row["val_mse"], row["val_vlb"] = evaluate(run.predict, run.diffusion, held_out)
        save_grid(torch.cat(list(draw(64, title="samples"))), folder / "samples.png")
        save_timesteps(run.drawn, folder / "timesteps.png")
    if distance:
        try:
            row["fid"] = distance(map(to_uint8, draw(args.fid_samples, title=distance.name)))
        except Exception as error:  # whatever it is costs the figure, not the run
            if signals.received:  # which may have taken clean-fid's workers with it
                raise KeyboardInterrupt(signals.received, signals.kept) from error
            tqdm.write(f"{distance.name} could not be measured at step {run.step}: {one_line(error)}")
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}


def read_rows(path):
    """The rows of a metrics.csv, all text, without a last one that was cut off."""
    return list(csv.DictReader(line for line in path.read_text().splitlines(True) if line.endswith("\n")))


def open_distance(args, images, folder):
    """The FrechetDistance that args ask for, or None. Adds to args which data and features it measures with.

    UserError if the run in folder, to be resumed, had others.
    """
    distance, identity = None, {"data": f"{len(images)} images, crc32 {zlib.crc32(images.numpy()):08x}"}
    if args.fid_samples:
        saved = folder and folder / "fid_reference.npz"
        published_cifar10 = (args.dataset, args.image_size) == ("cifar10", 32)
        distance = FrechetDistance(args.fid_features, args.device, images, published_cifar10, saved)
        file = Path(args.fid_features).read_bytes() if args.fid_features else None
        identity["features"] = distance.name + (f", crc32 {zlib.crc32(file):08x}" if file else "")
    for name, value in identity.items():
        was = getattr(args, name, value)
        refuse(was != value, f"--resume {folder}: its {name} were {was}, now they are {value}")
        setattr(args, name, value)
    return distance


def flops_per_image(args, channels: int) -> int:
    """Floating-point operations of the U-Net's forward and backward pass, counted without any of them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        image = torch.empty(1, channels, args.image_size, args.image_size)
        build_unet(args, channels)(image, torch.zeros(1)).sum().backward()
    return counter.get_total_flops()


def performance(run, images_per_second):
    """A line: images/s, peak memory, on a GPU the share of its matrix rate that the U-Net reaches."""
    text, size, device = f"{images_per_second:.4g} images/s", 8192, run.device
    if device.type == "cpu":
        with contextlib.suppress(ImportError):  # on Windows
            from resource import RUSAGE_SELF, getrusage

            unit = 2**30 if sys.platform == "darwin" else 2**20
            text += f", peak memory {getrusage(RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"
        return text
    from torch.utils.benchmark import Timer

    text += f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    torch.cuda.empty_cache()
    with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.device(device):  # others may use it, too
        a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
        rate = 2 * size**3 / Timer("a @ b", globals={"a": a, "b": b}).timeit(20).mean
        share = flops_per_image(run.args, run.images.shape[1]) * images_per_second / PROCESSES / rate
        text += f", {share:.1%} of the {rate / 1e12:.0f} TFLOP/s of bf16 matrix products on this GPU"
    return text


def refuse_full_disk(args, folder):
    """UserError where there is no room for the checkpoints of a run: the old one and the new."""
    with torch.device("meta"):  # weighs a model of any size, and makes none
        weights = sum(p.numel() for p in build_unet(args, 3).parameters())
    path = Path(folder or args.out or "runs").absolute()
    place = next(place for place in (path, *path.parents) if os.path.isdir(place))
    refuse(not os.access(place, os.W_OK | os.X_OK), f"{place} may not be written: name another with --out")
    free = shutil.disk_usage(place).free
    needed = (1 if folder else 2) * (16 * weights + 5e7)  # float32: model, EMA, AdamW's two moments; the rest
    problem = f"{path} has {free / 1e9:.3g} GB, its checkpoints take {needed / 1e9:.3g}"
    refuse(needed > free, f"{problem}: free some, name another with --out, or take a smaller --width")


def new_folder(out, default, first):
    """Make the folder out, or default, default-2 ...; it is for whoever creates the file `first` in it."""
    for number in itertools.count(1):
        path = Path(out or (default if number == 1 else f"{default}-{number}"))
        try:
            path.mkdir(parents=True, exist_ok=bool(out))
            open(path / first, "x").close()
            break
        except OSError as error:
            if out or not path.is_dir():
                raise UserError(f"no folder for the results ({error}): name another with --out") from error
    return path


@contextlib.contextmanager
def alone_in(folder):
    """Meanwhile hold the folder's lock. UserError: another process trains this run."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is being trained by another process") from error
        yield
    finally:
        os.close(lock)


def train(args, folder=None, checkpoint=None, rows=()):
    """Train as args say: from the start into a new folder, or on from a checkpoint and rows in its own."""
    batch, rows = args.batch_size, list(rows)
    refuse(batch % PROCESSES, f"--batch-size {batch} must divide by {PROCESSES}, the processes")
    if RANK == 0:
        refuse_full_disk(args, folder)
    for turn in range(3):  # rank 0, then one on each other machine, then the rest: a download is made once
        if turn == min(RANK, 1) + min(LOCAL_RANK, 1):
            images, held_out = load_dataset(args.dataset, args.data_dir, args.image_size)
        average_over_processes(torch.zeros(()))  # waits for all
    refuse(batch > len(images), f"--batch-size {batch} is more than the {len(images)} training images")
    distance = open_distance(args, images, folder) if RANK == 0 else None
    run = Training(args, images)
    if checkpoint:
        with reading_checkpoint(folder / "checkpoint.pt"):
            run.load_state_dict(checkpoint)
    if RANK:
        return loop(run, None, rows, None, None)
    names = args.dataset, args.strategy, "" if args.weighting == "auto" else args.weighting
    default = "-".join([name for name in names if name] + ["momentum-decay"] * args.momentum_decay)
    folder = folder or new_folder(args.out, Path("runs", default), "config.json")
    with alone_in(folder):
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        config = json.dumps(vars(args) | versions, indent=2) + "\n"
        write_whole(folder / "config.json", lambda path: path.write_text(config))
        table = "".join(",".join(line) + "\n" for line in [METRICS, *(row.values() for row in rows)])
        write_whole(folder / "metrics.csv", lambda path: path.write_text(table))
        if distance:
            mu, sigma = distance.reference
            write_whole(folder / "fid_reference.npz", lambda path: np.savez(path, mu=mu, sigma=sigma))
        shape, before = "x".join(map(str, images.shape[1:])), len(rows)
        millions = sum(p.numel() for p in run.model.parameters()) / 1e6
        print(f"{folder}: {len(images)} images {shape} to train on, {len(held_out)} held out")
        where = args.device if PROCESSES == 1 else f"{PROCESSES} x {args.device}"
        print(f"U-Net of {millions:.2f}M parameters on {where}, steps {run.step} to {args.steps}")
        loop(run, folder, rows, held_out.to(args.device), distance)
    # The pace is that since this process's first row: the steps before it are slow, they may compile.
    last, first = rows[-1], rows[min(before, len(rows) - 2)] if len(rows) > 1 else {"step": 0, "seconds": 0}
    figures = f"val_mse {last['val_mse']}, val_vlb {last['val_vlb']} bits per dimension"
    figures += f", {distance.name} {last['fid']}" if "fid" in last else ""
    print(f"{run.seconds:.0f} s of training: {figures}")
    if run.skipped:
        print(f"{run.skipped} updates were skipped: their loss or gradient was not finite")
    print(f"samples and all else in {folder}")
    steps, seconds = (float(last[name]) - float(first[name]) for name in ("step", "seconds"))
    print(performance(run, steps * batch / max(seconds, 1e-9)))


def reading_checkpoint(path):
    """A context in which whatever goes wrong becomes a UserError that names the file."""
    return explained(f"{path} is cut off or no checkpoint of this script")


def load_checkpoint(path):
    """A checkpoint of this script, on the CPU, never unpickled as code. UserError: anything else."""
    refuse(not os.path.isfile(path), f"{path}: no such checkpoint")
    with reading_checkpoint(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for action in make_parser()._actions:  # its settings are such as the command line admits
            value = checkpoint["args"].get(action.dest)
            for one in [] if value is None else value if isinstance(value, list) else [value]:
                refuse(action.choices and one not in action.choices, f"{action.dest} {one}")
                (action.type or str)(str(one))
    return checkpoint


def generate(args):
    """Write args.generate samples of a checkpoint's EMA model as PNG files, and a grid of the first 64."""
    path, first, done = Path(args.checkpoint), [], 0
    checkpoint = load_checkpoint(path)
    with reading_checkpoint(path):
        run = argparse.Namespace(**checkpoint["args"] | {"device": args.device})
        model, diffusion = build_model(run, checkpoint["channels"])
        model.load_state_dict(checkpoint["ema"])
    steps = args.sampling_steps = args.sampling_steps or min(50, run.timesteps)
    refuse(steps > run.timesteps, f"--sampling-steps {steps}: this model has {run.timesteps} timesteps")
    batch_size = args.batch_size or 256
    calls = (run.timesteps if args.method == "ddpm" else steps) * math.ceil(args.generate / batch_size)
    compile_in_place(args, calls, model)
    folder = new_folder(args.out, path.parent / "generated", "000000.png")
    shape = checkpoint["channels"], run.image_size, run.image_size
    options = args, args.seed, "generating", batch_size
    with make_autocast(args)[0]():
        for images in draw_samples(model.eval(), diffusion, args.generate, shape, *options):
            save_pngs(to_uint8(images), folder, done)
            done += len(images)
            first += images[: 64 - len(first)].cpu()
    save_grid(torch.stack(first), folder / "grid.png")
    print(f"{args.generate} images and grid.png in {folder}")


# 8 Report ---------------------------------------------------------------------------------------------------

# What may differ between the runs of one row, and what must not differ between figures that are compared.
FREE = {"seed", "out", "data_dir", "eval_every", "checkpoint_every", "python", "torch"}
FREE |= {"features", "fid_features", "fid_samples", "fid_every"}
FID_SETTINGS = ("features", "fid_samples", "method", "sampling_steps", "eta")
REPORT = "strategy | runs | steps | seconds | val_mse | val_vlb | {0} last | {0} best | "
REPORT += "steps to baseline's last | seconds to it | speed-up (steps) | speed-up (seconds)"


def read_run(folder):
    """Its folder, its config and its rows, each with METRICS as floats, None where nothing was measured."""
    with explained(f"--report {folder}: no run of this script to report"):
        config = json.loads((folder / "config.json").read_text())
        lines = read_rows(folder / "metrics.csv")
        rows = [{name: float(row[name]) if row[name] else None for name in METRICS} for row in lines]
        missing = {"strategy", "weighting", "momentum_decay", "seed", "data"} - set(config)
        refuse(missing or not rows, f"lacks {', '.join(sorted(missing)) or 'rows'}")
    return argparse.Namespace(folder=folder, config=config, rows=rows)


def curve(run, name="fid"):
    """[(step, seconds, value), ...] of what was measured under that name."""
    return [(row["step"], row["seconds"], row[name]) for row in run.rows if row[name] is not None]


def reach(points, target):
    """(step, seconds) where the line through points, a curve, first falls to target, else None."""
    for before, point in zip([points[0], *points] if points else [], points):
        if point[2] <= target:
            share = (before[2] - target) / (before[2] - point[2]) if before[2] > point[2] else 0.0
            return tuple(a + share * (b - a) for a, b in zip(before[:2], point[:2]))
    return None


def group_by_setting(runs):
    """{name: runs that differ in FREE alone}, a setting, named by how it differs from the first run."""
    named, groups = FREE | {"strategy", "weighting", "momentum_decay"}, {}
    for run in runs:
        config, name = run.config, run.config["strategy"]
        if config["weighting"] != "auto":
            name += f" + {config['weighting']} weights".replace("none", "no")
        name += " + momentum decay" * config["momentum_decay"]
        changed = {key: value for key, value in config.items() if str(value) != str(runs[0].config.get(key))}
        name += "".join(f", {key} {value}" for key, value in changed.items() if key not in named)
        groups.setdefault(name, []).append(run)
    return groups


def report(folders, out):
    """Print a Markdown table of the runs, a row a setting, the first the baseline; draw two pictures."""
    runs = [read_run(Path(folder)) for folder in folders]
    measured = [run for run in runs if "features" in run.config]
    for names, some in (("data",), runs), (FID_SETTINGS, measured):
        for name, run in itertools.product(names, some):
            one, two = some[0].config.get(name), run.config.get(name)
            refuse(one != two, f"--report: {name} is {one} in {some[0].folder} but {two} in {run.folder}")
    fid = measured[0].config["features"].split(", crc32")[0] if measured else "FID"
    groups = group_by_setting(runs)
    # Where did each first reach the baseline's last FID? A run is held against the baseline with its seed,
    # which had the same first weights, images and noise, or, where there is none, against their mean.
    curves = {run.config["seed"]: curve(run) for run in next(iter(groups.values()))}
    goals = {seed: (ps[-1][2], *reach(ps, ps[-1][2])) for seed, ps in curves.items() if ps}
    mean_goal = tuple(map(statistics.fmean, zip(*goals.values())))

    def row(run):
        goal, points, nothing = goals.get(run.config["seed"], mean_goal), curve(run), [(None,) * 3]
        last = [(curve(run, name) or nothing)[-1][2] for name in ("val_mse", "val_vlb", "fid")]
        best = min((value for *_, value in points), default=None)
        reached = (goal and reach(points, goal[0])) or (None, None)
        ratios = [theirs / own if own else None for theirs, own in zip(goal[1:], reached)] or (None, None)
        return [run.rows[-1]["step"], run.rows[-1]["seconds"], *last, best, *reached, *ratios]

    def cell(values):
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        three = statistics.fmean(known), min(known), max(known)
        mean, low, high = (f"{v:.4g}" if abs(v) < 1000 else f"{v:.0f}" for v in three)
        spread = f" ({low}..{high})" if low != high else ""
        return mean + spread + (f" in {len(known)} of {len(values)}" if len(known) < len(values) else "")

    print(f"| {REPORT.format(fid.replace('|', '/'))} |")
    print("|---" * len(REPORT.split("|")) + "|")
    for name, members in groups.items():
        print(" | ".join([f"| {name}", str(len(members)), *map(cell, zip(*map(row, members)))]) + " |")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("\nno pictures without matplotlib: pip install matplotlib")
    pictures = {"methods.png": draw_methods} | ({"curves.png": draw_curves} if any(map(curve, runs)) else {})
    figures = {name: Figure((12, 6), dpi=100, layout="constrained") for name in pictures}
    for name, draw in pictures.items():
        draw(figures[name], groups, fid)
    folder = new_folder(out, Path("runs") / "report", "methods.png")
    for name, figure in figures.items():
        write_whole(folder / name, figure.savefig)
    print(f"\n{' and '.join(pictures)} in {folder}")


def draw_curves(figure, groups, fid):
    """FID over steps and over seconds: each setting's mean a line, its runs dots, the baseline black."""
    axes = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(groups.items()):
        points, color = list(itertools.chain(*map(curve, runs))), f"C{number - 1}" if number else "black"
        at_step = [[p for p in points if p[0] == step] for step in sorted({p[0] for p in points})]
        means = [[statistics.fmean(x) for x in zip(*ps)] for ps in at_step if len(ps) == len(runs)]
        style = {"color": color, "label": name, "linestyle": "--" if number > 10 else "-"}
        for column, axis in enumerate(axes):
            axis.plot([p[column] for p in points], [p[2] for p in points], ".", color=color, alpha=0.4)
            axis.plot([p[column] for p in means], [p[2] for p in means], **style)
            if not number and means:
                axis.axhline(means[-1][2], color=color, linestyle=":")
    for axis, label in zip(axes, ("step", "seconds of training")):
        axis.set(xlabel=label, yscale="log")
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel(fid)
    axes[1].legend()


def draw_methods(figure, groups, fid):
    """P(t) and w(t) of the static methods, P(t) of the curriculum as it moves and as an adaptive run drew."""
    runs = list(itertools.chain(*groups.values()))
    args = argparse.Namespace(**runs[0].config)
    T, ab = args.timesteps, GaussianDiffusion(args.schedule, args.timesteps).alphas_cumprod

    def built(strategy, weighting="none"):
        args.strategy, args.weighting = strategy, weighting
        return build_strategy(args, ab, 1)

    lines = {"T P(t), static": {name: built(name)[0].probs for name in ("uniform", "logit-normal", "speed")}}
    weightings = [name for name in WEIGHTINGS[1:] if T > 2 or name != "change-aware"]
    lines["w(t), with mean 1 under uniform t"] = {name: built("uniform", name)[1] for name in weightings}
    curriculum = built("curriculum")[0]
    moved = lines["T P(t), curriculum"] = {}
    for part in range(5):
        curriculum.sample(ab[:1], part * args.steps / 4)
        moved[f"at {25 * part}% of the steps"] = curriculum.probs
    drawn = lines["T P(t), an adaptive run"] = {}
    adaptive = [run.folder / "checkpoint.pt" for run in runs if run.config["strategy"] == "adaptive"]
    for path in [path for path in adaptive if path.is_file()][:1]:
        counts = load_checkpoint(path)["drawn"][None].float()
        for part, shares in enumerate(F.adaptive_avg_pool2d(counts, (5, min(T, 50)))[0]):
            if shares.any():
                drawn[f"drawn from {20 * part}% to {20 * part + 20}%"] = shares
    for axis, (title, named) in zip(figure.subplots(2, 2).flat, lines.items()):
        for name, values in named.items():
            axis.plot((torch.arange(len(values)) + 0.5) * T / len(values), values / values.mean(), label=name)
        axis.set(title=title, xlabel="t", ylim=(0, None))
        axis.grid(alpha=0.3)
        if named:
            axis.legend()


# 9 Command line ---------------------------------------------------------------------------------------------

# What differs by data set. digits: the least that draws legible digits on two CPU cores in five minutes;
# cifar10: the adaptive sampler's authors', but for their quad schedule; the others follow from these two.
# fmt: off
PER_DATASET = ("image_size", "patch", "width", "mults", "num_blocks", "attention", "dropout",
               "steps", "batch_size", "lr", "warmup", "ema_decay", "eval_every", "flip")
DATASETS = {
    "digits":        (16, 2,  48, [1, 1],       1, [4],  0.0,   1_600, 128, 2e-3,   100, 0.998,    400, False),
    "mnist":         (28, 1,  64, [1, 2, 2],    2, [7],  0.0,  20_000, 128, 1e-3,   500, 0.999,  1_000, False),
    "fashion-mnist": (28, 1,  64, [1, 2, 2],    2, [7],  0.0,  20_000, 128, 1e-3,   500, 0.999,  1_000, True),
    "cifar10":       (32, 1, 128, [1, 2, 2, 2], 2, [16], 0.1, 100_000, 128, 2e-4, 5_000, 0.9999, 5_000, True),
    "celeba":        (64, 1, 128, [1, 2, 2, 2], 2, [16], 0.1, 200_000,  64, 1e-4, 5_000, 0.9999, 5_000, True),
    "folder":        (32, 1, 128, [1, 2, 2, 2], 2, [16], 0.1, 100_000, 128, 2e-4, 5_000, 0.9999, 5_000, True),
}
# fmt: on
CHANGEABLE = {"device", "data_dir", "fid_features", "amp", "compile", "lr", "grad_clip"}  # beside --resume
COUNT, SHARE = "int [1, 1e9]", "[0, 1)"
# flag: (what it takes, its default, help). No default: that of the data set, of other flags, or off.
# A title alone begins a group of --help.
FLAGS = {
    "method": None,
    "--strategy": (STRATEGIES, "uniform", "how timesteps are drawn"),
    "--weighting": (WEIGHTINGS, "auto", "loss weights; auto: change-aware for speed, else none"),
    "--momentum-decay": ("store_true", False, "lower beta1 and lr as training goes on"),
    "--speed-k": ("[1, 1e6]", 5.0, "SpeeD: t < tau is drawn k times as often"),
    "--speed-tau": (COUNT, None, "SpeeD: 1..T (default: the number of t with alphas_cumprod >= 0.0069)"),
    "--speed-lam": ("[0.5, 1]", 0.6, "change-aware weights lie in [1 - lam, lam]"),
    "--curriculum-mu": ("[0, 1]", 0.3, "curriculum: centre of the Gaussian, in units of T"),
    "--curriculum-sigma": ("[1e-3, 1e3]", 0.5, "curriculum: its width, in units of T"),
    "--adaptive-every": (COUNT, 40, "adaptive: steps between updates of the policy"),
    "--adaptive-selected": (COUNT, 3, "adaptive: timesteps that make the reward, |S|"),
    "--adaptive-queue": ("int [3, 1e5]", 20, "adaptive: probes that S is chosen from"),
    "--adaptive-probe": (COUNT, 100, "adaptive: timesteps a probe measures; T or more for all"),
    "--adaptive-lr": ("(0, 10]", 1e-2, "adaptive: learning rate of the policy"),
    "--adaptive-entropy": ("[0, 1e3]", 1e-2, "adaptive: weight of the policy's entropy"),
    "data": None,
    "--dataset": (tuple(DATASETS), "digits", "digits are rendered here, folder is your own images"),
    "--data-dir": ("name", "data", "where the images are, or are downloaded to"),
    "--image-size": ("int [4, 1024]", None, "side of the square images"),
    "--flip": (argparse.BooleanOptionalAction, None, "mirror half of the training images"),
    "diffusion and model": None,
    "--schedule": (("linear", "cosine", "quad"), "linear", "how fast the noise grows"),
    "--timesteps": ("int [1, 1e5]", 1000, "T"),
    "--width": ("int [2, 4096]", None, "channels of the first level"),
    "--mults": ("int [1, 64]", None, "channels of each level, in units of width"),
    "--num-blocks": ("int [1, 16]", None, "residual blocks of a level"),
    "--attention": (COUNT, None, "feature map sides with attention; no value: none"),
    "--dropout": (SHARE, None, "in the residual blocks"),
    "--patch": ("int [1, 64]", None, "pixel-unshuffle factor in front of the U-Net"),
    "training": None,
    "--steps": (COUNT, None, "training steps"),
    "--batch-size": ("int [1, 1e6]", None, "images a step, of all processes together"),
    "--lr": ("(0, 100]", None, "learning rate of AdamW, constant after the warm-up"),
    "--beta1": (SHARE, 0.9, "AdamW's momentum"),
    "--warmup": (COUNT, None, "steps to the full learning rate"),
    "--ema-decay": (SHARE, None, "of the weight average that is evaluated and sampled"),
    "--grad-clip": ("(0, 1e6]", 1.0, "largest gradient norm"),
    "--seed": ("int [0, 2147483647]", 0, "of model, order, noise and timesteps, not of the digits"),
    "--eval-every": (COUNT, None, "steps between measurements, samples and checkpoints"),
    "--checkpoint-every": (COUNT, None, "steps between further checkpoints (default: --eval-every)"),
    "--device": ("name", None, "cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"),
    "--amp": (("auto", "off", "bf16", "fp16"), "auto", "auto: bf16 or fp16 on a GPU, off on a CPU"),
    "--compile": (("auto", "off", "on"), "auto", f"auto: on a GPU for {COMPILE_FROM} steps or more"),
    "sampling": None,
    "--method": (("ddim", "ddpm"), "ddim", "ddpm visits every timestep"),
    "--sampling-steps": (COUNT, None, "timesteps ddim visits (default: 50, or T if that is less)"),
    "--eta": ("[0, 1]", 0.0, "noise of ddim: 0 none, 1 as much as ddpm"),
    "FID": None,
    "--fid-samples": ("int [2, 1e6]", None, "measure FID at the end, on so many samples: more than features"),
    "--fid-every": (COUNT, None, "measure it every so many steps, too"),
    "--fid-features": ("name", None, "TorchScript file, images in 0..255 to features; runs code: trust it"),
    "files": None,
    "--out": ("name", None, "folder of the results, new or empty (default: runs/DATASET-STRATEGY...)"),
    "--resume": ("name", None, "go on with the run in this folder, with its own settings"),
    "--generate": (COUNT, None, "write so many samples of --checkpoint as PNG files, train nothing"),
    "--checkpoint": ("name", None, "the checkpoint to generate from"),
    "--report": ("name", None, "compare runs in a table, the first being the baseline"),
}


def within(interval):
    """An argparse type: a number in an interval such as "[0, 1)", a whole one in "int [0, 9]"; never nan."""
    kind, ends = (int, interval[4:]) if interval.startswith("int") else (float, interval)
    low, high = (float(end) for end in ends[1:-1].split(","))

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low < value < high or (value, ends[0]) == (low, "[") or (value, ends[-1]) == (high, "]"):
                return value
        raise argparse.ArgumentTypeError(
            f"must be a {'whole ' * (kind is int)}number in {ends}, not {text!r}"
        )

    return parse


def setting(flag):
    return flag[2:].replace("-", "_")


def make_parser():
    """A parser of FLAGS. Its result has only what is given."""
    options = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser("speedup_diffusion.py", description=__doc__.split("\n")[0], **options)
    parser.error, group = functools.partial(refuse, True), parser  # a UserError, not its own exit
    for flag, row in FLAGS.items():
        if row is None:
            group = parser.add_argument_group(flag)
            continue
        kind, default, text = row
        if setting(flag) in PER_DATASET:
            values = {}
            for dataset, defaults in DATASETS.items():
                values.setdefault(str(defaults[PER_DATASET.index(setting(flag))]), []).append(dataset)
            default = "; ".join(f"{value} for {', '.join(names)}" for value, names in values.items())
        text += "" if default is None else f" (default: {default})"
        if isinstance(kind, tuple):
            group.add_argument(flag, choices=kind, help=text)
        elif kind in ("store_true", argparse.BooleanOptionalAction):
            group.add_argument(flag, action=kind, help=text)
        else:
            nargs = {"--mults": "+", "--attention": "*", "--report": "+"}.get(flag)
            kind = str if kind == "name" else within(kind)
            group.add_argument(flag, type=kind, nargs=nargs, metavar="X", help=text)
    return parser


def usable_device(name, amp):
    """The device of that name, or the best one where name is None. UserError if this machine lacks it."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    refuse(not re.fullmatch(r"cpu|cuda(:\d+)?", name), f"--device {name}: use cpu, cuda or cuda:N")
    gpus, here = torch.cuda.device_count(), LOCAL_PROCESSES
    refuse(here > 1 and ":" in name, f"--device {name}: torchrun gives each process its own GPU; use cuda")
    needed = 0 if name == "cpu" else max(int(name[5:] or 0) + 1, here)
    refuse(needed > gpus, f"--device {name}: torch sees {gpus} GPUs, this needs {needed}; use fewer, or cpu")
    if name == "cuda" and here > 1:
        torch.cuda.set_device(LOCAL_RANK)
    refuse(name == "cpu" and amp == "fp16", "--amp fp16 needs a GPU: use bf16 or off on a CPU")
    return name


def parse_args(argv):
    """(settings, with the defaults filled in; the names that were given). UserError where they clash."""
    given = vars(make_parser().parse_args(argv))
    for name, value in given.items():
        refuse(value in ("", [""]), f"--{name.replace('_', '-')} needs a name")
    defaults = {setting(flag): row[1] for flag, row in FLAGS.items() if row}
    args = argparse.Namespace(**defaults | given)

    def refuse_beside(flag, allowed, why):
        others = ", ".join("--" + name.replace("_", "-") for name in sorted(set(given) - allowed - {flag}))
        refuse(flag in given and others, f"--{flag} {why}: drop {others}")

    refuse_beside("resume", CHANGEABLE, "goes on with the run's own settings")
    sampling = {"checkpoint", "out", "method", "sampling_steps", "eta", "seed", "batch_size"}
    refuse_beside("generate", sampling | {"device", "amp", "compile"}, "trains nothing")
    refuse_beside("report", {"out"}, "trains nothing")
    refuse(("generate" in given) != ("checkpoint" in given), "--generate N and --checkpoint FILE go together")
    many = PROCESSES > 1 and given.keys() & {"generate", "report"}
    refuse(many, "torchrun is for training: start this one without")
    unused = args.method == "ddpm" and given.keys() & {"sampling_steps", "eta"}
    refuse(unused, "--method ddpm visits every timestep with eta 1: drop --sampling-steps and --eta")
    if not args.resume and not args.report:
        args.device = usable_device(args.device, args.amp)
    with explained(f"--out {args.out}"):
        taken = args.out and os.path.exists(args.out) and os.listdir(args.out)
    refuse(taken, f"--out {args.out} is not empty: name a new folder")
    trains = not (args.resume or args.generate or args.report)
    return training_settings(args, given) if trains else args, set(given)


def training_settings(args, given):
    """args with the defaults of their data set, for a run that begins. UserError where they clash."""
    own = dict(zip(PER_DATASET, DATASETS[args.dataset]))
    args = argparse.Namespace(**vars(args) | own | given | {"device": args.device})
    T, probed = args.timesteps, min(args.timesteps, args.adaptive_probe)
    args.checkpoint_every = args.checkpoint_every or args.eval_every
    args.sampling_steps = args.sampling_steps or min(50, T)
    sides = [args.image_size // args.patch // 2**level for level in range(len(args.mults))]
    if "attention" not in given:  # the default is for the default sides
        args.attention = [side for side in args.attention if side in sides] or sides[-1:]
    refuse(args.dataset == "folder" and "data_dir" not in given, "--dataset folder needs --data-dir FOLDER")
    too_large = args.dataset == "digits" and args.image_size > 128
    refuse(too_large, f"--image-size {args.image_size}: the digits are drawn up to 128")
    refuse(args.speed_tau and args.speed_tau > T, f"--speed-tau {args.speed_tau} must lie in 1..{T}")
    change_aware = args.weighting == "change-aware" or (args.strategy, args.weighting) == ("speed", "auto")
    refuse(change_aware and T < 3, f"--timesteps {T}: change-aware weights need at least 3 timesteps")
    too_many = args.strategy == "adaptive" and args.adaptive_selected > probed
    refuse(too_many, f"--adaptive-selected {args.adaptive_selected} exceeds the {probed} timesteps probed")
    unused = given.keys() & {"fid_every", "fid_features"} and not args.fid_samples
    refuse(unused, "--fid-every and --fid-features need --fid-samples N")
    missing = args.fid_features and not os.path.isfile(args.fid_features)
    refuse(missing, f"--fid-features {args.fid_features}: no such file")
    refuse(args.sampling_steps > T, f"--sampling-steps {args.sampling_steps} must lie in 1..{T}")
    refuse(args.width % 2, f"--width {args.width} must be even")
    shrink = args.patch * 2 ** (len(args.mults) - 1)
    refuse(args.image_size % shrink, f"--image-size {args.image_size} must divide by {shrink}")
    refuse(set(args.attention) - set(sides), f"--attention {args.attention}: the sides are {sides}")
    return args


def resume(args, given):
    """Go on with the run in args.resume, which rank 0 alone needs to have."""
    folder, read = Path(args.resume), [None]
    if RANK == 0:
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        with explained(f"{folder}: no metrics.csv of this script"):
            lines = read_rows(folder / "metrics.csv")
            rows = [row for row in lines if int(row["step"]) <= checkpoint["step"]]
        read = [(checkpoint, rows)]
    if TORCHRUN:
        distributed.broadcast_object_list(read, device=torch.device("cpu"))
    checkpoint, rows = read[0]
    settings = vars(args) | checkpoint["args"] | {name: vars(args)[name] for name in given & CHANGEABLE}
    settings["device"] = usable_device(settings["device"], settings["amp"])
    finished = rows and int(rows[-1]["step"]) == settings["steps"]
    refuse(finished, f"--resume {folder}: has done all of its {settings['steps']} steps")
    train(argparse.Namespace(**settings), folder, checkpoint, rows)


def main(argv=None) -> int:
    """Exit status: 0; 2 for what the user can mend; 1 for a failing disk or a diverging run; 128 + signal."""
    try:
        args, given = parse_args(argv)
        if args.report:
            report(args.report, args.out)
        elif args.generate:
            generate(args)
        else:
            join_processes()
            if args.resume:
                resume(args, given)
            else:
                train(args)
            if TORCHRUN:  # after a failure nothing is waited for
                average_over_processes(torch.zeros(()))  # rank 0's last figures
                distributed.destroy_process_group()
        return 0
    except UserError as error:
        if LOCAL_RANK == 0:  # the others on this machine met the same
            print("speedup_diffusion.py: error:", *str(error).splitlines(), file=sys.stderr)
        return 2
    except (OSError, FloatingPointError) as error:  # such as a full disk
        problem = str(error) if RANK == 0 or isinstance(error, OSError) else ""
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            problem = "out of memory: lower --batch-size, --width or --image-size"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            problem = f"torch.compile does not work here ({one_line(error)}): use --compile off"
        elif PROCESSES > 1 and any(text in str(error) for text in ("gloo", "NCCL", "onnection")):
            problem = f"rank {RANK} lost another process, whose message says why ({one_line(error)})"
        else:
            raise
    except KeyboardInterrupt as stop:
        number, kept = stop.args or (signal.SIGINT, "")
        if RANK == 0:
            print(f"\nstopped{kept}", file=sys.stderr)
        return 128 + number
    if problem:
        print("speedup_diffusion.py:", *problem.splitlines(), file=sys.stderr)
    return 1


if __name__ == "__main__":
    status = main()
    if TORCHRUN and status:
        sys.stdout.flush()
        os._exit(status)  # the end of an interpreter could wait for NCCL, which waits for the other processes
    sys.exit(status)
