"""The Fréchet distance of a run's snapshots against the pictures that training had seen, as a table and a plot.

    python tests/bench/bench_curve.py RUN REFERENCE FEATURES OUTPUT [NUM_IMAGES [STEPS]]

FEATURES: a network's file. Every snapshot draws the same seeds. The last one is measured in full, and its statistics of
the reference serve for the others. What is in OUTPUT already is not done again.
"""

import sys
from typing import Any

from ldm import storage
from ldm.snapshot import read_snapshot
from pipelines import cluster, plots
from pipelines.evaluate import EvaluateConfig, EvaluateReport, evaluate
from pipelines.tracking import TrackingConfig
from pipelines.train.snapshots import snapshot_steps, snapshot_url


def main(run: str, reference: str, features: str, output: str, num_images: int, steps: int) -> None:
    snapshots = [snapshot_url(run, step) for step in snapshot_steps(run)]
    statistics = storage.join(output, "reference.safetensors")

    def measured(snapshot: str, **settings: Any) -> EvaluateReport:
        config = EvaluateConfig(
            snapshot=snapshot,
            output=storage.join(output, storage.name(snapshot)),
            features=features,
            num_images=num_images,
            num_inference_steps=steps,
            through="ray",
            tracking=TrackingConfig(enabled=False),
            **settings,
        )
        return evaluate(config)

    with cluster.ray_session():
        last = measured(snapshots[-1], reference=reference, save_statistics=statistics)
        reports = [measured(url, reference=statistics) for url in snapshots[:-1]] + [last]
    seen = [read_snapshot(url).images_seen for url in snapshots]
    key = f"fd-{last.features}"
    curve = [[report.metrics[f"{key}{end}"] for report in reports] for end in ("", "_low", "_high")]
    print(f"{num_images} pictures, {steps} steps, {key}")
    for row in zip(seen, *curve, strict=True):
        print(f"{row[0]:>9,}  {row[1]:8.2f}  [{row[2]:.2f}, {row[3]:.2f}]")
    print({name: round(value, 3) for name, value in last.metrics.items()})
    thousands = [images / 1000 for images in seen]
    of = {f"{num_images} pictures, 95% interval": (thousands, *curve)}
    plot = plots.line(of, "thousand pictures seen in training", "Fréchet distance", "A run's snapshots")
    storage.write_bytes(storage.join(output, "curve.png"), plot)


if __name__ == "__main__":
    given = sys.argv[1:]
    rest = [*given[4:], *("500", "50")[len(given) - 4 :]]
    main(*given[:4], int(rest[0]), int(rest[1]))
