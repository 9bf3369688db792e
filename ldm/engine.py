"""Sampling step by step: pictures of many requests share each call of the denoiser, each at a step of its own plan.

A picture enters and leaves the batch between two calls, so that one of 10 steps never waits for one of 50, and a
cancelled one is gone at the next call. Calls are padded to a few batch shapes (buckets): a picture's bits depend on the
shape of its calls, never on its neighbours, and compiled code is used again. No Ray, no threads of its own.

Whose turn it is: `ldm.sharing`.
"""

import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm import sampler as sampling
from ldm.drawing import Edit, PictureSampler
from ldm.job import Drawn, Finished, Job, Picture, Preview, Progress
from ldm.plan import make_plan
from ldm.sharing import FairShare, Refused

PLANNED = 0.8
"""Share of the time to a deadline that is given away: the rest is for a machine that is slower than it was."""


class StepEngine:
    """Draws jobs with one sampler. `submit` and `cancel` may be called from any thread, `step` from one.

    buckets: the batch shapes, rising; the last is the most rows in one call. seconds: of a call in each bucket, as
    measured (`measure_buckets`). max_jobs: as many wait and run at a time. last_call: rows, bucket and seconds of the
    denoiser's last call.
    """

    def __init__(self, sampler: PictureSampler, seconds: dict[int, float], max_jobs: int) -> None:
        self.sampler, self.max_jobs = sampler, max_jobs
        self.seconds = dict(sorted(seconds.items()))
        self.buckets = list(self.seconds)
        self.capacity = self.buckets[-1]
        self.last_call: tuple[int, int, float] | None = None
        self._slowness = 1.0  # of a call, beside what was measured
        self._share: FairShare[Job] = FairShare()
        self._lock = threading.Lock()

    @property
    def jobs(self) -> list[Job]:
        """Those that are here, in the order in which they are served."""
        with self._lock:
            return self._share.in_order()

    def submit(self, job: Job) -> float:
        """Takes a job; returns the seconds after which it is expected to be done.

        Raises RequestError where model and settings do not go together, Refused where there is no room, or where a
        deadline, its own or another job's, could not be kept.
        """
        job.plan = make_plan(
            self.sampler.diffusion, job.settings, job.source.strength if isinstance(job.source, Edit) else 1.0
        )
        if job.rows > self.capacity:
            raise Refused(f"guidance needs batches of 2, the largest here is {self.capacity}", 60.0)
        with self._lock:
            expected = self._expected_with(job)
            self._share.add(job, job.work_left)
            return expected

    def cancel(self, job: Job) -> None:
        """The job's pictures are in no call that begins after this. It emits no further event but of a running call."""
        with self._lock:
            self._share.remove(job, done=False)

    def step(self) -> bool:
        """One call of the denoiser for as many pictures as there is room for; False where there is nothing to do.

        Whatever goes wrong ends the jobs that took part, and no other.
        """
        with self._lock:
            late = [
                job for job in self._share.in_order() if job.deadline is not None and job.deadline < time.monotonic()
            ]
            chosen = self._choose([job for job in self._share.in_order() if job not in late])
        for job in late:
            self._end(job, Finished("deadline_s: has passed before all was drawn", late=True))
        if not chosen:
            return False
        try:
            began = time.perf_counter()
            self._advance(chosen)
            self._measured(time.perf_counter() - began)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            for job in {picture.job for picture in chosen}:
                self._end(job, Finished(text))
        return True

    def _choose(self, jobs: Sequence[Job]) -> list[Picture]:
        """Jobs in their order, each with as many pictures as there is room for."""
        room, chosen = self.capacity, []
        for job in jobs:
            pictures = job.pictures()
            while room >= job.rows and (picture := next(pictures, None)) is not None:
                chosen.append(picture)
                room -= job.rows
            if room == 0:
                break
        return chosen

    @torch.no_grad()
    def _advance(self, pictures: list[Picture]) -> None:
        """One step of each picture, and what is told of it."""
        self._start([picture for picture in pictures if picture.x is None])
        x = torch.stack([_given(picture.x) for picture in pictures])
        steps = [picture.job.plan.steps[picture.step] for picture in pictures]
        answer = self._denoise(pictures, x, sampling.timesteps(steps, x))
        fresh = self._fresh(pictures) if any(step.sigma for step in steps) else None
        before = torch.stack(
            [x_ if picture.x0 is None else picture.x0 for picture, x_ in zip(pictures, x, strict=True)]
        )
        prediction = self.sampler.diffusion.prediction_type
        x, x0 = sampling.step(answer, x, steps, prediction, x0_before=before, noise=fresh)
        for picture, new, clean in zip(pictures, x, x0, strict=True):
            picture.x, picture.x0, picture.step = new, clean, picture.step + 1
            picture.job.steps_done += 1
        with self._lock:
            self._share.served(sum(picture.job.rows for picture in pictures))
        self._show(pictures)
        self._finish([picture for picture in pictures if picture.step == picture.job.steps])
        for job in {picture.job: None for picture in pictures}:
            job.emit(Progress(job.steps_done, job.images_done))
            if job.images_done == len(job.seeds):
                self._end(job, Finished())

    def _start(self, pictures: list[Picture]) -> None:
        """Where each picture starts, from its seed alone or from its job's source."""
        plain = [picture for picture in pictures if picture.job.source is None]
        if plain:
            seeds = torch.stack([picture.job.seeds[picture.index] for picture in plain]).to(self.sampler.device)
            noise = sampling.initial_noise(seeds, self.sampler.latent_shape)
            for picture, x in zip(plain, noise, strict=True):
                picture.x = x
        for picture in pictures:
            if picture.job.source is not None:
                picture.x = self.sampler.start(picture.job.plan, picture.job.seeds, picture.job.source, picture.index)

    def _denoise(self, pictures: list[Picture], x: Tensor, t: Tensor) -> Tensor:
        """The guided answers for x (n, C, h, w) at t (n,): one call, padded to a bucket."""
        total = self.sampler.diffusion.num_train_timesteps
        guided = [
            i
            for i, (picture, now) in enumerate(zip(pictures, t.tolist(), strict=True))
            if picture.job.rows == 2
            and total * picture.job.settings.guidance_interval[0]
            <= now
            <= total * picture.job.settings.guidance_interval[1]
        ]
        rows, count = [*range(len(pictures)), *guided], len(pictures)
        exact = any(picture.job.exact for picture in pictures)
        bucket = self.capacity if exact else next(size for size in self.buckets if size >= len(rows))
        padded = rows + [0] * (bucket - len(rows))
        labels = self._labels(pictures, guided, bucket)
        began = time.perf_counter()
        answer = self.sampler.denoise(x[padded], t[padded], labels)[: len(rows)]
        if answer.device.type == "cuda":
            torch.cuda.synchronize(answer.device)
        self.last_call = (len(rows), bucket, time.perf_counter() - began)
        if not guided:
            return answer
        settings = [pictures[i].job.settings for i in guided]
        scales, rescales = [s.guidance_scale for s in settings], [s.guidance_rescale for s in settings]
        conditional = answer[:count]
        conditional[guided] = sampling.guide(conditional[guided], answer[count:], scales, rescales)
        return conditional

    def _labels(self, pictures: list[Picture], guided: list[int], bucket: int) -> Tensor | None:
        """Each picture's label, the null class for each guided one, padding: int64 (bucket,)."""
        if self.sampler.conditioning.type != "class":
            return None
        own = [0 if p.job.labels is None else int(p.job.labels[p.index]) for p in pictures]
        null = [self.sampler.conditioning.num_classes] * len(guided)
        padding = [0] * (bucket - len(own) - len(null))
        return torch.tensor(own + null + padding, device=self.sampler.device)

    def _fresh(self, pictures: list[Picture]) -> Tensor:
        """The noise of each picture's own step."""
        seeds = torch.stack([picture.job.seeds[picture.index] for picture in pictures]).to(self.sampler.device)
        steps = torch.tensor([picture.step for picture in pictures], device=self.sampler.device)
        return sampling.step_noise(seeds, self.sampler.latent_shape)(steps)

    def _show(self, pictures: list[Picture]) -> None:
        for picture in pictures:
            job, done = picture.job, picture.step
            if done < job.steps and done in {job.steps * i // (job.previews + 1) for i in range(1, job.previews + 1)}:
                pixels = self.sampler.decode(_given(picture.x0)[None])[0]
                job.emit(Preview(picture.index, done, pixels))

    def _finish(self, pictures: list[Picture]) -> None:
        if not pictures:
            return
        pixels = self.sampler.decode(torch.stack([_given(picture.x) for picture in pictures]))
        for picture, drawn in zip(pictures, pixels, strict=True):
            picture.job.running.remove(picture)
            picture.job.images_done += 1
            picture.job.emit(Drawn(picture.index, drawn))

    def _end(self, job: Job, how: Finished) -> None:
        with self._lock:
            self._share.remove(job, done=how.problem is None)
        job.emit(how)

    def _measured(self, seconds: float) -> None:
        """A call took so long with all that belongs to it: what is decoded, and what is told."""
        assert self.last_call is not None
        _, bucket, _ = self.last_call
        # One factor for all buckets: what slows a machine down slows them all, those too that are not in use now. One
        # call that is far out moves it by a tenth at most.
        seen = min(seconds / self.seconds[bucket], 2 * self._slowness)
        self._slowness += 0.1 * (seen - self._slowness)

    def _expected_with(self, new: Job) -> float:
        """Seconds until the job would be done. Raises Refused."""
        jobs = self._share.in_order()
        if not jobs:
            self._slowness = 1.0  # of a while ago; and a request that is refused for it would leave it as it is
        if len(jobs) >= self.max_jobs:
            raise Refused("as many requests wait as may wait; try again in a moment", self._duration(jobs) / len(jobs))
        now, expected = time.monotonic(), 0.0
        others = sum(job.rows_left for job in jobs)
        retry_after = max(1.0, self._duration(jobs))
        work, rows = 0, 0  # of those ahead, without the new job
        behind = False
        for job in self._share.in_order_with(new, new.work_left):
            ahead = (work + new.work_left, rows + new.rows_left) if behind else (work, rows)
            seconds = self._seconds_for(job, *ahead, wanted=others + new.rows_left)
            if job is new:
                expected, behind = seconds, True
            if job.deadline is not None and seconds > PLANNED * (job.deadline - now):
                if job is new:
                    raise Refused("the deadline could not be kept; try again in a moment", retry_after)
                # Also where that one is late by itself: nobody passes it then.
                if self._seconds_for(job, work, rows, wanted=others) < seconds:
                    raise Refused("an earlier request's deadline could not be kept; try again in a moment", retry_after)
            if job is not new:
                work, rows = work + job.work_left, rows + job.rows_left
        return expected

    def _duration(self, jobs: Sequence[Job]) -> float:
        """Seconds until all are done, were every call full."""
        each, filled = self._call(sum(job.rows_left for job in jobs))
        return each * sum(job.work_left for job in jobs) / filled

    def _seconds_for(self, job: Job, work: int, rows: int, wanted: int) -> float:
        """Seconds until the job is done, behind so much work of so many rows, while `wanted` rows want a place in all.

        Graham's bound for list scheduling ("Bounds for certain multiprocessing anomalies", 1966): a call either takes
        the job's last picture a step on or is full of what is ahead of that. Where all have room, nobody waits.
        """
        each, filled = self._call(wanted)
        if rows + job.rows_left <= filled:
            return each * job.longest_left
        return each * ((work + job.work_left) / filled + job.longest_left * max(0.0, 1 - job.rows / filled))

    def _call(self, rows: int) -> tuple[float, int]:
        """Seconds of a call while `rows` want a place, and the pictures' rows in it: it costs the same with fewer."""
        bucket = next((size for size in self.buckets if size >= rows), self.capacity)
        return self._slowness * self.seconds[bucket], max(1, min(rows, bucket))


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
