# SPDX-License-Identifier: MIT
"""What speedup_diffusion.py promises, in its own order. `make test` runs all but the slow tests and the bench."""

import copy
import csv
import functools
import inspect
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from cleanfid import fid
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence

import speedup_diffusion as sd

sd.render_digits = functools.cache(sd.render_digits)
sd.digit_features = functools.cache(sd.digit_features)
TINY = "--device cpu --width 8 --batch-size 16 --steps 6 --eval-every 3 --timesteps 50 --fid-samples 0"
TINY += " --sampling-steps 4"
ADAPTING = f"{TINY} --momentum-decay --steps 25 --eval-every 10 --strategy"
SCRIPT = [sys.executable, sd.__file__]
SOURCE = Path(sd.__file__).read_text()
SECTION_2 = SOURCE[SOURCE.index("\n# 2 Acc") : SOURCE.index("\n# 3 U-Net")]
README = Path(sd.__file__).with_name("README.md").read_text(encoding="utf-8")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
AB = sd.GaussianDiffusion().alphas_cumprod
ON_CUDA = [pytest.param(f"--device cuda --amp {amp}", marks=on_cuda) for amp in ("off", "bf16", "fp16")]
each_schedule = pytest.mark.parametrize("schedule", ["linear", "quad", "cosine"])
assert_identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def main(flags):
    try:
        return sd.main(flags.split())
    except SystemExit as error:  # argparse's
        return error.code


def training(flags, images=64):
    args, _ = sd.parse_args(f"{TINY} {flags}".split())
    return sd.Training(args, sd.render_digits(images)[0], torch.device("cpu"))


def metrics(run):
    with open(f"{run}/metrics.csv") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]  # the seconds vary


def checkpoint(run):
    return torch.load(f"{run}/checkpoint.pt", map_location="cpu", weights_only=True)


# 1 Diffusion


@pytest.mark.parametrize("T", [2, 100, 1000])
@each_schedule
def test_schedules_and_q_sample_and_single_steps_have_their_closed_forms(schedule, T):
    ramp = np.linspace(0, 1, T)
    angle = (np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2
    betas = {
        "linear": (1e-4 + 0.0199 * ramp) * 1000 / T,
        "quad": (0.01 + (0.02**0.5 - 0.01) * ramp) ** 2 * 1000 / T,
        "cosine": 1 - (np.cos(angle[1:]) / np.cos(angle[:-1])) ** 2,
    }
    beta = torch.tensor(betas[schedule]).clamp(max=0.999).view(-1, 1, 1, 1)
    ab = (1 - beta).cumprod(0)
    ab_prev = ab / (1 - beta)
    diffusion = sd.GaussianDiffusion(schedule, T)
    assert np.allclose(diffusion.betas, beta.flatten())
    assert np.allclose(diffusion.alphas_cumprod, ab.flatten(), atol=0)
    t = torch.arange(T)
    x0, noise, z = torch.randn(3, T, 1, 1, 1)
    x_t = diffusion.q_sample(x0, t, noise)
    assert np.allclose(x_t, ab.sqrt() * x0 + (1 - ab).sqrt() * noise, atol=1e-5)
    mean = (ab_prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab_prev) * x_t) / (1 - ab)
    variance = beta * (1 - ab_prev) / (1 - ab)
    posterior = Normal(mean, variance.clamp(min=1e-18).sqrt())
    step = diffusion.ddpm_step(x_t, t, noise, z, clip=False)
    assert np.allclose(step, mean + posterior.stddev * z, atol=1e-3)
    # The coefficient of the epsilon-MSE is that of the full Gaussian KL, in bits per dimension.
    steps = [diffusion.ddpm_step(x_t, t, noise + error, 0 * z, clip=False) for error in (0, 1)]
    right, wrong = (kl_divergence(posterior, Normal(step, beta.sqrt())) for step in steps)
    assert np.allclose(diffusion.vlb_coefficients, (wrong - right).flatten() / math.log(2), rtol=1e-2)


@pytest.mark.parametrize("t", [999, 500, 0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_equal_those_of_diffusers(t, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02, "linear")
    scheduler.set_timesteps(50)
    x_t, eps, noise = torch.randn(3, 1, 1, 8, 8)
    expected = scheduler.step(eps, t, x_t, eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
    then = torch.tensor([max(t - 20, -1)])
    found = sd.GaussianDiffusion().ddim_step(x_t, torch.tensor([t]), then, eps, eta, noise)
    assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@each_schedule
def test_sampling_with_the_optimal_epsilon_returns_the_gaussian(schedule, method):
    diffusion = sd.GaussianDiffusion(schedule)

    def optimal(x_t, t):
        """E[eps | x_t] of data N(0.2, 0.15^2)."""
        ab = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (x_t - ab.sqrt() * 0.2) / (ab * 0.15**2 + 1 - ab)

    x = diffusion.sample(optimal, (20_000, 1, 1, 1), method, steps=200)
    assert x.mean().item() == pytest.approx(0.2, abs=0.005)
    assert x.std().item() == pytest.approx(0.15, rel=0.04)


# 2 Accelerations


def test_samplers_draw_as_their_probs_say_and_weights_average_one_under_them():
    ab = sd.GaussianDiffusion("linear", 20).alphas_cumprod
    adaptive = sd.AdaptiveSampler(ab, 1)
    adaptive.policy = lambda images: torch.tensor([[-20.0, -9.0], [30.0, 2.0]]).repeat(30, 1)
    distribution = scipy.special.ndtr(scipy.special.logit(np.linspace(0, 1, 21)))
    assert np.allclose(sd.LogitNormalSampler(20).probs, np.diff(distribution))
    samplers = [sd.UniformSampler(20), sd.LogitNormalSampler(20), sd.CurriculumSampler(20, 9)]
    samplers += [sd.SpeeDSampler(ab), sd.SpeeDSampler(ab, mirror=9), adaptive]
    for sampler in samplers:
        t = torch.cat([sampler.sample(torch.zeros(60, 1, 8, 8), step=7) for _ in range(400)])
        probs = sampler.probs.double()
        assert scipy.stats.chisquare(t.bincount(), len(t) * probs / probs.sum()).pvalue > 1e-4
        weights = sd.normalize_weights(ab.double(), probs)
        assert (probs @ weights).item() == pytest.approx(1)
        assert np.allclose(weights / weights[0], ab / ab[0])


@pytest.mark.parametrize("schedule, tau, mirror", [("linear", 700, 642), ("quad", 875, 829), ("cosine", 946, 959)])
def test_speed_draws_five_times_as_often_before_tau(schedule, tau, mirror):
    ab = sd.GaussianDiffusion(schedule).alphas_cumprod
    expected = torch.tensor([5.0] * tau + [1.0] * (1000 - tau))
    assert torch.allclose(sd.SpeeDSampler(ab).probs, expected / expected.sum())
    assert sd.SpeeDSampler.mirror_step(ab) == mirror


def test_speeds_authors_form_mirrors_half_of_what_is_drawn():
    probs = sd.SpeeDSampler(AB, mirror=642).probs
    assert np.allclose(1000 * probs[[1, 57, 58, 358, 643, 700]], [1.974, 1.974, 1.447, 1.316, 0.658, 0.132], atol=5e-4)


def test_curriculum_goes_from_uniform_to_its_gaussian():
    sampler = sd.CurriculumSampler(1000, total_steps=400)
    bell = scipy.stats.norm.pdf(range(1000), 300, 500)
    for step in (0, 100, 500):
        gamma = min(1, step / 400)
        sampler.sample(torch.zeros(1), step)
        assert np.allclose(sampler.probs, (1 - gamma) / 1000 + gamma * bell / bell.sum())


@pytest.mark.parametrize("a, b, margin", [(0.05, 0.3, 0.0), (40.0, 25.0, 0.1)])
def test_the_policys_distribution_is_a_beta_with_a_margin_and_a_floor(a, b, margin):
    sampler = sd.AdaptiveSampler(torch.linspace(0.99, 0.01, 5), 1, floor=0.1, margin=margin)
    sampler.policy = lambda images: torch.tensor([[a, b]]).expm1().log()
    density = scipy.stats.beta.pdf(margin + (1 - 2 * margin) * np.linspace(0.1, 0.9, 5), a, b)
    found = sampler.distribution(torch.zeros(1)).probs
    assert np.allclose(found, 0.9 * density / density.sum() + 0.1 / 5, rtol=2e-3)


def test_the_policy_gradient_is_that_of_the_closed_form():
    sampler = sd.AdaptiveSampler(torch.linspace(0.99, 0.01, 50), 1, entropy=0.3, floor=0.2)
    bias = torch.tensor([2.0, -1.0], requires_grad=True)  # far from uniform, where the entropy counts
    sampler.policy[-1].bias.data = bias.detach().clone()
    t = sampler.sample(torch.zeros(4, 1, 8, 8), 0)
    deltas = torch.randn(2, 4) * torch.tensor([[1.0], [9.0]])  # each selected timestep counts alike
    sampler.update_policy(deltas)
    found = sampler.policy[-1].bias.grad  # clipped with all the rest to norm 1
    a, b = torch.log1p(bias.exp())
    u = (torch.arange(50) + 0.5) / 50
    density = u ** (a - 1) * (1 - u) ** (b - 1)
    density = 0.8 * density / density.mean() + 0.2  # over (0, 1): its mean is 1
    entropy = -(density * density.log()).mean()
    advantage = torch.tensor(scipy.stats.zscore(scipy.stats.zscore(deltas, 1).sum(0)))
    objective = (advantage * density[t].log()).mean() + 0.3 * entropy
    (-objective).backward()
    assert np.allclose(found / found.norm(), bias.grad / bias.grad.norm(), atol=1e-3)


class Scaled(nn.Dropout):
    def forward(self, x_t, t):
        assert not self.training
        return self.p * x_t


def test_adaptive_rewards_each_image_by_the_fall_of_the_loss_on_the_same_noise(monkeypatch):
    ab = torch.linspace(0.99, 0.01, 100)
    weights = torch.linspace(1, 2, 100)
    sampler = sd.AdaptiveSampler(ab, 1, weights, every=4, selected=2)
    sampler.update_policy = mock.Mock()
    selected = sampler.selected
    levels = torch.linspace(-1, 1, 6)  # an image for each
    noise_levels = iter((1, 2))  # a draw for each
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, next(noise_levels)))
    for step in range(5):
        sampler.sample(levels.view(6, 1, 1, 1).expand(6, 1, 8, 8), step)
        sampler.before_update(Scaled(0.0), step)
        sampler.after_update(Scaled(0.1))
    first, second = sampler.update_policy.call_args_list
    x_t = ab.sqrt()[:, None] * levels + (1 - ab).sqrt()[:, None]
    fall = weights[:, None] * (1 - (1 - 0.1 * x_t) ** 2)
    assert torch.allclose(first.args[0], fall[selected], atol=1e-5)
    assert torch.isclose(sampler.queue[0], fall[sampler.grid].T, rtol=1e-4).all(1).sum() == 1  # one image


@each_schedule
def test_the_bounds_reward_leaves_out_the_timestep_whose_beta_is_capped(schedule):
    diffusion = sd.GaussianDiffusion(schedule)
    expected = diffusion.vlb_coefficients * (diffusion.betas < 0.999)
    found = sd.AdaptiveSampler(diffusion.alphas_cumprod, 1).reward_weights
    assert torch.allclose(found, expected, rtol=1e-2, atol=0)


def test_geometric_bins_cover_every_timestep_once_and_widen():
    middles, widths = sd.geometric_bins(1000, 100)
    ends = widths.cumsum(0)
    assert ends[-1] == 1000
    assert ((ends - widths <= middles) & (middles < ends)).all()
    assert widths[-1] > 4 * widths[0]


def test_adaptive_selects_of_each_third_the_column_that_correlates_most_with_the_weighted_sum():
    deltas = torch.randn(20, 12) * torch.rand(12)
    deltas[:, 11] = 0.25  # a constant predicts nothing
    widths = torch.randint(1, 5, (12,))
    total = deltas @ widths.float()
    with np.errstate(invalid="ignore"):
        r2 = np.nan_to_num(np.corrcoef(deltas.T, total)[-1, :-1] ** 2)
    expected = torch.tensor(r2).view(3, 4).argmax(1) + torch.tensor([0, 4, 8])
    assert torch.equal(sd.AdaptiveSampler.most_predictive(deltas, widths, 3), expected)


@each_schedule
def test_weights_have_their_closed_forms(schedule):
    ab = sd.GaussianDiffusion(schedule).alphas_cumprod.double()
    slope = np.gradient(1 - ab)
    expected = np.interp(slope, [slope.min(), slope.max()], [0.2, 0.8])
    assert np.allclose(sd.change_aware_weights(ab, 0.8), expected)
    expected[700:] = 1
    assert np.allclose(sd.change_aware_weights(ab, 0.8, tau=700), expected)
    snr = ab / (1 - ab)
    assert np.allclose(sd.min_snr_weights(ab), snr.clamp(max=5) / snr)


def test_momentum_decay_keeps_lr_times_one_minus_beta1():
    for left in (1.0, 0.7, 0.0):
        beta1, lr_scale = sd.momentum_decay(1 - left, 0.8)
        assert beta1 == pytest.approx(0.8 * left / (0.2 + 0.8 * left))  # from 0.8 to 0
        assert lr_scale * (1 - beta1) == pytest.approx(0.2)


@pytest.mark.parametrize("name", re.findall(r"\n(?:class|def) (\w+)", SECTION_2))
def test_each_acceleration_runs_where_only_its_source_is_pasted(name):
    """With math, torch, nn, F, and the pieces that the first line of its docstring names in backticks."""
    given = {"timesteps": 100, "total_steps": 100, "in_channels": 1, "progress": 0.5, "count": 9}
    for argument in ("alphas_cumprod", "weights", "probs", "tensor"):
        given[argument] = torch.linspace(0.99, 0.01, 100)
    piece = getattr(sd, name)
    elsewhere = {"math": math, "torch": torch, "nn": nn, "F": nn.functional}
    for needed in (*re.findall("`(.+?)`", piece.__doc__.splitlines()[0]), name):
        exec(inspect.getsource(getattr(sd, needed)), elsewhere)
    arguments = given.keys() & inspect.signature(piece).parameters
    made = elsewhere[name](**{argument: given[argument] for argument in arguments})
    if isinstance(piece, type):
        made.sample(torch.zeros(9, 1, 8, 8), 0)


# 3 U-Net


@pytest.mark.parametrize("channels, size, patch", [(1, 16, 2), (3, 28, 1)])
def test_unet_keeps_the_shape_depends_on_t_and_learns_everywhere(channels, size, patch):
    model = sd.UNet(channels, 6, (1, 2, 3), 1, None, 0.1, size, patch).eval()
    for p in model.parameters():
        if not p.any():  # what starts at zero has no effect yet
            nn.init.normal_(p, std=0.05)
    x = torch.randn(3, channels, size, size)
    t = torch.tensor([0, 10, 999])
    out = model(x, t)
    assert out.shape == x.shape
    assert (model(x, t.roll(1)) - out).abs().amax((1, 2, 3)).min() > 1e-4
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# 4 Data


def test_a_folder_is_split_and_leftovers_are_passed_over(tmp_path, capsys):
    leftovers = "__MACOSX/0.jpg .ipynb_checkpoints/0.png own/config.json own/metrics.csv own/3.png a/._1.jpg b/a.txt"
    for leftover in leftovers.split():
        (tmp_path / leftover).parent.mkdir(exist_ok=True)
        (tmp_path / leftover).touch()
    for i in range(300):
        pixels = torch.randint(256, (9, 40, 3)).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / "ab"[i % 2] / f"{i}.JPG")
    train, held_out = sd.load_dataset("folder", tmp_path, 8)
    assert (len(train), len(held_out)) == (285, 15)
    assert len(torch.cat([train, held_out]).unique(dim=0)) == 300
    assert re.search(r": 1 other files are not read\n$", capsys.readouterr().out)


def solid(mode, colour, **options):
    return lambda path: Image.new(mode, (64, 64), colour).save(path, **options)


@pytest.mark.parametrize(
    "name, write, expected",
    [
        ("alpha é 画像.PNG", solid("RGBA", (200, 0, 0, 51)), [244, 204, 204]),  # 20% red on white
        ("broken exif.jpg", solid("L", 9, exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff"), [9, 9, 9]),
        ("photo.jfif", solid("L", 9), [9, 9, 9]),
        ("photo.avif", solid("L", 0), [0, 0, 0]),
        ("16 bits.png", solid("I;16", 100), "more than 8 bits a channel, convert it to 8 bits"),
        ("postscript.png", solid("L", 1, format="EPS"), "cannot identify"),  # it could run code
    ],
)
def test_an_odd_image_is_read_right_or_refused_by_name(tmp_path, name, write, expected):
    write(tmp_path / name)
    if isinstance(expected, str):
        with pytest.raises(sd.UserError, match=f"{name} .{expected}"):
            sd.read_folder(tmp_path, 8)
    else:
        images = sd.read_folder(tmp_path, 8)
        assert images[0, :, 4, 4].tolist() == expected


def test_truncated_files_are_named_at_once(tmp_path):
    for i in range(7):
        solid("L", 1)(tmp_path / f"{i}.png")
        os.truncate(tmp_path / f"{i}.png", 60)
    with pytest.raises(sd.UserError, match=r"^7 files cannot be read.*: ([^,]*\d.png \([^,]*(, )?){5}$"):
        sd.read_folder(tmp_path, 8)


def test_the_test_split_of_torchvisions_sets_is_held_out(monkeypatch):
    def mnist(folder, train, download):
        return mock.Mock(data=torch.full((70 if train else 30, 28, 28), 9).byte())

    monkeypatch.setattr("torchvision.datasets.MNIST", mnist)
    train, held_out = sd.load_dataset("mnist", "", 14)
    assert (*train.shape, len(held_out)) == (70, 1, 14, 14, 30)


# 5 Evaluation


@pytest.mark.parametrize("known", [0.0, 0.5])
@pytest.mark.parametrize("T", [2, 20, 100, 1000, 4000])
@each_schedule
def test_evaluate_sums_the_coefficients_of_the_timesteps_whose_noise_a_model_misses(schedule, T, known):
    diffusion = sd.GaussianDiffusion(schedule, T)

    def model(x, t):
        noise = (x + diffusion._signal[t]) / diffusion._sigma[t]  # in black images
        return noise * (t < known * T).view(-1, 1, 1, 1)

    val_mse, val_vlb = sd.evaluate(model, diffusion, torch.zeros(9, 1, 32, 32).byte())
    assert val_mse == pytest.approx(1 - known, rel=0.03)
    assert val_vlb == pytest.approx(diffusion.vlb_coefficients[int(known * T) :].sum().item(), rel=0.03)


def test_fid_is_that_of_clean_fid_and_scipy_and_cifar10s_statistics_are_the_published_ones(monkeypatch, here):
    # clean-fid calls a SciPy function with an argument that SciPy 1.18 no longer has.
    monkeypatch.setattr("scipy.linalg.sqrtm", lambda matrix, disp=True, root=scipy.linalg.sqrtm: (root(matrix), 0))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    monkeypatch.setattr("cleanfid.features.feature_extractor", lambda name, **_: pooled)
    images = torch.randint(256, (2, 90, 8, 8, 3)).byte()
    for number, image in enumerate(images.flatten(0, 1)):
        os.makedirs(f"{number // 90}", exist_ok=True)
        Image.fromarray(image.numpy()).save(f"{number // 90}/{number}.png")
    expected = fid.compute_fid("0", "1", num_workers=0, device=torch.device("cpu"))
    one, two = images.movedim(4, 2)
    assert sd.FrechetDistance(None, "cpu", one)(two) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *_, **__: mock.Mock(data=images[0]))
    published = mock.Mock(return_value=(np.ones(12), np.eye(12)))
    monkeypatch.setattr("cleanfid.features.get_reference_statistics", published)
    assert main(f"{TINY} --dataset cifar10 --mults 1 --attention --fid-samples 2") == 0
    published.assert_called_once_with("cifar10", 32, split="train")


# 6 Training

METHODS = [
    "--strategy uniform --dropout 0.2",
    "--strategy logit-normal --weighting min-snr",
    "--strategy speed --speed-variant code",
    "--strategy curriculum --flip --momentum-decay",
    "--strategy adaptive --adaptive-reward loss --weighting change-aware",
]


def before_steps(steps, act):
    """A context in which act(run) comes before each of these training steps, numbered from 1."""
    train_step = sd.Training.train_step

    def act_and_step(run):
        if run.step + 1 in steps:
            act(run)
        train_step(run)

    return mock.patch.object(sd.Training, "train_step", act_and_step)


def spoil_the_loss(run):
    step = run.step
    run.model.register_forward_hook(lambda model, x, eps: eps * math.nan if run.step == step else None)


def assert_same_run(one, two):
    """The same but for settings and seconds, bit for bit."""
    assert_identical(*[checkpoint(run) | {"args": 0, "seconds": 0, "rows": 0} for run in (one, two)])
    assert metrics(one) == metrics(two)


def test_a_run_learns_says_what_it_measures_and_leaves_its_results(here, capsys):
    assert main(f"{TINY} --momentum-decay --steps 80 --eval-every 40 --lr 1e-2 --ema-decay 0.9 --fid-samples 32") == 0
    os.chdir("runs/digits-uniform")
    assert sorted(os.listdir()) == "checkpoint.pt config.json metrics.csv samples-40.png samples-80.png".split()
    rows = metrics(".")
    assert [row["step"] for row in rows] == ["25", "40", "50", "75", "80"]
    assert float(rows[4]["val_mse"]) < 0.8 * float(rows[1]["val_mse"])
    said = capsys.readouterr().out
    held_out, noise = re.match(r"FD \(digits\) of 32 held-out images (\S+), noise (\S+)\n", said).groups()
    assert 10 * float(held_out) < float(noise)
    assert re.search(r"\nstep 80: loss \S+, val_mse \S+, val_vlb \S+ bits/dim, FD \(digits\) \S+, \S+ images/s\n", said)


def test_strategies_share_model_images_noise_and_dropout(monkeypatch):
    seen = {}

    def watch(diffusion, x0, t, noise):
        seen[method] += [x0, noise, torch.get_rng_state()]
        return x0

    monkeypatch.setattr(sd.GaussianDiffusion, "q_sample", watch)
    for method in METHODS:
        run = training(f"{method} --flip --dropout 0.2")
        seen[method] = [copy.deepcopy(run.model.state_dict())]
        run.train_step()
        run.train_step()
        assert_identical(seen[method], seen[METHODS[0]])


def test_the_flags_of_each_method_reach_it():
    speed = ("speed --speed-k 3 --speed-lam 0.8", sd.SpeeDSampler(AB, 3), sd.change_aware_weights(AB, 0.8))
    code = ("speed --speed-variant code", sd.SpeeDSampler(AB, mirror=642), sd.change_aware_weights(AB, 0.6, 700))
    flat = ("curriculum --curriculum-mu 1 --curriculum-sigma 2", sd.CurriculumSampler(1000, 6, 1, 2), torch.ones(1000))
    for flags, expected, weights in (speed, code, flat):
        run = training(f"--timesteps 1000 --strategy {flags}")
        run.sampler.sample(torch.zeros(1), 4)  # the curriculum moves
        expected.sample(torch.zeros(1), 4)
        assert_identical([run.sampler.probs, run.raw_weights], [expected.probs, weights])


def test_the_flags_of_the_adaptive_sampler_reach_it():
    run = training(f"{METHODS[4]} --speed-lam 0.7 --adaptive-every 7 --adaptive-lr 0.5")
    run.load_state_dict(training(METHODS[4]).state_dict())  # as --resume does
    sampler = run.sampler
    assert_identical(sampler.reward_weights, sd.change_aware_weights(sampler.alphas_cumprod, 0.7))
    assert (sampler.every, sampler.optimizer.defaults["lr"], sampler.entropy) == (7, 0.5, 0.1)
    assert sampler.log_u.exp().min() > 0.1


@pytest.mark.parametrize("more", ["--amp off", *ON_CUDA])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_resumed_is_the_run_that_never_stopped(here, capsys, monkeypatch, method, more):
    monkeypatch.setattr(sd, "LOG_EVERY", 3)  # rows with, and between, the checkpoints (7, 10, 14, 20, 21)
    stops = [  # what comes before a step, that step, the exit status, the step of the checkpoint
        (lambda run: [*map(signal.raise_signal, [1, 1])], 17, 129, 17),  # a terminal that closes may hang up twice
        (lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1)), 23, 2, 21),  # the disk is full
        (lambda run: signal.raise_signal(signal.SIGINT), 25, 130, 25),  # all that is left to do is to measure
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = f"{TINY} {method} --steps 25 --eval-every 10 --checkpoint-every 7 {more}"
    assert main(f"{flags} --out whole") == 0
    command = f"{flags} --out run"
    for act, step, status, kept in stops:
        with before_steps({step}, act):
            ended = main(command)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        command = "--resume run"
        assert (ended, checkpoint("run")["step"]) == (status, kept)
        assert re.search("--resume run|checkpoint.pt could not be written", capsys.readouterr().err)
    assert main(command) == 0
    if "cuda" not in more:
        return assert_same_run("whole", "run")
    models = [checkpoint("whole")["model"], checkpoint("run")["model"], training(flags).model.state_dict()]
    whole, resumed, start = (nn.utils.parameters_to_vector(model.values()) for model in models)
    assert (whole - resumed).norm() < 0.1 * (whole - start).norm()  # a GPU's kernels sum in no fixed order


def test_a_finished_run_trains_longer_and_is_measured_again(here):
    torch.jit.trace(nn.Flatten(), torch.zeros(2, 3, 16, 16)).save("pixels.ts")
    assert main(f"{TINY} --fid-samples 20 --fid-every 3 --fid-features pixels.ts --out run") == 0
    before = metrics("run")[1]
    assert main("--resume run --fid-samples 30") == 0
    last = metrics("run")[1]
    assert last["fid"] not in ("", before["fid"])
    assert last["val_mse"] == before["val_mse"]
    assert main("--resume run --steps 9 --strategy adaptive --amp fp16") == 0
    assert [row["step"] for row in metrics("run")] == ["3", "6", "9"]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_optimiser_receives_the_decayed_momentum_and_clipped_gradients_that_are_finite(amp):
    run = training(f"--momentum-decay --lr 0.01 --warmup 2 --ema-decay 0.15 --amp {amp}")
    run.model.register_forward_hook(lambda model, x, eps: eps - 1)  # a gradient to clip
    average = run.ema.head.weight.clone()
    for step in range(3):
        if step == 1:
            spoil_the_loss(run)
        run.train_step()
        average = run.model.head.weight.detach().lerp(average, min(0.15, (1 + step) / (10 + step)))
        torch.testing.assert_close(run.ema.head.weight, average, rtol=1e-4, atol=1e-8)
        beta1, factor = sd.momentum_decay(step / 6)
        received = run.optimizer.param_groups[0]
        assert received["betas"] == (beta1, 0.999)
        assert received["lr"] == pytest.approx(0.01 * factor * min(1, (step + 1) / 2))
        assert run.bad_in_a_row == (step == 1)
    norm = nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    assert norm.item() == pytest.approx(1, rel=0.01)
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    run = training("", images=70)
    batches = [run.batch() for run.step in range(8)]  # two epochs of four times 16: the last 6 images are left out
    one, two = torch.cat(batches).split(64)
    assert len(one.unique(dim=0)) == len(two.unique(dim=0)) == 64
    assert not torch.equal(one, two)


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(here, capsys):
    with before_steps({*range(2, 11), *range(12, 40)}, spoil_the_loss):
        assert main(f"{TINY} --steps 40 --eval-every 4 --out run") == 2
    assert "step 24: ten losses or gradients in a row" in capsys.readouterr().err
    assert checkpoint("run")["step"] == 20
    assert main("--resume run --lr 1e-5") == 0  # where the fault is gone


def test_a_compiled_run_is_the_run(here, monkeypatch):
    eager = mock.Mock(side_effect=functools.partial(torch.compile, backend="eager"))  # traced but not translated
    monkeypatch.setattr(torch, "compile", eager)
    for flags in ("--out off", "--out on --compile"):
        assert main(f"{TINY} {METHODS[4]} --dropout 0.1 {flags}") == 0
    assert eager.call_count == 2  # the model and its average
    torch.testing.assert_close(checkpoint("on")["ema"], checkpoint("off")["ema"])


def test_generated_images_repeat_with_the_seed(here):
    assert main(f"{TINY} --out run") == 0
    pictures = []
    for flags in ("--out one", "--out two", "--out other --seed 1"):
        assert main(f"--generate 6 --checkpoint run/checkpoint.pt --sampling-steps 3 {flags}") == 0
        pictures.append(Path(flags.split()[1], "000005.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


# Several processes: this file is started twice, with RANK and WORLD_SIZE alone; the tests look at what it left behind


def one_of_two():
    """What each rank does: a run that is whole; five steps of every strategy; a run that is stopped, and resumed."""
    flags = f"{ADAPTING} adaptive --dropout 0.2 --flip --out"
    torch.distributed.destroy_process_group = lambda: None
    assert main(f"{flags} whole") == 0
    torch.distributed.init_process_group = lambda **_: None  # torch.distributed does not join twice
    for strategy in sd.STRATEGIES:
        run = training(f"{ADAPTING} {strategy} --adaptive-every 2")  # three probes, so that S moves
        for _ in range(4):
            run.train_step()
        before = copy.deepcopy(run.state_dict())
        with mock.patch.object(run.diffusion, "q_sample", wraps=run.diffusion.q_sample) as q_sample:
            run.train_step()
        after = run.state_dict() | {"args": 0, "grad": [p.grad for p in run.model.parameters()]}
        torch.save([before, after, q_sample.call_args.args], f"{strategy}-{sd.RANK}.pt")
    with before_steps({15} if sd.RANK == 1 else {}, lambda run: signal.raise_signal(signal.SIGTERM)):
        assert repr(main(f"{flags} stopped")) == "143"  # at step 20, where a row is due
    torch.distributed.barrier()
    if sd.RANK == 0:
        shutil.copytree("stopped", "as-one")
    assert main("--resume stopped") == 0
    main(f"{TINY} --batch-size 15")  # an error, which ends the process at once


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    options = {"cwd": folder, "stderr": subprocess.PIPE, "text": True}
    shared = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "MASTER_PORT": f"{20_000 + os.getpid() % 10_000}"}
    ranks = [subprocess.Popen([sys.executable, __file__], env=shared | {"RANK": rank}, **options) for rank in "01"]
    for process in ranks:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 2, error
        assert "error: --batch-size must be at most" in error
    return folder


@pytest.mark.parametrize("strategy", sd.STRATEGIES)
def test_two_ranks_stay_the_same_with_the_gradient_of_one_process(two_ranks, strategy):
    before, one, half = torch.load(two_ranks / f"{strategy}-0.pt", weights_only=True)
    _, two, other_half = torch.load(two_ranks / f"{strategy}-1.pt", weights_only=True)
    assert_identical(one, two)
    run = training(f"{ADAPTING} {strategy}")
    run.load_state_dict(before)
    x0, t, noise = (torch.cat(parts) for parts in zip(half, other_half))
    assert torch.equal(x0, run.batch())
    assert len(noise.unique(dim=0)) == 16  # each has noise of its own
    run.sampler.sample(x0, run.step)  # moves what moves
    weights = sd.normalize_weights(run.raw_weights, run.sampler.probs)[t]
    error = run.model(run.diffusion.q_sample(x0, t, noise), t) - noise
    (weights * error.square().mean((1, 2, 3))).mean().backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    torch.testing.assert_close(one["grad"], [p.grad for p in run.model.parameters()], rtol=1e-4, atol=1e-6)


def test_two_ranks_resume_as_two_and_as_one(two_ranks, monkeypatch):
    monkeypatch.chdir(two_ranks)
    assert_same_run("whole", "stopped")
    assert checkpoint("as-one")["step"] == 20
    assert main("--resume as-one") == 0


# 7 Report


def test_the_report_tells_how_much_sooner_runs_are_where_the_first_setting_ends(here, capsys, monkeypatch, places):
    matplotlib = mock.Mock()
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    curves = {"one": (9, 7, 5), "two": (9, 4, 6), "fast": (9, 4, 5), "soon": (5, 6), "later": (9, 6, 5.6)}
    made = Path(f"{places}/made/config.json").read_text()
    for run, values in curves.items():
        os.mkdir(run)
        config = made.replace('"seed": 0', f'"seed": "{run}"')
        Path(f"{run}/config.json").write_text(config.replace('"width": 8', f'"width": {len(run)}'))
        table = np.c_[(100, 200, 300)[: len(values)], values, values]
        np.savetxt(f"{run}/metrics.csv", table, "%g,%g,%g,", header="step,val_mse,val_vlb,fid", comments="")
    assert main("--report one fast soon later two --out drawn") == 0
    rows = "|5.5 (5..6)|1.43 (1.09..1.76)|one two\n|5 (5..5)|1.76 (1.76..1.76)|fast\n|6 (6..6)|3 (3..3)|soon\n"
    rows += "|5.6 (5.6..5.6)|nan (nan..nan)|later\n"  # the last value, the speed-up, of the runs of a setting
    said = re.sub("  +", "|", capsys.readouterr().out)
    assert said.count(rows) == 2
    assert "fid: not measured by one fast soon later two" in said
    assert all(matplotlib.pyplot.subplot().semilogy.call_args_list[0].args[1] == (9, 5.5, 5.5))  # the mean
    Path("two/config.json").write_text(config.replace("linear", "quad"))
    assert main("--report fast two") == 2


# 8 Command line

BAD_INPUT = """--generate 4 --checkpoint @made/checkpoint.pt --dataset cifar10 | --generate 4 --checkpoint @evil.pt
--weighting change-aware --speed-lam 0.4 | --strategy speed --speed-tau 1001 | --dataset folder --data-dir @made
--generate 4 --checkpoint @cut.pt | --checkpoint @made/checkpoint.pt | --strategy speed --speed-k 0.5 | --fid-samples=-1
--resume @made --timesteps 40 | --resume @made --report @made | --resume @made --width 16 | --resume @made --out new
--resume @made --steps 5 | --fid-features @other.pt | --fid-features @cut.pt | --sampling-steps 1001 | --batch-size 9729
--resume nowhere | --image-size 18 | --fid-samples 1 | --out @cut.pt/x | --timesteps 2 | --attention 5 | --warmup 2000
--out /proc/x | --device tpu | --report no | --out @made | --stepps 3 | --lr=nan | --lr=inf | --lr=-1 | --steps 0"""


class Malicious:  # unpickling it makes a file
    def __reduce__(self):
        return open, ("created", "w")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run, and files that are wrong in one way each."""
    root = tmp_path_factory.mktemp("places")
    assert main(f"{TINY} --strategy adaptive --out {root}/made") == 0
    torch.save(checkpoint(root / "made") | {"ema": Malicious()}, root / "evil.pt")
    torch.save({}, root / "other.pt")
    (root / "cut.pt").write_bytes((root / "made/checkpoint.pt").read_bytes()[:9999])
    return root


@pytest.mark.parametrize("command", re.split(r" \| |\n", BAD_INPUT))
def test_bad_input_is_one_line_and_status_2_at_once(here, capsys, monkeypatch, places, command):
    monkeypatch.setattr(sd.Training, "train_step", None)
    assert main(command.replace("@", f"{places}/")) == 2
    assert not os.listdir()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("speedup_diffusion.py: error: ")
    assert all(name in line for name in re.findall(r"@(\w+\.\w+)", command))


def test_the_script_stops_on_ctrl_c_with_a_checkpoint_and_a_way_to_go_on(here):
    process = subprocess.Popen([*SCRIPT, *f"{TINY} --steps 99999".split()], stderr=subprocess.PIPE, text=True)
    while not os.path.exists("runs/digits-uniform/checkpoint.pt") and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("go on with --resume runs/digits-uniform\n")
    assert process.returncode == 130


@pytest.mark.parametrize("block", re.findall(r"(?s)\n```python\n(.*?)\n```", README))
def test_every_snippet_of_the_readme_runs_as_it_stands(here, block):
    if "from diffusers" in block:
        pytest.importorskip("diffusers")
    names = {}
    exec(block, names)
    assert all(p.isfinite().all() for p in names["model"].parameters())


def test_every_flag_that_the_readme_and_make_compare_name_exists():
    compare = Path(sd.__file__).with_name("Makefile").read_text().partition("SEEDS")[2]
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", README + compare)
    others = "--help --nproc_per_node --nnodes --node_rank --master_addr --master_port --local-addr --quiet --upgrade"
    assert {*named} <= {*others.split(), *sd.make_parser()._option_string_actions}


# Minutes long; of seconds, which vary from machine to machine, nothing is asserted


@pytest.mark.slow
def test_ten_kills_even_while_a_checkpoint_is_written_lose_nothing(here):
    flags = f"{ADAPTING} adaptive --width 32 --steps 60 --eval-every 2 --out"
    assert main(f"{flags} whole") == 0
    process = subprocess.Popen([*SCRIPT, *flags.split(), "killed"])
    before = -1
    for pause in np.random.default_rng(0).uniform(0, 0.5, 10):
        while not os.path.exists("killed/checkpoint.pt") or checkpoint("killed")["step"] <= before:
            time.sleep(0.02)
        time.sleep(pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        before = checkpoint("killed")["step"]
        process = subprocess.Popen([*SCRIPT, "--resume", "killed"])
    assert process.wait() == 0
    assert_same_run("whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("options", [*(f"--strategy {name}" for name in sd.STRATEGIES), "--momentum-decay"])
def test_the_default_run_draws_digits(here, options):
    """The distance is 0.5 for held-out digits, 193 for noise, 26 to 52 after 80 steps."""
    assert main(f"{options} --device cpu --steps 80 --out begun") == 0
    assert main(f"{options} --device cpu --out run") == 0
    begun, trained = (float(metrics(run)[-1]["fid"]) for run in ("begun", "run"))
    assert 0.5 < trained < 8 < 20 < begun


@pytest.mark.bench
def test_bench(capsys):
    """Blocks of ten steps of each method in random order; every tenth step has a probe."""
    benched = ["uniform", "uniform --momentum-decay", "logit-normal", "speed", "curriculum", "adaptive"]
    benched += ["adaptive --adaptive-reward loss --weighting change-aware"]
    runs = []
    for method in benched:
        args, _ = sd.parse_args(f"--strategy {method}".split())
        runs.append(sd.Training(args, sd.render_digits(2000)[0], sd.pick_device(None)))
    seconds = np.empty((25, len(runs)))
    for block in range(25):
        for number in np.random.permutation(len(runs)):
            begin = time.perf_counter()
            for _ in range(10):
                runs[number].train_step()
            runs[number].losses[-1].item()  # waits for the device
            seconds[block, number] = time.perf_counter() - begin
    with capsys.disabled():
        for method, blocks in zip(benched, seconds.T):
            ratio = np.median(blocks / seconds[:, 0])
            print(f"\n{method}: {100 * np.median(blocks):.1f} ms a step, {ratio:.3f} of uniform's time")


if __name__ == "__main__":
    one_of_two()
