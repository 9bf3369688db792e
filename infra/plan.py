"""What a large run takes: storage, GPU hours, S3 requests, price and wall time.

    python infra/plan.py [INPUTS.yaml] [key=value …]

Prints Markdown: the inputs with where each is from, then what follows from them. Needs PyYAML and nothing of the
project; that the project asks and writes as it says here is held by tests/infra/test_plan.py.
"""

import math
import sys
from pathlib import Path
from typing import Any

import yaml

MIB, MB = 1 << 20, 1_000_000
READ_PART = 16 * MIB
"""Bytes of one GET."""
WHOLE_PUT, PUT_PART = 100 * MIB, 50 * MIB
"""A file below the first is one PUT; a larger one begins, comes in parts of the second, and is completed."""
INDEX_BYTES, RECEIPT_BYTES, TABLE_BYTES = 16, 1547, 287
"""Of a record in the index; of a shard: its receipt, its rows in the tables of a generation."""
LISTED = 1000
"""Names in an answer to LIST."""


class Wrong(Exception):
    """One line for the one who asked."""


def read_inputs(arguments: list[str]) -> dict[str, dict[str, Any]]:
    files = [Path(argument) for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise Wrong(f"{files[1]}: is a second file of inputs; give one, and key=value")
    place = files[0] if files else Path(__file__).with_name("plan.yaml")
    try:
        inputs: dict[str, dict[str, Any]] = yaml.safe_load(place.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Wrong(f"{place}: cannot be read ({' '.join(str(error).split())}); give a copy of plan.yaml") from None
    for key, _, text in (argument.partition("=") for argument in arguments if "=" in argument):
        if key not in inputs:
            raise Wrong(f"{key}={text}: there is no such input; give one of {', '.join(inputs)}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise Wrong(f"{key}={text}: give a number above 0")
        inputs[key] = {**inputs[key], "value": value, "kind": "given", "from": "the command line"}
    return inputs


def sizes(v: dict[str, float]) -> dict[str, float]:
    """Bytes, by what they are of; shards too."""
    shards = math.ceil(v["pictures"] / v["pictures_per_shard"])
    npy = 128 + 2 * v["latent_channels"] * v["latent_cells"]  # fp16
    record = 512 + 512 * math.ceil(npy / 512)
    return {
        "shards": shards,
        "input shard": v["pictures_per_shard"] * v["picture_bytes"],
        "latent tar": v["pictures_per_shard"] * record + 1024,
        "pictures": v["pictures"] * v["picture_bytes"],
        "latents": v["pictures"] * record + shards * 1024,
        "indexes": v["pictures"] * INDEX_BYTES,
        "columns": v["pictures"] * v["columns_bytes"],
        "receipts and tables": shards * (RECEIPT_BYTES + TABLE_BYTES),
        "three checkpoints, a snapshot": v["parameters"] * (3 * 20 + 4),
    }


def encode_requests(s: dict[str, float]) -> tuple[float, float]:
    """(PUT, POST and LIST; GET and HEAD) of an undisturbed run.

    For a shard: its tar, index, columns and receipt are put, and the receipt is asked for three times in vain (HEAD,
    LIST); the input is asked for and read, what was put is looked at (HEAD), and the driver reads the receipt.
    """
    tar = s["latent tar"]
    parts = 1 if tar < WHOLE_PUT else 2 + math.ceil(tar / PUT_PART)
    puts = parts + 3 + 3
    gets = 1 + math.ceil(s["input shard"] / READ_PART) + 3 + 3 + 2
    lists = 4 * math.ceil(s["shards"] / LISTED)  # inputs; receipts before, at the commit and after it
    return s["shards"] * puts + lists, s["shards"] * gets


def read_requests(s: dict[str, float]) -> float:
    """GETs of each shard once: its tar in parts, its index, its columns."""
    return s["shards"] * (math.ceil(s["latent tar"] / READ_PART) + 2)


def results(v: dict[str, float]) -> list[tuple[str, str]]:
    s = sizes(v)
    encode_hours = v["pictures"] / v["encode_rate"] / v["encode_efficiency"] / 3600
    train_hours = v["epochs"] * v["pictures"] / v["train_rate"] / 3600
    kept = sum(size for name, size in s.items() if name not in ("shards", "input shard", "latent tar"))
    nodes = math.ceil(v["gpus_train"] / v["gpus_per_node"])
    fetches = 1 if nodes * v["cache_bytes"] >= s["latents"] + s["indexes"] + s["columns"] else math.ceil(v["epochs"])
    puts, gets = encode_requests(s)
    reads = fetches * read_requests(s)
    gpu = v["price_gpu_hour"]
    prices = {
        "encode": encode_hours * gpu,
        "training": train_hours * gpu,
        "storage": kept / 1e9 * v["months"] * v["price_gb_month"],
        "requests": puts / 1000 * v["price_1000_puts"] + (gets + reads) / 1000 * v["price_1000_gets"],
    }
    stored = [(f"Storage: {name}", terabytes(size)) for name, size in s.items() if name in list(s)[3:]]
    return [
        ("Input shards", f"{s['shards']:,.0f} of {s['input shard'] / MB:,.0f} MB"),
        ("Latent tar of a shard", f"{s['latent tar'] / MB:,.1f} MB"),
        *stored,
        ("Storage in all", terabytes(kept)),
        ("Encode: GPU hours", f"{encode_hours:,.0f}"),
        ("Encode: wall time", days(encode_hours / v["gpus_encode"])),
        ("Encode: PUT, POST, LIST", f"{puts:,.0f}"),
        ("Encode: GET, HEAD", f"{gets:,.0f}"),
        ("Training: GPU hours", f"{train_hours:,.0f}"),
        ("Training: wall time", days(train_hours / v["gpus_train"])),
        ("Training: times that S3 is read", f"{fetches} ({nodes} nodes)"),
        ("Training: GET", f"{reads:,.0f}"),
        *((f"Price: {name}", f"${price:,.0f}") for name, price in prices.items()),
        ("Price in all", f"${sum(prices.values()):,.0f}"),
    ]


def terabytes(size: float) -> str:
    return f"{size / 1e12:,.4g} TB"


def days(hours: float) -> str:
    return f"{hours:,.1f} hours ({hours / 24:,.1f} days)"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def report(inputs: dict[str, dict[str, Any]]) -> str:
    lines = ["| input | value | unit | | from |", "|---|---|---|---|---|"]
    for key, about in inputs.items():
        row = (f"`{key}`", number(about["value"]), about["unit"], about["kind"], about["from"])
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| what it takes | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in results({k: i["value"] for k, i in inputs.items()})]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(report(read_inputs(sys.argv[1:])))
    except Wrong as error:
        print(error, file=sys.stderr)
        sys.exit(2)
