"""Which samples of a latent dataset are read: a condition on its columns, a list of ids left out, a held-out share."""

import ast
import difflib
import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ldm import random, storage
from ldm.config import DamagedError, RequestError, canonical_json
from ldm.latents.manifest import Manifest
from ldm.latents.tables import from_parquet
from ldm.latents.writer import columns_url

Split = Literal["train", "holdout"]
_AT_ONCE = 16
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_GRAMMAR = "compare columns with numbers or texts, as in: aesthetic > 5 and width >= 512"


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    where: a condition on the columns; "" for all. A value that is missing fulfils none.
    exclude: ids of records, or of pictures for all records of each.
    holdout: share of the pictures, by a hash of the id, that `split="train"` leaves out and "holdout" is.
    """

    where: str = ""
    exclude: frozenset[int] = frozenset()
    holdout: float = 0.0
    split: Split = "train"

    def __str__(self) -> str:
        excluded = f"{len(self.exclude)} ids" if self.exclude else "none"
        return f"where={self.where or 'all'}, exclude={excluded}, holdout={self.holdout}"

    @property
    def takes_all(self) -> bool:
        return not self.where and not self.exclude and self.holdout == 0 and self.split == "train"


@dataclass(frozen=True)
class Chosen:
    """What came of it. counts: chosen records of each shard, int64 (S,). masks: which these are, as packed bits; None
    where all are. left_out: records by what left them out, the first that did."""

    counts: npt.NDArray[np.int64]
    masks: tuple[bytes | None, ...]
    left_out: dict[str, int]

    def numbers(self, shard: int, count: int) -> npt.NDArray[np.int64] | None:
        """The chosen records of a shard of `count`, in order; None where all are."""
        mask = self.masks[shard] if self.masks else None
        if mask is None:
            return None
        return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), count=count))

    def hash(self, manifest: Manifest) -> str:
        """Of the very samples: the generation, and which of its records."""
        digest = hashlib.sha256(manifest.generation.encode())
        for number, mask in enumerate(self.masks):
            if mask is not None:
                digest.update(f"/{number}/".encode() + mask)
        return digest.hexdigest()[:16]


def choose(manifest: Manifest, choices: Sequence[Choice]) -> list[Chosen]:
    """Reads the columns that the choices ask about, of every shard, once; none where they take all.

    choices: of one condition and one split; they differ in what they exclude.
    Raises RequestError for a condition that cannot be read or names no column, DamagedError.
    """
    if all(choice.takes_all for choice in choices):
        return [Chosen(manifest.counts, (), {}) for _ in choices]
    where = choices[0].where
    condition, columns = parse_condition(where) if where else (None, set())
    lists = [pa.array(sorted(choice.exclude), pa.int64()) for choice in choices]
    wanted = sorted({*columns, "id", "picture"})

    def read(row: int) -> tuple[list[tuple[npt.NDArray[np.bool_], dict[str, int]]], set[str]]:
        table = _read_columns(manifest, row, wanted)
        fulfilled = _fulfilled(table, condition, columns, where)
        in_split = is_held_out(table["picture"].to_numpy(), choices[0].holdout) == (choices[0].split == "holdout")
        found = []
        for ids in lists:
            excluded = pc.or_(pc.is_in(table["id"], ids), pc.is_in(table["picture"], ids)).to_numpy()
            mask, left_out = np.ones(len(table), bool), {}
            for reason, kept in (("where", fulfilled), ("exclude", ~excluded), ("holdout", in_split)):
                left_out[reason] = int((mask & ~kept).sum())
                mask &= kept
            found.append((mask, left_out))
        return found, set(table.schema.names)

    counts = [np.zeros(len(manifest.counts), np.int64) for _ in choices]
    masks: list[list[bytes | None]] = [[] for _ in choices]
    left_out: list[Counter[str]] = [Counter() for _ in choices]
    known = set[str]()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for row, (found, names) in enumerate(pool.map(read, range(len(manifest.counts)))):
            known |= names
            for number, (mask, left) in enumerate(found):
                counts[number][row] = mask.sum()
                masks[number].append(None if mask.all() else np.packbits(mask).tobytes())
                left_out[number].update(left)
    if missing := sorted(columns - known):
        near = difflib.get_close_matches(missing[0], _read_columns(manifest, 0, None).schema.names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`ldm inspect` lists the columns"
        raise RequestError(f"where={where}: {manifest.url} has no column {missing[0]!r}; {hint}")
    each = zip(counts, masks, left_out, strict=True)
    return [Chosen(count, tuple(mask), {k: n for k, n in left.items() if n}) for count, mask, left in each]


def is_held_out(ids: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Whether each picture id (n,) belongs to the held-out share: a function of the id alone, so that adding shards
    moves no sample from one split to the other."""
    return random.uniform(0, "holdout", torch.from_numpy(np.array(ids, np.int64)), 0).numpy() < share


def hashed_between(manifest: Manifest, low: float, high: float) -> npt.NDArray[np.int64]:
    """The ids of the pictures whose hash, which `is_held_out` goes by, is in [low, high): shares that are nested."""
    tables = (_read_columns(manifest, row, ["picture"]) for row in range(len(manifest.counts)))
    ids = np.unique(np.concatenate([table["picture"].to_numpy() for table in tables]))
    return ids[is_held_out(ids, high) & ~is_held_out(ids, low)]


def read_ids(url: str) -> frozenset[int]:
    """The ids of a list: one number a line, `#` begins a remark. Raises RequestError."""
    try:
        lines = storage.read_bytes(url).decode().splitlines()
    except FileNotFoundError:
        raise RequestError(f"exclude={url}: does not exist; give a text file of ids, one a line") from None
    except UnicodeDecodeError:
        raise RequestError(f"exclude={url}: is no text; give a file of ids, one a line") from None
    ids = set()
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text and not (text.isdecimal() and int(text) < 2**63):
            raise RequestError(f"exclude={url}: line {number} is {line.strip()[:40]!r}; give one id a line")
        if text:
            ids.add(int(text))
    return frozenset(ids)


def exclusions_by_step(given: str | Collection[int] | Mapping[int, str | Collection[int]]) -> dict[int, frozenset[int]]:
    """All that is excluded from each step on, step 0 first."""
    by_step = given if isinstance(given, Mapping) else {0: given}
    found, so_far = {0: frozenset[int]()}, frozenset[int]()
    for step, ids in sorted(by_step.items()):
        so_far |= read_ids(ids) if isinstance(ids, str) else frozenset(map(int, ids))
        if so_far and not 0 <= min(so_far) <= max(so_far) < 2**63:
            raise RequestError(f"exclude: holds {max(so_far, key=abs)}, which is no id (0 to 2^63 - 1)")
        found[step] = so_far
    return found


def ids_hash(ids: Iterable[int]) -> str:
    return hashlib.sha256(canonical_json(sorted(ids)).encode()).hexdigest()[:16]


def parse_condition(text: str) -> tuple[pc.Expression, set[str]]:
    """A condition in Python's notation => (an Arrow expression, the columns that it names).

    Comparisons (chained ones too) of columns with constants or columns, `in [..]`, `is None`, and, or, not, brackets.
    Raises RequestError.
    """
    columns: set[str] = set()

    def value(node: ast.expr) -> pc.Expression:
        match node:
            case ast.Name(id=name):
                columns.add(name)
                return pc.field(name)
            case ast.Constant(value=bool() | int() | float() | str() as constant):
                return pc.scalar(constant)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as constant)):
                return pc.scalar(-constant)
        raise refusal(node)

    def compare(left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        match op, right:
            case ((ast.In() | ast.NotIn()), (ast.List(elts=items) | ast.Tuple(elts=items))):
                found = value(left).isin([ast.literal_eval(item) for item in items])
                # An empty value is in no list, and outside of none either.
                return found if isinstance(op, ast.In) else ~found & ~value(left).is_null()
            case ((ast.Is() | ast.IsNot()), ast.Constant(value=None)):
                return value(left).is_null() if isinstance(op, ast.Is) else ~value(left).is_null()
        if type(op) not in _COMPARISONS:
            raise refusal(right)
        return _COMPARISONS[type(op)](value(left), value(right))

    def condition(node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [condition(part) for part in values]
                whole = parts[0]
                for part in parts[1:]:
                    whole = whole & part if isinstance(op, ast.And) else whole | part
                return whole
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~condition(operand)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                lefts = [left, *rights[:-1]]
                parts = [compare(*each) for each in zip(lefts, ops, rights, strict=True)]
                whole = parts[0]
                for part in parts[1:]:
                    whole = whole & part
                return whole
            case ast.Name():
                return value(node)
        raise refusal(node)

    def refusal(node: ast.AST) -> RequestError:
        return RequestError(f"where={text}: {ast.unparse(node)!r} cannot be used here; {_GRAMMAR}")

    try:
        return condition(ast.parse(text.strip(), mode="eval").body), columns
    except (SyntaxError, RecursionError, MemoryError):
        raise RequestError(f"where={text}: cannot be read; {_GRAMMAR}") from None
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"where={text}: {' '.join(str(error).split())}; {_GRAMMAR}") from None


def _fulfilled(
    table: pa.Table, condition: pc.Expression | None, columns: Sequence[str] | set[str], text: str
) -> npt.NDArray[np.bool_]:
    if condition is None:
        return np.ones(len(table), bool)
    for name in sorted(set(columns) - set(table.schema.names)):  # a field that no sample of this shard has
        table = table.append_column(name, pa.nulls(len(table)))
    for place, field in enumerate(table.schema):
        if field.name in columns and pa.types.is_null(field.type):
            return _fulfilled_without(table, field.name, place, condition, columns, text)
    try:
        numbered = table.append_column("ldm:row", pa.array(np.arange(len(table))))
        kept = numbered.filter(condition)["ldm:row"].to_numpy()
    except (pa.ArrowException, TypeError) as error:
        kinds = ", ".join(f"{name}: {table.schema.field(name).type}" for name in sorted(columns))
        problem = " ".join(str(error).split())
        raise RequestError(f"where={text}: does not fit the columns ({kinds}): {problem}; {_GRAMMAR}") from None
    mask = np.zeros(len(table), bool)
    mask[kept] = True
    return mask


def _fulfilled_without(
    table: pa.Table, name: str, place: int, condition: pc.Expression, columns: set[str] | Sequence[str], text: str
) -> npt.NDArray[np.bool_]:
    """As `_fulfilled`, for a shard whose column `name` is empty and so has no type: that which fits the condition."""
    problem: RequestError | None = None
    for kind in (pa.float64(), pa.string(), pa.bool_()):
        try:
            typed = table.set_column(place, name, pa.nulls(len(table), kind))
            return _fulfilled(typed, condition, columns, text)
        except RequestError as error:
            problem = error
    assert problem is not None
    raise problem


def _read_columns(manifest: Manifest, row: int, names: Sequence[str] | None) -> pa.Table:
    """Those of the columns that the shard has; all of them where none is named."""
    shard = manifest.shard(row)
    place = columns_url(manifest.url, shard["columns"])
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:
        raise DamagedError(f"{place}: is missing") from None
    if hashlib.sha256(data).hexdigest() != shard["columns_sha256"]:
        raise DamagedError(f"{place}: does not have the hash that its manifest names; it is damaged")
    return from_parquet(data, None if names is None else list(names))
