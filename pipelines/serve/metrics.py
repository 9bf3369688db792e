"""Figures of a replica for Prometheus, through Ray: `infra/grafana/ldm-serve.json` draws them."""

from pipelines.serve.replica import Observe

_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
_SHARES = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]


def observer() -> Observe:
    """What takes the figures, in a replica of Ray Serve."""
    from ray.serve import metrics

    queue = metrics.Gauge("ldm_serve_queue", description="requests at the replica, those that are drawn included")
    histograms = {
        "occupancy": metrics.Histogram(
            "ldm_serve_batch_occupancy", description="rows of a call, as a share of the most", boundaries=_SHARES
        ),
        "step_s": metrics.Histogram(
            "ldm_serve_step_seconds", description="a call of the denoiser", boundaries=_SECONDS
        ),
        "first_preview_s": metrics.Histogram(
            "ldm_serve_first_preview_seconds", description="from a request to its first preview", boundaries=_SECONDS
        ),
    }
    counters = {
        "refused": metrics.Counter("ldm_serve_refused", description="requests for which there was no room"),
        "cancelled": metrics.Counter("ldm_serve_cancelled", description="requests that were cancelled"),
    }

    def observe(name: str, value: float) -> None:
        if name == "queue":
            queue.set(value)
        elif name in counters:
            counters[name].inc(value)
        else:
            histograms[name].observe(value)

    return observe
