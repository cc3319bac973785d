#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Train a small diffusion model faster: four published accelerations in one file, to read, run and copy.

    python speedup_diffusion.py --strategy adaptive                     # rendered digits, no download, no GPU
    python speedup_diffusion.py --strategy speed --dataset cifar10      # all flags: --help
    python speedup_diffusion.py --resume runs/cifar10-speed             # goes on from the last checkpoint
    python speedup_diffusion.py --generate 64 --checkpoint runs/cifar10-speed/checkpoint.pt
    torchrun --nproc_per_node=8 speedup_diffusion.py --dataset cifar10  # eight GPUs

1 Diffusion   2 Accelerations   3 U-Net   4 Data   5 Evaluation   6 Training   7 Report   8 Command line
"""

import argparse
import contextlib
import copy
import csv
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

# torchrun, or another launcher, numbers the processes it starts: RANK over all machines, LOCAL_RANK on each.
RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", RANK))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


class UserError(Exception):
    """An error that the user can fix: main prints it as one line and exits with status 2."""


# 1 Diffusion ------------------------------------------------------------------------------------------------
# Diffusion mixes an image x0 with noise to x_t: nearly all image at t = 0, nearly all noise at t = T - 1. A network
# predicts epsilon (eps), this noise, from x_t and t; its loss is the mean square error (MSE). Sampling goes back from
# pure noise to t = 0. "The bound" is the variational bound on the negative log-likelihood (VLB): the sum over t of
# vlb_coefficients[t] times the MSE at t. ab: alphas_cumprod. Images: float [B, C, H, W] in [-1, 1]; t: int64 [B].


class GaussianDiffusion:
    """The forward process q(x_t | x0) = N(sqrt(ab_t) x0, (1 - ab_t) I), and two ways back: DDPM and DDIM.

    schedule: "linear" (beta from 1e-4 to 0.02, Ho et al., arXiv:2006.11239) or "quad" (the same ends, linear
    in sqrt(beta)), both times 1000 / T, so that a smaller T ends about as noisy; "cosine" (Nichol and Dhariwal,
    arXiv:2102.09672). No beta exceeds 0.999. ValueError: another schedule.
    betas, alphas_cumprod: float32 [T], on device. vlb_coefficients: float32 [T], beta_t / (2 alpha_t (1 - ab_t) ln 2).
    For epsilon prediction with the fixed variance beta_t this times the epsilon-MSE (mean over dimensions) is the part
    of the bound's KL term at t that depends on the model, in bits per dimension; t = 0 is counted alike.
    """

    def __init__(self, schedule="linear", timesteps=1000, device="cpu"):
        low = 1e-4 * 1000 / timesteps
        high = 0.02 * 1000 / timesteps
        if schedule == "linear":
            betas = torch.linspace(low, high, timesteps, dtype=torch.float64)
        elif schedule == "quad":
            betas = torch.linspace(low**0.5, high**0.5, timesteps, dtype=torch.float64) ** 2
        elif schedule == "cosine":
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"schedule must be linear, quad or cosine, got {schedule!r}")
        betas = betas.clamp(max=0.999)
        ab = (1 - betas).cumprod(0)
        self.timesteps = timesteps
        self.betas = betas.float().to(device)
        self.alphas_cumprod = ab.float().to(device)
        self.vlb_coefficients = (betas / (2 * (1 - betas) * (1 - ab) * math.log(2))).float().to(device)
        # [T + 1, 1, 1, 1], from float64 because 1 - ab loses digits near t = 0; index -1 is x0 itself.
        ab = torch.cat([ab, ab.new_ones(1)]).view(-1, 1, 1, 1)
        self._signal = ab.sqrt().float().to(device)
        self._sigma = (1 - ab).sqrt().float().to(device)

    def q_sample(self, x0, t, noise):
        """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise."""
        return self._signal[t] * x0 + self._sigma[t] * noise

    def predict_x0(self, x_t, t, eps):
        """q_sample backwards: the x0 that x_t and the noise eps in it imply. Not clipped."""
        return (x_t - self._sigma[t] * eps) / self._signal[t]

    def ddim_step(self, x_t, t, t_prev, eps, eta, noise, clip=True):
        """One step t -> t_prev (int64 [B], -1 means x0) of DDIM, Song et al., arXiv:2010.02502, eq. 12.
        eta = 0 is deterministic, noise may be None; eta = 1 has DDPM's variance. clip: x0 to [-1, 1], take eps anew."""
        signal = self._signal[t]
        signal_prev = self._signal[t_prev]
        sigma = self._sigma[t]
        sigma_prev = self._sigma[t_prev]
        x0 = self.predict_x0(x_t, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x_t - signal * x0) / sigma
        added = sigma**2 - (sigma_prev * signal / signal_prev) ** 2  # variance of x_t given x_prev: 1 - ab_t / ab_prev
        variance = eta**2 * (sigma_prev / sigma) ** 2 * added
        x_prev = signal_prev * x0 + (sigma_prev**2 - variance).clamp(min=0).sqrt() * eps
        if eta:
            x_prev = x_prev + variance.clamp(min=0).sqrt() * noise
        return x_prev

    def ddpm_step(self, x_t, t, eps, noise, clip=True):
        """One step t -> t - 1 of DDPM, which is DDIM's with eta = 1: it draws from q(x_{t-1} | x_t, x0)."""
        return self.ddim_step(x_t, t, t - 1, eps, 1.0, noise, clip)

    @torch.no_grad()
    def sample(self, model, shape, method="ddim", steps=50, eta=0.0, generator=None):
        """Images of the given shape, clipped to [-1, 1], from noise; model(x_t, t) -> eps, in eval mode.
        "ddim" visits `steps` (1..T) evenly spaced timesteps from T-1 to 0; "ddpm" takes all T with eta = 1, whatever
        steps and eta say. generator: on the CPU, for the same images again. ValueError: another method."""
        if method == "ddpm":
            steps = self.timesteps
            eta = 1.0
        elif method != "ddim":
            raise ValueError(f"method must be ddim or ddpm, got {method!r}")
        times = torch.linspace(self.timesteps - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        x = torch.randn(shape, generator=generator).to(self.betas.device)
        for now, then in zip(times, times[1:] + [-1]):
            t = torch.full((len(x),), now, device=x.device)
            t_prev = torch.full_like(t, then)
            noise = torch.randn(shape, generator=generator).to(x.device) if eta else None
            x = self.ddim_step(x, t, t_prev, model(x, t).to(x.dtype), eta, noise)
        return x


# 2 Accelerations --------------------------------------------------------------------------------------------
# A timestep sampler decides which t are trained on, a loss weight how much each counts; any sampler goes with any
# weight. Every sampler has `probs` [T], its present distribution, and `sample(x0, step)`: int64 timesteps [B] on x0's
# device, from torch's global generator. To copy one, take math, torch, nn, F and what its docstring's first line names.


class UniformSampler:
    """Every timestep equally often: the DDPM baseline, P(t) = 1 / T."""

    def __init__(self, timesteps):
        self.probs = torch.full((timesteps,), 1 / timesteps)

    def sample(self, x0, step):
        self.probs = self.probs.to(x0.device)
        return torch.randint(len(self.probs), (len(x0),), device=x0.device)


class LogitNormalSampler:
    """The middle more often than the ends: t = floor(T sigmoid(z)), z ~ N(0, 1). A baseline, arXiv:2403.03206."""

    def __init__(self, timesteps):
        edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        self.probs = torch.special.ndtr(torch.logit(edges)).diff().float()

    def sample(self, x0, step):
        self.probs = self.probs.to(x0.device)
        return torch.multinomial(self.probs, len(x0), replacement=True)


class SpeeDSampler:
    """SpeeD's asymmetric sampling: the last timesteps are nearly pure noise, so draw them k times less often.

        P(t) = k / (T + tau (k - 1))  for t < tau,    1 / (T + tau (k - 1))  for t >= tau

    Source: Wang et al., "A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model Training",
    arXiv:2405.17403 (CVPR 2025). Formula, k = 5 and tau = 700 (linear, T = 1000) are as in the authors' code. tau=None
    is our rule for any schedule: the number of t with ab >= 0.0069, 700 on that one.
    mirror: the authors' training runs also move half of each batch from t to |t - m|, m = mirror. To draw from
    P'(t) = (P(t) + the sum of P(s) over all s moved to t) / 2 is the same. m < T.
    SpeeD is this sampler with `change_aware_weights`. alphas_cumprod: [T]. ValueError: k < 1, tau outside 1..T.
    """

    def __init__(self, alphas_cumprod, k=5.0, tau=None, mirror=None):
        T = len(alphas_cumprod)
        if tau is None:
            tau = max(1, int((alphas_cumprod >= 0.0069).sum()))
        if k < 1 or not 1 <= tau <= T:
            raise ValueError(f"SpeeD: k must be at least 1 and tau lie in 1..{T}, got k = {k}, tau = {tau}")
        t = torch.arange(T, device=alphas_cumprod.device)
        self.tau = tau
        self.probs = torch.where(t < tau, k, 1.0) / (T + tau * (k - 1))
        if mirror is not None:
            moved = torch.zeros_like(self.probs).index_add(0, (t - mirror).abs(), self.probs)
            self.probs = (self.probs + moved) / 2

    @staticmethod
    def mirror_step(alphas_cumprod):
        """The authors' m, 642 on linear T = 1000: the first t where sqrt(1 - ab) grows by less than 0.1 / T, + 1."""
        growth = torch.gradient((1 - alphas_cumprod.cpu().double()).sqrt())[0]
        return min(int((growth < 0.1 / len(growth)).long().argmax()) + 1, len(growth) - 1)

    def sample(self, x0, step):
        self.probs = self.probs.to(x0.device)
        return torch.multinomial(self.probs, len(x0), replacement=True)


class CurriculumSampler:
    """Curriculum timestep schedule (CLTS): begin uniform, then train the easy, noisy timesteps less.

        p_n(t) = (1 - gamma_n) / T + gamma_n N(t; mu T, sigma T),    gamma_n = min(1, n / total_steps)

    N is normalised over 0..T-1, n: the step. Ours: gamma is 1 at total_steps. sigma > 0.
    Source: Xu et al., "Towards Faster Training of Diffusion Models: An Inspiration of A Consistency Phenomenon",
    arXiv:2404.07946: the idea is in its abstract, no code of the authors was found. Second-hand: the formula, mu = 0.3
    (best in the paper's ablation, third parties say), sigma = 0.5 (one source; the paper's value is not known to us).
    """

    def __init__(self, timesteps, total_steps, mu=0.3, sigma=0.5):
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
    """In place, the mean of tensor over the processes of torch.distributed; unchanged where none are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def policy_network(in_channels):
    """The adaptive sampler's policy: images [B, in_channels, H, W] -> [B, 2]. Its softplus is (a, b), 0.97 at first.
    The layers are as in the authors' code. Ours: images are resized to 8x8 first, which is cheap and takes any size."""
    layers = [nn.Upsample((8, 8), mode="bilinear")]
    for c_in, c_out in ((in_channels, 32), (32, 64), (64, 128)):
        # Pooling before the ReLU: the same result for a quarter of its work.
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)]
    nn.init.zeros_(layers[-1].weight)
    nn.init.constant_(layers[-1].bias, 0.5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def geometric_bins(timesteps, count):
    """0..timesteps-1 cut into at most count bins, finer at small t: (middle of each, how many t it holds)."""
    edges = (timesteps + 1) ** torch.linspace(0, 1, count + 1, dtype=torch.float64) - 1
    edges = edges.round().long().unique()
    widths = edges.diff()
    return edges[:-1] + widths // 2, widths


class AdaptiveSampler:
    """Adaptive sampling. Needs `average_over_processes`, `policy_network` and `geometric_bins`.

    A policy learns which t lower the bound. For each image x0 it gives (a, b) of a Beta distribution, taken at
    u_t = margin + (1 - 2 margin) (t + 0.5) / T, which are the T bin centres for margin = 0:

        P(t | x0) = (1 - floor) softmax over t of [(a - 1) log u_t + (b - 1) log(1 - u_t)] + floor / T

    Every `every` steps it measures what an update of the model changed: Delta^t = L_t before it - L_t after it,
    L_t being reward_weights[t] times the epsilon-MSE at t. S is a set of `selected` timesteps that stand for all.
      1. Delta^t of ONE image of the batch at up to `probe` timesteps becomes a row of the queue, which keeps `queue`;
      2. Delta^t of EVERY image at the t in S makes its advantage A: standardised over the batch for each t,
         summed over S, and standardised again (each of several processes: over its own images);
      3. REINFORCE: loss = -mean(A log P(t | x0) + entropy H), H the entropy of P, one step of Adam;
      4. S becomes the timesteps whose column of the queue best predicts the sum of Delta over all t (largest
         r^2): one of each of |S| equal parts of the probe. At first it is the middle one of each.
    Use: sample(x0, step); loss.backward(); before_update(model, step); optimizer.step(); after_update(model).

    Source: Kim et al., "Adaptive Non-Uniform Timestep Sampling for Diffusion Model Training", arXiv:2411.09998
    (CVPR 2025), and its authors' code: network, steps 1 to 4, |S| = 3, queue 20, gradient norm 1. Their reward is
    the sum of Delta over S plus entropy H, their probe = T, every = 40, lr = entropy = 1e-2.
    Ours: A as the reward; before and after share x_t and noise, so that Delta shows the update and not the draw, and
    are measured without dropout, outside autocast; probes lie denser at small t, each weighted by its bin's width; S
    has one t of each part, as small t alone tell little at first; Adam's beta2 of 0.99; `floor`, so that no t dies out.
    reward_weights: [T]. None: the bound's coefficients, as in the paper, but 0 where beta is capped at 0.999 (on the
    cosine schedule one such t is nearly all of the bound). They only decide which t become S, as A standardises each.
    Our variant rewards a lower training loss: its weights as reward_weights, entropy = margin = 0.1 (no pile at t = 0).
    Cost: 2 (probe + selected B) forwards of an image, as two batches, every `every` steps, where a step is worth 3 B;
    and the policy at every step. alphas_cumprod: [T], on the images' device. model: a module, model(x_t, t) -> eps, in
    training mode, not DDP's wrapper. Processes that share a seed share the policy. ValueError: selected > probe.
    """

    def __init__(
        self, alphas_cumprod, in_channels, reward_weights=None, every=10, selected=3,
        queue=20, probe=100, lr=1e-3, entropy=0.05, floor=0.01, margin=0.0,
    ):  # fmt: skip
        T = len(alphas_cumprod)
        device = alphas_cumprod.device
        grid, widths = geometric_bins(T, probe)
        if not 1 <= selected <= len(grid):
            raise ValueError(f"adaptive: selected must lie in 1..{len(grid)}, got {selected}")
        if reward_weights is None:
            ab = alphas_cumprod.cpu().double()
            alphas = ab / torch.cat([ab.new_ones(1), ab[:-1]])
            reward_weights = (1 - alphas) / (2 * alphas * (1 - ab) * math.log(2))
            reward_weights[alphas < 0.002] = 0
        self.reward_weights = reward_weights.float().to(device)
        self.alphas_cumprod = alphas_cumprod.float()
        self.every = every
        self.queue_length = queue
        self.entropy = entropy
        self.floor = floor
        self.grid = grid.to(device)
        self.widths = widths.to(device)
        u = margin + (1 - 2 * margin) * (torch.arange(T, dtype=torch.float64) + 0.5) / T
        self.log_u = torch.stack([u.log(), (-u).log1p()]).float().to(device)
        self.policy = policy_network(in_channels).to(device)  # from here to probs: the state of a run
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr, betas=(0.9, 0.99))
        self.queue = torch.zeros(0, len(grid), device=device)
        self.selected = torch.stack([part[len(part) // 2] for part in self.grid.tensor_split(selected)])
        self.probs = torch.full((T,), 1 / T, device=device)  # of the last batch, mean over its images
        # Between the calls of one step:
        self._batch = ()  # sample leaves (x0, t)
        self._probe = ()  # before_update leaves (x_t, t, noise, L_t), after_update empties it

    def state_dict(self):
        parts = {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | {"queue": self.queue, "selected": self.selected, "probs": self.probs}

    def load_state_dict(self, state):
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})  # lr stays
        self.probs.copy_(state["probs"])  # RuntimeError: another T
        self.queue = state["queue"].to(self.grid.device)
        self.selected = state["selected"].to(self.grid.device)

    def distribution(self, x0):
        """P(t | x0) of each image of the batch."""
        concentrations = F.softplus(self.policy(x0.float())) + 1e-5
        beta = torch.softmax((concentrations - 1) @ self.log_u, 1)
        probs = (1 - self.floor) * beta + self.floor / len(self.probs)
        return torch.distributions.Categorical(probs, validate_args=False)

    @torch.no_grad()
    def sample(self, x0, step):
        distribution = self.distribution(x0)
        self.probs = average_over_processes(distribution.probs.mean(0))
        t = distribution.sample()
        self._batch = (x0, t)
        return t

    @torch.no_grad()
    def _weighted_mse(self, model, x_t, t, noise):
        model.eval()  # no dropout, before and after
        mse = (model(x_t, t).float() - noise).square().flatten(1).mean(1)
        model.train()
        return self.reward_weights[t] * mse

    def before_update(self, model, step):
        """Measure L_t before the update. Does nothing unless step is a multiple of `every`."""
        if step % self.every:
            return
        x0 = self._batch[0]
        one = x0[torch.randint(len(x0), (1,), device=x0.device)]
        x = torch.cat([one.expand(len(self.grid), -1, -1, -1), x0.repeat(len(self.selected), 1, 1, 1)])
        t = torch.cat([self.grid, self.selected.repeat_interleave(len(x0))])
        noise = torch.randn_like(x)
        ab = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = ab.sqrt() * x + (1 - ab).sqrt() * noise
        self._probe = (x_t, t, noise, self._weighted_mse(model, x_t, t, noise))

    def after_update(self, model):
        """Measure L_t again, with the same x_t and noise; update the policy, the queue and S."""
        if not self._probe:
            return
        *probe, before = self._probe
        self._probe = ()
        delta = torch.nan_to_num(before - self._weighted_mse(model, *probe), 0.0, 0.0, 0.0)
        of_one, of_all = delta.tensor_split([len(self.grid)])
        self.update_policy(of_all.view(len(self.selected), -1))
        self.queue = torch.cat([self.queue, average_over_processes(of_one)[None]])[-self.queue_length :]
        if len(self.queue) >= 3:  # two points always lie on a line
            self.selected = self.grid[self.most_predictive(self.queue, self.widths, len(self.selected))]

    def update_policy(self, deltas):
        """One REINFORCE step on the images drawn last; deltas [selected, B], larger is better."""

        def standardize(x):  # over the images
            return (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 1e-12)

        x0, t = self._batch
        distribution = self.distribution(x0)
        advantage = standardize(standardize(deltas).sum(0))
        loss = -(advantage * distribution.log_prob(t) + self.entropy * distribution.entropy()).mean()
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.policy.parameters():
            average_over_processes(p.grad)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    @staticmethod
    def most_predictive(deltas, widths, count):
        """Cut the columns of deltas [n, G] into count parts; of each part the index of one column: the one with
        the largest squared correlation with deltas @ widths. int64 [count]."""
        x = deltas - deltas.mean(0)
        y = x @ widths.to(x.dtype)
        r2 = torch.nan_to_num((y @ x) ** 2 / (x.square().sum(0) * y.square().sum()), -1.0)
        parts = torch.arange(len(r2), device=r2.device).tensor_split(count)
        return torch.cat([part[r2[part].argmax(0, keepdim=True)] for part in parts])  # without waiting for a GPU


def change_aware_weights(alphas_cumprod, lam=0.6, tau=None):
    """SpeeD's weighting: timesteps where the noise changes fast count more. Pass to `normalize_weights`.

        g = gradient of (1 - ab) along t, rescaled linearly so that min g -> 1 - lam, max g -> lam    [T]

    Source: Wang et al., arXiv:2405.17403. lam = 0.6 is that of the authors' runs. tau=None: the formula on
    all t, as third parties read it. With tau (`SpeeDSampler(...).tau`) the weight is 1 for t >= tau, more than the
    others have, as in the authors' code. alphas_cumprod: [T]. ValueError: lam outside [0.5, 1], or T < 3.
    """
    if not 0.5 <= lam <= 1 or len(alphas_cumprod) < 3:
        raise ValueError(f"change-aware: lam {lam} must lie in [0.5, 1], T {len(alphas_cumprod)} be at least 3")
    g = torch.gradient(1 - alphas_cumprod.cpu().double())[0]
    g = (g - g.min()) / (g.max() - g.min())
    weights = (1 - lam) + (2 * lam - 1) * g
    if tau is not None:
        weights[tau:] = 1
    return weights.to(alphas_cumprod)


def min_snr_weights(alphas_cumprod, gamma=5.0):
    """Min-SNR-gamma for epsilon prediction, [T]: min(SNR, gamma) / SNR, SNR = ab / (1 - ab). arXiv:2303.09556."""
    return (gamma * (1 - alphas_cumprod) / alphas_cumprod).clamp(max=1)  # the same, also for SNR = 0


def normalize_weights(weights, probs):
    """weights [T] scaled (our choice) so that sum(probs * result) = 1, with the sampler's probs [T]. A learning rate
    means then the same for every sampler and weight. Where probs move, call it at every step."""
    return weights / (probs.to(weights.device) * weights).sum()


def momentum_decay(progress, beta1=0.9):
    """Momentum decay with learning-rate compensation (MDLRC): (beta1, lr_scale) at progress s = n / N; b = beta1 < 1.

        beta1(s) = b (1 - s) / ((1 - b) + b (1 - s)),    lr_scale(s) = (1 - b) / (1 - beta1(s)) = 1 - b s

    Large momentum oscillates on a smooth loss surface, so it is lowered as training goes on; lr (1 - beta1) stays
    constant, so that updates are not amplified. Write both into Adam's param_groups at every step.
    Source: Xu et al., arXiv:2404.07946: the idea is in its abstract, no code of the authors was found. Second-hand: the
    compensation and b = 0.9. The rule for beta1(s) is Demon's (Chen et al., arXiv:1910.04952).
    """
    left = beta1 * (1 - progress)
    return left / ((1 - beta1) + left), 1 - beta1 * progress


# 3 U-Net ----------------------------------------------------------------------------------------------------
# DDPM's network, small: residual blocks that know t, self-attention at low resolutions, and skip connections from
# each block on the way down to one on the way up. To copy the section you need math, torch, nn and F.


def group_norm(channels):
    """At most 32 groups, of 4 channels or more: in a group of one channel the time embedding would cancel."""
    return nn.GroupNorm(math.gcd(32, channels, max(1, channels // 4)), channels)


def zeroed(layer):
    """The layer with weights and biases of zero, so that what it ends adds nothing at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class SelfAttention(nn.Module):
    """Self-attention over the H x W positions, one head as in DDPM; keeps [B, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        h = F.scaled_dot_product_attention(*qkv.chunk(3, -1))  # [B, 1 head, H W, C]
        return x + self.out(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class ResBlock(nn.Module):
    """[B, c_in, H, W] and the time embedding [B, emb] -> [B, c_out, H, W]; attend: then self-attention."""

    def __init__(self, c_in, c_out, emb, dropout, attend):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb, c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = SelfAttention(c_out) if attend else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """DDPM's U-Net: model(x_t [B, C, H, W], t int64 [B]) -> eps [B, C, H, W].

    Level i has width * mults[i] channels, num_blocks residual blocks on the way down, one more on the way up, and half
    the resolution of level i - 1. attention: sides of the feature maps with self-attention; None: the lowest level's;
    the middle has it, too, unless empty. patch: images are first folded to 1/patch of their side, with patch^2 times
    the channels: cheaper. ValueError: width is odd, the levels do not divide image_size, or there is no such side.
    """

    def __init__(self, in_channels, width, mults, num_blocks, attention, dropout, image_size=32, patch=1):
        super().__init__()
        shrink = patch * 2 ** (len(mults) - 1)
        if width % 2 or image_size % shrink:
            raise ValueError(f"width {width} must be even and image_size {image_size} divide by {shrink}")
        sides = [image_size // patch // 2**level for level in range(len(mults))]
        if attention is None:
            attention = sides[-1:]
        if not set(attention) <= set(sides):
            raise ValueError(f"attention {list(attention)}: the feature maps have the sides {sides}")
        emb = 4 * width
        self.width = width
        self.patch = patch
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        channels = width
        skips = [width]  # the channels of each feature map that the way up receives
        for level, mult in enumerate(mults):
            if level:
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
            for _ in range(num_blocks):
                self.down.append(ResBlock(channels, width * mult, emb, dropout, sides[level] in attention))
                channels = width * mult
                skips.append(channels)
        self.middle1 = ResBlock(channels, channels, emb, dropout, attend=bool(attention))
        self.middle2 = ResBlock(channels, channels, emb, dropout, attend=False)
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(num_blocks + 1):
                c_in = channels + skips.pop()
                self.up.append(ResBlock(c_in, width * mult, emb, dropout, sides[level] in attention))
                channels = width * mult
            if level:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.norm = group_norm(channels)
        self.head = zeroed(nn.Conv2d(channels, in_channels * patch**2, 3, padding=1))

    def forward(self, x, t):
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
        angles = t.float()[:, None] * frequencies
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = layer(F.interpolate(h, scale_factor=2.0))
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)


# 4 Data -----------------------------------------------------------------------------------------------------
# Every data set ends as two uint8 tensors [N, C, size, size]: one to train on, one held out.


@contextlib.contextmanager
def explained(problem):
    """Whatever the body raises, and libraries raise many kinds, becomes a UserError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{problem}: {reason or type(error).__name__}") from error


def render_digits(count, size=16, seed=0):
    """Digits in Pillow's font at random size, place, angle: uint8 [count, 1, size, size], labels [count]."""
    rng = random.Random(seed)
    canvas = 4 * size  # drawn four times as large, so that strokes are smooth
    fonts = [ImageFont.load_default(canvas * s / 64) for s in range(50, 73, 3)]
    images = np.empty((count, 1, size, size), np.uint8)
    labels = np.empty(count, np.int64)
    for i in range(count):
        labels[i] = rng.randrange(10)
        x = canvas / 2 + rng.uniform(-canvas, canvas) / 20
        y = canvas / 2 + rng.uniform(-canvas, canvas) / 20
        image = Image.new("L", (canvas, canvas))
        ImageDraw.Draw(image).text((x, y), str(labels[i]), fill=255, font=rng.choice(fonts), anchor="mm")
        image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        images[i, 0] = np.asarray(image.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(images), torch.from_numpy(labels)


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which runs code


def read_image(path, size):
    """An image file as uint8 [3, size, size], upright, on white, centre-cropped; or a str, what is wrong with it."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF":  # Pillow would clip these
                raise ValueError("more than 8 bits a channel, convert it to 8 bits")
            with contextlib.suppress(Exception):  # a broken EXIF block: the image stays as it lies
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds
        return f"{path} ({error})"


def read_folder(folder, size):
    """uint8 [N, 3, size, size] of the image files in and below folder. UserError names those that fail."""
    endings = [ending for ending, name in Image.registered_extensions().items() if name in FORMATS]
    found = []
    for here, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
        if {"config.json", "metrics.csv"} <= set(names):
            below.clear()  # a run of this script: its samples are no data
        else:
            found += [Path(here, name) for name in names if not name.startswith(".")]
    paths = sorted(path for path in found if path.suffix.lower() in endings)
    if not paths:
        raise UserError(f"--data-dir {folder}: no such folder, or no image ({', '.join(FORMATS)}) in it or below it")
    if RANK == 0 and len(paths) < len(found):
        print(f"{folder}: {len(found) - len(paths)} other files are not read")
    images = thread_map(read_image, paths, [size] * len(paths), desc="reading", leave=False, disable=None)
    if failed := [image for image in images if isinstance(image, str)]:
        raise UserError(f"{len(failed)} files cannot be read as images, fix or remove them: {', '.join(failed[:5])}")
    return torch.stack(images)


def load_dataset(name, data_dir, size):
    """(train, held_out): uint8 [N, C, size, size]. Held out: the test split or else a random 5% (1 to 2,500)."""
    if name in ("digits", "folder"):
        images = render_digits(10_240, size)[0] if name == "digits" else read_folder(data_dir, size)
        held_out = min(max(1, len(images) // 20), 2500)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[order[:-held_out]], images[order[-held_out:]]
    from torchvision import datasets, transforms  # imported late: it is slow, and a wrong flag should fail first

    dataset = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    with explained(f"{name} is not in {data_dir} and cannot be downloaded; take --dataset digits or folder"):
        parts = [torch.as_tensor(dataset(data_dir, train, download=True).data) for train in (True, False)]
    parts = [part.view(*part.shape[:3], -1).permute(0, 3, 1, 2) for part in parts]  # grey ones are [N, H, W]
    return tuple(transforms.functional.resize(part, [size, size]) for part in parts)


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1], channels_last."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


# 5 Evaluation -----------------------------------------------------------------------------------------------
# Two kinds. val_mse, a mean over t, and the bound, a sum that bounds the likelihood, say how well the model predicts
# noise. The Frechet distance says how far its samples are from the data. A method may win by one and lose by the other.


@torch.no_grad()
def evaluate(model, diffusion, images, count=1024):
    """(val_mse, val_vlb) of model(x_t, t) -> eps, in eval mode, on uint8 images [N, C, H, W], with fixed t and noise.

    val_mse: the epsilon-MSE, mean over t, from count / 2 evenly spaced t.
    val_vlb: the sum over t of vlb_coefficients[t] times the MSE at t, in bits per dimension. By importance sampling:
    the other count / 2 timesteps lie as dense as these coefficients are large, so the sum is their mean MSE times the
    sum of the coefficients. On the cosine schedule nearly all of it is the last timestep, whose beta is capped.
    """
    quantiles = (torch.arange(count // 2, dtype=torch.float64) + 0.5) / (count // 2)
    coefficients = diffusion.vlb_coefficients.cpu().double()
    even = (quantiles * diffusion.timesteps).long()
    dense = torch.searchsorted(coefficients.cumsum(0) / coefficients.sum(), quantiles)
    times = torch.cat([even, dense]).to(images.device)
    indices = torch.arange(len(times), device=images.device) % len(images)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for i, t in zip(indices.split(128), times.split(128)):
        x0 = to_float(images[i])
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        eps = model(diffusion.q_sample(x0, t, noise), t).float()
        errors.append((eps - noise).square().flatten(1).mean(1))
    val_mse, mean_mse = torch.cat(errors).view(2, -1).mean(1).tolist()
    return val_mse, mean_mse * coefficients.sum().item()


def draw_samples(model, diffusion, args, count, seed=0):
    """uint8 [count, C, H, W] on the CPU, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for part in tqdm(torch.arange(count).split(256), "sampling", leave=False, disable=None):
        shape = (len(part), args.channels, args.image_size, args.image_size)
        images.append(diffusion.sample(model, shape, args.method, args.sampling_steps, generator=generator))
    return (torch.cat(images).cpu() * 127.5 + 127.5).round().byte()


def save_grid(images, path):
    """The first 64 of uint8 images [N, C, H, W] as one PNG, eight in a row, small ones enlarged."""
    from torchvision.utils import save_image

    enlarged = F.interpolate(images[:64] / 255, scale_factor=max(1, 64 // images.shape[-1]))
    save_image(enlarged, path, pad_value=0.5)


def digit_features():
    """A function: float [N, 3, H, W] in 0..255 -> [N, 64], of a digit classifier that it trains. Seeds torch."""
    images, labels = render_digits(10_240, 16, seed=1)
    x = to_float(images)
    torch.manual_seed(0)
    strokes = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)]
    classifier = nn.Sequential(*strokes, *head)
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(classifier(x[batch]), labels[batch]).backward()
            optimizer.step()

    def features(images):
        grey = F.interpolate(images.cpu().mean(1, keepdim=True), (16, 16), mode="area")
        return classifier[: len(strokes)](grey / 127.5 - 1).amax((2, 3))

    return features


def inception_features(device):
    """Like digit_features, but InceptionV3's, [N, 2048], resized as by clean-fid, which makes FIDs comparable."""
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    model = build_feature_extractor("clean", device, use_dataparallel=False)
    resize = build_resizer("clean")

    def features(images):
        resized = [resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        return model(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(device))

    return features


class FrechetDistance:
    """How far the features of images are from those of the training images, both taken as Gaussians a and b:

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    features: "digits" for digit_features; a TorchScript file, float images [N, 3, H, W] in 0..255 -> [N, D],
    which runs code: open your own files; None for clean-fid's InceptionV3, and only that is FID.
    images: the training images, uint8 [N, C, H, W]. published: clean-fid's InceptionV3 statistics of CIFAR-10 replace
    them, which saves time. UserError: features that cannot be had, and what to do.
    """

    def __init__(self, features, device, images, published=False):
        self.name = f"FD ({Path(features).name})" if features else "FID"
        self.device = device
        with explained(f"--fid-features {features or '(InceptionV3)'} cannot be used; digits needs no download"):
            if features == "digits":
                self.features = digit_features()
            elif features:
                self.features = torch.jit.load(features, device).eval()
            else:
                self.features = inception_features(device)
            if published:
                from cleanfid.features import get_reference_statistics

                self.reference = [torch.from_numpy(x) for x in get_reference_statistics("cifar10", 32, split="train")]
            else:
                self.reference = self.statistics(images)

    @torch.no_grad()
    def statistics(self, images):
        """(mean [D], covariance [D, D]) of the features of uint8 images [N, C, H, W]; grey ones become RGB."""
        parts = [self.features(part.expand(-1, 3, -1, -1).float().to(self.device)) for part in images.split(256)]
        found = torch.cat(parts).cpu().double()
        return found.mean(0), found.T.cov()

    def __call__(self, images):
        """The distance of uint8 images [N, C, H, W] to the training images."""
        mean_a, cov_a = self.statistics(images)
        mean_b, cov_b = self.reference
        roots = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
        return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots).item()


# 6 Training -------------------------------------------------------------------------------------------------
# The loop is flat: see what is due, save, measure, take a step. All randomness of a step follows from the seed and
# the step, so a resumed run draws what the unbroken one would have drawn. args are the settings of section 8.

LOG_EVERY = 25  # steps: reading the loss waits for the device
PROGRESS = ("step", "seconds", "rows", "losses")  # what a checkpoint holds of Training's own
YARDSTICKS = ("val_mse", "val_vlb", "fid")
METRICS = ("step", "images", "seconds", "loss", "lr", "beta1", *YARDSTICKS)


def build_unet(args):
    shape = (args.width, args.mults, args.num_blocks, args.attention, args.dropout, args.image_size, args.patch)
    return UNet(args.channels, *shape)


def build_weights(args, ab):
    """The raw loss weights [T] of these settings, for alphas_cumprod ab [T]."""
    if args.weighting == "min-snr":
        return min_snr_weights(ab)
    if args.weighting == "change-aware" or (args.weighting == "auto" and args.strategy == "speed"):
        tau = SpeeDSampler(ab, args.speed_k, args.speed_tau).tau if args.speed_variant == "code" else None
        return change_aware_weights(ab, args.speed_lam, tau)
    return torch.ones_like(ab)


def build_sampler(args, ab):
    """The timestep sampler of these settings, for alphas_cumprod ab [T]."""
    if args.strategy == "speed":
        mirror = SpeeDSampler.mirror_step(ab) if args.speed_variant == "code" else None
        return SpeeDSampler(ab, args.speed_k, args.speed_tau, mirror)
    if args.strategy == "logit-normal":
        return LogitNormalSampler(len(ab))
    if args.strategy == "curriculum":
        return CurriculumSampler(len(ab), args.steps, args.curriculum_mu, args.curriculum_sigma)
    if args.strategy == "adaptive":
        given = {"every": args.adaptive_every, "lr": args.adaptive_lr, "entropy": args.adaptive_entropy or 0.05}
        if args.adaptive_reward == "loss":
            given |= {"reward_weights": build_weights(args, ab), "margin": 0.1, "entropy": args.adaptive_entropy or 0.1}
        return AdaptiveSampler(ab, args.channels, **given)
    return UniformSampler(len(ab))


class Training:
    """The state of a run, and one step. Weights and policy are the same in every process.

    Every strategy sees the same images, flips and noise under one seed: they are drawn first. Of several processes
    each takes its share of the batch, with noise, timesteps and dropout of its own. images: uint8 [N, C, H, W].
    """

    def __init__(self, args, images, device):
        self.args = args
        self.device = device
        self.images = images.to(device)
        enabled = args.amp != "off" and (args.amp != "auto" or device.type == "cuda")
        self.autocast = torch.autocast(device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16, enabled)
        torch.manual_seed(args.seed)  # the model first: every strategy starts from the same one
        self.model = build_unet(args).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.diffusion = GaussianDiffusion(args.schedule, args.timesteps, device)
        self.sampler = build_sampler(args, self.diffusion.alphas_cumprod)
        self.raw_weights = build_weights(args, self.diffusion.alphas_cumprod)
        if args.compile:
            self.model.compile()
            self.ema.compile()
        # DDP averages the gradients of what passes through it; all else calls the bare model.
        self.ddp_model = nn.parallel.DistributedDataParallel(self.model) if WORLD_SIZE > 1 else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.parts = ["model", "ema", "optimizer", "scaler"]  # what has a state_dict
        if args.strategy == "adaptive":
            self.parts.append("sampler")
        self.step = 0
        self.seconds = 0.0  # of training alone
        self.rows = []  # of metrics.csv
        self.losses = []  # since the last row, not yet read from the device
        self.bad_in_a_row = torch.tensor(0, device=device)
        self.order = None  # of this epoch's images, cut into batches

    def state_dict(self):
        state = {name: getattr(self, name).state_dict() for name in self.parts}
        return state | {name: getattr(self, name) for name in PROGRESS} | {"args": vars(self.args)}

    def load_state_dict(self, state):
        for name in self.parts:
            if state.get(name):  # a scaler or sampler that was off left nothing
                getattr(self, name).load_state_dict(state[name])
        for name in PROGRESS:
            setattr(self, name, state[name])

    def batch(self):
        """The next images, float [B, C, H, W]: each epoch in its own order, less an incomplete last batch."""
        args = self.args
        epoch, batch = divmod(self.step, len(self.images) // args.batch_size)
        if batch == 0 or self.order is None:
            shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.images), generator=shuffle).to(self.device).split(args.batch_size)
        x0 = to_float(self.images[self.order[batch].chunk(WORLD_SIZE)[RANK]])
        if args.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=self.device) < 0.5, x0.flip(-1), x0)
        return x0

    def train_step(self):
        """One update, from this step's images to the weight average. Waits for a GPU once an epoch, adaptive always."""
        args = self.args
        # A CPU generator keeps only 32 bits of a seed: a large odd factor keeps the ranks' seeds apart.
        seed = args.seed * 1_000_003 + RANK * 2_654_435_769 + 2 * self.step
        torch.manual_seed(seed)
        x0 = self.batch()
        noise = torch.randn_like(x0)
        t = self.sampler.sample(x0, self.step)

        torch.manual_seed(seed + 1)  # for dropout and probes, whatever the sampler drew
        with self.autocast:
            eps = self.ddp_model(self.diffusion.q_sample(x0, t, noise), t)
        mse = (eps.float() - noise).square().flatten(1).mean(1)
        loss = (normalize_weights(self.raw_weights, self.sampler.probs)[t] * mse).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # One inf or nan has made every gradient 0 or nan: all become 0, Adam's momentum goes on; fp16 skips the step.
        for p in self.model.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        loss = average_over_processes(loss.detach())
        self.losses.append(loss)
        self.bad_in_a_row = torch.where((loss + norm).isfinite(), 0, self.bad_in_a_row + 1)

        beta1, lr_scale = momentum_decay(self.step / args.steps) if args.momentum_decay else (0.9, 1.0)
        lr = args.lr * lr_scale * min(1.0, (self.step + 1) / args.warmup)
        self.optimizer.param_groups[0].update(lr=lr, betas=(beta1, 0.999))
        if args.strategy == "adaptive":
            self.sampler.before_update(self.model, self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if args.strategy == "adaptive":
            self.sampler.after_update(self.model)
        # The average forgets the random start: its decay grows to the final value over the first steps.
        average = get_ema_multi_avg_fn(min(args.ema_decay, (1 + self.step) / (10 + self.step)))
        average(list(self.ema.parameters()), list(self.model.parameters()), None)
        self.step += 1

    def log(self, folder, evaluates, held_out, distance):
        """Add a row to metrics.csv. If evaluates: measure the EMA model, too, save samples and print a line."""
        group = self.optimizer.param_groups[0]
        row = {"step": self.step, "images": self.step * self.args.batch_size, "seconds": self.seconds}
        row |= {"loss": torch.tensor(self.losses).nanmean().item(), "lr": group["lr"], "beta1": group["betas"][0]}
        if evaluates:
            with self.autocast:
                row["val_mse"], row["val_vlb"] = evaluate(self.ema, self.diffusion, held_out.to(self.device))
                count = self.args.fid_samples if distance else 64
                samples = draw_samples(self.ema, self.diffusion, self.args, count)
            save_grid(samples, folder / f"samples-{self.step}.png")
            text = f"loss {row['loss']:.4f}, val_mse {row['val_mse']:.5f}, val_vlb {row['val_vlb']:.4f} bits/dim"
            if distance:
                row["fid"] = distance(samples)
                text += f", {distance.name} {row['fid']:.4g}"
            tqdm.write(f"step {self.step}: {text}, {row['images'] / self.seconds:.4g} images/s")
        self.rows.append(row)
        with open(folder / "metrics.csv", "w", newline="") as file:  # if cut short, --resume mends it
            writer = csv.DictWriter(file, METRICS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def catch_signals():
    """A list to which SIGINT, SIGTERM and SIGHUP are appended; a Ctrl-C after the first of them ends the process."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # not SIGHUP: a terminal that closes may send two

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows lacks SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, receive)
    return received


def new_folder(path):
    """Make path or, where it exists, path-2, path-3 and so on. OSError: it cannot be made."""
    folder = Path(path)
    number = 1
    while folder.exists():
        number += 1
        folder = Path(f"{path}-{number}")
    folder.mkdir(parents=True)
    return folder


def pick_device(name):
    """--device, or the best there is. UserError if this machine lacks it."""
    with explained(f"--device {name or LOCAL_RANK} is not available here, use cpu, cuda, cuda:N or mps"):
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(LOCAL_RANK if device.index is None else device.index)
        torch.zeros(1, device=device).item()
    return device


def train(args, checkpoint):
    """Train as args say, from the start or on from a checkpoint. The exit status: 0, or 128 + a signal."""
    if RANK == 0 and not args.resume:  # fails at once, not after minutes, where no folder can be made
        with explained(f"no folder can be made at --out {args.out or 'runs'}"):
            parent = next(path for path in Path(args.out or "runs/new").absolute().parents if path.exists())
            tempfile.TemporaryDirectory(dir=parent).cleanup()
    if args.fid_samples and args.fid_features not in (None, "digits"):
        warnings.filterwarnings("ignore", "`torch.jit")  # PyTorch means to replace TorchScript
        with explained(f"--fid-features {args.fid_features}: no such file, or not TorchScript"):
            torch.jit.load(args.fid_features, "cpu")  # fails now, not after the data is read
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    torch.backends.cudnn.benchmark = True
    if WORLD_SIZE > 1:  # on one machine RANK and WORLD_SIZE suffice
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        distributed.init_process_group(timeout=timedelta(days=1))  # the others wait while rank 0 measures
    # On each machine one process reads the data first, as it may download them; the others wait, then read.
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        distributed.barrier()
    images, held_out = load_dataset(args.dataset, args.data_dir, args.image_size)
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        distributed.barrier()
    if args.batch_size > len(images) or args.batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size must be at most the {len(images)} images, a multiple of {WORLD_SIZE} processes")
    with explained("the model does not fit the checkpoint, or the memory"):
        run = Training(args, images, device)
        if checkpoint:
            run.load_state_dict(checkpoint)
    distance = None
    if RANK == 0 and args.fid_samples:
        published = args.dataset == "cifar10" and args.image_size == 32 and not args.fid_features
        distance = FrechetDistance(args.fid_features, device, images, published)
        real = held_out[: args.fid_samples]
        if len(real) > 1:
            noise = torch.randint(256, real.shape).byte()
            print(f"{distance.name} of {len(real)} held-out images {distance(real):.4g}, noise {distance(noise):.4g}")
    if RANK == 0:  # it alone measures, writes and prints
        folder = Path(args.resume or new_folder(args.out or f"runs/{args.dataset}-{args.strategy}"))
        config = vars(args) | {"device": str(device), "out": None, "resume": None}
        config["data"] = f"{args.dataset}, {len(images)} images {list(images.shape[1:])}"
        config["distance"] = distance and distance.name
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        print(f"{folder}: {config['data']}, {len(held_out)} more held out, on {WORLD_SIZE} x {device}")

    def due(every):  # at its multiples and at the last step
        return run.step > 0 and (run.step % every == 0 or run.step == args.steps)

    received = catch_signals()
    bar = tqdm(desc=args.strategy, initial=run.step, total=args.steps, disable=RANK or None)
    clock = time.perf_counter()
    while True:
        compares = args.fid_samples and due(args.fid_every or args.steps)
        evaluates = compares or due(args.eval_every or max(1, args.steps // 10))
        saves = evaluates or due(args.checkpoint_every or args.steps)
        logs = saves or due(LOG_EVERY)
        stop = received[0] if received and (logs or WORLD_SIZE == 1) else 0
        if WORLD_SIZE > 1 and logs:  # asking the others takes time: all stop together where a row is due
            agreed = torch.tensor(stop)
            distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
            stop = agreed.item()
        if logs or stop:
            if run.bad_in_a_row >= 10:  # waits for the device
                raise UserError(f"step {run.step}: ten losses or gradients in a row were not finite, lower --lr")
            run.seconds += time.perf_counter() - clock
            if RANK == 0 and (saves or stop):  # before measuring, which may take long; a resumed run measures again
                with explained(f"{folder}/checkpoint.pt could not be written, an older one, if any, is whole"):
                    torch.save(run.state_dict(), folder / "new-checkpoint.pt")
                    os.replace(folder / "new-checkpoint.pt", folder / "checkpoint.pt")  # never a half
            if RANK == 0 and not stop:
                run.log(folder, evaluates, held_out, compares and distance)
            run.losses.clear()
            clock = time.perf_counter()
        if stop or run.step == args.steps:
            break
        run.train_step()
        bar.update()

    bar.close()
    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    if RANK == 0 and stop:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"stopped at step {run.step}: go on with --resume {folder}", file=sys.stderr)
    elif RANK == 0:
        print(f"{run.seconds:.0f} s of training; samples and all else in {folder}")
    return 128 + stop if stop else 0


def generate(args, checkpoint):
    """Write args.generate samples of a checkpoint's EMA model as PNG files, and a grid of the first 64."""
    device = pick_device(args.device)
    model = build_unet(args)
    model.load_state_dict(checkpoint["ema"])
    model.eval().to(device, memory_format=torch.channels_last)
    diffusion = GaussianDiffusion(args.schedule, args.timesteps, device)
    folder = new_folder(args.out or Path(args.checkpoint).parent / "generated")
    images = draw_samples(model, diffusion, args, args.generate, args.seed)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{i:06d}.png")
    save_grid(images, folder / "grid.png")
    print(f"{len(images)} images and grid.png in {folder}")
    return 0


# 7 Report ---------------------------------------------------------------------------------------------------
# Runs that differ in the seed alone are one setting, the first run's is the baseline. Speed-up of a run: the baseline's
# steps / the step where its best value so far reaches the baseline's mean last one, interpolated between measurements.


def read_curve(run, column):
    """(steps, values), float [N] each: what a run, a folder, measured of a column of its metrics.csv, and when."""
    with open(Path(run, "metrics.csv")) as file:
        points = [(row["step"], row[column]) for row in csv.DictReader(file) if row[column]]
    return np.array(points, float).reshape(-1, 2).T


def report(runs, out):
    """Print, for each setting, what its runs (folders) measured last, and how much sooner they were than the first
    setting's: mean (min..max). With out: draw the means into this new folder. ValueError: they do not compare."""
    configs = {run: json.loads(Path(run, "config.json").read_text()) for run in runs}
    for key in ("data", "batch_size", "schedule", "timesteps", "distance", "fid_samples", "method", "sampling_steps"):
        if len({str(config[key]) for config in configs.values()}) > 1:
            raise ValueError(f"runs that differ in {key} do not compare")
    settings = {}  # runs that differ in the seed alone, and measured at the same steps, are one
    for run, config in configs.items():
        measured = [list(read_curve(run, column)[0]) for column in YARDSTICKS]
        settings.setdefault(str(config | {"seed": 0, "measured": measured}), []).append(run)
    baseline, *_ = settings.values()
    if out:
        from matplotlib import pyplot

        pyplot.figure(figsize=(18, 6))
    for panel, column in enumerate(YARDSTICKS, 1):
        if lacking := [run for run in configs if not read_curve(run, column).size]:
            print(f"{column}: not measured by {' '.join(lacking)}")
            continue
        steps, goal = np.mean([read_curve(run, column)[:, -1] for run in baseline], 0)
        print(f"{column}: last value, speed-up in steps to {goal:.4g}, {baseline[0]}'s at {steps:g} (nan: not by all)")
        for number, group in enumerate(settings.values()):
            x, y = np.stack([read_curve(run, column) for run in group], 1)  # [runs, N]; interp wants rising x: -best
            sooner = [steps / np.interp(-goal, -best, x[0], right=math.nan) for best in np.minimum.accumulate(y, 1)]
            last, gain = [f"{np.mean(v):.3g} ({np.min(v):.3g}..{np.max(v):.3g})" for v in (y[:, -1], sooner)]
            print(f"  {last:24} {gain:20} {' '.join(group)}")
            if out:
                axes = pyplot.subplot(1, 3, panel, title=f"{column} over steps")
                axes.semilogy(x[0], y.mean(0), color=pyplot.cm.tab20(number), label=group[0])
    if out:
        pyplot.legend(bbox_to_anchor=(1, 1))
        pyplot.savefig(new_folder(out) / "curves.png", bbox_inches="tight")
    return 0


# 8 Command line ---------------------------------------------------------------------------------------------
# What differs by data set. digits: the least that draws legible digits on two CPU cores in five minutes.
# cifar10, and folder: as the adaptive sampler's authors have it, but for their quad schedule.
DIGITS = {"image_size": 16, "patch": 2, "width": 48, "mults": [1, 1], "num_blocks": 1, "steps": 1600, "lr": 2e-3}
DIGITS |= {"ema_decay": 0.998, "fid_samples": 512, "fid_features": "digits"}
MNIST = {"image_size": 28, "width": 64, "mults": [1, 2, 2], "steps": 20_000, "lr": 1e-3, "ema_decay": 0.999}
CIFAR10 = {"image_size": 32, "width": 128, "mults": [1, 2, 2, 2], "attention": [16], "dropout": 0.1, "flip": True}
CIFAR10 |= {"steps": 100_000, "lr": 2e-4, "ema_decay": 0.9999}
PRESETS = {"digits": DIGITS, "mnist": MNIST, "fashion-mnist": MNIST, "cifar10": CIFAR10, "folder": CIFAR10}
STRATEGIES = ("uniform", "logit-normal", "speed", "curriculum", "adaptive")
WEIGHTINGS = ("auto", "none", "change-aware", "min-snr")


def within(kind, low, high):
    """An argparse type: a number of that kind from low to high, which nan is not."""

    def number(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    number.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # for the error message
    return number


WHOLE = within(int, 0, 10**9)
COUNT = within(int, 1, 10**9)
POSITIVE = within(float, 1e-12, 1e12)
SIZE = within(int, 1, 512)
SHARE = within(float, 0, 1)


def make_parser():
    """All flags but --help. What a data set decides gets its default from PRESETS."""
    options = {"usage": argparse.SUPPRESS, "allow_abbrev": False, "add_help": False}  # no usage: an error is one line
    options |= {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "description": __doc__.split("\n")[0]}
    parser = argparse.ArgumentParser("speedup_diffusion.py", **options)
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group().add_argument
    add("--strategy", choices=STRATEGIES, default="uniform", help="how timesteps are drawn")
    add("--weighting", choices=WEIGHTINGS, default="auto", help="auto: change-aware for speed, else none")
    add("--momentum-decay", action=argparse.BooleanOptionalAction, default=False, help="lower beta1 and lr with time")
    add("--speed-variant", choices=("paper", "code"), default="paper", help="SpeeD's formula or its authors' runs")
    add("--speed-k", type=POSITIVE, default=5.0, help="SpeeD: t < tau is drawn k times as often")
    add("--speed-tau", type=COUNT, help="SpeeD: 1..T; None: the number of t with alphas_cumprod >= 0.0069")
    add("--speed-lam", type=SHARE, default=0.6, help="change-aware weights lie in [1 - lam, lam]; code: 1 from tau on")
    add("--curriculum-mu", type=SHARE, default=0.3, help="centre of the Gaussian, in units of T")
    add("--curriculum-sigma", type=POSITIVE, default=0.5, help="its width, in units of T")
    add("--adaptive-reward", choices=("bound", "loss"), default="bound", help="what the policy learns to lower")
    add("--adaptive-every", type=COUNT, default=10, help="steps from one update of the policy to the next")
    add("--adaptive-lr", type=SHARE, default=1e-3, help="learning rate of the policy")
    add("--adaptive-entropy", type=POSITIVE, help="weight of the policy's entropy; None: 0.05, for the loss 0.1")
    add("--dataset", choices=PRESETS, default="digits", help="digits are rendered here, folder is your images")
    add("--data-dir", default="data", help="where the images are, or are downloaded to")
    add("--image-size", type=SIZE, help="side of the square images")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror training images half of the time")
    add("--schedule", choices=("linear", "cosine", "quad"), default="linear", help="how fast the noise grows")
    add("--timesteps", type=within(int, 3, 100_000), default=1000, help="T")
    add("--width", type=SIZE, help="channels of the first level")
    add("--mults", type=SIZE, nargs="+", help="channels of each level, in units of width")
    add("--num-blocks", type=SIZE, default=2, help="residual blocks of a level")
    add("--attention", type=SIZE, nargs="*", help="feature map sides with attention; None: the lowest level's")
    add("--dropout", type=SHARE, default=0.0, help="in the residual blocks")
    add("--patch", type=SIZE, default=1, help="pixel-unshuffle factor in front of the U-Net")
    add("--steps", type=COUNT, help="training steps")
    add("--batch-size", type=COUNT, default=128, help="images a step, of all processes together")
    add("--lr", type=POSITIVE, help="learning rate of Adam, after the warm-up")
    add("--warmup", type=COUNT, help="steps to the full learning rate; None: 5%% of a new run's --steps")
    add("--ema-decay", type=SHARE, help="of the weight average that is evaluated and sampled")
    add("--seed", type=WHOLE, default=0, help="of model, order, noise, timesteps and --generate, not of the digits")
    add("--eval-every", type=COUNT, help="steps between measurements, samples, checkpoints; None: a tenth")
    add("--checkpoint-every", type=COUNT, help="steps between further checkpoints, and rows; None: there are none")
    add("--device", help="cpu, cuda, cuda:N or mps; None: the best there is")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="auto: on CUDA bf16, else off")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="takes minutes, for long runs on a GPU")
    add("--method", choices=("ddim", "ddpm"), default="ddim", help="ddpm visits every timestep")
    add("--sampling-steps", type=COUNT, help="timesteps ddim visits; None: 50, at most T")
    add("--fid-samples", type=WHOLE, default=0, help="samples for the Frechet distance; 0: it is not measured")
    add("--fid-every", type=COUNT, help="steps between its measurements; None: at the end alone")
    add("--fid-features", help="digits, or a TorchScript file, which runs code; None: InceptionV3, that is FID")
    add("--out", help="a new folder for the results; None: runs/DATASET-STRATEGY, or beside --checkpoint")
    mode("--resume", metavar="RUN", help="go on with the run in this folder; flags beside it change its settings")
    mode("--generate", type=COUNT, metavar="N", help="write N samples of --checkpoint as PNG files, train nothing")
    add("--checkpoint", help="the file to generate from")
    mode("--report", nargs="+", metavar="RUN", help="print how much sooner these runs get where the first of them ends")
    return parser


def parse_args(argv=None):
    """(settings, where None is what --help says of it; the checkpoint they start from or None). UserError: a clash."""
    parser = make_parser()
    first, _ = parser.parse_known_args(argv)  # the data set and the checkpoint decide the defaults
    parser.set_defaults(**PRESETS[first.dataset])
    checkpoint = None
    if bool(first.generate) != bool(first.checkpoint):
        raise UserError("--generate and --checkpoint go together")
    if first.resume or first.generate:
        path = first.checkpoint or f"{first.resume}/checkpoint.pt"
        with explained(f"{path} is no checkpoint of this script, or cut off"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # it cannot run code
            parser.set_defaults(**checkpoint["args"] | {"out": None, "resume": None})
    parser.add_argument("-h", "--help", action="help", help="show the defaults of a --dataset and exit")
    args = parser.parse_args(argv)
    args.warmup = args.warmup or max(1, args.steps // 20)
    args.channels = 3 if args.dataset in ("cifar10", "folder") else 1  # of its images
    args.sampling_steps = args.sampling_steps or min(50, args.timesteps)
    if args.out and (args.resume or os.path.exists(args.out)):
        raise UserError(f"--out {args.out} is there already, or beside --resume, where it has no place")
    if args.sampling_steps > args.timesteps or args.fid_samples == 1:
        raise UserError("--sampling-steps must be at most --timesteps, and --fid-samples 0 or at least 2")
    if args.warmup > args.steps:
        raise UserError(f"--warmup {args.warmup} is longer than the run of {args.steps} steps")
    with explained("these settings do not fit together, or not the checkpoint"):  # also what a class refuses
        if args.resume and checkpoint["step"] > args.steps:
            raise UserError(f"{path}: {checkpoint['step']} steps are done, --steps is {args.steps}")
        ab = GaussianDiffusion(args.schedule, args.timesteps).alphas_cumprod
        with torch.device("meta"):  # without weights
            model = build_unet(args)
        if checkpoint:
            model.load_state_dict(checkpoint["ema"], assign=True)
        if args.strategy != "adaptive":  # which takes a second to build, and has nothing to refuse when new
            build_sampler(args, ab)
        elif checkpoint and "sampler" in checkpoint:
            build_sampler(args, ab).load_state_dict(checkpoint["sampler"])
        build_weights(args, ab)
    return args, checkpoint


def main(argv=None):
    """Exit status: 0; 2: an error that the user can fix; 128 + signal."""
    try:
        args, checkpoint = parse_args(argv)
        if args.generate:
            return generate(args, checkpoint)
        if args.report:
            with explained("--report"):
                return report(args.report, args.out)
        return train(args, checkpoint)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"speedup_diffusion.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        if WORLD_SIZE > 1:
            sys.stdout.flush()
            os._exit(2)  # the interpreter's own end could wait for NCCL, which waits for the others
        return 2
    except KeyboardInterrupt:
        print("speedup_diffusion.py: stopped", file=sys.stderr)
        return 130  # as shells say


if __name__ == "__main__":
    sys.exit(main())
