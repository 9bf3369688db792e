"""The Inception Score (Salimans et al. 2016): how sure a classifier is of each picture, how varied it finds them."""

import torch
from torch import Tensor


def log_score_contributions(log_probabilities: Tensor) -> Tensor:
    """Log probabilities (N, K) of a classifier => KL(p(y|x) ‖ p(y)) of each row in nats, float64 (N,).

    The score is exp of the mean, over one split of all rows; papers that give the mean over ten splits of 5,000 have
    slightly less. p(y) is the mean over the rows.
    """
    if log_probabilities.ndim != 2 or len(log_probabilities) == 0:
        raise ValueError(f"a score needs log probabilities (N, K), not {tuple(log_probabilities.shape)}")
    each = log_probabilities.double().log_softmax(1)
    overall = each.logsumexp(0) - torch.tensor(len(each), dtype=torch.float64).log()
    probabilities = each.exp()
    return torch.where(probabilities > 0, probabilities * (each - overall), 0.0).sum(1)
