"""The table of classes where DiTPipeline wants it: the null class of guidance is number 1000 there, whatever the count.

Ours: num_classes rows, then the null class. Theirs, of at least 1001 rows: fewer classes leave rows up to 1000, which
repeat the null class; of more classes those from 1000 on move up by one; and without classes all rows are 0.
"""

import torch
from torch import Tensor

NULL = 1000


def to_pipeline(table: Tensor | None, hidden_size: int) -> Tensor:
    """Our table (K + 1, D), or None for an unconditional model => theirs (max(1000, K) + 1, D)."""
    if table is None:
        return torch.zeros(NULL + 1, hidden_size)
    classes, null = table[:-1], table[-1:]
    padding = null.expand(max(0, NULL - len(classes)), -1)
    return torch.cat([classes[:NULL], padding, null, classes[NULL:]])


def from_pipeline(table: Tensor, num_classes: int) -> Tensor | None:
    """The inverse of `to_pipeline`."""
    if num_classes == 0:
        return None
    return torch.cat([table[: min(num_classes, NULL)], table[NULL + 1 : num_classes + 1], table[NULL : NULL + 1]])


def count_classes(table: Tensor) -> int:
    """The classes of a table (of another's) whose null class is the last row: equal rows before it are padding.

    They repeated it when the table was made, and a fine-tune of the null class leaves them behind.
    """
    padding = table[-2] if len(table) > 2 and torch.equal(table[-2], table[-3]) else table[-1]
    own = (table[:-1] != padding).any(dim=1).nonzero()
    return int(own.max()) + 1 if len(own) else len(table) - 1


def pipeline_label(number: int) -> int:
    """Our class number => DiTPipeline's."""
    return number if number < NULL else number + 1
