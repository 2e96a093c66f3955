"""The reported bound is a bound: against the exact likelihood on vocabularies one can enumerate.

A denoiser here is a table: for every noised sequence z of one or two tokens, logits per position.
Its generative process starts at log-SNR -9, walks up a grid with `schedule.posterior`, each
position on its own given all of z, and ends at +9 with a decision for a clean token. All of it is
enumerated in float64, so its negative log-likelihood is exact. Three quantities are compared.

    NLL_n   -log p(x0) of the process on a grid of n steps, by multiplying its transition matrices

    L_n     prior + sum over steps of E_q(z_t | x0) KL(q(z_s | z_t, x0) || p(z_s | z_t)) + decision,
            the variational bound of that process; NLL_n <= L_n for every n is Jensen's inequality

    L       prior + integral over log-SNR of p(lambda) E_q(z | x0) elbo(z, lambda) + decision,
            with `elbo` of the objective; what L_n tends to if the objective is right

Log-SNRs are cut at +-9, which leaves two terms that training drops. At -9 a share alpha = 1.2e-4 of
the clean token survives; from pure noise the masked process could never produce it and its
bound would be infinite. So the process starts from q_-9 of a guess over clean tokens, and
prior = KL(q_-9(z | x0) || q_-9(z | guess)), which is of size alpha. At +9 the remaining noise is
removed by Bayes' rule with the denoiser for a prior, p(x | z) ~ phat(x) q_9(z | x), and
decision = E -log p(x0 | z). Training draws log-SNRs of the same range but weighs them with a
density that is not renormalised for the cut, so the mean of `elbo` over training noise is the
integral divided by the range of times, 0.99975.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.config import NoiseConfig
from megatron_ext.diffusion import MixingSchedule, dense_gidd_loss
from megatron_ext.diffusion.noising import noise_for_validation, noise_sequence
from megatron_ext.kernels.gidd_loss import gidd_loss
from tests.diffusion.bounds import STANDARD_ERRORS

VOCAB_SIZE, MASK_ID = 5, 3
SHIFTS = [-1000.0, 0.0, 1000.0]
QUADRATURE = np.polynomial.legendre.leggauss(200)
DATA = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.1], dtype=torch.float64)
UNDECIDED = torch.tensor([0.25, 0.25, 0.25, 0.0, 0.25], dtype=torch.float64)


def _schedule(shift: float) -> MixingSchedule:
    return MixingSchedule(VOCAB_SIZE, MASK_ID, shift)


class Denoiser(NamedTuple):
    """A model of sequences of d tokens, as a table over all v^d noised sequences."""

    states: Tensor
    """[z, d] ids."""
    logits: Tensor
    """[z, d, v]; the mask's column is ignored, as the loss ignores it."""

    @classmethod
    def random(cls, num_tokens: int, seed: int) -> Denoiser:
        states = list(itertools.product(range(VOCAB_SIZE), repeat=num_tokens))
        rng = torch.Generator().manual_seed(seed)
        shape = len(states), num_tokens, VOCAB_SIZE
        logits = torch.randn(shape, generator=rng, dtype=torch.float64)
        return cls(torch.tensor(states), 1.5 * logits)

    @classmethod
    def constant(cls, probs: Tensor) -> Denoiser:
        """One token, the same guess whatever is seen."""
        return cls(torch.arange(VOCAB_SIZE)[:, None], probs.log().expand(VOCAB_SIZE, 1, -1))

    @property
    def probs(self) -> Tensor:
        at_mask = torch.tensor([MASK_ID])
        return torch.softmax(self.logits.index_fill(-1, at_mask, -torch.inf), dim=-1)


def _onehot(ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(ids, VOCAB_SIZE).double()


def _probability_of_states(states: Tensor, each: Tensor) -> Tensor:
    """[..., z] from independent laws of the positions [..., d, v]."""
    columns = [each[..., position, states[:, position]] for position in range(states.shape[1])]
    return torch.stack(columns).prod(0)


def _marginal(schedule: MixingSchedule, log_snr: Tensor, probs: Tensor) -> Tensor:
    """q of [d, v] clean distributions at every log-SNR, [n, d, v]."""
    shape = len(log_snr), *probs.shape
    return schedule.marginal(log_snr[:, None].expand(shape[:2]), probs.expand(shape))


def _divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) over the last dimension, 0 log 0 = 0."""
    return (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(-1)


def _objective_on_states(
    schedule: MixingSchedule, denoiser: Denoiser, x0: Tensor, log_snr: Tensor
) -> Tensor:
    """The sequence's elbo [n, z] at every log-SNR and noised sequence."""
    shape = len(log_snr), *denoiser.states.shape
    losses = dense_gidd_loss(
        denoiser.logits.expand(*shape, -1), denoiser.states.expand(shape), x0.expand(shape),
        log_snr[:, None, None].expand(shape), schedule,
    )  # fmt: skip
    return losses.elbo.sum(-1)


def _integral(schedule: MixingSchedule, denoiser: Denoiser, x0: Tensor) -> float:
    """Integral of p(lambda) E elbo by Gauss-Legendre quadrature."""
    nodes, weights = (torch.from_numpy(x) for x in QUADRATURE)
    half = (schedule.max_log_snr - schedule.min_log_snr) / 2
    log_snr = schedule.min_log_snr + half * (1 + nodes)
    elbo = _objective_on_states(schedule, denoiser, x0, log_snr)
    q = _probability_of_states(denoiser.states, _marginal(schedule, log_snr, _onehot(x0)))
    density = schedule.log_snr_density(log_snr)
    return (half * weights * density * (q * elbo).sum(-1)).sum().item()


def _decision(schedule: MixingSchedule, denoiser: Denoiser, x0: Tensor) -> Tensor:
    """log p(x0 | z) of every state z at log-SNR 9, by Bayes' rule."""
    end = torch.full(denoiser.states.shape, 9.0, dtype=torch.float64)
    target = x0.expand(denoiser.states.shape)
    guess = denoiser.probs.gather(-1, target[..., None]).squeeze(-1)
    at_state = denoiser.states[..., None]
    likelihood = schedule.marginal(end, _onehot(target)).gather(-1, at_state).squeeze(-1)
    evidence = schedule.marginal(end, denoiser.probs).gather(-1, at_state).squeeze(-1)
    # An impossible state (a mask in uniform noise) decides by the denoiser; it has no weight.
    possible = evidence > 0
    log_p = guess.log() + torch.where(possible, likelihood / evidence, 1.0).log()
    return log_p.sum(-1)


def _ends(schedule: MixingSchedule, denoiser: Denoiser, x0: Tensor, guess: Tensor) -> float:
    """prior + decision, what the cut at +-9 leaves outside of the integral."""
    both = torch.tensor([-9.0, 9.0], dtype=torch.float64)
    first, last = _marginal(schedule, both, _onehot(x0))
    prior = _divergence(first, schedule.marginal(both[:1], guess)).sum()
    q = _probability_of_states(denoiser.states, last)
    log_p = _decision(schedule, denoiser, x0)
    return (prior - torch.where(q > 0, q * log_p, 0.0).sum()).item()


def _reverse_steps(
    schedule: MixingSchedule, states: Tensor, probs: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-SNRs t [n] and posteriors [n, z, d, v] of the steps between neighbours of `grid`."""
    low, high = grid[:-1], grid[1:]
    shape = len(low), *states.shape
    t, s = (x[:, None, None].expand(shape) for x in (low, high))
    return low, schedule.posterior(probs.expand(*shape, -1), states.expand(shape), t, s)


def _discrete(
    schedule: MixingSchedule, denoiser: Denoiser, x0: Tensor, num_steps: int
) -> tuple[float, float]:
    """(NLL_n, L_n) of the process with `num_steps` equal steps in log-SNR."""
    grid = torch.linspace(-9, 9, num_steps + 1, dtype=torch.float64)
    states = denoiser.states
    low, model = _reverse_steps(schedule, states, denoiser.probs, grid)
    known = _onehot(x0).expand(len(states), -1, -1)
    _, exact = _reverse_steps(schedule, states, known, grid)
    q = _probability_of_states(states, _marginal(schedule, low, _onehot(x0)))
    steps = _divergence(exact, model).sum(-1)
    bound = torch.where(q > 0, q * steps, 0.0).sum().item()
    bound += _ends(schedule, denoiser, x0, UNDECIDED)

    prob_of_x0 = _decision(schedule, denoiser, x0).exp()
    for step in reversed(range(num_steps)):
        prob_of_x0 = _probability_of_states(states, model[step]) @ prob_of_x0
    start = schedule.marginal(grid[:1], UNDECIDED).expand(states.shape[1], -1)
    nll = -(_probability_of_states(states, start) @ prob_of_x0).log().item()
    return nll, bound


CASES = [(shift, x0) for shift in SHIFTS for x0 in ([4], [0, 2])]


@pytest.mark.parametrize(("shift", "x0"), CASES)
def test_bound_is_above_the_exact_nll_on_a_tiny_vocabulary(shift: float, x0: list[int]) -> None:
    schedule, ids = _schedule(shift), torch.tensor(x0)
    denoiser = Denoiser.random(len(x0), seed=2)
    bound = _integral(schedule, denoiser, ids) + _ends(schedule, denoiser, ids, UNDECIDED)
    coarse, fine = (_discrete(schedule, denoiser, ids, num_steps)[0] for num_steps in (500, 1000))
    assert abs(fine - coarse) < 0.02, "the process has a limit"
    gap = bound - fine
    assert gap > 3 * abs(fine - coarse), f"bound {bound:.4f}, exact {fine:.4f}"
    assert gap < 2, "and it is no trivial one"


@pytest.mark.parametrize(("shift", "x0"), CASES)
def test_objective_is_the_limit_of_the_discrete_bounds(shift: float, x0: list[int]) -> None:
    """L_n - L falls like 1 / n, to nothing."""
    schedule, ids = _schedule(shift), torch.tensor(x0)
    denoiser = Denoiser.random(len(x0), seed=2)
    bound = _integral(schedule, denoiser, ids) + _ends(schedule, denoiser, ids, UNDECIDED)
    (nll_coarse, coarse), (nll_fine, fine) = (
        _discrete(schedule, denoiser, ids, num_steps) for num_steps in (500, 1000)
    )
    assert coarse >= nll_coarse and fine >= nll_fine
    assert abs(fine - bound) < 0.51 * abs(coarse - bound) + 1e-9
    assert abs(2 * fine - coarse - bound) < 1e-5 * bound


@pytest.mark.parametrize(("shift", "x0"), CASES)
def test_mean_over_drawn_noise_is_the_integral(shift: float, x0: list[int]) -> None:
    """Training's and validation's draws both, through the loss that training uses.

    On a narrower range of log-SNR: near 9 a token in 8000 is noised and counts 8000 times, so the
    mean of as few draws as a test can afford would say little.
    """
    ids = torch.tensor(x0)
    schedule = MixingSchedule(VOCAB_SIZE, MASK_ID, shift, min_log_snr=-6, max_log_snr=2)
    denoiser = Denoiser.random(len(x0), seed=2)
    noise = NoiseConfig(
        p_independent=0.0, p_prompt=0.0, max_empty_fraction=0.0, uniform_noise_includes_mask=False
    )
    tokens = np.array(x0)
    training = [noise_sequence(tokens, schedule, noise, seed=0, index=i) for i in range(8000)]
    validation = [
        noise_for_validation(tokens, schedule, seed=0, index=i, draw=draw, num_draws=4)
        for i in range(2000)
        for draw in range(4)
    ]
    low, high = schedule.time_bounds
    expected = _integral(schedule, denoiser, ids) / (high - low)
    powers = VOCAB_SIZE ** torch.arange(len(x0) - 1, -1, -1)
    # Draws of one validation sequence depend on each other; their means do not.
    for drawn, per_sequence in ((training, 1), (validation, 4)):
        xt = torch.from_numpy(np.stack([x.xt for x in drawn]))
        log_snr = torch.from_numpy(np.stack([x.log_snr for x in drawn])).double()
        logits = denoiser.logits[(xt * powers).sum(-1)]
        losses = gidd_loss(logits, xt, ids.expand_as(xt), log_snr, schedule)
        means = losses.elbo.sum(-1).view(-1, per_sequence).mean(-1)
        error = means.std().item() / len(means) ** 0.5
        assert error < 0.03 * expected
        assert abs(means.mean().item() - expected) < STANDARD_ERRORS * error


@pytest.mark.parametrize("shift", [-1000.0, -2.0, 0.0, 2.0, 1000.0])
def test_bound_of_the_data_distribution_is_its_entropy(shift: float) -> None:
    """For one token the process of the constant guess `DATA` reverses the noise exactly.

    Its steps are Bayes' rule for the marginals, so the mean bound over the data is the entropy,
    with nothing lost, whatever the noise. Any other guess pays its cross-entropy at least.
    """
    schedule = _schedule(shift)

    def mean_bound(probs: Tensor) -> float:
        denoiser = Denoiser.constant(probs)
        ids = [torch.tensor([i]) for i in range(VOCAB_SIZE) if i != MASK_ID]
        return sum(
            DATA[x].item()
            * (_integral(schedule, denoiser, x) + _ends(schedule, denoiser, x, probs))
            for x in ids
        )

    entropy = -torch.special.xlogy(DATA, DATA).sum().item()
    assert mean_bound(DATA) == pytest.approx(entropy, rel=1e-8)
    cross_entropy = -torch.special.xlogy(DATA, UNDECIDED).sum().item()
    assert mean_bound(UNDECIDED) == pytest.approx(cross_entropy, rel=1e-8)


def test_a_token_is_judged_without_itself() -> None:
    """The best guess at a noised token ignores what the token shows: it is what the rest says.

    p(x0 | z) knows z already, and the process would count it twice. Under masking it makes no
    difference, since a mask shows nothing and a revealed token has no loss.
    """
    excess = {}
    for shift in (-1000.0, 1000.0):
        schedule = _schedule(shift)
        level = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
        likelihood = schedule.marginal(level, torch.eye(VOCAB_SIZE, dtype=torch.float64))
        seen = (DATA[:, None] * likelihood).t()
        seen = torch.where(seen.sum(-1, keepdim=True) > 0, seen, DATA)
        denoiser = Denoiser(torch.arange(VOCAB_SIZE)[:, None], seen.clamp_min(1e-30).log()[:, None])
        blind = Denoiser.constant(DATA)
        excess[shift] = sum(
            DATA[x].item()
            * (
                _integral(schedule, denoiser, torch.tensor([x]))
                - _integral(schedule, blind, torch.tensor([x]))
            )
            for x in range(VOCAB_SIZE)
            if x != MASK_ID
        )
    assert abs(excess[-1000.0]) < 1e-9
    assert excess[1000.0] > 0.1
