"""Train the demo model from scratch: `python -m training.train --out runs/demo`. Resumable: call it again."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, InternVLForConditionalGeneration

from training.batch import IGNORE, Batch, BatchMaker
from training.heads import Heads
from training.model import build_model
from training.tokenizer import build_tokenizer

Stages = tuple[tuple[float, int, int], ...]
# (share of the steps, fewest frames, most frames): clips grow with training; started long, the model stays at the
# answer prior.
CURRICULUM: Stages = ((0.18, 2, 8), (0.17, 6, 16), (0.25, 12, 48), (0.40, 32, 192))
# For a run that goes on from a finished one.
REFINEMENT: Stages = ((0.12, 4, 16), (0.28, 12, 64), (0.60, 48, 224))
REVIEW = 0.35  # share of the later steps that go back to a shorter stage; without, its answers are forgotten


def attention_in_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention outside of autocast: on a CPU the backward pass in bfloat16 takes four times as long."""
    grouped = query.shape[1] != key.shape[1]
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=attention_mask, scale=scaling, enable_gqa=grouped
        )
    return mixed.transpose(1, 2).contiguous(), None


def clip_length(rng: np.random.Generator, progress: float, stages: Stages) -> int:
    """Frames per clip at `progress` in 0…1, log-uniform inside the stage or an earlier one."""
    ends = np.cumsum([share for share, _, _ in stages])
    stage = min(int(np.searchsorted(ends, progress, side="right")), len(stages) - 1)
    if rng.random() < REVIEW:
        stage = int(rng.integers(stage + 1))
    _, fewest, most = stages[stage]
    return round(math.exp(rng.uniform(math.log(fewest), math.log(most))))


def loss_of(model: InternVLForConditionalGeneration, heads: Heads, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the answers' tokens, and that of the readings (`training.heads`)."""
    inner, embedding = model.model, model.model.get_input_embeddings()
    embeds = embedding(batch.input_ids)
    pictures = inner.get_image_features(batch.pixels, return_dict=True).pooler_output
    spots = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(spots, pictures.to(embeds.dtype))
    bias = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, -1e9)
    found = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=bias,
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    answered = batch.labels != IGNORE
    answers = F.cross_entropy(model.lm_head(found.last_hidden_state[answered]).float(), batch.labels[answered])
    return answers, heads(pictures, found.hidden_states, embedding.weight, batch)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def batches(
    maker: BatchMaker, stages: Stages, seed: int, start: int, stop: int, steps: int, frames_per_step: int
) -> Iterator[tuple[int, int, Batch]]:
    for step in range(start, stop):
        rng = np.random.default_rng([seed, step])
        frames = clip_length(rng, step / steps, stages)
        clips = max(3, min(36, frames_per_step // frames))
        yield step, frames, maker.make(rng, clips, frames)


def train(
    out: Path,
    init: Path | None,
    stages: Stages,
    steps: int,
    seed: int,
    peak: float,
    frames_per_step: int,
    threads: int,
    stop: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    AttentionInterface.register("float32", attention_in_float32)
    model.set_attn_implementation("float32")
    heads = Heads(model, tokenizer)
    both = torch.nn.ModuleList([model, heads])
    optimiser = torch.optim.AdamW(both.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    out.mkdir(parents=True, exist_ok=True)
    saved, start = out / "state.pt", 0
    if init is not None and not saved.exists():
        begun = torch.load(init / "state.pt", weights_only=True)
        model.load_state_dict(begun["model"])
        heads.load_state_dict(begun["heads"], strict=False)  # a run of before may lack a reading
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {start} to {steps}", flush=True)
    began, losses = time.perf_counter(), []
    made = batches(BatchMaker(tokenizer), stages, seed, start, stop or steps, steps, frames_per_step)
    for step, frames, batch in made:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16):
            answers, readings = loss_of(model, heads, batch)
        optimiser.zero_grad(set_to_none=True)
        (answers + 0.3 * readings).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        losses.append((answers.item(), readings.item()))
        if (step + 1) % 50 == 0:
            pace = (time.perf_counter() - began) / (step + 1 - start)
            answer_loss, reading_loss = np.mean(losses[-50:], axis=0)
            told = f"answers {answer_loss:.4f} readings {reading_loss:.4f}"
            print(f"step {step + 1} frames {frames} {told} {pace:.3f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == (stop or steps):
            state = {
                "model": model.state_dict(),
                "heads": heads.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step + 1,
            }
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--init", type=Path, help="another run whose weights to begin with")
    parser.add_argument("--refine", action="store_true", help="longer clips from the start, after --init")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--stop", type=int, default=0, help="stop early at this step (the schedule stays)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--frames-per-step", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    stages = REFINEMENT if args.refine else CURRICULUM
    train(
        args.out,
        args.init,
        stages,
        args.steps,
        args.seed,
        args.lr,
        args.frames_per_step,
        args.threads,
        args.stop,
    )


if __name__ == "__main__":
    main()
