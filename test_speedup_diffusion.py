# SPDX-License-Identifier: MIT
"""What speedup_diffusion.py promises, in its own order. `make test` runs all but the slow tests and the bench."""

import contextlib
import copy
import csv
import functools
import inspect
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import speedup_diffusion as sd

each_schedule = pytest.mark.parametrize(
    "schedule, T", [(schedule, T) for schedule in ("linear", "cosine", "quad") for T in (100, 1000)]
)
each_strategy = pytest.mark.parametrize("strategy", sd.STRATEGIES)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]
TINY = ["--width", "8", "--batch-size", "16", "--steps", "6", "--eval-every", "3", "--timesteps", "50"]
TINY += ["--sampling-steps", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it


@pytest.fixture(scope="module", autouse=True)
def digits_rendered_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "render_digits", functools.cache(sd.render_digits))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def settings(*argv):
    return sd.parse_args(["--device", "cpu", *argv])[0]


def metrics(run):
    with open(Path(run) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def checkpoint(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def assert_same_tensors(one, two):
    """Nested state dicts, bit for bit."""
    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def images_of(count, size=8, channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=generator).clamp(-1, 1)


class Pooled(nn.Module):
    """[N, 3, H, W] -> [N, 16]: the red channel at 4x4, enough to tell a digit from noise."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images[:, :1], 4).flatten(1)


def save_torchscript(module, path):
    torch.jit.script(module.eval()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    return save_torchscript(Pooled(), tmp_path_factory.mktemp("features") / "pooled.ts")


# 1 The forward process


@pytest.mark.parametrize("T", [1, 2, 19, 100, 1000])
def test_schedules_and_q_sample_have_their_closed_forms_and_predict_x0_inverts_it(T):
    ramp, angle = np.linspace(0, 1, T), (np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2
    linear, quad = (1e-4 + 0.0199 * ramp) * 1000 / T, (0.01 + (0.02**0.5 - 0.01) * ramp) ** 2 * 1000 / T
    cosine = 1 - (np.cos(angle[1:]) / np.cos(angle[:-1])) ** 2
    t, (x0, noise) = torch.arange(T), torch.randn(2, T, 1, 1, 1)
    for schedule, betas in {"linear": linear, "quad": quad, "cosine": cosine}.items():
        diffusion, betas = sd.GaussianDiffusion(schedule, T), torch.tensor(betas).clamp(max=0.999)
        ab, x_t = (1 - betas).cumprod(0).view(-1, 1, 1, 1), diffusion.q_sample(x0, t, noise)
        assert np.allclose(diffusion.betas, betas, atol=0)
        assert np.allclose(diffusion.alphas_cumprod, ab.flatten(), atol=0)
        assert np.allclose(x_t, ab.sqrt() * x0 + (1 - ab).sqrt() * noise, atol=1e-5)
        assert np.allclose(ab.sqrt() * diffusion.predict_x0(x_t, t, noise), ab.sqrt() * x0, atol=1e-5)


# 2 Accelerations


def chi_square_p(drawn, probs):
    """The p-value of the drawn timesteps under probs; those expected fewer than 5 times count as one."""
    expected = probs.double() / probs.double().sum() * len(drawn)
    bins = torch.where(expected < 5, -1, torch.arange(len(probs))).unique(return_inverse=True)[1]
    counts = bins[drawn].bincount(minlength=bins.max() + 1)
    return scipy.stats.chisquare(counts, bins.bincount(expected)).pvalue


@each_schedule
def test_samplers_draw_as_their_probs_say_and_weights_average_one_under_them(schedule, T):
    ab, x0 = sd.GaussianDiffusion(schedule, T).alphas_cumprod, images_of(64)
    adaptive = sd.AdaptiveSampler(ab, in_channels=1)  # sure of the ends, of the middle, or of little
    outputs = torch.tensor([[-20.0, -20.0], [1e9, 1e9], [0.0, 2.0], [1.0, 0.0]]).repeat(16, 1)
    adaptive.policy = lambda images: outputs
    adaptive.refresh_probs(x0)
    assert adaptive.probs.min() >= 0.005 / T  # no timestep dies out
    samplers = sd.UniformSampler(T), sd.LogitNormalSampler(T), sd.SpeeDSampler(ab), sd.CurriculumSampler(T, 9)
    drawn = {s: torch.cat([s.sample(x0, step=7) for _ in range(300)]) for s in (*samplers, adaptive)}
    for sampler, t in drawn.items():
        probs = sampler.probs.double()
        assert t.dtype == torch.int64 and probs.shape == (T,) and probs.sum().item() == pytest.approx(1)
        assert [s for s in drawn if chi_square_p(drawn[s], probs) > 1e-4] == [sampler]
        for raw in (torch.ones(T), sd.change_aware_weights(ab), sd.min_snr_weights(ab), sd.p2_weights(ab)):
            weights = sd.normalize_weights(raw, sampler.probs)
            assert (probs @ weights.double()).item() == pytest.approx(1, abs=1e-5)
            assert (weights > 0).all() and torch.allclose(weights / weights[0], raw / raw[0], rtol=1e-4)


def test_speed_draws_k_times_as_often_before_tau():
    cases = ("linear", (), 5, 700), ("cosine", (), 5, 946), ("quad", (), 5, 875), ("quad", (9, 300), 9, 300)
    for schedule, given, k, tau in cases:
        probs = sd.SpeeDSampler(sd.GaussianDiffusion(schedule).alphas_cumprod, *given).probs
        assert torch.allclose(probs * (1000 + tau * (k - 1)), torch.tensor([k] * tau + [1.0] * (1000 - tau)))


def test_curriculum_goes_from_uniform_to_its_gaussian():
    sampler, bell = sd.CurriculumSampler(1000, total_steps=400), scipy.stats.norm.pdf(range(1000), 300, 500)
    for step, gamma in ((0, 0.0), (100, 0.25), (200, 0.5), (400, 1.0), (500, 1.0)):
        sampler.sample(images_of(1), step)
        assert np.allclose(sampler.probs, (1 - gamma) / 1000 + gamma * bell / bell.sum(), atol=0), step


@pytest.mark.parametrize(
    "a, b", [(0.974, 0.974), (0.05, 0.3), (1.0, 1.0), (3.0, 0.6), (40.0, 25.0), (1e-5, 2.0)]
)
@pytest.mark.parametrize("T", [1, 2, 100, 1000])
def test_adaptive_probs_are_the_beta_distribution_rounded(T, a, b):
    edges = np.clip((np.arange(T + 1) - 0.5) / max(1, T - 1), 0, 1)
    edges[-1] = 1
    expected = np.diff(scipy.stats.beta.cdf(edges, a, b))
    got = sd.AdaptiveSampler.beta_probs(torch.tensor([a]), torch.tensor([b]), T)
    assert np.abs(got.numpy() - expected).max() < (1e-5 if T >= 100 else 5e-3)


@pytest.mark.parametrize("start, size, channels", [(0, 8, 1), (400, 5, 4), (800, 13, 3)])
def test_adaptive_begins_nearly_uniform_and_moves_to_the_rewarded_timesteps(start, size, channels):
    sampler = sd.AdaptiveSampler(sd.GaussianDiffusion().alphas_cumprod, channels)
    assert (sampler.probs - 1 / 1000).abs().sum() / 2 < 0.02  # total variation
    for step in range(60):
        t = sampler.sample(images_of(64, size, channels), step)
        sampler.update_policy(0.05 * ((t >= start) & (t < start + 200)).float())
    assert sampler.probs[start : start + 200].sum() > 0.5


def test_the_policy_gradient_is_that_of_the_mixture_with_its_floor():
    sampler = sd.AdaptiveSampler(sd.GaussianDiffusion().alphas_cumprod, in_channels=1, entropy=0.0, floor=0.3)
    sampler.sample(images_of(4), 0)
    u, reward, bias = sampler._drawn[1], torch.randn(4), sampler.policy[-1].bias.detach().double()

    def objective(bias):
        a, b = torch.log1p(bias.exp()) + 1e-5
        density = torch.exp(torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b))
        density = density * u.double() ** (a - 1) * (1 - u.double()) ** (b - 1)
        return -(torch.log(0.7 * density + 0.3) * reward).mean()

    expected = torch.autograd.functional.jacobian(objective, bias)
    sampler.optimizer.step = lambda: None
    sampler.update_policy(reward)
    found = sampler.policy[-1].bias.grad  # clipped with all the rest to norm 1
    assert torch.allclose(found / found.norm(), (expected / expected.norm()).float(), atol=1e-4)


class Scaled(nn.Module):
    """eps = scale x_t; remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = 0.0, []

    def forward(self, x_t, t):
        assert not self.training  # no dropout
        self.calls.append((x_t, t))
        return self.scale * x_t


def test_adaptive_rewards_each_image_by_the_fall_of_the_bound_on_the_same_noise():
    diffusion, model, rewards = sd.GaussianDiffusion("linear", 100), Scaled(), []
    sampler = sd.AdaptiveSampler(diffusion.alphas_cumprod, 1, every=4, selected=2, queue=3, probe=10)
    sampler.update_policy = rewards.append
    x0 = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)  # known by their level
    for step in range(17):
        sampler.sample(x0, step)
        one, two = sampler.selected.tolist()
        model.scale = 0.0
        sampler.before_update(model, step)
        model.scale = 0.1
        sampler.after_update(model)
        assert bool(model.calls) == (step % 4 == 0) and model.training
        if not model.calls:
            continue
        (x_t, again), (t, _) = (torch.cat(part).chunk(2) for part in zip(*model.calls))
        model.calls.clear()
        assert torch.equal(x_t, again) and t.tolist() == [*range(0, 100, 11), *[one] * 6, *[two] * 6]
        probed = x0[(x_t[0].mean() - x0[:, 0, 0, 0]).abs().argmin()]
        ab = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (x_t - ab.sqrt() * torch.cat([probed.expand(10, 1, 8, 8), x0, x0])) / (1 - ab).sqrt()
        fall = noise.square() - (noise - 0.1 * x_t).square()
        fall = diffusion.vlb_coefficients[t] * fall.mean((1, 2, 3))
        assert torch.allclose(sampler.queue[step // 4 % 3], fall[:10], rtol=1e-3, atol=1e-4)  # a ring
        assert torch.allclose(rewards[-1], fall[10:16] + fall[16:], rtol=1e-3, atol=1e-4)
    best = sampler.most_predictive(sampler.queue, 2)
    assert sampler.selected.tolist() == (11 * best).tolist() and len(rewards) == 5


# What scikit-learn 1.9.1's SelectKBest(f_regression, k=3) answers for the row sums of these matrices.
@pytest.mark.parametrize("seed, best", [(0, [2, 7, 11]), (1, [3, 5, 9]), (2, [0, 1, 6]), (3, [0, 2, 9])])
def test_adaptive_selects_the_timesteps_scikit_learn_selects(seed, best):
    generator = np.random.default_rng(seed)
    deltas = generator.normal(size=(20, 12)) * generator.uniform(0.1, 3, size=12) + generator.normal(size=12)
    deltas = np.hstack([deltas, np.full((20, 1), 0.25)])  # a constant predicts nothing
    assert sd.AdaptiveSampler.most_predictive(torch.tensor(deltas), 3).tolist() == best


@each_schedule
def test_weights_have_their_closed_forms(schedule, T):
    ab = sd.GaussianDiffusion(schedule, T).alphas_cumprod.double()
    snr, slope = (ab / (1 - ab)).numpy(), np.gradient(1 - ab)
    assert (
        np.allclose(sd.min_snr_weights(ab), np.minimum(1, 5 / snr)) and sd.min_snr_weights(0 * ab).eq(1).all()
    )
    assert np.allclose(sd.p2_weights(ab), 1 - ab) and np.allclose(sd.p2_weights(ab, 2, 3), (2 + snr) ** -3)
    for lam in (0.5, 0.6, 1.0):  # from 1 - lam to lam, in step with how fast the noise grows
        expected = np.interp(slope, [slope.min(), slope.max()], [1 - lam, lam])
        assert np.allclose(sd.change_aware_weights(ab, lam), expected)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
def test_momentum_decay_keeps_lr_times_one_minus_beta1(beta1):
    for left in np.linspace(1, 0, 11):
        decayed, lr_scale = sd.momentum_decay(1 - left, beta1)
        assert decayed == pytest.approx(beta1 * left / (1 - beta1 + beta1 * left))  # from beta1 to 0
        assert lr_scale * (1 - decayed) == pytest.approx(1 - beta1, rel=1e-12)


def test_each_acceleration_runs_where_only_its_source_is_pasted():
    """With math, torch, and the pieces that the first line of its docstring names in backticks."""
    given = {"timesteps": 100, "total_steps": 100, "in_channels": 1, "every": 1, "progress": 0.5}
    given |= dict.fromkeys(("alphas_cumprod", "weights", "probs", "tensor"), torch.linspace(0.99, 0.01, 100))
    section = re.search(r"(?ms)^# 2 Accelerations.*?^# 3 ", Path(sd.__file__).read_text())[0]
    for name in re.findall(r"(?m)^(?:class|def) (?!_)(\w+)", section):
        module, piece = types.ModuleType("elsewhere"), getattr(sd, name)
        for needed in (*re.findall(r"`(\w+)`", piece.__doc__.splitlines()[0]), name):
            exec("import math, torch\n" + inspect.getsource(getattr(sd, needed)), vars(module))  # noqa: S102
        arguments = {p: given[p] for p in inspect.signature(piece).parameters if p in given}
        made = getattr(module, name)(**arguments)
        for step in range(4) if isinstance(piece, type) else ():
            assert made.sample(images_of(9), step).shape == (9,)
            if name == "AdaptiveSampler":
                made.before_update(sd.UNet(1, 8, (1,), 1, (), 0.0), step)
                made.after_update(sd.UNet(1, 8, (1,), 1, (), 0.0))


# 3 U-Net


def awake(model):
    """The model in eval mode, its zero-initialised convolutions drawn, so that everything has an effect."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model.eval()


@pytest.mark.parametrize("channels, size, patch", [(1, 16, 2), (3, 28, 1)])
def test_unet_keeps_the_shape_depends_on_t_and_learns_everywhere(channels, size, patch):
    model = sd.UNet(channels, 6, (1, 2, 3), 1, (2, 7), 0.1, size, patch)  # 8, 4, 2 or 28, 14, 7 pixels wide
    x, t = torch.randn(3, channels, size, size), torch.tensor([0, 10, 999])
    assert sum(isinstance(m, sd.SelfAttention) for m in model.modules()) == 1 + 1 + 2  # down, middle, up
    assert not model(x, t).any()  # starts at zero
    out = awake(model)(x, t)
    assert out.shape == x.shape and torch.allclose(model(x[1:], t[1:]), out[1:], atol=1e-5)
    assert ((model(x, t.roll(1)) - out).abs().amax((1, 2, 3)) > 1e-4).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t).dtype == torch.bfloat16 and (model(x, t) - out).norm() < 0.03 * out.norm()
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_self_attention_is_softmax_attention():
    layer, x = awake(sd.SelfAttention(128)), torch.randn(2, 128, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 64, 15).unbind(1)  # each [B, heads, 64, H W]
    attended = v @ (q.mT @ k / 8).softmax(-1).mT
    assert torch.allclose(layer(x), x + layer.out(attended.reshape(x.shape)), atol=1e-4)


# 4 Sampling


@each_schedule
def test_single_steps_and_vlb_coefficients_have_their_closed_forms(schedule, T):
    diffusion, t = sd.GaussianDiffusion(schedule, T), torch.arange(T)
    x0, noise, z = torch.randn(3, T, 1, 4, 4)
    beta, x_t = diffusion.betas.double().view(-1, 1, 1, 1), diffusion.q_sample(x0, t, noise)
    ab, ab_prev = (1 - beta).cumprod(0), (1 - beta).cumprod(0) / (1 - beta)
    mean = (ab_prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab_prev) * x_t) / (1 - ab)
    posterior = torch.distributions.Normal(mean, (beta * (1 - ab_prev) / (1 - ab)).sqrt().clamp(min=1e-9))
    assert np.allclose(diffusion.ddpm_step(x_t, t, noise, z, False), mean + posterior.stddev * z, atol=1e-3)
    x0 = x0.clamp(-1, 1)  # and then x_t implies another epsilon
    path = ab_prev.sqrt() * x0 + (1 - ab_prev).sqrt() * (x_t - ab.sqrt() * x0) / (1 - ab).sqrt()
    assert np.allclose(diffusion.ddim_step(x_t, t, t - 1, noise, 0.0, None), path, atol=1e-3)
    means = torch.stack([diffusion.ddpm_step(x_t, t, noise + error, 0 * z, False) for error in (0.1, 0.7)])
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(means, beta.sqrt()))
    rise = kl.mean((2, 3, 4)).diff(dim=0) / math.log(2)  # in bits per dimension
    assert np.allclose(diffusion.vlb_coefficients * (0.7**2 - 0.1**2), rise, rtol=1e-3)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("t", [999, 500, 20, 1, 0])
def test_schedules_and_single_steps_equal_those_of_diffusers(t, clip):
    diffusers, names = pytest.importorskip("diffusers"), ("linear", "squaredcos_cap_v2", "scaled_linear")
    when, (x_t, eps) = torch.full((4,), t), torch.randn(2, 4, 1, 8, 8)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    for diffusion, name in zip(map(sd.GaussianDiffusion, ("linear", "cosine", "quad")), names):
        ddpm = diffusers.DDPMScheduler(1000, 1e-4, 0.02, name, clip_sample=clip)
        theirs = ddpm.step(eps, t, x_t, generator=torch.Generator().manual_seed(5))
        steps = [(diffusion.ddpm_step(x_t, when, eps, noise, clip), theirs)]
        ddim = diffusers.DDIMScheduler(1000, 1e-4, 0.02, name, clip_sample=clip)
        ddim.set_timesteps(50)
        for eta in (0.0, 0.5, 1.0):
            ours = diffusion.ddim_step(x_t, when, (when - 20).clamp(min=-1), eps, eta, noise, clip)
            steps.append((ours, ddim.step(eps, t, x_t, eta, True, variance_noise=noise)))
        for ours, theirs in steps:
            assert torch.allclose(ours, theirs[0], rtol=1e-4, atol=2e-4 * theirs[0].abs().max())
        assert torch.allclose(diffusion.alphas_cumprod, ddpm.alphas_cumprod, atol=2e-6)


@pytest.mark.parametrize("method, steps, eta", [("ddim", 200, 0.0), ("ddim", 1000, 1.0), ("ddpm", 50, 0.0)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "quad"])
def test_sampling_with_the_optimal_epsilon_returns_the_gaussian(schedule, method, steps, eta):
    """Data N(m, s^2): E[eps | x_t] = sqrt(1 - ab) (x_t - sqrt(ab) m) / (ab s^2 + 1 - ab)."""
    diffusion, m, s, visited = sd.GaussianDiffusion(schedule), 0.2, 0.15, []
    ab = diffusion.alphas_cumprod.view(-1, 1, 1, 1)

    def optimal(x_t, t):
        visited.append(t[0].item())
        return (1 - ab[t]).sqrt() * (x_t - ab[t].sqrt() * m) / (ab[t] * s**2 + 1 - ab[t])

    x = diffusion.sample(optimal, (20_000, 1, 1, 1), method, steps, eta)
    assert abs(x.mean() - m) < 5 * s / 20_000**0.5 and abs(x.std() - s) < 0.04 * s
    assert visited == np.linspace(999, 0, 1000 if method == "ddpm" else steps).round().tolist()


@pytest.mark.parametrize(
    "call",
    [
        lambda: sd.GaussianDiffusion("sigmoid"),
        lambda: sd.GaussianDiffusion(timesteps=0),
        lambda: sd.GaussianDiffusion(timesteps=10).sample(None, (1, 1, 4, 4), steps=11),
        lambda: sd.GaussianDiffusion(timesteps=10).sample(None, (1, 1, 4, 4), method="euler", steps=5),
        lambda: sd.SpeeDSampler(torch.linspace(0.9, 0.1, 10), k=0.5),
        lambda: sd.SpeeDSampler(torch.linspace(0.9, 0.1, 10), tau=11),
        lambda: sd.SpeeDSampler(torch.linspace(0.9, 0.1, 10), tau=0),
        lambda: sd.CurriculumSampler(10, 10, sigma=0),
        lambda: sd.AdaptiveSampler(torch.linspace(0.9, 0.1, 10), 1, selected=11),
        lambda: sd.change_aware_weights(torch.linspace(0.9, 0.1, 10), lam=0.4),
        lambda: sd.change_aware_weights(torch.linspace(0.9, 0.1, 10), lam=float("nan")),
        lambda: sd.momentum_decay(0.5, beta1=1.0),
        lambda: sd.UNet(1, 9, (1,), 1, (), 0.0),
        lambda: sd.UNet(1, 8, (1, 2), 1, (), 0.0, image_size=9),
    ],
)
def test_the_library_refuses_what_makes_no_sense(call):
    with pytest.raises(ValueError):
        call()


# 5 Data


def test_digits_are_fixed_by_their_seed_and_rendered_in_time():
    begin, render = time.perf_counter(), sd.render_digits.__wrapped__
    images, labels = render(10_240, 16, 0)
    assert time.perf_counter() - begin < 5 and images.shape == (10_240, 1, 16, 16)
    assert (render(99, 16, 0)[0] == images[:99]).all() and (render(99, 16, 1)[0] != images[:99]).any()
    assert len(images.unique(dim=0)) > 10_000 and scipy.stats.chisquare(labels.bincount()).pvalue > 1e-4
    ink = images[:, 0] > 128
    assert ink.sum((1, 2)).min() > 5 and ink[:, [0, -1]].any(-1).any(-1).float().mean() < 0.01  # not cut off


@pytest.fixture
def image_folder(tmp_path):
    """300 images of any size, nested."""
    for i in range(300):
        path = tmp_path / "my images" / f"class {i % 3}" / f"{i}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 5 + i % 40, 3), np.uint8)).save(path)
    return tmp_path / "my images"


def test_a_folder_is_held_out_evenly_and_read_once_whatever_links_to_it(image_folder, tmp_path):
    train, held_out = sd.load_dataset("folder", image_folder, 8)
    assert train.shape == (44, 3, 8, 8) and held_out.shape == (256, 3, 8, 8) and train.dtype == torch.uint8
    assert len(torch.cat([train, held_out]).unique(dim=0)) == 300  # nothing is in both
    (image_folder / "class 2").rename(tmp_path / "elsewhere")
    for name, target in ("class 2", "../elsewhere"), ("class 0/up", ".."), ("x", "class 1"), ("z", "z"):
        (image_folder / name).symlink_to(target)
    assert_same_tensors(sd.load_dataset("folder", image_folder, 8), (train, held_out))


def solid(mode, colour, size=(8, 8), **options):
    return lambda path: Image.new(mode, size, colour).save(path, **options)


ODD_IMAGES = [  # name, how it is written, the colour it is read as or why it is refused
    ("its centre.png", lambda path: Image.new("L", (8, 8), 7).crop((-8, 0, 16, 8)).save(path), [7]),
    ("palette é 画像.PNG", solid("P", (9, 200, 3)), [9, 200, 3]),
    ("cmyk.tiff", solid("CMYK", (0, 255, 255, 0)), [255, 0, 0]),
    ("alpha.png", solid("RGBA", (200, 0, 0, 51)), [244, 204, 204]),  # 20% red on white
    ("16 bits.png", solid("I;16", 100 * 257), [100]),
    ("16 bits.pgm", lambda path: path.write_bytes(b"P5 8 8 65535\n" + b"\xc8" * 128), [200]),
    ("animated.gif", solid("L", 9, save_all=True, append_images=[Image.new("L", (8, 8))]), [9]),
    ("white is 0.tiff", solid("I;16", 9, tiffinfo={262: 0}), "plain 16 bits"),
    ("bomb.png", solid("1", 0, (10_000, 10_000)), "bomb"),
    ("truncated.png", lambda path: (solid("L", 1, (64, 64))(path), os.truncate(path, 60)), "truncated"),
    ("empty.png", Path.touch, "cannot identify"),
    ("postscript.png", solid("L", 1, format="EPS"), "cannot identify"),  # it could run code
    ("pipe.png", os.mkfifo, "no file"),
    ("circle.png", lambda path: path.symlink_to("circle.png"), "no file"),
]


@pytest.mark.parametrize("name, write, expected", ODD_IMAGES)
def test_an_odd_image_is_read_right_or_refused_by_name(tmp_path, name, write, expected):
    write(tmp_path / name)
    if isinstance(expected, str):
        pytest.raises(sd.UserError, sd.load_dataset, "folder", tmp_path, 8).match(f"^.*{name}.*{expected}.*$")
    else:
        for i in range(256):  # that are held out
            os.link(tmp_path / name, tmp_path / f"{i} {name}")
        train, _ = sd.load_dataset("folder", tmp_path, 8)
        assert train.flatten(2).unique(dim=2)[0].tolist() == [[level] for level in expected]


def write_mnist(root, counts, kind="MNIST"):
    """Small files in MNIST's own format, where torchvision looks for them; the pixels are the count."""
    (raw := root / kind / "raw").mkdir(parents=True)
    for part, n in zip(("train", "t10k"), counts):
        pixels = struct.pack(">4i", 0x803, n, 28, 28) + bytes([n]) * 784 * n
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + bytes(n))


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_reads_mnist_and_its_test_split_is_held_out(tmp_path, name, kind):
    write_mnist(tmp_path, (70, 30), kind)
    for images, count in zip(sd.load_dataset(name, tmp_path, 28), (70, 30), strict=True):
        assert images.shape == (count, 1, 28, 28) and (images == count).all()


# 6 Evaluation


def test_evaluate_measures_the_bound_of_a_model_with_known_errors():
    diffusion, images = sd.GaussianDiffusion("linear", 100), sd.to_uint8(images_of(40))
    # A model that always says 0 misses all the noise.
    one, again = (sd.evaluate(lambda x, t: 0 * x, diffusion, images) for _ in range(2))
    assert one == again == pytest.approx((1, diffusion.vlb_coefficients.sum().item()), rel=0.05)


@pytest.mark.parametrize("published, channels", [(False, 1), (False, 3), (True, 3)])
def test_fid_is_that_of_clean_fid(published, channels, monkeypatch, here):
    cleanfid, inception = pytest.importorskip("cleanfid.fid"), {"torchscript_inception": Pooled()}
    monkeypatch.setattr("cleanfid.features.feature_extractor", lambda name, **_: inception[name])
    monkeypatch.setattr("cleanfid.features.check_download_url", lambda url, **_: Path(url).name)
    np.savez("cifar10_clean_train_32.npz", mu=np.arange(16), sigma=np.eye(16))
    one, two = (sd.to_uint8(images_of(90, 8, channels)) // divisor for divisor in (1, 2))
    for folder, images in ("one", one), ("two", two):
        os.mkdir(folder)
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image.squeeze()).save(f"{folder}/{i}.png")
    reference = {"dataset_name": "cifar10", "dataset_res": 32} if published else {"fdir2": "one"}
    expected = cleanfid.compute_fid("two", num_workers=0, device=torch.device("cpu"), **reference)
    distance = sd.FrechetDistance(None, "cpu", one, published)
    assert distance.name == "FID" and distance(two.split(25)) == pytest.approx(expected, rel=1e-5)


def test_with_own_features_the_distance_of_gaussians_has_its_closed_form(pooled):
    one = sd.to_uint8(images_of(90, 4)) // 3  # 4x4 images are their own features
    distance, features = sd.FrechetDistance(pooled, "cpu", one), one.flatten(1).double()
    expected = (features.mean(0) + 30).square().sum() + features.var(0).sum()  # |m2 - m1|^2 + sum (s2 - s1)^2
    assert distance([2 * one + 30]) == pytest.approx(expected.item(), rel=1e-5)
    assert distance.name == "FD (pooled.ts)" and abs(distance([sd.to_uint8(sd.to_float(one))])) < 1e-3


def test_a_failed_measurement_costs_its_figure_a_stopped_one_is_made_again(here, pooled, monkeypatch, capsys):
    features, measure = shutil.copy(pooled, here), sd.FrechetDistance.__call__
    options = ["--fid-samples", "20", "--fid-every", "2", "--fid-features", features, *TINY, "--out"]

    def fail(distance, batches):
        raise OSError("no such device")

    def stop(distance, batches):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("a worker was killed by a signal")  # which reaches these, too

    turns = iter([fail, measure, measure, stop])
    monkeypatch.setattr(sd.FrechetDistance, "__call__", lambda *args: next(turns, measure)(*args))
    assert sd.main([*options, "failed"]) == 0 and sd.main([*options, "stopped"]) == 143
    assert "could not be measured at step 2: no such device" in capsys.readouterr().out
    save_torchscript(nn.Sequential(Pooled(), nn.ReLU()), features)
    assert sd.main(["--resume", "stopped"]) == 2 and "features were FD (pooled.ts)" in capsys.readouterr().err
    assert sd.main(["--resume", "stopped", "--fid-features", pooled]) == 0
    failed, stopped = ({row["step"]: row["fid"] for row in metrics(out)} for out in ("failed", "stopped"))
    assert failed == stopped | {"2": ""} and [step for step in stopped if stopped[step]] == ["2", "4", "6"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_trained_model_is_nearer_to_the_kept_reference_than_noise(here, pooled, device):
    options = "--fid-samples 64 --steps 120 --ema-decay 0.9 --batch-size 32 --width 16 --lr 5e-3 --warmup 10"
    options += f" --sampling-steps 10 --device {device} --out run --fid-features"
    assert sd.main([*options.split(), pooled]) == 0
    digits, noise = sd.load_dataset("digits", "", 16)[0], sd.to_uint8(torch.randn(64, 1, 16, 16))
    distance = sd.FrechetDistance(pooled, device, noise, saved=Path("run/fid_reference.npz"))
    assert 0 <= distance([digits[:64]]) < float(metrics("run")[-1]["fid"]) < 0.5 * distance([noise])


def test_without_a_network_or_a_fit_scipy_fid_is_refused_before_training(here, capsys, monkeypatch):
    for name, stand_in, says in (
        ("cleanfid.features.feature_extractor", lambda **_: os.listdir("net"), "--fid-features FILE.*net"),
        ("scipy.linalg.sqrtm", lambda matrix: matrix, "pip install clean-fid 'scipy<1.18'"),  # as in 1.18
    ):
        monkeypatch.setattr(name, stand_in)
        assert sd.main(["--fid-samples", "10", *TINY]) == 2 and not list(here.iterdir())
        assert re.search(f"^.*{says}.*$", capsys.readouterr().err.strip())


def test_the_picture_of_the_timesteps_shows_t_upwards_and_training_to_the_right(tmp_path):
    drawn = torch.ones(50, 100)
    drawn[25:, 50:] = 0  # of the larger t none in the second half
    sd.save_timesteps(drawn, tmp_path / "timesteps.png")
    picture = np.asarray(Image.open(tmp_path / "timesteps.png"))
    quarters = [picture[y, x] for y in (100, 270) for x in (180, 520)]  # from the top left, row by row
    assert quarters == [191, 255, 191, 127]  # once, never, once, twice as often as uniform


# 7 Training

METHODS = {"uniform": ["--dropout", "0.2"], "logit-normal": [], "speed": ["--checkpoint-every", "2"]}
METHODS |= {"curriculum": ["--flip"], "adaptive": ["--adaptive-every", "2", "--weighting", "p2"]}
FILE_SIZE, LIMITS = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
ON_CUDA = [pytest.param(f"--device cuda --amp {amp}", marks=on_cuda) for amp in ("off", "bf16", "fp16")]


def terminate(run):
    signal.raise_signal(signal.SIGTERM)


def terminate_while_measuring(run):
    run.ema.forward = lambda *_: signal.raise_signal(signal.SIGTERM)


def fill_the_disk(run):
    resource.setrlimit(FILE_SIZE, (20_000, LIMITS[1]))


def interrupt(run):
    signal.raise_signal(signal.SIGINT)


ENDS = (  # what comes before a step, that step, the exit status, the steps of the checkpoint and the last row
    (terminate, 5, 143, 5, 4),
    (terminate_while_measuring, 8, 143, 8, 6),
    (fill_the_disk, 10, 1, 8, 9),
    (interrupt, 10, 130, 10, 9),  # all that is left to do is to measure
)


@contextlib.contextmanager
def before_steps(steps, act):
    """act(run) comes before each of these training steps, numbered from 1."""
    train_step = sd.Training.train_step

    def act_and_step(run):
        if run.step + 1 in steps:
            act(run)
        train_step(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd.Training, "train_step", act_and_step)
        yield


def signalled_at(steps, number=signal.SIGTERM):
    return before_steps(steps, lambda run: signal.raise_signal(number))


def infinite_loss_at(steps):
    def spoil(run):
        step = run.step

        def hook(model, inputs, output):
            return output * math.nan if run.step == step else None

        run.model.register_forward_hook(hook)

    return before_steps(steps, spoil)


def assert_same_run(one, two):
    """The same but for settings and seconds, bit for bit."""
    states = [checkpoint(run) | {"args": 0, "seconds": 0} for run in (one, two)]
    rows = [[row | {"seconds": ""} for row in metrics(run)] for run in (one, two)]
    pictures = [[path.read_bytes() for path in sorted(Path(run).glob("*.png"))] for run in (one, two)]
    assert_same_tensors(*states)
    assert rows[0] == rows[1] and pictures[0] == pictures[1]


def test_a_run_learns_and_leaves_its_results(here, capsys):
    options = "--weighting min-snr --momentum-decay --steps 80 --eval-every 40 --lr 1e-2 --ema-decay 0.9"
    assert sd.main([*TINY, *options.split()]) == 0
    run = Path("runs/digits-uniform-min-snr-momentum-decay")
    files = ["checkpoint.pt", "config.json", "metrics.csv", "samples.png", "timesteps.png"]
    assert sorted(os.listdir(run)) == files and '"weighting": "min-snr"' in (run / files[1]).read_text()
    rows = {int(row["step"]): row for row in metrics(run)}
    model, diffusion = sd.build_model(settings(*TINY), channels=1)
    model.load_state_dict(checkpoint(run)["ema"])
    expected = sd.evaluate(model.eval(), diffusion, sd.load_dataset("digits", "", 16)[1])  # held out
    assert (float(rows[80]["val_mse"]), float(rows[80]["val_vlb"])) == pytest.approx(expected, rel=1e-4)
    beta1, lr_scale = sd.momentum_decay(79 / 80)
    received = float(rows[80]["beta1"]), float(rows[80]["lr"])
    assert received == pytest.approx((beta1, 1e-2 * lr_scale * 80 / 100), rel=1e-4)
    assert ",".join(rows[80]) == "step,images,seconds,loss,lr,beta1,val_mse,val_vlb,fid"
    assert [step for step in rows if rows[step]["val_mse"]] == [40, 80] and list(rows) == [25, 40, 50, 75, 80]
    assert float(rows[80]["val_mse"]) < 0.8 * float(rows[40]["val_mse"]) and rows[80]["images"] == "1280"
    speed, memory = re.search(r"(\S+) images/s, peak memory (\S+) GiB.*\n$", capsys.readouterr().out).groups()
    seconds = float(rows[80]["seconds"]) - float(rows[25]["seconds"])  # the first steps may compile
    assert float(speed) == pytest.approx(55 * 16 / seconds, rel=1e-3) and 0.05 < float(memory) < 100


def test_strategies_share_model_images_noise_and_dropout_and_weigh_the_mse(monkeypatch):
    q_sample, images = sd.GaussianDiffusion.q_sample, sd.render_digits(64)[0]
    seen, first, timesteps = [], None, set()

    def watch(diffusion, x0, t, noise):
        seen.append((x0, noise, torch.get_rng_state(), t))
        return q_sample(diffusion, x0, t, noise)

    monkeypatch.setattr(sd.GaussianDiffusion, "q_sample", watch)
    for strategy in sd.STRATEGIES:
        args = settings(*TINY, "--strategy", strategy, *METHODS[strategy], "--flip", "--dropout", "0.2")
        run = sd.Training(args, images)
        model = copy.deepcopy(run.model.state_dict())
        seen.clear()
        for _ in range(6):
            run.train_step()
        x0, noise, dropout, t = zip(*seen)
        timesteps |= {tuple(batch.tolist()) for batch in t}
        first = first or (model, x0, noise, dropout)
        assert_same_tensors((model, x0, noise, dropout), first)
        # A new U-Net predicts 0: its MSE is the noise's mean square.
        sampler, raw_weights = sd.build_strategy(args, run.diffusion.alphas_cumprod, 1)
        weights = sd.normalize_weights(raw_weights, sampler.probs)
        loss = (weights[t[0]] * noise[0].square().mean((1, 2, 3))).mean()
        assert run.losses[0].item() == pytest.approx(loss.item(), rel=1e-4)
    assert len(timesteps) == 5 * 6
    mirrored = torch.cat(x0)[:, None].flip(-1) == sd.to_float(images)
    assert 25 < mirrored.flatten(2).all(2).any(1).sum() < 71  # of 96


def test_the_flags_of_each_method_reach_it(monkeypatch):
    ab, even, x0 = sd.GaussianDiffusion().alphas_cumprod, sd.UniformSampler(1000), images_of(1)
    gaussian, change_aware = sd.CurriculumSampler(1000, 50, 0.7, 2.0), sd.change_aware_weights(ab, 0.8)
    for flags, expected, weights in (
        ("uniform --weighting min-snr", even, sd.min_snr_weights(ab)),
        ("speed --speed-k 3 --speed-tau 100 --speed-lam 0.8", sd.SpeeDSampler(ab, 3.0, 100), change_aware),
        ("speed --weighting p2", sd.SpeeDSampler(ab), sd.p2_weights(ab)),
        ("speed --weighting none", sd.SpeeDSampler(ab), torch.ones(1000)),
        ("curriculum --steps 50 --curriculum-mu 0.7 --curriculum-sigma 2", gaussian, torch.ones(1000)),
        ("logit-normal --weighting change-aware --speed-lam 0.8", sd.LogitNormalSampler(1000), change_aware),
    ):
        sampler, raw_weights = sd.build_strategy(settings("--strategy", *flags.split()), ab, 1)
        assert len(sampler.sample(x0, 20)) == len(expected.sample(x0, 20)) == 1  # the curriculum moves
        assert_same_tensors([sampler.probs, raw_weights], [expected.probs, weights])
    monkeypatch.setattr(sd, "AdaptiveSampler", lambda *args, **options: options)
    given = {"every": 7, "selected": 2, "queue": 9, "probe": 30, "lr": 0.5, "entropy": 0.25}
    args = settings("--strategy=adaptive", *(f"--adaptive-{name}={value}" for name, value in given.items()))
    assert sd.build_strategy(args, ab, 1)[0] == given


def test_attention_defaults_follow_the_image_size():
    for flags, sides in (
        ("--dataset cifar10", [16]),
        ("--dataset mnist --image-size 32", [8]),
        ("--patch 1", [8]),
        ("--attention", []),
        ("--attention 8 4", [8, 4]),
    ):
        assert settings(*flags.split()).attention == sides, flags


@pytest.mark.parametrize("more", ["--amp off", "--momentum-decay", *ON_CUDA])
@each_strategy
def test_a_run_that_was_resumed_is_the_run_that_never_stopped(here, capsys, monkeypatch, strategy, more):
    monkeypatch.setattr(sd, "LOG_EVERY", 3)  # rows in one line with the checkpoints (4, 8) and between them
    options = [*TINY, *METHODS[strategy], *f"--strategy {strategy} --steps 10 --eval-every 4 {more}".split()]
    assert sd.main([*options, "--out", "whole"]) == 0
    command = [*options, "--out", "a run"]
    for act, step, status, kept, row in ENDS:
        with before_steps({step}, act):
            ended, command = sd.main(command), ["--resume", "a run"]
        resource.setrlimit(FILE_SIZE, LIMITS)
        said = f"step {kept}: --resume 'a run'" if status > 1 else "could not be written and is as it was"
        assert said in capsys.readouterr().err.splitlines()[-1] and len(os.listdir("a run")) == 5
        assert (ended, checkpoint("a run")["step"], metrics("a run")[-1]["step"]) == (status, kept, str(row))
    assert sd.main(command) == 0
    if "cuda" in more:  # its kernels sum in no fixed order, and Adam makes steps of what is rounding alone
        whole, again = (checkpoint(run) for run in ("whole", "a run"))
        torch.testing.assert_close(whole["losses"], again["losses"], rtol=1e-3, atol=1e-2)
        start = sd.Training(settings(*options), sd.render_digits(64)[0]).model.state_dict()
        apart, moved = (
            sum((whole["model"][name] - other[name]).norm() ** 2 for name in start) ** 0.5
            for other in (again["model"], start)
        )
        assert apart < 0.1 * moved
    else:
        assert_same_run("whole", "a run")


@on_cuda
def test_a_run_moves_from_a_cpu_to_a_gpu_and_back(here):
    command = [*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--out", "run"]
    with signalled_at({2, 4}):
        for device, ended in ("cpu", 143), ("cuda", 143), ("cpu", 0):
            assert sd.main([*command, "--device", device]) == ended
            command = ["--resume", "run"]


def test_ten_runs_started_together_get_ten_folders(here):
    def claim(barrier, out, results):
        barrier.wait()
        try:
            results.put(str(sd.new_folder(out, Path("runs") / "run", "config.json")))
        except sd.UserError:
            results.put(None)

    context = multiprocessing.get_context("fork")
    for out in (None, "own"):
        barrier, results = context.Barrier(10), context.Queue()
        processes = [context.Process(target=claim, args=(barrier, out, results)) for _ in range(10)]
        for process in processes:
            process.start()
        folders = [results.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        if out:
            assert sorted(folders, key=str) == [None] * 9 + ["own"]
        else:
            assert len(set(folders)) == 10 and None not in folders


def test_a_second_signal_stops_at_once(here):
    code = "import signal, sys, speedup_diffusion as sd\nstep = sd.Training.train_step\n"
    code += (
        "def twice(self):\n  signal.raise_signal(2); step(self); print('first'); signal.raise_signal(15)\n"
    )
    code += "  print('second')\nsd.Training.train_step = twice\nsys.exit(sd.main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(sd.__file__).parent), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *TINY, "--out", "run"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout.splitlines()[-1] == "first", done
    assert checkpoint("run")["step"] == 0


def test_a_run_needs_a_folder_that_no_other_process_trains_in_and_room_on_the_disk(here, capsys, monkeypatch):
    others, usage = [], shutil.disk_usage(here)
    with before_steps({5}, lambda run: others.append(sd.main(["--resume", "run"]))):
        assert sd.main([*TINY, "--out", "run"]) == 0
    assert others == [2] and "another process" in capsys.readouterr().err
    with pytest.raises(BlockingIOError), sd.alone_in("run"):
        raise BlockingIOError  # not of the lock
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    assert sd.main([*TINY, "--width", "64", "--out", "new/run"]) == 2 and os.listdir() == ["run"]
    run = sd.Training(settings(*TINY, "--width", "64"), sd.render_digits(64)[0])
    run.train_step()
    torch.save(run.state_dict(), "checkpoint.pt")
    needed = float(re.fullmatch(rf".*{here}.* GB.* take (\S+): .*\n", capsys.readouterr().err)[1])
    assert needed * 1e9 == pytest.approx(2 * (os.path.getsize("checkpoint.pt") + 5e7), rel=0.03)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_optimiser_receives_the_decayed_momentum_and_skips_what_is_not_finite(device, amp):
    args = settings(*TINY, "--momentum-decay", "--lr=0.01", "--warmup=2", "--beta1=0.8")
    args.amp, args.device, received, states = amp, device, [], []
    run, resumed = (sd.Training(args, sd.render_digits(64)[0]) for _ in range(2))
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: received.append(dict(*optimizer.param_groups)))
    for step, scale in enumerate((1024.0, 2.0**80, 1024.0)):  # no gradient in fp16 survives the second
        run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": scale if amp == "fp16" else 1.0})
        with infinite_loss_at({2} if amp == "off" else {}):
            run.train_step()
        states.append(copy.deepcopy(run.state_dict()))
        beta1, factor = sd.momentum_decay(step / 6, 0.8)
        lr = 0.01 * factor * min(1, (step + 1) / 2)
        assert (received[step]["lr"], *received[step]["betas"]) == pytest.approx((lr, beta1, 0.999))
    assert_same_tensors(*([state["model"], state["optimizer"]["state"]] for state in states[:2]))
    one, three = (states[turn]["model"] for turn in (0, 2))
    assert 0 < sum((weight - one[name]).abs().sum() for name, weight in three.items()) < math.inf
    average = {name: weight.lerp(one[name], 9 / 11) for name, weight in states[0]["ema"].items()}
    torch.testing.assert_close(average, dict(states[1]["ema"]))
    resumed.load_state_dict(states[2])
    assert_same_tensors(resumed.scaler.state_dict(), run.scaler.state_dict())
    assert resumed.step == 3 and resumed.skipped == (amp == "off")  # where the loss itself was not finite


def test_gradients_that_overflow_fp16_at_any_scale_end_the_run():
    args = settings(*TINY, "--steps", "30")
    args.amp = "fp16"
    run = sd.Training(args, sd.render_digits(64)[0])
    run.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(run.model.state_dict())
    for step in range(30):  # 65536 / 2^29 = 1.2e-4
        run.losses_since(step)
        run.train_step()
    with pytest.raises(FloatingPointError, match="step 30: .* scale fell to 6e-05: .* --amp bf16 or off"):
        run.losses_since(29)
    assert_same_tensors(run.model.state_dict(), before)
    assert run.skipped == 0  # the losses were finite


def test_an_update_whose_gradient_is_not_finite_is_skipped_and_counted():
    run = sd.Training(settings(*TINY), sd.render_digits(64)[0])
    before = copy.deepcopy(run.model.state_dict())
    run.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    run.train_step()
    assert_same_tensors(run.model.state_dict(), before)
    assert run.skipped == 1 and run.losses[0].isnan()


def test_gradients_are_clipped_to_the_norm_that_the_flag_gives():
    run, norms = sd.Training(settings(*TINY, "--grad-clip", "0.001"), sd.render_digits(64)[0]), []
    weights = list(run.model.parameters())
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.get_total_norm([p.grad for p in weights]))
    )
    run.train_step()
    assert norms[0].item() == pytest.approx(0.001, rel=1e-2)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    run, epochs = sd.Training(settings(*TINY), sd.render_digits(70)[0]), []
    for _ in range(2):
        batches = []
        for _ in range(4):  # of 16: the last 6 images of an epoch are left out
            batches.append(run.batch())
            run.step += 1
        epochs.append(torch.cat(batches))
        assert len(epochs[-1].unique(dim=0)) == 64
    assert not torch.equal(*epochs)


def test_samples_are_drawn_as_the_flags_say():
    asked = []

    class Recorded(sd.GaussianDiffusion):
        def ddim_step(self, x_t, t, t_prev, eps, eta, noise, clip=True):
            asked.append((t[0].item(), eta))
            return x_t

    every = [(t, 1.0) for t in range(49, -1, -1)]
    for flags, expected in (
        ("--sampling-steps 3 --eta 0.5", [(49, 0.5), (24, 0.5), (0, 0.5)]),
        ("--method ddpm", every),
    ):
        asked.clear()
        args = settings("--timesteps", "50", *flags.split())
        list(sd.draw_samples(lambda x, t: x, Recorded("linear", 50), 2, (1, 2, 2), args, 0, ""))
        assert asked == expected


def test_a_run_may_be_stopped_after_every_step(here):
    options = [*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--out"]
    assert sd.main([*options, "whole"]) == 0
    command = [*options, "stopped"]
    with signalled_at(range(1, 7)):
        for step in range(1, 7):
            assert sd.main(command) == 143 and checkpoint("stopped")["step"] == step
            command = ["--resume", "stopped"]
    assert sd.main(command) == 0
    assert_same_run("whole", "stopped")


def test_checkpoint_every_bounds_what_a_crash_loses(here):
    with before_steps({6}, lambda run: 1 / 0), pytest.raises(ZeroDivisionError):
        sd.main([*TINY, "--eval-every", "100", "--checkpoint-every", "2", "--out", "run"])
    assert checkpoint("run")["step"] == 4


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(here, capsys):
    with infinite_loss_at({2, *range(6, 15), *range(17, 40)}):  # a checkpoint is due in each streak
        with signalled_at({9}):
            assert sd.main([*TINY, "--steps", "40", "--eval-every", "4", "--out", "run"]) == 143
        assert sd.main(["--resume", "run"]) == 1
    last, state = capsys.readouterr().err.splitlines()[-1], checkpoint("run")
    assert (
        last.startswith("speedup_diffusion.py: step 26: 10 losses or gradients in a row") and "--lr" in last
    )
    assert state["step"] == 16 and state["skipped"] == 10  # the last before the losses went wrong
    assert sd.main(["--resume", "run", "--lr", "1e-5"]) == 0  # where the fault is gone
    assert json.loads(Path("run/config.json").read_text())["lr"] == 1e-5
    assert "10 updates were skipped" in capsys.readouterr().out and metrics("run")[-1]["step"] == "40"


@on_cuda
@pytest.mark.parametrize("share", [8, 1])
@each_strategy
def test_no_step_waits_for_the_gpu_wherever_the_images_fit(strategy, share, monkeypatch, request):
    memory = types.SimpleNamespace(total_memory=64 * 16 * 16 * share, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    options = ["--strategy", strategy, "--adaptive-every", "1", "--device", "cuda", "--flip"]
    run = sd.Training(settings(*TINY, *options), sd.render_digits(64)[0])
    assert run.images.is_cuda == (share == 8) and run.batch().is_cuda
    run.train_step()
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        run.train_step()


def test_a_compiled_run_is_the_run(here, monkeypatch):
    compiled, eager = [], functools.partial(torch.compile, backend="eager")  # traced but not translated
    monkeypatch.setattr(torch, "compile", lambda *args, **more: compiled.append(more) or eager(*args, **more))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    options = [*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--dropout", "0.1", "--compile"]
    assert [sd.main([*options, name, "--out", name]) for name in ("on", "off")] == [0, 0]
    assert compiled == [{"dynamic": False}] * 2  # the model and its average
    torch.testing.assert_close(*(checkpoint(run)["ema"] for run in ("on", "off")), rtol=0, atol=1e-5)
    generate = "--generate 2 --checkpoint on/checkpoint.pt --sampling-steps 2 --device cpu --compile"
    assert [sd.main([*generate.split(), name]) for name in ("on", "off")] == [0, 0] and len(compiled) == 3
    one, two = ((here / "on" / name / "000001.png").read_bytes() for name in ("generated", "generated-2"))
    assert one == two


@pytest.mark.parametrize(
    "name, device, calls, expected",
    [("auto", "cuda", 4999, 0), ("auto", "cuda:1", 5000, 1), ("auto", "cpu", 5000, 0),
     ("on", "cpu", 1, 1), ("off", "cuda", 5000, 0)],
)  # fmt: skip
def test_auto_compiles_on_a_gpu_what_is_called_often_enough(name, device, calls, expected):
    compiled, args = [], types.SimpleNamespace(compile=name, device=device)
    with torch._dynamo.config.patch(suppress_errors=False):  # restored afterwards
        sd.compile_in_place(args, calls, types.SimpleNamespace(compile=lambda **_: compiled.append(1)))
    assert len(compiled) == expected


def test_what_is_compiled_for_is_the_steps_or_the_calls_of_the_sampling(here, monkeypatch):
    counted = []
    monkeypatch.setattr(sd, "compile_in_place", lambda args, calls, *models: counted.append(calls))
    assert sd.main([*TINY, "--steps", "7", "--out", "run"]) == 0
    for more in ("--sampling-steps 4", "--method ddpm"):
        generate = f"--generate 5 --batch-size 2 --device cpu --checkpoint run/checkpoint.pt {more}"
        assert sd.main(generate.split()) == 0
    assert counted == [7, 4 * 3, 50 * 3]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_once_used_is_not_faulted_in_again():
    program = """if True:
        import resource, torch, speedup_diffusion as sd
        sd.build_model(sd.parse_args(["--device", "cpu"])[0], 1)
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for size in range(20, 27):
                torch.ones(2**size)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = subprocess.check_output([sys.executable, "-c", program], cwd=Path(sd.__file__).parent)
    assert int(faults) < 1000  # of 130,048 pages


def test_flops_are_those_that_the_profiler_counts():
    args = settings("--image-size", "16", "--width", "32", "--mults", "1", "2", "--attention", "4")
    (model, _), profiler = sd.build_model(args, 3), torch.autograd.profiler
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), profiler.profile(with_flops=True) as profile:
        model(torch.randn(1, 3, 16, 16), torch.zeros(1))
    forward = sum(event.flops for event in profile.key_averages())
    assert sd.flops_per_image(args, 3) == pytest.approx(3 * forward, rel=0.03)  # backward is twice forward


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_on_mnist_files_generates_images_that_repeat_with_the_seed(here, device):
    write_mnist(here / "data", (64, 32))
    assert sd.main(["--dataset", "mnist", "--num-blocks", "1", *TINY, "--out", "run"]) == 0
    generate = "--generate 6 --checkpoint run/checkpoint.pt --batch-size 4 --sampling-steps 3"
    generate += f" --device {device}"
    assert sd.main(generate.split()) == 0
    state = checkpoint("run")
    torch.save(
        state | {"model": {name: 0 * part for name, part in state["model"].items()}}, "run/checkpoint.pt"
    )
    for more in ([], ["--out", "other", "--seed", "1"]):  # from the average of the weights, not from the last
        assert sd.main([*generate.split(), *more]) == 0
    one, two, other = (sorted(Path(name).iterdir()) for name in ("run/generated", "run/generated-2", "other"))
    assert [path.name for path in one] == [f"{i:06d}.png" for i in range(6)] + ["grid.png"]
    assert one[5].read_bytes() == two[5].read_bytes() != other[5].read_bytes()


def test_a_folder_may_move_but_not_change(here, image_folder, capsys):
    options = ["--dataset", "folder", "--image-size", "8", "--mults", "1", "2", "--amp", "bf16", *TINY]
    with signalled_at({5}):
        assert sd.main([*options, "--data-dir", str(image_folder), "--out", "run"]) == 143
    moved, resume = image_folder.rename(here / "moved"), ["--resume", "run", "--data-dir", "moved"]
    assert sd.main(resume[:2]) == 2 and str(image_folder) in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(moved / "more.png")
    assert sd.main(resume) == 2 and "its data were" in capsys.readouterr().err
    (moved / "more.png").unlink()
    assert sd.main(resume) == 0


# 8 Report

# Strategy, seed, FID at steps 100, 200 ... Seed 1 of the baseline ends at 6, where it also was at step 160.
RUNS = "uniform 0 9 7 5,uniform 1 9 4 6,curriculum 0 5 3,curriculum 1 6 3,speed 0 9 6,speed 1 9 6,adaptive 0"
TABLE = """\
| strategy | runs | steps | seconds | val_mse | val_vlb | FD (pooled.ts) last | FD (pooled.ts) best \
| steps to baseline's last | seconds to it | speed-up (steps) | speed-up (seconds) |
|---|---|---|---|---|---|---|---|---|---|---|---|
| uniform | 2 | 300 | 30 | 0.03333 | 0.3333 | 5.5 (5..6) | 4.5 (4..5) | 230 (160..300) | 23 (16..30) | 1 | 1 |
| curriculum | 2 | 200 | 20 | 0.05 | 0.5 | 3 | 3 | 100 | 10 | 2.3 (1.6..3) | 2.3 (1.6..3) |
| speed | 2 | 200 | 20 | 0.05 | 0.5 | 6 | 6 | 200 in 1 of 2 | 20 in 1 of 2 | 0.8 in 1 of 2 | 0.8 in 1 of 2 |
| adaptive + no weights + momentum decay, lr 0.5 | 1 | 25 | 2.5 | - | - | - | - | - | - | - | - |
| adaptive | 1 | 6 | """


class Malicious:  # unpickling it makes a file
    def __reduce__(self):
        return open, ("created", "w")


@pytest.fixture(scope="module")
def places(tmp_path_factory, pooled):
    """A run, runs that cannot be compared with it, and files that are wrong in one way each."""
    root = tmp_path_factory.mktemp("places")
    fid = ["--fid-samples", "10", "--fid-every", "3", "--fid-features", pooled, "--out", str(root / "run")]
    assert sd.main([*TINY, "--strategy", "adaptive", "--adaptive-every", "2", *fid]) == 0
    for name, value in {"data": "80 images", "features": "FID", "fid_samples": 20, "eta": 1.0}.items():
        config = json.loads((shutil.copytree(root / "run", root / name) / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | {name: value}))
    (root / "broken.png").write_bytes(b"no picture")
    (root / "cut.pt").write_bytes((root / "run/checkpoint.pt").read_bytes()[:9999])
    torch.save({"weights": torch.zeros(3)}, root / "other.pt")
    torch.save(Malicious(), root / "evil.pt", _use_new_zipfile_serialization=False)
    save_torchscript(nn.Identity(), root / "identity.ts")
    return root


def test_the_report_compares_with_the_baseline_of_the_same_seed_and_draws(places, here, capsys, monkeypatch):
    config = json.loads((places / "run/config.json").read_text())
    for number, run in enumerate(RUNS.split(",")):
        strategy, seed, *fids = run.split()
        config |= {"strategy": strategy, "seed": int(seed)}
        config |= {} if fids else {"weighting": "none", "momentum_decay": True, "lr": 0.5}
        table = "step,images,seconds,loss,lr,beta1,val_mse,val_vlb,fid\n25,50,2.5,0.5,0.1,0.9,,,\n"
        for i, fid in enumerate(fids, 1):
            table += f"{i}00,{i}00,{i}0,0.5,0.1,0.9,{0.1 / i},{1 / i},{fid}\n"
        Path(f"{number}").mkdir()
        Path(f"{number}/config.json").write_text(json.dumps(config))
        Path(f"{number}/metrics.csv").write_text(table + "300,6")  # a kill cut the last line
    report = ["--report", *"0123456", str(places / "run")]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert sd.main(report) == 0
    out = capsys.readouterr().out
    assert out.startswith(TABLE) and out.endswith("pip install matplotlib\n") and not Path("runs").exists()
    pytest.importorskip("matplotlib")
    assert sd.main(report) == 0
    assert capsys.readouterr().out.endswith("\nmethods.png and curves.png in runs/report\n")
    assert {Image.open(f"runs/report/{name}.png").size for name in ("methods", "curves")} == {(1200, 600)}
    Path(shutil.copytree(places / "run", "cut"), "checkpoint.pt").write_bytes(b"cut")
    assert sd.main(["--report", "cut", "--out", "pictures"]) == 2 and not Path("pictures").exists()


def test_make_compare_runs_every_strategy_with_flags_that_exist():
    make = ["env", "-u", "MAKEFLAGS", "make", "-nB", "compare", "SEEDS=0 1", "RESULTS=nowhere"]
    shown = subprocess.check_output(make, cwd=Path(sd.__file__).parent, text=True).replace("\\\n", "")
    commands = [line.split()[2:] for line in shown.splitlines()]
    runs = [vars(sd.make_parser().parse_args(command)) for command in commands if "--out" in command]
    assert len({str(run | {"out": ""}) for run in runs}) == len(runs) == 24
    assert {run.get("strategy", "uniform") for run in runs} == set(sd.STRATEGIES)
    (reported,) = (command[1:] for command in commands if command[:1] == ["--report"])
    assert sorted(reported) == sorted(run["out"] for run in runs) and reported[0] == "nowhere/uniform-0"


# 9 Command line

# Where @ stands for the places. The line must name the last flag or its value.
BAD_INPUT = """\
--stepps 3 | --step 3 | --timesteps 0 | --steps 0 | --speed-k 0.5 | --speed-tau 0 | --speed-lam 0.4
--speed-lam 1.1 | --beta1 1 | --beta1 -0.1 | --fid-samples 1 | --width 9 | --attention 5 | --image-size 18
--image-size 256 | --attention --mults 64 64 --width 4096 | --batch-size 9729 | --sampling-steps 1001
--method ddpm --eta 0.5 | --strategy speed --timesteps 2 | --fid-every 5 | --report | --generate 4
--strategy speed --speed-tau 1001 | --strategy adaptive --adaptive-selected 101 | --device cpu --amp fp16
--dataset folder | --dataset folder --data-dir . | --dataset folder --data-dir @run | --out @run
--dataset folder --data-dir @ | --dataset mnist --data-dir @mnist | --resume @run | --resume @run --width 16
--checkpoint @run/checkpoint.pt | --generate 4 --checkpoint @run/checkpoint.pt --sampling-steps 51
--generate 4 --checkpoint @cut.pt | --generate 4 --checkpoint @other.pt | --generate 4 --checkpoint @evil.pt
--fid-samples 9 --fid-features @other.pt | --fid-samples 9 --fid-features @identity.ts | --report @run @data
--report @run --seed 1 | --report @run @features | --report @run @fid_samples | --report @run @eta"""
BAD_INPUT = [line.split(" | ") for line in BAD_INPUT.splitlines()]
VALUES = ["", "many", "nan", "inf", "-inf", "-1", "1e30", "9" * 40]
STARTS = ["--dataset folder --data-dir", "--fid-samples 9 --fid-features", "--generate 4 --checkpoint"]
STARTS = {start.split()[-1]: start for start in STARTS}
NAMES = {flag: ["", "x" * 5000, "nowhere", "no\nwhere"] for flag in ("--resume", "--report", *STARTS)}
NAMES["--out"] = ["", "x" * 5000, "/proc/none", "/dev/null"]
NAMES["--device"] = ["", "tpu", "cuda:99" if torch.cuda.is_available() else "cuda"]
FLAGS = [flag for action in sd.make_parser()._actions[1:] for flag in action.option_strings]  # but --help
BAD_INPUT += [[f"{STARTS.get(flag, flag)}={bad}" for bad in NAMES.get(flag, VALUES)] for flag in FLAGS]
ALTERED = {"num_blocks": 10**9, "timesteps": 10**12, "strategy": "mine", "width": 16, "drawn": torch.zeros(3)}
ALTERED |= {"sampler": {}, "optimizer": {}, "model": Malicious(), "args": Malicious(), "more": Malicious()}


@pytest.mark.parametrize("commands", BAD_INPUT, ids=lambda commands: commands[0])
def test_bad_input_is_one_line_and_status_2_at_once(here, capsys, monkeypatch, places, commands):
    monkeypatch.setattr(sd.Training, "train_step", None)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    for command in commands:
        argv, begin = command.replace("@", f"{places}/").split(" "), time.perf_counter()
        assert sd.main(argv) == 2, command
        assert time.perf_counter() - begin < 5 and not os.listdir(), command
        *bars, line = re.split(r"\s*[\r\n]\s*", capsys.readouterr().err.strip())
        assert line.startswith("speedup_diffusion.py: error: ") and all("reading" in bar for bar in bars)
        words = re.split(r"[\s=]", " ".join(argv))[-2:]
        assert any(word.strip("-") in line for word in words if len(word) > 3), (command, line)


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_checkpoint_is_refused_in_one_line_and_runs_no_code(here, capsys, places, name):
    shutil.copytree(places / "run", "run")
    state = checkpoint("run")
    state["args"]["steps"] = 9  # so that there is something to go on with
    (state["args"] if name in state["args"] else state)[name] = ALTERED[name]
    torch.save(state, "run/checkpoint.pt")
    assert sd.main(["--resume", "run"]) == 2 and os.listdir() == ["run"]
    assert capsys.readouterr().err.count("\n") == 1 and metrics("run") == metrics(places / "run")
    torch.load("run/checkpoint.pt", weights_only=False)
    assert Path("created").exists() == isinstance(ALTERED[name], Malicious)  # it would have


def test_too_little_memory_is_one_line_that_says_what_to_lower(here, capsys, monkeypatch):
    monkeypatch.setattr(sd.Training, "train_step", lambda self: torch.empty(10**15))
    assert sd.main(TINY) == 1
    assert capsys.readouterr().err.endswith("lower --batch-size, --width or --image-size\n")


def test_help_gives_every_default():  # --help, three flags of FID and four of files have none
    given = " ".join(sd.make_parser().format_help().split()).count("(default: ")
    assert given == len(sd.make_parser()._actions) - 8


def test_the_script_knows_a_wrong_flag_within_five_seconds_and_stops_on_ctrl_c(here):
    script, run = [sys.executable, sd.__file__], Path("runs/digits-uniform")
    begin = sum(os.times()[2:4])  # the CPU time of children: others may be using this machine
    done = subprocess.run([*script, "--lr=nan"], capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and sum(os.times()[2:4]) - begin < 5
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": lambda: signal.alarm(60)}
    process = subprocess.Popen([*script, *TINY, "--steps", "100000"], **options)
    while not (run / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].endswith(f"step {checkpoint(run)['step']}: --resume {run}\n")
    assert process.returncode == 130


# The README


def readme():
    return (Path(sd.__file__).parent / "README.md").read_text(encoding="utf-8")


def code_blocks():
    return re.findall(r"^```python\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", code_blocks(), ids=["diffusers", "own-loop", "momentum-decay", "adaptive"])
def test_every_snippet_of_the_readme_runs_as_it_stands(here, block):
    if "from diffusers" in block:
        pytest.importorskip("diffusers")
    names = {"__name__": "snippet"}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    assert all(p.isfinite().all() for group in names["optimizer"].param_groups for p in group["params"])


def test_the_snippet_of_momentum_decay_sets_adam_and_sgd():
    names = {"__name__": "snippet"}
    exec(next(block for block in code_blocks() if "def set_momentum" in block), names)  # noqa: S102
    beta1, lr_scale = sd.momentum_decay(0.99)  # its last step
    group = names["optimizer"].param_groups[0]
    assert (group["lr"], *group["betas"]) == pytest.approx((1e-2 * lr_scale, beta1, 0.999))
    sgd = torch.optim.SGD([names["weight"]], lr=0.1, momentum=0.9)
    names["set_momentum"](sgd, 0.99)
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]) == pytest.approx((0.1, beta1))
    with pytest.raises(ValueError, match="Adagrad has no momentum"):
        names["set_momentum"](torch.optim.Adagrad([names["weight"]]), 0.99)


def test_every_flag_the_readme_names_exists():
    torchrun = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme()))
    assert len(named) > 20 and named <= torchrun | {*sd.make_parser()._option_string_actions}


# Several processes: torchrun starts this file, and the tests look at what its two ranks left behind

ADAPTING = [*TINY, "--momentum-decay", "--adaptive-every", "2", "--grad-clip", "1e6", "--strategy"]


def one_of_two():
    """What each rank does: it is refused, takes five steps of every strategy, is stopped, resumed, and killed."""
    sd.join_processes()  # once: torch.distributed does not join twice
    sd.join_processes = torch.distributed.destroy_process_group = lambda: None
    sd.render_digits = functools.cache(sd.render_digits)
    for refused in ("--report run", "--device cuda:0", "--device cpu --batch-size 15"):
        assert sd.main(refused.split()) == 2
    batches, q_sample, images = [], sd.GaussianDiffusion.q_sample, sd.load_dataset("digits", "data", 16)[0]
    sd.GaussianDiffusion.q_sample = lambda *batch: batches.append(batch[1:]) or q_sample(*batch)
    for strategy in sd.STRATEGIES:
        run = sd.Training(settings(*ADAPTING, strategy), images)
        with infinite_loss_at({3} if strategy == "speed" and sd.RANK == 1 else {}):
            for _ in range(5):
                before = copy.deepcopy(run.state_dict())
                run.train_step()
        after = run.state_dict() | {"args": None, "grad": [p.grad for p in run.model.parameters()]}
        torch.save([before, after, batches[-1]], f"{strategy}-{sd.RANK}.pt")
    options = [*ADAPTING, "adaptive", "--dropout", "0.2", "--flip", "--steps", "8", "--out"]
    assert sd.main([*options, "whole"]) == 0
    with signalled_at({5} if sd.RANK == 1 else {}):
        assert sd.main([*options, "stopped"]) == 143
    if sd.RANK == 0:
        shutil.copytree("stopped", "as-one")
    else:  # only the machine of rank 0 needs the run's folder
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
    assert sd.main(["--resume", "stopped"]) == 0
    with signalled_at({5} if sd.RANK == 1 else {}, signal.SIGKILL):
        sys.exit(sd.main([*options, "dead"]))


def torchrun(folder, *command, ranks=2):
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
    options = {"capture_output": True, "text": True, "timeout": 180}
    return subprocess.run([*launch, *command], cwd=folder, check=False, **options)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, torchrun(folder, __file__)


@each_strategy
def test_two_ranks_stay_the_same_with_the_gradient_of_one_process(two_ranks, strategy):
    ranks = (torch.load(f"{two_ranks[0]}/{strategy}-{rank}.pt", weights_only=True) for rank in (0, 1))
    (before, one, half), (_, two, other_half) = ranks
    assert_same_tensors(one, two)
    # Of speed one update was skipped, for a loss of rank 1 alone.
    assert (one["step"], one["drawn"].sum(), one["skipped"]) == (5, 5 * 16, strategy == "speed")
    run = sd.Training(settings(*ADAPTING, strategy), sd.load_dataset("digits", "data", 16)[0])
    run.load_state_dict(before)
    x0, t, noise = map(torch.cat, zip(half, other_half))
    assert torch.equal(x0, run.batch()) and not torch.equal(t[:8], t[8:]) and (noise[:8] != noise[8:]).all()
    run.sampler.sample(x0, run.step)  # moves the curriculum
    weights = sd.normalize_weights(run.raw_weights, run.sampler.probs)[t]
    error = run.model(run.diffusion.q_sample(x0, t, noise), t) - noise
    (weights * error.square().mean((1, 2, 3))).mean().backward()
    torch.testing.assert_close(one["grad"], [p.grad for p in run.model.parameters()], rtol=1e-4, atol=1e-6)


def test_two_ranks_resume_as_two_and_as_one(two_ranks, monkeypatch):
    monkeypatch.chdir(two_ranks[0])
    assert_same_run("whole", "stopped")
    assert checkpoint("as-one")["step"] == 5 and checkpoint("whole")["sampler"]["filled"] == 4
    assert sd.main(["--resume", "as-one"]) == 0
    assert [row["step"] for row in metrics("as-one")] == ["3", "6", "8"]


def test_a_rank_that_dies_ends_the_run_and_rank_0_alone_speaks(two_ranks):
    folder, done = two_ranks
    assert done.returncode == 1 and checkpoint(folder / "dead")["step"] == 3, done.stderr
    # Rank 0 finds the other gone, or is told to stop by torchrun, whichever comes first.
    assert "rank 0 lost another process" in done.stderr or "step 3: --resume dead" in done.stderr
    assert done.stderr.count("speedup_diffusion.py: error: ") == 3 and done.stdout.count("on 2 x cpu") == 4


def test_torchrun_starts_the_script_itself_which_refuses_once(here):
    done = torchrun(here, sd.__file__, "--batch-size", "15", "--device", "cpu")
    assert done.returncode == 1 and not list(here.iterdir())
    assert done.stderr.count("error: --batch-size 15 must divide by 2, the processes\n") == 1


@on_cuda
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_one_rank_on_a_gpu_trains_by_nccl(here, compiled):
    options = [*ADAPTING, "adaptive", "--device", "cuda", "--compile", compiled, "--out", "run"]
    done = torchrun(here, sd.__file__, *options, ranks=1)
    assert done.returncode == 0 and checkpoint("run")["step"] == 6, done.stderr


# Minutes long

SCRIPT = [sys.executable, sd.__file__]
start = functools.partial(subprocess.Popen, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_twenty_kills_even_while_a_checkpoint_is_written_lose_nothing(here, capsys):
    command = [*SCRIPT, *ADAPTING, "adaptive", "--width", "32", "--steps", "300", "--eval-every", "50"]
    command += ["--checkpoint-every", "1", "--out"]
    assert start([*command, "whole"]).wait() == 0
    process, torn, before = start([*command, "killed"]), 0, -1
    for pause in np.random.default_rng(0).uniform(0, 0.5, 20):
        while not Path("killed/checkpoint.pt").exists() or checkpoint("killed")["step"] <= before:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        torn += len(list(Path("killed").glob("*checkpoint*"))) > 1
        before = checkpoint("killed")["step"]
        *rows, _ = Path("killed/metrics.csv").read_text().split("\n")
        assert all(row.count(",") == 8 for row in rows) and len(set(rows)) == len(rows)
        process = start([*SCRIPT, "--resume", "killed"])
    assert process.wait() == 0 and torn
    assert_same_run("whole", "killed")
    with capsys.disabled():
        print(f"\n20 kills up to step {before}, {torn} of them while a checkpoint was written")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")
def test_a_long_run_keeps_its_memory_its_pace_and_every_timestep(here, capsys):
    options = ["--strategy", "adaptive", "--steps", "20000", "--eval-every", "2000", "--out", "run"]
    process, memory = start([*SCRIPT, *TINY, *options]), []
    while process.poll() is None:
        memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
        time.sleep(1)
    assert process.returncode == 0
    _, early, _, late = (np.median(quarter) for quarter in np.array_split(memory, 4))
    seconds = np.diff([float(row["seconds"]) for row in metrics("run")])
    # Of the fastest steps: the machine may have something else to do.
    _, second, _, last = (np.quantile(quarter, 0.1) for quarter in np.array_split(seconds, 4))
    with capsys.disabled():
        print(f"\n20,000 steps: memory {late / early - 1:+.2%}, time of a step {last / second - 1:+.1%}")
    assert abs(late / early - 1) < 0.02 and last < 1.15 * second
    sampler = checkpoint("run")["sampler"]
    assert all(weight.isfinite().all() for weight in [*sampler["policy"].values(), sampler["queue"]])
    assert sampler["probs"].min() >= 0.005 / 50


@pytest.mark.slow
def test_ten_processes_started_together_get_ten_folders(here):
    processes = [start([*SCRIPT, *TINY, "--steps", "2"]) for _ in range(10)]
    assert [process.wait() for process in processes] == [0] * 10
    runs = list(Path("runs").iterdir())
    assert len(runs) == 10 and all(checkpoint(run)["step"] == 2 for run in runs)


@functools.cache  # trained once
class DigitFeatures(nn.Module):
    """float [N, 3, H, W] in 0..255 -> [N, 64]: the strokes that a small classifier of rendered digits knows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        images, labels = sd.render_digits(10_240, 16, 1)
        x = sd.to_float(images)
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3)]
        self.net = nn.Sequential(*layers, nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(self.net.parameters(), 2e-3)
        for batch in (batch for _ in range(5) for batch in torch.randperm(9_728).split(128)):
            optimizer.zero_grad()
            F.cross_entropy(self.net(x[batch]), labels[batch]).backward()
            optimizer.step()
        self.net.eval()
        self.strokes = self.net[:5]
        assert (self.net(x[9_728:]).argmax(1) == labels[9_728:]).float().mean() >= 0.97  # held out

    def forward(self, images):
        return self.strokes(images.mean(1, keepdim=True) / 127.5 - 1).amax((2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("options", [*(["--strategy", s] for s in sd.STRATEGIES), ["--momentum-decay"]])
def test_the_default_run_draws_legible_digits_in_five_minutes(here, capsys, options):
    begin = time.perf_counter()
    subprocess.run([*SCRIPT, "--device", "cpu", *options, "--out", "run"], check=True)
    seconds = time.perf_counter() - begin
    assert sd.main(["--generate", "256", "--checkpoint", "run/checkpoint.pt", "--device", "cpu"]) == 0
    digits = [np.array(Image.open(path).convert("L")) for path in Path("run/generated").glob("0*.png")]
    confidence = DigitFeatures().net(sd.to_float(torch.tensor(np.stack(digits))[:, None])).softmax(1).amax(1)
    legible = (confidence > 0.9).float().mean().item()
    with capsys.disabled():
        print(f"\n{' '.join(options)}: {seconds:.0f} s, {legible:.1%} legible, {metrics('run')[-1]}")
    assert len(digits) == 256 and seconds < 300 and legible >= 0.8


# Speed: nothing is asserted of seconds, which vary from machine to machine

BENCHED = ["uniform", "adaptive", "adaptive --adaptive-probe 1000", "uniform --momentum-decay"]
BENCHED += ["uniform --weighting none", *sd.STRATEGIES[1:4]]  # the first of these is uniform again
MNIST = "--dataset mnist --width 32 --num-blocks 1"  # ten times the operations of the digits' U-Net
SETUPS = ["--dataset digits", MNIST]
if torch.cuda.is_available():
    CIFAR10 = "--device cuda --dataset cifar10 --amp"
    SETUPS = [f"{CIFAR10} {amp} --compile {when}" for amp in ("bf16", "fp16") for when in ("off", "on")]


@pytest.mark.bench
def test_bench(capsys):
    """Blocks of four steps of each method in random order; an update of the policy in every second block."""
    rows = ["", "| setup | method | images/s | of uniform's time (goal 1.01, adaptive 1.08) |"]
    rows += ["|---" * 4 + "|"]
    for flags in [f"{setup} --batch-size {size}".split() for setup in SETUPS for size in (64, 256)]:
        torch.compiler.reset()
        args, built = settings(*flags), {}
        shape = 2000, 3 if args.dataset == "cifar10" else 1, args.image_size, args.image_size
        run = sd.Training(args, torch.randint(256, shape, dtype=torch.uint8))
        for method in BENCHED[:2] if args.dataset == "mnist" else BENCHED:
            own = settings(*flags, "--adaptive-every", "8", "--strategy", *method.split())
            built[method] = own, *sd.build_strategy(own, run.diffusion.alphas_cumprod, shape[1])
        seconds = {method: [] for method in built}
        for number in range(33):
            for method in random.sample(list(built), len(built)):
                # One model for all: where its weights lie in memory alone can make 5%.
                (run.args, run.sampler, run.raw_weights), run.step = built[method], 4 * number
                begin = time.perf_counter()
                for _ in range(4):
                    run.train_step()
                run.losses.tolist()  # waits for the device
                seconds[method].append(time.perf_counter() - begin)
        for method in built:
            ratios = np.divide(seconds[method], seconds["uniform"])[1:]  # the first round warmed up
            plain, updating = np.median(ratios[::2]), np.median(ratios[1::2])
            cost = plain + (updating - plain) / 10  # by default one block in ten has an update
            speed = 4 * args.batch_size / np.median(seconds["uniform"]) / cost
            rows += [f"| {' '.join(flags)} | {method} | {speed:.0f} | {cost:.3f} |"]
        with capsys.disabled():
            print(*rows, sep="\n", flush=True)
        rows.clear()


if __name__ == "__main__":
    one_of_two()
