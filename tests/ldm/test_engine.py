"""Pictures that share calls of the denoiser: each has the bits that it has alone, whatever comes and goes beside it."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.buckets import measure_buckets
from ldm.config import RequestError
from ldm.diffusion import DiffusionConfig
from ldm.drawing import Blend, Edit, PictureSampler, load_sampler
from ldm.engine import StepEngine
from ldm.job import Drawn, Event, Finished, Job, Preview, Progress
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig
from ldm.sharing import Refused
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

PLAIN = SamplerConfig(num_inference_steps=4)
NOISY = SamplerConfig(num_inference_steps=5, eta=0.7)
GUIDED = SamplerConfig(num_inference_steps=7, guidance_scale=3.0, guidance_rescale=0.5, guidance_interval=(0.1, 0.8))
MULTISTEP = SamplerConfig(num_inference_steps=6, sampler="dpmpp_2m")
CLIPPED = SamplerConfig(num_inference_steps=3, clip_x0=0.5, eta="sigma_hat", spacing="leading")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("engine") / "snapshot")


@pytest.fixture
def sampler(url: str) -> PictureSampler:
    return load_sampler(url, 1, "cpu")


class Told:
    """A job, and what it was told."""

    def __init__(
        self, settings: SamplerConfig, seeds: list[int], labels: list[int] | None = None, **options: Any
    ) -> None:
        self.events: list[Event] = []
        chosen = torch.tensor([seed % 10 for seed in seeds] if labels is None else labels)
        self.job = Job(settings, chosen, torch.tensor(seeds), self.events.append, **options)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def pictures(self) -> Tensor:
        return torch.stack([event.pixels for event in sorted(self.of(Drawn), key=lambda event: event.index)])


def slow_down(sampler: PictureSampler, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
    """Decoding takes so much longer."""
    decode = sampler.decode

    def slowly(latents: Tensor) -> Tensor:
        time.sleep(seconds)
        return decode(latents)

    monkeypatch.setattr(sampler, "decode", slowly)


def engine(sampler: PictureSampler, *buckets: int, seconds: float = 0.01, max_jobs: int = 64) -> StepEngine:
    return StepEngine(sampler, dict.fromkeys(buckets, seconds), max_jobs)


def random_job(chance: random.Random, rows: int) -> Told:
    """One to nine pictures of one to six steps, each of so many rows."""
    settings = SamplerConfig(num_inference_steps=chance.randint(1, 6), guidance_scale=1.0 if rows == 1 else 2.0)
    return Told(settings, list(range(chance.randint(1, 9))))


def run(engine: StepEngine, *told: Told) -> int:
    """Draws all of them; returns the number of calls."""
    for one in told:
        engine.submit(one.job)
    calls = 0
    while engine.step():
        calls += 1
    return calls


def offline(url: str, settings: SamplerConfig, seeds: list[int], rows: int) -> Tensor:
    """By the sampler of `ldm sample`, in calls of so many rows."""
    batch = rows if settings.guidance_scale == 1 else rows // 2
    labels = torch.tensor([seed % 10 for seed in seeds])
    return load_sampler(url, batch, "cpu").draw(labels, torch.tensor(seeds), settings)


@pytest.mark.parametrize(
    "settings",
    [PLAIN, NOISY, GUIDED.model_copy(update={"guidance_interval": (0.0, 1.0)}), MULTISTEP, CLIPPED],
    ids=["plain", "noisy", "guided", "2m", "clipped"],
)
def test_pictures_are_those_of_the_offline_sampler(url: str, sampler: PictureSampler, settings: SamplerConfig) -> None:
    told = Told(settings, [5, 6, 7])
    run(engine(sampler, 6), told)
    assert torch.equal(told.pictures, offline(url, settings, [5, 6, 7], 6))
    assert told.events[-1] == Finished()


def test_a_mixed_batch_changes_no_bit_of_any_picture(url: str, sampler: PictureSampler) -> None:
    """Alone and in a full batch of other steps, samplers, guidance and noise, in one bucket."""
    settings = [PLAIN, NOISY, GUIDED, MULTISTEP, CLIPPED, GUIDED.model_copy(update={"guidance_scale": 1.5})]
    mixed = [Told(one, [10 * i, 10 * i + 1, 10 * i + 2]) for i, one in enumerate(settings)]
    run(engine(sampler, 8), *mixed)
    for i, one in enumerate(settings):
        alone = Told(one, [10 * i, 10 * i + 1, 10 * i + 2])
        run(engine(sampler, 8), alone)
        assert torch.equal(mixed[i].pictures, alone.pictures), one


def test_across_buckets_the_latents_stay_within_the_stated_bound(sampler: PictureSampler) -> None:
    """docs/serving.md states it: 1e-5 of the largest latent after 20 steps."""
    settings = SamplerConfig(num_inference_steps=20, guidance_scale=2.0)
    last: dict[int, Tensor] = {}
    decode = sampler.decode
    for size in (2, 4, 8):

        def keep(latents: Tensor, size: int = size) -> Tensor:
            last[size] = latents
            return decode(latents)

        sampler.decode = keep  # type: ignore[method-assign]
        run(engine(sampler, size), Told(settings, [3]))
    for size in (2, 4):
        assert (last[size] - last[8]).abs().max() < 1e-5 * last[8].abs().max()


def test_the_exact_ones_are_drawn_in_the_largest_bucket_always(sampler: PictureSampler) -> None:
    shapes: list[int] = []
    denoise = sampler.denoise
    sampler.denoise = lambda x, t, labels: shapes.append(len(x)) or denoise(x, t, labels)  # type: ignore[method-assign, func-returns-value]
    run(engine(sampler, 1, 2, 4, 8), Told(PLAIN, [1]), Told(PLAIN, [2, 3]))
    assert set(shapes) == {4}  # three rows, padded
    shapes.clear()
    run(engine(sampler, 1, 2, 4, 8), Told(PLAIN, [1], exact=True))
    assert set(shapes) == {8}


def test_pictures_come_and_go_between_calls(sampler: PictureSampler) -> None:
    """One of 10 steps and three of 4 in a batch of two: none waits for whole batches, which take 14."""
    long = Told(SamplerConfig(num_inference_steps=10), [1])
    short = Told(PLAIN, [2, 3, 4])
    assert run(engine(sampler, 2), long, short) == 12
    assert len(long.of(Drawn)) == 1 and len(short.of(Drawn)) == 3


def test_a_small_job_does_not_wait_for_a_large_one(sampler: PictureSampler) -> None:
    large, small = Told(PLAIN, list(range(200))), Told(PLAIN, [1])
    running = engine(sampler, 4)
    running.submit(large.job)
    running.step()
    running.submit(small.job)
    calls = 0
    while not small.of(Finished):
        running.step()
        calls += 1
    assert calls == 4  # one for each of its steps
    while running.step():
        pass
    assert len(large.of(Drawn)) == 200


def test_a_cancelled_job_is_in_no_further_call(sampler: PictureSampler) -> None:
    gone, stays = Told(PLAIN, [1, 2]), Told(PLAIN, [3, 4, 5])
    running = engine(sampler, 2)
    running.submit(gone.job)
    running.step()
    running.submit(stays.job)
    running.cancel(gone.job)
    before = len(gone.events)
    while running.step():
        pass
    assert len(gone.events) == before
    assert len(stays.of(Drawn)) == 3
    running.cancel(gone.job)  # once more is nothing


def test_events_tell_of_every_step(sampler: PictureSampler) -> None:
    told = Told(SamplerConfig(num_inference_steps=9), [1, 2], previews=2)
    run(engine(sampler, 2), told)
    assert [event.steps_done for event in told.of(Progress)] == list(range(2, 19, 2))
    assert [(event.index, event.steps_done) for event in told.of(Preview)] == [(0, 3), (1, 3), (0, 6), (1, 6)]
    assert all(event.pixels.shape == (3, 32, 32) for event in told.of(Preview))
    assert told.events[-1] == Finished()


class Failing(PictureSampler):
    """Cannot answer for label 7."""

    def __init__(self, sampler: PictureSampler) -> None:
        self.__dict__.update(sampler.__dict__)

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if (labels == 7).any():
            raise RuntimeError("no answer\nfor seven")
        return super().denoise(x, t, labels)


def test_a_failure_ends_those_who_took_part_and_no_other(sampler: PictureSampler) -> None:
    bad, beside, later = Told(PLAIN, [1], [7]), Told(PLAIN, [2], [3]), Told(PLAIN, [3], [4])
    running = engine(Failing(sampler), 2)
    run(running, bad, beside, later)
    assert bad.events == [Finished("RuntimeError: no answer for seven")]
    assert beside.events == bad.events
    assert len(later.of(Drawn)) == 1
    assert running.jobs == []


class TestRoom:
    def test_no_more_jobs_than_may_wait(self, sampler: PictureSampler) -> None:
        running = engine(sampler, 2, max_jobs=2)
        for seed in (1, 2):
            running.submit(Told(PLAIN, [seed]).job)
        with pytest.raises(Refused, match="^as many requests wait as may wait") as error:
            running.submit(Told(PLAIN, [3]).job)
        assert error.value.retry_after > 0

    def test_a_deadline_that_cannot_be_kept_is_refused_at_once(self, sampler: PictureSampler) -> None:
        running = engine(sampler, 2, seconds=1.0)
        now = time.monotonic()
        with pytest.raises(Refused, match=r"^the deadline could not be kept"):
            running.submit(Told(PLAIN, [1, 2, 3], deadline=now + 9).job)  # two, then one: 8 calls, too near to 9 s
        assert running.submit(Told(PLAIN, [1, 2, 3], deadline=now + 11).job) == pytest.approx(8.0)

    def test_what_would_break_anothers_deadline_is_refused(self, sampler: PictureSampler) -> None:
        running = engine(sampler, 2, seconds=1.0)
        running.submit(Told(PLAIN, list(range(8)), deadline=time.monotonic() + 24).job)  # 18 s
        with pytest.raises(Refused, match="^an earlier request's deadline could not be kept"):
            running.submit(Told(PLAIN, [1]).job)  # would pass it: 2 s more
        running.submit(Told(PLAIN, list(range(20))).job)  # comes after it

    def test_a_call_is_taken_to_last_as_long_as_all_that_belongs_to_it(
        self, sampler: PictureSampler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow_down(sampler, monkeypatch)
        running = engine(sampler, 1, seconds=0.01)
        expected = running.submit(Told(PLAIN, [1]).job)
        running.submit(Told(SamplerConfig(num_inference_steps=40), [2], previews=39).job)
        for _ in range(35):  # each of which shows a preview
            running.step()
        assert running.submit(Told(PLAIN, [1]).job) > 2 * expected

    def test_one_call_that_is_far_out_hardly_counts_and_is_forgotten(
        self, sampler: PictureSampler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running = engine(sampler, 1, seconds=0.01)
        expected = running.submit(Told(PLAIN, [1]).job)
        slow_down(sampler, monkeypatch, seconds=0.5)
        drawn = Told(PLAIN, [2])
        run(running, drawn)  # the last calls decode, and take 50 times as long
        assert running.submit(Told(PLAIN, [3]).job) == expected, "nobody is here who was slowed down"
        assert running.submit(Told(PLAIN, [4]).job) == 2 * expected

    def test_who_waits_with_others_takes_calls_as_large_as_theirs(self, sampler: PictureSampler) -> None:
        running = StepEngine(sampler, {1: 1.0, 8: 5.0}, 64)
        assert running.submit(Told(PLAIN, [1]).job) == pytest.approx(4 * 1.0)
        assert running.submit(Told(PLAIN, [2]).job) == pytest.approx(4 * 5.0)

    def test_nobody_passes_one_that_is_late_already(
        self, sampler: PictureSampler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running = engine(sampler, 2, seconds=1.0)
        began = time.monotonic()
        running.submit(Told(PLAIN, list(range(8)), deadline=began + 24).job)  # 18 s
        monkeypatch.setattr(time, "monotonic", lambda: began + 10)  # and nothing was done
        with pytest.raises(Refused, match="^an earlier request's deadline could not be kept"):
            running.submit(Told(PLAIN, [1]).job)

    def test_a_call_that_is_not_full_takes_as_long(self, sampler: PictureSampler) -> None:
        running = StepEngine(sampler, {1: 1.0, 8: 5.0}, 64)
        assert running.submit(Told(PLAIN, [1, 2]).job) == pytest.approx(4 * 5.0)
        assert running.submit(Told(PLAIN, [3]).job) == pytest.approx(4 * 5.0)  # all three share the calls

    def test_nobody_makes_anothers_calls_too_large_for_its_deadline(self, sampler: PictureSampler) -> None:
        running = StepEngine(sampler, {1: 1.0, 8: 5.0}, 64)
        running.submit(Told(PLAIN, [1], deadline=time.monotonic() + 6).job)
        with pytest.raises(Refused, match="^an earlier request's deadline could not be kept"):
            running.submit(Told(PLAIN, list(range(8))).job)

    @pytest.mark.parametrize("rows", [1, 2])
    def test_no_job_takes_more_calls_than_it_was_told(self, sampler: PictureSampler, rows: int) -> None:
        """Whatever is on its way when it comes; one call takes a second here."""
        chance = random.Random(rows)
        for _ in range(40):
            running = engine(sampler, 4, seconds=1.0)
            for _ in range(chance.randint(1, 5)):
                running.submit(random_job(chance, rows).job)
                for _ in range(chance.randint(0, 4)):
                    running.step()
            last = random_job(chance, rows)
            running._slowness = 1.0  # what a call really takes does not matter here
            expected, calls = running.submit(last.job), 0
            while Finished() not in last.events:
                calls += running.step()
            assert calls <= expected + 1e-9

    def test_one_step_after_the_other_takes_its_time(self, sampler: PictureSampler) -> None:
        running = engine(sampler, 1, 8, seconds=1.0)
        with pytest.raises(Refused):  # one picture of 4 steps: 4 calls, however large they could be
            running.submit(Told(PLAIN, [1], deadline=time.monotonic() + 3).job)

    def test_a_deadline_that_passes_ends_the_job(self, sampler: PictureSampler) -> None:
        late, other = Told(PLAIN, [1], deadline=time.monotonic() + 0.2), Told(PLAIN, [2])
        running = engine(sampler, 1, seconds=0.001)
        running.submit(late.job)
        time.sleep(0.25)
        run(running, other)
        assert late.events == [Finished("deadline_s: has passed before all was drawn", late=True)]
        assert len(other.of(Drawn)) == 1

    def test_guidance_needs_two_rows(self, sampler: PictureSampler) -> None:
        with pytest.raises(Refused, match="guidance needs batches of 2"):
            engine(sampler, 1).submit(Told(GUIDED, [1]).job)

    def test_settings_that_cannot_work_are_told_as_such(self, sampler: PictureSampler) -> None:
        with pytest.raises(RequestError, match=r"^num_inference_steps=5000: must be 1 to 1000"):
            engine(sampler, 1).submit(Told(SamplerConfig(num_inference_steps=5000), [1]).job)


class TestSources:
    def test_interpolation_is_that_of_the_offline_sampler(self, url: str, sampler: PictureSampler) -> None:
        blend = Blend(torch.full((3,), 5), torch.full((3,), 9), torch.tensor([0.0, 0.5, 1.0]))
        told = Told(PLAIN, [5, 5, 5], [1, 1, 1], source=blend)
        run(engine(sampler, 4), told)
        expected = load_sampler(url, 4, "cpu").draw(torch.tensor([1, 1, 1]), torch.tensor([5, 5, 5]), PLAIN, blend)
        assert torch.equal(told.pictures, expected)
        ends = [Told(PLAIN, [seed], [1]) for seed in (5, 9)]
        run(engine(sampler, 4), *ends)
        assert torch.equal(told.pictures[0], ends[0].pictures[0])
        assert torch.equal(told.pictures[2], ends[1].pictures[0])

    def test_image_to_image_is_that_of_the_offline_sampler(self, url: str, sampler: PictureSampler) -> None:
        given = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        edit = Edit(given, 0.5)
        told = Told(NOISY, [3, 4], [1, 2], source=edit)
        run(engine(sampler, 4), told)
        expected = load_sampler(url, 4, "cpu").draw(torch.tensor([1, 2]), torch.tensor([3, 4]), NOISY, edit)
        assert torch.equal(told.pictures, expected)
        assert told.job.steps == 2  # of 5, rounded


@pytest.mark.parametrize("sampler_name", ["euler", "heun"])
def test_a_flow_is_drawn_as_off_line(url: str, sampler: PictureSampler, sampler_name: Any) -> None:
    settings, flow = SamplerConfig(num_inference_steps=5, sampler=sampler_name), DiffusionConfig(schedule="flow")
    sampler.diffusion = flow
    told = Told(settings, [1, 2, 3])
    run(engine(sampler, 4), told)
    reference = load_sampler(url, 4, "cpu")
    reference.diffusion = flow
    expected = reference.draw(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]), settings)
    assert torch.equal(told.pictures, expected)


def test_an_unconditional_model(tmp_path: Path) -> None:
    url = write_tiny_snapshot(tmp_path / "plain", Conditioning())
    told = Told(PLAIN, [1, 2])
    told.job.labels = None
    run(engine(load_sampler(url, 1, "cpu"), 4), told)
    expected = load_sampler(url, 4, "cpu").draw(None, torch.tensor([1, 2]), PLAIN)
    assert torch.equal(told.pictures, expected)


class TestBuckets:
    def test_of_a_size_that_is_given(self, sampler: PictureSampler) -> None:
        assert list(measure_buckets(sampler, 6)) == [1, 2, 4, 6]
        assert list(measure_buckets(sampler, 1)) == [1]

    def test_the_smallest_that_is_fast_enough_is_found(self, sampler: PictureSampler, monkeypatch: Any) -> None:
        takes = {1: 1.0, 2: 1.1, 4: 1.5, 8: 2.9, 16: 6.5}
        monkeypatch.setattr("ldm.buckets._seconds", lambda sampler, rows: takes[rows])
        assert measure_buckets(sampler) == {1: 1.0, 2: 1.1, 4: 1.5}  # 8 rows are 3% faster, 16 slower

    def test_of_what_does_not_fit_the_largest_that_does_is_taken(
        self, sampler: PictureSampler, monkeypatch: Any
    ) -> None:
        def seconds(sampler: PictureSampler, rows: int) -> float:
            if rows > 8:
                raise torch.OutOfMemoryError("no room")
            return 1.0

        monkeypatch.setattr("ldm.buckets._seconds", seconds)
        assert list(measure_buckets(sampler)) == [1, 2, 4, 8]
        with pytest.raises(torch.OutOfMemoryError):
            measure_buckets(sampler, 16)
