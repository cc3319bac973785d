# SPDX-License-Identifier: MIT
"""What speedup_diffusion.py promises, in its own order. `make test` runs all but the tests marked slow."""

import contextlib
import copy
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

import speedup_diffusion as sd

SCHEDULES = [(schedule, T) for schedule in ("linear", "cosine", "quad") for T in (100, 1000)]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_every_schedule = pytest.mark.parametrize("schedule, T", SCHEDULES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it


def make_samplers(alphas_cumprod):
    """Every sampler, each moved away from its start where it can move."""
    T = len(alphas_cumprod)
    curriculum = sd.CurriculumSampler(T, total_steps=10)
    curriculum.sample(torch.zeros(1, 1, 8, 8), step=7)
    adaptive = sd.AdaptiveSampler(alphas_cumprod, in_channels=1)
    nn.init.normal_(adaptive.policy[-1].weight)
    adaptive.refresh_probs(images_of(64))
    return {
        "uniform": sd.UniformSampler(T),
        "logit-normal": sd.LogitNormalSampler(T),
        "speed": sd.SpeeDSampler(alphas_cumprod),
        "curriculum": curriculum,
        "adaptive": adaptive,
    }


def images_of(count, size=8):
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def chi_square_p(drawn, probs):
    """p-value of the drawn timesteps under probs; timesteps expected fewer than 5 times count as one."""
    counts = torch.bincount(drawn, minlength=len(probs)).double()
    expected = probs.double() / probs.double().sum() * len(drawn)
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return scipy.stats.chisquare(observed[keep], expected[keep]).pvalue


# 1 Diffusion


def test_schedules_have_their_closed_forms():
    linear, quad, cosine = (sd.GaussianDiffusion(s, 1000) for s in ("linear", "quad", "cosine"))
    assert linear.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert linear.betas.diff().tolist() == pytest.approx([0.0199 / 999] * 999, rel=1e-2)
    assert quad.betas.sqrt().diff().tolist() == pytest.approx([(0.02**0.5 - 0.01) / 999] * 999, rel=1e-2)
    angle = (torch.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2
    expected = (angle.cos() ** 2 / angle[0].cos() ** 2)[1:]
    assert torch.allclose(cosine.alphas_cumprod[:990], expected[:990], atol=1e-6)
    for diffusion in (linear, quad, cosine):
        assert torch.allclose(diffusion.alphas_cumprod, (1 - diffusion.betas.double()).cumprod(0).float())


def test_fewer_timesteps_end_as_noisy():
    for schedule in ("linear", "cosine", "quad"):
        few, many = (sd.GaussianDiffusion(schedule, T).alphas_cumprod[-1] for T in (100, 1000))
        assert few < 1e-3 and many < 1e-3, schedule


@pytest.mark.parametrize("T", [1, 2, 10, 19])
def test_very_few_timesteps_stay_finite(T):
    for schedule in ("linear", "cosine", "quad"):
        diffusion = sd.GaussianDiffusion(schedule, T)
        assert (diffusion.alphas_cumprod > 0).all() and diffusion.vlb_coefficients.isfinite().all()


@pytest.mark.parametrize(
    "ours, theirs", [("linear", "linear"), ("quad", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_schedules_equal_those_of_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02, theirs)
    assert torch.allclose(
        sd.GaussianDiffusion(ours, 1000).alphas_cumprod, scheduler.alphas_cumprod, atol=2e-6
    )


def noisy_batch(diffusion, count=None):
    """x0, noise, t, x_t with every timestep once, or `count` spread over all."""
    T = diffusion.timesteps
    t = torch.linspace(0, T - 1, count or T).round().long()
    x0, noise = torch.rand(len(t), 1, 4, 4) * 2 - 1, torch.randn(len(t), 1, 4, 4)
    return x0, noise, t, diffusion.q_sample(x0, t, noise)


def exact_tables(diffusion):
    """betas, alphas_cumprod and alphas_cumprod of t - 1, in float64."""
    beta = diffusion.betas.double()
    ab = (1 - beta).cumprod(0)
    return beta, ab, torch.cat([ab.new_ones(1), ab[:-1]])


@on_every_schedule
def test_q_sample_is_the_forward_process_and_predict_x0_its_inverse(schedule, T):
    diffusion = sd.GaussianDiffusion(schedule, T)
    x0, noise, t, x_t = noisy_batch(diffusion)
    ab = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert torch.allclose(x_t, ab.sqrt() * x0 + (1 - ab).sqrt() * noise, atol=1e-4)
    early = t < 0.8 * T  # later on x0 is divided by nearly nothing
    assert torch.allclose(diffusion.predict_x0(x_t, t, noise)[early], x0[early], atol=1e-3)


@on_every_schedule
def test_ddpm_step_draws_from_the_posterior(schedule, T):
    diffusion = sd.GaussianDiffusion(schedule, T)
    x0, noise, t, x_t = noisy_batch(diffusion)
    beta, ab, ab_prev = exact_tables(diffusion)
    mean_x0, mean_xt = ab_prev.sqrt() * beta / (1 - ab), (1 - beta).sqrt() * (1 - ab_prev) / (1 - ab)
    mean = mean_x0.view(-1, 1, 1, 1) * x0 + mean_xt.view(-1, 1, 1, 1) * x_t
    std = (beta * (1 - ab_prev) / (1 - ab)).sqrt().view(-1, 1, 1, 1)
    for z in (torch.zeros_like(x_t), torch.ones_like(x_t)):
        got = diffusion.ddpm_step(x_t, t, noise, z)
        assert torch.allclose(got.double(), mean + std * z, atol=2e-4)


@on_every_schedule
def test_ddim_step_with_the_true_noise_stays_on_the_path(schedule, T):
    diffusion = sd.GaussianDiffusion(schedule, T)
    x0, noise, t, x_t = noisy_batch(diffusion)
    t_prev = (t - T // 10).clamp(min=-1)
    got = diffusion.ddim_step(x_t, t, t_prev, noise, 0.0, None)
    expected = torch.where(
        (t_prev < 0).view(-1, 1, 1, 1), x0, diffusion.q_sample(x0, t_prev.clamp(min=0), noise)
    )
    assert torch.allclose(got, expected, atol=1e-3)


def test_clipping_bounds_x0_and_takes_epsilon_again():
    diffusion = sd.GaussianDiffusion("linear", 1000)
    t = torch.tensor([600])
    x_t, eps = torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1)
    ab, ab_prev = diffusion.alphas_cumprod[[600, 500]].tolist()
    clipped_eps = (3.0 - ab**0.5) / (1 - ab) ** 0.5  # x0 would be far above 1
    expected = ab_prev**0.5 + (1 - ab_prev) ** 0.5 * clipped_eps
    assert diffusion.ddim_step(x_t, t, t - 100, eps, 0.0, None).item() == pytest.approx(expected, rel=1e-5)
    free = diffusion.ddim_step(x_t, t, t - 100, eps, 0.0, None, clip=False).item()
    assert free == pytest.approx(3.0 * (ab_prev / ab) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("t", [999, 500, 20, 1, 0])
def test_single_steps_equal_those_of_diffusers(t, clip):
    diffusers = pytest.importorskip("diffusers")
    diffusion = sd.GaussianDiffusion("linear", 1000)
    x_t, eps, when = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.full((4,), t)
    ddpm = diffusers.DDPMScheduler(1000, 1e-4, 0.02, variance_type="fixed_small", clip_sample=clip)
    theirs = ddpm.step(eps, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    ours = diffusion.ddpm_step(x_t, when, eps, noise, clip)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=2e-4 * theirs.abs().max())
    ddim = diffusers.DDIMScheduler(1000, 1e-4, 0.02, clip_sample=clip)
    ddim.set_timesteps(50)
    for eta in (0.0, 0.5, 1.0):
        theirs = ddim.step(eps, t, x_t, eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
        ours = diffusion.ddim_step(x_t, when, (when - 20).clamp(min=-1), eps, eta, noise, clip)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=2e-4 * theirs.abs().max())


@pytest.mark.parametrize("method, steps, eta", [("ddim", 200, 0.0), ("ddim", 1000, 1.0), ("ddpm", 50, 0.0)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "quad"])
def test_sampling_with_the_optimal_epsilon_returns_the_gaussian(schedule, method, steps, eta):
    """Data N(m, s^2): E[eps | x_t] = sqrt(1 - ab) (x_t - sqrt(ab) m) / (ab s^2 + 1 - ab)."""
    diffusion, m, s = sd.GaussianDiffusion(schedule, 1000), 0.2, 0.15

    def optimal(x_t, t):
        ab = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (x_t - ab.sqrt() * m) / (ab * s**2 + 1 - ab)

    x = diffusion.sample(optimal, (20_000, 1, 1, 1), method, steps, eta, torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(m, abs=5 * s / 20_000**0.5)
    assert x.std().item() == pytest.approx(s, rel=0.04)


def test_sampling_repeats_with_its_generator_and_visits_the_right_timesteps():
    diffusion, seen = sd.GaussianDiffusion("linear", 100), []

    def model(x_t, t):
        seen.append(t[0].item())
        return 0.1 * x_t

    one, two = (
        diffusion.sample(model, (2, 1, 4, 4), steps=5, generator=torch.Generator().manual_seed(3))
        for _ in "12"
    )
    assert torch.equal(one, two) and one.abs().max() <= 1
    assert seen[:5] == [99, 74, 50, 25, 0]
    seen.clear()
    diffusion.sample(model, (2, 1, 4, 4), method="ddpm")
    assert seen == list(range(99, -1, -1))


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


# 2 Accelerations: samplers


@on_every_schedule
@pytest.mark.parametrize("name", ["uniform", "logit-normal", "speed", "curriculum", "adaptive"])
def test_draws_follow_probs(name, schedule, T):
    sampler = make_samplers(sd.GaussianDiffusion(schedule, T).alphas_cumprod)[name]
    assert sampler.probs.shape == (T,) and sampler.probs.sum().item() == pytest.approx(1, abs=1e-5)
    if name == "adaptive":  # its images decide: the same 64 again and again
        drawn = torch.cat([sampler.sample(images_of(64), 7) for _ in range(200)])
    else:
        drawn = sampler.sample(torch.zeros(100_000, 1, 1, 1), step=7)
    assert drawn.dtype == torch.int64 and 0 <= drawn.min() and drawn.max() < T
    assert chi_square_p(drawn, sampler.probs) > 1e-4


def test_the_chi_square_test_tells_samplers_apart():
    samplers = make_samplers(sd.GaussianDiffusion("linear", 1000).alphas_cumprod)
    drawn = samplers["uniform"].sample(torch.zeros(100_000, 1, 1, 1), 0)
    assert all(chi_square_p(drawn, s.probs) < 1e-9 for name, s in samplers.items() if name != "uniform")


def test_speed_draws_k_times_as_often_before_tau():
    ab = sd.GaussianDiffusion("linear", 1000).alphas_cumprod
    probs = sd.SpeeDSampler(ab).probs  # k = 5, tau = 700: P = 5 / 3800 and 1 / 3800
    assert torch.allclose(probs[:700], torch.tensor(5 / 3800)) and torch.allclose(
        probs[700:], torch.tensor(1 / 3800)
    )
    probs = sd.SpeeDSampler(ab, k=10, tau=300).probs
    assert probs[299].item() == pytest.approx(10 / 3700) and probs[300].item() == pytest.approx(1 / 3700)
    assert torch.allclose(sd.SpeeDSampler(ab, k=1).probs, torch.tensor(1 / 1000))


@pytest.mark.parametrize("schedule, tau", [("linear", 700), ("cosine", 946), ("quad", 875)])
def test_speed_finds_tau_on_any_schedule(schedule, tau):
    probs = sd.SpeeDSampler(sd.GaussianDiffusion(schedule, 1000).alphas_cumprod).probs
    assert abs(int((probs > probs[-1]).sum()) - tau) <= (0 if schedule == "linear" else 2)


def test_curriculum_goes_from_uniform_to_its_gaussian():
    sampler, x0 = sd.CurriculumSampler(1000, total_steps=400, mu=0.3, sigma=0.5), torch.zeros(1, 1, 8, 8)
    gaussian = scipy.stats.norm.pdf(np.arange(1000), 300, 500)
    gaussian = torch.tensor(gaussian / gaussian.sum()).float()
    for step, gamma in ((0, 0.0), (100, 0.25), (200, 0.5), (400, 1.0), (500, 1.0)):
        sampler.sample(x0, step)
        assert torch.allclose(sampler.probs, (1 - gamma) / 1000 + gamma * gaussian, atol=1e-8), step
    assert sampler.probs.argmax() == 300


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


def test_adaptive_begins_nearly_uniform():
    sampler = sd.AdaptiveSampler(sd.GaussianDiffusion().alphas_cumprod, in_channels=3)
    uniform = torch.full((1000,), 1 / 1000)
    assert (sampler.probs - uniform).abs().sum() / 2 < 0.02  # total variation
    before = sampler.probs
    sampler.refresh_probs(torch.randn(4, 3, 32, 32))
    assert torch.allclose(before, sampler.probs)  # whatever the image


@pytest.mark.parametrize("window", [(0, 200), (400, 600), (800, 1000)])
def test_adaptive_moves_to_the_rewarded_timesteps(window):
    sampler = sd.AdaptiveSampler(sd.GaussianDiffusion().alphas_cumprod, in_channels=1)
    x0 = images_of(64)
    for step in range(60):
        t = sampler.sample(x0, step)
        sampler.update_policy(0.05 * ((t >= window[0]) & (t < window[1])).float())
    assert sampler.probs[slice(*window)].sum() > 0.5  # 0.2 at the start


@pytest.mark.parametrize("a, b", [(1e12, 1e12), (1e5, 1e-5), (1e-5, 1e5), (1e-5, 1e-5)])
def test_adaptive_leaves_no_timestep_out_however_sure_its_policy_is(a, b):
    sampler = sd.AdaptiveSampler(sd.GaussianDiffusion().alphas_cumprod, in_channels=1)
    raw = torch.tensor([a, b]).clamp(min=1e-9)
    sampler.policy[-1].bias.data = torch.where(raw > 20, raw, raw.expm1().log())  # the inverse of softplus
    x0 = images_of(1000)
    sampler.refresh_probs(x0)
    inner = sampler.probs[1:-1]
    assert inner.min() >= 0.01 / 1000 and sampler.probs[[0, -1]].min() >= 0.005 / 1000
    drawn = torch.cat([sampler.sample(x0, step) for step in range(50)])
    assert chi_square_p(drawn, sampler.probs) > 1e-4
    for step in range(3):
        sampler.sample(x0, step)
        sampler.update_policy(torch.randn(1000))
    assert all(p.isfinite().all() for p in sampler.policy.parameters()) and sampler.probs.isfinite().all()


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


class Recorder(nn.Module):
    """eps = scale x_t; remembers what it was asked, and in which mode."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(0.0)), []

    def forward(self, x_t, t):
        self.calls.append((x_t.clone(), t.clone(), self.training))
        return self.scale * x_t


def test_adaptive_measures_the_update_and_nothing_else():
    diffusion, model = sd.GaussianDiffusion("linear", 100), Recorder()
    sampler = sd.AdaptiveSampler(diffusion.alphas_cumprod, in_channels=1, every=4, selected=2, probe=10)
    x0, rewards = images_of(6), []
    sampler.update_policy = rewards.append
    for step in range(9):
        sampler.sample(x0, step)
        sampler.before_update(model, step)
        with torch.no_grad():
            model.scale += 0.1
        sampler.after_update(model)
        assert bool(model.calls) == (step % 4 == 0) and model.training
        if not model.calls:
            continue
        assert not any(training for _, _, training in model.calls)
        half = len(model.calls) // 2
        (x_t, t), (x_t_after, t_after) = (
            [torch.cat(part) for part in list(zip(*calls))[:2]]
            for calls in (model.calls[:half], model.calls[half:])
        )
        assert torch.equal(x_t, x_t_after) and torch.equal(t, t_after)  # same x_t, so the same noise
        assert t[:10].tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99] and len(t) == 10 + 2 * 6
        if step == 0:
            assert t[10:].tolist() == [0] * 6 + [1] * 6  # S at the start
            one = next(
                x
                for x in x0
                if torch.allclose(diffusion.q_sample(x[None], t[:1], 0 * x[None]), x_t[:1], atol=0.2)
            )
            clean = torch.cat([one.expand(10, 1, 8, 8), x0, x0])
            ab = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
            noise = (x_t - ab.sqrt() * clean) / (1 - ab).sqrt()
            mse = [(scale * x_t - noise).square().mean((1, 2, 3)) for scale in (0.0, 0.1)]
            delta = diffusion.vlb_coefficients[t] * (mse[0] - mse[1])
            assert torch.allclose(sampler.queue[0], delta[:10], rtol=1e-3, atol=1e-5)
            assert torch.allclose(rewards[0], delta[10:16] + delta[16:], rtol=1e-3, atol=1e-5)
        model.calls.clear()
    assert sampler.filled == 3 and set(sampler.selected.tolist()) <= set(range(0, 100, 11))


# (seed of a 20 x 12 matrix, what SelectKBest(f_regression, k=3) of scikit-learn 1.9.1 answers for its row sums)
STORED_SELECTIONS = {0: [2, 7, 11], 1: [3, 5, 9], 2: [0, 1, 6], 3: [0, 2, 9]}


def delta_matrix(seed):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(20, 12)) * generator.uniform(0.1, 3, size=12) + generator.normal(size=12)


@pytest.mark.parametrize("seed", STORED_SELECTIONS)
def test_adaptive_selects_the_timesteps_scikit_learn_selects(seed):
    deltas = delta_matrix(seed)
    chosen = sd.AdaptiveSampler.most_predictive(torch.tensor(deltas), 3).tolist()
    assert chosen == STORED_SELECTIONS[seed]
    r = [abs(scipy.stats.pearsonr(column, deltas.sum(1)).statistic) for column in deltas.T]
    assert chosen == sorted(np.argsort(r)[-3:])
    selection = pytest.importorskip("sklearn.feature_selection")
    best = selection.SelectKBest(selection.f_regression, k=3).fit(deltas, deltas.sum(1))
    assert chosen == best.get_support(indices=True).tolist()


def test_adaptive_never_selects_a_constant_column():
    deltas = torch.randn(5, 4)
    deltas[:, 2] = 0.25
    assert 2 not in sd.AdaptiveSampler.most_predictive(deltas, 3).tolist()


@on_every_schedule
def test_vlb_coefficients_give_differences_of_the_gaussian_kl(schedule, T):
    diffusion = sd.GaussianDiffusion(schedule, T)
    noise, x_t = (v[1:].double() for v in noisy_batch(diffusion)[1::2])  # at t = 0 the posterior is a point
    beta, ab, ab_prev = (v[1:].view(-1, 1, 1, 1) for v in exact_tables(diffusion))

    def posterior_mean(eps):
        return (x_t - beta / (1 - ab).sqrt() * eps) / (1 - beta).sqrt()

    def kl(eps):  # bits per dimension, against p(x_{t-1} | x_t) with variance beta_t
        q = torch.distributions.Normal(posterior_mean(noise), (beta * (1 - ab_prev) / (1 - ab)).sqrt())
        p = torch.distributions.Normal(posterior_mean(eps), beta.sqrt())
        return torch.distributions.kl_divergence(q, p).mean((1, 2, 3)) / math.log(2)

    good, bad = (noise + size * torch.randn_like(noise) for size in (0.1, 0.7))
    difference = (bad - noise).square().mean((1, 2, 3)) - (good - noise).square().mean((1, 2, 3))
    got = diffusion.vlb_coefficients[1:] * difference
    assert torch.allclose(got, kl(bad) - kl(good), rtol=1e-3)
    sampler = sd.AdaptiveSampler(diffusion.alphas_cumprod, in_channels=1)
    assert torch.allclose(sampler.vlb_coefficients, diffusion.vlb_coefficients, rtol=2e-2)


def test_adaptive_goes_on_from_its_state():
    ab, model, x0 = sd.GaussianDiffusion("linear", 100).alphas_cumprod, Recorder(), images_of(16)
    one, two = (sd.AdaptiveSampler(ab, in_channels=1, every=1) for _ in "12")

    def advance(sampler, steps):
        for step in steps:
            torch.manual_seed(step)
            sampler.sample(x0, step)
            sampler.before_update(model, step)
            with torch.no_grad():
                model.scale.fill_(0.01 * step)
            sampler.after_update(model)

    advance(one, range(5))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one.probs, two.probs) and torch.equal(one.selected, two.selected)
    for sampler in (one, two):
        model.scale.data.fill_(0.04)
        advance(sampler, range(5, 9))
    assert torch.equal(one.probs, two.probs) and torch.equal(one.queue, two.queue)
    assert not torch.equal(one.probs, sd.AdaptiveSampler(ab, in_channels=1).probs)


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (5, 3, 32, 32), (5, 4, 5, 7), (5, 3, 64, 64)])
def test_adaptive_takes_images_of_any_size_and_tables_of_any_precision(shape):
    ab = sd.GaussianDiffusion().alphas_cumprod
    for sampler in (sd.AdaptiveSampler(ab, shape[1]), sd.AdaptiveSampler(ab.double(), shape[1])):
        assert sampler.sample(torch.randn(shape), 0).shape == (5,)
        sampler.before_update(Recorder(), 0)


# 2 Accelerations: weights and momentum decay


def make_weights(alphas_cumprod):
    return {
        "none": torch.ones_like(alphas_cumprod),
        "change-aware": sd.change_aware_weights(alphas_cumprod),
        "min-snr": sd.min_snr_weights(alphas_cumprod),
        "p2": sd.p2_weights(alphas_cumprod),
    }


@on_every_schedule
def test_the_expected_weight_is_one_for_every_sampler_and_weighting(schedule, T):
    ab = sd.GaussianDiffusion(schedule, T).alphas_cumprod
    for sampler in make_samplers(ab).values():
        for name, raw in make_weights(ab).items():
            weights = sd.normalize_weights(raw, sampler.probs)
            assert weights.shape == (T,) and (weights > 0).all(), name
            assert (sampler.probs.double() * weights.double()).sum().item() == pytest.approx(1, abs=1e-5)
            assert torch.allclose(weights / weights[0], raw / raw[0], rtol=1e-4)


@on_every_schedule
@pytest.mark.parametrize("lam", [0.5, 0.6, 1.0])
def test_change_aware_weights_span_their_range(schedule, T, lam):
    ab = sd.GaussianDiffusion(schedule, T).alphas_cumprod
    weights = sd.change_aware_weights(ab, lam)
    assert weights.min().item() == pytest.approx(1 - lam, abs=1e-6)
    assert weights.max().item() == pytest.approx(lam, abs=1e-6)
    if lam > 0.5:
        slope = np.gradient(1 - ab.double().numpy())
        assert (
            weights.argmax().item() == slope.argmax()
            and scipy.stats.spearmanr(weights, slope).statistic > 0.999
        )


def test_the_noise_grows_fastest_at_219_on_the_linear_schedule():
    ab = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    assert sd.change_aware_weights(ab).argmax() == 219


def test_min_snr_and_p2_weights_have_their_closed_forms():
    ab = torch.tensor([0.99, 0.9, 5 / 6, 0.5, 0.01], dtype=torch.float64)  # SNR 99, 9, 5, 1, 1/99
    assert sd.min_snr_weights(ab).tolist() == pytest.approx([5 / 99, 5 / 9, 1, 1, 1])
    assert sd.p2_weights(ab).tolist() == pytest.approx((1 - ab).tolist())  # 1 / (1 + SNR) = 1 - ab
    assert sd.p2_weights(ab, k=2.0, gamma=0.5).tolist() == pytest.approx(
        [101**-0.5, 11**-0.5, 7**-0.5, 3**-0.5, (199 / 99) ** -0.5]
    )


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
def test_momentum_decay_keeps_lr_times_one_minus_beta1(beta1):
    assert sd.momentum_decay(0.0, beta1) == pytest.approx((beta1, 1.0))
    assert sd.momentum_decay(1.0, beta1) == pytest.approx((0.0, 1 - beta1))
    for progress in np.linspace(0, 1, 11):
        decayed, scale = sd.momentum_decay(progress, beta1)
        assert scale * (1 - decayed) == pytest.approx(1 - beta1, rel=1e-12)
        assert decayed == pytest.approx(beta1 * (1 - progress) / (1 - beta1 + beta1 * (1 - progress)))


# 3 U-Net


def awake(model):
    """The model with its zero-initialised convolutions drawn, so that everything has an effect."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize(
    "channels, size, options",
    [
        (1, 16, (16, (1, 1), 1, (4,), 0.0, 16, 2)),
        (3, 32, (16, (1, 2, 2), 2, (16, 8), 0.1, 32)),
        (1, 28, (20, (1, 2, 3), 1, (), 0.0, 28)),
        (3, 8, (6, (2,), 1, (8,), 0.0, 8)),
    ],
)
def test_unet_keeps_the_shape_depends_on_t_and_learns_everywhere(channels, size, options):
    model = sd.UNet(channels, *options).eval()
    x, t = torch.randn(3, channels, size, size), torch.tensor([0, 10, 999])
    assert not model(x, t).any()  # starts at zero
    out = awake(model)(x, t)
    assert out.shape == x.shape
    assert all((model(x, t.roll(1))[i] - out[i]).abs().max() > 1e-4 for i in range(3))
    assert torch.allclose(model(x[:1], t[:1]), out[:1], atol=1e-5)  # images do not mix
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_unet_attends_where_it_is_told():
    def attentions(attention):
        model = sd.UNet(1, 16, (1, 2, 2), 2, attention, 0.0, image_size=16)
        return sum(isinstance(m, sd.SelfAttention) for m in model.modules())

    assert [attentions(a) for a in ((), (8,), (16, 8))] == [0, 2 + 3 + 1, 4 + 6 + 1]


def test_unet_is_the_same_in_channels_last_and_close_in_bfloat16():
    model = awake(sd.UNet(3, 32, (1, 2), 1, (8,), 0.0, image_size=16)).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 500])
    plain = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t)
    assert half.dtype == torch.bfloat16 and (half - plain).norm() / plain.norm() < 0.03
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    assert torch.allclose(plain, last, atol=1e-4)


def test_self_attention_is_softmax_attention():
    layer = awake(sd.SelfAttention(128)).eval()  # two heads of 64
    x = torch.randn(2, 128, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, 1)  # [2, 128, 15]
    heads = []
    for h in (slice(0, 64), slice(64, 128)):
        weights = (q[:, h].transpose(1, 2) @ k[:, h] / 8).softmax(-1)
        heads.append((weights @ v[:, h].transpose(1, 2)).transpose(1, 2))
    expected = x + layer.out(torch.cat(heads, 1).view(2, 128, 3, 5))
    assert torch.allclose(layer(x), expected, atol=1e-4)


# 4 Data


def test_digits_are_fixed_by_their_seed_and_rendered_in_time():
    begin = time.perf_counter()
    images, labels = sd.render_digits.__wrapped__(10_240, 16, 0)
    assert time.perf_counter() - begin < 5
    assert images.shape == (10_240, 1, 16, 16) and images.dtype == torch.uint8
    again, _ = sd.render_digits.__wrapped__(100, 16, 0)
    other, _ = sd.render_digits.__wrapped__(100, 16, 1)
    assert torch.equal(images[:100], again) and not torch.equal(again, other)
    assert scipy.stats.chisquare(labels.bincount()).pvalue > 1e-4
    ink = (images > 128).flatten(1).sum(1)
    assert ink.min() > 5
    assert (images[:, 0, [0, -1]] > 128).any(-1).any(-1).float().mean() < 0.01  # whole, not cut off
    assert len(images.flatten(1).unique(dim=0)) > 10_000


@pytest.fixture
def image_folder(tmp_path):
    """300 images of every kind, nested, with other files between them."""
    folder, generator = tmp_path / "my images", np.random.default_rng(0)
    for i in range(300):
        place = folder / f"class {i % 3}" / ("ünter" if i % 2 else ".")
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(
            0, 256, (int(generator.integers(5, 40)), int(generator.integers(5, 40)), 3), np.uint8
        )
        image = Image.fromarray(pixels).convert(("RGB", "L", "P", "CMYK")[i % 4])
        image.save(place / f"{i}.{('png', 'JPG', 'png', 'jpeg')[i % 4]}")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_of_any_images_is_read_and_held_out_evenly(image_folder):
    train, held_out = sd.load_dataset("folder", image_folder, 8)
    assert train.shape == (44, 3, 8, 8) and held_out.shape == (256, 3, 8, 8) and train.dtype == torch.uint8
    together = torch.cat([train, held_out]).flatten(1)
    assert len(together.unique(dim=0)) == 300  # nothing is in both
    train_again, _ = sd.load_dataset("folder", image_folder, 8)
    assert torch.equal(train, train_again)


def png_of_bytes(pixels, **options):
    file = io.BytesIO()
    pixels.save(file, "PNG", **options)
    return file.getvalue()


def odd_images(folder):
    """{file that can be read: its colour}, and {file that cannot: what the refusal says}."""
    folder.mkdir()
    size, readable = (8, 8), {}

    def save(name, image, colour, **options):
        image.save(folder / name, **options)
        readable[name] = colour

    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    save("mit Leerzeichen.png", Image.new("RGB", size, (10, 20, 30)), (10, 20, 30))
    save("画像 é.PNG", Image.new("RGB", size, (1, 2, 3)), (1, 2, 3))
    save("palette.png", palette, (10, 200, 30))
    save("clear palette.png", palette, (255, 255, 255), transparency=1)
    save("cmyk.tiff", Image.new("CMYK", size, (0, 255, 255, 0)), (255, 0, 0))
    save("alpha.png", Image.new("RGBA", size, (200, 0, 0, 51)), (244, 204, 204))  # 20% red on white
    save("grey alpha.png", Image.new("LA", size, (100, 0)), (255, 255, 255))
    save("bits.png", Image.new("1", size, 1), (255, 255, 255))
    save("16 bit.png", Image.fromarray(np.full(size, 100 * 257, np.uint16)), (100, 100, 100))
    save("16 bit.tiff", Image.fromarray(np.full(size, 50 * 257, np.uint16)), (50, 50, 50))
    (folder / "16 bit.pgm").write_bytes(b"P5 8 8 65535\n" + np.full(64, 200 * 257, ">u2").tobytes())
    readable["16 bit.pgm"] = 200, 200, 200
    frames = [Image.new("RGB", size, colour) for colour in ((255, 0, 0), (0, 255, 0))]
    save("animated.png", frames[0], (255, 0, 0), save_all=True, append_images=frames[1:])
    save("animated.gif", frames[0], (255, 0, 0), save_all=True, append_images=frames[1:])
    save("pages.tiff", frames[0], (255, 0, 0), save_all=True, append_images=frames[1:])
    save("wide.png", Image.new("RGB", (3000, 1), (9, 9, 9)), (9, 9, 9))

    refused = {
        "empty.png": "cannot identify",
        "text.jpg": "cannot identify",
        "truncated.png": "mend or remove",
    }
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (folder / "truncated.png").write_bytes(png_of_bytes(noise)[:3000])
    Image.new("F", size, 0.5).save(folder / "float.tiff")
    Image.fromarray(np.full(size, 70_000, np.int32)).save(folder / "32 bit.tiff")
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    Image.new("1", (20_000, 10_000)).save(folder / "large bomb.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "circle.png").symlink_to("circle.png")
    deep = Image.fromarray(np.full(size, 9, np.uint16))
    deep.save(folder / "white is 0.tiff", tiffinfo={262: 0})
    deep.save(folder / "clear 16 bit.png", transparency=9)
    (folder / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    refused |= dict.fromkeys(["white is 0.tiff", "clear 16 bit.png"], "plain 16 bits")
    refused |= {"postscript.png": "cannot identify"}
    refused |= {"float.tiff": "no known range", "32 bit.tiff": "16 bits", "bomb.png": "bomb"}
    refused |= {"large bomb.png": "bomb", "pipe.png": "no file"}
    return readable, refused | {"dangling.png": "no file", "circle.png": "no file"}


def test_odd_images_are_read_right_or_refused_by_name(tmp_path):
    begin = time.perf_counter()
    readable, refused = odd_images(tmp_path / "all")
    for name, said in refused.items():
        alone = tmp_path / f"with {name}"
        alone.mkdir()
        (tmp_path / "all" / name).rename(alone / name)
        with pytest.raises(sd.UserError, match=said) as error:
            sd.read_folder(alone, 8)
        assert name in str(error.value) and "\n" not in str(error.value)
    images = sd.read_folder(tmp_path / "all", 8)
    for name, image in zip(sorted(readable, key=lambda name: tmp_path / "all" / name), images, strict=True):
        expected = torch.tensor(readable[name], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
        assert torch.equal(image, expected), (name, image[:, 0, 0])
    assert time.perf_counter() - begin < 20


def test_linked_folders_are_read_once_and_never_in_circles(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "data" / "a" / "1.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "elsewhere" / "2.png")
    for name, target in {"a/up": "..", "b": "a", "c": "../elsewhere", "d": "../elsewhere", "e": "e"}.items():
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "data" / "folder.png").mkdir()
    images = sd.read_folder(tmp_path / "data", 8)
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def write_grey(folder):
    """300 grey images of random pixels, which are returned."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return pixels


def test_a_grey_folder_has_one_channel_and_pixels_are_kept(tmp_path):
    pixels = write_grey(tmp_path)
    train, held_out = sd.load_dataset("folder", tmp_path, 8)
    got = {bytes(image.numpy()) for image in torch.cat([train, held_out])}
    assert train.shape[1] == 1 and got == {bytes(image) for image in pixels}


def test_wide_images_are_cropped_in_the_centre(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    for i in range(300):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    assert (sd.load_dataset("folder", tmp_path, 8)[0] == 200).all()


def write_mnist(root, counts, kind="MNIST"):
    """Small files in MNIST's own format, where torchvision looks for them."""
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    for name, count in zip(("train", "t10k"), counts):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, count, 28, 28) + pixels.tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(count))


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_reads_mnist_and_its_test_split_is_held_out(tmp_path, name, kind):
    write_mnist(tmp_path, (70, 30), kind)
    train, held_out = sd.load_dataset(name, tmp_path, 28)
    assert train.shape == (70, 1, 28, 28) and held_out.shape == (30, 1, 28, 28)
    expected = np.random.default_rng(70).integers(0, 256, (70, 28, 28), np.uint8)
    assert np.array_equal(train[:, 0].numpy(), expected)


# 5 Evaluation


def test_evaluate_measures_the_bound_of_a_model_that_knows_the_answer():
    diffusion = sd.GaussianDiffusion("linear", 100)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    mse, bound = sd.evaluate(lambda x_t, t: torch.zeros_like(x_t), diffusion, images)
    assert mse == pytest.approx(1, rel=0.05)  # the noise's own power
    assert bound == pytest.approx(diffusion.vlb_coefficients.sum().item(), rel=0.1)
    assert sd.evaluate(lambda x_t, t: torch.zeros_like(x_t), diffusion, images) == (mse, bound)


class ChannelMeans(nn.Module):
    """[N, 3, H, W] -> [N, 3]: features with a closed form."""

    def forward(self, images):
        return images.mean((2, 3))


class Pooled(nn.Module):
    """[N, 3, H, W] -> [N, 16]: the red channel at 4x4, enough to tell a digit from noise."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images[:, :1], 4).flatten(1)


class Constant(nn.Module):
    """One feature for a whole batch: no features of images."""

    def forward(self, images):
        return images.mean().view(1, 1)


def save_torchscript(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is to be replaced
        torch.jit.script(module.eval()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    return save_torchscript(Pooled(), tmp_path_factory.mktemp("features") / "pooled.ts")


def random_images(count, channels=3, low=0, high=256):
    return torch.randint(low, high, (count, channels, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_training_images_against_themselves_are_at_no_distance(pooled, channels):
    images = random_images(200, channels)
    distance = sd.FrechetDistance(pooled, "cpu", images)
    assert distance.name == "FD (pooled.ts)"
    assert abs(distance(images.split(70))) < 1e-3
    assert distance([images // 2]) > 1


def test_the_distance_is_that_of_compute_fid(pooled, tmp_path):
    cleanfid = pytest.importorskip("cleanfid.fid")
    one, two = random_images(100), random_images(60, low=50)
    for name, images in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    expected = cleanfid.compute_fid(
        str(tmp_path / "one"),
        str(tmp_path / "two"),
        custom_feat_extractor=Pooled(),
        custom_fn_resize=lambda image: image,
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
    )
    assert sd.FrechetDistance(pooled, "cpu", one)([two]) == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_gaussians_has_its_closed_form(tmp_path):
    def corners(means, spread):  # every combination of mean +- spread: independent channels
        signs = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 3)
        colours = torch.tensor(means) + torch.tensor(spread) * signs
        return colours.byte()[:, :, None, None].expand(-1, -1, 4, 4).repeat(4, 1, 1, 1)

    one, two = corners((100, 120, 90), (10, 20, 30)), corners((103, 116, 102), (14, 20, 27))
    features = save_torchscript(ChannelMeans(), tmp_path / "means.ts")
    # |mu1 - mu2|^2 + sum (s1 - s2)^2, the variances with n - 1 = 31
    expected = 9 + 16 + 144 + (16 + 0 + 9) * 32 / 31
    assert sd.FrechetDistance(features, "cpu", one)([two]) == pytest.approx(expected, rel=1e-4)


def test_inception_gets_images_resized_as_clean_fid_resizes_them(monkeypatch, tmp_path):
    cleanfid, resize = pytest.importorskip("cleanfid.fid"), pytest.importorskip("cleanfid.resize")
    asked, seen = [], []

    def extractor(mode, device, use_dataparallel=True):
        asked.append(mode)

        def inception(images):
            seen.append(images)
            return Pooled()(images)

        return inception

    for module in ("fid", "features"):
        monkeypatch.setattr(f"cleanfid.{module}.build_feature_extractor", extractor)
    images = random_images(40)
    distance = sd.FrechetDistance(None, "cpu", images)
    assert distance.name == "FID" and asked == ["clean"]
    resized = torch.cat(seen[1:])  # the first is a trial
    assert resized.shape == (40, 3, 299, 299)
    expected = resize.build_resizer("clean")(images[7].permute(1, 2, 0).numpy())
    assert np.abs(resized[7].permute(1, 2, 0).numpy() - expected).max() < 1e-3
    sd.save_pngs(images // 2, tmp_path)
    sd.save_pngs(images, tmp_path, 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:06d}.png" for i in range(80)]

    published = images.flatten(1).double()[:, :16].numpy()
    published = published.mean(0), np.cov(published, rowvar=False)
    monkeypatch.setattr(
        "cleanfid.features.get_reference_statistics",
        lambda *names, **more: published if (names, more) == (("cifar10", 32), {"split": "train"}) else None,
    )
    distance = sd.FrechetDistance(None, "cpu", images, published_cifar10=True)
    assert distance.reference is published
    monkeypatch.setattr("cleanfid.fid.get_reference_statistics", lambda *names, **more: published)
    options = {"dataset_name": "cifar10", "dataset_res": 32, "dataset_split": "train", "num_workers": 0}
    expected = cleanfid.compute_fid(str(tmp_path), device=torch.device("cpu"), verbose=False, **options)
    assert distance([images // 2, images]) == pytest.approx(expected, rel=1e-5)


def test_samples_survive_as_uint8():
    images = random_images(5)
    assert torch.equal(sd.to_uint8(sd.to_float(images)), images)
    assert sd.to_uint8(torch.tensor([-1.0, -0.999, 0.999, 1.0])).tolist() == [0, 0, 255, 255]


def test_a_file_is_never_half_written(tmp_path):
    def fail(path):
        path.write_text("hal")
        raise RuntimeError("disk")

    sd.write_whole(tmp_path / "file", lambda path: path.write_text("whole"))
    with pytest.raises(OSError, match="as it was"):
        sd.write_whole(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


# 6 Training, through the command line

TINY = ["--width", "8", "--batch-size", "16", "--steps", "6", "--eval-every", "3", "--timesteps", "50"]
TINY += ["--sampling-steps", "4", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def digits_rendered_once():
    patch, render = pytest.MonkeyPatch(), sd.render_digits
    cached = functools.wraps(render)(functools.cache(render))
    patch.setattr(sd, "render_digits", cached)
    yield
    patch.undo()


def metrics(run):
    with open(Path(run) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def checkpoint(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def assert_same_tensors(one, two):
    """Nested state dicts, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same_tensors(one[key], two[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("weighting", ["auto", "min-snr"])
@pytest.mark.parametrize("strategy", sd.STRATEGIES)
def test_every_strategy_trains_and_leaves_its_results(here, strategy, weighting):
    options = ["--strategy", strategy, "--weighting", weighting, "--adaptive-every", "2"]
    options += ["--momentum-decay"] if weighting == "min-snr" else []
    assert sd.main(options + TINY) == 0
    run = here / "runs" / f"digits-{strategy}{'-min-snr-momentum-decay' if weighting == 'min-snr' else ''}"
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "metrics.csv",
        "samples.png",
        "timesteps.png",
    ]
    rows = metrics(run)
    assert [int(row["step"]) for row in rows] == [3, 6] and [int(row["images"]) for row in rows] == [48, 96]
    assert ",".join(rows[0]) == "step,images,seconds,loss,lr,beta1,val_mse,val_vlb,fid"
    assert all(math.isfinite(float(row[name])) for row in rows for name in row if name != "fid")
    assert all(row["fid"] == "" for row in rows)
    assert json.loads((run / "config.json").read_text())["strategy"] == strategy
    assert Image.open(run / "samples.png").size == (8 * 66 + 2, 8 * 66 + 2)
    assert Image.open(run / "timesteps.png").size == (700, 400)
    drawn = checkpoint(run)["drawn"]
    assert drawn.sum() == 96 and (drawn.sum(1) > 0).sum() == 6


def test_training_learns(here):
    assert sd.main([*TINY, "--steps", "80", "--eval-every", "40", "--lr", "1e-2", "--ema-decay", "0.9"]) == 0
    first, last = (float(row["val_mse"]) for row in metrics("runs/digits-uniform") if row["val_mse"])
    assert last < 0.8 * first, (first, last)


def test_the_last_line_tells_images_per_second_and_memory(here, capsys):
    begin = time.perf_counter()
    assert sd.main([*TINY, "--steps", "60", "--eval-every", "60"]) == 0
    seconds = time.perf_counter() - begin
    line = capsys.readouterr().out.splitlines()[-1]
    pattern = r"(\S+) images/s, peak memory (\S+) GiB(, \S+% of the \d+ TFLOP/s .*)?"
    speed, memory, _ = re.fullmatch(pattern, line).groups()
    rows = {int(row["step"]): float(row["seconds"]) for row in metrics("runs/digits-uniform")}
    assert float(speed) == pytest.approx(35 * 16 / (rows[60] - rows[25]), rel=1e-2)  # since the first row
    assert float(speed) > 60 * 16 / seconds and 0.05 < float(memory) < 100


def test_flops_are_those_of_every_convolution_product_and_attention():
    args = settings("--image-size", "16", "--width", "32", "--mults", "1", "2", "--attention", "4")
    model, counted = awake(sd.build_model(args, 3)[0]), []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            counted.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            counted.append(output.numel() * module.in_features)
        elif isinstance(module, sd.SelfAttention):  # q k' and the product with v
            counted.append(2 * output.shape[1] * (output.shape[2] * output.shape[3]) ** 2)

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    model(torch.randn(1, 3, 16, 16), torch.zeros(1))
    assert len(hooks) > 20
    # Forward, and twice that backward, where the first layers have no input to send a gradient to; attention
    # is taken again in its backward pass by some kernels.
    assert sd.flops_per_image(args, 3) == pytest.approx(3 * 2 * sum(counted), rel=0.03)


def test_samples_come_in_batches_of_one_size(here):
    diffusion, sizes = sd.GaussianDiffusion("linear", 50), set()

    def model(x_t, t):
        sizes.add(len(x_t))
        return torch.zeros_like(x_t)

    for count, size in ((10, 4), (512, 256), (300, 256), (64, 256), (1, 1)):
        sizes.clear()
        batches = list(sd.draw_samples(model, diffusion, count, (1, 2, 2), settings(*TINY), 0, "", size))
        assert sum(map(len, batches)) == count and len(sizes) == 1 and max(sizes) <= size


def test_a_compiled_run_is_the_run(here, monkeypatch, pooled):
    """Traced but not translated, and never traced anew beyond the limit, where torch.compile would give up."""
    compiled, compile_call = [], torch.compile

    def compile_eagerly(model, **options):
        compiled.append(options)
        return compile_call(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    options = [*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--dropout", "0.1"]
    options += ["--fid-samples", "300", "--fid-every", "3", "--fid-features", pooled]
    assert sd.main([*options, "--compile", "on", "--out", "compiled"]) == 0
    assert compiled == [{"dynamic": False}] * 2  # the model and its average
    assert sd.main([*options, "--out", "eager"]) == 0
    assert len(compiled) == 2
    one, two = checkpoint("compiled"), checkpoint("eager")
    for name, weight in one["ema"].items():
        assert torch.allclose(weight, two["ema"][name], atol=1e-5), name
    generate = ["--generate", "3", "--checkpoint", "compiled/checkpoint.pt", "--device", "cpu"]
    assert sd.main([*generate, "--compile", "on", "--sampling-steps", "2"]) == 0 and len(compiled) == 3


def test_a_second_run_gets_its_own_folder(here):
    for _ in range(3):
        assert sd.main(TINY) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "digits-uniform",
        "digits-uniform-2",
        "digits-uniform-3",
    ]
    assert_same_tensors(
        checkpoint("runs/digits-uniform")["model"], checkpoint("runs/digits-uniform-3")["model"]
    )


def test_strategies_share_model_images_and_noise(here, monkeypatch):
    seen, q_sample, build = {}, sd.GaussianDiffusion.q_sample, sd.build_model

    def watch(self, x0, t, noise):
        if torch.is_grad_enabled():
            seen[strategy]["batches"].append((x0.clone(), noise.clone(), t.clone()))
            seen[strategy]["masks"].append(torch.get_rng_state())  # what dropout will draw from
        return q_sample(self, x0, t, noise)

    def watch_build(args, channels):
        model, diffusion = build(args, channels)
        seen[strategy]["model"] = {name: p.clone() for name, p in model.state_dict().items()}
        return model, diffusion

    monkeypatch.setattr(sd.GaussianDiffusion, "q_sample", watch)
    monkeypatch.setattr(sd, "build_model", watch_build)
    for strategy in sd.STRATEGIES:
        seen[strategy] = {"batches": [], "masks": []}
        options = ["--strategy", strategy, "--adaptive-every", "2", "--flip", "--dropout", "0.2"]
        assert sd.main([*options, *TINY]) == 0
    for strategy in sd.STRATEGIES[1:]:
        assert_same_tensors(seen["uniform"]["model"], seen[strategy]["model"])
        assert len(seen[strategy]["batches"]) == 6
        for (x0, noise, t), (x0_, noise_, t_) in zip(seen["uniform"]["batches"], seen[strategy]["batches"]):
            assert torch.equal(x0, x0_) and torch.equal(noise, noise_) and not torch.equal(t, t_)
        for mask, mask_ in zip(seen["uniform"]["masks"], seen[strategy]["masks"]):
            assert torch.equal(mask, mask_)
    x0 = torch.cat([batch[0] for batch in seen["uniform"]["batches"]])
    digits = {bytes(image.numpy()) for image in sd.load_dataset("digits", None, 16)[0]}
    pixels = (x0.add(1) * 127.5).round().byte()
    plain = sum(bytes(image.contiguous().numpy()) in digits for image in pixels)
    mirrored = sum(bytes(image.flip(-1).contiguous().numpy()) in digits for image in pixels)
    assert len(x0) == 96 and plain + mirrored >= 96 and 25 < mirrored < 71


def settings(*argv):
    return sd.parse_args(["--device", "cpu", *argv])[0]


def test_the_flags_of_each_method_reach_it():
    ab = sd.GaussianDiffusion("linear", 1000).alphas_cumprod

    def build(*argv):
        return sd.build_strategy(settings(*argv), ab, channels=1)

    change_aware = sd.change_aware_weights(ab, 0.8)
    speed, weights = build(
        "--strategy", "speed", "--speed-k", "3", "--speed-tau", "100", "--speed-lam", "0.8"
    )
    assert torch.equal(speed.probs, sd.SpeeDSampler(ab, 3.0, 100).probs) and torch.equal(
        weights, change_aware
    )
    assert torch.equal(build("--strategy", "speed", "--weighting", "none")[1], torch.ones(1000))
    assert torch.equal(build("--strategy", "adaptive")[1], torch.ones(1000))
    assert torch.equal(build("--weighting", "change-aware", "--speed-lam", "0.8")[1], change_aware)
    assert torch.equal(
        build("--weighting", "min-snr", "--min-snr-gamma", "2")[1], sd.min_snr_weights(ab, 2.0)
    )
    p2 = build("--weighting", "p2", "--p2-k", "2", "--p2-gamma", "0.5")[1]
    assert torch.equal(p2, sd.p2_weights(ab, 2.0, 0.5))
    flags = ["--curriculum-mu", "0.7", "--curriculum-sigma", "0.2", "--steps", "50"]
    curriculum, _ = build("--strategy", "curriculum", *flags)
    assert torch.equal(curriculum.gaussian, sd.CurriculumSampler(1000, 50, 0.7, 0.2).gaussian)
    assert curriculum.total_steps == 50
    flags = {"every": "7", "selected": "2", "queue": "9", "probe": "30", "lr": "0.5", "entropy": "0.25"}
    adaptive, _ = build(
        "--strategy", "adaptive", *(x for k, v in flags.items() for x in (f"--adaptive-{k}", v))
    )
    assert (adaptive.every, adaptive.selected.tolist(), adaptive.queue.shape) == (7, [0, 1], (9, 30))
    assert adaptive.optimizer.param_groups[0]["lr"] == 0.5 and adaptive.entropy == 0.25
    assert isinstance(build("--strategy", "logit-normal")[0], sd.LogitNormalSampler)


@pytest.mark.parametrize(
    "argv", [["--strategy", "speed"], ["--weighting", "p2"], ["--strategy", "curriculum"]]
)
def test_the_loss_is_the_weighted_mse(here, monkeypatch, argv):
    seen, q_sample = [], sd.GaussianDiffusion.q_sample

    def watch(self, x0, t, noise):
        seen.append((t, noise))
        return q_sample(self, x0, t, noise)

    monkeypatch.setattr(sd.GaussianDiffusion, "q_sample", watch)
    assert sd.main([*argv, *TINY, "--steps", "1", "--out", "run"]) == 0
    t, noise = seen[0]  # the first batch; a new U-Net predicts 0, so its MSE is the noise's mean square
    ab = sd.GaussianDiffusion("linear", 50).alphas_cumprod
    sampler, raw = sd.build_strategy(settings(*argv, *TINY), ab, 1)
    weights = sd.normalize_weights(raw, sampler.probs)
    expected = (weights[t] * noise.square().mean((1, 2, 3))).mean().item()
    assert float(metrics("run")[0]["loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "argv, attention",
    [
        (["--dataset", "cifar10"], [16]),
        (["--dataset", "mnist", "--image-size", "32"], [8]),
        (["--patch", "1"], [8]),
        (["--mults", "1"], [8]),
        (["--attention"], []),
        (["--attention", "8", "4"], [8, 4]),
    ],
)
def test_attention_defaults_follow_the_image_size(argv, attention):
    assert settings(*argv).attention == attention


def test_the_optimiser_receives_the_decayed_momentum(here, monkeypatch):
    received = []

    class Watched(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            received.append((self.param_groups[0]["lr"], self.param_groups[0]["betas"]))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    assert sd.main(["--momentum-decay", "--lr", "0.01", "--warmup", "2", "--beta1", "0.8", *TINY]) == 0
    for step, (lr, betas) in enumerate(received):
        beta1, scale = sd.momentum_decay(step / 6, 0.8)
        assert lr == pytest.approx(0.01 * scale * min(1, (step + 1) / 2)) and betas == pytest.approx(
            (beta1, 0.999)
        )
    assert len(received) == 6
    assert metrics("runs/digits-uniform-momentum-decay")[-1]["beta1"] == f"{received[-1][1][0]:.6g}"


@contextlib.contextmanager
def stopping_at(step):
    """Ctrl-C in the middle of that training step."""
    update, calls = torch.optim.AdamW.step, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        yield


@contextlib.contextmanager
def signalled_at(steps, number=signal.SIGTERM):
    """That signal in the middle of each of these training steps, numbered from 1."""
    train_step = sd.Training.train_step

    def step_with_signal(self):
        if self.step + 1 in steps:
            signal.raise_signal(number)
        train_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd.Training, "train_step", step_with_signal)
        yield


def assert_same_run(one, two):
    """The same metrics but for the seconds, the same pictures, and every part of the checkpoint bit for bit."""
    rows = [[row | {"seconds": ""} for row in metrics(run)] for run in (one, two)]
    assert rows[0] == rows[1]
    checkpoints = [checkpoint(run) for run in (one, two)]
    for state in checkpoints:
        del state["seconds"], state["args"]["out"]
    assert_same_tensors(*checkpoints)
    for name in ("samples.png", "timesteps.png"):
        assert Path(one, name).read_bytes() == Path(two, name).read_bytes()


# The rows of metrics.csv fall into one line with the checkpoints (4, 8) or between them (3, 6, 9).
METHODS = {
    "uniform": ["--dropout", "0.2"],
    "logit-normal": [],
    "speed": ["--checkpoint-every", "2"],
    "curriculum": ["--flip"],
    "adaptive": ["--adaptive-every", "2", "--weighting", "p2"],
}


@pytest.mark.parametrize("momentum_decay", [[], ["--momentum-decay"]])
@pytest.mark.parametrize("strategy", sd.STRATEGIES)
def test_a_stopped_and_resumed_run_is_the_run_that_never_stopped(here, monkeypatch, strategy, momentum_decay):
    monkeypatch.setattr(sd, "LOG_EVERY", 3)
    options = [*TINY, "--strategy", strategy, *METHODS[strategy], *momentum_decay]
    options += ["--steps", "10", "--eval-every", "4"]
    assert sd.main([*options, "--out", "whole"]) == 0
    with signalled_at({2, 7}):
        assert sd.main([*options, "--out", "stopped"]) == 143
        assert checkpoint("stopped")["step"] == 2
        assert sd.main(["--resume", "stopped"]) == 143
        assert checkpoint("stopped")["step"] == 7
    with stopping_at(2):  # not by a signal: in the middle of the ninth step, its last checkpoint is older
        assert sd.main(["--resume", "stopped"]) == 130
    assert checkpoint("stopped")["step"] == 8
    assert sd.main(["--resume", "stopped"]) == 0  # with the run's own device
    assert_same_run("whole", "stopped")


def test_a_run_may_be_stopped_after_every_step(here, monkeypatch):
    monkeypatch.setattr(sd, "LOG_EVERY", 3)
    options = [*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--steps", "8", "--eval-every", "4"]
    assert sd.main([*options, "--out", "whole"]) == 0
    with signalled_at(range(1, 9)):
        assert sd.main([*options, "--out", "stopped"]) == 143
        for step in range(2, 9):
            assert sd.main(["--resume", "stopped"]) == 143 and checkpoint("stopped")["step"] == step
    assert sd.main(["--resume", "stopped"]) == 0  # all that is left to do is its last measurement
    assert_same_run("whole", "stopped")
    assert sd.main(["--resume", "stopped"]) == 2


def test_checkpoint_every_bounds_what_a_crash_loses(here):
    with stopping_at(6):
        assert sd.main([*TINY, "--steps", "9", "--eval-every", "100", "--checkpoint-every", "2"]) == 130
    assert checkpoint("runs/digits-uniform")["step"] == 4


def test_two_processes_never_train_one_run(here, capsys):
    with stopping_at(4):
        assert sd.main([*TINY, "--out", "run"]) == 130
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    with sd.alone_in("run"):
        assert sd.main(["--resume", "run"]) == 2
    assert "another process" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}
    assert sd.main(["--resume", "run"]) == 0


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(here, capsys, number, status):
    with signalled_at({5}, number):
        assert sd.main([*TINY, "--out", "a run"]) == status
    assert (
        capsys.readouterr().err.splitlines()[-1] == "stopped with the checkpoint of step 5: --resume 'a run'"
    )
    assert [row["step"] for row in metrics("a run")] == ["3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_does_not_wait_for_a_measurement(here, monkeypatch):
    assert sd.main([*TINY, "--out", "whole"]) == 0
    evaluate = sd.evaluate
    monkeypatch.setattr(sd, "evaluate", lambda *args: signal.raise_signal(signal.SIGINT) or evaluate(*args))
    assert sd.main([*TINY, "--out", "stopped"]) == 130
    assert checkpoint("stopped")["step"] == 3 and metrics("stopped") == []
    monkeypatch.setattr(sd, "evaluate", evaluate)
    assert sd.main(["--resume", "stopped"]) == 0
    assert_same_run("whole", "stopped")


def test_a_signal_that_breaks_the_measurement_of_fid_loses_no_figure(here, pooled, monkeypatch):
    options = [*TINY, "--fid-samples", "20", "--fid-features", pooled]
    assert sd.main([*options, "--out", "whole"]) == 0
    call = sd.FrechetDistance.__call__

    def broken(self, batches):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated")

    monkeypatch.setattr(sd.FrechetDistance, "__call__", broken)
    assert sd.main([*options, "--out", "stopped"]) == 143
    monkeypatch.setattr(sd.FrechetDistance, "__call__", call)
    assert sd.main(["--resume", "stopped"]) == 0
    assert_same_run("whole", "stopped")


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


@contextlib.contextmanager
def infinite_loss_at(steps):
    """A loss that is not finite in these training steps, numbered from 1."""
    train_step, normalize = sd.Training.train_step, sd.normalize_weights

    def step_with_nan(self):
        with pytest.MonkeyPatch.context() as patch:
            if self.step + 1 in steps:
                patch.setattr(sd, "normalize_weights", lambda *args: normalize(*args) * math.nan)
            train_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd.Training, "train_step", step_with_nan)
        yield


def test_a_loss_that_is_not_finite_skips_its_update(here, capsys):
    options = [*TINY, "--strategy", "adaptive", "--adaptive-every", "1", "--momentum-decay"]
    with infinite_loss_at({5}):
        assert sd.main([*options, "--eval-every", "1", "--out", "run"]) == 0
    assert "1 updates were skipped" in capsys.readouterr().out
    state = checkpoint("run")
    assert {float(part["step"]) for part in state["optimizer"]["state"].values()} == {5.0}  # of 6
    assert all(weight.isfinite().all() for part in ("model", "ema") for weight in state[part].values())
    losses = [float(row["loss"]) for row in metrics("run")]
    assert math.isnan(losses[4]) and np.isfinite(losses[:4] + losses[5:]).all()
    assert float(metrics("run")[4]["beta1"]) == pytest.approx(sd.momentum_decay(4 / 6)[0], rel=1e-5)


def test_a_skipped_update_changes_no_weight():
    args, _ = sd.parse_args([*TINY, "--warmup", "1"])
    run = sd.Training(args, torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8))
    run.train_step()
    before = copy.deepcopy(run.model.state_dict())
    with infinite_loss_at({2}):
        run.train_step()
    assert_same_tensors(before, run.model.state_dict())
    assert run.skipped == 1 and run.step == 2
    run.train_step()
    assert any(not torch.equal(before[name], weight) for name, weight in run.model.state_dict().items())


DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


def fp16_run(device, *options):
    args = settings(*TINY, "--warmup", "1", "--momentum-decay", *options)
    args.amp, args.device = "fp16", device
    return sd.Training(args, sd.render_digits(64)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_skips_a_step_with_infinite_gradients_and_goes_on(device):
    run = fp16_run(device)
    run.train_step()
    before, scale = copy.deepcopy(run.state_dict()), 2.0**80
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": scale})  # no gradient survives it in fp16
    run.train_step()
    after = run.state_dict()
    assert_same_tensors(before["model"], after["model"])
    assert {float(part["step"]) for part in after["optimizer"]["state"].values()} == {1.0}
    assert run.scaler.get_scale() == scale / 2 and run.skipped == 0  # the loss itself was finite
    group = run.optimizer.param_groups[0]  # the step counts, for momentum decay and for the average
    assert run.step == 2 and group["betas"][0] == pytest.approx(sd.momentum_decay(1 / 6)[0])
    lerp = [torch.lerp(x, y, 1 - 2 / 11) for x, y in zip(before["ema"].values(), after["model"].values())]
    assert all(torch.allclose(x, y) for x, y in zip(lerp, after["ema"].values()))
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 1024.0})
    run.train_step()
    assert {float(p["step"]) for p in run.state_dict()["optimizer"]["state"].values()} == {2.0}
    assert all(weight.isfinite().all() for weight in run.model.state_dict().values())


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_goes_on_with_the_scale_it_had(device):
    one, two = fp16_run(device), fp16_run(device)
    one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": 512.0})
    for _ in range(3):
        one.train_step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.scaler.get_scale() == 512.0 and two.scaler.state_dict()["_growth_tracker"] == 3
    for run in (one, two):
        run.train_step()
    if device == "cpu":
        assert_same_tensors(one.state_dict(), two.state_dict())


@on_cuda
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", sd.STRATEGIES)
def test_on_cuda_a_resumed_run_is_the_run_but_for_rounding(here, strategy, amp):
    """What stays is the nondeterminism of kernels, which sum in no fixed order."""
    options = [*TINY, "--strategy", strategy, "--adaptive-every", "2", "--amp", amp, "--device", "cuda"]
    assert sd.main([*options, "--out", "unbroken"]) == 0
    with signalled_at({4}):
        assert sd.main([*options, "--out", "stopped"]) == 143
    assert sd.main(["--resume", "stopped"]) == 0
    one, two = (checkpoint(run)["model"] for run in ("unbroken", "stopped"))
    # Adam makes steps of up to lr of gradients that are rounding alone.
    assert all(torch.allclose(weight, two[name], rtol=1e-2, atol=5e-4) for name, weight in one.items())
    for name in ("loss", "lr", "beta1", "val_mse", "val_vlb"):
        one, two = ([float(row[name]) for row in metrics(run)] for run in ("unbroken", "stopped"))
        assert one == pytest.approx(two, rel=1e-3), name


@on_cuda
@pytest.mark.parametrize("strategy", sd.STRATEGIES)
def test_no_step_waits_for_the_gpu(strategy):
    args = settings(*TINY, "--strategy", strategy, "--adaptive-every", "1", "--device", "cuda", "--flip")
    run = sd.Training(args, torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8))
    run.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_images_that_fill_the_gpu_stay_on_the_host(monkeypatch):
    args = settings(*TINY, "--device", "cuda")
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8)
    near = sd.Training(args, images)
    little = types.SimpleNamespace(total_memory=images.numel())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: little)
    far = sd.Training(args, images)
    assert near.images.is_cuda and not far.images.is_cuda
    assert torch.equal(near.batch(), far.batch()) and far.batch().is_cuda


@pytest.mark.parametrize("stop", [[], [9]])
def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(here, capsys, stop):
    options = [*TINY, "--steps", "40", "--eval-every", "4", "--out", "run"]
    bad = {2, *range(6, 15), *range(17, 40)}  # one, nine in a row, and more; a checkpoint is due in each
    with infinite_loss_at(bad):
        with signalled_at(stop):
            assert sd.main(options) == (143 if stop else 1)
        assert not stop or sd.main(["--resume", "run"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("speedup_diffusion.py: step 26: 10 losses in a row") and "--lr" in last
    state = checkpoint("run")
    assert state["step"] == 16 and state["skipped"] == 10  # the last before the losses went wrong
    assert all(weight.isfinite().all() for part in ("model", "ema") for weight in state[part].values())
    assert sd.main(["--resume", "run", "--lr", "1e-5"]) == 0  # where the fault is gone
    assert json.loads(Path("run/config.json").read_text())["lr"] == 1e-5
    assert [int(row["step"]) for row in metrics("run")][-1] == 40


def test_a_full_disk_ends_the_run_and_keeps_its_checkpoint(here, capsys, monkeypatch):
    train_step, (soft, hard) = sd.Training.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(self):
        train_step(self)
        if self.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(sd.Training, "train_step", fill_the_disk)
            assert sd.main([*TINY, "--out", "run"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = capsys.readouterr().err.splitlines()[-1]
    assert "run/checkpoint.pt could not be written and is as it was" in last and "disk" in last
    assert sorted(p.name for p in Path("run").iterdir() if "new-" in p.name) == []
    assert checkpoint("run")["step"] == 3
    assert sd.main(["--resume", "run"]) == 0
    assert sd.main([*TINY, "--out", "whole"]) == 0
    assert_same_run("whole", "run")


def test_a_disk_without_room_is_known_before_training(here, capsys, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert sd.main([*TINY, "--out", "new/run"]) == 2
    err = capsys.readouterr().err
    assert str(here) in err and "0.0001 GB" in err and err.count("\n") == 1 and not list(here.iterdir())
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with stopping_at(4):
        assert sd.main([*TINY, "--strategy", "adaptive", "--adaptive-every", "1", "--out", "run"]) == 130
    size = Path("run/checkpoint.pt").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    assert sd.main(["--resume", "run"]) == 2
    assert sd.main([*TINY, "--strategy", "adaptive", "--out", "other"]) == 2 and not Path("other").exists()


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


def test_generate_writes_images_that_repeat_with_the_seed(here):
    assert sd.main([*TINY, "--out", "run"]) == 0
    generate = [
        "--checkpoint",
        "run/checkpoint.pt",
        "--sampling-steps",
        "3",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    for out in ([], [], ["--out", "elsewhere", "--method", "ddim", "--eta", "1"]):
        assert sd.main(["--generate", "6", *generate, *out]) == 0
    for folder in ("run/generated", "run/generated-2", "elsewhere"):
        names = sorted(p.name for p in Path(folder).iterdir())
        assert names == [f"{i:06d}.png" for i in range(6)] + ["grid.png"]
    first, second, other = (
        Path(f, "000005.png").read_bytes() for f in ("run/generated", "run/generated-2", "elsewhere")
    )
    assert first == second != other
    assert Image.open("run/generated/000000.png").size == (16, 16)


def test_a_folder_trains_and_resumes_where_it_was_moved(here, image_folder, capsys):
    options = ["--dataset", "folder", "--image-size", "8", "--mults", "1", "2", "--amp", "bf16", *TINY]
    with stopping_at(5):
        assert sd.main([*options, "--data-dir", str(image_folder)]) == 130
    moved = image_folder.rename(here / "moved")
    assert sd.main(["--resume", "runs/folder-uniform"]) == 2 and str(image_folder) in capsys.readouterr().err
    write_grey(here / "grey")
    assert sd.main(["--resume", "runs/folder-uniform", "--data-dir", "grey"]) == 2
    assert "1 channels, the run 3" in capsys.readouterr().err
    fewer = Path(shutil.copytree(moved, here / "fewer"))
    next(path for path in sorted(fewer.rglob("*")) if path.is_file()).unlink()
    assert sd.main(["--resume", "runs/folder-uniform", "--data-dir", "fewer"]) == 2
    assert "its data were" in capsys.readouterr().err
    assert sd.main(["--resume", "runs/folder-uniform", "--data-dir", str(moved)]) == 0
    assert [int(row["step"]) for row in metrics("runs/folder-uniform")] == [3, 6]
    assert all(math.isfinite(float(row["val_vlb"])) for row in metrics("runs/folder-uniform"))


def test_mnist_trains_from_its_files(here):
    write_mnist(here / "data", (64, 32))
    assert sd.main(["--dataset", "mnist", "--num-blocks", "1", "--strategy", "speed", *TINY]) == 0
    assert Image.open("runs/mnist-speed/samples.png").size[0] == 8 * 58 + 2


def test_fid_is_measured_along_the_run_and_a_resumed_run_measures_the_same(here, pooled, monkeypatch):
    options = [
        "--fid-samples",
        "20",
        "--fid-every",
        "2",
        "--fid-features",
        pooled,
        *TINY,
        "--eval-every",
        "4",
    ]
    assert sd.main([*options, "--out", "whole"]) == 0
    rows = metrics("whole")
    assert [(row["step"], row["fid"] != "", row["val_mse"] != "") for row in rows] == [
        ("2", True, False),
        ("4", True, True),
        ("6", True, True),
    ]
    config = json.loads(Path("whole/config.json").read_text())
    assert config["features"].startswith("FD (pooled.ts), crc32 ") and config["data"].startswith(
        "9728 images"
    )
    with stopping_at(6):
        assert sd.main([*options, "--out", "broken"]) == 130
    measure, measured = sd.FrechetDistance.measure, []

    def watch(self, batches):
        batches = list(batches)
        measured.append(sum(map(len, batches)))
        return measure(self, batches)

    monkeypatch.setattr(sd.FrechetDistance, "measure", watch)
    assert sd.main(["--resume", "broken"]) == 0
    assert measured == [2, 20]  # a trial and the samples: the reference was kept
    whole, broken = ([row | {"seconds": ""} for row in metrics(run)] for run in ("whole", "broken"))
    assert whole == broken


def test_a_run_is_not_resumed_with_other_features(here, pooled, capsys):
    features = shutil.copy(pooled, here / "own.ts")
    with stopping_at(5):
        assert sd.main(["--fid-samples", "20", "--fid-features", str(features), *TINY]) == 130
    save_torchscript(ChannelMeans(), here / "own.ts")
    assert sd.main(["--resume", "runs/digits-uniform"]) == 2
    assert "cannot be used (3 features, and 16 in the reference)" in capsys.readouterr().err
    save_torchscript(nn.Sequential(Pooled(), nn.ReLU()), here / "own.ts")
    assert sd.main(["--resume", "runs/digits-uniform"]) == 2
    assert "its features were FD (own.ts), crc32" in capsys.readouterr().err
    (here / "own.ts").unlink()
    assert sd.main(["--resume", "runs/digits-uniform"]) == 2
    assert "own.ts cannot be used" in capsys.readouterr().err
    (here / "elsewhere").mkdir()
    moved = shutil.copy(pooled, here / "elsewhere" / "own.ts")
    assert sd.main(["--resume", "runs/digits-uniform", "--fid-features", str(moved)]) == 0


def test_a_trained_model_is_nearer_than_noise(here, pooled):
    options = ["--fid-samples", "64", "--fid-features", pooled, "--steps", "120", "--ema-decay", "0.9"]
    options += [
        "--batch-size",
        "32",
        "--width",
        "16",
        "--lr",
        "5e-3",
        "--warmup",
        "10",
        "--sampling-steps",
        "10",
    ]
    assert sd.main([*options, "--device", "cpu"]) == 0
    images, _ = sd.load_dataset("digits", "", 16)
    noise = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8)
    trained = float(metrics("runs/digits-uniform")[-1]["fid"])
    distance = sd.FrechetDistance(pooled, "cpu", images)
    assert 0 <= distance([images[:64]]) < trained < 0.5 * distance([noise]), trained


def test_a_measurement_that_fails_costs_the_figure_not_the_run(here, pooled, monkeypatch, capsys):
    measure = sd.FrechetDistance.__call__

    def fail_once(self, batches):
        monkeypatch.setattr(sd.FrechetDistance, "__call__", measure)
        raise OSError("No space left on device")

    monkeypatch.setattr(sd.FrechetDistance, "__call__", fail_once)
    assert sd.main(["--fid-samples", "20", "--fid-every", "3", "--fid-features", pooled, *TINY]) == 0
    assert [row["fid"] != "" for row in metrics("runs/digits-uniform")] == [False, True]
    assert "could not be measured at step 3: No space left on device" in capsys.readouterr().out


def test_without_a_network_fid_is_refused_before_training(here, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("cleanfid.features.build_feature_extractor", offline)
    assert sd.main(["--fid-samples", "10", *TINY]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and "Name or service not known" in err and "--fid-features FILE" in err
    assert not list(here.iterdir())


def test_a_scipy_that_breaks_clean_fid_is_named_before_training(here, capsys, monkeypatch, pooled):
    def sqrtm(matrix):  # as of SciPy 1.18
        return matrix

    monkeypatch.setattr("scipy.linalg.sqrtm", sqrtm)
    assert sd.main(["--fid-samples", "10", "--fid-features", pooled, *TINY]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and "pip install clean-fid 'scipy<1.18'" in err and not list(here.iterdir())


# 7 Report


@pytest.mark.parametrize(
    "target, expected",
    [(9, (100, 10)), (10, (100, 10)), (8, (200, 20)), (7, (250, 30)), (6, (300, 40)), (3, None)],
)
def test_reach_interpolates_linearly(target, expected):
    curve = [(100, 10, 9), (200, 20, 8), (300, 40, 6), (400, 50, 8), (500, 60, 4)]
    assert sd.reach(curve, target) == expected
    assert sd.reach([], 5) is None


def write_run(folder, fids, **changes):
    """A run's folder as train leaves it, with FID at steps 100, 200 ... and a second per 10 steps."""
    folder.mkdir()
    parser = sd.make_parser()
    config = vars(parser.parse_args([])) | {"data": "90 images", "features": "FD (x.ts), crc32 1"}
    config |= {"fid_samples": 10, "lr": 0.1, "steps": 100 * len(fids)} | changes
    (folder / "config.json").write_text(json.dumps(config))
    lines = [",".join(sd.METRICS), "25,50,2.5,0.5,0.1,0.9,,,"]
    for step, fid in enumerate(fids, 1):
        lines.append(f"{100 * step},{200 * step},{10 * step},0.5,0.1,0.9,{0.1 / step},{1 / step},{fid}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n300,6")  # a kill cut the last line
    return str(folder)


def table(text):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_the_report_compares_with_the_baseline_of_the_same_seed(here, capsys, without_matplotlib):
    runs = [write_run(here / f"base-{seed}", fids, seed=seed) for seed, fids in ((0, (9, 5)), (1, (8, 6)))]
    speed = {"strategy": "speed", "momentum_decay": True}
    runs += [write_run(here / f"fast-{seed}", (7, 3), seed=seed, **speed) for seed in (0, 1)]
    runs += [write_run(here / f"slow-{seed}", (90, 5.5), seed=seed, lr=0.5) for seed in (0, 1)]
    runs += [write_run(here / "never", (90, 80), seed=0, weighting="p2")]
    assert sd.main(["--report", *runs]) == 0
    out = capsys.readouterr().out
    base, fast, slow, never = table(out)
    assert "pip install matplotlib" in out and len(list(here.iterdir())) == len(runs)
    assert (base["strategy"], base["runs"], base["steps"]) == ("uniform", "2", "200")
    assert base["FD (x.ts) last"] == "5.5 (5..6)" == base["FD (x.ts) best"]
    assert base["speed-up (steps)"] == "1" and base["val_mse"] == "0.05" and base["val_vlb"] == "0.5"
    # seed 0 falls to 5 half-way between 100 and 200 steps, seed 1 to 6 a quarter of the way
    assert fast["strategy"] == "speed + momentum decay"
    assert fast["steps to baseline's last"] == "137.5 (125..150)"
    assert fast["seconds to it"] == "13.75 (12.5..15)"
    assert fast["speed-up (steps)"] == "1.467 (1.333..1.6)" == fast["speed-up (seconds)"]
    assert slow["strategy"] == "uniform, lr 0.5"
    assert slow["steps to baseline's last"] == "199.4 in 1 of 2"
    assert never["strategy"] == "uniform + p2 weights"
    assert never["steps to baseline's last"] == "-" == never["speed-up (seconds)"]


def test_a_baseline_that_rises_again_is_no_faster_than_itself(here, capsys, without_matplotlib):
    one, two = (write_run(here / name, (9, 4, 5), strategy=name) for name in ("uniform", "speed"))
    assert sd.main(["--report", one, two]) == 0
    for row in table(capsys.readouterr().out):
        assert row["steps to baseline's last"] == "180" and row["speed-up (steps)"] == "1"
        assert (row["FD (x.ts) last"], row["FD (x.ts) best"]) == ("5", "4")


def test_a_report_without_fid_has_dashes(here, capsys, without_matplotlib):
    run = write_run(here / "run", ("", ""))
    config = json.loads((here / "run" / "config.json").read_text())
    del config["features"]
    (here / "run" / "config.json").write_text(json.dumps(config))
    assert sd.main(["--report", run]) == 0
    assert table(capsys.readouterr().out)[0] == {
        "strategy": "uniform",
        "runs": "1",
        "steps": "200",
        "seconds": "20",
        "val_mse": "0.05",
        "val_vlb": "0.5",
        "FID last": "-",
        "FID best": "-",
        "steps to baseline's last": "-",
        "seconds to it": "-",
        "speed-up (steps)": "-",
        "speed-up (seconds)": "-",
    }


@pytest.mark.parametrize(
    "changes",
    [{"data": "80 images"}, {"features": "FID"}, {"fid_samples": 20}, {"sampling_steps": 7}, {"eta": 1.0}],
)
def test_a_report_refuses_runs_that_cannot_be_compared(here, capsys, changes):
    runs = [write_run(here / "one", (9, 5)), write_run(here / "two", (8, 6), **changes)]
    assert sd.main(["--report", *runs]) == 2
    captured = capsys.readouterr()
    assert next(iter(changes)) in captured.err and not captured.out


def test_the_report_draws_real_runs(here, pooled, capsys):
    pytest.importorskip("matplotlib")
    fid = ["--fid-samples", "10", "--fid-every", "2", "--fid-features", pooled, *TINY]
    for strategy in ("uniform", "adaptive"):
        assert sd.main(["--strategy", strategy, "--adaptive-every", "2", *fid]) == 0
    capsys.readouterr()
    with stopping_at(2):  # a run without any measurement, nor a checkpoint
        assert sd.main(["--strategy", "adaptive", "--out", "runs/begun", "--seed", "1", *fid]) == 130
    with open("runs/begun/metrics.csv", "a") as file:
        file.write("1,16,0.1,0.5,0.001,0.9,,,\n")
    for out in ("runs/report", "runs/report-2"):
        assert sd.main(["--report", "runs/digits-uniform", "runs/begun", "runs/digits-adaptive"]) == 0
        printed = capsys.readouterr().out
        assert f"methods.png and curves.png in {out}" in printed and len(table(printed)) == 3
        assert Image.open(Path(out, "curves.png")).size == (1200, 600)
        assert Image.open(Path(out, "methods.png")).size == (1200, 600)


def test_make_compare_runs_every_strategy_with_flags_that_exist():
    make = ["make", "--dry-run", "--always-make", "compare", "SEEDS=0 1", "RESULTS=nowhere"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    shown = subprocess.run(
        make, cwd=Path(sd.__file__).parent, env=environment, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in shown.stdout.replace("\\\n", "").splitlines()]
    runs = {}
    for line in lines:
        if "--out" in line:
            args = sd.make_parser().parse_args(line[2:])
            runs[args.out] = args.strategy, args.weighting, args.momentum_decay, args.seed, args.speed_lam
    assert len(runs) == len(set(runs.values())) == 24 and {run[0] for run in runs.values()} == set(
        sd.STRATEGIES
    )
    assert runs["nowhere/adaptive-min-snr-1"] == ("adaptive", "min-snr", False, 1, 0.6)
    (reported,) = (line[line.index("--report") + 1 :] for line in lines if "--report" in line)
    assert sorted(reported) == sorted(runs) and reported[:2] == ["nowhere/uniform-0", "nowhere/uniform-1"]


# 8 Command line


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    assert sd.main([*TINY, "--out", str(run)]) == 0
    return run


BAD_INPUT = {
    "--strategy fastest": "invalid choice",
    "--weighting heavy": "invalid choice",
    "--dataset imagenet": "invalid choice",
    "--schedule sigmoid": "invalid choice",
    "--stepps 3": "unrecognized",
    "--step 3": "unrecognized",
    "--timesteps 0": "[1, ",
    "--steps 0": "[1, ",
    "--steps 2.5": "not a whole number",
    "--lr nan": "must lie",
    "--lr inf": "must lie",
    "--lr fast": "not a number",
    "--speed-k 0.5": "[1, ",
    "--speed-tau 0": "[1, ",
    "--strategy speed --speed-tau 1001": "1..1000",
    "--speed-lam 0.4": "[0.5, 1]",
    "--speed-lam 1.1": "[0.5, 1]",
    "--beta1 1": "[0, 1)",
    "--beta1 -0.1": "[0, 1)",
    "--sampling-steps 1001": "1..1000",
    "--timesteps 20 --sampling-steps 21": "1..20",
    "--method ddpm --eta 0.5": "drop",
    "--strategy adaptive --adaptive-selected 101": "100 timesteps",
    "--strategy speed --timesteps 2": "at least 3",
    "--width 9": "even",
    "--image-size 18": "divide by 4",
    "--attention 5": "[8, 4]",
    "--batch-size 9729": "9728 training images",
    "--dataset folder": "--data-dir",
    "--dataset folder --data-dir nowhere": "nowhere",
    "--dataset folder --data-dir {empty}": "no images",
    "--dataset folder --data-dir {few}": "too few",
    "--dataset folder --data-dir {broken}": "broken.png",
    "--out {run}": "not empty",
    "--out {run}/config.json": "Not a directory",
    "--device cuda:99": "torch sees",
    "--device tpu": "cpu, cuda or cuda:N",
    "--device cuda:": "cpu, cuda or cuda:N",
    "--resume {empty}": "no such checkpoint",
    "--dataset folder --data-dir {exif}": "exif.png",
    "--resume {part}": "no checkpoint of this script",
    "--device cpu --amp fp16": "--amp fp16 needs a GPU",
    "--resume nowhere": "no such checkpoint",
    "--resume {run} --width 16": "drop --width",
    "--resume {run} --lr 0": "(0, 100]",
    "--resume {unlogged}": "metrics.csv",
    "--image-size 256": "up to 128",
    "--width 4096 --mults 64 64 --attention": "GB",
    "--out /proc/none": "--out",
    "--dataset folder --data-dir {empty}/x --fid-samples 9": "no such folder",
    "--resume {run}": "done all of its 6 steps",
    "--generate 4": "--checkpoint",
    "--checkpoint {run}/checkpoint.pt": "--generate",
    "--generate 4 --checkpoint nowhere.pt": "no such checkpoint",
    "--generate 4 --checkpoint {run}/config.json": "no checkpoint of this script",
    "--generate 4 --checkpoint {cut}": "cut off",
    "--generate 4 --checkpoint {other}": "no checkpoint of this script",
    "--generate 4 --checkpoint {altered}": "no checkpoint of this script",
    "--generate 4 --checkpoint {run}/checkpoint.pt --width 16": "drop --width",
    "--fid-samples 1": "[2, ",
    "--fid-every 5": "--fid-samples N",
    "--fid-features {other}": "--fid-samples N",
    "--fid-samples 9 --fid-features nowhere.ts": "no such file",
    "--fid-samples 9 --fid-features {other}": "other.pt cannot be used",
    "--fid-samples 9 --fid-features {constant}": "features [N, D]",
    "--report nowhere": "no run of this script",
    "--report {empty}": "no run of this script to report",
    "--report {run} {part}": "no run of this script",
    "--report {run} --seed 1": "drop --seed",
    "--report": "expected at least one argument",
    "--generate 4 --checkpoint {run}/checkpoint.pt --sampling-steps 51": "50 timesteps",
}


@pytest.fixture(scope="module")
def places(run_folder, tmp_path_factory):
    """Folders and files that are wrong in one way each."""
    root = tmp_path_factory.mktemp("places")
    folders = ("empty", "few", "broken", "exif", "part", "unlogged")
    for name in folders:
        (root / name).mkdir()
    for i in range(300):
        for name in ("broken", "exif"):
            Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(root / name / f"{i}.png")
        if i < 20:
            Image.new("RGB", (8, 8)).save(root / "few" / f"{i}.png")
    whole = (run_folder / "checkpoint.pt").read_bytes()
    (root / "broken" / "broken.png").write_bytes(whole[:200])
    Image.new("RGB", (8, 8)).save(root / "exif" / "exif.png", exif=b"Exif\0\0garbage!")
    torch.save(
        {k: v for k, v in checkpoint(run_folder).items() if k != "optimizer"}, root / "part" / "checkpoint.pt"
    )
    shutil.copy(run_folder / "checkpoint.pt", root / "unlogged")
    (root / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, root / "other.pt")
    altered = checkpoint(run_folder)
    altered["args"]["width"] = 16
    torch.save(altered, root / "altered.pt")
    files = {name: root / f"{name}.pt" for name in ("cut", "other", "altered")}
    files["constant"] = save_torchscript(Constant(), root / "constant.ts")
    return {name: root / name for name in folders} | files | {"run": run_folder}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_status_2_and_nothing_written(here, capsys, places, command):
    argv = [part.format(**places) for part in command.split()]
    assert sd.main(argv) == 2
    err = capsys.readouterr().err
    lines = err.replace("\r", "\n").strip().splitlines()
    assert lines[-1].startswith("speedup_diffusion.py: error: ") and BAD_INPUT[command] in lines[-1]
    assert len([line for line in lines if line.strip() and "reading images" not in line]) == 1
    assert not list(here.iterdir())


NUMBERS = ["", "many", "nan", "inf", "-inf", "-1", "1e30", "9" * 40]
CHOICES = ["", "x", "Uniform", "1"]
SWITCHES = ["", "yes"]
NAMES = ["", "x" * 5000, "nowhere", "no\nwhere"]
BAD_VALUES = {
    **dict.fromkeys(["--strategy", "--weighting", "--dataset", "--schedule", "--method"], CHOICES),
    **dict.fromkeys(["--amp", "--compile"], CHOICES),
    **dict.fromkeys(["--momentum-decay", "--flip", "--no-flip"], SWITCHES),
    **dict.fromkeys(["--speed-k", "--speed-tau", "--speed-lam"], NUMBERS),
    **dict.fromkeys(["--curriculum-mu", "--curriculum-sigma"], NUMBERS),
    **dict.fromkeys(["--adaptive-every", "--adaptive-selected", "--adaptive-queue"], NUMBERS),
    **dict.fromkeys(["--adaptive-probe", "--adaptive-lr", "--adaptive-entropy"], NUMBERS),
    **dict.fromkeys(["--min-snr-gamma", "--p2-k", "--p2-gamma"], NUMBERS),
    **dict.fromkeys(["--image-size", "--timesteps", "--width", "--mults", "--num-blocks"], NUMBERS),
    **dict.fromkeys(["--attention", "--dropout", "--patch"], NUMBERS),
    **dict.fromkeys(["--steps", "--batch-size", "--lr", "--beta1", "--warmup", "--ema-decay"], NUMBERS),
    **dict.fromkeys(["--grad-clip", "--seed", "--eval-every", "--checkpoint-every"], NUMBERS),
    **dict.fromkeys(["--sampling-steps", "--eta", "--fid-samples", "--fid-every", "--generate"], NUMBERS),
    **dict.fromkeys(["--fid-features", "--resume", "--checkpoint", "--report"], NAMES),
    "--data-dir": NAMES,
    "--device": ["", "tpu", "cuda:99", "cuda:x", "cpu:0", "x" * 5000],
    "--out": ["", "x" * 5000, "/proc/none", "/dev/null"],
}
COMPANIONS = {  # without which a good value would be refused, too
    "--data-dir": ["--dataset", "folder"],
    "--fid-every": ["--fid-samples", "9"],
    "--fid-features": ["--fid-samples", "9"],
    "--generate": ["--checkpoint", "{run}/checkpoint.pt"],
    "--checkpoint": ["--generate", "4"],
}
FLAGS = [flag for action in sd.make_parser()._actions for flag in action.option_strings]


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag not in ("-h", "--help")])
def test_every_flag_refuses_bad_values_at_once(here, capsys, places, flag):
    companions = [part.format(**places) for part in COMPANIONS.get(flag, [])]
    for value in BAD_VALUES[flag]:
        begin = time.perf_counter()
        assert sd.main([f"{flag}={value}", *companions]) == 2, value
        assert time.perf_counter() - begin < 5
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("speedup_diffusion.py: error: "), (value, lines)
        assert not list(here.iterdir()), value


def test_a_wrong_flag_is_known_within_five_seconds_of_the_start(here):
    seconds = []
    for _ in range(2):  # the first one may have to read all of torch from the disk
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(Path(sd.__file__)), "--lr=nan"], capture_output=True, check=False
        )
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and not done.stdout
    assert min(seconds) < 5


class Malicious:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return open, ("created", "w")


def test_a_checkpoint_is_never_unpickled_as_code(here, run_folder, capsys):
    state = checkpoint(run_folder)
    Path("run").mkdir()
    shutil.copy(run_folder / "metrics.csv", "run")
    whole, parts = (
        Malicious(),
        [state | {name: Malicious()} for name in ("model", "args", "optimizer", "more")],
    )
    torch.save(whole, "0.pt")
    torch.save(whole, "1.pt", _use_new_zipfile_serialization=False)
    Path("2.pt").write_bytes(pickle.dumps(whole))
    for number, part in enumerate(parts, 3):
        torch.save(part, f"{number}.pt")
    for number in range(3 + len(parts)):
        shutil.copy(f"{number}.pt", "run/checkpoint.pt")
        for argv in (["--resume", "run"], ["--generate", "1", "--checkpoint", f"{number}.pt"]):
            assert sd.main(argv) == 2
            assert "no checkpoint of this script" in capsys.readouterr().err
    assert not Path("created").exists()
    torch.load("0.pt", weights_only=False).close()
    assert Path("created").exists()  # it would have


ALTERED = {
    "num_blocks": lambda state: state["args"].update(num_blocks=10**9),
    "timesteps": lambda state: state["args"].update(timesteps=10**12),
    "strategy": lambda state: state["args"].update(strategy="mine"),
    "optimizer": lambda state: state.update(optimizer={}),
    "drawn": lambda state: state.update(drawn=torch.zeros(3)),
    "sampler": lambda state: state["args"].update(strategy="adaptive"),
    "model": lambda state: state["model"].popitem(),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_checkpoint_is_refused_in_one_line(here, capsys, name):
    with stopping_at(5):
        assert sd.main([*TINY, "--out", "run"]) == 130
    state = checkpoint("run")
    ALTERED[name](state)
    torch.save(state, "run/checkpoint.pt")
    capsys.readouterr()
    assert sd.main(["--resume", "run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [row["step"] for row in metrics("run")] == ["3"]


def test_too_little_memory_is_one_line(here, capsys, monkeypatch):
    def full(self):
        torch.empty(10**15)

    monkeypatch.setattr(sd.Training, "train_step", full)
    assert sd.main([*TINY, "--out", "run"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("lower --batch-size, --width or --image-size")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(here, capsys):
    assert sd.main(["--device", "cuda"]) == 2
    assert "torch sees 0 GPUs" in capsys.readouterr().err


def test_a_failed_download_says_what_to_do(here, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading train-images\nsecond line")

    monkeypatch.setattr("torchvision.datasets.MNIST.__init__", offline)
    assert sd.main(["--dataset", "mnist"]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and "Error downloading train-images" in err and "--dataset folder" in err


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        sd.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for action in sd.make_parser()._actions:
        required = action.dest in ("help", "out", "resume", "generate", "checkpoint", "report")
        required |= action.dest.startswith("fid_")
        assert action.option_strings[0] in text
        assert required or "(default: " in action.help, action.dest


def test_the_script_runs_as_a_script_and_stops_on_ctrl_c(here):
    script = [sys.executable, str(Path(sd.__file__)), *TINY, "--steps", "100000"]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = here / "runs" / "digits-uniform"
    deadline = time.monotonic() + 60
    try:
        while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1].endswith(f"step {checkpoint(run)['step']}: --resume runs/digits-uniform")


# Several processes: torchrun starts this file, and what follows looks at what its two ranks wrote

SHARED = {
    "uniform": ["--dropout", "0.2", "--flip"],
    "logit-normal": ["--weighting", "min-snr"],
    "speed": [],
    "curriculum": ["--momentum-decay"],
    "adaptive": ["--adaptive-every", "2", "--weighting", "p2"],
}
BROKEN = [*TINY, "--strategy", "adaptive", "--adaptive-every", "2", "--momentum-decay", "--steps", "8"]


def start_torchrun(*argv):
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", *launch, *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def one_of_two(folder):
    """What each rank does: five steps of every strategy, and a run that is stopped by a signal and resumed."""
    os.chdir(folder)
    sd.join_processes()  # once for all runs: torch.distributed does not join twice
    sd.join_processes = torch.distributed.destroy_process_group = lambda: None
    sd.render_digits = functools.cache(sd.render_digits)
    record, build, clip = {}, sd.Training.__init__, nn.utils.clip_grad_norm_
    q_sample = sd.GaussianDiffusion.q_sample

    def remember_run(self, *args):
        build(self, *args)
        record["run"] = self

    def remember_batch(self, x0, t, noise):
        record.setdefault("batch", (x0, t, noise))
        return q_sample(self, x0, t, noise)

    def remember_gradient(parameters, limit):
        parameters = list(parameters)
        if len(parameters) == len(list(record["run"].model.parameters())):  # and not the policy's
            record.setdefault("gradient", [p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd.Training, "__init__", remember_run)
        patch.setattr(sd.GaussianDiffusion, "q_sample", remember_batch)
        patch.setattr(nn.utils, "clip_grad_norm_", remember_gradient)
        for strategy, options in SHARED.items():
            record.clear()
            options = [*TINY, "--strategy", strategy, *options, "--steps", "5"]
            with infinite_loss_at({3} if (strategy, sd.RANK) == ("speed", 1) else {}):
                assert sd.main([*options, "--out", strategy]) == 0
            state = record.pop("run").state_dict()
            del state["args"], state["seconds"]
            torch.save(record | {"state": state}, f"{strategy}-{sd.RANK}.pt")
    assert sd.main([*BROKEN, "--out", "unbroken"]) == 0
    with signalled_at({5} if sd.RANK else {}):  # rank 1 alone hears it
        assert sd.main([*BROKEN, "--out", "stopped"]) == 143
    if sd.RANK == 0:
        shutil.copytree("stopped", "as-one")
    assert sd.main(["--resume", "stopped"]) == 0


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    out, err = (process := start_torchrun(__file__, folder)).communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("on 2 x cpu") == len(SHARED) + 3  # rank 0 alone prints
    return folder


@pytest.mark.parametrize("strategy", sd.STRATEGIES)
def test_after_five_steps_two_ranks_hold_the_same(two_ranks, strategy):
    one, two = (torch.load(two_ranks / f"{strategy}-{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in (one, two):
        part["state"]["losses"].nan_to_num_(-1)  # or it would differ from itself
    assert_same_tensors(one["state"], two["state"])
    assert one["state"]["step"] == 5 and one["state"]["drawn"].sum() == 5 * 16
    assert one["state"]["skipped"] == (strategy == "speed")  # a loss of rank 1 alone was not finite
    assert_same_tensors(dict(enumerate(one["gradient"])), dict(enumerate(two["gradient"])))
    if strategy == "adaptive":
        assert one["state"]["sampler"]["filled"] == 3


@pytest.mark.parametrize("strategy", sd.STRATEGIES)
def test_two_ranks_have_the_gradient_of_one_process_with_both_batches(two_ranks, strategy):
    args = settings(*TINY, "--strategy", strategy, *SHARED[strategy], "--steps", "5", "--dropout", "0")
    run = sd.Training(args, sd.load_dataset("digits", "data", 16)[0])
    parts = [torch.load(two_ranks / f"{strategy}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    x0, t, noise = (torch.cat(both) for both in zip(*(part["batch"] for part in parts)))
    # Shares of one batch, in its order, with draws of their own.
    assert len(t) == 16 and not torch.equal(t[:8], t[8:]) and not torch.allclose(noise[:8], noise[8:])
    if not args.flip:
        assert torch.equal(x0, run.batch())
    eps = run.model(run.diffusion.q_sample(x0, t, noise), t)
    weights = sd.normalize_weights(run.raw_weights, run.sampler.probs)
    (weights[t] * (eps - noise).square().flatten(1).mean(1)).mean().backward()
    for p, gradient in zip(run.model.parameters(), parts[0]["gradient"]):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_two_ranks_resume_as_two_and_as_one(two_ranks, monkeypatch):
    monkeypatch.chdir(two_ranks)
    assert_same_run("unbroken", "stopped")
    assert checkpoint("as-one")["step"] == 5
    assert sd.main(["--resume", "as-one"]) == 0
    assert [row["step"] for row in metrics("as-one")] == ["3", "6", "8"]
    assert checkpoint("as-one")["drawn"].sum() == 8 * 16


def test_a_rank_that_dies_ends_the_run(here):
    process = start_torchrun(sd.__file__, *TINY, "--steps", "100000", "--out", "run")
    deadline = time.monotonic() + 60
    while not (Path("run/metrics.csv").exists() and metrics("run")) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    # Rank 0 finds the other gone, or is told to stop by torchrun, whichever comes first.
    assert process.returncode == 1
    assert "rank 0 lost another process" in err or "stopped with the checkpoint of step" in err
    assert checkpoint("run")["step"] >= 3


def test_what_torchrun_cannot_do_is_refused_once(here):
    process = start_torchrun(sd.__file__, "--batch-size", "15", "--device", "cpu")
    _, err = process.communicate(timeout=60)
    message = "speedup_diffusion.py: error: --batch-size 15 must divide by 2, the processes\n"
    assert process.returncode == 1 and err.count("speedup_diffusion.py") - err.count(sd.__file__) == 1
    assert message in err and not list(here.iterdir())


@pytest.mark.parametrize(
    "command, message",
    [
        (["--report", "run"], "torchrun is for training: start this one without"),
        (["--generate", "1", "--checkpoint", "x.pt"], "torchrun is for training: start this one without"),
        (["--device", "cuda:0"], "--device cuda:0: torchrun gives each process its own GPU; use cuda"),
    ],
)
def test_one_process_does_what_is_not_training(here, capsys, monkeypatch, command, message):
    monkeypatch.setattr(sd, "PROCESSES", 2)
    monkeypatch.setattr(sd, "LOCAL_PROCESSES", 2)
    assert sd.main(command) == 2
    assert capsys.readouterr().err == f"speedup_diffusion.py: error: {message}\n"


# Reliability, minutes long


def start(*argv, **options):
    """This script as a process of its own with one thread, which hears Ctrl-C."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(sd.__file__)), *argv]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, **options)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(here, capsys):
    """kill -9 at random moments, while checkpoints are written, too; then the run is the one never killed."""
    options = [*TINY, "--width", "32", "--strategy", "adaptive", "--momentum-decay", "--adaptive-every", "5"]
    options += ["--steps", "300", "--eval-every", "50", "--checkpoint-every", "1"]
    assert start(*options, "--out", "whole").wait() == 0
    rng, torn, before = random.Random(0), 0, -1
    process = start(*options, "--out", "killed")
    for _ in range(20):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:  # until it goes on
            with contextlib.suppress(OSError):
                if checkpoint("killed")["step"] > before:
                    break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        assert process.poll() is None
        process.kill()
        process.wait()
        torn += Path("killed/new-checkpoint.pt").exists()
        state = sd.load_checkpoint(Path("killed/checkpoint.pt"))
        assert state["step"] > before
        before = state["step"]
        lines = sd.complete_lines(Path("killed/metrics.csv"))
        steps = [int(row["step"]) for row in csv.DictReader(lines)]
        assert steps == sorted(set(steps)) and all(line.count(",") == 8 for line in lines)
        process = start("--resume", "killed")
    assert process.wait() == 0 and torn
    with capsys.disabled():
        print(f"\n20 kills up to step {before}, {torn} of them while a checkpoint was written")
    assert_same_run("whole", "killed")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")
def test_a_long_run_keeps_its_memory_and_its_pace(here, capsys):
    """20,000 steps of a tiny model with the adaptive sampler, which has the most to keep."""
    options = [*TINY, "--strategy", "adaptive", "--steps", "20000", "--eval-every", "2000", "--out", "run"]
    process, memory = start(*options, stdout=subprocess.DEVNULL), []
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            memory.append((metrics("run")[-1]["step"], pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
        time.sleep(1)
    assert process.returncode == 0
    early, late = (
        [mib for step, mib in memory if first <= int(step) < first + 2500] for first in (2500, 17_500)
    )
    growth = statistics.median(late) / statistics.median(early) - 1
    rows = metrics("run")
    seconds = np.diff([float(row["seconds"]) for row in rows])
    quarters = np.array_split(seconds, 4)
    pace = np.median(quarters[3]) / np.median(quarters[1]) - 1
    sampler = checkpoint("run")["sampler"]
    weights = [*sampler["policy"].values(), sampler["probs"], sampler["queue"]]
    with capsys.disabled():
        print(f"\n20,000 steps: memory {growth:+.2%}, time of a step {pace:+.1%}, ", end="")
        print(f"{1e3 * np.median(seconds) / 25:.1f} ms, smallest probability {sampler['probs'].min():.2g}")
    assert abs(growth) < 0.02 and np.quantile(quarters[3], 0.1) < 1.15 * np.median(quarters[1])
    assert all(weight.isfinite().all() for weight in weights)
    assert sampler["probs"].min() >= 0.005 / 50


@pytest.mark.slow
def test_ten_processes_started_together_get_ten_folders(here):
    processes = [start(*TINY, "--steps", "2") for _ in range(10)]
    assert [process.wait() for process in processes] == [0] * 10
    runs = list(Path("runs").iterdir())
    assert len(runs) == 10 and all(checkpoint(run)["step"] == 2 for run in runs)


# The default run, minutes long


@functools.cache
def digit_classifier():
    """A small convolutional network that reads at least 97% of held-out rendered digits."""
    torch.manual_seed(0)
    images, labels = sd.render_digits(10_240, 16, 1)
    x = sd.to_float(images)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3)]
    net = nn.Sequential(*layers, nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(5):
        for batch in torch.randperm(9_728).split(128):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), labels[batch]).backward()
            optimizer.step()
    net.eval()
    accuracy = (net(x[9_728:]).argmax(1) == labels[9_728:]).float().mean().item()
    assert accuracy >= 0.97
    return net


class DigitFeatures(nn.Module):
    """float [N, 3, H, W] in 0..255 -> [N, 64]: how strongly each stroke that digit_classifier knows occurs."""

    def __init__(self):
        super().__init__()
        self.net = digit_classifier()[:5]

    def forward(self, images):
        return self.net(images.mean(1, keepdim=True) / 127.5 - 1).amax((2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("options", [*(["--strategy", s] for s in sd.STRATEGIES), ["--momentum-decay"]])
def test_the_default_run_draws_legible_digits_in_five_minutes(here, capsys, options):
    script = [sys.executable, str(Path(sd.__file__)), "--device", "cpu"]
    begin = time.perf_counter()
    subprocess.run([*script, *options, "--out", "run"], check=True)
    seconds = time.perf_counter() - begin
    subprocess.run([*script, "--generate", "256", "--checkpoint", "run/checkpoint.pt"], check=True)
    paths = sorted(Path("run/generated").glob("0*.png"))
    samples = torch.stack([to_tensor(Image.open(path).convert("L")) for path in paths]) * 2 - 1
    confidence = digit_classifier()(samples).softmax(1).amax(1)
    legible = (confidence > 0.9).float().mean().item()
    with capsys.disabled():  # the README's table
        print(f"\n{' '.join(options)}: {seconds:.0f} s, {legible:.1%} legible, {metrics('run')[-1]}")
    assert len(samples) == 256 and seconds < 300 and legible >= 0.8


# Speed: `make bench` prints one table. Nothing is asserted of seconds, which vary from machine to machine.

METHOD_COSTS = {  # name: flags, and at most how much longer a step than uniform's it should take
    "uniform": ([], 1.0),
    "uniform again": ([], 1.0),
    "logit-normal": (["--strategy", "logit-normal"], 1.01),
    "speed": (["--strategy", "speed"], 1.01),
    "curriculum": (["--strategy", "curriculum"], 1.01),
    "momentum decay": (["--momentum-decay"], 1.01),
    "adaptive": (["--strategy", "adaptive"], 1.08),
    "adaptive, probing all T": (["--strategy", "adaptive", "--adaptive-probe", "1000"], None),
}
# An update of the policy is rare: its cost is what a step with one takes longer than a step without.
ADAPTIVE_EVERY, BLOCK = {"never": 10**8, "each block": 4}, 4
SMALL_MNIST = ["--dataset", "mnist", "--width", "32", "--num-blocks", "1"]  # ten times the digits' operations
SETUPS = {  # name: flags, rounds, methods
    "cpu": {
        "digits, batch 64": (["--batch-size", "64"], 50, list(METHOD_COSTS)),
        "digits, batch 256": (["--batch-size", "256"], 24, list(METHOD_COSTS)),
        "mnist, width 32, batch 64": ([*SMALL_MNIST, "--batch-size", "64"], 20, ["uniform", "adaptive"]),
        "mnist, width 32, batch 256": ([*SMALL_MNIST, "--batch-size", "256"], 8, ["uniform", "adaptive"]),
    },
    "cuda": {
        f"cifar10, batch {batch}, {amp}, compile {compiled}": (
            ["--dataset", "cifar10", "--batch-size", batch, "--amp", amp, "--compile", compiled],
            30,
            list(METHOD_COSTS) if (amp, compiled) == ("bf16", "off") else ["uniform", "adaptive"],
        )
        for compiled in ("off", "on")
        for amp in ("bf16", "fp16")
        for batch in ("64", "256")
    },
}


BENCH = SETUPS["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.bench
@pytest.mark.parametrize("setup", BENCH.items(), ids=list(BENCH))
def test_bench(setup, capsys):
    """Interleaved blocks of steps, in random order."""
    name, (flags, rounds, methods) = setup
    flags = ["--device", "cuda" if torch.cuda.is_available() else "cpu", *flags]
    torch.compiler.reset()
    args = settings(*flags)
    images = random_images(2_000, 3 if args.dataset == "cifar10" else 1)
    run = sd.Training(args, F.interpolate(images.float(), args.image_size).byte())
    built = {}  # one model for all: where its weights lie in memory alone can make 5%
    for method in methods:
        for every, steps in ADAPTIVE_EVERY.items() if "adaptive" in method else [("never", 1)]:
            options = settings(*flags, *METHOD_COSTS[method][0], "--adaptive-every", str(steps))
            built[method, every] = (
                options,
                *sd.build_strategy(options, run.diffusion.alphas_cumprod, run.images.shape[1]),
            )
    seconds = {key: [] for key in built}
    for number in range(rounds + 1):
        for key in random.sample(list(built), len(built)):
            run.args, run.sampler, run.raw_weights = built[key]
            run.step = number * BLOCK
            if args.device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(BLOCK):
                run.train_step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round compiles and warms up
                seconds[key].append((time.perf_counter() - begin) / BLOCK)

    base = seconds["uniform", "never"]

    def cost(method, part):
        """Of uniform's time in the same round, the median: the pace of a machine changes from minute to minute."""
        never, always = (
            statistics.median(own / uniform for own, uniform in zip(seconds[method, every][part], base[part]))
            for every in (ADAPTIVE_EVERY if "adaptive" in method else ["never", "never"])
        )
        return never + (always - never) * BLOCK / 40  # of 40 steps one updates the policy

    half = rounds // 2
    with capsys.disabled():
        if setup == next(iter(BENCH.items())):
            print(
                "\n| setup | method | images/s | of uniform's time | in each half | goal |\n"
                + "|---" * 6
                + "|"
            )
        for method in methods:
            ratio, *halves = (cost(method, part) for part in (slice(None), slice(half), slice(half, None)))
            speed, goal = args.batch_size / statistics.median(base) / ratio, METHOD_COSTS[method][1] or "-"
            print(
                f"| {name} | {method} | {speed:.0f} | {ratio:.3f} | {halves[0]:.3f}, {halves[1]:.3f} | {goal} |"
            )
        if args.device == "cuda":
            print(sd.performance(run, args.batch_size / statistics.median(base)))


if __name__ == "__main__":
    one_of_two(sys.argv[1])
