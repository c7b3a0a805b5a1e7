"""The demo model's transformer and text encoder, and how they are trained together."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from demo_training.run import LATENT_CHANNELS, Deadline, Progress, attention_backends, autocast, set_rate, wait
from demo_training.vae import LatentPool
from dit_sparse.demo.clips import ClipSpec, caption, vocabulary
from dit_sparse.demo.tokenizer import SPECIAL_TOKENS, make_tokenizer

log = logging.getLogger("train_demo")

TEXT_DIM = 128
PIPELINE_TEXT_LENGTH = 512  # WanPipeline's default max_sequence_length: cross-attention sees the zero padding too
CAPTION_TOKENS = 40
FLOW_SHIFT = 3.0
OPENING_FRAMES = 2  # latent frames: five frames of a clip


class Denoiser(nn.Module):
    """WanTransformer3DModel with the UMT5 encoder that is trained beside it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.text = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(vocabulary()) + len(SPECIAL_TOKENS),
                d_model=TEXT_DIM,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=128,
            ffn_dim=768,
            num_layers=layers,
        )
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the text embedding `[B, 512, 128]` exactly as WanPipeline makes it: zero beyond the last token."""
        hidden = self.text(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
        return F.pad(hidden, (0, 0, 0, PIPELINE_TEXT_LENGTH - ids.shape[1]))

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.transformer(noisy, timestep, self.embed(ids, mask), return_dict=False)[0]


class Captioner:
    """Turns clips into token ids: fresh wording every time, some captions empty, some with unknown words."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.tokenizer = make_tokenizer(vocabulary())
        self.rng = np.random.default_rng(seed)
        self.device = device

    def __call__(self, specs: list[ClipSpec]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, int64 `[B, CAPTION_TOKENS]`."""
        texts = ["" if self.rng.random() < 0.1 else caption(spec, self.rng) for spec in specs]
        batch = [self._with_unknown_words(ids) for ids in self.tokenizer(texts).input_ids]
        ids = torch.zeros(len(batch), CAPTION_TOKENS, dtype=torch.long)
        for row, tokens in zip(ids, batch, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        ids = ids.to(self.device, non_blocking=True)
        return ids, (ids != 0).long()

    def _with_unknown_words(self, ids: list[int]) -> list[int]:
        """Put one to three `<unk>` into one of ten captions, so that a word the model does not know is harmless."""
        if len(ids) > 1 and self.rng.random() < 0.1:
            for _ in range(int(self.rng.integers(1, 4))):
                ids.insert(int(self.rng.integers(len(ids))), SPECIAL_TOKENS.index("<unk>"))
        return ids


class Trainer:
    """The denoiser, its moving average and its two optimizers."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.progress = progress
        self.device = device
        self.net = Denoiser(progress.layers).to(device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        named = dict(self.net.named_parameters())
        self.matrices = {n: p for n, p in named.items() if n.startswith("transformer.blocks") and p.ndim == 2}
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.muon = torch.optim.Muon(
            self.matrices.values(), lr=2e-3, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            self.others.values(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0, fused=device.type == "cuda"
        )
        self.captioner = Captioner(progress.clips_drawn, device)
        self.order = np.random.default_rng(progress.clips_drawn + 1)

    @property
    def steps(self) -> int:
        return self.progress.coarse_steps + self.progress.opening_steps + self.progress.full_steps

    def run(
        self,
        pool: LatentPool,
        batch: int,
        seconds: float,
        schedule: Callable[[float], float],
        openings_until: float = 0.0,
    ) -> int:
        """Train for `seconds`; `schedule` maps the span's fraction to a factor of the learning rates.

        Until the fraction `openings_until`, every other step sees only the openings of clips, and as many more of them
        as make the same number of tokens. With fewer frames to average over, the noise hides the shapes for longer, so
        that the caption has to be read; and attention over fewer tokens costs a fraction.

        Returns:
            The number of steps taken, openings among them.
        """
        deadline = Deadline(seconds)
        openings = pool.openings(OPENING_FRAMES)
        openings_batch = batch * pool.latents.shape[2] // openings.latents.shape[2]
        losses: list[Tensor] = []
        parameters = list(self.net.parameters())
        averages = list(self.ema.parameters())
        first = self.steps
        taken = 0
        while deadline.left > 0:
            # A short warm-up after every start: the optimizers' resumed state is rounded.
            warm_up = min(1.0, (first + taken + 1) / 100, (taken + 1) / 30)
            rate = warm_up * schedule(deadline.fraction)
            set_rate(self.muon, 2e-3 * rate)
            set_rate(self.adamw, 1.5e-3 * rate)
            if taken % 2 == 1 and deadline.fraction < openings_until:
                self.step(openings, openings_batch)
                self.progress.opening_steps += 1
            else:
                losses.append(self.step(pool, batch))
            taken += 1
            decay = min(0.998, (first + taken) / (first + taken + 9))
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - decay)
            if taken in (1, 5, 20) or taken % 50 == 0:
                self.progress.loss = round(torch.stack(losses).mean().item(), 5)
                losses.clear()
                log.info(
                    "step %d  loss %.4f  rate x%.3f  %.3f s/step",
                    first + taken,
                    self.progress.loss,
                    rate,
                    deadline.elapsed / taken,
                )
        wait(self.device)
        return taken

    def step(self, pool: LatentPool, batch: int) -> Tensor:
        """Take one optimizer step on the flow-matching loss, and return that loss."""
        chosen = self.order.integers(0, len(pool.specs), batch)
        clean = pool.latents[torch.from_numpy(chosen).to(self.device, non_blocking=True)].float()
        ids, mask = self.captioner([pool.specs[i] for i in chosen])
        # Stratified over the batch: every step sees all noise levels.
        uniform = (torch.arange(batch, device=self.device) + torch.rand(batch, device=self.device)) / batch
        sigma = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
        noise = torch.randn_like(clean)
        level = sigma.view(-1, 1, 1, 1, 1)
        with autocast(self.device), attention_backends(self.device):
            predicted = self.net((1 - level) * clean + level * noise, sigma * 1000, ids, mask)
        loss = F.mse_loss(predicted.float(), noise - clean)
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.muon.step()
        self.adamw.step()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs; what is only an average or a momentum is kept in 16 bits."""
        tensors = {f"net.{n}": p.detach().float() for n, p in self.net.named_parameters()}
        tensors |= {f"ema.{n}": p.half() for n, p in self.ema.named_parameters()}
        for name, parameter in self.matrices.items():
            if state := self.muon.state.get(parameter):
                tensors[f"muon.{name}"] = state["momentum_buffer"].bfloat16()
        for name, parameter in self.others.items():
            if state := self.adamw.state.get(parameter):
                tensors[f"adamw.first.{name}"] = state["exp_avg"].bfloat16()
                tensors[f"adamw.second.{name}"] = state["exp_avg_sq"].bfloat16()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for prefix, module in (("net", self.net), ("ema", self.ema)):
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"{prefix}.{name}"])
        for name, parameter in self.matrices.items():
            if f"muon.{name}" in tensors:
                momentum = tensors[f"muon.{name}"].to(parameter)
                self.muon.state[parameter] = {"momentum_buffer": momentum}
        for name, parameter in self.others.items():
            if f"adamw.first.{name}" in tensors:
                self.adamw.state[parameter] = {
                    "step": torch.tensor(float(self.steps), device=self.device),
                    "exp_avg": tensors[f"adamw.first.{name}"].to(parameter),
                    "exp_avg_sq": tensors[f"adamw.second.{name}"].to(parameter),
                }


@dataclass(frozen=True)
class Span:
    """The part of the full-grid stage that one call trains, as fractions of the whole stage."""

    start: float
    until: float

    def learning_rate(self, fraction: float) -> float:
        """Return the learning rates' factor: constant, then linear to nearly 0 over the stage's last 65%."""
        done = self.start + (self.until - self.start) * fraction
        return 0.01 + 0.99 * min(1.0, (1 - done) / 0.65)

    def ends(self, done: float) -> float:
        """Return where in this span, as its fraction, the whole stage has come to `done`."""
        return (done - self.start) / (self.until - self.start)
