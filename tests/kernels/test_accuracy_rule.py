"""The accuracy rule itself: chance on few elements is forgiven, an inaccurate implementation never is."""

import pytest
import torch
from support.accuracy import InaccurateError, assert_accurate, judged_over_draws


def compare(factor: float, elements: int = 1) -> None:
    """One comparison whose actual errors have `factor` times the deviation of the plain computation's."""
    exact = torch.ones(elements, dtype=torch.float64)
    actual, plain = ((exact + 1e-3 * scale * torch.randn(elements)).float() for scale in (factor, 1.0))
    assert_accurate(actual, exact, plain)


def test_one_element_is_judged_by_many_draws(seed: int) -> None:
    """Alone, equal accuracy on one element breaks the rule about three times in ten."""
    broken = 0
    for _ in range(100):
        try:
            compare(1.0)
        except InaccurateError:
            broken += 1
    assert broken > 5
    judged_over_draws(lambda: compare(1.0), seed, draws=100)


@pytest.mark.parametrize("elements", [1, 1000])
def test_four_times_the_error_is_inaccurate(elements: int, seed: int) -> None:
    with pytest.raises(InaccurateError, match=r"RMS error .* allowed"):
        judged_over_draws(lambda: compare(4.0, elements), seed, draws=100)


def test_each_comparison_of_a_test_is_judged_by_itself(seed: int) -> None:
    """An accurate first result does not make up for an inaccurate second one."""

    def test() -> None:
        compare(0.1, 100)
        compare(4.0, 100)

    with pytest.raises(InaccurateError):
        judged_over_draws(test, seed)


def test_draws_differ_and_an_error_ends_them(seed: int) -> None:
    drawn = []

    def test() -> None:
        drawn.append(float(torch.rand(())))
        if len(drawn) == 3:
            raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        judged_over_draws(test, seed)
    assert len(set(drawn)) == 3
    with pytest.raises(InaccurateError):
        compare(1000.0, 100)  # judged at once again
