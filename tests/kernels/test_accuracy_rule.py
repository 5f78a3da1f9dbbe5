"""The accuracy rule itself: chance on few elements is forgiven, and told; an inaccurate implementation never is."""

from collections.abc import Callable

import pytest
import torch
from support.accuracy import InaccurateError, assert_accurate, judged_over_draws, poisoned, seeded

from afnext.kernels import activation
from afnext.kernels.triton_language import AVAILABLE as TRITON_AVAILABLE


def compare(factor: float, elements: int = 1) -> None:
    """One comparison whose actual errors have `factor` times the deviation of the plain computation's."""
    exact = torch.ones(elements, dtype=torch.float64)
    actual, plain = ((exact + 1e-3 * scale * torch.randn(elements)).float() for scale in (factor, 1.0))
    assert_accurate(actual, exact, plain)


def broken_draw(test: Callable[[], None], seed: int) -> InaccurateError:
    """The first draw's error that breaks the rule, by less than ten times."""
    for draw in range(seed, seed + 500):
        seeded(draw)
        try:
            test()
        except InaccurateError as error:
            if error.errors.actual**0.5 < 10 * error.errors.allowed:
                return error
    raise AssertionError("the rule was kept on 500 draws")


def test_one_element_is_judged_by_many_draws(seed: int) -> None:
    """Equal accuracy on one element breaks the rule about three times in ten."""
    broken = broken_draw(lambda: compare(1.0), seed)
    with pytest.warns(UserWarning, match="one draw of 100, which keep the rule together"):
        judged_over_draws(lambda: compare(1.0), seed, broken, draws=100)


@pytest.mark.parametrize("elements", [1, 1000])
def test_four_times_the_error_is_inaccurate(elements: int, seed: int) -> None:
    broken = broken_draw(lambda: compare(4.0, elements), seed)
    with pytest.raises(InaccurateError, match=r"RMS error .* allowed"):
        judged_over_draws(lambda: compare(4.0, elements), seed, broken, draws=100)


def test_each_comparison_of_a_test_is_judged_by_itself(seed: int) -> None:
    """An accurate first result does not make up for an inaccurate second one."""

    def test() -> None:
        compare(0.1, 100)
        compare(4.0, 100)

    with pytest.raises(InaccurateError) as judged:
        judged_over_draws(test, seed, broken_draw(test, seed))
    assert judged.value.comparison == 1


def test_the_draw_that_broke_the_rule_counts(seed: int) -> None:
    """What is inaccurate in one draw of many, and accurate in all others, is no chance."""
    broken = broken_draw(lambda: compare(9.0, 1000), seed)
    with pytest.raises(InaccurateError):
        judged_over_draws(lambda: compare(1.0, 1000), seed, broken, draws=16)


def test_ten_times_what_is_allowed_is_raised_at_once(seed: int) -> None:
    with pytest.raises(InaccurateError) as found:
        compare(1000.0, 100)
    with pytest.raises(InaccurateError) as again:
        judged_over_draws(lambda: pytest.fail("drawn again"), seed, found.value)
    assert again.value is found.value


def test_draws_differ_and_an_error_ends_them(seed: int) -> None:
    broken, drawn = broken_draw(lambda: compare(4.0, 100), seed), []

    def test() -> None:
        drawn.append(float(torch.rand(())))
        if len(drawn) == 3:
            raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        judged_over_draws(test, seed, broken)
    assert len(set(drawn)) == 3
    with pytest.raises(InaccurateError):
        compare(1000.0, 100)  # judged at once again


@pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")
def test_kernels_that_get_tensors_of_the_cpu_are_interpreted_also_beside_a_gpu(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = torch.randn(2, 5)
    with poisoned("triton"):
        actual = activation.gelu(x)
    torch.testing.assert_close(actual, torch.nn.functional.gelu(x))
