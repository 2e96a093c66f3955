"""Identities of the forward process, and its posterior by enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.diffusion import MixingSchedule

SHIFTS = [-1000.0, -2.0, 0.0, 2.0, 1000.0]
MASK_ID = 3
LOG_SNR = torch.linspace(-9, 9, 37, dtype=torch.float64)


def _schedule(shift: float, vocab_size: int = 6, scale: float = 1.0) -> MixingSchedule:
    return MixingSchedule(vocab_size, MASK_ID, shift, scale)


def _onehot(schedule: MixingSchedule) -> Tensor:
    return torch.eye(schedule.vocab_size, dtype=torch.float64)


def _step(schedule: MixingSchedule, high: float, low: float) -> Tensor:
    """q(z_t | z_s), [z_s, z_t], from the marginals at log-SNRs s = high and t = low.

    The one kernel that keeps a token with probability alpha_t / alpha_s, redraws it otherwise
    from a law that does not depend on it, and takes q_s to q_t.
    """
    s, t = (torch.tensor(x, dtype=torch.float64) for x in (high, low))
    kept = schedule.alpha(t) / schedule.alpha(s)
    noise_s, noise_t = ((1 - schedule.alpha(x)) * schedule.pi(x) for x in (s, t))
    return kept * _onehot(schedule) + (noise_t - kept * noise_s)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_noise_sums_to_one_and_its_derivative_to_zero(shift: float, scale: float) -> None:
    schedule = _schedule(shift, scale=scale)
    pi, slope = schedule.pi(LOG_SNR), schedule.pi_prime(LOG_SNR)
    assert (pi >= 0).all()
    torch.testing.assert_close(pi.sum(-1), torch.ones_like(LOG_SNR), rtol=0, atol=1e-14)
    torch.testing.assert_close(slope.sum(-1), torch.zeros_like(LOG_SNR), rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_noise_derivative_is_the_finite_difference(shift: float, scale: float) -> None:
    schedule, step = _schedule(shift, scale=scale), 1e-5
    difference = (schedule.pi(LOG_SNR + step) - schedule.pi(LOG_SNR - step)) / (2 * step)
    torch.testing.assert_close(schedule.pi_prime(LOG_SNR), difference, rtol=1e-8, atol=1e-10)


def test_shares_of_the_named_schedules() -> None:
    """Exactly masked, exactly uniform, and half of each where the log-SNR is minus the shift."""
    for dtype in (torch.float32, torch.float64):
        log_snr = LOG_SNR.to(dtype)
        assert not _schedule(-1000.0).uniform_share(log_snr).any()
        assert (_schedule(1000.0).uniform_share(log_snr) == 1).all()
    for shift in (-2.0, 0.0, 2.0):
        at = torch.tensor(-shift)
        assert _schedule(shift).uniform_share(at) == 0.5
    assert _schedule(-1000.0).is_mask_only and not _schedule(-2.0).is_mask_only


def test_noise_at_ids_is_the_noise_of_all_ids() -> None:
    schedule = _schedule(0.5)
    ids = torch.arange(37) % 6
    for at, everywhere in (
        (schedule.pi_at(LOG_SNR, ids), schedule.pi(LOG_SNR)),
        (schedule.pi_prime_at(LOG_SNR, ids), schedule.pi_prime(LOG_SNR)),
    ):
        assert torch.equal(at, everywhere.gather(-1, ids[:, None]).squeeze(-1))
        assert at.unique().numel() > 10


def test_time_and_log_snr_are_inverse() -> None:
    schedule = _schedule(0.0)
    low, high = schedule.time_bounds
    assert low == pytest.approx(1.2339e-4, rel=1e-4) and high == pytest.approx(1 - low, abs=1e-15)
    time = torch.linspace(low, high, 101, dtype=torch.float64)
    log_snr = schedule.log_snr_from_time(time)
    assert log_snr[0] == pytest.approx(9) and log_snr[-1] == pytest.approx(-9)
    torch.testing.assert_close(schedule.time_from_log_snr(log_snr), time, rtol=0, atol=1e-14)
    inside = LOG_SNR[1:-1]
    back = schedule.log_snr_from_time(schedule.time_from_log_snr(inside))
    torch.testing.assert_close(back, inside, rtol=1e-11, atol=1e-11)


def test_log_snr_beyond_the_range_is_clipped_in_the_signal_only() -> None:
    schedule = MixingSchedule(6, MASK_ID, 0.0, min_log_snr=-4, max_log_snr=5)
    ends = torch.tensor([-4.0, 5.0], dtype=torch.float64)
    beyond = torch.tensor([-20.0, 20.0], dtype=torch.float64)
    assert torch.equal(schedule.alpha(beyond), schedule.alpha(ends))
    assert not torch.equal(schedule.uniform_share(beyond), schedule.uniform_share(ends))
    times = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
    assert schedule.log_snr_from_time(times).tolist() == [5, -4]


def test_density_is_the_derivative_of_time() -> None:
    """t is uniform, so the log-SNR's density is |dt / d log_snr|."""
    schedule, step = _schedule(0.0), 1e-5
    inside = LOG_SNR[1:-1]
    slope = schedule.time_from_log_snr(inside + step) - schedule.time_from_log_snr(inside - step)
    torch.testing.assert_close(
        schedule.log_snr_density(inside), -slope / (2 * step), rtol=1e-6, atol=1e-10
    )


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_marginals_compose_as_a_markov_chain(shift: float, scale: float) -> None:
    """Steps between marginals are stochastic matrices, and two of them make the longer one."""
    schedule = _schedule(shift, scale=scale)
    clean = _onehot(schedule)
    for high, middle, low in [(9, 8.9, -9), (9, 0, -9), (3, 1, -1), (-6, -7.5, -8)]:
        first, second = _step(schedule, high, middle), _step(schedule, middle, low)
        for step in (first, second):
            assert step.min() >= -1e-15
            torch.testing.assert_close(step.sum(-1), torch.ones(6).double(), rtol=0, atol=1e-14)
        torch.testing.assert_close(first @ second, _step(schedule, high, low), rtol=0, atol=1e-14)
        q_high, q_low = (
            schedule.marginal(torch.full((6,), float(x), dtype=torch.float64), clean)
            for x in (high, low)
        )
        torch.testing.assert_close(q_high @ first @ second, q_low, rtol=0, atol=1e-14)


def test_marginal_is_linear_in_the_clean_distribution() -> None:
    schedule = _schedule(0.0)
    probs = torch.tensor([0.5, 0.2, 0.1, 0.0, 0.15, 0.05], dtype=torch.float64)
    each = schedule.marginal(torch.full((6,), 0.3, dtype=torch.float64), _onehot(schedule))
    at = schedule.marginal(torch.tensor(0.3, dtype=torch.float64), probs)
    torch.testing.assert_close(at, probs @ each, rtol=0, atol=1e-15)
    assert at.sum().item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("scale", [0.0, 1.2])
def test_a_scale_that_is_no_markov_chain_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="--mixing-scale"):
        _schedule(0.0, scale=scale)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_weight_is_the_rate_of_the_chain_over_the_marginal(shift: float, scale: float) -> None:
    """beta (pi - pi') is the rate at which noise produces z as the log-SNR falls.

    Divided by q(z | x0) it is the loss weight. The rate comes from the marginals alone: it is
    -alpha d/dlambda (beta pi / alpha), the numerator of the step from s to t as they meet.
    """
    schedule, h = _schedule(shift, scale=scale), 1e-5
    log_snr = LOG_SNR[1:-1]

    def ratio(x: Tensor) -> Tensor:
        return ((1 - schedule.alpha(x)) / schedule.alpha(x)).unsqueeze(-1) * schedule.pi(x)

    alpha = schedule.alpha(log_snr).unsqueeze(-1)
    rate = -alpha * (ratio(log_snr + h) - ratio(log_snr - h)) / (2 * h)
    for x0 in (0, 5):
        marginal = schedule.marginal(log_snr, _onehot(schedule)[x0].expand(len(log_snr), -1))
        for z in range(6):
            ids = torch.full(log_snr.shape, z), torch.full(log_snr.shape, x0)
            weight = schedule.loss_weight(log_snr, *ids)
            torch.testing.assert_close(weight * marginal[:, z], rate[:, z], rtol=1e-7, atol=1e-9)
            elbo_weight = schedule.elbo_weight(log_snr, *ids)
            density = schedule.log_snr_density(log_snr)
            torch.testing.assert_close(elbo_weight * density, weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
def test_simple_weights_of_the_paper(shift: float) -> None:
    """z = m: 1 + s;  z another token: s;  z = x0: s^2 / (s + (v - 1) e^lambda)."""
    schedule, size = _schedule(shift, vocab_size=101), 101
    share = schedule.uniform_share(LOG_SNR)
    kept = share.square() / (share + (size - 1) * LOG_SNR.exp())
    for z, expected in ((MASK_ID, 1 + share), (50, share), (10, kept)):
        ids = torch.full(LOG_SNR.shape, z), torch.full(LOG_SNR.shape, 10)
        torch.testing.assert_close(
            schedule.loss_weight(LOG_SNR, *ids), expected, rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("shift", SHIFTS)
def test_transitions_that_do_not_happen_have_no_weight(shift: float) -> None:
    schedule = _schedule(shift)
    x0 = torch.full(LOG_SNR.shape, 0)
    impossible = {-1000.0: [1, 2, 4, 5], 1000.0: [MASK_ID]}.get(shift, [])
    for z in range(6):
        weight = schedule.loss_weight(LOG_SNR, torch.full(LOG_SNR.shape, z), x0)
        is_revealed_by_masking = shift == -1000 and z == 0
        assert weight.any() == (z not in impossible and not is_revealed_by_masking)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_posterior_of_a_known_token_is_bayes_rule(shift: float, scale: float) -> None:
    """q(z_s | z_t, x0) = q(z_t | z_s) q(z_s | x0) / q(z_t | x0), for every x0, z_t, z_s."""
    schedule = _schedule(shift, scale=scale)
    clean, everything = _onehot(schedule), torch.arange(6)
    for high, low in [(9.0, 8.5), (2.0, -1.0), (0.1, 0.0), (-8.0, -9.0), (9.0, -9.0)]:
        t, s = (torch.full((6,), x, dtype=torch.float64) for x in (low, high))
        step = _step(schedule, high, low)
        q_s, q_t = schedule.marginal(s, clean), schedule.marginal(t, clean)
        for x0 in (0, 5):
            got = schedule.posterior(clean[x0].expand(6, -1), everything, t, s)
            bayes = (step * q_s[x0, :, None]).t() / q_t[x0, :, None]
            possible = q_t[x0] > 0
            assert possible.sum() >= 2
            torch.testing.assert_close(got[possible], bayes[possible], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shift", SHIFTS)
def test_posterior_of_a_guess_is_a_distribution(shift: float) -> None:
    """Also for a denoiser that is unsure, and where the jump is a difference of near equals."""
    schedule = _schedule(shift)
    probs = torch.tensor([0.5, 0.2, 0.1, 0.0, 0.15, 0.05], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-3)):
        for high, low in [(9.0, 8.99), (9.0, -9.0), (0.0, -0.01), (-8.99, -9.0)]:
            t, s = (torch.full((6,), x, dtype=dtype) for x in (low, high))
            got = schedule.posterior(probs.to(dtype).expand(6, -1), torch.arange(6), t, s)
            assert got.min() >= 0
            torch.testing.assert_close(
                got.sum(-1), torch.ones(6, dtype=dtype), rtol=0, atol=tolerance
            )


@pytest.mark.parametrize("shift", SHIFTS)
def test_posterior_without_a_step_keeps_the_token(shift: float) -> None:
    schedule = _schedule(shift)
    probs = torch.tensor([0.5, 0.2, 0.1, 0.0, 0.15, 0.05], dtype=torch.float64).expand(6, -1)
    level = torch.full((6,), 0.7, dtype=torch.float64)
    got = schedule.posterior(probs, torch.arange(6), level, level)
    possible = schedule.marginal(level, probs)[0] > 0
    torch.testing.assert_close(got[possible], _onehot(schedule)[possible], rtol=0, atol=1e-14)


def test_posterior_of_the_marginals_reverses_the_chain() -> None:
    """With the data's distribution for a guess, the steps lead from q_t back to q_s exactly."""
    data = torch.tensor([0.5, 0.2, 0.1, 0.0, 0.15, 0.05], dtype=torch.float64).expand(6, -1)
    for shift in SHIFTS:
        schedule = _schedule(shift)
        t, s = (torch.full((6,), x, dtype=torch.float64) for x in (-3.0, 2.0))
        back = schedule.posterior(data, torch.arange(6), t, s)
        q_t, q_s = (schedule.marginal(x, data)[0] for x in (t, s))
        torch.testing.assert_close(q_t @ back, q_s, rtol=0, atol=1e-14)


def test_posterior_leaves_a_token_that_the_denoiser_rules_out() -> None:
    """Masked diffusion never changes a revealed token, whatever the denoiser thinks of it."""
    schedule = _schedule(-1000.0)
    probs = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    t, s = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    got = schedule.posterior(probs, torch.tensor([0]), t, s)
    assert got.tolist() == [[1, 0, 0, 0, 0, 0]]


def test_posterior_of_a_mask_that_cannot_be_is_the_marginal() -> None:
    schedule = _schedule(1000.0)
    probs = torch.tensor([[0.5, 0.2, 0.1, 0.0, 0.15, 0.05]], dtype=torch.float64)
    t, s = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    got = schedule.posterior(probs, torch.tensor([MASK_ID]), t, s)
    torch.testing.assert_close(got, schedule.marginal(s, probs), rtol=0, atol=0)
    assert got.sum().item() == pytest.approx(1)


def test_the_largest_vocabulary_keeps_the_floor_of_the_denominator() -> None:
    schedule = MixingSchedule(131072, MASK_ID, 0.0)
    log_snr = torch.tensor([-8.0, -5.0], dtype=torch.float64)
    share = schedule.uniform_share(log_snr)
    other = schedule.loss_weight(log_snr, torch.tensor([11, 11]), torch.tensor([10, 10]))
    floored = share[0].item() ** 2 / (131071 * 1e-8)
    assert other[0].item() == pytest.approx(floored, rel=1e-6) and other[0] < share[0]
    assert other[1].item() == pytest.approx(share[1].item(), rel=1e-6)
    assert math.isclose(schedule.loss_weight(
        log_snr, torch.tensor([MASK_ID] * 2), torch.tensor([10, 10])
    )[0].item(), 1 + share[0].item(), rel_tol=1e-9)  # fmt: skip
