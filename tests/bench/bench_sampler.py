"""How fast sampling is beside the machine's own matmul, beside diffusers, and beside DDPM.

    python tests/bench/bench_sampler.py PART [rounds]     two cores, some minutes each; needs a C++ compiler

PART: rates (beside matmul and diffusers, and the sampler's own share) or ddpm (DDIM-50 beside DDPM-1000).

DiT-S/2 on latents (4, 32, 32), guidance on, bf16, DDIM. All sides take turns in one run; figures are medians, ratios
are medians of the rounds' ratios. The denoiser's weights are random.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.plan import SamplerConfig, SamplingPlan, make_plan
from ldm.sampler import guided, sample_latents

PICTURES, STEPS, CLASSES = 8, 1, 1000
D, DEPTH, TOKENS = 384, 12, 256
FLOP_PER_ROW = 2 * DEPTH * TOKENS * (12 * D * D + 2 * TOKENS * D)  # the products of the blocks, which is 0.99 of all
MATMUL = 2 * 4096 * 384 * 1536
NOISE = torch.randn(PICTURES, 4, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(PICTURES)


def rates(rounds: int) -> None:
    plain = dit()
    compiled = dit()
    compiled.compile()
    theirs = diffusers_dit(plain)
    plan = make_plan(DiffusionConfig(), SamplerConfig(num_inference_steps=50))
    part = SamplingPlan(plan.steps[:STEPS], plan.prediction_type, STEPS)
    x, weight = torch.randn(4096, 384).bfloat16(), torch.randn(1536, 384).bfloat16()
    rows = torch.cat([NOISE, NOISE]).bfloat16(), torch.full((2 * PICTURES,), 999), torch.cat([LABELS, LABELS])
    answer = compiled(*rows)
    sides: dict[str, Callable[[], object]] = {
        "matmul": lambda: [F.linear(x, weight) for _ in range(20)],
        "compiled": lambda: ours(compiled, part),
        "plain": lambda: ours(plain, part),
        "diffusers": lambda: diffusers_steps(theirs),
        "forward": lambda: [compiled(*rows) for _ in range(STEPS)],
        "no denoiser": lambda: ours(lambda x, t, labels: answer, part),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    report(seconds)


def report(seconds: dict[str, list[float]]) -> None:
    flop = {name: 2 * PICTURES * STEPS * FLOP_PER_ROW for name in seconds} | {"matmul": 20 * MATMUL}
    for name in ("matmul", "compiled", "plain", "diffusers", "forward"):
        median = statistics.median(seconds[name])
        steps = "" if name == "matmul" else f", {PICTURES * STEPS / median:6.1f} image-steps/s"
        print(f"{name:10} {flop[name] / median / 1e9:7.1f} GFLOP/s{steps}")
    for name in ("compiled", "plain", "diffusers"):
        rates = [m / s * flop[name] / flop["matmul"] for m, s in zip(seconds["matmul"], seconds[name], strict=True)]
        print(f"{name} / matmul: {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})")
    for name in ("compiled", "plain"):
        ratios = [d / s for d, s in zip(seconds["diffusers"], seconds[name], strict=True)]
        print(f"{name} / diffusers: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    shares = [n / f for n, f in zip(seconds["no denoiser"], seconds["forward"], strict=True)]
    print(f"sampler and guidance / the denoiser's own forward: {statistics.median(shares):.2%}")


def ddim_beside_ddpm() -> None:
    """One picture by DDIM-50 and by DDPM-1000, without guidance, of a DiT-S/2 with 3 of its 12 blocks.

    The thousand steps run in twenty parts, each beside a whole DDIM-50. CPU seconds of one thread: other work on the
    machine does not count.
    """
    torch.set_num_threads(1)
    denoiser = dit(depth=3)
    plans = {
        "ddim": make_plan(DiffusionConfig(), SamplerConfig(num_inference_steps=50)),
        "ddpm": make_plan(DiffusionConfig(), SamplerConfig(num_inference_steps=1000, sampler="ddpm")),
    }
    seconds: dict[str, list[float]] = {"ddim": [], "ddpm": []}
    for i in range(21):
        for name, plan in plans.items():
            first = 50 * max(0, i - 1) if name == "ddpm" else 0
            steps = plan.steps[first : first + 50]
            started = time.thread_time()
            ours(denoiser, SamplingPlan(steps, plan.prediction_type, len(steps)), pictures=1, guidance_scale=1.0)
            if i:  # the first of each warms up
                seconds[name].append(time.thread_time() - started)
    ddim = statistics.median(seconds["ddim"])
    print(f"a picture: DDPM-1000 {sum(seconds['ddpm']):.1f} s, DDIM-50 {ddim:.2f} s (median of 20)")
    ratios = [20 * ddpm / ddim for ddpm, ddim in zip(seconds["ddpm"], seconds["ddim"], strict=True)]
    print(f"DDPM-1000 / DDIM-50: {statistics.median(ratios):.1f}")


def dit(depth: int = DEPTH) -> nn.Module:
    denoiser = build_denoiser(DenoiserConfig(depth=depth), in_channels=4, sample_size=(32, 32), num_classes=CLASSES)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():  # a fresh one answers 0
        parameter.data.normal_(std=0.02, generator=generator)
    return denoiser.eval().requires_grad_(False).bfloat16()


def ours(
    denoiser: Callable[..., Tensor], plan: SamplingPlan, pictures: int = PICTURES, guidance_scale: float = 4.0
) -> Tensor:
    def in_bf16(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return denoiser(x.bfloat16(), t, labels)

    guide = guided(in_bf16, LABELS[:pictures], guidance_scale, CLASSES)
    noise = NOISE[:pictures]
    return sample_latents(guide, noise, plan, noise_fn=lambda step: noise)


def diffusers_steps(transformer: nn.Module) -> Tensor:
    """The loop of DiTPipeline, without its decoder."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    labels = torch.cat([LABELS, torch.full_like(LABELS, CLASSES)])
    x = torch.cat([NOISE, NOISE]).bfloat16()
    for t in scheduler.timesteps[:STEPS]:
        half = x[:PICTURES]
        output = transformer(torch.cat([half, half]), timestep=t.expand(len(x)), class_labels=labels).sample
        conditional, null = output.chunk(2)
        guided_output = null + 4.0 * (conditional - null)
        x = scheduler.step(torch.cat([guided_output, guided_output]), t, x).prev_sample
    return x


def diffusers_dit(denoiser: nn.Module) -> nn.Module:
    """The same weights in diffusers' class."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        num_layers=DEPTH,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    mine, theirs = denoiser.state_dict(), {}
    pairs = {"pos_embed.proj": "patch_embedding", "proj_out_1": "final.modulation", "proj_out_2": "final.linear"}
    for i in range(DEPTH):
        block = f"transformer_blocks.{i}"
        pairs |= {
            f"{block}.norm1.emb.timestep_embedder.linear_1": "timestep_embedding.hidden",
            f"{block}.norm1.emb.timestep_embedder.linear_2": "timestep_embedding.out",
            f"{block}.norm1.linear": f"blocks.{i}.modulation",
            f"{block}.attn1.to_out.0": f"blocks.{i}.attention_out",
            f"{block}.ff.net.0.proj": f"blocks.{i}.mlp.0",
            f"{block}.ff.net.2": f"blocks.{i}.mlp.2",
        }
        theirs[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = mine["label_embedding.weight"]
        for kind in ("weight", "bias"):
            for name, tensor in zip("qkv", mine[f"blocks.{i}.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{block}.attn1.to_{name}.{kind}"] = tensor
    for name, of in pairs.items():
        theirs |= {f"{name}.{kind}": mine[f"{of}.{kind}"] for kind in ("weight", "bias")}
    theirs["pos_embed.proj.weight"] = mine["patch_embedding.weight"].unflatten(1, (2, 2, 4)).permute(0, 3, 1, 2)
    theirs["pos_embed.pos_embed"] = model.pos_embed.pos_embed
    model.load_state_dict(theirs, strict=False)
    assert set(dict(model.named_parameters())) <= set(theirs), "a weight has no counterpart"
    return model.eval().requires_grad_(False).bfloat16()


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    if sys.argv[1] == "rates":
        rates(int(sys.argv[2]) if len(sys.argv) > 2 else 30)
    else:
        ddim_beside_ddpm()
