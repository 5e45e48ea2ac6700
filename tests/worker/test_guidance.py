"""The equations, by numbers worked out by hand."""

import torch

from worker import guidance


def column(*values: float) -> torch.Tensor:
    """[m, 1, 1, 1]: a scale, or predictions of one element an image."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def row(*values: float) -> torch.Tensor:
    """[1, m, 1, 1]: the elements of one image."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def check(seen: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(seen.flatten(), torch.tensor(expected, dtype=torch.float32))


def test_classifier_free_guidance_goes_from_nothing_through_the_prompt():
    check(guidance.classifier_free(column(1, 1), column(3, 3), column(7.5, 0)), 16, 1)


def test_safe_guidance_subtracts_gamma_inside_the_bracket():
    check(guidance.safe(column(1), column(3), column(0.5), column(4)), 1 + 4 * (2 - 0.5))


def test_phi_is_scaled_by_the_level():
    check(guidance.phi(column(0.5, -0.5), column(10, 2)), 5, -1)


def test_mu_is_the_smaller_of_one_and_the_size_of_phi():
    check(guidance.mu(row(-0.001, -0.004, -5), column(200), column(0)), 0.2, 0.8, 1)


def test_mu_is_signed_and_one_sided_and_strict_at_the_threshold():
    """A large positive difference is no concern, however large; an equally negative one is."""
    check(guidance.mu(row(-9, 9), column(1000), column(0.01)), 1, 0)
    check(guidance.mu(row(0.25, 0.5, 0.75), column(1000), column(0.5)), 1, 0, 0)
    check(guidance.mu(row(0.5, 0.5), column(1), column(1)), 0.5, 0.5)


def test_mu_has_the_parameters_of_each_image():
    difference = column(-0.002, -0.002, 0.02, 0.02)
    seen = guidance.mu(difference, column(200, 1000, 1000, 5000), column(0, 0.01, 0.01, 1))
    check(seen, 0.4, 1, 0, 1)


def test_gamma_is_the_weighted_direction_with_momentum():
    check(
        guidance.gamma(row(0.5, 0), row(1, 1), row(3, 3), column(0.3), row(10, 10)),
        0.5 * 2 + 0.3 * 10,
        0.3 * 10,
    )


def test_momentum_is_built_from_zero_in_two_calls():
    s_m, b_m, direction = column(0.5), column(0.7), column(1)
    nothing, one = column(0), column(1)
    first = guidance.gamma(one, nothing, direction, s_m, nothing)
    check(first, 1)
    nu = guidance.momentum(nothing, first, b_m)
    check(nu, 0.3)
    second = guidance.gamma(one, nothing, direction, s_m, nu)
    check(second, 1.15)
    check(guidance.momentum(nu, second, b_m), 0.7 * 0.3 + 0.3 * 1.15)


def test_a_difference_of_v_is_alpha_times_as_large_in_epsilon_space():
    """Two v at the same x: eps = alpha v + sigma x."""
    alpha, sigma, x = 0.6, 0.8, 3.0
    v = torch.tensor([0.5, -1.5])
    eps = alpha * v + sigma * x
    check(guidance.to_epsilon(v[:1] - v[1:], torch.tensor(alpha)), float(eps[0] - eps[1]))


def test_the_nearest_concept_is_the_one_of_the_smallest_angle_not_the_longest():
    e_0, e_p = row(1, 1), row(2, 1)  # the prompt points along the first axis
    e_S = torch.cat([row(101, 101), row(1.1, 1), row(-9, 1)])
    assert guidance.nearest_concept(e_0, e_p, e_S) == 1
    assert guidance.nearest_concept(e_0, e_p, e_S.flip(0)) == 1
    assert guidance.nearest_concept(e_0, e_p, e_S[[0, 2]]) == 0
