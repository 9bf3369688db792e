"""Classifier-free guidance: one call for both answers, its interval, its rescale."""

import pytest
import torch
from torch import Tensor

from ldm.config import RequestError
from ldm.sampler import guided


def test_guidance_is_one_call_of_conditional_and_null_rows() -> None:
    calls: list[list[int]] = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        calls.append(labels.tolist())
        return labels.reshape(-1, 1, 1, 1) * torch.ones_like(x)

    x, t, labels = torch.zeros(2, 1, 2, 2), torch.tensor([100, 900]), torch.tensor([1, 2])
    values = guided(denoiser, labels, 3.0, null_label=10)(x, t)[:, 0, 0, 0]
    assert calls == [[1, 2, 10, 10]]
    assert values.tolist() == [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)]
    assert guided(denoiser, labels, 0.0, null_label=10)(x, t)[:, 0, 0, 0].tolist() == [10, 10]
    assert guided(denoiser, labels, 1.0, null_label=10)(x, t)[:, 0, 0, 0].tolist() == [1, 2]
    assert calls[-1] == [1, 2]
    # only the row inside the interval is guided, and a batch wholly outside is one call of N rows
    low = guided(denoiser, labels, 3.0, null_label=10, interval=(0, 500))
    assert low(x, t)[:, 0, 0, 0].tolist() == [10 + 3 * (1 - 10), 2]
    assert low(x, t + 500)[:, 0, 0, 0].tolist() == [1, 2] and calls[-1] == [1, 2]


def test_guidance_rescale_keeps_the_deviation_of_the_conditional_answer() -> None:
    base = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return torch.where(labels.reshape(-1, 1, 1, 1) == 10, -x, 2 * x)

    x, t, labels = base, torch.zeros(2, dtype=torch.long), torch.tensor([1, 2])
    plain = guided(denoiser, labels, 5.0, 10)(x, t)
    torch.testing.assert_close(plain, 14 * x)
    whole = guided(denoiser, labels, 5.0, 10, rescale=1.0)(x, t)
    torch.testing.assert_close(whole.std(dim=(1, 2, 3)), (2 * x).std(dim=(1, 2, 3)))
    part = guided(denoiser, labels, 5.0, 10, rescale=0.7)(x, t)
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * plain)


def test_an_unconditional_denoiser_cannot_be_guided() -> None:
    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is None
        return x

    x, t = torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    assert torch.equal(guided(denoiser, None, 1.0, None)(x, t), x)
    with pytest.raises(RequestError, match=r"guidance_scale=2.0: the model is unconditional; must be 1"):
        guided(denoiser, None, 2.0, None)


def test_a_rescaled_answer_that_is_zero_stays_zero() -> None:
    """As a fresh denoiser answers: its deviation is 0."""
    x = torch.ones(2, 4, 4, 4)
    denoise = guided(lambda x, t, labels: torch.zeros_like(x), torch.tensor([0, 1]), 4.0, 2, rescale=0.7)
    assert torch.equal(denoise(x, torch.tensor([5, 5])), torch.zeros_like(x))
