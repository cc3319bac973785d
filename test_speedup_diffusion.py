# SPDX-License-Identifier: MIT
"""What speedup_diffusion.py promises, in its own order. `make test` runs all but the slow tests and the bench."""

import contextlib
import copy
import csv
import functools
import inspect
import json
import math
import os
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
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import speedup_diffusion as sd

SCHEDULES = ("linear", "quad", "cosine")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_strategy = pytest.mark.parametrize("strategy", sd.STRATEGIES)
TINY = "--width 8 --batch-size 16 --steps 6 --eval-every 3 --timesteps 50 --sampling-steps 4 --device cpu".split()
TINY += ["--fid-samples", "0"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it


@pytest.fixture(scope="module", autouse=True)
def rendered_and_trained_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "render_digits", functools.cache(sd.render_digits))
        patch.setattr(sd, "digit_features", functools.cache(sd.digit_features))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def settings(*argv):
    return sd.parse_args([*TINY, *argv])[0]


def training(*argv, images=64):
    return sd.Training(settings(*argv), sd.render_digits(images)[0], torch.device("cpu"))


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


def bytes_of(count, size=8, channels=1):
    return (images_of(count, size, channels) * 127.5 + 127.5).round().byte()


class Pooled(nn.Module):
    """[N, 3, H, W] -> [N, 16]: the red channel at 4x4, enough to tell a digit from noise."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images[:, :1], 4).flatten(1)


def save_torchscript(module, path):
    torch.jit.trace(module, torch.zeros(2, 3, 16, 16)).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    return save_torchscript(Pooled(), tmp_path_factory.mktemp("features") / "pooled.ts")


# 1 Diffusion


@pytest.mark.parametrize("T", [1, 2, 19, 100, 1000])
def test_schedules_and_q_sample_have_their_closed_forms_and_predict_x0_inverts_it(T):
    ramp = np.linspace(0, 1, T)
    angle = (np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2
    expected = {
        "linear": (1e-4 + 0.0199 * ramp) * 1000 / T,
        "quad": (0.01 + (0.02**0.5 - 0.01) * ramp) ** 2 * 1000 / T,
        "cosine": 1 - (np.cos(angle[1:]) / np.cos(angle[:-1])) ** 2,
    }
    t = torch.arange(T)
    x0, noise = torch.randn(2, T, 1, 1, 1)
    for schedule, betas in expected.items():
        diffusion = sd.GaussianDiffusion(schedule, T)
        betas = torch.tensor(betas).clamp(max=0.999)
        ab = (1 - betas).cumprod(0).view(-1, 1, 1, 1)
        x_t = diffusion.q_sample(x0, t, noise)
        assert np.allclose(diffusion.betas, betas, atol=0)
        assert np.allclose(diffusion.alphas_cumprod, ab.flatten(), atol=0)
        assert np.allclose(x_t, ab.sqrt() * x0 + (1 - ab).sqrt() * noise, atol=1e-5)
        assert np.allclose(ab.sqrt() * diffusion.predict_x0(x_t, t, noise), ab.sqrt() * x0, atol=1e-5)


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_single_steps_and_vlb_coefficients_have_their_closed_forms(schedule, T):
    diffusion = sd.GaussianDiffusion(schedule, T)
    t = torch.arange(T)
    x0, noise, z = torch.randn(3, T, 1, 4, 4)
    beta = diffusion.betas.double().view(-1, 1, 1, 1)
    x_t = diffusion.q_sample(x0, t, noise)
    ab = (1 - beta).cumprod(0)
    ab_prev = ab / (1 - beta)
    mean = (ab_prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab_prev) * x_t) / (1 - ab)
    posterior = torch.distributions.Normal(mean, (beta * (1 - ab_prev) / (1 - ab)).sqrt().clamp(min=1e-9))
    ours = diffusion.ddpm_step(x_t, t, noise, z, clip=False)
    assert np.allclose(ours, mean + posterior.stddev * z, atol=1e-3)
    x0 = x0.clamp(-1, 1)  # and then x_t implies another epsilon
    path = ab_prev.sqrt() * x0 + (1 - ab_prev).sqrt() * (x_t - ab.sqrt() * x0) / (1 - ab).sqrt()
    assert np.allclose(diffusion.ddim_step(x_t, t, t - 1, noise, 0.0, None), path, atol=1e-3)
    # The coefficient of the epsilon-MSE is that of the full Gaussian KL, in bits per dimension.
    means = torch.stack([diffusion.ddpm_step(x_t, t, noise + error, 0 * z, False) for error in (0.1, 0.7)])
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(means, beta.sqrt()))
    rise = kl.mean((2, 3, 4)).diff(dim=0) / math.log(2)
    assert np.allclose(diffusion.vlb_coefficients * (0.7**2 - 0.1**2), rise, rtol=1e-3)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("t", [999, 500, 20, 1, 0])
@pytest.mark.parametrize("ours, theirs", [*zip(SCHEDULES, ("linear", "scaled_linear", "squaredcos_cap_v2"))])
def test_single_steps_equal_those_of_diffusers(ours, theirs, t, clip):
    diffusers = pytest.importorskip("diffusers")
    diffusion = sd.GaussianDiffusion(ours)
    when = torch.full((4,), t)
    x_t, eps = torch.randn(2, 4, 1, 8, 8)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    ddpm = diffusers.DDPMScheduler(1000, 1e-4, 0.02, theirs, clip_sample=clip)
    assert torch.allclose(diffusion.alphas_cumprod, ddpm.alphas_cumprod, atol=2e-6)
    step = ddpm.step(eps, t, x_t, generator=torch.Generator().manual_seed(5))
    pairs = [(diffusion.ddpm_step(x_t, when, eps, noise, clip), step)]
    ddim = diffusers.DDIMScheduler(1000, 1e-4, 0.02, theirs, clip_sample=clip)
    ddim.set_timesteps(50)
    for eta in (0.0, 0.5, 1.0):
        step = ddim.step(eps, t, x_t, eta, use_clipped_model_output=True, variance_noise=noise)
        pairs.append((diffusion.ddim_step(x_t, when, (when - 20).clamp(min=-1), eps, eta, noise, clip), step))
    for one, two in pairs:
        assert torch.allclose(one, two[0], rtol=1e-4, atol=2e-4 * two[0].abs().max())


@pytest.mark.parametrize("method, steps, eta", [("ddim", 200, 0.0), ("ddim", 1000, 1.0), ("ddpm", 50, 0.0)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampling_with_the_optimal_epsilon_returns_the_gaussian(schedule, method, steps, eta):
    """Data N(m, s^2): E[eps | x_t] = sqrt(1 - ab) (x_t - sqrt(ab) m) / (ab s^2 + 1 - ab)."""
    diffusion = sd.GaussianDiffusion(schedule)
    ab = diffusion.alphas_cumprod.view(-1, 1, 1, 1)
    m = 0.2
    s = 0.15
    visited = []

    def optimal(x_t, t):
        visited.append(t[0].item())
        return (1 - ab[t]).sqrt() * (x_t - ab[t].sqrt() * m) / (ab[t] * s**2 + 1 - ab[t])

    x = diffusion.sample(optimal, (20_000, 1, 1, 1), method, steps, eta)
    assert abs(x.mean() - m) < 5 * s / 20_000**0.5
    assert abs(x.std() - s) < 0.04 * s
    assert visited == np.linspace(999, 0, 1000 if method == "ddpm" else steps).round().tolist()


# 2 Accelerations


def chi_square_p(drawn, probs):
    """The p-value of the drawn timesteps under probs; those expected fewer than 5 times count as one."""
    expected = probs.double() / probs.double().sum() * len(drawn)
    bins = torch.where(expected < 5, -1, torch.arange(len(probs))).unique(return_inverse=True)[1]
    counts = bins[drawn].bincount(minlength=bins.max() + 1)
    return scipy.stats.chisquare(counts, bins.bincount(expected)).pvalue


def opinionated(ab):
    """An adaptive sampler that is sure of the ends, of the middle, or of little, as the image may be."""
    sampler = sd.AdaptiveSampler(ab, in_channels=1)
    outputs = torch.tensor([[-20.0, -20.0], [30.0, 30.0], [0.0, 2.0], [1.0, 0.0]]).repeat(16, 1)
    sampler.policy = lambda images: outputs[: len(images)]
    return sampler


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_draw_as_their_probs_say_and_weights_average_one_under_them(schedule, T):
    ab = sd.GaussianDiffusion(schedule, T).alphas_cumprod
    x0 = images_of(64)
    mirrored = sd.SpeeDSampler(ab, mirror=sd.SpeeDSampler.mirror_step(ab))
    samplers = [sd.UniformSampler(T), sd.LogitNormalSampler(T), sd.SpeeDSampler(ab), mirrored]
    samplers += [sd.CurriculumSampler(T, 9), opinionated(ab)]
    drawn = [torch.cat([s.sample(x0, step=7) for _ in range(400)]) for s in samplers]
    raw_weights = [torch.ones(T), sd.change_aware_weights(ab), sd.change_aware_weights(ab, 0.8, tau=T // 2)]
    for number, sampler in enumerate(samplers):
        probs = sampler.probs.double()
        assert drawn[number].dtype == torch.int64
        assert probs.sum().item() == pytest.approx(1)
        assert [i for i, t in enumerate(drawn) if chi_square_p(t, probs) > 1e-4] == [number]
        for raw in [*raw_weights, sd.min_snr_weights(ab)]:
            weights = sd.normalize_weights(raw, sampler.probs)
            assert (probs @ weights.double()).item() == pytest.approx(1, abs=1e-5)
            assert torch.allclose(weights / weights[0], raw / raw[0], rtol=1e-4)


def test_speed_draws_k_times_as_often_before_tau():
    for schedule, given, k, tau in (
        ("linear", (), 5, 700),
        ("cosine", (), 5, 946),
        ("quad", (), 5, 875),
        ("quad", (9, 300), 9, 300),
    ):
        sampler = sd.SpeeDSampler(sd.GaussianDiffusion(schedule).alphas_cumprod, *given)
        assert sampler.tau == tau
        expected = torch.tensor([k] * tau + [1.0] * (1000 - tau))
        assert torch.allclose(sampler.probs * (1000 + tau * (k - 1)), expected)


def test_speeds_authors_form_mirrors_half_of_what_is_drawn():
    for schedule, mirror in (("linear", 642), ("quad", 829), ("cosine", 959)):
        assert sd.SpeeDSampler.mirror_step(sd.GaussianDiffusion(schedule).alphas_cumprod) == mirror
    probs = sd.SpeeDSampler(sd.GaussianDiffusion().alphas_cumprod, mirror=642).probs * 1000
    for first, end, expected in (
        (1, 58, 1.974),
        (58, 358, 1.447),
        (358, 642, 1.316),
        (643, 700, 0.658),
        (700, 1000, 0.132),
    ):
        assert np.allclose(probs[first:end], expected, atol=5e-4)


def test_curriculum_goes_from_uniform_to_its_gaussian():
    sampler = sd.CurriculumSampler(1000, total_steps=400)
    bell = scipy.stats.norm.pdf(range(1000), 300, 500)
    for step, gamma in ((0, 0.0), (100, 0.25), (200, 0.5), (400, 1.0), (500, 1.0)):
        sampler.sample(images_of(1), step)
        assert np.allclose(sampler.probs, (1 - gamma) / 1000 + gamma * bell / bell.sum(), atol=0), step


@pytest.mark.parametrize("a, b", [(0.974, 0.974), (0.05, 0.3), (1.0, 1.0), (3.0, 0.6), (40.0, 25.0)])
@pytest.mark.parametrize("T", [3, 10, 1000])
def test_the_policys_distribution_is_a_beta_at_the_bin_centres_with_a_floor(T, a, b):
    sampler = sd.AdaptiveSampler(torch.linspace(0.99, 0.01, T), 1, floor=0.1)
    before_softplus = torch.tensor([a, b]).sub(1e-5).expm1().log()
    sampler.policy = lambda images: before_softplus.expand(len(images), 2)
    distribution = sampler.distribution(images_of(2))
    density = scipy.stats.beta.pdf((np.arange(T) + 0.5) / T, a, b)
    expected = 0.9 * density / density.sum() + 0.1 / T
    log_prob = distribution.log_prob(torch.arange(T)[:, None])
    assert np.allclose(log_prob.exp(), expected[:, None], rtol=2e-3)
    assert np.allclose(distribution.entropy(), scipy.stats.entropy(expected), rtol=1e-3)


@pytest.mark.parametrize("start, size, channels", [(0, 8, 1), (400, 5, 4), (800, 40, 3)])
def test_adaptive_begins_nearly_uniform_and_moves_to_the_rewarded_timesteps(start, size, channels):
    sampler = sd.AdaptiveSampler(sd.GaussianDiffusion().alphas_cumprod, channels)
    sampler.sample(images_of(64, size, channels), 0)
    assert (sampler.probs - 1 / 1000).abs().sum() / 2 < 0.02  # total variation
    for step in range(30):
        t = sampler.sample(images_of(64, size, channels), step)
        sampler.update_policy(1e-4 * ((t >= start) & (t < start + 200)).float()[None])
    assert sampler.probs[start : start + 200].sum() > 0.5


@pytest.mark.parametrize("advantage", [True, False])
def test_the_policy_gradient_is_that_of_the_closed_form(advantage):
    T = 50
    ab = sd.GaussianDiffusion("linear", T).alphas_cumprod
    sampler = sd.AdaptiveSampler(ab, 1, entropy=0.3, floor=0.2, advantage=advantage)
    t = sampler.sample(images_of(4), 0)
    reward = torch.randn(4)
    u = (torch.arange(T).double() + 0.5) / T

    def objective(bias):
        a, b = torch.log1p(bias.exp()) + 1e-5
        density = u ** (a - 1) * (1 - u) ** (b - 1)
        density = 0.8 * density / density.mean() + 0.2  # over (0, 1): its mean is 1
        entropy = -(density * density.log()).mean()
        gain = (reward - reward.mean()) / reward.std(correction=0)
        if advantage:
            return -(gain * density[t].log() + 0.3 * entropy).mean()
        return -((reward + 0.3 * entropy) * density[t].log()).mean()

    expected = torch.autograd.functional.jacobian(objective, sampler.policy[-1].bias.detach().double())
    sampler.optimizer.step = lambda: None
    sampler.update_policy(reward[None])
    found = sampler.policy[-1].bias.grad  # clipped with all the rest to norm 1
    assert torch.allclose(found / found.norm(), (expected / expected.norm()).float(), atol=1e-4)


class Scaled(nn.Module):
    """eps = scale x_t; remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.scale = 0.0
        self.calls = []

    def forward(self, x_t, t):
        assert not self.training  # no dropout
        assert x_t.dtype == torch.float32
        self.calls.append((x_t, t))
        return self.scale * x_t


@pytest.mark.parametrize("reward_weights", [None, torch.linspace(1, 2, 100)])
def test_adaptive_rewards_each_image_by_the_fall_of_the_loss_on_the_same_noise(reward_weights):
    diffusion = sd.GaussianDiffusion("linear", 100)
    model = Scaled()
    rewards = []
    sampler = sd.AdaptiveSampler(diffusion.alphas_cumprod, 1, reward_weights, every=4, selected=2, queue=3, probe=10)
    sampler.update_policy = rewards.append
    coefficients = diffusion.vlb_coefficients if reward_weights is None else reward_weights
    x0 = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)  # known by their level
    grid = len(sampler.grid)
    for step in range(17):
        sampler.sample(x0, step)
        one, two = sampler.selected.tolist()
        model.scale = 0.0
        sampler.before_update(model, step)
        model.scale = 0.1
        sampler.after_update(model)
        assert bool(model.calls) == (step % 4 == 0)
        assert model.training
        if not model.calls:
            continue
        x_t, again = torch.cat([x for x, _ in model.calls]).chunk(2)
        t, _ = torch.cat([t for _, t in model.calls]).chunk(2)
        model.calls.clear()
        assert torch.equal(x_t, again)
        assert t.tolist() == [*sampler.grid.tolist(), *[one] * 6, *[two] * 6]
        probed = x0[(x_t[0].mean() - x0[:, 0, 0, 0]).abs().argmin()]
        ab = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (x_t - ab.sqrt() * torch.cat([probed.expand(grid, 1, 8, 8), x0, x0])) / (1 - ab).sqrt()
        fall = noise.square() - (noise - 0.1 * x_t).square()
        fall = coefficients[t] * fall.mean((1, 2, 3))
        assert torch.allclose(sampler.queue[step // 4 % 3], fall[:grid], rtol=1e-3, atol=1e-4)  # a ring
        assert torch.allclose(rewards[-1].flatten(), fall[grid:], rtol=1e-3, atol=1e-4)
    best = sampler.most_predictive(sampler.queue, sampler.widths, 2)
    assert torch.equal(sampler.selected, sampler.grid[best])
    assert len(rewards) == 5


def test_the_bounds_reward_leaves_out_the_timestep_whose_beta_is_capped():
    for schedule in SCHEDULES:
        diffusion = sd.GaussianDiffusion(schedule)
        left_out = sd.AdaptiveSampler(diffusion.alphas_cumprod, 1).reward_weights == 0
        assert torch.equal(left_out, diffusion.betas >= 0.999)
    assert left_out.sum() == left_out[-1] == 1


@pytest.mark.parametrize("T, count", [(1000, 100), (1000, 1000), (1000, 10**9), (50, 100), (4000, 7), (1, 1)])
def test_geometric_bins_cover_every_timestep_once_and_widen(T, count):
    middles, widths = sd.geometric_bins(T, count)
    assert widths.sum() == T
    assert len(middles) <= count
    first = widths.cumsum(0) - widths
    assert ((first <= middles) & (middles < first + widths)).all()
    if count >= T:
        assert middles.tolist() == list(range(T))
    else:
        assert middles[0] <= T // 100
        assert widths[-1] > 4 * widths[0]


@pytest.mark.parametrize("seed", range(4))
def test_adaptive_selects_of_each_third_the_column_that_correlates_most_with_the_weighted_sum(seed):
    generator = np.random.default_rng(seed)
    deltas = generator.normal(size=(20, 12)) * generator.uniform(0.1, 3, size=12) + generator.normal(size=12)
    deltas = np.hstack([deltas, np.full((20, 1), 0.25)])  # a constant predicts nothing; 13 columns: 5, 4, 4
    widths = generator.integers(1, 5, 13)
    r = [abs(scipy.stats.pearsonr(column, deltas @ widths)[0]) for column in deltas.T[:12]]
    found = sd.AdaptiveSampler.most_predictive(torch.tensor(deltas), torch.tensor(widths), 3)
    assert found.tolist() == [first + np.argmax(r[first:end]) for first, end in ((0, 5), (5, 9), (9, 12))]


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_have_their_closed_forms(schedule, T):
    ab = sd.GaussianDiffusion(schedule, T).alphas_cumprod.double()
    snr = (ab / (1 - ab)).numpy()
    slope = np.gradient(1 - ab)
    assert np.allclose(sd.min_snr_weights(ab), np.minimum(1, 5 / snr))
    assert sd.min_snr_weights(0 * ab).eq(1).all()
    for lam in (0.5, 0.6, 1.0):  # from 1 - lam to lam, in step with how fast the noise grows
        expected = np.interp(slope, [slope.min(), slope.max()], [1 - lam, lam])
        assert np.allclose(sd.change_aware_weights(ab, lam), expected)
        expected[70:] = 1
        assert np.allclose(sd.change_aware_weights(ab, lam, tau=70), expected)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
def test_momentum_decay_keeps_lr_times_one_minus_beta1(beta1):
    for left in np.linspace(1, 0, 11):
        decayed, lr_scale = sd.momentum_decay(1 - left, beta1)
        assert decayed == pytest.approx(beta1 * left / (1 - beta1 + beta1 * left))  # from beta1 to 0
        assert lr_scale * (1 - decayed) == pytest.approx(1 - beta1, rel=1e-12)


def test_each_acceleration_runs_where_only_its_source_is_pasted():
    """With math, torch, and the pieces that the first line of its docstring names in backticks."""
    given = {"timesteps": 100, "total_steps": 100, "in_channels": 1, "every": 1, "progress": 0.5, "count": 9}
    given |= dict.fromkeys(("alphas_cumprod", "weights", "probs", "tensor"), torch.linspace(0.99, 0.01, 100))
    section = re.search(r"(?ms)^# 2 Accelerations.*?^# 3 ", Path(sd.__file__).read_text())[0]
    for name in re.findall(r"(?m)^(?:class|def) (\w+)", section):
        piece = getattr(sd, name)
        module = types.ModuleType("elsewhere")
        for needed in (*re.findall(r"`(\w+)`", piece.__doc__.splitlines()[0]), name):
            exec("import math, torch\n" + inspect.getsource(getattr(sd, needed)), vars(module))  # noqa: S102
        arguments = {p: given[p] for p in inspect.signature(piece).parameters if p in given}
        made = getattr(module, name)(**arguments)
        for step in range(4) if isinstance(piece, type) else ():
            assert made.sample(images_of(9), step).shape == (9,)
            if name == "AdaptiveSampler":
                made.before_update(sd.UNet(1, 8, (1,), 1, (), 0.0), step)
                made.after_update(sd.UNet(1, 8, (1,), 1, (), 0.0))


AB = torch.linspace(0.9, 0.1, 10)


@pytest.mark.parametrize(
    "made, arguments",
    [
        (sd.GaussianDiffusion, {"schedule": "sigmoid"}),
        (sd.GaussianDiffusion, {"timesteps": 0}),
        (sd.SpeeDSampler, {"alphas_cumprod": AB, "k": 0.5}),
        (sd.SpeeDSampler, {"alphas_cumprod": AB, "tau": 11}),
        (sd.SpeeDSampler, {"alphas_cumprod": AB, "mirror": 10}),
        (sd.SpeeDSampler.mirror_step, {"alphas_cumprod": AB[:2]}),
        (sd.CurriculumSampler, {"timesteps": 10, "total_steps": 10, "sigma": 0}),
        (sd.AdaptiveSampler, {"alphas_cumprod": AB, "in_channels": 1, "selected": 11}),
        (sd.change_aware_weights, {"alphas_cumprod": AB, "lam": float("nan")}),
        (sd.momentum_decay, {"progress": 0.5, "beta1": 1.0}),
        (functools.partial(sd.GaussianDiffusion(timesteps=10).sample, None, (1, 1, 4, 4)), {"steps": 11}),
        (functools.partial(sd.GaussianDiffusion().sample, None, (1, 1, 4, 4)), {"method": "euler"}),
        (functools.partial(sd.UNet, 1, 9, (1,), 1), {"attention": (), "dropout": 0.0}),
        (functools.partial(sd.UNet, 1, 8, (1, 2), 1), {"attention": (), "dropout": 0.0, "image_size": 9}),
        (functools.partial(sd.UNet, 1, 8, (1, 2), 1), {"attention": (5,), "dropout": 0.0}),
    ],
)
def test_the_library_refuses_what_makes_no_sense(made, arguments):
    with pytest.raises(ValueError):
        made(**arguments)


# 3 U-Net


def awake(model):
    """The model in eval mode, its zero-initialised convolutions drawn, so that everything has an effect."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model.eval()


@pytest.mark.parametrize("channels, size, patch", [(1, 16, 2), (3, 28, 1)])
def test_unet_keeps_the_shape_depends_on_t_and_learns_everywhere(channels, size, patch):
    sides = [size // patch // 2, size // patch // 4]
    model = sd.UNet(channels, 6, (1, 2, 3), 1, sides, 0.1, size, patch)
    x = torch.randn(3, channels, size, size)
    t = torch.tensor([0, 10, 999])
    assert sum(isinstance(m, sd.SelfAttention) for m in model.modules()) == 2 + 1 + 4  # down, middle, up
    assert not model(x, t).any()  # starts at zero
    out = awake(model)(x, t)
    assert out.shape == x.shape
    assert torch.allclose(model(x[1:], t[1:]), out[1:], atol=1e-5)
    assert ((model(x, t.roll(1)) - out).abs().amax((1, 2, 3)) > 1e-4).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, t) - out).norm() < 0.03 * out.norm()
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_self_attention_is_softmax_attention():
    layer = awake(sd.SelfAttention(128))
    x = torch.randn(2, 128, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 64, 15).unbind(1)  # each [B, heads, 64, H W]
    attended = v @ (q.mT @ k / 8).softmax(-1).mT
    assert torch.allclose(layer(x), x + layer.out(attended.reshape(x.shape)), atol=1e-4)


# 4 Data


def test_digits_are_fixed_by_their_seed_and_differ():
    images, labels = sd.render_digits.__wrapped__(2000, 16, 0)
    assert torch.equal(sd.render_digits(99, 16, 0)[0], images[:99])
    assert not torch.equal(sd.render_digits(99, 16, 1)[0], images[:99])
    assert len(images.unique(dim=0)) > 1990
    assert scipy.stats.chisquare(labels.bincount()).pvalue > 1e-4
    ink = images[:, 0] > 128
    assert ink.sum((1, 2)).min() > 5
    assert ink[:, [0, -1]].any(-1).any(-1).float().mean() < 0.01  # not cut off


def write_images(folder, count):
    """Images of any size, in class folders."""
    for i in range(count):
        path = folder / f"class {i % 3}" / f"{i}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9, 5 + i % 40, 3), np.uint8)
        Image.fromarray(pixels).save(path)


def test_a_folder_is_held_out_evenly_and_leftovers_are_passed_over(tmp_path, capsys):
    write_images(tmp_path / "mine", 300)
    expected = sd.load_dataset("folder", tmp_path / "mine", 8)
    assert [len(part) for part in expected] == [285, 15]
    assert len(torch.cat(expected).unique(dim=0)) == 300  # nothing is in both
    assert capsys.readouterr().out == ""
    for leftover in (
        "__MACOSX/class 0/._0.jpg",
        ".ipynb_checkpoints/0-checkpoint.png",
        "class 1/._1.jpg",
        ".DS_Store",
        "class 2/notes.txt",
        "class 2/images.zip",
    ):
        (tmp_path / "mine" / leftover).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / leftover).write_bytes(b"no picture")
    own = tmp_path / "mine" / "runs" / "folder-uniform"
    own.mkdir(parents=True)
    for name in ("config.json", "metrics.csv", "samples-3.png"):
        (own / name).touch()
    assert_same_tensors(sd.load_dataset("folder", tmp_path / "mine", 8), expected)
    assert re.search(r": 2 files .* not read\n$", capsys.readouterr().out)


def solid(mode, colour, size=(8, 8), **options):
    return lambda path: Image.new(mode, size, colour).save(path, **options)


def broken_exif(path):
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path, exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff")


def cut_off(path):
    Image.new("L", (64, 64), 1).save(path)
    os.truncate(path, 60)


ODD_IMAGES = [  # name, how it is written, the colour it is read as or why it is refused
    ("its centre.png", lambda path: Image.new("L", (8, 8), 7).crop((-8, 0, 16, 8)).save(path), [7]),
    ("palette é 画像.PNG", solid("P", (9, 200, 3)), [9, 200, 3]),
    ("cmyk.tiff", solid("CMYK", (0, 255, 255, 0)), [255, 0, 0]),
    ("alpha.png", solid("RGBA", (200, 0, 0, 51)), [244, 204, 204]),  # 20% red on white
    ("animated.gif", solid("L", 9, save_all=True, append_images=[Image.new("L", (8, 8))]), [9]),
    ("broken exif.jpg", broken_exif, [9]),
    ("photo.jfif", solid("L", 9, format="JPEG"), [9]),
    ("photo.avif", solid("L", 0), [0]),
    (
        "16 bits.png",
        solid("I;16", 100 * 257),
        "16 bits.png .more than 8 bits a channel, convert it to 8 bits",
    ),
    ("16 bits.tiff", solid("I;16", 9), "16 bits.tiff .more than 8 bits"),
    ("bomb.png", solid("1", 0, (20_000, 10_000)), "bomb"),
    ("empty.png", Path.touch, "cannot identify"),
    ("postscript.png", solid("L", 1, format="EPS"), "cannot identify"),  # it could run code
    ("pipe.png", os.mkfifo, "no file"),
    ("circle.png", lambda path: path.symlink_to("circle.png"), "no file"),
]


@pytest.mark.parametrize("name, write, expected", ODD_IMAGES)
def test_an_odd_image_is_read_right_or_refused_by_name(tmp_path, name, write, expected):
    write(tmp_path / name)
    if isinstance(expected, str):
        with pytest.raises(sd.UserError, match=f"^.*{name}.*{expected}.*$|{expected}"):
            sd.load_dataset("folder", tmp_path, 8)
    else:
        os.link(tmp_path / name, tmp_path / f"again {name}")
        train, _ = sd.load_dataset("folder", tmp_path, 8)
        colour = expected if len(expected) == 3 else 3 * expected
        assert train.flatten(2).unique(dim=2)[0].tolist() == [[level] for level in colour]


def test_all_unreadable_files_are_named_at_once(tmp_path):
    write_images(tmp_path, 3)
    for number in range(7):
        cut_off(tmp_path / f"cut {number}.png")
    with pytest.raises(sd.UserError) as error:
        sd.load_dataset("folder", tmp_path, 8)
    assert len(re.findall(r"cut \d\.png \(", str(error.value))) == 5
    assert str(error.value).endswith(" and 2 more")


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_reads_mnist_and_its_test_split_is_held_out(tmp_path, name, kind):
    """From small files in MNIST's own format; the pixels are the count."""
    raw = tmp_path / kind / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 70), ("t10k", 30)):
        pixels = struct.pack(">4i", 0x803, n, 28, 28) + bytes([n]) * 784 * n
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + bytes(n))
    for size in (28, 14):
        for images, count in zip(sd.load_dataset(name, tmp_path, size), (70, 30), strict=True):
            assert images.shape == (count, 1, size, size)
            assert (images == count).all()


# 5 Evaluation


@pytest.mark.parametrize("T", [1, 2, 20, 100, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluate_gives_the_sum_of_the_coefficients_to_a_model_that_misses_all_the_noise(schedule, T):
    diffusion = sd.GaussianDiffusion(schedule, T)
    val_mse, val_vlb = sd.evaluate(lambda x, t: 0 * x, diffusion, bytes_of(40, 32, 3))
    assert val_mse == pytest.approx(1, rel=0.01)
    assert val_vlb == pytest.approx(diffusion.vlb_coefficients.sum().item(), rel=0.01)


@pytest.mark.parametrize("T", [20, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluate_measures_a_model_whose_error_depends_on_t(schedule, T):
    diffusion = sd.GaussianDiffusion(schedule, T)
    errors = torch.linspace(0.2, 1, T)

    def model(x, t):
        """Exactly wrong by errors[t], for black images."""
        black = diffusion._signal[t] * -1
        return (x - black) / diffusion._sigma[t] + errors[t].view(-1, 1, 1, 1)

    found = sd.evaluate(model, diffusion, torch.zeros(9, 1, 4, 4, dtype=torch.uint8))
    exact = errors.square().mean().item(), (diffusion.vlb_coefficients * errors.square()).sum().item()
    assert found == pytest.approx(exact, rel=0.01)


def test_the_frechet_distance_is_scipys():
    one, two = torch.randn(2, 300, 8, dtype=torch.float64) * torch.rand(2, 1, 8) + torch.rand(2, 1, 8)
    mean_one, cov_one, mean_two, cov_two = one.mean(0), one.T.cov(), two.mean(0), two.T.cov()
    root = scipy.linalg.sqrtm((cov_one @ cov_two).numpy()).real
    expected = (mean_one - mean_two).square().sum() + (cov_one + cov_two).trace() - 2 * np.trace(root)
    assert sd.frechet_distance(mean_one, cov_one, mean_two, cov_two) == pytest.approx(expected.item(), rel=1e-9)
    assert abs(sd.frechet_distance(mean_one, cov_one, mean_one, cov_one)) < 1e-9


@pytest.mark.parametrize("published, channels", [(False, 1), (False, 3), (True, 3)])
def test_fid_is_that_of_clean_fid(published, channels, monkeypatch, here):
    from cleanfid import fid

    # clean-fid calls a SciPy function with an argument that SciPy 1.18 no longer has.
    monkeypatch.setattr("scipy.linalg.sqrtm", lambda matrix, disp=True, root=scipy.linalg.sqrtm: (root(matrix), 0))
    monkeypatch.setattr("cleanfid.features.feature_extractor", lambda name, **_: Pooled())
    monkeypatch.setattr("cleanfid.features.check_download_url", lambda url, **_: Path(url).name)
    np.savez("cifar10_clean_train_32.npz", mu=np.arange(16), sigma=np.eye(16))
    one = bytes_of(90, 8, channels)
    two = one // 2
    for folder, images in (("one", one), ("two", two)):
        os.mkdir(folder)
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image.squeeze()).save(f"{folder}/{i}.png")
    reference = {"dataset_name": "cifar10", "dataset_res": 32} if published else {"fdir2": "one"}
    expected = fid.compute_fid("two", num_workers=0, device=torch.device("cpu"), **reference)
    distance = sd.FrechetDistance(None, torch.device("cpu"), one, published)
    assert distance.name == "FID"
    assert distance(two) == pytest.approx(expected, rel=1e-5)


def test_with_own_features_the_distance_of_gaussians_has_its_closed_form(pooled):
    one = bytes_of(90, 4) // 3  # 4x4 images are their own features
    distance = sd.FrechetDistance(pooled, "cpu", one)
    features = one.flatten(1).double()
    expected = (features.mean(0) + 30).square().sum() + features.var(0).sum()  # |m2 - m1|^2 + sum (s2 - s1)^2
    assert distance(2 * one + 30) == pytest.approx(expected.item(), rel=1e-5)
    assert distance.name == "FD (pooled.ts)"
    assert abs(distance(one)) < 1e-3


def test_the_digits_distance_tells_digits_from_noisy_ones_and_from_noise():
    train, held_out = sd.load_dataset("digits", "", 16)
    distance = sd.FrechetDistance("digits", "cpu", train)
    noise = torch.randint(256, held_out.shape).byte()
    noisy = (0.9 * held_out + 0.1 * noise).byte()
    assert 0 < 10 * distance(held_out) < distance(noisy) < distance(noise) / 2


def test_without_a_network_fid_is_refused_before_training(here, capsys, monkeypatch):
    monkeypatch.setattr("cleanfid.features.feature_extractor", lambda name, **_: os.listdir("no network"))
    assert sd.main([*TINY, "--dataset", "digits", "--fid-samples", "10", "--fid-features", "digits"]) == 0
    monkeypatch.setitem(sd.DIGITS, "fid_features", None)
    assert sd.main([*TINY, "--fid-samples", "10", "--out", "new"]) == 2
    assert not os.path.exists("new")
    assert re.search("^.*or give --fid-features.*no network.*$", capsys.readouterr().err.strip())


# 6 Training

METHODS = {
    "uniform": ["--dropout", "0.2"],
    "logit-normal": ["--weighting", "min-snr"],
    "speed": ["--checkpoint-every", "2", "--speed-variant", "code"],
    "curriculum": ["--flip", "--momentum-decay"],
    "adaptive": ["--adaptive-every", "2", "--adaptive-reward", "loss", "--weighting", "change-aware"],
}
FILE_SIZE = resource.RLIMIT_FSIZE
LIMITS = resource.getrlimit(FILE_SIZE)
ON_CUDA = [pytest.param(f"--device cuda --amp {amp}", marks=on_cuda) for amp in ("off", "bf16", "fp16")]


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


def raise_signal(number):
    return lambda run: signal.raise_signal(number)


def fill_the_disk(run):
    resource.setrlimit(FILE_SIZE, (20_000, LIMITS[1]))


def spoil_the_loss(run):
    step = run.step

    def hook(model, inputs, output):
        return output * math.nan if run.step == step else None

    run.model.register_forward_hook(hook)


def assert_same_run(one, two):
    """The same but for settings and seconds, bit for bit."""
    states = [checkpoint(run) for run in (one, two)]
    for state in states:
        del state["args"], state["seconds"]
        for row in state["rows"]:
            del row["seconds"]
    assert_same_tensors(*states)
    rows = [[row | {"seconds": ""} for row in metrics(run)] for run in (one, two)]
    assert rows[0] == rows[1]
    pictures = [[path.read_bytes() for path in sorted(Path(run).glob("*.png"))] for run in (one, two)]
    assert pictures[0] == pictures[1]


def test_a_run_learns_says_what_it_measures_and_leaves_its_results(here, capsys):
    options = "--weighting min-snr --momentum-decay --steps 80 --eval-every 40 --lr 1e-2 --ema-decay 0.9"
    assert sd.main([*TINY, *options.split(), "--fid-samples", "32"]) == 0
    run = Path("runs/digits-uniform-min-snr-momentum-decay")
    files = ["checkpoint.pt", "config.json", "metrics.csv", "samples-40.png", "samples-80.png"]
    assert sorted(os.listdir(run)) == files
    config = json.loads((run / "config.json").read_text())
    assert (config["weighting"], config["warmup"], config["features"]) == ("min-snr", 4, "FD (digits)")
    rows = {int(row["step"]): row for row in metrics(run)}
    assert list(rows) == [25, 40, 50, 75, 80]
    assert ",".join(rows[80]) == "step,images,seconds,loss,lr,beta1,val_mse,val_vlb,fid"
    assert [step for step in rows if rows[step]["val_mse"]] == [40, 80]
    assert [step for step in rows if rows[step]["fid"]] == [80]
    assert float(rows[80]["val_mse"]) < 0.8 * float(rows[40]["val_mse"])
    model = sd.build_unet(settings(), 1)
    model.load_state_dict(checkpoint(run)["ema"])
    expected = sd.evaluate(model.eval(), sd.GaussianDiffusion("linear", 50), sd.load_dataset("digits", "", 16)[1])
    assert (float(rows[80]["val_mse"]), float(rows[80]["val_vlb"])) == pytest.approx(expected, rel=1e-4)
    beta1, lr_scale = sd.momentum_decay(79 / 80)
    assert (float(rows[80]["beta1"]), float(rows[80]["lr"])) == pytest.approx((beta1, 1e-2 * lr_scale))
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"FD \(digits\) of 32 held-out images \S+, of noise \S+", said[0])
    figures = r"step 80: loss \S+, val_mse \S+, val_vlb \S+ bits/dim, FD \(digits\) \S+, \S+ images/s"
    assert [bool(re.fullmatch(figures, line)) for line in said[-2:]] == [True, False]
    assert sorted(checkpoint(run)["probs"]) == [40, 80]


def test_strategies_share_model_images_noise_and_dropout_and_weigh_the_mse(monkeypatch):
    q_sample = sd.GaussianDiffusion.q_sample
    seen = []
    first = None
    timesteps = set()

    def watch(diffusion, x0, t, noise):
        seen.append((x0, noise, torch.get_rng_state(), t))
        return q_sample(diffusion, x0, t, noise)

    monkeypatch.setattr(sd.GaussianDiffusion, "q_sample", watch)
    for strategy in sd.STRATEGIES:
        run = training("--strategy", strategy, *METHODS[strategy], "--flip", "--dropout", "0.2")
        model = copy.deepcopy(run.model.state_dict())
        seen.clear()
        for _ in range(6):
            run.train_step()
        x0, noise, dropout, t = zip(*seen)
        timesteps |= {tuple(batch.tolist()) for batch in t}
        first = first or (model, x0, noise, dropout)
        assert_same_tensors((model, x0, noise, dropout), first)
        # A new U-Net predicts 0: its MSE is the noise's mean square.
        sampler, raw_weights = sd.build_strategy(run.args, run.diffusion.alphas_cumprod, 1)
        sampler.probs = run.sampler.probs if strategy == "adaptive" else sampler.probs
        weights = sd.normalize_weights(raw_weights, sampler.probs)
        loss = (weights[t[0]] * noise[0].square().mean((1, 2, 3))).mean()
        assert run.losses[0].item() == pytest.approx(loss.item(), rel=0.02 if strategy == "adaptive" else 1e-4)
    assert len(timesteps) == 5 * 6
    mirrored = torch.cat(x0)[:, None].flip(-1) == sd.to_float(sd.render_digits(64)[0])
    assert 25 < mirrored.flatten(2).all(2).any(1).sum() < 71  # of 96


def test_the_flags_of_each_method_reach_it(monkeypatch):
    ab = sd.GaussianDiffusion().alphas_cumprod
    change_aware = sd.change_aware_weights(ab, 0.8)
    code = sd.SpeeDSampler(ab, mirror=642)
    ones = torch.ones(1000)
    for flags, expected, weights in (
        ("uniform --weighting min-snr", sd.UniformSampler(1000), sd.min_snr_weights(ab)),
        ("speed --speed-k 3 --speed-tau 100 --speed-lam 0.8", sd.SpeeDSampler(ab, 3.0, 100), change_aware),
        ("speed --speed-variant code", code, sd.change_aware_weights(ab, 0.6, 700)),
        ("speed --speed-variant code --weighting none", code, ones),
        (
            "curriculum --steps 50 --curriculum-mu 0.7 --curriculum-sigma 2",
            sd.CurriculumSampler(1000, 50, 0.7, 2),
            ones,
        ),
        ("logit-normal --weighting change-aware --speed-lam 0.8", sd.LogitNormalSampler(1000), change_aware),
    ):
        args = settings("--timesteps", "1000", "--strategy", *flags.split())
        sampler, raw_weights = sd.build_strategy(args, ab, 1)
        assert len(sampler.sample(images_of(1), 20)) == len(expected.sample(images_of(1), 20))  # the curriculum moves
        assert_same_tensors([sampler.probs, raw_weights], [expected.probs, weights])


def test_the_flags_of_the_adaptive_sampler_reach_it():
    given = "--strategy adaptive --adaptive-every 7 --adaptive-lr 0.5 --adaptive-entropy 0.25".split()
    sampler = training(*given).sampler
    assert (sampler.every, sampler.optimizer.defaults["lr"], sampler.entropy, sampler.advantage) == (
        7,
        0.5,
        0.25,
        True,
    )
    authors = training(*given, "--adaptive-authors", "--adaptive-reward", "loss", "--weighting", "min-snr")
    assert (authors.sampler.every, authors.sampler.advantage, len(authors.sampler.grid)) == (40, False, 50)
    assert_same_tensors(authors.sampler.reward_weights, authors.raw_weights)


STOPS = (  # what comes before a step, that step, the exit status, the steps of the checkpoint and the last row
    (raise_signal(signal.SIGTERM), 5, 143, 5, 4),
    (raise_signal(signal.SIGHUP), 7, 129, 7, 6),
    (fill_the_disk, 9, 1, 8, 9),
    (raise_signal(signal.SIGINT), 10, 130, 10, 9),  # all that is left to do is to measure
)


@pytest.mark.parametrize("more", ["--amp off", *ON_CUDA])
@each_strategy
def test_a_run_that_was_resumed_is_the_run_that_never_stopped(here, capsys, monkeypatch, strategy, more):
    monkeypatch.setattr(sd, "LOG_EVERY", 3)  # rows in one line with the checkpoints (4, 8) and between them
    options = [*TINY, *METHODS[strategy], *f"--strategy {strategy} --steps 10 --eval-every 4 {more}".split()]
    assert sd.main([*options, "--out", "whole"]) == 0
    command = [*options, "--out", "run"]
    for act, step, status, kept, row in STOPS:
        with before_steps({step}, act):
            ended = sd.main(command)
        command = ["--resume", "run"]
        resource.setrlimit(FILE_SIZE, LIMITS)
        said = capsys.readouterr().err.splitlines()[-1]
        assert "--resume run" in said or "is as it was, the new one could not be written" in said
        assert (ended, metrics("run")[-1]["step"]) == (status, str(row))
        assert checkpoint("run")["step"] == kept
        assert not list(Path("run").glob("new-*"))
    assert sd.main(command) == 0
    if "cuda" not in more:  # whose kernels sum in no fixed order
        assert_same_run("whole", "run")
        return
    whole, again = (checkpoint(run) for run in ("whole", "run"))
    start = sd.Training(settings(*options), sd.render_digits(64)[0], torch.device("cuda")).model.state_dict()
    apart = sum((whole["model"][name] - again["model"][name]).norm() ** 2 for name in start) ** 0.5
    moved = sum((whole["model"][name] - start[name].cpu()).norm() ** 2 for name in start) ** 0.5
    assert apart < 0.1 * moved


def test_a_finished_run_trains_longer_and_is_measured_otherwise(here, pooled):
    options = ["--fid-samples", "20", "--fid-every", "3", "--fid-features", pooled, "--out", "run"]
    assert sd.main([*TINY, *options]) == 0
    before = metrics("run")
    assert sd.main(["--resume", "run", "--fid-samples", "30"]) == 0
    again = metrics("run")
    assert [row["step"] for row in again] == ["3", "6"]
    assert [row["val_mse"] for row in again] == [row["val_mse"] for row in before]
    assert again[0]["fid"] == ""  # measured otherwise
    assert again[1]["fid"] not in ("", before[1]["fid"])
    assert sd.main(["--resume", "run", "--steps", "9", "--lr", "1e-5", "--fid-samples", "0"]) == 0
    assert [row["step"] for row in metrics("run")] == ["3", "6", "9"]
    config = json.loads(Path("run/config.json").read_text())
    assert (config["steps"], config["lr"], config["features"], "resume" in config) == (9, 1e-5, None, False)
    assert sd.main(["--resume", "run", "--steps", "8"]) == 2


def test_a_second_signal_has_its_default_effect(here):
    code = """if True:
        import signal, sys, speedup_diffusion as sd
        step = sd.Training.train_step
        def twice(self):
            signal.raise_signal(2)
            step(self)
            print("first", flush=True)
            signal.raise_signal(15)
            print("second", flush=True)
        sd.Training.train_step = twice
        sys.exit(sd.main(sys.argv[1:]))"""
    environment = os.environ | {"PYTHONPATH": str(Path(sd.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *TINY], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.splitlines()[-1] == "first"


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_optimiser_receives_the_decayed_momentum_and_no_gradient_that_is_not_finite(amp):
    run = training("--momentum-decay", "--lr=0.01", "--warmup=2", "--beta1=0.8", "--amp", amp)
    received = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: received.append(dict(*optimizer.param_groups)))
    for step in range(3):
        if step == 1:
            spoil_the_loss(run)
        run.train_step()
        beta1, factor = sd.momentum_decay(step / 6, 0.8)
        lr = 0.01 * factor * min(1, (step + 1) / 2)
        assert (received[-1]["lr"], *received[-1]["betas"]) == pytest.approx((lr, beta1, 0.999))
        assert run.bad_in_a_row == (step == 1)
    assert all(p.isfinite().all() for p in run.model.parameters())
    steps = run.optimizer.state_dict()["state"][0]["step"]
    assert steps == (3 if amp == "off" else 2)  # the scaler leaves out what overflows
    resumed = training("--momentum-decay", "--amp", amp)
    resumed.load_state_dict(run.state_dict())
    assert_same_tensors(resumed.state_dict()["scaler"], run.state_dict()["scaler"])


def test_gradients_are_clipped_to_the_norm_that_the_flag_gives():
    run = training("--grad-clip", "0.001")
    weights = list(run.model.parameters())
    run.train_step()
    assert nn.utils.get_total_norm([p.grad for p in weights]).item() == pytest.approx(0.001, rel=1e-2)


def test_the_average_forgets_the_random_start():
    run = training("--ema-decay", "0.5")
    expected = None
    for step in range(4):
        run.train_step()
        now = run.model.stem.weight.detach().clone()
        expected = now.lerp(expected, min(0.5, (1 + step) / (10 + step))) if step else run.ema.stem.weight.clone()
    torch.testing.assert_close(run.ema.stem.weight, expected)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    run = training(images=70)
    epochs = []
    for _ in range(2):
        batches = []
        for _ in range(4):  # of 16: the last 6 images of an epoch are left out
            batches.append(run.batch())
            run.step += 1
        epochs.append(torch.cat(batches))
        assert len(epochs[-1].unique(dim=0)) == 64
    assert not torch.equal(*epochs)


def test_checkpoint_every_bounds_what_a_crash_loses(here):
    def crash(run):
        raise ZeroDivisionError

    with before_steps({6}, crash), pytest.raises(ZeroDivisionError):
        sd.main([*TINY, "--eval-every", "100", "--checkpoint-every", "2", "--out", "run"])
    assert checkpoint("run")["step"] == 4


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(here, capsys):
    with before_steps({2, *range(6, 15), *range(17, 40)}, spoil_the_loss):  # a checkpoint is due in each streak
        with before_steps({9}, raise_signal(signal.SIGTERM)):
            assert sd.main([*TINY, "--steps", "40", "--eval-every", "4", "--out", "run"]) == 143
        assert sd.main(["--resume", "run"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("speedup_diffusion.py: step 28: 10 losses or gradients in a row were not finite")
    assert checkpoint("run")["step"] == 24
    assert all(part.isfinite().all() for part in checkpoint("run")["model"].values())
    assert sd.main(["--resume", "run", "--lr", "1e-5"]) == 0  # where the fault is gone
    assert metrics("run")[-1]["step"] == "40"


def test_a_compiled_run_is_the_run(here, monkeypatch):
    eager = functools.partial(torch.compile, backend="eager")  # traced but not translated
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda *args, **more: compiled.append(1) or eager(*args, **more))
    options = [*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--dropout", "0.1", "--compile"]
    assert [sd.main([*options, name, "--out", name]) for name in ("on", "off")] == [0, 0]
    assert len(compiled) == 2  # the model and its average
    torch.testing.assert_close(checkpoint("on")["ema"], checkpoint("off")["ema"], rtol=0, atol=1e-5)


def test_generated_images_are_of_the_average_and_repeat_with_the_seed(here):
    assert sd.main([*TINY, "--out", "run"]) == 0
    generate = "--generate 6 --checkpoint run/checkpoint.pt --sampling-steps 3".split()
    assert sd.main(generate) == 0
    state = checkpoint("run")
    state["model"] = {name: 0 * part for name, part in state["model"].items()}
    torch.save(state, "run/checkpoint.pt")
    assert sd.main(generate) == 0
    assert sd.main([*generate, "--out", "other", "--seed", "1"]) == 0
    one, two, other = (sorted(Path(name).iterdir()) for name in ("run/generated", "run/generated-2", "other"))
    assert [path.name for path in one] == [f"{i:06d}.png" for i in range(6)] + ["grid.png"]
    assert one[5].read_bytes() == two[5].read_bytes() != other[5].read_bytes()


@on_cuda
@each_strategy
def test_no_step_waits_for_the_gpu(strategy, request):
    args = settings("--strategy", strategy, "--adaptive-every", "1", "--flip")
    run = sd.Training(args, sd.render_digits(64)[0], torch.device("cuda"))
    run.train_step()
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        run.train_step()


# Several processes: this file is started twice, and the tests look at what its two ranks left behind

ADAPTING = [*TINY, "--momentum-decay", "--adaptive-every", "2", "--grad-clip", "1e6", "--strategy"]


def start_ranks(folder, *command):
    """Two processes that know RANK and WORLD_SIZE alone; their exit statuses and error output."""
    port = str(random.Random(str(folder)).randrange(20_000, 30_000))
    ranks = []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        options = {"cwd": folder, "env": environment, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen([sys.executable, *command], **options))
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    return [process.returncode for process in ranks], errors


def one_of_two():
    """What each rank does: five steps of every strategy; it is stopped, resumed, and killed."""
    destroy = torch.distributed.destroy_process_group
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.distributed.init_process_group()
    torch.distributed.init_process_group = lambda **_: None  # once: torch.distributed does not join twice
    torch.distributed.destroy_process_group = lambda: None
    sd.render_digits = functools.cache(sd.render_digits)
    images = sd.load_dataset("digits", "data", 16)[0]
    q_sample = sd.GaussianDiffusion.q_sample
    batches = []

    def watch(diffusion, *batch):
        batches.append(batch)
        return q_sample(diffusion, *batch)

    sd.GaussianDiffusion.q_sample = watch
    for strategy in sd.STRATEGIES:
        run = sd.Training(settings(*ADAPTING, strategy), images, torch.device("cpu"))
        with before_steps({3} if strategy == "speed" and sd.RANK == 1 else {}, spoil_the_loss):
            for _ in range(5):
                before = copy.deepcopy(run.state_dict())
                run.train_step()
        after = run.state_dict() | {"args": None}
        after["grad"] = [p.grad for p in run.model.parameters()]
        torch.save([before, after, batches[-1]], f"{strategy}-{sd.RANK}.pt")
    options = [*ADAPTING, "adaptive", "--dropout", "0.2", "--flip", "--steps", "8", "--out"]
    assert sd.main([*options, "whole"]) == 0
    with before_steps({5} if sd.RANK == 1 else {}, raise_signal(signal.SIGTERM)):
        assert sd.main([*options, "stopped"]) == 143  # at step 6, where a row is due
    torch.distributed.barrier()
    if sd.RANK == 0:
        shutil.copytree("stopped", "as-one")
    assert sd.main(["--resume", "stopped"]) == 0
    with before_steps({5} if sd.RANK == 1 else {}, raise_signal(signal.SIGKILL)):
        status = sd.main([*options, "dead"])
    sys.stderr.flush()
    os._exit(status or destroy() or 0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, *start_ranks(folder, __file__)


@each_strategy
def test_two_ranks_stay_the_same_with_the_gradient_of_one_process(two_ranks, strategy):
    before, one, half = torch.load(f"{two_ranks[0]}/{strategy}-0.pt", weights_only=True)
    _, two, other_half = torch.load(f"{two_ranks[0]}/{strategy}-1.pt", weights_only=True)
    assert_same_tensors(one, two)
    assert one["step"] == 5
    assert sum(not loss.isfinite() for loss in one["losses"]) == (strategy == "speed")  # for a loss of rank 1 alone
    run = sd.Training(settings(*ADAPTING, strategy), sd.load_dataset("digits", "data", 16)[0], torch.device("cpu"))
    run.load_state_dict(before)
    x0, t, noise = (torch.cat(parts) for parts in zip(half, other_half))
    assert torch.equal(x0, run.batch())
    assert not torch.equal(t[:8], t[8:])
    assert (noise[:8] != noise[8:]).all()
    run.sampler.sample(x0, run.step)  # moves what moves
    weights = sd.normalize_weights(run.raw_weights, run.sampler.probs)[t]
    error = run.model(run.diffusion.q_sample(x0, t, noise), t) - noise
    (weights * error.square().mean((1, 2, 3))).mean().backward()
    torch.testing.assert_close(one["grad"], [p.grad for p in run.model.parameters()], rtol=1e-4, atol=1e-6)


def test_two_ranks_resume_as_two_and_as_one(two_ranks, monkeypatch):
    monkeypatch.chdir(two_ranks[0])
    assert_same_run("whole", "stopped")
    assert checkpoint("as-one")["step"] == 6
    assert checkpoint("whole")["sampler"]["filled"] == 4
    assert sd.main(["--resume", "as-one"]) == 0
    assert [row["step"] for row in metrics("as-one")] == ["3", "6", "8"]


def test_a_rank_that_dies_ends_the_run(two_ranks):
    folder, statuses, errors = two_ranks
    assert statuses == [1, -signal.SIGKILL], errors
    assert checkpoint(folder / "dead")["step"] == 3
    assert "speedup_diffusion.py: " in errors[0].splitlines()[-1]
    assert "Traceback" not in errors[0]


def test_two_ranks_started_by_a_launcher_refuse_once(here):
    statuses, errors = start_ranks(here, sd.__file__, *TINY, "--batch-size", "15")
    assert statuses == [2, 2]
    assert "".join(errors).count("--batch-size 15 must be at most") == 1
    assert not list(here.iterdir())


# 7 Report

# Strategy, seed, distance at steps 100, 200 ... The baseline's mean curve goes 9, 5.5, 5.5: it is first there at 200.
RUNS = "uniform 0 9 7 5,uniform 1 9 4 6,curriculum 0 5 3,curriculum 1 6.5 4.5,speed 0 9 5.5,speed 1 9 6,adaptive 0 4"
TABLE = """\
| strategy | runs | FD (digits) | speed-up | val_vlb | speed-up | val_mse | speed-up | seconds a step |
|---|---|---|---|---|---|---|---|---|
| uniform | 2 | 5.5 (5..6) | 0.9519 (0.7273..1.176) | 0.3333 | 1 | 0.03333 | 1 | 0.1 |
| curriculum | 2 | 3.75 (3..4.5) | 1.667 (1.333..2) | 0.5 | - | 0.05 | - | 0.1 |
| speed | 2 | 5.75 (5.5..6) | - | 0.5 | - | 0.05 | - | 0.1 |
| adaptive, momentum_decay True, lr 0.5 | 1 | 4 | 2 | 1 | - | 0.1 | - | 0.1 |
"""


def test_the_report_compares_each_run_with_the_baselines_mean_curve_and_draws(here, capsys, monkeypatch):
    assert sd.main([*TINY, "--out", "made", "--fid-samples", "20"]) == 0
    capsys.readouterr()
    base = json.loads(Path("made/config.json").read_text())
    for number, run in enumerate(RUNS.split(",")):
        strategy, seed, *distances = run.split()
        config = base | {"strategy": strategy, "seed": int(seed)}
        if strategy == "adaptive":
            config |= {"momentum_decay": True, "lr": 0.5}
        table = "step,images,seconds,loss,lr,beta1,val_mse,val_vlb,fid\n25,50,2.5,0.5,0.1,0.9,,,\n"
        for i, distance in enumerate(distances, 1):
            table += f"{i}00,{i}00,{i}0,0.5,0.1,0.9,{0.1 / i},{1 / i},{distance}\n"
        shutil.copytree("made", str(number))
        Path(f"{number}/config.json").write_text(json.dumps(config))
        Path(f"{number}/metrics.csv").write_text(table)
    report = ["--report", *"0123456"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert sd.main(report) == 0
    out = capsys.readouterr().out
    assert out[: len(TABLE)] == TABLE
    assert out.endswith("pip install matplotlib\n")
    pytest.importorskip("matplotlib")
    assert sd.main(report) == 0
    assert Image.open("runs/report/report.png").size == (1500, 500)
    for key, value in (("data", "9 images"), ("features", "FID"), ("fid_samples", 9), ("timesteps", 9)):
        Path("1/config.json").write_text(json.dumps(base | {key: value}))
        assert sd.main(report) == 2
        assert f"--report: {key} is " in capsys.readouterr().err


def test_make_compare_runs_flags_that_exist():
    make = ["env", "-u", "MAKEFLAGS", "make", "-nB", "compare", "SEEDS=0 1", "RESULTS=nowhere"]
    shown = subprocess.run(make, cwd=Path(sd.__file__).parent, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"run (\S+) (--.*?);", shown)
    assert len(rows) >= 12
    assert {settings(*flags.split()).strategy for _, flags in rows} == set(sd.STRATEGIES)


# 8 Command line

BAD_INPUT = """\
--stepps 3 | --step 3 | --timesteps 0 | --steps 0 | --speed-k 0.5 | --speed-tau 0 | --speed-tau 1001
--speed-lam 1.1 | --weighting change-aware --speed-lam 0.4 | --beta1 1 | --beta1 -0.1 | --fid-samples 1
--width 9 | --attention 5 | --image-size 18 | --batch-size 9729 | --sampling-steps 1001 | --warmup 2000
--strategy speed --timesteps 2 | --strategy adaptive --timesteps 2 | --report
--generate 4 | --checkpoint @made/checkpoint.pt | --dataset folder | --dataset folder --data-dir .
--dataset folder --data-dir @made | --dataset folder --data-dir @ | --out @made | --resume nowhere
--resume @made --width 16 | --resume @made --steps 5 | --generate 4 --checkpoint @cut.pt | --device tpu
--generate 4 --checkpoint @other.pt | --generate 4 --checkpoint @evil.pt | --generate 4 --checkpoint nowhere
--fid-features @other.pt | --fid-features @identity.ts | --fid-features nowhere | --report nowhere
--report @made nowhere | --dataset mnist --data-dir @mnist | --out /proc/none/x"""
BAD_INPUT = re.split(r" \| |\n", BAD_INPUT)
BAD_INPUT += ["--device cuda:99" if torch.cuda.is_available() else "--device cuda"]
NUMBERS = (
    "--lr",
    "--steps",
    "--seed",
    "--dropout",
    "--speed-k",
    "--eval-every",
    "--fid-samples",
    "--adaptive-lr",
)
BAD_INPUT += [f"{flag}={bad}" for flag in NUMBERS for bad in ("", "many", "nan", "inf", "-1", "1e30", "9" * 40)]


class Malicious:  # unpickling it makes a file
    def __reduce__(self):
        return open, ("created", "w")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run, and files that are wrong in one way each."""
    root = tmp_path_factory.mktemp("places")
    assert sd.main([*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--out", str(root / "made")]) == 0
    (root / "broken.png").write_bytes(b"no picture")
    (root / "cut.pt").write_bytes((root / "made/checkpoint.pt").read_bytes()[:9999])
    torch.save({"weights": torch.zeros(3)}, root / "other.pt")
    torch.save(Malicious(), root / "evil.pt", _use_new_zipfile_serialization=False)
    save_torchscript(nn.Identity(), root / "identity.ts")
    return root


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2_at_once(here, capsys, monkeypatch, places, command):
    monkeypatch.setattr(sd.Training, "train_step", None)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    begin = time.perf_counter()
    assert sd.main(command.replace("@", f"{places}/").split(" ")) == 2
    assert time.perf_counter() - begin < 5
    assert set(os.listdir()) <= {"data"}
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("speedup_diffusion.py: error: ")
    assert all(name in line for name in re.findall(r"@(\w+\.\w+)", command))


@pytest.mark.parametrize("name", ["model", "args", "sampler", "rows"])
def test_a_malicious_checkpoint_runs_no_code(here, capsys, places, name):
    shutil.copytree(places / "made", "run")
    state = checkpoint("run")
    torch.save(state | {name: Malicious()}, "run/checkpoint.pt")
    assert sd.main(["--resume", "run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir() == ["run"]
    torch.load("run/checkpoint.pt", weights_only=False)
    assert Path("created").exists()  # it would have


def test_too_little_memory_is_one_line_that_says_what_to_lower(here, capsys, monkeypatch):
    monkeypatch.setattr(sd.Training, "train_step", lambda self: torch.empty(10**15))
    assert sd.main(TINY) == 1
    assert capsys.readouterr().err.endswith("lower --batch-size, --width or --image-size\n")


def test_help_shows_the_defaults_of_the_data_set(capsys):
    for dataset, width in (("digits", 48), ("cifar10", 128)):
        with pytest.raises(SystemExit):
            sd.main(["--help", "--dataset", dataset])
        assert f"channels of the first level (default: {width})" in " ".join(capsys.readouterr().out.split())


def test_the_script_stops_on_ctrl_c_with_a_checkpoint_and_a_way_to_go_on(here):
    process = subprocess.Popen(
        [sys.executable, sd.__file__, *TINY, "--steps", "99999"], stderr=subprocess.PIPE, text=True
    )
    while not Path("runs/digits-uniform/checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("go on with --resume runs/digits-uniform\n")
    assert process.returncode == 130


# The README


def readme():
    return (Path(sd.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE))
def test_every_snippet_of_the_readme_runs_as_it_stands(here, block):
    if "from diffusers" in block:
        pytest.importorskip("diffusers")
    names = {"__name__": "snippet"}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    assert all(p.isfinite().all() for group in names["optimizer"].param_groups for p in group["params"])


def test_every_flag_the_readme_names_exists():
    others = "--help --nproc_per_node --nnodes --node_rank --master_addr --master_port --local-addr".split()
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme()))
    assert len(named) > 20
    assert named <= {*others, *sd.make_parser()._option_string_actions}


# Minutes long

SCRIPT = [sys.executable, sd.__file__]
start = functools.partial(subprocess.Popen, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_ten_kills_even_while_a_checkpoint_is_written_lose_nothing(here):
    command = [*SCRIPT, *ADAPTING, "adaptive", "--width", "32", "--steps", "200", "--eval-every", "50"]
    command += ["--checkpoint-every", "1", "--out"]
    assert start([*command, "whole"]).wait() == 0
    process = start([*command, "killed"])
    before = -1
    for pause in np.random.default_rng(0).uniform(0, 0.5, 10):
        while not Path("killed/checkpoint.pt").exists() or checkpoint("killed")["step"] <= before:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        before = checkpoint("killed")["step"]
        process = start([*SCRIPT, "--resume", "killed"])
    assert process.wait() == 0
    assert_same_run("whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("options", [*(["--strategy", s] for s in sd.STRATEGIES), ["--momentum-decay"]])
def test_the_default_run_draws_digits_in_five_minutes(here, capsys, options):
    begin = time.perf_counter()
    subprocess.run([*SCRIPT, "--device", "cpu", *options, "--out", "run", "--fid-every", "160"], check=True)
    seconds = time.perf_counter() - begin
    train, held_out = sd.load_dataset("digits", "", 16)
    distance = sd.FrechetDistance("digits", "cpu", train)
    rows = [row for row in metrics("run") if row["fid"]]
    half_trained = float(rows[0]["fid"])
    noise = distance(torch.randint(256, held_out.shape).byte())
    with capsys.disabled():
        print(
            f"\n{options}: {seconds:.0f} s, {rows[-1]['fid']}; real {distance(held_out):.3g}, noise {noise:.3g}, "
            f"a tenth of the steps {half_trained:.3g}"
        )
    assert seconds < 300
    assert float(rows[-1]["fid"]) < 20 < min(half_trained, noise)


# Speed: nothing is asserted of seconds, which vary from machine to machine

BENCHED = ("uniform", "uniform --momentum-decay", "logit-normal", "speed", "curriculum", "adaptive")
BENCHED += ("adaptive --adaptive-authors", "uniform --seed 0")  # the last is uniform again


@pytest.mark.bench
def test_bench(capsys):
    """Blocks of ten steps of each method in random order, with one model for all; every tenth step has a probe."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setups = ["--batch-size 64", "--batch-size 256"]
    if device.type == "cuda":
        model = "--dataset cifar10 --batch-size 256 --fid-samples 0"
        setups = [f"{model} --amp {amp} --compile {on}" for amp in ("off", "bf16", "fp16") for on in ("off", "on")]
    for flags in setups:
        args = sd.parse_args(flags.split())[0]
        channels = 3 if args.dataset == "cifar10" else 1
        images = torch.randint(256, (2000, channels, args.image_size, args.image_size)).byte()
        run = sd.Training(args, images, device)
        built = {}
        for method in BENCHED:
            own = sd.parse_args([*flags.split(), "--strategy", *method.split()])[0]
            built[method] = (own, *sd.build_strategy(own, run.diffusion.alphas_cumprod, channels))
        seconds = {method: [] for method in built}
        for number in range(25):
            for method in random.sample(list(built), len(built)):
                run.args, run.sampler, run.raw_weights = built[method]
                run.step = 40 * number  # where the authors' pace has a probe, too; it is counted for a quarter
                begin = time.perf_counter()
                for _ in range(10):
                    run.train_step()
                run.losses[-1].item()  # waits for the device
                run.losses.clear()
                seconds[method].append(time.perf_counter() - begin)
        with capsys.disabled():
            print(f"\n| {flags} | images/s | of uniform's time |\n|---|---|---|")
            for method in built:
                ratio = np.median(np.divide(seconds[method], seconds["uniform"])[1:])  # the first round warms up
                speed = 10 * args.batch_size / np.median(seconds[method])
                print(f"| {method} | {speed:.0f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    one_of_two()
