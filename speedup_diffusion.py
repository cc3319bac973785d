#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Train a small diffusion model faster: four published accelerations in one file, to read, run and copy.

    python speedup_diffusion.py --strategy adaptive                     # rendered digits, no download, no GPU
    python speedup_diffusion.py --strategy speed --dataset cifar10      # SpeeD: its timesteps and its weights
    python speedup_diffusion.py --strategy curriculum --momentum-decay  # the two of the consistency paper
    python speedup_diffusion.py --resume runs/digits-speed              # go on from the last checkpoint
    python speedup_diffusion.py --generate 64 --checkpoint runs/digits-speed/checkpoint.pt
    python speedup_diffusion.py --report runs/digits-uniform runs/digits-speed  # which is faster, by how much
    torchrun --nproc_per_node=8 speedup_diffusion.py --dataset cifar10  # eight GPUs, --batch-size over all of them

Contents: 1 Diffusion (schedules, q_sample, DDPM and DDIM)   2 Accelerations (timestep samplers, loss weights,
momentum decay)   3 U-Net   4 Data   5 Evaluation and pictures   6 Training   7 Report   8 Command line

Throughout: T is the number of timesteps, t in 0..T-1, t = 0 the least noisy; `alphas_cumprod` is [T];
images are float in [-1, 1], [B, C, H, W]; x0 is a clean image, x_t a noisy one, eps (epsilon) the noise in it.
"""

import argparse
import collections
import contextlib
import copy
import csv
import datetime
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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# torchvision is imported where it is used: it takes as long as torch, and a wrong flag should be known at once.

# torchrun starts the processes and numbers them: over all machines, and on each.
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, LOCAL_RANK = int(TORCHRUN.get("RANK", "0")), int(TORCHRUN.get("LOCAL_RANK", "0"))
PROCESSES, LOCAL_PROCESSES = int(TORCHRUN.get("WORLD_SIZE", "1")), int(TORCHRUN.get("LOCAL_WORLD_SIZE", "1"))

# ---------------------------------------------------------------------------------------------------------
# 1 Diffusion
# ---------------------------------------------------------------------------------------------------------


class GaussianDiffusion:
    """The forward process q(x_t | x0) = N(sqrt(ab_t) x0, (1 - ab_t) I) and the two ways back, DDPM and DDIM.

    schedule: "linear" (beta from 1e-4 to 0.02, Ho et al., arXiv:2006.11239) or "quad" (the same ends, linear
    in sqrt(beta)), both times 1000 / T so that fewer timesteps end as noisy; "cosine" (Nichol and Dhariwal,
    arXiv:2102.09672). No beta exceeds 0.999. device holds the tables, and samples are drawn there.
    ValueError: an unknown schedule, or timesteps < 1.

    betas, alphas_cumprod: float32 [T].
    vlb_coefficients: float32 [T], c_t = beta_t / (2 alpha_t (1 - ab_t) ln 2). For epsilon prediction with the
    fixed variance beta_t, c_t times the epsilon-MSE (mean over dimensions) is the part of the variational
    bound's term at t that depends on the model, in bits per dimension. At t = 0 this is the KL to a Gaussian
    of variance beta_0, not the discretised likelihood of the DDPM paper.
    """

    def __init__(self, schedule="linear", timesteps=1000, device="cpu"):
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        low, high = 1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps
        if schedule == "linear":
            betas = torch.linspace(low, high, timesteps, dtype=torch.float64)
        elif schedule == "quad":
            betas = torch.linspace(low**0.5, high**0.5, timesteps, dtype=torch.float64) ** 2
        elif schedule == "cosine":
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            ab = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - ab[1:] / ab[:-1]
        else:
            raise ValueError(f"schedule must be linear, cosine or quad, got {schedule!r}")
        betas = betas.clamp(max=0.999).to(device)
        ab = (1 - betas).cumprod(0)
        self.timesteps = timesteps
        self.betas, self.alphas_cumprod = betas.float(), ab.float()
        self.vlb_coefficients = (betas / (2 * (1 - betas) * (1 - ab) * math.log(2))).float()
        # float64, because 1 - ab loses digits near t = 0; the appended 1 makes index -1 mean x0 itself.
        self._ab = torch.cat([ab, ab.new_ones(1)])

    def _ab_at(self, t, x):
        return self._ab[t].view(-1, *[1] * (x.dim() - 1))

    def q_sample(self, x0, t, noise):
        """x_t [B, C, H, W] from x0, noise (same shape) and t int64 [B]."""
        ab = self._ab_at(t, x0)
        return ab.sqrt().to(x0.dtype) * x0 + (1 - ab).sqrt().to(x0.dtype) * noise

    def predict_x0(self, x_t, t, eps):
        """The x0 that x_t and the predicted noise eps imply; t int64 [B]. Not clipped."""
        ab = self._ab_at(t, x_t)
        return (x_t - (1 - ab).sqrt().to(x_t.dtype) * eps) / ab.sqrt().to(x_t.dtype)

    def ddim_step(self, x_t, t, t_prev, eps, eta, noise, clip=True):
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

    def ddpm_step(self, x_t, t, eps, noise, clip=True):
        """One step t -> t - 1 of DDPM with the posterior's own variance ("fixed-small"), arXiv:2006.11239.

        q(x_{t-1} | x_t, x0) is what DDIM's step with eta = 1 draws from, so there is nothing else to write.
        """
        return self.ddim_step(x_t, t, t - 1, eps, 1.0, noise, clip)

    @torch.no_grad()
    def sample(self, model, shape, method="ddim", steps=50, eta=0.0, generator=None):
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


# ---------------------------------------------------------------------------------------------------------
# 2 Accelerations
#
# A timestep sampler decides which t are trained on, a loss weight how much each counts; any sampler goes with
# any weight. Every sampler has `probs` [T], its present distribution (sum 1), and `sample(x0, step)`, int64
# timesteps [B] on x0's device, drawn from torch's global generator. Each piece needs torch and math alone.
# ---------------------------------------------------------------------------------------------------------


class UniformSampler:
    """Every timestep equally often: the DDPM baseline, P(t) = 1 / T."""

    def __init__(self, timesteps):
        self.probs = torch.full((timesteps,), 1 / timesteps)

    def sample(self, x0, step):
        self.probs = self.probs.to(x0.device)
        return torch.randint(len(self.probs), (len(x0),), device=x0.device)


class LogitNormalSampler:
    """t = floor(T sigmoid(z)), z ~ N(0, 1): the middle more often than the ends (SD3, arXiv:2403.03206)."""

    def __init__(self, timesteps):
        edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        self.probs = torch.special.ndtr(torch.logit(edges)).diff().float()

    def sample(self, x0, step):
        self.probs = self.probs.to(x0.device)
        u = torch.sigmoid(torch.randn(len(x0), device=x0.device))
        return (u * len(self.probs)).long().clamp(max=len(self.probs) - 1)


class SpeeDSampler:
    """SpeeD's asymmetric sampling: the last timesteps hardly differ from pure noise, so draw them k times less.

        P(t) = k / (T + tau (k - 1))  for t < tau,    1 / (T + tau (k - 1))  for t >= tau

    Wang et al., "A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model Training",
    arXiv:2405.17403 (CVPR 2025). Formula, k = 5 and tau = 700 (linear schedule, T = 1000): authors' code.
    tau=None, our rule for any schedule: the number of timesteps with alphas_cumprod >= 0.0069. That is 700 on
    the linear one. SpeeD is this sampler with `change_aware_weights`.
    Differs from the authors' code: that also draws half of each batch as the mirror image of the other half
    about a step near 642, which changes P(t); left out here.
    Cost: none. alphas_cumprod: [T]. ValueError: k < 1, or tau outside 1..T.
    """

    def __init__(self, alphas_cumprod, k=5.0, tau=None):
        T = len(alphas_cumprod)
        tau = max(1, int((alphas_cumprod >= 0.0069).sum())) if tau is None else tau
        if not k >= 1 or not 1 <= tau <= T:
            raise ValueError(f"k must be at least 1 and tau lie in 1..{T}, got k = {k}, tau = {tau}")
        before_tau = torch.arange(T, device=alphas_cumprod.device) < tau
        self.probs = torch.where(before_tau, k, 1.0) / (T + tau * (k - 1))

    def sample(self, x0, step):
        self.probs = self.probs.to(x0.device)
        return torch.multinomial(self.probs, len(x0), replacement=True)


class CurriculumSampler:
    """Curriculum timestep schedule (CLTS): begin with all timesteps, then train the easy, noisy ones less.

        p_n(t) = (1 - gamma_n) / T + gamma_n N(t; mu T, sigma T),    gamma_n = min(1, n / total_steps)

    with the Gaussian normalised over 0..T-1 and n the training step. Xu et al., "Towards Faster Training of
    Diffusion Models: An Inspiration of A Consistency Phenomenon", arXiv:2404.07946. The idea is in its
    abstract; no code of the authors was found. The formula and mu = 0.3 (best in the paper's ablation) come
    from third-party readings; sigma = 0.5 from a single one: the paper's value is not known to us. That gamma
    reaches 1 at the end of the run is our choice.
    SpeeD's repository has a CLTS baseline whose exponent, -(t - mu)^2 / 2 * T^2, makes the Gaussian a spike at
    one t; that form is not used here.
    Cost: none. `probs` is the distribution of the last step sampled. ValueError: sigma <= 0, total_steps < 1.
    """

    def __init__(self, timesteps, total_steps, mu=0.3, sigma=0.5):
        if not sigma > 0 or total_steps < 1:
            raise ValueError(f"sigma must be above 0 and total_steps at least 1, got {sigma}, {total_steps}")
        t = torch.arange(timesteps, dtype=torch.float64) / timesteps
        self.gaussian = torch.softmax(-0.5 * ((t - mu) / sigma) ** 2, 0).float()
        self.probs = torch.full((timesteps,), 1 / timesteps)
        self.total_steps = total_steps

    def sample(self, x0, step):
        self.gaussian = self.gaussian.to(x0.device)
        gamma = min(1.0, step / self.total_steps)
        self.probs = (1 - gamma) / len(self.gaussian) + gamma * self.gaussian
        return torch.multinomial(self.probs, len(x0), replacement=True)


def average_over_processes(tensor):
    """In place, the mean of tensor over the processes that torch.distributed joined; unchanged where it did not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


class AdaptiveSampler:
    """Adaptive non-uniform sampling: a policy learns which t lower the bound most. With `average_over_processes`.

    A network pi(x0) gives (a, b) of a Beta distribution for each image; u ~ Beta(a, b), t = round(u (T - 1)).
    Every `every` training steps, on the batch just drawn, with Delta^t = L_t before the model's update minus
    L_t after it (L_t: the bound's term at t in bits per dimension):
      1. Delta^t of ONE image at `probe` evenly spaced timesteps, and their sum, enter a queue of `queue` rows;
      2. Delta^t of EVERY image at the `selected` timesteps S gives its reward, sum over S of Delta^t;
      3. REINFORCE: loss = -mean(log p(u_i) reward_i) - entropy mean(H_i), one Adam step of the policy;
      4. S becomes the `selected` timesteps whose column of the queue best predicts the sum (largest r^2).
    Use: t = sampler.sample(x0, step); before_update(model, step); optimizer.step(); after_update(model).

    Kim et al., "Adaptive Non-Uniform Timestep Sampling", arXiv:2411.09998 (CVPR 2025). Network, defaults
    (every 40 steps, |S| = 3, queue 20, Adam with lr 1e-2, gradient norm 1, entropy 1e-2): authors' code.
    Differs from the authors' code: before and after share x_t and noise, so that Delta shows the update and
    not the draw; step 1 probes 100 timesteps and not all T (probe=T does); r^2 ranks as their F score does;
    Delta^t is vlb_coefficients[t] times the fall of the epsilon-MSE, which is the same when the variance is
    fixed to beta_t; S may change from the third probe on; adaptive pooling, so that images need not be 32x32;
    a share `floor` of u is drawn uniformly, so that no t dies out however sure of itself the policy becomes.
    Cost in image-forwards: 2 (probe + selected B) every `every` steps, beside 3 B a step for training.
    With several processes, joined by torch.distributed, each has its own images; `average_over_processes` keeps
    policy, queue, S and `probs` the same in all. A probe is then the mean over one image of each.

    `probs` is the mixture over the images of the batch of the last policy update. The model, an nn.Module with
    model(x_t, t) -> eps, is measured in eval mode. alphas_cumprod: [T], on the device of the images to come.
    ValueError: fewer timesteps than `selected`, or a number that makes no sense.
    """

    def __init__(
        self,
        alphas_cumprod,
        in_channels,
        every=40,
        selected=3,
        queue=20,
        probe=100,
        lr=1e-2,
        entropy=1e-2,
        floor=0.01,
    ):
        T, device = len(alphas_cumprod), alphas_cumprod.device
        probe = min(probe, T)
        if not 1 <= selected <= probe or every < 1 or queue < 3 or not 0 < floor < 1:
            raise ValueError(
                f"selected must lie in 1..{probe} (probe, or T), every >= 1, queue >= 3, floor in (0, 1)"
            )
        ab = alphas_cumprod.double()
        alphas = ab / torch.cat([ab.new_ones(1), ab[:-1]])
        self.vlb_coefficients = ((1 - alphas) / (2 * alphas * (1 - ab) * math.log(2))).float()
        self.alphas_cumprod, self.every = alphas_cumprod.float(), every
        self.entropy, self.floor = entropy, floor
        layers = []
        for c_in, c_out in ((in_channels, 32), (32, 64), (64, 128)):
            conv = torch.nn.Conv2d(c_in, c_out, 3, padding=1)
            layers += [conv, torch.nn.MaxPool2d(2, ceil_mode=True), torch.nn.ReLU()]  # = pool(relu), cheaper
        layers += [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()]
        for c_in in (128 * 4 * 4, 256):
            layers += [torch.nn.Linear(c_in, 256), torch.nn.ReLU()]
        last = torch.nn.Linear(256, 2)
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, 0.5)  # a = b = softplus(0.5) = 0.974: nearly uniform
        self.policy = torch.nn.Sequential(*layers, last).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)
        self.grid = torch.linspace(0, T - 1, probe, dtype=torch.float64).round().long().to(device)
        self.selected = torch.arange(selected, device=device)
        self.queue, self.filled = torch.zeros(queue, probe, device=device), 0
        self.uniform = self.beta_probs(*torch.ones(2, 1, device=device), T)
        self.probs = self.beta_probs(*F.softplus(last.bias.detach()[:, None]) + 1e-5, T)
        self.probs = self.probs.lerp(self.uniform, floor)
        self._drawn = self._look = None

    @staticmethod
    def beta_probs(a, b, T):
        """[T]: the probability that round(u (T - 1)) is t, u ~ Beta(a_i, b_i), mean over i; a, b [n].

        To 1e-5 for T >= 100. The distribution function of Beta(a, b) is a closed form plus that of
        Beta(a + 1, b + 1), whose density has no poles, so that three Gauss-Legendre nodes a bin will do.
        """
        a, b = a.double()[:, None], b.double()[:, None]
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

        def kernel(u):  # u^a (1 - u)^b / B(a, b)
            return torch.exp(a * u.log() + b * (-u).log1p() - log_beta)

        edges = ((torch.arange(T + 1, dtype=a.dtype, device=a.device) - 0.5) / max(1, T - 1)).clamp(0, 1)
        edges[-1] = 1  # for T = 1
        middle, half = (edges[1:] + edges[:-1]) / 2, edges.diff() / 2
        nodes = ((-(0.6**0.5), 5 / 9), (0.0, 8 / 9), (0.6**0.5, 5 / 9))
        smooth = sum(weight * half * kernel(middle + node * half) for node, weight in nodes)
        closed = kernel(edges) * (b - (a + b) * edges)
        probs = (closed.diff() + (a + b) * (a + b + 1) * smooth) / (a * b)
        probs = probs.clamp(min=0).mean(0)
        return (probs / probs.sum()).float()

    def concentrations(self, x0):
        """(a, b), each [B], of the images' Beta distributions."""
        return (F.softplus(self.policy(x0)) + 1e-5).clamp(max=1e5).unbind(1)

    @torch.no_grad()
    def sample(self, x0, step):
        # u = A / (A + B) with A ~ Gamma(a), B ~ Gamma(b), in logarithms: below 0.1 the draws themselves underflow
        # and torch's Beta returns 1/2. A Gamma(c) draw is a Gamma(c + 1) draw times U^(1/c).
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

    def before_update(self, model, step):
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

    def after_update(self, model):
        """Measure L_t again, with the same x_t and noise; update the policy, the queue and S."""
        if self._look is None:
            return
        (fixed, before), self._look = self._look, None
        delta = torch.nan_to_num(before - self._vlb_terms(model, *fixed), 0.0, 0.0, 0.0)
        probed, rewards = delta[: len(self.grid)], delta[len(self.grid) :]
        self.update_policy(rewards.view(len(self.selected), -1).sum(0))
        self.queue[self.filled % len(self.queue)] = average_over_processes(probed)
        self.filled += 1
        if self.filled >= 3:  # two points always lie on a line
            best = self.most_predictive(self.queue[: self.filled], len(self.selected))
            self.selected = self.grid[best]

    def update_policy(self, reward):
        """One REINFORCE step on the images drawn last; reward [B], larger is better."""
        x0, u = self._drawn
        with torch.enable_grad(), torch.autocast(x0.device.type, enabled=False):
            beta = torch.distributions.Beta(*self.concentrations(x0), validate_args=False)
            floor = torch.full_like(u[:1], self.floor)
            log_prob = torch.logaddexp(beta.log_prob(u) + torch.log1p(-floor), floor.log())
            loss = -(log_prob * reward).mean() - self.entropy * beta.entropy().mean()
            self.optimizer.zero_grad()
            loss.backward()
            for p in self.policy.parameters():
                average_over_processes(p.grad)
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.refresh_probs(x0)

    @torch.no_grad()
    def refresh_probs(self, x0):
        """Set `probs` to the mixture over the images x0."""
        probs = self.beta_probs(*self.concentrations(x0), len(self.probs))
        self.probs = average_over_processes(probs).lerp(self.uniform, self.floor)

    @staticmethod
    def most_predictive(deltas, count):
        """Indices [count], ascending, of the columns of deltas [n, G] most correlated with the row sums."""
        x = deltas.double()
        y = x.sum(1)
        x, y = x - x.mean(0), y - y.mean()
        r2 = (x * y[:, None]).sum(0) ** 2 / (x.square().sum(0) * y.square().sum())
        return torch.nan_to_num(r2, -1.0).topk(count).indices.sort().values

    def state_dict(self):
        own = {name: getattr(self, name) for name in ("queue", "filled", "selected", "probs")}
        return own | {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("queue", "selected", "probs"):
            setattr(self, name, state[name].to(self.grid.device, copy=True))
        self.filled = state["filled"]


def change_aware_weights(alphas_cumprod, lam=0.6):
    """SpeeD's change-aware weighting, [T] in [1 - lam, lam]: timesteps where the noise changes fast count more.

        g = gradient of (1 - alphas_cumprod) along t, rescaled linearly so that min g -> 1 - lam, max g -> lam

    Wang et al., arXiv:2405.17403. lam = 0.6 from the authors' code, which sets the weight to 1 for t >= tau;
    this is the formula as third parties read it, on all t. Raw: pass the result through `normalize_weights`.
    alphas_cumprod: [T], T >= 3. ValueError: lam outside [0.5, 1], or T < 3.
    """
    if not 0.5 <= lam <= 1 or len(alphas_cumprod) < 3:
        raise ValueError(f"lam must lie in [0.5, 1] and T be at least 3, got {lam}, {len(alphas_cumprod)}")
    g = torch.gradient(1 - alphas_cumprod.double())[0]
    g = (g - g.min()) / (g.max() - g.min())
    return ((1 - lam) + (2 * lam - 1) * g).to(alphas_cumprod.dtype)


def min_snr_weights(alphas_cumprod, gamma=5.0):
    """Min-SNR-gamma for epsilon prediction, [T]: min(SNR, gamma) / SNR, SNR = ab / (1 - ab), arXiv:2303.09556."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


def p2_weights(alphas_cumprod, k=1.0, gamma=1.0):
    """P2 weighting, [T]: 1 / (k + SNR)^gamma, SNR = ab / (1 - ab), arXiv:2204.00227."""
    return (k + alphas_cumprod / (1 - alphas_cumprod)) ** -gamma


def normalize_weights(weights, probs):
    """weights [T] scaled so that sum(probs * result) = 1, probs [T] being the sampler's.

    The expected weight is then 1 and a learning rate means the same for every sampler and weight. Our choice.
    """
    return weights / (probs.to(weights.device) * weights).sum()


def momentum_decay(progress, beta1=0.9):
    """Momentum decay with learning-rate compensation (MDLRC): (beta1, lr_scale) at progress = n / N in [0, 1].

        beta1(s) = b (1 - s) / ((1 - b) + b (1 - s)),    lr_scale(s) = (1 - b) / (1 - beta1(s)) = 1 - b s

    Large momentum oscillates on a smooth loss surface, so it is lowered as training goes on; lr (1 - beta1)
    stays constant, so that updates are not amplified. Xu et al., arXiv:2404.07946: the idea is in its abstract,
    the compensation and b = 0.9 come from third-party readings; the rule for beta1 is Demon's (Chen et al.,
    arXiv:1910.04952). Write both into the optimiser's param_groups at every step. Cost: none.
    Note that this is a linear decay of the learning rate to 1 - b too. ValueError: beta1 outside [0, 1).
    """
    if not 0 <= beta1 < 1:
        raise ValueError(f"beta1 must lie in [0, 1), got {beta1}")
    left = beta1 * (1 - progress)
    return left / ((1 - beta1) + left), 1 - beta1 * progress


# ---------------------------------------------------------------------------------------------------------
# 3 U-Net
# ---------------------------------------------------------------------------------------------------------


def group_norm(channels):
    """At most 32 groups, of at least 4 channels: one alone would lose the time embedding, a constant to it."""
    return nn.GroupNorm(math.gcd(32, channels, max(1, channels // 4)), channels)


def zero(module):
    """Start at zero, so that the block it ends begins as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """[B, c_in, H, W] and the time embedding [B, emb] -> [B, c_out, H, W]."""

    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb, c_out)
        self.norm2, self.dropout = group_norm(c_out), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


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


class Stage(nn.Module):
    """A residual block, and self-attention after it where attend is true."""

    def __init__(self, c_in, c_out, emb, dropout, attend):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb, dropout)
        self.attention = SelfAttention(c_out) if attend else nn.Identity()

    def forward(self, x, emb):
        return self.attention(self.res(x, emb))


class UNet(nn.Module):
    """DDPM's U-Net: model(x_t [B, C, H, W], t int64 [B]) -> eps [B, C, H, W].

    Level i has width * mults[i] channels and num_blocks residual blocks on the way down, one more on the way
    up, at half the resolution of level i - 1. attention: the resolutions (feature map sides, for square images
    of image_size) with self-attention; unless empty, the middle has it too. patch: images are folded to
    1/patch of their side first (pixel-unshuffle), patch^2 times the channels: coarser, and cheaper.
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

        def stage(c_in, c_out):
            return Stage(c_in, c_out, emb, dropout, attend=size in attention)

        size, channels, skips = image_size // patch, width, [width]
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
        self.middle1 = Stage(channels, channels, emb, dropout, attend=bool(attention))
        self.middle2 = ResBlock(channels, channels, emb, dropout)
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(num_blocks + 1):
                self.up.append(stage(channels + skips.pop(), width * mult))
                channels = width * mult
            if level:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
                size *= 2
        self.norm = group_norm(channels)
        self.head = zero(nn.Conv2d(channels, in_channels * patch**2, 3, padding=1))

    def time_embedding(self, t):
        """Sinusoids [B, width] of t [B]."""
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(
            torch.arange(half, device=t.device) * (-math.log(10_000) / half)
        )
        return torch.cat([angles.cos(), angles.sin()], 1)

    def forward(self, x, t):
        emb = self.time(self.time_embedding(t))
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for block in self.down:
            h = block(h, emb) if isinstance(block, Stage) else block(h)
            skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for block in self.up:
            if isinstance(block, Stage):
                h = block(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = block(F.interpolate(h, scale_factor=2.0))
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)


# ---------------------------------------------------------------------------------------------------------
# 4 Data: every data set becomes one uint8 tensor [N, C, size, size] to train on and one held out
# ---------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """What the user can mend: main prints it as one line and exits with status 2."""


def refuse(condition, message):
    if condition:
        raise UserError(message)


def one_line(error):
    """What an exception says in one line: a traceback's last one, else the first; its kind if it is silent."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in str(error) else 0].strip().rstrip(":.")


def render_digits(count, size=16, seed=0):
    """Digits in Pillow's own font, white on black, at random size, place and angle; the seed fixes them.

    Returns images uint8 [count, 1, size, size] and labels int64 [count].
    """
    rng = random.Random(seed)
    canvas = 4 * size  # drawn four times as large, so that strokes are smooth
    fonts = [ImageFont.load_default(canvas * s / 64) for s in range(50, 73, 3)]
    images, labels = np.empty((count, 1, size, size), np.uint8), np.empty(count, np.int64)
    for i in range(count):
        labels[i] = rng.randrange(10)
        place = [canvas / 2 + rng.uniform(-canvas, canvas) / 20 for _ in "xy"]
        image = Image.new("L", (canvas, canvas))
        ImageDraw.Draw(image).text(place, str(labels[i]), fill=255, font=rng.choice(fonts), anchor="mm")
        image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        images[i, 0] = image.resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(images), torch.from_numpy(labels)


def to_rgb(image):
    """A PIL image of any mode as RGB, upright: the first frame, 16 bits scaled to 8, transparency on white."""
    tags = getattr(image, "tag_v2", {})  # of TIFF: bits per sample, and whether 0 is white
    refuse(image.mode == "F", "floating-point pixels have no known range")
    if deep := image.mode.startswith("I"):  # Pillow itself would clip these to 255
        plain = tags.get(258, (16,)) == (16,) and tags.get(262) != 0 and "transparency" not in image.info
        refuse(not plain, "of grey images with more than 8 bits only plain 16 bits are read")
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_images(open_image, names, size):
    """uint8 [N, C, size, size] from open_image(name) -> PIL image, centre-cropped; C = 1 if all are grey."""

    def read(name):
        try:
            with open_image(name) as image:
                return np.array(ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC))
        except Exception as error:  # Pillow's readers raise many kinds
            problem = f"{name} cannot be read as an image ({one_line(error)})"
            raise UserError(f"{problem}: mend or remove it") from error

    images, grey = torch.empty((len(names), 3, size, size), dtype=torch.uint8), True
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        options = {"unit": "img", "leave": False, "disable": RANK > 0}
        bar = tqdm(pool.map(read, names), "reading images", len(names), **options)
        try:
            for i, pixels in enumerate(bar):
                grey = grey and (pixels == pixels[..., :1]).all()
                images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C the rest is not waited for
    return images[:, :1].clone() if grey else images


def open_file(path):
    """Image.open, but not of what is no file: a pipe would never end."""
    if not path.is_file():
        raise OSError("no file, or a link that leads nowhere")
    # Whatever its name says: an EPS file, for one, would run code.
    return Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"))


def read_folder(folder, size):
    """Every image file below folder, in the order of their paths; of folders linked twice, the first."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def fail(error):
        raise UserError(f"--data-dir {folder}: {error}")

    refuse(not os.path.isdir(folder), f"--data-dir {folder}: no such folder")
    endings, seen, paths = (*IMG_EXTENSIONS, ".gif"), set(), []
    for here, below, files in os.walk(folder, onerror=fail, followlinks=True):
        below.sort()
        if (real := os.path.realpath(here)) in seen:
            below.clear()  # a link that leads back, maybe in a circle
        else:
            seen.add(real)
            paths += [Path(here, name) for name in files if name.lower().endswith(endings)]
    refuse(not paths, f"--data-dir {folder}: no images ({' '.join(endings)}) in it or below it")
    return read_images(open_file, sorted(paths), size)


def load_dataset(name, data_dir, size):
    """(train, held_out), both uint8 [N, C, size, size], on the CPU.

    Held out: the test split where there is one, else the last 5% (at least 256) of a fixed shuffle, so that a
    folder sorted by class is held out evenly. digits are the same for every --seed: runs can be compared.
    """
    if name in ("digits", "folder"):
        images = render_digits(10_240, size)[0] if name == "digits" else read_folder(data_dir, size)
        held_out = max(256, len(images) // 20)
        if len(images) <= held_out:
            raise UserError(f"--data-dir {data_dir}: {len(images)} images, 256 of them held out, are too few")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[order[:-held_out]], images[order[-held_out:]]
    from torchvision import datasets

    kinds = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    try:
        if name == "celeba":
            parts = [datasets.CelebA(data_dir, split=split, download=True) for split in ("train", "test")]
        else:
            parts = [kinds[name](data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, a full disk, a missing gdown, a checksum: torchvision says which
        raise UserError(
            f"{name} is not in {data_dir} and could not be downloaded ({one_line(error)}): put its files there as "
            f"torchvision expects them, or use --dataset folder or digits"
        ) from error
    train, held_out = (read_images(lambda i, part=part: part[i][0], range(len(part)), size) for part in parts)
    return train, held_out


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1], channels_last."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------
# 5 Evaluation and pictures
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, diffusion, images, count=1024):
    """(val_mse, val_vlb) of model on held-out uint8 images, with evenly spaced t and fixed noise.

    val_mse: epsilon-MSE, mean over t. val_vlb: sum over t of vlb_coefficients[t] times the MSE at t, in bits per
    dimension: the part of the variational bound that depends on the model, without its constants.
    """
    device = images.device
    which = torch.arange(count, device=device) % len(images)
    times = torch.linspace(0, diffusion.timesteps - 1, count, dtype=torch.float64).round().long().to(device)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for i, t in zip(which.split(128), times.split(128)):
        x0 = to_float(images[i])
        noise = torch.randn(x0.shape, generator=generator).to(device)
        eps = model(diffusion.q_sample(x0, t, noise), t).float()
        errors.append((eps - noise).square().flatten(1).mean(1))
    errors = torch.cat(errors)
    bound = diffusion.timesteps * (errors * diffusion.vlb_coefficients[times]).mean()
    return errors.mean().item(), bound.item()


def to_uint8(images):
    """float in [-1, 1] -> uint8 0..255, on the CPU: the inverse of to_float. UserError: not finite."""
    refuse(not images.isfinite().all(), "the samples are not finite: the training of this model diverged")
    return (images.cpu() * 127.5 + 127.5).round().clamp(0, 255).byte()


def save_pngs(images, folder, first=0):
    """uint8 [N, C, H, W] as 000000.png, 000001.png ..., numbered from first."""
    from torchvision.transforms.functional import to_pil_image

    for number, image in enumerate(images, first):
        to_pil_image(image).save(folder / f"{number:06d}.png")


def draw_samples(model, diffusion, count, shape, args, seed, title, batch_size=256):
    """Yields count images of shape (C, H, W) in [-1, 1], a batch at a time, as args sample; seed fixes them."""
    generator = torch.Generator().manual_seed(seed)
    # All batches are alike: a model is compiled for one size.
    batch = math.ceil(count / math.ceil(count / batch_size)), *shape
    with tqdm(total=count, unit="img", desc=title, leave=False) as bar:
        while bar.n < count:
            images = diffusion.sample(model, batch, args.method, args.sampling_steps, args.eta, generator)
            yield images[: count - bar.n]
            bar.update(min(batch[0], count - bar.n))


class FrechetDistance:
    """FID by clean-fid: how far the features of samples are from those of the training images, as Gaussians.

    features: None for InceptionV3, or a TorchScript file, float images [N, 3, H, W] in 0..255 -> [N, D] at the
    images' own size; that figure is not FID, and `name` says so. TorchScript runs code: open your own files.
    reference: (mu [D], sigma [D, D]) of the training images: from the file `saved` where it exists; else for
    published_cifar10 with InceptionV3 those of clean-fid; else measured from images, uint8 [N, C, H, W].
    Opens and tries all of it at once. UserError: what cannot be had, and what to do.
    """

    def __init__(self, features, device, images, published_cifar10=False, saved=None):
        self.name = f"FD ({Path(features).name})" if features else "FID"
        self.device, self.resize = torch.device(device), None
        try:
            from cleanfid import features as inception
            from cleanfid import fid as clean_fid

            clean_fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))
        except Exception as error:  # clean-fid 0.1.35 asks SciPy for what 1.18 has no more
            problem = f"--fid-samples: no working clean-fid ({one_line(error)})"
            raise UserError(f"{problem}: pip install clean-fid 'scipy<1.18'") from error
        self.clean_fid, waited = clean_fid, socket.getdefaulttimeout()
        advice = "it must map float images [N, 3, H, W] in 0..255 to features [N, D]"
        try:
            socket.setdefaulttimeout(20)  # a machine that is cut off should say so soon
            if features:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # torch.jit is to be replaced
                    self.features, self.resize = torch.jit.load(features, self.device).eval(), np.asarray
            else:
                advice = "give --fid-features FILE; if a download broke off, delete inception-2015-12-05.pt"
                self.features = inception.build_feature_extractor(
                    "clean", self.device, use_dataparallel=False
                )
            size = len(self.measure([images[:2]])[0])
            if saved and saved.is_file():
                with np.load(saved) as file:
                    self.reference = file["mu"], file["sigma"]
            elif published_cifar10 and not features:
                self.reference = inception.get_reference_statistics("cifar10", 32, split="train")
            else:
                self.reference = self.measure([images])
            if len(self.reference[0]) != size:
                raise ValueError(f"{size} features, and {len(self.reference[0])} in the reference")
        except Exception as error:  # no network, no TorchScript, other shapes: each raises its own kind
            what = f"--fid-features {features}" if features else "InceptionV3 or its reference"
            raise UserError(f"{what} cannot be used ({one_line(error)}): {advice}") from error
        finally:
            socket.setdefaulttimeout(waited)

    def measure(self, batches):
        """(mu [D], sigma [D, D]) of the features of batches of uint8 [N, C, H, W]; grey ones become RGB."""
        # clean-fid's data set cannot be sent to workers that do not fork
        workers = len(os.sched_getaffinity(0)) if multiprocessing.get_start_method() == "fork" else 0
        with tempfile.TemporaryDirectory() as folder:
            count = 0
            for images in batches:
                save_pngs(images, Path(folder), count)
                count += len(images)
            options = {"num_workers": workers, "device": self.device, "verbose": False, "batch_size": 32}
            features = self.clean_fid.get_folder_features(
                folder, self.features, custom_fn_resize=self.resize, **options
            )
        if features.ndim != 2 or len(features) != count or not np.isfinite(features).all():
            raise ValueError(
                f"features of {count} images have shape {list(features.shape)} or are not finite"
            )
        return features.mean(0), np.cov(features, rowvar=False)

    def __call__(self, batches):
        """The distance of batches of uint8 images to the reference."""
        return float(self.clean_fid.frechet_distance(*self.measure(batches), *self.reference))


def write_whole(path, write):
    """write(temporary path), then rename: path holds the old content or the new, never half of it. OSError."""
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
        with contextlib.suppress(OSError):
            temporary.unlink()


def append(path, text):
    try:
        with open(path, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path} could not be written ({one_line(error)}): is the disk full?") from error


def save_grid(images, path):
    """A PNG of at most 64 images in [-1, 1], eight in a row, small ones enlarged."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    images = F.interpolate(images[:64].float().cpu(), scale_factor=max(1, 64 // images.shape[-1]))
    pixels = make_grid(images, 8, normalize=True, value_range=(-1, 1), pad_value=0.5)
    write_whole(path, to_pil_image(pixels).save)


def save_timesteps(drawn, steps, path):
    """A heat map of the timesteps drawn: drawn [columns, T] counts, column by column as training went on."""
    T = drawn.shape[1]
    density = F.adaptive_avg_pool1d(drawn.float().cpu(), min(50, T))
    density = (density / density.mean(1, keepdim=True).clamp(min=1e-9)).T.flip(0).numpy()
    levels, colours = (0, 1, 2, 4), ((255, 255, 255), (125, 175, 220), (20, 60, 130), (10, 10, 50))
    picture = Image.new("RGB", (700, 400), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)

    def paint(values, box):
        rgb = np.stack([np.interp(values, levels, channel) for channel in zip(*colours)], -1)
        size = box[2] - box[0], box[3] - box[1]
        picture.paste(Image.fromarray(rgb.astype(np.uint8)).resize(size, Image.Resampling.NEAREST), box[:2])
        draw.rectangle(box, outline="black")

    paint(density, (60, 40, 600, 350))
    paint(np.linspace(4, 0, 100)[:, None], (630, 40, 650, 350))
    draw.text((60, 15), "Timesteps drawn, as multiples of uniform", "black", font)
    for text, y in ((f"{T - 1}", 40), ("t", 195), ("0", 350)):
        draw.text((50, y), text, "black", font, anchor="rm")
    for text, x in (("0", 60), ("training step", 330), (f"{steps}", 600)):
        draw.text((x, 365), text, "black", font, anchor="mt")
    for value in (0, 1, 2, 3, 4):
        draw.text((660, 350 - 310 * value / 4), f"{value}x", "black", font, anchor="lm")
    write_whole(path, picture.save)


# ---------------------------------------------------------------------------------------------------------
# 6 Training
# ---------------------------------------------------------------------------------------------------------

LOG_EVERY = 25  # steps: reading the loss waits for the device
PATIENCE = 10  # losses in a row that are not finite
COLUMNS = 50  # of the picture of the timesteps
COMPILE_FROM = 5_000  # steps: compiling takes a minute or two. Estimated, not measured
METRICS = ("step", "images", "seconds", "loss", "lr", "beta1", "val_mse", "val_vlb", "fid")
MODEL = ("width", "mults", "num_blocks", "attention", "dropout", "image_size", "patch")


def build_model(args, channels):
    """The U-Net and the diffusion of these settings, on their device."""
    model = UNet(channels, **{name: getattr(args, name) for name in MODEL})
    model = model.to(args.device, memory_format=torch.channels_last)
    return model, GaussianDiffusion(args.schedule, args.timesteps, args.device)


def build_strategy(args, alphas_cumprod, channels):
    """The timestep sampler and the raw loss weights [T] of these settings."""
    if args.strategy == "uniform":
        sampler = UniformSampler(args.timesteps)
    elif args.strategy == "logit-normal":
        sampler = LogitNormalSampler(args.timesteps)
    elif args.strategy == "speed":
        sampler = SpeeDSampler(alphas_cumprod, args.speed_k, args.speed_tau)
    elif args.strategy == "curriculum":
        sampler = CurriculumSampler(args.timesteps, args.steps, args.curriculum_mu, args.curriculum_sigma)
    else:
        names = ("every", "selected", "queue", "probe", "lr", "entropy")
        options = {name: getattr(args, f"adaptive_{name}") for name in names}
        sampler = AdaptiveSampler(alphas_cumprod, channels, **options)

    weighting = args.weighting
    if weighting == "auto":
        weighting = "change-aware" if args.strategy == "speed" else "none"
    if weighting == "none":
        weights = torch.ones_like(alphas_cumprod)
    elif weighting == "change-aware":
        weights = change_aware_weights(alphas_cumprod, args.speed_lam)
    elif weighting == "min-snr":
        weights = min_snr_weights(alphas_cumprod, args.min_snr_gamma)
    else:
        weights = p2_weights(alphas_cumprod, args.p2_k, args.p2_gamma)
    return sampler, weights


def join_processes():
    """What torchrun started becomes one group; where one process ends, what the others wait for fails."""
    if TORCHRUN:
        # NCCL between GPUs; gloo for what is on the CPU, such as waiting while rank 0 measures, be it for hours.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))


def of_rank_0(make):
    """make() of rank 0, in every process."""
    made = [make() if RANK == 0 else None]
    if TORCHRUN:
        distributed.broadcast_object_list(made, device=torch.device("cpu"))
    return made[0]


def to_device(tensor, device):
    """The tensor there. From the host to a GPU it goes through pinned memory, and nothing waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def flops_per_image(args, channels):
    """Floating-point operations of the U-Net's forward and backward pass, counted without any of them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = UNet(channels, **{name: getattr(args, name) for name in MODEL})
        model(torch.empty(1, channels, args.image_size, args.image_size), torch.zeros(1)).sum().backward()
    return counter.get_total_flops()


def matrix_flops_per_second(device, size=8192, repeats=20):
    """The rate of large bf16 matrix products on this GPU: what no training step exceeds."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def performance(run, images_per_second):
    """A line: images/s, peak memory, on a GPU also how much of its matrix rate the U-Net's operations make up."""
    text, device = f"{images_per_second:.4g} images/s", run.device
    if device.type == "cuda":
        text += f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.OutOfMemoryError):  # where others use this GPU, too
            rate = matrix_flops_per_second(device)
            share = flops_per_image(run.args, run.images.shape[1]) * images_per_second / PROCESSES / rate
            text += f", {share:.1%} of the {rate / 1e12:.0f} TFLOP/s of bf16 matrix products on this GPU"
        return text
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        text += f", peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"
    return text


def compile_in_place(args, *models):
    """torch.compile of the models; with auto one that cannot be compiled is called as it is."""
    config = torch._dynamo.config
    config.suppress_errors = args.compile == "auto"
    config.optimize_ddp = False  # it would cut the model into pieces
    config.recompile_limit = 16  # one graph for each size of a batch: training, probes, samples, measurements
    for model in models:
        model.compile(dynamic=False)


def make_autocast(args):
    """(a function that makes the autocast context, whether its fp16 needs loss scaling)."""
    device, amp = torch.device(args.device), args.amp
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    enabled = amp in ("bf16", "fp16")  # auto is off on a CPU: bf16 pays only on one made for it
    return functools.partial(torch.autocast, device.type, dtype, enabled=enabled), amp == "fp16"


def new_folder(out, default, first):
    """Make the folder out, new or empty, or default, default-2 ...; it belongs to who first makes `first` in it."""
    try:
        if out:
            os.makedirs(out, exist_ok=True)
            path = Path(out)
        else:
            for number in itertools.count(1):
                path = default if number == 1 else default.with_name(f"{default.name}-{number}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir(parents=True)
                    break
        open(path / first, "x").close()
        return path
    except OSError as error:
        raise UserError(f"no folder for the results ({error}): name another with --out") from error


def default_folder(args):
    """runs/ and what tells the run apart."""
    weighting = [] if args.weighting == "auto" else [args.weighting]
    momentum_decay = ["momentum-decay"] * args.momentum_decay
    return Path("runs") / "-".join([args.dataset, args.strategy, *weighting, *momentum_decay])


def refuse_full_disk(args, folder):
    """UserError where there is no room for the run's checkpoints, the old one and the new, or no right to write."""
    with torch.device("meta"):  # counts the weights of a model of any size and allocates none
        model = UNet(3, **{name: getattr(args, name) for name in MODEL})
    place = os.path.abspath(folder or args.out or "runs")
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    size = 16 * sum(p.numel() for p in model.parameters())  # float32: model, EMA, AdamW's two moments
    size += 4 * COLUMNS * args.timesteps + 1e7  # the adaptive policy and all the rest
    need, free = size if folder else 2 * size, shutil.disk_usage(place).free
    advice = "free some, name another with --out, or take a smaller --width"
    refuse(need > free, f"{place} has {free / 1e9:.3g} GB, checkpoints take {need / 1e9:.3g}: {advice}")
    refuse(not os.access(place, os.W_OK | os.X_OK), f"{place} may not be written: name another with --out")


def complete_lines(path):
    """The lines of a file but a last one without its end, which a killed run leaves."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def rows_until(step, path):
    """The complete rows of metrics.csv up to that step: those after it will come again. UserError: no file."""
    try:
        return [row for row in complete_lines(path)[1:] if int(row.split(",")[0]) <= step]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no metrics.csv of this script ({one_line(error)})") from error


def load_checkpoint(path):
    """A checkpoint of this script, a dict, its tensors on the CPU. UserError when it is anything else."""
    refuse(not os.path.isfile(path), f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_settings(checkpoint["args"])
        with torch.device("meta"):  # only the shapes are compared
            model = UNet(checkpoint["channels"], **{name: checkpoint["args"][name] for name in MODEL})
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        for part in ("model", "ema"):
            found = {name: weight.shape for name, weight in checkpoint[part].items()}
            refuse(found != shapes, "another model")
        refuse({"optimizer", "step", *Training.COUNTS} - set(checkpoint), "incomplete")
    except Exception as error:  # cut off, of another program, pickled code: each raises its own kind
        reason = type(error).__name__
        raise UserError(f"{path} is cut off or no checkpoint of this script ({reason})") from error
    return checkpoint


def generate(args):
    """Write args.generate samples of a checkpoint's EMA model as PNG files, and a grid of the first 64."""
    checkpoint = load_checkpoint(Path(args.checkpoint))
    run = argparse.Namespace(**checkpoint["args"] | {"device": args.device})
    args.sampling_steps = args.sampling_steps or min(50, run.timesteps)
    if args.sampling_steps > run.timesteps:
        raise UserError(f"--sampling-steps {args.sampling_steps}: this model has {run.timesteps} timesteps")
    autocast, _ = make_autocast(args)
    model, diffusion = build_model(run, checkpoint["channels"])
    model.load_state_dict(checkpoint["ema"])
    model.eval()
    if args.compile == "on":
        compile_in_place(args, model)
    folder = new_folder(args.out, Path(args.checkpoint).parent / "generated", "000000.png")
    shape, first, done = (checkpoint["channels"], run.image_size, run.image_size), [], 0
    options = args, args.seed, "generating", args.batch_size or 256
    with autocast():
        for images in draw_samples(model, diffusion, args.generate, shape, *options):
            save_pngs(to_uint8(images), folder, done)
            done += len(images)
            first += images[: 64 - len(first)].cpu()
    save_grid(torch.stack(first), folder / "grid.png")
    print(f"{args.generate} images and grid.png in {folder}")


def open_distance(args, images, folder=None):
    """The FrechetDistance that args ask for, or None. Adds to args which data and features it measures with.

    UserError if the run in folder, to be resumed, had others.
    """
    distance, identity = None, {"data": f"{len(images)} images, crc32 {zlib.crc32(images.numpy()):08x}"}
    if args.fid_samples:
        saved = folder and folder / "fid_reference.npz"
        published_cifar10 = (args.dataset, args.image_size) == ("cifar10", 32)
        distance = FrechetDistance(args.fid_features, args.device, images, published_cifar10, saved)
        identity["features"] = distance.name
        if args.fid_features:
            identity["features"] += f", crc32 {zlib.crc32(Path(args.fid_features).read_bytes()):08x}"
    for name, value in identity.items():
        was = getattr(args, name, value)
        refuse(was != value, f"--resume {folder}: its {name} were {was}, now they are {value}")
        setattr(args, name, value)
    return distance


@contextlib.contextmanager
def alone_in(folder):
    """Meanwhile no other process trains this run. UserError: one does."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"{folder} is being trained by another process") from error
    finally:
        os.close(lock)


class Signals:
    """with Signals() as signals: SIGINT and SIGTERM only set `received`, so that a step can be finished.

    Where `at_once` is set they raise KeyboardInterrupt; a second one ends the process in any case.
    """

    def __enter__(self):
        self.received, self.at_once = None, False
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        self.received = number
        for either in self.before:
            signal.signal(either, signal.SIG_DFL)
        if self.at_once:
            raise KeyboardInterrupt

    def agree(self):
        """The signal that any of the processes received, or None."""
        if not TORCHRUN:
            return self.received
        number = torch.tensor(self.received or 0)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return number.item() or None

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Training:
    """A run: all that its checkpoint holds, and one step. All of it is the same in every process.

    All randomness of a step follows from the seed and the step, so a checkpoint needs no generator: a resumed run
    draws what the unbroken one would. Every strategy sees the same images, flips and noise: they are drawn first.
    Of several processes each takes its share of the batch, with noise, timesteps and dropout of its own.
    """

    COUNTS = ("seconds", "drawn", "losses", "skipped")

    def __init__(self, args, images):
        """images: uint8 [N, C, H, W], on the CPU: they move to the device, unless they fill too much of it."""
        self.args, self.order, self.device = args, None, torch.device(args.device)
        device = self.device
        gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        self.images = images if gpu and images.numel() > gpu.total_memory / 4 else images.to(device)
        self.autocast, self.fp16 = make_autocast(args)
        torch.manual_seed(args.seed)  # the model first: every strategy starts from the same one
        self.model, self.diffusion = build_model(args, images.shape[1])
        self.sampler, self.raw_weights = build_strategy(args, self.diffusion.alphas_cumprod, images.shape[1])
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        long_on_gpu = device.type == "cuda" and args.steps >= COMPILE_FROM
        if args.compile == "on" or (args.compile == "auto" and long_on_gpu):
            compile_in_place(args, self.model, self.ema)
        # DDP averages the gradients; what else calls the model leaves it as it is.
        self.forward = DistributedDataParallel(self.model) if TORCHRUN else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
        # Off fp16 its scale stays 1: there it only skips the updates that are not finite, on the device.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=65_536.0 if self.fp16 else 1.0)
        self.step, self.seconds = 0, 0.0
        self.drawn = torch.zeros(COLUMNS, args.timesteps, dtype=torch.int32, device=device)
        self.losses = torch.zeros(LOG_EVERY + PATIENCE, device=device)  # the last ones, step by step
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.parts = {name: getattr(self, name) for name in ("model", "ema", "optimizer")}
        self.parts |= {"sampler": self.sampler} if args.strategy == "adaptive" else {}
        self.parts |= {"scaler": self.scaler} if self.fp16 else {}

    def state_dict(self):
        state = {"args": vars(self.args), "channels": self.images.shape[1], "step": self.step}
        state |= {name: getattr(self, name) for name in self.COUNTS}
        return state | {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        """UserError: not the state of such a run."""
        try:
            self.step, self.seconds = state["step"], state["seconds"]
            for name in ("drawn", "losses", "skipped"):
                getattr(self, name).copy_(state[name])
            for name, part in self.parts.items():
                if name in state or name != "scaler":  # a run that becomes fp16 has none
                    part.load_state_dict(state[name])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"the checkpoint is not of this run ({one_line(error)})") from error

    def batch(self):
        """The next images, float [B, C, H, W]: each epoch in its own order, without an incomplete last batch."""
        args = self.args
        epoch, batch = divmod(self.step, len(self.images) // args.batch_size)
        if batch == 0 or self.order is None:
            shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            self.order = to_device(torch.randperm(len(self.images), generator=shuffle), self.images.device)
        share = args.batch_size // PROCESSES
        first = batch * args.batch_size + RANK * share
        x0 = to_float(to_device(self.images[self.order[first : first + share]], self.device))
        if args.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=self.device) < 0.5, x0.flip(-1), x0)
        return x0

    def train_step(self):
        args, step, model, sampler = self.args, self.step, self.model, self.sampler
        adaptive = args.strategy == "adaptive"
        # On a CPU only 32 bits of it count; the odd factor, near 2^32 / 1.618, keeps the ranks far apart in these.
        seed = args.seed * 1_000_003 + RANK * 2_654_435_769
        torch.manual_seed(seed + 2 * step)
        x0 = self.batch()
        noise = torch.randn_like(x0)
        t = sampler.sample(x0, step)

        torch.manual_seed(seed + 2 * step + 1)  # of dropout, whatever the sampler drew
        with self.autocast():
            eps = self.forward(self.diffusion.q_sample(x0, t, noise), t)
        mse = (eps.float() - noise).square().flatten(1).mean(1)
        loss = (normalize_weights(self.raw_weights, sampler.probs)[t] * mse).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)

        progress = step / args.steps if args.momentum_decay else 0.0
        beta1, lr_scale = momentum_decay(progress, args.beta1)
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
        tally[-1] = loss.detach()
        average_over_processes(tally)
        self.drawn[step * COLUMNS // args.steps] += tally[:-1].round().int()
        self.losses[step % len(self.losses)] = tally[-1]
        self.skipped += ~tally[-1].isfinite()
        self.step += 1

    def losses_since(self, logged):
        """(mean of the finite losses since that step, at most LOG_EVERY ago; whether the last one is finite).

        Waits for the device. FloatingPointError after PATIENCE losses in a row that are not finite.
        """
        first = max(0, self.step - len(self.losses))
        losses = self.losses.roll(-first).tolist()[: self.step - first]
        finite, in_a_row = [math.isfinite(loss) for loss in losses], 0
        for step, fine in enumerate(finite, first + 1):
            in_a_row = 0 if fine else in_a_row + 1
            if in_a_row == PATIENCE:
                advice = "--amp bf16 or off, fp16 overflows" if self.fp16 else "a lower --lr, it diverges"
                problem = f"step {step}: {PATIENCE} losses in a row were not finite"
                raise FloatingPointError(f"{problem}: --resume the run with {advice}")
        recent = [loss for loss, fine in list(zip(losses, finite))[max(0, logged - first) :] if fine]
        return sum(recent) / len(recent) if recent else math.nan, all(finite[-1:])

    def predict(self, x_t, t):
        """The EMA model's epsilon."""
        with self.autocast():
            return self.ema(x_t, t)


def write_row(run, folder, mean_loss, held_out, distance, signals):
    """Append a row to metrics.csv and return it as a dict.

    With held_out it has the EMA model's figures on these, and the pictures are drawn anew; with distance, its FID.
    """
    args, group = run.args, run.optimizer.param_groups[0]
    row = run.step, run.step * args.batch_size, run.seconds, mean_loss, group["lr"], group["betas"][0]
    row = dict(zip(METRICS, row))
    options = {"shape": run.images.shape[1:], "args": args, "seed": 0}
    draw = functools.partial(draw_samples, run.predict, run.diffusion, **options)
    if held_out is not None:
        row["val_mse"], row["val_vlb"] = evaluate(run.predict, run.diffusion, held_out)
        save_grid(torch.cat(list(draw(64, title="samples"))), folder / "samples.png")
        save_timesteps(run.drawn, args.steps, folder / "timesteps.png")
    if distance:
        try:
            row["fid"] = distance(map(to_uint8, draw(args.fid_samples, title=distance.name)))
        except Exception as error:  # whatever it is costs the figure, not the run
            if signals.received:  # which may have taken clean-fid's workers with it
                raise KeyboardInterrupt from error
            tqdm.write(f"{distance.name} could not be measured at step {run.step}: {one_line(error)}")
    cells = (row.get(name, "") for name in METRICS)
    append(
        folder / "metrics.csv", ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in cells) + "\n"
    )
    return row


def loop(run, folder, held_out, distance, logged):
    """Train to the end, with a checkpoint, a row and pictures when they are due: by rank 0, the others wait.

    logged: the last step with a row. Returns the last row and the images per second, of rank 0, since the first
    one. KeyboardInterrupt(signal, what is kept) when it was stopped.
    """
    args, saved, row, stop, clock = run.args, run.step or None, None, None, time.perf_counter()
    timed = [(run.step, run.seconds)]  # the first steps are slow: what is compiled is compiled then
    options = {"initial": run.step, "unit": "img", "unit_scale": args.batch_size, "disable": RANK > 0}
    with tqdm(desc=args.strategy, total=args.steps, **options) as bar, Signals() as signals:
        try:
            while True:
                # The checkpoint comes before what takes long, and a resumed run measures what its metrics.csv
                # lacks: nothing is lost wherever a run ends. While losses are not finite the last one stays.
                step, last, stop = run.step, run.step == args.steps, signals.agree()
                evaluates = last or step % args.eval_every == 0
                compares = distance and (last or step % (args.fid_every or args.steps) == 0)
                logs = evaluates or compares or step % LOG_EVERY == 0
                saves = evaluates or compares or step % args.checkpoint_every == 0 or stop
                if logs or saves:
                    mean_loss, healthy = run.losses_since(logged)
                    run.seconds += time.perf_counter() - clock  # of training alone
                    if len(timed) < 2 and step > timed[0][0]:
                        timed.append((step, run.seconds))
                    if saves and healthy and step != saved:
                        if RANK == 0:
                            state = run.state_dict()
                            write_whole(folder / "checkpoint.pt", functools.partial(torch.save, state))
                        saved = step
                    if stop and (saved == step or not healthy):
                        raise KeyboardInterrupt
                    if RANK == 0 and logs and step > logged:
                        signals.at_once = saved == step or not healthy
                        if signals.received and signals.at_once:  # while the checkpoint was written
                            raise KeyboardInterrupt
                        due = held_out if evaluates else None, distance if compares else None
                        row = write_row(run, folder, mean_loss, *due, signals)
                        bar.set_postfix(loss=f"{mean_loss:.4f}")
                        signals.at_once = False
                    logged, clock = step if logs else logged, time.perf_counter()
                if last:
                    break
                run.train_step()
                bar.update()
        except (KeyboardInterrupt, RuntimeError) as error:
            # The other processes get the signal too, and the first that ends breaks what the others wait for.
            if isinstance(error, RuntimeError) and not (PROCESSES > 1 and signals.received):
                raise
            kept = f" with the checkpoint of step {saved}: --resume {shlex.quote(str(folder))}"
            raise KeyboardInterrupt(signals.received or stop or signal.SIGINT, kept) from error
    since, seconds = timed[-1] if timed[-1][0] < args.steps else timed[0]
    images = (args.steps - since) * args.batch_size
    return row, images / (run.seconds - seconds) if images else None


def train(args, folder=None, checkpoint=None, rows=()):
    """Train as args say: from the start into a new folder, or on from a checkpoint and its rows in its own."""
    uneven = args.batch_size % PROCESSES
    refuse(uneven, f"--batch-size {args.batch_size} must divide by {PROCESSES}, the processes")
    if RANK == 0:
        refuse_full_disk(args, folder)
    for turn in range(3):  # rank 0, then one on each other machine, then the rest: a download is made once
        if turn == min(RANK, 1) + min(LOCAL_RANK, 1):
            images, held_out = load_dataset(args.dataset, args.data_dir, args.image_size)
        average_over_processes(torch.zeros(()))  # waits for all
    count, channels, *size = images.shape
    refuse(
        args.batch_size > count, f"--batch-size {args.batch_size} is more than the {count} training images"
    )
    if checkpoint and channels != checkpoint["channels"]:
        raise UserError(f"{args.data_dir} has {channels} channels, the run {checkpoint['channels']}")
    distance = open_distance(args, images, folder) if RANK == 0 else None
    run, logged = Training(args, images), int(rows[-1].split(",")[0]) if rows else 0
    if checkpoint:
        run.load_state_dict(checkpoint)
    if RANK:
        loop(run, None, None, None, logged)
        return
    held_out = held_out.to(args.device)
    if not checkpoint:
        folder = new_folder(args.out, default_folder(args), "config.json")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    config, table = json.dumps(vars(args) | versions, indent=2), ",".join(METRICS) + "\n" + "".join(rows)
    with alone_in(folder):
        write_whole(folder / "config.json", lambda path: path.write_text(config + "\n"))
        write_whole(folder / "metrics.csv", lambda path: path.write_text(table))
        if distance:
            mu, sigma = distance.reference
            write_whole(folder / "fid_reference.npz", lambda path: np.savez(path, mu=mu, sigma=sigma))
        millions = sum(p.numel() for p in run.model.parameters()) / 1e6
        print(
            f"{folder}: {count} images {channels}x{size[0]}x{size[1]} to train on, {len(held_out)} held out"
        )
        where = args.device if PROCESSES == 1 else f"{PROCESSES} x {args.device}"
        print(f"U-Net of {millions:.2f}M parameters on {where}, steps {run.step} to {args.steps}")
        row, images_per_second = loop(run, folder, held_out, distance, logged)
    figures = f"val_mse {row['val_mse']:.5f}, val_vlb {row['val_vlb']:.4f} bits per dimension"
    figures += f", {distance.name} {row['fid']:.4g}" if "fid" in row else ""
    print(f"{run.seconds:.0f} s of training: {figures}")
    if run.skipped:
        print(f"{run.skipped} updates were skipped: their loss was not finite")
    print(f"samples and all else in {folder}")
    if images_per_second:
        print(performance(run, images_per_second))


# ---------------------------------------------------------------------------------------------------------
# 7 Report
# ---------------------------------------------------------------------------------------------------------

# What may differ between the runs of one row, and what must not differ between figures that are compared.
FREE = {"seed", "out", "data_dir", "eval_every", "checkpoint_every", "python", "torch"}
FREE |= {"features", "fid_features", "fid_samples", "fid_every"}
FID_SETTINGS = ("features", "fid_samples", "method", "sampling_steps", "eta")
REPORT = (
    "strategy | runs | steps | seconds | val_mse | val_vlb | {0} last | {0} best | steps to baseline's last"
)
REPORT += " | seconds to it | speed-up (steps) | speed-up (seconds)"
Run = collections.namedtuple("Run", "folder config rows")


def read_run(folder):
    """A Run: its config and its rows, each with METRICS as floats, None where nothing was measured."""
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = csv.DictReader(complete_lines(folder / "metrics.csv"))
        rows = [{name: float(row[name]) if row[name] else None for name in METRICS} for row in lines]
        missing = {"strategy", "weighting", "momentum_decay", "seed", "data"} - set(config)
        refuse(missing, f"config.json lacks {', '.join(sorted(missing))}")
        refuse(not rows, "not one row yet")
    except (OSError, ValueError, KeyError, TypeError, csv.Error, UserError) as error:
        raise UserError(f"--report {folder}: no run of this script to report ({one_line(error)})") from error
    return Run(folder, config, rows)


def curve(run, name="fid"):
    """[(step, seconds, value), ...] of what was measured under that name."""
    return [(row["step"], row["seconds"], row[name]) for row in run.rows if row[name] is not None]


def reach(points, target):
    """(step, seconds) where the line through points, a curve, first falls to target; None where it does not."""
    before = None
    for point in points:
        if point[2] <= target:
            before = before or point
            share = (before[2] - target) / (before[2] - point[2]) if before[2] > point[2] else 0.0
            return tuple(a + share * (b - a) for a, b in zip(before[:2], point[:2]))
        before = point
    return None


def group_by_setting(runs):
    """{name: its runs}: those that differ in FREE alone are one setting, named by how it differs from the first."""
    named, groups = FREE | {"strategy", "weighting", "momentum_decay"}, {}
    for run in runs:
        name, weighting = run.config["strategy"], run.config["weighting"]
        if weighting != "auto":
            name += f" + {weighting} weights".replace("none", "no")
        if run.config["momentum_decay"]:
            name += " + momentum decay"
        for key, value in run.config.items():
            if key not in named and str(value) != str(runs[0].config.get(key)):
                name += f", {key} {value}"
        groups.setdefault(name, []).append(run)
    return groups


def refuse_to_compare(runs):
    """UserError unless the runs have the same data and, those with FID, took it in the same way."""
    for names, some in (("data",), runs), (FID_SETTINGS, [run for run in runs if "features" in run.config]):
        for name, run in itertools.product(names, some):
            one, two = some[0].config.get(name), run.config.get(name)
            refuse(one != two, f"--report: {name} is {one} in {some[0].folder} but {two} in {run.folder}")


def report(folders, out):
    """Print a Markdown table of the runs, a row for each setting, the first the baseline; draw two pictures."""
    runs = [read_run(Path(folder)) for folder in folders]
    refuse_to_compare(runs)
    fid = next((run.config["features"] for run in runs if "features" in run.config), "FID").split(", crc32")[
        0
    ]
    groups = group_by_setting(runs)
    # A run is held against the baseline with its own seed, which had the same first weights, images and noise:
    # where did each first reach the baseline's last FID?
    curves = {run.config["seed"]: curve(run) for run in next(iter(groups.values()))}
    goals = {
        seed: (points[-1][2], *reach(points, points[-1][2])) for seed, points in curves.items() if points
    }
    mean_goal = tuple(map(statistics.fmean, zip(*goals.values())))

    def figures(run):
        goal, fids = goals.get(run.config["seed"], mean_goal), curve(run)
        last = [(curve(run, name) or [(None,) * 3])[-1][2] for name in ("val_mse", "val_vlb", "fid")]
        best = min((value for *_, value in fids), default=None)
        reached = (goal and reach(fids, goal[0])) or (None, None)
        ratios = [theirs / own if own else None for theirs, own in zip(goal[1:], reached)] or (None, None)
        return [run.rows[-1]["step"], run.rows[-1]["seconds"], *last, best, *reached, *ratios]

    def cell(values):
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        mean, low, high = (
            f"{v:.4g}" if abs(v) < 1000 else f"{v:.0f}"
            for v in (statistics.fmean(known), min(known), max(known))
        )
        spread = f" ({low}..{high})" if low != high else ""
        return mean + spread + (f" in {len(known)} of {len(values)}" if len(known) < len(values) else "")

    print(f"| {REPORT.format(fid.replace('|', '/'))} |")
    print("|---" * len(REPORT.split("|")) + "|")
    for name, members in groups.items():
        cells = map(cell, zip(*map(figures, members)))
        print(" | ".join([f"| {name}", str(len(members)), *cells]) + " |")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno pictures without matplotlib: pip install matplotlib")
        return
    pictures = {"methods.png": functools.partial(draw_methods, runs=runs)}
    if any(map(curve, runs)):
        pictures["curves.png"] = functools.partial(draw_curves, groups=groups, fid=fid)
    folder = new_folder(out, Path("runs") / "report", "methods.png")
    for name, draw in pictures.items():
        figure = Figure((12, 6), dpi=100, layout="constrained")
        draw(figure)
        figure.savefig(folder / name)
    print(f"\n{' and '.join(pictures)} in {folder}")


def draw_curves(figure, groups, fid):
    """FID over steps and over seconds: each setting's mean as a line, its runs as dots, the baseline black."""
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(groups.items()):
        color, dashes = f"C{number - 1}" if number else "black", "--" if number > 10 else "-"
        by_step = collections.defaultdict(list)
        for point in itertools.chain(*map(curve, runs)):
            by_step[point[0]].append(point)
            for axis, x in ((left, point[0]), (right, point[1])):
                axis.plot(x, point[2], ".", color=color, alpha=0.4)
        common = [points for _, points in sorted(by_step.items()) if len(points) == len(runs)]
        for axis, column in ((left, 0), (right, 1)):
            x, y = (
                [statistics.fmean(point[c] for point in points) for points in common] for c in (column, 2)
            )
            axis.plot(x, y, dashes, color=color, label=name)
            if not number and y:
                axis.axhline(y[-1], color=color, linestyle=":")
    for axis, name in ((left, "step"), (right, "seconds of training")):
        axis.set(xlabel=name, yscale="log")
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    left.set_ylabel(fid)
    right.legend()


def draw_methods(figure, runs):
    """P(t) and w(t) of the static methods, P(t) of the curriculum as it moves, and as an adaptive run drew it."""
    args = argparse.Namespace(**runs[0].config)
    alphas_cumprod = GaussianDiffusion(args.schedule, args.timesteps).alphas_cumprod
    T, greys = args.timesteps, [f"{0.8 - 0.2 * part}" for part in range(5)]

    def built(strategy, weighting="none"):
        args.strategy, args.weighting = strategy, weighting
        return build_strategy(args, alphas_cumprod, 1)

    static, weights, curriculum, adaptive = figure.subplots(2, 2).flat
    for strategy in ("uniform", "logit-normal", "speed"):
        static.plot(T * built(strategy)[0].probs, label=strategy)
    uniform = built("uniform")[0].probs
    for weighting in WEIGHTINGS[1:]:
        if T > 2 or weighting != "change-aware":
            weights.plot(normalize_weights(built("uniform", weighting)[1], uniform), label=weighting)
    sampler = built("curriculum")[0]
    for part, grey in enumerate(greys):
        sampler.sample(alphas_cumprod[None], part * args.steps / 4)
        curriculum.plot(T * sampler.probs, color=grey, label=f"at {25 * part}% of the steps")
    checkpoints = [run.folder / "checkpoint.pt" for run in runs if run.config["strategy"] == "adaptive"]
    for path in [path for path in checkpoints if path.is_file()][:1]:
        drawn = load_checkpoint(path)["drawn"].float()
        shares = F.adaptive_avg_pool2d(drawn[None], (5, min(drawn.shape[1], 50)))[0]
        middles = (torch.arange(shares.shape[1]) + 0.5) * drawn.shape[1] / shares.shape[1]
        for part, share in enumerate(shares):
            label = f"drawn from {20 * part}% to {20 * part + 20}%"
            if share.any():
                adaptive.plot(middles, share / share.mean(), color=greys[part], label=label)
    titles = (
        "T P(t), static",
        "w(t), with mean 1 under uniform t",
        "T P(t), curriculum",
        "T P(t), an adaptive run",
    )
    for axis, title in zip(figure.axes, titles):
        axis.set(title=title, xlabel="t", ylim=(0, None))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()


# ---------------------------------------------------------------------------------------------------------
# 8 Command line
# ---------------------------------------------------------------------------------------------------------

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
STRATEGIES = ("uniform", "logit-normal", "speed", "curriculum", "adaptive")
CHANGEABLE = {"device", "data_dir", "fid_features", "amp", "compile", "lr", "grad_clip"}  # beside --resume
WEIGHTINGS = ("auto", "none", "change-aware", "min-snr", "p2")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def within(kind, interval):
    """An argparse type: int or float in an interval written as "[0, 1)". nan is in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if (
            not low <= value <= high
            or (value, interval[0]) == (low, "(")
            or (value, interval[-1]) == (high, ")")
        ):
            raise argparse.ArgumentTypeError(f"must lie in {interval}, got {text}")
        return value

    return parse


def name(text):
    """An argparse type: of a file, a folder or a device."""
    if not text:
        raise argparse.ArgumentTypeError("needs a name")
    return text


def make_parser():
    parser = Parser("speedup_diffusion.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    whole, real = functools.partial(within, int), functools.partial(within, float)
    count = whole("[1, 1000000000]")

    def add_flag(group, flag, kind, help, default=None, **more):
        """kind: a tuple of choices, or what turns text into the value. No default: the data set's, if any."""
        if (setting := flag[2:].replace("-", "_")) in PER_DATASET:
            values = {}
            for dataset, row in DATASETS.items():
                values.setdefault(str(row[PER_DATASET.index(setting)]), []).append(dataset)
            default_text = "; ".join(f"{value} for {', '.join(names)}" for value, names in values.items())
        else:
            default_text = default
        help += "" if default_text is None else f" (default: {default_text})"
        kind = {"choices": kind} if isinstance(kind, tuple) else {"type": kind} if kind else {}
        group.add_argument(flag, default=default, help=help, **kind, **more)

    def group(title):
        return functools.partial(add_flag, parser.add_argument_group(title))

    add = group("method")
    add("--strategy", STRATEGIES, "how timesteps are drawn", "uniform")
    add("--weighting", WEIGHTINGS, "loss weights; auto: change-aware for speed, else none", "auto")
    add("--momentum-decay", None, "lower beta1 and lr as training goes on", False, action="store_true")
    add("--speed-k", real("[1, 1e6]"), "SpeeD: t < tau is drawn k times as often", 5.0)
    add("--speed-tau", count, "SpeeD: 1..T (default: the number of t with alphas_cumprod >= 0.0069)")
    add("--speed-lam", real("[0.5, 1]"), "change-aware weights lie in [1 - lam, lam]", 0.6)
    add("--curriculum-mu", real("[0, 1]"), "curriculum: centre of the Gaussian, in units of T", 0.3)
    add("--curriculum-sigma", real("[1e-3, 1e3]"), "curriculum: its width, in units of T", 0.5)
    add("--adaptive-every", count, "adaptive: steps between updates of the policy", 40)
    add("--adaptive-selected", count, "adaptive: timesteps that make the reward, |S|", 3)
    add("--adaptive-queue", whole("[3, 1e5]"), "adaptive: probes that S is chosen from", 20)
    add("--adaptive-probe", count, "adaptive: timesteps a probe measures; T or more for all", 100)
    add("--adaptive-lr", real("(0, 10]"), "adaptive: learning rate of the policy", 1e-2)
    add("--adaptive-entropy", real("[0, 1e3]"), "adaptive: weight of the policy's entropy", 1e-2)
    add("--min-snr-gamma", real("[1e-6, 1e6]"), "min-snr: the SNR above which the weight falls", 5.0)
    add("--p2-k", real("[1e-6, 1e3]"), "p2: k of 1 / (k + SNR)^gamma", 1.0)
    add("--p2-gamma", real("[0, 5]"), "p2: gamma", 1.0)

    add = group("data")
    add("--dataset", tuple(DATASETS), "digits are rendered here, folder is your own images", "digits")
    add("--data-dir", name, "where the images are, or are downloaded to", "data")
    add("--image-size", whole("[4, 1024]"), "side of the square images")
    add("--flip", None, "mirror half of the training images", action=argparse.BooleanOptionalAction)

    add = group("diffusion and model")
    add("--schedule", ("linear", "cosine", "quad"), "how fast the noise grows", "linear")
    add("--timesteps", whole("[1, 1e5]"), "T", 1000)
    add("--width", whole("[2, 4096]"), "channels of the first level")
    add("--mults", whole("[1, 64]"), "channels of each level, in units of width", nargs="+", metavar="M")
    add("--num-blocks", whole("[1, 16]"), "residual blocks of a level")
    add("--attention", count, "feature map sides with attention; no value: none", nargs="*", metavar="SIDE")
    add("--dropout", real("[0, 1)"), "in the residual blocks")
    add("--patch", whole("[1, 64]"), "pixel-unshuffle factor in front of the U-Net")

    add = group("training")
    add("--steps", count, "training steps")
    add("--batch-size", whole("[1, 1e6]"), "images a step")
    add("--lr", real("(0, 100]"), "learning rate of AdamW, constant after the warm-up")
    add("--beta1", real("[0, 1)"), "AdamW's momentum", 0.9)
    add("--warmup", count, "steps to the full learning rate")
    add("--ema-decay", real("[0, 1)"), "of the weight average that is evaluated and sampled")
    add("--grad-clip", real("(0, 1e6]"), "largest gradient norm", 1.0)
    add("--seed", whole("[0, 2147483647]"), "of model, order, noise and timesteps, not of the digits", 0)
    add("--eval-every", count, "steps between measurements, samples and checkpoints")
    add("--checkpoint-every", count, "steps between further checkpoints (default: --eval-every)")
    add("--device", name, "cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--amp", ("auto", "off", "bf16", "fp16"), "auto: bf16 or fp16 on a GPU, off on a CPU", "auto")
    text = f"torch.compile; auto: when training on a GPU for {COMPILE_FROM} steps or more"
    add("--compile", ("auto", "off", "on"), text, "auto")

    add = group("sampling")
    add("--method", ("ddim", "ddpm"), "ddpm visits every timestep", "ddim")
    add("--sampling-steps", count, "timesteps ddim visits (default: 50, or T if that is less)")
    add("--eta", real("[0, 1]"), "noise of ddim: 0 none, 1 as much as ddpm", 0.0)

    add = group("FID")
    add(
        "--fid-samples",
        whole("[2, 1e6]"),
        "measure FID at the end on N samples, more than there are features",
        metavar="N",
    )
    add("--fid-every", count, "and every so many steps", metavar="STEPS")
    features = "TorchScript in place of InceptionV3, images 0..255 to features; it runs code: trust the file"
    add("--fid-features", name, features, metavar="FILE")

    add = group("files")
    add("--out", name, "folder of the results, new or empty (default: runs/<dataset>-<strategy>...)")
    add("--resume", name, "go on with the run in this folder, with its own settings", metavar="RUN")
    add("--generate", count, "write N samples of --checkpoint as PNG files, train nothing", metavar="N")
    add("--checkpoint", name, "the checkpoint to generate from", metavar="FILE")
    add("--report", name, "compare runs in a table, the first being the baseline", nargs="+", metavar="RUN")
    return parser


def usable_device(name, amp):
    """The device of that name, or the best one where name is None. UserError if this machine lacks it."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    refuse(not re.fullmatch(r"cpu|cuda(:\d+)?", name), f"--device {name}: use cpu, cuda or cuda:N")
    gpus, here = torch.cuda.device_count(), LOCAL_PROCESSES
    refuse(here > 1 and ":" in name, f"--device {name}: torchrun gives each process its own GPU; use cuda")
    refuse(name != "cpu" and int(name[5:] or 0) >= gpus, f"--device {name}: torch sees {gpus} GPUs; use cpu")
    refuse(name == "cuda" and here > gpus, f"{here} processes, but torch sees {gpus} GPUs: start as many")
    if name == "cuda" and here > 1:
        torch.cuda.set_device(LOCAL_RANK)
    refuse(name == "cpu" and amp == "fp16", "--amp fp16 needs a GPU: use bf16 or off on a CPU")
    return name


def check_settings(settings):
    """Raises an error of some kind where the command line would refuse one of them."""
    for action in make_parser()._actions:
        value = settings.get(action.dest)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and action.type:
                action.type(str(one))
            refuse(one is not None and action.choices and one not in action.choices, f"{action.dest}: {one}")


def parse_args(argv):
    """(settings with all defaults filled in, the set of names that were given). UserError where they clash."""
    parser = make_parser()
    args, unset = parser.parse_args(argv), object()
    bare = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(bare).items() if value is not unset}

    def refuse_beside(flag, allowed, why):
        others = ", ".join("--" + name.replace("_", "-") for name in sorted(given - allowed - {flag}))
        refuse(flag in given and others, f"--{flag} {why}: drop {others}")

    refuse_beside("resume", CHANGEABLE, "goes on with the run's own settings")
    sampling = {"checkpoint", "out", "method", "sampling_steps", "eta", "seed", "batch_size"}
    refuse_beside("generate", sampling | {"device", "amp", "compile"}, "trains nothing")
    refuse_beside("report", {"out"}, "trains nothing")
    refuse(("generate" in given) != ("checkpoint" in given), "--generate N and --checkpoint FILE go together")
    refuse(
        PROCESSES > 1 and (args.generate or args.report), "torchrun is for training: start this one without"
    )
    fixed = args.method == "ddpm" and given & {"sampling_steps", "eta"}
    refuse(fixed, "--method ddpm visits every timestep with eta 1: drop --sampling-steps and --eta")

    if args.resume is None and not args.report:
        args.device = usable_device(args.device, args.amp)
    try:
        taken = args.out and os.path.exists(args.out) and os.listdir(args.out)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error
    refuse(taken, f"--out {args.out} is not empty: name a new folder")
    if args.resume is not None or args.generate or args.report:
        return args, given

    for name, value in zip(PER_DATASET, DATASETS[args.dataset]):
        if name not in given:
            setattr(args, name, value)
    args.checkpoint_every = args.checkpoint_every or args.eval_every
    T, probed = args.timesteps, min(args.timesteps, args.adaptive_probe)
    refuse(args.dataset == "folder" and "data_dir" not in given, "--dataset folder needs --data-dir FOLDER")
    too_large = args.dataset == "digits" and args.image_size > 128
    refuse(too_large, f"--image-size {args.image_size}: the digits are drawn up to 128")
    refuse(args.speed_tau and args.speed_tau > T, f"--speed-tau {args.speed_tau} must lie in 1..{T}")
    change_aware = args.weighting == "change-aware" or (args.strategy, args.weighting) == ("speed", "auto")
    refuse(change_aware and T < 3, "change-aware weights need at least 3 timesteps")
    too_many = args.strategy == "adaptive" and args.adaptive_selected > probed
    refuse(too_many, f"--adaptive-selected {args.adaptive_selected} exceeds the {probed} timesteps probed")
    alone = given & {"fid_every", "fid_features"} and args.fid_samples is None
    refuse(alone, "--fid-every and --fid-features need --fid-samples N")
    missing = args.fid_features and not os.path.isfile(args.fid_features)
    refuse(missing, f"--fid-features {args.fid_features}: no such file")
    args.sampling_steps = args.sampling_steps or min(50, T)
    refuse(args.sampling_steps > T, f"--sampling-steps {args.sampling_steps} must lie in 1..{T}")
    refuse(args.width % 2, f"--width {args.width} must be even")
    shrink = args.patch * 2 ** (len(args.mults) - 1)
    refuse(args.image_size % shrink, f"--image-size {args.image_size} must divide by {shrink}")
    sides = [args.image_size // args.patch // 2**level for level in range(len(args.mults))]
    if "attention" not in given:  # the default is for the default sides
        args.attention = [side for side in args.attention if side in sides] or sides[-1:]
    refuse(set(args.attention) - set(sides), f"--attention {args.attention}: the sides are {sides}")
    return args, given


def resume(args, given):
    """Go on with the run in args.resume, which rank 0 alone needs to have."""
    folder = Path(args.resume)

    def read():
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        return checkpoint, rows_until(checkpoint["step"], folder / "metrics.csv")

    checkpoint, rows = of_rank_0(read)
    changed = {name: vars(args)[name] for name in given & CHANGEABLE}
    settings = vars(make_parser().parse_args([])) | checkpoint["args"] | changed
    settings["device"] = usable_device(settings["device"], settings["amp"])
    steps = settings["steps"]
    finished = rows and rows[-1].startswith(f"{steps},")
    refuse(finished, f"--resume {folder}: has done all of its {steps} steps")
    train(argparse.Namespace(**settings), folder, checkpoint, rows)


def main(argv=None):
    """Exit status: 0; 2 for what the user can mend; 1 for a failing disk or a diverging run; 128 + signal."""
    try:
        args, given = parse_args(argv)
        if args.report:
            report(args.report, args.out)
        elif args.generate:
            generate(args)
        else:
            join_processes()
            if args.resume is not None:
                resume(args, given)
            else:
                train(args)
            if TORCHRUN:  # after a failure nothing is waited for
                average_over_processes(torch.zeros(()))  # rank 0's last figures
                distributed.destroy_process_group()
    except UserError as error:
        if LOCAL_RANK == 0:  # the others on this machine met the same
            print("speedup_diffusion.py: error:", *str(error).splitlines(), file=sys.stderr)
        return 2
    except (OSError, FloatingPointError) as error:  # such as a full disk
        if RANK == 0 or isinstance(error, OSError):
            print("speedup_diffusion.py:", *str(error).splitlines(), file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        too_little = "out of memory", "not enough memory", "can't allocate memory"  # torch, on GPU and CPU
        if isinstance(error, MemoryError) or any(text in str(error) for text in too_little):
            problem = "out of memory: lower --batch-size, --width or --image-size"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            problem = f"torch.compile does not work here ({one_line(error)}): use --compile off"
        elif PROCESSES > 1 and any(text in str(error) for text in ("gloo", "NCCL", "onnection")):
            problem = f"rank {RANK} lost another process, whose message says why ({one_line(error)})"
        else:
            raise
        print(f"speedup_diffusion.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        number, kept = stop.args or (signal.SIGINT, "")
        if RANK == 0:
            print(f"\nstopped{kept}", file=sys.stderr)
        return 128 + number
    return 0


if __name__ == "__main__":
    status = main()
    if TORCHRUN and status:
        sys.stdout.flush()
        os._exit(status)  # the end of an interpreter could wait for NCCL, which waits for the other processes
    sys.exit(status)
